"""An attached table searched by ehub and by pgvector's own index, side by side."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, LiteralString, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from psycopg import sql

from ehub import values
from ehub.binary import VectorParameter, decode_vector
from ehub.database import Connection, Database, mapped
from ehub.errors import InvalidValueError
from ehub.search import Searchable
from ehub.types import IndexPlace, Vector

_ROUNDS = 3
_WAIT_SECONDS = 3600.0
# What sets how far pgvector's indexes look, and the most that they take.
_SETTINGS = {"hnsw": ("hnsw.ef_search", 1000), "ivfflat": ("ivfflat.probes", 32768)}


class Measured(NamedTuple):
    """One way to search a table, measured.

    Attributes:
        way: what searched, and how it was set.
        recall: the share of the true nearest that it found.
        rate: queries a second of one client; the median of some rounds, in which ways take turns.
        memory: bytes of the index, None where it is not known.
    """

    way: str
    recall: float
    rate: float
    memory: int | None


class _Query(NamedTuple):
    vector: Vector
    # The row that it was taken of, which is no answer.
    own: str | None


class _Way(NamedTuple):
    name: str
    ask: Callable[[_Query], list[str]]
    memory: int | None = None
    # What it needs set, and its values.
    settings: tuple[tuple[str, str], ...] = ()


def measure(
    space: Searchable,
    address: str,
    database: Database,
    place: IndexPlace,
    queries: ArrayLike | None,
    k: int,
    sample: int,
    watch: Callable[[str], None],
) -> list[Measured]:
    """Measure searches of an attached space: see :meth:`ehub.Space.compare_with_pgvector`."""
    if space.attached_to is None:
        raise InvalidValueError("only spaces that are attached to a table are compared")
    watch("waiting for ehub's index")
    space.wait_until_indexed(_WAIT_SECONDS)
    with mapped(), contextlib.closing(database.connect()) as connection:
        connection.execute("SET ehub.mode = 'index'")
        asked = list(_queries(connection, space, address, queries, sample))
        watch(f"searching exactly, {len(asked)} queries")
        exact = _in_sql(connection, _function("nearest_exact", address), k)
        truth = [exact(query) for query in asked]

        def recall(way: _Way) -> float:
            watch(f"searching by {way.name}")
            with _set(connection, way):
                pairs = list(zip(map(way.ask, asked), truth, strict=True))
            return float(np.mean([len({*found} & {*near}) / len(near) for found, near in pairs]))

        ours = _ours(connection, space, address, place, k)
        ways = {ours: recall(ours)}
        for way in _theirs(connection, space, address, k):
            ways[way] = recall(way)
            if ways[way] >= ways[ours]:
                break
        # How it is set now, and how it has to be set.
        for way in [*ways][2:-1]:
            del ways[way]
        watch("measuring the rates, in turns")
        rates: dict[_Way, list[float]] = {way: [] for way in ways}
        for way in [*ways] * _ROUNDS:
            with _set(connection, way):
                started = time.perf_counter()
                for query in asked:
                    way.ask(query)
                rates[way].append(len(asked) / (time.perf_counter() - started))
    return [
        Measured(way.name, found, statistics.median(rates[way]), way.memory)
        for way, found in ways.items()
    ]


def _queries(
    connection: Connection,
    space: Searchable,
    address: str,
    given: ArrayLike | None,
    sample: int,
) -> Iterator[_Query]:
    if given is not None:
        for vector in values.as_matrix(given, space.dims, space.metric, "queries"):
            yield _Query(vector, None)
        return
    drawn = connection.execute(
        sql.SQL("SELECT key, embedding FROM {} AS t ORDER BY random() LIMIT %s").format(
            _facts(connection, "ehub.rows_of(s)", address)
        ),
        [sample],
        binary=True,
    ).fetchall()
    if len(drawn) < 2:
        raise InvalidValueError(f"{space.attached_to} has too few rows to draw queries from them")
    for key, vector in drawn:
        yield _Query(decode_vector(vector), key)


def _ours(
    connection: Connection, space: Searchable, address: str, place: IndexPlace, k: int
) -> _Way:
    row = connection.execute(
        "SELECT max(r.memory) FROM ehub.status AS r JOIN ehub.require_space(%s) AS s"
        " ON s.index_id = r.index_id WHERE r.index_state = 'ready'",
        [address],
    ).fetchone()
    memory = row[0] if row else None
    if place == "service":
        asking = _in_sql(connection, _function("nearest", address), k)
        return _Way("ehub, in SQL", asking, memory)

    def ask(query: _Query) -> list[str]:
        found = space.nearest_neighbors(k + (query.own is not None), vector=query.vector)
        return [one.key for one in found if one.key != query.own][:k]

    return _Way("ehub, in this process", ask, memory)


def _theirs(connection: Connection, space: Searchable, address: str, k: int) -> Iterator[_Way]:
    """Yield pgvector's index on the column as it is set, and then looking farther and farther."""
    found = connection.execute(
        "SELECT i.indexrelid::regclass::text, m.amname, pg_relation_size(i.indexrelid),"
        " k.name, c.name, ARRAY[p.prorettype::regtype, c.type]::text[]"
        " FROM ehub.attached AS a JOIN pg_proc AS p ON p.oid = 'ehub.get(text, text)'::regprocedure"
        " CROSS JOIN LATERAL ehub.attached_key(a.relation) AS k"
        ' CROSS JOIN LATERAL ehub.attached_column(a.relation, a."column", NULL) AS c'
        " JOIN pg_index AS i ON i.indrelid = a.relation AND i.indkey[0] = c.number"
        " JOIN pg_opclass AS o ON o.oid = i.indclass[0] JOIN pg_am AS m ON m.oid = o.opcmethod"
        " WHERE a.space = %s AND m.amname = ANY(%s) AND o.opcname ~ ('_' || a.metric || '_')"
        " AND i.indisvalid AND i.indpred IS NULL ORDER BY m.amname, i.indexrelid LIMIT 1",
        [address, list(_SETTINGS)],
    ).fetchone()
    if found is None:
        return
    index, method, size, key, column, types = found
    statement = sql.SQL("SELECT {}::text FROM {} ORDER BY {} {} %(vector)s::{} LIMIT %(k)s").format(
        sql.Identifier(key),
        _facts(connection, "s.relation::text", address),
        sql.Identifier(column),
        _facts(connection, "ehub.distance_operator(s.metric)", address),
        # A half vector is made of a whole one.
        sql.SQL("::").join(map(sql.SQL, dict.fromkeys(types))),
    )
    ask = _in_sql(connection, statement, k)
    setting, most = _SETTINGS[method]
    # Its parameters are known once its library is loaded, which a search does.
    ask(_Query(np.ones(space.dims, np.float32), None))
    row = connection.execute("SELECT current_setting(%s)::int", [setting]).fetchone()
    number = row[0] if row else most
    while True:
        # On a small table the planner would do without the index.
        settings = ((setting, str(number)), ("enable_seqscan", "off"))
        yield _Way(f"pgvector, {index}, {setting} {number}", ask, size, settings)
        if number >= most:
            return
        number = min(2 * number, most)


@contextlib.contextmanager
def _set(connection: Connection, way: _Way) -> Iterator[None]:
    before = [
        (name, *(connection.execute("SELECT current_setting(%s)", [name]).fetchone() or ()))
        for name, _ in way.settings
    ]
    for setting in way.settings:
        connection.execute("SELECT set_config(%s, %s, false)", setting)
    yield
    for setting in before:
        connection.execute("SELECT set_config(%s, %s, false)", setting)


def _function(name: str, address: str) -> sql.Composed:
    statement = sql.SQL("SELECT key FROM ehub.{}({}, %(vector)s, %(k)s)")
    return statement.format(sql.Identifier(name), sql.Literal(address))


def _in_sql(
    connection: Connection, statement: sql.Composed, k: int
) -> Callable[[_Query], list[str]]:
    def ask(query: _Query) -> list[str]:
        parameters = {"vector": VectorParameter(query.vector), "k": k + (query.own is not None)}
        rows = connection.execute(statement, parameters).fetchall()
        return [key for (key,) in rows if key != query.own][:k]

    return ask


def _facts(connection: Connection, what: LiteralString, address: str) -> sql.SQL:
    """Return a piece of SQL that the database has written about the space."""
    query = sql.SQL("SELECT {} FROM ehub.require_space(%s) AS s").format(sql.SQL(what))
    row = connection.execute(query, [address]).fetchone()
    text: Any = "" if row is None else row[0].replace("%", "%%")
    return sql.SQL(text)
