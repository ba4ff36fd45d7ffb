"""Models in and out of directories in Hugging Face's layout: sharded safetensors, never pickle.

Opening checks everything from the files' headers before a weight is read; what is opened can be
rewritten, padded or pieced together without being in memory. Loading builds the module on the meta
device and fills it tensor by tensor, so a model is in memory once. Of a model that is spread over
processes, each reads its own rows and writes some of the files.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tessera import dist
from tessera.model.config import ModelConfig
from tessera.model.families import config_dict, config_json, read_config
from tessera.model.source import CheckpointError, resolve
from tessera.model.tensors import LazyTensor, find_tensors, listed, write_tensors
from tessera.model.transformer import Transformer
from tessera.runs.files import replacing

# Importing a checkpoint renames tensors and never permutes numbers; the first prefix that fits
# decides. The two linear replacements have the names of the released Puzzle models (DeciLM).
_NAMES = {
    "embed_tokens.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "lm_head.": "lm_head.",
    "attention.norm.": "input_layernorm.",
    "attention.op.weight": "self_attn.linear_attn.weight",
    "attention.op.": "self_attn.",
    "ffn.norm.": "post_attention_layernorm.",
    "ffn.op.weight": "mlp.linear_mlp.weight",
    "ffn.op.": "mlp.",
}


def hf_name(key: str) -> str:
    """Hugging Face's name of one of our tensors: `layers.3.ffn.op.…` -> `model.layers.3.mlp.…`.

    Raises KeyError for a name that is not ours.
    """
    layer = re.match(r"layers\.\d+\.", key)
    start, above = (layer[0], f"model.{layer[0]}") if layer else ("", "")
    rest = key.removeprefix(start)
    for ours, theirs in _NAMES.items():
        if rest.startswith(ours):
            return above + theirs + rest.removeprefix(ours)
    raise KeyError(key)


# FP8 in compressed-tensors' layout, which vLLM, SGLang and transformers read:
#
#     weight[o, i] ≈ float8[o, i] * scale[o]        scale[o] = max_i |weight[o, i]| / 448
#
# Projections alone are rounded. The engine rounds activations token by token. Loaded here, the
# weights are plain again.

SCALE = "_scale"  # behind a weight's name
# Of activations and of the KV cache: for an engine that rounds them too. Computed here in full.
_ENGINE_SCALES = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
FP8_LARGEST = 448.0
_ROUNDING = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_CONFIG: dict[str, Any] = {
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


def in_fp8(name: str) -> bool:
    """Whether FP8 checkpoints round the tensor of this name."""
    return name.endswith("_proj.weight")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 `(O, I)` and float32 scales `(O, 1)` of a weight `(O, I)`."""
    scale = weight.float().abs().amax(1, keepdim=True) / FP8_LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight. scale: one number, or one an output channel."""
    return weight.float() * scale.float().reshape(-1, 1)


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor, in every process; each process calls this in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor, like: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy of this process's part of `tensor`, spread as `like` is; all of it for a plain one.

    dtype: None keeps the tensor's.
    """
    dtype = dtype or tensor.dtype
    if not isinstance(like, DTensor):
        return tensor.to(device=device, dtype=dtype, copy=True)
    mesh, placements = like.device_mesh, like.placements
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    dense = torch.contiguous_format
    local = local.to(device=device, dtype=dtype, copy=True, memory_format=dense)
    spread = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=like.stride()
    )
    return spread.to(device)  # back, where it waits in the machine's memory


# Saving.

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a directory of chat templates by name
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py", ".md")


def save_model(
    model: Transformer | Checkpoint,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory, whole or not at all, replacing the model that was there.

    tokenizer_from: a directory whose tokenizer files are copied beside the weights. dtype: of the
    files, the model's own if None. Every process of a job calls this; a model that is whole in
    each of them is written by the main one. Raises WriteError (disk full) with the old directory
    intact, CheckpointError where the directory is not a model's.
    """
    together = isinstance(model, Transformer) and any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
    if not (together or dist.is_main()):
        return
    directory = Path(directory)
    found = sorted(directory.iterdir()) if directory.exists() else []
    own = [e for e in found if e.name != TEMPLATES]
    foreign = [e.name for e in own if e.is_dir() or e.suffix not in _MODEL_SUFFIXES]
    if foreign or (found and not (directory / "config.json").is_file()):
        raise CheckpointError(
            f"{directory} is no model's and would be replaced; choose another directory. It holds "
            f"{listed(foreign or [e.name for e in found])}"
        )
    with replacing(directory) if dist.is_main() else nullcontext() as temporary:
        # Processes that write together share a file system, and the main one renames.
        place: Any = dist.broadcast(temporary) if together else temporary
        write_model(model, place, tokenizer_from=tokenizer_from, dtype=dtype, together=together)
        if together:
            dist.barrier()
    if together:
        dist.barrier()


def write_model(
    model: Transformer | Checkpoint,
    directory: Path | None,
    *,
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    together: bool = False,
) -> None:
    """Write weights, config and tokenizer into an existing directory, by this process alone.

    dtype: of the files, the model's own if None. fp8: the projections in FP8. together: by every
    process of a job, each some of the shards. directory: None for a process that holds a part of
    what another one writes. Raises OSError when the system refuses.
    """
    model = Checkpoint.of(model) if isinstance(model, Transformer) else model
    tensors: dict[str, LazyTensor] = {}
    for name, one in ((hf_name(key), one) for key, one in model.tensors.items()):
        if fp8 and in_fp8(name):
            tensors[name] = one.map(lambda weight: quantize(weight)[0], torch.float8_e4m3fn)
            scale = one._replace(shape=(one.shape[0], 1))
            tensors[name + SCALE] = scale.map(lambda weight: quantize(weight)[1], torch.float32)
        else:
            tensors[name] = one.to(dtype)
    write_tensors(tensors, directory, together)
    if directory is None or (together and not dist.is_main()):
        return
    values = config_dict(model.config)
    values["torch_dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    if fp8:
        values["quantization_config"] = FP8_CONFIG
    (directory / "config.json").write_text(config_json(values), encoding="utf-8")
    if tokenizer_from is not None:
        source = Path(tokenizer_from)
        if not source.is_dir():
            raise CheckpointError(f"{source} is no directory to copy a tokenizer from")
        names = [Path(TEMPLATES) / one.name for one in source.glob(f"{TEMPLATES}/*.jinja")]
        for name in (*TOKENIZER_FILES, *names):
            if (source / name).is_file():
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, directory / name)


# Loading.


@dataclass(frozen=True)
class Checkpoint:
    """A model whose tensors, by our names, are read when they are asked for.

    It is in files, or made of what is in files (`puzzle.library.assemble`, `export.padding`), or a
    module's (`of`).
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]

    @classmethod
    def of(cls, module: Transformer) -> Checkpoint:
        """A module's tensors, which stay the module's; all of each in every process."""
        return cls(
            module.config,
            {
                key: LazyTensor(tuple(one.shape), one.dtype, partial(whole, one.detach()))
                for key, one in module.state_dict().items()
            },
        )

    @classmethod
    def named(
        cls, config: ModelConfig, stored: Mapping[str, LazyTensor], where: Path
    ) -> Checkpoint:
        """Of tensors by Hugging Face's names, FP8 undone. Raises CheckpointError where names,
        shapes or types are not what the config asks for."""
        with torch.device("meta"):
            module = Transformer(config)
        keys = {hf_name(key): key for key in module.state_dict()}
        expected = {hf_name(key): one.shape for key, one in module.state_dict().items()}
        _check(expected, stored, where)
        if config.tie_word_embeddings:
            _check_tied(stored)
        return cls(config, {keys[name]: _plain(name, stored) for name in expected})

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in, which the embedding's tensor tells."""
        return self.tensors["embed_tokens.weight"].dtype

    def cast(self, dtype: torch.dtype | None) -> Checkpoint:
        """The same in another dtype; None keeps each tensor's."""
        return Checkpoint(self.config, {key: one.to(dtype) for key, one in self.tensors.items()})

    def fill(
        self,
        module: nn.Module,
        dtype: torch.dtype | None,
        device: torch.device,
        prefix: str = "",
        only: Callable[[str], bool] | None = None,
    ) -> None:
        """Give a module on the meta device copies of its tensors, spread as it is.

        prefix: of its names here. dtype: None keeps what is stored. only: names to read; the others
        stay without memory.
        """
        module.load_state_dict(
            {
                key: place(self.tensors[prefix + key].read(), like, dtype, device)
                for key, like in module.state_dict().items()
                if only is None or only(key)
            },
            assign=True,
            strict=only is None,
        )


def open_model(source: str | Path) -> Checkpoint:
    """A finished run's model, a Hugging Face directory's or a hub id's, from the files' headers.

    Raises CheckpointError (files, tensors) or ConfigError (`config.json`).
    """
    directory = resolve(source)
    return Checkpoint.named(read_config(directory), find_tensors(directory), directory)


def load_model(
    source: str | Path | Checkpoint,
    *,
    frozen: bool = False,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    prepare: Callable[[Transformer], object] | None = None,
    only: Callable[[str], bool] | None = None,
) -> Transformer:
    """A model of its own from a finished run, a Hugging Face directory, a hub id or a Checkpoint.

    frozen: no gradients, evaluation mode (teachers and references). dtype: None keeps what is
    stored. device: where this process computes, unless given. prepare: called with the module while
    it has no memory yet; it may spread parameters over processes. only: parameters to read, by
    name; the others stay without memory. Raises CheckpointError (files, tensors) or ConfigError
    (`config.json`).
    """
    model = source if isinstance(source, Checkpoint) else open_model(source)
    with torch.device("meta"):
        module = Transformer(model.config)
    if frozen:
        module.requires_grad_(False).eval()
    if prepare is not None:
        prepare(module)
    model.fill(module, dtype, torch.device(device or dist.device()), only=only)
    return module


def _plain(name: str, stored: Mapping[str, LazyTensor]) -> LazyTensor:
    """A tensor of floating-point numbers: of one in FP8, the float32 that it stands for."""
    one, scale = stored[name], stored.get(name + SCALE)
    if not one.dtype.is_floating_point:
        raise CheckpointError(
            f"{name} in {one.file} is {one.dtype}; quantized checkpoints are not supported, give "
            "the plain one"
        )
    if one.dtype != torch.float8_e4m3fn:
        return one.to(torch.float32) if one.dtype == torch.float64 else one
    if scale is None or math.prod(scale.shape) not in (1, one.shape[0]):
        raise CheckpointError(
            f"{name} in {one.file} is in FP8 and needs {name}{SCALE}, one number or one for each "
            f"of its {one.shape[0]} rows"
        )
    return one.map(lambda weight: dequantize(weight, scale.read()), torch.float32)


def _check(
    expected: Mapping[str, torch.Size], stored: Mapping[str, LazyTensor], where: Path
) -> None:
    """Names and shapes in the files against those that the config asks for."""
    if missing := [name for name in expected if name not in stored]:
        tied = "; if the model ties them, set tie_word_embeddings to true in config.json"
        hint = tied if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{where} lacks {listed(missing)}, which config.json asks for{hint}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{name} in {stored[name].file} is {list(stored[name].shape)}; config.json asks "
                f"for {list(shape)}"
            )
    passed_over = ("rotary_emb.inv_freq", *_ENGINE_SCALES)
    unexpected = [  # old transformers stored a buffer that is computed here
        name
        for name in stored
        if not (name in expected or name.removesuffix(SCALE) in expected)
        and not name.endswith(passed_over)
    ]
    if unexpected and unexpected != ["lm_head.weight"]:
        raise CheckpointError(
            f"{where} holds {listed(unexpected)}, for which config.json has no place; is it "
            "the config of another model?"
        )


def _check_tied(stored: Mapping[str, LazyTensor]) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    if names[1] not in stored:
        return
    if not torch.equal(*(stored[name].read() for name in names)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {names[1]} in {stored[names[1]].file} "
            f"differs from {names[0]}; set tie_word_embeddings to false to use both"
        )
