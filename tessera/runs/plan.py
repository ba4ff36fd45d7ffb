"""A recipe against what is on disk: every config checked, every input found, every run known.

Planning reads and writes nothing but manifests and configs, so `tessera check` is this and no
more, and a mistake in the last stage is found before the first one runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

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
    are models made by a `parent` stage.
    module: relative to tessera (".puzzle.bld"), or absolute; it holds the config class `config` and
    the function `function(config, run, inputs)`.
    paths: config keys that may name files outside; the files' contents are part of the fingerprint.
    together: every process of the job works on it; otherwise the main one, and the others wait.
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
        """The needs' names: keys of a table that name inputs and are not the config's."""
        return {need.rstrip("?=*") for need in self.needs.split()}

    def validate(self, spec: StageSpec) -> BaseModel:
        """The config of a table without its inputs. Raises RecipeError."""
        keys = self.keys()
        table = {key: value for key, value in spec.table.items() if key not in keys}
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
    def resolved(self) -> dict[str, Any]:
        """The config with every default spelled out, as JSON values."""
        return self.config.model_dump(mode="json")

    @property
    def outdated(self) -> bool:
        """True where an input has been made anew, or deleted, since this run was begun.

        An input that the recipe no longer names is a change of the recipe, not an outdated run.
        """
        listed = self.manifest.inputs.values() if self.manifest else ()
        inputs = [one for refs in listed for one in (refs if isinstance(refs, list) else [refs])]
        times = {
            (self.path.parent / one["path"]).resolve(): one["started"]
            for one in inputs
            if one and "started" in one
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


def flat(inputs: Mapping[str, Input]) -> list[Path]:
    """All paths among inputs."""
    lists = [value if isinstance(value, list) else [value] for value in inputs.values()]
    return [path for paths in lists for path in paths if path is not None]


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
    """Every stage of a recipe resolved, and what running it would do; runs and writes nothing.

    A stage in `redo` that has been redone, while what follows from it (of `only`) has not, is kept:
    an earlier command was stopped, and this one finishes it.
    Raises RecipeError or RunError for whatever can be known to be wrong beforehand.
    """
    recipe = with_defaults(recipe, stages)
    names = [spec.name for spec in recipe.stages]
    for name in redo:
        if name not in names:
            raise RecipeError(
                f"--redo {name}: the recipe has no such stage; {nearest(name, names)}"
            )
    steps: list[Step] = []
    for spec in recipe.stages:
        steps.append(_resolve(spec, recipe, runs_dir, steps, stages))
    begun = {name for name in redo if _under_way(name, steps, only)}
    following = _following(begun, steps)
    decided: list[Step] = []
    for step in steps:
        anew = step.name in redo and step.name not in begun
        anew = anew or any(s.action == "redo" and step.reads(s.path) for s in decided)
        action = "redo" if anew else _action(step, step in following)
        decided.append(replace(step, action=action))
    return decided


def with_defaults(recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
    """The recipe with each stage's table completed from `[defaults]`.

    Raises RecipeError for a stage that there is not, and for a default that no stage has a key for.
    """
    for spec in recipe.stages:
        if spec.stage not in stages:
            raise RecipeError(
                f"[{spec.name}]: there is no stage {spec.stage!r}; {nearest(spec.stage, stages)}"
            )
    specs, allowed = [], set[str]()
    for spec in recipe.stages:
        stage = stages[spec.stage]
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

    A default that is a table completes one that is there or required: it switches nothing on.
    """
    result = dict(table)
    for key, info in config.model_fields.items():
        path = f"{where}.{key}"
        allowed.add(path)
        value = defaults.get(key)
        inner = next(iter(models_in(info.annotation)), None)
        if isinstance(value, dict) and inner:
            own = table.get(key, {})
            completed = (
                _completed(own, value, inner, path, allowed) if isinstance(own, dict) else own
            )
            if key in table or (completed and info.default is not None):
                result[key] = completed
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


def _resolve(
    spec: StageSpec,
    recipe: Recipe,
    runs_dir: Path,
    before: Sequence[Step],
    stages: Mapping[str, Stage],
) -> Step:
    stage = stages[spec.stage]
    later = [one.name for one in recipe.stages[len(before) :]]
    inputs = resolve_inputs(spec, stage, before, later, stages)
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


def resolve_inputs(
    spec: StageSpec,
    stage: Stage,
    before: Sequence[Step],
    later: Sequence[str],
    stages: Mapping[str, Stage],
) -> dict[str, Input]:
    """Where each of a stage's needs comes from. Raises RecipeError for one that nothing gives."""
    inputs: dict[str, Input] = {}
    for mark in stage.needs.split():
        need = mark.rstrip("?=*")
        kind = KINDS.get(need, need)
        given = spec.table.get(need)
        where = f"{spec.name}.{need}"
        if mark.endswith("*"):
            if not isinstance(given, list) or not given:
                raise RecipeError(f'{where}: give a list of runs, e.g. {need} = ["child", "kd"]')
            inputs[need] = [_named(one, kind, where, before, later, stages) for one in given]
        elif given is not None:
            inputs[need] = _named(given, kind, where, before, later, stages)
        else:
            inputs[need] = None if mark.endswith("=") else _nearest_before(need, kind, before)
            if inputs[need] is None and mark == need:
                raise RecipeError(
                    f"{where}: nothing above [{spec.name}] gives this; add its stage above, or "
                    f'say {need} = "RUN OR PATH"'
                )
    return inputs


def _nearest_before(need: str, kind: str, before: Sequence[Step]) -> Path | None:
    origin = need in ("parent", "teacher")
    fits = (s for s in reversed(before) if s.stage.gives == kind)
    return next((s.path for s in fits if not origin or s.stage.name == "parent"), None)


def _named(
    given: Any,
    kind: str,
    where: str,
    before: Sequence[Step],
    later: Sequence[str],
    stages: Mapping[str, Stage],
) -> Path:
    """The directory that a table's `NEED = "run or path"` means."""
    if not isinstance(given, str):
        raise RecipeError(f"{where}: {given!r} is neither a run of this recipe nor a path")
    steps = {step.name: step for step in before}
    if given in steps:
        step = steps[given]
        if not _fits(step.stage.gives, kind):
            raise RecipeError(f"{where}: [{given}] gives {step.stage.gives}, and this needs {kind}")
        return step.path
    if given in later:
        raise RecipeError(f"{where}: [{given}] is not above this stage; move it up")
    path = Path(given)
    if not path.exists():
        raise RecipeError(
            f"{where}: {given!r} is no run above and no path; {nearest(given, steps)}"
        )
    if run := find_manifest(path):
        made = stages.get(run.stage)
        if made and not _fits(made.gives, kind):
            raise RecipeError(f"{where}: the run {given} gives {made.gives}, and this needs {kind}")
    return path


def _fits(given: str, kind: str) -> bool:
    return given == kind or (given, kind) in ALSO


def table_text(step: Step) -> str:
    """A step's table in TOML: its inputs by name or path, then its config, defaults included."""
    home = step.path.parent
    shown = {
        need: [_shown(path, home) for path in value]
        if isinstance(value, list)
        else _shown(value, home)
        for need, value in step.inputs.items()
        if value is not None
    }
    return dumps({"stage": step.stage.name, **shown, **step.resolved}, step.name)


def _shown(path: Path, home: Path) -> str:
    return path.name if path.parent == home else str(path)


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
    made = identity(step.config)
    return _diff(old, new, new) + _diff(manifest.config, step.resolved, made, f"{step.name}.")


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
