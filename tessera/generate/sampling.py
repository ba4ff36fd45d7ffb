"""From logits to tokens: pure functions, no state.

    p = softmax(top_p(top_k(logits / temperature)));   token = min {i : cdf(i) > u}

The uniform u is a function of (seed, prompt key, sample, position), so a completion does not
depend on its batch mates or on the number of slots. Reported log-probs are those of the raw
logits, which is what a trainer recomputes and what policy ratios divide.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tessera.generate.engine import SamplingParams


def uniforms(seed: int, key: int, sample: int, count: int) -> list[float]:
    """`count` numbers in [0, 1), one a position: Philox 4x64 (Salmon et al. 2011).

    The identity of the sample is the high half of the counter, so streams never meet.
    """
    counter = np.array([0, 0, sample, key % 2**64], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    return ((generator.random_raw(count) >> np.uint64(11)) * 2.0**-53).tolist()


def choose(
    logits: Tensor, params: SamplingParams, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens `(B,)` and their untempered log-probs `(B,)` from logits `(B,V)`.

    noise `(B,)` holds one uniform a row; it is not read when temperature is 0.
    """
    logits = logits.float()
    if params.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        assert noise is not None, "sampling needs a uniform a row"
        tokens = sample(logits, params, noise)
    logprobs = logits.log_softmax(-1).gather(-1, tokens)
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def sample(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """Tokens `(B,1)` drawn from logits `(B,V)` as `params` says."""
    logits = logits / params.temperature
    limit = params.top_k if 0 < params.top_k < logits.shape[-1] else 0
    if not limit and params.top_p == 1:
        return draw(logits.softmax(-1), noise)
    ranked, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranked = ranked[:, : limit or None]
    return ids.gather(-1, draw(nucleus(ranked.softmax(-1), params.top_p), noise))


def nucleus(ranked: Tensor, top_p: float) -> Tensor:
    """Descending probabilities `(B,V)` with all behind the first `top_p` of mass set to 0.

    The token that crosses the line stays (Holtzman et al. 2020), so one is always left.
    """
    if top_p == 1:
        return ranked
    before = ranked.double().cumsum(-1) - ranked
    return ranked.masked_fill(before >= top_p, 0.0)


def draw(weights: Tensor, noise: Tensor) -> Tensor:
    """Index `(B,1)` by inverse CDF of non-negative weights `(B,V)`, not necessarily normalised.

    In float64: over a large vocabulary a float32 sum is off by more than its rare tokens weigh.
    """
    cdf = weights.double().cumsum(-1)
    target = noise.double()[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).clamp_(max=weights.shape[-1] - 1)
