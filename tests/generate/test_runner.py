"""A thread serves what is submitted, outlives a failure, drains and stops."""

from __future__ import annotations

import time

import pytest

from tessera.generate.engine import ClosedError, SamplingParams
from tessera.generate.requests import EngineError
from tessera.generate.torch_engine import MAX_FAILURES, EngineThread, TorchEngine
from tests import tiny

GREEDY = SamplingParams(max_tokens=30, temperature=0)


def test_requests_are_served_until_it_stops():
    module = tiny.model()
    expected = TorchEngine(module).generate([[1, 2, 3]], GREEDY)[0][0].token_ids
    with EngineThread(TorchEngine(module)) as thread:
        for _ in range(3):
            (done,) = thread.engine.submit([1, 2, 3], GREEDY).result(timeout=30)
            assert done.token_ids == expected
        assert thread.engine.generate([[1, 2, 3]], GREEDY)[0][0].token_ids == expected
        late = thread.engine.submit([1], GREEDY, timeout=0.0)
        assert late.result(timeout=30)[0].finish_reason == "timeout"
    assert not thread.alive
    with pytest.raises(ClosedError):
        thread.engine.submit([1], GREEDY)


def test_draining_lets_what_is_there_end_and_refuses_the_rest():
    thread = EngineThread(TorchEngine(tiny.model(), max_batch_size=1))
    handles = [thread.engine.submit([1], GREEDY) for _ in range(3)]
    thread.start()
    assert thread.drain(30)
    assert [handle.completions[0].finish_reason for handle in handles] == ["length"] * 3
    with pytest.raises(ClosedError, match="closed or draining"):
        thread.engine.submit([1], GREEDY)
    thread.stop()


def test_stopping_cancels_what_is_there():
    thread = EngineThread(TorchEngine(tiny.model(), max_batch_size=1))
    handles = [thread.engine.submit([1], GREEDY) for _ in range(2)]
    thread.stop()  # without ever having been started
    assert [handle.result(0)[0].finish_reason for handle in handles] == ["cancelled"] * 2


def test_one_failure_is_survived_and_many_in_a_row_close_the_engine(monkeypatch):
    engine, errors = TorchEngine(tiny.model(), max_batch_size=1), []
    with EngineThread(engine, errors.append) as thread:
        with monkeypatch.context() as patch:
            patch.setattr(engine.slots, "step", lambda packed: 1 / 0)
            with pytest.raises(EngineError, match="division by zero"):
                engine.submit([1], GREEDY).result(timeout=30)
        assert engine.submit([1], GREEDY).result(timeout=30) and len(errors) == 1
        monkeypatch.setattr(engine.slots, "step", lambda packed: 1 / 0)
        handles = [engine.submit([1], GREEDY) for _ in range(MAX_FAILURES)]
        end = time.monotonic() + 30
        while thread.alive and time.monotonic() < end:
            time.sleep(0.01)
        assert isinstance(thread.error, ZeroDivisionError) and all(h.done for h in handles)
        with pytest.raises(ClosedError):
            engine.submit([1], GREEDY)
