"""Warnings of a recipe's stages: what will fail is said beforehand, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.pipeline import STAGES
from tessera.runs.plan import plan
from tessera.runs.recipe import load, loads

ROOT = Path(__file__).parents[2]
RECIPE = """
[data]
tokenizer = { bpe = 300 }
tasks = { calc = 40 }
[parent]
architecture = { hidden_size = 16, num_hidden_layers = 2, intermediate_size = 16 }
train = { steps = 1 }
[bld]
train = { steps = 1 }
space = { ffn = ["50%"] }
[score]
[cost]
source = "counted"
[search]
constraints = { parameters = "0.9x" }
[search-dropped]
method = "dropped"
constraints = { parameters = "0.9x" }
[search-attention]
method = "dropped-attention"
constraints = { parameters = "0.9x" }
[child]
architecture = "search"
[data-chat]
model = "parent"
tasks = { calc = 40 }
format = "chat"
[sft]
train = { steps = 1 }
[compare]
models = ["child"]
[eval]
tasks = ["calc@2"]
[eval-text]
stage = "eval"
tasks = ["calc@2"]
asking = "text"
"""


def told(*overrides: str) -> dict[str, str]:
    """The warnings on the recipe's stages, by name."""
    return of(loads(RECIPE, overrides))


def of(recipe) -> dict[str, str]:
    steps = plan(recipe, Path("absent"), (), STAGES)
    return {step.name: " ".join(found) for step in steps if (found := step.warnings(steps))}


def test_what_cannot_go_well_is_said_of_the_stage():
    found = told()
    assert set(found) == {"search-dropped", "data-chat", "sft", "compare", "eval"}
    assert "no noop for the ffn: add it to space.ffn of the [bld] table" in found["search-dropped"]
    for name in ("data-chat", "sft", "eval"):
        assert "trained without chat = true" in found[name]
    assert "[data-chat], which holds chats" in found["compare"]
    assert 'say compare.data = "data"' in found["compare"]


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ('bld.space.ffn=["50%", "noop"]', "search-dropped"),
        ('bld.space.layers={ "1" = { ffn = ["noop"] } }', "search-dropped"),
        ("data.tokenizer={ bpe = 300, chat = true }", "sft"),
        ('compare.data="data"', "compare"),
        ('compare.data="data-chat"', "compare"),
    ],
)
def test_what_is_put_right_is_said_no_more(override: str, name: str):
    assert name not in told(override)


def test_a_space_without_any_noop_cannot_lose_attention_either():
    assert (
        "no noop for the attention" in told('bld.space.attention=["divisors"]')["search-attention"]
    )


def test_the_quickstart_has_no_warnings():
    found = {path.name: of(load(path, ())) for path in (ROOT / "recipes").glob("quick*.toml")}
    assert found == {"quickstart.toml": {}}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], True),
        (['data-chat.switch="detailed thinking"'], False),
        (['data-chat.switch="none"'], False),
        (['data.tokenizer={ bpe = 300, chat = true, tokens = ["a"] }'], True),
    ],
)
def test_chats_with_and_without_reasoning_for_a_model_without_a_switch(
    overrides: list[str], said: bool
):
    found = told("data.tokenizer={ bpe = 300, chat = true }", *overrides).get("data-chat", "")
    assert ('set switch = "detailed thinking"' in found) == said


def test_a_model_that_was_taught_the_switch_keeps_it():
    taught = RECIPE.replace('format = "chat"', 'format = "chat"\nswitch = "/no_think"')
    more = '[data-more]\nmodel = "sft"\ntasks = { calc = 40 }\nformat = "chat"\n'
    recipe = loads(taught + more, ["data.tokenizer={ bpe = 300, chat = true }"])
    assert "data-more" not in of(recipe)
