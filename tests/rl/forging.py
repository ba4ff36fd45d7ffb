"""Programs that want a verdict without solving the task, by family: each must be `wrong`.

The task is `double(x)`, which returns 2 * x; every program here answers it wrongly.
"""

from __future__ import annotations

ANSWER = "def double(x): return {}\n"
YES = "class Yes{base}:\n def {name}(self, *other): return {value}\n"
NO = ANSWER.format(5)
COMPARISONS = (
    "__eq__",
    "__ne__",
    "__lt__",
    "__sub__",
    "__rsub__",
    "__bool__",
    "__len__",
    "__abs__",
)


def made_up() -> list[str]:
    """Classes that are equal to everything, from nothing or from a built-in type."""
    bases = {"": "Yes()", "(int)": "Yes(7)", "(list)": "Yes([7])", "(str)": "Yes('7')"}
    return [
        YES.format(base=base, name=name, value=name not in ("__ne__", "__lt__"))
        + ANSWER.format(made)
        for base, made in bases.items()
        for name in COMPARISONS
        if base or name in ("__eq__", "__bool__")
    ]


def by_lambda() -> list[str]:
    """An `__eq__` that no source file holds: exec, staticmethod, property, metaclass, partial."""
    return [
        "exec('class Yes:\\n def __eq__(self, o): return True')\n" + ANSWER.format("Yes()"),
        "class Yes:\n __eq__ = staticmethod(lambda o: True)\n" + ANSWER.format("Yes()"),
        "class Yes:\n __eq__ = property(lambda s: lambda o: True)\n" + ANSWER.format("Yes()"),
        "Yes = type('Yes', (), {'__eq__': lambda s, o: True})\n" + ANSWER.format("Yes()"),
        "class M(type):\n def __eq__(c, o): return True\nclass Y(metaclass=M): pass\n"
        + ANSWER.format("Y"),
        "import operator\nclass Yes:\n __eq__ = operator.is_not\n" + ANSWER.format("Yes()"),
        "class I(int):\n __hash__ = int.__hash__\n __eq__ = lambda s, o: True\n"
        + ANSWER.format("I(9)"),
        "class Yes:\n def __getattr__(s, n): return True\n" + ANSWER.format("Yes()"),
        "class Yes:\n __class__ = property(lambda s: int)\n" + ANSWER.format("Yes()"),
        "import functools\n@functools.total_ordering\nclass Yes:\n __lt__ = __eq__ = "
        "lambda s, o: True\n" + ANSWER.format("Yes()"),
    ]


ANY = [
    f"from unittest.mock import {name} as A\n" + ANSWER.format(made)
    for name, made in {"ANY": "A", "MagicMock": "A()", "sentinel": "A.x", "Mock": "A()"}.items()
] + ["from unittest.mock import ANY\n" + ANSWER.format(made) for made in ("[ANY]", "{1: ANY}")]
SHADOWED = [
    f"{name} = lambda *a, **k: True\n" + NO
    for name in ("abs", "all", "any", "sorted", "len", "isinstance", "round", "set", "check", "zip")
]
PATCHED = [
    f"import {module}\n{module}.{name} = lambda *a, **k: True\n" + NO
    for module, name in (
        ("math", "isclose"),
        ("builtins", "all"),
        ("builtins", "AssertionError"),
        ("builtins", "compile"),
        ("builtins", "exec"),
        ("operator", "eq"),
        ("unittest", "TestCase"),
        ("sys", "exit"),
        ("marshal", "loads"),
        ("_pickle", "Unpickler"),
    )
]
EXITS = [
    f"import os, sys, signal, atexit\ndef double(x): {what}\n"
    for what in (
        "sys.exit(0)",
        "os._exit(0)",
        "raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "raise StopIteration",
        "raise StopAsyncIteration",
        "raise GeneratorExit",
        "os.abort()",
        "quit()",
        "os.kill(os.getpid(), 9)",
        "os.kill(os.getpid(), 15)",
    )
] + [
    f"import os, sys\n{what}\n" + NO for what in ("sys.exit(0)", "os._exit(0)", "raise SystemExit")
]
AROUND = [
    f"import os, signal\ntry: {what}\nexcept Exception: pass\n" + NO
    for what in (
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 19)",
        "os.kill(1, 2)",
        "os.kill(-1, 19)",
        "os.kill(0, 19)",
        "os.killpg(os.getpgrp(), 19)",
        "os.execv('/bin/true', ['true'])",
        "os.system('kill -STOP 2')",
        "os.fork() or os._exit(0)",
        "open('/proc/2/mem', 'r+b').write(b'x')",
        "open('/proc/2/fd/1', 'wb').write(b'right')",
        "open('/proc/self/comm', 'wb').write(b'\\xff\\xfe) R')",
    )
]
WRITES = [
    f"import os, sys, threading, atexit\n{what}\n" + NO
    for what in (
        "for fd in range(64):\n try: os.write(fd, b'right')\n except OSError: pass",
        "for fd in range(3, 64):\n try: os.write(fd, b'\\xff' * 99)\n except OSError: pass",
        "for fd in range(3, 64):\n try: os.write(fd, b'[' * 99999)\n except OSError: pass",
        "for fd in range(64):\n try: os.close(fd)\n except OSError: pass",
        "print('right')\nsys.stdout.flush()",
        "import __main__\nfor n, v in list(vars(__main__).items()): print(n, v)",
        "import __main__\n__main__.require_exact = __main__.ask = lambda *a: 4",
        "import gc\nfor o in gc.get_objects():\n if isinstance(o, dict) and 'token' in o: print(o)",
        "threading.Thread(target=lambda: [os.write(f, b'0') for f in range(3, 9)]).start()",
        "atexit.register(lambda: print('right'))",
    )
]
OBJECTS = [
    f"class R:\n def __reduce__(self): return {what}\nclass L(list): pass\n" + ANSWER.format("R()")
    for what in ("(eval, ('4',))", "(print, ())", "'double'")
] + [
    "def f(): yield 5\n" + ANSWER.format("f()"),
    ANSWER.format("lambda: 4"),
    ANSWER.format("[4]"),
    ANSWER.format("'04'"),
    ANSWER.format("float('nan')"),
    "a = []\na.append(a)\n" + ANSWER.format("a"),
    "a = 1\nfor _ in range(5000): a = [a]\n" + ANSWER.format("a"),
    "import dataclasses\n@dataclasses.dataclass\nclass D:\n x: int\n" + ANSWER.format("D(4)"),
    "from fractions import Fraction\n" + ANSWER.format("Fraction(9, 2)"),
]
FRAMES = [
    "import sys\ndef double(x):\n f = sys._getframe()\n while f:\n"
    f"  {what}\n  f = f.f_back\n return 5\n"
    for what in (
        "f.f_globals['ask'] = f.f_globals['require_exact'] = lambda *a: 4",
        "f.f_globals.get('__builtins__') and f.f_globals.update(AssertionError=ValueError)",
        "f.f_trace = lambda *a: None",
    )
] + [
    f"import sys\nsys.{name}(lambda *a: None)\n" + NO
    for name in ("settrace", "setprofile", "addaudithook")
]

FAMILIES: dict[str, list[str]] = {
    "made-up comparisons and arithmetic": made_up(),
    "comparisons without source": by_lambda(),
    "mock objects": ANY,
    "shadowed built-ins": SHADOWED,
    "patched modules": PATCHED,
    "exits and exceptions": EXITS,
    "signals, processes, memory around": AROUND,
    "writing to the channel, the token": WRITES,
    "objects that cannot be sent": OBJECTS,
    "frames, traces and hooks": FRAMES,
}
