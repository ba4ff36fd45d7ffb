"""Whether a response follows its instructions: IFEval's 25, strict and loose (arXiv 2311.07911).

Strict judges the response as it is. Loose also accepts it without its first line, its last line,
both, and each of these without asterisks: what a polite opening or Markdown alone breaks.

An instruction that is not known, or whose arguments are not those it takes, is an error: in other
checkers such a constraint passes everything, which as a reward is free.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.rl.verifiers import constraints
from tessera.rl.verifiers.language import UndetectedError
from tessera.rl.verifiers.outcome import Outcome, unjudged
from tessera.runs.recipe import nearest

CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": constraints.capital_word_frequency,
    "change_case:english_capital": constraints.english_capital,
    "change_case:english_lowercase": constraints.english_lowercase,
    "combination:repeat_prompt": constraints.repeat_prompt,
    "combination:two_responses": constraints.two_responses,
    "detectable_content:number_placeholders": constraints.number_placeholders,
    "detectable_content:postscript": constraints.postscript,
    "detectable_format:constrained_response": constraints.constrained_response,
    "detectable_format:json_format": constraints.json_format,
    "detectable_format:multiple_sections": constraints.multiple_sections,
    "detectable_format:number_bullet_lists": constraints.number_bullet_lists,
    "detectable_format:number_highlighted_sections": constraints.number_highlighted_sections,
    "detectable_format:title": constraints.title,
    "keywords:existence": constraints.existence,
    "keywords:forbidden_words": constraints.forbidden_words,
    "keywords:frequency": constraints.frequency,
    "keywords:letter_frequency": constraints.letter_frequency,
    "language:response_language": constraints.response_language,
    "length_constraints:nth_paragraph_first_word": constraints.nth_paragraph_first_word,
    "length_constraints:number_paragraphs": constraints.number_paragraphs,
    "length_constraints:number_sentences": constraints.number_sentences,
    "length_constraints:number_words": constraints.number_words,
    "punctuation:no_comma": constraints.no_comma,
    "startend:end_checker": constraints.end_checker,
    "startend:quotation": constraints.quotation,
}


class InstructionError(ValueError):
    """An instruction that is not known, or that lacks an argument; the text says which."""


@dataclass(frozen=True)
class Instruction:
    """One constraint of the registry with its arguments, known to fit each other."""

    name: str
    arguments: dict[str, Any]

    def followed(self, text: str) -> bool:
        """Whether a text follows it; an empty text follows nothing. Raises UndetectedError."""
        return bool(text.strip()) and CONSTRAINTS[self.name](text, **self.arguments)


def read_instructions(
    names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]
) -> list[Instruction]:
    """IFEval's `instruction_id_list` and `kwargs`, position by position; null arguments are none.

    Raises InstructionError for an unknown name or argument, and for one that is missing.
    """
    if len(names) != len(arguments):
        raise InstructionError(
            f"{len(names)} instructions, but {len(arguments)} sets of arguments; give one each"
        )
    return [_instruction(name, given or {}) for name, given in zip(names, arguments, strict=True)]


def _instruction(name: str, given: Mapping[str, Any]) -> Instruction:
    if name not in CONSTRAINTS:
        raise InstructionError(f"there is no instruction {name!r}; {nearest(name, CONSTRAINTS)}")
    present = {key: value for key, value in given.items() if value is not None}
    wanted = _keys(name)
    if present.keys() != wanted:
        raise InstructionError(
            f"{name} takes {', '.join(sorted(wanted)) or 'no arguments'}, "
            f"but was given {', '.join(sorted(present)) or 'none'}"
        )
    for key in present.keys() & {"relation", "let_relation", "capital_relation"}:
        try:
            constraints.relation_holds(0, present[key], 0)
        except ValueError as error:
            raise InstructionError(f"{name}: {error}") from None
    return Instruction(name, present)


@functools.cache
def _keys(name: str) -> frozenset[str]:
    parameters = inspect.signature(CONSTRAINTS[name]).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def verify_instructions(
    response: str,
    names: Sequence[str],
    arguments: Sequence[Mapping[str, Any] | None],
    *,
    loose: bool = False,
    partial: bool = False,
) -> Outcome:
    """Whether a response follows all of its instructions.

    partial: the score is the share that it follows; the verdict stays that of all of them.
    Raises InstructionError.
    """
    followed = follow_list(response, read_instructions(names, arguments), loose=loose)
    undecided = [n for n, each in zip(names, followed, strict=True) if each is None]
    if undecided:
        return unjudged(f"the language could not be told for {', '.join(undecided)}")
    broken = [name for name, each in zip(names, followed, strict=True) if not each]
    score = 1 - len(broken) / len(names) if partial and names else float(not broken)
    reason = f"not followed: {', '.join(broken)}" if broken else ""
    return Outcome("wrong" if broken else "right", score, reason)


def follow_list(
    response: str, instructions: Sequence[Instruction], *, loose: bool = False
) -> list[bool | None]:
    """For each instruction whether it is followed, None where that could not be told."""
    texts = list(variants(response)) if loose else [response]
    return [_any_followed(texts, instruction) for instruction in instructions]


def _any_followed(texts: Sequence[str], instruction: Instruction) -> bool | None:
    undecided = False
    for text in texts:
        try:
            if instruction.followed(text):
                return True
        except UndetectedError:
            undecided = True
    return None if undecided else False


def variants(response: str) -> Iterator[str]:
    """What loose judging looks at: without first line, last line, both; each without asterisks."""
    lines = response.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip() if part is not lines else response
        yield text
        yield text.replace("*", "")
