"""Where each token stands: its position, its document, and what follows from the two.

One `Context` is made a forward pass and shared by every layer, so that its tables are made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def zigzag(length: int, rank: int, world: int) -> list[tuple[int, int]]:
    """The two spans of a row's columns that one of `world` processes holds: a piece of the first
    half and its mirror image, so that all have equally many earlier tokens to attend to."""
    size = length // (2 * world)
    return [(piece * size, (piece + 1) * size) for piece in (rank, 2 * world - 1 - rank)]


@dataclass(frozen=True)
class Part:
    """Says of tokens that they are one process's part (`zigzag`) of rows that a mesh shares.

    positions, segments, prefix: as in `Context`, of the whole rows, (B, columns of a row).
    """

    mesh: DeviceMesh
    positions: Tensor
    segments: Tensor
    prefix: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Part:
        """The part with what `function` makes of each tensor."""
        prefix = None if self.prefix is None else function(self.prefix)
        return replace(
            self,
            positions=function(self.positions),
            segments=function(self.segments),
            prefix=prefix,
        )

    @property
    def spans(self) -> list[tuple[int, int]]:
        """This process's columns."""
        return zigzag(self.segments.shape[1], self.mesh.get_local_rank(), self.mesh.size())


@dataclass
class Context:
    """positions `(B,T)`; segments `(B,T)` document ids, -1 for padding, None for one a row.

    prefix: `(B,T)`, the segment that a token's document goes on from, -1 for none. part: of which
    rows these tokens are a part, None for whole rows. plans: what `attention.py` makes of it all.
    """

    positions: Tensor
    segments: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    sliding_window: int | None = None
    prefix: Tensor | None = None
    part: Part | None = None
    plans: dict[bool, Any] = field(default_factory=dict)

    @classmethod
    def rows(cls, tokens: Tensor) -> Context:
        """Every row of `tokens` `(B,T)` is one document from position 0."""
        return cls(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))

    @cached_property
    def rope(self) -> tuple[Tensor, Tensor]:
        """`cos` and `sin` `(B,T,1,D)` of rotate-half RoPE."""
        assert self.inverse_frequencies is not None, "the Transformer fills these in"
        angles = self.positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
        return angles.cos(), angles.sin()

    @cached_property
    def simple(self) -> bool:
        """True when a row is one document and padding behind it: plain causal order is right."""
        if self.segments is None:
            return True
        if self.prefix is not None or self.part is not None:
            return False
        padding = self.segments < 0
        one_document = (self.segments == self.segments[:, :1]) | padding
        behind = padding[:, 1:] | ~padding[:, :-1]
        return bool(one_document.all() and behind.all())
