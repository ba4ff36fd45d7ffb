"""`tessera check` tells what each stage of a recipe takes on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.pipeline import STAGES, run_recipe
from tessera.planning import here
from tessera.runs.recipe import loads
from tessera.runs.run import read_manifest

RECIPE = """
name = "toy"
[defaults]
train = { tokens_per_step = 256, microbatch_tokens = 256, sequence_length = 64 }
tokens = 256
microbatch_tokens = 256
scenario = { batch = 2, prompt = 8, new = 4 }
[parent]
architecture = { hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 4 }
train = { steps = 2 }
[curate]
model = "parent"
sources = [{ paths = "PROMPTS", question = "prompt" }]
teachers.parent = { kind = "engine", batch = 4 }
steps = [{ step = "generate", teacher = "parent", n = 2, max_tokens = 16 }]
[data]
tokenizer = "byte"
tasks = { calc = 50 }
[bld]
train = { steps = 1 }
calibration_tokens = 256
[bld-2]
train = { steps = 1 }
calibration_tokens = 256
[merge]
libraries = ["bld", "bld-2"]
[score]
[cost]
rounds = 3
[search]
constraints = { throughput = "1.5x" }
conditional = {}
[race]
searches = ["search"]
train = { steps = 1 }
[child]
architecture = "race"
[fuse]
[kd]
train = { steps = 2 }
[cpt]
train = { steps = 2 }
[sft]
train = { steps = 2 }
[profile]
paths = ["PROMPTS"]
samples = 2
max_tokens = 16
rewards = [{ kind = "number" }]
[grpo]
train = { steps = 2, microbatch_tokens = 512 }
max_tokens = 16
prompts_per_rollout = 2
samples = 2
rewards = [{ kind = "number" }]
[compare]
models = ["child", "kd"]
[eval]
tasks = ["calc"]
limit = 3
max_tokens = 16
[export]
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # a busy machine keeps nothing
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    file = tmp_path / "toy.toml"
    file.write_text(RECIPE.replace("PROMPTS", str(tmp_path / "prompts.jsonl")))
    return file


def test_every_stage_has_an_estimate_of_time_memory_and_disk(toy: Path, monkeypatch):
    words = ["check", str(toy), "--runs", str(toy.parent / "runs")]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0, found.output
    lines = {row["name"]: row["estimate"] for row in json.loads(found.stdout)}
    for name, line in lines.items():
        assert line["phases"] and line["seconds"] >= 0, name
        assert line["seconds"] > 0 or name == "merge", name
        assert line["fits"] and line["memory"]["total"] < 2e9, name
    assert not any(line["unknown"] for line in lines.values())
    assert lines["kd"]["disk"] > lines["child"]["disk"] > 0
    # The child stands for one of two thirds of the parent's seconds: it has fewer layers.
    assert lines["kd"]["step_seconds"]["flops"] < 4 / 3 * lines["parent"]["step_seconds"]["flops"]
    # What was measured once is known.
    monkeypatch.setattr(here.Measured, "measure", lambda *_: pytest.fail("measured twice"))
    text = CliRunner().invoke(app, words)
    assert "# in all about" in text.stdout and "# about 0:0" in text.stdout


def test_what_is_not_known_is_told(toy: Path):
    file = toy.parent / "bare.toml"
    file.write_text('[data]\ntokenizer = "byte"\ntasks = { calc = 5 }\n')
    found = CliRunner().invoke(app, ["check", str(file), "--json"])
    assert found.exit_code == 0 and '"estimate": null' in found.stdout
    assert "is not known: this recipe has no [parent]" in found.stderr


def test_a_run_tells_what_is_to_come_and_keeps_its_peak(tmp_path: Path, capsys):
    text = '[data]\ntokenizer = "byte"\ntasks = { calc = 5 }\n[data-2]\ntokenizer = "byte"\n'
    recipe = loads(f"{text}tasks = {{ calc = 6 }}\n")
    seconds = {"data": (40.0, "about 0:40"), "data-2": (80.0, "about 1:20")}
    (step, _) = run_recipe(recipe, tmp_path, stages=STAGES, expect=lambda: seconds)
    first, second = (line for line in capsys.readouterr().err.splitlines() if "running" in line)
    assert first == "[1/2] data: running, about 0:40; about 2:00 to the recipe's end"
    left = second.removeprefix("[2/2] data-2: running, about 1:20; about ").split()[0]
    assert left != "1:20"  # the first took less than it was thought to
    assert read_manifest(step.path).peak_memory > 10e6
