"""How byte-level tokenizers cut a text before they merge, by the names that GGUF files have for it.

The names and what they mean are llama.cpp's (llama-vocab.cpp).
"""

from __future__ import annotations

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")

# A split is a sequence of regular expressions, each cutting what the one before left;
# ByteLevel's own expression and Digits are written out, so that equal splits compare equal.

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
PUNCTUATION = "punctuation"  # a run of it, as the Punctuation step with contiguous pieces cuts
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_SPACE_RUNS = "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1))
# The name that llama.cpp (llama-vocab.cpp) has for a split; "…" stands for any end.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_SPLIT,),
    "llama-bpe": (LLAMA3_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
    "smollm": (DIGIT, GPT2_SPLIT),
    "qwen35": (
        QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),
    ),
    "tekken": (_CASED % ("", "", r"\p{N}"),),
    "gpt-4o": (_CASED % (ENDINGS + "?", ENDINGS + "?", r"\p{N}{1,3}"),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT),
    "falcon": (PUNCTUATION, GPT2_SPLIT, DIGITS, "[0-9][0-9][0-9]"),
    "minicpm5": (r"\p{N}{1,3}", LLAMA3_SPLIT.replace("{1,3}", "+")),
    "seed-coder": (
        LLAMA3_SPLIT.replace("{1,3}", "{1}").replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+"),
    ),
    "ufakzeka": (QWEN2_SPLIT.removeprefix(ENDINGS + "|"),),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ…",
        r"\s?[!-/:-~！-／：-～…",
        r"\s+$",
        _CJK,
        DIGIT,
    ),
    "bailingmoe": (QWEN2_SPLIT.replace(r"\s*[\r\n]+", r"\s*[\r\n]"),),
    "exaone-moe": (
        QWEN2_SPLIT.replace(r"\p{L}+|", r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|")
        .replace(r"\p{N}]+[\r\n]*", r"\p{N}]+[\r\n/]?")
        .replace(r"\s*[\r\n]+", r"\s*[\r\n]"),
    ),
    "jais-2": (LLAMA3_SPLIT.replace(r"\s+(?!\S)|\s+", _SPACE_RUNS + r"|\s{1,2}(?!\S)|\s{1}"),),
    "youtu": (
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        _CASED % (ENDINGS + "?", ENDINGS + "?", r"\p{N}"),
    ),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, DIGIT),
}
NEARLY = ("tekken", "gpt-4o")  # llama.cpp tells cases apart in ASCII alone
# llama.cpp takes a word that is a token whole under these names, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "tekken", "minicpm5", "youtu")
MERGED = {"llama-bpe": "smaug-bpe"}  # the same split without that rule
