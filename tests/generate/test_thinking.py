"""A thought ends where the model ends it or where its budget does; the answer is the model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tessera.generate.engine import SamplingParams, Thinking
from tessera.generate.requests import ThoughtBudget
from tessera.generate.torch_engine import TorchEngine
from tests import tiny

OPEN, CLOSE, MERGED = (7,), (5, 6), (5, 9)
PARAMS = SamplingParams(max_tokens=20, temperature=0.9, n=2, seed=3)


def follow(thinking: Thinking, tokens: list[int]) -> list[int]:
    """The tokens that come when the model would say `tokens`."""
    thought, said = ThoughtBudget(thinking), []
    for token in tokens:
        said.append(token if thought.forced is None else thought.forced)
        thought.push(said[-1])
    return said


@pytest.mark.parametrize(
    "budget, wanted, said",
    [
        (9, [1, 5, 6, 2, 2], [1, 5, 6, 2, 2]),
        (9, [1, 5, 9, 2, 2], [1, 5, 9, 2, 2]),
        (2, [1, 1, 1, 1, 1, 1], [1, 1, 5, 6, 1, 1]),
        (0, [1, 1, 1, 1], [5, 6, 1, 1]),
        (2, [1, 5, 1, 1, 1], [1, 5, 6, 1, 1]),
        (2, [1, 5, 9, 1, 1], [1, 5, 6, 1, 1]),
        (3, [1, 1, 5, 6, 1, 1], [1, 1, 5, 6, 1, 1]),
    ],
    ids=["in time", "in time, merged", "forced", "at once", "begun", "begun and turned", "last"],
)
def test_the_end_is_forced_once_and_only_when_the_budget_is_spent(budget, wanted, said):
    assert follow(Thinking(budget, (CLOSE, MERGED)), wanted) == said


def test_an_end_the_model_has_begun_is_the_one_completed():
    thinking = Thinking(2, (CLOSE, (8, 3, 4)))
    assert follow(thinking, [1, 8, 1, 1, 1]) == [1, 8, 3, 4, 1]


def test_what_never_opens_is_no_thought():
    thinking = Thinking(1, (CLOSE,), (OPEN,))
    assert follow(thinking, [1] * 9) == [1] * 9
    assert follow(thinking, [1, 7, 1, 1, 1, 1]) == [1, 7, 1, 5, 6, 1]
    thought = ThoughtBudget(thinking)
    for token in (7, 5, 6):
        assert thought.stage != "answering"
        thought.push(token)
    assert thought.stage == "answering"


@pytest.mark.parametrize("slots", [1, 3, 64])
@torch.no_grad()
def test_after_the_forced_end_the_model_goes_on_from_it(slots):
    """Up to the budget as if there were none; then the end; then what follows from both."""
    module, prompt = tiny.model(), [1, 2, 3]
    engine = TorchEngine(module, max_batch_size=slots)
    limited = replace(PARAMS, thinking=Thinking(4, ((5, 6, 5, 6, 8),)))
    handles = [engine.submit(prompt, params, key=1) for params in (limited, PARAMS)]
    while engine.step():
        pass
    for done, free in zip(*(handle.completions for handle in handles), strict=True):
        assert done.token_ids[:4] == free.token_ids[:4]
        assert done.token_ids[4:9] == [5, 6, 5, 6, 8]
        assert len(done.token_ids) == 20
        tokens = torch.tensor([prompt + done.token_ids])
        table = module.logits(module(tokens))[0, 2:-1].log_softmax(-1)
        expected = table.gather(-1, tokens[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-5, rtol=0)


def test_a_greedy_answer_is_that_of_the_prompt_with_the_thought():
    engine, prompt = TorchEngine(tiny.model()), [1, 2, 3]
    greedy = SamplingParams(max_tokens=15, temperature=0, thinking=Thinking(3, ((5, 6),)))
    (done,) = engine.generate([prompt], greedy)[0]
    head = done.token_ids[:5]
    rest = engine.generate([prompt + head], replace(greedy, max_tokens=10, thinking=None))
    assert head[3:] == [5, 6] and done.token_ids[5:] == rest[0][0].token_ids
