"""A process that judges, sample by sample, until its pipe closes: `-m tessera.rl.worker FD`.

JSON in, JSON out, so that the parent never unpickles what a checker made of a model's text. It dies
with its parent, and may be killed at any instant: it holds nothing that others need.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from pydantic import TypeAdapter

from tessera.rl.rewards import Reward, Sample, check, prepare

PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int, memory_bytes: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or memory_bytes < most:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    pipe = Connection(descriptor)
    rewards = TypeAdapter(list[Reward]).validate_json(pipe.recv_bytes())
    prepare(rewards)
    pipe.send_bytes(b"{}")
    while True:
        try:
            part, sample = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        outcome = check(rewards[part], Sample(**sample))  # pyright: ignore[reportArgumentType]
        pipe.send_bytes(json.dumps([outcome.verdict, outcome.score, outcome.reason]).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
