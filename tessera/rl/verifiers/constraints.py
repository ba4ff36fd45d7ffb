"""The 25 verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1).

Each function tells whether a text follows one instruction; its keyword arguments are the data's.
The paper describes them in words; where words leave room (what is a bullet, may a paragraph be
empty), they hold what the verdicts published with GPT-4's answers imply. Words are runs of letters
and digits. Sentences are counted by rule and not by nltk's trained splitter, see `sentences`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tessera.rl.verifiers.language import language_of

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, bound: count >= bound,
    "less than": lambda count, bound: count < bound,
}


def relation_holds(count: int, relation: str, bound: int) -> bool:
    """Whether a count stands in a relation to a bound. Raises ValueError for an unknown one."""
    if relation not in _RELATIONS:
        raise ValueError(f"{relation!r} is no relation; allowed: {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](count, bound)


# keywords


def existence(text: str, *, keywords: list[str]) -> bool:
    return all(re.search(re.escape(keyword), text, re.IGNORECASE) for keyword in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(re.escape(keyword), text, re.IGNORECASE)
    return relation_holds(len(found), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    escaped = map(re.escape, forbidden_words)
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in escaped)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return relation_holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# language


def response_language(text: str, *, language: str) -> bool:
    return language_of(text) == language


# length_constraints


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return relation_holds(sentences(text), relation, num_sentences)


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    return relation_holds(len(re.findall(r"\w+", text)), relation, num_words)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs parted by `***`; only the first and the last of the parts may be empty."""
    parts = [part.strip() for part in text.split("***")]
    inner_filled = all(parts[1:-1])
    return inner_filled and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many paragraphs parted by an empty line, of which the nth (from 1) begins with a word."""
    parts = [part.strip() for part in text.split("\n\n")]
    filled = sum(map(bool, parts))
    if not 1 <= nth_paragraph <= filled or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'\"")
    word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    return filled == num_paragraphs and word == first_word.lower()


# detectable_content


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript after its marker; `P.S.` and `P.P.S` may be spaced, and in either case."""
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(postscript_marker, re.escape(postscript_marker.lower()))
    return bool(re.search(pattern, text.lower()))


# detectable_format


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `-`, or with one `*`."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many `*sections*` or `**sections**`, of one line each and not empty."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(section.strip()) for section in single + double) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings like `SECTION 1`. (The data spells the key this way.)"""
    return len(re.findall(rf"{section_spliter}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole text is JSON, which may stand in a fence."""
    body = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(body.strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    found = re.findall(r"<<[^\n]+>>", text)
    return any(each.lstrip("<").rstrip(">").strip() for each in found)


# combination


def two_responses(text: str) -> bool:
    """Two different texts parted by six asterisks; only the outermost parts may be empty."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


# startend


def end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# change_case


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Words all in capitals, `A`, `U.S.` and `COVID-19` among them."""
    words = re.findall(r"\w+(?:[-'’./]\w+)*", text)
    return relation_holds(
        sum(word.isupper() for word in words), capital_relation, capital_frequency
    )


def english_capital(text: str) -> bool:
    return text.isupper() and language_of(text) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) == "en"


# punctuation


def no_comma(text: str) -> bool:
    return "," not in text


_TITLES = r"(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|inc|ltd|co|no|fig|al)"
_ABBREVIATION = re.compile(rf"(?<!\w)(?:(?i:{_TITLES})|[A-Z]|\w(?:\.\w)+)\.$")
_END = re.compile(r"[.!?…]+[\"')\]*”’]*(?=\s|$)|[。！？]")


def sentences(text: str) -> int:
    """Sentences: texts up to `.`, `!` or `?` before a space, and a rest without one.

    An end after an abbreviation or an initial is none. This differs from nltk's splitter where
    abbreviations are rare ones: see benchmarks/results/verifiers.md for how often.
    """
    count, start = 0, 0
    for end in _END.finditer(text):
        before = text[start : end.start() + 1]
        if _ABBREVIATION.search(before):
            continue
        count, start = count + bool(before.strip()), end.end()
    return count + bool(text[start:].strip())
