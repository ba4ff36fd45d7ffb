"""Requests that come and go one by one get what `generate` gives, whatever happens around them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch

from tessera.generate.engine import ClosedError, GenerationError, QueueFullError, SamplingParams
from tessera.generate.requests import EngineError
from tessera.generate.torch_engine import TorchEngine
from tests import tiny

LENGTHS = (5, 2, 9, 30, 6, 21, 3, 8)
GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, n=2, seed=5, logprobs=2)

mixes = [
    (("gqa-2", "swiglu-16"), mix, ("gqa-4", "swiglu-8"))
    for mix in itertools.product(
        ("gqa-1", "gqa-4", "linear", "noop"), ("swiglu-40", "linear", "noop")
    )
]


def prompts(lengths=LENGTHS) -> list[list[int]]:
    return [tiny.tokens(29, n, seed=i).tolist() for i, n in enumerate(lengths)]


def run(engine: TorchEngine) -> None:
    while engine.step():
        pass


def tokens_of(handles) -> list[list[list[int]]]:
    return [[done.token_ids for done in handle.completions] for handle in handles]


def expected_of(module, params=SAMPLED) -> list[list[list[int]]]:
    found = TorchEngine(module).generate(prompts(), params)
    return [[done.token_ids for done in samples] for samples in found]


@pytest.mark.parametrize("words", mixes, ids=lambda words: "+".join(words[1]))
def test_late_chunked_and_crowded_requests_get_the_same_tokens(words):
    """Reading in chunks of 4 beside decoding rows = one pass over the whole prompt."""
    module = tiny.model(words)
    expected = expected_of(module)
    engine = TorchEngine(module, max_batch_size=5, chunk_tokens=4)
    handles = []
    for i, prompt in enumerate(prompts()):
        handles.append(engine.submit(prompt, SAMPLED, key=i))
        for _ in range(i):
            engine.step()
    run(engine)
    assert tokens_of(handles) == expected


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("window", [None, 5])
def test_the_size_of_a_chunk_changes_nothing(chunk, window):
    module = tiny.model(sliding_window=window)
    expected = TorchEngine(module).generate(prompts(), GREEDY)
    engine = TorchEngine(module, chunk_tokens=chunk)
    first = engine.submit([1], replace(GREEDY, max_tokens=60))
    engine.step()  # something must decode, else prompts are read whole
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts()]
    run(engine)
    assert len(first.completions[0].token_ids) == 60
    for handle, wanted in zip(handles, expected, strict=True):
        assert handle.completions[0].token_ids == wanted[0].token_ids
        found = torch.tensor(handle.completions[0].logprobs)
        torch.testing.assert_close(found, torch.tensor(wanted[0].logprobs), atol=1e-5, rtol=0)


def test_a_long_prompt_does_not_stall_who_decodes():
    engine = TorchEngine(tiny.model(), chunk_tokens=8)
    running = engine.submit([1, 2], replace(GREEDY, max_tokens=40))
    engine.step()
    long = engine.submit([3] * 50, GREEDY)
    counts = []
    while not long.completions[0].token_ids:
        engine.step()
        counts.append(len(running.completions[0].token_ids))
    assert len(counts) == 7  # 50 tokens in chunks of 8
    assert counts == list(range(counts[0], counts[0] + 7))


def test_requests_with_parameters_of_their_own_share_a_batch():
    module = tiny.model()
    params = [
        GREEDY,
        SAMPLED,
        replace(SAMPLED, top_k=3, seed=1),
        replace(SAMPLED, top_p=0.6, n=1),
        replace(SAMPLED, min_p=0.2, repetition_penalty=1.3),
        replace(GREEDY, repetition_penalty=2.0, max_tokens=20),
        replace(GREEDY, logprobs=3, stop_token_ids=(4, 11)),
        replace(SAMPLED, temperature=1.7, max_tokens=3),
    ]
    pairs = list(zip(prompts(), params, strict=True))
    expected = [TorchEngine(module).generate([prompt], one, keys=[7])[0] for prompt, one in pairs]
    engine = TorchEngine(module, max_batch_size=6, chunk_tokens=16)
    handles = [engine.submit(prompt, one, key=7) for prompt, one in pairs]
    run(engine)
    for handle, wanted, one in zip(handles, expected, params, strict=True):
        for found, other in zip(handle.completions, wanted, strict=True):
            assert found.token_ids == other.token_ids
            assert found.finish_reason == other.finish_reason
            assert [len(top) for top in found.top_logprobs] == [one.logprobs] * bool(
                one.logprobs
            ) * len(found.token_ids)


def test_the_likeliest_tokens_hold_the_greedy_one():
    (done,) = TorchEngine(tiny.model()).generate([[1, 2]], replace(GREEDY, logprobs=2))[0]
    for token, logprob, top in zip(done.token_ids, done.logprobs, done.top_logprobs, strict=True):
        assert top[0] == (token, logprob) and top[1][1] <= logprob


@torch.no_grad()
def test_the_penalty_is_about_prompt_and_completion():
    module = tiny.model()
    params = replace(GREEDY, repetition_penalty=1.7, max_tokens=20)
    given = prompts((5, 2, 9))
    for tokens, (done,) in zip(given, TorchEngine(module).generate(given, params), strict=True):
        for token in done.token_ids:
            logits = module.logits(module(torch.tensor([tokens])))[0, -1]
            for held in set(tokens):
                logits[held] *= 1.7 if logits[held] < 0 else 1 / 1.7
            assert token == logits.argmax()
            tokens.append(token)


def test_a_cancelled_request_frees_its_row_and_changes_nothing_for_others():
    module = tiny.model()
    expected = expected_of(module)
    engine = TorchEngine(module, max_batch_size=4, chunk_tokens=4)
    handles = [engine.submit(prompt, SAMPLED, key=i) for i, prompt in enumerate(prompts())]
    victims = (0, 3, 5)  # one decodes by then, one is read in chunks, one waits
    for step in range(200):
        if step in (3, 6, 9):
            handles[victims[step // 3 - 1]].cancel()
        if not engine.step():
            break
    for i, handle in enumerate(handles):
        for done, whole in zip(handle.completions, expected[i], strict=True):
            if i in victims and done.finish_reason == "cancelled":
                assert done.token_ids == whole[: len(done.token_ids)]
            else:
                assert done.token_ids == whole
    assert {handles[i].completions[0].finish_reason for i in victims} == {"cancelled"}
    assert engine.idle and engine.running == 0 and not engine.slots.starts


def test_cancelling_one_of_two_rows_leaves_room_at_the_next_step():
    engine = TorchEngine(tiny.model(), max_batch_size=1)
    first, second = (engine.submit([1, 2], replace(GREEDY, max_tokens=50)) for _ in range(2))
    engine.step()
    first.cancel()
    engine.step()
    assert first.done and len(second.completions[0].token_ids) == 2


def test_a_deadline_ends_a_request_wherever_it_is():
    engine = TorchEngine(tiny.model(), max_batch_size=1)
    params = replace(GREEDY, max_tokens=50)
    running = engine.submit([1, 2], params, timeout=0.05)
    waiting = engine.submit([1, 2], params, timeout=0.0)
    patient = engine.submit([1, 2], params, timeout=60)
    engine.step()
    assert waiting.done and waiting.completions[0].finish_reason == "timeout"
    time.sleep(0.06)
    engine.step()
    assert running.done and running.completions[0].finish_reason == "timeout"
    assert running.completions[0].token_ids
    run(engine)
    assert patient.completions[0].finish_reason == "length"


def test_a_full_queue_refuses_and_takes_again_when_it_empties():
    engine = TorchEngine(tiny.model(), max_batch_size=1, max_queue=2)
    engine.submit([1], GREEDY)
    engine.step()
    waiting = engine.submit([1], replace(GREEDY, n=2))
    with pytest.raises(QueueFullError, match="2 of 2 places are taken and 1 were asked for"):
        engine.submit([1], GREEDY)
    with pytest.raises(GenerationError, match="3 samples .* the queue holds 2 in all"):
        engine.submit([1], replace(GREEDY, n=3))
    waiting.cancel()
    engine.step()
    engine.submit([1], GREEDY)
    assert len(engine.generate([[1]] * 5, GREEDY)) == 5  # whose caller waits; no bound for it


def test_a_closed_engine_refuses_and_ends_what_it_had():
    engine = TorchEngine(tiny.model(), max_batch_size=1)
    handles = [engine.submit([1], GREEDY) for _ in range(2)]
    engine.step()
    engine.close()
    assert [handle.completions[0].finish_reason for handle in handles] == ["cancelled"] * 2
    engine.close()
    for call in (lambda: engine.submit([1], GREEDY), engine.step, lambda: engine.score([[1]])):
        with pytest.raises(ClosedError):
            call()


def test_a_failed_step_fails_its_requests_and_no_others(monkeypatch):
    module = tiny.model()
    engine = TorchEngine(module, max_batch_size=1)
    first, second = (engine.submit([1, 2, 3], GREEDY) for _ in range(2))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.slots, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    with pytest.raises(EngineError, match="division by zero"):
        first.result(timeout=0)
    run(engine)
    expected = TorchEngine(module).generate([[1, 2, 3]], GREEDY)[0][0]
    assert second.completions[0].token_ids == expected.token_ids


def test_a_stopping_criterion_ends_its_sample_and_one_that_fails_hurts_nobody_else():
    module = tiny.model()
    (whole,) = TorchEngine(module).generate([[1, 2, 3]], GREEDY)[0]
    engine = TorchEngine(module)

    def third():
        count = itertools.count(1)
        return lambda token: next(count) == 3

    watched = engine.submit([1, 2, 3], GREEDY, stopping=third)
    broken = engine.submit([1, 2, 3], GREEDY, stopping=lambda: lambda token: [][0])
    free = engine.submit([1, 2, 3], GREEDY)
    run(engine)
    assert watched.completions[0].token_ids == whole.token_ids[:3]
    assert watched.completions[0].finish_reason == "stop"
    assert free.completions[0].token_ids == whole.token_ids
    with pytest.raises(EngineError, match="list index out of range"):
        broken.result()


@pytest.mark.parametrize("words", [tiny.MOSAIC, tiny.PARENT], ids=["same shape", "another shape"])
def test_requests_in_flight_at_a_sync_go_on_under_the_new_weights(words):
    """As if what they had were part of the prompt; samples that were not begun are all new."""
    engine = TorchEngine(tiny.model(), max_batch_size=2, chunk_tokens=2)
    flying = engine.submit([1, 2, 3], GREEDY)
    for _ in range(5):
        engine.step()
    reading = engine.submit([4] * 20, GREEDY)
    engine.step()
    waiting = engine.submit([5, 6], GREEDY)
    had = list(flying.completions[0].token_ids)
    other = tiny.model(words, seed=1)
    engine.sync(other, 7)
    run(engine)
    fresh = TorchEngine(other)
    rest = fresh.generate([[1, 2, 3, *had]], replace(GREEDY, max_tokens=12 - len(had)))
    assert had and flying.completions[0].token_ids == had + rest[0][0].token_ids
    assert flying.completions[0].version == 0
    for handle, prompt in ((reading, [4] * 20), (waiting, [5, 6])):
        assert handle.completions[0].token_ids == fresh.generate([prompt], GREEDY)[0][0].token_ids
        assert handle.completions[0].version == 7


def test_a_sync_that_flying_requests_would_not_fit_is_refused():
    engine = TorchEngine(tiny.model())
    engine.submit([1, 2, 3], GREEDY)
    with pytest.raises(GenerationError, match="vocab_size 29, and the new model has 20"):
        engine.sync(tiny.model(vocab_size=20), 1)
    run(engine)
    engine.sync(tiny.model(vocab_size=20), 1)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_known_prefixes_change_nothing_and_are_not_read_again(slots):
    module = tiny.model()
    system = tiny.tokens(29, 24, seed=99).tolist()
    given = [system + prompt for prompt in prompts((5, 2, 9, 1, 12))] + [system, system[:20]]
    expected = TorchEngine(module).generate(given, SAMPLED)
    engine = TorchEngine(module, max_batch_size=slots, prefix_cache_tokens=200, chunk_tokens=8)
    for _ in range(2):
        handles = [engine.submit(prompt, SAMPLED, key=i) for i, prompt in enumerate(given)]
        run(engine)
        assert tokens_of(handles) == [[c.token_ids for c in samples] for samples in expected]
    assert engine.stats.cached_tokens + engine.stats.prefill_tokens == 2 * sum(map(len, given))
    assert engine.stats.cached_tokens > 11 * 19  # all but the first, but for each last token


def test_known_prefixes_are_of_the_weights_in_use():
    engine = TorchEngine(tiny.model(), prefix_cache_tokens=100)
    prompt = [3] * 20
    engine.generate([prompt], GREEDY)
    engine.sync(other := tiny.model(seed=1), 1)
    found = engine.generate([prompt], GREEDY)[0][0].token_ids
    assert found == TorchEngine(other).generate([prompt], GREEDY)[0][0].token_ids


def test_a_reader_gets_every_token_once():
    engine = TorchEngine(tiny.model(), max_batch_size=3)
    handle = engine.submit([1, 2, 3], SAMPLED)
    stepping = threading.Thread(target=run, args=(engine,))
    stepping.start()
    tokens, logprobs = [[], []], [[], []]
    reasons: list[str | None] = [None, None]
    for delta in handle:
        tokens[delta.sample] += delta.token_ids
        logprobs[delta.sample] += delta.logprobs
        reasons[delta.sample] = delta.finish_reason
    stepping.join()
    assert tokens == [done.token_ids for done in handle.completions]
    assert logprobs == [done.logprobs for done in handle.completions]
    assert reasons == ["length", "length"]
    assert [delta.token_ids for delta in handle] == tokens  # who comes late gets all at once
    assert handle.result() == handle.completions and not handle.wakers


def test_many_threads_submit_and_read_while_one_steps():
    module = tiny.model()
    expected = expected_of(module)
    engine, stop, found = TorchEngine(module, max_batch_size=5), threading.Event(), {}

    def client(i: int) -> None:
        handle = engine.submit(prompts()[i % 8], SAMPLED, key=i % 8)
        pieces = [[], []]
        for delta in handle:
            pieces[delta.sample] += delta.token_ids
        found[i] = pieces

    def serve() -> None:
        while not stop.is_set():
            if not engine.step():
                engine.waiting.wait(0.01)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    assert engine.score([[1, 2, 3]])  # takes its turn
    for thread in threads:
        thread.join(30)
    stop.set()
    server.join(30)
    assert [found[i] for i in range(24)] == expected * 3


def test_async_readers_and_one_that_hangs_up():
    engine = TorchEngine(tiny.model())

    async def read(handle) -> list[int]:
        return [token async for delta in handle for token in delta.token_ids]

    async def hang_up(handle) -> None:
        with handle:
            async for _ in handle:
                return

    async def main():
        handles = [engine.submit([i], replace(GREEDY, max_tokens=30)) for i in range(3)]
        readers = asyncio.gather(read(handles[0]), read(handles[1]), hang_up(handles[2]))
        while not all(handle.done for handle in handles):
            await asyncio.to_thread(engine.step)
        return handles, await readers

    handles, found = asyncio.run(main())
    assert found[:2] == [handle.completions[0].token_ids for handle in handles[:2]]
    assert handles[2].completions[0].finish_reason == "cancelled"
    assert len(handles[2].completions[0].token_ids) < 30


def test_the_cap_on_the_cache_holds_for_requests_that_come_late():
    module, cap = tiny.model(), 150
    given = prompts((3, 40, 2, 50, 7, 30, 1, 20))
    expected = TorchEngine(module).generate(given, GREEDY)
    engine = TorchEngine(module, max_tokens=cap)
    handles = []
    for i, prompt in enumerate(given):
        handles.append(engine.submit(prompt, GREEDY, key=i))
        engine.step()
        assert engine.slots.rows * engine.slots.columns <= cap
    while engine.step():
        assert engine.slots.rows * engine.slots.columns <= cap
    assert tokens_of(handles) == [[c.token_ids for c in samples] for samples in expected]
