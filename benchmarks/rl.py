"""A GRPO step: against TRL's GRPOTrainer, with our engine and with vLLM's, in turn.

    python benchmarks/rl.py trl [--baselines DIR] [--peer PYTHON] [--steps 3]
    python benchmarks/rl.py engines [--steps 3]

trl: DIR (../shared/baselines) holds trl_grpo.py: a random Llama of 6M parameters, 16 prompts of 67
tokens, 8 completions of exactly 64 tokens each, temperature 1, one update a rollout, no reference.
Ours runs the real `Rollouts`, `PolicyGradient` and `Trainer` on the same model, prompts of the same
lengths, and a reward as cheap (the share of even tokens).

engines: our step with our engine and with vLLM's CPU build (`make venv-vllm`), each with the
rollout before the step and one ahead of it, where the engine has the second core.
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
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import (
    BASELINES,
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
from training import SIZES, conversations, draw, initial, open_run, peak, shape, spans

from tessera.data.batch import Batch
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


def ours(options: argparse.Namespace) -> Figures:
    steps, model = options.steps + 1, shape(SIZES[options.size])
    if options.smoke:
        drawn = [list(map(int, one)) for one in draw(model.vocab_size, 600 * steps * PROMPTS)]
    else:
        drawn = conversations(options.baselines, 4 * steps * PROMPTS)
    ids = [one[:PROMPT_TOKENS] for one in drawn if len(one) >= PROMPT_TOKENS][: steps * PROMPTS]
    train = {"steps": steps, "lr": 3e-4, "schedule": "constant", "warmup": 0.0}
    train |= {"microbatch_tokens": options.microbatch, "save_seconds": 1e9}
    settings = {"prompts_per_rollout": PROMPTS, "samples": SAMPLES, "max_tokens": options.new}
    rewards = [{"kind": "format"}]
    settings |= {"engine": options.engine, "staleness": options.staleness, "gap_limit": 9.0}
    config = GRPOConfig(train=train, rewards=rewards, engine_batch=PROMPTS * SAMPLES, **settings)  # type: ignore[arg-type]
    module = initial(Transformer(model))
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
        "flops": statistics.median(source.flops[1:]),
        "tokens": statistics.median(source.tokens[1:]),
    }


def theirs(options: argparse.Namespace) -> Figures:
    script = options.baselines / "trl_grpo.py"
    words = ["--threads", "1", "--steps", str(options.steps), "--warmup", "1"]
    words += [
        "--prompts",
        str(PROMPTS),
        "--completions",
        str(SAMPLES),
        "--new-tokens",
        str(options.new),
    ]
    with tempfile.TemporaryDirectory() as out:
        found = fresh(script, [*words, "--out", out], 1, options.peer)
    return {
        "wall": found["update_seconds"]["median"],
        "cpu": found["cpu_seconds_per_rollout_step"],
        "generate": found["generate_seconds"]["median"],
        "judge": found["score_seconds"]["median"],
        "train": found["train_seconds"],
        "peak": found["peak_rss_mb"],
        "grown": found["peak_rss_mb"] - found["peak_rss_mb_before_training"],
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--peer", default=TRL, help="a Python that has TRL")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--microbatch", type=int, default=2048, help="ours: tokens of a row")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of a completion")
    parser.add_argument("--size", choices=SIZES, default="6M", help=argparse.SUPPRESS)
    parser.add_argument(
        "--engine", choices=["tessera", "vllm"], default="tessera", help=argparse.SUPPRESS
    )
    parser.add_argument("--staleness", type=int, choices=[0, 1], default=0, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)


def side(options: argparse.Namespace, *more: str) -> Figures:
    """Our figures from a fresh process with the same options."""
    words = sys.argv[1:]
    words = words[1:] if words and words[0] in ("trl", "engines") else words
    return fresh(__file__, ["trl", *words, *more, "--side", "ours"], 1)


def trl(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(ours(options)))
        return
    ways: dict[str, Any] = {"tessera": lambda: {**side(options), "matmul": peak()}}
    if not options.smoke:
        need(
            options.baselines / "trl_grpo.py",
            options.peer,
            hint="--baselines, --peer; make venv-trl",
        )
        ways["TRL GRPOTrainer"] = partial(theirs, options)
    found = alternate(ways, options.rounds)
    samples, mine = PROMPTS * SAMPLES, found["tessera"]
    table(
        [
            {
                "": name,
                "samples/s": f"{samples / median(rows, 'wall'):.2f}",
                "samples/CPU-s": f"{samples / median(rows, 'cpu'):.2f}",
                **{
                    f"{key} s": f"{median(rows, key):.2f}" for key in ("generate", "judge", "train")
                },
                **{f"{key} MB": f"{median(rows, key):,.0f}" for key in ("peak", "grown")},
            }
            for name, rows in found.items()
        ]
    )
    if not options.smoke:
        told = (
            f"{ratio(found['TRL GRPOTrainer'], mine, key):.2f}" for key in ("wall", "cpu", "peak")
        )
        print("\nTRL / tessera, medians of pairs: wall {}, CPU {}, peak memory {}.".format(*told))
    share = statistics.median(
        own["flops"] / (own["train"] / own["wall"] * own["cpu"]) / own["matmul"] for own in mine
    )
    print(
        f"A step trains on {median(mine, 'tokens'):,.0f} tokens, prompts computed once, instead of "
        f"{samples * (PROMPT_TOKENS + options.new):,}; training runs at "
        f"{share:.0%} of the matmul peak."
    )


def engines(options: argparse.Namespace) -> None:
    """A row an engine and staleness, medians of rounds in which they take turns."""
    if not options.smoke:
        need(VLLM, hint="make venv-vllm")
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
    TOY = {"steps": 2, "new": 8, "size": "toy"}
    harness.main(
        __doc__, {"trl": Command(trl, arguments, TOY), "engines": Command(engines, arguments, TOY)}
    )
