"""Keys, vectors and metadata of a space or of one version of it: written, kept, averaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, cast, overload

from numpy.typing import ArrayLike
from psycopg import sql

from ehub import average, values
from ehub.average import FieldValue
from ehub.binary import VectorParameter
from ehub.checkpoint import Checkpoint, CheckpointInfo
from ehub.database import copy_rows, require_encodable
from ehub.errors import AttachedError, InvalidValueError
from ehub.search import Searchable
from ehub.snapshot import Snapshot
from ehub.types import Matrix, Metadata, Partition, Vector

_COPY_ROWS = 5000

Row: TypeAlias = tuple[str, ArrayLike] | tuple[str, ArrayLike, Metadata | None]
"""A key and a vector, or a key, a vector and metadata."""


class Restored(NamedTuple):
    """What a restore changed: the rows that it wrote and those that it deleted."""

    written: int
    deleted: int


class SubIndex(NamedTuple):
    """An index over the rows that match ``where``.

    Attributes:
        M, ef_construction, target_recall: what it is built with, and how good it is to be.
        state: of its copy that is farthest, None where there is none that one may see; and its
            ``rows`` and measured ``recall``.
    """

    name: str
    where: dict[str, Any]
    M: int
    ef_construction: int
    target_recall: float
    state: str | None
    rows: int | None
    recall: float | None


class Collection(Searchable):
    """Embeddings that can be written and searched: a space (its current version), or a version.

    Keys are strings of 1 to 1024 bytes, vectors anything that numpy reads as numbers, metadata a
    JSON object. Every write is one transaction, durable when the call returns; to a version that
    was frozen it raises :class:`ehub.FrozenError`.
    """

    @property
    def frozen(self) -> bool:
        """Whether it can be written no more; asked of Postgres."""
        return self._read_shape().frozen

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address!r}: {self.dims} dims, {self.metric}>"

    # --- keys and values

    def set(
        self,
        key: str,
        vector: ArrayLike,
        metadata: Metadata | None = None,
        *,
        partition: Partition | None = None,
    ) -> None:
        """Store a vector under a key, in place of what was there.

        Without ``metadata`` a key that was there keeps what it had. ``partition`` is put into it,
        under the field that the space is partitioned by.

        Raises:
            InvalidValueError: the key, the vector, the metadata, or a partition where there are
                none; nothing was changed.
        """
        place = values.describe(self._address, values.as_key(key))
        if partition is not None:
            metadata = self._in_partition(metadata, partition)
        parameter = VectorParameter(self._as_vector(vector, place))
        update = sql.SQL("embedding = EXCLUDED.embedding")
        parameters: list[object] = [key, parameter]
        note: sql.Composable = sql.SQL("'{}'")
        written: str | None = None
        if metadata is None and self.partition_by is not None:
            # A row without its partition is refused before it is seen that there is one already.
            note = sql.SQL(
                "coalesce((SELECT t.metadata FROM {} AS t WHERE t.key = %s), '{{}}')"
            ).format(self._written)
            parameters.append(key)
        elif metadata is not None:
            written = values.as_json(metadata, place)
            note = sql.SQL("%s")
            update = sql.SQL("embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata")
            parameters.append(written)
        statement = sql.SQL(
            "INSERT INTO {} (key, embedding, metadata) VALUES (%s, %s, {}) ON CONFLICT (key)"
            " DO UPDATE SET {} RETURNING pg_current_xact_id()::text::bigint"
        ).format(self._written, note, update)
        with self._database.connection(self._address) as connection:
            require_encodable(connection, self._address, [key], [written])
            row = connection.execute(statement, parameters).fetchone()
        self._wrote(row)

    def _in_partition(self, metadata: Metadata | None, partition: Partition) -> Metadata:
        text = values.as_partition(partition)
        field = self.partition_by
        if field is None:
            raise InvalidValueError(f"space {self._address!r} has no partitions")
        given = dict(metadata or {})
        if field in given and values.as_partition(given[field]) != text:
            raise InvalidValueError(
                f"space {self._address!r}: partition {partition!r}, and {given[field]!r} in the"
                f" metadata, field {field!r}"
            )
        return {field: partition, **given}

    @overload
    def multiset(
        self, rows: Mapping[str, ArrayLike] | Iterable[Row], /, *, checkpoint: str | None = None
    ) -> int: ...
    @overload
    def multiset(
        self,
        keys: Sequence[str],
        vectors: ArrayLike,
        /,
        metadata: Sequence[Metadata | None] | None = None,
        *,
        checkpoint: str | None = None,
    ) -> int: ...
    def multiset(
        self,
        rows: Mapping[str, ArrayLike] | Iterable[Row] | Sequence[str],
        vectors: ArrayLike | None = None,
        /,
        metadata: Sequence[Metadata | None] | None = None,
        *,
        checkpoint: str | None = None,
    ) -> int:
        """Store many vectors in one transaction: all or nothing. Returns the number of keys.

        Takes a mapping from key to vector; an iterable of ``(key, vector)`` or ``(key, vector,
        metadata)``, which is streamed; or keys with a 2-d array of shape ``(n, dims)``. Where a
        key comes twice, the last one counts. Without metadata a key keeps what it had.
        ``checkpoint`` names one that is made of the state just before.

        Raises:
            InvalidValueError: a row, which is named, or no rows at all; nothing was changed.
            CheckpointExistsError: there is one of that name; nothing was changed.
        """
        if vectors is not None:
            keys = values.as_keys(cast("Sequence[str]", rows))
            names = [values.describe(self._address, key) for key in keys]
            matrix = self._as_matrix(vectors, names)
            if len(matrix) != len(keys) or (metadata is not None and len(metadata) != len(keys)):
                raise InvalidValueError(
                    f"space {self._address!r}: {len(keys)} keys, {len(matrix)} vectors"
                    + ("" if metadata is None else f", {len(metadata)} metadata")
                )
            notes = None
            if metadata is not None:
                notes = [
                    None if note is None else values.as_json(note, name)
                    for note, name in zip(metadata, names, strict=True)
                ]
            batches: Iterable[tuple[list[str], Matrix, list[str | None] | None]] = (
                (
                    keys[start : start + _COPY_ROWS],
                    matrix[start : start + _COPY_ROWS],
                    notes and notes[start : start + _COPY_ROWS],
                )
                for start in range(0, len(keys), _COPY_ROWS)
            )
        else:
            batches = self._batches(rows.items() if isinstance(rows, Mapping) else rows)
        return self._merge(batches, checkpoint)

    def delete(self, key: str) -> None:
        """Delete a key.

        Raises:
            KeyNotFoundError: it was not there.
        """
        self.multidelete([key])

    def multidelete(self, keys: Iterable[str]) -> int:
        """Delete many keys in one transaction, and return their number.

        Raises:
            KeyNotFoundError: one of them was not there; nothing was deleted.
            InvalidValueError: no keys were given.
        """
        wanted = values.as_keys(keys)
        statement = sql.SQL(
            "WITH gone AS (DELETE FROM {} WHERE key = ANY(%s) RETURNING key)"
            " SELECT array_agg(key), pg_current_xact_id()::text::bigint FROM gone"
        ).format(self._written)
        with self._database.connection(self._address) as connection, connection.transaction():
            row = connection.execute(statement, [wanted]).fetchone()
            gone = set(row[0] or ()) if row else set()
            for key in wanted:
                if key not in gone:
                    raise self._no_key(key)
        self._wrote(row and row[1:])
        return len(gone)

    def delete_all(self) -> int:
        """Delete every key in one transaction, and return their number."""
        statement = sql.SQL(
            "WITH gone AS (DELETE FROM {} RETURNING 1)"
            " SELECT count(*), pg_current_xact_id()::text::bigint FROM gone"
        ).format(self._written)
        with self._database.connection(self._address) as connection:
            row = connection.execute(statement).fetchone()
        self._wrote(row and row[1:])
        return int(row[0]) if row else 0

    # --- sub-indexes and partitions

    def create_index(
        self,
        name: str,
        where: Metadata,
        *,
        M: SupportsIndex | None = None,
        ef_construction: SupportsIndex | None = None,
        target_recall: float | None = None,
    ) -> None:
        """Make an index over just the rows that match a filter; it is built in the background.

        Searches use it by its name, and where their own filter implies ``where``. It costs memory
        in proportion to its rows. What is not said is as in the index over all rows. Of a space it
        is of the current version, and versions that are made from now on have it too.

        Raises:
            InvalidNameError: not 1 to 60 letters, digits, ``_``, ``-`` or ``.``.
            InvalidFilterError: the filter, which must not be empty.
            InvalidValueError: another value; the message names it and its limits.
            IndexExistsError: there is one of that name.
        """
        with self._database.connection(self._address) as connection:
            connection.execute(
                "SELECT ehub.create_index(%s, %s, %s::jsonb, %s::int, %s::int, %s)",
                [
                    self._address,
                    values.as_name("an index", name),
                    values.as_filter(where),
                    *values.as_build(M, ef_construction, target_recall),
                ],
            )

    def drop_index(self, name: str) -> None:
        """Drop an index that :meth:`create_index` has made.

        Raises:
            IndexNotFoundError: there is none of that name.
        """
        self._call("drop_index", values.as_name("an index", name))
        if self._replica is not None:
            self._replica.refresh()

    def indexes(self) -> list[SubIndex]:
        """Return the sub-indexes, by name."""
        with self._database.connection(self._address) as connection:
            rows = connection.execute(
                'SELECT i.index, i."where", i.m, i.ef_construction, i.target_recall, i.state,'
                " i.rows, i.recall FROM ehub.sub_indexes AS i"
                " JOIN ehub.require_space(%s) AS s ON s.version_id = i.version_id ORDER BY i.index",
                [self._address],
            )
            return [SubIndex(*row) for row in rows]

    def partitions(self) -> dict[str, int]:
        """Return the number of rows of each partition, by the text of its value, largest first.

        Raises:
            InvalidValueError: the space has no partitions.
        """
        with self._database.connection(self._address) as connection:
            rows = connection.execute("SELECT * FROM ehub.partitions(%s)", [self._address])
            return dict(rows.fetchall())

    def drop_partition(self, partition: Partition) -> int:
        """Delete all rows of a partition in one statement, and return their number.

        Raises:
            PartitionNotFoundError: it has none.
            InvalidValueError: the space has no partitions.
        """
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT ehub.drop_partition(%s, %s), pg_current_xact_id()::text::bigint",
                [self._address, values.as_partition(partition)],
            ).fetchone()
        self._wrote(row and row[1:])
        return int(row[0]) if row else 0

    # --- averages

    @overload
    def average(
        self,
        keys: Iterable[str],
        weights: Iterable[float] | None = None,
    ) -> Vector: ...
    @overload
    def average(self, *, filter: Metadata | None = None) -> Vector | None: ...
    def average(
        self,
        keys: Iterable[str] | None = None,
        weights: Iterable[float] | None = None,
        *,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
    ) -> Vector | None:
        """Return the average of the vectors of ``keys``, float32 of shape ``(dims,)``.

        A key that comes twice counts twice; ``weights`` are one for each key. Without keys: of the
        rows that match ``filter``, or of all; None where there are none. Each number is off by less
        than 1e-7 of itself, with weights of both signs by that of the average of the sizes.

        Raises:
            KeyNotFoundError: one of the keys is not there; it is named.
            InvalidValueError: no keys, both keys and a filter, not a weight for each key, a weight
                that is no finite number from 1e-100 to 1e100 in size or 0, or weights that sum to
                zero.
            InvalidFilterError: the filter.
        """
        return average.average(self._database, self._address, keys, weights, filter)

    def averages(
        self,
        by: str,
        weight: str | None = None,
        *,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
    ) -> dict[FieldValue, Vector]:
        """Return the average of the rows with each value of field ``by``: float32, ``(dims,)``.

        Weighted by the numbers in field ``weight`` if one is given. ``a.b`` is field ``b`` of the
        object in ``a``, as in filters. Rows whose value is no string, number, true or false do not
        take part, nor those whose weight is no number; a value whose weights sum to zero has no
        average. :meth:`ehub.Hub.create_average` keeps averages in a space.

        Raises:
            InvalidValueError: a name of a field, or two values that are one key of a dict, as 1
                and True.
            InvalidFilterError: the filter.
        """
        return average.averages(self._database, self._address, by, weight, filter)

    # --- checkpoints, snapshots

    def checkpoint(self, name: str) -> None:
        """Remember the rows as they are now, under a name.

        Waits for transactions that are writing, and copies nothing: from now on, what changes a
        row for the first time keeps its image of before, until the checkpoint is dropped.

        Raises:
            InvalidNameError: not 1 to 60 letters, digits, ``_``, ``-`` or ``.``.
            CheckpointExistsError: there is one of that name.
        """
        self._call("checkpoint", values.as_name("a checkpoint", name))

    def checkpoints(self) -> list[CheckpointInfo]:
        """Return the checkpoints, the oldest first."""
        with self._database.connection(self._address) as connection:
            rows = connection.execute(
                "SELECT c.checkpoint, c.created_at, c.created_by FROM ehub.checkpoints AS c"
                " JOIN ehub.require_space(%s) AS s ON s.version_id = c.version_id ORDER BY c.id",
                [self._address],
            )
            return [CheckpointInfo(*row) for row in rows]

    def at(self, name: str) -> Checkpoint:
        """Return the rows as of a checkpoint, to read.

        Raises:
            CheckpointNotFoundError: there is none of that name.
        """
        address = self._pinned()
        with self._database.connection(self._address) as connection:
            connection.execute(
                "SELECT ehub.require_checkpoint(ehub.require_space(%s), %s)",
                [address, values.as_name("a checkpoint", name)],
            )
        return Checkpoint(address, name, self.dims, self.metric, self._database)

    def restore(self, name: str) -> Restored:
        """Put the rows back to what they were at a checkpoint, in one transaction.

        Takes time in proportion to what has changed since; indexes follow it as any change.

        Raises:
            CheckpointNotFoundError: there is none of that name.
            FrozenError: the version was frozen.
        """
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT written, deleted, pg_current_xact_id()::text::bigint"
                " FROM ehub.restore(%s, %s)",
                [self._address, values.as_name("a checkpoint", name)],
            ).fetchone()
        assert row is not None  # noqa: S101 - the function returns a row
        self._wrote(row[2:])
        return Restored(*row[:2])

    def drop_checkpoint(self, name: str) -> None:
        """Forget a checkpoint, and the images of rows that only it needed.

        Raises:
            CheckpointNotFoundError: there is none of that name.
        """
        self._call("drop_checkpoint", values.as_name("a checkpoint", name))

    def freeze(self) -> None:
        """Refuse every write from now on: by whomever, by whatever way, for good."""
        self._call("freeze")

    def keep_warm(self, warm: bool = True) -> None:
        """Say whether indexes are kept of this version while it is not the current one.

        They are of a new version, and of the one that was current before.
        """
        self._call("keep_warm", warm)

    def download_snapshot(self, watch: Callable[[int, int], None] | None = None) -> Snapshot:
        """Download all rows, as of one instant, to search and read here.

        ``watch`` is told now and then how many rows of how many have come.
        """
        return Snapshot.download(self._database, self._address, watch)

    # --- inside

    @property
    def _written(self) -> sql.Composable:
        """The view through which rows are written."""
        if self.attached_to is not None:
            raise AttachedError(
                f"space {self._address!r} is attached to {self.attached_to}: its rows are written"
                " there"
            )
        return sql.Identifier("spaces", self._address)

    def _call(self, function: str, *parameters: object) -> None:
        """Call a function of schema ehub on this."""
        statement = sql.SQL("SELECT {}({})").format(
            sql.Identifier("ehub", function),
            sql.SQL(", ").join([sql.Placeholder()] * (1 + len(parameters))),
        )
        with self._database.connection(self._address) as connection:
            connection.execute(statement, [self._address, *parameters])

    def _merge(
        self,
        batches: Iterable[tuple[Sequence[str], Matrix, Sequence[str | None] | None]],
        checkpoint: str | None,
    ) -> int:
        with self._database.connection(self._address) as connection, connection.transaction():
            connection.execute("SELECT ehub.stage()")
            if not copy_rows(connection, self._address, "ehub_staging", batches):
                raise InvalidValueError("an empty batch: no embeddings were given")
            if checkpoint is not None:
                connection.execute("SELECT ehub.checkpoint(%s, %s)", [self._address, checkpoint])
            row = connection.execute(
                "SELECT ehub.merge_staged(%s), pg_current_xact_id()::text::bigint", [self._address]
            ).fetchone()
        self._wrote(row and row[1:])
        return int(row[0]) if row else 0

    def _batches(
        self, rows: Iterable[object]
    ) -> Iterator[tuple[list[str], Matrix, list[str | None] | None]]:
        if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
            raise InvalidValueError(
                f"space {self._address!r}: rows are a mapping or pairs of key and vector, not"
                f" {rows!r:.60}"
            )
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, _COPY_ROWS)):
            keys: list[str] = []
            vectors: list[ArrayLike] = []
            notes: list[str | None] = []
            for row in batch:
                if not isinstance(row, tuple | list) or len(row) not in (2, 3):
                    raise InvalidValueError(
                        f"space {self._address!r}: a row is (key, vector) or (key, vector,"
                        f" metadata), not {row!r:.60}"
                    )
                keys.append(values.as_key(row[0]))
                vectors.append(row[1])
                note = row[2] if len(row) == 3 else None
                notes.append(
                    None
                    if note is None
                    else values.as_json(note, values.describe(self._address, keys[-1]))
                )
            names = [values.describe(self._address, key) for key in keys]
            matrix = self._as_matrix(vectors, names)
            yield keys, matrix, notes

    def _wrote(self, row: Sequence[int] | None) -> None:
        """Remember a transaction that the index must see before it answers this process."""
        if row and self._replica is not None:
            self._replica.wrote(self._address, row[0])
