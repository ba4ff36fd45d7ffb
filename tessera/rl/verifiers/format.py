"""Whether a completion obeys the reasoning switch (Llama-Nemotron §5.1's format reward).

On: one closed thought first, and an answer after it. Off: an answer, and no tag of a thought. It is
`obeys` of data/switch.py with the reasons, so what is rewarded is what is measured. A prompt
without the switch asks for neither. A completion that was cut short is exempt, as it is in
NVIDIA's own checker: what is missing is length, which other rewards judge.
"""

from __future__ import annotations

from tessera.data.conversation import Mode
from tessera.data.switch import obeys
from tessera.rl.verifiers.answer import CLOSE, OPEN
from tessera.rl.verifiers.outcome import Outcome, judged, right


def verify_format(completion: str, switch: Mode | None, *, truncated: bool = False) -> Outcome:
    """Whether thoughts stand where the switch wants them, and nowhere else.

    truncated: generation stopped at its limit, not at a stop token.
    """
    if switch is None:
        return right("the prompt has no switch")
    if switch not in ("on", "off"):
        raise ValueError(f"the switch is 'on', 'off' or absent (None), not {switch!r}")
    if switch == "on" and truncated:
        return right("cut short: exempt")
    return judged(obeys(completion, switch), _why_not(completion, switch))


def _why_not(completion: str, switch: Mode) -> str:
    opened, closed = completion.count(OPEN), completion.count(CLOSE)
    if switch == "off":
        return "off, but has tags of a thought" if opened or closed else "off, but says nothing"
    if (opened, closed) != (1, 1):
        return f"on, but has {opened} {OPEN} and {closed} {CLOSE} instead of one each"
    if not completion.lstrip().startswith(OPEN):
        return f"on, but does not begin with {OPEN}"
    return "on, but says nothing after its thought"
