"""BFCL's tasks give the verdicts and results that bfcl-eval gives when it is called directly."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tessera.eval import bfcl
from tessera.eval.task import Data, EvalError, Item
from tessera.eval.tasks import find
from tessera.eval.tasks.multi_turn import goes_on, turns_of, verify_turns
from tessera.eval.tasks.tools import SETS, read_calls, verify_calls
from tessera.rl.rewards import Sample
from tests.eval.bfcl_calls import CONTRADICT, DONE, Call, possible, said, sample, true_calls

Change = Callable[[list[Call]], list[Call] | None]


@functools.cache
def items(shared: Path, name: str) -> list[Item]:
    return list(find(name).read(Data("", str(shared / "data"))))


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_floats(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def whole_floats(calls: list[Call]) -> list[Call] | None:
    changed = [(name, _floats(arguments)) for name, arguments in calls]
    return changed if repr(changed) != repr(calls) else None


def missing_argument(calls: list[Call]) -> list[Call] | None:
    found = [(name, dict(list(arguments.items())[1:])) for name, arguments in calls]
    return found if found != calls else None


def extra_argument(calls: list[Call]) -> list[Call]:
    return [(name, {**arguments, "strange": 1}) for name, arguments in calls]


def wrong_name(calls: list[Call]) -> list[Call]:
    return [(f"{name}x", arguments) for name, arguments in calls]


def wrong_order(calls: list[Call]) -> list[Call] | None:
    return calls[::-1] if len(calls) > 1 else None


def one_dropped(calls: list[Call]) -> list[Call]:
    return calls[1:]


def one_twice(calls: list[Call]) -> list[Call]:
    return [*calls, calls[0]]


def other_text(calls: list[Call]) -> list[Call] | None:
    """Case, spaces and some punctuation do not count in texts of a single turn."""
    changed = [
        (name, {key: v.upper() + "." if isinstance(v, str) else v for key, v in arguments.items()})
        for name, arguments in calls
    ]
    return changed if changed != calls else None


CHANGES: tuple[Change, ...] = (
    list,
    whole_floats,
    missing_argument,
    extra_argument,
    wrong_name,
    wrong_order,
    one_dropped,
    one_twice,
    other_text,
)


def single(item: Item, calls: list[Call]) -> tuple[bool, bool]:
    """Our verdict of an answer, and bfcl-eval's of the calls in it."""
    ours = verify_calls(Sample(item.messages, said(calls), json.loads(json.dumps(item.fields))))
    fields = deepcopy(item.fields)
    rows = [{name: arguments} for name, arguments in calls]
    bfcl.official()
    checker = sys.modules["bfcl_eval.eval_checker.ast_eval.ast_checker"]
    python = sys.modules["bfcl_eval.constants.enums"].Language.PYTHON
    theirs = checker.ast_checker(
        fields["functions"], rows, fields["calls"], python, fields["set"], bfcl.MODEL
    )
    return ours.verdict == "right", theirs["valid"]


# bfcl-eval pairs possible answers with calls one by one and never goes back.
PAIRED = {"parallel_178"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [name for name in SETS if "relevance" not in name])
def test_a_single_turn_has_the_official_verdict(shared: Path, name: str, change: Change):
    accepted, refused = set(), set()
    for item in items(shared, name):
        calls = change(possible(item))
        if calls is None:
            continue
        ours, theirs = single(item, calls)
        assert ours == theirs, (item.id, calls)
        (accepted if ours else refused).add(item.id)
    if change in (extra_argument, wrong_name, one_dropped, one_twice):
        assert refused and not accepted
    elif change in (list, wrong_order):
        assert refused <= CONTRADICT | (PAIRED if change is wrong_order else set())
    elif change is whole_floats and accepted:
        assert len(refused) > len(accepted)


FUNCTION = {
    "name": "area",
    "description": "The area of a triangle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
        },
        "required": ["base", "height"],
    },
}


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"base": 10, "height": 5.5}, True),
        ({"base": 10, "height": 5.5, "unit": "CM ^2"}, True),
        ({"base": 10.0, "height": 5.5}, False),
        ({"base": True, "height": 5.5}, False),
        ({"base": "10", "height": 5.5}, False),
        ({"base": 10}, False),
        ({"base": 10, "height": 5.5, "unit": "mm"}, False),
        ({"base": 10, "height": 5.5, "color": "red"}, False),
    ],
)
def test_a_call_is_compared_by_type_and_value(arguments: dict[str, Any], valid: bool):
    truth = [{"area": {"base": [10], "height": [5.5], "unit": ["cm^2", ""]}}]
    fields = {"calls": truth, "functions": [FUNCTION], "set": "simple_python"}
    assert single(Item("x", [], fields), [("area", arguments)]) == (valid, valid)


def test_a_float_may_be_given_as_an_integer_and_names_keep_their_dots():
    named = {**FUNCTION, "name": "triangle.area"}
    truth = [{"triangle.area": {"base": [10], "height": [5.0]}}]
    item = Item("x", [], {"calls": truth, "functions": [named], "set": "simple_python"})
    assert single(item, [("triangle.area", {"base": 10, "height": 5})]) == (True, True)
    assert single(item, [("triangle_area", {"base": 10, "height": 5})]) == (False, False)


def test_an_integer_beyond_every_float_is_wrong():
    truth = [{"area": {"base": [10], "height": [5.5]}}]
    fields = {"calls": truth, "functions": [FUNCTION], "set": "simple_python"}
    answer = said([("area", {"base": 10, "height": 10**400})])
    assert verify_calls(Sample([], answer, fields)).verdict == "wrong"


def conversation(item: Item, turns: Sequence[Sequence[Call]]) -> Sample:
    """All calls of a turn in one answer, and an answer without a call after them."""
    answers = [text for calls in turns for text in ([said(calls)] if calls else []) + [DONE]]
    return sample(item, answers)


def multi(item: Item, turns: Sequence[Sequence[Call]]) -> tuple[bool, bool]:
    """Our verdict of a conversation, and bfcl-eval's of the calls in it."""
    ours = verify_turns(conversation(item, turns))
    written = [
        [[f"{name}({','.join(f'{k}={v!r}' for k, v in a.items())})" for name, a in calls]]
        if calls
        else []
        for calls in turns
    ]
    official = bfcl.official()
    before = set(vars(official.utils))
    theirs = official.multi_turn_checker(
        written, item.fields["calls"], item.fields["entry"], "", "direct"
    )
    for name in set(vars(official.utils)) - before:
        delattr(official.utils, name)
    return ours.verdict == "right", theirs["valid"]


MULTI = ("bfcl_multi_turn_base", "bfcl_multi_turn_miss_func", "bfcl_multi_turn_miss_param")


@pytest.mark.parametrize("name", MULTI)
def test_the_true_calls_of_a_conversation_are_right_and_none_fails(shared: Path, name: str):
    results = 0
    for item in items(shared, name):
        steps = [calls for calls in item.fields["calls"] if calls]
        for result in (one for step in bfcl.run(steps, item.fields["entry"]) for one in step):
            results += 1
            assert not result.startswith(("Error", '{"error"')), (item.id, result)
        assert multi(item, true_calls(item)) == (True, True), item.id
    assert results > 1_100


def one_turn(turns: list[list[Call]], change: Change) -> Iterator[list[list[Call]]]:
    """The conversation with the calls of one turn changed, for each turn that has calls."""
    for number, calls in enumerate(turns):
        changed = change(calls) if calls else None
        if changed is not None:
            yield [*turns[:number], changed, *turns[number + 1 :]]


@pytest.mark.parametrize("change", CHANGES[1:], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", MULTI)
def test_a_changed_conversation_has_the_official_verdict(shared: Path, name: str, change: Change):
    found = []
    for item in items(shared, name)[::8]:
        for turns in one_turn(true_calls(item), change):
            ours, theirs = multi(item, turns)
            assert ours == theirs, (item.id, turns)
            found.append(ours)
    assert not all(found) or change in (whole_floats, one_twice, wrong_order)


TREE = {
    "root": {
        "home": {
            "type": "directory",
            "contents": {"a.txt": {"type": "file", "content": "b\na\nb c"}},
        }
    }
}
ENTRY = {
    "id": "multi_turn_base_0",
    "initial_config": {"GorillaFileSystem": TREE},
    "involved_classes": ["GorillaFileSystem", "MathAPI"],
}
TINY = Item(
    "multi_turn_base_0",
    [{"role": "user", "content": "Sort a.txt, then note it in b.txt."}],
    {"calls": [["sort('a.txt')"], ["touch(file_name='b.txt')"]], "entry": ENTRY},
    follow_ups=("And create b.txt.",),
)


def test_a_conversation_by_hand():
    sort: Call = ("sort", {"file_name": "a.txt"})
    touch: Call = ("touch", {"file_name": "b.txt"})
    assert multi(TINY, [[sort], [touch]]) == (True, True)
    assert multi(TINY, [[("ls", {}), sort], [touch]]) == (True, True)
    assert multi(TINY, [[sort], [("touch", {"file_name": "c.txt"})]]) == (False, False)
    assert multi(TINY, [[sort], []]) == (False, False)
    assert multi(TINY, [[touch, sort], [touch]]) == (False, False)
    assert multi(TINY, [[touch, sort], [("ls", {})]]) == (False, False)
    unended = conversation(TINY, [[sort]])
    assert "turn 2" in verify_turns(unended).reason


def test_results_are_what_bfcl_eval_returns_and_each_run_begins_anew():
    sort = bfcl.executable(("sort", {"file_name": "a.txt"}), ENTRY["involved_classes"])
    touch = bfcl.executable(("touch", {"file_name": "b.txt"}), ENTRY["involved_classes"])
    expected = [['{"sorted_content": "a\\nb\\nb c"}'], ["None"]]
    assert bfcl.run([[sort], [touch]], ENTRY) == expected
    assert bfcl.run([[sort], [touch]], ENTRY) == expected
    assert not [name for name in vars(bfcl.official().utils) if bfcl.MODEL in name]
    chat = [*TINY.messages, {"role": "assistant", "content": "[sort(file_name='a.txt'), pwd(x=1)]"}]
    told = goes_on(TINY, chat)
    assert told is not None and told.startswith(
        '<TOOL_RESPONSE>[{"sorted_content": "a\\nb\\nb c"}, "Error'
    )


def test_an_answer_runs_nothing_but_the_services_functions(tmp_path: Path):
    made = tmp_path / "made"
    for name, arguments in (
        ("open", {"file": str(made), "mode": "w"}),
        (f"open({str(made)!r}, 'w').close", {}),
        ("sort", {f"file_name=open({str(made)!r}, 'w'), b": 1}),
        ("exec", {"source": f"open({str(made)!r}, 'w')"}),
        ("_load_scenario", {"scenario": {}}),
        ("GorillaFileSystem.ls", {}),
        ("cat", {"file_name": f"' + str(open({str(made)!r}, 'w')) + '"}),
        ("cat", {}),
        ("cat", {"file_name": None}),
        ("cat", {"class": 1}),
        ("power", {"base": 10, "exponent": 10**12}),
        ("power", {"base": 10**4000, "exponent": 10**400}),
        ("logarithm", {"value": 2, "base": 3, "precision": "999999999"}),
        ("round_number", {"number": 7, "decimal_places": -(10**12)}),
        ("add", {"a": 16**9999, "b": 1}),
        ("add", {"a": math.nan, "b": 1}),
    ):
        call = bfcl.executable((name, arguments), ENTRY["involved_classes"])
        ((result,),) = bfcl.run([[call]], ENTRY)
        assert "rror" in result, (name, result)
        assert bfcl.check_turns([[[call]]], [["ls()"]], ENTRY) != ""
    assert not made.exists()


def test_no_answer_raises():
    for text in (
        "[" * 100_000,
        "<TOOLCALL>" + '{"a":' * 100_000,
        "<TOOLCALL>[{}]</TOOLCALL>",
        '<TOOLCALL>[{"name": "cat", "arguments": [1]}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "cat", "arguments": "x"}]</TOOLCALL>',
        "[cat(file_name=" + "[" * 900 + "]" * 900 + ")]",
        '<TOOLCALL>[{"name": "cat", "arguments": {"file_name": '
        + "[" * 900
        + "]" * 900
        + "}}]</TOOLCALL>",
        '<TOOLCALL>[{"name": "cat", "arguments": {"file_name": "\\ud800"}}]</TOOLCALL>',
        "[f(*a)]",
        "[add(a=0x" + "f" * 9999 + ", b=1)]",
    ):
        read_calls(text)
        goes_on(TINY, [*TINY.messages, {"role": "assistant", "content": text}])
        steps = [step for turn in turns_of(TINY.fields, [text]) for step in turn]
        bfcl.check_turns([steps, []], TINY.fields["calls"], ENTRY)


def test_a_missing_bfcl_eval_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    for module in [name for name in sys.modules if name.startswith("bfcl_eval.")]:
        monkeypatch.delitem(sys.modules, module)
    bfcl.official.cache_clear()
    for name in ("bfcl_live", "bfcl_multi_turn"):
        with pytest.raises(EvalError, match=bfcl.INSTALL):
            list(find(name).read(Data(name)))


def test_make_installs_the_same_version():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert bfcl.INSTALL.split()[-1] in makefile
