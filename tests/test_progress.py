"""Progress on a terminal and elsewhere."""

import sys

import pytest

from flash_stu import progress
from flash_stu.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time, moved by a test."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_now_and_then_where_there_is_no_terminal(clock, capfd):
    with Progress("scoring", "tok", line_every=30) as work:
        work.start(1000, done=100)
        for _ in range(9):
            clock.now += 20
            work.update(100, "12 MB/s")
    assert capfd.readouterr() == (
        "",
        "scoring: 30%, 12 MB/s, about 2 min left\n"
        "scoring: 50%, 12 MB/s, about 2 min left\n"
        "scoring: 70%, 12 MB/s, about 60 s left\n"
        "scoring: 90%, 12 MB/s, about 20 s left\n",
    )


def test_an_unknown_total_has_no_share(clock, capfd):
    work = Progress("reading")
    work.start(None)
    clock.now += 31
    work.update(7, "7 documents")
    assert capfd.readouterr().err == "reading: 7 documents\n"
    assert work.done == 7 and work.seconds == 31


@pytest.mark.parametrize("options", [{"enabled": False}, {"line_every": float("inf")}])
def test_nothing_is_shown_but_updates_are_told(options, clock, capfd):
    told = []
    work = Progress("scoring", on_update=lambda: told.append(work.done), **options)
    work.start(10)
    for _ in range(2):
        clock.now += 1e6
        work.update(5)
    work.close()
    assert told == [5, 10] and capfd.readouterr() == ("", "")


def test_a_bar_is_shown_on_a_terminal_and_removed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("training", "step", unit_scale=False) as work:
        work.start(9, done=3)
        work.update(2, "loss 1.5")
        work.bar.refresh()
        work.say("a line")
    assert work.bar is None
    out, err = capsys.readouterr()
    assert out == "a line\n" and "training" in err and "5/9" in err and "loss 1.5" in err
    assert err.rstrip(" ").endswith("\r")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1 h 30 min")])
def test_durations(seconds, text, clock, capfd):
    work = Progress("x", line_every=0)
    work.start(2)
    clock.now += seconds
    work.update(1)
    assert capfd.readouterr().err == f"x: 50%, about {text} left\n"
