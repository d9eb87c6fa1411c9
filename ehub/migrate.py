"""Bring a database to the schema of this release.

Tables change by Alembic's revisions; functions, triggers and views are replaced whole from
``sql/`` every time. All of it is one transaction.
"""

from __future__ import annotations

import alembic.command
import alembic.config
import alembic.script
import psycopg
import sqlalchemy
from psycopg import errors as pg
from psycopg import sql

from ehub import resources
from ehub.database import Connection, Database, installed, mapped
from ehub.errors import SchemaError

_MINIMUM_POSTGRES = 15
_MINIMUM_PGVECTOR = (0, 7)
_COMMENT = "ehub, the embedding database: what it knows of spaces, and its functions"


def migrate(database: Database) -> bool:
    """Create or upgrade the ehub schema; returns whether anything was to be done.

    Needs the right to create schemas, and extension ``vector`` or the right to create it.
    Concurrent calls wait for each other.

    Raises:
        SchemaError: Postgres or pgvector is too old or missing, or the schema is a newer one.
    """
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(database.conninfo()),
        poolclass=sqlalchemy.NullPool,
    )
    with mapped():
        try:
            try:
                return _in_transaction(engine)
            except (pg.UniqueViolation, pg.DuplicateSchema):
                # Somebody else was making the schema at the same time.
                return _in_transaction(engine)
        except sqlalchemy.exc.DBAPIError as error:
            # SQLAlchemy wraps the driver's error, which `mapped` knows.
            raise (error.orig or error) from error


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
    config = _alembic()
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except alembic.util.CommandError as error:
        raise SchemaError(f"the ehub schema is of another release: {error}") from error
    quoted = sql.Identifier(vector_schema).as_string(driver)
    # Functions call each other, in whatever order their files come.
    driver.execute("SET LOCAL check_function_bodies = off")
    for file in resources.sql_files():
        # Like an extension's script: pgvector is called by its schema, wherever that is.
        driver.execute(file.read_text().replace("@vector@", quoted).encode())
    driver.execute(
        "INSERT INTO ehub.setting VALUES ('sql_digest', %s)"
        " ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value",
        [digest],
    )
    return True


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
