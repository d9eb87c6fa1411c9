"""Servers and databases for tests: real ones.

The server is the embedded Postgres, or the one that EHUB_TEST_DATABASE_URL names (a role that may
create databases). Every test gets a database of its own, cloned from a migrated template.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub
from ehub.config import Target, resolve
from ehub.database import Database
from ehub.migrate import migrate

for name in list(os.environ):
    # The tests say which database they mean; PGSERVER_… chooses the embedded server's version.
    if name.startswith(("PG", "EHUB_DATA")) and not name.startswith("PGSERVER_"):
        del os.environ[name]


_EMBEDDED = not os.environ.get("EHUB_TEST_DATABASE_URL")
_deselected: dict[str, int] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the server is not for: CI runs the tests on one of either kind."""
    kept = []
    for item in items:
        marker = item.get_closest_marker("whole_postgres" if _EMBEDDED else "embedded_postgres")
        if marker is None:
            kept.append(item)
        else:
            _deselected[marker.args[0]] = _deselected.get(marker.args[0], 0) + 1
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for needed, number in sorted(_deselected.items()):
        terminalreporter.line(
            f"without {number} that need {needed}, as "
            + ("EHUB_TEST_DATABASE_URL may have it" if _EMBEDDED else "the embedded server has it")
        )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of a server, as a role that may create databases."""
    url = os.environ.get("EHUB_TEST_DATABASE_URL")
    database = Database(resolve(url) if url else Target(None, tmp_path_factory.mktemp("server")))
    yield database.conninfo()
    database.close()


class Admin:
    """The server's administrator, who connects for each statement: servers are crashed here."""

    def __init__(self, url: str) -> None:
        self.url = url

    def execute(self, statement: object, parameters: object = None) -> list[tuple]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def admin(server: str) -> Admin:
    return Admin(server)


@pytest.fixture(scope="session")
def template(server: str, admin: Admin, tmp_path_factory) -> Iterator[str]:
    name = f"ehub_template_{uuid.uuid4().hex[:8]}"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    target = Target(make_conninfo(server, dbname=name), tmp_path_factory.mktemp("template"))
    database = Database(target)
    migrate(database)
    database.close()
    yield name
    drop_database(admin, name)


@pytest.fixture
def url(server: str, admin: Admin, template: str) -> Iterator[str]:
    """The connection string of a fresh database with the ehub schema."""
    name = f"ehub_test_{uuid.uuid4().hex[:8]}"
    admin.execute(
        sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template)
        )
    )
    url = make_conninfo(server, dbname=name)
    with psycopg.connect(url) as connection:
        # It is a copy, as a restored database is.
        connection.execute("SELECT ehub.recognise()")
    yield url
    drop_database(admin, name)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def connect(url: str, data_dir: Path) -> Iterator[Callable[..., ehub.Hub]]:
    """Connect to the test's database; what it returns is closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: object) -> ehub.Hub:
            options.setdefault("data_dir", data_dir)
            return stack.enter_context(ehub.connect(url, **options))

        yield make


@pytest.fixture
def hub(connect: Callable[..., ehub.Hub]) -> ehub.Hub:
    return connect()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[ehub.Hub]:
    """A hub of an embedded server of its own, whose programs fit it."""
    with ehub.connect("embedded", data_dir=tmp_path / "here") as hub:
        yield hub


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The programs of another cluster, and its connection string."""
    database = Database(Target(None, tmp_path / "elsewhere"))
    assert database.embedded is not None
    yield database.embedded.bin_dir, database.conninfo()
    database.close()


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection]:
    """Somebody else: a connection in autocommit mode."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def drop_database(admin: Admin, name: str) -> None:
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
