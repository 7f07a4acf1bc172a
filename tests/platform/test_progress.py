"""Progress: plain lines, and the bars that a terminal shows."""

import io
import re

import pytest

from megatron_encdec.platform import progress
from megatron_encdec.platform.progress import Progress, duration, short_count


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (999.6, "1k"), (1_234_567, "1.23M"), (4e12, "4T")])
def test_short_count(number, text):
    assert short_count(number) == text


def test_plain_lines_when_it_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("work", 200) as shown:
        shown.update(50, "5 things/s")
        shown.part("a", "[one]", 3, 4)
        shown.part("b", "two")  # of which nothing is known yet
        shown.say("said")
    with Progress("silent", 200, active=False) as shown:
        shown.update(50, "5 things/s")
        shown.say("nothing")
    with Progress("unknown", 0) as shown:
        shown.update(7, "7 things")
    err = capsys.readouterr().err
    assert re.fullmatch(r"work: 25%  5 things/s  0:0\d left\n  \[one\] 75%\nsaid\nunknown: 7 things\n", err), err


def test_a_line_only_now_and_then_and_at_the_end(capsys):
    with Progress("step", 4, done=1, counts=True) as shown:
        for step in (2, 3, 4):
            shown.update(step, "loss 1.0", always=step == 4)
    assert capsys.readouterr().err == "step 4/4  loss 1.0  0:00 left\n"


def test_time_left_counts_what_was_done_here():
    shown = Progress("step", 100, done=80, active=False)
    assert shown.time_left(80) == "?"
    shown._started -= 60.0
    assert (shown.time_left(90), shown.time_left(100)) == ("1:00", "0:00")


def test_the_bars_of_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    with Progress("runs", 4, done=1, counts=True, stream=terminal) as shown:
        shown.part(0, "tiny/[red]x")
        shown.part(1, "tiny/y", 50, 100)
        shown.update(2, "1 failed")
        shown.say("2/4  [red]done")
        shown._bars.refresh()
        screen = terminal.getvalue()
        shown.part(1, "tiny/z", 1, 100)  # the next one begins at nothing
        shown.part_ended(0)
        terminal.truncate(0)
        shown._bars.refresh()
        later = terminal.getvalue()
    assert all(part in screen for part in ("2/4  [red]done\n", "tiny/[red]x", "50/100", "1 failed", "0:00:00"))
    assert "tiny/z" in later and "1/100" in later and "tiny/y" not in later and "tiny/[red]x" not in later
