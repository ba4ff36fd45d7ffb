"""Prompts of reinforcement learning, and how often the model solves each already.

    pass rate of a prompt = share of its judged samples that are right     (Llama-Nemotron §5.1)

Prompts come from procedural tasks, or from rows of chats without their last answer. Stage `profile`
keeps samples and verdicts in journals as they come, so a stopped one goes on where it was, and
writes `prompts.jsonl`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tessera import dist
from tessera.data.chat import ChatEncoder
from tessera.data.config import no_chat_template
from tessera.data.conversation import Message, Mode
from tessera.data.dialects import read_chats
from tessera.data.problems import problem
from tessera.data.readers import Bad, DataError, expand, no_chats, with_chats, without_chats
from tessera.data.sources import first_refusals
from tessera.data.switch import NONE, Switch, set_switch
from tessera.data.thought import split_message
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import Completion, Engine, GenerationRequest, SamplingParams
from tessera.generate.text import completion_text
from tessera.model.source import resolve
from tessera.progress import Progress
from tessera.rl.pool import Rubric
from tessera.rl.rewards import Reward, Sample, require_fields
from tessera.rl.verifiers.answer import final_answer
from tessera.runs.files import AnyJournal, SharedJournal
from tessera.runs.plan import Step
from tessera.runs.recipe import Config, RecipeError
from tessera.runs.run import Run
from tessera.vllm.config import InferenceConfig

FILE = "prompts.jsonl"
PORTION = 256  # samples judged at a time
BINS = 10
# The names under which rows keep the expected answer; without one it is what their own answer ends
# with (verifiers/answer.py).
ANSWERS = ("answer", "expected_answer", "ground_truth")


@dataclass(frozen=True, slots=True)
class Prompt:
    """messages: with the switch of `mode`, None for a model without a switch. fields: what rewards
    judge by. pass_rate: the share of `samples` judged answers that were right; None, it was not
    measured."""

    id: str
    messages: list[Message]
    mode: Mode | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    pass_rate: float | None = None
    samples: int = 0


class PromptsConfig(Config):
    """tasks: number of problems by name (`"calc@6" = 400`). paths: files of chats, and "chats" for
    the rows of the run that the stage's `chats` names. off: the share of prompts with reasoning
    off, so that the switch is trained on both sides. switch: how the mode is said (data/switch.py),
    the model's own where not given; "none" says no mode."""

    tasks: dict[str, int] = {}
    paths: tuple[str, ...] = ()
    reasoning: Literal["on", "off"] = "on"
    off: float = Field(default=0.0, ge=0, le=1)
    switch: Switch | None = None
    limit: int | None = Field(default=None, ge=1)


def collect(config: PromptsConfig, seed: int, switch: str | None = None) -> list[Prompt]:
    """All prompts, each question once, reasoning off spread evenly. Raises DataError.

    switch: the model's, which the config's goes before.
    """
    switch = config.switch or switch or NONE
    found: dict[str, Prompt] = {}
    for one in (*_of_tasks(config.tasks, seed), *_of_files(config.paths)):
        question, _ = set_switch(one.messages, "on", switch)  # the same in either mode
        found.setdefault(json.dumps(question), one)
        if len(found) == config.limit:
            break
    if not found:
        raise DataError(
            'there are no prompts: give tasks = { "calc@6" = 400 } or paths = ["FILE.jsonl"]'
        )
    prompts = []
    for number, prompt in enumerate(found.values()):
        off = int((number + 1) * config.off) > int(number * config.off)
        mode: Mode | None = "off" if off or config.reasoning == "off" else "on"
        mode = None if switch == NONE else mode
        messages, _ = set_switch(prompt.messages, mode, switch)
        prompts.append(replace(prompt, messages=messages, mode=mode))
    return prompts


def _of_tasks(tasks: Mapping[str, int], seed: int) -> Iterator[Prompt]:
    for name, count in tasks.items():
        base, _, level = name.partition("@")
        if level and not level.isdigit():
            raise DataError(f"tasks: {name}: after @ comes a level, a number from 1 up")
        for index in range(count):
            one = problem(base, seed, index, "train", int(level) if level else None)
            fields = {"answer": one.answer, "level": one.level, "work": one.work, **one.fields}
            question: Message = {"role": "user", "content": one.question}
            yield Prompt(f"{name}/{index}", [question], "on", fields)


def _of_files(paths: Sequence[str]) -> Iterator[Prompt]:
    for path in expand(paths) if paths else ():
        for number, chat in read_chats(path):
            if isinstance(chat, Bad):
                raise DataError(f"{chat}; mend the row, or let curate leave it out")
            messages = chat.messages[:-1] if chat.answered else chat.messages
            fields = {**_instructions(chat.extra.get("args")), **chat.extra}
            known = next((fields[name] for name in ANSWERS if fields.get(name) is not None), None)
            if known is None and chat.answered:  # as in the Llama-Nemotron set
                own = split_message(chat.messages[-1]).answer
                known = final_answer(own) or own
            if known:
                fields.setdefault("answer", known)
            yield Prompt(f"{path.name}:{number}", messages, chat.mode, fields)


def _instructions(arguments: Any) -> dict[str, Any]:
    """What the Llama-Nemotron RL part keeps in `args`, under IFEval's names, without nulls."""
    if not isinstance(arguments, Mapping) or "instruction_id_list" not in arguments:
        return {}
    ids = arguments["instruction_id_list"]
    given = arguments.get("instruction_kwargs") or [{}] * len(ids)
    kwargs = [{k: v for k, v in (one or {}).items() if v is not None} for one in given]
    return {"instruction_id_list": ids, "kwargs": kwargs}


def sample_answers(
    engine: Engine,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    **sampling: int,
) -> tuple[list[list[int]], list[list[Completion]], list[Sample]]:
    """Each prompt's ids and completions at temperature 1, and the samples of all in order.

    sampling: `n`, `max_tokens` and `seed`.
    """
    ids = [encoder.prompt(one.messages, one.mode) for one in prompts]
    params = SamplingParams(stop_token_ids=encoder.tokenizer.eos_ids, **sampling)  # type: ignore[arg-type]
    completions = engine.generate(ids, params, keys=keys)
    samples = [
        _sample(prompt, completion_text(encoder.tokenizer, own, one.token_ids), one.finish_reason)
        for prompt, own, of_prompt in zip(prompts, ids, completions, strict=True)
        for one in of_prompt
    ]
    return ids, completions, samples


def _sample(prompt: Prompt, text: str, reason: str) -> Sample:
    return Sample(prompt.messages, text, dict(prompt.fields), reason == "length", prompt.mode)


def write(prompts: Sequence[Prompt]) -> str:
    """The text of a prompts file."""
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in prompts)


def read(run: Path) -> list[Prompt]:
    """The prompts of a finished run."""
    lines = (run / FILE).read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines if line]


class ProfileConfig(PromptsConfig, InferenceConfig):
    """samples: of each prompt; 0 measures nothing. rewards: the first says what is right. Prompts
    with a pass rate of `drop_from` or more (the report: 0.75 of 8 samples), or of `drop_to` or
    less, are left out."""

    samples: int = Field(default=8, ge=0)
    rewards: tuple[Reward, ...] = ()
    drop_from: float = Field(default=0.75, ge=0)
    drop_to: float = Field(default=-1.0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    batch: int = Field(default=128, ge=1)
    workers: int = Field(default=2, ge=1)  # that judge, on each machine

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        told = no_chat_template(step, steps) + no_chats(self.paths, step.inputs.get("chats"))
        for path in expand(without_chats(self.paths)):
            told += first_refusals(path, (one for _, one in read_chats(path)))
        return told


def answer(
    prompts: Mapping[int, Prompt],
    config: ProfileConfig,
    engine: Engine,
    encoder: ChatEncoder,
    kept: AnyJournal,
    run: Run,
    label: str,
) -> None:
    """Writes every sample that `kept` lacks of the prompts into it, as it ends; its key is
    `PROMPT/SAMPLE`."""
    stops = encoder.tokenizer.eos_ids
    params = SamplingParams(
        config.max_tokens, n=config.samples, seed=run.seed, stop_token_ids=stops
    )
    left = {
        number: [n for n in range(config.samples) if f"{number}/{n}" not in kept]
        for number in prompts
    }

    def missing() -> Iterator[GenerationRequest]:
        for number, prompt in prompts.items():
            if left[number]:
                ids = encoder.prompt(prompt.messages, prompt.mode)
                yield GenerationRequest(ids, params, number, left[number], owner=prompt)

    known = len(kept)
    total = known + sum(map(len, left.values()))
    with (
        Progress(label, total, "tokens", steps="samples", quiet=run.quiet) as progress,
        closing(engine.as_completed(missing(), progress.working)) as completed,
    ):
        progress.advance(known, 0)
        for request, sample, completion in completed:
            row = {
                "prompt_id": request.owner.id,
                "sample": sample,
                "mode": request.owner.mode,
                "messages": request.owner.messages,
                "prompt": encoder.tokenizer.decode(request.prompt, special=True),
                "text": completion_text(encoder.tokenizer, request.prompt, completion.token_ids),
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            kept.add(f"{request.key}/{sample}", row)
            progress.advance(1, row["tokens"])


def judge(
    prompts: Mapping[int, Prompt],
    config: ProfileConfig,
    kept: AnyJournal,
    verdicts: AnyJournal,
    run: Run,
    label: str,
) -> None:
    """Writes the verdict on every sample that `verdicts` lacks of the prompts into it, under the
    same key."""
    numbers = {key: int(key.split("/")[0]) for key in kept if key not in verdicts}
    missing = [key for key, number in numbers.items() if number in prompts]
    with (
        Rubric(config.rewards, dist.share_of_machine(config.workers)) as rubric,
        Progress(f"{label}: judging", len(missing), "samples", quiet=run.quiet) as progress,
    ):
        for start in range(0, len(missing), PORTION):
            part = missing[start : start + PORTION]
            rows = [(prompts[numbers[key]], kept.get(key)) for key in part]
            samples = [_sample(one, row["text"], row["finish_reason"]) for one, row in rows]
            for key, judged in zip(part, rubric(samples), strict=True):
                first = judged.parts[rubric.names[0]]
                verdicts.add(key, {"verdict": first.verdict, "reason": first.reason})
            progress.advance(len(part))


def measure(
    prompts: Sequence[Prompt], config: ProfileConfig, model: Path, encoder: ChatEncoder, run: Run
) -> list[Prompt]:
    """The prompts with their pass rates; those that could not be judged at all have none. The
    processes share the prompts, and the main one has the result."""
    layout = config.placement(model).layout
    label = layout.title(run.name)
    with (
        SharedJournal(run.path / "samples.jsonl") as samples,
        SharedJournal(run.path / "verdicts.jsonl") as verdicts,
        closing(config.open_engine(model, config.batch)) as engine,
    ):
        keys = [[f"{number}/{n}" for n in range(config.samples)] for number in range(len(prompts))]
        todo = [
            number for number, own in enumerate(keys) if not all(map(verdicts.__contains__, own))
        ]
        own = {number: prompts[number] for number in layout.mine(todo)}
        answer(own, config, engine, encoder, samples, run, label)
        if layout.leads:
            judge(own, config, samples, verdicts, run, label)
        samples.collect()
        verdicts.collect()
        if not dist.is_main():
            return []
        found = []
        for prompt, own in zip(prompts, keys, strict=True):
            known = [verdicts.get(key)["verdict"] for key in own]
            known = [one == "right" for one in known if one != "could-not-judge"]
            rate = sum(known) / len(known) if known else None
            found.append(replace(prompt, pass_rate=rate, samples=len(known)))
        return found


def stage(config: ProfileConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `profile`: write `prompts.jsonl` and `tables/pass_rates.jsonl`."""
    model = inputs["model"]
    encoder = ChatEncoder.of(load_tokenizer(resolve(model)), switch=config.switch)
    config = config.model_copy(update={"paths": with_chats(config.paths, inputs.get("chats"))})
    prompts = collect(config, run.seed, encoder.switch)
    if not config.samples:
        run.write_file(FILE, write(prompts))
        return
    if not config.rewards:
        raise RecipeError(f"{run.name}: give rewards, the first of which says what is right")
    for prompt in prompts:
        require_fields(config.rewards, prompt.fields)
    found = measure(prompts, config, model, encoder, run)
    if not dist.is_main():
        return
    low, high = config.drop_to, config.drop_from
    chosen = [p for p in found if p.pass_rate is not None and low < p.pass_rate < high]
    total, left = (
        Counter(min(int(rate * BINS), BINS - 1) for p in some if (rate := p.pass_rate) is not None)
        for some in (found, chosen)
    )
    bins = [f"{n / BINS:.1f}-{(n + 1) / BINS:.1f}" for n in range(BINS)]
    table = [{"pass_rate": one, "prompts": total[n], "kept": left[n]} for n, one in enumerate(bins)]
    run.write_table("pass_rates", table)
    unjudged = sum(one.pass_rate is None for one in found)
    kept_of = f"{len(chosen):,} of {len(found):,} prompts kept"
    run.say(f"{run.name}: {kept_of}, {unjudged} could not be judged")
    if not chosen:
        raise RecipeError(
            f"{run.name}: no prompt has a pass rate between {low} and {high}; give harder or "
            "easier ones, or move the bounds"
        )
    run.write_file(FILE, write(chosen))
