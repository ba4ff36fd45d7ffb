"""Layers as a recipe names them: `"0-3, 7"`. `model.servable.spans` writes what this reads."""

from __future__ import annotations

import re

from tessera.export.engines import spans
from tessera.model.config import ConfigError, ModelConfig

_SPAN = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")


def layer_numbers(spec: str) -> tuple[int, ...]:
    """The layers of `"0-3, 7"`, ascending: 0, 1, 2, 3, 7. Raises ConfigError."""
    found: list[int] = []
    for part in spec.split(","):
        match = _SPAN.fullmatch(part.strip())
        if not match:
            raise ConfigError(
                f'{spec!r} names no layers; write numbers and spans from 0 up, e.g. "0-3, 7"'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{spec!r}: {part.strip()} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({layer for layer in found if found.count(layer) > 1})
    if twice:
        raise ConfigError(f"{spec!r} names {spans(twice)} twice; name each layer once")
    return tuple(sorted(found))


def layers_of(spec: str | None, parent: ModelConfig, where: str) -> tuple[int, ...]:
    """The layers of a parent that `spec` names; all of them for None. Raises ConfigError."""
    count = parent.num_hidden_layers
    layers = tuple(range(count)) if spec is None else layer_numbers(spec)
    if beyond := [layer for layer in layers if layer >= count]:
        raise ConfigError(
            f"{where}: {spec!r} names {spans(beyond)}, and the parent has layers 0-{count - 1}"
        )
    return layers
