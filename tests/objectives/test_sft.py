"""The masked objective, its stage, and a staged recipe like Nano's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.batch import OFF, ON, Batch
from tessera.data.chat import ChatEncoder
from tessera.data.documents import Documents
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import load_model
from tessera.objectives.lm import LM, SFT, SFTConfig, sft
from tessera.pipeline import run_recipe
from tessera.runs.files import RunError
from tessera.runs.recipe import loads
from tessera.runs.run import Run, read_metrics
from tessera.train.engine import Objective
from tests.toy import toy_batch, toy_model

SHAPE = (
    "{ hidden_size = 16, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 2"
)
TRAIN = "{ steps = 3, tokens_per_step = 480, microbatch_tokens = 160, sequence_length = 160 }"
PARENT = f"""
[data]
tokenizer = {{ bpe = 290, chat = true }}
tasks = {{ calc = 60 }}
[parent]
architecture = {SHAPE}, intermediate_size = 16 }}
train = {TRAIN}
"""
# Nano's three stages: reasoning alone, both mixed, a smaller blend of other kinds.
NANO = f"""
[data-1]
model = "parent"
switch = "detailed thinking"
tasks = {{ calc = 60 }}
format = "chat"
reasoning = "on"
[sft-1]
train = {TRAIN}
[data-2]
model = "sft-1"
sources.on = {{ tasks = {{ calc = 60 }}, format = "chat", reasoning = "on", weight = 2.0 }}
sources.off = {{ tasks = {{ calc = 60 }}, format = "chat", reasoning = "off" }}
[sft-2]
train = {TRAIN}
evaluate_every = 1
[data-3]
model = "sft-2"
sources.sort = {{ tasks = {{ sort = 60 }}, format = "chat" }}
sources.compare = {{ tasks = {{ compare = 60 }}, format = "chat", weight = 0.5, heldout = 10 }}
[sft-3]
train = {TRAIN}
"""


MORE = (["--thinking", "on"], ["--thinking", "off"], [], ["--thinking", "maybe"])


def batch(seed: int = 0) -> Batch:
    """Rows of text, of off and of on, with untrained positions."""
    found = toy_batch(seed, rows=6)
    found.mode = torch.arange(6)[:, None].remainder(3).expand_as(found.tokens).contiguous()
    return found


def gradient(objective: Objective, given: Batch) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    module = toy_model()
    ((loss, stats),) = objective.losses(module, given)
    loss.backward()
    return float(loss.detach()), [p.grad for p in module.parameters() if p.grad is not None], stats


def test_the_loss_and_its_gradient_are_those_of_pretraining_on_the_trained_tokens() -> None:
    ours, theirs = gradient(SFT(), batch()), gradient(LM(), batch())
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_not_trained_has_no_part_in_the_gradient() -> None:
    changed = batch()
    changed.labels = torch.where(changed.weight > 0, changed.labels, 7)
    assert gradient(SFT(), changed)[0] == gradient(SFT(), batch())[0]


def test_the_losses_of_on_and_off_are_those_of_their_tokens() -> None:
    *_, stats = gradient(SFT(), batch())
    for name, mode in (("on", ON), ("off", OFF)):
        alone = batch()
        assert alone.mode is not None
        alone.weight = alone.weight * (alone.mode == mode)
        loss, *_ = gradient(LM(), alone)
        assert float(stats[f"loss_{name}"]) == pytest.approx(loss, rel=1e-5)
        assert float(stats[f"loss_{name}/weight"]) == float(alone.weight.sum()) > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    run_recipe(loads(PARENT + NANO), home, quiet=True)
    return home / "recipe"


def test_a_recipe_of_three_stages_trains_each_on_its_own_chats(runs: Path) -> None:
    one, two, three = (read_metrics(runs / f"sft-{n}") for n in (1, 2, 3))
    assert all(row["loss_off"] is None and row["loss"] == row["loss_on"] for row in one)
    assert "heldout_off" not in one[-1] and one[-1]["heldout"] == one[-1]["heldout_on"]
    assert all("heldout" in row for row in two), "evaluate_every = 1"
    assert math.isfinite(two[-1]["heldout_off"]) and math.isfinite(two[-1]["heldout_on"])
    assert {"heldout", "heldout_on", "heldout_off"} <= set(three[-1])
    table = (runs / "sft-2" / "tables" / "mix.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in table] == ["off", "on"]


def test_the_model_asks_in_the_words_it_was_trained_with(runs: Path) -> None:
    trained, made = load_tokenizer(runs / "data-2"), load_tokenizer(runs / "sft-3")
    messages = [{"role": "user", "content": "start 1 a+1 mod 10"}]
    asked = [ChatEncoder.of(one).prompt(messages, "on") for one in (trained, made)]
    assert asked[0] == asked[1] and made.eos_ids == trained.eos_ids
    parent = load_tokenizer(runs / "parent")  # the switch is a fact of the model that was trained
    assert [ChatEncoder.of(one).switch for one in (parent, made)] == ["none", "detailed thinking"]
    assert load_model(runs / "sft-3").config.vocab_size == made.vocab_size


def test_a_model_is_asked_with_the_switch_on_the_command_line(runs: Path) -> None:
    words = ["generate", str(runs / "sft-3"), "--prompt", "start 1 a+1 mod 10", "--max-tokens", "3"]
    asked = [CliRunner().invoke(app, [*words, *more, "--json"]) for more in MORE]
    assert [one.exit_code for one in asked] == [0, 0, 0, 2]
    texts = [json.loads(one.stdout) for one in asked[:3]]
    assert all(len(one["token_ids"]) <= 3 for one in texts)
    assert texts[0]["logprobs"] != texts[1]["logprobs"] != texts[2]["logprobs"]


def _sft(path: Path, runs: Path, data: str, stop: int | None = None, **train: Any) -> None:
    sizes = {"steps": 6, "tokens_per_step": 480, "microbatch_tokens": 160, "sequence_length": 160}
    config = SFTConfig(train={**sizes, "save_seconds": 1e-9, **train})  # type: ignore[arg-type]
    inputs = {"model": runs / "parent", "data": runs / data}
    plain = Documents.batches

    def stopping(self: Documents, step: int) -> list[Batch]:
        if step == stop:
            raise KeyboardInterrupt
        return plain(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "batches", stopping)
        with Run.open(path, stage="sft", config={}, inputs=inputs, seed=0, quiet=True) as run:
            sft(config, run, inputs)
            run.finish()


def test_a_stage_that_was_stopped_goes_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    _sft(tmp_path / "straight", runs, "data-2")
    with pytest.raises(KeyboardInterrupt):
        _sft(tmp_path / "stopped", runs, "data-2", stop=3)
    _sft(tmp_path / "stopped", runs, "data-2")
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "stopped")
    weights = [load_model(tmp_path / name).state_dict() for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_data_without_chats_and_of_another_tokenizer_are_refused(
    runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match='format = "chat"'):
        _sft(tmp_path / "no", runs, "data")
    other = '[data]\ntokenizer = { bpe = 400, chat = true }\ntasks = { sort = 90 }\nformat = "chat"'
    run_recipe(loads(other), tmp_path, quiet=True)
    with pytest.raises(RunError, match=r"token \d+ and the model has \d+"):
        _sft(tmp_path / "other", runs, str(tmp_path / "recipe" / "data"))


def test_chats_that_a_sequence_does_not_hold_are_counted(runs: Path, tmp_path: Path) -> None:
    _sft(tmp_path / "short", runs, "data-2", steps=1, sequence_length=115)
    assert (
        "chats are longer than 115 tokens and left out"
        in (tmp_path / "short" / "log.txt").read_text()
    )
