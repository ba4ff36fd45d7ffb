"""Stages that train nothing share their work over processes, and give what one process gives.

One recipe is run in this process; its shared stages are run again in two processes, and in four, of
which two hold a model together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_json, read_table
from tests.test_dist import run_ranks

SIZES = "tokens_per_step = 96, microbatch_tokens = 96, sequence_length = 32"
TRAIN = f"{{ steps = 2, {SIZES}, lr = 3e-3 }}"
RECIPE = f"""
name = "r"
[data]
tokenizer = "byte"
tasks = {{ calc = 60 }}
heldout = 0.2
[parent]
train = {TRAIN}
[parent.architecture]
hidden_size = 16
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 16
[bld]
train = {TRAIN}
calibration_tokens = 64
space = {{ attention = ["gqa-1", "noop"], ffn = ["50%", "noop"] }}
[score]
tokens = 300
microbatch_tokens = 128
sequence_length = 32
tasks = {{ calc = 3 }}
[cost]
source = "counted"
[search-dropped]
method = "dropped-attention"
constraints = {{ kv_bytes_per_token = "0.4x" }}
[child]
[search]
constraints = {{ parameters = "0.8x" }}
[search.conditional]
rounds = 2
polish = 1
tokens = 128
microbatch_tokens = 64
sequence_length = 32
[frontier]
constraint = "parameters"
points = [0.9, 0.7]
methods = ["mip", "uniform"]
tokens = 96
[fuse]
model = "child"
keep_last = false
tokens = 150
microbatch_tokens = 64
sequence_length = 32
scenario = {{ batch = 1, prompt = 4, new = 2 }}
rounds = 3
[compare]
models = ["child"]
tokens = 150
microbatch_tokens = 64
sequence_length = 32
scenario = {{ batch = 1, prompt = 4, new = 2 }}
rounds = 3
"""
SHARED = ("score", "search", "frontier", "fuse", "compare")
CODE = """
import sys
from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
run_recipe(loads(sys.argv[2], sys.argv[3:]), sys.argv[1], quiet=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shares")
    run_recipe(loads(RECIPE), home / "1", quiet=True)
    for world, overrides in ((2, []), (4, ["score.tensor=2"])):
        again = home / str(world)
        shutil.copytree(home / "1", again)
        for stage in SHARED:
            shutil.rmtree(again / "r" / stage)
        run_ranks(CODE, str(again), RECIPE, *overrides, world=world)
    return home


def _assert_same(found: Any, expected: Any) -> None:
    """Equal, numbers to rounding; without what is measured by the clock."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if not key.endswith(("_ms", "_ms_before", "_per_second", "speedup", "promise_error")):
                _assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("world", ["2", "4"])
@pytest.mark.parametrize("stage", SHARED)
def test_any_number_of_processes_gives_the_same(stage: str, world: str, home: Path):
    own, one = (home / n / "r" / stage for n in (world, "1"))
    tables = sorted(file.name for file in (one / "tables").iterdir())
    assert sorted(file.name for file in (own / "tables").iterdir()) == tables
    for name in tables:
        read = read_table if name.endswith(".jsonl") else read_json
        _assert_same(*(read(path, name.partition(".")[0]) for path in (own, one)))
