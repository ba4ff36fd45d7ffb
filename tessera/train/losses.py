"""Token losses through the output head, in chunks of tokens: pure functions.

    cross entropy   -log q(y_t)
    KL              sum_v p(v) (log p(v) - log q(v))        p the parent, q the child

The gradient of each with respect to the child's logits is known in closed form (q - onehot(y),
q - p), so each chunk's logits are turned into gradients at once and forgotten: `(N, V)` is
never held, and nothing is computed twice. Everything here is a weighted *sum*; dividing by the
global weight is the trainer's work. Softmaxes are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.cpu import multiply


@dataclass(frozen=True, slots=True)
class Portions:
    """How much of `(N, V)` is there at once, and how much is worked on at once.

    chunk, tile: elements of the logits that one product makes, and that one pass of softmax goes
    over. slab: tokens, at least, whose slopes are kept for one product with the head's gradient,
    which reads and writes all of that gradient, 8 bytes for every 2 * slab operations.
    """

    chunk: int
    tile: int
    slab: int


PORTIONS = {
    # 16 MiB, the most that glibc hands out again without asking the kernel; 1 MiB, a core's L2;
    # products of 32 tokens with the gradient of a head of 128,256 were a third of a step.
    "cpu": Portions(chunk=1 << 22, tile=1 << 18, slab=256),
    # 512 MiB, 1046 tokens at 128,256: far fewer, and reading the head bounds the product.
    "cuda": Portions(chunk=1 << 27, tile=1 << 27, slab=1024),
}


def portions(device: torch.device) -> Portions:
    """Those of a kind of device; an unknown one is taken for a GPU."""
    return PORTIONS.get(device.type, PORTIONS["cuda"])


def chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices over `rows` `(N, …)` whose products `(n, width)` a device is to hold at once."""
    return _slices(len(rows), portions(rows.device).chunk // width)


def _slices(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


# (logits (n, V), the tokens' slice, where to write slopes (n, V)) -> losses (n,); both of the
# model's dtype, and in float32 a tile at a time
ChunkLoss = Callable[[Tensor, slice, Tensor], Tensor]


class _HeadLoss(torch.autograd.Function):
    """Σ w·ℓ of hidden `(N, C)` through head `(V, C)`, with gradients made on the way forward.

    Weights scale hidden states and their gradients, `(N, C)`, and not the slopes, `(N, V)`.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, weight: Tensor, chunk_loss: ChunkLoss):  # type: ignore[override]
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head) if needs_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, 4 * portions(hidden.device).chunk // (len(head) * head.itemsize))
        slab = -(-portions(hidden.device).slab // size) * size
        buffer = head.new_empty((min(slab, len(hidden)), len(head)))
        for at in _slices(len(hidden), slab):
            own, weights = hidden[at], weight[at]
            slope, scale = buffer[: len(own)], weights[:, None].to(hidden.dtype)
            for part in _slices(len(own), size):
                logits = multiply(own[part], head)
                total += chunk_loss(logits, _within(at, part), slope[part]) @ weights[part]
            if grad_hidden is not None:
                torch.mul(multiply(slope, head.t()), scale, out=grad_hidden[at])
            if grad_head is not None:
                grad_head.addmm_(slope.t(), own * scale)
        ctx.gradients = grad_hidden, grad_head
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        return *_scaled(ctx, upstream), None, None


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _scaled(ctx, upstream: Tensor) -> list[Tensor | None]:
    """The gradients made on the way forward times `upstream`, in place and handed over.

    Kept, they would stand beside their own product, and autograd would copy that once more.
    """
    assert ctx.gradients is not None, "a loss of the head is differentiated once"
    gradients, ctx.gradients = ctx.gradients, None
    return [None if x is None else x.mul_(upstream) for x in gradients]


def _tiles(logits: Tensor) -> Iterator[slice]:
    return _slices(len(logits), portions(logits.device).tile // logits.shape[1])


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of logits `(n, V)` into `out`; `(n,)` log Σ exp and the entropy."""
    log_sums, entropies = [], []
    for tile in _tiles(logits):
        z = logits[tile].float()
        p = torch.softmax(z, -1, out=out[tile]) if out.dtype == z.dtype else torch.softmax(z, -1)
        log_sums.append(_log_sum_exp(z, p))
        entropies.append(log_sums[-1] - torch.linalg.vecdot(p, z))
        if out.dtype != z.dtype:
            out[tile] = p
    return torch.cat(log_sums), torch.cat(entropies)


def _log_sum_exp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """`(n,)` log Σ exp of logits `(n, V)` from their softmax: max z = lse + log max p."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Σ w·(-log q(label)) of hidden `(N, C)`, head `(V, C)`, labels and weight `(N,)`.

    Stands for `(F.cross_entropy(hidden @ head.T, labels, reduction="none") * weight).sum()`.
    """

    def loss(logits: Tensor, part: slice, slope: Tensor) -> Tensor:
        index = labels[part, None]
        log_sum, _ = _softmax(logits, slope)
        slope.scatter_add_(1, index, slope.new_full(index.shape, -1.0))
        return log_sum - logits.gather(1, index).squeeze(1)

    return _HeadLoss.apply(hidden, head, weight, loss)  # type: ignore[return-value]


# (log-probs (n,), entropies (n,), the tokens' slice) -> f and its derivative, each (n,)
Curve = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


def log_prob_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor, curve: Curve
) -> Tensor:
    """Σ w·f(log q(label)) of hidden `(N, C)`, head `(V, C)`, labels and weight `(N,)`.

    `curve` tells f and f' of each token: a policy gradient is one, cross entropy is f = -log q.
    """

    def loss(logits: Tensor, part: slice, slope: Tensor) -> Tensor:
        index = labels[part, None]
        log_sum, entropy = _softmax(logits, slope)
        losses, slopes = curve(logits.gather(1, index).squeeze(1) - log_sum, entropy, part)
        slopes = slopes[:, None].to(slope.dtype)
        slope.mul_(-slopes).scatter_add_(1, index, slopes)
        return losses

    return _HeadLoss.apply(hidden, head, weight, loss)  # type: ignore[return-value]


@torch.no_grad()
def token_log_probs(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """`(N,)` log q(label) of hidden `(N, C)` through head `(V, C)`."""
    found = []
    for part in chunks(hidden, len(head)):
        logits = multiply(hidden[part], head).float()
        found.append(logits.gather(1, labels[part, None]).squeeze(1) - logits.logsumexp(-1))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def kl_divergence(
    hidden: Tensor,
    head: Tensor,
    parent_hidden: Tensor,
    parent_head: Tensor,
    weight: Tensor,
    beta: float = 0.0,
) -> Tensor:
    """Σ w·KL(parent ‖ child); hidden `(N, C)` each through its own head `(V, C)`.

    beta: 1 is KL(child ‖ parent), between is the generalised Jensen-Shannon divergence (TRL's).
    The parent's side carries no gradient (Puzzle §2.7: forward KL, temperature 1). With logits a
    and b, KL = Σ p (a - b) - lse(a) + lse(b): one exponential an element and side, not two.
    """
    parent_hidden, parent_head = parent_hidden.detach(), parent_head.detach()
    between = partial(_between, beta=beta)
    divergence = {0.0: _kl, 1.0: _reverse_kl}.get(beta, between)

    def loss(logits: Tensor, part: slice, slope: Tensor) -> Tensor:
        parent = multiply(parent_hidden[part], parent_head)
        return torch.cat(
            [divergence(parent[t].float(), logits[t].float(), slope[t]) for t in _tiles(logits)]
        )

    return _HeadLoss.apply(hidden, head, weight, loss)  # type: ignore[return-value]


def _kl(parent: Tensor, child: Tensor, slope: Tensor) -> Tensor:
    """`(n,)` KL of float32 logits `(n, V)`; q - p goes into `slope`, and `parent` is used up."""
    p, q = torch.softmax(parent, -1), torch.softmax(child, -1)
    losses = _log_sum_exp(child, q) - _log_sum_exp(parent, p)
    losses += parent.sub_(child).mul_(p).sum(-1)
    torch.sub(q, p, out=slope) if slope.dtype == q.dtype else slope.copy_(q.sub_(p))
    return losses


def _reverse_kl(parent: Tensor, child: Tensor, slope: Tensor) -> Tensor:
    """As `_kl`, of KL(q ‖ p), whose slope is q (log q - log p - KL)."""
    q = torch.softmax(child, -1)
    log_sum = _log_sum_exp(parent, torch.softmax(parent, -1)) - _log_sum_exp(child, q)
    apart = torch.sub(child, parent, out=parent)
    mean = torch.linalg.vecdot(q, apart)
    slope.copy_(q.mul_(apart.sub_(mean[:, None])))
    return log_sum + mean


def _between(parent: Tensor, child: Tensor, slope: Tensor, beta: float) -> Tensor:
    """As `_kl`, of β KL(p ‖ m) + (1-β) KL(q ‖ m), where m = βp + (1-β)q.

    Its slope is (1-β) q (log(q/m) - KL(q ‖ m)).
    """
    p, q = torch.softmax(parent, -1), torch.softmax(child, -1)
    log_sum = _log_sum_exp(parent, p) - _log_sum_exp(child, q)
    log_p_q = parent.sub_(child).sub_(log_sum[:, None])
    log_q_m = torch.logaddexp(log_p_q + math.log(beta), log_p_q.new_tensor(math.log(1 - beta)))
    log_q_m.neg_()
    of_p = torch.linalg.vecdot(p, log_p_q.add_(log_q_m))
    of_q = torch.linalg.vecdot(q, log_q_m)
    slope.copy_(q.mul_(log_q_m.sub_(of_q[:, None])).mul_(1 - beta))
    return beta * of_p + (1 - beta) * of_q


class _Cosine(torch.autograd.Function):
    """Σ w·(1 - x·y/(|x| |y|)); the gradient w (c x/|x|² - y/(|x| |y|)) is made on the way.

    In float32: layers change the stream by little, and below 1 bfloat16 goes in steps of 0.004.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor):  # type: ignore[override]
        cosine = torch.empty_like(weight)
        slope = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        rows, others = x.flatten(0, -2), y.flatten(0, -2)
        for at in _slices(len(rows), portions(x.device).tile // x.shape[-1]):
            to = None if slope is None else slope.view_as(rows)[at]
            found = _cosine(rows[at].float(), others[at].float(), weight.flatten()[at], to)
            cosine.view(-1)[at] = found
        ctx.gradients = (slope,)
        return ((1 - cosine) * weight).sum()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        return *_scaled(ctx, upstream), None, None


def _cosine(x: Tensor, y: Tensor, weight: Tensor, slope: Tensor | None) -> Tensor:
    """`(n,)` cosines of states `(n, C)`; the gradient of x goes into `slope`."""
    inverse = torch.linalg.vector_norm(x, dim=-1).clamp_min_(1e-8).reciprocal_()
    inverses = torch.linalg.vector_norm(y, dim=-1).clamp_min_(1e-8).reciprocal_().mul_(inverse)
    cosine = torch.linalg.vecdot(x, y).mul_(inverses)
    if slope is not None:
        along = x * (weight * cosine * inverse.square())[..., None]
        slope.copy_(along.sub_(y * (weight * inverses)[..., None]))
    return cosine


def hidden_cosine(child: Tensor, parent: Tensor, weight: Tensor) -> Tensor:
    """Σ w·(1 - cos(child, parent)) over tokens; states `(…, C)`, weight `(…)`.

    The parent's side carries no gradient.
    """
    return _Cosine.apply(child, parent.detach(), weight)  # type: ignore[return-value]


@torch.no_grad()
def token_statistics(
    hidden: Tensor, head: Tensor, parent_logits: Callable[[slice], Tensor], labels: Tensor
) -> dict[str, Tensor]:
    """Per token `(N,)`: `lm_loss`, `kl` to the parent, `agreement` of the two top-1 tokens."""
    columns: dict[str, list[Tensor]] = {"lm_loss": [], "kl": [], "agreement": []}
    for part in chunks(hidden, len(head)):
        log_q = F.log_softmax(multiply(hidden[part], head).float(), dim=-1)
        log_p = F.log_softmax(parent_logits(part).float(), dim=-1)
        columns["lm_loss"].append(-log_q.gather(1, labels[part, None]).squeeze(1))
        columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        columns["agreement"].append((log_q.argmax(-1) == log_p.argmax(-1)).float())
    return {key: torch.cat(parts) for key, parts in columns.items()}
