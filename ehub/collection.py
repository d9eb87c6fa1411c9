"""Keys, vectors, metadata and nearest neighbours, of a space or of one version of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, SupportsIndex, TypeAlias, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from psycopg import sql

from ehub import average, values
from ehub.average import FieldValue
from ehub.binary import VectorParameter, VectorsParameter
from ehub.checkpoint import Checkpoint, CheckpointInfo
from ehub.database import Connection, Database, copy_rows
from ehub.errors import (
    ConfigurationError,
    InvalidValueError,
    ServiceError,
    WaitTimeoutError,
)
from ehub.replica import Answering, Progress, Replica
from ehub.rows import Rows
from ehub.snapshot import Snapshot
from ehub.types import Consistency, IndexPlace, Matrix, Metadata, Metric, Neighbor, Vector

_WAIT_SECONDS = 0.05
_COPY_ROWS = 5000

Row: TypeAlias = tuple[str, ArrayLike] | tuple[str, ArrayLike, Metadata | None]
"""A key and a vector, or a key, a vector and metadata."""


class _Shape(NamedTuple):
    """What the version that is meant is like."""

    version: str
    dims: int
    metric: Metric
    M: int
    ef_construction: int
    target_recall: float
    frozen: bool


class Restored(NamedTuple):
    """What a restore changed: the rows that it wrote and those that it deleted."""

    written: int
    deleted: int


class Collection(Rows):
    """Embeddings that can be written and searched: a space (its current version), or a version.

    Keys are strings of 1 to 1024 bytes, vectors anything that numpy reads as numbers, metadata a
    JSON object. Every write is one transaction, durable when the call returns; to a version that
    was frozen it raises :class:`ehub.FrozenError`.
    """

    def __init__(
        self, address: str, database: Database, index: IndexPlace, replica: Replica | None
    ) -> None:
        super().__init__(address, database)
        self._by_service = index == "service"
        self._index_place: IndexPlace = index
        self._replica = replica
        self._view = sql.Identifier("spaces", address)
        self._shape = self._read_shape()

    @property
    def dims(self) -> int:
        """The length of its vectors."""
        return self._shape.dims

    @property
    def metric(self) -> Metric:
        """``l2``, ``cosine`` or ``ip``."""
        return self._shape.metric

    @property
    def M(self) -> int:  # noqa: N802 - the field's own name
        """The links of a node of its index."""
        return self._shape.M

    @property
    def ef_construction(self) -> int:
        """The candidates kept while a node of its index is linked."""
        return self._shape.ef_construction

    @property
    def target_recall(self) -> float:
        """The share of true neighbours that a search is to find."""
        return self._shape.target_recall

    @property
    def frozen(self) -> bool:
        """Whether it can be written no more; asked of Postgres."""
        return self._read_shape().frozen

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address!r}: {self.dims} dims, {self.metric}>"

    # --- keys and values

    def set(self, key: str, vector: ArrayLike, metadata: Metadata | None = None) -> None:
        """Store a vector under a key, in place of what was there.

        Without ``metadata`` a key that was there keeps what it had.

        Raises:
            InvalidValueError: the key, the vector or the metadata; nothing was changed.
        """
        place = values.describe(self._address, values.as_key(key))
        parameter = VectorParameter(self._as_vector(vector, place))
        update = sql.SQL("embedding = EXCLUDED.embedding")
        parameters: list[object] = [key, parameter]
        if metadata is not None:
            update = sql.SQL("embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata")
            parameters.append(values.as_json(metadata, place))
        statement = sql.SQL(
            "INSERT INTO {} (key, embedding{}) VALUES (%s, %s{}) ON CONFLICT (key)"
            " DO UPDATE SET {} RETURNING pg_current_xact_id()::text::bigint"
        ).format(
            self._view,
            sql.SQL("" if metadata is None else ", metadata"),
            sql.SQL("" if metadata is None else ", %s"),
            update,
        )
        with self._database.connection(self._address) as connection:
            row = connection.execute(statement, parameters).fetchone()
        self._wrote(row)

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
        ).format(self._view)
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
        ).format(self._view)
        with self._database.connection(self._address) as connection:
            row = connection.execute(statement).fetchone()
        self._wrote(row and row[1:])
        return int(row[0]) if row else 0

    # --- neighbours

    def nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        key: str | None = None,
        vector: ArrayLike | None = None,
        metadata: bool = False,
        consistency: Consistency = "replica",
    ) -> list[Neighbor]:
        """Find the ``k`` nearest rows to a stored ``key``, which is left out, or to a ``vector``.

        Returns them nearest first, fewer than ``k`` only where the space has fewer. Distances are
        pgvector's: Euclidean, cosine distance, negative inner product.

        The index of this process answers, as of its watermark: never behind this process' own last
        write. ``consistency="strong"`` sees everything that was committed before the call, by
        anybody; the index service always does. The first call starts the index of this process;
        until it is ready Postgres answers, exactly.

        Raises:
            KeyNotFoundError: there is no such key.
            InvalidValueError: ``k``, the vector, or not just one of ``key`` and ``vector``.
        """
        count = values.as_count(k)
        strong = self._strong(consistency)
        values.require_one_of(key, vector)
        if key is not None:
            return self._neighbors_of_key(values.as_key(key), count, metadata, strong)
        query = self._as_vector(vector, f"space {self._address!r}, query")
        answering = self._index_for_queries(strong)
        if answering is not None:
            found = answering.index.search(query[None], count)
            if found is not None:
                near = list(map(Neighbor, *found[0]))
                answer = self._complete(near, metadata, answering)
                if answer is not None:
                    return answer
        return self._by_postgres(self._address, query, count, metadata)

    def multi_nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        vectors: ArrayLike,
        metadata: bool = False,
        consistency: Consistency = "replica",
    ) -> list[list[Neighbor]]:
        """Find the ``k`` nearest rows to each of many vectors, shape ``(n, dims)``, in parallel.

        As :meth:`nearest_neighbors` otherwise.

        Raises:
            InvalidValueError: ``k``, a vector, which is named by its row, or no vectors at all.
        """
        count = values.as_count(k)
        strong = self._strong(consistency)
        queries = values.require_some(self._as_matrix(vectors, f"space {self._address!r}, queries"))
        answering = self._index_for_queries(strong)
        if answering is not None:
            found = answering.index.search(queries, count)
            if found is not None:
                flat = [neighbor for one in found for neighbor in map(Neighbor, *one)]
                whole = self._complete(flat, metadata, answering)
                if whole is not None:
                    rest = iter(whole)
                    return [list(itertools.islice(rest, len(one.keys))) for one in found]
        if self._by_service:
            return self._many_by_service(queries, count, metadata)
        # All by one version, also where another is promoted meanwhile.
        address = self._pinned()
        return [self._by_postgres(address, query, count, metadata) for query in queries]

    def wait_until_indexed(
        self, timeout: float | None = None, *, watch: Callable[[Progress], None] | None = None
    ) -> None:
        """Wait until the index is ready and sees all that was committed before the call.

        ``timeout`` is in seconds; ``watch`` is told of the progress now and then.

        Raises:
            WaitTimeoutError: it was not ready in time; the work goes on.
            EhubError: no index can be made, or no service is installed; the message says which.
        """
        self._read_shape()
        if self._by_service:
            self._wait_for_service(timeout)
        elif self._replica is not None:
            self._replica.wait_until_ready(self._address, timeout, watch)
        else:
            raise ConfigurationError("this hub was connected with index='none'; there is no index")

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

    def _call(self, function: str, *parameters: object) -> None:
        """Call a function of schema ehub on this."""
        statement = sql.SQL("SELECT {}({})").format(
            sql.Identifier("ehub", function),
            sql.SQL(", ").join([sql.Placeholder()] * (1 + len(parameters))),
        )
        with self._database.connection(self._address) as connection:
            connection.execute(statement, [self._address, *parameters])

    def _index(self, strong: bool) -> Answering | None:
        if self._replica is None:
            return None
        self._replica.follow(self._address)
        return self._replica.index(self._address, strong=strong)

    def _index_for_queries(self, strong: bool) -> Answering | None:
        """Return the index if it is of the shape that queries were checked for."""
        found = self._index(strong)
        if found is None or (found.index.dims, found.index.metric) == (self.dims, self.metric):
            return found
        # Another version has been promoted, or the space was made anew: what these queries were
        # checked for says nothing of its metric. Postgres checks them anew, this once.
        self._read_shape()
        return None

    def _neighbors_of_key(self, key: str, k: int, metadata: bool, strong: bool) -> list[Neighbor]:
        answering = self._index(strong)
        vector = None if answering is None else answering.index.vector(key)
        if answering is not None and vector is not None:
            found = answering.index.search(vector[None], k + 1)
            if found is not None:
                near = [one for one in map(Neighbor, *found[0]) if one.key != key]
                answer = self._complete(near[:k], metadata, answering)
                if answer is not None:
                    return answer
        function = "nearest_to" if self._by_service else "nearest_exact_to"
        return self._ask(function, [self._address, key, k], metadata)

    def _by_postgres(self, address: str, query: Vector, k: int, metadata: bool) -> list[Neighbor]:
        function = "nearest" if self._by_service else "nearest_exact"
        return self._ask(function, [address, VectorParameter(query), k], metadata)

    def _ask(self, function: str, values: list[object], metadata: bool) -> list[Neighbor]:
        statement = sql.SQL("SELECT key, distance, {} FROM {}(%s, %s, %s)").format(
            sql.SQL("metadata" if metadata else "NULL"), sql.Identifier("ehub", function)
        )
        with self._database.connection(self._address) as connection:
            return [Neighbor(*row) for row in connection.execute(statement, values)]

    def _many_by_service(self, queries: Matrix, k: int, metadata: bool) -> list[list[Neighbor]]:
        statement = sql.SQL(
            "SELECT q, key, distance, {} FROM ehub.nearest_many(%s, %s, %s)"
        ).format(sql.SQL("metadata" if metadata else "NULL"))
        answers: list[list[Neighbor]] = [[] for _ in queries]
        with self._database.connection(self._address) as connection:
            vectors = VectorsParameter(queries, self._vector_type(connection))
            for q, *found in connection.execute(statement, [self._address, vectors, k]):
                answers[q - 1].append(Neighbor(*found))
        return answers

    def _vector_type(self, connection: Connection) -> int:
        """Return the oid of pgvector's type."""
        oid = connection.execute(
            "SELECT atttypid FROM pg_attribute"
            " WHERE attrelid = to_regclass(format('spaces.%%I', %s::text))"
            " AND attname = 'embedding'",
            [self._address],
        ).fetchone()
        return oid[0] if oid else 0

    def _wait_for_service(self, timeout: float | None) -> None:
        if not self._database.has_service():
            raise ServiceError("the database has no index service: run `ehub install-service`")
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._database.connection(self._address) as connection:
            seen = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
            assert seen is not None  # noqa: S101 - a select without from
            while True:
                row = connection.execute(
                    "SELECT ehub.index_missing(%s, %s::text::pg_snapshot)", [self._address, seen[0]]
                ).fetchone()
                if row == (None,):
                    return
                if deadline is not None and time.monotonic() > deadline:
                    why = row and row[0]
                    raise WaitTimeoutError(
                        f"space {self._address!r}: the index was not ready in {timeout} seconds:"
                        f" {why}"
                    )
                time.sleep(_WAIT_SECONDS)

    def _complete(
        self, near: list[Neighbor], metadata: bool, answering: Answering
    ) -> list[Neighbor] | None:
        """Add metadata where it is asked for; None if a row is gone since the watermark."""
        if not metadata or not near:
            return near
        # Of the version that the index holds, whichever is current by now.
        query = sql.SQL("SELECT key, metadata FROM {} WHERE key = ANY(%s)").format(
            answering.entry.relation
        )
        keys = list({one.key for one in near})
        with self._database.connection(self._address) as connection:
            notes = dict(connection.execute(query, [keys]).fetchall())
        if len(notes) < len(keys):
            return None
        return [one._replace(metadata=notes[one.key]) for one in near]

    def _merge(
        self,
        batches: Iterable[tuple[Sequence[str], Matrix, Sequence[str | None] | None]],
        checkpoint: str | None,
    ) -> int:
        with self._database.connection(self._address) as connection, connection.transaction():
            connection.execute("SELECT ehub.stage()")
            if not copy_rows(connection, "ehub_staging", batches):
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
        if isinstance(rows, str | bytes):
            raise InvalidValueError("a mapping or pairs of key and vector are needed, not a string")
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

    def _read_shape(self) -> _Shape:
        space, at, version = self._address.partition("@")
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT version, dims, metric, m, ef_construction, target_recall, frozen"
                " FROM ehub.catalogue"
                " WHERE space = %s AND CASE WHEN %s THEN version = %s ELSE current END",
                [space, bool(at), version],
            ).fetchone()
            if row is None:
                # It knows what is missing, and says it.
                connection.execute("SELECT ehub.require_space(%s)", [self._address])
        assert row is not None  # noqa: S101 - else that has raised
        self._shape = _Shape(*row)
        return self._shape

    def _pinned(self) -> str:
        """Return the address of the version that is meant now."""
        return f"{self._address.partition('@')[0]}@{self._read_shape().version}"

    def _relation(self, keys: list[str] | None = None) -> sql.Composable:
        return self._view

    def _as_vector(self, value: object, name: str) -> Vector:
        return self._checked(lambda: values.as_vector(value, self.dims, self.metric, name))

    def _as_matrix(self, value: object, names: Sequence[str] | str) -> Matrix:
        return self._checked(lambda: values.as_matrix(value, self.dims, self.metric, names))

    def _checked(self, check: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Check a value; what the space is may have changed since this handle was made."""
        try:
            return check()
        except InvalidValueError:
            before = self._shape
            if self._read_shape() == before:
                raise
            return check()

    def _strong(self, consistency: str) -> bool:
        if consistency not in ("replica", "strong"):
            raise InvalidValueError(f"consistency is 'replica' or 'strong', not {consistency!r}")
        return consistency == "strong"
