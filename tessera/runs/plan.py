"""A recipe against what is on disk: every config checked, every input found, every run known.

Planning reads and writes nothing but manifests and configs, so `tessera check` is this and no
more, and a mistake in the last stage is found before the first one runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tessera.runs.recipe import Recipe, RecipeError, StageSpec, dumps, validate
from tessera.runs.redo import aside, holds_no_work, read_mark
from tessera.runs.run import Manifest, fingerprint_path, read_manifest, run_fingerprint
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
# What a table may also name for a kind, though nothing takes it unnamed.
ALSO = {("frontier", "architecture")}


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    needs: `data` comes from the nearest run before that gives data; `data?` may be absent;
    `model=` is taken only where the table names it; `models*` is a list in the table. `parent`
    and `teacher` are models made by a `parent` stage.
    paths: config keys that may name files outside; what those hold is part of the fingerprint.
    together: every process of the job works on it; otherwise the main one, and the others wait.
    """

    name: str
    module: str
    config: str
    needs: tuple[str, ...]
    gives: str
    function: str = "stage"
    paths: tuple[str, ...] = ()
    together: bool = False


@dataclass(frozen=True)
class Step:
    """One stage of a recipe, resolved: what it is given, what it will be known by, what to do."""

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

    def reads(self, path: Path) -> bool:
        """True when this step has that run among its inputs."""
        return path in flat(self.inputs)


def flat(inputs: Mapping[str, Input]) -> list[Path]:
    """All paths among inputs."""
    lists = [value if isinstance(value, list) else [value] for value in inputs.values()]
    return [path for paths in lists for path in paths if path is not None]


def plan(
    recipe: Recipe,
    runs_dir: Path,
    redo: Sequence[str],
    stages: Mapping[str, Stage],
) -> list[Step]:
    """Every stage of a recipe resolved, and what running it would do; runs and writes nothing.

    A stage in `redo` of which the new run is here, and not yet all that follows from it, is not
    begun again: that command was stopped, and this one goes on.
    Raises RecipeError or RunError for whatever can be known to be wrong beforehand.
    """
    names = [spec.name for spec in recipe.stages]
    for name in redo:
        if name not in names:
            raise RecipeError(
                f"--redo {name}: the recipe has no such stage; {nearest(name, names)}"
            )
    steps: list[Step] = []
    for spec in recipe.stages:
        steps.append(_resolve(spec, recipe, runs_dir, steps, stages))
    named = [name for name in redo if not _under_way(name, steps)]
    decided: list[Step] = []
    for step in steps:
        decided.append(replace(step, action=_action(step, named, decided)))
    return decided


def _under_way(name: str, steps: Sequence[Step]) -> bool:
    """True when a redo of this stage, by the same recipe, has begun it and has not ended."""
    step = next(step for step in steps if step.name == name)
    known = step.manifest and step.manifest.fingerprint
    if known != step.fingerprint or read_mark(step.path):
        return False
    marks = [read_mark(path) for one in steps for path in (one.path, aside(one.path))]
    return any(mark and name in mark.named for mark in marks)


def _resolve(
    spec: StageSpec,
    recipe: Recipe,
    runs_dir: Path,
    before: Sequence[Step],
    stages: Mapping[str, Stage],
) -> Step:
    if spec.stage not in stages:
        raise RecipeError(
            f"[{spec.name}]: there is no stage {spec.stage!r}; {nearest(spec.stage, stages)}"
        )
    stage = stages[spec.stage]
    later = [one.name for one in recipe.stages[len(before) :]]
    inputs = resolve_inputs(spec, stage, before, later, stages)
    table = {key: value for key, value in spec.table.items() if key not in inputs}
    config = validate(
        getattr(importlib.import_module(stage.module), stage.config), table, spec.name
    )
    files = {key: _outside(getattr(config, key, None)) for key in stage.paths}
    known = {step.path: step.fingerprint for step in before}
    prints = {need: _prints(value, known) for need, value in {**inputs, **files}.items()}
    dumped = config.model_dump(mode="json")
    path = runs_dir / recipe.name / spec.name
    identity = run_fingerprint(stage.name, dumped, recipe.seed, prints)
    manifest = read_manifest(path) if (path / "run.json").is_file() else None
    return Step(spec, stage, config, path, recipe.seed, inputs, files, identity, "run", manifest)


def _action(step: Step, named: Sequence[str], before: Sequence[Step]) -> Action:
    """What running a step does; `before` are those above it, decided."""
    if step.name in named or any(s.action == "redo" and step.reads(s.path) for s in before):
        return "redo"
    manifest, mark = step.manifest, read_mark(step.path)
    if manifest is None:
        return "run"
    same = manifest.fingerprint == step.fingerprint
    if mark:
        begun = {s.name: s.manifest.started if s.manifest else "" for s in before}
        if mark.becomes == step.fingerprint or (same and mark.outdated(begun)):
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
    for mark in stage.needs:
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
    if (path / "run.json").is_file():
        made = stages.get(read_manifest(path).stage)
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
    lines = []
    if manifest.stage != step.stage.name:
        lines.append(f"  stage: {manifest.stage} -> {step.stage.name}")
    if manifest.seed != step.seed:
        lines.append(f"  seed: {manifest.seed} -> {step.seed}")
    lines += _diff(manifest.config, step.resolved, f"{step.name}.")
    if not lines:
        lines.append("  the config is the same, and what it is made from is not")
    return (
        f"{step.path} is {manifest.status}, and the recipe has changed under it:\n"
        + "\n".join(lines)
        + f"\nUndo the change, or make that run and what follows from it anew: --redo {step.name}"
    )


def _diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += _diff(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"  {prefix}{key}: {before!r} -> {after!r}")
    return lines
