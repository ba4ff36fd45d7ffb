from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera import pipeline
from tessera.cli.main import app
from tessera.model.families import config_dict, config_json
from tests.pipeline_stages import STAGES
from tests.tiny import config

RECIPE = "[data]\n[parent]\n[child]\n[compare]\nmodels = ['child']\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> Path:
    """A recipe of counting stages, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    for name, stage in STAGES.items():
        monkeypatch.setitem(pipeline.STAGES, name, stage)
    file = tmp_path / "nano.toml"
    file.write_text(RECIPE)
    return file


def tessera(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_help_is_quick_and_brings_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['tessera', '--help']\n"
        "try: runpy.run_module('tessera', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    seconds = []
    for _ in range(5):  # of CPU: on a busy machine the wall clock tells of the others
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
    assert min(seconds) < 0.5


def test_a_terminal_without_the_bars_signs_shows_the_rest(tmp_path: Path):
    (tmp_path / "config.json").write_text(config_json(config_dict(config())))
    words = [sys.executable, "-m", "tessera", "show", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    told = subprocess.run(words, env=environment, capture_output=True, check=True)
    assert b"???" in told.stdout


def test_version_and_what_a_bare_word_teaches():
    assert tessera("--version").stdout.startswith("tessera ")
    assert "recipes/quickstart.toml" in tessera().output


def test_run_prints_the_table_and_where_things_are(recipe: Path):
    result = tessera("run", recipe, "parent.value=4")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3:-1] == ["-----  -----", "child      6"]
    assert "[4/4] compare: done" in result.stderr and "runs/nano" in result.stderr
    recipe.write_text(RECIPE + "[child-2]\n")  # the table need not come last
    again = tessera("run", recipe, "parent.value=4", "--json")
    assert json.loads(again.stdout)["tables"] == {"compare": [{"model": "child", "value": 6}]}
    assert "done before" in again.stderr


def test_run_quiet_prints_only_results(recipe: Path):
    result = tessera("run", recipe, "--quiet", "--only", "data")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "[1/1]" not in result.stderr and "show runs/nano/data" in result.stderr


def test_check_resolves_and_runs_nothing(recipe: Path):
    result = tessera("check", recipe)
    assert result.exit_code == 0
    assert "# child: would run" in result.stdout and 'parent = "parent"' in result.stdout
    assert "value = 1" in result.stdout
    steps = json.loads(tessera("check", recipe, "--json").stdout)
    assert [step["action"] for step in steps] == ["run"] * 4
    assert not Path("runs").exists()
    tessera("run", recipe)
    changed = tessera("check", recipe, "child.value=3")
    assert "value: 1 -> 3" in changed.stdout and "# parent: is done" in changed.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "absent.toml"], "there is no recipe"),
        (["run", "."], ". is a directory; Allowed: nano.toml"),
        (["run", "nano.toml", "parent.valu=1"], "did you mean 'value'"),
        (["run", "nano.toml", "prent.value=1"], "did you mean 'parent'"),
        (["run", "nano.toml", "--redo", "chld"], "did you mean 'child'"),
        (["check", "nano.toml", "parent.value=x"], "parent.value: Input should be a valid integer"),
        (["show", "absent"], "there is no absent"),
        (["diff", "nano.toml", "nano.toml"], "not valid JSON"),
        (["runn"], "No such command"),
        (["run"], "RECIPE"),
        (["run", "nano.toml", "--device", "tpu"], "unknown device 'tpu'; did you mean 'xpu'?"),
        (["run", "nano.toml", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES says"),
        (["chat", "M", "--dtype", "fp8"], "give auto or float32 or bfloat16"),
    ],
)
def test_words_that_are_off_exit_with_2_and_a_reason(recipe: Path, words: list[str], message: str):
    result = tessera(*words)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_changed_recipe_exits_with_2_and_the_diff(recipe: Path):
    tessera("run", recipe)
    result = tessera("run", recipe, "child.value=2")
    assert result.exit_code == 2 and "value: 1 -> 2" in result.stderr
    assert tessera("run", recipe, "child.value=2", "--redo", "child").exit_code == 0


def test_show_lists_runs_and_describes_one(recipe: Path):
    tessera("run", recipe)
    assert "child" in tessera("show", "runs/nano").stdout
    shown = tessera("show", "runs/nano/compare")
    assert shown.exit_code == 0 and "made from" in shown.stdout
    assert json.loads(tessera("show", "runs/nano/compare", "--json").stdout)["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_exits_with_130(tmp_path: Path, number: signal.Signals):
    code = (
        "from tessera import pipeline; from tessera.cli import main\n"
        "from tests.pipeline_stages import STAGES\n"
        "pipeline.STAGES.update(STAGES); main.main()"
    )
    recipe = tmp_path / "r.toml"
    recipe.write_text("[data]\n[parent]\n[kd]\nsteps = 1000\npause = 0.02\n")
    words = [sys.executable, "-c", code, "run", str(recipe), "--runs", str(tmp_path / "runs")]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        metrics = tmp_path / "runs" / "r" / "kd" / "metrics.jsonl"
        deadline = time.monotonic() + 20
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in stderr and "Traceback" not in stderr
