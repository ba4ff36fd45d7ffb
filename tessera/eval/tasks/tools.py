"""Tool calls in the manner of BFCL: the calls of an answer against the calls that are possible.

The report's form (Llama-Nemotron's chat template): tools between `<AVAILABLE_TOOLS>` tags in the
system prompt, calls as `<TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>`. An argument is
right if it is among the values that BFCL lists for it; "" among them means that it may be left out.
Calls in parallel match in any order. Where no tool fits, right is no call. The multi-turn sets,
whose calls are run, are in `multi_turn.py`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tessera.eval.task import Data, EvalError, Item, Measure, Task, ask
from tessera.rl.rewards import FunctionReward, Sample
from tessera.rl.verifiers.outcome import Outcome, judged, wrong

SETS = {
    "bfcl_simple": "simple_python",
    "bfcl_multiple": "multiple",
    "bfcl_parallel": "parallel",
    "bfcl_parallel_multiple": "parallel_multiple",
    "bfcl_irrelevance": "irrelevance",
    "bfcl_live_simple": "live_simple",
    "bfcl_live_multiple": "live_multiple",
    "bfcl_live_parallel": "live_parallel",
    "bfcl_live_parallel_multiple": "live_parallel_multiple",
    "bfcl_live_irrelevance": "live_irrelevance",
    "bfcl_live_relevance": "live_relevance",
}
# What the report calls BFCL v2 Live: the sets that users of the live site contributed.
LIVE = tuple(name for name in SETS if "_live_" in name)
SYSTEM = (
    "You may call these tools:\n<AVAILABLE_TOOLS>{tools}</AVAILABLE_TOOLS>\n\nIf one fits what the "
    'user asks, answer with nothing but <TOOLCALL>[{{"name": NAME, "arguments": {{...}}}}, ...]'
    "</TOOLCALL>. If none does, say so and call nothing."
)
_CALL = re.compile(r"<TOOLCALL>(.*?)(?:</TOOLCALL>|\Z)", re.DOTALL)
_PLAIN = re.compile(r"[ ,./\-_*^'\"]")
Call = tuple[str, dict[str, Any]]


def bfcl(kind: str, data: Data) -> Iterator[Item]:
    """The items of one set; the live sets' answers stand in `possible_answer`."""
    without = kind.endswith("irrelevance") or kind.endswith("relevance")
    truth: dict[str, Any] = {}
    if not without:
        answers = data.rows(f"bfcl/possible_answer/BFCL_v4_{kind}.jsonl")
        truth = {row["id"]: row["ground_truth"] for row in answers}
    for row in data.rows(f"bfcl/BFCL_v4_{kind}.jsonl"):
        if not without and row["id"] not in truth:
            raise EvalError(f"{data.task}: {row['id']} has no row in possible_answer")
        turn = row["question"][0]
        own = "\n\n".join(one["content"] for one in turn if one["role"] == "system")
        tools = SYSTEM.format(tools=json.dumps(row["function"]))
        system = f"{tools}\n\n{own}" if own else tools
        rest = [one for one in turn if one["role"] != "system"]
        messages = [*ask("", system)[:1], *rest]
        wanted = truth.get(row["id"], "none" if kind.endswith("irrelevance") else "any")
        yield Item(str(row["id"]), messages, {"calls": wanted}, {"set": kind})


def live(data: Data) -> Iterator[Item]:
    for name in LIVE:
        yield from bfcl(SETS[name], data)


def verify_calls(sample: Sample) -> Outcome:
    """Whether the answer makes the calls that `fields["calls"]` asks for, and no others."""
    wanted = sample.fields["calls"]
    calls = read_calls(sample.answer)
    if wanted in ("none", "any"):
        return judged(bool(calls) == (wanted == "any"), "a call" if calls else "no call")
    if calls is None:
        return wrong("no calls that can be read")
    if len(calls) != len(wanted):
        return wrong(f"{len(calls)} calls instead of {len(wanted)}")
    return judged(_matched(calls, wanted), "another call, or another argument")


def read_calls(answer: str) -> list[Call] | None:
    """The calls in an answer: none where nothing looks like one, None where one cannot be read."""
    found = _CALL.search(answer)
    text = (found[1] if found else answer).strip()
    if not found and not text.startswith("["):
        return []
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
        return [(str(row["name"]), dict(row.get("arguments") or {})) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _python_calls(text)


def _python_calls(text: str) -> list[Call] | None:
    """`[f(a=1), g.h(b="x")]`, the form that BFCL's own prompt asks for."""
    try:
        body = ast.parse(text, mode="eval").body
        return [
            _python_call(node) for node in (body.elts if isinstance(body, ast.List) else [body])
        ]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> Call:
    """Raises ValueError for what is no call of plain values by name."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call by name")
    arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    return ast.unparse(node.func), arguments


def _matched(calls: Sequence[Call], wanted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the calls can be paired with what is wanted, whatever their order.

    A call fits few of what is wanted, so the search for a pairing is short.
    """
    if not calls:
        return not wanted
    first, rest = calls[0], calls[1:]
    return any(
        _fits(first, one) and _matched(rest, [*wanted[:i], *wanted[i + 1 :]])
        for i, one in enumerate(wanted)
    )


def _fits(call: Call, wanted: Mapping[str, Any]) -> bool:
    name, arguments = call
    ((wanted_name, allowed),) = wanted.items()
    # Functions with dots are offered with underscores by engines that allow no others.
    if name != wanted_name and name != wanted_name.replace(".", "_"):
        return False
    if any(key not in allowed for key in arguments):
        return False
    return all(
        _among(arguments[key], values) if key in arguments else "" in values
        for key, values in allowed.items()
    )


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    return any(_same(value, one) for one in allowed)


def _same(value: Any, wanted: Any) -> bool:
    """BFCL's equality: numbers by value, texts without case, spaces and punctuation."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return float(value) == float(wanted)
    if isinstance(value, str) and isinstance(wanted, str):
        return _PLAIN.sub("", value).lower() == _PLAIN.sub("", wanted).lower()
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        return _same_object(value, wanted)
    return value == wanted


def _same_object(value: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Nested objects list the values of each key, as arguments do."""
    if any(key not in wanted for key in value):
        return False
    for key, allowed in wanted.items():
        options = allowed if isinstance(allowed, list) else [allowed]
        if key not in value:
            if "" not in options:
                return False
        elif not (_among(value[key], options) or _same(value[key], allowed)):
            return False
    return True


CALLS = Measure("accuracy", FunctionReward(kind="function", function=f"{__name__}:verify_calls"))
TASKS = (
    *(Task(name, partial(bfcl, kind), (CALLS,)) for name, kind in SETS.items()),
    Task("bfcl_live", live, (CALLS,), groups=("set",)),
)
