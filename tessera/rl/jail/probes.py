"""The jail's self-test: ways out, tried from within; each that works is a reason to refuse."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

PROCESSES = 8  # what the probes may start at once

# Runs jailed, with {secret}, {pid}, {limit} put in. Prints the list of what it managed to do.
_SCRIPT = """
import ctypes, json, os, socket, time
escaped = []

def attempt(words, action):
    try:
        worked = action()
    except BaseException:
        worked = False
    if worked:
        escaped.append(words)

def status(key):
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(key + ":"))

def in_child(action):
    child = os.fork()
    if not child:
        os._exit(not action())
    return os.waitpid(child, 0)[1] == 0

def too_many():
    made = 0
    children = []
    for _ in range({limit} + 8):
        try:
            child = os.fork()
        except OSError:
            break
        if not child:
            time.sleep(5)
            os._exit(0)
        made += 1
        children.append(child)
    if made > {limit}:
        time.sleep(0.2)  # the watcher's chance
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return made > {limit}

libc = ctypes.CDLL(None, use_errno=True)
attempt("read a file of the host", lambda: open({secret!r}).read())
attempt("read a file of the host above its root", lambda: open("/.." + {secret!r}).read())
attempt("write to the root", lambda: open("/escaped", "w"))
attempt("write to the interpreter", lambda: open(os.path.join(os.__file__ + ".escaped"), "w"))
attempt("see a process of the host", lambda: os.path.exists("/proc/{pid}/status") and {pid} > 64)
attempt("open a socket", lambda: socket.socket(socket.AF_INET))
attempt("see the network", lambda: len(open("/proc/net/dev").read().splitlines()) > 3)
attempt("make a user namespace", lambda: libc.unshare(0x10000000) == 0)
attempt("keep rights", lambda: int(status("CapEff"), 16) or int(status("CapBnd"), 16))
attempt("gain rights", lambda: status("NoNewPrivs") != "1" or status("Seccomp") != "2")
attempt("become another user", lambda: os.setuid(0) is None)
attempt("take memory without limit", lambda: bytearray(1 << 30))
attempt("trace", lambda: in_child(lambda: libc.ptrace(0, 0, 0, 0) == 0))
print(json.dumps(escaped), flush=True)
# Last, for whom the limit does not hold (root) the watcher ends the jail.
attempt("start processes without limit", too_many)
print(json.dumps(escaped), flush=True)
"""


@contextmanager
def canary() -> Iterator[str]:
    """A file outside that anybody may read, and that a jailed program must not find."""
    descriptor, path = tempfile.mkstemp(prefix="tessera-jail-")
    try:
        os.write(descriptor, b"secret")
        os.fchmod(descriptor, 0o644)
        yield path
    finally:
        os.close(descriptor)
        os.unlink(path)


def script(secret: str) -> str:
    """Tries the ways out and prints those that worked: before a bomb, and, if it can, after."""
    assert json.dumps(secret).isascii()
    return _SCRIPT.format(secret=secret, pid=os.getpid(), limit=PROCESSES)
