"""A Llama whose layers differ, for transformers 5: each layer is built from its own sizes.

Attention and FFN are transformers' own Llama modules; a subblock may also be one matrix
(`linear_attn`, `linear_mlp`) or absent, and then has neither weights nor norm. Layers with
attention take consecutive places in the KV cache, so the first of them is always place 0, from
which transformers reads the number of tokens seen. Written for tessera's exports.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_decilm import DeciLMConfig, intermediate_size


class Linear(nn.Module):
    """One matrix in a subblock's place, under the name that the released models give it."""

    def __init__(self, name: str, hidden_size: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(hidden_size, hidden_size, bias=False))

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return getattr(self, self.name)(hidden_states)


class DeciLMDecoderLayer(LlamaDecoderLayer):
    """One layer; `place` is its index among the layers that keep keys and values."""

    def __init__(self, config: DeciLMConfig, block: Any, place: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = size = config.hidden_size
        attention, ffn, sizes = block.attention, block.ffn, copy.copy(config)
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)
            if attention.replace_with_linear:
                self.self_attn = Linear("linear_attn", size)
            else:
                sizes.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
                self.self_attn = LlamaAttention(sizes, place)
                self.self_attn.config = config  # the shared one: kernels may be switched later
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)
            if ffn.replace_with_linear:
                self.mlp = Linear("linear_mlp", size)
            else:
                sizes.intermediate_size = intermediate_size(ffn.ffn_mult, size)
                self.mlp = LlamaMLP(sizes)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if hasattr(self, "self_attn"):
            delta = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + (delta[0] if isinstance(delta, tuple) else delta)
        if hasattr(self, "mlp"):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers, place = [], 0
        for block in config.block_configs:
            layers.append(DeciLMDecoderLayer(config, block, place))
            place += block.attention.n_heads_in_group is not None
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
