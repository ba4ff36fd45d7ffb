"""BFCL's true and possible calls, and answers that make calls."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

from tessera.eval import bfcl
from tessera.eval.task import Item
from tessera.rl.rewards import Sample

Call = tuple[str, dict[str, Any]]
DONE = "That is done."
# No answer of these is right: a required argument has no possible value, or a possible argument is
# none of the function's.
CONTRADICT = {
    *("live_simple_106-63-0", "live_simple_112-68-0"),
    *("live_multiple_862-181-3", "live_multiple_964-207-0"),
}


def said(calls: Sequence[Call]) -> str:
    rows = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"<TOOLCALL>{json.dumps(rows)}</TOOLCALL>"


def sample(item: Item, answers: Sequence[str]) -> Sample:
    """What a worker gets, whose fields have been JSON; what others said between is left out."""
    before = [{"role": "assistant", "content": one} for one in answers[:-1]]
    fields = json.loads(json.dumps(item.fields))
    return Sample([*item.messages, *before], answers[-1], fields)


def possible(item: Item) -> list[Call]:
    """The first value that each argument may have; "" stands for leaving it out."""
    known = {function["name"]: function["parameters"] for function in item.fields["functions"]}
    return [(n, _firsts(a, known[n])) for one in item.fields["calls"] for n, a in one.items()]


def _firsts(allowed: dict[str, list[Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, values in allowed.items():
        given = [value for value in values if value != ""]
        if given and (key in parameters["properties"] or "" not in values):
            found[key] = _object(given[0])
        elif values and key in parameters["required"]:
            found[key] = ""
    return found


def _object(value: Any) -> Any:
    """An object lists the values of each of its keys; what lies deeper stands as it is."""
    if isinstance(value, dict):
        return {key: v[0] for key, v in value.items() if v and v[0] != ""}
    return [_object(one) for one in value] if isinstance(value, list) else value


def true_calls(item: Item) -> list[list[Call]]:
    """The true calls of each turn, every argument by name."""
    return [[_true_call(text, item) for text in turn] for turn in item.fields["calls"]]


def _true_call(text: str, item: Item) -> Call:
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Call)
    name = ast.unparse(node.func)
    modules = bfcl.official().modules
    classes = item.fields["entry"]["involved_classes"]
    kinds = [getattr(importlib.import_module(modules[one]), one) for one in classes]
    method = next(getattr(kind, name) for kind in kinds if hasattr(kind, name))
    words = dict(zip(list(inspect.signature(method).parameters)[1:], node.args, strict=False))
    words |= {str(word.arg): word.value for word in node.keywords}
    return name, {key: ast.literal_eval(value) for key, value in words.items()}
