"""Our names of tensors and Hugging Face's: nine rules, read in either direction. Torch-free.

Importing a checkpoint renames tensors and never permutes numbers. The first rule that fits
decides; `hf_name` and `our_name` are a bijection. The two linear replacements have the names of
the released Puzzle models (DeciLM).
"""

from __future__ import annotations

import re

_OUTER = (
    ("embed_tokens.", "model.embed_tokens."),
    ("norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)
_INNER = (
    ("attention.norm.", "input_layernorm."),
    ("attention.op.weight", "self_attn.linear_attn.weight"),
    ("attention.op.", "self_attn."),
    ("ffn.norm.", "post_attention_layernorm."),
    ("ffn.op.weight", "mlp.linear_mlp.weight"),
    ("ffn.op.", "mlp."),
)
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def hf_name(key: str) -> str:
    """Hugging Face's name of one of our tensors: `layers.3.ffn.op.…` -> `model.layers.3.mlp.…`.

    Raises KeyError for a name that is not ours.
    """
    if key.startswith("layers.") and (match := _LAYER.fullmatch(key)):
        return f"model.layers.{match[1]}.{_rename(match[2], _INNER, 0)}"
    return _rename(key, _OUTER, 0)


def our_name(key: str) -> str:
    """The inverse of `hf_name`. Raises KeyError for a tensor that no supported model has."""
    if key.startswith("model.layers.") and (match := _LAYER.fullmatch(key)):
        return f"layers.{match[1]}.{_rename(match[2], _INNER, 1)}"
    return _rename(key, _OUTER, 1)


def _rename(key: str, rules: tuple[tuple[str, str], ...], source: int) -> str:
    for rule in rules:
        if key.startswith(rule[source]):
            return rule[1 - source] + key[len(rule[source]) :]
    raise KeyError(key)
