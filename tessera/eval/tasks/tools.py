"""BFCL's single-turn sets: its `ast_checker` compares an answer's calls with the possible ones.

Tools and calls have the form of Llama-Nemotron's chat template. Where no tool fits (irrelevance),
an answer without a call is right.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from tessera.data.calls import BUILT_IN, LLAMA3, MARKED, read
from tessera.eval import bfcl
from tessera.eval.bfcl import Call
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
_CALL = re.compile(rf"{BUILT_IN.mark}(.*?)(?:{BUILT_IN.close}|\Z)", re.DOTALL)


def single_turn(kind: str, data: Data) -> Iterator[Item]:
    """The items of one set. Raises EvalError where bfcl-eval is not installed."""
    bfcl.official()
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
        fields = {"calls": wanted, "functions": row["function"], "set": kind}
        yield Item(str(row["id"]), messages, fields, {"set": kind})


def live(data: Data) -> Iterator[Item]:
    for name in LIVE:
        yield from single_turn(SETS[name], data)


def verify_calls(sample: Sample) -> Outcome:
    """Whether the answer makes the calls that `fields["calls"]` asks for, and no others."""
    wanted = sample.fields["calls"]
    calls = read_calls(sample.answer)
    if wanted in ("none", "any"):
        return judged(bool(calls) == (wanted == "any"), "a call" if calls else "no call")
    if calls is None:
        return wrong("no calls that can be read")
    why = bfcl.check_calls(calls, sample.fields["functions"], wanted, sample.fields["set"])
    return judged(not why, why)


def read_calls(answer: str) -> list[Call] | None:
    """The calls in an answer: none where nothing looks like one, None where one cannot be read."""
    _, calls = read(answer, (*MARKED, LLAMA3))
    if calls:
        return calls
    found = _CALL.search(answer)
    text = (found[1] if found else answer).strip()
    return _python_calls(text) if found or text.startswith("[") else []


def _python_calls(text: str) -> list[Call] | None:
    """`[f(a=1), g.h(b="x")]`, the form that BFCL's own prompt asks for."""
    calls = []
    try:
        body = ast.parse(text, mode="eval").body
        for node in body.elts if isinstance(body, ast.List) else [body]:
            if not isinstance(node, ast.Call) or node.args:
                return None
            values = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            calls.append((ast.unparse(node.func), values))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return calls


CALLS = Measure("accuracy", FunctionReward(kind="function", function=f"{__name__}:verify_calls"))
TASKS = (
    *(Task(name, partial(single_turn, kind), (CALLS,)) for name, kind in SETS.items()),
    Task("bfcl_live", live, (CALLS,), groups=("set",)),
)
