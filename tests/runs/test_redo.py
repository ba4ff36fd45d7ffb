"""What --redo keeps, replaces and leaves behind, however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tessera.pipeline import run_recipe
from tessera.report.sections import read_runs
from tessera.report.show import describe
from tessera.runs.files import RunError
from tessera.runs.plan import plan
from tessera.runs.recipe import loads
from tessera.runs.run import Run, aside, is_done, read_json, read_manifest, read_metrics, read_table
from tests import pipeline_stages
from tests.pipeline_stages import STAGES
from tests.test_pipeline import RECIPE, actions, run, start, wait_for


def contents(runs: Path) -> dict[Path, bytes]:
    files = (p for p in runs.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(runs): p.read_bytes() for p in files}


def leftovers(runs: Path) -> list[Path]:
    return [p for p in runs.rglob(".*") if p.name != ".lock"]


def test_a_redo_that_fails_before_it_makes_anything_leaves_all_as_it_was(tmp_path: Path):
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="as asked"):
        run(tmp_path, RECIPE, "child.fail=true", redo=["child"])
    assert contents(tmp_path) == before
    assert set(actions(tmp_path).values()) == {"skip"}


def test_a_redo_that_fails_further_down_keeps_what_it_has_not_come_to(tmp_path: Path):
    run(tmp_path)
    words = ("parent.value=2", "child.fail=true")
    with pytest.raises(RuntimeError, match="as asked"):
        run(tmp_path, RECIPE, *words, redo=["parent"])
    assert read_json(tmp_path / "r" / "parent", "value") == 3
    assert read_json(tmp_path / "r" / "child", "value") == 3  # back, and of the old parent
    planned = {"data": "skip", "parent": "skip", "child": "changed"}
    found = actions(tmp_path, RECIPE, "parent.value=2", "child.value=7")
    assert {name: found[name] for name in planned} == planned
    run(tmp_path, RECIPE, "parent.value=2", redo=["child"])
    assert read_table(tmp_path / "r" / "compare", "compare")[0]["value"] == 4
    assert leftovers(tmp_path) == []


def test_a_redo_replaces_all_that_follows_and_leaves_nothing_behind(tmp_path: Path):
    old = {name: step.path for name, step in run(tmp_path).items()}
    begun = {name: read_manifest(path).started for name, path in old.items()}
    run(tmp_path, redo=["child"])
    again = {name for name, path in old.items() if read_manifest(path).started != begun[name]}
    assert again == {"child", "kd", "compare"} and leftovers(tmp_path) == []


def test_the_old_run_stands_aside_unseen_while_the_new_one_is_made(tmp_path: Path):
    kd = run(tmp_path)["kd"].path
    slow = RECIPE.replace("[kd]", "[kd]\nsteps = 1000\npause = 0.02")
    with start(tmp_path, slow, "kd") as process:
        wait_for(lambda: aside(kd).exists() and len(read_metrics(kd)) >= 2)
        listed = [row["name"] for row in describe(kd.parent)["runs"]]
        assert sorted(listed) == ["child", "compare", "data", "kd", "parent"]
        assert len(read_runs(kd.parent).all) == 5
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run(tmp_path)
        process.kill()
        process.communicate()
    assert read_metrics(kd) and set(actions(tmp_path, slow).values()) == {"skip", "resume", "redo"}
    run(tmp_path)  # with the old recipe the old run is back
    assert set(actions(tmp_path).values()) == {"skip"} and not aside(kd).exists()
    assert read_json(kd, "value") == 55


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path):
    text = RECIPE.replace("[kd]", "[kd]\nsteps = 12\npause = 0.02")
    kd = run(tmp_path, text)["kd"].path
    with start(tmp_path, text, "parent") as process:
        wait_for(lambda: aside(kd).exists() and len(read_metrics(kd)) >= 4)
        process.kill()
        process.communicate()
    begun = {name: read_manifest(kd.parent / name).started for name in ("parent", "child", "kd")}
    assert actions(tmp_path, text)["compare"] == "redo"
    run(tmp_path, text, redo=["parent"])
    assert begun == {name: read_manifest(kd.parent / name).started for name in begun}
    assert leftovers(tmp_path) == []
    run(tmp_path, text, redo=["parent"])  # that one has ended: this is another
    assert read_manifest(kd.parent / "parent").started != begun["parent"]


def measure(config: Any, run: Run, inputs: dict[str, Path | None]) -> None:
    """Gives another value each time, under the same fingerprint, and says what it read."""
    below = {k: read_json(path, "value") for k, path in inputs.items() if path}
    run.write_json("of", below)
    run.write_json("value", time.monotonic_ns())


MEASURED = 'name = "r"\n[data]\n[parent]\n[child]\n'


def die_at(runs: Path, number: int) -> bool:
    """A redo in a process of its own that is killed at its number-th rename; False: it ended."""
    pid = os.fork()
    if pid == 0:
        left, replace = number, os.replace

        def counted(*words: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*words)

        os.replace = counted
        try:
            run_recipe(loads(MEASURED), runs, redo=["parent"], quiet=True, stages=STAGES)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] != 0


@pytest.mark.parametrize("redo", [["parent"], []])
def test_killed_at_any_rename_the_next_run_takes_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redo: list[str]
):
    monkeypatch.setattr(pipeline_stages, "make", measure)
    for number in range(1, 100):
        runs = tmp_path / str(number)
        run_recipe(loads(MEASURED), runs, quiet=True, stages=STAGES)
        died = die_at(runs, number)
        planned = plan(loads(MEASURED), runs, redo, STAGES)
        assert "changed" not in [step.action for step in planned]
        run_recipe(loads(MEASURED), runs, redo=redo, quiet=True, stages=STAGES)
        home = runs / "r"
        assert all(is_done(home / name) for name in ("data", "parent", "child"))
        assert read_json(home / "child", "of") == {"parent": read_json(home / "parent", "value")}
        assert json.loads((home / "parent/tables/of.json").read_text())
        assert [p for p in leftovers(runs) if p.name.endswith((".old", ".redo"))] == []
        if not died:
            break
    assert not died and number > 8


def test_a_redo_that_goes_on_and_fails_forgets_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline_stages, "make", measure)
    run(tmp_path, MEASURED)

    def fails(config: Any, run: Run, inputs: dict[str, Path | None]) -> None:
        if run.name == "child":
            raise RunError("as asked")
        measure(config, run, inputs)

    for redo in (["parent"], []):
        monkeypatch.setattr(pipeline_stages, "make", fails)
        with pytest.raises(RunError, match="as asked"):
            run(tmp_path, MEASURED, redo=redo)
        assert actions(tmp_path, MEASURED)["child"] == "redo"
    monkeypatch.setattr(pipeline_stages, "make", measure)
    run(tmp_path, MEASURED)
    home = tmp_path / "r"
    assert read_json(home / "child", "of") == {"parent": read_json(home / "parent", "value")}


def test_a_measurement_alone_is_made_anew_as_often_as_it_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline_stages, "make", measure)
    run(tmp_path, MEASURED)
    parent = tmp_path / "r" / "parent"
    values = [read_json(parent, "value")]
    for _ in range(2):
        run(tmp_path, MEASURED, redo=["parent"], only=["parent"])
        values.append(read_json(parent, "value"))
    assert len(set(values)) == 3
    assert actions(tmp_path, MEASURED) == {"data": "skip", "parent": "skip", "child": "redo"}


def test_a_redo_under_a_changed_recipe_goes_on_when_named_again(tmp_path: Path):
    run(tmp_path)
    words = ("parent.value=2", "child.value=7", "child.fail=true")
    with pytest.raises(RuntimeError, match="as asked"):
        run(tmp_path, RECIPE, *words, redo=["parent"])
    begun = read_manifest(tmp_path / "r" / "parent").started
    assert actions(tmp_path, RECIPE, *words[:2])["child"] == "changed"
    run(tmp_path, RECIPE, *words[:2], redo=["parent"])
    assert read_manifest(tmp_path / "r" / "parent").started == begun
    assert read_json(tmp_path / "r" / "child", "value") == 10


def test_what_was_made_from_a_deleted_run_is_outdated(tmp_path: Path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "r" / "parent")
    planned = {"data": "skip", "parent": "run", "child": "redo", "kd": "redo", "compare": "redo"}
    assert actions(tmp_path) == planned


def test_another_input_is_a_change_and_a_moved_one_is_none(tmp_path: Path):
    run(tmp_path, 'name = "first"\n[parent]\n[parent-2]\nvalue = 2')
    first = tmp_path / "first"
    text = f'name = "second"\n[child]\nparent = "{first}/parent"'
    run(tmp_path, text)
    assert actions(tmp_path, text.replace("/parent", "/parent-2")) == {"child": "changed"}
    first.rename(tmp_path / "moved")
    assert actions(tmp_path, text.replace("/first/", "/moved/")) == {"child": "skip"}
