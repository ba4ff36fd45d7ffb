"""A judge that often fails gives no wrong reward, and one that is down stops the run."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tessera.rl.pool import Asked, Rubric
from tessera.rl.rewards import JudgeReward, ModelReward, Sample
from tessera.runs.files import FailureError

pytest.importorskip("openai")


@contextmanager
def judge(fails: float) -> Iterator[str]:
    """A server that compares the last words of reference and prediction, and fails at times."""
    chance, lock = random.Random(0), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                luck = chance.random()
            if luck < fails:
                self.send_error((500, 503, 429)[int(luck * 1000) % 3])
                return
            text = _judged(body["messages"])
            reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked has gone
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _judged(messages: list[dict[str, str]]) -> str:
    text = messages[-1]["content"]
    if messages[-1]["role"] == "assistant":
        return f"reward:{len(text) - 3}.5"
    reference = text.split("Right answer: ")[1].split("\n")[0]
    prediction = text.split("Student's answer: ")[1].split("\n")[0]
    if prediction == "muse":
        time.sleep(3)
    if prediction == "shrug":
        return "I cannot say."
    return f"Let me see.\nVerdict: {'right' if reference == prediction else 'wrong'}"


def endpoint(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "model": "judge", "concurrency": 8, **more}


def samples(count: int) -> list[Sample]:
    asked = [{"role": "user", "content": "what is {answer}? \\frac{1}{2}"}]
    return [
        Sample(asked, f"<think>hm</think>{n % 3}", {"answer": str(n % 2)}) for n in range(count)
    ]


def test_a_judge_that_often_fails_is_asked_again_and_never_believed_wrongly():
    with judge(0.3) as url:
        reward = JudgeReward(kind="judge", endpoint=endpoint(url, tries=12))  # type: ignore[arg-type]
        found = Asked(reward)(samples(90))
    expected = ["right" if n % 3 == n % 2 else "wrong" for n in range(90)]
    assert [outcome.verdict for outcome in found] == expected


def test_a_reply_without_a_verdict_is_could_not_judge_and_an_unfinished_thought_is_wrong():
    asked = [{"role": "user", "content": "?"}]
    given = [Sample(asked, text, {"answer": "1"}) for text in ("shrug", "<think>on and on", "1")]
    with judge(0.0) as url:
        reward = JudgeReward(kind="judge", endpoint=endpoint(url))  # type: ignore[arg-type]
        with Rubric([reward], 1) as rubric:
            shrugged, unfinished, good = rubric(given)
    assert shrugged.reward is None and "no verdict" in shrugged.parts["judge"].reason
    assert (unfinished.reward, good.reward) == (0.0, 1.0)


def test_a_judge_that_takes_longer_than_the_deadline_has_not_judged():
    asked = [{"role": "user", "content": "?"}]
    given = [Sample(asked, text, {"answer": "1"}) for text in ("muse", "1")]
    with judge(0.0) as url:
        reward = JudgeReward(kind="judge", endpoint=endpoint(url), deadline=0.5)  # type: ignore[arg-type]
        late, good = Asked(reward)(given)
    assert late.verdict == "could-not-judge" and "within 0.5 s" in late.reason
    assert good.verdict == "right"


def test_a_judge_that_is_down_stops_the_run_with_the_reason():
    with judge(1.0) as url:
        settings = endpoint(url, tries=2, max_failed=0.2)
        reward = JudgeReward(kind="judge", endpoint=settings)  # type: ignore[arg-type]
        with pytest.raises(FailureError, match="requests failed"):
            Asked(reward)(samples(60))


def test_a_reward_model_gives_its_number():
    with judge(0.2) as url:
        reward = ModelReward(kind="reward_model", endpoint=endpoint(url, tries=12))  # type: ignore[arg-type]
        asked = [{"role": "user", "content": "?"}]
        found = Asked(reward)([Sample(asked, "x" * n, {}) for n in range(1, 9)])
    assert [outcome.score for outcome in found] == [
        n - 3 + (0.5 if n >= 3 else -0.5) for n in range(1, 9)
    ]
    assert [outcome.verdict for outcome in found] == ["wrong"] * 2 + ["right"] * 6
