"""The Berkeley Function-Calling Leaderboard's own checkers and simulated services.

All of it is `bfcl-eval` (Apache-2.0), which this file alone imports: a verdict and the result of a
call are what its functions return. Its pins (numpy 1.26.4, tree_sitter 0.21.3 and more) clash with
ours; the parts used here import only mpmath, which torch brings, so it is installed by `--no-deps`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from tessera.eval.task import EvalError

INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
MODEL = "tessera"
# `power(base=10, exponent=10**12)` would never return: bfcl-eval has no limit of its own.
SLOW = ("exponent", "precision", "decimal_places")
LARGEST = 1_000
Call = tuple[str, dict[str, Any]]


@functools.cache
def official() -> SimpleNamespace:
    """`ast_checker`, `multi_turn_checker` and the modules and tables of bfcl-eval that they need.

    Raises EvalError with the command that installs bfcl-eval.
    """
    try:
        with _no_model_config():
            from bfcl_eval.constants.enums import Language
            from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING
            from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
            from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
            from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import (
                multi_turn_checker,
            )
    except ModuleNotFoundError as error:
        raise EvalError(f"BFCL's tasks need bfcl-eval ({error}): {INSTALL}") from None
    return SimpleNamespace(
        ast_checker=ast_checker,
        python=Language.PYTHON,
        multi_turn_checker=multi_turn_checker,
        utils=multi_turn_utils,
        modules=CLASS_FILE_PATH_MAPPING,
    )


@contextmanager
def _no_model_config() -> Iterator[None]:
    """Puts a small module in the place of bfcl-eval's `model_config` during an import.

    `ast_checker` reads one flag there (function names keep their dots), and the real module imports
    the client libraries of a dozen providers.
    """
    small = ModuleType("bfcl_eval.constants.model_config")
    small.__dict__["MODEL_CONFIG_MAPPING"] = {MODEL: SimpleNamespace(underscore_to_dot=False)}
    sys.modules[small.__name__] = small
    try:
        yield
    finally:
        del sys.modules[small.__name__]


def check_calls(
    calls: Sequence[Call],
    functions: Sequence[Mapping[str, Any]],
    possible: Sequence[Mapping[str, Any]],
    category: str,
) -> str:
    """Why `ast_checker` refuses the calls of a single turn; "" where it accepts them."""
    given = [{name: arguments} for name, arguments in calls]
    language = official().python
    try:
        found = official().ast_checker(functions, given, possible, language, category, MODEL)
    except OverflowError as error:  # an integer beyond every float, where a float is asked for
        return str(error)
    return "" if found["valid"] else f"{found['error_type']}: {found['error']}"[:300]


def check_turns(
    turns: Sequence[Sequence[Sequence[str]]],
    truth: Sequence[Sequence[str]],
    entry: Mapping[str, Any],
) -> str:
    """Why `multi_turn_checker` refuses the calls of each step of each turn; "" where it accepts.

    entry: a row of the data: id, initial_config, involved_classes.
    """
    with _new_services():
        found = official().multi_turn_checker(turns, truth, entry, "", MODEL)
    return "" if found["valid"] else f"{found['error_type']}: {found['error_message']}"


def run(steps: Sequence[Sequence[str]], entry: Mapping[str, Any]) -> list[list[str]]:
    """The results of each step's calls on new services, as bfcl-eval tells them to a model."""
    config, classes = entry["initial_config"], entry["involved_classes"]
    execute = official().utils.execute_multi_turn_func_call
    with _new_services():
        return [execute(list(calls), config, classes, MODEL, entry["id"])[0] for calls in steps]


@contextmanager
def _new_services() -> Iterator[None]:
    """bfcl-eval keeps services as globals of its module, by model and item; these are removed."""
    kept = vars(official().utils)
    before = set(kept)
    try:
        yield
    finally:
        for name in set(kept) - before:
            del kept[name]


def executable(call: Call, classes: Sequence[str]) -> str:
    """The call as the Python expression that bfcl-eval evaluates.

    The services' functions alone are called, with literals alone. Any other call becomes the text
    of the error that it has, because bfcl-eval would evaluate `open(...)` as well.
    """
    name, arguments = call
    if name not in _functions(tuple(classes)):
        return _error(f"name {name[:80]!r} is not defined")
    for key, value in arguments.items():
        if not key.isidentifier():
            return _error(f"{name} has no argument {key[:80]!r}")
        try:
            large = key in SLOW and abs(float(value)) > LARGEST
        except (TypeError, ValueError, OverflowError) as error:
            large = isinstance(error, OverflowError)
        if large:
            return _error(f"{key} is larger than {LARGEST}")
    try:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    except (ValueError, RecursionError) as error:  # an integer of over 4,300 digits, a deep list
        return _error(str(error))


def _error(text: str) -> str:
    return repr(f"Error during execution: {text}")


@functools.cache
def _functions(classes: tuple[str, ...]) -> set[str]:
    """The names of the public methods of the services."""
    kinds = [getattr(importlib.import_module(official().modules[name]), name) for name in classes]
    found = {name for kind in kinds for name, _ in inspect.getmembers(kind, inspect.isfunction)}
    return {name for name in found if not name.startswith("_")}
