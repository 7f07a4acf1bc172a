"""Numbers and labels as the tables print them."""

import io

import pytest

from megatron_encdec.inspection.tables import number, say, short, size


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (0, "0"), (9_999_999, "9,999,999"), (10_000_000, "10.000M"), (99_090_432_000, "99.090B"),
    (2.5e12, "2.500T"), (1.5e16, "15,000.000T"), (14451.4, "14,451"),
])
def test_short_counts(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (5 * 2**50, "5120.0 TiB")])
def test_sizes(count, text):
    assert size(count) == text


def test_numbers():
    assert (number(None), number(1234567), number(1.23456), number(1422.68, 1)) == (
        "-", "1,234,567", "1.2346", "1,422.7")


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    say("naïve")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"na\\xefve\n"
