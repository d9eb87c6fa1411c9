"""What an operator meets who runs the service: a new secret, another owner, a Postgres that is away."""

import os
import re
import signal
import time

import psycopg
import pytest
from psycopg import sql

import ehub
from service.conftest import ServiceProcess, free_port, settled
from service.test_faults import fill, right


def in_sql(db):
    return db.execute("SELECT in_sql, index_state FROM ehub.status").fetchone()


def by_its_index(db, seconds=20):
    """Wait until status says so, which it is told a moment later."""
    deadline = time.monotonic() + seconds
    while not re.fullmatch("by the index service.* ready", " ".join(in_sql(db))):
        assert time.monotonic() < deadline, in_sql(db)
        time.sleep(0.05)


def by_the_index(url, seconds=20):
    """Wait until a new session is answered by the index."""
    deadline = time.monotonic() + seconds
    while True:
        with psycopg.connect(url, autocommit=True) as connection:
            now = connection.execute("SELECT pg_current_snapshot()").fetchone()[0]
            (reason,) = connection.execute("SELECT ehub.index_missing('s', %s)", [now]).fetchone()
            if reason is None:
                return
        assert time.monotonic() < deadline, reason
        time.sleep(0.2)


def test_a_new_secret(url, db, data_dir, process):
    fill(url, data_dir)
    settled(db)
    before = db.execute("SELECT ehub.service_secret()").fetchone()
    db.execute("SELECT ehub.set_service_secret()")
    assert db.execute("SELECT ehub.service_secret()").fetchone() != before
    # Sessions that are connected go on, and new ones once the service has heard of it.
    by_the_index(url)
    right(db)


def test_an_owner_without_the_secret_is_told_and_given_one(url, db, data_dir, process, connect):
    """As after REASSIGN OWNED, which leaves the user mapping with the role that was."""
    fill(url, data_dir)
    settled(db)
    assert in_sql(db)[0].startswith("by the index service")
    who = sql.Identifier(db.info.user)
    db.execute(
        sql.SQL(
            "DROP USER MAPPING FOR {} SERVER ehub_service;"
            " CREATE USER MAPPING FOR PUBLIC SERVER ehub_service OPTIONS (user 'ehub', password 'x')"
        ).format(who)
    )
    problem = f"role {db.info.user}, which owns ehub, has not the secret of the index service"
    assert in_sql(db)[0] == (
        f"exact: the index service cannot be asked: {problem}; `ehub doctor --mend` puts that right"
    )
    with psycopg.connect(url, autocommit=True) as other:
        right(other)
    hub = connect(index="none")
    found = [(f.subject, f.problem) for f in hub.doctor()]
    assert ("server ehub_service", problem) in found
    hub.doctor(mend=True)
    assert hub.doctor() == []
    by_the_index(url)


def test_a_service_that_has_left_is_not_ready(url, db, data_dir, process):
    fill(url, data_dir)
    settled(db)
    by_its_index(db)
    assert process.stop() == 0
    assert in_sql(db) == ("exact: the index service is not connected", "stopped")
    process.start()
    settled(db)
    by_its_index(db)


def test_what_cannot_be_reached_is_told(url, db, data_dir, process):
    fill(url, data_dir)
    settled(db)
    with psycopg.connect(url, autocommit=True) as other:
        # Where nobody listens; the service itself lives.
        db.execute("ALTER SERVER ehub_service OPTIONS (SET port '1')")
        right(other)
        other.execute("SELECT pg_stat_force_next_flush()")
        right(other)
    if db.info.server_version >= 160000:
        deadline = time.monotonic() + 5
        while not in_sql(db)[0].startswith("exact: Postgres could not ask the index service "):
            assert time.monotonic() < deadline, in_sql(db)
            time.sleep(0.1)


def test_a_second_service_is_told(url, db, data_dir, process, tmp_path):
    fill(url, data_dir)
    (tmp_path / "second").mkdir()
    second = ServiceProcess(url, tmp_path / "second", free_port())
    try:
        assert "another index service follows this database" in second.text()
        assert "another index service" not in process.text()
    finally:
        second.close()


def test_a_service_waits_for_a_postgres_that_is_away(url, db, data_dir, process, admin):
    fill(url, data_dir)
    settled(db)
    name = sql.Identifier(db.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
    os.kill(process.worker, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while "waiting for Postgres" not in process.text():
        assert time.monotonic() < deadline, process.text()
        time.sleep(0.1)
    assert process.process.poll() is None
    admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    settled(db)
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        assert hub.get_space("s").nearest_neighbors(1, key="k1")


@pytest.mark.whole_postgres("prepared transactions")
def test_a_prepared_transaction_is_named(db, url):
    """It has no process, and can stand in the way for ever. The embedded Postgres allows none."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE t IN ROW EXCLUSIVE MODE; PREPARE TRANSACTION 'forgotten'")
    try:
        users = db.execute("SELECT ehub.users_of('public.t')").fetchone()[0]
        assert users == "prepared transaction 'forgotten' (RowExclusiveLock)"
    finally:
        db.execute("ROLLBACK PREPARED 'forgotten'")
