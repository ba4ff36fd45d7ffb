"""From logits to tokens, each row by parameters of its own.

    l = allowed(penalise(logits + bias));   p = softmax(min_p(top_p(top_k(l / temperature))))
    token = min {i : cdf(i) > u}

The uniform u is a function of (seed, prompt key, sample, position), and a row is drawn in the order
its own filters need (by rank under top_k and top_p, by id without), so a completion does not depend
on its batch mates. Reported log-probs are those of the raw logits, as a trainer recomputes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera import dist
from tessera.generate.engine import SamplingParams

MIN_TEMPERATURE = 1e-30  # dividing by less overflows float32
BLOCK = 128  # weights that `draw` sums at once


def uniforms(seed: int, key: int, sample: int, count: int) -> list[float]:
    """`count` numbers in [0, 1), one a position: Philox 4x64 (Salmon et al. 2011).

    The identity of the sample is the high half of the counter, so streams never meet.
    """
    counter = np.array([0, 0, sample, key % 2**64], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    return ((generator.random_raw(count) >> np.uint64(11)) * 2.0**-53).tolist()


@dataclass(frozen=True)
class Filters:
    """How a group of sampled rows is drawn. Columns are `(R,1)`, None where no row uses them.

    rows: which rows of the batch, None for all of them. ranked: whether they are drawn by rank.
    """

    rows: Tensor | None
    ranked: bool
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None


class Chosen(NamedTuple):
    """tokens `(B,)`, their raw logprobs `(B,)`, and (ids, logprobs) `(B,n)` of the likeliest."""

    tokens: Tensor
    logprobs: Tensor
    top: tuple[Tensor, Tensor] | None


def joined(parts: Sequence[Chosen]) -> Chosen:
    """Of the rows of all parts, in order; as many of the likeliest in each."""
    if len(parts) == 1:
        return parts[0]
    tokens, logprobs, tops = zip(*parts, strict=True)
    top = None
    if tops[0] is not None:
        ids, theirs = zip(*tops, strict=True)
        top = torch.cat(ids), torch.cat(theirs)
    return Chosen(torch.cat(tokens), torch.cat(logprobs), top)


class Sampler:
    """Chooses the next token of each row of a batch; made anew where the rows change."""

    def __init__(
        self, rows: Sequence[SamplingParams], device: torch.device | None = None, top: int = 0
    ) -> None:
        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        wide = dist.widest_float(device)
        by_kind: dict[bool, list[int]] = {}
        for row, params in enumerate(rows):
            if params.temperature > 0:
                by_kind.setdefault(params.top_k > 0 or params.top_p < 1, []).append(row)
        self.groups: list[Filters] = []  # the rows in none are greedy
        for ranked, chosen in by_kind.items():
            given = [rows[i] for i in chosen]
            top_k = [p.top_k or 2**31 for p in given]
            top_p, min_p = [p.top_p for p in given], [p.min_p for p in given]
            self.groups.append(
                Filters(
                    None if len(chosen) == len(rows) else torch.tensor(chosen, device=device),
                    ranked,
                    column([max(p.temperature, MIN_TEMPERATURE) for p in given]),
                    torch.tensor(top_k, device=device)[:, None] if min(top_k) < 2**31 else None,
                    column(top_p, wide) if min(top_p) < 1 else None,
                    column(min_p) if max(min_p) > 0 else None,
                )
            )

        def used(name: str, none: float) -> Tensor | None:
            values = [getattr(params, name) for params in rows]
            return column(values) if set(values) - {none} else None

        self.penalty = used("repetition_penalty", 1.0)
        self.frequency, self.presence = (
            used("frequency_penalty", 0.0),
            used("presence_penalty", 0.0),
        )
        self.bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows, tokens, what is added
        if biased := [(row, *one) for row, params in enumerate(rows) for one in params.logit_bias]:
            where, ids, values = zip(*biased, strict=True)
            places = torch.tensor([where, ids], device=device)
            self.bias = places[0], places[1], torch.tensor(values, device=device)
        self.top = max([top, *(p.logprobs for p in rows)])

    def choose(
        self,
        logits: Tensor,
        noise: Tensor | None = None,
        seen: Tensor | None = None,
        counts: Tensor | None = None,
        forced: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Chosen:
        """The next token of each row of logits `(B,V)`.

        noise `(B,)`: one uniform a row, needed where rows are sampled. seen `(B,V)`: the tokens
        that repetition_penalty looks at. counts `(B,V)`: how often the completion holds each.
        forced `(B,)`: tokens that must come, -1 where the row chooses. allowed `(B,V)`: those that
        may come.
        """
        logits = logits.float()
        shaped = self._penalised(logits, seen, counts)
        if allowed is not None:
            shaped = shaped.masked_fill(~allowed, float("-inf"))
        if len(self.groups) == 1 and self.groups[0].rows is None:
            tokens = sample(shaped, self.groups[0], noise)  # type: ignore[arg-type]
        else:
            tokens = shaped.argmax(-1)
            for group in self.groups:
                tokens[group.rows] = sample(shaped[group.rows], group, noise[group.rows])  # type: ignore[index]
        if forced is not None:
            tokens = torch.where(forced >= 0, forced, tokens)
        logprobs = logits.log_softmax(-1)
        top = None
        if self.top:
            values, ids = logprobs.topk(min(self.top, logits.shape[-1]), dim=-1)
            top = (ids, values)
        return Chosen(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], top)

    def _penalised(self, logits: Tensor, seen: Tensor | None, counts: Tensor | None) -> Tensor:
        if self.bias is not None:
            rows, ids, values = self.bias
            logits = logits.index_put((rows, ids), values, accumulate=True)
        if self.penalty is not None:
            assert seen is not None, "a penalty needs to know what was seen"
            penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(seen, penalised, logits)
        if self.frequency is not None:
            assert counts is not None, "a penalty needs to know what was said"
            logits = logits - self.frequency * counts
        if self.presence is not None:
            assert counts is not None, "a penalty needs to know what was said"
            logits = logits - self.presence * (counts > 0)
        return logits


def sample(logits: Tensor, filters: Filters, noise: Tensor) -> Tensor:
    """Tokens `(R,)` drawn from logits `(R,V)`."""
    logits = logits / filters.temperature
    if not filters.ranked:
        return draw(drop_unlikely(logits.softmax(-1), filters.min_p), noise)
    ranked, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    if filters.top_k is not None:
        width = min(int(filters.top_k.max()), ranked.shape[-1])
        ranked = ranked[:, :width]
        outside = torch.arange(width, device=ranked.device) >= filters.top_k
        ranked = ranked.masked_fill(outside, float("-inf"))
    weights = ranked.softmax(-1)
    if filters.top_p is not None:
        weights = nucleus(weights, filters.top_p)
    return ids.gather(-1, draw(drop_unlikely(weights, filters.min_p), noise)[:, None])[:, 0]


def nucleus(ranked: Tensor, top_p: Tensor | float) -> Tensor:
    """Descending probabilities `(R,V)` with all behind the first `top_p` `(R,1)` of mass set to 0.

    The token that crosses the line stays (Holtzman et al. 2020), so one is always left. A top_p
    of 1 keeps all: rounding may bring the mass before the last tokens up to 1.
    """
    before = ranked.to(dist.widest_float(ranked.device)).cumsum(-1) - ranked
    limit = torch.as_tensor(top_p)
    return ranked.masked_fill((before >= limit) & (limit < 1), 0.0)


def drop_unlikely(weights: Tensor, min_p: Tensor | None) -> Tensor:
    """Weights `(R,V)` with those below `min_p` `(R,1)` of the largest set to 0."""
    if min_p is None:
        return weights
    return weights.masked_fill(weights < min_p * weights.amax(-1, keepdim=True), 0.0)


def draw(weights: Tensor, noise: Tensor) -> Tensor:
    """Index `(R,)` by inverse CDF of non-negative weights `(R,V)`, not necessarily normalised.

    First among blocks of BLOCK weights, then inside the block: a running sum over a whole row takes
    three times as long. In the widest float: over a large vocabulary a float32 sum is off by more
    than its rare tokens weigh.
    """
    wide = dist.widest_float(weights.device)
    padded = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, rest = _first_above(padded.sum(-1, dtype=wide), noise.to(wide)[:, None])
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].to(wide)
    token, _ = _first_above(inside, rest)
    # Weights that are NaN have no order: still a token, for `logprobs` to say what is wrong.
    return (block * BLOCK + token)[:, 0].clamp(max=weights.shape[-1] - 1)


def _first_above(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The first index `(R,1)` whose running sum is above `share` `(R,1)` of all, never one that
    weighs nothing, and the share of its own weight that is left."""
    cdf = weights.cumsum(-1)
    target = cdf[:, -1:] * share.clamp(0, 1 - torch.finfo(share.dtype).eps)
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
    own = weights.gather(-1, index)
    return index, (target - (cdf.gather(-1, index) - own)) / own
