"""Completions up to the stop string of their answer, whatever their thought says."""

from __future__ import annotations

import dataclasses

import pytest

from tessera.data.tokenizer import byte_tokenizer
from tessera.eval.harness import Answer, Wanted, complete
from tessera.generate.engine import GenerationError, SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tests import tiny

TOKENIZER = byte_tokenizer()
PARAMS = SamplingParams(max_tokens=24, temperature=0, stop_token_ids=TOKENIZER.eos_ids)
PROMPTS = [TOKENIZER.encode(text, bos=True) for text in ("one", "another", "a third of them")]


def engine(batch: int = 64) -> TorchEngine:
    return TorchEngine(tiny.model(vocab_size=TOKENIZER.vocab_size), max_batch_size=batch)


def read(text: str, stops: tuple[str, ...] = (), prompt: str = "", keep: bool = False) -> str:
    wanted = Wanted(TOKENIZER.encode(prompt), PARAMS, stops, keep_thought=keep)
    answer = Answer(TOKENIZER, wanted)
    for token in TOKENIZER.encode(text):
        if answer.push(token):
            break
    return answer.finish()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("a\n\nb", ("\n\n",)), "a"),
        (("a\nb\n", ("\n\n",)), "a\nb\n"),
        (("<think>a\n\nb</think>\n\nc\n\nd", ("\n\n",)), "c"),
        (("<think>a\n\nb</think>\n\nc\n\nd", ("\n\n",), "", True), "<think>a"),
        (("a\n\nb</think>\n\nc\n\nd", ("\n\n",), "x<think>\n"), "c"),
        (("<think>a\n\nb", ()), ""),
        (("a</think>\n\nb</think>", ()), "a</think>\n\nb</think>"),
        (("caf\u00e9 \u20ac", ("\u20ac",)), "caf\u00e9 "),
    ],
)
def test_a_stop_string_counts_in_the_answer_alone(given: tuple, text: str):
    assert read(*given) == text


def test_texts_are_those_of_the_engine_and_a_stop_string_saves_the_rest():
    expected = [TOKENIZER.decode(c.token_ids) for (c,) in engine().generate(PROMPTS, PARAMS)]
    wanted = [Wanted(prompt, PARAMS) for prompt in PROMPTS]
    for batch in (1, 2, 64):
        found = dict(complete(engine(batch), TOKENIZER, wanted, room=64))
        assert [found[i] for i in range(3)] == expected
    stops = tuple(text[4] for text in expected)
    cut = [min(text.find(stop) for stop in stops if stop in text) for text in expected]
    stopped = [dataclasses.replace(one, stops=stops) for one in wanted]
    saving, whole = engine(), engine()
    found = dict(complete(saving, TOKENIZER, stopped, room=64))
    assert [found[i] for i in range(3)] == [t[:n] for t, n in zip(expected, cut, strict=True)]
    list(complete(whole, TOKENIZER, wanted, room=64))
    assert saving.stats.decode_tokens < whole.stats.decode_tokens


def test_a_completion_ends_with_its_room_and_one_that_is_left_is_cancelled():
    wanted = [Wanted(prompt, PARAMS) for prompt in PROMPTS]
    room = len(PROMPTS[2]) + 3
    found = dict(complete(engine(1), TOKENIZER, wanted[2:], room=room))
    (whole,) = engine().generate(PROMPTS[2:], PARAMS)[0]
    assert found == {0: TOKENIZER.decode(whole.token_ids[:3])}
    left = engine(1)
    for _ in complete(left, TOKENIZER, wanted, room=64):
        break
    left.step()
    assert left.idle
    with pytest.raises(GenerationError, match="max_tokens is 0"):
        list(complete(engine(), TOKENIZER, wanted, room=len(PROMPTS[2])))
