"""The way in: a database, its spaces, and the indexes of this process."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Literal, SupportsIndex, overload

from ehub import access, average, config, resources, values
from ehub.access import AuditEntry, Finding, Grant, Privilege, Right, Role
from ehub.average import KeptAverage
from ehub.database import SCHEMA_REVISION, Database
from ehub.errors import ConfigurationError, NotAttachableError, SchemaError, SpaceNotFoundError
from ehub.replica import Replica
from ehub.snapshot import Snapshot
from ehub.space import Space, Version
from ehub.types import IndexPlace, Metadata, Metric


class Hub:
    """The spaces of one database. Use :func:`ehub.connect` to get one.

    A hub holds a pool of connections and, once neighbours were asked for, indexes that follow the
    database. :meth:`close` (or ``with``) saves them; the end of the process does too.
    """

    def __init__(self, database: Database, index: IndexPlace = "local") -> None:
        self._database = database
        self._index: IndexPlace = index
        self._replica = Replica(database) if index == "local" else None

    @property
    def index(self) -> IndexPlace:
        """Who answers searches: ``local``, ``service`` or ``none``; see :func:`ehub.connect`."""
        return self._index

    def create_space(
        self,
        name: str,
        dims: SupportsIndex,
        metric: Metric = "l2",
        *,
        M: int = 16,
        ef_construction: int = 200,
        target_recall: float = 0.95,
        partition_by: str | None = None,
    ) -> Space:
        """Make a space for vectors of ``dims`` numbers.

        ``metric`` is ``l2`` (Euclidean), ``cosine`` or ``ip`` (negative inner product). ``M`` and
        ``ef_construction`` are HNSW's build parameters; ``target_recall`` is the share of the true
        10 nearest that a search is to find: the index measures which ``ef`` reaches it.

        ``partition_by`` is a field of the metadata, like a tenant, by whose values rows are
        searched apart: each row must have it then, as a string, number or boolean. Large partitions
        have a graph of their own, small ones are compared exactly, and there is none over all rows:
        a search without ``partition=`` goes through all of them.

        Raises:
            InvalidNameError: not 1 to 40 letters, digits, ``_``, ``-`` or ``.``.
            InvalidValueError: another value; the message names it and its limits.
            SpaceExistsError: there is one of that name.
        """
        parameters = [
            values.as_name("a space", name),
            values.as_whole("dims", dims),
            str(metric),
            values.as_whole("M", M),
            values.as_whole("ef_construction", ef_construction),
            values.as_number("target_recall", target_recall),
            None if partition_by is None else values.as_name("a field", partition_by),
        ]
        with self._database.connection() as connection:
            connection.execute(
                "SELECT ehub.create_space(%s, %s::int, %s, %s::int, %s::int, %s, %s)", parameters
            )
        return self.get_space(name)

    def create_average(
        self,
        name: str,
        source: str,
        by: str,
        weight: str | None = None,
        *,
        metric: Metric | None = None,
        M: int = 16,
        ef_construction: int = 200,
        target_recall: float = 0.95,
    ) -> Space:
        """Make a space of averages, which follows the rows of space ``source``.

        For each value of field ``by`` in the metadata of the source it has a row under that value
        as text: the average of the rows with it, weighted by field ``weight`` if one is given, with
        metadata ``{"rows": …}`` and ``{"weight": …}``, the sum of the weights. Whoever writes to
        the source changes it in the same transaction; nobody writes to it. It has the versions that
        the source has, and each follows its like. :meth:`ehub.Space.averages` says what takes no
        part.

        The metric is by default that of the source; the rest is as for :meth:`create_space`. Needs
        the right to make spaces and to manage the source. Those who write to the source wait while
        it is made.

        Raises:
            SpaceNotFoundError: there is no such source.
            SpaceExistsError: there is a space of that name.
            AccessDeniedError: you may not make spaces, or do not manage the source.
            InvalidValueError: another value; the message names it; or the source is an average.
        """
        parameters = [
            values.as_name("a space", name),
            values.as_name("a space", source),
            average.as_field("by", by),
            None if weight is None else average.as_field("weight", weight),
            None if metric is None else str(metric),
            values.as_whole("M", M),
            values.as_whole("ef_construction", ef_construction),
            values.as_number("target_recall", target_recall),
        ]
        with self._database.connection(source) as connection:
            connection.execute(
                "SELECT ehub.create_average(%s, %s, %s, %s, %s, %s::int, %s::int, %s)", parameters
            )
        return self.get_space(name)

    def attach(
        self,
        table: str,
        column: str,
        name: str | None = None,
        *,
        schema: str | None = None,
        metric: Metric | None = None,
        dims: SupportsIndex | None = None,
        M: int = 16,
        ef_construction: int = 200,
        target_recall: float = 0.95,
    ) -> Space:
        """Search the embeddings in a column of a table that is there already, as a space.

        No row moves: the table goes on as it is, and triggers log which keys change. Its primary
        key, of one column (integers, uuid, text), gives the keys, its other columns are the
        metadata. ``table`` is its name as SQL writes it, like ``public.documents``; with a
        ``schema`` both are the plain names, without quotes. The column is
        of pgvector's type ``vector`` or ``halfvec``; rows without an embedding are not in the
        space, and those that have no distance to anything are not found.

        The space's ``name`` is by default that of the table, its ``metric`` that of pgvector's
        index on the column, else ``l2``. ``dims`` is needed where the column has vectors of
        several: then the space is of those rows. The rest is as for :meth:`create_space`. Needs
        ownership of the table; those who write to it wait while triggers are made.

        What needs rows of ehub's own raises :class:`ehub.AttachedError`: writes, versions,
        checkpoints, grants (those on the table count), maintained averages.

        Raises:
            NotAttachableError: there is no such table or column, or it cannot be attached.
            SpaceExistsError: there is a space of that name, or the column is attached already.
            AccessDeniedError: you do not own the table.
            InvalidValueError: another value; the message names it and its limits.
            WaitTimeoutError: transactions wrote to the table for a minute; nothing was changed.
        """
        parameters = [
            table,
            column,
            None if name is None else values.as_name("a space", name),
            None if metric is None else str(metric),
            None if dims is None else values.as_whole("dims", dims),
            values.as_whole("M", M),
            values.as_whole("ef_construction", ef_construction),
            values.as_number("target_recall", target_recall),
        ]
        with self._database.connection() as connection:
            found = connection.execute(
                "SELECT to_regclass(CASE WHEN %(schema)s::text IS NULL THEN %(table)s ELSE"
                " format('%%I.%%I', %(schema)s::text, %(table)s::text) END)::oid::bigint",
                {"schema": schema, "table": table},
            ).fetchone()
            if found is None or found[0] is None:
                raise NotAttachableError(f"there is no table {table!r} that you may use")
            row = connection.execute(
                "SELECT ehub.attach(%s::oid, %s, %s, %s, %s::int, %s::int, %s::int, %s)",
                [found[0], *parameters[1:]],
            ).fetchone()
        assert row is not None  # noqa: S101 - a select without from
        return self.get_space(row[0])

    def attached(self, table: str, column: str, metric: Metric | None = None) -> Space | None:
        """Return the space that a column of a table is attached as, None where it is not.

        Raises:
            InvalidValueError: it is attached under several metrics, and none is said.
        """
        try:
            with self._database.connection() as connection:
                row = connection.execute(
                    "SELECT ehub.space_of(to_regclass(%s), %s, %s)",
                    [table, column, None if metric is None else str(metric)],
                ).fetchone()
        except SpaceNotFoundError:
            return None
        return self.get_space(row[0]) if row and row[0] else None

    def detach(self, name: str) -> None:
        """End what :meth:`attach` began: of the space nothing is left, and the table is as before.

        Needs ownership of the table; waits for transactions that use it.

        Raises:
            SpaceNotFoundError: there is no space of that name.
            NotAttachableError: it is not attached.
            AccessDeniedError: you do not own the table.
            WaitTimeoutError: transactions used the table for a minute; nothing was changed.
        """
        with self._database.connection(name) as connection:
            connection.execute("SELECT ehub.detach(%s)", [name])
        if self._replica is not None:
            self._replica.refresh()

    def kept_averages(self) -> list[KeptAverage]:
        """Return the spaces of averages that one may read or write, by name."""
        return average.kept_averages(self._database)

    @overload
    def get_space(self, name: str, *, version: None = None) -> Space: ...
    @overload
    def get_space(self, name: str, *, version: str) -> Version: ...
    @overload
    def get_space(
        self, name: str, *, version: str | None = None, download_snapshot: Literal[True]
    ) -> Snapshot: ...
    def get_space(
        self, name: str, *, version: str | None = None, download_snapshot: bool = False
    ) -> Space | Version | Snapshot:
        """Return a handle on a space, or on one version of it; or a snapshot of that.

        Raises:
            SpaceNotFoundError: there is none of that name.
            VersionNotFoundError: the space has no such version.
        """
        parts = (self._database, self._index, self._replica)
        found = Space(name, *parts) if version is None else Version.of(name, version, *parts)
        return found.download_snapshot() if download_snapshot else found

    def resolve(self, address: str) -> Space | Version:
        """Return a handle on what an address means: ``items``, or ``items@v1``.

        Raises:
            NotFoundError: there is no such space or version.
        """
        name, at, version = address.partition("@")
        return self.get_space(name, version=version) if at else self.get_space(name)

    def load_snapshot(self, path: str | os.PathLike[str]) -> Snapshot:
        """Read a snapshot from a file, to refresh it from this database or to write it there.

        Raises:
            InvalidFileError: it is damaged, or not a snapshot.
            DependencyError: pyarrow is needed and not installed.
        """
        return Snapshot.load_for(self._database, path)

    def spaces(self) -> list[Space]:
        """Return handles on all spaces, by name."""
        with self._database.connection() as connection:
            names = connection.execute(
                "SELECT space FROM ehub.catalogue WHERE current ORDER BY space"
            ).fetchall()
        return [self.get_space(name) for (name,) in names]

    def delete_space(self, name: str) -> None:
        """Delete a space with all its rows; waits for transactions that use it.

        Raises:
            SpaceNotFoundError: there is none of that name.
            SpaceInUseError: averages follow it; they are named.
            DatabaseError: something else in the database, a view for example, depends on it.
        """
        with self._database.connection(name) as connection:
            connection.execute("SELECT ehub.delete_space(%s)", [name])
        if self._replica is not None:
            self._replica.refresh()

    def status(self) -> list[dict[str, Any]]:
        """Return the rows of the view ``ehub.status``: every space and every copy of its index."""
        with self._database.connection() as connection:
            cursor = connection.execute("SELECT * FROM ehub.status")
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    def grants(self) -> list[Grant]:
        """Return the grants that one may know of: on spaces that one manages, and one's own."""
        return access.grants(self._database)

    def roles(self) -> list[Role]:
        """Return the roles that have grants which one may know of, with their members."""
        return access.roles(self._database)

    def whoami(self) -> list[Right]:
        """Return what the role of this hub may do, and through which role it may."""
        return access.whoami(self._database)

    def grant_create(self, role: str) -> None:
        """Let a role make spaces; it manages those that it makes. For the owner of schema ehub.

        Raises:
            AccessDeniedError: you are not the owner.
            RoleNotFoundError: there is no such role.
        """
        access.change_default(self._database, "grant_create", role)

    def revoke_create(self, role: str) -> None:
        """Let a role make no more spaces; it goes on managing those that it made.

        Raises:
            AccessDeniedError: you are not the owner of schema ehub.
            GrantNotFoundError: it may not anyway.
        """
        access.change_default(self._database, "revoke_create", role)

    def grant_default(
        self, role: str, privilege: Privilege, *, rows: Metadata | None = None
    ) -> None:
        """Give a role a right on every space to come, as :meth:`ehub.Space.grant` does on one.

        Raises:
            AccessDeniedError: you are not the owner of schema ehub.
            RoleNotFoundError: there is no such role.
            InvalidValueError: another value; the message names it.
        """
        limits = access.as_rows(rows)
        access.change_default(self._database, "grant_default", role, privilege, limits)

    def revoke_default(self, role: str) -> None:
        """Give a role nothing any more on spaces to come; what it has on others stays.

        Raises:
            AccessDeniedError: you are not the owner of schema ehub.
            GrantNotFoundError: there is no such grant.
        """
        access.change_default(self._database, "revoke_default", role)

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        """Return the last acts of managing, the last first: of the spaces that one manages."""
        return access.audit(self._database, None, values.as_whole("limit", limit))

    def doctor(self, *, mend: bool = False) -> list[Finding]:
        """Find what is not as it should be.

        Rights given by hand, changed policies, lost roles; triggers of spaces that are missing or
        switched off; the mark of a current version.

        With ``mend`` what can be put right is; the rest has no ``remedy``.

        Raises:
            AccessDeniedError: you are not the owner of schema ehub.
        """
        return access.doctor(self._database, mend)

    @property
    def conninfo(self) -> str:
        """Libpq's connection string, for psycopg or psql. It may hold a password."""
        return self._database.conninfo()

    def close(self) -> None:
        """Save the indexes, stop following, close the connections. Safe to call twice."""
        if self._replica is not None:
            self._replica.close()
        self._database.close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Hub: {self._database.target.describe()}, index: {self._index}>"


def connect(
    url: str | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    index: IndexPlace | None = None,
) -> Hub:
    """Connect to a database.

    ``url`` is ``postgresql://user@host/database``, or any connection string of libpq. Without one:
    ``EHUB_DATABASE_URL``, then libpq's own variables (``PGHOST`` …), then the embedded Postgres in
    ``data_dir`` (``EHUB_DATA_DIR``, else the user's data directory), which ``"embedded"`` names
    outright; its schema is made or upgraded on the way. Index files live in that folder too.

    Searches are answered with ``index="local"`` by indexes in this process, which follow the
    database; with ``"service"`` by Postgres, which asks the index service (``ehub.nearest``, exact
    where that cannot help); with ``"none"`` by Postgres, exactly. By default ``"service"`` where
    the database has one installed, else ``"local"``; ``hub.index`` says which it is.

    Raises:
        ConfigurationError: the URL cannot be read.
        UnavailableError: the database cannot be reached.
        SchemaError: it has no ehub schema, or that of another release: run ``ehub migrate``.
        DependencyError: the embedded Postgres is meant and not installed.
    """
    if index not in (None, "local", "service", "none"):
        raise ConfigurationError(f"index is 'local', 'service' or 'none', not {index!r}")
    database = open_database(url, data_dir)
    return Hub(database, index or ("service" if database.has_service() else "local"))


def open_database(
    url: str | None = None, data_dir: str | os.PathLike[str] | None = None
) -> Database:
    """Return a database that has the schema of this release; raises what :func:`connect` does."""
    database = Database(config.resolve(url, data_dir))
    try:
        revision, digest = database.installed()
        if database.embedded is not None:
            # It is ehub's own. SQLAlchemy and Alembic are loaded only where there is work for them.
            if (revision, digest) != (SCHEMA_REVISION, resources.sql_digest()):
                from ehub.migrate import migrate

                migrate(database)
        elif revision != SCHEMA_REVISION:
            raise _schema_error(database.target.describe(), revision)
    except BaseException:
        database.close()
        raise
    return database


def _schema_error(where: str, revision: str | None) -> SchemaError:
    if revision is None:
        return SchemaError(
            f"{where} has no ehub schema yet: run `ehub migrate URL` as a role that may create "
            "schemas and extensions there"
        )
    return SchemaError(
        f"{where} has revision {revision} of the ehub schema, this release needs "
        f"{SCHEMA_REVISION}: run `ehub migrate URL`, or install the release that fits"
    )
