"""A space: keys, vectors, metadata and nearest neighbours."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from psycopg import sql

from ehub import values
from ehub.binary import (
    COPY_HEADER,
    COPY_TRAILER,
    VectorParameter,
    VectorsParameter,
    decode_vector,
    encode_rows,
)
from ehub.database import Database
from ehub.errors import (
    ConfigurationError,
    InvalidValueError,
    KeyNotFoundError,
    ServiceError,
    SpaceNotFoundError,
    WaitTimeoutError,
)
from ehub.index import HnswIndex
from ehub.replica import Progress, Replica
from ehub.types import Consistency, IndexPlace, Matrix, Metadata, Metric, Neighbor, Vector

_STREAM_ROWS = 2000
_WAIT_SECONDS = 0.05
_COPY_ROWS = 5000

Row: TypeAlias = tuple[str, ArrayLike] | tuple[str, ArrayLike, Metadata | None]
"""A key and a vector, or a key, a vector and metadata."""


class _Shape(NamedTuple):
    """What a space says of its current version."""

    dims: int
    metric: Metric
    M: int
    ef_construction: int
    target_recall: float


class Space:
    """A handle on a space; made by :class:`ehub.Hub`. Every method may be called from any thread.

    Keys are strings of 1 to 1024 bytes, vectors anything that numpy reads as numbers, metadata a
    JSON object. Every write is one transaction, durable when the call returns.

    Any method may raise :class:`ehub.UnavailableError` (Postgres is not there),
    :class:`ehub.AccessDeniedError` (the role may not) and :class:`ehub.SpaceNotFoundError` (the
    space has been deleted).
    """

    def __init__(
        self, name: str, database: Database, index: IndexPlace, replica: Replica | None
    ) -> None:
        self._name = name
        self._database = database
        self._by_service = index == "service"
        self._replica = replica
        self._view = sql.Identifier("spaces", name)
        self._shape = self._read_shape()

    @property
    def name(self) -> str:
        """The name that applications ask for."""
        return self._name

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

    def __repr__(self) -> str:
        return f"<Space {self._name!r}: {self.dims} dims, {self.metric}>"

    # --- keys and values

    def set(self, key: str, vector: ArrayLike, metadata: Metadata | None = None) -> None:
        """Store a vector under a key, in place of what was there.

        Without ``metadata`` a key that was there keeps what it had.

        Raises:
            InvalidValueError: the key, the vector or the metadata; nothing was changed.
        """
        place = values.describe(self._name, values.as_key(key))
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
        with self._database.connection(self._name) as connection:
            row = connection.execute(statement, parameters).fetchone()
        self._wrote(row)

    def get(self, key: str) -> Vector:
        """Return the vector of a key, float32 of shape ``(dims,)``.

        Raises:
            KeyNotFoundError: there is none.
        """
        query = sql.SQL("SELECT embedding FROM {} WHERE key = %s").format(self._view)
        row = self._one(query, values.as_key(key))
        if row is None:
            raise self._no_key(key)
        return decode_vector(row[0])

    def metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata of a key, ``{}`` where none was given.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        query = sql.SQL("SELECT metadata FROM {} WHERE key = %s").format(self._view)
        row = self._one(query, values.as_key(key))
        if row is None:
            raise self._no_key(key)
        return cast("dict[str, Any]", row[0])

    @overload
    def multiset(self, rows: Mapping[str, ArrayLike] | Iterable[Row], /) -> int: ...
    @overload
    def multiset(
        self,
        keys: Sequence[str],
        vectors: ArrayLike,
        /,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> int: ...
    def multiset(
        self,
        rows: Mapping[str, ArrayLike] | Iterable[Row] | Sequence[str],
        vectors: ArrayLike | None = None,
        /,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> int:
        """Store many vectors in one transaction: all or nothing. Returns the number of keys.

        Takes a mapping from key to vector; an iterable of ``(key, vector)`` or ``(key, vector,
        metadata)``, which is streamed; or keys with a 2-d array of shape ``(n, dims)``. Where a
        key comes twice, the last one counts. Without metadata a key keeps what it had.

        Raises:
            InvalidValueError: a row, which is named, or no rows at all; nothing was changed.
        """
        if vectors is not None:
            keys = values.as_keys(cast("Sequence[str]", rows))
            names = [values.describe(self._name, key) for key in keys]
            matrix = self._as_matrix(vectors, names)
            if len(matrix) != len(keys) or (metadata is not None and len(metadata) != len(keys)):
                raise InvalidValueError(
                    f"space {self._name!r}: {len(keys)} keys, {len(matrix)} vectors"
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
        return self._merge(batches)

    def multiget(self, keys: Iterable[str]) -> Matrix:
        """Return the vectors of many keys, in their order: float32 of shape ``(n, dims)``.

        Raises:
            KeyNotFoundError: one of them is not there; it is named.
            InvalidValueError: no keys were given.
        """
        wanted = values.as_keys(keys)
        query = sql.SQL("SELECT key, embedding FROM {} WHERE key = ANY(%s)").format(self._view)
        with self._database.connection(self._name) as connection:
            found = dict(connection.execute(query, [wanted], binary=True).fetchall())
        for key in wanted:
            if key not in found:
                raise self._no_key(key)
        return np.stack([decode_vector(found[key]) for key in wanted])

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
        with self._database.connection(self._name) as connection, connection.transaction():
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
        with self._database.connection(self._name) as connection:
            row = connection.execute(statement).fetchone()
        self._wrote(row and row[1:])
        return int(row[0]) if row else 0

    def __len__(self) -> int:
        """Count the keys, in Postgres."""
        query = sql.SQL("SELECT count(*) FROM {}").format(self._view)
        with self._database.connection(self._name) as connection:
            row = connection.execute(query).fetchone()
        return int(row[0]) if row else 0

    def __bool__(self) -> bool:
        """Be true: a handle is, also that of an empty space."""
        return True

    def __contains__(self, key: object) -> bool:
        query = sql.SQL("SELECT 1 FROM {} WHERE key = %s").format(self._view)
        return self._one(query, values.as_key(key)) is not None

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def keys(self) -> Iterator[str]:
        """Iterate over the keys as of one moment, in no order, streamed from Postgres."""
        for (key,) in self._stream("key"):
            yield key

    @overload
    def items(self, *, metadata: Literal[False] = False) -> Iterator[tuple[str, Vector]]: ...
    @overload
    def items(self, *, metadata: Literal[True]) -> Iterator[tuple[str, Vector, dict[str, Any]]]: ...
    def items(
        self, *, metadata: bool = False
    ) -> Iterator[tuple[str, Vector]] | Iterator[tuple[str, Vector, dict[str, Any]]]:
        """Iterate over ``(key, vector)``, or ``(key, vector, metadata)``, streamed from Postgres.

        All of it is as of one moment, in no order.
        """
        if metadata:
            return (
                (key, decode_vector(data), note)
                for key, data, note in self._stream("key", "embedding", "metadata")
            )
        return ((key, decode_vector(data)) for key, data in self._stream("key", "embedding"))

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
        if (key is None) == (vector is None):
            raise InvalidValueError("give either key= or vector=, and not both")
        if key is not None:
            return self._neighbors_of_key(values.as_key(key), count, metadata, strong)
        query = self._as_vector(vector, f"space {self._name!r}, query")
        index = self._index(strong)
        if index is not None:
            found = index.search(query[None], count)
            if found is not None:
                answer = self._complete(list(map(Neighbor, *found[0])), metadata)
                if answer is not None:
                    return answer
        return self._by_postgres(query, count, metadata)

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
        queries = self._as_matrix(vectors, f"space {self._name!r}, queries")
        if not len(queries):
            raise InvalidValueError("an empty batch: no vectors were given")
        index = self._index(strong)
        if index is not None:
            found = index.search(queries, count)
            if found is not None:
                flat = [neighbor for one in found for neighbor in map(Neighbor, *one)]
                whole = self._complete(flat, metadata)
                if whole is not None:
                    rest = iter(whole)
                    return [list(itertools.islice(rest, len(one.keys))) for one in found]
        if self._by_service:
            return self._many_by_service(queries, count, metadata)
        return [self._by_postgres(query, count, metadata) for query in queries]

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
            self._replica.wait_until_ready(self._name, timeout, watch)
        else:
            raise ConfigurationError("this hub was connected with index='none'; there is no index")

    # --- inside

    def _index(self, strong: bool) -> HnswIndex | None:
        if self._replica is None:
            return None
        self._replica.follow(self._name)
        index = self._replica.index(self._name, strong=strong)
        if index is None:
            return None
        # The space may have been made anew, with other dims.
        return index if index.dims == self.dims and index.metric == self.metric else None

    def _neighbors_of_key(self, key: str, k: int, metadata: bool, strong: bool) -> list[Neighbor]:
        index = self._index(strong)
        vector = None if index is None else index.vector(key)
        if index is not None and vector is not None:
            found = index.search(vector[None], k + 1)
            if found is not None:
                near = [one for one in map(Neighbor, *found[0]) if one.key != key]
                answer = self._complete(near[:k], metadata)
                if answer is not None:
                    return answer
        function = "nearest_to" if self._by_service else "nearest_exact_to"
        return self._ask(function, [self._name, key, k], metadata)

    def _by_postgres(self, query: Vector, k: int, metadata: bool) -> list[Neighbor]:
        function = "nearest" if self._by_service else "nearest_exact"
        return self._ask(function, [self._name, VectorParameter(query), k], metadata)

    def _ask(self, function: str, values: list[object], metadata: bool) -> list[Neighbor]:
        statement = sql.SQL("SELECT key, distance, {} FROM {}(%s, %s, %s)").format(
            sql.SQL("metadata" if metadata else "NULL"), sql.Identifier("ehub", function)
        )
        with self._database.connection(self._name) as connection:
            return [Neighbor(*row) for row in connection.execute(statement, values)]

    def _many_by_service(self, queries: Matrix, k: int, metadata: bool) -> list[list[Neighbor]]:
        statement = sql.SQL(
            "SELECT q, key, distance, {} FROM ehub.nearest_many(%s, %s, %s)"
        ).format(sql.SQL("metadata" if metadata else "NULL"))
        answers: list[list[Neighbor]] = [[] for _ in queries]
        with self._database.connection(self._name) as connection:
            oid = connection.execute(
                "SELECT atttypid FROM pg_attribute"
                " WHERE attrelid = to_regclass(format('spaces.%%I', %s::text))"
                " AND attname = 'embedding'",
                [self._name],
            ).fetchone()
            vectors = VectorsParameter(queries, oid[0] if oid else 0)
            for q, *found in connection.execute(statement, [self._name, vectors, k]):
                answers[q - 1].append(Neighbor(*found))
        return answers

    def _wait_for_service(self, timeout: float | None) -> None:
        if not self._database.has_service():
            raise ServiceError("the database has no index service: run `ehub install-service`")
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._database.connection(self._name) as connection:
            seen = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
            assert seen is not None  # noqa: S101 - a select without from
            while True:
                row = connection.execute(
                    "SELECT ehub.index_missing(%s, %s::text::pg_snapshot)", [self._name, seen[0]]
                ).fetchone()
                if row == (None,):
                    return
                if deadline is not None and time.monotonic() > deadline:
                    why = row and row[0]
                    raise WaitTimeoutError(
                        f"space {self._name!r}: the index was not ready in {timeout} seconds: {why}"
                    )
                time.sleep(_WAIT_SECONDS)

    def _complete(self, near: list[Neighbor], metadata: bool) -> list[Neighbor] | None:
        """Add metadata where it is asked for; None if a row is gone since the watermark."""
        if not metadata or not near:
            return near
        query = sql.SQL("SELECT key, metadata FROM {} WHERE key = ANY(%s)").format(self._view)
        keys = list({one.key for one in near})
        with self._database.connection(self._name) as connection:
            notes = dict(connection.execute(query, [keys]).fetchall())
        if len(notes) < len(keys):
            return None
        return [one._replace(metadata=notes[one.key]) for one in near]

    def _merge(
        self, batches: Iterable[tuple[Sequence[str], Matrix, Sequence[str | None] | None]]
    ) -> int:
        with self._database.connection(self._name) as connection, connection.transaction():
            connection.execute("SELECT ehub.stage()")
            rows = 0
            statement = "COPY pg_temp.ehub_staging (key, embedding, metadata) FROM STDIN BINARY"
            with connection.cursor().copy(statement) as copy:
                copy.write(COPY_HEADER)
                for keys, matrix, notes in batches:
                    rows += len(keys)
                    copy.write(encode_rows(keys, matrix, notes))
                copy.write(COPY_TRAILER)
            if not rows:
                raise InvalidValueError("an empty batch: no embeddings were given")
            row = connection.execute(
                "SELECT ehub.merge_staged(%s), pg_current_xact_id()::text::bigint", [self._name]
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
                        f"space {self._name!r}: a row is (key, vector) or (key, vector, metadata),"
                        f" not {row!r:.60}"
                    )
                keys.append(values.as_key(row[0]))
                vectors.append(row[1])
                note = row[2] if len(row) == 3 else None
                notes.append(
                    None
                    if note is None
                    else values.as_json(note, values.describe(self._name, keys[-1]))
                )
            names = [values.describe(self._name, key) for key in keys]
            matrix = self._as_matrix(vectors, names)
            yield keys, matrix, notes

    def _stream(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)), self._view
        )
        with self._database.connection(self._name) as connection, connection.transaction():
            with connection.cursor(name="ehub_rows", binary=True) as cursor:
                cursor.itersize = _STREAM_ROWS
                cursor.execute(query)
                yield from cursor

    def _one(self, query: sql.Composed, key: str) -> tuple[Any, ...] | None:
        with self._database.connection(self._name) as connection:
            return connection.execute(query, [key], binary=True).fetchone()

    def _wrote(self, row: Sequence[int] | None) -> None:
        """Remember a transaction that the index must see before it answers this process."""
        if row and self._replica is not None:
            self._replica.wrote(self._name, row[0])

    def _read_shape(self) -> _Shape:
        with self._database.connection(self._name) as connection:
            row = connection.execute(
                "SELECT dims, metric, m, ef_construction, target_recall FROM ehub.catalogue"
                " WHERE space = %s",
                [self._name],
            ).fetchone()
        if row is None:
            raise SpaceNotFoundError(f"there is no space {self._name!r}")
        self._shape = _Shape(*row)
        return self._shape

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

    def _no_key(self, key: str) -> KeyNotFoundError:
        return KeyNotFoundError(f"space {self._name!r} has no key {key!r}")

    def _strong(self, consistency: str) -> bool:
        if consistency not in ("replica", "strong"):
            raise InvalidValueError(f"consistency is 'replica' or 'strong', not {consistency!r}")
        return consistency == "strong"
