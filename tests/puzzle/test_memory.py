"""The bound that `tessera check` prints: counted where it can be, and falling with the groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.model.context import Context
from tessera.pipeline import STAGES
from tessera.puzzle.bld import BLD, TRAINED, kept_numbers, training_memory, unit_params
from tessera.puzzle.library import BlockLibrary, trainable_units
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import collect_statistics
from tests import tiny
from tests.toy import toy_batch, toy_config, toy_model

UNITS = "[bld]\ntrain = { steps = 1 }\n"
COUPLE = '[score]\n[cost]\n[search]\nconstraints = { parameters = "0.9x" }\n[couple]\n'


def test_units_are_counted_and_the_largest_group_decides():
    parent = toy_model()
    space, batch = build_space(SpaceConfig(), parent.config), toy_batch(1)
    library = BlockLibrary.from_parent(parent, space, collect_statistics(parent, [batch]))
    keys = trainable_units(space)
    for key, unit in zip(keys, library.values(), strict=True):
        assert sum(p.numel() for p in unit.parameters()) == unit_params(parent.config, *key[1:])
    whole = training_memory(parent.config, keys, None, 32)
    assert whole.units == TRAINED * sum(p.numel() for p in library.parameters())
    assert whole.parent == 4 * sum(p.numel() for p in parent.parameters())
    one = training_memory(parent.config, keys, 1, 32)
    assert one.units * 3 == whole.units and one.activations == whole.activations
    assert one.total == one.parent + one.units + one.activations


def test_the_bound_does_not_grow_with_the_layers_of_the_parent():
    found = []
    for layers in (4, 40):
        config = toy_config(layers=layers)
        keys = trainable_units(build_space(SpaceConfig(), config))
        found.append(training_memory(config, keys, 2, 64))
    assert found[0].units == found[1].units and found[0].activations == found[1].activations


def test_activations_are_near_what_autograd_keeps():
    """Bytes of distinct storages saved for backward in the graph of the largest layer."""
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
    from tessera.planning.training import stage_memory
    from tessera.runs.plan import plan
    from tessera.runs.recipe import loads

    tiny.saved(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one<|endoftext|>two")

    def memories(text: str) -> dict:
        head = f"[parent]\npath = '{tmp_path}/model'\n[data]\npaths = ['{tmp_path}/text.txt']\n"
        steps = plan(loads(head + text), tmp_path / "runs", (), STAGES)
        return {step.name: stage_memory(step, steps) for step in steps}

    return memories


def test_check_knows_it_before_anything_has_run(planned):
    found = planned(UNITS + COUPLE + 'searches = ["search"]\ntrain = { steps = 1 }')
    assert found["parent"] is None and found["search"] is None
    assert found["bld"].layers == 3 and found["couple"].units > 0
    single = planned(UNITS + "layers_at_once = 1")["bld"]
    assert single.units * 3 == found["bld"].units and "1 of 3 layers at once" in str(single)


def test_check_hears_of_words_that_do_not_fit_the_parent(planned):
    with pytest.raises(ValueError, match="names layer 3, and the parent has layers 0-2"):
        planned(UNITS + 'layers = "0-3"')


def test_a_merged_library_is_bounded_too(planned):
    text = UNITS + '[bld-2]\ntrain = { steps = 1 }\n[merge]\nlibraries = ["bld", "bld-2"]\n'
    found = planned(text + COUPLE + 'searches = ["search"]\ntrain = { steps = 1 }')
    assert found["couple"].layers == 3
