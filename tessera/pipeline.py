"""Which stages there are, in the order of the paper, and how a recipe of them is run.

A stage is a function at the bottom of a file, `stage(config, run, inputs)`. Before anything
runs, the whole recipe is planned: every config checked, every input found, every fingerprint
known. Then finished stages are skipped, unfinished ones resumed, and a stage that changed under
an existing run stops everything with a diff. It is `make` for models.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tessera import dist
from tessera.progress import clock
from tessera.runs.files import FailureError, RunError
from tessera.runs.plan import Stage, Step, explain_change, plan, table_text
from tessera.runs.recipe import Recipe, RecipeError, nearest
from tessera.runs.redo import Mark, mark_all, replacing, settle, withdraw_marks
from tessera.runs.run import Run

_ROWS = (
    Stage("data", "tessera.data.prepare", "DataConfig", ("model=",), "data", paths=("files",)),
    Stage(
        "parent",
        "tessera.puzzle.parent",
        "ParentConfig",
        ("data?",),
        "model",
        paths=("path",),
        together=True,
    ),
    Stage("bld", "tessera.puzzle.bld", "BLDConfig", ("parent", "data"), "library", together=True),
    Stage("merge", "tessera.puzzle.library", "MergeConfig", ("libraries*",), "library", "merge"),
    Stage(
        "score",
        "tessera.puzzle.score",
        "ScoreConfig",
        ("parent", "library", "data"),
        "scores",
        paths=("files",),
    ),
    Stage("cost", "tessera.puzzle.cost", "CostConfig", ("parent", "library"), "costs"),
    Stage(
        "cost_vllm",
        "tessera.puzzle.vllm_cost",
        "VLLMCostConfig",
        ("parent", "library"),
        "costs",
    ),
    Stage(
        "search",
        "tessera.puzzle.search",
        "SearchConfig",
        ("parent", "scores", "costs", "library?", "data?"),
        "architecture",
    ),
    Stage(
        "couple",
        "tessera.puzzle.couple",
        "CoupleConfig",
        ("parent", "library", "searches*", "data"),
        "library",
        together=True,
    ),
    Stage(
        "race",
        "tessera.puzzle.race",
        "RaceConfig",
        ("parent", "library", "searches*", "data"),
        "architecture",
        together=True,
    ),
    Stage(
        "frontier",
        "tessera.puzzle.frontier",
        "FrontierConfig",
        ("parent", "library", "scores", "costs", "data"),
        "frontier",
    ),
    Stage(
        "child",
        "tessera.puzzle.library",
        "ChildConfig",
        ("parent", "library", "architecture"),
        "model",
    ),
    Stage("fuse", "tessera.puzzle.fuse", "FuseConfig", ("model", "data"), "model"),
    Stage(
        "kd",
        "tessera.objectives.kd",
        "KDConfig",
        ("model", "teacher", "data"),
        "model",
        together=True,
    ),
    Stage(
        "cpt",
        "tessera.objectives.lm",
        "CPTConfig",
        ("model", "data"),
        "model",
        "cpt",
        together=True,
    ),
    Stage(
        "curate",
        "tessera.curate.runner",
        "CurateConfig",
        ("model=",),
        "chats",
        paths=("files",),
        together=True,
    ),
    Stage(
        "sft",
        "tessera.objectives.lm",
        "SFTConfig",
        ("model", "data"),
        "model",
        "sft",
        together=True,
    ),
    Stage(
        "profile",
        "tessera.rl.profile",
        "ProfileConfig",
        ("model",),
        "prompts",
        paths=("paths",),
    ),
    Stage(
        "grpo",
        "tessera.rl.policy",
        "GRPOConfig",
        ("model", "prompts"),
        "model",
        "grpo",
        together=True,
    ),
    Stage(
        "rloo",
        "tessera.rl.policy",
        "RLOOConfig",
        ("model", "prompts"),
        "model",
        "rloo",
        together=True,
    ),
    Stage(
        "rpo",
        "tessera.rl.preference",
        "RPOConfig",
        ("model", "prompts?"),
        "model",
        "rpo",
        paths=("paths",),
        together=True,
    ),
    Stage(
        "compare", "tessera.puzzle.compare", "CompareConfig", ("parent", "models*", "data"), "table"
    ),
    Stage("eval", "tessera.eval.evaluate", "EvalConfig", ("model",), "table"),
    Stage("export", "tessera.export.write", "ExportConfig", ("model",), "directory"),
)
STAGES: dict[str, Stage] = {row.name: row for row in _ROWS}


def run_recipe(
    recipe: Recipe,
    runs_dir: str | Path = "runs",
    *,
    only: Sequence[str] | None = None,
    redo: Sequence[str] = (),
    quiet: bool = False,
    stages: Mapping[str, Stage] = STAGES,
) -> list[Step]:
    """Brings every stage of a recipe to `done`, or those named in `only`; returns their steps.

    `redo` makes the runs of the stages named, and of all that were made from them, anew: each is
    kept until its own stage has made another. A run of another config that stopped before it
    made anything is deleted without being named.
    Raises RunError with a diff where a recipe changed under a run, before anything is run.
    """
    with dist.processes(), _sigterm_interrupts():
        steps = _settled(recipe, Path(runs_dir), redo, stages)
        chosen = _choose(steps, only)
        for step in chosen:
            if step.action == "changed":
                raise RunError(explain_change(step))
        # Also what is not run now: made from a measurement that is gone, it would look done.
        again = [step for step in steps if step.action == "redo"]
        if dist.is_main():
            marks = {s.path: _mark(s, again, redo, only) for s in again if s.path.exists()}
            mark_all(marks, [step.path for step in steps if _abandoned(step, chosen)])
        dist.barrier()
        with _withdrawn_on_error(steps):
            for number, step in enumerate(chosen, 1):
                _bring_about(step, f"[{number}/{len(chosen)}] {step.name}", quiet)
                dist.barrier()
    return chosen


def _settled(
    recipe: Recipe, runs_dir: Path, redo: Sequence[str], stages: Mapping[str, Stage]
) -> list[Step]:
    """The plan, once what a killed process left half replaced has been put in order."""
    steps = dist.broadcast(plan(recipe, runs_dir, redo, stages))
    ended = [settle(s.path, s.fingerprint) for s in steps] if dist.is_main() else []
    if dist.broadcast(any(ended)):
        steps = dist.broadcast(plan(recipe, runs_dir, redo, stages))
    return steps


def _mark(
    step: Step, again: Sequence[Step], redo: Sequence[str], only: Sequence[str] | None
) -> Mark:
    inputs = {
        one.name: one.manifest.started if one.manifest else ""
        for one in again
        if step.reads(one.path)
    }
    # What --only leaves out does not keep a stage from being redone by the same words again.
    named = tuple(redo) if only is None or step.name in redo else ()
    return Mark(named=named, becomes=step.fingerprint, inputs=inputs)


@contextmanager
def _withdrawn_on_error(steps: Sequence[Step]) -> Iterator[None]:
    """Leaves no mark on what a redo that failed has not come to, unless it is outdated already."""
    try:
        yield
    except Exception:
        if dist.is_main():
            withdraw_marks([step.path for step in steps])
        raise


def _abandoned(step: Step, chosen: Sequence[Step]) -> bool:
    """True for a run of another config that made nothing, and whose stage runs now."""
    return step in chosen and step.action == "run" and step.manifest is not None


def _choose(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps to bring about; every input from outside of them must be done already."""
    if only is None:
        return list(steps)
    names = [step.name for step in steps]
    for name in only:
        if name not in names:
            raise RecipeError(
                f"--only {name}: the recipe has no such stage; {nearest(name, names)}"
            )
    chosen = [step for step in steps if step.name in only]
    for step in chosen:
        for other in steps:
            if step.reads(other.path) and other not in chosen and other.action != "skip":
                raise RunError(
                    f"{step.name} needs {other.name}, which is not finished as the recipe says "
                    f"now; run without --only, or with --only {other.name} too"
                )
    return chosen


def _bring_about(step: Step, title: str, quiet: bool) -> None:
    say = _quiet if quiet or not dist.is_main() else _loud
    if step.action == "skip":
        assert step.manifest is not None
        say(f"{title}: done before, in {clock(step.manifest.seconds)}")
        return
    say(f"{title}: {'going on' if step.action == 'resume' else 'running'}")
    begun = time.monotonic()
    function = getattr(importlib.import_module(step.stage.module), step.stage.function)
    inputs = {**step.inputs, **step.files}
    kept = replacing(step.path, step.action == "redo") if dist.is_main() else nullcontext()
    with (
        kept,
        Run.open(
            step.path,
            stage=step.stage.name,
            config=step.resolved,
            inputs=inputs,
            seed=step.seed,
            quiet=quiet,
        ) as run,
    ):
        run.write_file("recipe.toml", table_text(step))
        with _peers_alive(step.name):
            if step.stage.together or dist.is_main():
                function(step.config, run, step.inputs)
            dist.barrier()
        run.finish()
    say(f"{title}: done in {clock(time.monotonic() - begun)}")


@contextmanager
def _peers_alive(name: str) -> Iterator[None]:
    """Turns the error of a collective whose other side is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if not dist.lost_peer(error):
            raise
        raise FailureError(
            f"{name}: process {dist.rank()} of {dist.world()} lost another one "
            f"({str(error).splitlines()[0]}). What ended that one is said by it, or by torchrun; "
            "the same command again goes on from the last state saved"
        ) from error


def _loud(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quiet(text: str) -> None:
    pass


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: recorded, its state kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
