"""However a library is cut up by layers, merged or interrupted, its files are the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.puzzle import bld
from tessera.puzzle.library import LibraryError
from tessera.puzzle.ranges import passes
from tessera.puzzle.space import Unit
from tessera.runs.recipe import RecipeError
from tessera.runs.run import read_json, read_metrics
from tests.objectives.recipes import BLD, TRAIN, run, tables, units

WHOLE = f"[bld]\n{BLD}"
RANGES = f"""
[bld-low]
layers = "0, 1"
{BLD}
[bld-high]
layers = "2-3"
{BLD}
[merge]
libraries = ["bld-low", "bld-high"]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library trained at once."""
    return run(tmp_path_factory.mktemp("whole"), WHOLE) / "bld"


def test_libraries_of_layer_ranges_merge_to_the_library_trained_at_once(tmp_path, whole):
    runs = run(tmp_path, RANGES)
    assert units(runs / "merge") == units(whole)
    assert tables(runs / "merge") == tables(whole)
    assert {name[:2] for name in units(runs / "bld-high")} == {"02", "03"}
    low = read_json(runs / "bld-low", "space")
    assert [len(attention) + len(ffn) for attention, ffn in low] == [7, 7, 2, 2]
    sample = runs / "merge" / "library" / "00" / "ffn" / "linear.safetensors"
    assert sample.stat().st_nlink == 2


def test_a_merged_library_can_be_merged_again(tmp_path, whole):
    text = RANGES.replace('"2-3"', '"2"') + f'[bld-last]\nlayers = "3"\n{BLD}'
    text += '[merge-all]\nlibraries = ["bld-last", "merge"]'
    assert units(run(tmp_path, text) / "merge-all") == units(whole)


def test_ranges_that_overlap_merge_only_where_they_agree(tmp_path):
    longer = f"[bld-high]\nlayers = '1-3'\n{BLD.replace('steps = 4', 'steps = 5')}"
    text = RANGES[: RANGES.index("[bld-high]")] + longer
    with pytest.raises(LibraryError, match="two libraries trained the same word"):
        run(tmp_path, text + '[merge]\nlibraries = ["bld-low", "bld-high"]')


def test_libraries_of_different_parents_do_not_merge(tmp_path):
    other = f"[parent-2]\npath = '{tmp_path}/recipe/parent'\n"
    text = RANGES.replace("[bld-high]", f"{other}[bld-high]").split("[merge]")
    run(tmp_path, text[0].split("[parent-2]")[0])
    with pytest.raises(LibraryError, match="made from different parents"):
        run(tmp_path, "[merge]".join(text))


@pytest.mark.parametrize("layers_at_once", [1, 3])
def test_some_layers_at_once_give_the_same_files(tmp_path, whole, layers_at_once: int):
    runs = run(tmp_path, f"[bld]\nlayers_at_once = {layers_at_once}\n{BLD}")
    assert units(runs / "bld") == units(whole) and tables(runs / "bld") == tables(whole)
    steps = [row["step"] for row in read_metrics(runs / "bld")]
    assert steps == list(range(1, 4 * -(-4 // layers_at_once) + 1))


def test_the_parent_above_the_last_layer_does_not_run(tmp_path, monkeypatch):
    seen: list[int] = []
    plain = bld.walk

    def counting(*args):
        for layer, found in enumerate(plain(*args)):
            seen.append(layer)
            yield found

    monkeypatch.setattr(bld, "walk", counting)
    run(tmp_path, f'[bld]\nlayers = "1"\n{BLD}')
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("moment", ["between", "in training", "while saving"])
def test_a_kill_in_any_group_is_made_good(tmp_path, whole, monkeypatch, moment: str):
    """Killed in the second of four groups, or around it: finished groups are not trained again."""
    text = f"[bld]\nlayers_at_once = 1\n{BLD}"
    straight = run(tmp_path / "straight", text) / "bld"
    trained: list[tuple[int, int]] = []

    class Dying(bld.Trainer):
        def train_step(self, step: int):
            trained.append((self.before, step))
            if dying and trained[-1] == {"between": (4, 0), "in training": (4, 2)}.get(moment):
                raise KeyboardInterrupt
            return super().train_step(step)

    def save(library, directory, **options):
        if dying and moment == "while saving" and any(key[:2] == "01" for key in library):
            del library["01/ffn/linear"]
            plain_save(library, directory, **options)
            raise KeyboardInterrupt
        plain_save(library, directory, **options)

    plain_save, dying = bld.save_library, True
    monkeypatch.setattr(bld, "Trainer", Dying)
    monkeypatch.setattr(bld, "save_library", save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", text)
    killed = tmp_path / "killed" / "recipe" / "bld"
    assert any(name[:2] == "00" for name in units(killed))
    dying = False
    trained.clear()
    run(tmp_path / "killed", text)
    assert min(before for before, _ in trained) >= 4  # the first group is not trained again
    assert units(killed) == units(straight) == units(whole)
    assert read_metrics(killed) == read_metrics(straight)
    assert not (killed / "state").exists()


def test_a_space_without_weights_trains_nothing(tmp_path):
    space = 'space = { attention = ["noop"], ffn = ["noop"] }'
    runs = run(tmp_path, f"[bld]\n{space}\ntrain = {TRAIN} }}\ncalibration_tokens = 64")
    assert units(runs / "bld") == {} and len(read_json(runs / "bld", "space")) == 4


def test_layers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="bld.layers: '2-1': 2-1 runs backwards"):
        run(tmp_path, f'[bld]\nlayers = "2-1"\n{BLD}')
    with pytest.raises(ValueError, match="bld.layers: '2-4' names layer 4, and the parent has"):
        run(tmp_path, f'[bld]\nlayers = "2-4"\n{BLD}')


def test_groups_hold_every_key_once_and_layers_whole():
    keys = [
        Unit(layer, "ffn", word) for layer in (0, 1, 4, 5, 9) for word in ("linear", "swiglu-4")
    ]
    whole = [range(10)]
    groups = passes(keys, whole, 2)
    assert [sorted({layer for layer, _, _ in group}) for group in groups] == [[0, 1], [4, 5], [9]]
    assert [key for group in groups for key in group] == keys
    assert passes(keys, whole, None) == passes(keys, whole, 99) == [keys]
    assert passes([], whole, 3) == []
    # Of two processes each trains two of its layers at once.
    groups = passes(keys, [range(2), range(2, 10)], 2)
    assert [sorted({key.layer for key in group}) for group in groups] == [[0, 1, 4, 5], [9]]
