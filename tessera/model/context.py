"""Where each token stands: its position, its document, and what follows from the two.

One `Context` is made a forward pass and shared by every layer, so the rotary tables and the
grouping of packed documents are computed once. It is an argument and never a global.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentPlan:
    """Packed tokens regrouped as rows of one document each.

    groups: index tensors `(N, T_n)` into the flattened `(B*T)` tokens, padded at the end.
    inverse: `(B*T,)`, where each token sits in the concatenation of the flattened groups.
    """

    groups: tuple[Tensor, ...]
    inverse: Tensor


@dataclass
class Context:
    """positions `(B,T)`; segments `(B,T)` document ids, -1 for padding, None for one a row."""

    positions: Tensor
    segments: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    sliding_window: int | None = None

    @classmethod
    def rows(cls, tokens: Tensor) -> Context:
        """Every row of `tokens` `(B,T)` is one document from position 0."""
        return cls(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))

    @cached_property
    def rope(self) -> tuple[Tensor, Tensor]:
        from tessera.model.layers import rope_tables

        assert self.inverse_frequencies is not None, "the Transformer fills these in"
        return rope_tables(self.inverse_frequencies, self.positions)

    @cached_property
    def simple(self) -> bool:
        """True when a row is one document and padding behind it: plain causal order is right."""
        if self.segments is None:
            return True
        padding = self.segments < 0
        one_document = (self.segments == self.segments[:, :1]) | padding
        behind = padding[:, 1:] | ~padding[:, :-1]
        return bool(one_document.all() and behind.all())

    def sliding_mask(self, length: int) -> Tensor | None:
        """`(T,T)` mask of Mistral's window, or None where causal order alone decides."""
        if self.sliding_window is None or length <= self.sliding_window:
            return None
        order = torch.arange(length, device=self.positions.device)
        distance = order[:, None] - order
        return (distance >= 0) & (distance < self.sliding_window)

    @cached_property
    def documents(self) -> DocumentPlan:
        assert self.segments is not None
        return plan_documents(self.segments)


def plan_documents(segments: Tensor, slack: float = 0.75) -> DocumentPlan:
    """Group the documents of packed rows `(B,T)` by length.

    A group holds documents at least `slack` times as long as its longest, so padding stays
    under a quarter and the number of attention calls is logarithmic in the spread of lengths.
    Padding (-1) forms documents of its own, whose output nobody reads.
    """
    flat = segments.flatten()
    change = torch.ones_like(flat, dtype=torch.bool)
    change[1:] = flat[1:] != flat[:-1]
    change[:: segments.shape[1]] = True
    starts = change.nonzero().flatten()
    ends = torch.cat((starts[1:], starts.new_tensor([flat.numel()])))
    lengths, order = (ends - starts).sort(descending=True, stable=True)
    starts, sizes = starts[order], lengths.tolist()
    groups: list[Tensor] = []
    inverse = torch.empty_like(flat)
    first = offset = 0
    while first < len(sizes):
        last = first
        while last < len(sizes) and sizes[last] >= slack * sizes[first]:
            last += 1
        steps = torch.arange(sizes[first], device=flat.device)
        inside = steps < lengths[first:last, None]
        index = torch.where(inside, starts[first:last, None] + steps, 0)
        places = torch.arange(index.numel(), device=flat.device).view_as(index) + offset
        inverse[index[inside]] = places[inside]
        groups.append(index)
        offset += index.numel()
        first = last
    return DocumentPlan(tuple(groups), inverse)
