"""The reasoning switch: how it is said, who may say it, and whether a model obeys.

Llama-Nemotron's is the system prompt `detailed thinking on` or `detailed thinking off` (paper §4);
the later `/no_think` stands in the system prompt where thinking is off; other templates take a
variable, `enable_thinking` say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tessera.data.conversation import SWITCH, Message, Mode, switch_of
from tessera.data.thought import CLOSE, OPEN, split

DETAILED, NO_THINK = "detailed thinking", "/no_think"
_SOFT = re.compile(r"(?<!\S)/(no_)?think(?!\S)")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")  # the first two are off


class SwitchError(ValueError):
    """A request for thinking that cannot be understood; the text says what is allowed."""


def set_switch(
    messages: Sequence[Message], mode: Mode, switch: str = DETAILED
) -> tuple[list[Message], dict[str, Any]]:
    """(messages that say the mode, variables for the template that say it).

    What the system prompt says already is replaced; instructions of its own follow the switch on
    a line of their own. switch: "detailed thinking", "/no_think" or a variable of the template.
    """
    rest = [dict(message) for message in messages]
    text = rest.pop(0)["content"].strip() if rest[0]["role"] == "system" else ""
    first, _, own = text.partition("\n")
    if first.strip() in (*SWITCH, NO_THINK):
        text = own.strip()
    says = {DETAILED: f"{DETAILED} {mode}", NO_THINK: NO_THINK if mode == "off" else ""}
    system = "\n\n".join(part for part in (says.get(switch, ""), text) if part)
    if system:
        rest.insert(0, {"role": "system", "content": system})
    return rest, {} if switch in says else {switch: mode == "on"}


def requested(
    messages: Sequence[Message],
    *,
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> tuple[Mode | None, list[Message]]:
    """(the mode that a request asks for, its messages without `/think` and `/no_think`).

    In this order: `enable_thinking`, `reasoning_effort` ("none" and "minimal" are off), the last
    `/think` or `/no_think` of a user or the system, the system prompt `detailed thinking …`. None
    where nobody says. Raises SwitchError for an unknown effort.
    """
    if reasoning_effort is not None and reasoning_effort not in _EFFORTS:
        raise SwitchError(
            f"reasoning_effort = {reasoning_effort!r} is not one of {', '.join(_EFFORTS)}"
        )
    soft: Mode | None = None
    cleaned: list[Message] = []
    for message in messages:
        content = message.get("content")
        if message["role"] in ("user", "system") and isinstance(content, str):
            for hit in _SOFT.finditer(content):
                soft = "off" if hit[1] else "on"
            if _SOFT.search(content):
                message = {**message, "content": _SOFT.sub("", content).strip()}
                if message["role"] == "system" and not message["content"]:
                    continue
        cleaned.append(dict(message))
    if enable_thinking is not None:
        return ("on" if enable_thinking else "off"), cleaned
    if reasoning_effort is not None:
        return ("off" if reasoning_effort in _EFFORTS[:2] else "on"), cleaned
    return soft or switch_of(cleaned), cleaned


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
