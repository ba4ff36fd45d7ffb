from __future__ import annotations

import io
import random
import re
import sys

import pytest

from tessera import progress
from tessera.progress import Progress
from tessera.table import clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def time_at(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = 100.0 + seconds

    return at


def test_rate_and_time_left_count_only_what_was_done_here(time_at):
    with Progress("kd", 100, "tokens", quiet=True) as bar:
        bar.advance(40, 0)  # made before a resume
        time_at(10)
        bar.advance(20, 20_000, loss=1.25)
        assert bar.text() == "2,000 tokens/s  0:20 left  loss 1.25"


def seconds_left(bar: Progress) -> float | None:
    found = re.search(r"([\d:]+) left", bar.text())
    return found and sum(60**n * int(x) for n, x in enumerate(reversed(found[1].split(":"))))


@pytest.mark.parametrize(("answers", "rows"), [(30, 64), (64, 64), (400, 64), (40, 1)])
def test_time_left_of_answers_that_are_written_beside_each_other(time_at, answers, rows):
    """One token a row and second; lengths from 200 to 4,000 tokens, the median at 900."""
    draw = random.Random(answers)
    waiting = [min(4000, max(200, int(draw.lognormvariate(6.8, 0.8)))) for _ in range(answers)]
    second, live, told = 0, [], {}
    with Progress("aime24", answers, "tokens", steps="answers", quiet=True) as bar:
        while waiting or live:
            while waiting and len(live) < rows:
                live.append((second, waiting.pop()))
            second += 1
            time_at(second)
            for begun, length in [one for one in live if second - one[0] == one[1]]:
                live.remove((begun, length))
                bar.advance(1, length)
            bar.working(sum(second - begun for begun, _ in live), len(live))
            told[second] = seconds_left(bar)
    assert list(told.values()).index(None) == 0 and told[second] == 0
    for at, left in told.items():
        truth = second - at
        assert left is None or left < 2.5 * second
        if 0.1 * second < at < 0.9 * second:
            assert left is not None and 0.15 * truth < left < 3 * truth


def test_a_line_says_answers_and_tokens_and_comes_before_the_first_answer(time_at, capsys):
    with Progress("aime24", 30, "tokens", steps="answers") as bar:
        time_at(20)
        bar.working(12_000, 30)
        assert capsys.readouterr().err == "aime24  0/30 answers  12,000 tokens  600 tokens/s\n"
        time_at(40)
        bar.working(15_000, 20)
        bar.advance(10, 9_000)
        assert bar.text() == "24,000 tokens  600 tokens/s  1:04 left"
        bar.advance(19, 9_000)
        bar.working(4_000, 1)  # a mean answer took 40 * 30 / 29 s, and the last one is under way
        assert bar.text() == "22,000 tokens  550 tokens/s  0:20 left"


def test_lines_come_seldom_and_short_work_is_silent(time_at, capsys):
    with Progress("score", 4, "words") as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    with Progress("score", 4, "words") as bar:
        for second in (4, 8, 12, 16):
            time_at(second)
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["score", "3/4"], ["score", "4/4"]]


def test_the_last_line_comes_once(time_at, capsys):
    with Progress("score", 2, "words") as bar:
        bar.advance()
        time_at(11)
        bar.advance()
    assert capsys.readouterr().err.count("2/2") == 1


def test_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("kd", 2, "tokens") as bar:
        bar.advance(2, 4096, loss=0.5)
    assert "kd" in screen.getvalue() and "2/2" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()


def test_work_inside_of_a_bar_prints_lines_and_quiet_work_nothing(monkeypatch, time_at):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)

    def inner() -> None:
        with Progress("inner", 2) as bar:
            time_at(11)
            bar.advance(2)

    with Progress("outer", 1):
        inner()
    assert "inner  2/2" in screen.getvalue()
    screen.truncate(0)
    with progress.quietly(True):
        inner()
    assert not screen.getvalue()


def test_durations():
    assert [clock(s) for s in (0, 42, 61, 4000)] == ["0:00", "0:42", "1:01", "1:06:40"]
