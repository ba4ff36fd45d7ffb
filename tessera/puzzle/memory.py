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

from tessera.model.config import KINDS, ModelConfig, Variant, parse_kind
from tessera.puzzle.library import Key, layer_groups
from tessera.puzzle.space import split
from tessera.train.flops import kept, working

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
    return Memory(
        parent=WEIGHT * parent.num_params(),
        units=TRAINED
        * max((sum(unit_params(parent, *k[1:]) for k in g) for g in groups), default=0),
        activations=round(WEIGHT * microbatch_tokens * kept_numbers(parent, keys)) if keys else 0,
        layers_at_once=max((len({key[0] for key in group}) for group in groups), default=0),
        layers=len({layer for layer, _, _ in keys}),
    )


def unit_params(parent: ModelConfig, kind: str, word: str) -> int:
    """Parameters of a unit; of both subblocks for kind `block`."""
    return sum(parent.subblock_params(k, parse_kind(k, w)) for k, w in _parts(kind, word))


def _parts(kind: str, word: str) -> list[tuple[str, str]]:
    return list(zip(KINDS, split(word), strict=True)) if kind == "block" else [(kind, word)]


def kept_numbers(parent: ModelConfig, keys: Sequence[Key], *, working_too: bool = True) -> float:
    """Numbers a token that the units of one layer keep for their backward, of the largest layer.

    Behind attention runs the parent's FFN. working_too: and what the widest FFN's backward pass
    holds beside that.
    """
    layers: dict[int, float] = {}
    variants: list[Variant] = []
    for layer, kind, word in keys:
        own = [parse_kind(k, w) for k, w in _parts(kind, word)]
        own += [parent.blocks[layer].ffn] if kind == "attention" else []
        # All units of a layer share what enters; each keeps its distance from the parent instead.
        layers[layer] = layers.get(layer, 0) + sum(kept(parent, v) for v in own)
        variants += own
    most = max(layers.values(), default=0)
    return most + (working(parent, variants) if working_too else 0)


def _bytes(count: float) -> str:
    """`3.2 GB`, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
