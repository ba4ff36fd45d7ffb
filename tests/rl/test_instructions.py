"""IFEval's instructions: what follows each and what does not, and the published verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.rl.verifiers.instructions import (
    CONSTRAINTS,
    InstructionError,
    follow_list,
    read_instructions,
    variants,
    verify_instructions,
)

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
# name, arguments, a text that follows, a text that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["rose", "oak"]}, "Oak and Roses", "an oak"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, **AT_LEAST}, "A cat", "a dog"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, **LESS}, "a dog", "a cat"),
    ("keywords:existence", {"keywords": ["C++"]}, "it is c++", "it is cc"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "a Rock."),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "#a #b",
        "#a",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, **AT_LEAST}, "Ah. Bo!", "A bee."),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, "two words", "three more words"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a***\n***b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        'a\n\n"So," he said',
        "a\n\nb",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a] b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\np. s. b", "a\nps b"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\nP.P.S b", "a\nP.S. b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n**b**", "**a**"),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "My answer is never."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        "*a* and * *",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSECTION b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1} is it'),
    ("detectable_format:title", {}, "<<a>>\nb", "<< >>\nb"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:two_responses", {}, "******a******b", "a******b******c"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Do it."}, "do it. Done", "Done. Do it."),
    ("startend:end_checker", {"end_phrase": "Bye."}, 'Well, "bye."', "Bye. Or not"),
    ("startend:quotation", {}, ' "a b" ', '"a b'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "U.S. only",
        "U.S. and COVID-19",
    ),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]
SPOKEN: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz.",
        "This is a quite ordinary English sentence.",
    ),
    (
        "change_case:english_capital",
        {},
        "THIS IS A QUITE ORDINARY ENGLISH SENTENCE.",
        "THIS IS A QUITE ORDINARY English SENTENCE.",
    ),
    (
        "change_case:english_lowercase",
        {},
        "this is a quite ordinary english sentence.",
        "das ist ein ganz gewöhnlicher deutscher satz.",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "follows", "breaks"), CASES + SPOKEN)
def test_each_instruction(name: str, arguments: dict[str, Any], follows: str, breaks: str):
    if (name, arguments, follows, breaks) in SPOKEN:
        pytest.importorskip("langdetect", reason="needs the extra `rl`")
    assert verify_instructions(follows, [name], [arguments]).verdict == "right"
    assert verify_instructions(breaks, [name], [arguments]).verdict == "wrong"
    assert verify_instructions("  \n", [name], [arguments]).verdict == "wrong"


def test_all_25_are_here():
    assert len(CONSTRAINTS) == 25
    assert {case[0] for case in CASES + SPOKEN} == set(CONSTRAINTS)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["keywords:exist"], [{"keywords": ["a"]}], "did you mean 'keywords:existence'"),
        (["punctuation:no_comma"], [{"num": 1}], "takes no arguments, but was given num"),
        (["keywords:existence"], [{}], "takes keywords, but was given none"),
        (["keywords:existence"], [None], "takes keywords, but was given none"),
        (["punctuation:no_comma"], [], "1 instructions, but 0 sets"),
        (
            ["length_constraints:number_words"],
            [{"relation": "about", "num_words": 3}],
            "'about' is no relation; allowed: at least, less than",
        ),
    ],
)
def test_what_is_not_known_is_an_error(names: list, arguments: list, message: str):
    with pytest.raises(InstructionError, match=message):
        verify_instructions("anything", names, arguments)


def test_no_instructions_are_not_judged():
    assert verify_instructions("a", [], []).verdict == "could-not-judge"


def test_null_arguments_are_none():
    names = ["punctuation:no_comma"] * 2
    assert verify_instructions("a", names, [{"num_words": None}, None]).verdict == "right"


def test_loose_forgives_a_polite_line_and_asterisks():
    quoted = (["startend:quotation"], [{}])
    for text in ('Sure:\n"a"', '"a"\nAnything else?', 'Sure:\n"a"\nAnything else?', '*"a"*'):
        assert verify_instructions(text, *quoted).verdict == "wrong"
        assert verify_instructions(text, *quoted, loose=True).verdict == "right"
    assert verify_instructions("Sure:\na", *quoted, loose=True).verdict == "wrong"
    assert len(list(variants("a\nb\nc"))) == 8


def test_a_language_that_cannot_be_told_is_not_judged():
    pytest.importorskip("langdetect", reason="needs the extra `rl`")
    outcome = verify_instructions("123 456", ["language:response_language"], [{"language": "de"}])
    assert outcome.verdict == "could-not-judge"


def test_a_part_followed_scores_its_share_and_is_wrong_all_the_same():
    names = ["punctuation:no_comma", "startend:quotation"]
    outcome = verify_instructions("a", names, [{}, {}], partial=True)
    assert (outcome.verdict, outcome.score) == ("wrong", 0.5)
    assert verify_instructions("a", names, [{}, {}]).score == 0.0


@pytest.mark.parametrize(("mode", "differing"), [("strict", 2), ("loose", 0)])
def test_verdicts_on_gpt4_are_the_published_ones(shared: Path, mode: str, differing: int):
    """The two that differ: the carrier's checker replaces a letter `#` or `!` by a random one."""
    pytest.importorskip("langdetect", reason="needs the extra `rl`")
    rows = {r["prompt"]: r for r in read(shared / "data/ifeval/input_data.jsonl")}
    texts = {r["prompt"]: r["response"] for r in read(shared / "data/ifeval/gpt4_responses.jsonl")}
    different = []
    for verdict in read(shared / f"data/ifeval/gpt4_verdicts_{mode}.jsonl"):
        row = rows[verdict["prompt"]]
        instructions = read_instructions(row["instruction_id_list"], row["kwargs"])
        ours = follow_list(texts[row["prompt"]], instructions, loose=mode == "loose")
        theirs = verdict["follow_instruction_list"]
        pairs = zip(instructions, ours, theirs, strict=True)
        different += [i.name for i, own, published in pairs if own != published]
    assert different == ["keywords:letter_frequency"] * differing


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
