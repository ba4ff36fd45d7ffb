"""Checkpoints in: sharded safetensors in Hugging Face's layout, never pickle. Out: `saving.py`.

Everything is checked against `config.json` from the files' headers before a weight is read: shards
present and whole, names, shapes. Loading builds the module on the meta device and assigns tensors,
so a model is in memory once, and of one that is spread over processes each reads its own part.
Of quantized checkpoints those in FP8 are read (`fp8.py`), and become plain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera.model import fp8
from tessera.model.families import read_config
from tessera.model.names import hf_name
from tessera.model.saving import INDEX, SINGLE, copy_tokenizer, replacing, save_model, write_tensors
from tessera.model.sharded import place
from tessera.model.source import PICKLES, CheckpointError, load_config, pickle_error, resolve, some
from tessera.model.transformer import Transformer

__all__ = [
    "CheckpointError",
    "copy_tokenizer",
    "find_tensors",
    "load_config",
    "load_model",
    "replacing",
    "resolve",
    "save_model",
    "write_tensors",
]

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
        if tensor.dtype == fp8.DTYPE:
            tensor = _plain(name, tensor, factors, stored[name].file)
        tensors[names[name]] = place(tensor, likes[names[name]], dtype, device)
    module.load_state_dict(tensors, assign=True)
    return module


def _split_scales(
    stored: Mapping[str, Stored], names: Mapping[str, str]
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The scales of weights in FP8, and the other tensors."""
    scales = {n: one for n, one in stored.items() if n.removesuffix(fp8.SUFFIX) in names}
    scales = {n: one for n, one in scales.items() if n not in names}
    return scales, {n: one for n, one in stored.items() if n not in scales}


def _plain(name: str, tensor: Tensor, scales: Mapping[str, Tensor], file: Path) -> Tensor:
    """A weight out of FP8. Raises CheckpointError without a scale that fits it."""
    scale = scales.get(name + fp8.SUFFIX)
    if scale is None or scale.numel() not in (1, tensor.shape[0]):
        found = "none" if scale is None else list(scale.shape)
        raise CheckpointError(
            f"{name} in {file} is in FP8 and needs {name}{fp8.SUFFIX}, one number or one for each "
            f"of its {tensor.shape[0]} rows; there is {found}"
        )
    return fp8.dequantize(tensor, scale)


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
