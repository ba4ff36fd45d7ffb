"""The vocabulary of a GGUF file, which llama.cpp reads to the ids of the Hugging Face tokenizer.

llama.cpp tokenises with code of its own, chosen by the names of a model and of a text split. What
it would read otherwise is refused, by name. gguf's own BpeVocab, LlamaHfVocab and SpecialVocab are
not used: they lose the types of added tokens inside the vocabulary, the order of SentencePiece's
merges, and all end tokens but one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from tessera.data.switch import recorded_switch
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.data.vocabulary import TokenizerError
from tessera.export.engines import ExportError
from tessera.model.pre_tokenizers import (
    DIGIT,
    DIGITS,
    ENDINGS,
    GPT2_SPLIT,
    MERGED,
    NEARLY,
    PRE_TOKENIZERS,
    PUNCTUATION,
    WHOLE_WORDS,
)

# llama.cpp insists on merges; no text has symbols of more than one character to join by this one.
_NO_MERGE = "[none] [none]"
BY_IDS = (
    "To write the file all the same, for use with token ids: --engine none, or engines = [] in a "
    "recipe"
)


@dataclass(slots=True, kw_only=True)
class Vocabulary:
    """Tokens in order of their ids, and what llama.cpp needs to know beside them.

    notes: what is worth knowing. faults: what llama.cpp would read otherwise.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    switch: str | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add_to(self, writer: GGUFWriter, vocab_size: int) -> None:
        """Write the tokenizer's keys; the model's surplus rows become unused tokens."""
        self._fit(vocab_size)
        surplus = range(len(self.tokens), vocab_size)
        held = set(self.tokens)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens + [_unused(i, held) for i in surplus])
        writer.add_token_types(self.types + [TokenType.UNUSED for _ in surplus])
        if self.model == "llama":
            writer.add_token_scores(self.scores + [-1e4 for _ in surplus])
            writer.add_add_space_prefix(self.add_space_prefix)
        else:
            writer.add_token_merges(self.merges or [_NO_MERGE])
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)
        if self.switch:  # what the model was trained with, data/switch.py
            writer.add_string("tessera.reasoning_switch", self.switch)

    def _fit(self, vocab_size: int) -> None:
        """Leave out added tokens that the model has no row for; a text may only name them."""
        beyond = range(vocab_size, len(self.tokens))
        if any(self.types[i] not in (TokenType.CONTROL, TokenType.USER_DEFINED) for i in beyond):
            raise ExportError(
                f"{len(self.tokens)} tokens in the tokenizer, {vocab_size} in the model"
            )
        if beyond:
            named = ", ".join(self.tokens[i] for i in beyond)
            self.notes.append(f"the model has no row for {named}, so the file leaves it out")
        for values in (self.tokens, self.types, self.scores):
            del values[vocab_size:]
        self.special = {role: i for role, i in self.special.items() if i < vocab_size}


def _unused(index: int, held: set[str]) -> str:
    """A text for a row without a token; llama.cpp refuses two tokens of one text."""
    text = f"[PAD{index}]"
    while text in held:
        text = f"[{text}]"
    return text


def read_vocabulary(directory: Path, *, strict: bool = True) -> Vocabulary:
    """The vocabulary of a Hugging Face directory's tokenizer files.

    Raises ExportError for a tokenizer llama.cpp has no code for, and for none at all. Not strict:
    what llama.cpp would read otherwise becomes a note, for use with token ids only.
    """
    try:
        tokenizer = load_tokenizer(directory)
    except TokenizerError as error:
        raise ExportError(
            f"{error}. A GGUF file carries its tokenizer; put the model's tokenizer.json, "
            "tokenizer.model or vocab.json with merges.txt there"
        ) from error
    spec = json.loads(tokenizer.tokenizer.to_str())
    vocabulary = _of_spec(spec, tokenizer)
    _add_special_tokens(vocabulary, tokenizer)
    vocabulary.chat_template = _template(directory)
    vocabulary.switch = recorded_switch(tokenizer.home)
    if vocabulary.faults and strict:
        raise ExportError(f"llama.cpp {'; llama.cpp '.join(vocabulary.faults)}. {BY_IDS}")
    if vocabulary.faults:
        told = "; ".join(vocabulary.faults)
        vocabulary.notes.append(f"prompt it by token ids, for llama.cpp {told}")
    return vocabulary


def _of_spec(spec: dict[str, Any], tokenizer: Tokenizer) -> Vocabulary:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"the tokenizer is a {model.get('type')} model: llama.cpp's llama takes BPE only"
        )
    added = {t["id"]: t for t in spec.get("added_tokens") or ()}
    by_id = {index: token for token, index in model["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    held = set(by_id.values())
    tokens = [by_id.get(i) or _unused(i, held) for i in range(max(by_id) + 1)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    steps = _steps(spec.get("pre_tokenizer"))
    if any(step["type"] == "ByteLevel" for step in steps):
        vocabulary = Vocabulary(
            model="gpt2",
            tokens=tokens,
            types=[_added_type(added.get(i)) for i in range(len(tokens))],
            merges=merges,
        )
        _name_split(vocabulary, steps, model, tokenizer)
        _check_normalizer(vocabulary, _steps(spec.get("normalizer")))
    elif "▁" in str(spec.get("normalizer")) + str(spec.get("pre_tokenizer")):
        vocabulary = _sentencepiece(spec, tokens, added, merges)
    else:
        raise ExportError(
            "the tokenizer is neither byte-level BPE nor SentencePiece BPE (no ByteLevel, no ▁): "
            "llama.cpp has no code for it"
        )
    if strips := [t["content"] for t in added.values() if t.get("lstrip") or t.get("rstrip")]:
        vocabulary.faults.append(f"keeps the spaces beside {strips[0]}, which the tokenizer drops")
    return vocabulary


def _added_type(added: dict[str, Any] | None) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [s for part in inner for s in _steps(part)] if inner else [step]


# Byte-level BPE.


def _name_split(
    vocabulary: Vocabulary,
    steps: list[dict[str, Any]],
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """llama.cpp's name of the text split, or why it has none."""
    if not vocabulary.merges:  # every byte is a token however the text is split
        vocabulary.pre = "gpt-2"
        return
    split = tuple(_splits(steps))
    known = (name for name, one in PRE_TOKENIZERS.items() if _same(split, one))
    name = next(known, None)
    if any(step.get("add_prefix_space") for step in steps):
        vocabulary.faults.append("puts no space before a text, as add_prefix_space does")
    if name is None:
        vocabulary.faults.append(
            f"has no code that we know for the text split {' then '.join(split)!r} (known: "
            f"{', '.join(PRE_TOKENIZERS)})"
        )
        return
    whole = bool(model.get("ignore_merges"))
    if whole != (name in WHOLE_WORDS) and not _all_merged(tokenizer):
        if whole or name not in MERGED:
            does = "joins words by merges" if whole else "takes known words whole"
            vocabulary.faults.append(f"{does} under the split {name}, and the tokenizer does not")
        name = MERGED.get(name, name)
    vocabulary.pre = name
    if name in NEARLY:
        vocabulary.notes.append(
            f"llama.cpp's {name} reads words with marks, and with capitals outside ASCII, to "
            "other ids now and then"
        )


def _same(split: tuple[str, ...], known: tuple[str, ...]) -> bool:
    if len(split) != len(known):
        return False
    pairs = zip(map(_plain, split), map(_plain, known), strict=True)
    return all(
        one.startswith(other[:-1]) if other.endswith("…") else one == other for one, other in pairs
    )


def _splits(steps: list[dict[str, Any]]) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer, and by name what is no such expression."""
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                if step.get("use_regex", True):
                    yield GPT2_SPLIT
            case {"type": "Digits"}:
                yield DIGIT if step.get("individual_digits") else DIGITS
            case {"type": "Punctuation", "behavior": "Contiguous"}:
                yield PUNCTUATION
            case {"type": "Split", "pattern": {"Regex": pattern}}:
                plain = step.get("behavior") == "Isolated" and not step.get("invert")
                kept = step.get("behavior") == "Removed" and step.get("invert")
                whole = pattern.endswith(r"|\s+")  # every character is of some match
                yield pattern if plain or (kept and whole) else f"{step['behavior']} {pattern}"
            case _:
                yield str(step["type"])


_SPELLED = (
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", ENDINGS),
    ("'(?i:[sdmt]|ll|ve|re)", ENDINGS),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),
    ("\r", r"\r"),
    ("\n", r"\n"),
)


def _plain(pattern: str) -> str:
    """A pattern with one spelling of what is written in several ways."""
    for one, other in _SPELLED:
        pattern = pattern.replace(one, other)
    return pattern


def _all_merged(tokenizer: Tokenizer) -> bool:
    """Whether the merges make every token, so that taking words whole changes nothing."""
    model = tokenizer.tokenizer.model
    before, model.ignore_merges = model.ignore_merges, False
    try:
        vocab = tokenizer.tokenizer.get_vocab(with_added_tokens=False)
        return all(len(model.tokenize(token)) == 1 for token in vocab if token)
    finally:
        model.ignore_merges = before


def _check_normalizer(vocabulary: Vocabulary, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step["type"] == "NFC":
            vocabulary.notes.append(
                "llama.cpp does not normalise: a text that is not in NFC is read to other ids"
            )
        else:
            vocabulary.faults.append(f"does not do what the normalizer {step['type']} does")


# SentencePiece.

_SPACES = {r"\A +| +\z", r"\A +", r" +\z", r"\A\s+", r"\s+\z", " {2,}"}


def _sentencepiece(
    spec: dict[str, Any], tokens: list[str], added: Mapping[int, Any], merges: list[str]
) -> Vocabulary:
    model = spec["model"]
    rank: dict[str, int] = {}  # SentencePiece joins the pair that scores highest: earlier merges
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), i)
    normalizer, splits = _steps(spec.get("normalizer")), _steps(spec.get("pre_tokenizer"))
    schemes = [s.get("prepend_scheme", "always") for s in splits if s["type"] == "Metaspace"]
    prepends = any(step["type"] == "Prepend" for step in normalizer)
    vocabulary = Vocabulary(
        model="llama",
        tokens=tokens,
        types=[_piece_type(t, added.get(i), model) for i, t in enumerate(tokens)],
        scores=[-float(rank.get(token, len(merges) + i)) for i, token in enumerate(tokens)],
        add_space_prefix=prepends or any(scheme != "never" for scheme in schemes),
    )
    if TokenType.BYTE not in vocabulary.types:
        vocabulary.notes.append(
            "the tokenizer has no byte tokens: llama.cpp answers text with characters outside the "
            "vocabulary with an error, where the original reads them as unknown"
        )
    if "first" in schemes:
        vocabulary.notes.append(
            "llama.cpp puts a space behind a special token too, where the tokenizer puts one "
            "before the text alone"
        )
    if not prepends and set(schemes) & {"first", "always"} and r"\\A▁" not in str(normalizer):
        vocabulary.notes.append("llama.cpp reads a text that begins with a space to another id")
    _check_spaces(vocabulary, normalizer)
    for step in splits:
        if step["type"] != "Metaspace" or step.get("split"):
            told = (step.get("pattern") or {}).get("Regex", "")
            what = f"{step['type']} {told!r}" if told else step["type"]
            vocabulary.faults.append(f"does not split a text as {what} does")
    return vocabulary


def _check_spaces(vocabulary: Vocabulary, steps: list[dict[str, Any]]) -> None:
    """What a normalizer does beside writing ▁ for a space."""
    collapses = False
    for step in steps:
        pattern = step.get("pattern") or {}
        told = (pattern.get("Regex") or pattern.get("String"), step.get("content"))
        if step["type"] == "Prepend" or told in ((" ", "▁"), (r"\A▁", "▁▁")):
            continue
        if step["type"] == "Strip" or (step["type"] == "Replace" and told[0] in _SPACES):
            collapses = True
        elif step["type"] == "NFC":
            _check_normalizer(vocabulary, [step])
        else:
            what = f"{step['type']} {told[0]!r}" if pattern else step["type"]
            vocabulary.faults.append(f"does not do what the normalizer {what} does")
    if collapses:
        vocabulary.notes.append(
            "llama.cpp keeps the spaces that the tokenizer drops (at both ends, and of several)"
        )


def _piece_type(token: str, added: dict[str, Any] | None, model: dict[str, Any]) -> TokenType:
    if token == (model.get("unk_token") or "<unk>"):
        return TokenType.UNKNOWN
    is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)
    return TokenType.BYTE if is_byte and added is None else _added_type(added)


# What stands around a text.


def _add_special_tokens(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Special token ids and the rule of BOS and EOS."""
    begin, end = tokenizer.begin, tokenizer.end
    if len(begin) > 1 or len(end) > 1:
        texts = [tokenizer.token(i) or "?" for i in (*begin, *end)]
        vocabulary.faults.append(f"puts one token at each end of a text, not {' '.join(texts)}")
    vocabulary.add_bos, vocabulary.add_eos = bool(begin), bool(end)
    bos = begin[0] if begin else tokenizer.bos_id
    unknown = tokenizer.names.get("unk_token")
    roles = {
        "bos": bos,
        "unknown": None if unknown is None else tokenizer.token_id(unknown),
        "padding": tokenizer.own_pad_id,
    }
    vocabulary.special = {role: index for role, index in roles.items() if index is not None}
    # llama.cpp has one slot a role: first what the rule appends, last what begins a text too.
    ends = list(dict.fromkeys([*end[:1], *tokenizer.eos_ids]))
    ends.sort(key=lambda i: (i not in end, i == bos))
    vocabulary.special |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    if not ends:
        vocabulary.notes.append(
            "the source names no end token, so llama.cpp stops at one of its own choosing "
            f"({11 if vocabulary.model == 'gpt2' else 2})"
        )
    if ends[3:]:
        texts = ", ".join(tokenizer.token(i) or str(i) for i in ends[3:])
        vocabulary.notes.append(f"llama.cpp has room for three ends, so not for {texts}")


def _template(directory: Path) -> str | None:
    """The chat template, of several the default one."""
    if (file := directory / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    settings = directory / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    template = found.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template if isinstance(template, str) else None
