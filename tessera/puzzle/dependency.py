"""Which blocks of a model read what which others wrote (FFN Fusion §3.2).

    h_j(X) = f_j(X) - X            what block j adds
    M_ij   = 1 - cos(h_j, h_j without block i)      mean over tokens, for j > i

A small M_ij says that block j hardly reads block i, so the two may run on the same input. The
states below block i are the model's own, computed once a batch: M costs L²/2 blocks, not L².
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.batch import Batch
from tessera.model.context import Context
from tessera.model.transformer import Transformer


@torch.no_grad()
def dependency_matrix(
    module: Transformer, batches: Sequence[Batch], tell: Callable[[], None] = lambda: None
) -> Tensor:
    """M `(L, L)`, zero on and below the diagonal and where either block is empty.

    `tell` is called after each removed block of each batch.
    """
    depth = len(module.blocks)
    sums, total = torch.zeros(depth, depth), 0.0
    for batch in batches:
        context = module.prepare(Context(batch.positions, batch.segments))
        states = list(module.hidden_states(batch.tokens, context))
        real = (batch.segments >= 0).float()
        total += float(real.sum())
        for removed in range(depth):
            sums[removed] += _change(module, removed, states, context, real)
            tell()
    return sums / max(1.0, total)


def _change(
    module: Transformer, removed: int, states: Sequence[Tensor], context: Context, real: Tensor
) -> Tensor:
    """Row `removed` of M, summed over tokens `(L,)`."""
    row = torch.zeros(len(module.blocks))
    if torch.equal(states[removed], states[removed + 1]):
        return row
    x = states[removed]
    for layer in range(removed + 1, len(module.blocks)):
        out = module.blocks[layer](x, context)
        own = states[layer + 1] - states[layer]
        if own.any():
            distance = 1 - F.cosine_similarity(out - x, own, dim=-1)
            row[layer] = float((distance * real).sum())
        x = out
    return row
