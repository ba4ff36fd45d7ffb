"""A GRPO step: ours against TRL's GRPOTrainer on one work, in turn, and where our step goes.

    python benchmarks/rl.py [--baselines DIR] [--peer PYTHON] [--rounds 3] [--steps 3]
    python benchmarks/rl.py --engines [--rounds 3] [--steps 3]

DIR (../shared/baselines) holds trl_grpo.py: a random Llama of 6M parameters, 16 prompts of some 67
tokens, 8 completions of exactly 64 tokens each, temperature 1, one update a rollout, no reference.
Ours runs the real `Rollouts`, `PolicyGradient` and `Trainer` on the same model, prompts of the same
lengths, and the same reward (the share of digits). With --engines instead: our step with our engine
and with vLLM's CPU build (`make venv-vllm`), each with the rollout before the step and one ahead of
it, where the engine has the second core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from training import (
    ROOT,
    conversations,
    initial,
    json_of,
    matmul_flops,
    open_run,
    peak_mb,
    shape,
)

from tessera.data.batch import Batch
from tessera.model.cpu import multiply
from tessera.model.transformer import Transformer
from tessera.objectives.grpo import PolicyGradient
from tessera.rl import advantages
from tessera.rl.policy import GRPOConfig
from tessera.rl.pool import Judged
from tessera.rl.profile import Prompt
from tessera.rl.rewards import Sample
from tessera.rl.rollouts import Rollouts
from tessera.rl.verifiers.outcome import right
from tessera.runs.run import read_timings
from tessera.train.engine import Trainer
from tessera.train.flops import Work, model_cost
from tessera.vllm.config import open_engine

PROMPTS, SAMPLES, NEW, PROMPT_TOKENS = 16, 8, 64, 67


class Text:
    """A tokenizer of numbers and an encoder of prompts by number, which is all this work needs."""

    eos_ids: tuple[int, ...] = ()

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids, self.tokenizer = ids, self

    def prompt(self, messages: Any, mode: str) -> list[int]:
        return self.ids[int(messages[0]["content"])]

    def decode(self, ids: list[int], special: bool = False) -> str:
        return " ".join(map(str, ids))


class Digits:
    """A rubric of one reward that costs nothing: the share of even tokens."""

    names = ("digits",)

    def __call__(self, samples: list[Sample]) -> list[Judged]:
        shares = [[int(t) % 2 == 0 for t in one.completion.split()] for one in samples]
        return [Judged(sum(share) / len(share), {"digits": right()}) for share in shares]


class Clocked(Rollouts):
    """Notes when each step begins, and what its rows hold."""

    marks: list[tuple[float, float]] = []
    flops: list[float] = []
    tokens: list[int] = []

    def batches(self, step: int) -> list[Batch]:
        self.marks.append((time.perf_counter(), time.process_time()))
        found = super().batches(step)
        cost = model_cost(self.module.config)
        self.flops.append(sum(cost.training(Work.of(batch)) for batch in found))
        self.tokens.append(sum(batch.num_tokens for batch in found))
        return found


def ours(options: argparse.Namespace) -> dict[str, Any]:
    steps = options.steps + 1
    ids = [one[:PROMPT_TOKENS] for one in conversations(options.baselines, 4 * steps * PROMPTS)]
    ids = [one for one in ids if len(one) == PROMPT_TOKENS][: steps * PROMPTS]
    train = {"steps": steps, "lr": 3e-4, "schedule": "constant", "warmup": 0.0}
    train |= {"microbatch_tokens": options.microbatch, "save_seconds": 1e9}
    settings = {"prompts_per_rollout": PROMPTS, "samples": SAMPLES, "max_tokens": NEW}
    rewards = [{"kind": "format"}]
    settings |= {"engine": options.engine, "staleness": options.staleness, "gap_limit": 9.0}
    config = GRPOConfig(train=train, rewards=rewards, engine_batch=PROMPTS * SAMPLES, **settings)  # type: ignore[arg-type]
    module = initial(Transformer(shape()))
    before = peak_mb()
    prompts = [
        Prompt(str(n), [{"role": "user", "content": str(n)}], "off") for n in range(len(ids))
    ]
    opened = closing(open_engine(config, module, PROMPTS * SAMPLES))
    with (
        opened as engine,
        tempfile.TemporaryDirectory() as folder,
        open_run(Path(folder) / "run", "grpo") as run,
    ):
        source = Clocked(
            module,
            engine,
            Text(ids),  # type: ignore[arg-type]
            prompts,
            config,
            advantages.grpo,
            run,
            Digits(),  # type: ignore[arg-type]
        )
        Trainer(module, PolicyGradient(config), source, config.train, run).fit()
        source.marks.append((time.perf_counter(), time.process_time()))
        timings = read_timings(run.path)[1:]
    spans = list(zip(source.marks[1:], source.marks[2:], strict=False))
    wall, cpu = (statistics.median(b[i] - a[i] for a, b in spans) for i in (0, 1))
    generate = statistics.median(one["generate_seconds"] for one in timings)
    judge = statistics.median(one["judge_seconds"] for one in timings)
    return {
        "wall": wall,
        "cpu": cpu,
        "generate": generate,
        "judge": judge,
        "wait": statistics.median(one.get("wait_seconds", 0.0) for one in timings),
        "train": wall - generate - judge,
        "peak": peak_mb(),
        "grown": peak_mb() - before,
        "flops": statistics.median(source.flops[1:]),
        "tokens": statistics.median(source.tokens[1:]),
    }


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    script = options.baselines / "trl_grpo.py"
    words = ["--threads", "1", "--steps", str(options.steps), "--warmup", "1"]
    words += ["--prompts", str(PROMPTS), "--completions", str(SAMPLES), "--new-tokens", str(NEW)]
    with tempfile.TemporaryDirectory() as out:
        found = json_of([options.peer, str(script), *words, "--out", out], 1)
    return {
        "wall": found["update_seconds"]["median"],
        "cpu": found["cpu_seconds_per_rollout_step"],
        "generate": found["generate_seconds"]["median"],
        "judge": found["score_seconds"]["median"],
        "train": found["train_seconds"],
        "peak": found["peak_rss_mb"],
        "grown": found["peak_rss_mb"] - found["peak_rss_mb_before_training"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baselines", type=Path, default=ROOT.parent / "shared" / "baselines")
    parser.add_argument("--peer", default=str(ROOT / ".venv-trl/bin/python"), help="has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--microbatch", type=int, default=2048, help="ours: tokens of a row")
    parser.add_argument("--side", choices=["both", "ours"], default="both")
    parser.add_argument("--engines", action="store_true", help="compare engines instead")
    parser.add_argument("--engine", choices=["tessera", "vllm"], default="tessera")
    parser.add_argument("--staleness", type=int, choices=[0, 1], default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side == "ours":
        print(json.dumps(ours(options)))
        return
    if options.engines:
        print(engines(options))
        return
    for needed in (options.baselines / "trl_grpo.py", Path(options.peer)):
        if not needed.exists():
            print(f"skipped: {needed} is not here (--baselines, --peer; make venv-trl)")
            return
    command = [sys.executable, __file__, *sys.argv[1:], "--side", "ours"]
    pairs = []
    for _ in range(options.rounds):
        peak = max(matmul_flops(torch.matmul), matmul_flops(multiply))
        pairs.append((json_of(command, 1), theirs(options), peak))
        print(f"# {pairs[-1][0]['cpu']:.2f} against {pairs[-1][1]['cpu']:.2f}", file=sys.stderr)
    print(report(pairs, options))


def engines(options: argparse.Namespace) -> str:
    """A row an engine and staleness, medians of rounds in which they take turns."""
    ways = list(itertools.product(("tessera", "vllm"), (0, 1)))
    found: dict[Any, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for engine, staleness in ways:
            words = ["--side", "ours", "--engine", engine, "--staleness", str(staleness)]
            found[engine, staleness].append(
                json_of([sys.executable, __file__, *sys.argv[1:], *words], 1)
            )
            print(
                f"# {engine} {staleness}: {found[engine, staleness][-1]['wall']:.2f}",
                file=sys.stderr,
            )
    lines = [
        f"{torch.backends.cpu.get_cpu_capability()}, float32, torch {torch.__version__}, trainer "
        f"and engine a thread each; {options.rounds} rounds of {options.steps} steps\n",
        "| engine | rollout | seconds a step | generating | waiting | in the first's time |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for engine, staleness in ways:
        rows = found[engine, staleness]
        told = [statistics.median(row[key] for row in rows) for key in ("wall", "generate", "wait")]
        firsts = zip(rows, found[ways[0]], strict=True)
        ratio = statistics.median(row["wall"] / first["wall"] for row, first in firsts)
        when = "one ahead" if staleness else "before the step"
        cells = " | ".join(f"{one:.2f}" for one in (*told, ratio))
        lines.append(f"| {engine} | {when} | {cells} |")
    return "\n".join(lines)


def report(pairs: list[Any], options: argparse.Namespace) -> str:
    def median(side: int, key: str) -> float:
        return statistics.median(pair[side][key] for pair in pairs)

    samples = PROMPTS * SAMPLES
    lines = [
        f"1 thread, {torch.backends.cpu.get_cpu_capability()}, float32, torch {torch.__version__}; "
        f"{options.rounds} pairs of {options.steps} steps\n",
        "| | samples/s | samples/CPU-s | generate s | judge s | train s | peak MB | grown MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for side, name in enumerate(("tessera", "TRL GRPOTrainer")):
        parts = [median(side, key) for key in ("generate", "judge", "train", "peak", "grown")]
        told = [f"{samples / median(side, key):.2f}" for key in ("wall", "cpu")]
        told += [f"{part:.2f}" for part in parts[:3]] + [f"{part:,.0f}" for part in parts[3:]]
        lines.append(f"| {name} | {' | '.join(told)} |")
    ratios = [
        statistics.median(theirs[key] / own[key] for own, theirs, _ in pairs)
        for key in ("wall", "cpu", "peak")
    ]
    share = statistics.median(
        own["flops"] / (own["train"] / own["wall"] * own["cpu"]) / peak for own, _, peak in pairs
    )
    whole = samples * (PROMPT_TOKENS + NEW)
    lines += [
        f"\nTRL / tessera, medians of pairs: wall {ratios[0]:.2f}, CPU {ratios[1]:.2f}, "
        f"peak memory {ratios[2]:.2f}.",
        f"A step trains on {median(0, 'tokens'):,.0f} tokens, prompts computed once, instead of "
        f"{whole:,}; training runs at {share:.0%} of the matmul peak.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
