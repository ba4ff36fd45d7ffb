"""A tokenizer as llama.cpp wants it: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

llama.cpp tokenises with code of its own, chosen by two names. A `tokenizer.json` it has no code
for is refused, because it would run and split text differently from training. What it leaves
out of SentencePiece is the removal of doubled spaces: such texts differ.

A GGUF file for llama.cpp: `llama` for equal layers, `deci` where they differ. Float32.

`deci` has per-layer arrays of query heads, KV heads and FFN widths; 0 heads mean no attention,
0 KV heads beside query heads one matrix in its place, width 0 no FFN. llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered:

    (heads, 2, D/2, C) -> (heads, D/2, 2, C)

Llama 3.x's long-context stretch is the tensor `rope_freqs.weight`, a divisor a frequency.
`read` is the inverse of `write` for the tensors: the parity check runs on the file's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessera.data.tokenizer import SentencePiece, read_gpt2_files, read_model_file
from tessera.export.errors import ExportError
from tessera.model.config import GQA, Linear, ModelConfig, SwiGLU
from tessera.model.layers import Subblock, rope_frequencies
from tessera.model.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# How a pre-tokenizer's regular expression is called in llama.cpp (llama-vocab.cpp).
PRE_TOKENIZERS = {
    "": "gpt-2",  # ByteLevel's own
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
}

# llama.cpp insists on merges; no text has symbols of more than one character to join by this one.
_NO_MERGE = "[none] [none]"
_FOREIGN_SPLIT = (
    "llama.cpp has no code for this tokenizer's way of splitting text: prompt it by token ids; "
    "text it tokenises itself differs from training"
)


@dataclass(slots=True, kw_only=True)
class Vocabulary:
    """Tokens in order of their ids, and what llama.cpp needs to know beside them."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: GGUFWriter, vocab_size: int) -> None:
        """Write the tokenizer's keys; the model's surplus rows become unused tokens."""
        if len(self.tokens) > vocab_size:
            raise ExportError(
                f"the tokenizer has {len(self.tokens)} tokens and the model {vocab_size}; "
                "they do not belong together"
            )
        surplus = range(len(self.tokens), vocab_size)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens + [f"[PAD{i}]" for i in surplus])
        writer.add_token_types(self.types + [UNUSED for _ in surplus])
        if self.model == "llama":
            writer.add_token_scores(self.scores + [-1e4 for _ in surplus])
            writer.add_add_space_prefix(self.add_space_prefix)
        else:
            writer.add_token_merges(self.merges or [_NO_MERGE])
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(directory: Path, *, strict: bool = True) -> Vocabulary:
    """The vocabulary of a Hugging Face directory's tokenizer files.

    Raises ExportError for a tokenizer llama.cpp has no code for, and for none at all. Not strict:
    a text split that llama.cpp has no code for becomes a note, for use with token ids only.
    """
    vocabulary = _from_files(directory, strict)
    if vocabulary.model == "llama" and BYTE not in vocabulary.types:
        vocabulary.notes.append(
            "the tokenizer has no byte tokens: llama.cpp answers text with characters outside the "
            "vocabulary with an error, where the original reads them as unknown"
        )
    _add_roles(vocabulary, directory)
    return vocabulary


def _from_files(directory: Path, strict: bool) -> Vocabulary:
    if (directory / "tokenizer.json").is_file():
        return _from_json(_json(directory / "tokenizer.json"), strict)
    if (directory / "tokenizer.model").is_file():
        backend = read_model_file(directory / "tokenizer.model")
        if isinstance(backend, SentencePiece):
            return _from_pieces(backend.processor, directory / "tokenizer.model")
        return _from_json(json.loads(backend.tokenizer.to_str()), strict)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        backend = read_gpt2_files(directory / "vocab.json", directory / "merges.txt")
        return _from_json(json.loads(backend.tokenizer.to_str()), strict)
    raise ExportError(
        f"{directory} has no tokenizer.json, tokenizer.model or vocab.json with merges.txt, and a "
        "GGUF file carries its tokenizer; put the model's tokenizer there"
    )


def _from_json(spec: dict[str, Any], strict: bool) -> Vocabulary:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"the tokenizer is a {model.get('type')} model: llama.cpp's llama family takes BPE only"
        )
    added = {t["id"]: t for t in spec.get("added_tokens") or ()}
    tokens = _in_order(model["vocab"], added)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    add_bos = "SpecialToken" in str((spec.get("post_processor") or {}).get("single"))
    if "ByteLevel" in _types(spec.get("pre_tokenizer")):
        split = _pre_tokenizer(spec["pre_tokenizer"], any_will_do=not merges, strict=strict)
        return Vocabulary(
            model="gpt2",
            pre=split or "default",
            tokens=tokens,
            types=[_added_type(added.get(i)) for i in range(len(tokens))],
            merges=merges,
            add_bos=add_bos,
            notes=[] if split else [_FOREIGN_SPLIT],
        )
    if "▁" not in str(spec.get("normalizer")) + str(spec.get("pre_tokenizer")):
        raise ExportError(
            "the tokenizer is neither byte-level BPE nor SentencePiece BPE (no ByteLevel, no ▁): "
            "llama.cpp has no code for it"
        )
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=[_piece_type(i, t, added.get(i), model) for i, t in enumerate(tokens)],
        scores=_scores(tokens, merges),
        add_bos=add_bos,
        add_space_prefix=_prepends(spec),
    )


def _in_order(vocab: dict[str, int], added: dict[int, dict[str, Any]]) -> list[str]:
    by_id = {index: token for token, index in vocab.items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    return [by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece BPE joins the pair whose result scores highest: earlier merges score higher."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges) + i)) for i, token in enumerate(tokens)]


def _added_type(added: dict[str, Any] | None) -> int:
    if added is None:
        return NORMAL
    return CONTROL if added.get("special") else USER_DEFINED


def _piece_type(i: int, token: str, added: dict[str, Any] | None, model: dict[str, Any]) -> int:
    if token == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return _added_type(added)
    is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
    return BYTE if is_byte else NORMAL


def _types(step: dict[str, Any] | None) -> list[str]:
    """The types of a normalizer's or pre-tokenizer's steps, in order."""
    return [s["type"] for s in _steps(step)]


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [s for part in inner for s in _steps(part)] if inner else [step]


def _pre_tokenizer(spec: dict[str, Any], *, any_will_do: bool, strict: bool) -> str | None:
    """llama.cpp's name of a byte-level text split, None if it has none (ExportError if strict).

    Without merges every byte is a token however the text is split, and any name will do.
    """
    if any_will_do:
        return "gpt-2"
    steps = _steps(spec)
    pattern = "".join(s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split")
    others = [s["type"] for s in steps if s["type"] not in ("Split", "ByteLevel")]
    byte_level = next(s for s in steps if s["type"] == "ByteLevel")
    own_regex = byte_level.get("use_regex", True)
    prefix = byte_level.get("add_prefix_space")
    if pattern in PRE_TOKENIZERS and own_regex == (not pattern) and not others and not prefix:
        return PRE_TOKENIZERS[pattern]
    if not strict:
        return None
    what = ", ".join(others) or pattern or "ByteLevel with add_prefix_space or without its regex"
    raise ExportError(
        f"the tokenizer splits text by {what!r}, for which llama.cpp has no code that we know "
        f"(known: {', '.join(PRE_TOKENIZERS.values())}): it would run and read text otherwise than "
        "in training. With engines = [] the file is written all the same, for use with token ids"
    )


def _prepends(spec: dict[str, Any]) -> bool:
    steps = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    return any(
        s["type"] == "Prepend"
        or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
        for s in steps
    )


def _from_pieces(pieces: Any, path: Path) -> Vocabulary:
    """From a SentencePieceProcessor. BPE's scores are whole numbers (ranks), Unigram's are not."""
    ids = range(pieces.GetPieceSize())
    scores = [pieces.GetScore(i) for i in ids]
    if any(score != round(score) for score in scores):
        raise ExportError(f"{path} is a Unigram model: llama.cpp's llama family takes BPE only")
    return Vocabulary(
        model="llama",
        tokens=[pieces.IdToPiece(i) for i in ids],
        types=[_flag(pieces, i) for i in ids],
        scores=scores,
        add_bos=pieces.bos_id() >= 0,
        add_space_prefix=pieces.Encode("a", out_type=str)[0].startswith("▁"),
    )


def _flag(pieces: Any, i: int) -> int:
    flags = {
        UNKNOWN: pieces.IsUnknown,
        CONTROL: pieces.IsControl,
        UNUSED: pieces.IsUnused,
        BYTE: pieces.IsByte,
    }
    return next((kind for kind, holds in flags.items() if holds(i)), NORMAL)


def _add_roles(vocabulary: Vocabulary, directory: Path) -> None:
    """Special token ids, the BOS rule and the chat template, from the files beside the tokens."""
    settings = _json(directory / "tokenizer_config.json")
    config = _json(directory / "config.json") | _json(directory / "generation_config.json")
    if isinstance(settings.get("add_bos_token"), bool):
        vocabulary.add_bos = settings["add_bos_token"]
    by_text = {token: i for i, token in enumerate(vocabulary.tokens)}
    for role, key in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        index = by_text.get(text) if text else config.get(f"{key}_id")
        if isinstance(index, int):
            vocabulary.special[role] = index
    ends = config.get("eos_token_id")
    for role, index in zip(("eos", "eot", "eom"), _ends(ends, vocabulary.special), strict=False):
        vocabulary.special[role] = index
    if "eos" not in vocabulary.special:
        vocabulary.notes.append(
            "the source names no end token, so llama.cpp stops at one of its own choosing "
            f"({11 if vocabulary.model == 'gpt2' else 2})"
        )
    vocabulary.chat_template = _chat_template(directory, settings)
    if vocabulary.add_bos and "bos" not in vocabulary.special:
        vocabulary.add_bos = False


def _ends(ids: int | list[int] | None, special: dict[str, int]) -> list[int]:
    """Stop tokens, the one that is nothing else first: llama.cpp has one slot a role."""
    listed = [ids] if isinstance(ids, int) else list(ids or ())
    return sorted(listed, key=lambda i: i == special.get("bos"))


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    template = file.read_text() if file.is_file() else settings.get("chat_template")
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


FILE_NAME = "model.gguf"


def write(module: Transformer, path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write the whole model and its tokenizer as one GGUF file."""
    config = module.config
    writer = _library().GGUFWriter(path, "llama" if config.homogeneous else "deci")
    add_metadata(writer, config, name)
    vocabulary.add_to(writer, config.vocab_size)
    for key, tensor in tensors(module):
        writer.add_tensor(key, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, config: ModelConfig, name: str) -> None:
    """The keys that describe the architecture."""
    writer.add_name(name)
    writer.add_file_type(0)  # every tensor in float32
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    heads, kv_heads, widths = layer_sizes(config)
    equal = config.homogeneous
    writer.add_head_count(heads[0] if equal else heads)
    writer.add_head_count_kv(kv_heads[0] if equal else kv_heads)
    writer.add_feed_forward_length(widths[0] if equal else widths)


def layer_sizes(config: ModelConfig) -> tuple[list[int], list[int], list[int]]:
    """Query heads, KV heads and FFN width of every layer, in `deci`'s convention of zeros."""
    heads, kv_heads, widths = [], [], []
    for block in config.blocks:
        heads.append(config.num_attention_heads if isinstance(block.attention, GQA | Linear) else 0)
        kv_heads.append(getattr(block.attention, "num_key_value_heads", 0))
        widths.append(block.ffn.intermediate_size if isinstance(block.ffn, SwiGLU) else 0)
    return heads, kv_heads, widths


def tensors(module: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by llama.cpp's names."""
    config = module.config
    yield "token_embd.weight", module.embed_tokens.weight
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for layer, block in enumerate(module.layers):
        for kind in ("attention", "ffn"):
            for key, ours, heads in names(config, layer, kind):
                value = getattr(block, kind).get_parameter(ours)
                yield key, interleave(value, heads) if heads else value
    yield "output_norm.weight", module.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", module.head


def names(config: ModelConfig, layer: int, kind: str) -> Iterator[tuple[str, str, int]]:
    """(llama.cpp's name, the subblock's parameter, heads to reorder or 0) of one subblock."""
    variant = getattr(config.blocks[layer], kind)
    prefix = f"blk.{layer}."
    match variant:
        case GQA(kv_heads):
            yield prefix + "attn_norm.weight", "norm.weight", 0
            heads = {"q": config.num_attention_heads, "k": kv_heads, "v": 0}
            for letter, count in heads.items():
                yield f"{prefix}attn_{letter}.weight", f"op.{letter}_proj.weight", count
                if config.qkv_bias:
                    yield f"{prefix}attn_{letter}.bias", f"op.{letter}_proj.bias", count
            yield prefix + "attn_output.weight", "op.o_proj.weight", 0
            if config.o_bias:
                yield prefix + "attn_output.bias", "op.o_proj.bias", 0
        case Linear():
            yield prefix + "attn_norm.weight", "norm.weight", 0
            yield prefix + "attn_output.weight", "op.weight", 0
        case SwiGLU():
            yield prefix + "ffn_norm.weight", "norm.weight", 0
            for part in ("gate", "up", "down"):
                yield f"{prefix}ffn_{part}.weight", f"op.{part}_proj.weight", 0
                if config.mlp_bias:
                    yield f"{prefix}ffn_{part}.bias", f"op.{part}_proj.bias", 0


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads*D, …)` from rotate-half order to neighbouring pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(value: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(config: ModelConfig) -> Tensor | None:
    """`(D/2,)` divisors of the plain frequencies, for Llama 3.x's scaling; None without it."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    return rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)


def read(path: Path, config: ModelConfig) -> Transformer:
    """The module a written file describes, its tensors put back in Hugging Face's order."""
    reader: GGUFReader = _library().GGUFReader(path)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    module = Transformer(config)
    with torch.no_grad():
        module.embed_tokens.weight.copy_(stored["token_embd.weight"])
        module.norm.weight.copy_(stored["output_norm.weight"])
        if not config.tie_word_embeddings:
            module.lm_head.weight.copy_(stored["output.weight"])
        for layer, block in enumerate(module.layers):
            for kind in ("attention", "ffn"):
                _fill(getattr(block, kind), stored, config, layer, kind)
    return module.requires_grad_(False)


def _fill(
    subblock: Subblock, stored: dict[str, Tensor], config: ModelConfig, layer: int, kind: str
) -> None:
    for key, ours, heads in names(config, layer, kind):
        value = stored[key]
        subblock.get_parameter(ours).copy_(deinterleave(value, heads) if heads else value)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            "writing GGUF needs the gguf package: pip install 'tessera[gguf]'"
        ) from error
    return gguf
