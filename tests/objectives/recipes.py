"""A recipe of a small library, and what a library run of it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.pipeline import run_recipe
from tessera.runs.recipe import loads
from tessera.runs.run import read_json

TRAIN = "{ steps = 4, tokens_per_step = 64, microbatch_tokens = 64, sequence_length = 32, lr = 5e-3"
SHAPE = "{ hidden_size = 16, num_hidden_layers = 4, num_attention_heads = 2, intermediate_size = 16"
PARENT = f"""
[data]
tokenizer = "byte"
tasks = {{ calc = 40 }}
heldout = 0.2
[parent]
architecture = {SHAPE}, num_key_value_heads = 2 }}
train = {TRAIN} }}
"""
UNITS = f"""
train = {TRAIN}, save_seconds = 1e-9 }}
calibration_tokens = 256
"""
BLD = UNITS + 'space = { attention = ["gqa-1", "noop"], ffn = ["50%", "linear", "noop"] }\n'
SEARCH = """
[score]
tokens = 64
microbatch_tokens = 64
sequence_length = 32
[cost]
source = "counted"
[search]
constraints = { parameters = "0.7x" }
solutions = 3
"""


def run(runs: Path, text: str, **options: Any) -> Path:
    """Brings a recipe to its end; returns the directory of its runs."""
    run_recipe(loads(PARENT + text), runs, quiet=True, **options)
    return runs / "recipe"


def units(library: Path) -> dict[str, bytes]:
    """Every file of a library run, by its name there."""
    files = sorted((library / "library").rglob("*.safetensors"))
    return {str(file.relative_to(library / "library")): file.read_bytes() for file in files}


def tables(library: Path) -> list[Any]:
    return [read_json(library, name) for name in ("space", "pairs", "servable", "block_influence")]
