"""Transactions of others that stay open: none that may not write to a space keeps it from being managed."""

import contextlib
import threading

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from test_access_matrix import FUNCTIONS

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

# What is done to a space of their own, by those who may: it keeps others from managing that one alone.
MANAGED = ("create_space", "create_average", "attach", "add_attached")


@pytest.fixture
def low(url, db):
    """A role that may connect, and another one that may read a space, each with an open transaction."""
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in ("ehub_test_stranger", "ehub_test_reader"):
            db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name)))
            stack.callback(db.execute, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
            sessions[name.split("_")[-1]] = stack.enter_context(
                psycopg.connect(make_conninfo(url, user=name, password="x"), autocommit=True)
            )
        yield sessions


@pytest.fixture
def space(hub, db, low):
    space = hub.create_space("secret", 2)
    space.multiset({f"k{i}": [i, 0] for i in range(20)})
    space.create_version("plan_b", from_version="v1")
    hub.create_space("kept", 2).set("k", [1, 1])
    hub.get_space("kept").grant("ehub_test_reader", "read")
    # There is something to trim.
    db.execute("SELECT ehub.tend()")
    return space


def call_everything(session):
    """Call all that everybody may call, each in a savepoint that is kept if it succeeds."""
    for name, rule in FUNCTIONS.items():
        if name in MANAGED or rule[0] in ("internal", "owner"):
            continue
        # A placeholder for the name of a role.
        text = rule[1].replace("%(reader)s", "'pg_monitor'").replace("'secret'", "'kept'")
        if "%(" in text:
            continue
        with contextlib.suppress(psycopg.Error), session.transaction():
            session.execute("SET LOCAL lock_timeout = '500ms'")
            session.execute(f"SELECT t FROM {text} AS t")


def test_nobody_elses_transaction_keeps_a_space_from_being_managed(space, hub, db, low, url):
    for session in low.values():
        session.execute("BEGIN")
        session.execute("SELECT ehub.trim()")
        call_everything(session)
    # What both have left is there to the end of this test.
    db.execute("SET lock_timeout = '2s'")
    db.execute("SELECT ehub.trim()")
    db.execute("SELECT ehub.tend()")
    assert db.execute("SELECT ehub.enter_incarnation(), ehub.recognise()").fetchone()
    for statement in (
        "SELECT ehub.keep_warm('secret@plan_b')",
        "SELECT ehub.checkpoint('secret', 'now')",
        "SELECT ehub.promote('secret', 'plan_b', patience => '1 s')",
        "SELECT ehub.rollback('secret', patience => '1 s')",
        "SELECT ehub.create_index('secret', 'few', '{\"n\": 1}')",
        "SELECT ehub.drop_index('secret', 'few')",
        "SELECT ehub.grant('secret', 'pg_monitor', 'read')",
        "SELECT ehub.revoke('secret', 'pg_monitor')",
        "SELECT ehub.restore('secret', 'now')",
        "SELECT ehub.drop_checkpoint('secret', 'now')",
        "SELECT ehub.freeze('secret@plan_b')",
        "SELECT ehub.drop_version('secret', 'plan_b')",
        "SELECT ehub.mend()",
        "SELECT ehub.delete_space('secret')",
        "SELECT ehub.create_space('secret', 2)",
    ):
        db.execute(statement)


def test_who_trims_keeps_nobody_from_trimming(space, db, low, url):
    def logged():
        return db.execute("SELECT count(*) FROM ehub.change").fetchone()[0]

    db.execute("DELETE FROM ehub.replica")
    low["stranger"].execute("BEGIN")
    assert low["stranger"].execute("SELECT ehub.trim()").fetchone()[0] > 0
    with psycopg.connect(url, autocommit=True) as writer:
        for n in range(3):
            writer.execute("INSERT INTO spaces.kept VALUES (%s, '[1,2]')", [f"new{n}"])
    # As long as it is open the rows of later ones stay: it might write some itself.
    low["stranger"].execute("COMMIT")
    assert db.execute("SELECT ehub.trim()").fetchone()[0] == 3
    assert logged() == 0
    # What one has taken back is trimmed by the next.
    db.execute("INSERT INTO spaces.kept VALUES ('newest', '[1,2]')")
    low["stranger"].execute("BEGIN")
    assert low["stranger"].execute("SELECT ehub.trim()").fetchone() == (1,)
    assert db.execute("SELECT ehub.trim()").fetchone() == (0,)
    low["stranger"].execute("ROLLBACK")
    assert db.execute("SELECT ehub.trim()").fetchone() == (1,)


def test_a_lock_that_anybody_can_hold_keeps_nobody_from_migrating(url, db, low, tmp_path):
    low["stranger"].execute(
        "SELECT pg_advisory_lock(1701344610, n) FROM generate_series(1, 9) AS n"
    )
    db.execute("UPDATE ehub.setting SET value = 'old' WHERE name = 'sql_digest'")
    with contextlib.closing(Database(Target(url, tmp_path))) as database:
        with psycopg.connect(url) as connection:
            connection.execute("SET lock_timeout = '1s'")
        assert migrate(database)


def test_several_that_migrate_at_once(server, admin, tmp_path):
    """Also where there is no schema yet to wait for."""
    admin.execute("CREATE DATABASE ehub_migrated_at_once")
    url = make_conninfo(server, dbname="ehub_migrated_at_once")
    done, failed = [], []

    def one(number):
        try:
            with contextlib.closing(Database(Target(url, tmp_path / str(number)))) as database:
                done.append(migrate(database))
        except ehub.EhubError as error:
            failed.append(error)

    try:
        threads = [threading.Thread(target=one, args=[n]) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert sorted(done) == [False, False, True]
    finally:
        admin.execute("DROP DATABASE ehub_migrated_at_once WITH (FORCE)")
