"""What an engine did, and the clock it is measured by."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


def clock(device: torch.device) -> float:
    """Seconds for measuring an engine's work: of the wall, or of this thread where it does it all.

    On a CPU with one torch thread the two agree when nothing else runs, and on a shared machine
    the thread's own seconds leave out what others took.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


@dataclass(slots=True)
class Stats:
    """Counts since an engine was made or `reset`, seconds by `clock`; a prompt counts once.

    cached_tokens: of prompts, known from earlier ones and not read. each_step: gathers the
    seconds of every decode step, where it is a list.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    each_step: list[float] | None = None
