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


class LinearAttention(nn.Module):
    """One matrix in the place of attention."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One matrix in the place of the FFN."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


def build_attention(config: DeciLMConfig, section: Any, place: int) -> nn.Module:
    if section.replace_with_linear:
        return LinearAttention(config.hidden_size)
    sizes = copy.copy(config)
    sizes.num_key_value_heads = config.num_attention_heads // section.n_heads_in_group
    attention = LlamaAttention(sizes, place)
    attention.config = config  # the shared one: attention kernels may be switched later
    return attention


def build_ffn(config: DeciLMConfig, section: Any) -> nn.Module:
    if section.replace_with_linear:
        return LinearMLP(config.hidden_size)
    sizes = copy.copy(config)
    sizes.intermediate_size = intermediate_size(section.ffn_mult, config.hidden_size)
    return LlamaMLP(sizes)


class DeciLMDecoderLayer(LlamaDecoderLayer):
    """One layer; `place` is its index among the layers that keep keys and values."""

    def __init__(self, config: DeciLMConfig, block: Any, place: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        if not block.attention.no_op:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = build_attention(config, block.attention, place)
        if not block.ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = build_ffn(config, block.ffn)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if hasattr(self, "self_attn"):
            delta, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + delta
        if hasattr(self, "mlp"):
            delta = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = hidden_states + delta
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
