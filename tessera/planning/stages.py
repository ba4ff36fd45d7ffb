"""What every stage of a recipe takes on a cluster: a line each, of phases that follow each other.

training     planning/training.py, in the layout that the recipe says
tokenising   bytes of the files, by what was measured here
reading      forward passes: scores, tables, calibration
answering    prefill and decode of an engine's batches, by the roofline of puzzle/roofline.py
judging      checkers on the machines' CPUs; what an endpoint takes is not known
copying      a model's bytes, read and written
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tessera.ask.local import EngineConfig
from tessera.curate.config import CurateConfig
from tessera.curate.steps.arrange import Blend
from tessera.curate.steps.rows import AskStep
from tessera.data.config import DataConfig
from tessera.data.readers import expand, is_lines, read_rows, without_chats
from tessera.devices import GB
from tessera.eval.evaluate import PERPLEXITY, EvalConfig
from tessera.eval.tasks import find
from tessera.export.write import ExportConfig
from tessera.generate.scheduler import PREFILL_TOKENS
from tessera.model.config import GQA, BlockConfig, ModelConfig, NoOp, parse_kind
from tessera.model.parallel import held_params, split_params, splits
from tessera.model.placed import PlacedConfig
from tessera.model.placement import ROOM, TRAINED_BYTES, LayoutError, ParallelConfig, fewest
from tessera.model.source import is_hub_id, load_config, model_config
from tessera.objectives.kd import KDConfig
from tessera.objectives.lm import CPTConfig, SFTConfig
from tessera.planning.training import (
    ANSWERED,
    BYTES,
    MOMENTS,
    NAMES,
    PROMPT,
    Cluster,
    Job,
    Layout,
    Parts,
    Plan,
    best,
    experience,
    layout_of,
    loss_bytes,
    planned,
)
from tessera.puzzle.bld import BLDConfig, CoupleConfig, largest_pairs, unit_params, units_of
from tessera.puzzle.compare import CompareConfig
from tessera.puzzle.constraints import COLUMNS
from tessera.puzzle.cost import PREFILLS, CostConfig, offered_words
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.frontier import FrontierConfig
from tessera.puzzle.fuse import FuseConfig
from tessera.puzzle.library import ChildConfig, MergeConfig, trainable_units, union
from tessera.puzzle.parent import ArchitectureConfig, ParentConfig
from tessera.puzzle.race import RaceConfig
from tessera.puzzle.roofline import Serving, layer_seconds, model_seconds
from tessera.puzzle.score import ConditionalConfig, HeldoutConfig, ScoreConfig
from tessera.puzzle.search import SearchConfig
from tessera.puzzle.space import Space, Unit, read_space
from tessera.rl.preference import RPOConfig
from tessera.rl.profile import ProfileConfig
from tessera.rl.rewards import AskedReward, CodeReward, MathReward
from tessera.rl.rollouts import RolloutConfig
from tessera.runs.plan import Stage, stage_of
from tessera.runs.recipe import Recipe, RecipeError, StageSpec, validate
from tessera.runs.run import is_done, read_json, read_table
from tessera.table import clock, count
from tessera.train.flops import working
from tessera.train.optim import TrainConfig

# Our own assumptions. COPY: bytes a second that one process reads and writes of a shared file
# system. CHECKED: samples that a worker checks a second (`benchmarks/results/rewards-cpu.md`: a
# verdict that math-verify decides takes 50 to 70 ms, a program 45). ITEMS: of a benchmark.
COPY = 1 * GB
CHECKED = {MathReward: 16.0, CodeReward: 22.0}
CHECKED_ELSE = 5000.0
ITEMS = 500
DRAWN = 400.0  # bytes of a problem with its work, or of an answer
FILTERED = 5000.0  # rows a second that steps of programs pass (`benchmarks/results/curate-cpu.md`)
MAKERS = ("parent", "child", "fuse", "kd", "cpt", "sft", "grpo", "rloo", "rpo")  # of models
HAVE_DTYPE = (TrainConfig, PlacedConfig)  # computing in the type that they say
WORTH_ROUNDING = 1.5  # products in bfloat16 over those in float32, from which on it is told
PACKED = 0.7  # share of a model's weights that an engine lays out anew (generate/packed.py)
TOKENISED = 4.6e6  # bytes of text a CPU second (`benchmarks/results/data-cpu.md`, Llama 3)


@dataclass(frozen=True)
class Phase:
    """Something that a stage does: seconds in all, bytes on the fullest device, and what it is."""

    name: str
    seconds: float
    parts: Parts = Parts()
    told: str = ""


@dataclass(frozen=True)
class Line:
    """One stage on a cluster. disk: bytes that it leaves. host: in the memory of one machine, where
    parts of a model are there.

    unknown: what takes time that is not counted. undivided: why its layout cannot be had. advice:
    what would make it fit. hint: what would make it faster on this machine.
    """

    name: str
    stage: str
    cluster: Cluster
    phases: tuple[Phase, ...] = ()
    training: Plan | None = None
    disk: float = 0.0
    host: float = 0.0
    unknown: str = ""
    undivided: str = ""
    advice: tuple[str, ...] = ()
    hint: str = ""

    @property
    def parts(self) -> Parts:
        """Of the phase that takes most."""
        return max((one.parts for one in self.phases), key=lambda p: p.total, default=Parts())

    @property
    def fits(self) -> bool:
        return self.parts.total <= self.cluster.device.memory and not self.undivided

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.phases)

    @property
    def left(self) -> float:
        """Bytes on disk once it is done: of a training the model, of a race tables alone."""
        job = self.training and self.training.job
        if job is None or job.student is None:
            return self.disk
        return 0.0 if job.heats else min(self.disk, 4.0 * job.student.num_params())

    @property
    def gpu_hours(self) -> float:
        """Of the whole cluster, which waits where one process works."""
        return self.seconds * self.cluster.world / 3600

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, counts."""
        found = {
            "name": self.name,
            "stage": self.stage,
            "cluster": str(self.cluster),
            "fits": self.fits,
            "phases": [
                {
                    "name": one.name,
                    "seconds": one.seconds,
                    "memory": {**asdict(one.parts), "total": one.parts.total},
                    "told": one.told,
                }
                for one in self.phases
            ],
            "memory": {**asdict(self.parts), "total": self.parts.total},
            "device_memory": self.cluster.device.memory,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "disk": self.disk,
            "left": self.left,
            "host": self.host,
            "unknown": self.unknown,
            "undivided": self.undivided,
            "advice": list(self.advice),
            "hint": self.hint,
        }
        if (plan := self.training) is not None:
            found |= {
                "layout": asdict(plan.layout),
                "step_seconds": {**asdict(plan.time), "total": plan.time.total},
                "mfu": plan.time.mfu,
                "tokens": plan.job.tokens,
            }
        return found


@dataclass(frozen=True)
class Planner:
    """A recipe, its parent's and its child's shape, and where it runs.

    child: None stands for a child that is not known yet: the parent is taken, an upper bound.
    runs: where the recipe's runs are, on the machine at hand: what is done there is known, and a
    child that is not there has as many of the parent's layers as its search's budget lets it.
    """

    recipe: Recipe
    stages: Mapping[str, Stage]
    cluster: Cluster
    parent: ModelConfig
    child: ModelConfig | None = None
    runs: Path | None = None
    _configs: dict[str, BaseModel] = field(default_factory=dict)

    def lines(self) -> list[Line]:
        """A line for every stage, in order."""
        return [self.line(spec) for spec in self.recipe.stages]

    def config(self, spec: StageSpec) -> Any:
        if spec.name not in self._configs:
            stage = stage_of(spec, self.stages)
            imported = stage.name == "parent" and "architecture" not in spec.table
            elsewhere = self.runs is None
            if elsewhere and (imported or stage.name == "data"):  # the files need not be here
                config = stage.load(stage.config).model_construct()
            else:
                config = stage.validate(spec)
            self._configs[spec.name] = config
        return self._configs[spec.name]

    def line(self, spec: StageSpec) -> Line:
        """A stage as the recipe says it, and what would make it fit where it does not."""
        config = self.config(spec)
        line = replace(self._line(spec, config), hint=self._hint(config))
        return line if line.fits else replace(line, advice=tuple(self._remedies(spec, config)))

    def _hint(self, config: Any) -> str:
        """Whether a CPU is faster in the other type, by products of the model's own shape."""
        train, rates = getattr(config, "train", None), self.cluster.rates
        if rates is None or not self.cluster.on_cpu or not isinstance(train or config, HAVE_DTYPE):
            return ""
        key = "train.dtype" if train else "dtype"
        dtype = train.dtype if train else self._dtype(config)
        ratio = rates.peak("bfloat16") / rates.peak("float32")
        if dtype == "bfloat16" and ratio < 1:
            return (
                f"WARNING: this CPU computes bfloat16 slowly: its products take {1 / ratio:.1f} "
                f'times as long as in float32; {key} = "float32" is faster'
            )
        if dtype == "float32" and ratio >= WORTH_ROUNDING:
            return f'{key} = "bfloat16" has products {ratio:.1f} times as fast as float32 here'
        return ""

    def _line(self, spec: StageSpec, config: Any) -> Line:
        disk, host = self._disk(spec, config), self._host(spec, config)
        line = Line(spec.name, spec.stage, self.cluster, disk=disk, host=host)
        if (job := self.job(spec, config)) is not None:
            return self._trained(line, config, job)
        phases, unknown = self._phases(spec, config)
        return replace(line, phases=tuple(phases), unknown=unknown)

    def job(self, spec: StageSpec, config: Any) -> Job | None:
        """The training of a stage; None for one that trains nothing."""
        child, parent = self._model(spec), self.parent
        match config:
            case ParentConfig(train=TrainConfig() as train):
                return Job(spec.name, train, student=parent)
            case BLDConfig() | CoupleConfig():
                keys = tuple(self._units(spec, config))
                return Job(spec.name, config.train, None, parent, units=keys, local=config)
            case RaceConfig():
                names = spec.table.get("searches", [])
                candidates = sum(self._found(str(name)) for name in names) or 1
                heats = tuple(config.heats(candidates))
                return Job(spec.name, config.train, child, parent, config.cosine > 0, heats=heats)
            case KDConfig():
                return Job(spec.name, config.train, child, parent, config.cosine > 0)
            case CPTConfig() | SFTConfig():
                return Job(spec.name, config.train, student=child)
            case RolloutConfig():
                own = experience(config)
                if own.engine:
                    own = replace(own, engine=self._ways([child], config))
                refers = isinstance(config, RPOConfig) or getattr(config, "kl", 0)
                taught = "teacher" in self.stages[spec.stage].needs
                reference = parent if taught else child if refers else None
                train = own.train(config.train)
                return Job(spec.name, train, child, reference, experience=own)
        return None

    def _units(self, spec: StageSpec, config: BLDConfig | CoupleConfig) -> list[Unit]:
        if isinstance(config, BLDConfig):
            return units_of(config, self.parent, spec.name)[1]
        return largest_pairs(config, self._space(spec), self.parent, spec.name)

    def _space(self, spec: StageSpec) -> Space:
        """What the library offers that a stage takes: the nearest above, or the one it names."""
        return self._offered(self._above(spec, "library", ("bld", "merge", "couple")), spec)

    def _offered(self, library: StageSpec | Path | None, user: StageSpec) -> Space:
        if isinstance(library, Path):
            return read_space(library)
        if library is None:
            raise RecipeError(f"[{user.name}]: no [bld] above it says what its library holds")
        if self.runs and is_done(run := self.runs / library.name):
            return read_space(run)
        if library.stage == "bld":
            return units_of(self.config(library), self.parent, library.name)[0]
        if library.stage == "couple":
            return self._space(library)
        named = {one.name: one for one in self.recipe.stages}
        parts = (named.get(n) or Path(n) for n in library.table["libraries"])
        return union([self._offered(one, user) for one in parts])

    def _above(
        self, spec: StageSpec, need: str, stages: Collection[str]
    ) -> StageSpec | Path | None:
        """What a stage takes for a need: the run or path that it names, or the nearest above."""
        before = self.recipe.stages[: self.recipe.stages.index(spec)]
        if isinstance(given := spec.table.get(need), str):
            return next((one for one in before if one.name == given), Path(given))
        return next((one for one in reversed(before) if one.stage in stages), None)

    def _model(self, spec: StageSpec) -> ModelConfig:
        """The model that a stage takes or makes of what it takes."""
        if self.runs is None or self.child is not None:
            return self.child or self.parent
        made = self._above(spec, "model", MAKERS)
        if spec.stage == "child":
            return self._allowed(spec)
        if isinstance(made, Path):
            return load_config(made)
        if made is None or made.stage == "parent":
            return self.parent
        run = self.runs / made.name
        return load_config(run) if is_done(run) else self._model(made)

    def _allowed(self, child: StageSpec) -> ModelConfig:
        """The parent with as many layers as a search's budget leaves of its parameters or seconds,
        which stands for the child until that is there."""
        share, at = 1.0, self._above(child, "architecture", ("search", "race", "frontier"))
        if isinstance(at, StageSpec) and at.stage == "race":
            names = at.table.get("searches", [])
            at = next((one for one in self.recipe.stages if one.name in names), None)
        if isinstance(at, StageSpec) and at.stage == "search":
            for name, given in self.config(at).constraints.items():
                text = str(given).strip()
                if text.endswith("x") and name in COLUMNS and (value := float(text[:-1])) > 0:
                    share = min(share, 1 / value if name == "throughput" else value)
        whole = self.parent.num_params()
        layers = whole - replace(self.parent, blocks=()).num_params()
        kept = max(0.0, layers - (1 - share) * whole) / max(1, layers)
        blocks = self.parent.blocks
        return replace(self.parent, blocks=blocks[: max(1, round(kept * len(blocks)))])

    def _found(self, name: str) -> int:
        """How many architectures a search has at most: what it is asked for, or has found."""
        search = next((one for one in self.recipe.stages if one.name == name), None)
        if search is None:
            return len(read_json(Path(name), "architectures")) if is_done(Path(name)) else 1
        match self.config(search):
            case SearchConfig(method="mip") as config:
                return config.solutions + (config.conditional is not None)
            case FrontierConfig() as config:
                return len(config.methods) * len(config.points)
            case _:
                return 1

    # Trainings

    def _trained(self, line: Line, config: Any, job: Job) -> Line:
        try:
            layout = layout_of(job, self.cluster)
        except LayoutError as error:
            return replace(line, undivided=str(error))
        plan = planned(job, self.cluster, layout)
        phases, unknown = [_phase(plan)], ""
        if self.cluster.rates and job.student:
            phases += [*self._heldout_losses(_spec(self.recipe, line.name), config, job)]
            phases += [self._copying(job.student)]
        if isinstance(config, BLDConfig | CoupleConfig):
            phases.insert(0, self._calibration(config, plan))
        if isinstance(config, RolloutConfig) and job.experience and job.experience.written:
            more, unknown = self._rollouts(config, plan)
            phases = [*more, *phases]
        return replace(line, phases=tuple(phases), training=plan, unknown=unknown)

    def _heldout_losses(self, spec: StageSpec, config: Any, job: Job) -> Iterator[Phase]:
        """At the end of a training, or around every heat of a race, on text that is there."""
        tokens = self._heldout(spec)
        times = 2 * len(job.heats) if isinstance(config, RaceConfig) else 1
        tokens = min(tokens, config.tokens) if isinstance(config, RaceConfig) else tokens
        if not 0 < tokens < math.inf or job.experience or job.student is None:
            return
        n, length = job.train.microbatch_tokens, job.train.sequence_length
        models = [job.student, job.teacher] if isinstance(config, RaceConfig) else [job.student]
        one = sum(self._pass(m, n, length, 1, job.train.dtype) for m in models if m is not None)
        yield Phase("held out", times * one * tokens / n, told=f"{count(tokens)} tokens")

    def _heldout(self, spec: StageSpec) -> float:
        """Tokens that are held out; infinite where the data are not there yet."""
        data = self._above(spec, "data", ("data",))
        place = data if isinstance(data, Path) else self.runs and data and self.runs / data.name
        if not place or not is_done(place):
            return math.inf
        rows = read_table(place, "summary")
        return sum(row["tokens"] for row in rows if row["split"] == "heldout")

    def _calibration(self, config: BLDConfig | CoupleConfig, plan: Plan) -> Phase:
        """Batches pass through the ranges of layers one behind the other, twice; every group of
        processes has all of them."""
        train, tokens = config.train, config.calibration_tokens
        parts = replace(plan.parts, gradients=0.0, moments=0.0, units_whole=0.0, weights=0.0)
        if rates := self.cluster.rates:
            held = self._heldout(_spec(self.recipe, plan.job.name))
            own = config.model_copy(update={"calibration_tokens": int(min(tokens, held))})
            importance = config.importance if isinstance(config, BLDConfig) else "independent"
            layers = len({unit.layer for unit in plan.job.units})
            seconds = rates.calibration(own, importance, layers)
            return Phase("calibration", seconds, parts, f"{count(tokens)} tokens")
        one = self._pass(self.parent, train.microbatch_tokens, train.sequence_length, 1)
        batches = math.ceil(tokens / train.microbatch_tokens)
        seconds = 2 * one * (1 + (batches - 1) / plan.layout.shard)
        return Phase("calibration", seconds, parts, f"{count(tokens)} tokens")

    def _rollouts(self, config: RolloutConfig, plan: Plan) -> tuple[list[Phase], str]:
        """Answering and judging of every rollout, beside the state of the training."""
        own, job = plan.job.experience, plan.job
        assert own is not None and job.student is not None
        rollouts = math.ceil(job.steps / config.updates_per_rollout)
        if not own.engine:
            return [], f"the answers of {rollouts} rollouts of {own.written:,}, which vLLM writes"
        answered = self._answering(
            job.student,
            own.written,
            min(config.max_tokens, job.train.microbatch_tokens),
            config.engine_batch,
            own.engine,
            job.train.dtype,
            loaded=False,
        )
        # Gradients come when the engine sleeps.
        state = {part: getattr(plan.parts, part) for part in ("weights", "moments")}
        parts = replace(answered.parts, weights=0.0, engine=answered.parts.weights)
        parts = replace(parts, **state, teacher=plan.parts.teacher)
        told = f"{rollouts} rollouts of {own.written:,} answers, {answered.told}"
        phases = [Phase("answering", rollouts * answered.seconds, parts, told)]
        judged, unknown = self._judging(config, rollouts * own.written)
        return [*phases, *judged], unknown

    # Reading and answering

    def _serving(self, dtype: str, ways: int, training: bool = False) -> Serving:
        device = self.cluster.device
        link = self.cluster.link(ways)
        share = device.training if training else device.compute
        return Serving(replace(device, link=link, compute=share), NAMES[dtype], ways)

    def _ways(self, models: Sequence[ModelConfig], config: BaseModel) -> int:
        """Processes that hold models together: as the stage says, or by the rule of placement.py,
        the fewest with room for the weights, beside a training no fewer than its own."""
        if given := getattr(config, "tensor", None):
            return given
        least, room = 1, ROOM * self.cluster.device.memory
        if isinstance(config, RolloutConfig):
            parallel = config.train.parallel
            least = parallel.tensor
            shard = parallel.shard or self.cluster.world // least
            room -= TRAINED_BYTES * models[0].num_params() / (shard * least)
        size, world = BYTES[self._dtype(config)], self.cluster.world
        # Where no number of processes will do, the stage ends; of one machine's its memory is told.
        return fewest(models, size, world, room, least) or self.cluster.gpus

    def _dtype(self, config: BaseModel) -> str:
        """Of a stage that trains nothing: bfloat16 on an accelerator unless it says another."""
        given = getattr(config, "dtype", "auto")
        if isinstance(config, RolloutConfig) and given == "auto":
            return config.train.dtype
        return given if given in BYTES else "float32" if self.cluster.on_cpu else "bfloat16"

    def _forward(
        self, model: ModelConfig, tokens: int, length: int, ways: int, dtype: str
    ) -> tuple[list[float], float]:
        """Seconds of each layer, and of the head on every token, of one microbatch."""
        if self.cluster.rates:
            return self.cluster.rates.forward(model, tokens, min(length, tokens), dtype)
        rows = Scenario(batch=max(1, tokens // length), prompt=min(length, tokens), new=2)
        serving = self._serving(dtype, ways, training=True)
        layers = [prefill for prefill, _ in layer_seconds(model, rows, serving)]
        return layers, serving.product(tokens, model.hidden_size, -(-model.vocab_size // ways))

    def _pass(
        self, model: ModelConfig, tokens: int, length: int, ways: int, dtype: str = "bfloat16"
    ) -> float:
        """Seconds of a forward pass of one microbatch, the head on every token included."""
        layers, head = self._forward(model, tokens, length, ways, dtype)
        return math.fsum(layers) + head

    def _read(self, models: Sequence[ModelConfig], config: HeldoutConfig, held: float) -> Parts:
        """Memory of forward passes. held: bytes of other things on a device."""
        size, ways, n = BYTES[self._dtype(config)], self._ways(models, config), 1
        n = config.microbatch_tokens
        widest = max(models, key=lambda model: model.hidden_size)
        variants = [variant for block in widest.blocks for variant in (block.attention, block.ffn)]
        loss = loss_bytes(widest, n, size, len(models) > 1, not self.cluster.on_cpu)
        if (rates := self.cluster.rates) is not None:
            length, dtype = config.sequence_length, self._dtype(config)
            loss = max(loss, rates.head_memory(n, min(n, length), dtype))
        return self._reserved(
            weights=size * sum(held_params(model, ways) for model in models),
            beside=held,
            activations=size * n * working(widest, variants, ways),
            loss=loss,
        )

    def _reserved(self, **parts: float) -> Parts:
        return Parts(**parts, reserve=self.cluster.reserve)

    def _scoring(self, spec: StageSpec, config: ScoreConfig | ConditionalConfig, rounds: int):
        """Every unit alone in the parent: it, the layers behind it and the head (score.py)."""
        space, parent = self._space(spec), self.parent
        units, ways = trainable_units(space), self._ways([parent], config)
        dtype, size = self._dtype(config), BYTES[self._dtype(config)]
        tokens = int(min(config.tokens, self._heldout(spec)))
        n, length = min(config.microbatch_tokens, tokens), config.sequence_length
        layers, head = self._forward(parent, n, length, ways, dtype)
        offered = [*space.replacements(), *space.pairs]
        own = sum(head + math.fsum(layers[unit.layer :]) for unit in offered)
        groups, batches = (
            self.cluster.world // ways,
            tokens / n if self.runs else math.ceil(tokens / n),
        )
        seconds = batches * own / groups + batches * (math.fsum(layers) + 2 * head)
        largest = max(
            (sum(unit_params(parent, u.kind, u.word) for u in units if u.layer == layer))
            for layer in {unit.layer for unit in units}
        )
        states = tokens * parent.hidden_size * (4 + 3 * size)
        parts = self._read([parent], config, size * largest / ways)
        told = f"{len(offered):,} words on {count(tokens)} tokens"
        told += f", {groups} shares" if groups > 1 else ""
        return Phase("reading", rounds * seconds, replace(parts, states=states), told)

    def _answering(
        self,
        model: ModelConfig,
        answers: int,
        length: int,
        most: int,
        ways: int,
        dtype: str,
        loaded: bool = True,
        prompt: int = PROMPT,
    ) -> Phase:
        """An engine of `ways` devices in every group of them, at most `most` answers at a time.

        Seconds are of answers of average length, memory is of the longest. loaded: from disk, not
        from the policy.
        """
        own = math.ceil(answers / max(1, self.cluster.world // ways))
        batch = min(own, most)
        scenario = Scenario(batch=batch, prompt=prompt, new=max(2, length))
        read = min(batch * prompt, PREFILL_TOKENS if self.cluster.rates else sys.maxsize)
        tokens = max(2, round(ANSWERED * length))
        average = scenario.model_copy(update={"new": tokens})
        prefill, step = self._generation(model, average, ways, dtype)
        size = BYTES[dtype]
        heads = sum(
            kept.num_key_value_heads / (ways if splits(model, kept, ways) else 1)
            for block in model.blocks
            if isinstance(kept := block.attention, GQA)
        )
        variants = [variant for block in model.blocks for variant in (block.attention, block.ffn)]
        parts = self._reserved(
            weights=size * _packed(model, ways),
            cache=size * scenario.cached_tokens * 2 * model.head_dim * heads,
            activations=size * read * working(model, variants, ways),
        )
        # An engine lays the weights out while the model that it takes them from is there.
        beside = PACKED * parts.weights
        if self.cluster.on_cpu:  # and the head, whose norm is folded into it in float32
            beside = size * held_params(model, ways) + 6.0 * model.vocab_size * model.hidden_size
        both = replace(parts, cache=0.0, activations=0.0, beside=beside)
        parts = max(parts, both, key=lambda one: one.total) if loaded else parts
        where = f" on {ways} GPU{'s' * (ways > 1)}"
        told = f"{length:,} tokens each, {batch} at a time{where}"
        if self.cluster.rates:
            told = f"at most {length:,} tokens each, {batch} at a time"
        return Phase("answering", own / batch * (prefill + tokens * step), parts, told)

    def _generation(
        self, model: ModelConfig, scenario: Scenario, ways: int, dtype: str
    ) -> tuple[float, float]:
        """Seconds of (prefill, one decode step)."""
        if self.cluster.rates:
            return self.cluster.rates.generation(model, scenario, dtype)
        return model_seconds(model, scenario, self._serving(dtype, ways))

    def _judging(self, config: Any, samples: int) -> tuple[list[Phase], str]:
        """Checkers run beside every process; what a server takes is its own."""
        asked = [one for one in config.rewards if isinstance(one, AskedReward)]
        checked = [one for one in config.rewards if not isinstance(one, AskedReward)]
        rate = config.workers * self.cluster.world
        each = sum(1 / CHECKED.get(type(one), CHECKED_ELSE) for one in checked)
        phases = [Phase("judging", samples * each / rate)] if checked else []
        names = " and ".join(one.endpoint.model for one in asked)
        return phases, f"{samples * len(asked):,} questions to {names}" if asked else ""

    def _phases(self, spec: StageSpec, config: Any) -> tuple[list[Phase], str]:
        """Of a stage that trains nothing, and what is not known of it."""
        child, parent = self._model(spec), self.parent
        match config:
            case DataConfig():
                return self._tokenising(spec, config)
            case ParentConfig():
                return [self._copying(parent)], ""
            case ScoreConfig():
                return [self._scoring(spec, config, 1)], ""
            case SearchConfig(conditional=ConditionalConfig() as own):
                scored = self._scoring(spec, own, own.rounds + own.polish)
                return [scored, self._solving(config)], ""
            case SearchConfig():
                return [self._solving(config)], ""
            case CostConfig(source="measured"):
                return [self._timing(spec, config)], ""
            case MergeConfig() | CostConfig():
                return [Phase("copying", 0.0)], ""
            case ChildConfig():
                return [self._copying(child)], ""
            case FuseConfig():
                return [self._fusing(config, child), self._copying(child)], ""
            case CompareConfig():
                models = len(spec.table.get("models", [])) * [child]
                return [self._comparing(config, [parent, *models])], ""
            case ProfileConfig(samples=0):
                return [Phase("copying", 0.0)], ""
            case ProfileConfig():
                return self._profiling(spec, config, child)
            case EvalConfig():
                return self._evaluating(config, child)
            case CurateConfig():
                return self._curating(spec, config)
            case ExportConfig():
                return [self._copying(child, 2 if config.check else 1)], ""
        return [], "no model of it yet"

    def _tokenising(self, spec: StageSpec, config: DataConfig) -> tuple[list[Phase], str]:
        """Of files that are here, with the tokenizer of a model that is here."""
        rates, model = self.cluster.rates, self._above(spec, "model", ())
        if rates is None:
            return [], f"tokenising, {TOKENISED / 1e6:.1f} MB of text a CPU second"
        known = config.tokenizer if isinstance(config.tokenizer, str) else None
        if isinstance(model, StageSpec):
            known = model.table.get("path")
        files = [path for path in config.files if path.is_file()]
        drawn = sum(sum(one.tasks.values()) for one in config.readings.values())
        drawn += self._curated(spec)
        size = sum(path.stat().st_size for path in files) + DRAWN * drawn
        unknown = [one.dataset for one in config.readings.values() if one.dataset]
        rate = TOKENISED
        if known and known != "byte" and Path(known).exists():
            rate = rates.tokenised(Path(known))
        told = f"{size / 1e6:.3g} MB of text"
        parts = self._reserved(beside=4.0 * size)
        phase = Phase("tokenising", size / rate, parts, told)
        return [phase], f"the dataset {unknown[0]}" if unknown else ""

    def _timing(self, spec: StageSpec, config: CostConfig) -> Phase:
        """Rounds of every probe: each word in `depth` layers, and whole architectures; all of their
        engines are there at once."""
        parent = self.parent
        words = [word for word in offered_words(self._space(spec)) if word[1] != "noop"]
        depth = config.depth or len(parent.blocks)
        empty = BlockConfig(NoOp(), NoOp())
        models = [replace(parent, blocks=())]
        for kind, word in words:
            block = empty.with_(kind, parse_kind(kind, word))
            models.append(replace(parent, blocks=(block,) * depth))
        models += [parent] * (1 + config.wholes) * bool(config.wholes)
        dtype = "bfloat16" if config.dtype == "bf16" else "float32"
        dtype = self._dtype(config) if config.dtype == "auto" else dtype
        seconds = 0.0
        for _, scenario in config.priced():
            found = [self._generation(model, scenario, 1, dtype) for model in models]
            each = sum(PREFILLS * prefill + scenario.new * step for prefill, step in found)
            seconds += (config.rounds + 1) * each
        size = BYTES[dtype]
        largest = max(models, key=lambda model: model.num_params())
        parts = self._reserved(
            weights=size * sum(_packed(model, 1) for model in models),
            beside=float(4 * largest.num_params()),  # one that an engine is made of
        )
        told = f"{config.rounds + 1} rounds of {len(models)} models"
        return Phase("timing", seconds, parts, told)

    def _profiling(
        self, spec: StageSpec, config: ProfileConfig, child: ModelConfig
    ) -> tuple[list[Phase], str]:
        prompts = config.limit or sum(config.tasks.values())
        if config.paths and self.cluster.rates:
            rows = sum(_rows(path) for path in expand(without_chats(config.paths)))
            rows += self._curated(spec)
            prompts = min(config.limit or sys.maxsize, sum(config.tasks.values()) + rows)
        elif config.paths and not config.limit:
            prompts = 0
        if not prompts:
            return [], "as many prompts as the files hold; `limit` bounds them"
        ways, answers = self._ways([child], config), prompts * config.samples
        dtype = self._dtype(config)
        answered = self._answering(child, answers, config.max_tokens, config.batch, ways, dtype)
        judged, unknown = self._judging(config, answers)
        return [answered, *judged], unknown

    def _evaluating(self, config: EvalConfig, child: ModelConfig) -> tuple[list[Phase], str]:
        if config.endpoint:
            return [], f"what {config.endpoint.model} answers"
        ways, modes = self._ways([child], config), 2
        if self.cluster.rates and (config.asking == "text" or config.thinking != "both"):
            modes = 1
        phases = []
        for task in config.tasks:
            items = (find(task).limit if self.cluster.rates and task != PERPLEXITY else 0) or ITEMS
            length = config.max_tokens or 4096
            asked = min(config.limit or items, items) * modes
            dtype = self._dtype(config)
            phase = self._answering(child, asked, length, config.batch, ways, dtype)
            phases.append(replace(phase, told=f"{asked:,} answers, {phase.told}"))
        most = max(phases, key=lambda phase: phase.parts.total)
        seconds = sum(phase.seconds for phase in phases)
        told = phases[0].told if len(phases) == 1 else f"{len(phases)} tasks"
        judge = f"what {config.judge.model} judges" if config.judge else ""
        return [Phase("answering", seconds, most.parts, told)], judge

    def _curating(self, spec: StageSpec, config: CurateConfig) -> tuple[list[Phase], str]:
        """What a teacher of this process answers: as many rows as the files hold, at the longest;
        what the steps before leave out is not known."""
        phases, unknown, rows = [], [], 0
        for step, rows in _rows_before(config):
            if not isinstance(step, AskStep):
                continue
            teacher = config.teachers[step.teacher]
            if not isinstance(teacher, EngineConfig):
                unknown.append(f"what {step.teacher} answers")
                continue
            answers = rows * getattr(step, "n", 1)
            length, model = getattr(step, "max_tokens", 1), self._model(spec)
            ways, dtype = self._ways([model], teacher), self._dtype(teacher)
            phase = self._answering(model, answers, length, teacher.batch, ways, dtype)
            phases.append(replace(phase, told=f"{answers:,} answers, {phase.told}"))
        parts = self._reserved(beside=2e3 * rows)
        return [*phases, Phase("filtering", rows / FILTERED, parts)], ", ".join(unknown)

    def _curated(self, spec: StageSpec) -> int:
        """Rows that the stage's `chats` gives at most."""
        chats = self._above(spec, "chats", ())
        if isinstance(chats, StageSpec):
            *_, (_, rows) = _rows_before(self.config(chats))
            return rows
        return 0

    def _solving(self, config: SearchConfig) -> Phase:
        told = f"integer programs, mostly a second each, at most {clock(config.time_limit)}"
        return Phase("solving", float(config.solutions), self._reserved(), told)

    def _fusing(self, config: FuseConfig, model: ModelConfig) -> Phase:
        """The dependency matrix: each FFN-only block left out, and all behind it again. What could
        be fused is there a second time while both are measured."""
        ways, size = self._ways([model], config), BYTES[self._dtype(config)]
        one = self._pass(model, config.microbatch_tokens, config.sequence_length, ways)
        batches = math.ceil(config.tokens / config.microbatch_tokens)
        seconds = batches * one * (len(model.blocks) / 2 + 2) * ways / self.cluster.world
        alone = [block for block in model.blocks if not isinstance(block.attention, GQA)]
        fused = sum(split_params(model, block, ways) for block in alone)
        packed = PACKED * held_params(model, ways)
        return Phase("reading", seconds, self._read([model], config, size * (fused + packed)))

    def _comparing(self, config: CompareConfig, models: list[ModelConfig]) -> Phase:
        ways, size = self._ways(models, config), BYTES[self._dtype(config)]
        one = sum(
            self._pass(
                model, config.microbatch_tokens, config.sequence_length, ways, self._dtype(config)
            )
            for model in models
        )
        batches = math.ceil(config.tokens / config.microbatch_tokens)
        dtype = self._dtype(config) if self.cluster.rates else "bfloat16"
        rounds = [self._generation(model, config.scenario, ways, dtype) for model in models]
        timed = sum(prefill + config.scenario.new * step for prefill, step in rounds)
        seconds = batches * 2 * one * ways / self.cluster.world + (config.rounds + 1) * 2 * timed
        packed = size * PACKED * max(held_params(model, ways) for model in models)
        return Phase("reading", seconds, self._read(models, config, packed))

    def _copying(self, model: ModelConfig, times: int = 2) -> Phase:
        rate = self.cluster.rates.copied() if self.cluster.rates else COPY
        size = self._bytes(model)
        embedding = 4.0 * model.vocab_size * model.hidden_size  # the largest tensor, read and cast
        parts = self._reserved(beside=2 * embedding) if self.cluster.rates else Parts()
        return Phase("copying", times * size / rate, parts)

    def _bytes(self, model: ModelConfig) -> float:
        """Of its files; of one that was trained here float32."""
        return BYTES["float32" if self.runs else "bfloat16"] * float(model.num_params())

    def _host(self, spec: StageSpec, config: Any) -> float:
        """Bytes in one machine's memory: of a fused model, which is made there whole, and of state
        that waits there."""
        match config:
            case FuseConfig():
                return self._bytes(self._model(spec))
            case BaseModel(train=TrainConfig(parallel=ParallelConfig(offload=True)) as train):
                state = 4 + 4 + MOMENTS[train.optimizer]
                return state * self._model(spec).num_params() / self.cluster.nodes
        return 0.0

    def _disk(self, spec: StageSpec, config: Any) -> float:
        """Bytes that a stage leaves, or holds at its end: a training its resume states, too."""
        child = self._model(spec)
        match config:
            case ParentConfig():
                return self._bytes(self.parent)
            case BLDConfig() | CoupleConfig():
                units = self._units(spec, config)
                return 4.0 * sum(unit_params(self.parent, u.kind, u.word) for u in units)
            case ChildConfig() | FuseConfig() | ExportConfig():
                return self._bytes(child)
            case BaseModel(train=TrainConfig() as train):
                return (12 * (1 + train.save_total_limit) + 4) * float(child.num_params())
        return 0.0

    def _remedies(self, spec: StageSpec, config: Any) -> list[str]:
        """Each setting that makes a stage fit alone; else with the layout that suits, or a larger
        cluster."""
        if found := [f"{key} = {value} fits" for key, value in self._fitting(spec, config)]:
            return found
        for nodes in (self.cluster.nodes * 2**i for i in range(6)):
            more = replace(self, cluster=replace(self.cluster, nodes=nodes))
            where = "" if nodes == self.cluster.nodes else f" on {more.cluster}"
            for layout in more._layouts(spec, config):
                spread = _changed(config, "train.parallel", layout.config)
                if where and more._line(spec, spread).fits:
                    return [f"train.parallel = {layout} fits{where}"]
                for key, value in more._fitting(spec, spread):
                    return [f"{key} = {value} with train.parallel = {layout} fits{where}"]
            if where and more._line(spec, config).fits:
                return [f"it fits{where}"]
        return ["no setting tried makes it fit"]

    def _fitting(self, spec: StageSpec, config: Any) -> Iterator[tuple[str, Any]]:
        """Of each setting the first value with which a stage fits."""
        for key, values in self._settings(spec, config).items():
            for value in values:
                plain = value.config if isinstance(value, Layout) else value
                if self._line(spec, _changed(config, key, plain)).fits:
                    yield key, json.dumps(value) if isinstance(value, str) else value
                    break

    def _settings(self, spec: StageSpec, config: Any) -> dict[str, list[Any]]:
        """Values that take less memory, the nearest first, of the settings that a stage has."""
        train, found = getattr(config, "train", None), {}
        if train is not None:
            found["train.parallel"] = self._layouts(spec, config)
            least = train.sequence_length
            if isinstance(config, RolloutConfig):  # a row holds an answer, or a pair of them
                least = PROMPT + config.max_tokens * (2 if isinstance(config, RPOConfig) else 1)
            found["train.microbatch_tokens"] = _halves(train.microbatch_tokens, least)
            if train.optimizer == "adamw":
                found["train.optimizer"] = ["adamw-8bit"]
            if train.dtype == "float32":
                found["train.dtype"] = ["bfloat16"]
        if getattr(config, "cosine", 0):
            found["cosine"] = [0]
        if isinstance(config, BLDConfig | CoupleConfig):
            layers = config.layers_at_once or len(self.parent.blocks)
            found["layers_at_once"] = _halves(layers, 1)
        if "tensor" in type(config).model_fields:
            least = self._ways([self._model(spec)], config)
            found["tensor"] = [n for n in (2, 4, 8, 16) if n > least]
        for key in ("batch", "engine_batch", *([] if train else ["tokens", "microbatch_tokens"])):
            if key in type(config).model_fields:
                found[key] = _halves(getattr(config, key), 1)
        return found

    def _layouts(self, spec: StageSpec, config: Any) -> list[Layout]:
        """The fastest that fits, beside what an engine holds, too."""
        job = self.job(spec, config)
        if job is None:
            return []
        held = [0.0]
        if isinstance(config, RolloutConfig) and job.experience and job.experience.engine:
            phases, _ = self._rollouts(config, best(job, self.cluster))
            held.append(phases[0].parts.cache)
        return [best(job, self.cluster, one).layout for one in held]


def _halves(value: int, least: int) -> list[int]:
    return [value >> i for i in range(1, 24) if value >> i >= least]


def _changed(config: Any, key: str, value: Any) -> Any:
    """A config with one key changed, or one key of its `train`."""
    table, _, inner = key.rpartition(".")
    if table:
        value = getattr(config, table).model_copy(update={inner: value})
    return config.model_copy(update={table or inner: value})


def _phase(plan: Plan) -> Phase:
    told = (
        f"{count(plan.job.tokens)} tokens, {plan.time.total:.3g} s a step, MFU {plan.time.mfu:.0%}"
    )
    return Phase("training", plan.seconds, plan.parts, told)


def _packed(model: ModelConfig, ways: int) -> float:
    """Numbers that an engine holds of a model: a tied head is there twice."""
    tied = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    return held_params(model, ways) + tied


def _spec(recipe: Recipe, name: str) -> StageSpec:
    return next(spec for spec in recipe.stages if spec.name == name)


def _rows_before(config: CurateConfig) -> Iterator[tuple[Any, int]]:
    """Every step with the rows that it gets at most; None is the end."""
    rows = sum(_rows(path) for one in config.sources for path in one.files())
    rows += sum(sum(one.tasks.values()) for one in config.sources)
    for step in config.steps:
        yield step, rows
        rows *= getattr(step, "n", 1) if isinstance(step, AskStep) else 1
        rows = step.rows if isinstance(step, Blend) and step.rows else rows
    yield None, rows


def _rows(path: Path) -> int:
    if not is_lines(path):
        return sum(1 for _ in read_rows(path))
    with path.open("rb") as file:
        return sum(1 for _ in file)


def parent_of(recipe: Recipe, config: Path | None) -> ModelConfig:
    """The parent's config: given, read from its checkpoint, or built. Raises RecipeError."""
    if config is not None:
        return model_config(config)
    table = next((spec.table for spec in recipe.stages if spec.stage == "parent"), None)
    if table is None:
        raise RecipeError("this recipe has no [parent]; give --config CONFIG.JSON")
    if isinstance(path := table.get("path"), str):
        if is_hub_id(path):
            raise RecipeError(
                f"the checkpoint {path} is not on this machine; give --config its config.json"
            )
        return load_config(path)
    if not isinstance(table.get("architecture"), dict):
        raise RecipeError("[parent] names no path; say parent.path=MODEL, or give --config")
    shape = validate(ArchitectureConfig, table["architecture"], "parent.architecture")
    data = next((spec.table for spec in recipe.stages if spec.stage == "data"), {})
    wanted: Any = data.get("tokenizer")
    size = 259 if wanted == "byte" else wanted.get("bpe") if isinstance(wanted, dict) else None
    if not isinstance(size, int):
        raise RecipeError("the vocabulary is not known before the data; give --config CONFIG.JSON")
    return shape.model(size, None, ())


def render(lines: Sequence[Line], price: float | None = None) -> str:
    """A paragraph a stage, and the sum. price: of a GPU-hour."""
    parts = [_rendered(line) for line in lines]
    hours = sum(line.gpu_hours for line in lines)
    worst = [line.name for line in lines if not line.fits]
    verdict = f"{', '.join(worst)} do not fit" if worst else "all stages fit"
    days = sum(line.seconds for line in lines) / 86_400
    total = f"{verdict}: {days:.3g} days, {hours:,.0f} GPU-hours"
    money = f", {price * hours:,.0f} at {price:g} a GPU-hour" if price else ""
    return "\n".join([*parts, total + money])


def _rendered(line: Line) -> str:
    capacity, parts = line.cluster.device.memory, line.parts
    held = f": {parts.total / GB:.1f} of {capacity / GB:.0f} GB a GPU" if parts.total else ""
    verdict = "fits" if line.fits else "does not fit"
    told = [f"[{line.name}]  {verdict} {line.cluster}{held}"]
    if parts.total:
        named = {k.replace("_", " "): v for k, v in asdict(parts).items() if v}
        told.append(f"  memory    {', '.join(f'{k} {v / GB:.2g}' for k, v in named.items())}")
    told += [f"  layout    {line.undivided}"] if line.undivided else []
    told += [f"  advice    {one}" for one in line.advice]
    if line.training is not None:
        told.append(f"  layout    train.parallel = {line.training.layout}")
    for one in line.phases:
        more = f": {one.told}" if one.told else ""
        told.append(f"  {one.name:<9} {clock(one.seconds)}{more}")
    if line.seconds:
        disk = f", {line.disk / GB:,.0f} GB on disk" if line.disk else ""
        host = f", {line.host / GB:,.0f} GB in a machine's memory" if line.host else ""
        told.append(f"  in all    {line.gpu_hours:,.1f} GPU-hours{disk}{host}")
    if line.unknown:
        told.append(f"  not known {line.unknown}")
    return "\n".join(told)


def told_here(line: Line) -> list[str]:
    """What a stage takes on this machine: time, memory, disk; then what it is made of."""
    parts = {k.replace("_", " "): v for k, v in asdict(line.parts).items() if v >= 0.005 * GB}
    named = ", ".join(f"{key} {value / GB:.2g}" for key, value in parts.items())
    memory = f", {line.parts.total / GB:.2g} GB of memory ({named})" if line.parts.total else ""
    disk = f", {line.disk / GB:.2g} GB on disk" if line.disk >= 0.005 * GB else ""
    told = [f"about {clock(line.seconds)}{memory}{disk}"] if line.phases else []
    for one in line.phases:
        if one.told and (len(line.phases) > 1 or one.name != "training"):
            told.append(f"{one.name} {clock(one.seconds)}: {one.told}")
    told += [f"WARNING: {line.undivided}"] if line.undivided else []
    told += [f"WARNING: it does not fit; {one}" for one in line.advice]
    told += [line.hint] if line.hint else []
    return told + ([f"not known: {line.unknown}"] if line.unknown else [])


def total_here(lines: Sequence[Line]) -> str:
    """The sum of the stages that are to be run."""
    if not lines:
        return "all is done"
    most = max(lines, key=lambda line: line.parts.total)
    seconds = clock(sum(line.seconds for line in lines))
    unknown = [line.name for line in lines if line.unknown or not line.phases]
    rest = f"; not all of {', '.join(unknown)} is known" if unknown else ""
    disk = sum(line.left for line in lines) + max(line.disk - line.left for line in lines)
    return (
        f"in all about {seconds}, at most {most.parts.total / GB:.2g} GB of memory ({most.name}), "
        f"{disk / GB:.2g} GB on disk{rest}"
    )
