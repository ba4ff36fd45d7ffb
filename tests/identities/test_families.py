"""Our Llama, Mistral and Qwen = transformers' logits, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model import tensors
from tessera.model.checkpoint import load_model, save_model
from tests import tiny

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.1": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama-3.1-rope_parameters": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-3.2-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 12}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24, "rms_norm_eps": 1e-4}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}
LENGTH = 100  # past the sliding windows, and past the original context of LLAMA3


def reference(case: str) -> Any:
    """A random transformers model; every gain and bias is random."""
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    return tiny.randomise(transformers.AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def ours(directory: Path, tokens: Tensor) -> Tensor:
    module = load_model(directory, frozen=True)
    return module.logits(module(tokens))


@torch.no_grad()
def theirs(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    model, tokens = reference(case), tiny.tokens(61, 2, LENGTH)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(ours(tmp_path, tokens), theirs(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save(case, tmp_path, monkeypatch):
    model, tokens = reference(case), tiny.tokens(61, 2, LENGTH)
    model.save_pretrained(tmp_path / "in")
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 20_000)
    save_model(load_model(tmp_path / "in"), tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is type(model)
    assert torch.equal(theirs(back, tokens), theirs(model, tokens))


def test_shards_of_transformers_are_read(tmp_path):
    model, tokens = reference("llama-2"), tiny.tokens(61, 1, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(ours(tmp_path, tokens), theirs(model, tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_scaled_rope_and_the_window_show_at_these_lengths(tmp_path):
    """The cases above would not pass with the scaling or the window left out."""
    tokens = tiny.tokens(61, 1, LENGTH)
    for case, keys in (("llama-3.1", ["rope_parameters"]), ("mistral", ["sliding_window"])):
        model = reference(case)
        model.save_pretrained(tmp_path / case)
        file = tmp_path / case / "config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | dict.fromkeys(keys)))
        assert (ours(tmp_path / case, tokens) - theirs(model, tokens)).abs().max() > 0.05


@pytest.mark.parametrize("case", ["llama-3.1", "mistral", "qwen3"])
@torch.no_grad()
def test_greedy_tokens_equal_transformers(case, tmp_path):
    model, prompt, new = reference(case), tiny.tokens(61, 1, 30), 20
    model.save_pretrained(tmp_path)
    wanted = model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
    engine = TorchEngine(load_model(tmp_path, frozen=True))
    params = SamplingParams(max_tokens=new, temperature=0)
    ((found,),) = engine.generate(prompt.tolist(), params)
    assert prompt[0].tolist() + found.token_ids == wanted[0].tolist()
