"""A GGUF file seen as a Hugging Face directory.

`directory_of` writes the file's config and tokenizer in Hugging Face's form into the user's cache,
beside links to the file; `tensors` and `read_tensor` give its weights under Hugging Face's names,
dequantised one at a time when they are asked for. Torch-free. docs/model.md says what is read.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessera.model.config import (
    GQA,
    BlockConfig,
    ConfigError,
    Linear,
    ModelConfig,
    NoOp,
    RopeScaling,
    SwiGLU,
)
from tessera.model.families import config_dict, config_json, integer
from tessera.model.pre_tokenizers import (
    DIGIT,
    DIGITS,
    GPT2_SPLIT,
    MERGED,
    PRE_TOKENIZERS,
    PUNCTUATION,
    WHOLE_WORDS,
)
from tessera.runs.files import WriteError, cache_home, replacing

if TYPE_CHECKING:
    from gguf import GGUFReader

VERSION = 2  # of the directories in the cache; raised whenever one is written otherwise
INDEX = "gguf.json"
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # Mistral's are llama
FAMILIES["deci"] = "llama"  # layers that differ, as `tessera export --format gguf` writes them
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# llama.cpp turns neighbouring pairs of q and k in these architectures, Hugging Face halves.
_PAIRED = ("llama", "deci")
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Llama 3.x's stretches of the rotary frequencies that published models have; a file holds the
# divisor of each frequency alone.
_LLAMA3 = ((1.0, 4.0, 8192), (1.0, 4.0, 4096), (1.0, 4.0, 16384))


class GGUFError(ConfigError):
    """A GGUF file that cannot be read; the text names the file and what is supported."""


class Tensor(NamedTuple):
    """Where a weight stands. heads: of q or k whose rows are put into Hugging Face's order."""

    file: str
    offset: int
    shape: tuple[int, ...]  # Hugging Face's
    type: str
    heads: int


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def directory_of(path: Path) -> Path:
    """The Hugging Face directory of a GGUF file, or of any file of a split one.

    It lies in the user's cache under the name, size and time of the file. Raises GGUFError.
    """
    files = _files(path)
    known = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    digest = hashlib.blake2b(json.dumps([VERSION, known]).encode(), digest_size=8).hexdigest()
    directory = cache_home() / "gguf" / f"{path.stem}-{digest}"
    if (directory / INDEX).is_file():
        return directory
    try:
        content = _content(files)
    except GGUFError:
        raise
    except ConfigError as error:
        raise GGUFError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a key of another kind than llama.cpp writes
        raise GGUFError(f"{path} holds keys that describe no model ({error!r})") from None
    try:
        _write(directory, files, content)
    except WriteError:  # a home that nobody may write in
        directory = Path(tempfile.mkdtemp(prefix="tessera-gguf-")) / directory.name
        _write(directory, files, content)
    return directory


def _write(directory: Path, files: Sequence[Path], content: dict[str, str]) -> None:
    with replacing(directory) as temporary:
        for name, text in content.items():
            file = temporary / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        for number, file in enumerate(files):
            (temporary / f"{number}.gguf").symlink_to(file.resolve())


def _files(path: Path) -> list[Path]:
    """All files of a model, in order. Raises GGUFError where one is missing."""
    part = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if part is None:
        return [path]
    names = [f"{part[1]}-{n:05}-of-{part[3]}.gguf" for n in range(1, int(part[3]) + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise GGUFError(f"{path} is one of {part[3]} files, and {missing[0]} is not beside it")
    return [path.parent / name for name in names]


def tensors(directory: Path) -> dict[str, Tensor]:
    """The weights of a directory that `directory_of` made, by Hugging Face's names."""
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    return {
        name: Tensor(file, offset, tuple(shape), kind, heads)
        for name, (file, offset, shape, kind, heads) in index.items()
    }


def tensors_of(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of one file of an architecture that is known, by Hugging Face's names."""
    found = _index(Header([file]), config)
    return {name: tensor._replace(file=file.name) for name, tensor in found}


def read_tensor(directory: Path, tensor: Tensor) -> np.ndarray:
    """A weight in float32; in float16 where the file holds that, bfloat16 as int16. A view of the
    file where nothing is to be done."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.type]
    block, size = GGML_QUANT_SIZES[kind]
    row = tensor.shape[-1] // block * size
    shape = (*tensor.shape[:-1], row)
    data = np.memmap(directory / tensor.file, np.uint8, "c", tensor.offset, shape)
    plain = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}.get(tensor.type)
    value = data.view(plain) if plain else dequantize(data, kind)
    if tensor.heads:  # (heads, D/2, 2, …) -> (heads, 2, D/2, …)
        rest = tensor.shape[1:]
        value = value.reshape(tensor.heads, -1, 2, *rest).swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(value)


# The file's keys and tensors.


class Header:
    """The keys of a model's files and where their tensors are."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.path = files[0]
        readers = [_opened(file) for file in files]
        self.fields = readers[0].fields
        count = self.get("split.count", 1)
        if count != len(files):
            raise GGUFError(f"{self.path} is one of {count} files; name them as llama.cpp does")
        self.places = {
            one.name: (f"{number}.gguf", one)
            for number, reader in enumerate(readers)
            for one in reader.tensors
        }
        self.architecture = str(self.get("general.architecture", "?"))
        if self.architecture not in FAMILIES:
            raise GGUFError(
                f"{self.path} is of the architecture {self.architecture!r}; supported are "
                f"{', '.join(FAMILIES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the file; `.name` stands for one of the architecture's own."""
        key = f"{self.architecture}{key}" if key.startswith(".") else key
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise GGUFError(f"{self.path} lacks the key {self.architecture}{key}")
        return value


def _opened(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise GGUFError(
            f"{file}: reading GGUF needs the gguf package: pip install 'tessera[gguf]'"
        ) from error
    if not is_gguf(file):
        raise GGUFError(f"{file} is no GGUF file: it does not begin with the letters GGUF")
    try:
        reader = GGUFReader(file)
        end = max((int(one.data_offset + one.n_bytes) for one in reader.tensors), default=0)
    except Exception as error:  # noqa: BLE001 - the package checks nothing that it reads
        raise GGUFError(
            f"{file} is truncated or corrupt, {file.stat().st_size} bytes ({error!r}); copy or "
            "download it again"
        ) from None
    if end > file.stat().st_size:
        raise GGUFError(f"{file} is truncated: {file.stat().st_size} of {end} bytes")
    return reader


def _content(files: Sequence[Path]) -> dict[str, str]:
    """The texts of the directory's files by name."""
    header = Header(files)
    config = _config(header)
    values = config_dict(config)
    values["torch_dtype"] = "float32"
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) or None,
        "pad_token_id": config.pad_token_id,
    }
    known = {key: value for key, value in generation.items() if value is not None}
    return {
        "config.json": config_json(values),
        "generation_config.json": json.dumps(known, indent=2) + "\n",
        INDEX: json.dumps(dict(_index(header, config))),
        **_tokenizer_files(header),
    }


def _index(header: Header, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, (file, one) in header.places.items():
        if name == "rope_freqs.weight":
            continue
        base, _, end = name.rpartition(".")
        layer, _, part = base.removeprefix("blk.").rpartition(".")
        block = (
            config.blocks[int(layer)]
            if layer.isdigit() and len(config.blocks) > int(layer)
            else None
        )
        if block is not None and part == "attn_output" and isinstance(block.attention, Linear):
            new = f"model.layers.{layer}.self_attn.linear_attn"
        elif block is not None and part in _LAYER:
            new = f"model.layers.{layer}.{_LAYER[part]}"
        elif base in _TOP:
            new = _TOP[base]
        else:
            raise GGUFError(f"{header.path} holds {name}, for which its architecture has no place")
        if one.tensor_type.name not in TYPES:
            raise GGUFError(
                f"{name} in {header.path} is in {one.tensor_type.name}; read are {', '.join(TYPES)}"
            )
        heads = {"attn_q": config.num_attention_heads}
        if block is not None and isinstance(block.attention, GQA):
            heads["attn_k"] = block.attention.num_key_value_heads
        turned = heads.get(part, 0) if header.architecture in _PAIRED else 0
        shape = tuple(int(n) for n in reversed(one.shape))
        yield (
            f"{new}.{end}",
            Tensor(file, int(one.data_offset), shape, one.tensor_type.name, turned),
        )


def _config(header: Header) -> ModelConfig:
    layers, hidden = header.need(".block_count"), header.need(".embedding_length")
    integer({"num_hidden_layers": layers}, "num_hidden_layers")
    if header.get(".expert_count"):
        raise GGUFError(f"{header.path} is a mixture of experts; supported are dense models")
    heads = _each(header.need(".attention.head_count"), layers)
    kv_heads = _each(header.get(".attention.head_count_kv", heads), layers)
    widths = _each(header.need(".feed_forward_length"), layers)
    query = max(heads)
    head_dim = header.get(".attention.key_length", hidden // query)
    sizes = {"hidden_size": hidden, "head_dim": head_dim}
    for key in sizes:
        integer(sizes, key)
    rotated = header.get(".rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise GGUFError(f"{header.path} rotates {rotated} of {head_dim} numbers of a head, not all")
    ids = {
        role: header.get(f"tokenizer.ggml.{role}_token_id")
        for role in ("bos", "eos", "eot", "eom", "padding")
    }
    theta = _short(header.get(".rope.freq_base", 10_000.0))
    embedding = header.places.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(f"{header.path} holds no token_embd.weight: it is no whole language model")
    ends = [ids[role] for role in ("eos", "eot", "eom") if ids[role] is not None]
    return ModelConfig(
        vocab_size=int(embedding[1].shape[1]),
        hidden_size=hidden,
        num_attention_heads=query,
        head_dim=head_dim,
        blocks=tuple(
            BlockConfig(_attention(q, kv), SwiGLU(width) if width else NoOp())
            for q, kv, width in zip(heads, kv_heads, widths, strict=True)
        ),
        family=FAMILIES[header.architecture],
        rms_norm_eps=_short(header.need(".attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(header, theta, head_dim),
        max_position_embeddings=header.get(".context_length", 2048),
        tie_word_embeddings="output.weight" not in header.places,
        qkv_bias="blk.0.attn_q.bias" in header.places,
        o_bias="blk.0.attn_output.bias" in header.places,
        mlp_bias="blk.0.ffn_up.bias" in header.places,
        qk_norm="blk.0.attn_q_norm.weight" in header.places,
        sliding_window=header.get(".attention.sliding_window") or None,
        bos_token_id=ids["bos"],
        eos_token_id=tuple(dict.fromkeys(ends)),
        pad_token_id=ids["padding"],
    )


def _each(value: Any, layers: int) -> list[int]:
    return [int(one) for one in value] if isinstance(value, list) else [int(value)] * layers


def _attention(query: int, kv_heads: int) -> GQA | Linear | NoOp:
    return NoOp() if not query else GQA(kv_heads) if kv_heads else Linear()


def _short(value: float) -> float:
    """The shortest number that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(header: Header, theta: float, head_dim: int) -> RopeScaling | None:
    kind = header.get(".rope.scaling.type", "none")
    if kind == "linear":
        factor = _short(header.need(".rope.scaling.factor"))
        return RopeScaling(rope_type="linear", factor=factor)
    if kind != "none":
        raise GGUFError(f"{header.path} stretches RoPE by {kind!r}; supported: linear, llama3")
    if "rope_freqs.weight" not in header.places:
        return None
    _, one = header.places["rope_freqs.weight"]
    divisors = np.asarray(one.data, np.float64).reshape(-1)
    factor = _short(float(divisors.max()))
    inverse = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for low, high, original in _LLAMA3:
        keep = np.clip((original * inverse / (2 * np.pi) - low) / (high - low), 0, 1)
        if np.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
            return RopeScaling(
                rope_type="llama3",
                factor=factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=original,
            )
    raise GGUFError(f"{header.path} stretches RoPE by factors that are not those of a Llama 3.x")


# The tokenizer, as the JSON of `tokenizers`.

_SAME = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_SAME |= dict.fromkeys(MERGED.values(), "llama-bpe")
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


def _tokenizer_files(header: Header) -> dict[str, str]:
    def get(name: str, default: Any = None) -> Any:
        return header.get(f"tokenizer.ggml.{name}", default)

    kind, tokens = get("model"), get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise GGUFError(
            f"{header.path} has a tokenizer of the kind {kind!r}; read are gpt2 (byte-level BPE) "
            "and llama (SentencePiece BPE)"
        )
    types = get("token_type") or [_NORMAL] * len(tokens)
    spec = _byte_level(header, tokens) if kind == "gpt2" else _sentencepiece(header, tokens)
    spec["added_tokens"] = [_added(i, tokens[i], types[i]) for i in _marks(types)]
    names = {
        f"{name}_token": tokens[index]
        for name, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (index := get(f"{role}_token_id")) is not None
    }
    first = get("add_bos_token", kind == "llama" or _pre(header) == "llama-bpe")
    last = get("add_eos_token", False)
    spec["post_processor"] = _template(
        names.get("bos_token") if first else None, names.get("eos_token") if last else None, tokens
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    settings |= {"add_bos_token": bool(first), "clean_up_tokenization_spaces": False}
    if switch := header.get("tessera.reasoning_switch"):
        settings["reasoning_switch"] = switch
    found = {
        "tokenizer.json": json.dumps({"version": "1.0", **spec}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    if template := header.get("tokenizer.chat_template"):
        found["chat_template.jinja"] = template
    for name in header.get("tokenizer.chat_templates", ()):
        if re.fullmatch(r"\w+", name):
            found[f"additional_chat_templates/{name}.jinja"] = header.get(
                f"tokenizer.chat_template.{name}", ""
            )
    return found


def _marks(types: Sequence[int]) -> Iterable[int]:
    return (i for i, kind in enumerate(types) if kind in (_CONTROL, _USER, _UNKNOWN))


def _added(index: int, token: str, kind: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **plain, "special": kind != _USER}


def _template(first: str | None, last: str | None, tokens: Sequence[str]) -> dict[str, Any] | None:
    marks = [one for one in (first, last) if one is not None]
    if not marks:
        return None

    def around(sequence: str, segment: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": segment}}]
        before = [{"SpecialToken": {"id": first, "type_id": segment}}] if first else []
        after = [{"SpecialToken": {"id": last, "type_id": segment}}] if last else []
        return [*before, *found, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            one: {"id": one, "ids": [tokens.index(one)], "tokens": [one]} for one in marks
        },
    }


def _pre(header: Header) -> str:
    name = str(header.get("tokenizer.ggml.pre", "default"))
    return _SAME.get(name, name)


def _byte_level(header: Header, tokens: Sequence[str]) -> dict[str, Any]:
    name = _pre(header)
    known = [
        one for one, splits in PRE_TOKENIZERS.items() if not any(s.endswith("…") for s in splits)
    ]
    if name not in known:
        raise GGUFError(f"{header.path} splits text by {name!r}; read are {', '.join(known)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [pair.split(" ", 1) for pair in header.get("tokenizer.ggml.merges", ())]
    model = {
        "type": "BPE",
        "vocab": vocab,  # a file without merges holds one that joins nothing: llama.cpp wants one
        "merges": [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()],
        "ignore_merges": name in WHOLE_WORDS
        and header.get("tokenizer.ggml.pre") not in MERGED.values(),
    }
    own = {**byte_level, "use_regex": True}
    steps = [own if one == GPT2_SPLIT else _split(one) for one in PRE_TOKENIZERS[name]]
    if own not in steps:
        steps.append({**byte_level, "use_regex": False})
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": model,
    }


def _split(pattern: str) -> dict[str, Any]:
    if pattern == PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    if pattern in (DIGIT, DIGITS):
        return {"type": "Digits", "individual_digits": pattern == DIGIT}
    found = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Split", **found}


def _sentencepiece(header: Header, tokens: Sequence[str]) -> dict[str, Any]:
    """SentencePiece's BPE: the pair whose union scores highest is merged first."""
    scores = header.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:i], token[i:], scores[index])
        for token, index in vocab.items()
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    merges.sort(key=lambda one: (-one[2], vocab[one[0]], vocab[one[1]]))
    unknown = header.get("tokenizer.ggml.unknown_token_id")
    space = header.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [list(one[:2]) for one in merges],
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
