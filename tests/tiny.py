"""Small random models for tests: every norm gain and bias is random too, so that none hides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.model.checkpoint import save_model
from tessera.model.config import ModelConfig
from tessera.model.transformer import Transformer

MOSAIC = (
    ("gqa-4", "swiglu-24"),
    ("gqa-1", "noop"),
    ("noop", "swiglu-8"),
    ("linear", "linear"),
    ("gqa-2", "swiglu-40"),
)
PARENT = (("gqa-2", "swiglu-24"),) * 3


def config(words: Iterable[Sequence[str]] = MOSAIC, **changes: Any) -> ModelConfig:
    """A heterogeneous config of 16 channels, 4 query heads and 29 tokens; `PARENT` is uniform."""
    fields: dict[str, Any] = {
        "vocab_size": 29,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "head_dim": 4,
        "blocks": (),
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": (2,),
    }
    return ModelConfig(**fields | changes).with_words(words)


def model(
    config_or_words: ModelConfig | Iterable[Sequence[str]] = MOSAIC, seed: int = 0, **changes: Any
) -> Transformer:
    """A model with random weights. The same seed and config give the same weights."""
    given = config_or_words
    shape = given if isinstance(given, ModelConfig) else config(given, **changes)
    return randomise(Transformer(shape), seed)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Fill every parameter: matrices keep their inputs' scale, gains around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for key, weight in module.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            centre = 0.0 if key.endswith("bias") else 1.0
            weight.normal_(centre, 0.2, generator=generator)
    return module


def tokens(vocab_size: int, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids of this shape, `(B,T)`."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def saved(directory: Path, words: Iterable[Sequence[str]] = PARENT, **changes: Any) -> Path:
    """A model directory on disk, without a tokenizer."""
    save_model(model(words, **changes), directory)
    return directory
