"""What a GPU shows, in at most 8 minutes on one H200; on a CPU at toy sizes, whether this runs.

    python benchmarks/gpu.py [--device cuda] [--parts parity engine ...] [--out DIR]

Parts are processes with limits of their own; what one says is printed and written to
DIR/gpu-DATE.md as it is known, and one that fails or takes too long does not stop the others. Only
the core's packages are needed; what needs another (pytest, gguf) is skipped with the reason.

tests       those marked `gpu`: attention's kernels
parity      logits, LM and KD losses, a gradient and greedy tokens there and on the CPU
attention   memory of one layer's attention over long rows under masks (benchmarks/attention.py)
training    MFU of LM, KD and GRPO updates in bfloat16 over rows of 8,192 tokens: the widths of an
            8B Llama, random weights, as many of its 32 layers as fit with AdamW's states
engine      new tokens a second at batch 1, 32 and 256 of that shape and of SmolLM2-135M's
recipe      recipes/checkpoint.toml on SmolLM2-135M-Instruct, stage by stage
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention as kernels
import harness
import numpy as np
import torch
from harness import ROOT, Command, Figures, skip, table
from torch import Tensor
from training import SIZES, open_run, shape

from tessera import devices, dist, pipeline
from tessera.data.batch import Batch
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.transformer import Transformer, holding
from tessera.objectives.grpo import PolicyGradient, PolicyLossConfig
from tessera.objectives.kd import KD, KDConfig
from tessera.objectives.lm import LM
from tessera.puzzle.cost import generation_seconds
from tessera.puzzle.cost_table import Scenario
from tessera.report import show
from tessera.rl.experience import Answer, Group, row
from tessera.runs.recipe import load
from tessera.runs.run import find_manifest, read_timings
from tessera.train.engine import Objective, Trainer
from tessera.train.flops import peak
from tessera.train.optim import TrainConfig

LIMITS = {  # seconds; together with starting Python, 8 minutes
    "tests": 45,
    "parity": 45,
    "attention": 45,
    "training": 125,
    "engine": 90,
    "recipe": 110,
}
LLAMA_8B = (128_256, 4096, 14_336, 32, 32, 8)  # as in training.SIZES
SMOLLM2 = (49_152, 576, 1536, 30, 9, 3)
MIDDLE = (8192, 512, 1376, 4, 8, 2)  # of parity
ROOM = 0.95  # of a device's memory that parameters, gradients and AdamW's states may take
STEPS = 4


def toy() -> bool:
    """Whether sizes are small: on a CPU, or a device that does not say how much memory it has."""
    return dist.device_memory() is None


def say(name: str, figures: Figures) -> None:
    """A line of result, for the process that started this one."""
    print("LINE " + json.dumps([name, figures]), flush=True)


def random_model(
    size: tuple[int, ...], dtype: torch.dtype, layers: int | None = None
) -> Transformer:
    """Random weights of a shape, made on the device."""
    config, there = shape(SIZES["toy"] if toy() else size), dist.device()
    config = config.with_words(config.words[:layers])
    torch.manual_seed(0)

    def weight(key: str, like: torch.Size) -> Tensor:
        if len(like) == 1:
            return torch.ones(like, device=there, dtype=dtype)
        return torch.randn(like, device=there, dtype=dtype).mul_(like[-1] ** -0.5)

    return holding(config, weight)


def rows(vocab_size: int, length: int, documents: int = 1) -> Batch:
    """A row of documents of equal length."""
    ids = torch.randint(0, vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    order, size = torch.arange(length)[None], length // documents
    weight = torch.ones(1, length)
    return Batch(ids[None, :-1], ids[None, 1:], weight, order % size, order // size)


def answers(vocab_size: int, length: int) -> Batch:
    """A row of a prompt and the four answers that share it."""
    draw, part = np.random.default_rng(0), length // 5
    ids = [draw.integers(0, vocab_size, part).tolist() for _ in range(5)]
    made = [
        Answer(one, [-9.0] * part, "stop", "", 0.0, {}, True, advantage=(-1.0) ** number)
        for number, one in enumerate(ids[1:])
    ]
    return row([Group(0, None, ids[0], made)])


# The parts


def tests() -> None:
    if importlib.util.find_spec("pytest") is None:
        skip("pytest is not installed")
    if dist.device().type != "cuda":
        skip(f"they need CUDA, and this is {dist.device().type}")
    files = [str(f) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for failed in re.findall(r"^FAILED (.*)", done.stdout, re.MULTILINE):
        say("failed", {"test": failed})
    say(f"{len(files)} file(s)", {"outcome": done.stdout.splitlines()[-1]})


def parity() -> None:
    here = random_model(MIDDLE, torch.float32).cpu()
    teacher = random_model(MIDDLE, torch.float32).cpu().requires_grad_(False)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)
    batch = rows(here.config.vocab_size, 1024, documents=3)
    prompts = [batch.tokens[0, start : start + 24].tolist() for start in range(0, 480, 24)]
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for device in (torch.device("cpu"), dist.device()):
            mine, theirs = (copy.deepcopy(one).to(device, dtype) for one in (here, teacher))
            found.append(_figures(mine, theirs, batch.to(device), prompts))
        mine, theirs = found
        name = str(dtype).removeprefix("torch.")
        difference = (mine["logits"] - theirs["logits"]).abs().max() / mine["logits"].std()
        say(f"{name}, logits", {"largest difference, in standard deviations": f"{difference:.2g}"})
        for key in ("LM loss", "KD loss", "norm of LM's gradient"):
            say(f"{name}, {key}", {"CPU": f"{mine[key]:.7g}", "there": f"{theirs[key]:.7g}"})
        pairs = list(zip(mine["tokens"], theirs["tokens"], strict=True))
        same = sum(a == b for a, b in pairs)
        say(f"{name}, greedy completions of 32 tokens", {"equal": same, "of": len(pairs)})


def _figures(
    module: Transformer, teacher: Transformer, batch: Batch, prompts: list[list[int]]
) -> Figures:
    loss = sum(one for one, _ in LM().losses(module, batch))
    loss.backward()  # type: ignore[union-attr]
    squares = [weight.grad.float().square().sum() for weight in module.parameters()]  # type: ignore[union-attr]
    settings = KDConfig(train=_train(1, 64), cosine=1.0)
    with torch.no_grad():
        distance = sum(one for one, _ in KD(teacher, settings).losses(module, batch))
        logits = module.logits(module(batch.tokens[:, :256])).float().cpu()
    made = TorchEngine(module).generate(prompts, SamplingParams(32, temperature=0.0))
    return {
        "logits": logits,
        "LM loss": float(loss),
        "KD loss": float(distance),
        "norm of LM's gradient": float(torch.stack(squares).sum().sqrt()),
        "tokens": [one.token_ids for (one,) in made],
    }


def attention() -> None:
    for tokens in (256, 512) if toy() else (4096, 8192, 16_384):
        for case in kernels.CASES:
            figures = {}
            for way in ("mask", "tessera"):
                found = kernels.measured(case, way, tokens)
                figures[f"{way} MiB"] = f"{found['mib']:,.0f}"
                figures[f"{way} ms"] = f"{1e3 * found['seconds']:.1f}"
            say(f"{case}, {tokens:,} tokens", figures)


def _train(steps: int, length: int) -> TrainConfig:
    table = {"steps": steps, "lr": 1e-5, "schedule": "constant", "warmup": 0.0, "save_seconds": 1e9}
    table |= {"tokens_per_step": length, "microbatch_tokens": length, "sequence_length": length}
    table |= {"dtype": "bfloat16", "parallel": {"gradient_checkpointing": True}}
    return TrainConfig.model_validate(table)


class Same:
    """A source of one row, again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, step: int) -> list[Batch]:
        return [self.batch]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def training() -> None:
    length = 128 if toy() else 8192
    for name in ("LM", "KD", "GRPO"):
        for layers in (2,) if toy() else (32, 24, 16, 8):
            try:
                if _fits(layers, teacher=name == "KD"):
                    say(f"{name}, {layers} layers", _updates(name, layers, length))
                    break
            except torch.OutOfMemoryError:
                say(f"{name}, {layers} layers", {"outcome": "out of memory"})
            _forget()


def _forget() -> None:
    gc.collect()
    if not toy():
        torch.accelerator.empty_cache()


def _fits(layers: int, teacher: bool) -> bool:
    config = shape(LLAMA_8B)
    parameters = config.with_words(config.words[:layers]).num_params()
    room = dist.device_memory()
    return room is None or (18 if teacher else 16) * parameters < ROOM * room


def _updates(name: str, layers: int, length: int) -> Figures:
    train = _train(STEPS, length)
    module = train.placement.transformer(random_model(LLAMA_8B, torch.float32, layers))
    vocab_size, objective = module.config.vocab_size, _objective(name, layers, train)
    batch = (answers if name == "GRPO" else rows)(vocab_size, length)
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run", "cpt") as run:
        Trainer(module, objective, Same(batch), train, run).fit()
        seconds = min(one["seconds"] for one in read_timings(run.path)[1:])
    rate = objective.flops(module, batch) / seconds
    best = peak(torch.bfloat16)
    memory = 0.0 if toy() else torch.accelerator.max_memory_allocated() / 1e9
    return {
        "tokens a second": f"{batch.num_tokens / seconds:,.0f}",
        "TFLOPS": f"{rate / 1e12:.3g}",
        "MFU": f"{rate / best:.1%}" if best else "-",
        "GB": f"{memory:.1f}",
    }


def _objective(name: str, layers: int, train: TrainConfig) -> Objective:
    if name == "LM":
        return LM()
    if name == "GRPO":
        return PolicyGradient(PolicyLossConfig())
    teacher = random_model(LLAMA_8B, torch.bfloat16, layers).requires_grad_(False)
    return KD(train.placement.transformer(teacher), KDConfig(train=train))


def engine() -> None:
    prompt, new = (8, 8) if toy() else (128, 64)
    batches = (1, 4) if toy() else (1, 32, 256)
    for name, size in (("SmolLM2-135M", SMOLLM2), ("8B", LLAMA_8B)):
        module = random_model(size, torch.bfloat16).requires_grad_(False).eval()
        config, room = module.config, prompt + new
        one = TorchEngine(module, max_batch_size=max(batches))
        del module
        for batch in batches:
            scenario = Scenario(batch=batch, prompt=prompt, new=new)
            generation_seconds(one, config.vocab_size, Scenario(batch=batch, prompt=prompt, new=4))
            prefill, each = generation_seconds(one, config.vocab_size, scenario)
            read = 2 * config.num_params() + batch * room * config.kv_bytes_per_token(2)
            figures = {
                "new tokens a second": f"{batch / each:,.0f}",
                "ms a step": f"{1e3 * each:.2f}",
                "of the bandwidth": _share(read / each),
                "prompt tokens a second": f"{batch * prompt / prefill:,.0f}",
            }
            say(f"{name}, batch {batch}", figures)
        one.close()
        _forget()


def _share(bytes_a_second: float) -> str:
    """Of the bandwidth that the device's sheet says, if it is known."""
    if dist.device().type != "cuda":
        return "-"
    name = torch.cuda.get_device_name(dist.device())
    known = [one for one in devices.DEVICES.values() if one.name in name]
    return f"{bytes_a_second / known[0].bandwidth:.0%}" if known else "-"


def recipe() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = harness.tiny_model(home / "model", layers=4) if toy() else harness.smollm2()
        texts = home / "texts.jsonl"
        lines = (json.dumps({"text": one}) for one in harness.tiny_texts(300 if toy() else 20_000))
        texts.write_text("\n".join(lines))
        words = [f"parent.path={model}", f'data.paths=["{texts}"]', *_sizes()]
        plan, begun = load(ROOT / "recipes" / "checkpoint.toml", words), time.perf_counter()
        for spec in plan.stages:
            (step,) = pipeline.run_recipe(plan, home, only=[spec.name], quiet=True)
            manifest = find_manifest(step.path)
            assert manifest is not None
            say(spec.name, {"seconds": f"{manifest.seconds:.1f}"})
        say("all of it", {"seconds": f"{time.perf_counter() - begun:.0f}"})
        for one in show.tables(step.path)["compare"]:
            say(str(one.pop("model")), {key: _brief(value) for key, value in one.items()})


def _sizes() -> list[str]:
    """Overrides of recipes/checkpoint.toml: its sizes on this device, steps for two minutes."""
    length, tokens = (64, 256) if toy() else (512, 16_384)
    rows = f"tokens = {tokens}, sequence_length = {length}"
    words = [f"search.conditional={{ rounds = 1, polish = 0, {rows} }}", "race.rungs=1"]
    words += ["race.lrs=[1e-4]", 'race.searches=["search", "search-dropped"]']
    for stage, steps in (("bld", 4), ("race", 5), ("kd", 20)):
        own = {"steps": steps, "tokens_per_step": tokens, "microbatch_tokens": tokens}
        own |= {"sequence_length": length, "dtype": "float32" if stage == "bld" else "bfloat16"}
        words += [f"{stage}.train.{key}={value}" for key, value in own.items()]
    for stage in ("score", "compare"):
        words += [f"{stage}.tokens={tokens}", f"{stage}.sequence_length={length}"]
    words += ["cost.rounds=3", "cost.wholes=2", "compare.rounds=3"]
    work = "{ batch = 1, prompt = 4, new = 4 }" if toy() else "{ batch = 8, prompt = 64, new = 16 }"
    words += [f"{stage}.scenario={work}" for stage in ("cost", "compare")]
    if toy():
        names = ("search", "search-dropped", "search-attention")
        words += [f'{one}.constraints={{ kv_bytes_per_token = "0.5x" }}' for one in names]
    return words


def _brief(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


PARTS: dict[str, Callable[[], None]] = {
    "tests": tests,
    "parity": parity,
    "attention": attention,
    "training": training,
    "engine": engine,
    "recipe": recipe,
}


# What runs them


def run(options: argparse.Namespace) -> None:
    with dist.computing_on(options.device):
        if options.side:
            PARTS[options.side]()
            return
        device = dist.device()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options.out.mkdir(parents=True, exist_ok=True)
    small = device.type == "cpu"
    file = options.out / f"gpu-{'kit-cpu' if small else dt.date.today()}.md"
    with file.open("w", encoding="utf-8") as out:

        def tell(text: str) -> None:
            print(text, flush=True)
            print(text, file=out, flush=True)

        tell(f"# {'The GPU kit on a CPU' if small else name}\n")
        tell(f"`benchmarks/gpu.py`, {dt.date.today()}, {name}, torch {torch.__version__}.")
        if small:
            tell("Toy sizes: what is shown is that the kit runs. No figure here is of a GPU.")
        summary = [part(one, device.type, options.threads, tell) for one in options.parts]
    table(summary)
    print(f"\nwritten to {file}")


def part(name: str, device: str, threads: int, tell: Callable[[str], None]) -> Figures:
    """One part in a process of its own: its lines as they come, and how it ended."""
    tell(f"\n## {name}\n")
    words = [
        sys.executable,
        __file__,
        "--side",
        name,
        "--device",
        device,
        "--threads",
        str(threads),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    begun, count, skipped = time.perf_counter(), 0, ""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # whose processes end with it
        )
        timer = threading.Timer(LIMITS[name], os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("LINE "):
                (head, figures), count = json.loads(line[5:]), count + 1
                tell(f"- {head}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
            elif line.startswith("skipped: "):
                skipped = line.strip()
        code, late = child.wait(), not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    outcome = skipped or ("done" if code == 0 else f"failed: {last[:300]}")
    if code and late:
        outcome = f"stopped after {LIMITS[name]} s"
    seconds = f"{time.perf_counter() - begun:.0f}"
    tell(f"\n{outcome}, {seconds} s")
    return {"part": name, "lines": count, "seconds": seconds, "outcome": outcome}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, xpu, mps or cpu; the accelerator that torch finds")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--side", choices=LIMITS, help=argparse.SUPPRESS)


if __name__ == "__main__":
    smoke = {"device": "cpu", "out": Path(), "parts": ["parity", "training", "engine"]}
    harness.main(__doc__, Command(run, arguments, smoke))
