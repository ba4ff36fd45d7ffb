"""Small models and sources for tests of training and search: random, fixed by a seed."""

from __future__ import annotations

from typing import Any

import torch

from tessera.data.batch import Batch
from tessera.model.config import ModelConfig, uniform
from tessera.model.transformer import Transformer


def toy_config(layers: int = 3, **changes: Any) -> ModelConfig:
    """A Llama of `layers` layers, hidden 32, 4 query and 4 KV heads, FFN 48, vocabulary 40."""
    shape: dict[str, Any] = dict(
        vocab_size=40,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        blocks=uniform("gqa-4", "swiglu-48", layers),
    )
    return ModelConfig(**(shape | changes))


def toy_model(layers: int = 3, seed: int = 0, **changes: Any) -> Transformer:
    return Transformer(toy_config(layers, **changes)).init_weights(seed)


def toy_batch(seed: int, rows: int = 2, length: int = 16, vocab_size: int = 40) -> Batch:
    """Packed rows of two documents and some padding, with a few untrained positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
    segments = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(length).repeat(rows, 1)
    for row in range(rows):
        cut = int(torch.randint(3, length - 3, (), generator=generator))
        segments[row, cut:] = 1
        positions[row, cut:] = torch.arange(length - cut)
    segments[-1, -2:], positions[-1, -2:] = -1, 0
    weight = (torch.rand(rows, length, generator=generator) > 0.2).float()
    weight[segments < 0] = 0
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), weight, positions, segments)


class ToySource:
    """Endless ragged microbatches, a pure function of (seed, step)."""

    def __init__(self, seed: int = 0, microbatches: int = 2) -> None:
        self.seed, self.microbatches, self.served = seed, microbatches, 0

    def batches(self, step: int) -> list[Batch]:
        self.served += 1
        first = 1000 * self.seed + step * self.microbatches
        return [toy_batch(first + i, rows=1 + i) for i in range(self.microbatches)]

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def split_rows(batch: Batch) -> list[Batch]:
    """A batch as one microbatch a row."""
    return [batch.each(lambda x, i=i: x[i : i + 1]) for i in range(len(batch.tokens))]
