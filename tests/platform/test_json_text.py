"""JSON that any reader takes, whatever numbers stand in it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_encdec.platform.json_text import json_text

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(
    inner) | st.tuples(inner) | st.dictionaries(st.text(), inner))


def refuse(word: str):
    raise AssertionError(f"{word} is no JSON")


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_it_is_json_and_says_the_same(value, indent, ascii_only):
    def same(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(same, one, other))
        return other is None if isinstance(one, float) and not math.isfinite(one) else (one, type(one)) == (
            other, type(other))

    text = json_text(value, indent, ascii_only)
    assert same(value, json.loads(text, parse_constant=refuse))
    assert text.isascii() or not ascii_only


@pytest.mark.parametrize("number", [0.1, 1e-320, 5e-324, 1 / 3, 1.7976931348623157e308])
def test_floats_keep_every_digit(number):
    assert json.loads(json_text({"a": [number]})) == {"a": [number]}
