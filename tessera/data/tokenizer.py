"""Tokenizer backends: every supported file format becomes one of two small classes.

`Fast` wraps the `tokenizers` library: tokenizer.json, GPT-2's vocab.json + merges.txt, tiktoken
ranks, the byte-level tokenizer and freshly trained BPE. `SentencePiece` wraps a tokenizer.model.

tiktoken merges the adjacent pair whose *union* has the lowest rank; a BPE model merges the pair
listed first. Listing every split of every token in order of the token's rank makes the two agree
(tests compare the ids on the published vectors). No file here holds a split pattern, so tiktoken
ranks are read with Llama 3's.

Text to ids and back, whatever file the ids were defined in.

`load_tokenizer(path)` takes a model, run or tokenizer directory, or a file: tokenizer.json,
SentencePiece or tiktoken tokenizer.model, GPT-2's vocab.json + merges.txt. Which tokens begin and
end a text is read from the Hugging Face files beside it (tokenizer_config.json,
special_tokens_map.json, generation_config.json, config.json).

`encode` adds nothing: no <s> unless `bos=True`, and the characters "<s>" in a text are characters
unless `special=True`. It does not render chats and does not fetch from the hub.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from tessera.data.thought import CLOSE, OPEN
from tessera.runs.files import atomic_write, writing

__all__ = ["Tokenizer", "TokenizerError", "byte_tokenizer", "load_tokenizer", "train_bpe"]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # the last ends a turn

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


VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Specials:
    """Ids of the tokens that begin, end and pad; `eos` lists the tokenizer's own end first."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


class Tokenizer:
    """One vocabulary. Build it with `load_tokenizer`, `byte_tokenizer` or `train_bpe`."""

    def __init__(self, backend: Backend, specials: Specials, home: Path | None = None) -> None:
        self._backend = backend
        self._specials = specials
        self._home = home

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._backend.vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._specials.bos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids after which generation stops; the first is the one a document ends with."""
        return self._specials.eos

    @property
    def pad_id(self) -> int:
        """The padding id, else the end token, else 0. `Batch.segments` marks padding, not this."""
        return next(i for i in (self._specials.pad, *self._specials.eos, 0) if i is not None)

    @property
    def home(self) -> Path | None:
        """The directory of its files, None for one made here."""
        return self._home

    def special_names(self) -> dict[str, str]:
        """The named special tokens, as chat templates know them: bos_token, eos_token, pad_token.

        Beside the three, whatever the tokenizer's own files name (unk_token …).
        """
        named = {} if self._home is None else _named_specials(self._home)
        own = {"bos_token": self.bos_id, "pad_token": self._specials.pad}
        own["eos_token"] = self.eos_ids[0] if self.eos_ids else None
        told = {key: None if i is None else self.token(i) for key, i in own.items()}
        return {key: token for key, token in told.items() if token is not None} | named

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        """The texts that `special=True` reads as one special token each."""
        return self._backend.special_tokens()

    def encode(self, text: str, bos: bool = False, *, special: bool = False) -> list[int]:
        """Ids of `text`; `special=True` reads special tokens out of the text itself."""
        return self.encode_batch([text], bos, special=special)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, *, special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, in parallel where the library can.

        Raises TokenizerError for a text with half a surrogate pair, which no bytes stand for.
        """
        try:
            encoded = self._backend.encode(texts, special)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_speakable(text)
            raise
        if not bos:
            return encoded
        if self.bos_id is None:
            raise TokenizerError("this tokenizer names no beginning-of-text token; set bos = false")
        first = [self.bos_id]
        return [first + ids for ids in encoded]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special=True`."""
        return self._backend.decode(ids, special)

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None where there is none."""
        return self._backend.token_id(token)

    def token(self, index: int) -> str | None:
        """The vocabulary entry with this id."""
        return self._backend.token(index)

    def fingerprint(self) -> str:
        """A hash of the vocabulary and its rules: equal ones give every text the same ids."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hashlib.blake2b(self._backend.definition(), digest_size=16).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Writes Hugging Face tokenizer files; a generation_config.json already there is kept."""
        directory = Path(directory)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for name in (*VOCABULARY_FILES, *SIDE_FILES):
            if self._home is not None and (self._home / name).is_file():
                _copy(self._home / name, directory / name)
        if isinstance(self._backend, Fast) and not (directory / "tokenizer.json").is_file():
            atomic_write(directory / "tokenizer.json", self._backend.tokenizer.to_str(pretty=True))
        if not (directory / "tokenizer_config.json").is_file():
            _write_json(directory / "tokenizer_config.json", self._config())
        if not (directory / "generation_config.json").is_file():
            _write_json(directory / "generation_config.json", self._generation_config())

    def _config(self) -> dict[str, Any]:
        fast = isinstance(self._backend, Fast)
        names = {
            "bos_token": None if self.bos_id is None else self.token(self.bos_id),
            "eos_token": self.token(self.eos_ids[0]) if self.eos_ids else None,
            "pad_token": None if self._specials.pad is None else self.token(self._specials.pad),
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
            "clean_up_tokenization_spaces": False,
            **{key: name for key, name in names.items() if name is not None},
        }

    def _generation_config(self) -> dict[str, Any]:
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) or None,
            "pad_token_id": self._specials.pad,
        }
        return {key: value for key, value in ids.items() if value is not None}


def byte_tokenizer() -> Tokenizer:
    """The byte-level tokenizer: 259 ids, any text, no training."""
    backend = byte_backend()
    return Tokenizer(backend, _trained_specials(backend))


def train_bpe(
    texts: Iterable[str], vocab_size: int, tokens: Sequence[str] = (), *, chat: bool = False
) -> Tokenizer:
    """A byte-level BPE learned from `texts`; the same texts give the same tokenizer.

    tokens: texts that are one token each, on top. chat: so are the built-in template's marks and,
    as plain text that stock parsers find, `<think>` and `</think>`.
    """
    marks, thoughts = (CHAT_MARKS, (OPEN, CLOSE)) if chat else ((), ())
    backend = train_bpe_backend(texts, vocab_size, [*thoughts, *tokens], marks)
    return Tokenizer(backend, _trained_specials(backend))


def _trained_specials(backend: Backend) -> Specials:
    """A turn's end stops generation too, behind the document's end."""
    ends = [backend.token_id(token) for token in (EOS, CHAT_MARKS[-1])]
    eos = tuple(i for i in ends if i is not None)
    return Specials(backend.token_id(BOS), eos, backend.token_id(PAD))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model, run or tokenizer directory, or of one tokenizer file."""
    path = Path(path)
    if path.is_file():
        return _from_file(path)
    if not path.is_dir():
        raise TokenizerError(f"no tokenizer at {path}: there is no such file or directory")
    for home in (path, path / "tokenizer", path / "model"):
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
            if (home / name).is_file():
                return _from_file(home / name)
    raise TokenizerError(
        f"no tokenizer in {path} (nor in its tokenizer/ or model/): looked for tokenizer.json, "
        "tokenizer.model, and vocab.json with merges.txt"
    )


def _from_file(path: Path) -> Tokenizer:
    home = path.parent
    if path.suffix == ".model":
        backend: Fast | SentencePiece = read_model_file(path)
    elif path.name == "vocab.json":
        if not (home / "merges.txt").is_file():
            raise TokenizerError(f"{path} has no merges.txt beside it; a BPE needs both files")
        backend = read_gpt2_files(path, home / "merges.txt")
    elif path.suffix == ".json":
        backend = read_json_tokenizer(path)
    else:
        raise TokenizerError(
            f"{path} is not a tokenizer file; expected tokenizer.json, a .model file or vocab.json"
        )
    if isinstance(backend, Fast):
        backend.mark_special(_named_specials(home).values())
    # Files are copied on save only where they carry their own names and mean the same ids.
    copied = path.name in VOCABULARY_FILES
    return Tokenizer(backend, _read_specials(home, backend), home if copied else None)


def _read_specials(home: Path, backend: Fast | SentencePiece) -> Specials:
    """Named tokens first (tokenizer files), then ids (generation_config, else config)."""
    named = _read_json(home / "special_tokens_map.json") | _read_json(
        home / "tokenizer_config.json"
    )
    ids = _read_json(home / "generation_config.json") or _read_json(home / "config.json")
    found = {key: _named(named.get(f"{key}_token"), backend) for key in ("bos", "eos", "pad")}
    ends = [found["eos"], *_as_list(ids.get("eos_token_id"))]
    guess = _own_specials(backend)
    eos = tuple(dict.fromkeys(i for i in ends if i is not None))
    bos = next((i for i in (found["bos"], ids.get("bos_token_id")) if i is not None), guess.bos)
    pad = next((i for i in (found["pad"], ids.get("pad_token_id")) if i is not None), guess.pad)
    return Specials(bos, eos or guess.eos, pad)


def _named_specials(home: Path) -> dict[str, str]:
    """The entries `…_token` of a tokenizer's files, as texts."""
    found = _read_json(home / "special_tokens_map.json") | _read_json(
        home / "tokenizer_config.json"
    )
    named = {}
    for key, value in found.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            named[key] = content
    return named


def _own_specials(backend: Fast | SentencePiece) -> Specials:
    """What the vocabulary file itself says, for one that comes without any config file."""
    if isinstance(backend, SentencePiece):
        inner = backend.processor
        bos, eos, pad = (
            i if i >= 0 else None for i in (inner.bos_id(), inner.eos_id(), inner.pad_id())
        )
        return Specials(bos, () if eos is None else (eos,), pad)
    for begin, ends, pad in (
        (BOS, (EOS,), PAD),
        ("<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>"), "<|finetune_right_pad_id|>"),
        ("<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>"),
    ):
        first, last = backend.token_id(begin), [backend.token_id(end) for end in ends]
        if first is not None and None not in last:
            return Specials(first, tuple(i for i in last if i is not None), backend.token_id(pad))
    return Specials()


def _named(value: Any, backend: Backend) -> int | None:
    """The id of `"</s>"` or of `{"content": "</s>", ...}`."""
    content = value.get("content") if isinstance(value, dict) else value
    return backend.token_id(content) if isinstance(content, str) else None


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        with writing(target):
            shutil.copyfile(source, target)


def _check_speakable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.end])
        raise TokenizerError(
            f"{around} ends with half a surrogate pair: bytes that are no UTF-8, or an escape of "
            "JSON cut in two. Give the text in UTF-8"
        ) from None
