"""A GRPO step: against TRL's GRPOTrainer, with our engine and with vLLM's, in turn.

    python benchmarks/rl.py trl [--model PATH] [--peer PYTHON] [--steps 1] [--threads-of 1 2]
    python benchmarks/rl.py engines [--model PATH] [--steps 1]

trl: SmolLM2-135M-Instruct, or another model: 8 prompts (arithmetic problems), 8 completions of
exactly 128 tokens each, temperature 1, one update a rollout, no reference, in float32 and bfloat16;
TRL as in training.py, 8 completions a backward pass. Ours runs the real `Rollouts`,
`PolicyGradient` and `Trainer`, and a reward as cheap (the share of even tokens).

engines: our step with our engine and with vLLM's CPU build (`make venv-vllm`), each with the
rollout before the step and one ahead of it, where the engine has the second core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import (
    TRL,
    VLLM,
    Command,
    Figures,
    alternate,
    fresh,
    median,
    memory_mb,
    need,
    ratio,
    table,
)
from training import SETTINGS, TRL_SIDE, open_run, peak, spans, yardstick

from tessera.data.batch import Batch
from tessera.data.problems import problem
from tessera.data.tokenizer import load_tokenizer
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

PROMPTS, SAMPLES, NEW = 8, 8, 128


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


def questions(options: argparse.Namespace) -> list[str]:
    count = (options.steps + 1) * PROMPTS
    return [problem("calc", 0, number).question for number in range(count)]


def ours(options: argparse.Namespace) -> Figures:
    tokenizer = load_tokenizer(options.model)
    ids = [tokenizer.encode(one) for one in questions(options)]
    train = {"steps": options.steps + 1, "lr": 1e-5, "schedule": "constant", "warmup": 0.0}
    train |= {"microbatch_tokens": options.microbatch, "save_seconds": 1e9}
    train |= {"sequence_length": options.microbatch, "dtype": options.setting}
    settings = {"prompts_per_rollout": PROMPTS, "samples": SAMPLES, "max_tokens": options.new}
    rewards = [{"kind": "format"}]
    settings |= {"engine": options.engine, "staleness": options.staleness, "gap_limit": 9.0}
    config = GRPOConfig(train=train, rewards=rewards, engine_batch=PROMPTS * SAMPLES, **settings)  # type: ignore[arg-type]
    module = config.train.placement.load(options.model)
    before = memory_mb()
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
    wall, cpu = map(statistics.median, zip(*spans(source.marks), strict=True))
    generate, judge = (median(timings, f"{key}_seconds") for key in ("generate", "judge"))
    return {
        "wall": wall,
        "cpu": cpu,
        "generate": generate,
        "judge": judge,
        "wait": statistics.median(one.get("wait_seconds", 0.0) for one in timings),
        "train": wall - generate - judge,
        "peak": memory_mb(),
        "grown": memory_mb() - before,
        "matmul": peak(config.train.placement.dtype),
        "flops": statistics.median(source.flops[1:]),
        "tokens": statistics.median(source.tokens[1:]),
    }


def theirs(options: argparse.Namespace, setting: str) -> Figures:
    work = {"prompts": questions(options), "new": options.new}
    work |= {"prompts_per_step": PROMPTS, "samples": SAMPLES}
    words = ["--dtype", setting, "--batch", str(SAMPLES), "--steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "work.json").write_text(json.dumps(work))
        words = ["grpo", str(options.model), str(path), *words, "--threads", str(options.threads)]
        return fresh(TRL_SIDE, words, options.threads, options.peer)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="HF directory or GGUF; SmolLM2-135M otherwise")
    parser.add_argument("--peer", default=TRL, help="a Python that has TRL")
    parser.add_argument("--steps", type=int, default=1, help="timed, after one")
    parser.add_argument("--microbatch", type=int, default=2048, help="ours: tokens of a row")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of a completion")
    parser.add_argument("--dtypes", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads-of", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument(
        "--engine", choices=["tessera", "vllm"], default="tessera", help=argparse.SUPPRESS
    )
    parser.add_argument("--staleness", type=int, choices=[0, 1], default=0, help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)


def side(options: argparse.Namespace, *more: str) -> Figures:
    """Our figures from a fresh process with the same options."""
    words = ["trl", "--side", "ours", *more]
    for key in ("model", "steps", "microbatch", "new", "threads"):
        words += [f"--{key}", str(getattr(options, key))]
    return fresh(__file__, words, options.threads)


def trl(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(ours(options)))
        return
    need(options.peer, hint="--peer; make venv-trl")
    with tempfile.TemporaryDirectory() as folder:
        options.model = yardstick(options, Path(folder) / "model")
        for threads, dtype in itertools.product(options.threads_of, options.dtypes):
            options.threads = threads
            ways: dict[str, Any] = {"tessera": partial(side, options, "--setting", dtype)}
            for setting in SETTINGS[dtype]:
                ways[f"TRL GRPOTrainer, {setting}"] = partial(theirs, options, setting)
            found = alternate(ways, options.rounds)
            rows = [grpo_row(way, rows, found["tessera"]) for way, rows in found.items()]
            table(rows, f"grpo, {dtype}, {threads} thread(s)")


def grpo_row(name: str, rows: list[Figures], mine: list[Figures]) -> Figures:
    row = {
        "": name,
        "seconds a step": f"{median(rows, 'wall'):.1f}",
        "CPU-s": f"{median(rows, 'cpu'):.1f}",
        "peak MB": f"{median(rows, 'peak'):,.0f}",
    }
    if rows is mine:
        row |= {f"{key} s": f"{median(rows, key):.1f}" for key in ("generate", "judge", "train")}
        share = statistics.median(
            one["flops"] / (one["train"] / one["wall"] * one["cpu"]) / one["matmul"] for one in mine
        )
        return {**row, "training, of the products' peak": f"{share:.0%}"}
    row["tessera / it, wall"] = f"{ratio(rows, mine, 'wall'):.2f}"
    return {**row, "CPU": f"{ratio(rows, mine, 'cpu'):.2f}"}


def engines(options: argparse.Namespace) -> None:
    """A row an engine and staleness, medians of rounds in which they take turns."""
    if not options.smoke:
        need(VLLM, hint="make venv-vllm")
    with tempfile.TemporaryDirectory() as folder:
        options.model = yardstick(options, Path(folder) / "model")
        ways_of_engines(options)


def ways_of_engines(options: argparse.Namespace) -> None:
    names = ["tessera", "vllm"] if Path(VLLM).exists() else ["tessera"]
    ways = {
        f"{engine}, {'one ahead' if staleness else 'before the step'}": partial(
            side, options, "--engine", engine, "--staleness", str(staleness)
        )
        for engine, staleness in itertools.product(names, (0, 1))
    }
    found = alternate(ways, options.rounds)
    first = next(iter(found.values()))
    table(
        [
            {
                "engine, rollout": name,
                "seconds a step": f"{median(rows, 'wall'):.2f}",
                "generating": f"{median(rows, 'generate'):.2f}",
                "waiting": f"{median(rows, 'wait'):.2f}",
                "in the first's time": f"{ratio(rows, first, 'wall'):.2f}",
            }
            for name, rows in found.items()
        ]
    )


if __name__ == "__main__":
    TOY = {"steps": 1, "new": 8, "threads_of": [1]}
    harness.main(
        __doc__, {"trl": Command(trl, arguments, TOY), "engines": Command(engines, arguments, TOY)}
    )
