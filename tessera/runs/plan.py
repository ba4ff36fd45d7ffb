"""A recipe against what is on disk: every config checked, every input found, every run known.

Planning reads manifests and configs and writes nothing; `tessera check` prints its result.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tessera import dist
from tessera.runs.recipe import (
    Recipe,
    RecipeError,
    StageSpec,
    dumps,
    identity,
    models_in,
    validate,
)
from tessera.runs.run import (
    Manifest,
    aside,
    find_manifest,
    fingerprint_path,
    holds_no_work,
    run_fingerprint,
)
from tessera.table import nearest

Input = Path | list[Path] | None
Action = Literal["run", "resume", "skip", "redo", "changed"]
KINDS = {
    "parent": "model",
    "teacher": "model",
    "models": "model",
    "searches": "architecture",
    "libraries": "library",
}
# What a table may also name for a kind, though no stage takes it unnamed.
ALSO = {("frontier", "architecture")}


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    needs: `data` comes from the nearest run above that gives data; `data?` may be absent; `model=`
    is taken only where the table names it; `models*` is a list in the table. `parent` and `teacher`
    are models made by a `parent` stage. module: relative to tessera (".puzzle.bld"), or absolute;
    it holds the class `config` and `function(config, run, inputs)`. paths: config keys that may
    name files; their contents are part of the fingerprint. together: every process of the job
    works on it; otherwise the main one, and the others wait.
    """

    name: str
    needs: str
    gives: str
    module: str
    config: str
    function: str = "stage"
    paths: tuple[str, ...] = ()
    together: bool = False

    def load(self, name: str) -> Any:
        """The config class or the function of this stage, by name."""
        return getattr(importlib.import_module(self.module, "tessera"), name)

    def keys(self) -> set[str]:
        """Keys of a table that are not the config's: the needs' names, and where it computes."""
        own = set() if "device" in self.load(self.config).model_fields else {"device"}
        return own | {need.rstrip("?=*") for need in self.needs.split()}

    def validate(self, spec: StageSpec) -> BaseModel:
        """The config of a table without its inputs. Raises RecipeError."""
        table = {k: value for k, value in spec.table.items() if k not in self.keys()}
        device = spec.table.get("device", "cpu")
        if "device" in self.keys() and device not in dist.KINDS:
            raise RecipeError(f"{spec.name}.device: {device!r}; {nearest(str(device), dist.KINDS)}")
        return validate(self.load(self.config), table, spec.name)


@dataclass(frozen=True)
class Step:
    """One stage of a recipe, resolved: its inputs, its fingerprint, and what running it does."""

    spec: StageSpec
    stage: Stage
    config: BaseModel
    path: Path
    seed: int
    inputs: dict[str, Input]
    files: dict[str, Input]
    fingerprint: str
    action: Action
    manifest: Manifest | None = field(repr=False, default=None)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def device(self) -> str | None:
        """The kind of device that the table says it computes on (`dist.KINDS`)."""
        return self.spec.table.get("device") if "device" in self.stage.keys() else None

    @property
    def resolved(self) -> dict[str, Any]:
        """The config with every default spelled out, as JSON values."""
        return self.config.model_dump(mode="json")

    @property
    def outdated(self) -> bool:
        """True where an input that the recipe still names was made anew, or deleted, since."""
        times = {
            (self.path.parent / one["path"]).resolve(): one["started"]
            for one in flat(self.manifest.inputs if self.manifest else {})
            if "started" in one
        }
        current = {path.resolve() for path in flat({**self.inputs, **self.files})}
        now = {path: find_manifest(path) for path in times.keys() & current}
        return any(run is None or run.started != times[path] for path, run in now.items())

    def reads(self, path: Path) -> bool:
        """True when this step has that run among its inputs."""
        return path in flat(self.inputs)

    def warnings(self, steps: Sequence[Step]) -> list[str]:
        """What will fail or surprise, by `warnings(step, steps)` of its config; none when done."""
        warnings = getattr(self.config, "warnings", None)
        return warnings(self, steps) if warnings and self.action != "skip" else []

    def notes(self) -> list[str]:
        """What its config's `notes` says of settings that come from its inputs."""
        notes = getattr(self.config, "notes", None)
        return notes(self) if notes else []


def flat(inputs: Mapping[str, Any]) -> list[Any]:
    """All inputs, those in lists too, without absent ones."""
    lists = [value if isinstance(value, list) else [value] for value in inputs.values()]
    return [one for values in lists for one in values if one is not None]


def maker(path: Input, steps: Sequence[Step]) -> Step | None:
    """The step that makes a directory; None where it is from outside of the recipe."""
    return next((step for step in steps if step.path == path), None)


def plan(
    recipe: Recipe,
    runs_dir: Path,
    redo: Sequence[str],
    stages: Mapping[str, Stage],
    only: Sequence[str] | None = None,
) -> list[Step]:
    """Every stage of a recipe resolved, and what running it would do.

    A stage in `redo` that has been redone, while what follows from it (of `only`) has not, is kept:
    an earlier command was stopped, and this one finishes it.
    Raises RecipeError or RunError for whatever can be known to be wrong beforehand.
    """
    recipe = with_defaults(recipe, stages)
    names = [spec.name for spec in recipe.stages]
    for name in redo:
        if name not in names:
            raise RecipeError(f"--redo {name}: no such stage; {nearest(name, names)}")
    steps: list[Step] = []
    for spec in recipe.stages:
        steps.append(_resolved(spec, recipe, runs_dir, steps, stages))
    begun = {name for name in redo if _under_way(name, steps, only)}
    following = _following(begun, steps)
    decided: list[Step] = []
    for step in steps:
        anew = step.name in redo and step.name not in begun
        anew = anew or any(s.action == "redo" and step.reads(s.path) for s in decided)
        action = "redo" if anew else _action(step, step in following)
        decided.append(replace(step, action=action))
    return decided


def stage_of(spec: StageSpec, stages: Mapping[str, Stage]) -> Stage:
    """The stage of a table. Raises RecipeError where there is none."""
    if spec.stage not in stages:
        raise RecipeError(
            f"[{spec.name}]: there is no stage {spec.stage!r}; {nearest(spec.stage, stages)}"
        )
    return stages[spec.stage]


def with_defaults(recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
    """The recipe with each stage's table completed from `[defaults]`.

    Raises RecipeError for a stage that there is not, and for a default that no stage has a key for.
    """
    specs, allowed = [], set[str]()
    for spec in recipe.stages:
        stage = stage_of(spec, stages)
        given = {key: recipe.defaults[key] for key in stage.keys() & recipe.defaults.keys()}
        table = {**given, **spec.table}
        if recipe.defaults:
            config = stage.load(stage.config)
            table = _completed(table, recipe.defaults, config, "defaults", allowed)
            allowed |= {f"defaults.{key}" for key in stage.keys()}
        specs.append(replace(spec, table=table))
    if unknown := _paths(recipe.defaults, "defaults") - allowed:
        first = min(unknown)
        table, _, key = first.rpartition(".")
        keys = sorted(p.removeprefix(f"{table}.") for p in allowed if p.rpartition(".")[0] == table)
        raise RecipeError(f"{first}: no stage has such a key; {nearest(key, keys)}")
    return replace(recipe, stages=tuple(specs), defaults={})


def _completed(
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    config: type[BaseModel],
    where: str,
    allowed: set[str],
) -> dict[str, Any]:
    """A table with what `config` has of the defaults; adds the config's key paths to `allowed`.

    A default table completes one that is there or required: it switches nothing on.
    """
    result = dict(table)
    for key, info in config.model_fields.items():
        path = f"{where}.{key}"
        allowed.add(path)
        value = defaults.get(key)
        inner = next(iter(models_in(info.annotation)), None)
        if isinstance(value, dict) and inner:
            own = table.get(key, {})
            if isinstance(own, dict):
                own = _completed(own, value, inner, path, allowed)
            if key in table or (own and info.default is not None):
                result[key] = own
        elif key in defaults:
            allowed |= _paths(value, path)
            result.setdefault(key, value)
    return result


def _paths(value: Any, where: str) -> set[str]:
    """The dotted paths of a value and of all tables inside of it, without the outermost."""
    if not isinstance(value, dict):
        return set()
    found = {f"{where}.{key}" for key in value}
    return found.union(*(_paths(inner, f"{where}.{key}") for key, inner in value.items()))


def _following(names: Collection[str], steps: Sequence[Step]) -> list[Step]:
    """The steps named and all that are made from them."""
    found: list[Step] = []
    for step in steps:
        if step.name in names or any(step.reads(one.path) for one in found):
            found.append(step)
    return found


def _under_way(name: str, steps: Sequence[Step], only: Sequence[str] | None) -> bool:
    """True when a redo of this stage, by the same recipe, has replaced it and is not finished."""
    step = next(step for step in steps if step.name == name)
    if step.outdated or not step.manifest or step.manifest.fingerprint != step.fingerprint:
        return False
    left = [one for one in _following([name], steps) if only is None or one.name in only]
    return any(one.outdated or aside(one.path).exists() for one in left)


def _resolved(
    spec: StageSpec,
    recipe: Recipe,
    runs_dir: Path,
    before: Sequence[Step],
    stages: Mapping[str, Stage],
) -> Step:
    stage = stages[spec.stage]
    inputs = _inputs(spec, stage, before, recipe, stages)
    config = stage.validate(spec)
    files = {key: _outside(getattr(config, key, None)) for key in stage.paths}
    known = {step.path: step.fingerprint for step in before}
    prints = {need: _prints(value, known) for need, value in {**inputs, **files}.items()}
    path = runs_dir / recipe.name / spec.name
    fingerprint = run_fingerprint(stage.name, identity(config), recipe.seed, prints)
    run = find_manifest(path)
    return Step(spec, stage, config, path, recipe.seed, inputs, files, fingerprint, "run", run)


def _action(step: Step, follows: bool) -> Action:
    """What running a step does; `follows`: it is part of a redo that was stopped."""
    manifest = step.manifest
    if manifest is None:
        return "run"
    same = manifest.fingerprint == step.fingerprint
    if step.outdated and (same or follows or not _own_changes(step, manifest)):
        return "redo"
    if same:
        return "skip" if manifest.status == "done" else "resume"
    return "run" if manifest.status != "done" and holds_no_work(step.path) else "changed"


def _outside(value: Any) -> Input:
    """The files on disk that a config's value names; a hub id or a number names none."""
    if isinstance(value, list | tuple):
        return [path for one in value if (path := _outside(one)) and isinstance(path, Path)]
    exists = isinstance(value, str | Path) and Path(value).exists()
    return Path(value) if exists else None


def _prints(value: Input, known: Mapping[Path, str]) -> Any:
    if isinstance(value, list):
        return [_prints(one, known) for one in value]
    return value and (known.get(value) or fingerprint_path(value))


def _inputs(
    spec: StageSpec,
    stage: Stage,
    before: Sequence[Step],
    recipe: Recipe,
    stages: Mapping[str, Stage],
) -> dict[str, Input]:
    """Where each of a stage's needs comes from. Raises RecipeError for one that nothing gives."""
    steps = {step.name: step for step in before}
    later = [one.name for one in recipe.stages[len(before) :]]

    def named(given: Any, kind: str, where: str) -> Path:
        """The directory that a table's `NEED = "run or path"` means."""
        if not isinstance(given, str):
            raise RecipeError(f"{where}: {given!r} is neither a run of this recipe nor a path")
        if given in later:
            raise RecipeError(f"{where}: [{given}] is not above this stage; move it up")
        if given in steps:
            path, made = steps[given].path, steps[given].stage
        else:
            path = Path(given)
            if not path.exists():
                raise RecipeError(
                    f"{where}: {given!r} is no run above and no path; {nearest(given, steps)}"
                )
            run = find_manifest(path)
            made = stages.get(run.stage) if run else None
        if made and made.gives != kind and (made.gives, kind) not in ALSO:
            raise RecipeError(f"{where}: [{given}] gives {made.gives}, and this needs {kind}")
        return path

    inputs: dict[str, Input] = {}
    for mark in stage.needs.split():
        need = mark.rstrip("?=*")
        kind = KINDS.get(need, need)
        given = spec.table.get(need)
        where = f"{spec.name}.{need}"
        if mark.endswith("*"):
            if not isinstance(given, list) or not given:
                raise RecipeError(f'{where}: give a list of runs, e.g. {need} = ["child", "kd"]')
            inputs[need] = [named(one, kind, where) for one in given]
        elif given is not None:
            inputs[need] = named(given, kind, where)
        else:
            found = None
            if not mark.endswith("="):  # the nearest above
                origin = need in ("parent", "teacher")
                fits = (s for s in reversed(before) if s.stage.gives == kind)
                found = next((s.path for s in fits if not origin or s.stage.name == "parent"), None)
            inputs[need] = found
            if inputs[need] is None and mark == need:
                raise RecipeError(
                    f"{where}: nothing above [{spec.name}] gives this; add its stage above, or "
                    f'say {need} = "RUN OR PATH"'
                )
    return inputs


def table_text(step: Step) -> str:
    """A step's table in TOML: its inputs by name or path, then its config, defaults included."""

    def shown(value: Path | list[Path]) -> Any:
        if isinstance(value, list):
            return [shown(path) for path in value]
        return value.name if value.parent == step.path.parent else str(value)

    inputs = {need: shown(value) for need, value in step.inputs.items() if value is not None}
    first = {"stage": step.stage.name, **({"device": step.device} if step.device else {})}
    return dumps({**first, **inputs, **step.resolved}, step.name)


def explain_change(step: Step) -> str:
    """The diff of a step against the run that stands in its place, and what to do."""
    manifest = step.manifest
    assert manifest is not None
    lines = _own_changes(step, manifest) or ["the config is the same, and an input is not"]
    return (
        f"{step.path} is {manifest.status}, and the recipe has changed under it:\n"
        + "".join(f"  {line}\n" for line in lines)
        + f"Undo the change, or make that run and what follows from it anew: --redo {step.name}"
    )


def _own_changes(step: Step, manifest: Manifest) -> list[str]:
    """Lines on stage, seed and config where they differ from the run's; inputs are left out."""
    old = {"stage": manifest.stage, "seed": manifest.seed}
    new = {"stage": step.stage.name, "seed": step.seed}
    config = identity(step.config)
    return _diff(old, new, new) + _diff(manifest.config, step.resolved, config, f"{step.name}.")


def _diff(
    old: Mapping[str, Any], new: Mapping[str, Any], made: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Lines on what differs, but for keys of `new` that `made` lacks."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if key in new and key not in made:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += _diff(before, after, made[key], f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
