"""Stage `profile`: the prompts of a training, and how often the model solves each already.

    pass rate of a prompt = share of its judged samples that are right     (Llama-Nemotron §5.1)

Verdicts are kept in a journal, so a stopped profile goes on where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from tessera.data.chat import ChatEncoder
from tessera.data.config import no_chat_template
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import Engine
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve
from tessera.progress import Progress
from tessera.rl.prompts import FILE, Prompt, PromptsConfig, collect, sample_answers, write
from tessera.rl.rewards import Reward, require_fields
from tessera.rl.rubric import Rubric
from tessera.runs.files import Journal
from tessera.runs.plan import Step
from tessera.runs.recipe import RecipeError
from tessera.runs.run import Run
from tessera.vllm.config import EngineChoice, open_engine

PORTION = 256  # samples at a time
BINS = 10


class ProfileConfig(PromptsConfig, EngineChoice):
    """samples: of each prompt; 0 measures nothing. rewards: the first says what is right. Prompts
    with a pass rate of `drop_from` or more (the report: 0.75 of 8 samples), or of `drop_to` or
    less, are left out."""

    samples: int = Field(default=8, ge=0)
    rewards: tuple[Reward, ...] = ()
    drop_from: float = Field(default=0.75, ge=0)
    drop_to: float = Field(default=-1.0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    batch: int = Field(default=128, ge=1)
    workers: int = Field(default=2, ge=1)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)


def measure(
    prompts: Sequence[Prompt],
    config: ProfileConfig,
    engine: Engine,
    encoder: ChatEncoder,
    kept: Journal,
    run: Run,
) -> list[Prompt]:
    """The prompts with their pass rates; those that could not be judged at all have none."""
    missing = [n for n in range(len(prompts)) if str(n) not in kept]
    portion = max(1, PORTION // config.samples)
    sampling = {"max_tokens": config.max_tokens, "n": config.samples, "seed": run.seed}
    with (
        Rubric(config.rewards, config.workers) as rubric,
        Progress(run.name, len(prompts), "prompts", quiet=run.quiet) as progress,
    ):
        progress.advance(len(prompts) - len(missing), 0)
        for start in range(0, len(missing), portion):
            part = missing[start : start + portion]
            asked = [prompts[n] for n in part]
            _, _, samples = sample_answers(engine, encoder, asked, part, **sampling)
            verdicts = (judged.parts[rubric.names[0]].verdict for judged in rubric(samples))
            right = [None if v == "could-not-judge" else v == "right" for v in verdicts]
            for place, number in enumerate(part):
                own = slice(place * config.samples, (place + 1) * config.samples)
                kept.add(str(number), {"right": right[own]})
            progress.advance(len(part))
    found = []
    for number, prompt in enumerate(prompts):
        known = [one for one in kept.get(str(number))["right"] if one is not None]
        rate = sum(known) / len(known) if known else None
        found.append(replace(prompt, pass_rate=rate, samples=len(known)))
    return found


def histogram(prompts: Sequence[Prompt], kept: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows of ten bins of pass rate: prompts in them, and those that were kept."""
    total, left = (
        Counter(min(int(rate * BINS), BINS - 1) for p in some if (rate := p.pass_rate) is not None)
        for some in (prompts, kept)
    )
    return [
        {"pass_rate": f"{n / BINS:.1f}-{(n + 1) / BINS:.1f}", "prompts": total[n], "kept": left[n]}
        for n in range(BINS)
    ]


def stage(config: ProfileConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `profile`: write `prompts.jsonl` and `tables/pass_rates.jsonl`."""
    prompts = collect(config, run.seed)
    if not config.samples:
        run.write_file(FILE, write(prompts))
        return
    if not config.rewards:
        raise RecipeError(f"{run.name}: give rewards, the first of which says what is right")
    for prompt in prompts:
        require_fields(config.rewards, prompt.fields)
    model = inputs["model"]
    encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
    engine = open_engine(config, load_model(model, frozen=True), config.batch)
    with Journal(run.path / "samples.jsonl") as kept, closing(engine):
        found = measure(prompts, config, engine, encoder, kept, run)
    low, high = config.drop_to, config.drop_from
    chosen = [p for p in found if p.pass_rate is not None and low < p.pass_rate < high]
    run.write_table("pass_rates", histogram(found, chosen))
    unjudged = sum(one.pass_rate is None for one in found)
    kept_of = f"{len(chosen):,} of {len(found):,} prompts kept"
    run.say(f"{run.name}: {kept_of}, {unjudged} could not be judged")
    if not chosen:
        raise RecipeError(
            f"{run.name}: no prompt has a pass rate between {low} and {high}; give harder or "
            "easier ones, or move the bounds"
        )
    run.write_file(FILE, write(chosen))
