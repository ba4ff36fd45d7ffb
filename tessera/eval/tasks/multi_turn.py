"""BFCL's multi-turn sets: calls are run on simulated services, and what they do is judged.

In a turn of the user's the model is asked, its calls are run and their results given back between
`<TOOL_RESPONSE>` tags, until an answer holds no call that can be read. Over 20 answers with calls
in one turn end the conversation, and it is wrong. The rule is BFCL v3's, as its authors' article
and pull request 733 of ShishirPatil/gorilla have it: after each turn the services' state is that
after the turn's true calls, and the results of those are among all that the model has been given
so far. A turn without true calls (a function or parameter is missing) asks for nothing itself: what
was done in it shows in the states after it. Functions that are not offered run all the same, as
there: miss_func_49 is right by `tail`, two turns before it is offered.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tessera.data.conversation import Message
from tessera.eval.services import SERVICES
from tessera.eval.services.base import Services
from tessera.eval.task import Data, EvalError, Item, Measure, Task, ask
from tessera.eval.tasks.tools import read_calls
from tessera.rl.rewards import FunctionReward, Sample
from tessera.rl.verifiers.answer import split_thoughts
from tessera.rl.verifiers.outcome import Outcome, right, wrong

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


@dataclass(slots=True)
class Turn:
    """What answers did in one turn of the user's.

    results: of all calls. last: of the last answer's. steps: answers with calls. state: after the
    turn, None until an answer without a call ends it.
    """

    results: list[Any] = field(default_factory=list)
    last: list[Any] = field(default_factory=list)
    steps: int = 0
    state: dict[str, Any] | None = None


def multi_turn(kind: str, data: Data) -> Iterator[Item]:
    """The items of one set, their services' descriptions read from `multi_turn_func_doc`."""
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
    fields = {
        "services": {name: row["initial_config"].get(name) for name in row["involved_classes"]},
        "calls": [[_true_call(text, docs) for text in calls] for calls in truth],
    }
    system = SYSTEM.format(tools=_listed(docs, first))
    return Item(str(row["id"]), ask(said[0], system), fields, {"set": kind}, tuple(said[1:]))


def _listed(docs: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([docs[name] for name in names])


def _true_call(text: str, docs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A call of the answers', in which arguments may stand by place."""
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Call)
    name = ast.unparse(node.func)
    words = dict(zip(docs[name]["parameters"]["properties"], node.args, strict=False))
    words |= {str(word.arg): word.value for word in node.keywords}
    return name, {key: ast.literal_eval(value) for key, value in words.items()}


def play(fields: Mapping[str, Any], answers: Sequence[str]) -> list[Turn]:
    """The turns that answers make up; the last one is still open."""
    services = _services(fields)
    turns = [Turn()]
    for answer in answers:
        turn = turns[-1]
        calls = read_calls(answer)
        if calls:
            turn.steps += 1
            turn.last = [services.call(*call) for call in calls]
            turn.results += turn.last
        else:
            turn.state = copy.deepcopy(services.state)
            turns.append(Turn())
    return turns


def _services(fields: Mapping[str, Any]) -> Services:
    configs = fields["services"]
    return Services({name: SERVICES[name] for name in configs}, configs)


def goes_on(item: Item, chat: Sequence[Message]) -> str | None:
    """The results of the last answer's calls, or what the user says in the next turn."""
    *ended, turn = play(item.fields, _answers(chat))
    if turn.steps > STEPS:
        return None
    if turn.steps:
        return RESULTS.format(results=json.dumps(turn.last))
    return item.follow_ups[len(ended) - 1] if len(ended) <= len(item.follow_ups) else None


def _answers(chat: Sequence[Mapping[str, str]]) -> list[str]:
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    return [split_thoughts(one)[1] for one in said]


def verify_turns(sample: Sample) -> Outcome:
    """Whether every turn of the conversation did what the true calls in `fields["calls"]` do."""
    truth = sample.fields["calls"]
    turns = play(sample.fields, [*_answers(sample.messages), sample.answer])
    services = _services(sample.fields)
    given: list[Any] = []
    for number, calls in enumerate(truth, 1):
        results = [services.call(*call) for call in calls]
        turn = turns[number - 1] if number <= len(turns) else Turn()
        if turn.state is None:
            return wrong(f"turn {number} did not end: {turn.steps} answers with calls")
        given += turn.results
        if not calls:
            continue
        if not turn.steps:
            return wrong(f"turn {number}: no call")
        for name, state in services.state.items():
            if turn.state[name] != state:
                return wrong(f"turn {number}: another state of {name}")
        if not _among(results, given):
            return wrong(f"turn {number}: a result is missing")
    return right()


def _among(results: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether each result was given, and as often."""
    left = list(given)
    for result in results:
        if result not in left:
            return False
        left.remove(result)
    return True


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
