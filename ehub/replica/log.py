"""What a replica reads: the table and its change log, as of one snapshot."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from psycopg import sql

from ehub.binary import decode_rows, decode_vector
from ehub.database import Connection
from ehub.types import Matrix, Metric
from ehub.watermark import Watermark

_READ_KEYS = 1000


class Entry(NamedTuple):
    """A row of ``ehub.catalogue``: a version of a space, and its index."""

    space: str
    version: str
    version_id: int
    dims: int
    metric: Metric
    index_id: int
    m: int
    ef_construction: int
    target_recall: float
    current: bool

    @property
    def address(self) -> str:
        """What this version goes by, whichever is current."""
        return f"{self.space}@{self.version}"

    @property
    def relation(self) -> sql.Identifier:
        """The data table."""
        return sql.Identifier("ehub_data", f"v{self.version_id}")

    def build_parameters(self) -> dict[str, Any]:
        """Return what a graph depends on; a saved one with others is of no use."""
        return {
            "dims": self.dims,
            "metric": self.metric,
            "m": self.m,
            "ef_construction": self.ef_construction,
        }


class Behind(Exception):  # noqa: N818 - control flow, not an error
    """The log that a watermark needs is gone, or the whole table changed."""


def read_catalogue(connection: Connection, addresses: Collection[str] | None) -> list[Entry]:
    """Return the versions to keep indexes of, current ones first.

    For the name of a space these are its current version and those that are to be kept warm, for
    the address of a version just that one; None stands for the names of all spaces.
    """
    rows = connection.execute(
        "SELECT space, version, version_id, dims, metric, index_id, m, ef_construction,"
        " target_recall, current FROM ehub.catalogue"
        " WHERE (current OR warm) AND (%(names)s::text[] IS NULL OR space = ANY(%(names)s))"
        " OR space || '@' || version = ANY(%(names)s)"
        " ORDER BY current DESC, version_id",
        {"names": None if addresses is None else list(addresses)},
    )
    return [Entry(*row) for row in rows]


def take_snapshot(connection: Connection) -> tuple[Watermark, int]:
    """Return the snapshot of the transaction, and the transaction below which the log is gone."""
    row = connection.execute(
        "SELECT pg_current_snapshot()::text, ehub.trimmed_below()::text::bigint"
    ).fetchone()
    assert row is not None  # noqa: S101 - a select without from
    return Watermark.parse(row[0]), row[1]


def acknowledged_nonce(
    connection: Connection, replica: uuid.UUID, index_id: int
) -> uuid.UUID | None:
    """Return the name of the last acknowledgement of a replica; None if it has no lease."""
    row = connection.execute(
        "SELECT nonce FROM ehub.replica WHERE id = %s AND index_id = %s", [replica, index_id]
    ).fetchone()
    return None if row is None else row[0]


def changed_keys(
    connection: Connection, entry: Entry, watermark: Watermark, redo: set[str], trimmed: int
) -> set[str]:
    """Return the keys that changed between a watermark and the transaction's snapshot."""
    if trimmed > watermark.xmin:
        raise Behind("the change log has been trimmed")
    changed = set(redo)
    for (keys,) in connection.execute(
        "SELECT keys FROM ehub.changes(%s, %s::text::pg_snapshot)",
        [entry.version_id, str(watermark)],
    ):
        if keys is None:
            raise Behind("the table was truncated")
        changed.update(keys)
    return changed


def read_rows(
    connection: Connection, entry: Entry, keys: set[str]
) -> Iterator[tuple[list[str], Matrix]]:
    """Read the current rows of some keys, as the transaction sees them."""
    query = sql.SQL("SELECT key, embedding FROM {} WHERE key = ANY(%s)").format(entry.relation)
    wanted = list(keys)
    for start in range(0, len(wanted), _READ_KEYS):
        part = wanted[start : start + _READ_KEYS]
        rows = connection.execute(query, [part], binary=True).fetchall()
        if rows:
            vectors = np.stack([decode_vector(data) for _, data in rows])
            yield [key for key, _ in rows], vectors


def stream_rows(connection: Connection, entry: Entry) -> Iterator[tuple[list[str], Matrix]]:
    """Read the whole table, in batches, as the transaction sees it."""
    query = sql.SQL("COPY (SELECT embedding, key FROM {}) TO STDOUT (FORMAT binary)")
    with connection.cursor().copy(query.format(entry.relation)) as stream:
        yield from decode_rows(stream, entry.dims)


def estimated_rows(connection: Connection, entry: Entry) -> int:
    """Return the planner's idea of the table's size, 0 where it has none."""
    row = connection.execute(
        "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(%s)",
        [f"ehub_data.v{entry.version_id}"],
    ).fetchone()
    return max(0, row[0]) if row else 0
