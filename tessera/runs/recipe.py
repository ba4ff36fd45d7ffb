"""A recipe: one TOML file, one table a stage, in pipeline order.

    name = "nano"                     # and `seed`: the only keys outside tables
    [defaults]                        # of every stage that has such a key; a stage's own wins
    train = { sequence_length = 512 }
    [parent]                          # the key is the run's name
    [kd-long]                         # and, up to its first "-", the stage: this one is `kd`
    stage = "kd"                      # unless the table names it
    train.lr = 3e-4

The stages are listed in `pipeline.py`; a stage's keys are those of the config class beside it.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from tessera.table import nearest

Model = TypeVar("Model", bound=BaseModel)
LARGEST = 4 << 20  # bytes of a recipe
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RecipeError(ValueError):
    """A recipe or an override that does not say what to do; the text says what to change."""


class Config(BaseModel):
    """Base of every stage's config: frozen, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def identity(config: BaseModel) -> dict[str, Any]:
    """A config as JSON values, without the keys in its class's `EXECUTION`: how it is run."""
    made = config.model_dump(mode="json")
    for key, value in config:
        if isinstance(value, BaseModel) and key in made:  # a key excluded from dumps is none
            made[key] = identity(value)
    execution = getattr(config, "EXECUTION", ())
    return {key: value for key, value in made.items() if key not in execution}


@dataclass(frozen=True)
class StageSpec:
    """One table of a recipe: the run's name, its stage, and the rest of the table."""

    name: str
    stage: str
    table: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe, read and overridden, its tables not yet checked against their configs."""

    name: str
    seed: int
    stages: tuple[StageSpec, ...]
    defaults: dict[str, Any] = field(default_factory=dict)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `KEY=VALUE` overrides. Raises RecipeError."""
    file = Path(path)
    try:
        if file.exists() and (
            file.stat().st_size > LARGEST or not (file.is_file() or file.is_dir())
        ):
            raise RecipeError(f"{file} is no recipe: those are files of {LARGEST:,} bytes at most")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {file}{_recipes_near(file)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{file} is a directory{_recipes_near(file / 'recipe')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not a readable recipe: {error}") from None
    return loads(text, overrides, name=file.stem, where=str(file))


def _recipes_near(file: Path) -> str:
    folders = {file.parent, Path("recipes")}
    found = sorted(str(p) for folder in folders for p in folder.glob("*.toml"))
    return f"; {nearest(str(file), found)}" if found else ""


def loads(
    text: str, overrides: Sequence[str] = (), *, name: str = "recipe", where: str = "recipe"
) -> Recipe:
    """`load` from a string; `name` is used where the text gives none, `where` in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = f"\n  {text.split(chr(10))[int(at[1]) - 1].strip()}" if at else ""
        raise RecipeError(f"{where}: not valid TOML: {error}{line}") from None
    except (ValueError, RecursionError) as error:  # too long a number, too deep
        raise RecipeError(f"{where}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(document, override)
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    scalars = {key: value for key, value in document.items() if key not in tables}
    for key in scalars.keys() - {"name", "seed"}:
        raise RecipeError(
            f"{key}: unknown key outside the tables; {nearest(key, ['name', 'seed', *tables])}"
        )
    recipe_name, seed = scalars.get("name", name), scalars.get("seed", 0)
    if not isinstance(recipe_name, str) or not _RUN_NAME.fullmatch(recipe_name):
        raise RecipeError(f"name: {recipe_name!r} names no directory; use letters, digits, - and _")
    if type(seed) is not int or seed < 0:
        raise RecipeError(f"seed: {seed!r} is no seed; give a whole number from 0 up")
    defaults = tables.pop("defaults", {})
    if not tables:
        raise RecipeError(f"{name}: holds no stage; a recipe is one [table] a stage")
    specs = []
    for key, table in tables.items():
        if not _RUN_NAME.fullmatch(key):
            raise RecipeError(f"[{key}]: names no directory; use letters, digits, - and _")
        stage = table.pop("stage", key.partition("-")[0])
        if not isinstance(stage, str):
            raise RecipeError(f"{key}.stage: {stage!r} is no stage; give its name as a string")
        specs.append(StageSpec(key, stage, table))
    return Recipe(recipe_name, seed, tuple(specs), defaults)


def _apply(document: dict[str, Any], override: str) -> None:
    """Sets one dotted key of a document: `kd.train.lr=3e-4`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"{override!r} is no override; write STAGE.KEY=VALUE, e.g. kd.train.lr=3e-4"
        )
    tables = [*(key for key, value in document.items() if isinstance(value, dict)), "defaults"]
    kind, known = ("key", ["name", "seed"]) if len(keys) == 1 else ("stage", tables)
    if keys[0] not in known:
        raise RecipeError(f"{override}: no {kind} {keys[0]!r}; {nearest(keys[0], known)}")
    table = document
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{path}: {'.'.join(keys[: depth + 1])} is {table!r}, not a table")
    table[keys[-1]] = value = text.strip()  # TOML where it parses as such, else a string
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return
    if len(parsed) == 1 and isinstance(parsed["value"], str | int | float | bool | list | dict):
        table[keys[-1]] = parsed["value"]


def validate(model: type[Model], table: Mapping[str, Any], where: str) -> Model:
    """The table as its config class. Raises RecipeError with a line for every wrong key.

    Types are strict, as TOML's are: "3" is no number and 0.5 no count.
    """
    try:
        return model.model_validate_json(json.dumps(dict(table), default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(model, item, where) for item in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _explain(model: type[BaseModel], item: Mapping[str, Any], where: str) -> str:
    location = [str(part) for part in item["loc"]]
    path = ".".join([where, *location])
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        for part in location[:-1]:
            if part in model.model_fields:
                model = next(iter(models_in(model.model_fields[part].annotation)), model)
        return f"{path}: unknown key; {nearest(location[-1], model.model_fields)}"
    if item["type"] == "missing":
        return f"{path}: missing; set it in the recipe, or on the command line with {path}=..."
    if item["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{path}: {given!r} is not allowed; {nearest(str(given), allowed)}"
    message = item["msg"].removeprefix("Value error, ")
    text = repr(given)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{path}: {message}" + ("" if isinstance(given, dict) else f" (given: {text})")


def models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """The config classes that a field's annotation mentions."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple, dict):
        for argument in get_args(annotation):
            yield from models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def dumps(table: Mapping[str, Any], name: str = "") -> str:
    """A table as TOML, plain keys before sub-tables; a None, which TOML lacks, is left out."""
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{_key(k)} = {_literal(v)}" for k, v in plain.items() if v is not None]
    text = "\n".join(lines) + "\n" if lines else ""
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = f"{name}.{_key(key)}" if name else _key(key)
            text += ("\n" if text else "") + dumps(value, inner)
    return text


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items() if v is not None)
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(one) for one in value) + "]"
    if isinstance(value, float):
        return repr(value)  # JSON has no inf and nan
    return json.dumps(value if isinstance(value, int) else str(value), ensure_ascii=False)
