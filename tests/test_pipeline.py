from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera.pipeline import STAGES as REAL_STAGES
from tessera.pipeline import run_recipe
from tessera.runs.files import RunError
from tessera.runs.plan import KINDS, Step, plan, table_text, with_defaults
from tessera.runs.recipe import RecipeError, loads
from tessera.runs.run import is_done, read_json, read_manifest, read_metrics, read_table
from tests.pipeline_stages import STAGES, MakeConfig

RECIPE = """
name = "r"
[data]
[parent]
[child]
[kd]
model = "child"
[compare]
models = ["child", "kd"]
"""


def run(runs: Path, text: str = RECIPE, *overrides: str, **options) -> dict[str, Step]:
    steps = run_recipe(loads(text, overrides), runs, quiet=True, stages=STAGES, **options)
    return {step.name: step for step in steps}


def actions(runs: Path, text: str = RECIPE, *overrides: str, redo=()) -> dict[str, str]:
    return {step.name: step.action for step in plan(loads(text, overrides), runs, redo, STAGES)}


def test_every_stage_is_run_and_reads_what_was_made(tmp_path: Path):
    steps = run(tmp_path)
    assert all(is_done(step.path) for step in steps.values())
    assert read_json(tmp_path / "r" / "child", "value") == 3  # data 1 + parent 1 + its own 1
    rows = [{"model": "child", "value": 3}, {"model": "kd", "value": 55}]
    assert read_table(tmp_path / "r" / "compare", "compare") == rows


def test_what_runs_is_what_was_planned(tmp_path: Path):
    planned = {step.name: step.fingerprint for step in plan(loads(RECIPE), tmp_path, (), STAGES)}
    run(tmp_path)
    written = {p.parent.name: read_manifest(p.parent) for p in tmp_path.glob("r/*/run.json")}
    assert {name: one.fingerprint for name, one in written.items()} == planned


def test_running_again_changes_nothing(tmp_path: Path):
    run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert set(actions(tmp_path).values()) == {"skip"}
    run(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_interrupted_stage_goes_on_to_the_same_end(tmp_path: Path):
    run(tmp_path / "undisturbed")
    text = RECIPE.replace("[kd]", "[kd]\nstop_at = 2")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", text)
    kd = tmp_path / "stopped" / "r" / "kd"
    assert read_manifest(kd).status == "interrupted"
    assert (actions(tmp_path / "stopped", text))["kd"] == "resume"
    run(tmp_path / "stopped", text)
    assert read_metrics(kd) == read_metrics(tmp_path / "undisturbed" / "r" / "kd")
    assert not (kd / "state").exists()


def test_a_failed_stage_stops_the_recipe_and_is_resumed(tmp_path: Path):
    text = RECIPE.replace("[child]", "[child]\nfail = true")
    with pytest.raises(RuntimeError, match="as asked"):
        run(tmp_path, text)
    child = read_manifest(tmp_path / "r" / "child")
    assert (child.status, child.error) == ("failed", "RuntimeError: as asked")
    assert not (tmp_path / "r" / "kd").exists()


def test_a_run_that_failed_before_it_made_anything_begins_anew_when_put_right(tmp_path: Path):
    with pytest.raises(RuntimeError, match="as asked"):
        run(tmp_path, RECIPE, "child.fail=true")
    assert actions(tmp_path)["child"] == "run"
    run(tmp_path)
    assert read_json(tmp_path / "r" / "child", "value") == 3


def test_a_run_that_holds_work_is_not_deleted_by_a_change(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, RECIPE, "kd.stop_at=2")
    with pytest.raises(RunError, match=r"(?s)kd is interrupted.*kd\.steps: 5 -> 6.*--redo kd"):
        run(tmp_path, RECIPE, "kd.stop_at=2", "kd.steps=6")


def test_a_changed_stage_is_refused_with_a_diff_before_anything_runs(tmp_path: Path):
    run(tmp_path, RECIPE, only=["data", "parent", "child"])
    text = RECIPE + "[child-2]\nvalue = 9\n"
    with pytest.raises(RunError, match=r"(?s)child is done.*value: 1 -> 5.*--redo child"):
        run(tmp_path, text, "child.value=5")
    assert not (tmp_path / "r" / "child-2").exists()
    assert read_json(tmp_path / "r" / "child", "value") == 3


def test_a_change_upstream_invalidates_what_was_made_from_it(tmp_path: Path):
    run(tmp_path)
    changed = actions(tmp_path, RECIPE, "parent.value=2")
    assert changed == {
        "data": "skip",
        "parent": "changed",
        "child": "changed",
        "kd": "changed",
        "compare": "changed",
    }
    with pytest.raises(RunError, match=r"(?s)value: 1 -> 2.*--redo parent"):
        run(tmp_path, RECIPE, "parent.value=2")


def test_redo_of_one_stage_alone_leaves_nothing_stale(tmp_path: Path):
    """A measurement made again has the same fingerprint, so what was made from it must go."""
    run(tmp_path)
    run(tmp_path, redo=["parent"], only=["parent"])
    assert {k for k, action in actions(tmp_path).items() if action == "skip"} == {"data", "parent"}


def test_redo_takes_everything_made_from_it_along(tmp_path: Path):
    run(tmp_path)
    planned = actions(tmp_path, RECIPE, "child.value=2", redo=["child"])
    assert planned["parent"] == "skip" and planned["kd"] == planned["compare"] == "redo"
    run(tmp_path, RECIPE, "child.value=2", redo=["child"])
    assert read_table(tmp_path / "r" / "compare", "compare")[0]["value"] == 4


def test_a_changed_seed_and_a_changed_file_are_changes(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("1")
    run(tmp_path, RECIPE, f"parent.path={checkpoint}")
    assert read_manifest(tmp_path / "r" / "parent").inputs["path"]["path"] == str(checkpoint)
    assert set(actions(tmp_path, RECIPE, f"parent.path={checkpoint}").values()) == {"skip"}
    assert actions(tmp_path, RECIPE, f"parent.path={checkpoint}", "seed=1")["data"] == "changed"
    (checkpoint / "config.json").write_text("2")
    assert actions(tmp_path, RECIPE, f"parent.path={checkpoint}")["parent"] == "changed"


def test_only_needs_its_inputs_to_be_done(tmp_path: Path):
    with pytest.raises(RunError, match=r"kd.*data.*--only data"):
        run(tmp_path, only=["kd"])
    with pytest.raises(RecipeError, match=r"--only kdd.*did you mean 'kd'"):
        run(tmp_path, only=["kdd"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[parnt]", r"\[parnt\]: there is no stage 'parnt'; did you mean 'parent'"),
        ("[child]", r"child\.parent: nothing above \[child\] gives this"),
        ("[data]\n[child]\nparent = 'data'", r"\[data\] gives data, and this needs model"),
        ("[child]\nparent = 'parent'\n[parent]", r"\[parent\] is not above this stage"),
        ("[parent]\n[child]\nparent = 'parnt'", r"no run above and no path; did you mean 'parent'"),
        ("[parent]\n[compare]", r'compare\.models: give a list of runs, e\.g\. models = \["child"'),
        ("[parent]\nvalu = 1", r"parent\.valu: unknown key; did you mean 'value'"),
        ("[parent]\n[child]\nparent = 3", r"3 is neither a run of this recipe nor a path"),
    ],
)
def test_what_is_off_is_found_before_anything_runs(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, text)
    assert list(tmp_path.iterdir()) == []


def test_needs_come_from_the_nearest_run_above(tmp_path: Path):
    text = "[data]\n[parent]\n[child]\n[child-2]\n[kd]\n[data-2]\nmodel = 'kd'"
    steps = {step.name: step for step in plan(loads(text), tmp_path, (), STAGES)}
    home = tmp_path / "recipe"
    assert steps["parent"].inputs == {"data": home / "data"}
    assert steps["data"].inputs == {"model": None}
    assert steps["kd"].inputs == {
        "model": home / "child-2",
        "teacher": home / "parent",
        "data": home / "data",
    }
    assert steps["data-2"].inputs == {"model": home / "kd"}


def test_a_need_may_be_a_finished_run_of_another_recipe(tmp_path: Path):
    run(tmp_path, 'name = "first"\n[parent]\nvalue = 7')
    text = f'name = "second"\n[child]\nparent = "{tmp_path}/first/parent"'
    run(tmp_path, text)
    assert read_json(tmp_path / "second" / "child", "value") == 8
    with pytest.raises(RecipeError, match=r"parent\.data.*model.*data"):
        run(tmp_path, f'name = "t"\n[parent]\ndata = "{tmp_path}/first/parent"')


def test_the_resolved_table_is_a_recipe_of_the_same_stage(tmp_path: Path):
    kd = run(tmp_path)["kd"]
    again = loads((kd.path / "recipe.toml").read_text()).stages[0]
    assert (again.name, again.stage) == ("kd", "kd")
    assert again.table == {"model": "child", "teacher": "parent", "data": "data"} | {
        key: value for key, value in kd.resolved.items() if value is not None
    }
    assert table_text(kd).startswith("[kd]\n")


def start(runs: Path, text: str, *redo: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pipeline_stages", str(runs), text, *redo]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_then_run_again(tmp_path: Path, number: signal.Signals):
    text = RECIPE.replace("[kd]", "[kd]\nsteps = 12\npause = 0.02")
    run(tmp_path / "undisturbed", text)
    kd = tmp_path / "stopped" / "r" / "kd"
    with start(tmp_path / "stopped", text) as process:
        wait_for(lambda: len(read_metrics(kd)) >= 4)
        process.send_signal(number)
        process.communicate()
    assert read_manifest(kd).status == ("running" if number == signal.SIGKILL else "interrupted")
    run(tmp_path / "stopped", text)
    assert read_metrics(kd) == read_metrics(tmp_path / "undisturbed" / "r" / "kd")
    assert read_json(kd, "value") == read_json(tmp_path / "undisturbed" / "r" / "kd", "value")


def test_a_second_process_on_the_same_runs_is_refused(tmp_path: Path):
    text = RECIPE.replace("[kd]", "[kd]\nsteps = 1000\npause = 0.02")
    kd = tmp_path / "r" / "kd"
    with start(tmp_path, text) as process:
        wait_for(lambda: len(read_metrics(kd)) >= 1)
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run(tmp_path, text)
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run(tmp_path, text, redo=["kd"])
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run(tmp_path, text, redo=["data"])
        assert is_done(tmp_path / "r" / "data")
        process.kill()
        process.communicate()


def test_the_real_table_is_in_order_and_its_needs_are_given():
    given = {"data?", "model=", "chats="}
    for stage in REAL_STAGES.values():
        for need in stage.needs.split():
            plain = need.rstrip("?*")
            assert KINDS.get(plain, plain) in given or need in given, (
                f"{stage.name} needs {need} before anything gives it"
            )
        given.add(stage.gives)


def test_warnings_come_before_anything_runs_and_not_of_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def warnings(config: MakeConfig, step: Step, steps: list[Step]) -> list[str]:
        return [f"{step.name} of {len(steps)}"] if step.name == "child" else []

    monkeypatch.setattr(MakeConfig, "warnings", warnings, raising=False)
    for expected in (True, False):
        run_recipe(loads("[data]\n[parent]\n[child]"), tmp_path, stages=STAGES)
        lines = capsys.readouterr().err.splitlines()
        assert (lines[0] == "child: WARNING: child of 3") is expected
        assert len(lines) == (7 if expected else 3)


DEFAULTS = """
[defaults]
value = 5
steps = 3
[data]
[parent]
[child]
value = 7
[kd]
[compare]
models = ["child"]
"""


def test_defaults_complete_the_stages_that_have_such_a_key(tmp_path: Path):
    steps = {step.name: step for step in plan(loads(DEFAULTS), tmp_path, (), STAGES)}
    values = {n: s.resolved["value"] for n, s in steps.items() if "value" in s.resolved}
    assert values == {"data": 5, "parent": 5, "child": 7, "compare": 5}
    assert steps["kd"].resolved["steps"] == 3
    changed = plan(loads(DEFAULTS, ["defaults.steps=4"]), tmp_path, (), STAGES)
    assert next(s for s in changed if s.name == "kd").resolved["steps"] == 4


@pytest.mark.parametrize(("key", "near"), [("valu", "value"), ("stps", "steps")])
def test_a_default_that_no_stage_takes_is_refused(tmp_path: Path, key: str, near: str):
    text = f'[defaults]\n{key} = 1\n[data]\n[parent]\n[kd]\nmodel = "parent"'
    with pytest.raises(RecipeError, match=rf"defaults\.{key}: .*'{near}'"):
        plan(loads(text), tmp_path, (), STAGES)


def test_default_tables_complete_key_by_key_and_switch_nothing_on(tmp_path: Path):
    text = """
[defaults]
train = { steps = 3, sequence_length = 64, lr = 1e-3 }
[data]
tokenizer = "byte"
tasks = { calc = 40 }
[parent]
architecture = {}
train = { lr = 2e-3 }
[bld]
"""
    steps = {s.name: s for s in plan(loads(text), tmp_path, (), REAL_STAGES)}
    trained = [steps[name].resolved["train"] for name in ("parent", "bld")]
    assert [table["lr"] for table in trained] == [2e-3, 1e-3]
    assert all((t["steps"], t["sequence_length"]) == (3, 64) for t in trained)
    without = with_defaults(loads(text.replace("train = { lr = 2e-3 }", "")), REAL_STAGES)
    assert without.stages[1].table == {"architecture": {}}
    wrong = text.replace("sequence_length", "sequence_lenth")
    with pytest.raises(RecipeError, match=r"defaults\.train\.sequence_lenth: .*sequence_length"):
        plan(loads(wrong), tmp_path, (), REAL_STAGES)
