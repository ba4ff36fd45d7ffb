"""A parent that cannot be read stops a recipe before its first stage."""

from __future__ import annotations

import pytest

from tessera.puzzle.parent import ParentConfig
from tessera.runs.recipe import RecipeError, validate


def test_a_parent_is_looked_at_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match=r"parent\.path: .*absent does not exist"):
        validate(ParentConfig, {"path": str(tmp_path / "absent")}, "parent")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RecipeError, match=r"parent\.path: .*unsupported architecture"):
        validate(ParentConfig, {"path": str(tmp_path)}, "parent")


def test_a_hub_id_is_not_fetched_to_check_it():
    assert validate(ParentConfig, {"path": "owner/name"}, "parent").path == "owner/name"
