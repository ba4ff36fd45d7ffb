"""Reinforcement learning stopped anywhere is the same run, and two processes are one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tessera import dist
from tessera.cli.main import app
from tessera.model.checkpoint import load_model
from tessera.model.parallel import held_params
from tessera.model.placement import LayoutError, ParallelConfig
from tessera.model.source import load_config
from tessera.objectives.kd import load_teacher
from tessera.rl.policy import GRPOConfig, Guard
from tessera.rl.rewards import FormatReward
from tessera.rl.rollouts import RolloutConfig, joined, share
from tessera.runs.files import FailureError, RunError
from tessera.runs.run import Run, read_metrics
from tessera.train.optim import TrainConfig
from tests.rl.policy_runs import made, train
from tests.test_dist import run_ranks

ROOT = Path(__file__).parents[2]
CODE = "from tests.rl.policy_runs import main; main()"
TWICE = {"updates_per_rollout": 2}
STALE = {"staleness": 1}
DISTIL = {"stage": "gkd"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("policy"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model").state_dict()


def assert_equal(run: Path, other: Path) -> None:
    assert read_metrics(run) == read_metrics(other)
    found, theirs = weights(run), weights(other)
    assert all(torch.equal(value, theirs[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("stop", "within", "more"),
    [
        *[(3, False, {}), (2, True, {}), (3, False, TWICE), (2, True, TWICE), (5, False, TWICE)],
        *[(3, False, STALE), (2, True, STALE), (1, False, STALE), (5, False, STALE)],
        *[(3, False, STALE | TWICE), (2, False, STALE | TWICE), (2, True, STALE | TWICE)],
        *[(3, False, DISTIL), (2, True, DISTIL | STALE | TWICE)],
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    home: Path, tmp_path: Path, stop: int, within: bool, more: dict
):
    whole = home / "-".join(["whole", *more])
    if not whole.exists():
        train(str(home), str(whole), **more)
    run = tmp_path / whole.name
    train(str(home), str(run), stop=stop, within=within, **more)
    assert len(read_metrics(run)) < 6
    train(str(home), str(run), **more)
    assert_equal(run, whole)


def test_two_processes_are_one(home: Path):
    jobs: list[dict[str, Any]] = [{"kl": 0.1, "tensor": 2}, STALE, TWICE | {"tensor": 2}]
    for number, job in enumerate(jobs):
        train(str(home), str(home / f"one-{number}"), **job | {"tensor": 1})
    settings = {"steps": 6, "lr": 1e-3, "microbatch_tokens": 256, "save_seconds": 1e-9}
    jobs.append(TWICE | {"train": settings | {"parallel": {"context": 2}}})
    jobs += [DISTIL | STALE, DISTIL | {"tensor": 2}]
    for number, job in enumerate(jobs[4:], 4):
        train(str(home), str(home / f"one-{number}"), **job | {"tensor": 1})
    asked = [{"home": str(home), "run": str(home / f"two-{n}"), **j} for n, j in enumerate(jobs)]
    run_ranks(CODE, json.dumps(asked))
    for number in range(len(jobs)):
        one, two = home / f"one-{2 if number == 3 else number}", home / f"two-{number}"
        for row, other in zip(read_metrics(one), read_metrics(two), strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(weights(one), weights(two), rtol=1e-3, atol=1e-4)
    (whole,), halves = (rollouts(home / f"{n}-2", 5 // 2) for n in ("one", "two"))
    assert joined(halves, 2) == whole and len(halves) == 2


def rollouts(run: Path, number: int) -> list[list[list[list[int]]]]:
    """The tokens of the answers to each prompt of a rollout, process by process."""
    files = sorted((run / "rollouts").glob(f"{number:08}-*.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[[a["ids"] for a in group["answers"]] for group in own] for own in rows]


def test_shares_are_equal_in_every_update_and_join_to_the_whole():
    for updates, world, count in [(1, 1, 9), (1, 4, 8), (2, 2, 8), (3, 2, 12), (2, 3, 7)]:
        shares = [share(range(count), updates, rank, world) for rank in range(world)]
        assert joined(shares, updates) == list(range(count))
        for update in range(updates):
            fed = [own[update::updates] for own in shares]
            assert sorted(sum(fed, [])) == list(range(update, count, updates))
            assert count % (updates * world) or len({len(one) for one in fed}) == 1


@pytest.mark.parametrize(
    ("more", "fewer"),
    [(TWICE, True), (STALE, False)],
    ids=["fewer, within a rollout", "more, one in flight"],
)
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    home: Path, tmp_path: Path, more: dict, fewer: bool
):
    whole, run = home / "-".join(["whole", *more]), tmp_path / "run"
    if not whole.exists():
        train(str(home), str(whole), **more)
    job = {"home": str(home), "run": str(run), **more}
    if fewer:
        run_ranks(CODE, json.dumps([job | {"stop": 3}]))
        train(**job)
    else:
        train(**job, stop=3)
        run_ranks(CODE, json.dumps([job]))
    for row, other in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights(run), weights(whole), rtol=1e-3, atol=1e-4)


def test_a_stale_rollout_was_said_by_the_weights_of_one_ago(home: Path):
    settings = {"train": {"steps": 6, "lr": 3e-3, "microbatch_tokens": 256}}
    train(str(home), str(home / "fresh"), **settings)
    train(str(home), str(home / "stale"), **STALE, **settings)
    fresh, stale = read_metrics(home / "fresh"), read_metrics(home / "stale")
    assert [row["staleness"] for row in stale] == [0, 1, 1, 1, 1, 1]
    # The first is said by the same weights, and by the engine they are the trainer's own.
    assert stale[0] == pytest.approx(fresh[0] | {"staleness": 0.0}, rel=1e-5, abs=1e-6)
    assert all(row["gap"] < 1e-5 for row in [*fresh, stale[0]])
    assert all(row["gap"] > 1e-4 for row in stale[1:])


@pytest.mark.vllm
def test_vllm_says_what_the_trainer_thinks_it_says(home: Path):
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        pytest.skip("needs vLLM's CPU build: make venv-vllm")
    told = {"engine": "vllm", "vllm": {"python": str(python)}, "engine_batch": 16}
    settings = {"train": {"steps": 4, "lr": 3e-3, "microbatch_tokens": 256}}
    for name, more in (("vllm", {}), ("vllm-stale", STALE)):
        train(str(home), str(home / name), **told, **settings, **more)
    assert all(row["gap"] < 1e-4 for row in read_metrics(home / "vllm"))
    stale = read_metrics(home / "vllm-stale")
    assert [row["staleness"] for row in stale] == [0, 1, 1, 1]
    assert stale[0]["gap"] < 1e-4 < stale[1]["gap"]


def test_what_was_sampled_is_there_to_be_read(home: Path):
    run = home / "samples"
    train(str(home), str(run))
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        f"{n:08}.jsonl" for n in (0, 2, 4)
    ]
    rows = list(map(json.loads, (run / "samples/00000000.jsonl").read_text().splitlines()))
    best, worst = ([r["reward"] for r in rows if r["kind"] == k] for k in ("best", "worst"))
    assert len(best) == len(worst) == 3 and min(best) >= max(worst)
    told = CliRunner().invoke(app, ["show", str(run), "--samples"])
    assert told.exit_code == 0, told.output
    assert "rollout 0, best: reward" in told.stdout and "rollout 4, worst" in told.stdout
    none = CliRunner().invoke(app, ["show", str(home / "parent"), "--samples"])
    assert none.exit_code == 2 and "keeps no samples" in none.stderr
    (row, *_) = read_metrics(run)
    assert row["reward"] == row["reward/function"] and row["gap"] < 1e-5
    assert {"length", "truncated", "unjudged", "no_signal", "obedience", "entropy"} <= set(row)


def test_a_policy_learns_what_it_is_rewarded_for(home: Path):
    run = home / "learns"
    settings = {"steps": 40, "lr": 1e-2, "microbatch_tokens": 512}
    train(str(home), str(run), prompts_per_rollout=8, samples=8, train=settings)
    rewards = [row["reward"] for row in read_metrics(run)]
    assert sum(rewards[-5:]) / 5 > 1.15 * sum(rewards[:5]) / 5


def test_a_teacher_is_followed_on_the_policys_own_answers(home: Path):
    """Reverse KL on its own samples; nothing is judged, so nothing of rewards is told."""
    run = home / "distils"
    settings = {"steps": 40, "lr": 1e-2, "microbatch_tokens": 512}
    train(str(home), str(run), **DISTIL, prompts_per_rollout=8, samples=1, train=settings)
    (first, *_, last) = rows = read_metrics(run)
    assert sum(row["loss"] for row in rows[-5:]) / 5 < 0.5 * first["loss"]
    assert {"length", "truncated", "obedience"} <= set(last)
    assert not {"reward", "no_signal", "unjudged", "gap"} & set(last)
    kept = (run / "samples/00000000.jsonl").read_text().splitlines()
    assert {json.loads(row)["kind"] for row in kept} == {"random"}
    told = CliRunner().invoke(app, ["show", str(run), "--samples"])
    assert told.exit_code == 0 and "rollout 0, random: 8 tokens" in told.stdout
    child: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    with pytest.raises(RunError, match="of 295 tokens and the model one of 7"):
        load_teacher(home / "cpt", TrainConfig(steps=1), child)


def test_an_engine_of_other_weights_stops_the_run(tmp_path: Path):
    with Run.open(tmp_path / "r", stage="grpo", config={}, inputs={}, seed=0, quiet=True) as run:
        guard = Guard(run, 0.05)
        guard(0, {"gap": 0.04, "length": 10.0})
        with pytest.raises(FailureError, match=r"\b0\.2\b.*gap_limit"):
            guard(1, {"gap": 0.2})
        with pytest.raises(FailureError, match="60% of the answers could not be judged"):
            guard(1, {"unjudged": 0.6})
        guard(2, {"length": 25.0, "truncated": 0.5, "unjudged": 0.2, "obedience": 0.5})
        guard(3, {"length": 25.0, "truncated": 0.5, "unjudged": 0.2, "obedience": 0.5})
    said = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert sum("25 tokens" in line for line in said) == 1
    assert sum("max_tokens" in line for line in said) == 1


def test_a_resumed_run_knows_how_long_its_first_answers_were(tmp_path: Path):
    opened = {"stage": "grpo", "config": {}, "inputs": {}, "seed": 0, "quiet": True}
    with Run.open(tmp_path / "r", **opened) as run:
        Guard(run, 0.05)(0, {"length": 10.0})
        run.log(1, length=10.0)
        run.log(2)  # a step in the middle of a rollout
    with Run.open(tmp_path / "r", **opened) as run:
        Guard(run, 0.05)(2, {"length": 25.0})
    (line,) = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert "25 tokens" in line


def test_a_step_whose_answers_are_all_cut_says_what_to_raise(home: Path, tmp_path: Path):
    with pytest.raises(FailureError, match="max_tokens = 1"):
        train(str(home), str(tmp_path / "run"), max_tokens=1, overlong="mask")


def test_a_step_that_could_not_be_judged_says_where_the_reasons_are(home: Path, tmp_path: Path):
    unable = [{"kind": "function", "function": "tests.rl.letters:unable"}]
    with pytest.raises(FailureError) as failed:
        train(str(home), str(tmp_path / "run"), rewards=unable)
    file = tmp_path / "run" / "samples" / "00000000.jsonl"
    assert str(file) in str(failed.value)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows and all("KeyError: 'no letters'" in row["unjudged"] for row in rows)


def test_as_few_processes_answer_together_as_have_room_beside_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    """12 bytes a parameter over all 8 processes, and the weights over those that share them."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, model = RolloutConfig(train=TrainConfig(steps=1)), load_config(home / "parent")

    def ways(room: float, **more: Any) -> int:
        state = 12 / 8 * model.num_params()
        monkeypatch.setattr(dist, "device_memory", lambda: 1.001 * (state + 4 * room) / 0.7)
        return config.model_copy(update=more).placement(home / "parent").config.tensor

    split = {"train": TrainConfig(steps=1, parallel=ParallelConfig(tensor=4))}
    one, two, four = (held_params(model, n) for n in (1, 2, 4))
    assert [ways(room) for room in (one, two, four)] == [1, 2, 4]
    assert ways(two, dtype="bfloat16") == ways(four, staleness=1) == 1
    assert [ways(one, **split), ways(one, tensor=2, **split)] == [4, 2]
    with pytest.raises(LayoutError, match="tensor = 3 .* the 4 processes"):
        ways(one, tensor=3, **split)
    with pytest.raises(LayoutError, match="start more processes"):
        ways(0)


def test_settings_that_cannot_be_are_refused():
    rewards, steps = (FormatReward(kind="format"),), TrainConfig(steps=1)
    with pytest.raises(ValueError, match="samples"):
        RolloutConfig(train=steps, samples=1, rewards=rewards)
    with pytest.raises(ValueError, match="prompts_per_rollout"):
        RolloutConfig(train=steps, prompts_per_rollout=2, updates_per_rollout=3, rewards=rewards)
    with pytest.raises(ValueError, match="overlong_buffer = 65"):
        RolloutConfig(train=steps, max_tokens=64, overlong_buffer=65, rewards=rewards)
    with pytest.raises(ValueError, match="tensor = 2 .* staleness = 1"):
        RolloutConfig(train=steps, tensor=2, staleness=1, rewards=rewards)
    GRPOConfig(train=steps, rewards=rewards, dual_clip=3.0)
    with pytest.raises(ValueError, match="dual_clip = 1"):
        GRPOConfig(train=steps, rewards=rewards, dual_clip=1.0)
