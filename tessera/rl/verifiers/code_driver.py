"""Runs a solution against its tests; `code.py` starts the source of this file in the jail.

stdin holds one JSON object: {"solution", "setup", "tests", "token"} for tests that assert, or
{"solution", "inputs", "seconds", "together", "clock", "output_bytes"} for programs that read and
print. It prints the token once every test has passed, or the outputs, which `code.py` compares.
Solutions that exit before the tests print no token; tests get the built-ins from before the
solution ran; `honest` refuses values with an `__eq__` of their own. Code written against this file
can find the token.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import os
import resource
import signal
import sys
import time
import types
from typing import Any, NoReturn

SOLUTION = "<solution>"
ORDERINGS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__")


def invents_order(value: Any, depth: int = 0) -> bool:
    """Whether a value, or one within it, compares by a method that the solution wrote."""
    if type(value) in (list, tuple, set, frozenset) and depth < 8:
        return any(invents_order(each, depth + 1) for each in value)
    if type(value) is dict and depth < 8:
        return any(invents_order(each, depth + 1) for pair in value.items() for each in pair)
    for kind in type(value).__mro__:
        for name in ORDERINGS:
            method = kind.__dict__.get(name)
            if isinstance(method, types.FunctionType) and method.__code__.co_filename == SOLUTION:
                return True
    return False


def honest(left: Any, right: Any) -> None:
    """Raises AssertionError where only one side brings its own idea of equality."""
    if invents_order(left) != invents_order(right):
        raise AssertionError("an answer that brings its own comparison")


class Compared(ast.NodeTransformer):
    """`a == b` in a test becomes `(honest(a, b), a == b)[1]`, each side evaluated once."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        left, right = (ast.Name(name, ast.Load()) for name in ("_left", "_right"))
        arguments = [ast.arg("_left"), ast.arg("_right")]
        check = ast.Call(ast.Name("_honest", ast.Load()), [left, right], [])
        plain = ast.Compare(left, node.ops, [right])
        body = ast.Subscript(ast.Tuple([check, plain], ast.Load()), ast.Constant(1), ast.Load())
        empty: list[Any] = []
        signature = ast.arguments(
            posonlyargs=empty, args=arguments, kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        call = ast.Call(ast.Lambda(signature, body), [node.left, node.comparators[0]], [])
        return ast.copy_location(call, node)


def run_tests(job: dict[str, Any]) -> NoReturn:
    """Solution, set-up and tests, in this process; the token on the real stdout if all hold."""
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    before = dict(vars(builtins))
    tree = ast.fix_missing_locations(Compared().visit(ast.parse(job["tests"])))
    tests = compile(tree, "<tests>", "exec")
    exec_, exit_, write = exec, os._exit, os.write
    namespace: dict[str, Any] = {"__name__": "__solution__"}
    exec_(compile(job["solution"], SOLUTION, "exec"), namespace)
    exec_(compile(job["setup"], "<setup>", "exec"), namespace)
    namespace |= {"__builtins__": before, "_honest": honest, "__name__": "__main__"}
    exec_(tests, namespace)
    write(answer, job["token"].encode())
    exit_(0)


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
        results.append(run_case(program, job["seconds"], deadline))
        with open("/tmp/out", "rb") as file:
            results[-1]["output"] = file.read(job["output_bytes"]).decode(errors="replace")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if used.ru_utime + used.ru_stime > job["together"]:
            results[-1]["ended"] = "cpu"
        if results[-1]["ended"]:
            break
    print(json.dumps(results), flush=True)


def run_case(program: types.CodeType, seconds: float, deadline: float) -> dict[str, Any]:
    """The exit code of the program, and the limit that ended it: `cpu`, `clock` or none."""
    child = os.fork()
    if not child:
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


if __name__ == "__main__":
    job = json.load(sys.stdin)
    run_tests(job) if "tests" in job else run_cases(job)
