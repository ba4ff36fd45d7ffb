"""What is asked in reinforcement learning: prompts with what their rewards judge by.

They come from procedural tasks or from rows of chats (the Llama-Nemotron RL part, or any dialect)
whose answer, if they hold one, is not shown. A run keeps them as `prompts.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tessera.data.conversation import Message, Mode
from tessera.data.dialects import read_chats
from tessera.data.problems import problem
from tessera.data.readers import Bad, DataError, expand
from tessera.data.switch import DETAILED, set_switch
from tessera.data.tokenizer import Tokenizer
from tessera.generate.engine import Completion
from tessera.generate.text import completion_text
from tessera.rl.rewards import Sample
from tessera.runs.recipe import Config

FILE = "prompts.jsonl"
# The names under which rows of other sets keep what a checker needs.
ANSWERS = ("answer", "expected_answer", "ground_truth")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.

    messages: say the mode. fields: what rewards judge by. pass_rate: the share of `samples` answers
    that were right, where it was measured.
    """

    id: str
    messages: list[Message]
    mode: Mode
    fields: Mapping[str, Any] = field(default_factory=dict)
    pass_rate: float | None = None
    samples: int = 0


class PromptsConfig(Config):
    """tasks: how many problems of which (`"calc@6" = 400`). paths: files of chats. off: the share
    of the prompts that are asked with reasoning off, so that the switch is trained on both sides.
    switch: how the mode is said, "detailed thinking", "/no_think" or a variable of the template.
    """

    tasks: dict[str, int] = {}
    paths: tuple[str, ...] = ()
    reasoning: Literal["on", "off"] = "on"
    off: float = Field(default=0.0, ge=0, le=1)
    switch: str = DETAILED
    limit: int | None = Field(default=None, ge=1)


def collect(config: PromptsConfig, seed: int) -> list[Prompt]:
    """All prompts, each question once. Raises DataError for none, and for a file of bad rows."""
    found: dict[str, Prompt] = {}
    for one in (*_of_tasks(config.tasks, seed), *_of_files(config.paths)):
        asked, _ = set_switch(one.messages, "on", config.switch)  # one question in either mode
        found.setdefault(json.dumps(asked), one)
    prompts = list(found.values())[: config.limit]
    if not prompts:
        raise DataError(
            'there are no prompts: give tasks = { "calc@6" = 400 } or paths = ["FILE.jsonl"]'
        )
    return [_in_mode(one, _mode(config, n), config.switch) for n, one in enumerate(prompts)]


def _mode(config: PromptsConfig, number: int) -> Mode:
    """The mode of a prompt: `off` of them spread evenly."""
    if config.reasoning == "off":
        return "off"
    return "off" if int((number + 1) * config.off) > int(number * config.off) else "on"


def _in_mode(prompt: Prompt, mode: Mode, switch: str) -> Prompt:
    messages, _ = set_switch(prompt.messages, mode, switch)
    return Prompt(prompt.id, messages, mode, prompt.fields)


def _of_tasks(tasks: Mapping[str, int], seed: int) -> Iterator[Prompt]:
    for name, count in tasks.items():
        base, _, level = name.partition("@")
        if level and not level.isdigit():
            raise DataError(f"tasks: {name}: what stands behind @ is a level, a number from 1 up")
        for index in range(count):
            one = problem(base, seed, index, "train", int(level) if level else None)
            fields = {"answer": one.answer, "level": one.level, "work": one.work}
            yield Prompt(
                f"{name}/{index}", [{"role": "user", "content": one.question}], "on", fields
            )


def _of_files(paths: Sequence[str]) -> Iterator[Prompt]:
    for path in expand(paths) if paths else ():
        for number, chat in read_chats(path):
            if isinstance(chat, Bad):
                raise DataError(f"{chat}; mend the row, or let curate leave it out")
            asked = chat.messages[:-1] if chat.answered else chat.messages
            fields = {**_instructions(chat.extra.get("args")), **chat.extra}
            known = next((name for name in ANSWERS if fields.get(name) is not None), None)
            if known:
                fields.setdefault("answer", fields[known])
            yield Prompt(f"{path.name}:{number}", asked, chat.mode, fields)


def _instructions(arguments: Any) -> dict[str, Any]:
    """What the Llama-Nemotron RL part keeps in `args`, under IFEval's names; nulls are none."""
    if not isinstance(arguments, Mapping) or "instruction_id_list" not in arguments:
        return {}
    told = arguments.get("instruction_kwargs") or [{}] * len(arguments["instruction_id_list"])
    kwargs = [{k: v for k, v in (one or {}).items() if v is not None} for one in told]
    return {"instruction_id_list": arguments["instruction_id_list"], "kwargs": kwargs}


def judged_samples(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Completion]],
) -> list[Sample]:
    """Samples in the order of prompts and their completions, as rewards take them.

    ids: of each prompt, as the engine was asked with it.
    """
    return [
        Sample(
            prompt.messages,
            completion_text(tokenizer, asked, one.token_ids),
            dict(prompt.fields),
            one.finish_reason == "length",
        )
        for prompt, asked, of_prompt in zip(prompts, ids, completions, strict=True)
        for one in of_prompt
    ]


def write(prompts: Sequence[Prompt]) -> str:
    """The text of a prompts file."""
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in prompts)


def read(run: Path) -> list[Prompt]:
    """The prompts of a finished run."""
    lines = (run / FILE).read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines if line]
