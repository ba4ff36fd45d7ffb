"""llama.cpp, which we did not write, says the same: its server, from the xllamacpp wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.data.tokenizer import byte_tokenizer, load_tokenizer
from tessera.export.engines import ExportError
from tessera.export.write import GGUF_FILE, export_model
from tessera.model.checkpoint import load_model, save_model
from tessera.model.config import RopeScaling
from tessera.model.transformer import Transformer
from tests.export.interop import (
    EQUAL,
    HETEROGENEOUS,
    PROMPTS,
    greedy,
    llama_cpp,
    random_model,
    write_byte_tokenizer,
)

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
pytest.importorskip("gguf", reason="needs the GGUF writer: pip install gguf")

FULL = ("gqa-8", "swiglu-256")
CASES = {
    "no attention, no layer, four numbers of KV heads": (HETEROGENEOUS, {}),
    "tied, biases, head size not hidden / heads": (
        HETEROGENEOUS,
        {"tie_word_embeddings": True, "qkv_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "linear attention first and later, linear rope scaling": (
        (("linear", "swiglu-256"), FULL, ("linear", "swiglu-64"), ("noop", "swiglu-128")),
        {"rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    ),
    "equal layers": (EQUAL, {"rope_scaling": None}),
}


@pytest.mark.parametrize(("words", "changes"), CASES.values(), ids=CASES)
def test_random_children_give_the_same_tokens(words, changes, tmp_path):
    module = random_model(words, **changes)
    save_model(module, tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "gguf")
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        for prompt in PROMPTS:
            tokens, logprobs = greedy(module, prompt, 24)
            theirs, given = server.complete(prompt, 24)
            assert theirs == tokens
            pairs = [(x, y) for x, y in zip(logprobs, given, strict=True) if y is not None]
            assert pairs and all(abs(x - y) < 2e-4 for x, y in pairs)


def test_a_child_in_bfloat16_gives_the_same_tokens(tmp_path):
    module = random_model(HETEROGENEOUS).to(torch.bfloat16)
    save_model(module, tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "gguf")
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        for prompt in PROMPTS:
            tokens, logprobs = greedy(module.float(), prompt, 4)
            theirs, given = server.complete(prompt, 4)
            assert theirs == tokens
            pairs = [(x, y) for x, y in zip(logprobs, given, strict=True) if y is not None]
            assert pairs and all(abs(x - y) < 0.1 for x, y in pairs)  # it rounds activations


@pytest.mark.parametrize("name", ["stories260k", "tinystories-char-940k"])
def test_real_checkpoints_tell_their_stories(name, shared: Path, tmp_path):
    source = shared / "models" / name
    export_model(source, tmp_path / "out", "gguf")
    tokenizer = load_tokenizer(source)
    text = (shared / "data" / "tinystories" / "valid_5_stories.txt").read_text()
    stories = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        for story in json.loads((source / "expected_outputs.json").read_text())["greedy"]:
            prompt, expected = story["prompt_ids"], story["greedy_ids"]
            tokens, _ = server.complete(prompt, len(expected) - len(prompt))
            assert prompt + tokens == expected
        known = [s for s in stories if 0 not in tokenizer.encode(s)]
        assert known
        for story in known:
            assert server.tokenize(story) == tokenizer.encode(story, bos=True)


def test_a_child_cut_from_a_real_checkpoint(shared: Path, tmp_path):
    parent = load_model(shared / "models" / "stories260k", frozen=True)
    words = [["gqa-4", "swiglu-172"] for _ in range(5)]
    words[1][1], words[2][0] = "swiglu-100", "noop"
    module = Transformer(parent.config.with_words(words)).requires_grad_(False)
    for key, value in module.state_dict().items():  # the first 100 channels of layer 1's FFN
        value.copy_(parent.state_dict()[key][tuple(slice(n) for n in value.shape)])
    save_model(module, tmp_path / "child", tokenizer_from=shared / "models" / "stories260k")
    export_model(tmp_path / "child", tmp_path / "out", "gguf")
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        for prompt in ([1], [1, 403, 407, 261, 378]):
            assert server.complete(prompt, 48)[0] == greedy(module, prompt, 48)[0]


def test_a_byte_level_tokenizer_reads_text_as_llama_cpp_does(tmp_path):
    save_model(random_model(), tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "gguf")
    ours = load_tokenizer(tmp_path / "child")
    texts = ["Once upon a time, there was", "  the dog's 2 legs\n\tran", "Zoë 日本 ∑ x²", "a\r\nb"]
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        for text in texts:
            assert server.tokenize(text) == ours.encode(text)


def test_what_llama_cpp_would_split_otherwise_is_refused_or_noted(tmp_path):
    save_model(random_model(), tmp_path / "child")
    write_byte_tokenizer(tmp_path / "child")
    file = tmp_path / "child" / "tokenizer.json"
    spec = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, spec["pre_tokenizer"] | {"use_regex": False}]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    file.write_text(json.dumps(spec))
    with pytest.raises(ExportError, match=r"\\\\w\+.*gpt-2, llama-bpe, qwen2"):
        export_model(tmp_path / "child", tmp_path / "out", "gguf")
    report = export_model(tmp_path / "child", tmp_path / "out", "gguf", engines=())
    assert any("by token ids" in note for note in report.notes)


def test_a_tokenizer_without_merges_splits_the_same_whatever_its_pattern(tmp_path):
    module = random_model(vocab_size=264)
    save_model(module, tmp_path / "child")
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "gguf")
    with llama_cpp(tmp_path / "out" / GGUF_FILE, tmp_path / "log") as server:
        text = "12+3 = 15, said Zoë.\n"
        assert server.tokenize(text) == tokenizer.encode(text, bos=True)


def test_a_missing_tokenizer_is_named(tmp_path):
    save_model(random_model(), tmp_path / "child")
    with pytest.raises(ExportError, match="tokenizer.json"):
        export_model(tmp_path / "child", tmp_path / "out", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["child"]


def test_the_file_holds_the_modules_numbers(shared: Path, tmp_path):
    source = shared / "models" / "stories260k"
    export_model(source, tmp_path / "out", "gguf", check=False)
    module = load_model(source)
    back = load_model(tmp_path / "out" / GGUF_FILE)
    for key, value in module.state_dict().items():
        assert value.equal(back.state_dict()[key]), key
