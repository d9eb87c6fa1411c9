"""The rows of one instant, and what has changed since: how they come out of the database."""

from __future__ import annotations

import dataclasses
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from psycopg import sql

from ehub.binary import decode_rows_with_notes
from ehub.database import Connection, Database, repeatable_read
from ehub.types import Matrix, Metric


@dataclasses.dataclass(frozen=True)
class Source:
    """What a snapshot was taken of, and how it would be indexed and named."""

    space: str
    version: str
    version_id: int
    dims: int
    metric: Metric
    M: int
    ef_construction: int
    target_recall: float
    # What tells the database from all others.
    identity: str


class _Rows(NamedTuple):
    """Rows as a relation, and the condition for some keys of it, as the database writes them."""

    relation: Any
    by_keys: Any


class Block(NamedTuple):
    """Rows: keys, float32 of shape ``(n, dims)``, JSON text or None for ``{}``."""

    keys: list[str]
    vectors: Matrix
    notes: list[str | None]


class Lease(NamedTuple):
    """What the database keeps the change log by, from the instant of the rows on."""

    id: uuid.UUID
    nonce: uuid.UUID | None
    watermark: str


def download(
    database: Database,
    address: str,
    lease: uuid.UUID,
    watch: Callable[[int, int], None] | None,
) -> tuple[Source, Block, Lease]:
    """Read all rows in one snapshot, into arrays that are made once."""
    with database.connection(address) as connection, repeatable_read(connection):
        source, rows, watermark = _look(connection, address)
        row = connection.execute(
            sql.SQL("SELECT count(*) FROM {} AS t").format(sql.SQL(rows.relation))
        ).fetchone()
        total = row[0] if row else 0
        held = _hold(database, lease, source, watermark, total)
        vectors = np.empty((total, source.dims), np.float32)
        keys: list[str] = []
        notes: list[str | None] = []
        for part, matrix, texts in _read(connection, rows, source.dims):
            vectors[len(keys) : len(keys) + len(part)] = matrix
            keys += part
            notes += texts
            if watch is not None:
                watch(len(keys), total)
    return source, Block(keys, vectors, notes), held


def news(
    database: Database, address: str, before: Source, lease: Lease
) -> tuple[list[str], Block, Lease] | None:
    """Read what has changed since a lease began; None where all has to be read."""
    if lease.nonce is None:
        return None
    with database.connection(address) as connection, repeatable_read(connection):
        source, rows, watermark = _look(connection, address)
        if (source.version_id, source.identity) != (before.version_id, before.identity):
            return None
        row = connection.execute(
            "SELECT ehub.changed_since(%s, %s, %s, %s::text::pg_snapshot)",
            [lease.id, lease.nonce, source.version_id, lease.watermark],
        ).fetchone()
        if row is None or row[0] is None:
            return None
        changed: list[str] = row[0]
        keys: list[str] = []
        notes: list[str | None] = []
        matrices = [np.empty((0, source.dims), np.float32)]
        for part, matrix, texts in _read(connection, rows, source.dims, changed):
            keys += part
            notes += texts
            matrices.append(matrix)
        held = _hold(database, lease.id, source, watermark, len(keys))
    return changed, Block(keys, np.concatenate(matrices), notes), held


def _look(connection: Connection, address: str) -> tuple[Source, _Rows, str]:
    """Return what an address means, where its rows are, and the snapshot of this transaction."""
    row = connection.execute(
        "SELECT space, version, version_id, dims, metric, m, ef_construction, target_recall,"
        " ehub.rows_of(s), ehub.has_keys(s, '$1'), pg_current_snapshot()::text"
        " FROM ehub.require_space(%s) AS s",
        [address],
    ).fetchone()
    assert row is not None  # noqa: S101 - what is not there raises
    return Source(*(*row[:8], identity(connection))), _Rows(*row[8:10]), row[10]


def identity(connection: Connection) -> str:
    """Return what tells this database from all others."""
    row = connection.execute("SELECT ehub.identity()").fetchone()
    assert row is not None  # noqa: S101 - a select without from
    return str(row[0])


def _hold(database: Database, lease: uuid.UUID, source: Source, watermark: str, rows: int) -> Lease:
    place = f"snapshot, {socket.gethostname()} process {os.getpid()}"
    # On a connection of its own: what is read goes on in a snapshot that writes nothing.
    with database.connection() as connection:
        row = connection.execute(
            "SELECT ehub.hold_log(%s, %s, %s::text::pg_snapshot, %s, %s)",
            [lease, source.version_id, watermark, place, rows],
        ).fetchone()
    return Lease(lease, row[0] if row else None, watermark)


def _read(
    connection: Connection, rows: _Rows, dims: int, keys: list[str] | None = None
) -> Iterator[tuple[list[str], Matrix, list[str | None]]]:
    chosen: sql.Composable = sql.SQL("")
    if keys is not None:
        wanted = (sql.Literal(keys) + sql.SQL("::text[]")).as_string(connection)
        chosen = sql.SQL(" WHERE ") + sql.SQL(rows.by_keys.replace("$1", wanted))
    query = sql.SQL(
        "COPY (SELECT embedding, key, nullif(metadata, '{{}}')::text FROM {} AS t{})"
        " TO STDOUT (FORMAT binary)"
    ).format(sql.SQL(rows.relation), chosen)
    with connection.cursor().copy(query) as stream:
        yield from decode_rows_with_notes(stream, dims)
