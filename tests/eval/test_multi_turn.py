"""BFCL's multi-turn sets as conversations: steps, turns, tools held back, records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tessera.ask.ask import Receive, Reply, Request
from tessera.eval import scores
from tessera.eval.answers import Asker, Conversation, Sampling, answer, conversations
from tessera.eval.task import Data, Item
from tessera.eval.tasks import find
from tessera.eval.tasks.multi_turn import STEPS, goes_on, turns_of, verify_turns
from tessera.rl.verifiers.outcome import Outcome
from tessera.runs.files import Journal
from tests.eval.bfcl_calls import DONE, Call, said, sample, true_calls


def judged(item: Item, turns: Sequence[Sequence[Sequence[Call]]]) -> Outcome:
    """turns: the steps of each turn."""
    answers = [text for steps in turns for text in (*map(said, steps), DONE)]
    return verify_turns(sample(item, answers))


def true(item: Item) -> list[list[list[Call]]]:
    """The data's calls, all of a turn in one answer."""
    return [[calls] if calls else [] for calls in true_calls(item)]


@pytest.fixture(scope="module")
def items(shared: Path) -> list[Item]:
    return list(find("bfcl_multi_turn").read(Data("", str(shared / "data"))))


def test_one_call_a_step_does_what_all_in_one_do(items: list[Item]):
    for item in items:
        steps = [[[call] for call in calls] for calls in true_calls(item)]
        assert judged(item, steps).verdict == "right", item.id


def test_saying_nothing_or_calling_all_a_turn_late_is_wrong(items: list[Item]):
    for item in items:
        turns = true(item)
        assert judged(item, [[] for _ in turns]).verdict == "wrong", item.id
        assert judged(item, [[], *turns[:-1]]).verdict == "wrong", item.id


def test_calls_that_do_not_meet_may_come_in_any_order_and_more_may_be_called(items: list[Item]):
    (item,) = [one for one in items if one.id == "multi_turn_base_75"]
    turns = true(item)
    look = ("get_current_speed", {})
    assert judged(item, [[*steps, [look]] for steps in turns]).verdict == "right"
    (calls,) = turns[1]
    assert judged(item, [turns[0], [calls[::-1]], *turns[2:]]).verdict == "right"
    brake = ("pressBrakePedal", {"pedalPosition": 1.0})
    assert judged(item, [[*turns[0], [brake]], *turns[1:]]).verdict == "wrong"


def test_what_was_seen_in_a_turn_before_need_not_be_seen_again(items: list[Item]):
    (item,) = [one for one in items if one.id == "multi_turn_base_100"]
    fund: list[Call] = [("fund_account", {"amount": 2203.4})]
    late: list[Call] = [("get_stock_info", {"symbol": "NVDA"}), *fund]
    assert judged(item, [[late[:1]], [fund]]).verdict == "right"
    look: list[Call] = [("get_account_info", {})]
    assert "execution_response_mismatch" in judged(item, [[look], [late]]).reason
    assert "empty_turn_model_response" in judged(item, [[], [late]]).reason


def test_a_thought_calls_nothing_and_calls_may_be_pythons(items: list[Item]):
    (item,) = [one for one in items if one.id == "multi_turn_base_100"]
    thought = "<think>[fund_account(amount=1.0)]</think>"
    answers = [f"{thought}[get_stock_info(symbol='NVDA')]", DONE, "[fund_account(amount=2203.4)]"]
    assert verify_turns(sample(item, [*answers, DONE])).verdict == "right"
    assert verify_turns(sample(item, [answers[0], f"{thought}ok", answers[2], DONE])).score == 1


def test_held_out_tools_are_offered_in_the_turn_that_asks_nothing(items: list[Item]):
    item = next(one for one in items if one.id == "multi_turn_miss_func_0")
    first = item.messages[0]["content"]
    assert '"name": "sort"' not in first and '"name": "cp"' not in first
    assert ['"name": "sort"' in text for text in item.follow_ups] == [False, False, True, False]
    shown = [text for one in items for text in (one.messages[0]["content"], *one.follow_ups)]
    assert all(text.strip() for text in shown)


def test_over_twenty_steps_in_a_turn_end_the_conversation(items: list[Item]):
    item = items[0]
    chat = list(item.messages)
    for number in range(STEPS + 1):
        chat.append({"role": "assistant", "content": said([("pwd", {})])})
        more = goes_on(item, chat)
        assert (more is None) == (number == STEPS)
        chat.append({"role": "user", "content": more})
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    assert "did not end" in verify_turns(sample(item, answers)).reason


class Knowing:
    """Answers with the data's calls, one a step; knows where it is by the conversation alone."""

    model = "knowing"

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = {one.messages[-1]["content"]: one for one in items}
        self.asked = 0

    def ask(self, requests: Iterable[Request], receive: Receive, working: Any = None) -> None:
        for request in requests:
            self.asked += 1
            item = self.items[request.messages[1]["content"]]
            answers = [m["content"] for m in request.messages if m["role"] == "assistant"]
            *ended, steps = turns_of(item.fields, answers)
            calls = true_calls(item)[len(ended)]
            text = said([calls[len(steps)]]) if len(steps) < len(calls) else DONE
            receive(request, Reply(text, None, "stop", 3))


def test_a_conversation_is_held_scored_and_resumed_without_asking_again(
    items: list[Item], tmp_path: Path
):
    task = find("bfcl_multi_turn")
    few = [*items[:200:25], *items[205:400:25], *items[410::25]]  # the sets share questions
    assert len({item.messages[-1]["content"] for item in few}) == len(few)

    def chat(teacher: Knowing) -> list[Conversation]:
        chats = list(conversations(task, few, ["off"], {"off": Sampling()}, 64))
        with Journal(tmp_path / "records.jsonl") as records:
            answer(chats, Asker(teacher, False), records, label="", quiet=True)
        return chats

    first, second = Knowing(few), Knowing(few)
    chats, again = chat(first), chat(second)
    steps = sum(len(calls) + 1 for item in few for calls in true_calls(item))
    assert (first.asked, second.asked) == (steps, 0)
    assert [one.messages for one in chats] == [one.messages for one in again]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-40]))
    third = Knowing(few)
    assert [one.messages for one in chat(third)] == [one.messages for one in chats]
    assert third.asked == 40
    with Journal(tmp_path / "verdicts.jsonl") as kept:
        row = scores.summary(task, "off", scores.score(chats, task, kept, 1, quiet=True), [])
        groups = scores.groups(task, "off", scores.score(chats, task, kept, 1, quiet=True))
    assert (row["value"], row["unjudged"], row["items"]) == (1.0, 0, len(few))
    assert [one["of"] for one in groups] == ["base", "miss_func", "miss_param"]
