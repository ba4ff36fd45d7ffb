"""Configuration of a DeciLM checkpoint (`model_type: nemotron-nas`): a Llama whose layers differ.

`config.block_configs[layer].attention.n_heads_in_group` and its neighbours are attributes, as
vLLM, SGLang and the modelling file beside this one read them; saved again, they are the JSON
objects they came from. Written for tessera's exports; needs nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Section:
    """One JSON object as attributes; nested objects become sections too."""

    def __init__(self, fields: dict[str, Any]) -> None:
        for key, value in fields.items():
            setattr(self, key, Section(value) if isinstance(value, dict) else value)

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, Section) else v for k, v in vars(self).items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Section) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Section({self.to_dict()})"


def intermediate_size(ffn_mult: float, hidden_size: int) -> int:
    """FFN width of a multiplier: two thirds of it, rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


class DeciLMConfig(LlamaConfig):
    """LlamaConfig plus `block_configs`, one section a layer.

    The file's `num_key_value_heads` and `intermediate_size` are null because layers differ; in
    memory they hold the largest of them, a safe bound for tools that plan memory from them.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        blocks: list[Any] = [Section(b) if isinstance(b, dict) else b for b in block_configs or []]
        heads = kwargs.get("num_attention_heads", 32)
        groups = [b.attention.n_heads_in_group for b in blocks if b.attention.n_heads_in_group]
        widths = [
            intermediate_size(b.ffn.ffn_mult, kwargs.get("hidden_size", 4096))
            for b in blocks
            if b.ffn.ffn_mult
        ]
        if kwargs.get("num_key_value_heads") is None:
            kwargs["num_key_value_heads"] = max((heads // g for g in groups), default=heads)
        if kwargs.get("intermediate_size") is None:
            kwargs["intermediate_size"] = max(widths, default=256)
        super().__init__(**kwargs)
        self.block_configs = blocks

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields["block_configs"] = [b.to_dict() for b in self.block_configs]
        fields["num_key_value_heads"] = fields["intermediate_size"] = None
        return fields
