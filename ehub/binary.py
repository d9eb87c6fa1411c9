"""Postgres' binary formats for vectors and COPY, by numpy where a loop would cost.

Sources: PostgreSQL documentation, "COPY", "Binary Format"; pgvector ``vector_send`` (two 16-bit
numbers, dims and 0, then big-endian floats).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

from ehub.types import Matrix, Vector

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = b"\xff\xff"

_BATCH = 4096
# Of a row that begins with an embedding: the number of fields, its size, its dims.
_FIRST = 10


class VectorParameter:
    """A vector as a parameter of a statement, sent as its exact bits."""

    __slots__ = ("data",)

    def __init__(self, vector: Vector) -> None:
        self.data = struct.pack(">HH", len(vector), 0) + vector.astype(">f4").tobytes()


class VectorsParameter:
    """The rows of a matrix as an array of vectors, whose type has this oid."""

    __slots__ = ("data",)

    def __init__(self, matrix: Matrix, oid: int) -> None:
        # One dimension, no nulls, the type of the elements, their number, counted from 1.
        header = struct.pack(">iiIii", 1, 0, oid, len(matrix), 1)
        self.data = header + _sized_vectors(matrix).tobytes()


class VectorDumper(Dumper):
    """Sends one of the two; their type follows from where they stand in the statement."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: VectorParameter | VectorsParameter) -> Buffer:
        """Return the bytes that ``vector_recv`` or ``array_recv`` reads."""
        return obj.data


def decode_vector(data: Buffer) -> Vector:
    """Read what ``vector_send`` wrote, as float32 of shape ``(dims,)``."""
    return np.frombuffer(data, ">f4", offset=4).astype(np.float32)


def encode_rows(
    keys: Sequence[str], vectors: Matrix, metadata: Sequence[str | None] | None
) -> bytes:
    """Write rows ``(key text, embedding vector, metadata jsonb)`` for COPY, without header.

    ``vectors`` is float32 of shape ``(len(keys), dims)``; ``metadata`` holds JSON text or None.
    """
    n = len(vectors)
    body = _sized_vectors(vectors)
    width = body.dtype.itemsize
    embeddings = body.tobytes()
    names = [key.encode() for key in keys]
    pieces: list[Iterable[bytes]] = [
        [struct.pack(">hi", 3, len(name)) for name in names],
        names,
        [embeddings[start : start + width] for start in range(0, n * width, width)],
        itertools.repeat(_jsonb(None), n) if metadata is None else map(_jsonb, metadata),
    ]
    return b"".join(itertools.chain.from_iterable(zip(*pieces, strict=True)))


def decode_rows(messages: Iterable[Buffer], dims: int) -> Iterator[tuple[list[str], Matrix]]:
    """Read rows ``(embedding vector, key text)`` of a binary COPY, in batches.

    Takes one message a row, as Postgres sends them. Yields keys and float32 of shape ``(n, dims)``.
    """
    rows = _strip(messages)
    start = _FIRST + 4 * dims + 4
    while batch := list(itertools.islice(rows, _BATCH)):
        yield [str(row[start:], "utf-8") for row in batch], _embeddings(batch, dims)


def decode_rows_with_notes(
    messages: Iterable[Buffer], dims: int
) -> Iterator[tuple[list[str], Matrix, list[str | None]]]:
    """Read rows ``(embedding vector, key text, metadata text or NULL)`` as :func:`decode_rows`."""
    rows = _strip(messages)
    start = _FIRST + 4 * dims + 4
    while batch := list(itertools.islice(rows, _BATCH)):
        keys: list[str] = []
        notes: list[str | None] = []
        for row in batch:
            end = start + int.from_bytes(row[start - 4 : start], "big")
            keys.append(str(row[start:end], "utf-8"))
            # A NULL is a size of -1 and nothing more.
            notes.append(str(row[end + 4 :], "utf-8") if len(row) > end + 4 else None)
        yield keys, _embeddings(batch, dims), notes


def _embeddings(rows: Sequence[Buffer], dims: int) -> Matrix:
    # They are of one length and stand first, so they have their place.
    values = b"".join([row[_FIRST : _FIRST + 4 * dims] for row in rows])
    return np.frombuffer(values, ">f4").astype(np.float32).reshape(len(rows), dims)


def _sized_vectors(vectors: Matrix) -> NDArray[Any]:
    """Return what ``vector_send`` writes of each row, with its size before it."""
    n, dims = vectors.shape
    body: NDArray[Any] = np.empty(
        n, [("size", ">i4"), ("dims", ">u2"), ("unused", ">u2"), ("values", ">f4", (dims,))]
    )
    body["size"], body["dims"], body["unused"], body["values"] = 4 + 4 * dims, dims, 0, vectors
    return body


def _strip(messages: Iterable[Buffer]) -> Iterator[Buffer]:
    """Take the header, which stands before the first row, and the trailer away."""
    first = True
    for message in messages:
        row = message
        if first:
            row = memoryview(message)[len(COPY_HEADER) :]
            first = False
        if len(row) > len(COPY_TRAILER):
            yield row


def _jsonb(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">i", -1)
    data = text.encode()
    # The version of the format stands before the text.
    return struct.pack(">ib", len(data) + 1, 1) + data
