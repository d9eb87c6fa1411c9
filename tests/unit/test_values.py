import numpy as np
import pytest

from ehub import errors, values


@pytest.mark.parametrize("key", ["", "a\0b", "x" * 1025, "é" * 513, "\ud800", 5, None, b"bytes"])
def test_refuses_what_is_no_key(key):
    with pytest.raises(errors.InvalidKeyError):
        values.as_key(key)


@pytest.mark.parametrize(
    "key", ["a", "x" * 1024, "'; DROP TABLE x; --", "naïve ключ 鍵", "\n", " "]
)
def test_takes_any_other_text_as_key(key):
    assert values.as_key(key) == key


def test_a_list_of_keys_is_not_a_string_and_not_empty():
    with pytest.raises(errors.InvalidKeyError, match="not the string 'abc'"):
        values.as_keys("abc")
    with pytest.raises(errors.InvalidValueError, match="empty"):
        values.as_keys([])


@pytest.mark.parametrize("k", [0, -1, 2**31, 1.5, "3", None])
def test_refuses_what_is_no_number_of_neighbours(k):
    with pytest.raises(errors.InvalidValueError, match="k is a"):
        values.as_count(k)


def test_takes_numpy_numbers_of_neighbours():
    assert values.as_count(np.int64(3)) == 3


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([1, 2], "this one has 2 dims"),
        ([1, 2, 3, 4], "this one has 4 dims"),
        ([], "this one has 0 dims"),
        ([[1, 2, 3]], "the shape"),
        (1.0, "the shape"),
        ([1, float("nan"), 3], "NaN at position 1"),
        ([1, 2, float("inf")], "infinity .* at position 2"),
        ([1e300, 0, 0], "infinity .* at position 0"),
        ([1e38, 1e38, 0], "too large"),
        (["1", "2", "3"], "list or an array of numbers"),
        ([1, None, 3], "list or an array of numbers|NaN"),
        ("[1,2,3]", "list or an array of numbers"),
        ([True, False, True], "list or an array of numbers"),
        ([1j, 2, 3], "list or an array of numbers"),
        ({"a": 1}, "list or an array of numbers"),
    ],
)
def test_refuses_what_is_no_vector_and_says_why(vector, reason):
    with pytest.raises(errors.InvalidVectorError, match=f"somewhere: .*({reason})"):
        values.as_vector(vector, 3, "l2", "somewhere")


@pytest.mark.parametrize("vector", [[0, 0, 0], [1e-25, 0, 0], np.zeros(3)])
def test_cosine_needs_a_direction(vector):
    with pytest.raises(errors.InvalidVectorError, match="direction"):
        values.as_vector(vector, 3, "cosine", "somewhere")
    values.as_vector(vector, 3, "l2", "somewhere")
    values.as_vector(vector, 3, "ip", "somewhere")


def test_the_wrong_row_of_a_matrix_is_named():
    names = ["first", "second", "third"]
    with pytest.raises(errors.InvalidVectorError, match="third: NaN at position 0"):
        values.as_matrix([[1, 2], [3, 4], [np.nan, 6]], 2, "l2", names)
    with pytest.raises(errors.InvalidVectorError, match=r"second: .*2 dims is needed"):
        values.as_matrix([[1, 2], [3, 4, 5], [5, 6]], 2, "l2", names)
    with pytest.raises(errors.InvalidVectorError, match="queries, row 1: "):
        values.as_matrix([[1, 2], [0, 0]], 2, "cosine", "queries")


def test_vectors_become_contiguous_float32():
    vector = values.as_vector(np.arange(6, dtype=np.int16)[::2], 3, "l2", "v")
    assert vector.dtype == np.float32
    assert vector.flags.c_contiguous
    assert vector.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    "metadata",
    [[1], "text", 5, {"a": float("nan")}, {"a": {1, 2}}, {"a": "\0"}, {"a": "\ud800"}, {(1,): 2}],
)
def test_refuses_what_is_no_metadata(metadata):
    with pytest.raises(errors.InvalidMetadataError, match="here: "):
        values.as_json(metadata, "here")


def test_a_backslash_before_u0000_is_text():
    assert values.as_json({"a": "\\u0000"}, "here") == '{"a": "\\\\u0000"}'
