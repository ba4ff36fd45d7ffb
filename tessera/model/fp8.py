"""Weights in FP8: E4M3 with a scale for each output channel, in compressed-tensors' layout.

    weight[o, i] ≈ float8[o, i] * scale[o]        scale[o] = max_i |weight[o, i]| / 448

Projections are rounded; embeddings, norms, biases and the head are not. Activations are rounded
token by token by the engine that runs it, which needs no calibration. vLLM, SGLang and transformers
read it; read here, it becomes plain weights again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.model.transformer import Transformer, holding

SUFFIX = "_scale"  # of a weight's name
LARGEST = 448.0  # of E4M3
KEY = "quantization_config"
DTYPE = torch.float8_e4m3fn

_ROUNDING = {"num_bits": 8, "type": "float", "symmetric": True}
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*linear_(attn|mlp)$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_ROUNDING, "strategy": "channel", "dynamic": False},
            "input_activations": {**_ROUNDING, "strategy": "token", "dynamic": True},
        }
    },
}


def is_rounded(name: str) -> bool:
    """Whether the tensor of this name, ours or Hugging Face's, is kept in FP8."""
    return name.endswith("_proj.weight")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 `(O, I)` and float32 scales `(O, 1)` of a weight `(O, I)`."""
    scale = weight.float().abs().amax(1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / scale).to(DTYPE), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight. scale: one number, or one an output channel."""
    return weight.float() * scale.float().reshape(-1, 1)


def compressed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with its projections in FP8, and their scales."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_rounded(name):
            found[name], found[name + SUFFIX] = quantize(tensor)
        else:
            found[name] = tensor
    return found


@torch.no_grad()
def rounded(module: Transformer) -> Transformer:
    """A frozen copy that computes with the weights as FP8 keeps them."""
    state = module.state_dict()

    def tensor(key: str, _: torch.Size) -> Tensor:
        one = state[key]
        return dequantize(*quantize(one)).to(one.dtype) if is_rounded(key) else one

    return holding(module.config, tensor).requires_grad_(False).eval()


def write_config(directory: Path) -> None:
    """Say in `config.json` that the projections are in FP8."""
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, KEY: CONFIG}, indent=2) + "\n", encoding="utf-8")
