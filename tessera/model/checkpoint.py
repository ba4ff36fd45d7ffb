"""Our names of tensors and Hugging Face's: nine rules, read in either direction. Torch-free.

Importing a checkpoint renames tensors and never permutes numbers. The first rule that fits
decides; `hf_name` and `our_name` are a bijection. The two linear replacements have the names of
the released Puzzle models (DeciLM).

Weights in FP8: E4M3 with a scale for each output channel, in compressed-tensors' layout.

    weight[o, i] ≈ float8[o, i] * scale[o]        scale[o] = max_i |weight[o, i]| / 448

Projections are rounded; embeddings, norms, biases and the head are not. Activations are rounded
token by token by the engine that runs it, which needs no calibration. vLLM, SGLang and transformers
read it; read here, it becomes plain weights again.

Tensors that are spread over processes, in and out of files, never whole on any one of them.

A checkpoint is read by every process, each the rows that are its own (a tensor of a safetensors
file maps the file, so the rest is never touched). It is written by all of them: a tensor is
gathered, its file's owner keeps it, the others drop it, so a process holds its share of the model
and one tensor more.

Models out of memory: a directory in Hugging Face's layout, whole or not at all.

A sibling directory is written and renamed into place. A model that is spread over processes is
written by all of them, each some of the files (`sharded.py`).

Checkpoints in: sharded safetensors in Hugging Face's layout, never pickle. Out: `saving.py`.

Everything is checked against `config.json` from the files' headers before a weight is read: shards
present and whole, names, shapes. Loading builds the module on the meta device and assigns tensors,
so a model is in memory once, and of one that is spread over processes each reads its own part.
Of quantized checkpoints those in FP8 are read (`fp8.py`), and become plain.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tessera import dist
from tessera.model.families import config_dict, config_json, read_config
from tessera.model.source import PICKLES, CheckpointError, load_config, pickle_error, resolve, some
from tessera.model.transformer import Transformer, holding
from tessera.runs.files import replacing

__all__ = [
    "CheckpointError",
    "copy_tokenizer",
    "find_tensors",
    "load_config",
    "load_model",
    "resolve",
    "save_model",
    "write_tensors",
]

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


def is_sharded(module: nn.Module) -> bool:
    """True where parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor's all values, in every process; each process calls this in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor, like: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy of this process's part of `tensor`, spread as `like` is; all of it for a plain one.

    dtype: None keeps the tensor's.
    """
    if not isinstance(like, DTensor):
        return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    mesh, placements = like.device_mesh, like.placements
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    local = local.to(
        device=device, dtype=dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format
    )
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=like.stride()
    )


def files_of(
    tensors: Mapping[str, Tensor], max_shard_bytes: int, at_least: int = 1
) -> list[list[str]]:
    """Names by file, in order: none larger than allowed unless one tensor is.

    at_least: files wanted, so that as many processes have something to write.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    limit = min(max_shard_bytes, -(-sum(sizes.values()) // at_least))
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def collect(tensors: Mapping[str, Tensor], files: Sequence[Sequence[str]]) -> dict[int, dict]:
    """The files that this process writes: number -> its tensors, whole, on the CPU."""
    mine: dict[int, dict[str, Tensor]] = {}
    for number, names in enumerate(files):
        for name in names:
            tensor = whole(tensors[name].detach())
            if number % dist.world() == dist.rank():
                mine.setdefault(number, {})[name] = tensor.cpu()
    return mine


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
MAX_SHARD_BYTES = 5_000_000_000
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py", ".md")


def save_model(
    module: Transformer,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory, whole or not at all, replacing the model that was there.

    tokenizer_from: a directory whose tokenizer files are copied beside the weights. dtype: of the
    files, the module's own if None. Stock software loads the directory of a homogeneous model.
    Every process of a job calls this; a model that is whole in each of them is written by the main
    one. Raises WriteError (disk full) with the old directory intact, CheckpointError where the
    directory is not a model's.
    """
    together = is_sharded(module)
    if not (together or dist.is_main()):
        return
    _refuse_foreign(Path(directory))
    with (_replacing_together if together else replacing)(Path(directory)) as temporary:
        write_model(
            module,
            temporary,
            tokenizer_from=tokenizer_from,
            max_shard_bytes=max_shard_bytes,
            dtype=dtype,
            together=together,
        )


def write_model(
    module: Transformer,
    directory: Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    together: bool = False,
) -> None:
    """Write weights, config and tokenizer into an existing directory, by this process alone.

    together: by every process of a job, each some of the shards.
    """
    tensors = {hf_name(key): tensor for key, tensor in module.state_dict().items()}
    write_tensors(tensors, directory, max_shard_bytes, together=together, dtype=dtype)
    if together and not dist.is_main():
        return
    values = config_dict(module.config)
    values["torch_dtype"] = str(dtype or module.head.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(config_json(values), encoding="utf-8")
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), directory)


@contextmanager
def _replacing_together(directory: Path) -> Iterator[Path]:
    """`replacing` for all processes of a job at once, on a file system that they share."""
    with replacing(directory) if dist.is_main() else nullcontext() as temporary:
        yield dist.broadcast(temporary)
        dist.barrier()  # all have written before the main one renames
    dist.barrier()


def _refuse_foreign(directory: Path) -> None:
    entries = sorted(directory.iterdir()) if directory.exists() else []
    foreign = [e.name for e in entries if e.is_dir() or e.suffix not in _MODEL_SUFFIXES]
    if entries and (foreign or not (directory / "config.json").is_file()):
        raise CheckpointError(
            f"{directory} holds what is no model's ({some(foreign or [e.name for e in entries])}) "
            "and would be replaced; choose another directory"
        )


def write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    together: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors as `model.safetensors`, or as shards and their index when they are larger.

    together: every process of the job calls this, and each writes some of the shards. Raises
    OSError when the system refuses, which `replacing` turns into a WriteError.
    """
    files = files_of(tensors, max_shard_bytes, dist.world() if together else 1)
    count = len(files)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    if together:
        for number, shard in collect(tensors, files).items():
            _write_shard(shard, directory / names[number], dtype)
    else:
        for file, keys in zip(names, files, strict=True):
            _write_shard({key: tensors[key] for key in keys}, directory / file, dtype)
    if count > 1 and (dist.is_main() or not together):
        places = {key: file for file, keys in zip(names, files, strict=True) for key in keys}
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    plain = {name: one.detach().to("cpu", dtype).contiguous() for name, one in tensors.items()}
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:  # carries the system's error as text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy what there is of tokenizer files, chat template and generation config.

    Raises CheckpointError where `source` is no directory.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory to copy a tokenizer from")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what shape its file says it has."""

    file: Path
    shape: tuple[int, ...]


def load_model(
    source: str | Path,
    *,
    frozen: bool = False,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[Transformer], object] | None = None,
) -> Transformer:
    """A model of its own from a finished run, a Hugging Face directory or a hub id.

    frozen: no gradients, evaluation mode (teachers and references); dtype: None keeps what is
    stored. prepare: called with the module while it has no memory yet; it may spread parameters
    over processes. Nothing is shared with any other load. Raises CheckpointError (files, tensors)
    or ConfigError (`config.json`).
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
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    names = {hf_name(key): key for key in shapes}
    scales, stored = _split_scales(stored, names)
    _check({name: shapes[key] for name, key in names.items()}, stored, directory)
    if config.tie_word_embeddings:
        _check_tied(stored)
    likes, device = module.state_dict(), torch.device(device)
    factors = dict(_read(scales))
    tensors = {}
    for name, tensor in _read({name: stored[name] for name in names}):
        if tensor.dtype == DTYPE:
            tensor = _plain(name, tensor, factors, stored[name].file)
        tensors[names[name]] = place(tensor, likes[names[name]], dtype, device)
    module.load_state_dict(tensors, assign=True)
    return module


def _split_scales(
    stored: Mapping[str, Stored], names: Mapping[str, str]
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The scales of weights in FP8, and the other tensors."""
    scales = {n: one for n, one in stored.items() if n.removesuffix(SUFFIX) in names}
    scales = {n: one for n, one in scales.items() if n not in names}
    return scales, {n: one for n, one in stored.items() if n not in scales}


def _plain(name: str, tensor: Tensor, scales: Mapping[str, Tensor], file: Path) -> Tensor:
    """A weight out of FP8. Raises CheckpointError without a scale that fits it."""
    scale = scales.get(name + SUFFIX)
    if scale is None or scale.numel() not in (1, tensor.shape[0]):
        found = "none" if scale is None else list(scale.shape)
        raise CheckpointError(
            f"{name} in {file} is in FP8 and needs {name}{SUFFIX}, one number or one for each "
            f"of its {tensor.shape[0]} rows; there is {found}"
        )
    return dequantize(tensor, scale)


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory by its name there, from the headers; no weights are read.

    Raises CheckpointError: a shard missing, truncated, corrupt, or without a tensor the index
    puts there; no safetensors at all; pickle.
    """
    if (directory / INDEX).is_file():
        return _find_sharded(directory)
    if (directory / SINGLE).is_file():
        file = directory / SINGLE
        return {name: Stored(file, shape) for name, shape in read_header(file).items()}
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLES:
            raise pickle_error(file)
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _find_sharded(directory: Path) -> dict[str, Stored]:
    places = _weight_map(directory / INDEX)
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {some(missing)}, {len(missing)} of the {len(shards)} shards that "
            f"{INDEX} lists; copy or download again"
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    for name, shard in places.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{directory / INDEX} puts {name} in {shard}, which does not hold it; the index "
                "and the shards are not of one checkpoint"
            )
    return {name: Stored(directory / shard, headers[shard][name]) for name, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        assert all(Path(shard).name == shard for shard in places.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(
            f"{index} is not an index of shards (a JSON object whose weight_map names a file for "
            "every tensor)"
        ) from None
    return places


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, having checked that the file is whole.

    Raises CheckpointError with the bytes expected and found.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        if start == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise CheckpointError(f"{file} is corrupt, or no safetensors file ({size} bytes)")
        if size < 8 + length:
            raise _truncated(file, 8 + length, size, "for its header alone")
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is corrupt: its header cannot be read ({error})") from None
    if size != 8 + length + data:
        raise _truncated(file, 8 + length + data, size, "by its header")
    return shapes


def _truncated(file: Path, expected: int, found: int, why: str) -> CheckpointError:
    state = "truncated" if found < expected else "corrupt"
    return CheckpointError(
        f"{file} is {state}: expected {expected} bytes {why}, found {found}; "
        "copy or download it again"
    )


def _check(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], directory: Path
) -> None:
    """Names and shapes in the files against those the config asks for."""
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; if the model ties them, set tie_word_embeddings to true in config.json"
        raise CheckpointError(
            f"{directory} lacks {some(missing)}, which config.json asks for{hint}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{name} in {stored[name].file} is {list(stored[name].shape)}; config.json asks "
                f"for {list(shape)}"
            )
    unexpected = [name for name in stored if name not in expected and not _ignored(name)]
    if unexpected and unexpected != ["lm_head.weight"]:
        raise CheckpointError(
            f"{directory} holds {some(unexpected)}, for which config.json has no place; is it "
            "the config of another model?"
        )


def _ignored(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")  # a buffer of old transformers, computed here


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


def _read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, shard by shard; each is a view of its file until it is copied."""
    for file in sorted({where.file for where in stored.values()}):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in (name for name, where in stored.items() if where.file == file):
                    tensor = shard.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise CheckpointError(
                            f"{name} in {file} is {tensor.dtype}; quantized checkpoints are not "
                            "supported, give the plain one"
                        )
                    yield name, tensor
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt: {error}") from None
