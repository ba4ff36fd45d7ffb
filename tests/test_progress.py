from __future__ import annotations

import io
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


def test_durations():
    assert [clock(s) for s in (0, 42, 61, 4000)] == ["0:00", "0:42", "1:01", "1:06:40"]
