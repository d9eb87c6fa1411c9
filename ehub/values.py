"""What ehub accepts: keys, vectors, metadata. Decided here, before anything is sent or changed.

Postgres holds the same rules as constraints (``sql/embedding.sql``), so that SQL writers obey them
too; these functions exist to name the wrong value before a batch is streamed.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, SupportsIndex

import numpy as np

from ehub.errors import (
    InvalidFilterError,
    InvalidKeyError,
    InvalidMetadataError,
    InvalidNameError,
    InvalidValueError,
    InvalidVectorError,
)
from ehub.types import Matrix, Metric, Vector

MAX_KEY_BYTES = 1024

# Below this a squared norm has lost its precision in float32, and cosine with it.
_TINY = float(np.finfo(np.float32).tiny)


def as_key(key: object) -> str:
    """Return ``key`` if it is a string of 1 to 1024 UTF-8 bytes without NUL.

    Raises:
        InvalidKeyError: it is not.
    """
    if not isinstance(key, str):
        raise InvalidKeyError(f"a key is a string, not {type(key).__name__}: {key!r}")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidKeyError(f"key {key!r} cannot be written as UTF-8") from None
    if not 1 <= size <= MAX_KEY_BYTES or "\0" in key:
        raise InvalidKeyError(
            f"a key has 1 to {MAX_KEY_BYTES} bytes and no NUL; {_short(key)} has {size} bytes"
        )
    return key


def as_keys(keys: Iterable[object]) -> list[str]:
    """Return ``keys`` as a list of valid keys, in their order.

    Raises:
        InvalidKeyError: one of them is not a key, or they are one string.
        InvalidValueError: there are none.
    """
    if isinstance(keys, str | bytes):
        raise InvalidKeyError(f"a list of keys is needed, not the string {_short(keys)}")
    if not isinstance(keys, Iterable):
        raise InvalidKeyError(f"a list of keys is needed, not {keys!r}")
    checked = [as_key(key) for key in keys]
    if not checked:
        raise InvalidValueError("an empty batch: no keys were given")
    return checked


def as_count(k: SupportsIndex, name: str = "k") -> int:
    """Return a number of neighbours as an int; ``name`` says what it is.

    Raises:
        InvalidValueError: it is not a whole number from 1 to 2**31 - 1.
    """
    try:
        count = k.__index__()
    except (AttributeError, TypeError):
        raise InvalidValueError(f"{name} is a whole number, not {k!r}") from None
    if not 1 <= count < 2**31:
        raise InvalidValueError(f"{name} is a number from 1 to 2147483647, not {count}")
    return count


def as_whole(name: str, value: SupportsIndex) -> int:
    """Return a whole number that Postgres will check.

    Raises:
        InvalidValueError: it is not one; ``name`` says what it is.
    """
    try:
        # Larger than Postgres' integer is too large for every limit that it checks.
        return max(min(operator.index(value), 2**31 - 1), -(2**31))
    except TypeError:
        raise InvalidValueError(f"{name} is a whole number, not {value!r}") from None


def as_number(name: str, value: float) -> float:
    """Return a number as a float.

    Raises:
        InvalidValueError: it is not one; ``name`` says what it is.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidValueError(f"{name} is a number, not {value!r}") from None


def as_build(
    M: SupportsIndex | None, ef_construction: SupportsIndex | None, target_recall: float | None
) -> list[float | None]:
    """Return what an index is to be built with, None for what is not said; Postgres checks it.

    Raises:
        InvalidValueError: one of them is not a number.
    """
    return [
        None if M is None else as_whole("M", M),
        None if ef_construction is None else as_whole("ef_construction", ef_construction),
        None if target_recall is None else as_number("target_recall", target_recall),
    ]


def as_name(what: str, name: object) -> str:
    """Return the name of ``what`` if it is a string that Postgres can read, and check.

    Raises:
        InvalidNameError: it is not.
    """
    if not isinstance(name, str) or "\0" in name:
        raise InvalidNameError(f"{what}'s name is a string without NUL, not {name!r}")
    return name


def as_filter(matching: object) -> str | None:
    """Return a filter as JSON text, None for none; what is in it Postgres checks.

    Raises:
        InvalidFilterError: not a mapping, or nothing that JSON can write.
    """
    if matching is None or matching == {}:
        return None
    try:
        return as_json(matching, "filter")
    except InvalidMetadataError as error:
        raise InvalidFilterError(str(error).replace("metadata", "it", 1)) from None


def as_partition(partition: object) -> str | None:
    """Return the text that a partition goes by, None for none: what ``->>`` makes of its value.

    Raises:
        InvalidValueError: neither a string nor a number nor a boolean.
    """
    if partition is None:
        return None
    if isinstance(partition, str) and "\0" not in partition and _is_utf8(partition):
        return partition
    if isinstance(partition, np.generic):
        partition = partition.item()
    if not isinstance(partition, int | float) or not math.isfinite(partition):
        raise InvalidValueError(
            f"a partition is text without NUL, a number, True or False, not {partition!r}"
        )
    if isinstance(partition, float):
        # Postgres writes numbers without exponents, and knows no negative zero.
        return format(Decimal(repr(partition or 0.0)), "f")
    return json.dumps(partition)


def as_examples(name: str, examples: object) -> tuple[list[str], list[float] | None]:
    """Return the keys of examples, and their weights if they are a mapping to these.

    Raises:
        InvalidKeyError: one of them is not a key.
        InvalidValueError: there are none, or a weight is not a number; Postgres checks the rest.
    """
    if isinstance(examples, Mapping):
        weights = [as_number(f"the weight of {key!r}", value) for key, value in examples.items()]
        return as_keys(examples), weights
    if not isinstance(examples, Iterable):
        raise InvalidValueError(f"{name} is a list of keys or maps them to weights: {examples!r}")
    return as_keys(examples), None


def require_one_of(**given: object) -> None:
    """Refuse a search for the neighbours of nothing, or of several things.

    Raises:
        InvalidValueError: not just one of them is given.
    """
    if sum(value is not None for value in given.values()) != 1:
        names = [f"{name}=" for name in given]
        raise InvalidValueError(
            f"give either {', '.join(names[:-1])} or {names[-1]}, and just one of them"
        )


def require_some(queries: Matrix) -> Matrix:
    """Return the queries of a batch if there are any.

    Raises:
        InvalidValueError: there are none.
    """
    if not len(queries):
        raise InvalidValueError("an empty batch: no vectors were given")
    return queries


def as_vector(value: object, dims: int, metric: Metric, name: str) -> Vector:
    """Return ``value`` as a contiguous float32 array of shape ``(dims,)``.

    ``name`` says in errors what the value is, for example ``space 'fruit', key 'apple'``.

    Raises:
        InvalidVectorError: wrong shape, not numbers, NaN, infinity, or of no use under ``metric``.
    """
    vector = _as_float32(value, name)
    if vector.shape != (dims,):
        what = f"{len(vector)} dims" if vector.ndim == 1 else f"the shape {vector.shape}"
        raise InvalidVectorError(f"{name}: a vector of {dims} dims is needed, this one has {what}")
    with np.errstate(all="ignore"):
        square = float(vector.dot(vector))
    # One number decides for almost all vectors: NaN and infinity in an element show in the sum.
    if not (_TINY if metric == "cosine" else 0.0) <= square < np.inf:
        raise InvalidVectorError(f"{name}: {_reason(vector, metric)}")
    return vector


def as_vector_text(value: object, name: str) -> str:
    """Return a vector as pgvector writes it; its dims and metric are not known here.

    Raises:
        InvalidVectorError: not one row of numbers, or NaN or infinity among them.
    """
    # pgvector's own values.
    to_numpy = getattr(value, "to_numpy", None)
    vector = _as_float32(value if to_numpy is None else to_numpy(), name)
    if vector.ndim != 1 or not len(vector):
        raise InvalidVectorError(f"{name}: one vector is needed, not the shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise InvalidVectorError(f"{name}: {_reason(vector, 'l2')}")
    return "[" + ",".join(map(repr, vector.tolist())) + "]"


def as_matrix(values: object, dims: int, metric: Metric, names: Sequence[str] | str) -> Matrix:
    """Return ``values`` as a contiguous float32 array of shape ``(n, dims)``.

    ``names`` says in errors what a row is: one name a row, or one for all.

    Raises:
        InvalidVectorError: as :func:`as_vector`, naming the first row that is wrong.
    """

    def name(row: int) -> str:
        return f"{names}, row {row}" if isinstance(names, str) else names[row]

    try:
        matrix = _as_float32(values, names if isinstance(names, str) else "vectors")
    except InvalidVectorError:
        # Ragged or not numeric: find the row to name.
        if isinstance(values, Sequence) and not isinstance(values, str):
            for row, value in enumerate(values):
                as_vector(value, dims, metric, name(row))
        raise
    if matrix.ndim != 2 or matrix.shape[1] != dims:
        if matrix.ndim == 2 and len(matrix):
            as_vector(matrix[0], dims, metric, name(0))
        where = names if isinstance(names, str) else "vectors"
        raise InvalidVectorError(
            f"{where}: an array of shape (n, {dims}) is needed, not {matrix.shape}"
        )
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", matrix, matrix)
        good = (squares >= (_TINY if metric == "cosine" else 0.0)) & (squares < np.inf)
    if not good.all():
        row = int(np.argmin(good))
        raise InvalidVectorError(f"{name(row)}: {_reason(matrix[row], metric)}")
    return matrix


def as_json(metadata: object, name: str) -> str:
    """Return ``metadata`` as the text of a JSON object.

    Raises:
        InvalidMetadataError: not a mapping, or holds what JSON or Postgres cannot.
    """
    if not isinstance(metadata, Mapping):
        raise InvalidMetadataError(
            f"{name}: metadata is a mapping (a JSON object), not {type(metadata).__name__}"
        )
    try:
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False, default=_plain)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        field = _wrong_field(metadata)
        where = "metadata" if field is None else f"metadata, field {field}"
        raise InvalidMetadataError(f"{name}: {where} is not JSON: {error}") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise InvalidMetadataError(f"{name}: metadata holds a NUL character, Postgres has none")
    return text


def _wrong_field(metadata: Mapping[Any, Any]) -> str | None:
    """Return the path of the first field that alone is not JSON; None if only the whole is not."""
    for field, value in metadata.items():
        try:
            json.dumps({field: value}, allow_nan=False, ensure_ascii=False, default=_plain).encode()
        except RecursionError:
            return repr(field)
        except (TypeError, ValueError):
            inner = _wrong_field(value) if isinstance(value, Mapping) else None
            return repr(field) if inner is None else f"{field!r}, {inner}"
    return None


def _plain(value: object) -> object:
    """Return numpy's scalars, which come out of its arrays, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(space: str, key: str) -> str:
    """Name a row of a space in an error."""
    return f"space {space!r}, key {_short(key)}"


def _as_float32(value: object, name: str) -> Matrix:
    array: np.ndarray[Any, Any]
    try:
        with np.errstate(all="ignore"):
            array = np.asarray(value)
            if array.dtype.kind not in "iuf":
                # Text, booleans, complex numbers and objects: numpy would convert some in silence.
                if array.dtype.kind != "O" and array.size:
                    raise TypeError(f"of type {array.dtype}")
                array = array.astype(np.float64)
            return array.astype(np.float32, order="C", copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidVectorError(
            f"{name}: a vector is a list or an array of numbers, this is not: {error}"
        ) from None


def _reason(vector: Vector, metric: Metric) -> str:
    if np.isnan(vector).any():
        return f"NaN at position {int(np.argmax(np.isnan(vector)))}"
    if np.isinf(vector).any():
        return f"infinity (in float32) at position {int(np.argmax(np.isinf(vector)))}"
    with np.errstate(all="ignore"):
        if not np.isfinite(vector.dot(vector)):
            return "its values are too large for distances in float32"
    if vector.any():
        return (
            f"its length of {np.linalg.norm(vector.astype(np.float64)):.2g} is too small for a"
            f" direction in float32, and so for distances under {metric}"
        )
    return f"a zero vector has no direction, and so no distance under {metric}"


def _short(text: str | bytes) -> str:
    return repr(text if len(text) <= 60 else text[:60]) + ("…" if len(text) > 60 else "")
