"""Streamed text is the whole text, cut anywhere: no half character, no part of a stop string."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tessera.data.thought import Thought, split
from tessera.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from tessera.generate.engine import GenerationError, SamplingParams
from tessera.generate.text import (
    Detokenizer,
    StopStrings,
    TextStream,
    completion_text,
    opens_thought,
    stop_criterion,
    thinking_budget,
)
from tessera.generate.torch_engine import TorchEngine
from tests import tiny

TEXTS = (
    "plain words, and a second sentence.\n\nA paragraph.",
    "naïve façade — 東京タワー 👩🏽‍🚀 and 🇩🇪 flags, ﷽",
    "  leading space, tabs\t\t and   many    spaces ",
    "\ufffd is a character too\ufffd\ufffd",
)
BPE = train_bpe([text * 5 for text in TEXTS] + ["<think>\nhm.\n</think>\n\nyes"] * 20, 400)


def tokenizers(shared):
    yield byte_tokenizer()
    yield BPE
    yield load_tokenizer(shared / "models" / "stories260k")


def streamed(tokenizer, ids, context=()) -> list[str]:
    stream = Detokenizer(tokenizer, context)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_is_half_a_character(shared, text):
    for tokenizer in tokenizers(shared):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in tokenizer.decode(ids):
            assert "\ufffd" not in "".join(pieces)


def test_a_text_goes_on_after_its_prompt(shared):
    for tokenizer in tokenizers(shared):
        ids = tokenizer.encode("Once upon a time, there was a little girl. She liked the park.")
        for cut in range(1, len(ids)):
            head, tail = ids[:cut], ids[cut:]
            whole = tokenizer.decode(ids).removeprefix(tokenizer.decode(head))
            assert "".join(streamed(tokenizer, tail, head)) == whole


def test_any_bytes_stream_to_what_they_decode_to():
    tokenizer, draw = byte_tokenizer(), random.Random(0)
    for _ in range(200):
        ids = [draw.choice((draw.randrange(256), 0xE2, 0x82, 0xAC)) for _ in range(20)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_never_become_a_character_are_given_out_at_last():
    tokenizer = byte_tokenizer()
    (broken,) = {tokenizer.encode("\u00ff")[1]}  # a continuation byte
    pieces = streamed(tokenizer, [broken] * 100)
    assert "".join(pieces) == "\ufffd" * 100 and pieces[:60] != [""] * 60


def cuts(text: str, draw: random.Random) -> list[str]:
    places = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("stops", [("abc",), ("ab", "bca"), ("aab", "b"), ("abcd", "bc"), ()])
def test_a_text_is_cut_before_the_stop_string_that_is_complete_first(stops):
    draw = random.Random(1)
    for _ in range(400):
        text = "".join(draw.choices("abcd", k=12))
        ends = [(i, -len(s)) for i in range(1, 13) for s in stops if text[:i].endswith(s)]
        wanted = text[: sum(min(ends))] if ends else text
        stopper, given = StopStrings(stops), ""
        for piece in cuts(text, draw):
            given += stopper.push(piece)
            assert wanted.startswith(given)
        assert given + stopper.flush() == wanted and stopper.stopped == bool(ends)


def test_what_cannot_begin_a_stop_string_is_not_held_back():
    stopper = StopStrings(["</tool>"])
    assert stopper.push("a < b <") == "a < b "
    assert stopper.push("/tea") == "</tea"
    with pytest.raises(GenerationError, match="a stop string is empty"):
        StopStrings(["x", ""])


def test_a_stream_counts_the_tokens_of_the_thought_and_ends_at_a_stop_string():
    ids = BPE.encode("<think>\nhm.\n</think>\n\nyes, END and more")
    stream, found = TextStream(BPE, stops=["END"]), Thought()
    for token in ids:
        found += stream.push([token])
    assert found + stream.finish() == Thought("hm.", "yes, ", True) and stream.stopped
    thought = BPE.encode("<think>\nhm.\n</think>")
    assert len(thought) <= stream.thought_tokens <= len(thought) + 1  # the tag's end may be merged
    plain = TextStream(BPE, opened=None)
    assert plain.push(ids) + plain.finish() == Thought(None, BPE.decode(ids))
    assert plain.thought_tokens == 0


def test_a_watched_request_ends_with_the_token_that_completes_the_stop_string():
    tokenizer = byte_tokenizer()
    engine = TorchEngine(tiny.model(vocab_size=tokenizer.vocab_size))
    params = SamplingParams(max_tokens=40, n=3, seed=1)
    for free in engine.generate([[1, 2]], params)[0]:
        text = tokenizer.decode(free.token_ids)
        stop = next(character for character in text[10:] if character.isascii())
        watched = engine.submit(
            [1, 2], params, stopping=stop_criterion(tokenizer, [stop, "never"], [1, 2])
        )
        while engine.step():
            pass
        for done in watched.completions:
            if done.finish_reason == "stop":
                assert stop in tokenizer.decode(done.token_ids)
                assert stop not in tokenizer.decode(done.token_ids[:-1])
            else:
                assert stop not in tokenizer.decode(done.token_ids)


@pytest.mark.parametrize("before", ["", "\n", "a.", "well"])
@pytest.mark.parametrize("behind", ["", "\n\n", "so"])
def test_a_budget_knows_the_tags_as_they_are_tokenised(before, behind):
    for tokenizer in (byte_tokenizer(), BPE):
        thinking = thinking_budget(tokenizer, 9)
        assert tokenizer.decode(thinking.ends[0]) == "\n</think>\n\n"
        ids = tokenizer.encode(f"<think>{before}</think>{behind}")
        assert any(tuple(ids[: len(start)]) == start for start in thinking.starts)
        places = range(len(ids))
        assert any(tuple(ids[i : i + len(end)]) == end for i in places for end in thinking.ends)
        assert thinking_budget(tokenizer, 9, opened=True) == replace(thinking, starts=())


def test_a_prompt_opens_a_thought_where_the_tag_is_the_last_thing_in_it():
    tokenizer = train_bpe(["a cat thought of fish"] * 9, 300, ["<think>", "</think>"])
    prompts = ("hm <think>", "hm <think>\n", "<think> hm", "<think></think>", "hm")
    opens = [opens_thought(tokenizer, tokenizer.encode(one, special=True)) for one in prompts]
    assert opens == [True, True, False, False, False]


def test_what_was_said_ends_before_its_stop_token_and_begins_with_the_tag_of_its_prompt():
    for prompt, text in (("hm <think>\n", "a cat</think>fish"), ("hm", "<think>a cat</think>fish")):
        asked, tokens = BPE.encode(prompt, special=True), BPE.encode(text, special=True)
        for ending in ([], [BPE.eos_ids[0]]):
            assert completion_text(BPE, asked, tokens + ending) == "<think>a cat</think>fish"
    assert (
        completion_text(BPE, BPE.encode("hm"), [BPE.eos_ids[0]])
        == completion_text(BPE, [], [])
        == ""
    )


def test_a_budget_closes_the_thought_in_the_text():
    tokenizer = byte_tokenizer()
    engine = TorchEngine(tiny.model(vocab_size=tokenizer.vocab_size))
    prompt = tokenizer.encode("<think>\n")
    thinking = thinking_budget(tokenizer, 10, opened=True)
    params = SamplingParams(max_tokens=40, seed=4, n=4, thinking=thinking)
    for done in engine.generate([prompt], params)[0]:
        text = tokenizer.decode(done.token_ids)
        assert text.count("</think>") == 1
        assert tokenizer.decode(done.token_ids[10:]).startswith("\n</think>\n\n")
        stream = TextStream(tokenizer, prompt, opened=True)
        assert stream.push(done.token_ids) + stream.finish() == split(text, opened=True)
        assert stream.thought_tokens == 10 + len("\n</think>")
