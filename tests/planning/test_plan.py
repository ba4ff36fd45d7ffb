"""A plan counts what a Trainer holds, and tells what fits and what does not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.batch import Batch
from tessera.model.config import ModelConfig, uniform
from tessera.model.parallel import held_params, root_params
from tessera.model.transformer import Transformer
from tessera.objectives.lm import LM
from tessera.pipeline import STAGES
from tessera.planning.stages import Planner, parent_of, render
from tessera.planning.training import (
    ClusterError,
    Job,
    Layout,
    best,
    experience,
    layouts,
    memory,
    parse_cluster,
    step_time,
)
from tessera.puzzle.race import RaceConfig
from tessera.rl.experience import Answer, Group, rows
from tessera.rl.rollouts import RolloutConfig
from tessera.runs.plan import with_defaults
from tessera.runs.recipe import load, loads
from tessera.runs.run import Run
from tessera.train.engine import Trainer
from tessera.train.flops import Work, kept
from tessera.train.optim import TrainConfig
from tests.toy import ToySource, toy_batch, toy_config, toy_model

ROOT = Path(__file__).parents[2]
WORDS = (("gqa-4", "swiglu-48"), ("noop", "swiglu-10"), ("gqa-2", "noop"), ("linear", "linear"))
TRAIN = TrainConfig(
    steps=100,
    tokens_per_step=2**21,
    microbatch_tokens=8192,
    sequence_length=8192,
    dtype="bfloat16",
)


def llama(layers: int, hidden: int, heads: int, width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=128,
        blocks=uniform("gqa-8", f"swiglu-{width}", layers),
    )


LLAMA_8B = llama(32, 4096, 32, 14_336)
LLAMA_405B = llama(126, 16_384, 128, 53_248)


def test_clusters_are_machines_times_devices():
    nine = parse_cluster("9x8xH100")
    assert (nine.nodes, nine.gpus, nine.world, nine.device.name) == (9, 8, 72, "H100")
    assert [parse_cluster(t).world for t in ("8xh200", "L40S", "2x4xA100")] == [8, 1, 8]
    assert nine.link(8) > nine.link(16) == nine.network


@pytest.mark.parametrize(
    "text, said",
    [("9x8", "write machines x devices"), ("0xH100", "begin at 1"), ("8xH1000", "'H100'")],
)
def test_what_is_no_cluster_is_told(text, said):
    with pytest.raises(ClusterError, match=said):
        parse_cluster(text)


def test_weights_gradients_and_moments_are_those_of_a_trainer(tmp_path):
    module = Transformer(toy_config(4).with_words(WORDS)).init_weights(0)
    held: dict[str, int] = {}

    class Looking(Trainer):
        def _update(self, step: int) -> float:
            held["gradients"] = sum(
                p.grad.nbytes for p in module.parameters() if p.grad is not None
            )
            return super()._update(step)

    with Run.open(tmp_path / "r", stage="cpt", config={}, inputs={}, seed=0, quiet=True) as run:
        trainer = Looking(module, LM(), ToySource(), TrainConfig(steps=1), run)
        trainer.fit()
    states = trainer.optimizer.state.values()
    held["weights"] = sum(p.nbytes for p in module.parameters())
    held["moments"] = sum(s[k].nbytes for s in states for k in ("exp_avg", "exp_avg_sq"))
    job = Job("cpt", TrainConfig(steps=1), module.config)
    parts = asdict(memory(job, Layout(1, 1, 1, False), 0.0, accelerator=False))
    assert {name: parts[name] for name in held} == held


def test_shards_hold_it_once_and_tensor_ranks_split_what_divides():
    config = toy_config(4).with_words(WORDS)
    job = Job("cpt", TrainConfig(steps=1), config)
    one, four = (memory(job, Layout(1, n, 1, False), 0.0, accelerator=False) for n in (1, 4))
    assert four.weights * 4 == one.weights == 4 * config.num_params()
    split = 2 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 48 + 3 * 32 * 10  # gqa-4, swiglu-48, swiglu-10
    split += 2 * 32 * 32 + 2 * 32 * 16  # gqa-2
    assert held_params(config, 1) - held_params(config, 2) == split // 2
    assert root_params(config) == 2 * 40 * 32 + 32


def test_activations_are_near_what_autograd_keeps():
    module = toy_model(4, hidden_size=64, head_dim=16)
    batch, seen = toy_batch(0, rows=2, length=64), {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in LM().losses(module, batch):
            pass
    config = module.config
    numbers = sum(kept(config, b.attention) + kept(config, b.ffn) for b in config.blocks)
    assert 0.85 < sum(seen.values()) / (4 * batch.tokens.numel() * numbers) < 1.1


def test_the_best_plan_fits_and_no_layout_that_fits_is_faster():
    cluster = parse_cluster("2x8xH100")
    job = Job("kd", TRAIN, LLAMA_8B, LLAMA_8B, states=True)
    plan = best(job, cluster)
    assert plan.fits and plan.parts.total <= 80e9
    others = [
        layout
        for layout in layouts(job, cluster)
        if memory(job, layout, 80e9).total <= 80e9
        and step_time(job, layout, cluster).total < plan.time.total
    ]
    assert not others
    assert 0.2 < plan.time.mfu < 0.75


def test_recomputation_trades_time_for_memory():
    job, cluster = Job("cpt", TRAIN, LLAMA_8B), parse_cluster("8xH100")
    keeps, again = Layout(1, 8, 1, False), Layout(1, 8, 1, True)
    assert memory(job, again, 80e9).activations < memory(job, keeps, 80e9).activations / 3
    ratio = step_time(job, again, cluster).products / step_time(job, keeps, cluster).products
    assert 1.25 < ratio < 4 / 3


@pytest.mark.parametrize("window", [None, 3, 16])
def test_the_work_of_a_step_is_that_of_its_longest_documents(window):
    train = TrainConfig(steps=1, tokens_per_step=32, microbatch_tokens=16, sequence_length=8)
    job = Job("cpt", train, toy_config(2, sliding_window=window))
    positions = torch.arange(8).repeat(4, 1)
    batch = Batch(positions, positions, positions, positions, torch.zeros_like(positions))
    assert job.work() == Work.of(batch, window)


RACE = """
[parent]
architecture = { hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 4 }
train = { steps = 1 }
[data]
tokenizer = "byte"
[search]
constraints = { parameters = "0.9x" }
solutions = 4
conditional = {}
[search-dropped]
method = "dropped"
constraints = { parameters = "0.9x" }
[race]
searches = ["search", "search-dropped"]
train = { steps = 10 }
rungs = 3
lrs = [1e-4, 1e-3]
"""


def planned_jobs(text: str) -> list[Job]:
    recipe = loads(text)
    planner = Planner(recipe, STAGES, parse_cluster("8xH100"), parent_of(recipe, None))
    return [
        job
        for spec in recipe.stages
        if (job := planner.job(spec, planner.config(spec))) is not None
    ]


def test_a_race_is_planned_with_every_heat():
    race = planned_jobs(RACE)[-1]
    assert race.heats == (10,) * 12 + (20,) * 3 + (40,) * 2  # 4 + 1 + 1, at two rates; 3; 2
    assert best(race, parse_cluster("H100")).job.steps == 12 * 10 + 3 * 20 + 2 * 40
    assert RaceConfig(train=TrainConfig(steps=10), rungs=9).heats(3) == [10, 10, 10, 20, 20]


def policy(table: str, recipe: str = "grpo") -> Job:
    rewards = "" if recipe == "gkd" else "rewards = [{ kind = 'exact', answer = 'a' }]\n"
    return planned_jobs(f"{RACE}[{recipe}]\n{rewards}{table}")[-1]


@pytest.mark.parametrize("window", [None, 3])
def test_a_policy_learns_from_its_answers_and_from_each_prompt_once(window: int | None):
    own = experience(RolloutConfig(train=TRAIN, prompts_per_rollout=6, samples=3, max_tokens=5))
    own = replace(own, prompt=4, length=5)
    answers = [Answer([0] * 5, [0.0] * 5, "stop", "", 1.0, {}, True, advantage=1.0)] * 3
    (batch,) = rows([Group(i, "on", [0] * 4, answers) for i in range(6)], 200, "token")
    assert own.work(window) == Work.of(batch, window)


def test_a_policy_is_planned_with_its_reference_and_its_engine():
    train = "train = { steps = 7, microbatch_tokens = 4096 }\nmax_tokens = 1000\n"
    plain, kl = policy(train), policy(train + "kl = 0.1")
    assert plain.tokens == 7 * 64 * (127 + 16 * 667)
    assert plain.teacher is None and kl.teacher == kl.student
    assert memory(plain, Layout(1, 8, 1, False), 80e9).engine == 0  # it sleeps
    held = memory(policy(train + "staleness = 1"), Layout(1, 8, 1, False), 80e9)
    assert held.engine == 4 * plain.config.num_params() == 8 * held.weights
    assert policy(train + "updates_per_rollout = 4").tokens == plain.tokens // 4
    own = policy(train, "gkd")  # one answer a prompt, and the logits of both models
    assert own.tokens == 7 * 64 * (127 + 667) and own.teacher == plain.config
    ours, theirs = (memory(one, Layout(1, 8, 1, False), 80e9).loss for one in (own, kl))
    assert ours > 1.3 * theirs
    pairs = policy(train + "paths = ['P']\npairs_per_step = 10", "rpo")
    assert pairs.tokens == 7 * 10 * (127 + 2 * 667) and pairs.teacher is not None
    assert memory(pairs, Layout(1, 1, 1, False), 80e9).engine == 0


LONG = 'dtype = "bfloat16", tokens_per_step = 2097152, microbatch_tokens = 65536'


@pytest.mark.parametrize(
    "stage, cluster, said",
    [
        (f"[sft]\ntrain = {{ steps = 9, {LONG} }}", "8xH100", "train.parallel = {"),
        ("[kd]\ntrain = { steps = 9 }", "8xH100", 'train.dtype = "bfloat16" fits'),
        ("[kd]\ntrain = { steps = 9 }", "H100", "fits on 4x1xH100"),
        ("[grpo]\nengine_batch = 4096\nsamples = 512\nREWARD\nTRAIN", "8xH100", "engine_batch = "),
        ("[profile]\nlimit = 999\nREWARD\nbatch = 4096", "H100", "batch = 512 fits"),
        ("[sft]\ntrain = { steps = 9, parallel = { tensor = 3 } }", "8xH100", "train.parallel = {"),
    ],
)
def test_what_does_not_fit_is_told_what_would(stage: str, cluster: str, said: str):
    stage = stage.replace("REWARD", "rewards = [{ kind = 'exact', answer = 'a' }]")
    stage = stage.replace("TRAIN", 'train = { steps = 9, dtype = "bfloat16" }')
    recipe = loads(f"[parent]\npath = 'x'\n{stage}")
    planner = Planner(recipe, STAGES, parse_cluster(cluster), LLAMA_8B)
    line = planner.line(recipe.stages[-1])
    assert not line.fits and any(said in one for one in line.advice), line.advice


def replace_train(**changes) -> TrainConfig:
    return TRAIN.model_copy(update=changes)


# What the released child is made of: layers with attention, and FFN-only ones, by width; the last
# are runs that were fused.
ULTRA = {53_248: (34, 0), 37_376: (4, 0), 32_000: (2, 0), 26_624: (19, 0), 21_504: (5, 5)}
ULTRA |= {16_128: (0, 6), 10_752: (0, 1), 5376: (0, 1)}
ULTRA |= dict.fromkeys((399_360, 425_984, 343_040, 301_056), (0, 1))
CHILD = LLAMA_405B.with_words(
    (attention, f"swiglu-{width}")
    for width, counts in ULTRA.items()
    for attention, count in zip(("gqa-8", "noop"), counts, strict=True)
    for _ in range(count)
)
TIED = {"tie_word_embeddings": True}
LLAMA_1B = replace(llama(16, 2048, 32, 8192), head_dim=64, **TIED)
QWEN = replace(llama(28, 1024, 16, 3072), vocab_size=151_936, qk_norm=True, **TIED)


@pytest.mark.parametrize(
    "name, parent, child",
    [
        ("nano-8b", LLAMA_8B, None),
        ("super-49b", llama(80, 8192, 64, 28_672), None),
        ("ultra-253b", LLAMA_405B, CHILD),
        ("llama-3.2-1b", LLAMA_1B, None),
        ("qwen3-0.6b", QWEN, None),
    ],
)
def test_every_stage_of_a_recipe_fits_the_cluster_at_its_head(name, parent, child):
    path = ROOT / f"recipes/{name}.toml"
    recipe = with_defaults(load(path), STAGES)
    cluster = parse_cluster(path.read_text().split("--cluster ")[1].split()[0])
    lines = Planner(recipe, STAGES, cluster, parent, child).lines()
    assert [line.name for line in lines] == [spec.name for spec in recipe.stages]
    assert [(line.name, line.advice) for line in lines if not line.fits] == []
    assert "all stages fit" in render(lines)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


def test_a_recipe_is_planned_from_a_config_alone(config: Path):
    words = ["plan", str(ROOT / "recipes/super-49b.toml"), "--config", str(config)]
    words += ["--cluster", "32x8xH100"]
    found = CliRunner().invoke(app, [*words, "--price", "2"])
    assert found.exit_code == 0, found.output
    assert "[rloo]  fits" in found.stdout and "at 2 a GPU-hour" in found.stdout
    lines = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert {line["name"]: line for line in lines}["kd"]["tokens"] == 19_074 * 2_097_152


@pytest.mark.parametrize(
    "words, said",
    [
        (["--cluster", "8xG100", "--config", "CONFIG"], "unknown device 'G100'"),
        (["--cluster", "8xH100"], "--config"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(config, words, said):
    words = [str(config) if word == "CONFIG" else word for word in words]
    found = CliRunner().invoke(app, ["plan", str(ROOT / "recipes/super-49b.toml"), *words])
    assert found.exit_code == 2 and said in found.output
