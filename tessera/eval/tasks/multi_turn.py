"""BFCL's multi-turn sets: calls are run on its services, and its `multi_turn_checker` judges.

In each turn the model's calls are run and their results given back between `<TOOL_RESPONSE>` tags,
until an answer holds no call that can be read; more than 20 answers with calls are wrong. Functions
that are not offered run all the same, as in bfcl-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tessera.data.conversation import Message
from tessera.data.thought import split
from tessera.eval import bfcl
from tessera.eval.task import Data, EvalError, Item, Measure, Task, ask
from tessera.eval.tasks.tools import read_calls
from tessera.rl.rewards import FunctionReward, Sample
from tessera.rl.verifiers.outcome import Outcome, judged, wrong

SETS = ("base", "miss_func", "miss_param")
DOCS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
STEPS = 20  # answers with calls in one turn
SYSTEM = (
    "You act for the user through these tools:\n<AVAILABLE_TOOLS>{tools}</AVAILABLE_TOOLS>\n\nTo "
    'call some, answer with nothing but <TOOLCALL>[{{"name": NAME, "arguments": {{...}}}}, ...]'
    "</TOOLCALL>. They run in that order, and what they return comes back as <TOOL_RESPONSE>[..., "
    "...]</TOOL_RESPONSE>. Call until all that the user asks is done; then answer without a call. "
    "If a tool or a value that you need is missing and no tool tells it, say so and call nothing."
)
MORE = (
    "These tools may be called now as well:\n<AVAILABLE_TOOLS>{tools}</AVAILABLE_TOOLS>\n\nDo what "
    "I asked for, if you can with them."
)
# A message of the user's: templates need not know the role `tool`, and servers ask it for ids.
RESULTS = "<TOOL_RESPONSE>{results}</TOOL_RESPONSE>"


def multi_turn(kind: str, data: Data) -> Iterator[Item]:
    """The items of one set. Raises EvalError where bfcl-eval is not installed."""
    bfcl.official()
    answers = data.rows(f"bfcl/possible_answer/BFCL_v4_multi_turn_{kind}.jsonl")
    truth = {row["id"]: row["ground_truth"] for row in answers}
    docs: dict[str, dict[str, Any]] = {
        service: {doc["name"]: doc for doc in data.rows(f"bfcl/multi_turn_func_doc/{name}.jsonl")}
        for service, name in DOCS.items()
    }
    for row in data.rows(f"bfcl/BFCL_v4_multi_turn_{kind}.jsonl"):
        if row["id"] not in truth:
            raise EvalError(f"{data.task}: {row['id']} has no row in possible_answer")
        known = {k: doc for name in row["involved_classes"] for k, doc in docs[name].items()}
        yield _item(row, truth[row["id"]], known, kind)


def every_set(data: Data) -> Iterator[Item]:
    for kind in SETS:
        yield from multi_turn(kind, data)


def _item(
    row: Mapping[str, Any], truth: Sequence[Sequence[str]], docs: Mapping[str, Any], kind: str
) -> Item:
    later = {int(turn): names for turn, names in row.get("missed_function", {}).items()}
    held = {name for names in later.values() for name in names}
    first = [name for name in docs if name not in {*held, *row.get("excluded_function", ())}]
    said = []
    for number, messages in enumerate(row["question"]):
        more = MORE.format(tools=_listed(docs, later[number])) if number in later else ""
        said.append("\n\n".join(filter(None, [more, *(one["content"] for one in messages)])))
    entry = {key: row[key] for key in ("id", "initial_config", "involved_classes")}
    fields = {"calls": truth, "entry": entry}
    system = SYSTEM.format(tools=_listed(docs, first))
    return Item(str(row["id"]), ask(said[0], system), fields, {"set": kind}, tuple(said[1:]))


def _listed(docs: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([docs[name] for name in names])


def turns_of(fields: Mapping[str, Any], answers: Sequence[str]) -> list[list[list[str]]]:
    """The calls of each answer with calls, by turn; the last turn has not ended."""
    classes = fields["entry"]["involved_classes"]
    turns: list[list[list[str]]] = [[]]
    for answer in answers:
        calls = read_calls(answer)
        if calls:
            turns[-1].append([bfcl.executable(call, classes) for call in calls])
        else:
            turns.append([])
    return turns


def goes_on(item: Item, chat: Sequence[Message]) -> str | None:
    """The results of the last answer's calls, or what the user says in the next turn."""
    turns = turns_of(item.fields, _answers(chat))
    ended = len(turns) - 1
    if len(turns[-1]) > STEPS:
        return None
    if turns[-1]:
        steps = [calls for turn in turns for calls in turn]
        results = bfcl.run(steps, item.fields["entry"])[-1]
        return RESULTS.format(results=json.dumps([_value(one) for one in results]))
    return item.follow_ups[ended - 1] if ended <= len(item.follow_ups) else None


def _value(result: str) -> Any:
    """bfcl-eval writes objects as JSON, and errors as plain text."""
    try:
        return json.loads(result)
    except (ValueError, RecursionError):
        return result


def _answers(chat: Sequence[Mapping[str, str]]) -> list[str]:
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    return [split(one).answer.strip() for one in said]


def verify_turns(sample: Sample) -> Outcome:
    """Whether every turn of the conversation did what the true calls in `fields["calls"]` do."""
    truth = sample.fields["calls"]
    *turns, last = turns_of(sample.fields, [*_answers(sample.messages), sample.answer])
    if len(turns) < len(truth):
        return wrong(f"turn {len(turns) + 1} did not end: {len(last)} answers with calls")
    why = bfcl.check_turns(turns, truth, sample.fields["entry"])
    return judged(not why, why)


REWARD = FunctionReward(kind="function", function=f"{__name__}:verify_turns")
TASKS = (
    *(
        Task(
            f"bfcl_multi_turn_{kind}",
            partial(multi_turn, kind),
            (Measure("accuracy", REWARD),),
            goes_on=goes_on,
        )
        for kind in SETS
    ),
    Task(
        "bfcl_multi_turn",
        every_set,
        (Measure("accuracy", REWARD),),
        groups=("set",),
        goes_on=goes_on,
    ),
)
