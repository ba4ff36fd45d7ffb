"""Does the exported copy compute the same? Asked of the written files, never of memory.

The source decodes greedily from fixed prompts; the copy reads the same tokens once, and must
choose the same next token at every place with logits as close as a reordered sum allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.export.errors import ExportError
from tessera.model.transformer import Transformer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 16
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order stay well below


@dataclass(frozen=True, slots=True)
class Parity:
    """How many greedy tokens agree, and the largest difference of any logit."""

    tokens: int
    tokens_equal: int
    max_logit_difference: float


@dataclass(frozen=True, slots=True)
class Probe:
    """sequences `(P, T)` as the source continued them; its logits `(P, T, V)` on them."""

    sequences: Tensor
    logits: Tensor


def prompts(vocab_size: int) -> Tensor:
    """`(P, T)` token ids, the same for every model of this vocabulary."""
    rows, columns = torch.arange(PROMPTS)[:, None], torch.arange(PROMPT_TOKENS)
    return (rows * 101 + columns * columns * 17 + columns * 5 + 3) % vocab_size


@torch.no_grad()
def probe(module: Transformer) -> Probe:
    """The model's greedy continuations of the fixed prompts, and its logits on them."""
    sequences = prompts(module.config.vocab_size).to(module.head.device)
    new = min(NEW_TOKENS, module.config.max_position_embeddings - PROMPT_TOKENS)
    for _ in range(new):
        last = module.logits(module(sequences)[:, -1])
        sequences = torch.cat((sequences, last.argmax(-1, keepdim=True)), dim=1)
    return Probe(sequences, module.logits(module(sequences)))


@torch.no_grad()
def compare(source: Probe, copy: Transformer) -> Parity:
    """Parity of an exported copy with the source.

    Raises ExportError when logits differ by more than rounding, or when a token does that is
    not a tie within that difference.
    """
    logits, result = _compared(source, copy)
    difference, ours = result.max_logit_difference, slice(PROMPT_TOKENS - 1, -1)
    agree = logits[:, ours].argmax(-1) == source.sequences[:, PROMPT_TOKENS:]
    top = source.logits[:, ours].topk(2, dim=-1).values
    tie = top[..., 0] - top[..., 1] <= 2 * difference
    limit = TOLERANCE * max(1.0, source.logits.abs().max().item())
    if not difference <= limit or not bool((agree | tie).all()):
        raise ExportError(
            f"the exported files do not compute what the source does: {result.tokens_equal} of "
            f"{result.tokens} greedy tokens agree and a logit differs by {difference:.3g} (allowed "
            f"{limit:.3g}); nothing was kept. This is a defect of the exporter: please report it"
        )
    return result


def distance(source: Probe, copy: Transformer) -> Parity:
    """Parity of a copy that is meant to differ."""
    return _compared(source, copy)[1]


@torch.no_grad()
def _compared(source: Probe, copy: Transformer) -> tuple[Tensor, Parity]:
    logits = copy.logits(copy(source.sequences.to(copy.head.device))).to(source.logits.device)
    found = logits[:, PROMPT_TOKENS - 1 : -1].argmax(-1)
    agree = found == source.sequences[:, PROMPT_TOKENS:]
    difference = (logits - source.logits).abs().max().item()
    return logits, Parity(agree.numel(), int(agree.sum()), difference)
