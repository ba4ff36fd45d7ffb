"""Runs a solution against its tests; `code.py` starts the source of this file in the jail.

stdin holds a job, as marshal writes it with its length before it: {"solution", "names", "filter"}
for tests that assert, and then a second one, {"setup", "tests", "token"}; or {"solution",
"inputs", "seconds", "together", "clock", "output_bytes", "filter"} for programs that read and
print, whose outputs `code.py` compares.

The solution runs in a process of its own, made before the tests are read. The tests call it
through two pipes, and take from it only values of exact built-in types and exceptions of built-in
classes; what is anything else stays there, and the tests hold a Handle. So nothing that the
solution patches, shadows or overloads is in the process that decides.
"""

from __future__ import annotations

import _ast
import _pickle
import builtins
import collections
import ctypes
import io
import marshal
import math
import os
import resource
import signal
import sys
import time
import types
from itertools import islice
from typing import Any, NoReturn

SOLUTION = "<solution>"
MOST_ITEMS = 10_000  # that are taken from an iterator
MOST_BYTES = 1 << 28  # of one message
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range)
SEQUENCES = (list, tuple, set, frozenset)
BASES: tuple[Any, ...] = (*SEQUENCES, str, int, float, complex, bytes, bytearray)
LISTED = (collections.deque, type({}.keys()), type({}.values()), type({}.items()))
CONSTRUCTORS = {"complex": complex, "range": range, "bytearray": bytearray, "set": set}
CONSTRUCTORS |= {"frozenset": frozenset}
# Raised within `all(map(...))` they end the loop early, and the test passes.
SILENT = ("StopIteration", "StopAsyncIteration")


class Ended(BaseException):
    """The verdict is known: `wrong` for what the solution did, `unjudged` for what tests did."""


class Handle:
    """An object of the solution: its attributes and calls are asked for, it compares by identity.

    It has no truth, no order and no arithmetic, and equals no value.
    """

    __slots__ = ("_number", "_kind")

    def __init__(self, number: int, kind: str) -> None:
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        return ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        ask("set", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ask("call", self, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return ask("call", ask("get", self, "__getitem__"), (key,), {})

    def __len__(self) -> int:
        return ask("call", ask("get", self, "__len__"), (), {})

    def __iter__(self) -> Any:
        return iter(ask("items", self))

    def __hash__(self) -> int:
        return hash(self._number)

    def __eq__(self, other: Any) -> bool:
        if other is None or type(other) is Handle:
            return other is not None and other._number == self._number
        raise Ended("wrong", f"returned a {self._kind}, which is compared with nothing: {ADVICE}")

    def __bool__(self) -> bool:
        raise Ended("wrong", f"returned a {self._kind}, which is neither true nor false: {ADVICE}")


ADVICE = "return numbers, texts, lists, tuples, sets or dictionaries"


def send(descriptor: int, data: bytes) -> None:
    left = memoryview(len(data).to_bytes(8, "little") + data)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int) -> bytes:
    """One message; empty where the other side is gone or says nonsense."""
    length = int.from_bytes(_read(descriptor, 8), "little")
    return _read(descriptor, length) if length <= MOST_BYTES else b""


def _read(descriptor: int, length: int) -> bytes:
    parts, left = [], length
    while left:
        part = os.read(descriptor, min(left, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# The side of the tests.

channel: tuple[int, int]  # to read from, to write to


class Values(_pickle.Unpickler):
    """Reads built-in values, and handles; calls nothing but their constructors."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in ("builtins", "__builtin__") or name not in CONSTRUCTORS:
            raise Ended("wrong", f"returned a {module}.{name}: {ADVICE}")
        return CONSTRUCTORS[name]

    def persistent_load(self, pid: Any) -> Handle:
        number, kind = pid
        if type(number) is not int or type(kind) is not str:
            raise Ended("wrong", "broke the channel to the tests")
        return Handle(number, kind[:60])


class Asked(_pickle.Pickler):
    """Writes what the tests pass: handles by their number."""

    def persistent_id(self, value: Any) -> Any:
        return value._number if type(value) is Handle else None


def require_exact(value: Any) -> None:
    """Raises Ended for a value, at any depth, that is not of a built-in type itself."""
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        kind = type(one)
        if kind in PLAIN or kind is Handle or id(one) in seen:
            continue
        seen.add(id(one))
        if kind is dict:
            left += one.keys()
            left += one.values()
        elif kind in SEQUENCES:
            left += one
        else:
            raise Ended("wrong", f"returned a {kind.__name__}: {ADVICE}")


def ask(what: str, *arguments: Any) -> Any:
    """What the solution answers: a value, or an exception of a built-in class is raised."""
    buffer = io.BytesIO()
    try:
        Asked(buffer, 5).dump((what, arguments))
    except Ended:
        raise
    except Exception as error:
        raise Ended(
            "unjudged", f"the tests pass the solution what cannot be sent: {error}"
        ) from None
    try:
        send(channel[1], buffer.getvalue())
        message = Values(io.BytesIO(receive(channel[0]))).load()
        require_exact(message)
        kind, value, changed = message
    except Ended:
        raise
    except BaseException as error:
        raise Ended("wrong", f"ended before the tests, or broke their channel: {error!r}") from None
    if kind == "raised":
        raise_again(value)
    if kind == "iterator" and type(value) is list:
        return iter(value)
    if changed and what == "in place":
        for mine, new in zip(arguments[1], changed, strict=True):
            put_back(mine, new)
    return value


def put_back(mine: Any, new: Any) -> None:
    if type(mine) is type(new) and type(mine) in (list, bytearray):
        mine[:] = new
    elif type(mine) is type(new) and type(mine) in (dict, set):
        mine.clear()
        mine.update(new)


def raise_again(value: Any) -> NoReturn:
    name, text = value
    kind = before.get(name) if type(name) is str else None
    if not isinstance(kind, type) or not issubclass(kind, Exception) or name in SILENT:
        raise Ended("wrong", f"raised {name}: {text}"[:200])
    try:
        error = kind(text)
    except TypeError:  # UnicodeDecodeError takes five
        error = ValueError(text)
    raise error


before = dict(vars(builtins))


def in_place(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A call whose result nobody takes: it is made for what it does to its arguments."""
    if type(function) is Handle:
        return ask("in place", function, args, kwargs)
    return function(*args, **kwargs)


def mark_in_place(body: list[Any]) -> None:
    for node in body:
        for name in ("body", "orelse", "finalbody", "handlers"):
            mark_in_place(getattr(node, name, None) or [])
        call = node.value if isinstance(node, _ast.Expr) else None
        if isinstance(call, _ast.Call):
            named = isinstance(call.func, _ast.Name) and call.func.id not in before
            if named or isinstance(call.func, _ast.Attribute):
                at = {key: getattr(call.func, key) for key in call.func._attributes}
                call.args.insert(0, call.func)
                call.func = _ast.Name("_in_place", _ast.Load(), **at)


def run_tests(job: dict[str, Any]) -> NoReturn:
    """Forks the solution, then reads the tests, runs them, and writes the verdict."""
    global channel
    told, asked = os.pipe(), os.pipe()
    if not os.fork():
        os.close(told[0])
        os.close(asked[1])
        silence(0, 1, 2)
        confine(job["filter"])
        Solution(asked[0], told[1]).serve(job)
    os.close(told[1])
    os.close(asked[0])
    channel = told[0], asked[1]
    answer = os.dup(1)
    rest = marshal.loads(receive(0))
    silence(0, 1)
    try:
        namespace = {"__name__": "__main__", "_in_place": in_place}
        namespace |= named(ask("names"), job["names"])
        for part in ("setup", "tests"):
            tree: Any = compile(rest[part], f"<{part}>", "exec", _ast.PyCF_ONLY_AST)
            mark_in_place(tree.body)
            exec(compile(tree, f"<{part}>", "exec"), namespace)
        verdict, why = "right", ""
    except Ended as error:
        verdict, why = error.args
    except BaseException as error:
        verdict, why = "wrong", f"{type(error).__name__}: {error}"
    text = f"{rest['token']} {verdict} {why[:200]}"
    os.write(answer, text.encode(errors="replace"))
    os._exit(0)


def named(found: Any, names: list[str]) -> dict[str, Any]:
    """What the solution calls by the names that the tests use; modules the tests import anew."""
    kept = {}
    for name, (module, value) in found.items():
        if name in names:
            known = module in (name, {"np": "numpy", "pd": "pandas"}.get(name))
            kept[name] = __import__(str(module)) if known else value
    return kept


def silence(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


# The side of the solution: whatever it does here, only its messages leave the process.


class Solution:
    """Runs the solution and answers what the tests ask, one message at a time."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self, job: dict[str, Any]) -> NoReturn:
        module = types.ModuleType("__solution__")
        sys.modules[module.__name__] = module  # dataclasses look for it
        namespace = vars(module)
        failed: BaseException | None = None
        try:
            exec(compile(job["solution"], SOLUTION, "exec"), namespace)
        except BaseException as error:
            failed = error
        while data := receive(self.inbox):
            try:
                unpickler = _pickle.Unpickler(io.BytesIO(data))
                unpickler.persistent_load = self.objects.__getitem__  # type: ignore[method-assign]
                what, arguments = unpickler.load()
                if failed:
                    raise Ended(f"{type(failed).__name__}: {failed}")
                if what == "names":
                    self.say("value", self.names(namespace, job["names"]))
                else:
                    self.answer(what, *arguments)
            except BaseException as error:
                self.say("raised", (type(error).__name__, text_of(error)))
        os._exit(0)

    def names(self, namespace: dict[str, Any], names: list[str]) -> dict[str, Any]:
        found = {name: namespace[name] for name in names if name in namespace}
        module = types.ModuleType
        return {
            name: (value.__name__, None) if type(value) is module else ("", value)
            for name, value in found.items()
        }

    def answer(self, what: str, target: Any, *arguments: Any) -> None:
        if what == "get":
            return self.say("value", getattr(target, arguments[0]))
        if what == "set":
            return self.say("value", setattr(target, *arguments))
        if what == "items":
            return self.say("value", list(islice(iter(target), MOST_ITEMS)))
        args, kwargs = arguments
        value = target(*args, **kwargs)
        if hasattr(value, "__next__"):
            return self.say("iterator", list(islice(value, MOST_ITEMS)))
        return self.say("value", value, args if what == "in place" else ())

    def say(self, kind: str, value: Any, changed: Any = ()) -> None:
        buffer = io.BytesIO()
        Told(buffer, 5).dump(self.plain((kind, value, changed)))
        send(self.outbox, buffer.getvalue())

    def plain(self, value: Any) -> Any:
        """The value with built-in types for their subclasses and for numpy's; else a handle."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind in SEQUENCES:
            return kind(map(self.plain, value))
        if isinstance(value, dict):
            return {self.plain(key): self.plain(one) for key, one in dict.items(value)}
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return self.plain(value.tolist())
        if kind in LISTED:
            return self.plain(list(value))
        for base in BASES:
            if isinstance(value, base):
                made: Any = base.__new__ if base in PLAIN else None
                return self.plain(made(base, value) if made else base(value))
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return Handle(number, kind.__name__)


class Told(_pickle.Pickler):
    """Writes what the solution answers: handles by their number and the name of their type."""

    def persistent_id(self, value: Any) -> Any:
        return (value._number, value._kind) if type(value) is Handle else None


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


def run_cases(job: dict[str, Any]) -> None:
    """The solution once for each input, in a process each; stops at the first that is too slow.

    Each may use `seconds` of CPU time, all `together` of CPU time and `clock` of the clock's.
    """
    program = compile(job["solution"], SOLUTION, "exec")
    deadline = time.monotonic() + job["clock"]
    results = []
    for text in job["inputs"]:
        with open("/tmp/in", "w") as file:
            file.write(text)
        results.append(run_case(program, job["seconds"], deadline, job["filter"]))
        with open("/tmp/out", "rb") as file:
            results[-1]["output"] = file.read(job["output_bytes"]).decode(errors="replace")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if used.ru_utime + used.ru_stime > job["together"]:
            results[-1]["ended"] = "cpu"
        if results[-1]["ended"]:
            break
    import json  # takes 3 ms, which tests that assert are spared

    print(json.dumps(results), flush=True)


def run_case(
    program: types.CodeType, seconds: float, deadline: float, allowed: bytes
) -> dict[str, Any]:
    """The exit code of the program, and the limit that ended it: `cpu`, `clock` or none."""
    child = os.fork()
    if not child:
        confine(allowed)
        os.dup2(os.open("/tmp/in", os.O_RDONLY), 0)
        os.dup2(os.open("/tmp/out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        most = math.ceil(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # to the tenth; the limit stands behind it
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    pause = 0.0005
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            spent = used.ru_utime + used.ru_stime >= 0.9 * seconds
            killed = code in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL)
            return {"code": code, "ended": "cpu" if killed and spent else ""}
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"code": -signal.SIGKILL, "ended": "clock"}
        time.sleep(pause)
        pause = min(0.01, pause * 2)


def confine(code: bytes) -> None:
    """No new processes and no signals to those around: the filter of `seccomp.solution`."""
    if code:
        held = ctypes.create_string_buffer(code, len(code))
        program = (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(held))
        if libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
            os._exit(9)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


PR_SET_DUMPABLE, PR_SET_SECCOMP = 4, 22
libc = ctypes.CDLL(None)

if __name__ == "__main__":
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the solution cannot look into this process
    job = marshal.loads(receive(0))
    run_tests(job) if "names" in job else run_cases(job)
