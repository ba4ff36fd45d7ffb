"""IFEval: whether a response follows its verifiable instructions (arXiv 2311.07911, table 1).

One function for each of the 25; its keyword arguments are those of the data. Where the paper's
words leave room (what is a bullet, may a paragraph be empty), the verdicts published with GPT-4's
answers decide. Strict judges the response as it is. Loose also accepts it without its first line,
its last line or both, and each of these without asterisks. An unknown instruction is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.rl.verifiers.english import sentences, tokens, words
from tessera.rl.verifiers.language import UndetectedError, language_of
from tessera.rl.verifiers.outcome import Outcome, unjudged
from tessera.table import nearest

RELATIONS = ("at least", "less than")


def holds(count: int, relation: str, bound: int) -> bool:
    """Whether a count is at least, or less than, a bound."""
    return count >= bound if relation == "at least" else count < bound


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    escaped = map(re.escape, forbidden_words)
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in escaped)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs parted by `***`; only the first and the last of the parts may be empty."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


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


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript after its marker; `P.S.` and `P.P.S` may be spaced, and in either case."""
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(postscript_marker, re.escape(postscript_marker.lower()))
    return bool(re.search(pattern, text.lower()))


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many `*sections*` or `**sections**`, of one line each and not empty."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(section.strip()) for section in single + double) >= num_highlights


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


def two_responses(text: str) -> bool:
    """Two different texts parted by six asterisks; only the outermost parts may be empty."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# By the data's names; the keyword arguments are the data's, too.
CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, *, keywords: all(
        re.search(re.escape(keyword), text, re.IGNORECASE) for keyword in keywords
    ),
    "keywords:frequency": lambda text, *, keyword, frequency, relation: holds(
        len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency
    ),
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": lambda text, *, letter, let_frequency, let_relation: holds(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, *, language: language_of(text)[0] == language,
    "length_constraints:number_sentences": lambda text, *, num_sentences, relation: holds(
        len(sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, *, num_words, relation: holds(
        len(words(text)), relation, num_words
    ),
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, *, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    # Exactly so many lines that begin with `-`, or with one `*`.
    "detectable_format:number_bullet_lists": lambda text, *, num_bullets: (
        len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(
        f"My answer is {word}." in text for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    # At least so many headings like `SECTION 1`. (The data spell the key this way.)
    "detectable_format:multiple_sections": lambda text, *, section_spliter, num_sections: (
        len(re.findall(rf"{section_spliter}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda text, *, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, *, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": quotation,
    # Words all in capitals, `A`, `U.S.`, and `I` of `I'm` among them.
    "change_case:capital_word_frequency": (
        lambda text, *, capital_frequency, capital_relation: holds(
            sum(map(str.isupper, tokens(text))), capital_relation, capital_frequency
        )
    ),
    "change_case:english_capital": lambda text: text.isupper() and language_of(text)[0] == "en",
    "change_case:english_lowercase": lambda text: text.islower() and language_of(text)[0] == "en",
    "punctuation:no_comma": lambda text: "," not in text,
}


class InstructionError(ValueError):
    """An instruction that is not known, or that lacks an argument; the text says which."""


@dataclass(frozen=True)
class Instruction:
    """One constraint with its arguments, known to fit each other."""

    name: str
    arguments: dict[str, Any]


def read_instructions(
    names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]
) -> list[Instruction]:
    """IFEval's `instruction_id_list` and `kwargs`, nulls left out. Raises InstructionError."""
    if len(names) != len(arguments):
        raise InstructionError(
            f"{len(names)} instructions, but {len(arguments)} sets of arguments; give one each"
        )
    found = []
    for name, given in zip(names, arguments, strict=True):
        if name not in CONSTRAINTS:
            raise InstructionError(
                f"there is no instruction {name!r}; {nearest(name, CONSTRAINTS)}"
            )
        present = {key: value for key, value in (given or {}).items() if value is not None}
        parameters = inspect.signature(CONSTRAINTS[name]).parameters.values()
        wanted = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
        if present.keys() != wanted:
            raise InstructionError(
                f"{name} takes {', '.join(sorted(wanted)) or 'no arguments'}, "
                f"but was given {', '.join(sorted(present)) or 'none'}"
            )
        for key in present.keys() & {"relation", "let_relation", "capital_relation"}:
            if present[key] not in RELATIONS:
                raise InstructionError(
                    f"{name}: {present[key]!r} is no relation; allowed: {', '.join(RELATIONS)}"
                )
        found.append(Instruction(name, present))
    return found


def verify_instructions(
    response: str,
    names: Sequence[str],
    arguments: Sequence[Mapping[str, Any] | None],
    *,
    loose: bool = False,
    partial: bool = False,
) -> Outcome:
    """Whether a response follows all instructions. partial: scores the share that it follows."""
    if not names:
        return unjudged("there are no instructions")
    followed = follow_list(response, read_instructions(names, arguments), loose=loose)
    undecided = [n for n, each in zip(names, followed, strict=True) if each is None]
    if undecided:
        return unjudged(f"the language could not be told for {', '.join(undecided)}")
    broken = [name for name, each in zip(names, followed, strict=True) if not each]
    score = 1 - len(broken) / len(names) if partial else float(not broken)
    reason = f"not followed: {', '.join(broken)}" if broken else ""
    return Outcome("wrong" if broken else "right", score, reason)


def follow_list(
    response: str, instructions: Sequence[Instruction], *, loose: bool = False
) -> list[bool | None]:
    """For each instruction whether it is followed, None where that could not be told."""
    texts = list(variants(response)) if loose else [response]
    found: list[bool | None] = []
    for instruction in instructions:
        verdicts: list[bool | None] = []
        for text in texts:
            try:  # an empty text follows nothing
                check = CONSTRAINTS[instruction.name]
                verdicts.append(bool(text.strip()) and check(text, **instruction.arguments))
            except UndetectedError:
                verdicts.append(None)
            if verdicts[-1]:
                break
        found.append(True if any(verdicts) else None if None in verdicts else False)
    return found


def variants(response: str) -> Iterator[str]:
    """What loose judging looks at: without first line, last line, both; each without asterisks."""
    lines = response.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip() if part is not lines else response
        yield text
        yield text.replace("*", "")
