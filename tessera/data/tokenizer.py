"""Text to ids and back, whatever file the ids were defined in.

`encode` adds nothing: no <s> unless `bos=True`, and the characters "<s>" in a text are characters
unless `special=True`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from tessera.data import vocabulary
from tessera.data.thought import CLOSE, OPEN
from tessera.data.vocabulary import TokenizerError, Vocabulary, read_json
from tessera.model.gguf import directory_of, is_gguf
from tessera.model.pre_tokenizers import QWEN2_SPLIT
from tessera.runs.files import atomic_write, writing

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # the last ends a turn
# Digits stay single, and llama.cpp knows the split, so an exported GGUF reads text.
TRAINED_SPLIT = QWEN2_SPLIT
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"  # a directory of those that have a name

_ENCODING = threading.Lock()  # encode_special_tokens is the library's state, not an argument


class Tokenizer:
    """One vocabulary. Build it with `load_tokenizer`, `byte_tokenizer` or `train_bpe`.

    bos_id: the id named as the beginning of a text, which a text begins with only where `begin`
    holds it. begin: the ids that the tokenizer's own rule puts before a raw text, as transformers'
    `tokenizer(text)` does. eos_ids: generation stops at each, a document ends with the first.
    names: the special tokens that its files name (bos_token, unk_token …). kind: the class that
    transformers reads it with. home: the directory of its files, None for one made here.
    """

    def __init__(self, found: Vocabulary) -> None:
        tokenizer = found.tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.names, self.kind = found.names, found.kind
        self.begin, self.end = _around(tokenizer)
        self.bos_id: int | None = None
        self.eos_ids: tuple[int, ...] = ()
        self.own_pad_id: int | None = None
        self.home: Path | None = None

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None where there is none."""
        return self.tokenizer.token_to_id(token)

    def token(self, index: int) -> str | None:
        """The vocabulary entry with this id."""
        return self.tokenizer.id_to_token(index)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special=True`."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    @property
    def special_tokens(self) -> list[str]:
        """The texts that `special=True` reads as one special token each."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    @property
    def pad_id(self) -> int:
        """The padding id, else the end token, else 0. `Batch.segments` marks padding, not this."""
        return next(i for i in (self.own_pad_id, *self.eos_ids, 0) if i is not None)

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest token; 0 where a token may stand for more than it spells."""
        plain = isinstance(self.tokenizer.model, models.BPE) and not self.tokenizer.model.fuse_unk
        known = plain and self.tokenizer.normalizer is None
        return max(map(len, self.tokenizer.get_vocab()), default=0) if known else 0

    def special_names(self) -> dict[str, str]:
        """bos_token, eos_token, pad_token and what its files name (unk_token …), for templates."""
        return self.names or self._own_names()

    def _own_names(self) -> dict[str, str]:
        eos = self.eos_ids[0] if self.eos_ids else None
        own = {"bos_token": self.bos_id, "eos_token": eos, "pad_token": self.own_pad_id}
        told = {key: None if i is None else self.token(i) for key, i in own.items()}
        return {key: token for key, token in told.items() if token is not None}

    def encode(self, text: str, bos: bool = False, *, special: bool = False) -> list[int]:
        """Ids of `text`; `special=True` reads special tokens out of the text itself.

        bos: begin as the tokenizer's own rule says, with <s> or with nothing (`begin`).
        """
        return self.encode_batch([text], bos, special=special)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, *, special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, in parallel.

        Raises TokenizerError for a text with half a surrogate pair, which no bytes stand for.
        """
        try:
            with _ENCODING:
                if self.tokenizer.encode_special_tokens == special:
                    self.tokenizer.encode_special_tokens = not special
                encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    around = ascii(text[max(0, error.start - 20) : error.end])
                    raise TokenizerError(
                        f"{around} ends with half a surrogate pair; give the text in UTF-8"
                    ) from None
            raise
        first = list(self.begin) if bos else []
        return [first + encoding.ids for encoding in encoded]

    def beginning(self, bos: bool | None = None) -> tuple[int, ...]:
        """The ids before a raw text: by the tokenizer's own rule (None), forced, or none.

        Raises TokenizerError where <s> is asked for and the tokenizer names none.
        """
        if bos is None or (bos and self.begin):
            return self.begin
        if bos and self.bos_id is None:
            raise TokenizerError("this tokenizer names no beginning-of-text token; set bos = false")
        return (self.bos_id,) if bos and self.bos_id is not None else ()

    def fingerprint(self) -> str:
        """A hash of the vocabulary and its rules: equal ones give every text the same ids."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        told = f"tokenizers {tokenizers.__version__} {self.tokenizer.to_str()}".encode()
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Writes Hugging Face tokenizer files; a generation_config.json already there is kept."""
        directory = Path(directory)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for name in (*VOCABULARY_FILES, *SIDE_FILES):
                source = None if self.home is None else self.home / name
                target = directory / name
                if source and source.is_file() and source.resolve() != target.resolve():
                    shutil.copyfile(source, target)
            copy_templates(self.home, directory)
        if not (directory / "tokenizer.json").is_file():
            atomic_write(directory / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) or None,
            "pad_token_id": self.own_pad_id,
        }
        generation = {key: value for key, value in ids.items() if value is not None}
        config = {"tokenizer_class": self.kind, "clean_up_tokenization_spaces": False}
        for name, value in (
            ("tokenizer_config.json", config | self._own_names()),
            ("generation_config.json", generation),
        ):
            if not (directory / name).is_file():
                _write_json(directory / name, value)
        # A class that follows from the model_type of a config.json elsewhere is named here.
        settings = read_json(directory / "tokenizer_config.json")
        if settings.get("tokenizer_class", "").removesuffix("Fast") != self.kind.removesuffix(
            "Fast"
        ):
            _write_json(
                directory / "tokenizer_config.json", settings | {"tokenizer_class": self.kind}
            )


def _write_json(path: Path, value: object) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and behind a text."""
    made = tokenizer.encode("a")
    inside = [at for at, part in enumerate(made.sequence_ids) if part is not None]
    if not inside:
        return tuple(made.ids), ()
    return tuple(made.ids[: inside[0]]), tuple(made.ids[inside[-1] + 1 :])


def byte_tokenizer() -> Tokenizer:
    """Any text, no training: <pad> 0, <bos> 1, <eos> 2, byte b is id b + 3."""
    tokens = [PAD, BOS, EOS, *vocabulary.byte_characters()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = vocabulary.byte_level(TRAINED_SPLIT)
    return _finish(tokenizer)


def train_bpe(
    texts: Iterable[str], vocab_size: int, tokens: Sequence[str] = (), *, chat: bool = False
) -> Tokenizer:
    """A byte-level BPE learned from `texts`, the same for the same texts.

    It has at most `vocab_size` tokens, fewer when the texts run out of pairs. On top of them,
    tokens: texts that are one token each wherever they stand. chat: so are the built-in template's
    marks, where special tokens are asked for, and, as plain text that stock parsers find, `<think>`
    and `</think>`.
    """
    if vocab_size < 256 + 3:
        raise TokenizerError(f"bpe = {vocab_size} is below 259: 256 bytes and 3 specials")
    marks, thoughts = (CHAT_MARKS, (OPEN, CLOSE)) if chat else ((), ())
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = vocabulary.byte_level(TRAINED_SPLIT)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in marks])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*thoughts, *tokens)])
    return _finish(tokenizer)


def _finish(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    """Adds what stock software expects: specials 0, 1, 2 and a template that puts <bos> first.

    A turn's end stops generation too, behind the document's end.
    """
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 1)]
    )
    made = Tokenizer(Vocabulary(tokenizer, {}))
    made.bos_id, made.own_pad_id = made.token_id(BOS), made.token_id(PAD)
    ends = [made.token_id(token) for token in (EOS, CHAT_MARKS[-1])]
    made.eos_ids = tuple(i for i in ends if i is not None)
    return made


def copy_templates(source: Path | None, target: Path) -> None:
    """Copies the named chat templates of a tokenizer's directory."""
    for path in () if source is None else sorted(source.glob(f"{TEMPLATES}/*.jinja")):
        (target / TEMPLATES).mkdir(exist_ok=True)
        if path.resolve() != (target / TEMPLATES / path.name).resolve():
            shutil.copyfile(path, target / TEMPLATES / path.name)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model, run or tokenizer directory, of a GGUF file or a tokenizer's."""
    path = Path(path)
    if path.is_file() and is_gguf(path):
        path = directory_of(path)
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
    home, found = path.parent, vocabulary.read(path)
    made = Tokenizer(found)
    # Named tokens first (tokenizer files), then ids (generation_config, else config).
    config, generation = (
        read_json(home / f"{name}.json") for name in ("config", "generation_config")
    )
    ids = {**config, **{key: value for key, value in generation.items() if value is not None}}
    rows = config.get("vocab_size") or math.inf

    def usable(*values: int | None) -> list[int]:
        """Without -1, which some write for none, and ids that the model has no row for."""
        return [i for i in values if isinstance(i, int) and 0 <= i < rows]

    tokens = [found.names.get(f"{key}_token") for key in ("bos", "eos", "pad")]
    bos, eos, pad = (None if t is None else made.token_id(t) for t in tokens)
    more = ids.get("eos_token_id")
    ends = usable(eos, *(more if isinstance(more, list) else [more]))
    guess = _guess(made)
    begins = usable(bos, *made.begin)
    if not found.names:
        begins = usable(ids.get("bos_token_id"), *begins, guess[0])
    made.bos_id = next(iter(begins), None)
    made.eos_ids = tuple(dict.fromkeys(ends)) or guess[1]
    made.own_pad_id = next(iter(usable(pad, ids.get("pad_token_id"), guess[2])), None)
    # Files are copied on save only where they carry their own names and mean the same ids.
    made.home = home if path.name in VOCABULARY_FILES else None
    return made


def _guess(made: Tokenizer) -> tuple[int | None, tuple[int, ...], int | None]:
    """(bos, eos, pad) as the vocabulary itself says, for one without any config file."""
    for begin, ends, last in (
        (BOS, (EOS,), PAD),
        ("<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>"), "<|finetune_right_pad_id|>"),
        ("<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>"),
    ):
        found = [i for i in map(made.token_id, ends) if i is not None]
        if made.token_id(begin) is not None and len(found) == len(ends):
            return made.token_id(begin), tuple(found), made.token_id(last)
    return None, (), None
