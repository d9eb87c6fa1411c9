"""Two versions of a space side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from psycopg import sql

from ehub.database import Database, repeatable_read

Change = Literal["added", "removed", "changed"]


class Drift(NamedTuple):
    """How far the vectors of the keys that both versions have moved from one to the other.

    Under ``l2`` and ``ip`` that is the Euclidean distance, under ``cosine`` the cosine distance.
    Keys that did not move count, with 0.
    """

    minimum: float
    quarter: float
    median: float
    three_quarters: float
    p90: float
    p99: float
    maximum: float


class Moved(NamedTuple):
    """A key, and how far its vector moved."""

    key: str
    distance: float


class Keys:
    """The keys that were added, removed or changed: counted, and iterated over as of now."""

    def __init__(
        self, database: Database, addresses: tuple[str, str], change: Change, n: int
    ) -> None:
        self._database, self._addresses, self._change, self._n = database, addresses, change, n

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[str]:
        query = sql.SQL("SELECT key FROM ehub.diff_keys(%s, %s) WHERE change = %s")
        with self._database.connection() as connection, connection.transaction():
            with connection.cursor(name="ehub_diff") as cursor:
                cursor.execute(query, [*self._addresses, self._change])
                for (key,) in cursor:
                    yield key

    def __repr__(self) -> str:
        return f"<{self._n:,} keys {self._change}>"


class Diff(NamedTuple):
    """What became of a version in another one, and what searches notice of it.

    Attributes:
        added, removed, changed: keys; ``changed`` where the vector or the metadata differs.
        same: the number of keys that are as they were.
        drift: how far vectors moved; None where the dims differ or no key is in both.
        moved_most: the keys that moved farthest, the farthest first; empty where the dims differ.
        overlaps: for each key or query that was compared, the share of its ``k`` nearest that is
            the same in both; queries go by their number, from 0.
        k: how many neighbours were compared.
    """

    added: Keys
    removed: Keys
    changed: Keys
    same: int
    drift: Drift | None
    moved_most: list[Moved]
    overlaps: dict[str | int, float]
    k: int

    def __repr__(self) -> str:
        share = "none compared" if self.overlap is None else f"{self.overlap:.3f}"
        return (
            f"<Diff: {len(self.added):,} added, {len(self.removed):,} removed,"
            f" {len(self.changed):,} changed, {self.same:,} the same, overlap@{self.k} {share}>"
        )

    @property
    def overlap(self) -> float | None:
        """The mean of the overlaps: what users will notice. None where nothing was compared."""
        return sum(self.overlaps.values()) / len(self.overlaps) if self.overlaps else None


def compare(database: Database, earlier: str, later: str, most: int, k: int) -> Diff:
    """Compare two versions by their addresses, in one snapshot; without any overlaps yet."""
    addresses = (earlier, later)
    with database.connection(earlier) as connection, repeatable_read(connection):
        row = connection.execute(
            "SELECT added, removed, changed, same, drift FROM ehub.diff(%s, %s)", addresses
        ).fetchone()
        assert row is not None  # noqa: S101 - the function returns a row
        added, removed, changed, same, drift = row
        farthest = connection.execute(
            "SELECT key, moved FROM ehub.diff_keys(%s, %s)"
            " WHERE moved > 0 ORDER BY moved DESC, key LIMIT %s",
            [*addresses, most],
        ).fetchall()
    return Diff(
        added=Keys(database, addresses, "added", added),
        removed=Keys(database, addresses, "removed", removed),
        changed=Keys(database, addresses, "changed", changed),
        same=same,
        drift=None if drift is None else Drift(*drift),
        moved_most=[Moved(*one) for one in farthest],
        overlaps={},
        k=k,
    )
