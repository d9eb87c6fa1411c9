"""A version as it was: read by key or by nearness, and never written."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import NamedTuple, NoReturn, SupportsIndex

from numpy.typing import ArrayLike
from psycopg import sql

from ehub import values
from ehub.binary import VectorParameter
from ehub.database import Database
from ehub.errors import ReadOnlyError
from ehub.rows import Rows
from ehub.types import Metric, Neighbor, Vector


class CheckpointInfo(NamedTuple):
    """What is known of a checkpoint: its name, and when and by which role it was made."""

    name: str
    created_at: datetime.datetime
    created_by: str


class Checkpoint(Rows):
    """The rows of a version as of a checkpoint; got by ``version.at(name)``.

    It has what a space has for reading. Neighbours are found by comparing all rows: exactly. Every
    write raises :class:`ehub.ReadOnlyError`. For roles that see every row of the version.
    """

    def __init__(
        self, address: str, name: str, dims: int, metric: Metric, database: Database
    ) -> None:
        super().__init__(address, database)
        self._name, self._dims, self._metric = name, dims, metric

    @property
    def name(self) -> str:
        """The name of the checkpoint."""
        return self._name

    @property
    def dims(self) -> int:
        """The length of its vectors."""
        return self._dims

    @property
    def metric(self) -> Metric:
        """``l2``, ``cosine`` or ``ip``."""
        return self._metric

    def __repr__(self) -> str:
        return f"<Checkpoint {self._name!r} of {self._address!r}>"

    def nearest_neighbors(
        self,
        k: SupportsIndex,
        *,
        key: str | None = None,
        vector: ArrayLike | None = None,
        metadata: bool = False,
    ) -> list[Neighbor]:
        """Find the ``k`` nearest rows to a stored ``key``, which is left out, or to a ``vector``.

        Raises:
            KeyNotFoundError: there was no such key.
            InvalidValueError: ``k``, the vector, or not just one of ``key`` and ``vector``.
        """
        count = values.as_count(k)
        values.require_one_of(key=key, vector=vector)
        if key is not None:
            return self._nearest(self.get(key), count, metadata, key)
        query = values.as_vector(
            vector, self._dims, self._metric, f"space {self._address!r}, query"
        )
        return self._nearest(query, count, metadata, None)

    def multi_nearest_neighbors(
        self, k: SupportsIndex, *, vectors: ArrayLike, metadata: bool = False
    ) -> list[list[Neighbor]]:
        """Find the ``k`` nearest rows to each of many vectors, shape ``(n, dims)``.

        Raises:
            InvalidValueError: ``k``, a vector, which is named by its row, or no vectors at all.
        """
        count = values.as_count(k)
        queries = values.require_some(
            values.as_matrix(vectors, self._dims, self._metric, f"space {self._address!r}, queries")
        )
        return [self._nearest(query, count, metadata, None) for query in queries]

    def _nearest(
        self, query: Vector, k: int, metadata: bool, leave_out: str | None
    ) -> list[Neighbor]:
        statement = sql.SQL(
            "SELECT key, distance, {} FROM ehub.nearest_at(%s, %s, %s, %s, %s)"
        ).format(sql.SQL("metadata" if metadata else "NULL"))
        parameters = [self._address, self._name, VectorParameter(query), k, leave_out]
        with self._database.connection(self._address) as connection:
            return [Neighbor(*row) for row in connection.execute(statement, parameters)]

    def _relation(self, keys: list[str] | None = None) -> sql.Composable:
        return sql.SQL("ehub.rows_at({}, {}, {}) AS rows").format(
            sql.Literal(self._address), sql.Literal(self._name), sql.Literal(keys)
        )

    # --- what a space has, and a checkpoint refuses

    def set(self, key: str, vector: ArrayLike, metadata: object = None) -> NoReturn:
        """Raise :class:`ehub.ReadOnlyError`."""
        self._refuse()

    def multiset(self, *rows: object, **options: object) -> NoReturn:
        """Raise :class:`ehub.ReadOnlyError`."""
        self._refuse()

    def delete(self, key: str) -> NoReturn:
        """Raise :class:`ehub.ReadOnlyError`."""
        self._refuse()

    def multidelete(self, keys: Iterable[str]) -> NoReturn:
        """Raise :class:`ehub.ReadOnlyError`."""
        self._refuse()

    def delete_all(self) -> NoReturn:
        """Raise :class:`ehub.ReadOnlyError`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ReadOnlyError(
            f"checkpoint {self._name!r} of {self._address!r} cannot be written;"
            " restore() puts the version back to it"
        )
