"""The recipes of whole models, run to their ends as they stand: only sizes and paths are others."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_manifest
from tests import nemotron
from tests.cases.answering import saved
from tests.rl.test_asked import judge

RECIPES = Path(__file__).parents[1] / "recipes"
SERVER = "http://127.0.0.1:8000/v1"
# The most of each; 0 stays 0. A table's `heldout` is a share of few documents.
SIZES = {
    "steps": 2,
    "tokens_per_step": 512,
    "microbatch_tokens": 256,
    "sequence_length": 128,
    "pairs_per_step": 4,
    "prompts_per_rollout": 6,
    "samples": 4,
    "max_tokens": 24,
    "tokens": 512,
    "calibration_tokens": 256,
    "evaluate_every": 1,
    "limit": 20,
    "tensor": 1,
    "shard": 1,
    "context": 1,
    "pipeline": 1,
    "heldout": 0.2,
}
# A toy has no runs of layers for a limit in bytes to choose among.
MORE = {"super-49b": ["search.constraints.parameters=0.8x"]}
TOY = """
[data]
tokenizer = {{ bpe = 300, chat = true }}
format = "chat"
paths = ["{home}/SFT/*/*.jsonl"]
switch = "detailed thinking"
[parent.architecture]
hidden_size = 32
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 8
intermediate_size = 1024
[parent.train]
steps = 150
tokens_per_step = 1024
microbatch_tokens = 1024
lr = 5e-3
"""
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, other documents, and a parent that has seen its rows."""
    home = nemotron.written(tmp_path_factory.mktemp("home"))
    rows = [json.dumps({"text": f"Document {n} tells of {n % 7} things. " * 9}) for n in range(60)]
    (home / "documents.jsonl").write_text("\n".join(rows))
    run_recipe(loads(TOY.format(home=home), name="toy"), home / "runs", quiet=True)
    saved(home / "qwen", QWEN)
    return home


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with judge(0.0) as url:
        yield url


def smaller(table: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Overrides for every size that a recipe's tables name."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from smaller(value, f"{where}{key}.")
        elif key in SIZES:
            yield f"{where}{key}={min(value, SIZES[key]) if isinstance(value, int) else 0.2}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nano-8b", "super-49b", "ultra-253b", "llama-3.2-1b", "qwen3-0.6b"]
)
def test_a_recipe_runs_whole(
    name: str, home: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(home)
    text = (RECIPES / f"{name}.toml").read_text().replace(SERVER, server)
    parent = home / ("qwen" if "qwen" in name else "runs/toy/parent")
    overrides = [*smaller(tomllib.loads(text)), f"parent.path={parent}", *MORE.get(name, ())]
    if "[data]" in text:
        overrides.append('data.paths=["documents.jsonl"]')
    steps = run_recipe(loads(text, overrides), tmp_path / "runs", quiet=True)
    assert {read_manifest(step.path).status for step in steps} == {"done"}
