"""Where each token stands: its position, its document, and what follows from the two.

One `Context` is made a forward pass and shared by every layer, so that its tables are made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Documents of similar length as rows of their own.

    index: `(N, T_n)` into the flattened `(B*T)` tokens, padded at the end. prefix: `(N, P)` of the
    tokens before each document that are shared with others, padded at the end, and which of them
    are there; None for documents that begin with themselves.
    """

    index: Tensor
    prefix: Tensor | None = None
    present: Tensor | None = None


@dataclass(frozen=True)
class DocumentPlan:
    """Packed tokens regrouped as rows of one document each."""

    groups: tuple[Group, ...]
    inverse: Tensor  # (B*T,), where each token sits in the concatenation of the flattened groups


@dataclass
class Context:
    """positions `(B,T)`; segments `(B,T)` document ids, -1 for padding, None for one a row.

    prefix: `(B,T)`, the segment that a token's document goes on from, -1 for none.
    """

    positions: Tensor
    segments: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    sliding_window: int | None = None
    prefix: Tensor | None = None

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
        if self.prefix is not None:
            return False
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
        return plan_documents(self.segments, self.prefix)

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """What each group of `documents` sees, as `sdpa` takes it; None for causal order."""
        return tuple(map(self._mask, self.documents.groups))

    def _mask(self, group: Group) -> Tensor | None:
        """Behind a prefix `(N,1,T,P+T)`: a token sees what is there of it, and its own past."""
        if group.prefix is None or group.present is None:
            return self.sliding_mask(group.index.shape[1])
        positions = self.positions.flatten()
        own = positions[group.index]
        order = torch.arange(group.index.shape[1], device=own.device)
        seen = group.present[:, None].expand(-1, len(order), -1)
        causal = (order[:, None] >= order).expand(len(own), -1, -1)
        allowed = torch.cat((seen, causal), -1)
        if self.sliding_window is not None:
            distance = own[:, :, None] - torch.cat((positions[group.prefix], own), 1)[:, None]
            allowed = allowed & (distance < self.sliding_window)
        return allowed[:, None]


def plan_documents(
    segments: Tensor, prefix: Tensor | None = None, slack: float = 0.75
) -> DocumentPlan:
    """Group the documents of packed rows `(B,T)` by length, those with a prefix apart.

    A group holds documents at least `slack` times as long as its longest, so the number of
    attention calls is logarithmic in the spread of lengths. Padding (-1) forms documents of its
    own, whose output nobody reads.
    """
    flat = segments.flatten()
    change = torch.ones_like(flat, dtype=torch.bool)
    change[1:] = flat[1:] != flat[:-1]
    change[:: segments.shape[1]] = True
    starts = change.nonzero().flatten()
    ends = torch.cat((starts[1:], starts.new_tensor([flat.numel()])))
    before = _prefixes(segments, prefix, starts)
    # Documents with a prefix behind all others, the longest first in each part.
    sizes, parts = (ends - starts).tolist(), (before >= 0).tolist()
    order = sorted(range(len(sizes)), key=lambda d: (parts[d], -sizes[d]))
    groups: list[Group] = []
    inverse = torch.empty_like(flat)
    first = offset = 0
    while first < len(order):
        longest, last = sizes[order[first]], first
        while last < len(order) and parts[order[last]] == parts[order[first]]:
            if sizes[order[last]] < slack * longest:
                break
            last += 1
        chosen = torch.tensor(order[first:last], device=flat.device)
        index, inside = _rows(starts[chosen], ends[chosen])
        places = torch.arange(index.numel(), device=flat.device).view_as(index) + offset
        inverse[index[inside]] = places[inside]
        shared = before[chosen]
        there = _rows(starts[shared], ends[shared]) if parts[order[first]] else ()
        groups.append(Group(index, *there))
        offset += index.numel()
        first = last
    return DocumentPlan(tuple(groups), inverse)


def _rows(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `(N, T)` of the tokens of N documents, and which are no padding."""
    lengths = ends - starts
    steps = torch.arange(int(lengths.max()), device=starts.device)
    inside = steps < lengths[:, None]
    return torch.where(inside, starts[:, None] + steps, 0), inside


def _prefixes(segments: Tensor, prefix: Tensor | None, starts: Tensor) -> Tensor:
    """`(documents,)` the document that each goes on from, -1 for none."""
    if prefix is None:
        return torch.full_like(starts, -1)
    rows = (starts // segments.shape[1]).tolist()
    documents = zip(rows, segments.flatten()[starts].tolist(), strict=True)
    known = {document: number for number, document in enumerate(documents)}
    wanted = zip(rows, prefix.flatten()[starts].tolist(), strict=True)
    return starts.new_tensor([known[one] if one[1] >= 0 else -1 for one in wanted])
