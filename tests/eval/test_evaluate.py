"""An evaluation asks what is missing and no more, and tells what it could not judge."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tessera.ask.ask import Receive, Reply, Request
from tessera.data.conversation import Mode
from tessera.data.switch import DETAILED, SwitchError
from tessera.data.thought import CLOSE, OPEN
from tessera.eval import scores
from tessera.eval.answers import Asker, Conversation, Sampling, answer, conversations
from tessera.eval.evaluate import EvalConfig, _logprobs, evaluate
from tessera.eval.scores import Scored, pass_at, summary
from tessera.eval.task import Data, EvalError, Item, Task, ask
from tessera.eval.tasks import find
from tessera.runs.files import Journal


class Answerer:
    """Answers every question with its number of the ask; stops the work after `stop` answers."""

    def __init__(self, model: str = "m", stop: int = 10**9, broken: frozenset[str] = frozenset()):
        self.model, self.stop, self.broken = model, stop, broken
        self.asked: list[Request] = []

    def ask(self, requests: Iterable[Request], receive: Receive, working: Any = None) -> None:
        for request in requests:
            if len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append(request)
            text = request.messages[-1]["content"]
            if text in self.broken:
                receive(request, Reply(error="too long"))
            else:
                receive(request, Reply("Answer: 1", "hm", "stop", 5))


ITEMS = [Item(str(n), ask(f"question {n}"), {"answer": str(n % 2), "work": ""}) for n in range(6)]
TASK = find("calc@2")
BOTH: tuple[Mode, Mode] = ("on", "off")


def chat(folder: Path, teacher: Answerer, samples: int = 1, items=ITEMS) -> list[Conversation]:
    samplings: dict[Mode, Sampling] = {"on": Sampling(samples=samples), "off": Sampling()}
    chats = list(conversations(TASK, items, BOTH, samplings, 64))
    with Journal(folder / "records.jsonl") as records:
        answer(chats, Asker(teacher, False), records, label="", quiet=True)
    return chats


def test_a_stopped_evaluation_asks_only_what_is_missing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        chat(tmp_path, Answerer(stop=5))
    second = Answerer()
    chats = chat(tmp_path, second)
    assert len(second.asked) == 12 - 5
    assert [one.completion for one in chats] == [f"{OPEN}hm{CLOSE}Answer: 1"] * 12
    third = Answerer()
    chat(tmp_path, third, samples=3)
    assert len(third.asked) == 2 * 6  # the samples that are new, with reasoning on alone
    fourth = Answerer(model="another")
    chat(tmp_path, fourth)
    assert len(fourth.asked) == 12


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path: Path):
    chat(tmp_path, Answerer())
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = Answerer()
    chat(tmp_path, again)
    assert len(again.asked) == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_what_is_missing_or_cannot_be_judged_is_counted_and_never_a_zero(tmp_path: Path):
    chats = chat(tmp_path, Answerer(broken=frozenset({"question 1"})))
    whole = [one for one in chats if not one.failed]
    assert len(whole) == 10
    with Journal(tmp_path / "verdicts.jsonl") as kept:
        found = scores.score(whole, TASK, kept, 1, quiet=True)
        on = [one for one in found if one.chat.mode == "on"]
    blind = [Scored(one.chat, {"accuracy": None, "work": None}, True) for one in on[:1]]
    row = summary(TASK, "on", [*blind, *on[1:]], failed=["too long"])
    assert (row["failed"], row["unjudged"], row["items"]) == (1, 1, 4)
    assert row["value"] == 2 / 4  # 3 and 5 of 2, 3, 4, 5


def test_verdicts_are_kept_by_answer_expectation_and_measure(tmp_path: Path):
    chats = chat(tmp_path, Answerer())
    with Journal(tmp_path / "verdicts.jsonl") as kept:
        scores.score(chats, TASK, kept, 1, quiet=True)
        assert len(kept) == 12
        scores.score(chats, TASK, kept, 1, quiet=True)
        assert len(kept) == 12
        other = [Item(one.id, one.messages, {"answer": "7", "work": ""}) for one in ITEMS]
        anew = chat(tmp_path, Answerer(), items=other)
        row = summary(TASK, "off", scores.score(anew, TASK, kept, 1, quiet=True)[6:], [])
        assert row["value"] == 0.0 and len(kept) == 24


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c, k in itertools.product((4, 6), (0, 1, 3), (1, 2, 4)):
        draws = list(itertools.combinations(range(n), k))
        share = sum(any(i < c for i in draw) for draw in draws) / len(draws)
        assert pass_at(n, c, k) == pytest.approx(share)


def test_the_mean_is_over_items_and_its_error_that_of_the_items():
    values = {"a": [1.0, 1.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 0.0], "c": [1.0, 1.0, 1.0, 1.0]}
    task = Task("t", lambda data: [], TASK.measures)
    found = []
    for name, row in values.items():
        item = Item(name, ask("q"))
        for n, value in enumerate(row):
            one = Conversation(task, item, "on", n, {}, key="k", tokens=4, completion="x")
            found.append(Scored(one, {"accuracy": value}, True))
    row = summary(task, "off", found, [])
    mean = (0.75 + 0 + 1) / 3
    spread = math.sqrt(sum((v - mean) ** 2 for v in (0.75, 0, 1)) / 2)
    assert row["value"] == pytest.approx(mean)
    assert row["stderr"] == pytest.approx(spread / math.sqrt(3))
    assert row["samples"] == 4 and row["pass@2"] == pytest.approx(2 / 3)


def test_an_endpoint_is_told_the_mode_in_the_messages_or_in_its_templates_variable():
    teacher, item = Answerer(), ITEMS[0]
    said = Asker(teacher, True).request(TASK, item.messages, None, {}, 0)
    assert said.messages == item.messages and said.sampling == {}
    said = Asker(teacher, True, DETAILED).request(TASK, item.messages, "on", {}, 0)
    assert said.messages[0] == {"role": "system", "content": "detailed thinking on"}
    said = Asker(teacher, True, "enable_thinking").request(TASK, item.messages, "off", {}, 0)
    assert said.messages == item.messages
    assert said.sampling == {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("table", "switch", "modes"),
    [
        ({}, "enable_thinking", ("on", "off")),
        ({"thinking": "on"}, DETAILED, ("on",)),
        ({}, "none", (None,)),
        ({"thinking": "off"}, "none", (None,)),
        ({"asking": "text", "thinking": "on"}, "none", ("off",)),
    ],
)
def test_a_model_without_a_switch_is_asked_once(table: dict, switch: str, modes: tuple):
    assert EvalConfig(tasks=("calc@2",), **table).modes(switch) == modes


def test_thinking_asked_of_a_model_without_a_switch_is_an_error():
    with pytest.raises(SwitchError, match="the model has no reasoning switch.*--switch"):
        EvalConfig(tasks=("calc@2",), thinking="on").modes("none")
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    asking = EvalConfig(tasks=("calc@2",), thinking="on", endpoint=endpoint)
    with pytest.raises(SwitchError, match="the endpoint"):
        asking.modes("none")


def test_windows_of_a_long_text_give_each_token_once():
    class Counting:
        def score(self, sequences):
            return [[float(t) for t in ids[1:]] for ids in sequences]

    for length in (2, 7, 8, 9, 12, 13, 31):
        ids = list(range(length))
        assert _logprobs(Counting(), ids, 8) == [float(t) for t in ids[1:]]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tasks": ["mt_bench"]}, "no data was given"),
        ({"tasks": ["perplexity"]}, "needs the model itself"),
        ({"tasks": ["calc@2"]}, "model = "),
    ],
)
def test_what_an_evaluation_lacks_is_said_before_anything_is_asked(tmp_path, table, says: str):
    with pytest.raises(ValueError, match=says):
        evaluate(EvalConfig(**table), tmp_path, None, 0, quiet=True)


def test_a_judged_task_asks_for_its_judge(shared, tmp_path: Path):
    config = EvalConfig(tasks=("mt_bench",), data=str(shared / "data"))
    with pytest.raises(EvalError, match="give judge"):
        evaluate(config, tmp_path, None, 0, quiet=True)
    assert list(find("mt_bench").read(Data("mt_bench", str(shared / "data"))))
