"""Checkpoints that are broken say where; models are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.model import tensors
from tessera.model.checkpoint import load_model, save_model
from tessera.model.source import CheckpointError
from tessera.runs.files import WriteError
from tests import tiny

GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 3000)
    save_model(tiny.model(tiny.PARENT), tmp_path / "sharded")
    return tmp_path / "sharded"


def rewrite(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of an unsharded checkpoint; None takes one away."""
    file = directory / "model.safetensors"
    changed = load_file(file) | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({key: value for key, value in changed.items() if value is not None}, file)


def reconfigure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    return str(error.value)


# Loading.


def test_every_load_is_its_own(single):
    first, second = load_model(single), load_model(single)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    with torch.no_grad():
        first.norm.weight.zero_()
    assert second.norm.weight.abs().min() > 0 and load_model(single).norm.weight.abs().min() > 0


def test_frozen_has_no_gradients_and_does_not_train(single):
    frozen, free = load_model(single, frozen=True), load_model(single)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert free.training and all(p.requires_grad for p in free.parameters())


def test_dtypes(single):
    half = load_model(single, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.inverse_frequencies(torch.device("cpu")).dtype == torch.float32
    tokens = tiny.tokens(29, 2, 9)
    assert half(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(half(tokens).float(), load_model(single)(tokens), atol=0.2, rtol=0)


def test_nothing_is_left_on_the_meta_device(single):
    module = load_model(single)
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_old_rotary_buffers_are_ignored(single):
    rewrite(single, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    load_model(single)


# Broken checkpoints.


def test_missing_shards_are_named(sharded):
    total = len(list(sharded.glob("model-*.safetensors")))
    for number in (2, 3):
        (sharded / f"model-{number:05}-of-{total:05}.safetensors").unlink()
    text = refusal(sharded)
    assert f"model-00002-of-{total:05}.safetensors, model-00003-of-{total:05}" in text
    assert f"2 of the {total} shards that model.safetensors.index.json lists" in text


def test_an_index_that_does_not_fit_its_shards(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    file.write_text(json.dumps(index))
    assert "puts model.norm.weight in model-00001-of" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": "../b"}}'])
def test_an_index_that_is_none(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "is not an index of shards" in refusal(sharded)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:-1000],
        lambda whole: whole[:100],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: b"\xff" * 300,
        lambda whole: whole[:8] + b"\xff" + whole[9:],
        lambda whole: whole + b"more",
        lambda whole: whole.replace(b'"F32"', b'"F99"', 1),
        lambda whole: b"version https://git-lfs.github.com/spec/v1",
    ],
)
def test_a_damaged_file_is_named_with_its_size(damage, single):
    file = single / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(single)
    assert message.startswith(str(file))
    assert str(file.stat().st_size) in message or "git lfs pull" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_refused_with_the_way_out(name, single):
    (single / "model.safetensors").rename(single / name)
    text = refusal(single)
    assert f"{name} is a pickle" in text and "save_pretrained(OUT)" in text


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(single)


def test_a_shape_that_does_not_fit(single):
    rewrite(single, **{GATE.replace(".", "__"): torch.zeros(24, 15)})
    assert f"{GATE} in {single}/model.safetensors is [24, 15]; config.json asks for [24, 16]" in (
        refusal(single)
    )


def test_missing_tensors_are_named(single):
    reconfigure(single, num_hidden_layers=4)
    text = refusal(single)
    assert "lacks model.layers.3." in text and "6 more, which config.json asks for" in text


def test_a_missing_head_has_its_hint(single):
    rewrite(single, lm_head__weight=None)
    assert "set tie_word_embeddings to true" in refusal(single)


def test_unexpected_tensors_are_named(single):
    reconfigure(single, num_hidden_layers=2)
    text = refusal(single)
    assert "holds model.layers.2." in text and "config.json has no place" in text


def test_tied_with_another_head_is_refused(single):
    reconfigure(single, tie_word_embeddings=True)
    assert "says tie_word_embeddings, but lm_head.weight" in refusal(single)


def test_integers_are_refused(single):
    rewrite(single, **{GATE.replace(".", "__"): torch.zeros(24, 16, dtype=torch.int8)})
    assert "is torch.int8; quantized checkpoints are not supported" in refusal(single)


# Saving.


def test_a_model_takes_the_tokenizer_along(single, tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in names:
        (single / name).write_text(name)
    (single / "unrelated.txt").write_text("stays behind")
    save_model(load_model(single), tmp_path / "out", tokenizer_from=single)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", *names}


def test_a_tokenizer_from_nowhere_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        save_model(tiny.model(), tmp_path / "out", tokenizer_from=tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_model(single, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 2000)
    save_model(tiny.model(seed=1), single)
    assert not (single / "model.safetensors").exists()
    assert load_model(single).config == tiny.config()
    assert [file.name for file in single.parent.iterdir()] == ["single"]


def test_a_full_disk_leaves_the_old_model(single, monkeypatch):
    before = {file.name: file.read_bytes() for file in single.iterdir()}
    saved = []

    def full(tensor):
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(raw(tensor))
        return saved[-1]

    raw = tensors.raw
    monkeypatch.setattr(tensors, "raw", full)
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 2000)
    with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)):
        save_model(tiny.model(seed=1), single)
    assert saved and {file.name: file.read_bytes() for file in single.iterdir()} == before
    assert [file.name for file in single.parent.iterdir()] == ["single"]


def test_what_a_kill_left_behind_is_cleared(single, tmp_path):
    (tmp_path / ".single.tmp").mkdir()
    (tmp_path / ".single.tmp/half").touch()
    single.rename(tmp_path / ".single.old")  # the instant between the two renames
    save_model(tiny.model(), single)
    assert [file.name for file in tmp_path.iterdir()] == ["single"]


@pytest.mark.parametrize("name", ["notes.md", "thesis.tex", "folder"])
def test_a_directory_that_is_no_model_is_not_replaced(name, tmp_path):
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=name):
        save_model(tiny.model(), tmp_path)
    assert (tmp_path / name).exists()
