"""The bound that `tessera check` prints: counted where it can be, and falling with the groups."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.devices import CPU, Device
from tessera.model.context import Context
from tessera.model.placement import LayoutError, ParallelConfig
from tessera.pipeline import STAGES
from tessera.planning.stages import Line
from tessera.puzzle.bld import BLD, TRAINED, BLDConfig, kept_numbers, training_memory, unit_params
from tessera.puzzle.library import BlockLibrary, trainable_units
from tessera.puzzle.ranges import layer_ranges
from tessera.puzzle.space import SpaceConfig, Unit, build_space
from tessera.puzzle.surgery import collect_statistics
from tessera.train.optim import TrainConfig
from tests import tiny
from tests.toy import toy_batch, toy_config, toy_model

UNITS = "[bld]\ntrain = { steps = 1 }\n"


def _config(layers_at_once: int | None = None, **train: Any) -> BLDConfig:
    settings = {"steps": 1, "microbatch_tokens": 512, **train}
    return BLDConfig(train=TrainConfig(**settings), layers_at_once=layers_at_once)


COUPLE = '[score]\n[cost]\n[search]\nconstraints = { parameters = "0.9x" }\n[couple]\n'


def test_units_are_counted_and_the_largest_group_decides():
    parent = toy_model()
    space, batch = build_space(SpaceConfig(), parent.config), toy_batch(1)
    library = BlockLibrary.from_parent(parent, space, collect_statistics(parent, [batch]))
    keys = trainable_units(space)
    for key, unit in zip(keys, library.values(), strict=True):
        assert sum(p.numel() for p in unit.parameters()) == unit_params(parent.config, *key[1:])
    whole = training_memory(parent.config, keys, _config())
    assert whole.states == TRAINED * sum(p.numel() for p in library.parameters())
    needed = [p for key, p in parent.named_parameters() if key.startswith(("layers.", "embed"))]
    assert whole.parent == 4 * sum(p.numel() for p in needed)
    one = training_memory(parent.config, keys, _config(1))
    assert one.states * 3 == whole.states and one.activations == whole.activations
    assert one.total == one.parent + one.states + one.activations and one.passes == 3


def test_processes_share_the_layers_and_those_beyond_them_the_states():
    config = toy_config(layers=4)
    keys = trainable_units(build_space(SpaceConfig(), config))
    one, two, eight = (training_memory(config, keys, _config(), n) for n in (1, 2, 8))
    layers = one.parent - 4 * config.vocab_size * config.hidden_size
    assert two.ranges == 2 and two.states * 2 == one.states
    assert two.parent == layers / 2 + 4 * config.vocab_size * config.hidden_size
    assert (eight.ranges, eight.replicas) == (4, 2) and eight.states * 8 == one.states
    half = training_memory(config, keys, _config(dtype="bfloat16"), 8)
    assert half.parent * 2 == eight.parent and half.states == eight.states
    assert half.gathered * 3 == eight.gathered * 2  # of float32 2 · 4 + 4 bytes, here 2 · 2 + 4


def test_layers_are_held_in_ranges_of_about_equal_work():
    config = toy_config(layers=6)
    units = [Unit(layer, "ffn", f"swiglu-{n}") for layer in (3, 4, 5) for n in (48, 24)]
    split = partial(layer_ranges, config, units, ParallelConfig())
    assert split(1) == [range(6)]
    assert split(2) == [range(4), range(4, 6)]
    assert [len(layers) for layers in split(4)] == [3, 1, 1, 1]
    assert len(split(7)) == 1 and len(split(12)) == 4  # half of six would hold no unit
    assert len(layer_ranges(config, units, ParallelConfig(shard=2), 12)) == 2
    with pytest.raises(LayoutError, match="shard = 5: 12 processes can hold the 6 layers in 1, 2"):
        layer_ranges(config, units, ParallelConfig(shard=5), 12)
    with pytest.raises(LayoutError, match="do not apply to block-wise"):
        layer_ranges(config, units, ParallelConfig(tensor=2), 2)


def test_the_bound_does_not_grow_with_the_layers_of_the_parent():
    found = []
    for layers in (4, 40):
        config = toy_config(layers=layers)
        keys = trainable_units(build_space(SpaceConfig(), config))
        found.append(training_memory(config, keys, _config(2)))
    assert found[0].states == found[1].states and found[0].activations == found[1].activations


def test_activations_are_near_what_autograd_keeps():
    """Bytes of distinct storages saved for backward in the graph of the largest unit."""
    parent = toy_model(hidden_size=64, head_dim=16).requires_grad_(False)
    space, batch = build_space(SpaceConfig(), parent.config), toy_batch(1, rows=4, length=64)
    statistics = collect_statistics(parent, [batch])
    library = BlockLibrary.from_parent(parent, space, statistics)
    weights = {
        p.untyped_storage().data_ptr() for p in [*library.parameters(), *parent.parameters()]
    }
    parent.prepare(Context(batch.positions, batch.segments))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for loss, _ in BLD(parent, statistics).losses(library, batch):
            kept.append(sum(saved.values()))
            loss.backward()
            saved.clear()
    numbers = kept_numbers(parent.config, trainable_units(space), working_too=False)
    ratio = max(kept) / (4 * batch.tokens.numel() * numbers)
    assert 0.8 < ratio < 1.1, ratio


@pytest.fixture
def planned(tmp_path: Path):
    from tessera.planning.stages import Planner, parent_of
    from tessera.planning.training import Cluster
    from tessera.runs.recipe import loads

    tiny.saved(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one<|endoftext|>two")
    here = Cluster(1, 1, Device(CPU, 1e9, 1e9, {"fp32": 1e9, "bf16": 1e9}, 1e9))

    def lines(text: str) -> dict[str, Line]:
        head = f"[parent]\npath = '{tmp_path}/model'\n[data]\npaths = ['{tmp_path}/text.txt']\n"
        recipe = loads(head + text)
        planner = Planner(recipe, STAGES, here, parent_of(recipe, None), None, tmp_path / "runs")
        return {line.name: line for line in planner.lines()}

    return lines


def layers(line: Line) -> int:
    assert line.training is not None
    return len({unit.layer for unit in line.training.job.units})


def test_check_knows_it_before_anything_has_run(planned):
    found = planned(UNITS + COUPLE + 'searches = ["search"]\ntrain = { steps = 1 }')
    assert found["parent"].training is None and found["search"].training is None
    assert layers(found["bld"]) == 3 and found["couple"].parts.moments > 0
    apart = UNITS.replace("{ steps", "{ parallel = { shard = 3 }, steps")
    assert "shard = 3" in planned(apart)["bld"].undivided
    single = planned(UNITS + "layers_at_once = 1")["bld"]
    assert single.parts.moments * 3 == found["bld"].parts.moments


def test_check_hears_of_words_that_do_not_fit_the_parent(planned):
    with pytest.raises(ValueError, match="names layer 3, and the parent has layers 0-2"):
        planned(UNITS + 'layers = "0-3"')


def test_a_merged_library_is_bounded_too(planned):
    text = UNITS + '[bld-2]\ntrain = { steps = 1 }\n[merge]\nlibraries = ["bld", "bld-2"]\n'
    found = planned(text + COUPLE + 'searches = ["search"]\ntrain = { steps = 1 }')
    assert layers(found["couple"]) == 3
