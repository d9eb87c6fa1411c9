"""Connections to Postgres, and the one place where the driver's errors become ehub's."""

from __future__ import annotations

import codecs
import contextlib
import logging
import select
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.types.json import set_json_loads
from psycopg_pool import ConnectionPool, PoolTimeout

from ehub import errors, jsontext
from ehub.binary import (
    COPY_HEADER,
    COPY_TRAILER,
    VectorDumper,
    VectorParameter,
    VectorsParameter,
    encode_rows,
)
from ehub.config import Target
from ehub.embedded import EmbeddedPostgres
from ehub.types import Matrix

_log = logging.getLogger(__name__)

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

SCHEMA_REVISION = "0009"
"""The Alembic revision that this release works with."""

# Raised by the functions in sql/, which describe the value themselves.
_OWN_ERRORS: dict[str, type[errors.EhubError]] = {
    "EH001": errors.SpaceNotFoundError,
    "EH002": errors.SpaceExistsError,
    "EH003": errors.InvalidNameError,
    "EH004": errors.InvalidVectorError,
    "EH005": errors.InvalidValueError,
    "EH006": errors.InvalidKeyError,
    "EH007": errors.InvalidMetadataError,
    "EH008": errors.KeyNotFoundError,
    "EH009": errors.IndexUnavailableError,
    "EH010": errors.ServiceError,
    "EH011": errors.VersionNotFoundError,
    "EH012": errors.CheckpointNotFoundError,
    "EH013": errors.VersionExistsError,
    "EH014": errors.CheckpointExistsError,
    "EH015": errors.FrozenError,
    "EH016": errors.VersionInUseError,
    "EH017": errors.OverlapError,
    "EH018": errors.WaitTimeoutError,
    "EH019": errors.GrantNotFoundError,
    "EH020": errors.RoleNotFoundError,
    "EH021": errors.InvalidFilterError,
    "EH022": errors.IndexNotFoundError,
    "EH023": errors.IndexExistsError,
    "EH024": errors.PartitionNotFoundError,
    "EH025": errors.ReadOnlyError,
    "EH026": errors.SpaceInUseError,
    "EH027": errors.AttachedError,
    "EH028": errors.NotAttachableError,
}


# Of every connection: keys and metadata are written and read as UTF-8, whatever role, database,
# PGCLIENTENCODING or the connection string says.
ENCODING = "utf8"
_POOL_LOG = logging.getLogger("psycopg.pool")
# What Python calls otherwise than Postgres.
_CODECS = {"KOI8R": "koi8-r", "KOI8U": "koi8-u", "EUC_CN": "gb2312"}


class Database:
    """A pool of connections to one database, for short work, and single ones for long work.

    Connections are in autocommit mode; a transaction is opened where one is meant. They are made
    when they are needed: creating a ``Database`` sends nothing.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._embedded = EmbeddedPostgres(target.data_dir) if target.conninfo is None else None
        self._pool: ConnectionPool[Connection] | None = None
        self._absence = _Absence(f"ehub {id(self)}")
        self._mutex = threading.Lock()
        self._closed = False

    @property
    def embedded(self) -> EmbeddedPostgres | None:
        """The embedded server, or None where the database is somebody else's."""
        return self._embedded

    def conninfo(self) -> str:
        """Return libpq's connection string; starts the embedded server where it does not run.

        It may hold a password: not for logs.
        """
        if self._embedded is not None:
            return self._embedded.conninfo()
        assert self.target.conninfo is not None  # noqa: S101 - else it is embedded
        return self.target.conninfo

    def connect(self) -> Connection:
        """Open a connection of one's own, in autocommit mode, without any timeout of the role's.

        Raises:
            UnavailableError: Postgres cannot be reached.
        """
        with mapped():
            connection = psycopg.connect(self.conninfo(), autocommit=True, client_encoding=ENCODING)
            _configure(connection)
            connection.execute(
                "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0;"
                " SET idle_session_timeout = 0; SET search_path = pg_catalog"
            )
            return connection

    @contextlib.contextmanager
    def connection(self, space: str | None = None) -> Iterator[Connection]:
        """Lend a connection of the pool; ``space`` is named in errors.

        Raises:
            EhubError: what the driver raised inside, as :func:`mapped` translates it.
        """
        with mapped(space):
            with self._open_pool().connection() as connection:
                yield connection

    def installed(self) -> tuple[str | None, str | None]:
        """Return the revision of the ehub schema, and the digest of its functions.

        Raises:
            UnavailableError: Postgres cannot be reached.
        """
        # Not of the pool, which would try again and again where nobody is.
        with contextlib.closing(self.connect()) as connection, mapped():
            return installed(connection)

    def has_service(self) -> bool:
        """Whether an index service is installed, running or not.

        Raises:
            UnavailableError: Postgres cannot be reached.
        """
        if self._embedded is not None:
            # It is there as long as somebody runs it; an index of this process always is.
            return False
        with self.connection() as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_foreign_server WHERE srvname = 'ehub_service'"
            )
            return found.fetchone() is not None

    def close(self) -> None:
        """Close the pool and leave the embedded server. Safe to call twice."""
        with self._mutex:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
            _POOL_LOG.removeFilter(self._absence)
        if self._embedded is not None:
            self._embedded.release()

    def _configure_pooled(self, connection: Connection) -> None:
        self._absence.end()
        _configure(connection)

    def _open_pool(self) -> ConnectionPool[Connection]:
        pool = self._pool
        if pool is not None:
            return pool
        with self._mutex:
            if self._closed:
                raise errors.UnavailableError("this hub is closed; connect again")
            if self._pool is None:
                self._pool = ConnectionPool(
                    self.conninfo,
                    kwargs={"autocommit": True, "client_encoding": ENCODING},
                    min_size=0,
                    max_size=16,
                    timeout=10,
                    num_workers=1,
                    check=_check_alive,
                    configure=self._configure_pooled,
                    name=self._absence.pool,
                    open=True,
                )
                _POOL_LOG.addFilter(self._absence)
            return self._pool


def require_encodable(
    connection: Connection, space: str, keys: Iterable[str], notes: Iterable[str | None]
) -> None:
    """Refuse text that the database's own encoding cannot hold; ``notes`` are JSON.

    Raises:
        InvalidKeyError, InvalidMetadataError: one of them; the key, the character and the encoding
            are named.
    """
    encoding = connection.info.parameter_status("server_encoding") or ""
    if encoding in ("UTF8", "SQL_ASCII"):
        return
    try:
        codec = codecs.lookup(_CODECS.get(encoding, encoding.replace("WIN", "cp")))
    except LookupError:
        # Postgres says it, though not of which key.
        return
    for key, note in zip(keys, notes, strict=True):
        for text, error in ((key, errors.InvalidKeyError), (note, errors.InvalidMetadataError)):
            try:
                codec.encode(text or "")
            except UnicodeEncodeError as refused:
                character = refused.object[refused.start]
                raise error(
                    f"space {space!r}, key {key[:60]!r}: the database's encoding {encoding} has no"
                    f" {character!r}; a database in UTF8 holds every character"
                ) from None


def copy_rows(
    connection: Connection,
    space: str,
    table: str,
    batches: Iterable[tuple[Sequence[str], Matrix, Sequence[str | None] | None]],
) -> int:
    """Copy keys, vectors and metadata into a table ``(key, embedding, metadata)`` of the session.

    A batch is keys, float32 of shape ``(n, dims)`` and JSON text or None for each. Returns the
    number of rows. ``space`` is named in errors.

    Raises:
        InvalidKeyError, InvalidMetadataError: see :func:`require_encodable`.
    """
    rows = 0
    refused: errors.EhubError | None = None
    statement = sql.SQL("COPY pg_temp.{} (key, embedding, metadata) FROM STDIN BINARY")
    with contextlib.suppress(_Refused):
        with connection.cursor().copy(statement.format(sql.Identifier(table))) as copy:
            copy.write(COPY_HEADER)
            for keys, vectors, notes in batches:
                rows += len(keys)
                try:
                    require_encodable(connection, space, keys, notes or [None] * len(keys))
                except errors.EhubError as error:
                    # The server is told what ends the copy, and this is what it cannot be told.
                    refused = error
                    raise _Refused from None
                copy.write(encode_rows(keys, vectors, notes))
            copy.write(COPY_TRAILER)
    if refused is not None:
        raise refused
    return rows


class _Absence(logging.Filter):
    """Lets the log say once that Postgres cannot be reached, and once that it can be again.

    A pool says it of every attempt, of which there are many.
    """

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self._away = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log what a pool says."""
        given = record.args
        if not isinstance(given, tuple) or self.pool not in given:
            return True
        if record.msg.startswith("error connecting in"):
            if not self._away:
                self._away = True
                _log.warning("Postgres cannot be reached: %s", given[-1])
            return False
        return not record.msg.startswith("reconnection attempt in pool")

    def end(self) -> None:
        """Say that a connection was made."""
        if self._away:
            self._away = False
            _log.warning("Postgres can be reached again")


class _Refused(Exception):  # noqa: N818 - control flow, not an error
    """Text that the database cannot hold ends a copy."""


@contextlib.contextmanager
def repeatable_read(connection: Connection) -> Iterator[None]:
    """Do what is inside in one snapshot, without writing."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield


@contextlib.contextmanager
def mapped(space: str | None = None) -> Iterator[None]:
    """Translate the driver's errors into ehub's, chained to their cause."""
    try:
        yield
    except PoolTimeout as error:
        raise errors.UnavailableError("no connection to Postgres could be had in time") from error
    except psycopg.Error as error:
        raise _translate(error, space) from error


def installed(connection: Connection) -> tuple[str | None, str | None]:
    """Return what ``ehub migrate`` left: the schema's revision, and the digest of its functions."""
    row = connection.execute("SELECT to_regclass('ehub.migration') IS NOT NULL").fetchone()
    if row != (True,):
        return None, None
    row = connection.execute(
        "SELECT (SELECT version_num FROM ehub.migration),"
        " (SELECT value FROM ehub.setting WHERE name = 'sql_digest')"
    ).fetchone()
    return (None, None) if row is None else (row[0], row[1])


def is_lost(error: BaseException) -> bool:
    """Whether a driver's error means that the connection, and not the statement, failed."""
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    state = error.sqlstate
    return state is None or state.startswith(("08", "57P"))


def _translate(error: psycopg.Error, space: str | None) -> errors.EhubError:
    text = error.diag.message_primary or str(error).strip() or type(error).__name__
    if error.diag.message_hint:
        text = f"{text} ({error.diag.message_hint})"
    own = _OWN_ERRORS.get(error.sqlstate or "")
    if own is not None:
        return own(text)
    if isinstance(error, pg.UndefinedTable) and space is not None:
        name, at, version = space.partition("@")
        if at:
            return errors.VersionNotFoundError(f"space {name!r} has no version {version!r}")
        return errors.SpaceNotFoundError(f"there is no space {space!r}")
    if isinstance(error, pg.UndefinedTable | pg.UndefinedFunction | pg.InvalidSchemaName):
        return errors.SchemaError(f"{text}: has `ehub migrate` been run?")
    # Functions of ehub's name it themselves.
    where = "" if space is None or text.startswith("space ") else f"space {space!r}: "
    if isinstance(error, pg.InsufficientPrivilege):
        if "row-level security" in text:
            text = (
                "this role may write rows only whose metadata contains what its grant is limited"
                " to, which `ehub whoami` shows"
            )
        return errors.AccessDeniedError(where + text)
    if is_lost(error):
        return errors.UnavailableError(f"Postgres cannot be reached: {text}")
    return errors.DatabaseError(where + text)


def _check_alive(connection: Connection) -> None:
    """Refuse a pooled connection whose server is gone, without asking the server.

    An idle connection has nothing to say; one that is readable holds the server's farewell.
    """
    if connection.closed or select.select([connection], [], [], 0)[0]:
        # Closed, or the pool would take it for a good one.
        connection.close()
        raise psycopg.OperationalError("the connection was lost while it was idle")


def _tell_of_waiting(notice: psycopg.errors.Diagnostic) -> None:
    """Log for whom something waits; other notices are for those who write SQL."""
    if notice.sqlstate == "EH018":
        _log.warning("%s", notice.message_primary)


def _configure(connection: Connection) -> None:
    # What values are as text, whatever the role, the database or the connection string sets.
    connection.execute(
        "SET extra_float_digits = 1; SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres';"
        " SET bytea_output = 'hex'; SET standard_conforming_strings = on; SET row_security = on"
    )
    set_json_loads(jsontext.read, connection)
    connection.add_notice_handler(_tell_of_waiting)
    for parameter in (VectorParameter, VectorsParameter):
        connection.adapters.register_dumper(parameter, VectorDumper)
