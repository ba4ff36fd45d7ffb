"""The reasoning switch on the toy of recipes/sft-toy.toml: accuracy, obedience, tokens, on and off.

    python benchmarks/switch.py [--seeds 1 2 3] [--runs DIR] [--problems 400]

Each seed is a parent from scratch and its fine-tuning, run by the command line (5 to 7 CPU-minutes;
what DIR holds already is not run again). Then held-out problems, the same for every seed, are
answered greedily by the built-in engine, asked through the model's own template.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Mode
from tessera.data.problems import MODES, Problem, problem
from tessera.data.switch import switch_metrics
from tessera.data.thought import split, split_message
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve
from tessera.table import render_table

ROOT = Path(__file__).parents[1]
LEVELS = range(2, 7)
COLUMNS = ("obedience", "accuracy", "tokens")


def trained(seed: int, runs: Path) -> Path:
    """The fine-tuned model of a seed, made if it is not there."""
    name = f"sft-toy-{seed}"
    words = ["run", str(ROOT / "recipes" / "sft-toy.toml"), f"seed={seed}", f"name={name}"]
    subprocess.run([sys.executable, "-m", "tessera", *words, "--runs", str(runs)], check=True)
    return runs / name / "sft"


def answers(model: Path, problems: list[Problem], mode: Mode) -> Iterator[dict[str, Any]]:
    """What `switch_metrics` reads, of each problem."""
    tokenizer = load_tokenizer(resolve(model))
    encoder, engine = ChatEncoder.of(tokenizer), TorchEngine(load_model(model, frozen=True))
    params = SamplingParams(max_tokens=64, temperature=0, stop_token_ids=tokenizer.eos_ids)
    chats = [one.chat(mode) for one in problems]
    prompts = [encoder.prompt(chat.messages[:1], mode) for chat in chats]
    for chat, (completion,) in zip(chats, engine.generate(prompts, params), strict=True):
        text = tokenizer.decode(completion.token_ids)
        wanted = split_message(chat.messages[-1]).answer
        correct = split(text).answer.strip() == wanted
        yield {"mode": mode, "text": text, "correct": correct, "tokens": len(completion.token_ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/switch"))
    parser.add_argument("--problems", type=int, default=400, help="of each number of operations")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        model = trained(seed, args.runs)
        for level in LEVELS:
            drawn = [problem("calc", 0, i, "heldout", level) for i in range(args.problems)]
            drawn = list({one.question: one for one in drawn}.values())
            found = switch_metrics([row for mode in MODES for row in answers(model, drawn, mode)])
            named = {f"{c}_{m}": round(found[f"{c}_{m}"], 3) for m in MODES for c in COLUMNS}
            rows.append({"seed": seed, "operations": level, "problems": len(drawn), **named})
    print(render_table(rows))


if __name__ == "__main__":
    main()
