"""Prompts of reinforcement learning, with the fields that their rewards judge by.

They come from procedural tasks or from rows of chats (the Llama-Nemotron RL part, or any dialect)
without their last answer. A run keeps them as `prompts.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode
from tessera.data.dialects import read_chats
from tessera.data.problems import problem
from tessera.data.readers import Bad, DataError, expand
from tessera.data.switch import DETAILED, set_switch
from tessera.generate.engine import Completion, Engine, SamplingParams
from tessera.generate.text import completion_text
from tessera.rl.rewards import Sample
from tessera.runs.recipe import Config

FILE = "prompts.jsonl"
# The names under which rows of other sets keep what a checker needs.
ANSWERS = ("answer", "expected_answer", "ground_truth")


@dataclass(frozen=True, slots=True)
class Prompt:
    """messages: with the switch of `mode`. fields: what rewards judge by. pass_rate: the share of
    `samples` judged answers that were right; None, it was not measured."""

    id: str
    messages: list[Message]
    mode: Mode
    fields: Mapping[str, Any] = field(default_factory=dict)
    pass_rate: float | None = None
    samples: int = 0


class PromptsConfig(Config):
    """tasks: number of problems by name (`"calc@6" = 400`). paths: files of chats. off: the share
    of prompts with reasoning off, so that the switch is trained on both sides. switch: how the mode
    is said, "detailed thinking", "/no_think" or a variable of the template."""

    tasks: dict[str, int] = {}
    paths: tuple[str, ...] = ()
    reasoning: Literal["on", "off"] = "on"
    off: float = Field(default=0.0, ge=0, le=1)
    switch: str = DETAILED
    limit: int | None = Field(default=None, ge=1)


def collect(config: PromptsConfig, seed: int) -> list[Prompt]:
    """All prompts, each question once; those with reasoning off are spread evenly.

    Raises DataError for none, and for a file of bad rows.
    """
    found: dict[str, Prompt] = {}
    for one in (*_of_tasks(config.tasks, seed), *_of_files(config.paths)):
        question, _ = set_switch(one.messages, "on", config.switch)  # the same in either mode
        found.setdefault(json.dumps(question), one)
    if not found:
        raise DataError(
            'there are no prompts: give tasks = { "calc@6" = 400 } or paths = ["FILE.jsonl"]'
        )
    prompts = []
    for number, prompt in enumerate(list(found.values())[: config.limit]):
        off = int((number + 1) * config.off) > int(number * config.off)
        mode: Mode = "off" if off or config.reasoning == "off" else "on"
        messages, _ = set_switch(prompt.messages, mode, config.switch)
        prompts.append(replace(prompt, messages=messages, mode=mode))
    return prompts


def _of_tasks(tasks: Mapping[str, int], seed: int) -> Iterator[Prompt]:
    for name, count in tasks.items():
        base, _, level = name.partition("@")
        if level and not level.isdigit():
            raise DataError(f"tasks: {name}: after @ comes a level, a number from 1 up")
        for index in range(count):
            one = problem(base, seed, index, "train", int(level) if level else None)
            fields = {"answer": one.answer, "level": one.level, "work": one.work}
            question: Message = {"role": "user", "content": one.question}
            yield Prompt(f"{name}/{index}", [question], "on", fields)


def _of_files(paths: Sequence[str]) -> Iterator[Prompt]:
    for path in expand(paths) if paths else ():
        for number, chat in read_chats(path):
            if isinstance(chat, Bad):
                raise DataError(f"{chat}; mend the row, or let curate leave it out")
            messages = chat.messages[:-1] if chat.answered else chat.messages
            fields = {**_instructions(chat.extra.get("args")), **chat.extra}
            known = next((name for name in ANSWERS if fields.get(name) is not None), None)
            if known:
                fields.setdefault("answer", fields[known])
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
        Sample(
            prompt.messages,
            completion_text(encoder.tokenizer, own, one.token_ids),
            dict(prompt.fields),
            one.finish_reason == "length",
        )
        for prompt, own, of_prompt in zip(prompts, ids, completions, strict=True)
        for one in of_prompt
    ]
    return ids, completions, samples


def write(prompts: Sequence[Prompt]) -> str:
    """The text of a prompts file."""
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in prompts)


def read(run: Path) -> list[Prompt]:
    """The prompts of a finished run."""
    lines = (run / FILE).read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines if line]
