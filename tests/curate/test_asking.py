"""Steps that ask a model: nothing lost, nothing asked twice, nothing believed that was not said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.ask import endpoint, judge
from tessera.ask.ask import AskError
from tessera.curate.steps import ask
from tessera.runs.files import FailureError, Journal
from tests.curate.conftest import Curated, Server, killed, run_stage, write_lines

Curate = Callable[..., Curated]
Serve = Callable[..., Server]
QUESTIONS = [{"q": f"What is {n} + 1?"} for n in range(40)]
SOURCE = {"question": "q"}


def solve(body: dict[str, Any]) -> str:
    """The sum that the last message asks for, behind a thought."""
    number = int(body["messages"][-1]["content"].split()[2])
    return f"<think>\n{number} and one\n</think>\n\nThe answer is \\boxed{{{number + 1}}}."


def test_every_question_gets_its_own_answers(curate: Curate, serve: Serve):
    server = serve(solve)
    server.delay = 0.01
    steps = [{"step": "generate", "n": 3, "generator": "m"}, {"step": "extract_answer"}]
    made = curate(QUESTIONS, steps, source=SOURCE, teachers={"teacher": server.teacher()})
    assert made.counts()["1 generate"] == (40, 120)
    for row in made.rows:
        number = int(row["messages"][-2]["content"].split()[2])
        assert row["predicted_answer"] == str(number + 1)
        assert row["messages"][0]["role"] == "user"  # what says the mode is the model's to know
        assert row["reasoning"] == "on" and row["generator"] == "m"
    assert 2 <= server.busiest <= 8
    assert len({body["seed"] for body in server.asked}) == 3


def test_what_may_pass_is_tried_again(curate: Curate, serve: Serve):
    server = serve(solve)
    server.faults = {0: 503, 3: 429, 5: "cut", 8: 500, 11: "odd", 12: 408}
    teachers = {"teacher": server.teacher()}
    made = curate(QUESTIONS, [{"step": "generate"}], source=SOURCE, teachers=teachers)
    assert len(made.rows) == 40
    assert len(server.asked) == 46


def test_one_request_that_is_refused_leaves_one_row_out(curate: Curate, serve: Serve):
    server = serve(solve)
    server.faults = {7: 400}
    teachers = {"teacher": server.teacher()}
    made = curate(QUESTIONS, [{"step": "generate"}], source=SOURCE, teachers=teachers)
    assert len(made.rows) == 39
    assert made.removed[0]["reason"].startswith("teacher: 400")


def test_a_server_that_is_down_stops_the_work_and_loses_none(tmp_path: Path, serve: Serve):
    server = serve(solve)
    server.faults = {n: 500 for n in range(10, 10_000)}
    file = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    table = {
        "sources": [{"paths": str(file), **SOURCE}],
        "steps": [{"step": "generate"}],
        "teachers": {"teacher": server.teacher(tries=2)},
    }
    with pytest.raises(FailureError, match="requests failed"):
        run_stage(tmp_path / "run", table)
    server.faults = {}
    asked = len(server.asked)
    made = run_stage(tmp_path / "run", table)
    assert len(made.rows) == 40
    assert len(server.asked) - asked == 30


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_said_at_once(curate: Curate, serve: Serve, status: int):
    server = serve(solve)
    server.faults = {n: status for n in range(1000)}
    with pytest.raises(AskError, match="correct url, model or key_file"):
        teachers = {"teacher": server.teacher(concurrency=1)}
        curate(QUESTIONS, [{"step": "generate"}], source=SOURCE, teachers=teachers)
    assert len(server.asked) == 1


def test_the_key_is_sent(curate: Curate, serve: Serve, tmp_path: Path):
    server = serve(solve)
    (tmp_path / "key").write_text("secret\n")
    teacher = server.teacher(key_file=str(tmp_path / "key"))
    curate(QUESTIONS[:2], [{"step": "generate"}], source=SOURCE, teachers={"teacher": teacher})
    headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["authorization"] == "Bearer secret"


def test_killed_while_asking_no_answered_request_is_asked_again(tmp_path: Path, serve: Serve):
    server = serve(solve)
    server.delay = 0.01
    file = write_lines(tmp_path / "q.jsonl", [{"q": f"What is {n} + 1?"} for n in range(120)])
    table = {
        "sources": [{"paths": str(file), **SOURCE}],
        "steps": [{"step": "generate", "n": 2}, {"step": "extract_answer"}],
        "teachers": {"teacher": server.teacher(concurrency=4)},
        "shard_mb": 0.001,
    }
    for share in (60, 150):
        killed(tmp_path / "run", table, lambda share=share: len(server.asked) > share)
    made = run_stage(tmp_path / "run", table)
    undisturbed = run_stage(tmp_path / "whole", table)
    assert made.rows == undisturbed.rows and len(made.rows) == 240
    again = {key: n - 2 for key, n in server.answered.items() if n > 2}  # once for each run
    assert sum(again.values()) <= 2 * 4  # those under way when it was killed


def _chat(**more: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "4", **more}}], **more}).encode()


ODD = [
    _chat(content=["4"]),
    _chat(content="\ud800"),
    _chat(usage={"completion_tokens": "many"}, content=4),
    b"[" * 100_000 + b"]" * 100_000,
    b'{"choices": [{"message": ' + b'{"a": ' * 100_000,
    b"\xff\xfe",
    b"\x1f\x8b" + bytes(100),
    b"null",
    b" " * 2_000_000,  # more than the test allows
    "drip",
]


def test_odd_replies_leave_their_rows_out_and_are_never_kept(
    curate: Curate, serve: Serve, monkeypatch
):
    monkeypatch.setattr(endpoint, "LARGEST_BODY", 1_000_000)
    server = serve(solve)
    server.faults = dict(enumerate(ODD))
    teacher = server.teacher(tries=1, timeout=2.0)
    begun = time.monotonic()
    made = curate(QUESTIONS, [{"step": "generate"}], source=SOURCE, teachers={"teacher": teacher})
    assert len(made.rows) == 40 - len(ODD), made.removed
    assert time.monotonic() - begun < 10
    assert {row["reason"][:9] for row in made.removed} == {"teacher: "}


def test_token_counts_and_vectors_of_other_kinds_are_not_believed():
    for count in ("1e999", "-3", '"many"', "9" * 400, "true"):
        text = b'{"choices": [{"message": {"content": "4"}}], "usage": {"completion_tokens": %s}}'
        found = endpoint._parse(text % count.encode(), 1)
        assert found and found[0].tokens == 0
    for vector in ("[NaN]", "[1e999]", "[]", '"ab"', "[[1]]"):
        assert endpoint._parse(b'{"data": [{"embedding": %s}]}' % vector.encode(), 1) is None


def test_a_poisoned_journal_is_read_past_and_asked_again(tmp_path: Path, serve: Serve):
    server = serve(solve)
    file = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    server.faults = {n: 500 for n in range(10, 10_000)}
    table = {
        "sources": [{"paths": str(file), **SOURCE}],
        "steps": [{"step": "generate"}],
        "teachers": {"teacher": server.teacher(tries=1)},
    }
    with pytest.raises(FailureError):
        run_stage(tmp_path / "run", table)
    (journal,) = (tmp_path / "run").rglob("*journal*.jsonl")
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rows[0]["reply"]["text"] = ["a list"]
    rows[1]["reply"]["tokens"] = "many"
    lines = [*map(json.dumps, rows), "[" * 100_000, "{}", "\x00", '{"key": 3}']
    journal.write_text("\n".join(lines) + "\n")
    server.faults, asked = {}, len(server.asked)
    made = run_stage(tmp_path / "run", table)
    assert len(made.rows) == 40 and len(server.asked) - asked == 40 - len(rows) + 2
    assert "6 lines are no replies" in (tmp_path / "run" / "log.txt").read_text()


def test_a_torn_journal_gives_what_is_whole(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"text": "ü"})
        journal.add("b", {"text": "two"})
    path.write_bytes(path.read_bytes()[:-5])
    with Journal(path) as journal:
        assert "a" in journal and "b" not in journal
        journal.add("b", {"text": "again"})
        assert journal.get("a") == {"key": "a", "text": "ü"}
        assert journal.get("b")["text"] == "again"


def test_answers_cut_off_or_without_the_thought_are_left_out(curate: Curate, serve: Serve):
    def answer(body: dict[str, Any]) -> Any:
        number = int(body["messages"][-1]["content"].split()[2])
        if number == 0:
            choice = {"message": {"content": "<think>on and"}, "finish_reason": "length"}
            return {"choices": [choice]}
        if number == 1:
            return "2"
        message = {"content": "3", "reasoning_content": "two and one"}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    teachers = {"teacher": serve(answer).teacher()}
    made = curate(QUESTIONS[:3], [{"step": "generate"}], source=SOURCE, teachers=teachers)
    reasons = {row["reason"] for row in made.removed}
    assert reasons == {"an answer cut at max_tokens", "no thought"}
    assert made.rows[0]["messages"][-1]["content"] == "<think>\ntwo and one\n</think>\n\n3"
    teachers = {"teacher": serve(answer).teacher()}
    off = curate(
        QUESTIONS[2:3], [{"step": "generate", "mode": "off"}], source=SOURCE, teachers=teachers
    )
    assert off.rows[0]["messages"][-1]["content"] == "3"


def test_the_pipeline_of_the_paper_s_mathematics(curate: Curate, serve: Serve):
    """Extract, classify, answers from the forum, n solutions, vote where none is known, judge."""

    def answer(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "discussion in a forum" in text:
            if "chat" in text.rpartition("\n")[2]:
                return "NONE"
            post = text.rpartition("\n\n")[2]
            return "".join(f"PROBLEM:\n{one}\n" for one in post.split("|")[0].split("&"))
        if "VERDICT" in text and "Concerning" in text:
            proof = "prove or show" in text and "Prove" in text
            return f"Let me see.\nVERDICT: {'yes' if proof else 'no'}"
        if "Discussion:" in text:
            known = text.rpartition("| it is ")[2] if "| it is " in text else "NONE"
            return f"ANSWER: {known}"
        if "Right answer" in text:
            return "VERDICT: yes" if "one more than three" in text else "VERDICT: no"
        sample, question = body["seed"], text
        if "2 + 2" in question:
            return ["\\boxed{4}", "\\boxed{one more than three}", "\\boxed{5}"][sample]
        return ["\\boxed{7}", "\\boxed{8}", "\\boxed{7}"][sample]

    posts = [
        {"post": "What is 2 + 2?& Prove that 2 is prime.| it is 4"},
        {"post": "What is 3 + 4?"},
        {"post": "just chat"},
    ]
    steps: list[dict[str, Any]] = [
        {"step": "extract_problems"},
        {"step": "classify"},
        {"step": "extract_known"},
        {"step": "generate", "n": 3, "mode": "off"},
        {"step": "extract_answer", "source": "boxed"},
        {"step": "verify", "keep": "all"},
        {"step": "judge", "keep": "all"},
        {"step": "where", "key": "correct", "values": ["False"], "drop": True},
        {"step": "majority"},
    ]
    teachers = {"teacher": serve(answer).teacher()}
    made = curate(posts, steps, source={"question": "post"}, teachers=teachers)
    found = sorted((r["messages"][0]["content"], r["predicted_answer"]) for r in made.rows)
    assert found == [
        ("What is 2 + 2?", "4"),
        ("What is 2 + 2?", "one more than three"),
        ("What is 3 + 4?", "7"),
        ("What is 3 + 4?", "7"),
    ]
    assert made.counts()["2 classify"] == (3, 2)
    assert all(row["correct"] and row["problem_type"] == "open" for row in made.rows)
    assert made.rows[0]["lineage"][1:4] == ["extract_problems 0", "classify", "extract_known"]


def test_the_nearest_problem_of_an_evaluation_is_judged(
    curate: Curate, serve: Serve, tmp_path: Path
):
    exam = write_lines(tmp_path / "exam.jsonl", [{"p": "apples and pears"}, {"p": "a red car"}])

    def embed(body: dict[str, Any]) -> dict[str, Any]:
        words = ("apples", "pears", "car", "fruit", "nothing")
        vectors = [[text.count(one) for one in words] for text in body["input"]]
        return {"data": [{"embedding": vector} for vector in vectors]}

    embedder = serve(embed)
    teacher = serve(lambda body: "VERDICT: yes" if "fruit" in str(body) else "VERDICT: no")
    against = [{"paths": str(exam), "field": "p"}]
    steps: list[dict[str, Any]] = [
        {"step": "nearest", "against": against},
        {"step": "same_problem", "over": 0.7},
    ]
    rows = [{"q": "apples, fruit, pears"}, {"q": "car and car"}, {"q": "nothing of it"}]
    teachers = {"embedder": embedder.teacher(), "teacher": teacher.teacher()}
    made = curate(rows, steps, source=SOURCE, teachers=teachers)
    assert [row["messages"][0]["content"] for row in made.rows] == ["car and car", "nothing of it"]
    assert made.rows[0]["nearest"] == "a red car"
    assert len(teacher.asked) == 2
    assert [len(body["input"]) for body in embedder.asked] == [2, 3]


def test_a_reply_is_read_strictly():
    assert judge.verdict("no, wait\nVERDICT: yes") is True
    assert judge.verdict("**Verdict: No.**") is False
    assert judge.verdict("Final verdict: right") is True
    assert judge.verdict("I would say VERDICT: yes or no") is None
    short = judge.same_answer("{answer}?", "1", "2", "{question} {answer} {prediction}")
    assert short == "{answer}? 1 2"
    assert ask.told_answer("ANSWER: NONE") is None
    assert ask.told_answer("so\n**ANSWER: 42**") == "42"
    assert ask.told_problems("NONE") == []
    assert judge.fill("{question} \\frac{1}{2} {other}", question="{text}") == (
        "{text} \\frac{1}{2} {other}"
    )
