"""Models in and out of directories in Hugging Face's layout: sharded safetensors, never pickle.

Loading checks everything from the files' headers before a weight is read, builds the module on the
meta device and assigns tensors, so a model is in memory once. Of a model that is spread over
processes, each reads its own rows and writes some of the files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tessera import dist
from tessera.model import gguf
from tessera.model.families import config_dict, config_json, read_config
from tessera.model.source import CheckpointError, no_weights, resolve
from tessera.model.transformer import Transformer, holding
from tessera.runs.files import replacing, with_usual_mode

log = logging.getLogger(__name__)

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


@torch.no_grad()
def rounded_to_fp8(module: Transformer) -> Transformer:
    """A frozen copy that computes with the weights as FP8 keeps them."""
    state = module.state_dict()

    def tensor(key: str, _: torch.Size) -> Tensor:
        value = state[key]
        return dequantize(*quantize(value)).to(value.dtype) if in_fp8(key) else value

    return holding(module.config, tensor).requires_grad_(False).eval()


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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a directory of chat templates by name
MAX_SHARD_BYTES = 5_000_000_000
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py", ".md")


def save_model(
    module: Transformer,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a model directory, whole or not at all, replacing the model that was there.

    tokenizer_from: a directory whose tokenizer files are copied beside the weights. Every process
    of a job calls this; a model that is whole in each of them is written by the main one. Raises
    WriteError (disk full) with the old directory intact, CheckpointError where the directory is
    not a model's.
    """
    together = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    if not (together or dist.is_main()):
        return
    directory = Path(directory)
    found = sorted(directory.iterdir()) if directory.exists() else []
    own = [e for e in found if e.name != TEMPLATES]
    foreign = [e.name for e in own if e.is_dir() or e.suffix not in _MODEL_SUFFIXES]
    if foreign or (found and not (directory / "config.json").is_file()):
        raise CheckpointError(
            f"{directory} is no model's and would be replaced; choose another directory. It holds "
            f"{_listed(foreign or [e.name for e in found])}"
        )
    with replacing(directory) if dist.is_main() else nullcontext() as temporary:
        # Processes that write together share a file system, and the main one renames.
        place: Any = dist.broadcast(temporary) if together else temporary
        write_model(module, place, tokenizer_from=tokenizer_from, together=together)
        if together:
            dist.barrier()
    if together:
        dist.barrier()


def write_model(
    module: Transformer,
    directory: Path,
    *,
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    together: bool = False,
) -> None:
    """Write weights, config and tokenizer into an existing directory, by this process alone.

    dtype: of the files, the module's own if None. fp8: the projections in FP8. together: by every
    process of a job, each some of the shards. Raises OSError when the system refuses.
    """
    tensors = {hf_name(key): tensor for key, tensor in module.state_dict().items()}
    if fp8:
        for name in [name for name in tensors if in_fp8(name)]:
            tensors[name], tensors[name + SCALE] = quantize(tensors[name])
    _write_tensors(tensors, directory, dtype, together)
    if together and not dist.is_main():
        return
    values = config_dict(module.config)
    values["torch_dtype"] = str(dtype or module.head.dtype).removeprefix("torch.")
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


def _write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, dtype: torch.dtype | None, together: bool
) -> None:
    """Write `model.safetensors`, or shards and their index where that would be too large."""
    rank, world = (dist.rank(), dist.world()) if together else (0, 1)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    files = _split(sizes, min(MAX_SHARD_BYTES, -(-total // world)))
    count = len(files)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    mine: dict[str, dict[str, Tensor]] = {}
    for number, keys in enumerate(files):
        for key in keys:
            tensor = whole(tensors[key].detach())  # every process gathers every tensor
            if number % world == rank:
                mine.setdefault(names[number], {})[key] = tensor.cpu() if together else tensor
    for file, shard in mine.items():
        plain = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in shard.items()}
        try:
            save_file(plain, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # carries the system's error as text only
            if (code := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
        with_usual_mode(directory / file)
    if count > 1 and rank == 0:
        places = {key: file for file, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by file, in order: no file larger than the limit unless one tensor is."""
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


# Loading.


class Stored(NamedTuple):
    """Where a tensor is. name: the file's own, where that is another."""

    file: Path
    shape: tuple[int, ...]
    name: str = ""


def load_model(
    source: str | Path,
    *,
    frozen: bool = False,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    prepare: Callable[[Transformer], object] | None = None,
) -> Transformer:
    """A model of its own from a finished run, a Hugging Face directory or a hub id.

    frozen: no gradients, evaluation mode (teachers and references). dtype: None keeps what is
    stored. device: where this process computes, unless given. prepare: called with the module while
    it has no memory yet; it may spread parameters over processes. Raises CheckpointError (files,
    tensors) or ConfigError (`config.json`).
    """
    directory = resolve(source)
    config = read_config(directory)
    stored = find_tensors(directory)
    with torch.device("meta"):
        module = Transformer(config)
    if frozen:
        module.requires_grad_(False).eval()
    if prepare is not None:
        prepare(module)
    likes = {hf_name(key): tensor for key, tensor in module.state_dict().items()}
    keys = dict(zip(likes, module.state_dict(), strict=True))
    scales = {
        name: one
        for name, one in stored.items()
        if name not in likes and name.removesuffix(SCALE) in likes
    }
    _check(likes, {n: one for n, one in stored.items() if n not in scales}, directory)
    if config.tie_word_embeddings:
        _check_tied(stored)
    factors = dict(_read(scales))
    tensors, where = {}, torch.device(device or dist.device())
    for name, tensor in _read({name: stored[name] for name in likes}):
        if tensor.dtype == torch.float8_e4m3fn:
            scale = factors.get(name + SCALE)
            if scale is None or scale.numel() not in (1, len(tensor)):
                raise CheckpointError(
                    f"{name} in {stored[name].file} is in FP8 and needs {name}{SCALE}, one number "
                    f"or one for each of its {len(tensor)} rows"
                )
            tensor = dequantize(tensor, scale)
        tensors[keys[name]] = place(tensor, likes[name], dtype, where)
    module.load_state_dict(tensors, assign=True)
    return module


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory by its name there, from the headers; no weights are read.

    Raises CheckpointError: a shard missing, truncated, corrupt, or without a tensor the index
    puts there; no safetensors at all; pickle.
    """
    if (directory / gguf.INDEX).is_file():
        found = gguf.tensors(directory).items()
        return {name: Stored(directory / one.file, one.shape) for name, one in found}
    if (directory / "adapter_config.json").is_file():
        log.warning("%s also holds an adapter (LoRA), which is not applied", directory)
    index, single = (directory / name for name in (INDEX, SINGLE))
    if single.is_file():  # which transformers looks for first
        if index.is_file() and (others := set(_read_index(index).values()) - {SINGLE}):
            log.warning(
                "%s holds %s and an index of %d other files; %s is read, as transformers does. "
                "Delete what is out of date",
                directory, SINGLE, len(others), SINGLE,
            )  # fmt: skip
        return _prefixed(_read_header(single))
    if index.is_file():
        return _prefixed(_find_sharded(directory))
    raise no_weights(directory)


def _prefixed(stored: dict[str, Stored]) -> dict[str, Stored]:
    """A language model's names of the weights, also where the bare model was saved."""
    if "embed_tokens.weight" not in stored or any(name.startswith("model.") for name in stored):
        return stored
    return {
        name if name == "lm_head.weight" else f"model.{name}": where._replace(name=name)
        for name, where in stored.items()
    }


def _read_index(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        assert all(Path(shard).name == shard for shard in places.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(
            f"{index} is not an index of shards: its weight_map names a file for every tensor"
        ) from None
    return places


def _find_sharded(directory: Path) -> dict[str, Stored]:
    index = directory / INDEX
    places = _read_index(index)
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise CheckpointError(
            f"{directory} lacks {_listed(missing)}, {len(missing)} of the {len(shards)} shards "
            f"that {INDEX} lists; copy or download again"
        )
    headers = {shard: _read_header(directory / shard) for shard in shards}
    if lost := [name for name, shard in places.items() if name not in headers[shard]]:
        raise CheckpointError(
            f"{index} puts {lost[0]} in {places[lost[0]]}, which does not hold it; the index and "
            "the shards are not of one checkpoint"
        )
    return {name: headers[shard][name] for name, shard in places.items()}


def _read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, which safetensors has checked to be whole."""
    with file.open("rb") as handle:
        if handle.read(8) == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: git lfs pull")
    with _opened(file) as shard:
        return {n: Stored(file, tuple(shard.get_slice(n).get_shape())) for n in shard.keys()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt, {file.stat().st_size} bytes ({error}); copy or "
            "download it again"
        ) from None


def _read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, shard by shard; each is a view of its file until it is copied."""
    for file in sorted({where.file for where in stored.values()}):
        if file.suffix == ".gguf":
            found = gguf.tensors(file.parent)
            for name in (name for name, where in stored.items() if where.file == file):
                yield name, torch.from_numpy(gguf.read_tensor(file.parent, found[name]))
            continue
        with _opened(file) as shard:
            for name in (name for name, where in stored.items() if where.file == file):
                tensor = shard.get_tensor(stored[name].name or name)
                if not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{name} in {file} is {tensor.dtype}; quantized checkpoints are not "
                        "supported, give the plain one"
                    )
                yield name, tensor


def _check(expected: Mapping[str, Tensor], stored: Mapping[str, Stored], directory: Path) -> None:
    """Names and shapes in the files against those that the config asks for."""
    if missing := [name for name in expected if name not in stored]:
        tied = "; if the model ties them, set tie_word_embeddings to true in config.json"
        hint = tied if missing == ["lm_head.weight"] else ""
        raise CheckpointError(
            f"{directory} lacks {_listed(missing)}, which config.json asks for{hint}"
        )
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} in {stored[name].file} is {list(stored[name].shape)}; config.json asks "
                f"for {list(tensor.shape)}"
            )
    passed_over = ("rotary_emb.inv_freq", *_ENGINE_SCALES)
    unexpected = [  # old transformers stored a buffer that is computed here
        n for n in stored if n not in expected and not n.endswith(passed_over)
    ]
    if unexpected and unexpected != ["lm_head.weight"]:
        raise CheckpointError(
            f"{directory} holds {_listed(unexpected)}, for which config.json has no place; is it "
            "the config of another model?"
        )


def _check_tied(stored: Mapping[str, Stored]) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    if names[1] not in stored:
        return
    tensors = dict(_read({name: stored[name] for name in names}))
    if not torch.equal(*(tensors[name] for name in names)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {names[1]} in {stored[names[1]].file} "
            f"differs from {names[0]}; set tie_word_embeddings to false to use both"
        )


def _listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
