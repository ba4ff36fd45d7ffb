"""The model that a recipe begins with, from words alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.model.config import ModelConfig
from tessera.model.source import is_hub_id, load_config
from tessera.objectives.lm import ArchitectureConfig
from tessera.runs.recipe import Recipe, RecipeError, validate

BYTE_VOCABULARY = 259


def config_of(path: Path) -> ModelConfig:
    """The config of a model directory, a run, or of a config.json itself."""
    from tessera.model.lineage import model_config

    return model_config(path)


def parent_of(recipe: Recipe, config: Path | None) -> ModelConfig:
    """The parent's config: given, read from its checkpoint, or built from its shape.

    Raises RecipeError where none of these is there.
    """
    if config is not None:
        return config_of(config)
    table = next((spec.table for spec in recipe.stages if spec.stage == "parent"), None)
    if table is None:
        raise RecipeError("this recipe has no [parent]; give --config CONFIG.JSON")
    if isinstance(path := table.get("path"), str):
        if is_hub_id(path):
            raise RecipeError(
                f"the checkpoint {path} is not on this machine; give --config its config.json"
            )
        return load_config(path)
    if not isinstance(table.get("architecture"), dict):
        raise RecipeError("[parent] names no path; say parent.path=MODEL, or give --config")
    shape = validate(ArchitectureConfig, table["architecture"], "parent.architecture")
    return shape.model(_vocabulary(recipe), None, ())


def _vocabulary(recipe: Recipe) -> int:
    """Of a tokenizer that is trained by the recipe."""
    tables = [spec.table for spec in recipe.stages if spec.stage == "data"]
    wanted: Any = tables[0].get("tokenizer") if tables else None
    if isinstance(wanted, dict) and isinstance(wanted.get("bpe"), int):
        return wanted["bpe"]
    if wanted == "byte":
        return BYTE_VOCABULARY
    raise RecipeError("the vocabulary is not known before the data is; give --config CONFIG.JSON")
