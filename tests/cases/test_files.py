"""What people give as MODEL: read as transformers reads it, or named with what to give instead."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.tokenizer import byte_tokenizer, load_tokenizer
from tessera.export.engines import ExportError
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.families import read_config
from tessera.model.source import CheckpointError, model_config, resolve
from tessera.runs.files import RunError
from tests import tiny
from tests.cases.odd import PLAIN, sentencepiece_model, write

TIED = {"tie_word_embeddings": True}


def saved(directory: Path, words: Any = tiny.PARENT, **changes: Any) -> Path:
    return tiny.saved(directory, words, **changes)


def rename(directory: Path, **files: dict[str, torch.Tensor]) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})


def index(directory: Path, places: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": places})
    (directory / "model.safetensors.index.json").write_text(text)


def same(directory: Path, module: Any) -> bool:
    found = load_model(directory, frozen=True).state_dict()
    return all(torch.equal(value, found[key]) for key, value in module.state_dict().items())


# A LoRA directory, a hub cache, and others.


def test_an_adapter_is_named_with_its_base_and_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, adapter_config={"base_model_name_or_path": "owner/base", "peft_type": "LORA"})
    rename(tmp_path, adapter_model={"a": torch.zeros(1)})
    for given in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"adapter.*owner/base.*merge_and_unload"):
            resolve(given)
    write(tmp_path, config={"model_type": "llama"})  # some tools copy the base's config beside it
    with pytest.raises(CheckpointError, match=r"owner/base.*merge_and_unload"):
        resolve(tmp_path)


def cached(root: Path, *commits: str, main: str | None = None) -> Path:
    """A model's directory in the hub cache."""
    home = root / "models--owner--name"
    for commit in commits:
        saved(home / "snapshots" / commit)
    if main is not None:
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(main)
    return home


def test_a_hub_caches_directory_is_its_snapshot(tmp_path: Path) -> None:
    home = cached(tmp_path, "aaa", "bbb", main="bbb")
    assert resolve(home) == resolve(home / "snapshots") == home / "snapshots/bbb"
    assert model_config(home) == read_config(home / "snapshots/bbb")
    (home / "refs/main").write_text("ccc\n")
    with pytest.raises(CheckpointError, match=r"snapshots/aaa.*snapshots/bbb"):
        resolve(home)
    shutil.rmtree(home / "snapshots/aaa")
    assert resolve(home) == home / "snapshots/bbb"


def test_an_empty_cache_and_the_whole_cache_are_named(tmp_path: Path) -> None:
    (tmp_path / "models--owner--name/snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="download the model again"):
        resolve(tmp_path / "models--owner--name")
    with pytest.raises(CheckpointError, match=r"Hugging Face cache.*models--owner--name"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("params.json", "own format"),
        ("pytorch_model.bin", "is a pickle"),
        ("model_index.json", "diffusers"),
    ],
)
def test_other_things_in_the_place_of_a_model(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=told):
        resolve(tmp_path)
    with pytest.raises(RunError, match=told):
        model_config(tmp_path)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "model.tar.gz").touch()
    with pytest.raises(CheckpointError, match="unpack"):
        resolve(tmp_path / "model.tar.gz")


# Weights.


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_weights_of_the_bare_model_are_read_as_transformers_reads_them(
    tmp_path: Path, family: str
) -> None:
    transformers = pytest.importorskip("transformers")
    biases = {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    whole = tiny.model(tiny.PARENT, family=family, **biases, **TIED)
    save_model(whole, tmp_path / "whole")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    bare.save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in load_file(tmp_path / "bare/model.safetensors")
    assert same(tmp_path / "bare", whole)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    ids = torch.tensor([[1, 5, 9, 3]])
    ours = load_model(tmp_path / "bare", frozen=True)
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits.float())


def test_a_bare_model_without_its_head_says_so(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    rename(directory, model={k.removeprefix("model."): v for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight.*tie_word_embeddings"):
        load_model(directory)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_fp8_with_a_scale_a_tensor_and_static_scales_of_activations(
    tmp_path: Path, shape: tuple[int, ...], form: str
) -> None:
    directory = saved(tmp_path)
    tensors, wanted = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        rounded = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name], wanted[name] = rounded, rounded.float() * scale
        base = name.removesuffix("weight")
        tensors |= {f"{base}weight_scale": scale.reshape(shape)}
        tensors |= {f"{base}{x}_scale": torch.ones(1) for x in ("input", "output")}
    tensors |= {f"model.layers.0.self_attn.{x}_scale": torch.ones(1) for x in "kv"}
    rename(directory, model=tensors)
    rounding = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    groups = {"weights": rounding | {"dynamic": False}, "input_activations": rounding}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], **groups}},
    }
    write(directory, config=config)
    found = load_model(directory).state_dict()
    for name, value in wanted.items():
        ours = name.removeprefix("model.").replace("self_attn.", "attention.op.")
        assert torch.equal(found[ours.replace("mlp.", "ffn.op.")], value)


def test_rounding_to_something_else_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    write(directory, config=config)
    with pytest.raises(ValueError, match="compressed-tensors"):
        load_model(directory)


def test_a_single_file_beside_an_index_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    directory, old = saved(tmp_path / "m"), tiny.model(tiny.PARENT, seed=1)
    save_model(old, tmp_path / "old")
    stale = load_file(tmp_path / "old/model.safetensors")
    rename(directory, **{"model-00001-of-00001": stale})
    places = dict.fromkeys(stale, "model-00001-of-00001.safetensors")
    index(directory, places)
    with caplog.at_level(logging.WARNING):
        found = load_model(directory, frozen=True)
    assert "model.safetensors is read" in caplog.text and "index of 1" in caplog.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(found.head, theirs.lm_head.weight)
    caplog.clear()
    (directory / "model-00001-of-00001.safetensors").unlink()
    load_model(directory)
    assert "out of date" in caplog.text


def test_an_index_of_the_single_file_itself_is_no_contradiction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved(tmp_path)
    places = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    index(directory, places)
    load_model(directory)
    assert not caplog.text


def test_an_adapter_beside_whole_weights_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write(saved(tmp_path), adapter_config={"base_model_name_or_path": "owner/base"})
    load_model(directory)
    assert "adapter" in caplog.text and "not applied" in caplog.text


# What is written.


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        directory = saved(tmp_path / "m", tiny.PARENT)
        byte_tokenizer().save(directory)
        export_model(directory, tmp_path / "out", "hf", check=False)
    finally:
        os.umask(before)
    for file in (*directory.iterdir(), *(tmp_path / "out").iterdir()):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file.name
        assert not file.name.startswith(".")


def test_an_export_says_its_tokenizers_class(tmp_path: Path) -> None:
    """A Mistral's SentencePiece model is read as it stands; a nemotron-nas' would be Llama's."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/tokenizer.model").write_bytes(sentencepiece_model(**PLAIN))
    write(tmp_path / "m", tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    size = load_tokenizer(tmp_path / "m").vocab_size
    save_model(
        tiny.model(tiny.PARENT, family="mistral", vocab_size=size),
        tmp_path / "parent",
        tokenizer_from=tmp_path / "m",
    )
    export_model(tmp_path / "parent", tmp_path / "out", "decilm", check=False)
    texts = [" a", "a<s> b", "two  spaces"]
    made = [load_tokenizer(tmp_path / one) for one in ("parent", "out")]
    ids = [one.encode_batch(texts, special=True) for one in made]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert ids[0] == ids[1] == theirs(texts, add_special_tokens=False)["input_ids"]


def test_vocab_and_merges_go_with_an_export(tmp_path: Path) -> None:
    from tests.cases.odd import write_merges

    size = write_merges(write(tmp_path / "m")) + 1  # and <|endoftext|>
    save_model(
        tiny.model(tiny.PARENT, vocab_size=size), tmp_path / "p", tokenizer_from=tmp_path / "m"
    )
    write(tmp_path / "p", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    report = export_model(tmp_path / "p", tmp_path / "out", "hf", check=False)
    assert not report.notes
    pair = [load_tokenizer(tmp_path / one).encode("don'T 12") for one in ("p", "out")]
    assert pair[0] == pair[1]


# What is said.


def test_a_hint_can_be_followed(tmp_path: Path) -> None:
    directory = saved(tmp_path / "llama", [("noop", "swiglu-8"), ("gqa-4", "swiglu-24")])
    with pytest.raises(ExportError, match=r'servable = \["vllm"\]'):
        export_model(directory, tmp_path / "out", "decilm")
    qwen = saved(tmp_path / "qwen3", [("gqa-4", "swiglu-24"), ("gqa-2", "swiglu-8")],
                 family="qwen3", qk_norm=True)  # fmt: skip
    with pytest.raises(ExportError, match="QK norm") as error:
        export_model(qwen, tmp_path / "out", "decilm")
    assert "servable" not in str(error.value) and "--format padded" in str(error.value)
    export_model(qwen, tmp_path / "out", "padded")


PROMPTS = ["  two  spaces ", " leading", "plain", "a <s> b", "日本 \n\n ", "x\ty"]


@pytest.mark.parametrize("kind", ["bytes", "collapses spaces"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_is_printed_once(tmp_path: Path, kind: str, prompt: str) -> None:
    if kind == "bytes":
        byte_tokenizer().save(tmp_path)
    else:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path)
    shown = tmp_path / "model"
    save_model(
        tiny.model(tiny.PARENT, vocab_size=tokenizer.vocab_size), shown, tokenizer_from=tmp_path
    )
    words = ["generate", str(shown), "--prompt", prompt, "--max-tokens", "4"]
    plain, told = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    found = json.loads(told.stdout)
    assert plain.stdout == f"{prompt}{found['text']}\n"
    ids = [*tokenizer.encode(prompt, bos=True, special=True), *found["token_ids"]]
    assert tokenizer.decode(ids).endswith(found["text"])
