"""Generation speed of `TorchEngine`, transformers, llama.cpp and vLLM on one dense model, in turn.

    python benchmarks/generation.py [--model PATH] [--gguf FILE] [--batch 1 8 32] [--queue 64]
        [--sides tessera "llama.cpp Q4_1" ...] [--threads 2] [--vllm .venv-vllm/bin/python]

Greedy, the same token ids, a fixed number of new tokens a request (stop tokens off); everybody may
run 32 at a time. The engines take turns, so that all see the same neighbours on a shared machine;
figures are medians over rounds, ratios medians of the rounds' ratios, and CPU seconds of the
engine's own process the steadier clock. In the queue, prompts and completions have ragged lengths,
and transformers' `generate` gets them sorted by what nobody knows beforehand, the lengths of the
completions. tessera's int8 is that of its large matrices, with the rest in bfloat16. llama.cpp has
flash attention, its defaults, and all threads. The model is SmolLM2-135M-Instruct unless named, a
Hugging Face directory or a GGUF file, which then runs as it is, too ("original"); F32, BF16 and
Q8_0 are written from it. All sides at once hold 9 GB. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import harness
import torch
import transformers
from gguf.scripts.gguf_new_metadata import copy_with_new_metadata
from harness import ROOT, Command, Figures, alternate, median, ratio, smollm2, table
from harness import VLLM as VLLM_PYTHON
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tessera.export.write import export_model
from tessera.generate.engine import GenerationRequest, SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.placement import Placement

sys.path.insert(0, str(ROOT))

from tests.export.interop import LlamaCpp, write_byte_tokenizer  # noqa: E402

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SIDES = (
    *("tessera", "tessera bfloat16", "tessera int8", "transformers", "transformers bfloat16"),
    *("llama.cpp F32", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp original"),
    *("vLLM", "vLLM bfloat16"),
)


@dataclass(frozen=True)
class Workload:
    """Requests: prompts of token ids, and how many new tokens each asks for."""

    name: str
    prompts: list[list[int]]
    new: list[int]


class Here:
    """A side in this process: its new tokens of each request, and seconds."""

    def run(self, work: Workload) -> Figures:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = self.answer(work)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"tokens": tokens, "wall": wall, "cpu": cpu}

    def answer(self, work: Workload) -> list[list[int]]:
        raise NotImplementedError


class Ours(Here):
    def __init__(self, path: Path, rows: int, dtype: torch.dtype, int8: bool = False) -> None:
        module, placement = load_model(path, frozen=True), Placement(dtype=dtype)
        self.engine = TorchEngine(module, max_batch_size=rows, int8=int8, placement=placement)

    def answer(self, work: Workload) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(work.new)
        requests = [
            GenerationRequest(prompt, SamplingParams(max_tokens=new, temperature=0), owner=index)
            for index, (prompt, new) in enumerate(zip(work.prompts, work.new, strict=True))
        ]
        for request, _, completion in self.engine.as_completed(requests):
            found[request.owner] = completion.token_ids
        return found


class Transformers(Here):
    """`generate` in batches of at most `rows`, padded at the left; all run to the longest."""

    def __init__(self, path: Path, rows: int, dtype: torch.dtype) -> None:
        found = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", dtype=dtype)
        self.model, self.rows = found.eval(), rows

    def answer(self, work: Workload) -> list[list[int]]:
        order = range(len(work.prompts))
        order = sorted(order, key=lambda i: (work.new[i], len(work.prompts[i])))
        found: list[list[int]] = [[] for _ in order]
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            longest = max(len(work.prompts[i]) for i in group)
            new = max(work.new[i] for i in group)
            behind = [longest - len(work.prompts[i]) for i in group]
            ids = [[0] * n + work.prompts[i] for n, i in zip(behind, group, strict=True)]
            mask = [[0] * n + [1] * (longest - n) for n in behind]
            with torch.inference_mode():
                out = self.model.generate(
                    torch.tensor(ids),
                    attention_mask=torch.tensor(mask),
                    do_sample=False,
                    use_cache=True,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            for i, row in zip(group, out[:, longest:].tolist(), strict=True):
                found[i] = row[: work.new[i]]
        return found


class Llama:
    """llama.cpp's server with `rows` slots, asked by as many threads; CPU seconds are its own."""

    def __init__(self, server: LlamaCpp, rows: int) -> None:
        self.server, self.rows = server, rows

    def run(self, work: Workload) -> Figures:
        wall, cpu = time.perf_counter(), self._cpu()
        with ThreadPoolExecutor(self.rows) as pool:
            tokens = list(pool.map(self._ask, work.prompts, work.new))
        wall = time.perf_counter() - wall
        return {"tokens": tokens, "wall": wall, "cpu": max(0.01, self._cpu() - cpu)}

    def _ask(self, prompt: list[int], new: int) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": new,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        return self.server.post("/completion", body, seconds=3600)["tokens"]

    def _cpu(self) -> float:
        stat = Path(f"/proc/{self.server.process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        # utime and stime, in ticks
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Vllm:
    """vLLM's CPU build, in its own environment; a process that answers a line a workload."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, work: Workload) -> Figures:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([work.prompts, work.new]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return dict(zip(("tokens", "wall", "cpu"), json.loads(line[7:]), strict=True))
        raise SystemExit("vLLM ended without an answer")


VLLM = """
import json, os, sys, time
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
import torch, vllm
torch.set_num_threads(int(sys.argv[3]))
llm = vllm.LLM(model=sys.argv[1], dtype=sys.argv[4], enforce_eager=True, max_model_len=512,
    max_num_seqs=int(sys.argv[2]), enable_prefix_caching=False, skip_tokenizer_init=True)
torch.set_num_threads(int(sys.argv[3]))
for line in sys.stdin:
    prompts, new = json.loads(line)
    params = [vllm.SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
        for n in new]
    wall, cpu = time.perf_counter(), time.process_time()
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = [time.perf_counter() - wall, time.process_time() - cpu]
    print("ANSWER", json.dumps([[list(o.outputs[0].token_ids) for o in out], *seconds]), flush=True)
"""
LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
rows, threads = int(sys.argv[3]), int(sys.argv[4])
params.n_ctx, params.n_parallel, params.warmup = rows * 512, rows, False
params.hostnames, params.port, params.n_threads_http = ["127.0.0.1"], int(sys.argv[2]), rows + 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(36000)
"""


@contextmanager
def llama_side(file: Path, options: argparse.Namespace) -> Iterator[Llama]:
    more = (str(options.rows), str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        server = LlamaCpp(file, Path(folder) / "log", LLAMA, more)
        try:
            server.wait(600)
            yield Llama(server, options.rows)
        finally:
            server.process.kill()
            server.process.wait()


@contextmanager
def vllm_side(path: Path, dtype: str, options: argparse.Namespace) -> Iterator[Vllm]:
    words = [str(path), str(options.rows), str(options.threads), dtype]
    process = subprocess.Popen(
        [str(options.vllm), "-c", VLLM, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Vllm(process)
    finally:
        process.kill()
        process.wait()


def run(options: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "vLLM" in " ".join(options.sides) and not options.vllm.is_file():
        print(f"vLLM: {options.vllm} is missing (make venv-vllm)", file=sys.stderr)
        options.sides = [side for side in options.sides if "vLLM" not in side]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = given = random_model(folder / "toy") if options.smoke else options.model or smollm2()
        if given.is_file():
            options.gguf, path = options.gguf or given, folder / "model"
            export_model(given, path, "hf", check=False)
        opened = {side: open_side(side, path, folder, options) for side in options.sides}
        sides = {k: stack.enter_context(side) for k, side in opened.items() if side is not None}
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        warm_up = Workload("", [[1] * options.prompt], [8])
        alternate({name: partial(side.run, warm_up) for name, side in sides.items()}, 1)
        rows = [measure(sides, work, options.rounds) for work in workloads(vocab, options)]
    table(
        sum(rows, []),
        f"{given.name}: transformers {transformers.__version__}; {options.prompt} prompt + "
        f"{options.new} new tokens, {options.rounds} rounds",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--gguf", type=Path, help="a side of its own: llama.cpp runs it as it is")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--queue", type=int, default=64, help="ragged requests; 0 for no queue")
    parser.add_argument("--rows", type=int, default=32, help="that run at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument("--vllm", type=Path, default=Path(VLLM_PYTHON))


def random_model(directory: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory


def open_side(
    side: str, path: Path, folder: Path, options: argparse.Namespace
) -> AbstractContextManager[Any] | None:
    """None for the original file where there is none."""
    name, _, kind = side.partition(" ")
    dtype = torch.bfloat16 if kind in ("bfloat16", "int8") else torch.float32
    if name == "tessera":
        return nullcontext(Ours(path, options.rows, dtype, int8=kind == "int8"))
    if name == "transformers":
        return nullcontext(Transformers(path, options.rows, dtype))
    if name == "vLLM":
        return vllm_side(path, kind or "float32", options)
    if kind == "original":
        return llama_side(options.gguf, options) if options.gguf else None
    written = folder / kind
    if not written.exists():
        dtype = "bfloat16" if kind == "BF16" else "float32"
        export_model(path, written, "gguf", engines=[], dtype=dtype, check=False)
        if kind == "Q8_0":
            quantise(written / "model.gguf")
    return llama_side(written / "model.gguf", options)


def quantise(file: Path) -> None:
    """Round the matrices of a GGUF file in float32 to Q8_0."""
    reader, kind = gguf.GGUFReader(file), gguf.GGMLQuantizationType.Q8_0
    for index, one in enumerate(reader.tensors):
        if one.data.ndim == 2:
            data = gguf.quants.quantize(one.data, kind)
            reader.tensors[index] = one._replace(data=data, n_bytes=data.nbytes, tensor_type=kind)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), "llama")
    copy_with_new_metadata(reader, writer, {}, ())
    file.with_suffix(".new").replace(file)


def workloads(vocab: int, options: argparse.Namespace) -> Iterator[Workload]:
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return draw.choices(range(vocab), k=length)

    for batch in options.batch:
        prompts = [prompt(options.prompt) for _ in range(batch)]
        yield Workload(str(batch), prompts, [options.new] * batch)
    if options.queue:
        # A few long answers among many short ones, as with a model that thinks when it must.
        new = [round(options.new * 2 ** draw.uniform(-3, 1.3)) for _ in range(options.queue)]
        prompts = [prompt(draw.randint(8, 2 * options.prompt)) for _ in new]
        yield Workload(f"queue of {options.queue}", prompts, new)


def measure(sides: dict[str, Any], work: Workload, rounds: int) -> list[Figures]:
    """A row a side: tokens a second, its time to the first side's, and how many of its completions
    it repeats."""
    found = alternate({k: partial(side.run, work) for k, side in sides.items()}, rounds)
    first = {name: figures[0]["tokens"] for name, figures in found.items()}
    ours = next(iter(sides))
    for tokens in first.values():
        assert [len(one) for one in tokens] == work.new
    count, rows = sum(work.new), []
    for name, figures in found.items():
        speed = [f"{count / median(figures, key):,.0f}" for key in ("wall", "cpu")]
        ratios = [f"{ratio(figures, found[ours], key):.2f}" for key in ("wall", "cpu")]
        equal = [a == b for a, b in zip(first[name], first[ours], strict=True)]
        rows.append(
            {
                "requests": work.name,
                "engine": name,
                "tokens/s wall (CPU)": "{} ({})".format(*speed),
                f"its time to {ours}'s, wall (CPU)": "{} ({})".format(*ratios),
                f"completions equal to {ours}'s": f"{sum(equal) / len(equal):.0%}",
            }
        )
    return rows


if __name__ == "__main__":
    toy = {"batch": [1, 2], "queue": 6, "rows": 4, "prompt": 8, "new": 8}
    harness.main(__doc__, Command(run, arguments, toy, rounds=2))
