"""The reasoning switch of a model: which one it has, how it is said, and whether an answer obeys.

A switch is "none"; "detailed thinking", the system prompt `detailed thinking on` or `off` of
Llama-Nemotron (paper §4); "/no_think", which stands in the system prompt where thinking is off; or
the name of a variable that the chat template reads, `enable_thinking` say. A model that was trained
with a switch records it in its tokenizer_config.json; of others the template tells. A model whose
switch is "none" is never told to think or not to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from tessera.data.conversation import SWITCH, Message, Mode, switch_of
from tessera.data.thought import CLOSE, OPEN, split
from tessera.runs.files import atomic_write

if TYPE_CHECKING:
    from tessera.data.template import Template

NONE, DETAILED, NO_THINK, THINK = "none", "detailed thinking", "/no_think", "/think"
NAMES = f'"{NONE}", "{DETAILED}", "{NO_THINK}" or a variable of the chat template'
KEY, FILE = "reasoning_switch", "tokenizer_config.json"  # where a model records its switch
VARIABLES = ("enable_thinking", "thinking", "enable_reasoning", "enable_think")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")  # the first two are off


class SwitchError(ValueError):
    """A request for thinking that cannot be understood; the text says what is allowed."""


def check_switch(value: str) -> str:
    """The name of a switch. Raises SwitchError for what is none."""
    if is_variable(value) and not value.isidentifier():
        raise SwitchError(f"{value!r} names no switch; give {NAMES}")
    return value


Switch = Annotated[str, AfterValidator(check_switch)]


def is_variable(switch: str) -> bool:
    """Whether a switch is a variable of the template."""
    return switch not in (NONE, DETAILED, NO_THINK)


def recorded_switch(home: Path | None) -> str | None:
    """The switch that the model of a tokenizer's directory was trained with, None for none."""
    path = None if home is None else home / FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    value = found.get(KEY) if isinstance(found, dict) else None
    return check_switch(value) if isinstance(value, str) else None


def record_switch(home: Path, switch: str | None) -> None:
    """Write the switch into the directory's tokenizer_config.json; without one, nothing changes."""
    if switch is None or switch == NONE or recorded_switch(home) == switch:
        return
    path = home / FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    atomic_write(path, json.dumps(found | {KEY: switch}, indent=2, ensure_ascii=False) + "\n")


def switch_of_model(home: Path | None, template: Template) -> str:
    """The switch that is recorded in the tokenizer's directory, else what the template reads."""
    if (known := recorded_switch(home)) is not None:
        return known
    if (variable := next((name for name in VARIABLES if name in template.variables), None)) is None:
        return next((word for word in (DETAILED, NO_THINK) if word in template.source), NONE)
    return variable


def set_switch(
    messages: Sequence[Message], mode: Mode | None, switch: str
) -> tuple[list[Message], dict[str, Any]]:
    """(messages that say the mode, variables for the template that say it).

    Where the mode is None or the switch "none", nothing is said. A first line of the system prompt
    that says a mode in another way, or another mode, is replaced; all else stays as it is.
    """
    found = [dict(message) for message in messages]
    if mode is None or switch == NONE:
        return found, {}
    said = {DETAILED: f"{DETAILED} {mode}", NO_THINK: NO_THINK if mode == "off" else ""}
    said, variables = said.get(switch, ""), {switch: mode == "on"} if is_variable(switch) else {}
    has_system = found[0]["role"] == "system"
    text = found[0]["content"] if has_system else ""
    first, _, rest = text.strip().partition("\n")
    if said and (first.strip() == said or (said == NO_THINK and _soft(text) == "off")):
        return found, variables
    replaced = first.strip() in (
        tuple(SWITCH) if switch == DETAILED else (*SWITCH, NO_THINK, THINK)
    )
    if not said and not replaced:
        return found, variables
    own = rest.strip() if replaced else text
    system = {"role": "system", "content": "\n\n".join(part for part in (said, own) if part)}
    others = found[1:] if has_system else found
    return ([system, *others] if system["content"] else others), variables


def requested(
    messages: Sequence[Message],
    switch: str,
    *,
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> Mode | None:
    """The mode that a request asks for, None where nobody says; its messages stay as they are.

    In this order: `enable_thinking`, `reasoning_effort` ("none" and "minimal" are off), `/think` or
    `/no_think` as the last word of the last user message or of the system prompt, and for the
    switch "detailed thinking" the system prompt. Raises SwitchError for what is not understood.
    """
    if reasoning_effort is not None and reasoning_effort not in _EFFORTS:
        raise SwitchError(
            f"reasoning_effort = {reasoning_effort!r} is not one of {', '.join(_EFFORTS)}"
        )
    if not isinstance(enable_thinking, bool | None):
        raise SwitchError(f"enable_thinking = {enable_thinking!r}: give true or false")
    if switch == NONE:
        return None
    if enable_thinking is not None:
        return "on" if enable_thinking else "off"
    if reasoning_effort is not None:
        return "off" if reasoning_effort in _EFFORTS[:2] else "on"
    last: dict[str, Any] = {one["role"]: one.get("content") for one in messages}
    soft = _soft(last.get("user")) or _soft(last.get("system"))
    return soft or (switch_of(messages) if switch == DETAILED else None)


def _soft(text: Any) -> Mode | None:
    """What the last word of a text says: elsewhere, `/no_think` is talked about and not said."""
    word = text.split()[-1:] if isinstance(text, str) else []
    return {THINK: "on", NO_THINK: "off"}.get(word[0]) if word else None  # type: ignore[return-value]


def require_switch(switch: str, mode: Mode | None, what: str) -> None:
    """Raises SwitchError where a model is to be asked in a mode and has no switch to say it by."""
    if mode == "on" and switch == NONE:
        raise SwitchError(
            f"{what} has no reasoning switch that is known: none is recorded in its {FILE} or read "
            "by its chat template. Leave --thinking out to ask it as it is, or say how it is told "
            f"to think with --switch (`switch` in a recipe): {NAMES}"
        )


def obeys(text: str, mode: Mode, *, opened: bool = False) -> bool:
    """Whether a text is one closed thought and an answer, or with "off" has no trace of a thought.

    opened: its prompt ended with `<think>`. A thought that nobody opened does not obey.
    """
    if mode == "off":
        return OPEN not in text and CLOSE not in text and bool(text.strip())
    if opened:
        text = OPEN + text
    once = text.count(OPEN) == text.count(CLOSE) == 1
    return once and text.lstrip().startswith(OPEN) and bool(split(text).answer.strip())


def obedience(text: str, mode: Mode | None) -> bool | None:
    """`obeys`, None where no mode was asked for."""
    return None if mode is None else obeys(text, mode)


def switches_of(found: Mapping[str, str]) -> str | None:
    """The one switch that is said in all of some sources, by their names, but for "none".

    Raises SwitchError where they differ: a model has one.
    """
    said = {name: switch for name, switch in found.items() if switch != NONE}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name}: {switch!r}" for name, switch in said.items())
        raise SwitchError(f"the sources say the mode in different ways ({told}); a model has one")
    return next(iter(said.values()), None)
