"""A `tokenizers.Tokenizer` of the files that a vocabulary comes in, with transformers' ids.

How a text is split follows from `tokenizer_class` of tokenizer_config.json, else from `model_type`
of config.json: transformers makes the tokenizer of a class it knows from the vocabulary and the
merges alone, and reads any other tokenizer.json as it stands. A tokenizer.model is converted by
what the file itself says. Checked against transformers 5.24.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tessera.model.pre_tokenizers import LLAMA3_SPLIT, QWEN2_SPLIT

LLAMA3_RANKS = 128_000
LLAMA3_NAMED = (
    "begin_of_text end_of_text - - finetune_right_pad_id step_id start_header_id end_header_id "
    "eom_id eot_id python_tag"
)
SPECIALS = tuple(f"{key}_token" for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of a SentencePiece model's pieces

Vocab = dict[str, int]
Merges = list[tuple[str, str]]
Settings = Mapping[str, Any]


class TokenizerError(ValueError):
    """A tokenizer file is absent, broken or of a format that is not supported."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer, its special tokens by name (bos_token, unk_token …), and its class, "" for none.

    kind: what to call the class so that a tokenizer.json of it is read to the same ids.
    """

    tokenizer: Tokenizer
    names: dict[str, str]
    kind: str = "PreTrainedTokenizerFast"


# What transformers makes of a vocabulary whose class it knows.


def _byte_bpe(vocab: Vocab, merges: Merges, split: str | None, prefix: bool) -> Tokenizer:
    """A byte-level BPE; split: a text split instead of GPT-2's."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        tokenizer.pre_tokenizer = byte_level(split, prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(split: str, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(split), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([pieces, as_bytes])


def _gpt2(vocab: Vocab, merges: Merges, settings: Settings) -> Tokenizer:
    return _byte_bpe(vocab, merges, None, bool(settings.get("add_prefix_space")))


def _gpt_neox(vocab: Vocab, merges: Merges, settings: Settings) -> Tokenizer:
    tokenizer = _gpt2(vocab, merges, settings)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _qwen2(vocab: Vocab, merges: Merges, settings: Settings) -> Tokenizer:
    tokenizer = _byte_bpe(vocab, merges, QWEN2_SPLIT, bool(settings.get("add_prefix_space")))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _llama(vocab: Vocab, merges: Merges, settings: Settings) -> Tokenizer:
    prefix = settings.get("add_prefix_space") in (None, True)
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    return _metaspace(vocab, merges, scheme, strip=prefix)


def _code_llama(vocab: Vocab, merges: Merges, settings: Settings) -> Tokenizer:
    prefix = settings.get("add_prefix_space") in (None, True)
    unknown = _text(settings.get("unk_token", "<unk>"))
    return _metaspace(vocab, merges, "first" if prefix else "never", unk_token=unknown)


def _metaspace(
    vocab: Vocab, merges: Merges, scheme: str, *, strip: bool = True, **options: Any
) -> Tokenizer:
    """A SentencePiece BPE. scheme: where a text gets a space. strip: whether decoding drops it."""
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, **options)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    first = [decoders.Strip(content=" ", left=1)] if strip else []
    tokenizer.decoder = decoders.Sequence([*steps, *first])
    return tokenizer


@dataclass(frozen=True, slots=True)
class Family:
    """build: the tokenizer of a vocabulary and merges. names: its special tokens by default.

    bos: whether a tokenizer.json of the class puts BOS first; None where its post-processor says.
    """

    build: Callable[[Vocab, Merges, Settings], Tokenizer]
    names: dict[str, str]
    bos: bool | None = None


END = "<|endoftext|>"
_END_NAMES = {"eos_token": END, "unk_token": END}
_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILLING = {
    **{f"{key}_token": f"▁<{key[:3].upper()}>" for key in ("prefix", "middle", "suffix", "eot")},
    "fill_token": "<FILL_ME>",
}
FAMILIES = {
    "LlamaTokenizer": Family(_llama, _LLAMA_NAMES),
    "CodeLlamaTokenizer": Family(_code_llama, {**_LLAMA_NAMES, **_INFILLING}, bos=True),
    "GPT2Tokenizer": Family(_gpt2, {"bos_token": END, **_END_NAMES}),
    "CodeGenTokenizer": Family(_gpt2, {"bos_token": END, **_END_NAMES}),
    "GPTNeoXTokenizer": Family(
        _gpt_neox, {"bos_token": END, **_END_NAMES, "pad_token": "<|padding|>"}, bos=False
    ),
    "Qwen2Tokenizer": Family(_qwen2, {**_END_NAMES, "pad_token": END}),
}
OF_PIECES = ("LlamaTokenizer", "CodeLlamaTokenizer")
AS_IT_STANDS = ""  # a tokenizer.json that is read as it is, a tokenizer.model by what it says
_MODELS = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "mistral": AS_IT_STANDS,
    "mixtral": AS_IT_STANDS,
}
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")


def _class_of(settings: Settings, config: Settings, byte_level: bool) -> str:
    """transformers' class for these files; byte_level: whether a tokenizer.json says ByteLevel."""
    named = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    named, kind = str(named).removesuffix("Fast"), config.get("family", config.get("model_type"))
    own = _MODELS.get(str(kind))
    if named in _GENERIC or own == AS_IT_STANDS:
        return AS_IT_STANDS
    if not named:  # a tokenizer.json that names no class says all itself
        return AS_IT_STANDS if byte_level else own or AS_IT_STANDS
    if kind == "qwen2":  # its checkpoints name other classes by mistake
        return "Qwen2Tokenizer"
    return AS_IT_STANDS if named == "LlamaTokenizer" and byte_level else named


# The settings beside a vocabulary.


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _read_settings(home: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json is heeded where that lists no added tokens."""
    settings = read_json(home / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json(home / "special_tokens_map.json")
    return settings


def _added(value: Any, special: bool = True) -> AddedToken:
    """A token of a tokenizer's files, where it is a text or an object."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, special=special)
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {"special": special} | {key: value[key] for key in keys if key in value}
    return AddedToken(value["content"], **flags)


def _raw(token: AddedToken) -> AddedToken:
    """The token, looked for in a text as it was given."""
    keys = ("single_word", "lstrip", "rstrip", "special")
    return AddedToken(token.content, **{k: getattr(token, k) for k in keys}, normalized=False)


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _names(settings: Settings, defaults: Mapping[str, str]) -> dict[str, Any]:
    """The special tokens by name; null in the files takes a default away."""
    more = [key for key in (*settings, *defaults) if key.endswith("_token")]
    keys = dict.fromkeys([*SPECIALS, *more])
    found = {key: settings.get(key, defaults.get(key)) for key in keys}
    return {key: value for key, value in found.items() if _text(value) is not None}


def _extra(settings: Settings) -> list[Any]:
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return list(more.values()) if isinstance(more, dict) else list(more)


def _added_by_id(home: Path, settings: Settings, spec: Settings) -> dict[int, AddedToken]:
    """The added tokens that the files list; spec: a tokenizer.json's."""
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"]
        return {int(i): _added(token, special=False) for i, token in listed.items()}
    named = [*_names(settings, {}).values(), *_extra(settings)]
    specials = {_text(token) for token in named}
    found = {
        index: AddedToken(text, special=text in specials, normalized=text not in specials)
        for text, index in read_json(home / "added_tokens.json").items()
    }
    return found | {one["id"]: _added(one) for one in spec.get("added_tokens") or ()}


def _add_tokens(
    tokenizer: Tokenizer,
    listed: Mapping[int, AddedToken],
    names: Mapping[str, Any],
    extra: Iterable[Any],
) -> None:
    """What the files list by id, then what they name; all that is named is special."""
    by_name = {_text(value) for value in names.values()}
    tokens = [token for _, token in sorted(listed.items())]
    for token in tokens:
        token.special = token.special or token.content in by_name
    held = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    held |= {token.content for token in tokens}
    for value in (*names.values(), *extra):
        token = _added(value)
        if token.content not in held:
            held.add(token.content)
            tokens.append(token)
    tokenizer.add_tokens(tokens)


def _add_ends(tokenizer: Tokenizer, names: Mapping[str, Any], bos: bool, eos: bool) -> None:
    """The post-processor that puts the named tokens around a text."""
    first, last = _text(names.get("bos_token")), _text(names.get("eos_token"))
    begin, end = ([first] if bos and first else []), ([last] if eos and last else [])
    around = [(text, tokenizer.token_to_id(text)) for text in (*begin, *end)]
    single = [*begin, "$A:0", *end]
    pair = [*single, *begin, "$B:1", *end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=around
    )


# The layouts.


def read(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json, a .model file, or a vocab.json beside its merges.txt.

    The files beside it are heeded. Raises TokenizerError.
    """
    home = path.parent
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise TokenizerError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
    settings, config = _read_settings(home), read_json(home / "config.json")
    if path.suffix == ".model":
        data = path.read_bytes()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            return _read_ranks(data, path, settings)
        return _read_pieces(data, path, settings, config)
    if path.name == "vocab.json":
        return _read_merges(path, settings, config)
    if path.suffix == ".json":
        return _read_whole(path, settings, config)
    raise TokenizerError(
        f"{path} is not a tokenizer file; expected tokenizer.json, a .model file or vocab.json"
    )


def _read_whole(path: Path, settings: Settings, config: Settings) -> Vocabulary:
    """A tokenizer.json: as it stands, or by its class with its own post-processor."""
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer, spec = Tokenizer.from_str(text), json.loads(text)
    except Exception as error:  # the library raises nothing narrower than Exception
        raise TokenizerError(f"{path} is not a readable tokenizer.json ({error})") from error
    kind = _class_of(settings, config, '"ByteLevel"' in text)
    family = FAMILIES.get(kind) if spec["model"].get("type") == "BPE" else None
    names = _names(settings, family.names if family else {})
    model, whole = spec["model"], tokenizer
    if family is not None:
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        merges = [(left, right) for left, right in pairs]
        tokenizer = family.build(model["vocab"], merges, settings)
        if whole.post_processor is not None:
            tokenizer.post_processor = whole.post_processor
        if family.bos is not None:
            _add_ends(tokenizer, names, family.bos, False)
    _add_tokens(tokenizer, _added_by_id(path.parent, settings, spec), names, _extra(settings))
    return Vocabulary(tokenizer, _texts(names), *([kind] if family else []))


def _read_merges(path: Path, settings: Settings, config: Settings) -> Vocabulary:
    """vocab.json with merges.txt, which do not say how a text is split: the class does."""
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise TokenizerError(f"{path} has no merges.txt beside it; a BPE needs both files")
    name = _class_of(settings, config, byte_level=False)
    if not name and not settings.get("tokenizer_class") and not config.get("model_type"):
        name = "GPT2Tokenizer"  # whose files these were first
    family = FAMILIES.get(name)
    if family is None or name in OF_PIECES:
        told = settings.get("tokenizer_class") or f"model_type {config.get('model_type')!r}"
        known = ", ".join(one for one in FAMILIES if one not in OF_PIECES)
        raise TokenizerError(
            f"{path} with merges.txt does not say how a text is split, and {told} is not a class "
            f"that does ({known}). Name one as tokenizer_class in tokenizer_config.json, or save "
            "a tokenizer.json with transformers"
        )
    try:
        pairs = models.BPE.read_file(str(path), str(merges))
        tokenizer = family.build(*pairs, settings)
    except Exception as error:  # the library raises nothing narrower than Exception
        raise TokenizerError(
            f"{path} with {merges.name} is not a BPE vocabulary ({error})"
        ) from error
    names = _names(settings, family.names)
    _add_tokens(tokenizer, _added_by_id(path.parent, settings, {}), names, _extra(settings))
    bos, eos = (settings.get(f"add_{end}_token") is True for end in ("bos", "eos"))
    _add_ends(tokenizer, names, bos, eos)
    return Vocabulary(tokenizer, _texts(names), name)


def _texts(names: Mapping[str, Any]) -> dict[str, str]:
    return {key: text for key, value in names.items() if (text := _text(value)) is not None}


# SentencePiece.


def _read_pieces(data: bytes, path: Path, settings: Settings, config: Settings) -> Vocabulary:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    broken = f"{path} is neither a SentencePiece model nor a list of tiktoken ranks"
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise TokenizerError(broken) from error
    if not model.pieces:
        raise TokenizerError(broken)
    listed = _added_by_id(path.parent, settings, {})
    pieces = list(model.pieces)
    extra: list[Any] = [
        AddedToken(one.piece, normalized=False, special=one.type == CONTROL)
        for one in pieces
        if one.type in (CONTROL, USER_DEFINED)
    ]
    kind = _class_of(settings, config, byte_level=False)
    family = FAMILIES[kind] if kind in OF_PIECES else None
    if family is not None:
        names = _names(settings, family.names)
        vocab = {one.piece: index for index, one in enumerate(pieces)}
        tokenizer = family.build(vocab, _merges_of(vocab), settings)
    else:
        trainer = model.trainer_spec
        own = {
            f"{key}_token": getattr(trainer, f"{key}_piece")
            for key in ("bos", "eos", "unk")
            if getattr(trainer, f"{key}_id") >= 0
        }
        names = _names(settings, own)
        extra = [one for one in extra if one.special]
        legacy = settings.get("legacy", True)
        tokenizer = _of_pieces(model, listed, legacy)
        if model.normalizer_spec.add_dummy_prefix:  # what stands between two gets a prefix each
            listed = {i: _raw(token) for i, token in listed.items()}
    extra = _extra(read_json(path.parent / "tokenizer_config.json")) or extra
    _add_tokens(tokenizer, listed, names, extra)
    # transformers documents true as the default of Llama's tokenizers.
    bos = settings.get("add_bos_token", model.trainer_spec.bos_id >= 0) is True
    _add_ends(tokenizer, names, bos, settings.get("add_eos_token") is True)
    return Vocabulary(tokenizer, _texts(names), *([kind] if family else []))


def _merges_of(vocab: Vocab) -> Merges:
    """Every pair that makes a token, tokens in order of their ids."""
    found = [
        (index, at, token[:at], token[at:])
        for token, index in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _of_pieces(model: Any, listed: Mapping[int, AddedToken], legacy: bool) -> Tokenizer:
    """A BPE or Unigram model that reads as SentencePiece does, with its normalizer."""
    trainer, rules, pieces = model.trainer_spec, model.normalizer_spec, list(model.pieces)
    names = {index: token.content for index, token in listed.items() if index < len(pieces)}
    kept = {one.piece for index, one in enumerate(pieces) if index not in names}
    texts = [
        names[i] if i in names and names[i] not in kept else one.piece
        for i, one in enumerate(pieces)
    ]
    whole = [text for text, one in zip(texts, pieces, strict=True) if one.type == USER_DEFINED]
    if trainer.model_type == 1:
        scored = [(one.piece, one.score) for one in pieces]
        tokenizer = Tokenizer(
            models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
        )
    else:
        tokenizer = Tokenizer(
            models.BPE(
                vocab={text: index for index, text in enumerate(texts)},
                merges=_ranked_merges(texts, pieces),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(whole),
            )
        )
    tokenizer.normalizer = _normalizer_of(rules, legacy)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        steps.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    if whole:  # pieces that are never joined with what stands beside them
        pattern = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if steps:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = _decoder_of(rules, trainer.byte_fallback)
    return tokenizer


def _ranked_merges(texts: list[str], pieces: list[Any]) -> Merges:
    """Every pair of normal pieces that makes one, the highest score first."""
    normal = {
        text: (-one.score, index)
        for index, (text, one) in enumerate(zip(texts, pieces, strict=True))
        if one.type == NORMAL
    }
    found = [
        (*rank, token[:at], token[at:])
        for token, rank in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _normalizer_of(rules: Any, legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if rules.add_dummy_prefix and legacy:  # Metaspace gives no second ▁, SentencePiece does
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    return normalizers.Sequence(steps)


def _decoder_of(rules: Any, byte_fallback: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    if rules.add_dummy_prefix or byte_fallback:
        steps.append(decoders.Fuse())
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


# tiktoken.


def byte_characters() -> list[str]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's map)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    characters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        characters.setdefault(byte, chr(256 + len(characters) - len(shown)))
    return [characters[byte] for byte in range(256)]


def _read_ranks(data: bytes, path: Path, settings: Settings) -> Vocabulary:
    """tiktoken ranks (lines "base64 rank"), split as Llama 3 splits.

    tiktoken merges the adjacent pair whose union has the lowest rank, a BPE model the pair listed
    first. Listing every split of every token in order of the token's rank makes the two agree.
    """
    try:
        rows = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path} is not a list of tiktoken ranks: {error}") from error
    shown = byte_characters()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = [
        (text[left], text[right])
        for token, _ in sorted(ranks.items(), key=lambda item: item[1])
        for left, right in _splits(token, ranks)
    ]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level(LLAMA3_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    names, listed = _names(settings, {}), _added_by_id(path.parent, settings, {})
    extra, around = _extra(settings), names
    bare = not (names or listed or extra) and len(ranks) == LLAMA3_RANKS
    if bare:  # as Meta publishes Llama 3
        around = {"bos_token": "<|begin_of_text|>"}
        listed = dict(enumerate(_llama3_specials(), LLAMA3_RANKS))
    filled = {
        index: listed.get(index) or AddedToken(f"<|reserved_token_{index}|>", special=True)
        for index in range(len(ranks), max(listed, default=-1) + 1)
    }
    _add_tokens(tokenizer, filled, {}, extra)
    _add_tokens(tokenizer, listed, names, ())
    bos = settings.get("add_bos_token", bare) is True
    _add_ends(tokenizer, around, bos, settings.get("add_eos_token") is True)
    return Vocabulary(tokenizer, _texts(names))


def _llama3_specials() -> list[AddedToken]:
    reserved = (f"reserved_special_token_{n}" for n in range(256))
    names = [*LLAMA3_NAMED.split(), *("-" * 256)][:256]
    texts = [f"<|{next(reserved) if name == '-' else name}|>" for name in names]
    return [AddedToken(text, special=True) for text in texts]


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
