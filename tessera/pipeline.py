"""Which stages there are, in the order of the paper, and how a recipe of them is run.

The whole recipe is planned first. Then finished stages are skipped, unfinished ones resumed; a
stage that changed under an existing run stops everything with a diff, before anything is run.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tessera import dist
from tessera.progress import quietly, tell
from tessera.runs.files import FailureError, Lock, RunError, remove_directories
from tessera.runs.plan import Stage, Step, explain_change, plan, table_text
from tessera.runs.recipe import Recipe, RecipeError, identity
from tessera.runs.run import Run, replacing_run, settle
from tessera.table import clock, nearest

# Seconds that each stage will take, by name, and the sentence that says so.
Expect = Callable[[], Mapping[str, tuple[float, str]]]

# A row: name, needs, gives; module, config class, how it runs.
# fmt: off
_ROWS = (
    Stage("data", "model= chats=", "data", ".data.prepare", "DataConfig", paths=("files",)),
    Stage("parent", "data?", "model",
          ".puzzle.parent", "ParentConfig", paths=("path",), together=True),
    Stage("bld", "parent data", "library", ".puzzle.bld", "BLDConfig", together=True),
    Stage("merge", "libraries*", "library", ".puzzle.library", "MergeConfig", function="merge"),
    Stage("score", "parent library data", "scores",
          ".puzzle.score", "ScoreConfig", paths=("files",), together=True),
    Stage("cost", "parent library", "costs", ".puzzle.cost", "CostConfig"),
    Stage("cost_vllm", "parent library", "costs", ".puzzle.vllm_cost", "VLLMCostConfig"),
    Stage("search", "parent scores costs library? data?", "architecture",
          ".puzzle.search", "SearchConfig", together=True),
    Stage("couple", "parent library searches* data", "library",
          ".puzzle.bld", "CoupleConfig", function="couple", together=True),
    Stage("race", "parent library searches* data", "architecture",
          ".puzzle.race", "RaceConfig", together=True),
    Stage("frontier", "parent library scores costs data", "frontier",
          ".puzzle.frontier", "FrontierConfig", together=True),
    Stage("child", "parent library architecture", "model", ".puzzle.library", "ChildConfig"),
    Stage("fuse", "model data", "model", ".puzzle.fuse", "FuseConfig", together=True),
    Stage("kd", "model teacher data", "model", ".objectives.kd", "KDConfig", together=True),
    Stage("cpt", "model data", "model",
          ".objectives.lm", "CPTConfig", function="cpt", together=True),
    Stage("curate", "model=", "chats",
          ".curate.runner", "CurateConfig", paths=("files",), together=True),
    Stage("sft", "model data", "model",
          ".objectives.lm", "SFTConfig", function="sft", together=True),
    Stage("profile", "model chats=", "prompts",
          ".rl.profile", "ProfileConfig", paths=("paths",), together=True),
    Stage("grpo", "model prompts", "model",
          ".rl.policy", "GRPOConfig", function="grpo", together=True),
    Stage("rloo", "model prompts", "model",
          ".rl.policy", "RLOOConfig", function="rloo", together=True),
    Stage("gkd", "model teacher prompts", "model",
          ".rl.policy", "GKDConfig", function="gkd", together=True),
    Stage("rpo", "model prompts?", "model",
          ".rl.preference", "RPOConfig", function="rpo", paths=("paths",), together=True),
    Stage("compare", "parent models* data", "table",
          ".puzzle.compare", "CompareConfig", together=True),
    Stage("eval", "model", "table", ".eval.evaluate", "EvalConfig", together=True),
    Stage("export", "model", "directory", ".export.write", "ExportConfig"),
)
# fmt: on
STAGES: dict[str, Stage] = {row.name: row for row in _ROWS}


def run_recipe(
    recipe: Recipe,
    runs_dir: str | Path = "runs",
    *,
    only: Sequence[str] | None = None,
    redo: Sequence[str] = (),
    quiet: bool = False,
    stages: Mapping[str, Stage] = STAGES,
    expect: Expect | None = None,
) -> list[Step]:
    """Brings every stage of a recipe to `done`, or those named in `only`; returns their steps.

    `redo` makes the runs of the stages named, and of all that were made from them, anew: each is
    kept until its own stage has made another. A run of another config that stopped before it
    made anything is deleted. expect: asked before each stage how long it and the others take.
    Raises RunError with a diff where a recipe changed under a run.
    """
    with dist.processes(), _sigterm_interrupts(), quietly(quiet):
        steps = dist.broadcast(plan(recipe, Path(runs_dir), redo, stages, only))
        ended = [settle(step.path, step.fingerprint) for step in steps] if dist.is_main() else []
        if dist.broadcast(any(ended)):  # what a killed process left half replaced is in order now
            steps = dist.broadcast(plan(recipe, Path(runs_dir), redo, stages, only))
        chosen = _choose(steps, only)
        for step in chosen:
            if step.action == "changed":
                raise RunError(explain_change(step))
        if dist.is_main():
            _claim(steps, chosen)
        dist.barrier()
        say = _printer(quiet)
        for step in chosen:
            for warning in step.warnings(steps):
                say(f"{step.name}: WARNING: {warning}")
        left = _Left(chosen, expect) if expect and dist.world() == 1 else None
        for number, step in enumerate(chosen, 1):
            told = left.before(number - 1) if left and step.action != "skip" else ""
            begun = time.monotonic()
            _bring_about(step, f"[{number}/{len(chosen)}] {step.name}", quiet, told)
            if left and step.action != "skip":
                left.took(time.monotonic() - begun)
            dist.barrier()
    return chosen


class _Left:
    """How long the stages that are left will take: as estimated, times how much longer than
    estimated those took that were run."""

    def __init__(self, steps: Sequence[Step], expect: Expect) -> None:
        self.steps, self.expect = steps, expect
        self.taken = self.expected = self.next = 0.0

    def before(self, number: int) -> str:
        """What is told before a stage; nothing where the time of no stage is known."""
        found = self.expect()
        here = [found[step.name] for step in self.steps[number:] if step.action != "skip"
                and step.name in found]  # fmt: skip
        name = self.steps[number].name
        self.next = found[name][0] if name in found else 0.0
        if not here:
            return ""
        factor = self.taken / self.expected if self.expected else 1.0
        whole = clock(factor * sum(seconds for seconds, _ in here))
        return f", {found[name][1]}; about {whole} to the recipe's end" if self.next else ""

    def took(self, seconds: float) -> None:
        if self.next:
            self.taken, self.expected = self.taken + seconds, self.expected + self.next


def _claim(steps: Sequence[Step], chosen: Sequence[Step]) -> None:
    """Deletes chosen runs of another config that made nothing.

    Raises RunError, with nothing deleted, where a process works on a run that is to be redone.
    """
    with ExitStack() as held:
        for step in steps:
            if step.action == "redo" and step.path.exists():
                held.enter_context(Lock(step.path))
        remove_directories(*(s.path for s in chosen if s.action == "run" and s.manifest))


def _choose(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps to bring about; every input from outside of them must be done already."""
    if only is None:
        return list(steps)
    names = [step.name for step in steps]
    for name in only:
        if name not in names:
            raise RecipeError(f"--only {name}: no such stage; {nearest(name, names)}")
    chosen = [step for step in steps if step.name in only]
    for step in chosen:
        for other in steps:
            if step.reads(other.path) and other not in chosen and other.action != "skip":
                raise RunError(
                    f"{step.name} needs {other.name}, which is not finished as the recipe says "
                    f"now; run without --only, or with --only {other.name} too"
                )
    return chosen


def _bring_about(step: Step, title: str, quiet: bool, told: str = "") -> None:
    say = _printer(quiet)
    if step.action == "skip":
        assert step.manifest is not None
        say(f"{title}: done before, in {clock(step.manifest.seconds)}")
        return
    verbs = {"resume": "going on", "redo": "running anew"}
    say(f"{title}: {verbs.get(step.action, 'running')}{told}")
    begun = time.monotonic()
    function = step.stage.load(step.stage.function)
    main = dist.is_main()
    with (
        replacing_run(step.path, step.action == "redo") if main else nullcontext(),
        Run.open(
            step.path,
            stage=step.stage.name,
            config=step.resolved,
            identity=identity(step.config),
            inputs={**step.inputs, **step.files},
            seed=step.seed,
            quiet=quiet,
        ) as run,
    ):
        run.write_file("recipe.toml", table_text(step))
        with dist.computing_on(step.device), _peers_alive(step.name):
            if step.stage.together or main:
                function(step.config, run, step.inputs)
            dist.barrier()
        run.finish()
    say(f"{title}: done in {clock(time.monotonic() - begun)}")


def _printer(quiet: bool) -> Callable[[str], None]:
    """Prints a line on stderr, in the main process, unless `quiet`."""
    if quiet or not dist.is_main():
        return lambda text: None
    return tell


@contextmanager
def _peers_alive(name: str) -> Iterator[None]:
    """Raises a FailureError for a collective that failed because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not dist.lost_peer(error):
            raise
        raise FailureError(
            f"{name}: process {dist.rank()} of {dist.world()} lost another one "
            f"({str(error).splitlines()[0]}). That process or torchrun prints why it ended; "
            "the same command again goes on from the last state saved"
        ) from error


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
