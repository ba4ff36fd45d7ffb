"""Token losses through the output head, in chunks of tokens: pure functions.

    cross entropy   -log q(y_t)
    KL              sum_v p(v) (log p(v) - log q(v))        p the parent, q the child

The gradient of both with respect to the child's logits is known in closed form (q - onehot(y),
q - p), so each chunk's logits are turned into gradients at once and forgotten: `(N, V)` is
never held, and nothing is computed twice. Everything here is a weighted *sum*; dividing by the
global weight is the trainer's work. Logits are float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.matmul import multiply

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in float32


def chunks(tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices over `tokens` whose logits stay under CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _HeadLoss(torch.autograd.Function):
    """Σ w·ℓ of hidden `(N, C)` through head `(V, C)`, with gradients made on the way forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, weight: Tensor, chunk_loss: ChunkLoss):  # type: ignore[override]
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in chunks(len(hidden), len(head)):
            losses, slope = chunk_loss(multiply(hidden[part], head), part)
            total += losses @ weight[part]
            slope = slope.mul_(weight[part, None]).to(head.dtype)
            grad_hidden[part] = multiply(slope, head.t())
            if grad_head is not None:
                grad_head += multiply(slope.t(), hidden[part].t())
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            grad_hidden * upstream,
            None if grad_head is None else grad_head * upstream,
            None,
            None,
        )


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Σ w·(-log q(label)) of hidden `(N, C)`, head `(V, C)`, labels and weight `(N,)`.

    Stands for `(F.cross_entropy(hidden @ head.T, labels, reduction="none") * weight).sum()`.
    """

    def loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_q = F.log_softmax(logits.float(), dim=-1)
        index = labels[part, None]
        losses = -log_q.gather(1, index).squeeze(1)
        slope = log_q.exp_()
        return losses, slope.scatter_add_(1, index, slope.new_full(index.shape, -1.0))

    return _HeadLoss.apply(hidden, head, weight, loss)  # type: ignore[return-value]


def kl_divergence(
    hidden: Tensor, head: Tensor, parent_hidden: Tensor, parent_head: Tensor, weight: Tensor
) -> Tensor:
    """Σ w·KL(parent ‖ child); hidden `(N, C)` each through its own head `(V, C)`.

    The parent's side carries no gradient (Puzzle §2.7: forward KL, temperature 1).
    """
    parent_hidden, parent_head = parent_hidden.detach(), parent_head.detach()

    def loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_q = F.log_softmax(logits.float(), dim=-1)
        log_p = F.log_softmax(multiply(parent_hidden[part], parent_head).float(), dim=-1)
        p = log_p.exp()
        losses = (p * (log_p - log_q)).sum(-1)
        return losses, log_q.exp_().sub_(p)

    return _HeadLoss.apply(hidden, head, weight, loss)  # type: ignore[return-value]


def hidden_cosine(child: Tensor, parent: Tensor, weight: Tensor) -> Tensor:
    """Σ w·(1 - cos(child, parent)) over tokens; states `(…, C)`, weight `(…)`."""
    return ((1 - F.cosine_similarity(child, parent, dim=-1)) * weight).sum()


@torch.no_grad()
def token_statistics(
    hidden: Tensor, head: Tensor, parent_logits: Callable[[slice], Tensor], labels: Tensor
) -> dict[str, Tensor]:
    """Per token `(N,)`: `lm_loss`, `kl` to the parent, `agreement` of the two top-1 tokens."""
    columns: dict[str, list[Tensor]] = {"lm_loss": [], "kl": [], "agreement": []}
    for part in chunks(len(hidden), len(head)):
        log_q = F.log_softmax(multiply(hidden[part], head).float(), dim=-1)
        log_p = F.log_softmax(parent_logits(part).float(), dim=-1)
        columns["lm_loss"].append(-log_q.gather(1, labels[part, None]).squeeze(1))
        columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        columns["agreement"].append((log_q.argmax(-1) == log_p.argmax(-1)).float())
    return {key: torch.cat(parts) for key, parts in columns.items()}
