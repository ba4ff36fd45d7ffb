"""Text to ids and back, whatever file the ids were defined in.

`encode` adds nothing: no <s> unless `bos=True`, and the characters "<s>" in a text are characters
unless `special=True`.
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
from pathlib import Path
from typing import Any, ClassVar, cast

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from tessera.data.thought import CLOSE, OPEN
from tessera.runs.files import atomic_write, writing

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # the last ends a turn
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2's: digits stay single, and llama.cpp knows the split, so an exported GGUF reads text.
TRAINED_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
LLAMA3_RANKS = 128_000
LLAMA3_NAMED = (
    "begin_of_text end_of_text - - finetune_right_pad_id step_id start_header_id end_header_id "
    "eom_id eot_id python_tag"
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"  # a directory of those that have a name


class TokenizerError(ValueError):
    """A tokenizer file is absent, broken or of a format that is not supported."""


class Tokenizer:
    """One vocabulary. Build it with `load_tokenizer`, `byte_tokenizer` or `train_bpe`."""

    kind: ClassVar[str]  # the class that transformers reads it with
    vocab_size: int  # one more than the highest id
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # generation stops at each; a document ends with the first
    own_pad_id: int | None = None
    home: Path | None = None  # the directory of its files, None for one made here

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None where there is none."""
        raise NotImplementedError

    def token(self, index: int) -> str | None:
        """The vocabulary entry with this id."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special=True`."""
        raise NotImplementedError

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        raise NotImplementedError

    def _definition(self) -> bytes:
        """All that the ids of a text follow from: the file, and the library's version."""
        raise NotImplementedError

    @property
    def special_tokens(self) -> list[str]:
        """The texts that `special=True` reads as one special token each."""
        return []

    @property
    def pad_id(self) -> int:
        """The padding id, else the end token, else 0. `Batch.segments` marks padding, not this."""
        return next(i for i in (self.own_pad_id, *self.eos_ids, 0) if i is not None)

    def special_names(self) -> dict[str, str]:
        """bos_token, eos_token, pad_token and what its files name (unk_token …), for templates."""
        if self.home is None:
            return self._own_names()
        config = _read_json(self.home / "tokenizer_config.json")
        unnamed = {key for key, value in config.items() if value is None}  # as in transformers
        found = self._own_names() | _named_specials(self.home)
        return {key: token for key, token in found.items() if key not in unnamed}

    def _own_names(self) -> dict[str, str]:
        eos = self.eos_ids[0] if self.eos_ids else None
        own = {"bos_token": self.bos_id, "eos_token": eos, "pad_token": self.own_pad_id}
        told = {key: None if i is None else self.token(i) for key, i in own.items()}
        return {key: token for key, token in told.items() if token is not None}

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
            encoded = self._encode(texts, special)
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
        if not bos:
            return encoded
        if self.bos_id is None:
            raise TokenizerError("this tokenizer names no beginning-of-text token; set bos = false")
        first = [self.bos_id]
        return [first + ids for ids in encoded]

    def fingerprint(self) -> str:
        """A hash of the vocabulary and its rules: equal ones give every text the same ids."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hashlib.blake2b(self._definition(), digest_size=16).hexdigest()

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
        if isinstance(self, Fast) and not (directory / "tokenizer.json").is_file():
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
                text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
                atomic_write(directory / name, text)


class Fast(Tokenizer):
    """A `tokenizers.Tokenizer`, with truncation and padding of its file switched off."""

    kind = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if self.tokenizer.encode_special_tokens == special:
            self.tokenizer.encode_special_tokens = not special
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def token(self, index: int) -> str | None:
        return self.tokenizer.id_to_token(index)

    @property
    def special_tokens(self) -> list[str]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def _definition(self) -> bytes:
        return f"tokenizers {tokenizers.__version__} {self.tokenizer.to_str()}".encode()


class SentencePiece(Tokenizer):
    """A SentencePiece `tokenizer.model`."""

    kind = "LlamaTokenizer"

    def __init__(self, data: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(data)
        self.vocab_size = self.processor.GetPieceSize()

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if special:
            raise TokenizerError(
                "a SentencePiece tokenizer.model does not recognise special tokens in text; "
                "use a tokenizer.json of the same model"
            )
        return cast(list[list[int]], self.processor.Encode(list(texts), out_type=int))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
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

    def _definition(self) -> bytes:
        model = cast(bytes, self.processor.serialized_model_proto())
        return f"sentencepiece {sentencepiece.__version__} ".encode() + model


def read_model_file(path: Path) -> Fast | SentencePiece:
    """The tokenizer of a tokenizer.model: SentencePiece or tiktoken ranks, by its content."""
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return _of_tiktoken(data, path)
    try:
        return SentencePiece(data)
    except RuntimeError as error:
        raise TokenizerError(
            f"{path} is neither a SentencePiece model nor a list of tiktoken ranks"
        ) from error


def read_gpt2_files(vocab: Path, merges: Path) -> Fast:
    """The tokenizer of GPT-2's vocab.json + merges.txt: plain byte-level BPE."""
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises nothing narrower than Exception
        raise TokenizerError(
            f"{vocab} with {merges.name} is not a BPE vocabulary ({error})"
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Fast(tokenizer)


def _byte_characters() -> list[str]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's map)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    characters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        characters.setdefault(byte, chr(256 + len(characters) - len(shown)))
    return [characters[byte] for byte in range(256)]


def _of_tiktoken(data: bytes, path: Path) -> Fast:
    """The tokenizer of tiktoken ranks (lines "base64 rank"), split as Llama 3 splits.

    tiktoken merges the adjacent pair whose union has the lowest rank, a BPE model the pair listed
    first. Listing every split of every token in order of the token's rank makes the two agree.
    """
    try:
        rows = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path} is not a list of tiktoken ranks: {error}") from error
    shown = _byte_characters()
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
        reserved = (f"reserved_special_token_{n}" for n in range(256))
        names = [*LLAMA3_NAMED.split(), *("-" * 256)][:256]
        texts = [f"<|{next(reserved) if name == '-' else name}|>" for name in names]
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in texts])
    return Fast(tokenizer)


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_level(split: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, as_bytes])


def byte_tokenizer() -> Tokenizer:
    """Any text, no training: <pad> 0, <bos> 1, <eos> 2, byte b is id b + 3."""
    tokens = [PAD, BOS, EOS, *_byte_characters()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = _byte_level(TRAINED_SPLIT)
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
    tokenizer.pre_tokenizer = _byte_level(TRAINED_SPLIT)
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
    made = Fast(tokenizer)
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
    home, made = path.parent, _vocabulary(path)
    named = _named_specials(home)
    if isinstance(made, Fast):  # special is what the files name so, as in `transformers`
        texts = [t for t in named.values() if made.token_id(t) is not None]
        lacking = [t for t in texts if t not in made.special_tokens]
        made.tokenizer.add_special_tokens([AddedToken(t, special=True) for t in lacking])
    # Named tokens first (tokenizer files), then ids (generation_config, else config).
    ids = _read_json(home / "generation_config.json") or _read_json(home / "config.json")
    tokens = [named.get(f"{key}_token") for key in ("bos", "eos", "pad")]
    bos, eos, pad = (None if t is None else made.token_id(t) for t in tokens)
    more = ids.get("eos_token_id")
    ends = [eos, *(more if isinstance(more, list) else [more])]
    guess = _guess(made)
    made.bos_id = next((i for i in (bos, ids.get("bos_token_id")) if i is not None), guess[0])
    made.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None)) or guess[1]
    made.own_pad_id = next((i for i in (pad, ids.get("pad_token_id")) if i is not None), guess[2])
    # Files are copied on save only where they carry their own names and mean the same ids.
    made.home = home if path.name in VOCABULARY_FILES else None
    return made


def _guess(made: Tokenizer) -> tuple[int | None, tuple[int, ...], int | None]:
    """(bos, eos, pad) as the vocabulary itself says, for one without any config file."""
    if isinstance(made, SentencePiece):
        ids = made.processor.bos_id(), made.processor.eos_id(), made.processor.pad_id()
        bos, eos, pad = (i if i >= 0 else None for i in ids)
        return bos, () if eos is None else (eos,), pad
    for begin, ends, last in (
        (BOS, (EOS,), PAD),
        ("<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>"), "<|finetune_right_pad_id|>"),
        ("<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>"),
    ):
        found = [i for i in map(made.token_id, ends) if i is not None]
        if made.token_id(begin) is not None and len(found) == len(ends):
            return made.token_id(begin), tuple(found), made.token_id(last)
    return None, (), None


def _vocabulary(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        return read_model_file(path)
    if path.name == "vocab.json":
        merges = path.with_name("merges.txt")
        if not merges.is_file():
            raise TokenizerError(f"{path} has no merges.txt beside it; a BPE needs both files")
        return read_gpt2_files(path, merges)
    if path.suffix == ".json":
        try:
            return Fast(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises nothing narrower than Exception
            raise TokenizerError(f"{path} is not a readable tokenizer.json ({error})") from error
    raise TokenizerError(
        f"{path} is not a tokenizer file; expected tokenizer.json, a .model file or vocab.json"
    )


def _named_specials(home: Path) -> dict[str, str]:
    """The entries `…_token` of a tokenizer's files, as texts."""
    found = _read_json(home / "special_tokens_map.json")
    found |= _read_json(home / "tokenizer_config.json")
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}
