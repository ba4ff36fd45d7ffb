"""Decode memory: one entry a layer, `None` where there is no attention.

Shapes may differ from layer to layer (each has its own number of KV heads), and an absent
layer costs nothing. Entries are appended at explicit positions, so rows of a batch may stand
at different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.model.config import GQA, ModelConfig


@dataclass
class LayerCache:
    """k and v `(B, S, K, D)`; `length` is how far any row has been written."""

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v `(B,T,K,D)` at `positions` `(B,T)`; return all up to the furthest."""
        self.length = max(self.length, int(positions.max()) + 1)
        assert self.length <= self.k.shape[1], "the cache was made too short"
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[rows, positions] = k
        self.v[rows, positions] = v
        return self.k[:, : self.length], self.v[:, : self.length]


class KVCache:
    """`layers[i]` is a LayerCache, or None for a layer whose attention is linear or absent."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers: list[LayerCache | None] = []
        for block in config.blocks:
            if not isinstance(block.attention, GQA):
                self.layers.append(None)
                continue
            shape = (batch_size, max_length, block.attention.num_key_value_heads, config.head_dim)
            k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append(LayerCache(k, v))

    def num_bytes(self) -> int:
        """Bytes held, over all layers."""
        return sum(2 * c.k.numel() * c.k.element_size() for c in self.layers if c is not None)
