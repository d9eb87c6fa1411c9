"""Reading rows by their keys: what a space, a version and a checkpoint have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast, overload

import numpy as np
from psycopg import sql

from ehub import values
from ehub.binary import decode_vector
from ehub.database import Database
from ehub.errors import KeyNotFoundError
from ehub.types import Matrix, Vector

_STREAM_ROWS = 2000


class Rows(ABC):
    """Keys with their vectors and metadata, as Postgres has them. Any thread may call any method.

    Any method may raise :class:`ehub.UnavailableError` (Postgres is not there),
    :class:`ehub.AccessDeniedError` (the role may not) and :class:`ehub.NotFoundError` (what the
    handle stands for has been deleted).
    """

    def __init__(self, address: str, database: Database) -> None:
        self._address = address
        self._database = database

    @abstractmethod
    def _relation(self, keys: list[str] | None = None) -> sql.Composable:
        """Return the rows as a relation, of which only those of ``keys`` will be asked for.

        It is for statements with parameters, if only none: a percent sign in it stands twice.
        """

    def get(self, key: str) -> Vector:
        """Return the vector of a key, float32 of shape ``(dims,)``.

        Raises:
            KeyNotFoundError: there is none.
        """
        return decode_vector(self._one("embedding", key))

    def metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata of a key, ``{}`` where none was given.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        return cast("dict[str, Any]", self._one("metadata", key))

    def multiget(self, keys: Iterable[str]) -> Matrix:
        """Return the vectors of many keys, in their order: float32 of shape ``(n, dims)``.

        Raises:
            KeyNotFoundError: one of them is not there; it is named.
            InvalidValueError: no keys were given.
        """
        wanted = values.as_keys(keys)
        query = sql.SQL("SELECT key, embedding FROM {} WHERE key = ANY(%s)").format(
            self._relation(wanted)
        )
        with self._database.connection(self._address) as connection:
            found = dict(connection.execute(query, [wanted], binary=True).fetchall())
        for key in wanted:
            if key not in found:
                raise self._no_key(key)
        return np.stack([decode_vector(found[key]) for key in wanted])

    def __len__(self) -> int:
        """Count the keys, in Postgres."""
        query = sql.SQL("SELECT count(*) FROM {}").format(self._relation())
        with self._database.connection(self._address) as connection:
            row = connection.execute(query, []).fetchone()
        return int(row[0]) if row else 0

    def __bool__(self) -> bool:
        """Be true: a handle is, also that of an empty space."""
        return True

    def __contains__(self, key: object) -> bool:
        return self._find("1", values.as_key(key)) is not None

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

    def _stream(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)), self._relation()
        )
        with self._database.connection(self._address) as connection, connection.transaction():
            with connection.cursor(name="ehub_rows", binary=True) as cursor:
                cursor.itersize = _STREAM_ROWS
                cursor.execute(query, [])
                yield from cursor

    def _one(self, column: Literal["embedding", "metadata"], key: str) -> Any:
        row = self._find(column, values.as_key(key))
        if row is None:
            raise self._no_key(key)
        return row[0]

    def _find(
        self, what: Literal["embedding", "metadata", "1"], key: str
    ) -> tuple[Any, ...] | None:
        query = sql.SQL("SELECT {} FROM {} WHERE key = %s").format(
            sql.SQL(what), self._relation([key])
        )
        with self._database.connection(self._address) as connection:
            return connection.execute(query, [key], binary=True).fetchone()

    def _no_key(self, key: str) -> KeyNotFoundError:
        return KeyNotFoundError(f"space {self._address!r} has no key {key!r}")
