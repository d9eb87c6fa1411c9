"""A space and its versions: made beside each other, compared, promoted, rolled back."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, SupportsIndex

from numpy.typing import ArrayLike

from ehub import access, values
from ehub.access import AuditEntry, Grant, Privilege
from ehub.binary import VectorsParameter
from ehub.collection import Collection
from ehub.compare import Measured, measure
from ehub.database import Database
from ehub.diff import Diff, compare
from ehub.errors import InvalidNameError, InvalidValueError, VersionNotFoundError
from ehub.replica import Replica
from ehub.types import IndexPlace, Matrix, Metadata, Metric

_log = logging.getLogger(__name__)


class Switched(NamedTuple):
    """What a promotion or a rollback did.

    Attributes:
        from_version, to_version: the current versions before and after.
        warm: whether the index of the new one was ready wherever that of the old one is; where it
            was not, searches are exact until it is.
    """

    from_version: str
    to_version: str
    warm: bool


class Promotion(NamedTuple):
    """An entry of a space's history: when, by which role, ``promote`` or ``rollback``, from, to."""

    at: datetime.datetime
    by: str
    kind: str
    from_version: str
    to_version: str


class Version(Collection):
    """A handle on one version of a space, which it goes on to mean when another becomes current.

    Got by ``space.version(name)`` or ``hub.get_space(space, version=name)``. It has what a space
    has for rows, neighbours, checkpoints and snapshots. In SQL it is the view
    ``spaces."<space>@<version>"``, and ``<space>@<version>`` for functions.
    """

    @classmethod
    def of(
        cls,
        space: str,
        name: object,
        database: Database,
        index: IndexPlace,
        replica: Replica | None,
    ) -> Version:
        """Return the handle on a version of a space, also where one may see no other of it."""
        return cls(_version_address(space, name), database, index, replica)

    @property
    def name(self) -> str:
        """The name of the version."""
        return self._address.partition("@")[2]

    @property
    def space(self) -> str:
        """The name of its space."""
        return self._address.partition("@")[0]

    @property
    def rows(self) -> int:
        """The number of its rows, counted in Postgres."""
        return len(self)

    @property
    def current(self) -> bool:
        """Whether its space's name means it; asked of Postgres."""
        with self._database.connection(self._address) as connection:
            row = connection.execute(
                "SELECT current FROM ehub.require_space(%s)", [self._address]
            ).fetchone()
        return row == (True,)


class Space(Collection):
    """A handle on a space; made by :class:`ehub.Hub`. Every method may be called from any thread.

    Everything about rows, neighbours, checkpoints and snapshots is about its current version, that
    of the moment when it is called.
    """

    @property
    def name(self) -> str:
        """The name that applications ask for."""
        return self._address

    def compare_with_pgvector(
        self,
        queries: ArrayLike | None = None,
        *,
        k: SupportsIndex = 10,
        sample: SupportsIndex = 100,
        watch: Callable[[str], None] = lambda _: None,
    ) -> list[Measured]:
        """Measure searches of an attached space: ehub's, and by pgvector's index on the column.

        ``queries`` are numbers of shape ``(n, dims)``; without them ``sample`` rows are drawn, and
        none is an answer to itself. Exact searches say what the ``k`` nearest are, and take most of
        the time; ``watch`` is told what is being done. ehub is asked as this hub asks it, in SQL or
        in this process, which comes first in the answer. pgvector's index, if there is one, is
        measured as the database sets it, and where it finds less than ehub also as it has to be set
        to find as much, or as far as it goes. Nothing is changed.

        Raises:
            InvalidValueError: the space is not attached, or has too few rows; or a query.
            WaitTimeoutError: ehub's index was not ready within an hour.
        """
        return measure(
            self,
            self._address,
            self._database,
            self._index_place,
            queries,
            values.as_whole("k", k),
            values.as_whole("sample", sample),
            watch,
        )

    # --- versions

    def version(self, name: str) -> Version:
        """Return a handle on a version.

        Raises:
            VersionNotFoundError: there is none of that name.
        """
        return Version.of(self._address, name, self._database, self._index_place, self._replica)

    def versions(self) -> list[Version]:
        """Return handles on all versions, the oldest first."""
        with self._database.connection(self._address) as connection:
            names = connection.execute(
                "SELECT version FROM ehub.catalogue WHERE space = %s ORDER BY version_id",
                [self._address],
            ).fetchall()
        return [self.version(name) for (name,) in names]

    @property
    def current(self) -> Version:
        """The version that the space's name means now."""
        return self.version(self._read_shape().version)

    def create_version(
        self,
        name: str,
        dims: SupportsIndex | None = None,
        metric: Metric | None = None,
        *,
        from_version: str | None = None,
        M: int | None = None,
        ef_construction: int | None = None,
        target_recall: float | None = None,
        partition_by: str | None = None,
    ) -> Version:
        """Make a version beside the others; readers of the space do not see it.

        With ``from_version`` it begins as a copy of that one. What is not said is as in that
        version, or as in the current one. Who may read or write the current version may do so here.

        Raises:
            InvalidNameError: not 1 to 22 letters, digits, ``_``, ``-`` or ``.``.
            InvalidValueError: another value; the message names it and its limits.
            VersionExistsError: there is one of that name.
            VersionNotFoundError: there is no ``from_version``.
        """
        parameters = [
            None if dims is None else values.as_whole("dims", dims),
            metric,
            from_version,
            *values.as_build(M, ef_construction, target_recall),
            None if partition_by is None else values.as_name("a field", partition_by),
        ]
        _version_address(self._address, name)
        with self._database.connection(self._address) as connection:
            connection.execute(
                "SELECT ehub.create_version(%s, %s, %s::int, %s, %s, %s::int, %s::int, %s, %s)",
                [self._address, name, *parameters],
            )
        return self.version(name)

    def promote(
        self,
        version: str,
        *,
        wait: float | None = None,
        min_overlap: float | None = None,
        k: int = 10,
        sample: int = 100,
    ) -> Switched:
        """Make a version the current one: from one moment on, the space's name means it.

        No reader sees an error or a mixture; statements under way end on the version that they
        began with. ``wait`` waits so many seconds for the version's indexes to be ready; without,
        ``warm`` in the answer says whether they were. ``min_overlap`` refuses where, for ``sample``
        keys, a smaller share than that of the ``k`` nearest would stay the same.

        Raises:
            VersionNotFoundError: there is none of that name.
            InvalidValueError: it is current already.
            WaitTimeoutError: the indexes were not ready in time; nothing was changed.
            OverlapError: too many answers would change; nothing was changed.
        """
        return self._switch(
            "SELECT from_version, to_version, warm FROM ehub.promote("
            "%s, %s, %s, make_interval(secs => %s), %s::int, %s::int)",
            [
                _version_address(self._address, version).partition("@")[2],
                None if min_overlap is None else values.as_number("min_overlap", min_overlap),
                None if wait is None else values.as_number("wait", wait),
                values.as_count(k),
                values.as_whole("sample", sample),
            ],
        )

    def rollback(self) -> Switched:
        """Make that version current again which was so before the last promotion.

        Each further call goes one promotion further back.

        Raises:
            VersionNotFoundError: there is none to go back to.
        """
        return self._switch("SELECT from_version, to_version, warm FROM ehub.rollback(%s)", [])

    def history(self) -> list[Promotion]:
        """Return all promotions and rollbacks, the last one first."""
        with self._database.connection(self._address) as connection:
            rows = connection.execute(
                "SELECT at, by, kind, from_version, to_version FROM ehub.promotions"
                " WHERE space = %s",
                [self._address],
            )
            return [Promotion(*row) for row in rows]

    def drop_version(self, name: str, *, force: bool = False) -> None:
        """Drop a version with its rows; waits for transactions that use it.

        Raises:
            VersionNotFoundError: there is none of that name.
            VersionInUseError: it is current; or, without ``force``, a rollback would go back to it,
                or it has checkpoints.
        """
        _version_address(self._address, name)
        with self._database.connection(self._address) as connection:
            connection.execute("SELECT ehub.drop_version(%s, %s, %s)", [self._address, name, force])
        if self._replica is not None:
            self._replica.refresh()

    def diff(
        self,
        earlier: str,
        later: str,
        *,
        k: int = 10,
        sample: int = 100,
        keys: Iterable[str] | None = None,
        queries: ArrayLike | None = None,
        later_queries: ArrayLike | None = None,
        most: int = 10,
    ) -> Diff:
        """Compare two versions: what differs, how far vectors moved, whether answers stay the same.

        The ``k`` nearest of a sample of keys are compared, or of the given ``keys``, or of
        ``queries`` of shape ``(n, dims)``; where the dims differ, ``later_queries`` are the same
        queries in the form of the later version. ``most`` is how many of the keys that moved
        farthest are told.

        Raises:
            VersionNotFoundError: one of the two is not there.
            KeyNotFoundError: one of the keys is not in both.
            InvalidValueError: a query that does not fit its version, or ``k``.
        """
        first, second = self.version(earlier), self.version(later)
        addresses = [first._address, second._address]
        count = values.as_count(k)
        found = compare(self._database, addresses[0], addresses[1], most, count)
        if queries is not None:
            asked = first._as_matrix(queries, f"space {first._address!r}, queries")
            answered = second._as_matrix(
                queries if later_queries is None else later_queries,
                f"space {second._address!r}, queries",
            )
            if not len(asked) or len(asked) != len(answered):
                raise InvalidValueError(
                    f"as many queries in the form of either version are needed, not {len(asked)}"
                    f" and {len(answered)}"
                )
            return found._replace(
                overlaps=self._overlap_of_queries(addresses, asked, answered, count)
            )
        chosen = None if keys is None else values.as_keys(keys)
        with self._database.connection(self._address) as connection:
            rows = connection.execute(
                "SELECT key, overlap FROM ehub.overlap(%s, %s, %s, %s, %s)",
                [*addresses, count, chosen, values.as_whole("sample", sample)],
            )
            return found._replace(overlaps=dict(rows.fetchall()))

    # --- access

    def grant(
        self,
        role: str,
        privilege: Privilege,
        *,
        version: str | None = None,
        rows: Metadata | None = None,
    ) -> None:
        """Give a role of Postgres' a right on this space, and with it to the role's members.

        ``read``; ``write``, which is that and changing rows; or ``admin``, all that and managing:
        versions, checkpoints, grants. On all versions, also those to come, or on one. With ``rows``
        only on rows whose metadata contains that: others are not seen, not counted and not written,
        and searches find the nearest of those that are. Several grants add up.

        Raises:
            AccessDeniedError: you do not manage the space.
            RoleNotFoundError: there is no such role.
            VersionNotFoundError: there is no such version.
            InvalidValueError: another value; the message names it.
        """
        access.change(self._database, "grant", self._address, role, privilege, version, rows)

    def revoke(
        self,
        role: str,
        privilege: Privilege | None = None,
        *,
        version: str | None = None,
        rows: Metadata | None = None,
    ) -> None:
        """Take a role's rights on this space away: all, or those that are named.

        Takes effect with the next statement of whoever had them; an index in a process of theirs
        is dropped within five seconds, thirty where it cannot reach the database.

        Raises:
            AccessDeniedError: you do not manage the space.
            GrantNotFoundError: the role has no such right.
            RoleNotFoundError: there is no such role.
        """
        access.change(self._database, "revoke", self._address, role, privilege, version, rows)

    def grants(self) -> list[Grant]:
        """Return the grants on this space: all to who manages it, to others their own."""
        return access.grants(self._database, self._address)

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        """Return what was done to manage this space, the last first, to who manages it."""
        return access.audit(self._database, self._address, values.as_whole("limit", limit))

    # --- inside

    def _overlap_of_queries(
        self, addresses: list[str], asked: Matrix, answered: Matrix, k: int
    ) -> dict[str | int, float]:
        with self._database.connection(self._address) as connection:
            oid = self._vector_type(connection)
            rows = connection.execute(
                "SELECT q - 1, overlap FROM ehub.overlap_of_queries(%s, %s, %s, %s, %s) ORDER BY 1",
                [*addresses, VectorsParameter(asked, oid), VectorsParameter(answered, oid), k],
            )
            return dict(rows.fetchall())

    def _switch(self, statement: str, parameters: list[object]) -> Switched:
        with self._database.connection(self._address) as connection:
            row = connection.execute(statement.encode(), [self._address, *parameters]).fetchone()
        assert row is not None  # noqa: S101 - the functions return a row
        switched = Switched(*row)
        if not switched.warm:
            _log.warning(
                "space %r: the index of version %r is not ready everywhere; searches are exact"
                " until it is",
                self._address,
                switched.to_version,
            )
        self._read_shape()
        if self._replica is not None:
            self._replica.refresh()
        return switched


def _version_address(space: str, name: object) -> str:
    text = values.as_name("a version", name)
    if "@" in text:
        raise InvalidNameError(f"a version's name has no @: {text!r}")
    if not text:
        raise VersionNotFoundError(f"space {space!r} has no version ''")
    return f"{space}@{text}"
