"""transformers, with the two files an export carries, says the same as we do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.export.write import export_model
from tessera.model.checkpoint import load_model, save_model
from tests.export.interop import EQUAL, HETEROGENEOUS, PROMPTS, greedy, random_model

transformers = pytest.importorskip("transformers", reason="needs transformers 5")

FULL = ("gqa-4", "swiglu-256")
CASES = {
    "mixed": (HETEROGENEOUS, {}),
    "linear and no attention in layer 0, no FFN in the last": (
        (("noop", "swiglu-256"), ("linear", "linear"), FULL, ("gqa-1", "noop")),
        {},
    ),
    "nothing at all in layer 0": ((("noop", "noop"), ("linear", "noop"), FULL), {"head_dim": 8}),
    "tied, Qwen's biases": (HETEROGENEOUS, {"tie_word_embeddings": True, "qkv_bias": True}),
    "no attention anywhere": ((("noop", "swiglu-256"), ("linear", "swiglu-256")), {}),
}


def load(directory: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    )


@pytest.mark.parametrize(("words", "changes"), CASES.values(), ids=CASES)
def test_remote_code_gives_the_same_tokens(words, changes, tmp_path):
    module = random_model(words, **changes)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "decilm", engines=["transformers"])
    theirs = load(tmp_path / "out")
    for prompt in PROMPTS:
        tokens, logprobs = greedy(module, prompt, 24)
        answer = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert answer.sequences[0, len(prompt) :].tolist() == tokens
        given = [float(row.log_softmax(-1).max()) for row in answer.logits]
        assert all(abs(x - y) < 2e-4 for x, y in zip(logprobs, given, strict=True))


def test_what_transformers_saves_again_is_what_it_loaded(tmp_path):
    module = random_model()
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "decilm")
    theirs = load(tmp_path / "out")
    assert theirs.config.block_configs[1].attention.no_op is True
    assert theirs.config.num_key_value_heads == 8
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    first = json.loads((tmp_path / "out" / "config.json").read_text())
    assert again["block_configs"] == first["block_configs"]
    assert again["num_key_value_heads"] is again["intermediate_size"] is None
    first_model, second_model = load_model(tmp_path / "out"), load_model(tmp_path / "again")
    for key, value in first_model.state_dict().items():
        assert value.equal(second_model.state_dict()[key]), key


def test_files_in_bfloat16_are_loaded_as_that(tmp_path):
    module = random_model().to(torch.bfloat16)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "decilm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype="auto"
    )
    assert theirs.dtype == torch.bfloat16
    tokens = torch.tensor(PROMPTS[2:3])
    with torch.no_grad():
        expected = module.float().logits(module(tokens))
        torch.testing.assert_close(theirs.float()(tokens).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_stock_families_need_no_code_of_ours(family, tmp_path):
    changes = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(family, {})
    module = random_model(EQUAL, family=family, rope_scaling=None, **changes)
    save_model(module, tmp_path / "child")
    export_model(tmp_path / "child", tmp_path / "out", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    tokens = torch.arange(40).view(2, 20) * 13 % 320
    with torch.no_grad():
        difference = theirs(tokens).logits - module.logits(module(tokens))
    assert difference.abs().max() < 2e-4


def test_a_real_checkpoint_tells_its_story_from_text(shared: Path, tmp_path):
    source = shared / "models" / "stories260k"
    export_model(source, tmp_path / "out", "decilm")
    theirs = load(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for story in json.loads((source / "expected_outputs.json").read_text())["greedy"]:
        asked = tokenizer(story["prompt"], return_tensors="pt", return_token_type_ids=False)
        assert asked.input_ids[0].tolist() == story["prompt_ids"]
        length = len(story["greedy_ids"])
        answer = theirs.generate(**asked, max_length=length, do_sample=False)
        assert answer[0].tolist() == story["greedy_ids"]
        assert tokenizer.decode(answer[0], skip_special_tokens=True) == story["greedy_text"]
