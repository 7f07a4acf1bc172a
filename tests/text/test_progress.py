import pytest

from megatron_encdec.text import progress
from megatron_encdec.text.progress import Progress, duration, short_count


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3725, "1:02:05"),
                                               (float("inf"), "?")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (999.6, "1k"), (1_234_567, "1.23M"), (4e12, "4T")])
def test_short_count(number, text):
    assert short_count(number) == text


def test_plain_lines_when_it_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("work", 200) as shown:
        shown.update(50, "5 things/s")
    with Progress("silent", 200, enabled=False) as shown:
        shown.update(50, "5 things/s")
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("work:  25% · 5 things/s · 0:0")
