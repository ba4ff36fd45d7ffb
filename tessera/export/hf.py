"""A stock Hugging Face directory: Llama, Mistral, Qwen2 or Qwen3, all layers equal.

Every engine that reads such directories serves it; no code travels with the weights.
"""

from __future__ import annotations

from pathlib import Path

from tessera.export.errors import ExportError
from tessera.model.families import FAMILIES, config_dict
from tessera.model.saving import save_model
from tessera.model.transformer import Transformer


def write(module: Transformer, directory: Path, tokenizer_from: Path | None = None) -> None:
    """Write a homogeneous model and its tokenizer into `directory`, which must not exist.

    Raises ExportError for properties that no stock family has together.
    """
    if config_dict(module.config)["model_type"] not in FAMILIES:
        raise ExportError(
            f"no stock family has all the properties of this {module.config.family} model (biases, "
            f"QK norm, sliding window); families are {', '.join(FAMILIES)}. Use --format decilm"
        )
    save_model(module, directory, tokenizer_from=tokenizer_from)
