from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from tessera.runs.recipe import Config, RecipeError, dumps, identity, load, loads, validate

TEXT = """
name = "nano"
seed = 7
[data]
files = ["a.txt"]
[kd-long]
train = { lr = 1e-3, steps = 10 }
[again]
stage = "kd"
"""


class Train(Config):
    lr: float = 1e-3
    steps: int = 10
    schedule: Literal["cosine", "wsd"] = "cosine"


class KD(Config):
    train: Train = Field(default_factory=Train)
    weight: float | None = None
    files: tuple[Path, ...] = ()
    mix: dict[str, Train] = Field(default_factory=dict)
    required: int


def test_tables_are_stages_in_order():
    recipe = loads(TEXT)
    assert (recipe.name, recipe.seed) == ("nano", 7)
    assert [(s.name, s.stage) for s in recipe.stages] == [
        ("data", "data"),
        ("kd-long", "kd"),
        ("again", "kd"),
    ]
    assert recipe.stages[2].table == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("12", 12),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('{ a = "b" }', {"a": "b"}),
        ("../models/stories260k", "../models/stories260k"),
        ('"12"', "12"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("2024-01-01", "2024-01-01"),
        ("1\nseed = 2", "1\nseed = 2"),
        ("", ""),
    ],
)
def test_an_override_is_toml_or_a_bare_string(text: str, value: Any):
    recipe = loads(TEXT, [f"kd-long.train.lr={text}", "seed=3", f"defaults.lr={text}"])
    assert recipe.stages[1].table["train"] == {"lr": value, "steps": 10}
    assert (recipe.seed, recipe.defaults["lr"]) == (3, value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sed = 1\n[kd]", [], r"sed: unknown key.*did you mean 'seed'"),
        ("seed = -1\n[kd]", [], "whole number"),
        ("seed = true\n[kd]", [], "whole number"),
        ("", [], "holds no stage"),
        ("[kd", [], r"not valid TOML: .*"),
        ("[kd]\nlr = = 3", [], r"not valid TOML: .*\n  lr = = 3"),
        ('name = "../x"\n[kd]', [], "names no directory"),
        ('["a/b"]', [], "names no directory"),
        ("[kd]\nstage = 3", [], "give its name as a string"),
        (TEXT, ["kd-lnog.train.lr=1"], r"no stage 'kd-lnog'; did you mean 'kd-long'"),
        (TEXT, ["kd-long.train.lr"], "is no override"),
        (TEXT, ["sede=1"], "did you mean 'seed'"),
        (TEXT, ["data.files.x=1"], r"data\.files is \['a\.txt'\], not a table"),
    ],
)
def test_what_is_off_is_said(text: str, overrides: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        loads(text, overrides)


def test_a_missing_recipe_names_the_nearest(tmp_path: Path):
    (tmp_path / "quickstart.toml").write_text("[kd]")
    with pytest.raises(RecipeError, match=r"did you mean '.*quickstart\.toml'"):
        load(tmp_path / "quikstart.toml")


@pytest.mark.parametrize(
    ("table", "messages"),
    [
        ({"train": {"ler": 1}}, ["kd.train.ler: unknown key; did you mean 'lr'", "kd.required"]),
        ({"required": "3"}, ["kd.required: Input should be a valid integer (given: '3')"]),
        ({"required": 1, "train": {"steps": 0.5}}, ["kd.train.steps:", "0.5"]),
        ({"required": 1, "train": {"schedule": "cosin"}}, ["did you mean 'cosine'? Allowed: cosi"]),
        ({"required": 1, "mix": {"x": {"lrr": 1.0}}}, ["kd.mix.x.lrr: unknown key; did you mean"]),
        ({}, ["kd.required: missing; set it", "kd.required=..."]),
        ({"required": True}, ["valid integer"]),
    ],
)
def test_wrong_keys_are_explained(table: dict[str, Any], messages: list[str]):
    with pytest.raises(RecipeError) as error:
        validate(KD, table, "kd")
    for message in messages:
        assert message in str(error.value)


def test_toml_types_become_the_config_types():
    config = validate(KD, {"required": 1, "weight": 2, "files": ["a"]}, "kd")
    assert config.weight == 2.0 and config.files == (Path("a"),)


def test_dumps_is_toml_that_validates_to_the_same_config():
    config = validate(KD, {"required": 1, "mix": {"a b": {"lr": 1e-5}}}, "kd")
    text = dumps(config.model_dump(mode="json"), "kd")
    assert validate(KD, tomllib.loads(text)["kd"], "kd") == config


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("ab.-é", min_size=1), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("ab.-é", min_size=1), values, max_size=4))
def test_dumps_then_parse_is_the_identity(table: dict[str, Any]):
    assert tomllib.loads(dumps(table)) == table


class Cached(Config):
    kept: Train = Field(default_factory=Train)
    cache: Train = Field(default_factory=Train, exclude=True)


def test_identity_leaves_out_what_is_excluded_from_dumps():
    assert set(identity(Cached())) == {"kept"}
