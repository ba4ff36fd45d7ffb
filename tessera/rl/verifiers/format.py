"""Whether a completion obeys the reasoning switch (Llama-Nemotron §5.1's format reward).

On: one closed thought first, and an answer after it. Off: no tag of a thought at all. A prompt
without the switch asks for neither. A completion that was cut short is exempt, as it is in
NVIDIA's own checker: what is missing is length, which other rewards judge.
"""

from __future__ import annotations

import re
from typing import Literal

from tessera.rl.verifiers.answer import CLOSE, OPEN
from tessera.rl.verifiers.outcome import Outcome, judged, right, wrong

Switch = Literal["on", "off"]
_SWITCH = re.compile(r"detailed thinking (on|off)\b", re.IGNORECASE)


def switch_of(system: str) -> Switch | None:
    """What a system prompt's `detailed thinking on|off` asks for; None where it does not say."""
    found = _SWITCH.findall(system)
    return found[-1].lower() if found else None


def verify_format(completion: str, switch: Switch | None, *, truncated: bool = False) -> Outcome:
    """Whether thoughts stand where the switch wants them, and nowhere else.

    truncated: generation stopped at its limit, not at a stop token.
    """
    if switch is None:
        return right("the prompt has no switch")
    if switch not in ("on", "off"):
        raise ValueError(f"the switch is 'on', 'off' or absent (None), not {switch!r}")
    opened, closed = completion.count(OPEN), completion.count(CLOSE)
    if switch == "off":
        return judged(not opened and not closed, "off, but has tags of a thought")
    if truncated:
        return right("cut short: exempt")
    if (opened, closed) != (1, 1):
        return wrong(f"on, but has {opened} {OPEN} and {closed} {CLOSE} instead of one each")
    if not completion.lstrip().startswith(OPEN):
        return wrong(f"on, but does not begin with {OPEN}")
    answer = completion.partition(CLOSE)[2]
    return judged(bool(answer.strip()), "on, but says nothing after its thought")
