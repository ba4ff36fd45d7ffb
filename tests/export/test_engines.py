"""Which engine refuses which shape: one row a limit that was seen on the engine itself."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.export.engines import ENGINES, format_refusals, padded_head_dim, refusals
from tessera.model.config import ConfigError, ModelConfig
from tessera.table import spans
from tests.export.interop import EQUAL, HETEROGENEOUS

FULL = ("gqa-4", "swiglu-256")


def config(*words: tuple[str, str], **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=320, hidden_size=256, num_attention_heads=8, head_dim=32, blocks=()
    )
    return ModelConfig(**(fields | changes)).with_words(words)


# words, then the engines that refuse them and a phrase each reason must hold
SHAPES = [
    (HETEROGENEOUS, {}),
    (EQUAL, {}),
    ((("noop", "swiglu-256"), FULL, FULL), {"vllm": "layer 0", "llama.cpp": "layer 0"}),
    ((("noop", "noop"), ("noop", "swiglu-256"), FULL), {"vllm": "layer 1", "llama.cpp": "layer 0"}),
    ((("noop", "noop"), FULL, FULL), {"llama.cpp": "layer 0"}),
    ((FULL, ("gqa-2", "noop"), FULL), {"llama.cpp": "layer 1 has attention and no FFN"}),
    ((FULL, ("linear", "noop"), FULL), {"llama.cpp": "layer 1", "vllm": "layer 1 has linear"}),
    ((FULL, ("noop", "noop")), {"llama.cpp": "the last layer (1)"}),
    ((FULL, ("linear", "swiglu-256")), {"vllm": "linear attention"}),
    ((("linear", "swiglu-256"), FULL), {"vllm": "layer 0"}),
    ((FULL, ("noop", "linear"), FULL), {"llama.cpp": "linear FFN", "vllm": "linear ffn"}),
    ((("noop", "swiglu-256"),), {"vllm": "no layer has attention", "llama.cpp": "layer 0"}),
]


@pytest.mark.parametrize(("words", "refused"), SHAPES)
def test_engines_refuse_what_breaks_them_and_nothing_else(words, refused):
    model = config(*words)
    for engine in ("vllm", "llama.cpp", "transformers"):
        reasons = "; ".join(refusals(model, engine))
        assert refused.get(engine, "") in reasons
        assert bool(reasons) == (engine in refused), (engine, reasons)
    assert refusals(model, "sglang") == [
        reason.replace("vLLM", "SGLang") for reason in refusals(model, "vllm")
    ]


def test_layers_are_listed_as_spans():
    linear = ("gqa-4", "linear")
    (reason,) = refusals(config(FULL, linear, linear, linear, FULL, linear, FULL), "llama.cpp")
    assert reason.startswith("layers 1-3, 5 have a linear FFN")


def test_a_homogeneous_model_has_no_limits_but_the_dialect_has():
    qwen3 = config(*EQUAL, qk_norm=True, family="qwen3")
    assert refusals(qwen3, "vllm") == []
    assert "QK norm" in refusals(qwen3, "vllm", "decilm")[0]
    assert "QK norm" in format_refusals(qwen3, "decilm")[0]


def test_a_window_longer_than_the_context_is_none():
    window = config(*HETEROGENEOUS, sliding_window=128, max_position_embeddings=512)
    assert "128 tokens" in format_refusals(window, "decilm")[0]
    wide = config(*HETEROGENEOUS, sliding_window=512, max_position_embeddings=512)
    assert format_refusals(wide, "decilm") == format_refusals(wide, "gguf") == []


def test_hf_names_the_first_layer_that_differs():
    (reason,) = format_refusals(config(FULL, ("gqa-2", "swiglu-256")), "hf")
    assert "layer 1 is gqa-2 swiglu-256, layer 0 is gqa-4 swiglu-256" in reason
    assert "--format decilm" in reason and "--format gguf" in reason


def test_vllm_on_a_cpu_knows_some_head_sizes():
    assert "head_dim is 16" in refusals(config(*EQUAL, head_dim=16), "vllm-cpu")[0]
    assert refusals(config(*EQUAL, head_dim=16), "vllm-cpu", "decilm") == []
    assert refusals(config(*HETEROGENEOUS, head_dim=144), "vllm") == []
    assert "head_dim is 144" in refusals(config(*HETEROGENEOUS, head_dim=144), "vllm-cpu")[0]


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="llama.cpp"):
        refusals(config(FULL), "llama-cpp")
    with pytest.raises(ConfigError, match=", ".join(ENGINES)):
        refusals(config(FULL), "mlx")
    with pytest.raises(ConfigError, match="onnx"):
        format_refusals(config(FULL), "onnx")


def test_head_sizes_go_to_the_smallest_multiple_that_has_kernels():
    sizes = {8: 32, 16: 32, 32: 32, 24: 96, 40: 80, 48: 96, 128: 128, 144: 144}
    assert {size: padded_head_dim(size) for size in sizes} == sizes


def test_spans():
    assert spans([4]) == "layer 4"
    assert spans([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
