"""A simulated service: functions that a model calls by name, over a state of plain data.

A call never raises: a function that is not there, an argument that is missing, strange or of
another type, and whatever a service refuses come back as `{"error": ...}`, which the model reads.
A result is a copy, so that what was said stays said when the state goes on. Services draw no clock
and no entropy: the same calls give the same results and the same state, always.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, final

MOST = 2**63  # of a whole number; beyond it a product of a few takes seconds to print


class Refused(ValueError):
    """What a service will not do; the text is what the model is told."""


def offered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method as one that a model may call."""
    function.__dict__["offered"] = True
    return function


class Service:
    """One service with its state.

    data: what the functions read and write, begun as `defaults` overlaid by an item's config. Keys
    with a leading underscore are its own business and no part of the state that is compared.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.data: dict[str, Any] = copy.deepcopy({**self.defaults, **config})

    @property
    def state(self) -> dict[str, Any]:
        """What is compared, as plain data."""
        return {key: value for key, value in self.data.items() if not key.startswith("_")}

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The functions that may be called, by name."""
        return _offered(type(self))

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """The result of a call, or `{"error": why}`."""
        function = self.functions.get(name)
        if function is None:
            return {"error": f"there is no function {name[:80]!r}"}
        try:
            return copy.deepcopy(function(self, **_bound(function, arguments)))
        except Refused as error:
            return {"error": str(error)}


@final
class Services:
    """The services of one item behind one door: every function that they have can be called."""

    def __init__(self, kinds: Mapping[str, type[Service]], configs: Mapping[str, Any]) -> None:
        self.parts = {name: kind(configs.get(name) or {}) for name, kind in kinds.items()}

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See `Service.call`; a service's name may stand before the function's, with a dot."""
        own = name.rpartition(".")[2]
        for part in self.parts.values():
            if own in part.functions:
                return part.call(own, arguments)
        return {"error": f"there is no function {name[:80]!r}"}

    @property
    def state(self) -> dict[str, Any]:
        """The state of every service."""
        return {name: part.state for name, part in self.parts.items()}


@functools.cache
def _offered(kind: type[Service]) -> dict[str, Callable[..., Any]]:
    members = inspect.getmembers(kind, inspect.isfunction)
    return {name: member for name, member in members if member.__dict__.get("offered")}


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(function).parameters)
    del found["self"]
    return found


def _bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types that the function states. Raises Refused."""
    known = _parameters(function)
    for name in arguments:
        if name not in known:
            raise Refused(
                f"{function.__name__} has no argument {name[:80]!r}; it takes {_list(known)}"
            )
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and arguments.get(name) is None
    ]
    if missing:
        raise Refused(f"{function.__name__} lacks {_list(missing)}")
    hints = _hints(function)
    return {
        name: _typed(value, hints[name], name)
        for name, value in arguments.items()
        if value is not None  # a null is an argument left out
    }


def _typed(value: Any, kind: Any, name: str) -> Any:
    """The value as what is asked for: whole numbers are floats too, truths are no numbers."""
    if isinstance(kind, types.UnionType):
        return _one_of(value, kind, name)
    if typing.get_origin(kind) is list and isinstance(value, list | tuple):
        (inner,) = typing.get_args(kind)
        return [_typed(one, inner, name) for one in value]
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < MOST and math.isfinite(value):
            return float(value)
    elif kind is int and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < MOST and value == int(value):
            return int(value)
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        return {str(key): one for key, one in value.items()}
    elif kind in (str, bool) and isinstance(value, kind):
        return value
    raise Refused(f"{name} must be {_kind(kind)}, not of type {type(value).__name__}")


def _one_of(value: Any, kind: types.UnionType, name: str) -> Any:
    """The docs write the default of an optional text as the text "None"."""
    kinds = typing.get_args(kind)
    if value == "None" and types.NoneType in kinds:
        return None
    for one in kinds:
        try:
            return None if one is types.NoneType else _typed(value, one, name)
        except Refused:
            continue
    raise Refused(f"{name} must be {_kind(kind)}, not of type {type(value).__name__}")


def _kind(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if isinstance(kind, types.UnionType):
        return " or ".join(_kind(one) for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is list:
        return f"a list, each {_kind(typing.get_args(kind)[0])}"
    return names.get(kind, "an object")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
