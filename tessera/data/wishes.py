"""Requests in words with constraints that a program can check, in the manner of IFEval.

    Write a few sentences about the sea. Do not use any commas. Use the word "bright".

What is asked, a topic, and as many constraints as the level says. Their names and arguments are
those of IFEval's data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ASKED = (
    "Write a few sentences about {}.", "Write a short paragraph about {}.", "Describe {} briefly.",
    "Tell a child about {} in a few sentences.", "Write a short letter to a friend about {}.",
    "Explain in a few words why people like {}.", "Give short advice about {}.",
    "Write a short advertisement for {}.", "Write a very short story about {}.",
)  # fmt: skip
TOPICS = (
    "the sea", "a rainy day", "learning to cook", "a lost dog", "the moon", "an old library",
    "riding a bicycle", "growing tomatoes", "a trip by train", "baking bread", "a city in winter",
    "friendship", "a small garden", "playing chess", "the first day at school", "a long walk",
    "healthy food", "a birthday party", "swimming in a lake", "a busy market", "good sleep",
    "a new phone", "drinking water", "a mountain village", "music", "saving money", "birds",
    "a job interview", "keeping a cat", "reading every day", "a storm", "coffee", "honest work",
    "a visit to a museum", "planting trees", "a football match", "the stars", "cleaning a room",
)  # fmt: skip
WORDS = (
    "bright", "quiet", "window", "river", "golden", "simple", "together", "morning", "gentle",
    "future", "strong", "little", "always", "wonder", "careful", "green", "summer", "journey",
    "family", "secret", "stone", "dream", "fresh", "paper", "silver", "early", "people", "great",
    "time", "good", "many", "world", "life", "place", "love", "small", "home", "water", "light",
)  # fmt: skip
PHRASES = (
    "That is all.", "Thank you for reading.", "Have a nice day.", "Is there anything else?",
    "See you soon.", "And that was that.", "I hope this helps.", "The end.", "Good luck to you.",
    "What do you think?", "Peace and joy.", "Until next time.", "Take care of yourself.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constraint:
    """What is said, and the instruction and arguments by which it is checked."""

    said: str
    name: str
    arguments: dict[str, Any]


Draw = Callable[[np.random.Generator, bool], Constraint]


def _one(rng: np.random.Generator, texts: Sequence[str], held: bool | None = None) -> str:
    """One of some texts; with `held`, one of every fourth from the first, or of the others."""
    if held is not None:
        texts = [text for i, text in enumerate(texts) if (i % 4 == 0) == held]
    return texts[int(rng.integers(len(texts)))]


def _said(name: str, *texts: str, **arguments: Any) -> Draw:
    """A constraint without numbers, in one of its wordings."""
    return lambda rng, held: Constraint(_one(rng, texts, held), name, arguments)


def _counted(name: str, key: str, low: int, high: int, *texts: str, **more: Any) -> Draw:
    """A constraint of a number from low to high, which stands for {n}; multiples of 3 held out."""

    def draw(rng: np.random.Generator, held: bool) -> Constraint:
        n = int(rng.choice([n for n in range(low, high + 1) if (n % 3 == 0) == held]))
        return Constraint(_one(rng, texts).format(n=n), name, {key: n, **more})

    return draw


def _keywords(name: str, key: str, *texts: str) -> Draw:
    def draw(rng: np.random.Generator, held: bool) -> Constraint:
        found = [_one(rng, words, held) for words in (WORDS[:20], WORDS[20:])]
        one, two = (f'"{word}"' for word in found)
        return Constraint(_one(rng, texts).format(one=one, two=two), name, {key: found})

    return draw


def _end(rng: np.random.Generator, held: bool) -> Constraint:
    phrase = _one(rng, PHRASES, held)
    texts = ('End with exactly these words: "{}"', 'The last words must be "{}"')
    said = _one(rng, texts).format(phrase)
    return Constraint(said, "startend:end_checker", {"end_phrase": phrase})


# By groups: constraints of one group may contradict each other, so a wish has one of each at most.
KINDS: tuple[tuple[Draw, ...], ...] = (
    (
        _said(
            "change_case:english_lowercase",
            "Use only lowercase letters.", "Write everything in lowercase.",
            "No capital letters are allowed.", "Your whole answer must be in lowercase letters.",
        ),
        _said(
            "change_case:english_capital",
            "Use only capital letters.", "Write everything in capital letters.",
            "Your whole answer must be in capitals.", "No lowercase letters are allowed.",
        ),
        _counted(
            "detectable_format:multiple_sections", "num_sections", 2, 4,
            "Part it into {n} sections that begin with SECTION 1, SECTION 2 and so on.",
            "Write {n} sections and mark each as SECTION X.", section_spliter="SECTION",
        ),
        _said(
            "detectable_content:postscript",
            "At the end, add a postscript that begins with P.S.", "Add a postscript after P.S.",
            "Close with a postscript starting with P.S.",
            postscript_marker="P.S.",
        ) ,
    ),
    (
        _said(
            "punctuation:no_comma",
            "Do not use any commas.", "Use no commas at all.", "Commas are not allowed.",
            "Your answer must not contain a comma.", "Avoid commas.", "Write without commas.",
        ),
        _counted(
            "length_constraints:number_sentences", "num_sentences", 2, 6,
            "Write fewer than {n} sentences.", "Use less than {n} sentences.", relation="less than",
        ),
        _counted(
            "length_constraints:number_words", "num_words", 20, 60,
            "Use less than {n} words.", "Write fewer than {n} words.", relation="less than",
        ),
        _counted(
            "length_constraints:number_words", "num_words", 25, 60,
            "Use at least {n} words.", "Write {n} or more words.", relation="at least",
        ),
    ),
    (
        _counted(
            "detectable_format:number_bullet_lists", "num_bullets", 2, 5,
            'Write exactly {n} bullet points that begin with "* ".',
            "Your answer must be a list of exactly {n} points, each marked with *.",
        ),
        _counted(
            "detectable_format:number_highlighted_sections", "num_highlights", 1, 4,
            "Highlight at least {n} parts like *this part*.",
            "Mark {n} or more phrases with asterisks, as in *a phrase*.",
        ),
        _said(
            "detectable_format:title",
            "Give it a title in double angular brackets, like <<my title>>.",
            "Begin with a title such as <<the title>>.",
            "It must have a title wrapped in double angular brackets, i.e. <<title>>.",
        ),
        _counted(
            "detectable_content:number_placeholders", "num_placeholders", 1, 4,
            "Use at least {n} placeholders in square brackets, such as [name].",
            "Include {n} or more placeholders like [address].",
        ),
    ),
    (
        _said(
            "startend:quotation",
            "Wrap your whole answer in double quotation marks.",
            "Begin and end your answer with a double quotation mark.",
            "Put the entire answer in double quotes.",
        ),
        _end,
    ),
    (
        _keywords(
            "keywords:existence", "keywords",
            "Use the words {one} and {two}.", "Include the keywords {one} and {two}.",
        ),
        _keywords(
            "keywords:forbidden_words", "forbidden_words",
            "Do not use the words {one} and {two}.", "The words {one} and {two} are forbidden.",
        ),
    ),
)  # fmt: skip


def draw(rng: np.random.Generator, level: int, held: bool) -> tuple[str, list[Constraint]]:
    """A request with `level` constraints of different groups, and the constraints alone.

    held: topic, wordings, numbers, words and phrases are those that other wishes never have.
    """
    groups = rng.choice(len(KINDS), size=min(level, len(KINDS)), replace=False)
    found = [KINDS[g][int(rng.integers(len(KINDS[g])))](rng, held) for g in groups]
    asked = _one(rng, ASKED).format(_one(rng, TOPICS, held))
    return " ".join([asked, *(one.said for one in found)]), found
