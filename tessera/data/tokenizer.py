"""Text to ids and back, whatever file the ids were defined in.

`load_tokenizer(path)` takes a model, run or tokenizer directory, or a file: tokenizer.json,
SentencePiece or tiktoken tokenizer.model, GPT-2's vocab.json + merges.txt. Which tokens begin and
end a text is read from the Hugging Face files beside it (tokenizer_config.json,
special_tokens_map.json, generation_config.json, config.json).

`encode` adds nothing: no <s> unless `bos=True`, and the characters "<s>" in a text are characters
unless `special=True`. It does not render chats and does not fetch from the hub.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.data.formats import (
    BOS,
    CHAT_MARKS,
    EOS,
    PAD,
    THINK,
    Backend,
    Fast,
    SentencePiece,
    TokenizerError,
    byte_backend,
    read_gpt2_files,
    read_json_tokenizer,
    read_model_file,
    train_bpe_backend,
)
from tessera.runs.files import atomic_write, writing

__all__ = ["Tokenizer", "TokenizerError", "byte_tokenizer", "load_tokenizer", "train_bpe"]

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
    marks, thoughts = (CHAT_MARKS, THINK) if chat else ((), ())
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
