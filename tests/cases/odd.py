"""Odd strings for tokenizers, the same every time, and directories to read them with."""

from __future__ import annotations

import io
import json
import random
import shutil
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PIECES: dict[str, tuple[float, list[str]]] = {
    "scripts": (0.25, [
        "abc defg Hello World", "Größe naïve façade Ångström", "Привет мир", "Ελληνικά",
        "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया ४५६", "ไทยภาษา", "日本語テキスト漢字かな",
        "中文字符。，！", "한국어 텍스트", "አማርኛ", "తెలుగు", "ქართული", "Việt Nam ấ ẵ ợ",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "ﬁ ﬂ Ⅷ ½ ² ㎏",
    ]),
    "emoji": (0.08, ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "🙂", "1️⃣", "👨🏿‍🚀"]),
    "spaces": (0.17, [
        " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\u00a0", "\u3000", "\u2003",
        "\u2028", "\v", "\f", "\x85", "\u200b", "\u200d", "\ufeff", "\u2060", "     \n\n   ",
    ]),
    "controls": (0.07, [
        "\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\u009f", "\ufffd", "\ufffe", "\ue000",
        "\U000f0000", "\u0301", "\u0308\u0301", "\u202e", "\U0010ffff",
    ]),
    "contractions": (0.10, [
        "don't", "DON'T", "don'T", "I'LL", "we'Ve", "it's", "IT'S", "y'all'd've", "'S'T", "’s",
        "they'RE", "I'm I'M",
    ]),
    "digits": (0.10, [
        "0", "12", "123", "1234", "12345678", "3.14159", "1,000,000", "-7e-10", "٣٤٥", "１２３",
        "²³", "Ⅻ", "x1y22z333",
    ]),
    "code": (0.09, [
        "def f(x):\n    return x**2  # ok\n", "for(i=0;i<10;++i){a[i]+=1;}", "!!!???...---***",
        '<div class="a">&nbsp;</div>', "\\frac{1}{2} $x_{i}^{2}$", "C:\\path\\to\\file",
        "https://a.b/c?d=e&f=%20#g", '{"k": [1, 2, null]}', "a_b-c.d/e", "=====",
    ]),
    "marks": (0.09, [
        "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>",
        "</think>", "<tool_call>", "<pad>", "[INST]", "<0x0A>", "▁", "▁▁", "<nörm>", "Ġ", "Ċ",
        "<|im", "<bos>", "<eos>", "[PAD]", "<extra>",
    ]),
}  # fmt: skip
FIRST = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "a ",
    "  a  ",
    "▁",
    "▁a",
    "<s>",
    "<s> a</s>",
    "a<s> b </s>c",
]


def odd_strings(count: int, seed: int = 20) -> list[str]:
    """Strings of many scripts, of white space, control characters, marks, digits and code."""
    chance = random.Random(seed)
    weights = [weight for weight, _ in PIECES.values()]

    def piece() -> str:
        kind = chance.choices([*PIECES, "any"], [*weights, 0.05])[0]
        if kind == "any":
            code = chance.randrange(0x110000)
            return "?" if 0xD800 <= code < 0xE000 else chr(code)
        text = chance.choice(PIECES[kind][1])
        if kind == "scripts":
            start = chance.randrange(len(text))
            return text[start : start + chance.randint(1, 12)]
        return text * chance.choice([1, 1, 1, 2, 3]) if kind == "spaces" else text

    made = list(FIRST)
    while len(made) < count:
        text = "".join(piece() for _ in range(chance.randint(1, 8)))
        how = chance.random()
        if how < 0.2:
            text = unicodedata.normalize("NFD" if how < 0.1 else "NFC", text)
        made.append(f" {text}" if 0.2 <= how < 0.3 else f"{text} " if how >= 0.9 else text)
    return made[:count]


@cache
def byte_level(pre: str = "", vocab_size: int = 700, whole: bool = False) -> str:
    """The tokenizer.json of a byte-level BPE learned from odd strings; pre: JSON of the split."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre:
        spec = json.loads(tokenizer.to_str()) | {"pre_tokenizer": json.loads(pre)}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in ("<bos>", "<eos>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(odd_strings(1500, seed=5), trainer)
    return tokenizer.to_str()


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """A small SentencePiece model; options: of its trainer."""
    import sentencepiece

    texts = [text for text in odd_strings(1500, seed=5) if text.strip() and "\0" not in text]
    words = ["the little girl said hello to the big dog and it was a good day"] * 50
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *words]),
        model_writer=out,
        minloglevel=2,
        hard_vocab_limit=False,
        **{
            "vocab_size": 600,
            "character_coverage": 0.98,
            "model_type": "bpe",
            "byte_fallback": True,
            **options,
        },
    )
    return out.getvalue()


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def added(text: str, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": text, "special": special, "normalized": normalized, **flags}


def write_merges(directory: Path) -> int:
    """vocab.json and merges.txt of a byte-level BPE; returns how many tokens they have."""
    model = json.loads(byte_level())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return len(model["vocab"])


def write(directory: Path, files: Sequence[Path] = (), **texts: Any) -> Path:
    """A directory of these files and of these JSON values by name."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, directory / file.name)
    for name, value in texts.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory
