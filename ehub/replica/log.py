"""What a replica reads: the table and its change log, as of one snapshot."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from ehub.binary import decode_rows, decode_rows_with_notes, decode_vector
from ehub.database import Connection
from ehub.types import Matrix, Metric
from ehub.watermark import Watermark

_READ_KEYS = 1000
_ENTRIES = (
    "SELECT space, version, version_id, dims, metric, index_id, m, ef_construction, target_recall,"
    " current, name, partition_by, coalesce(condition, 'true'), whole, source, by_keys, attached,"
    " token, outdated, problem, shape FROM ehub.indexes"
)


class Entry(NamedTuple):
    """A row of ``ehub.indexes``: a version of a space, and an index of it.

    It is over all rows (``whole``), or over those that limited roles see, or with a ``name`` over
    those that match a filter. Over all rows of a version with partitions it is kept by the values
    of ``partition_by``, a field of metadata.
    """

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
    name: str | None
    partition_by: str | None
    # As the database itself has written these: which rows it has, of what, and how to find some.
    condition: Any
    whole: bool
    source: Any
    by_keys: Any
    # An attached table is somebody else's, who may alter it. Of any table: what is the same while
    # every change of it is logged, and why it cannot be followed; of an attached one, whether its
    # functions were made for another shape.
    attached: bool
    token: str | None
    outdated: bool | None
    problem: str | None
    # What it is called and has: under another one filters mean other columns.
    shape: str | None

    @property
    def address(self) -> str:
        """What this version goes by, whichever is current."""
        return f"{self.space}@{self.version}"

    @property
    def state(self) -> tuple[str | None, str]:
        """What an index of it was made under; under another one it must be compared."""
        return self.token, self.condition

    @property
    def partition(self) -> str:
        """What partition a row is in, as an expression; NULL where there are none."""
        if self.partition_by is None:
            return "NULL::text"
        return f"metadata ->> {sql.Literal(self.partition_by).as_string()}"

    def rows_with_keys(self, columns: str, condition: str = "true") -> sql.Composed:
        """Return a query for columns of the rows of some keys, its parameter ``keys``."""
        query = sql.SQL("SELECT {} FROM {} AS rows WHERE {} AND ({})")
        by_keys: Any = _escaped(self.by_keys).replace("$1", "%(keys)s::text[]")
        parts: list[Any] = [columns, _escaped(self.source), by_keys, condition]
        return query.format(*map(sql.SQL, parts))

    def build_parameters(self) -> dict[str, Any]:
        """Return what a graph depends on; a saved one with others is of no use."""
        return {
            "dims": self.dims,
            "metric": self.metric,
            "m": self.m,
            "ef_construction": self.ef_construction,
            "partition_by": self.partition_by,
        }


class Batch(NamedTuple):
    """Some rows.

    Attributes:
        keys: their keys, and ``vectors`` float32 of shape ``(n, dims)``.
        partitions: where each belongs; "" where there are no partitions.
        matches: which conditions hold for which row, of shape ``(n, conditions)``.
    """

    keys: list[str]
    vectors: Matrix
    partitions: list[str]
    matches: NDArray[np.bool_]


class Behind(Exception):  # noqa: N818 - control flow, not an error
    """The log that a watermark needs is gone, or the whole table changed."""


def read_catalogue(connection: Connection, addresses: Collection[str] | None) -> list[Entry]:
    """Return the indexes to keep, those of current versions first.

    For the name of a space these are of its current version and of those that are to be kept warm,
    for the address of a version just of that one; None stands for the names of all spaces, and for
    the indexes over limited rows too, which only searches in SQL have a use for.
    """
    rows = connection.execute(
        f"{_ENTRIES} WHERE (current OR warm) AND %(names)s::text[] IS NULL OR rows IS NULL AND"
        " ((current OR warm) AND space = ANY(%(names)s)"
        " OR space || '@' || version = ANY(%(names)s))"
        " ORDER BY current DESC, version_id, rows NULLS FIRST, name NULLS FIRST",
        {"names": None if addresses is None else list(addresses)},
    )
    return [Entry(*row) for row in rows]


def read_entry(connection: Connection, entry: Entry) -> Entry:
    """Return what an entry is now; raises Behind where there is none any more."""
    row = connection.execute(f"{_ENTRIES} WHERE index_id = %s", [entry.index_id]).fetchone()
    if row is None:
        raise Behind("it is gone")
    return Entry(*row)


def take_snapshot(connection: Connection) -> Watermark:
    """Return the snapshot of the transaction."""
    row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None  # noqa: S101 - a select without from
    return Watermark.parse(row[0])


def has_log_since(connection: Connection, entry: Entry, watermark: Watermark) -> bool:
    """Whether the log has all that a watermark does not see."""
    row = connection.execute(
        "SELECT ehub.trimmed_below(%s) <= %s::text::xid8", [entry.version_id, watermark.xmin]
    ).fetchone()
    return row == (True,)


def acknowledged_nonce(
    connection: Connection, replica: uuid.UUID, index_id: int
) -> uuid.UUID | None:
    """Return the name of the last acknowledgement of a replica; None if it has no lease."""
    row = connection.execute("SELECT ehub.acknowledged(%s, %s)", [replica, index_id]).fetchone()
    return None if row is None else row[0]


def changed_keys(
    connection: Connection, entry: Entry, watermark: Watermark, redo: set[str]
) -> set[str]:
    """Return the keys that changed between a watermark and the transaction's snapshot."""
    changed = set(redo)
    for (keys,) in connection.execute(
        "SELECT keys FROM ehub.changes(%s, %s::text::pg_snapshot)",
        [entry.version_id, str(watermark)],
    ):
        if keys is None:
            raise Behind("the table was truncated, or the change log has been trimmed")
        changed.update(keys)
    return changed


def read_rows(
    connection: Connection, entry: Entry, keys: set[str], conditions: Sequence[str] = ()
) -> Iterator[Batch]:
    """Read the rows of some keys, and whether conditions hold for them, in the transaction."""
    held = ", ".join(map(_escaped, conditions))
    statement = entry.rows_with_keys(
        f"key, embedding, {_escaped(entry.partition)}, ARRAY[{held}]::bool[]",
        _escaped(entry.condition),
    )
    wanted = list(keys)
    for start in range(0, len(wanted), _READ_KEYS):
        part = wanted[start : start + _READ_KEYS]
        with _every_row(connection, entry):
            rows = connection.execute(statement, {"keys": part}, binary=True).fetchall()
        if rows:
            yield Batch(
                [row[0] for row in rows],
                np.stack([decode_vector(row[1]) for row in rows]),
                [row[2] or "" for row in rows],
                np.array([row[3] for row in rows], np.bool_).reshape(len(rows), len(conditions)),
            )


def stream_rows(connection: Connection, entry: Entry, condition: Any = "true") -> Iterator[Batch]:
    """Read all rows of the index, or those that match, as the transaction sees them."""
    query = sql.SQL(
        "COPY (SELECT embedding, key{} FROM {} AS rows WHERE ({}) AND ({}))"
        " TO STDOUT (FORMAT binary)"
    )
    partition: Any = "" if entry.partition_by is None else f", {entry.partition}"
    statement = query.format(
        sql.SQL(partition),
        sql.SQL(entry.source),
        sql.SQL(entry.condition),
        sql.SQL(condition),
    )
    with _every_row(connection, entry), connection.cursor().copy(statement) as stream:
        if entry.partition_by is None:
            for keys, vectors in decode_rows(stream, entry.dims):
                yield Batch(keys, vectors, [""] * len(keys), np.empty((len(keys), 0), np.bool_))
        else:
            for keys, vectors, names in decode_rows_with_notes(stream, entry.dims):
                nothing = np.empty((len(keys), 0), np.bool_)
                yield Batch(keys, vectors, [name or "" for name in names], nothing)


@contextlib.contextmanager
def _every_row(connection: Connection, entry: Entry) -> Iterator[None]:
    """Have Postgres fail rather than let row policies of somebody's table hide a row, in here.

    They are not even asked: what they call is their owner's, and would run with the rights of
    whoever reads.
    """
    if entry.attached:
        connection.execute("SET LOCAL row_security = off")
    yield
    if entry.attached:
        connection.execute("SET LOCAL row_security = on")


def filter_conditions(
    connection: Connection, entry: Entry, filters: Sequence[str]
) -> dict[str, str]:
    """Return what filters are in SQL, as the database translates them."""
    rows = connection.execute(
        "SELECT f, ehub.has_filter(c, f::jsonb) FROM unnest(%s::text[]) AS f"
        " JOIN ehub.catalogue AS c ON c.version_id = %s",
        [list(filters), entry.version_id],
    )
    return dict(rows.fetchall())


def _escaped(condition: str) -> Any:
    """Return an expression as it stands in a statement that has parameters."""
    return condition.replace("%", "%%")


def estimated_rows(connection: Connection, entry: Entry) -> int:
    """Return the planner's idea of the table's size, 0 where it has none."""
    row = connection.execute(
        "SELECT ehub.known_rows(coalesce(c.relation, to_regclass('ehub_data.v' || c.version_id)))"
        " FROM ehub.catalogue AS c WHERE c.version_id = %s",
        [entry.version_id],
    ).fetchone()
    return max(0, int(row[0])) if row else 0
