"""Thought and answer are told apart by one rule, wherever a text is read or cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.ask.ask import Reply
from tessera.data.conversation import Chat, tidy
from tessera.data.switch import obeys
from tessera.data.template import LLAMA3, Template
from tessera.data.thought import CLOSE, OPEN, Splitter, Thought, split, split_message
from tessera.rl.rewards import Sample

# text, whether the prompt opened the thought, thought, answer, closed
CASES = [
    ("<think>\nhm\n</think>\n\nyes", False, "hm", "yes", True),
    ("\n<think>a <b> c</think>yes\n", False, "a <b> c", "yes\n", True),
    ("hm\n</think>\n\nyes", True, "hm", "yes", True),
    ("a</think>b", False, None, "a</think>b", False),  # nobody opened it: it is spoken of
    ("a</think>b</think>c", True, "a", "b</think>c", True),
    ("</think>a<think>b", True, "", "a<think>b", True),
    ("</think>a<think>b", False, None, "</think>a<think>b", False),
    ("<think>a</think>b</think>c", False, "a", "b</think>c", True),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>", True),
    ("<think></think> <think>", False, "", "<think>", True),
    ("<think>cut off \n", False, "cut off", "", False),
    ("cut off", True, "cut off", "", False),
    ("a </thin", True, "a </thin", "", False),
    ("", True, "", "", False),
    ("no thought <think>x</think>", False, None, "no thought <think>x</think>", False),
    ("no thought <think>x", False, None, "no thought <think>x", False),
    (" plain", False, None, " plain", False),
    ("<thin", False, None, "<thin", False),
    ("", False, None, "", False),
]


def streamed(pieces: list[str], opened: bool) -> Thought:
    splitter, found = Splitter(opened), Thought()
    for piece in pieces:
        found += splitter.push(piece)
    return found + splitter.flush()


def cuts(text: str, draw: random.Random) -> list[str]:
    places = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("text", "opened", "thought", "answer", "closed"), CASES)
def test_every_reader_splits_a_text_alike(
    text: str, opened: bool, thought: str | None, answer: str, closed: bool
):
    found = split(text, opened)
    assert found == Thought(thought, answer, closed)
    written = OPEN + text if opened else text  # as rewards and evaluations are given it
    assert split(written) == found
    assert Sample([], written, {}).answer == Reply(written).answer.strip() == answer.strip()
    message = {"role": "assistant", "content": written}
    assert split_message(message) == found
    ask: Any = {"role": "user", "content": "?"}
    builtin = Template(LLAMA3, {"bos_token": ""})
    alone = {**message, "content": answer, "reasoning_content": ""}
    assert builtin.render([ask, message]) == builtin.render([ask, alone])
    assert Chat([ask, message]).mode == ("off" if thought is None else "on")
    tags = (written.count(OPEN), written.count(CLOSE))
    obedient = tags == (1, 1) and closed and bool(answer.strip())
    assert obeys(text, "on", opened=opened) == (obedient and thought is not None)


@settings(derandomize=True, max_examples=500)
@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "\n", " ", "x", "<", "th", "ink>", "y z"]), max_size=8),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_stream_splits_as_the_whole_text_wherever_it_is_cut(
    parts: list[str], opened: bool, draw: random.Random
):
    text = "".join(parts)
    whole = split(text, opened)
    found = streamed(cuts(text, draw), opened)
    assert found == whole
    pieces, so_far, splitter = cuts(text, draw), Thought(), Splitter(opened)
    for piece in pieces:
        so_far += splitter.push(piece)
        assert (found.thought or "").startswith(so_far.thought or "")
        assert found.answer.startswith(so_far.answer)


def test_a_lone_closing_tag_is_text():
    mention = {"role": "assistant", "content": f"A thought ends with {CLOSE}."}
    asked = {"role": "user", "content": "?"}
    apart = {"role": "assistant", "content": "4", "reasoning_content": " 2+2 "}
    alone = tidy([asked, mention])
    assert split_message(alone[1]).answer == mention["content"]
    read = tidy([asked, mention, asked, apart])
    assert split_message(read[1]).answer == mention["content"]
    assert split_message(read[3]) == Thought("2+2", "4", True)
    assert mention["content"] in Template(LLAMA3, {"bos_token": ""}).render(read)
    tagged = {"role": "assistant", "content": f"{OPEN}a{CLOSE}b"}
    assert split_message(tidy([asked, tagged, asked, apart])[1]) == Thought("a", "b", True)
