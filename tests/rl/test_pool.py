"""Rewards that cannot hang or lie: workers that die, sleep or fill the memory judge nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tessera.rl import rewards as checks
from tessera.rl.pool import Pool, Rubric
from tessera.rl.rewards import (
    CodeReward,
    ExactReward,
    FunctionReward,
    InstructionsReward,
    MathReward,
    RewardError,
    Sample,
    names,
    require_fields,
)
from tessera.rl.verifiers import code
from tessera.rl.verifiers.outcome import Outcome, right

ROOT = Path(__file__).parents[2]
ASKED = [{"role": "user", "content": "?"}]


def sample(completion: str, **fields) -> Sample:
    return Sample(ASKED, completion, fields)


def odd(one: Sample) -> Outcome:
    """Does to its own process what the completion says."""
    match one.completion.split():
        case ["sleep"]:
            time.sleep(60)
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["leave", code]:
            os._exit(int(code))
        case ["raise"]:
            raise KeyError("nothing here")
        case ["fill"]:
            return Outcome("right", float(len(bytearray(1 << 36))))
        case ["recurse"]:
            return odd(one) if odd(one) else right()
        case ["lie"]:
            return 1.0  # type: ignore[return-value]
    return right()


ODD = FunctionReward(kind="function", function=f"{__name__}:odd", deadline=1.5)
BAD = {
    "sleep": "took over 1.5 s and was killed",
    "die": "SIGKILL",
    "leave 3": "exit code 3",
    "raise": "KeyError",
    "fill": "MemoryError",
    "recurse": "RecursionError",
    "lie": "returned float and no Outcome",
}


def test_what_goes_wrong_in_a_checker_is_could_not_judge_with_the_reason_and_the_rest_is_judged():
    samples = [sample(text) for bad in BAD for text in (bad, "fine")]
    with Pool([ODD], workers=2) as pool:
        outcomes = pool.check([(0, one) for one in samples])
        assert pool.replaced == 3  # for the sleeper, the killed and the one that left
    for one, outcome in zip(samples, outcomes, strict=True):
        if one.completion == "fine":
            assert outcome == right()
        else:
            assert outcome.verdict == "could-not-judge" and outcome.score is None
            assert BAD[one.completion] in outcome.reason


def test_outcomes_come_in_the_order_of_the_tasks_and_workers_live_between_calls():
    rewards = [ExactReward(kind="exact"), MathReward(kind="math")]
    with Pool(rewards, workers=3) as pool:
        for _ in range(2):
            tasks = [(n % 2, sample(f"\\boxed{{{n % 5}}}", answer=str(n % 3))) for n in range(60)]
            found = pool.check(tasks)
            right_ones = [outcome.verdict == "right" for outcome in found]
            assert right_ones == [n % 5 == n % 3 for n in range(60)]
        assert pool.replaced == 0


def test_what_is_done_is_not_looked_at_again_for_every_message(monkeypatch: pytest.MonkeyPatch):
    looks = 0

    def look(self: Outcome, other: object) -> bool:
        nonlocal looks
        looks += 1
        return self is other

    with Pool([ExactReward(kind="exact")], workers=2) as pool:
        monkeypatch.setattr(Outcome, "__eq__", look)
        pool.check([(0, sample("a", answer="a"))] * 200)
    assert looks < 200


def test_workers_end_with_the_process_that_made_them(tmp_path: Path):
    code = (
        "import os, signal\n"
        "from tessera.rl.pool import Pool\n"
        "from tessera.rl.rewards import ExactReward, Sample\n"
        "pool = Pool([ExactReward(kind='exact')], 2)\n"
        "pool.check([(0, Sample([], 'a', {'answer': 'a'}))] * 2)\n"
        "print(*[w.process.pid for w in pool._workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < until, "workers outlive their maker"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_pool_that_is_closed_under_a_call_starts_nobody_again():
    pool, failed = Pool([ODD], workers=1), []

    def judge() -> None:
        try:
            pool.check([(0, sample("sleep"))] * 3)
        except RewardError as error:
            failed.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    until = time.monotonic() + 60
    while not pool._busy() and time.monotonic() < until:
        time.sleep(0.01)
    pool.close()
    thread.join(60)
    left = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert not left and failed == ["the processes that judge were ended"]


def test_a_function_that_is_not_there_is_said_before_anything_is_judged(capfd):
    missing = FunctionReward(kind="function", function="tests.rl.nowhere:no")
    with Pool([missing], 1) as pool, pytest.raises(RewardError, match="exit code 1"):
        pool.check([(0, sample("x"))])
    assert "nowhere" in capfd.readouterr().err


def test_the_sum_is_weighted_and_nothing_where_a_part_could_not_be_judged():
    rewards = [
        ExactReward(kind="exact", weight=2.0),
        FunctionReward(kind="function", function=f"{__name__}:odd", weight=0.5, name="odd"),
    ]
    with Rubric(rewards, 2) as rubric:
        assert rubric.names == ["exact", "odd"]
        answers = ("a", "b", "raise")
        one, other, none = rubric([sample(text, answer="a") for text in answers])
    assert (one.reward, other.reward, none.reward) == (2.5, 0.5, None)
    assert none.parts["exact"].verdict == "wrong"
    assert none.parts["odd"].verdict == "could-not-judge"


@pytest.mark.parametrize(
    ("row", "judged_by"),
    [
        ({"tests": "assert f() == 1"}, "asserts"),
        ({"inputs": ["1"], "outputs": ["1"]}, "outputs"),
        ({"tests": "assert f() == 1", "inputs": None, "outputs": None}, "asserts"),
        ({"tests": None, "inputs": ["1"], "outputs": ["1"]}, "outputs"),
        ({"tests": "assert f() == 1", "inputs": ["1"], "outputs": ["1"]}, "asserts"),
    ],
)
def test_code_is_judged_by_asserts_where_a_row_has_tests(
    monkeypatch: pytest.MonkeyPatch, row: dict, judged_by: str
):
    for name in ("asserts", "outputs"):
        monkeypatch.setattr(code, f"verify_{name}", lambda *_, name=name, **__: right(name))
    reward = CodeReward(kind="code")
    require_fields([reward], row)
    assert checks.check(reward, sample("x = 1", **row)).reason == judged_by


def test_what_rewards_judge_by_must_be_in_the_row():
    with pytest.raises(RewardError, match="'answer'"):
        require_fields([ExactReward(kind="exact")], {"anser": 1})
    with pytest.raises(ValueError, match="nonsense"):
        row = {"instruction_id_list": ["nonsense:none"], "kwargs": [{}]}
        require_fields([InstructionsReward(kind="instructions")], row)
    with pytest.raises(RewardError, match="'exact'"):
        names([ExactReward(kind="exact"), ExactReward(kind="exact")])
