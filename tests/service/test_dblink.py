"""The service by way of dblink, where Postgres has it and not extension ehub_link."""

import psycopg
import pytest

from service.test_isolation import role, space  # noqa: F401 - fixtures

pytestmark = pytest.mark.whole_postgres("dblink")


def test_nobody_else_can_use_dblink(space, role):  # noqa: F811
    _, stranger = role("stranger")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        stranger.execute("SELECT ehub_dblink.dblink_connect('ehub', 'host=127.0.0.1')")


def test_status_says_that_there_is_a_shorter_way(space, db):  # noqa: F811
    (said,) = db.execute("SELECT in_sql FROM ehub.status").fetchone()
    assert said == "by the index service, through dblink: extension ehub_link is not installed"


def test_dblink_is_kept_apart(service, db, role):  # noqa: F811
    db.execute("SELECT ehub.uninstall_service()")
    db.execute("CREATE EXTENSION dblink SCHEMA public")
    with pytest.raises(psycopg.DatabaseError, match="dblink is in schema public") as raised:
        db.execute("SELECT ehub.install_service('127.0.0.1', 6433)")
    for statement in raised.value.diag.message_hint.split("; "):
        db.execute(statement)
    db.execute("SELECT ehub.install_service('127.0.0.1', 6433)")
    first = db.execute("SELECT ehub.service_secret()").fetchone()
    db.execute("SELECT ehub.install_service('127.0.0.1', 6434)")
    assert db.execute("SELECT ehub.service_secret()").fetchone() == first
    db.execute("GRANT USAGE ON SCHEMA ehub_dblink TO PUBLIC")
    with pytest.raises(psycopg.DatabaseError, match="everybody could use"):
        db.execute("SELECT ehub.install_service('127.0.0.1', 6433)")
    db.execute("REVOKE USAGE ON SCHEMA ehub_dblink FROM PUBLIC")
    name, _ = role("stranger")
    db.execute(f"ALTER SCHEMA ehub_dblink OWNER TO {name}")
    with pytest.raises(psycopg.DatabaseError, match="belongs to somebody else") as raised:
        db.execute("SELECT ehub.install_service('127.0.0.1', 6433)")
    db.execute(raised.value.diag.message_hint)
    db.execute("SELECT ehub.install_service('127.0.0.1', 6433)")
