"""Searches of a space or version: neighbours, distances, and among which rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from psycopg import sql

from ehub import values
from ehub.binary import VectorParameter, VectorsParameter, decode_vector
from ehub.database import Connection, Database
from ehub.errors import (
    AccessDeniedError,
    ConfigurationError,
    DatabaseError,
    InvalidValueError,
    NotFoundError,
    ServiceError,
    UnavailableError,
    WaitTimeoutError,
)
from ehub.index import PartitionedIndex
from ehub.replica import Answering, Progress, Replica, rows_near
from ehub.rows import Rows
from ehub.types import (
    Consistency,
    IndexPlace,
    Matrix,
    Metadata,
    Metric,
    Neighbor,
    Partition,
    Vector,
)

_WAIT_SECONDS = 0.05
_PAGE_ROWS = 4096
# So many at once: writers, and readers behind them, wait for the whole of it.
_BATCH_ROWS = 256

Examples: TypeAlias = Sequence[str] | Mapping[str, float]
"""Keys, or a mapping from keys to what each weighs."""


class Shape(NamedTuple):
    """What the version that is meant is like."""

    version: str
    dims: int
    metric: Metric
    M: int
    ef_construction: int
    target_recall: float
    frozen: bool
    partition_by: str | None
    attached_to: str | None


class Way(NamedTuple):
    """A way in which a search can be answered.

    Attributes:
        chosen: whether it is the one.
        way: ``rows`` (all that match are compared, in the index), ``graph`` (the graph is asked for
            more than is wanted), ``near`` (rows that match are looked for among the nearest),
            ``exact`` (in Postgres); or ``note``, something to know.
        rows: how many match, as far as is known; for ``exact`` by the planner's estimate.
        compared: vectors that are compared, roughly: what it costs.
        note: more about it, or why it is not chosen.
    """

    chosen: bool
    way: str
    rows: int | None
    compared: int | None
    note: str | None


class _Among(NamedTuple):
    """Which rows a search is about.

    ``filter`` is JSON, ``partition`` the text of a value, ``sub_index`` the name of one.
    """

    filter: str | None
    partition: str | None
    sub_index: str | None

    @classmethod
    def of(
        cls, matching: Metadata | None, partition: Partition | None, index: str | None
    ) -> _Among:
        return cls(
            values.as_filter(matching),
            values.as_partition(partition),
            None if index is None else values.as_name("an index", index),
        )


_ALL = _Among(None, None, None)


class Searchable(Rows):
    """Rows that can be searched: the half of a space or version that asks for neighbours."""

    def __init__(
        self, address: str, database: Database, index: IndexPlace, replica: Replica | None
    ) -> None:
        super().__init__(address, database)
        self._by_service = index == "service"
        self._index_place: IndexPlace = index
        self._replica = replica
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
    def attached_to(self) -> str | None:
        """The table whose rows these are, where the space is attached to one."""
        return self._shape.attached_to

    @property
    def target_recall(self) -> float:
        """The share of true neighbours that a search is to find."""
        return self._shape.target_recall

    @property
    def partition_by(self) -> str | None:
        """The field of metadata by whose values it is partitioned, None if it is not."""
        return self._shape.partition_by

    def nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        key: str | None = None,
        vector: ArrayLike | None = None,
        like: Examples | None = None,
        unlike: Examples | None = None,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
        partition: Partition | None = None,
        index: str | None = None,
        metadata: bool = False,
        consistency: Consistency = "replica",
    ) -> list[Neighbor]:
        """Find the ``k`` nearest rows to a stored ``key``, to a ``vector``, or to examples.

        A key and examples are left out of the answer. ``like`` are keys, or a mapping from keys to
        weights: the query is their mean p (under cosine of vectors of length 1), and with
        ``unlike``, whose mean is n, it is p + (p - n).

        Returns them nearest first, fewer than ``k`` only where there are fewer. Distances are
        pgvector's: Euclidean, cosine distance, negative inner product.

        ``filter`` is a condition on metadata: ``{"lang": "en", "price": {"<": 20}}``, with ``=``,
        ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``, ``exists``, and ``{"or": […]}``,
        ``{"and": […]}``, ``{"not": …}``. A field that holds a list matches where an element does;
        values of other types match no comparison. ``partition`` searches one value of
        :attr:`partition_by`, ``index`` the rows of a sub-index.

        The index of this process answers, as of its watermark: never behind this process' own last
        write. ``consistency="strong"`` sees everything that was committed before the call, by
        anybody; the index service always does. The first call starts the index of this process;
        until it is ready Postgres answers, exactly. So it does for a filter that is new.

        Raises:
            KeyNotFoundError: there is no such key.
            IndexNotFoundError: there is no such sub-index.
            InvalidFilterError: the filter; the message names the field or operator.
            InvalidValueError: ``k``, the vector, weights, a partition where there are none, or not
                just one of ``key``, ``vector`` and ``like``.
        """
        count = values.as_count(k)
        strong = self._strong(consistency)
        among = _Among.of(filter, partition, index)
        values.require_one_of(key=key, vector=vector, like=like)
        if unlike is not None and like is None:
            raise InvalidValueError("unlike= needs like=: what to search near to")
        if key is not None:
            return self._neighbors_of_key(values.as_key(key), count, metadata, strong, among)
        address = self._address
        left_out: list[str] = []
        if like is not None:
            address, query, left_out = self._example_query(like, unlike)
        else:
            query = self._as_vector(vector, f"space {self._address!r}, query")
        answering = self._index_for_queries(strong, among, address)
        if answering is not None:
            found = answering.search(query[None], count + len(left_out), among.partition)
            if found is not None:
                near = [one for one in map(Neighbor, *found[0]) if one.key not in left_out]
                answer = self._complete(near[:count], metadata, answering)
                if answer is not None:
                    return answer
        elif among.filter is not None and among.partition is None and among.sub_index is None:
            nearest = self._matching_near(address, query, count, metadata, strong, among, left_out)
            if nearest is not None:
                return nearest
        return self._by_postgres(address, query, count, metadata, among, left_out)

    def multi_nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        vectors: ArrayLike,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
        partition: Partition | None = None,
        index: str | None = None,
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
        among = _Among.of(filter, partition, index)
        queries = values.require_some(self._as_matrix(vectors, f"space {self._address!r}, queries"))
        return self._neighbors_of_many(self._address, queries, count, metadata, strong, among)

    def nearest_neighbors_of_all(
        self,
        k: SupportsIndex,
        *,
        after: str | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[str, list[Neighbor]]]:
        """Iterate over all rows in the order of their keys, each with its ``k`` nearest others.

        That is the k-NN graph of the rows: what "similar items" are made of. Rows are read page by
        page and searched by the index in batches. To go on after an interruption, pass the last key
        that came as ``after``. Of a space it is the current version, that of the first row, to the
        end. ``watch`` is told now and then how many rows of how many are done in this call.

        Raises:
            InvalidValueError: ``k``.
            NotFoundError: the version was dropped meanwhile.
        """
        count = values.as_count(k)
        last = "" if after is None else values.as_key(after)
        return self._all_neighbors(count, last, watch)

    def within(
        self,
        distance: float,
        *,
        key: str | None = None,
        vector: ArrayLike | None = None,
        limit: SupportsIndex | None = None,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
        partition: Partition | None = None,
        index: str | None = None,
        metadata: bool = False,
        complete: bool = True,
    ) -> list[Neighbor]:
        """Find everything within a distance of a ``key``, which is left out, or of a ``vector``.

        Nearest first, and at most ``limit`` rows where that is given. With ``complete`` Postgres
        compares every row that matches, so none is missing; without, the index is asked for more
        and more rows until the last is farther away: much faster where little is that near, and
        approximate like :meth:`nearest_neighbors`.

        Raises:
            KeyNotFoundError: there is no such key.
            InvalidValueError: the distance, the limit, the vector, or not just one of ``key`` and
                ``vector``.
        """
        radius = values.as_number("distance", distance)
        most = None if limit is None else values.as_count(limit, "limit")
        values.require_one_of(key=key, vector=vector)
        among = _Among.of(filter, partition, index)
        address = self._pinned()
        left_out = [] if key is None else [values.as_key(key)]
        if key is not None:
            query = self._vector_of(address, key)
        else:
            query = self._as_vector(vector, f"space {self._address!r}, query")
        if not complete and not self._by_service:
            found = self._within_by_index(address, query, radius, most, among, left_out, metadata)
            if found is not None:
                return found
        statement = sql.SQL(
            "SELECT key, distance, {} FROM ehub.within(%s, %s, %s, %s::int, %s::jsonb, %s, %s, %s,"
            " %s)"
        ).format(sql.SQL("metadata" if metadata else "NULL"))
        parameters = [
            *(address, VectorParameter(query), radius, most, *among),
            complete or not self._by_service,
            left_out,
        ]
        with self._database.connection(self._address) as connection:
            return [Neighbor(*row) for row in connection.execute(statement, parameters)]

    def distance(self, a: str, b: str) -> float:
        """Return the distance of two keys, as pgvector computes it.

        Raises:
            KeyNotFoundError: one of them is not there.
        """
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT ehub.distance(%s, %s, %s)",
                [self._address, values.as_key(a), values.as_key(b)],
            ).fetchone()
        assert row is not None  # noqa: S101 - a select without from
        return float(row[0])

    def distances(self, keys: Sequence[str]) -> NDArray[np.float64]:
        """Return the distance of each of some keys to each: float64 of shape ``(n, n)``.

        As pgvector computes them; 0 on the diagonal, but for inner products.

        Raises:
            KeyNotFoundError: one of them is not there; it is named.
            InvalidValueError: no keys were given.
        """
        wanted = values.as_keys(keys)
        rows: dict[str, list[int]] = {}
        for row, one in enumerate(wanted):
            rows.setdefault(one, []).append(row)
        found = np.zeros((len(wanted), len(wanted)))
        with self._database.connection(self._address) as connection:
            for a, b, distance in connection.execute(
                "SELECT a, b, distance FROM ehub.distances(%s, %s)", [self._address, wanted]
            ):
                found[np.ix_(rows[a], rows[b])] = found[np.ix_(rows[b], rows[a])] = distance
        if self.metric == "ip":
            vectors = self.multiget(wanted).astype(np.float64)
            for at in rows.values():
                found[np.ix_(at, at)] = -float(vectors[at[0]] @ vectors[at[0]])
        return found

    def explain_nearest(
        self,
        k: SupportsIndex,
        *,
        vector: ArrayLike,
        filter: Metadata | None = None,  # noqa: A002 - the word for it
        partition: Partition | None = None,
        index: str | None = None,
    ) -> list[Way]:
        """Say how :meth:`nearest_neighbors` would answer, and what else it could have done.

        Raises:
            InvalidValueError: as from that.
        """
        count = values.as_count(k)
        among = _Among.of(filter, partition, index)
        query = self._as_vector(vector, f"space {self._address!r}, query")
        ways = []
        if self._replica is not None:
            ways.append(self._way_of_index(count, among))
        with self._database.connection(self._address) as connection, connection.transaction():
            if not self._by_service:
                connection.execute("SET LOCAL ehub.mode = 'exact'")
            rows = connection.execute(
                "SELECT * FROM ehub.explain_nearest(%s, %s, %s, %s::jsonb, %s, %s)",
                [self._address, VectorParameter(query), count, *among],
            ).fetchall()
        for row in map(Way._make, rows):
            if self._by_service or row.way in ("exact", "note"):
                ways.append(row._replace(chosen=row.chosen and not any(w.chosen for w in ways)))
        return ways

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

    # --- by the index of this process

    def _index(
        self, strong: bool, among: _Among = _ALL, address: str | None = None
    ) -> Answering | None:
        if self._replica is None:
            return None
        address = address or self._address
        self._replica.follow(self._address)
        if among.filter is None and among.sub_index is None:
            return self._replica.index(address, strong=strong)
        return self._replica.index(address, strong=strong, among=(among.filter, among.sub_index))

    def _index_for_queries(
        self, strong: bool, among: _Among, address: str | None = None
    ) -> Answering | None:
        """Return the index if it is of the shape that queries were checked for."""
        found = self._index(strong, among, address)
        if found is None or (found.index.dims, found.index.metric) == (self.dims, self.metric):
            return found
        if address not in (None, self._address):
            # The queries were taken from that very version.
            return found
        # Another version has been promoted, or the space was made anew: what these queries were
        # checked for says nothing of its metric. Postgres checks them anew, this once.
        self._read_shape()
        return None

    def _matching_near(
        self,
        address: str,
        query: Vector,
        k: int,
        metadata: bool,
        strong: bool,
        among: _Among,
        left_out: list[str],
    ) -> list[Neighbor] | None:
        """Look for rows that match among the nearest; None where they are too few.

        For a filter that the index does not know: Postgres says which of some near rows match.
        """
        answering = self._index_for_queries(strong, _ALL, address)
        if answering is None or isinstance(answering.index, PartitionedIndex):
            return None
        found = answering.search(query[None], rows_near(k))
        if found is None:
            return None
        notes = self._notes(
            answering,
            "metadata" if metadata else "NULL",
            found[0].keys,
            among.filter,
        )
        if notes is None:
            return None
        near = [
            Neighbor(key, distance, notes[key])
            for key, distance in zip(*found[0], strict=True)
            if key in notes and key not in left_out
        ]
        return near[:k] if len(near) >= k else None

    def _neighbors_of_key(
        self, key: str, k: int, metadata: bool, strong: bool, among: _Among
    ) -> list[Neighbor]:
        answering = self._index(strong, among)
        vector = None if answering is None else answering.whole.vector(key)
        if answering is not None and vector is not None:
            found = answering.search(vector[None], k + 1, among.partition)
            if found is not None:
                near = [one for one in map(Neighbor, *found[0]) if one.key != key]
                answer = self._complete(near[:k], metadata, answering)
                if answer is not None:
                    return answer
        function = "nearest_to" if self._by_service else "nearest_exact_to"
        return self._ask(function, [self._address, key, k], among, metadata)

    def _neighbors_of_many(
        self,
        address: str,
        queries: Matrix,
        k: int,
        metadata: bool,
        strong: bool,
        among: _Among = _ALL,
    ) -> list[list[Neighbor]]:
        answering = self._index_for_queries(strong, among, address)
        if answering is not None:
            found = answering.search(queries, k, among.partition)
            if found is not None:
                flat = [neighbor for one in found for neighbor in map(Neighbor, *one)]
                whole = self._complete(flat, metadata, answering)
                if whole is not None:
                    rest = iter(whole)
                    return [list(itertools.islice(rest, len(one.keys))) for one in found]
        if self._by_service:
            return self._many_by_service(address, queries, k, metadata, among)
        # All by one version, also where another is promoted meanwhile.
        if "@" not in address:
            address = self._pinned()
        return [self._by_postgres(address, query, k, metadata, among) for query in queries]

    def _all_neighbors(
        self, k: int, last: str, watch: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, list[Neighbor]]]:
        address = self._pinned()
        page = sql.SQL("SELECT key, embedding FROM {} WHERE key > %s ORDER BY key LIMIT %s")
        count = sql.SQL("SELECT count(*) FROM {} WHERE key > %s")
        rows = self._relation_of(address)
        with self._database.connection(address) as connection:
            row = connection.execute(count.format(rows), [last]).fetchone()
        total, done = row[0] if row else 0, 0
        while True:
            with self._database.connection(address) as connection:
                found = connection.execute(
                    page.format(rows), [last, _PAGE_ROWS], binary=True
                ).fetchall()
            if watch is not None:
                watch(done, max(total, done + len(found)))
            if not found:
                return
            for start in range(0, len(found), _BATCH_ROWS):
                batch = found[start : start + _BATCH_ROWS]
                queries = np.stack([decode_vector(data) for _, data in batch])
                # Its own row is among its neighbours, or else not needed.
                answers = self._neighbors_of_many(address, queries, k + 1, False, strong=False)
                for (key, _), near in zip(batch, answers, strict=True):
                    yield key, [one for one in near if one.key != key][:k]
            last = found[-1][0]
            done += len(found)

    def _within_by_index(
        self,
        address: str,
        query: Vector,
        radius: float,
        most: int | None,
        among: _Among,
        left_out: list[str],
        metadata: bool,
    ) -> list[Neighbor] | None:
        """Ask the index of this process for more and more; None where it cannot answer."""
        answering = self._index_for_queries(False, among, address)
        asked = 100 + len(left_out)
        while answering is not None:
            found = answering.search(query[None], asked, among.partition)
            if found is None:
                return None
            keys, distances = found[0]
            enough = most is not None and asked - len(left_out) >= most
            if len(keys) < asked or distances[-1] > radius or enough:
                near = [
                    one
                    for one in map(Neighbor, keys, distances)
                    if one.distance <= radius and one.key not in left_out
                ]
                return self._complete(near[:most], metadata, answering)
            asked *= 10
        return None

    def _way_of_index(self, k: int, among: _Among) -> Way:
        answering = self._index(False, among)
        if among.partition is not None and answering and answering.entry.partition_by is None:
            return Way(False, "index", None, None, "it is not kept by partitions")
        plan = None if answering is None else answering.plan(k, among.partition)
        if answering is None or plan is None:
            why = "the index of this process cannot answer yet"
            if among != _ALL and self._index(False) is not None:
                why = "it does not know which rows match: a filter is learnt when it comes again"
            return Way(False, "index", None, None, why)
        name = f" {answering.entry.name}" if answering.entry.name else ""
        return Way(True, plan.by, plan.rows, plan.compared, f"index{name}: {plan.note}")

    def _complete(
        self, near: list[Neighbor], metadata: bool, answering: Answering
    ) -> list[Neighbor] | None:
        """Add metadata where it is asked for; None if a row is gone since the watermark."""
        if not metadata or not near:
            return near
        # Of the version that the index holds, whichever is current by now.
        keys = list({one.key for one in near})
        notes = self._notes(answering, "metadata", keys)
        if notes is None or len(notes) < len(keys):
            return None
        return [one._replace(metadata=notes[one.key]) for one in near]

    def _notes(
        self,
        answering: Answering,
        column: str,
        keys: Sequence[str],
        matching: str | None = None,
    ) -> dict[str, Any] | None:
        """Return a column of the index' rows with some keys, by key; or of those that match.

        None where the rows are not what they were.
        """
        condition = (
            "true" if matching is None else "metadata @@ ehub.filter_path(%(filter)s::jsonb)"
        )
        statement = answering.entry.rows_with_keys(f"key, {column}", condition)
        parameters = {"keys": list(keys), "filter": matching}
        try:
            with self._database.connection(self._address) as connection:
                return dict(connection.execute(statement, parameters).fetchall())
        except (UnavailableError, AccessDeniedError):
            raise
        except (DatabaseError, NotFoundError):
            if answering.entry.attached:
                # Somebody has altered the table, and the replica does not know it yet.
                return None
            raise

    # --- by Postgres

    def _by_postgres(
        self,
        address: str,
        query: Vector,
        k: int,
        metadata: bool,
        among: _Among = _ALL,
        left_out: Sequence[str] = (),
    ) -> list[Neighbor]:
        function = "nearest" if self._by_service else "nearest_exact"
        parameters: list[object] = [address, VectorParameter(query), k]
        return self._ask(function, parameters, among, metadata, list(left_out) or None)

    def _ask(
        self,
        function: str,
        parameters: list[object],
        among: _Among,
        metadata: bool,
        left_out: list[str] | None = None,
    ) -> list[Neighbor]:
        named = {
            "leave_out": left_out,
            "filter": among.filter,
            "partition": among.partition,
            "index": among.sub_index,
        }
        given = {name: value for name, value in named.items() if value is not None}
        arguments: list[sql.Composable] = [sql.SQL("%s")] * len(parameters)
        arguments += [
            sql.SQL("{} => %s{}").format(
                sql.Identifier(name), sql.SQL("::jsonb" if name == "filter" else "")
            )
            for name in given
        ]
        statement = sql.SQL("SELECT key, distance, {} FROM {}({})").format(
            sql.SQL("metadata" if metadata else "NULL"),
            sql.Identifier("ehub", function),
            sql.SQL(", ").join(arguments),
        )
        with self._database.connection(self._address) as connection:
            found = connection.execute(statement, [*parameters, *given.values()])
            return [Neighbor(*row) for row in found]

    def _many_by_service(
        self, address: str, queries: Matrix, k: int, metadata: bool, among: _Among
    ) -> list[list[Neighbor]]:
        statement = sql.SQL(
            "SELECT q, key, distance, {} FROM ehub.nearest_many(%s, %s, %s, %s::jsonb, %s, %s)"
        ).format(sql.SQL("metadata" if metadata else "NULL"))
        answers: list[list[Neighbor]] = [[] for _ in queries]
        with self._database.connection(self._address) as connection:
            vectors = VectorsParameter(queries, self._vector_type(connection))
            for q, *found in connection.execute(statement, [address, vectors, k, *among]):
                answers[q - 1].append(Neighbor(*found))
        return answers

    def _example_query(
        self, like: Examples, unlike: Examples | None
    ) -> tuple[str, Vector, list[str]]:
        """Return the version that is meant, the query that examples make, and their keys."""
        likes, weights = values.as_examples("like", like)
        unlikes, unlike_weights = values.as_examples("unlike", unlike) if unlike else ([], None)
        address = self._pinned()
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT ehub.example_query(%s, %s, %s, %s::float8[], %s::float8[])",
                [address, likes, unlikes, weights, unlike_weights],
                binary=True,
            ).fetchone()
        assert row is not None  # noqa: S101 - a select without from
        return address, decode_vector(row[0]), [*likes, *unlikes]

    def _vector_of(self, address: str, key: str) -> Vector:
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT ehub.get(%s, %s)", [address, key], binary=True
            ).fetchone()
        assert row is not None  # noqa: S101 - a select without from
        return decode_vector(row[0])

    def _vector_type(self, connection: Connection) -> int:
        """Return the oid of pgvector's type."""
        oid = connection.execute(
            "SELECT prorettype FROM pg_proc WHERE oid = 'ehub.get(text, text)'::regprocedure"
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

    # --- what is meant

    def _read_shape(self) -> Shape:
        space, at, version = self._address.partition("@")
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT version, dims, metric, m, ef_construction, target_recall, frozen,"
                " partition_by, relation::text FROM ehub.catalogue"
                " WHERE space = %s AND CASE WHEN %s THEN version = %s ELSE current END",
                [space, bool(at), version],
            ).fetchone()
            if row is None:
                # It knows what is missing, and says it.
                connection.execute("SELECT ehub.require_space(%s)", [self._address])
        assert row is not None  # noqa: S101 - else that has raised
        self._shape = Shape(*row)
        return self._shape

    def _pinned(self) -> str:
        """Return the address of the version that is meant now."""
        return f"{self._address.partition('@')[0]}@{self._read_shape().version}"

    def _relation(self, keys: list[str] | None = None) -> sql.Composable:
        return self._relation_of(self._address, keys)

    def _relation_of(self, address: str, keys: list[str] | None = None) -> sql.Composable:
        if self._shape.attached_to is None:
            return sql.Identifier("spaces", address)
        with self._database.connection(address) as connection:
            row = connection.execute(
                "SELECT ehub.rows_of(s), ehub.has_keys(s, '$1') FROM ehub.require_space(%s) AS s",
                [address],
            ).fetchone()
            assert row is not None  # noqa: S101 - what is not there raises
            rows, by_keys = (text.replace("%", "%%") for text in row)
            if keys is None:
                return sql.SQL("{} AS rows").format(sql.SQL(rows))
            wanted = (sql.Literal(keys) + sql.SQL("::text[]")).as_string(connection)
        return sql.SQL("(SELECT * FROM {} AS t WHERE {}) AS rows").format(
            sql.SQL(rows), sql.SQL(by_keys.replace("$1", wanted.replace("%", "%%")))
        )

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
