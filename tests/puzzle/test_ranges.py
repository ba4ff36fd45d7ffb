"""Two processes that each hold some of the parent's layers make the library that one makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tessera.model.checkpoint import load_model
from tessera.puzzle.bld import load_layers
from tessera.puzzle.ranges import Held
from tessera.puzzle.surgery import collect_statistics
from tessera.runs.run import read_metrics, read_table
from tests.objectives.recipes import BLD, SEARCH, UNITS, run, tables, units
from tests.puzzle.ranks import bring
from tests.test_dist import run_ranks
from tests.toy import toy_batch

CODE = "from tests.puzzle.ranks import main; main()"
WHOLE = f"[bld]\n{BLD}"
COUPLE = f'{SEARCH}[couple]\nsearches = ["search"]\n{UNITS}'
PARTS = f"[bld]\nlayers_at_once = 1\n{BLD}"
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def _with(text: str, **train: str) -> str:
    """The recipe with more settings of its trainings."""
    given = "".join(f", {key} = {value}" for key, value in train.items())
    return text.replace("lr = 5e-3", f"lr = 5e-3{given}")


HALF = _with(WHOLE, dtype='"bfloat16"')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `PROCESSES-WHAT` on one parent; `12-…` was begun in one process and ended in two."""
    home = tmp_path_factory.mktemp("ranges")
    run(home / "parent", "")

    def job(name: str, text: str, **more: Any) -> dict[str, Any]:
        if not (home / name).exists():
            shutil.copytree(home / "parent", home / name)
        return {"runs": str(home / name), "text": text, **more}

    bring(**job("1-whole", WHOLE + COUPLE))
    bring(**job("1-half", HALF))
    bring(**job("12-whole", WHOLE, stop=(0, 2)))
    bring(**job("12-parts", PARTS, stop=(4, 2)))
    two = [
        job("2-whole", WHOLE + COUPLE),
        job("2-parts", PARTS),
        job("2-half", HALF),
        job("2-rows", _with(WHOLE, parallel="{ shard = 1 }")),
        job("2-resumed", PARTS, stop=(4, 2)),
        job("2-resumed", PARTS),
        job("12-parts", PARTS, refused="begun in another number of processes"),
        job("21-whole", WHOLE, stop=(0, 2)),
        job("12-whole", WHOLE),
    ]
    run_ranks(CODE, json.dumps(two))
    bring(**job("21-whole", WHOLE))
    bring(**job("12-parts", PARTS))  # as it was begun
    return home


def _weights(library: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load(data) for name, data in units(library).items()}


def _assert_close(one: Path, other: Path) -> None:
    torch.testing.assert_close(_weights(one), _weights(other), **TOLERANCE)
    assert len(read_metrics(one)) == len(read_metrics(other))
    for row, same in zip(read_metrics(one), read_metrics(other), strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["2-whole", "2-rows", "12-whole", "21-whole"])
def test_two_processes_make_the_library_of_one(home: Path, name: str):
    one, two = home / "1-whole" / "recipe" / "bld", home / name / "recipe" / "bld"
    _assert_close(one, two)
    for mine, same in zip(tables(one)[:3], tables(two)[:3], strict=True):
        assert mine == same
    assert tables(one)[3] == pytest.approx(tables(two)[3], rel=1e-5)


def test_two_processes_couple_as_one(home: Path):
    one, two = home / "1-whole" / "recipe" / "couple", home / "2-whole" / "recipe" / "couple"
    _assert_close(one, two)
    for row, same in zip(read_table(one, "pairs"), read_table(two, "pairs"), strict=True):
        assert row["word"] == same["word"]
        assert [row["apart"], row["joint"]] == pytest.approx([same["apart"], same["joint"]], 1e-4)


def test_some_layers_of_each_process_at_once_give_the_same_weights(home: Path):
    parts = home / "2-parts" / "recipe" / "bld"
    torch.testing.assert_close(_weights(parts), _weights(home / "2-whole" / "recipe" / "bld"))
    rows = read_metrics(parts)
    assert [row["step"] for row in rows] == list(range(1, 9))  # two passes of four steps
    assert {key[4:6] for key in rows[0] if key[:4] == "bld/"} == {"00", "02"}


def test_resuming_in_as_many_processes_is_bit_for_bit(home: Path):
    resumed, straight = (home / name / "recipe" / "bld" for name in ("2-resumed", "2-parts"))
    assert units(resumed) == units(straight) and read_metrics(resumed) == read_metrics(straight)


def test_what_two_processes_refuse_one_goes_on_with(home: Path):
    parts = home / "12-parts" / "recipe" / "bld"
    torch.testing.assert_close(_weights(parts), _weights(home / "1-whole" / "recipe" / "bld"))
    assert [row["step"] for row in read_metrics(parts)] == list(range(1, 17))


def test_bfloat16_is_near_and_its_weights_are_float32(home: Path):
    one, two, exact = (home / name / "recipe" / "bld" for name in ("1-half", "2-half", "1-whole"))
    assert all(w.dtype == torch.float32 for unit in _weights(one).values() for w in unit.values())
    for row, same, near in zip(*map(read_metrics, (one, two, exact)), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-2)
        assert row["loss"] != near["loss"] == pytest.approx(row["loss"], rel=3e-2)


def test_a_process_holds_its_own_layers_alone(home: Path):
    path = home / "1-whole" / "recipe" / "parent"
    part = load_layers(path, Held(range(1, 3), before=0, after=2), torch.bfloat16)
    held = {key for key, value in part.named_parameters() if not value.is_meta}
    assert {key.split(".")[1] for key in held} == {"1", "2"}
    assert all(value.dtype == torch.bfloat16 for value in part.parameters())
    last = load_layers(path, Held(range(3), after=None), torch.float32)
    found = collect_statistics(last, [toy_batch(0)], held=Held(range(3)))
    whole = collect_statistics(load_model(path), [toy_batch(0)])
    assert found.output_scale == whole.output_scale[:3]
