"""The price of a word in vLLM: table arithmetic with an engine whose layers add up exactly."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tessera.export.padding import expressible
from tessera.model.config import KINDS
from tessera.pipeline import STAGES
from tessera.puzzle import vllm_cost
from tessera.puzzle.cost_table import read_costs
from tessera.puzzle.search import SearchConfig, find
from tessera.puzzle.space import Space, write_space
from tessera.puzzle.vllm_cost import VLLMCostConfig, prefill_and_step, served, unloadable
from tessera.runs.files import FailureError, RunError
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import Run, read_json, read_table
from tessera.vllm.engine import find_python
from tests import tiny

PARENT = (("gqa-4", "swiglu-600"),) * 3
SPACE = Space(((("gqa-4", "gqa-1", "linear", "noop"),
                ("swiglu-600", "swiglu-300", "swiglu-260", "linear", "noop")),) * 3)  # fmt: skip
SCENARIO = {"batch": 2, "prompt": 5, "new": 9}

# Seconds (prefill, decode step) that the engine below takes for a layer, and around all layers.
SPENT = {"gqa-4": (0.7, 0.5), "gqa-1": (0.4, 0.3), "swiglu-768": (0.3, 0.21),
         "swiglu-512": (0.2, 0.125)}  # fmt: skip
AROUND = (2.0, 1.0)
# A `vllm` that reads the config it is given and moves the clock by the sum of its layers.
ENGINE = """
import json, time
from types import SimpleNamespace
NOW = [0.0]
time.process_time = time.perf_counter = lambda: NOW[0]
SPENT, AROUND = %r, %r
__version__ = "0"

class SamplingParams:
    def __init__(self, max_tokens, **rest):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, load_format, **rest):
        cache = SimpleNamespace(kv_cache_size_tokens=rest.get("gpu_memory_utilization", 1000))
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
        config = json.load(open(model + "/config.json"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        self.layers = [AROUND]
        for block in config["block_configs"]:
            if not block["attention"]["no_op"]:
                group = block["attention"]["n_heads_in_group"]
                self.layers.append(SPENT["gqa-%%d" %% (heads // group)])
            if not block["ffn"]["no_op"]:
                width = round(block["ffn"]["ffn_mult"] * hidden * 2 / 3)
                self.layers.append(SPENT["swiglu-%%d" %% width])

    def generate(self, prompts, sampling, use_tqdm):
        new = sampling.max_tokens
        NOW[0] += sum(first + (new - 1) * step for first, step in self.layers)
        output = SimpleNamespace(token_ids=[0] * new)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]
"""


# Its torch, for a process that starts at once.
TORCH = """
from types import SimpleNamespace
cuda, get_num_threads = SimpleNamespace(is_available=lambda: False), lambda: 1
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    """Paths of a parent and a library; the `vllm` of processes is the engine above."""
    packages = tmp_path / "engine"
    packages.mkdir()
    (packages / "vllm.py").write_text(ENGINE % (SPENT, AROUND))
    (packages / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    with opened(tmp_path / "library") as run:
        write_space(SPACE, run)
        run.finish()
    return {"parent": tiny.saved(tmp_path / "parent", PARENT), "library": tmp_path / "library"}


def opened(path: Path, config: VLLMCostConfig | None = None) -> Run:
    table = config.model_dump(mode="json") if config else {}
    return Run.open(path, stage="cost_vllm", config=table, inputs={}, seed=0, quiet=True)


def priced(path: Path, inputs: dict[str, Path], **table) -> Path:
    fields = {"scenario": SCENARIO, "rounds": 3, "depth": 4, "python": sys.executable}
    config = VLLMCostConfig(**(fields | table))
    with opened(path, config) as run:
        vllm_cost.stage(config, run, inputs)
        run.finish()
    return path


def test_an_engine_whose_layers_add_up_gives_back_its_parts(inputs, tmp_path):
    costs = read_costs(priced(tmp_path / "costs", inputs))
    table = costs.first
    config = tiny.config(PARENT)
    spent = SPENT | {"noop": (0.0, 0.0), "": AROUND}
    for key, columns in [(("base", ""), table.base), *table.words.items()]:
        word = key[1] if key[0] == "base" else served(config, key)[1]
        found = columns["prefill_seconds"], columns["decode_seconds"]
        assert found == pytest.approx(spent[word])
    words = [("gqa-4", "swiglu-600"), ("noop", "swiglu-300"), ("gqa-1", "noop")]
    total = table.total(words)
    assert total["parameters"] == config.with_words(words).num_params()
    seconds = 2 + 0.7 + 0.3 + 0.2 + 0.4 + 8 * (1 + 0.5 + 0.21 + 0.125 + 0.3)
    assert total["seconds"] == pytest.approx(seconds)


def test_counted_bytes_are_those_of_the_exported_model(inputs, tmp_path):
    table = read_costs(priced(tmp_path / "costs", inputs)).first
    words = [("gqa-4", "swiglu-600"), ("noop", "swiglu-300"), ("gqa-1", "noop")]
    total, exported = table.total(words), expressible(tiny.config(words))
    assert total["kv_bytes_per_token"] == exported.kv_bytes_per_token()
    cache = table.scenario.cached_tokens * exported.kv_bytes_per_token()
    assert total["bytes"] == 4 * exported.num_params() + cache


def test_noise_only_adds_so_that_a_quiet_start_among_loud_ones_decides():
    quiet, loud = [(1.0, 9.0)] * 10, [(1.7, 13.0)] * 10
    assert prefill_and_step(quiet, 9) == (1.0, 1.0) == prefill_and_step(loud + quiet, 9)
    assert prefill_and_step(loud, 9)[1] > 1.4


def test_what_vllm_cannot_load_has_no_row_and_is_in_no_architecture(inputs, tmp_path):
    costs = priced(tmp_path / "costs", inputs)
    words = {(row["kind"], row["word"]) for row in read_table(costs, "costs")}
    offered = {(kind, word) for kind, of in zip(KINDS, SPACE.layers[0], strict=True) for word in of}
    unavailable = {("attention", "linear"), ("ffn", "linear")}
    assert words == offered - unavailable | {("base", "")}
    told = read_json(costs, "scenarios")["unavailable"]
    assert {(one["kind"], one["word"]) for one in told} == unavailable
    assert "replace_with_linear" in told[0]["reason"]

    rows = [{"layer": i, "kind": k, "word": w, "kl": 0.0 if w == "linear" else 1.0}
            for i, k, w in SPACE.replacements()]  # fmt: skip
    with opened(tmp_path / "scores") as run:
        write_space(SPACE, run)
        run.write_table("scores", rows)
        run.finish()
    needed = {"scores": tmp_path / "scores", "costs": costs, "library": None, "data": None}
    (best,), *_ = find(SearchConfig(constraints={"throughput": "1.2x"}), inputs | needed)
    assert "linear" not in {word for pair in best["words"] for word in pair}


def test_words_that_pad_to_the_same_are_one_probe_and_cost_the_same(inputs, tmp_path, monkeypatch):
    asked = []
    drive = vllm_cost.drive
    monkeypatch.setattr(vllm_cost, "drive", lambda *given: asked.append(given) or drive(*given))
    table = read_costs(priced(tmp_path / "costs", inputs)).first
    assert len(asked) == 5  # the base, gqa-4, gqa-1, and widths 768 and 512
    wider, narrower = (table.words["ffn", f"swiglu-{width}"] for width in (300, 260))
    assert wider["seconds"] == narrower["seconds"] and wider["bytes"] == narrower["bytes"]
    assert wider["parameters"] > narrower["parameters"]


def test_an_interrupted_stage_asks_only_for_what_is_missing(inputs, tmp_path, monkeypatch):
    drive, asked = vllm_cost.drive, []

    def stops_at_the_third(*given):
        asked.append(given)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return drive(*given)

    monkeypatch.setattr(vllm_cost, "drive", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        priced(tmp_path / "costs", inputs)
    priced(tmp_path / "costs", inputs)
    assert len(asked) == 6  # the third twice
    undisturbed = priced(tmp_path / "again", inputs)
    assert read_table(tmp_path / "costs", "costs") == read_table(undisturbed, "costs")


def test_every_scenario_and_batch_is_measured_in_the_same_processes(inputs, tmp_path, monkeypatch):
    asked = []
    drive = vllm_cost.drive
    monkeypatch.setattr(vllm_cost, "drive", lambda *given: asked.append(given) or drive(*given))
    scenarios = {"chat": SCENARIO, "long": {"batch": 1, "prompt": 90, "new": 3}}
    path = priced(tmp_path / "costs", inputs, scenarios=scenarios, batches=[1, 4], starts=2)
    assert len(asked) == 2 * 5
    assert asked[0][1]["arguments"]["max_model_len"] == 93  # beyond the parent's context of 64
    assert sorted(read_costs(path).tables) == [("chat", 1), ("chat", 4), ("long", 1), ("long", 4)]


def test_a_family_that_vllm_cannot_load_is_refused_before_anything_runs():
    words = [("attention", "gqa-4"), ("ffn", "swiglu-600")]
    with pytest.raises(RunError, match="no child of this parent: QK norm"):
        unloadable(tiny.config(PARENT, qk_norm=True), words)
    mixed = tiny.config((*PARENT, ("gqa-4", "linear")))
    with pytest.raises(RunError, match="layer 3 of the parent, linear: .* replace_with_linear"):
        unloadable(mixed, [*words, ("ffn", "linear")])


def test_a_missing_environment_is_an_error_that_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="make venv-vllm"):
        find_python(None)
    with pytest.raises(RunError, match="'nowhere/python' is no program"):
        find_python("nowhere/python")
    there = tmp_path / ".venv-vllm" / "bin" / "python"
    there.parent.mkdir(parents=True)
    there.symlink_to(sys.executable)
    assert find_python(None) == os.path.join(".venv-vllm", "bin", "python")


def test_an_engine_that_does_not_start_is_an_error_with_its_last_words(inputs, tmp_path):
    (tmp_path / "engine" / "vllm.py").write_text("raise ImportError('no kernels here')")
    with pytest.raises(FailureError, match="no kernels here"):
        priced(tmp_path / "costs", inputs)


def test_a_scenario_that_does_not_fit_the_cache_is_refused_rather_than_timed(inputs, tmp_path):
    with pytest.raises(FailureError, match="holds 27 tokens and a scenario needs 28"):
        priced(tmp_path / "costs", inputs, arguments={"gpu_memory_utilization": 27})


def test_keys_that_the_stage_sets_are_refused_as_arguments():
    with pytest.raises(RecipeError, match=r"arguments: dtype: the stage sets this itself"):
        validate(VLLMCostConfig, {"arguments": {"dtype": "float16"}}, "cost_vllm")
    table = {"arguments": {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}}
    assert validate(VLLMCostConfig, table, "cost_vllm").arguments["tensor_parallel_size"] == 2
    assert STAGES["cost_vllm"].gives == STAGES["cost"].gives


@pytest.mark.vllm
def test_the_real_engine_prices_every_word(inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    try:
        python = find_python(None)
    except RunError:
        pytest.skip("needs vLLM's CPU build: make venv-vllm")
    with opened(tmp_path / "small") as run:
        write_space(Space(((("gqa-4", "noop"), ("swiglu-600", "noop")),) * 3), run)
        run.finish()
    needed = inputs | {"library": tmp_path / "small"}
    options = {"python": python, "enforce_eager": True, "threads": 1}
    path = priced(tmp_path / "costs", needed, **options)
    told = read_json(path, "scenarios")
    assert told["engine"].startswith("vLLM 0.") and told["clock"] == "process"
    table = read_costs(path).first
    assert table.base["prefill_seconds"] > 0 and table.base["decode_seconds"] > 0
    assert table.words["attention", "gqa-4"]["seconds"] > 0
    assert table.words["ffn", "swiglu-600"]["seconds"] > 0
    assert table.words["ffn", "noop"]["seconds"] == 0
