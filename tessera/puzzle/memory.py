"""What training units takes: a bound that is known before anything is built.

    parent                    4 bytes a parameter, frozen
    units being trained      16 bytes a parameter: weight, gradient, Adam's two moments
    activations               what one layer's units save for their backward, a microbatch

Only the units of the layers at once count, and the largest group of layers decides; the graph is
one layer's at any time. Counted parameters are exact; activations are an estimate for float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tessera.model.config import GQA, KINDS, Linear, ModelConfig, SwiGLU, Variant, parse_kind
from tessera.puzzle.library import Key, layer_groups
from tessera.puzzle.space import split

WEIGHT, TRAINED = 4, 16  # bytes a parameter


@dataclass(frozen=True)
class Memory:
    """Bytes, and of how many layers units train at once."""

    parent: int
    units: int
    activations: int
    layers_at_once: int
    layers: int

    @property
    def total(self) -> int:
        return self.parent + self.units + self.activations

    def as_json(self) -> dict[str, Any]:
        """The fields and their sum."""
        return {**asdict(self), "total": self.total}

    def told(self) -> str:
        """One line for a person."""
        return (
            f"memory about {_bytes(self.total)}: parent {_bytes(self.parent)}, units "
            f"{_bytes(self.units)} ({self.layers_at_once} of {self.layers} layers at once, "
            f"{TRAINED} bytes a parameter), activations about {_bytes(self.activations)}"
        )


def training_memory(
    parent: ModelConfig, keys: Sequence[Key], layers_at_once: int | None, microbatch_tokens: int
) -> Memory:
    """What it takes to train the units of `keys`, `layers_at_once` layers together (None: all)."""
    groups = layer_groups(keys, layers_at_once)
    saved: dict[int, int] = {}
    for layer, kind, word in keys:
        saved[layer] = saved.get(layer, 0) + _saved_beside_parent(parent, layer, kind, word)
    return Memory(
        parent=WEIGHT * parent.num_params(),
        units=TRAINED
        * max((sum(unit_params(parent, *k[1:]) for k in g) for g in groups), default=0),
        activations=WEIGHT * microbatch_tokens * max(saved.values(), default=0),
        layers_at_once=max((len({key[0] for key in group}) for group in groups), default=0),
        layers=len(saved),
    )


def unit_params(parent: ModelConfig, kind: str, word: str) -> int:
    """Parameters of a unit; of both subblocks for kind `block`."""
    return sum(parent.subblock_params(k, parse_kind(k, w)) for k, w in _parts(kind, word))


def _parts(kind: str, word: str) -> list[tuple[str, str]]:
    return list(zip(KINDS, split(word), strict=True)) if kind == "block" else [(kind, word)]


def _saved_beside_parent(parent: ModelConfig, layer: int, kind: str, word: str) -> int:
    """Numbers a token that autograd keeps for one unit; behind attention runs the parent's FFN."""
    own = sum(_saved(parent, parse_kind(k, w)) for k, w in _parts(kind, word))
    behind = _saved(parent, parent.blocks[layer].ffn) if kind == "attention" else 0
    return own + behind


def _saved(config: ModelConfig, variant: Variant) -> int:
    """Numbers a token that the backward of one subblock needs: its layers.py, line by line."""
    hidden = 4 * config.hidden_size  # the input, the norm's output, the delta, the sum
    match variant:
        case SwiGLU(width):
            return hidden + 4 * width
        case GQA(heads):
            q, kv = config.num_attention_heads * config.head_dim, heads * config.head_dim
            return hidden + 5 * q + 6 * kv
        case Linear():
            return hidden
        case _:
            return 0


def _bytes(count: float) -> str:
    """`3.2 GB`, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
