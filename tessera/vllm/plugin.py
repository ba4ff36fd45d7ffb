"""A vLLM plugin that lifts two limits of its `nemotron_nas`: an opt-in, never needed by an export.

    a layer without attention before the first one that has it      (vLLM starts the residual in
                                                                     an attention norm)
    linear attention and linear FFN, as in Nemotron-51B             (vLLM ignores the flag)

Where tessera is installed beside vLLM, `TESSERA_VLLM_PLUGIN=1` in the environment of `vllm serve`
is all; without it vLLM stays as it is. This file needs vLLM and torch, and nothing of tessera.
"""

# vllm is not installed here, and pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from typing import Any

VARIABLE = "TESSERA_VLLM_PLUGIN"


def load() -> None:
    """The entry point that vLLM calls in each of its processes."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        register()


def register() -> None:
    """Puts models of these layers in the place of vLLM's own `DeciLMForCausalLM`."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from vllm.transformers_utils import (  # pyright: ignore[reportMissingImports]
        model_arch_config_convertor as convertors,
    )

    class Convertor(convertors.NemotronNasModelArchConfigConvertor):
        def get_total_num_kv_heads(self) -> int:
            heads = self.hf_text_config.num_attention_heads
            for block in self.hf_text_config.block_configs:
                if block.attention.n_heads_in_group:
                    return heads // block.attention.n_heads_in_group
            return heads  # no layer caches anything

    convertors.MODEL_ARCH_CONFIG_CONVERTORS["nemotron-nas"] = Convertor
    ModelRegistry.register_model("DeciLMForCausalLM", _model())


def _model() -> type:
    """The class, made when vLLM is there to be imported."""
    from vllm.model_executor.layers import (  # pyright: ignore[reportMissingImports]
        layernorm,
        linear,
    )
    from vllm.model_executor.models import nemotron_nas  # pyright: ignore[reportMissingImports]

    class Linear(nemotron_nas.nn.Module):
        """One matrix in a subblock's place, never quantised."""

        def __init__(self, name: str, size: int, prefix: str) -> None:
            super().__init__()
            self.name = name
            prefix = f"{prefix}.{name}"
            self.add_module(name, linear.ReplicatedLinear(size, size, bias=False, prefix=prefix))

        def forward(self, hidden_states: Any) -> Any:
            return getattr(self, self.name)(hidden_states)[0]

    class Layer(nemotron_nas.DeciLMDecoderLayer):
        def __init__(
            self, config: Any, layer_idx: int, *arguments: Any, prefix: str = "", **keys: Any
        ) -> None:
            block = config.block_configs[layer_idx]
            shown = copy.copy(config)
            shown.block_configs = {layer_idx: _without_linear(block)}
            super().__init__(shown, layer_idx, *arguments, prefix=prefix, **keys)
            size, eps = config.hidden_size, config.rms_norm_eps
            if block.attention.replace_with_linear:
                self.self_attn = Linear("linear_attn", size, f"{prefix}.self_attn")
                self.input_layernorm = layernorm.RMSNorm(size, eps=eps)
            if block.ffn.replace_with_linear:
                self.mlp = Linear("linear_mlp", size, f"{prefix}.mlp")
                self.post_attention_layernorm = layernorm.RMSNorm(size, eps=eps)

        def forward(self, positions: Any, hidden_states: Any, residual: Any) -> tuple[Any, Any]:
            def normed(norm: Any) -> tuple[Any, Any]:
                if residual is None:
                    return norm(hidden_states), hidden_states
                return norm(hidden_states, residual)

            if hasattr(self, "self_attn"):
                hidden_states, residual = normed(self.input_layernorm)
                if isinstance(self.self_attn, Linear):
                    hidden_states = self.self_attn(hidden_states)
                else:
                    hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
            if hasattr(self, "mlp"):
                hidden_states, residual = normed(self.post_attention_layernorm)
                hidden_states = self.mlp(hidden_states)
            return hidden_states, residual

    class DeciLMForCausalLM(nemotron_nas.DeciLMForCausalLM):
        def _init_model(self, vllm_config: Any, prefix: str = "") -> Any:
            return nemotron_nas.DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

    return DeciLMForCausalLM


def _without_linear(block: Any) -> Any:
    """The block as vLLM's own layer is to build it: what is linear is absent."""

    def part(section: Any) -> Any:
        absent = section.no_op or section.replace_with_linear
        return SimpleNamespace(**{**vars(section), "no_op": absent})

    return SimpleNamespace(attention=part(block.attention), ffn=part(block.ffn))
