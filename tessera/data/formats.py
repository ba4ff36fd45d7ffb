"""Tokenizer backends: every supported file format becomes one of two small classes.

`Fast` wraps the `tokenizers` library: tokenizer.json, GPT-2's vocab.json + merges.txt, tiktoken
ranks, the byte-level tokenizer and freshly trained BPE. `SentencePiece` wraps a tokenizer.model.

tiktoken merges the adjacent pair whose *union* has the lowest rank; a BPE model merges the pair
listed first. Listing every split of every token in order of the token's rank makes the two agree
(tests compare the ids on the published vectors). No file here holds a split pattern, so tiktoken
ranks are read with Llama 3's.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # the last ends a turn
THINK = ("<think>", "</think>")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2's: digits stay single, and llama.cpp knows the split, so an exported GGUF reads text.
TRAINED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


class TokenizerError(ValueError):
    """A tokenizer file is absent, broken or of a format that is not supported."""


class Backend(Protocol):
    """Ids to text and back, specials left alone unless asked for."""

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], special: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, index: int) -> str | None: ...
    def special_tokens(self) -> list[str]: ...
    def definition(self) -> bytes: ...
    @property
    def vocab_size(self) -> int: ...


class Fast:
    """A `tokenizers.Tokenizer`, with truncation and padding of its file switched off."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Ids of each text; `special` says whether the text "<s>" is the token or three signs."""
        if self.tokenizer.encode_special_tokens == special:
            self.tokenizer.encode_special_tokens = not special
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], special: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def token(self, index: int) -> str | None:
        return self.tokenizer.id_to_token(index)

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Makes special what the files beside the vocabulary name so, as `transformers` does."""
        found = [token for token in tokens if self.token_id(token) is not None]
        lacking = [token for token in found if token not in self.special_tokens()]
        if lacking:
            self.tokenizer.add_special_tokens([AddedToken(t, special=True) for t in lacking])

    def special_tokens(self) -> list[str]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def definition(self) -> bytes:
        """All that the ids of a text follow from: the tokenizer.json, and the library's version."""
        return f"tokenizers {tokenizers.__version__} {self.tokenizer.to_str()}".encode()


class SentencePiece:
    """A SentencePiece `tokenizer.model`."""

    def __init__(self, data: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(data)
        self.vocab_size: int = self.processor.GetPieceSize()

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Ids of each text. SentencePiece never reads control tokens out of a text."""
        if special:
            raise TokenizerError(
                "a SentencePiece tokenizer.model does not recognise special tokens in text; "
                "use a tokenizer.json of the same model"
            )
        return cast(list[list[int]], self.processor.Encode(list(texts), out_type=int))

    def decode(self, ids: Sequence[int], special: bool) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]  # as `tokenizers` does
        if not special:
            unknown = self.processor.unk_id()
            return cast(str, self.processor.Decode([i for i in known if i != unknown]))
        return "".join(
            "".join(map(self.processor.IdToPiece, run))
            if control
            else cast(str, self.processor.Decode(list(run)))
            for control, run in itertools.groupby(known, self.processor.IsControl)
        )

    def token_id(self, token: str) -> int | None:
        index = self.processor.PieceToId(token)
        return index if self.processor.IdToPiece(index) == token else None

    def token(self, index: int) -> str | None:
        return self.processor.IdToPiece(index) if 0 <= index < self.vocab_size else None

    def special_tokens(self) -> list[str]:
        return []

    def definition(self) -> bytes:
        """All that the ids of a text follow from: the model file, and the library's version."""
        model = cast(bytes, self.processor.serialized_model_proto())
        return f"sentencepiece {sentencepiece.__version__} ".encode() + model


def read_json_tokenizer(path: Path) -> Fast:
    """The backend of a tokenizer.json."""
    try:
        return Fast(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises nothing narrower than Exception
        raise TokenizerError(
            f"{path} is not a readable tokenizer.json ({error}); copy it again from its source"
        ) from error


def read_model_file(path: Path) -> Fast | SentencePiece:
    """The backend of a tokenizer.model: SentencePiece or tiktoken ranks, told apart by content."""
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return tiktoken_backend(data, path)
    try:
        return SentencePiece(data)
    except RuntimeError as error:
        raise TokenizerError(
            f"{path} is neither a SentencePiece model nor a list of tiktoken ranks "
            f"({len(data)} bytes); copy it again from its source"
        ) from error


def read_gpt2_files(vocab: Path, merges: Path) -> Fast:
    """The backend of GPT-2's vocab.json + merges.txt: plain byte-level BPE."""
    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#vers")]
        model = models.BPE(vocab=ids, merges=cast(Any, pairs))
    except Exception as error:  # the library raises nothing narrower than Exception
        raise TokenizerError(
            f"{vocab} with {merges.name} is not a BPE vocabulary ({error})"
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in ids:
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Fast(tokenizer)


def byte_characters() -> list[str]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's map)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    characters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        characters.setdefault(byte, chr(256 + len(characters) - len(shown)))
    return [characters[byte] for byte in range(256)]


def tiktoken_backend(data: bytes, path: Path) -> Fast:
    """The backend of tiktoken ranks (lines "base64 rank"), split as Llama 3 splits."""
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
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _byte_level(LLAMA3_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    if len(ranks) == LLAMA3_RANKS:
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in _llama3_specials()])
    return Fast(tokenizer)


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _llama3_specials() -> list[str]:
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(256))
    return [LLAMA3_NAMED.get(i) or next(reserved) for i in range(256)]


def _byte_level(split: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, as_bytes])


def _finish(tokenizer: tokenizers.Tokenizer) -> Fast:
    """Adds what stock software expects: specials 0, 1, 2 and a template that puts <bos> first."""
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 1)]
    )
    return Fast(tokenizer)


def byte_backend() -> Fast:
    """256 bytes and three specials: <pad> 0, <bos> 1, <eos> 2, byte b is id b + 3."""
    tokens = [PAD, BOS, EOS, *byte_characters()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = _byte_level(TRAINED_SPLIT)
    return _finish(tokenizer)


def train_bpe_backend(
    texts: Iterable[str], vocab_size: int, tokens: Sequence[str] = (), specials: Sequence[str] = ()
) -> Fast:
    """A byte-level BPE of at most `vocab_size` tokens (fewer when the texts run out of pairs).

    On top of them, `tokens` are always one token wherever they stand in a text, and `specials` are
    read out of a text only where special tokens are asked for.
    """
    smallest = 256 + 3
    if vocab_size < smallest:
        raise TokenizerError(
            f"bpe = {vocab_size} is below {smallest} (256 bytes and 3 specials); "
            'give at least that, or tokenizer = "byte"'
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _byte_level(TRAINED_SPLIT)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens])
    return _finish(tokenizer)
