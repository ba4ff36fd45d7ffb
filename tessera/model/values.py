"""Values of a `config.json`, checked: one function a kind of number. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.model.config import ConfigError

Values = Mapping[str, Any]


def whole(values: Values, key: str, default: int | None = None) -> int:
    """A whole number above 0; ConfigError, naming the key, for anything else."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} is {value!r}; it must be a whole number above 0")
    return value


def number(values: Values, key: str, default: float | None = None) -> float:
    """A number above 0; ConfigError, naming the key, for anything else."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key!r} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{key} is {value!r}; it must be a number above 0")
    return float(value)
