"""A GGUF file for llama.cpp in float32: `llama` for equal layers, `deci` where they differ.

`deci` has per-layer arrays of query heads, KV heads and FFN widths; 0 heads mean no attention,
0 KV heads beside query heads one matrix in its place, width 0 no FFN. llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered:

    (heads, 2, D/2, C) -> (heads, D/2, 2, C)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFWriter, RopeScalingType, SentencePieceVocab, TokenType
from torch import Tensor

from tessera.data.tokenizer import SentencePiece, read_gpt2_files, read_model_file
from tessera.export.engines import ExportError
from tessera.model.config import GQA, Linear, ModelConfig
from tessera.model.layers import rope_frequencies
from tessera.model.transformer import Transformer

# The vocabulary. llama.cpp tokenises with code of its own, chosen by the names of a model and of a
# text split. gguf's own BpeVocab, LlamaHfVocab and SpecialVocab are not used: they lose the types
# of added tokens inside the vocabulary, the order of SentencePiece's merges, and all end tokens but
# one.

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# What llama.cpp (llama-vocab.cpp) calls a pre-tokenizer's regular expression.
PRE_TOKENIZERS = {
    "": "gpt-2",  # ByteLevel's own
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
}
# llama.cpp insists on merges; no text has symbols of more than one character to join by this one.
_NO_MERGE = "[none] [none]"


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
                f"{len(self.tokens)} tokens in the tokenizer, {vocab_size} in the model"
            )
        surplus = range(len(self.tokens), vocab_size)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens + [f"[PAD{i}]" for i in surplus])
        writer.add_token_types(self.types + [TokenType.UNUSED for _ in surplus])
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
    model, files = (
        directory / "tokenizer.model",
        [directory / "vocab.json", directory / "merges.txt"],
    )
    if (directory / "tokenizer.json").is_file():
        vocabulary = _from_json(_json(directory / "tokenizer.json"), strict)
    elif model.is_file() or all(file.is_file() for file in files):
        backend = read_model_file(model) if model.is_file() else read_gpt2_files(*files)
        if isinstance(backend, SentencePiece):
            vocabulary = _from_pieces(directory)
        else:
            vocabulary = _from_json(json.loads(backend.tokenizer.to_str()), strict)
    else:
        raise ExportError(
            f"{directory} has no tokenizer.json, tokenizer.model or vocab.json with merges.txt, "
            "and a GGUF file carries its tokenizer; put the model's tokenizer there"
        )
    if vocabulary.model == "llama" and TokenType.BYTE not in vocabulary.types:
        vocabulary.notes.append(
            "the tokenizer has no byte tokens: llama.cpp answers text with characters outside the "
            "vocabulary with an error, where the original reads them as unknown"
        )
    _add_special_tokens(vocabulary, directory)
    return vocabulary


def _from_json(spec: dict[str, Any], strict: bool) -> Vocabulary:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"the tokenizer is a {model.get('type')} model: llama.cpp's llama takes BPE only"
        )
    added = {t["id"]: t for t in spec.get("added_tokens") or ()}
    by_id = {index: token for token, index in model["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    add_bos = "SpecialToken" in str((spec.get("post_processor") or {}).get("single"))
    if any(step["type"] == "ByteLevel" for step in _steps(spec.get("pre_tokenizer"))):
        # Without merges every byte is a token however the text is split, and any name will do.
        split = _pre_tokenizer(spec["pre_tokenizer"], strict) if merges else "gpt-2"
        note = "llama.cpp splits text otherwise than this tokenizer: prompt it by token ids"
        return Vocabulary(
            model="gpt2",
            pre=split or "default",
            tokens=tokens,
            types=[_added_type(added.get(i)) for i in range(len(tokens))],
            merges=merges,
            add_bos=add_bos,
            notes=[] if split else [note],
        )
    if "▁" not in str(spec.get("normalizer")) + str(spec.get("pre_tokenizer")):
        raise ExportError(
            "the tokenizer is neither byte-level BPE nor SentencePiece BPE (no ByteLevel, no ▁): "
            "llama.cpp has no code for it"
        )
    rank: dict[str, int] = {}  # SentencePiece joins the pair that scores highest: earlier merges
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), i)
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=[_piece_type(t, added.get(i), model) for i, t in enumerate(tokens)],
        scores=[-float(rank.get(token, len(merges) + i)) for i, token in enumerate(tokens)],
        add_bos=add_bos,
        add_space_prefix=any(
            step["type"] == "Prepend"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
        ),
    )


def _added_type(added: dict[str, Any] | None) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _piece_type(token: str, added: dict[str, Any] | None, model: dict[str, Any]) -> TokenType:
    if token == model.get("unk_token"):
        return TokenType.UNKNOWN
    is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
    return TokenType.BYTE if is_byte and added is None else _added_type(added)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [s for part in inner for s in _steps(part)] if inner else [step]


def _pre_tokenizer(spec: dict[str, Any], strict: bool) -> str | None:
    """llama.cpp's name of a byte-level text split, None if it has none (ExportError if strict)."""
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
        f"(known: {', '.join(PRE_TOKENIZERS.values())}). With engines = [] the file is written all "
        "the same, for use with token ids"
    )


def _from_pieces(directory: Path) -> Vocabulary:
    """From a tokenizer.model. BPE's scores are whole numbers (ranks), Unigram's are not."""
    vocabulary = SentencePieceVocab(directory)
    pieces: Any = vocabulary.sentencepiece_tokenizer
    tokens, scores, types = zip(*vocabulary.all_tokens(), strict=True)
    if any(score != round(score) for score in scores):
        raise ExportError(
            f"{directory / 'tokenizer.model'} is a Unigram model: llama.cpp's llama takes BPE only"
        )
    return Vocabulary(
        model="llama",
        tokens=[token.decode() for token in tokens],
        types=list(types),
        scores=list(scores),
        add_bos=pieces.bos_id() >= 0,
        add_space_prefix=pieces.Encode("a", out_type=str)[0].startswith("▁"),
    )


def _add_special_tokens(vocabulary: Vocabulary, directory: Path) -> None:
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
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    # llama.cpp has one slot a role: the end token that is nothing else comes first.
    ends.sort(key=lambda i: i == vocabulary.special.get("bos"))
    vocabulary.special |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    if not ends:
        vocabulary.notes.append(
            "the source names no end token, so llama.cpp stops at one of its own choosing "
            f"({11 if vocabulary.model == 'gpt2' else 2})"
        )
    file = directory / "chat_template.jinja"
    template = file.read_text() if file.is_file() else settings.get("chat_template")
    vocabulary.chat_template = template if isinstance(template, str) else None
    vocabulary.add_bos = vocabulary.add_bos and "bos" in vocabulary.special


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


# The model.


def write(module: Transformer, path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write the whole model and its tokenizer as one GGUF file."""
    config, blocks = module.config, module.config.blocks
    equal, query = config.homogeneous, module.config.num_attention_heads
    writer = GGUFWriter(path, "llama" if equal else "deci")
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
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    heads = [query if isinstance(b.attention, GQA | Linear) else 0 for b in blocks]
    kv_heads = [getattr(b.attention, "num_key_value_heads", 0) for b in blocks]
    widths = [getattr(b.ffn, "intermediate_size", 0) for b in blocks]
    writer.add_head_count(heads[0] if equal else heads)
    writer.add_head_count_kv(kv_heads[0] if equal else kv_heads)
    writer.add_feed_forward_length(widths[0] if equal else widths)
    vocabulary.add_to(writer, config.vocab_size)
    for key, tensor in _tensors(module):
        writer.add_tensor(key, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(module: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by llama.cpp's names."""
    config = module.config
    yield "token_embd.weight", module.embed_tokens.weight
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        # Llama 3.x's long-context stretch: a divisor of each plain frequency, (D/2,).
        plain = rope_frequencies(replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / rope_frequencies(config)
    for key, parameter, heads in _layer_tensors(module):
        yield key, interleave(parameter, heads) if heads else parameter
    yield "output_norm.weight", module.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", module.head


# llama.cpp's names of a layer's tensors, without their `.weight` or `.bias`.
_NAMES = {
    "attention.norm": "attn_norm",
    "attention.op.q_proj": "attn_q",
    "attention.op.k_proj": "attn_k",
    "attention.op.v_proj": "attn_v",
    "attention.op.o_proj": "attn_output",
    "attention.op": "attn_output",  # linear
    "ffn.norm": "ffn_norm",
    "ffn.op.gate_proj": "ffn_gate",
    "ffn.op.up_proj": "ffn_up",
    "ffn.op.down_proj": "ffn_down",
}


def _layer_tensors(module: Transformer) -> Iterator[tuple[str, Tensor, int]]:
    """(llama.cpp's name, the parameter, heads to reorder or 0) of all layers."""
    for layer, block in enumerate(module.blocks):
        kv_heads = getattr(block.attention.variant, "num_key_value_heads", 0)
        heads = {"attn_q": module.config.num_attention_heads, "attn_k": kv_heads}
        for key, parameter in block.named_parameters():
            place, _, end = key.rpartition(".")
            name = _NAMES[place]
            yield f"blk.{layer}.{name}.{end}", parameter, heads.get(name, 0)


def interleave(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads*D, …)` from rotate-half order to neighbouring pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def read(path: Path, config: ModelConfig) -> Transformer:
    """The module a written file describes, its tensors in Hugging Face's order: for the check."""
    reader = GGUFReader(path)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    module = Transformer(config)
    module.embed_tokens.weight.copy_(stored["token_embd.weight"])
    module.norm.weight.copy_(stored["output_norm.weight"])
    if not config.tie_word_embeddings:
        module.lm_head.weight.copy_(stored["output.weight"])
    for key, parameter, heads in _layer_tensors(module):
        value = stored[key]
        if heads:  # back from neighbouring pairs
            value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        parameter.copy_(value)
    return module.requires_grad_(False)
