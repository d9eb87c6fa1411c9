"""JSON that Python's own module refuses, and all other JSON."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehub import jsontext

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_it_reads_and_writes_what_json_does(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert jsontext.read(text) == json.loads(text)
        assert (
            jsontext.read(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"))
            == value
        )
        # The way that is for what json does not read.
        assert jsontext._read_step_by_step(text) == value
    assert jsontext.write(value) == json.dumps(value, ensure_ascii=False)
    assert "".join(jsontext._written(value)) == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("digits", ["9" * 4300, "9" * 4301, "1" + "0" * 5000, "-" + "7" * 100_000])
def test_integers_of_any_length(digits):
    value = jsontext.read(f'{{"n": {digits}, "m": 1.5}}')
    assert value["m"] == 1.5
    assert jsontext.write(value) == f'{{"n": {digits}, "m": 1.5}}'
    assert value["n"] % 1000 == int(digits[-3:]) * (1 if digits[0] != "-" else -1) % 1000


def test_any_depth():
    depth = sys.getrecursionlimit() * 5
    for opening, closing in (("[", "]"), ('{"a": ', "}")):
        text = opening * depth + "1" + closing * depth
        value = jsontext.read(text.encode())
        assert jsontext.write(value) == text


def test_what_is_no_json_is_refused():
    for text in ("", "[1", "{'a': 1}", "nul"):
        with pytest.raises(ValueError):  # noqa: PT011
            jsontext.read(text)
