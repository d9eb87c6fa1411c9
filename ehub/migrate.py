"""Bring a database to the schema of this release.

Tables change by Alembic's revisions; functions and views are replaced from ``sql/`` where they
differ from what the last migration left. All of it is one transaction, which is short and does not
wait: where somebody uses a table or a view that it has to change, it is undone and tried again, so
that searches and writers are never kept waiting behind it for long.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time

import alembic.command
import alembic.config
import alembic.script
import psycopg
import sqlalchemy
from psycopg import errors as pg
from psycopg import sql

from ehub import resources
from ehub.database import ENCODING, Connection, Database, installed, mapped
from ehub.errors import SchemaError, WaitTimeoutError

_log = logging.getLogger(__name__)

_MINIMUM_POSTGRES = 15
_MINIMUM_PGVECTOR = (0, 7)
_COMMENT = "ehub, the embedding database: what it knows of spaces, and its functions"
# Whoever comes after a migration that waits for a lock waits behind it.
_LOCK_TIMEOUT = "50ms"
_PAUSE_SECONDS = 0.2
_TELL_SECONDS = 5.0
# What is made anew where it differs; the rest of the files is run every time.
_DEFINITION = re.compile(r"CREATE OR REPLACE (FUNCTION|VIEW) ehub\.(\w+)")
# Not ehub.users_of, which the database may not have yet.
_USERS = """
    SELECT concat_ws(
        ', ', 'process ' || l.pid || coalesce(' of role ' || quote_ident(a.usename), ''),
        nullif(a.application_name, ''),
        a.state || coalesce(format(
            ' for %s s', round(extract(epoch FROM clock_timestamp() - a.state_change))
        ), '')
    ) || format(' (uses %s)', string_agg(DISTINCT c.oid::regclass::text, ', '))
    FROM pg_locks AS l
    JOIN pg_class AS c ON c.oid = l.relation AND l.locktype = 'relation'
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND c.relnamespace IN (
            SELECT oid FROM pg_namespace WHERE nspname IN ('ehub', 'ehub_data', 'spaces')
        )
        AND c.relkind IN ('r', 'v') AND l.pid <> pg_backend_pid()
    GROUP BY l.pid, a.usename, a.application_name, a.state, a.state_change
    ORDER BY a.state_change LIMIT 5
"""
_VIEWS_OF_OTHERS = """
    WITH ours AS (
        SELECT oid FROM pg_namespace WHERE nspname IN ('ehub', 'ehub_data', 'spaces')
    )
    SELECT DISTINCT v.oid::regclass::text
    FROM pg_depend AS d
    JOIN pg_rewrite AS r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
    JOIN pg_class AS v ON v.oid = r.ev_class
    JOIN pg_class AS t ON t.oid = d.refobjid AND d.refclassid = 'pg_class'::regclass
    WHERE t.relnamespace IN (SELECT oid FROM ours) AND v.relnamespace NOT IN (SELECT oid FROM ours)
    ORDER BY 1
"""


def migrate(database: Database, timeout: float = 60.0) -> bool:
    """Create or upgrade the ehub schema; returns whether anything was to be done.

    Needs the right to create schemas, and extension ``vector`` or the right to create it.
    Concurrent calls wait for each other. Where transactions use what has to change, it tries again
    for ``timeout`` seconds, and tells in the log who they are.

    Raises:
        SchemaError: Postgres or pgvector is too old or missing, or the schema is a newer one.
        WaitTimeoutError: transactions were in the way all the time; nothing was changed.
    """
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(database.conninfo(), client_encoding=ENCODING),
        poolclass=sqlalchemy.NullPool,
    )
    deadline = time.monotonic() + timeout
    tell_at = time.monotonic() + 1.0
    failures = 0
    with mapped():
        while True:
            try:
                try:
                    changed = _in_transaction(engine)
                    break
                except sqlalchemy.exc.DBAPIError as error:
                    # SQLAlchemy wraps the driver's error, which `mapped` knows.
                    raise (error.orig or error) from error
            except (pg.UniqueViolation, pg.DuplicateSchema):
                # Somebody else was making the schema at the same time.
                failures += 1
                if failures > 1:
                    raise
            except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
                now = time.monotonic()
                if now > deadline:
                    raise WaitTimeoutError(
                        f"others used what has to change for {timeout:g} seconds, and nothing was"
                        f" changed: {_users(database)}"
                    ) from error
                if now > tell_at:
                    _log.warning("the migration waits for %s", _users(database))
                    tell_at = now + _TELL_SECONDS
                time.sleep(_PAUSE_SECONDS)
        if changed:
            _tend_triggers(database)
        return changed


def _users(database: Database) -> str:
    """Say who uses something of ehub's just now."""
    with database.connect() as connection:
        rows = connection.execute(_USERS).fetchall()
    return "; ".join(user for (user,) in rows) or "others, now and then"


def _tend_triggers(database: Database) -> None:
    """Make triggers that are older than these functions anew, one table at a time."""
    with database.connect() as connection:
        may = connection.execute(
            "SELECT has_function_privilege('ehub.tend_triggers(interval, bigint)', 'EXECUTE')"
        ).fetchone()
        if may != (True,):
            return
        versions = connection.execute(
            "SELECT id FROM ehub.version WHERE to_regclass('ehub_data.v' || id) IS NOT NULL"
            " AND ehub.wrong_triggers(id) IS NOT NULL ORDER BY id"
        ).fetchall()
        for (version_id,) in versions:
            connection.execute("SELECT ehub.tend_triggers('1 minute', %s)", [version_id])


def uninstall(database: Database, *, dry_run: bool = False) -> list[str]:
    """Take ehub out of a database, with all its spaces; returns the statements for it.

    Attached tables stay as they are, without ehub's triggers. For the owner of schema ehub, who
    owns these tables too. Extension ``vector`` stays. With ``dry_run`` nothing is done.

    Raises:
        SchemaError: somebody's views are made of what would be dropped; nothing was changed.
        AccessDeniedError: somebody else owns the schema, or an attached table.
        WaitTimeoutError: transactions used an attached table for a minute.
    """
    with contextlib.closing(database.connect()) as connection, mapped():
        if installed(connection)[0] is None:
            return []
        views = connection.execute(_VIEWS_OF_OTHERS).fetchall()
        if views:
            raise SchemaError(
                f"{', '.join(view for (view,) in views)}: made of ehub's relations; drop that first"
            )
        attached = connection.execute("SELECT space FROM ehub.attached ORDER BY space").fetchall()
        detach = sql.SQL("SELECT ehub.detach({})")
        statements = [detach.format(space).as_string(connection) for (space,) in attached]
        if database.has_service():
            statements.append("SELECT ehub.uninstall_service()")
        statements.append("DROP SCHEMA spaces, ehub_data, ehub CASCADE")
        for statement in () if dry_run else statements:
            connection.execute(statement.encode())
        return statements


def head() -> str:
    """Return the newest revision among the migrations of this release."""
    found = alembic.script.ScriptDirectory.from_config(_alembic()).get_current_head()
    if found is None:
        raise SchemaError("this installation of ehub has lost its migrations; install it again")
    return found


def _in_transaction(engine: sqlalchemy.Engine) -> bool:
    with engine.connect() as connection, connection.begin():
        changed = _migrate(connection)
        # A copied or restored database is noticed too, by whoever may.
        connection.exec_driver_sql(
            "SELECT CASE WHEN has_function_privilege('ehub.recognise()', 'EXECUTE')"
            " THEN ehub.recognise()::text END"
        )
        return changed


def _migrate(connection: sqlalchemy.Connection) -> bool:
    driver: Connection = connection.connection.driver_connection  # type: ignore[assignment]
    digest = resources.sql_digest()
    # The files are written for this, whatever the role or the database sets.
    driver.execute("SET LOCAL standard_conforming_strings = on")
    driver.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
    if installed(driver) == (head(), digest):
        return False
    vector_schema = _require_pgvector(driver)
    # One at a time. By a lock that only the schema's owner can take: an advisory one is anybody's.
    if driver.execute("SELECT to_regnamespace('ehub')").fetchone() == (None,):
        driver.execute("CREATE SCHEMA ehub")
    driver.execute(sql.SQL("COMMENT ON SCHEMA ehub IS {}").format(sql.Literal(_COMMENT)))
    if installed(driver) == (head(), digest):
        return False
    owner = driver.execute(
        "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'ehub'"
    ).fetchone()
    assert owner is not None  # noqa: S101 - it is there by now
    # All of it belongs to one role, whoever upgrades it: functions run with their owner's rights.
    driver.execute(b"SET LOCAL ROLE " + owner[0].encode())
    definitions = _Definitions(driver, sql.Identifier(vector_schema).as_string(driver))
    # Functions call each other, in whatever order they come.
    driver.execute("SET LOCAL check_function_bodies = off")
    config = _alembic()
    config.attributes["connection"] = connection
    if definitions.there:
        definitions.try_functions()
        # The first that every search uses, with the tables below it: who has got it meets nobody
        # who waits for one thing and holds another.
        driver.execute("LOCK TABLE ehub.catalogue IN ACCESS EXCLUSIVE MODE")
    try:
        alembic.command.upgrade(config, "head")
    except alembic.util.CommandError as error:
        raise SchemaError(f"the ehub schema is of another release: {error}") from error
    definitions.make()
    _remember(driver, "sql_digest", digest)
    return True


def _remember(driver: Connection, name: str, value: str) -> None:
    driver.execute(
        "INSERT INTO ehub.setting VALUES (%s, %s)"
        " ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value",
        [name, value],
    )


class _Definitions:
    """What ``sql/`` defines, as far as it is not in the database like this.

    Searches wait from the moment that something of theirs is locked. So functions, which nobody
    waits for, are made before that where it can be done, and views are replaced after all else.
    """

    def __init__(self, driver: Connection, vector_schema: str) -> None:
        self._driver = driver
        done: set[str] = set()
        self.there = self._names()
        if self.there:
            known = driver.execute(
                "SELECT value FROM ehub.setting WHERE name = 'sql_statements'"
            ).fetchone()
            done = set() if known is None else set(known[0].split())
        self._first: list[str] = []
        self._views: list[str] = []
        self._last: list[str] = []
        self._digests: list[str] = []
        self._unchanged: list[str] = []
        for statement in resources.sql_statements():
            # Like an extension's script: pgvector is called by its schema, wherever that is.
            text = statement.replace("@vector@", vector_schema)
            definition = _DEFINITION.match(text)
            if definition is None:
                # A block before all that is done to spaces makes a type, which functions take.
                (self._last if self._last or text.startswith("SELECT") else self._first).append(
                    text
                )
                continue
            self._digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
            if self._digests[-1] in done:
                self._unchanged.append(text)
            elif definition[1] == "VIEW" and definition.groups() in self.there:
                self._views.append(text)
            else:
                self._first.append(text)

    def try_functions(self) -> None:
        """Make functions (and what is new) before tables are changed, if they do not need that."""
        try:
            with self._driver.transaction():
                self._run(self._first)
        except psycopg.Error:
            return
        self._unchanged += self._first
        self._first = []

    def make(self) -> None:
        """Make the rest, with what the change of tables has taken away."""
        self._run(self._first)
        names = self._names()
        for text in self._unchanged:
            definition = _DEFINITION.match(text)
            if definition is not None and definition.groups() not in names:
                self._run([text])
        self._run(self._views)
        self._run(self._last)
        _remember(self._driver, "sql_statements", " ".join(self._digests))

    def _run(self, statements: list[str]) -> None:
        for text in statements:
            self._driver.execute(text.encode())

    def _names(self) -> set[tuple[str, str]]:
        rows: list[tuple[str, str]] = self._driver.execute(
            "SELECT 'FUNCTION', p.proname::text FROM pg_proc AS p"
            " JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = 'ehub'"
            " UNION SELECT 'VIEW', c.relname::text FROM pg_class AS c"
            " JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'ehub' AND c.relkind = 'v'"
        ).fetchall()
        return set(rows)


def _require_pgvector(driver: Connection) -> str:
    """Create extension vector where it is missing, and return its schema."""
    if driver.info.server_version < _MINIMUM_POSTGRES * 10000:
        raise SchemaError(f"ehub needs PostgreSQL {_MINIMUM_POSTGRES} or newer")
    query = (
        "SELECT n.nspname, e.extversion FROM pg_extension e"
        " JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    )
    row = driver.execute(query).fetchone()
    if row is None:
        known = driver.execute("SELECT FROM pg_available_extensions WHERE name = 'vector'")
        if known.fetchone() is None:
            raise SchemaError("pgvector is not installed on this server; ehub needs it")
        driver.execute("CREATE EXTENSION vector")
        row = driver.execute(query).fetchone()
    assert row is not None  # noqa: S101 - it has just been created
    schema, version = row
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_PGVECTOR:
        raise SchemaError(
            f"pgvector {version} is too old, ehub needs 0.7: ALTER EXTENSION vector UPDATE"
        )
    return str(schema)


def _alembic() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option(
        "script_location", str(resources.folder("migrations")).replace("%", "%%")
    )
    config.set_main_option("path_separator", "os")
    return config
