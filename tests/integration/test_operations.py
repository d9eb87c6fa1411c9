"""Beside a busy database: who waits for whom, what is told of it, how ehub leaves again."""

import contextlib
import re
import subprocess
import threading
import time
import uuid

import psycopg
import pytest
from typer.testing import CliRunner

import ehub
from ehub.cli import app
from ehub.config import Target, resolve
from ehub.database import Database
from ehub.migrate import migrate, uninstall

TABLE = (
    "CREATE TABLE t (id int PRIMARY KEY, e vector(2));"
    "INSERT INTO t SELECT i, ARRAY[i, 1]::real[] FROM generate_series(1, 50) AS i"
)
# A migration that has everything to do again.
FORGET = "DELETE FROM ehub.setting WHERE name IN ('sql_digest', 'sql_statements')"


@contextlib.contextmanager
def told(db):
    """The notices of a connection."""
    notices = []
    db.add_notice_handler(notice := lambda diag: notices.append(diag.message_primary))
    yield notices
    db.remove_notice_handler(notice)


@contextlib.contextmanager
def busy(url, statement, name="a report"):
    """Somebody in the middle of a transaction."""
    with psycopg.connect(url, application_name=name) as other:
        other.execute(statement)
        yield other


@contextlib.contextmanager
def beside(url, *statements):
    """Others who go on with statements; yields how long each of them waited."""
    stop = threading.Event()
    waits, errors = [], []

    def go_on(statement):
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                started = time.perf_counter()
                try:
                    connection.execute(statement)
                except psycopg.Error as error:
                    errors.append(error)
                    return
                waits.append(time.perf_counter() - started)

    threads = [threading.Thread(target=go_on, args=(one,)) for one in statements]
    for thread in threads:
        thread.start()
    try:
        yield waits
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


# --- locks


@pytest.mark.parametrize("relation", ["public.t", "spaces.s"])
def test_who_is_waited_for_is_named_and_others_go_on(relation, db, url, hub):
    db.execute(TABLE)
    hub.create_space("s", 2)
    statement = f"LOCK TABLE {relation} IN ACCESS EXCLUSIVE MODE"
    with busy(url, f"SELECT * FROM {relation}") as other, told(db) as notices:
        pid = other.info.backend_pid
        # One search can wait for a turn, and not for all of them.
        with beside(url, f"SELECT * FROM {relation} LIMIT 1") as waits:
            with pytest.raises(psycopg.Error, match="have been using") as raised:
                db.execute("SELECT ehub.in_turns(%s, %s, '1.5 s')", [relation, statement])
        assert len(waits) > 20
    assert raised.value.sqlstate == "EH018"
    who = f"process {pid} of role {db.info.user} (a report, idle in transaction for "
    for text in (raised.value.diag.message_hint, *notices):
        assert who in text
    assert notices[0].startswith(f"waiting for {relation}, for 1 of 2 seconds: in use by ")


def test_what_vacuums_a_table_keeps_nobody_else_waiting(db, url):
    """What it takes to end an autovacuum is taken beside readers and writers."""
    db.execute(TABLE)
    # Like one, it keeps others from maintaining the table; it does not leave when it is waited for.
    with busy(url, "LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE", "vacuum") as other:
        threading.Timer(2.5, other.rollback).start()
        with beside(url, "UPDATE t SET e = e WHERE id = 1") as waits:
            db.execute("SELECT ehub.attach('t', 'e')")
        assert len(waits) > 100
    assert db.execute("SELECT space FROM ehub.attached").fetchall() == [("t",)]
    db.execute("SELECT ehub.detach('t')")


def test_an_autovacuum_leaves_a_table_that_is_detached(tmp_path):
    """A real one, on a server of its own: it would take minutes, and is told to leave."""
    with contextlib.closing(Database(Target(None, tmp_path / "own"))) as database:
        migrate(database)
        with psycopg.connect(database.conninfo(), autocommit=True) as db:
            db.execute("ALTER SYSTEM SET autovacuum_naptime = 1")
            db.execute("SELECT pg_reload_conf()")
            db.execute(
                "CREATE TABLE t (id int PRIMARY KEY, e vector(3)) WITH (autovacuum_vacuum_threshold = 1,"
                " autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 100,"
                " autovacuum_vacuum_cost_limit = 1)"
            )
            db.execute("INSERT INTO t SELECT i, '[1,2,3]' FROM generate_series(1, 50000) AS i")
            db.execute("SELECT ehub.attach('t', 'e')")
            db.execute("UPDATE t SET e = '[3,2,1]'")
            at_it = (
                "SELECT FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid"
                " WHERE l.relation = 't'::regclass AND a.backend_type = 'autovacuum worker'"
            )
            deadline = time.monotonic() + 60
            while db.execute(at_it).fetchone() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            started = time.monotonic()
            with beside(database.conninfo(), "UPDATE t SET e = e WHERE id = 1") as waits:
                db.execute("SELECT ehub.detach('t')")
            assert time.monotonic() - started < 10
            assert max(waits) < 2
            assert db.execute("SELECT FROM ehub.attached").fetchall() == []
        log = (tmp_path / "own" / "postgres" / "log").read_text()
        assert "canceling autovacuum task" in log


# --- the bell


def test_who_sleeps_and_does_not_hear_is_rung_a_few_times_a_second(db, url, hub):
    hub.create_space("s", 2)
    with (
        psycopg.connect(url, autocommit=True) as ear,
        psycopg.connect(url, autocommit=True) as sleeper,
    ):
        ear.execute("LISTEN ehub")
        sleeper.execute("SELECT pg_advisory_lock(1701344610, 1)")
        started = time.monotonic()
        write = "INSERT INTO spaces.s VALUES (gen_random_uuid()::text, '[1,2]')"
        with beside(url, *[write] * 3) as waits:
            time.sleep(1.5)
        rung = len(list(ear.notifies(timeout=0.2)))
        assert len(waits) > 100
        # Some may look at the same moment.
        assert 1 <= rung <= 3 * (2 + 5 * (time.monotonic() - started))


def test_a_transaction_that_stays_open_rings_once(db, url, hub):
    hub.create_space("s", 2)
    with (
        psycopg.connect(url, autocommit=True) as ear,
        psycopg.connect(url, autocommit=True) as sleeper,
        psycopg.connect(url) as slow,
    ):
        ear.execute("LISTEN ehub")
        sleeper.execute("SELECT pg_advisory_lock(1701344610, 1)")
        slow.execute("INSERT INTO spaces.s VALUES ('a', '[1,2]')")
        time.sleep(0.3)
        slow.execute("INSERT INTO spaces.s VALUES ('b', '[1,2]')")
        # So others ring.
        db.execute("INSERT INTO spaces.s VALUES ('c', '[1,2]')")
        assert len(list(ear.notifies(timeout=0.3))) == 1
        slow.commit()
        assert len(list(ear.notifies(timeout=0.3))) == 1


# --- migrations


def migrated(url, tmp_path, timeout=60.0):
    with contextlib.closing(Database(Target(url, tmp_path / "migrating"))) as database:
        return migrate(database, timeout)


def test_a_migration_waits_for_nobody_and_says_for_whom(db, url, hub, tmp_path, caplog):
    hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1]})
    before = db.execute("SELECT oid, xmin FROM pg_proc ORDER BY oid").fetchall()
    db.execute(FORGET)
    search = "SELECT * FROM ehub.nearest('s', '[1,2]', 1)"
    write = "UPDATE spaces.s SET embedding = embedding WHERE key = 'a'"
    with busy(url, search) as other:
        pid = other.info.backend_pid
        with beside(url, search, write) as waits:
            with pytest.raises(ehub.WaitTimeoutError, match="nothing was changed") as raised:
                migrated(url, tmp_path, 2)
        assert f"process {pid} of role {db.info.user}, a report, idle in tr" in str(raised.value)
        assert "the migration waits for" in caplog.text
        assert len(waits) > 100
        assert db.execute("SELECT oid, xmin FROM pg_proc ORDER BY oid").fetchall() == before
    with beside(url, search, write):
        assert migrated(url, tmp_path)
    assert not migrated(url, tmp_path)
    assert [near.key for near in hub.get_space("s").nearest_neighbors(1, vector=[1, 2])] == ["a"]


def test_a_migration_changes_what_differs(db, url, hub, tmp_path):
    state = (
        "SELECT p.oid::regprocedure::text, p.xmin::text FROM pg_proc AS p"
        " WHERE p.pronamespace = 'ehub'::regnamespace"
        " UNION SELECT c.relname, r.xmin::text FROM pg_class AS c JOIN pg_rewrite AS r"
        " ON r.ev_class = c.oid WHERE c.relnamespace = 'ehub'::regnamespace"
    )
    before = dict(db.execute(state).fetchall())
    # As if the last release had another one of these, and lacked another.
    db.execute("DELETE FROM ehub.setting WHERE name = 'sql_digest'")
    db.execute("DROP FUNCTION ehub.users_of(text)")
    assert migrated(url, tmp_path)
    after = dict(db.execute(state).fetchall())
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"ehub.users_of(text)"}
    assert hub.doctor() == []


# --- what is told


def test_one_bad_table_blinds_nobody_to_the_rest(db, hub):
    db.execute(TABLE)
    db.execute("SELECT ehub.attach('t', 'e')")
    hub.create_space("s", 2).set("a", [1, 2])
    role = f"ehub_shut_{uuid.uuid4().hex[:8]}"
    try:
        db.execute(f"CREATE ROLE {role}; CREATE SCHEMA other AUTHORIZATION {role}")
        db.execute(f"GRANT SELECT ON t TO {role}; SELECT ehub.grant('s', '{role}', 'read')")
        db.execute("CREATE SCHEMA third; ALTER TABLE t SET SCHEMA third")
        db.execute(f"SET ROLE {role}")
        rows = db.execute("SELECT space, rows FROM ehub.status ORDER BY space").fetchall()
        assert rows == [("s", 1), ("t", None)]
    finally:
        db.execute(f"RESET ROLE; DROP OWNED BY {role} CASCADE")
        db.execute("DELETE FROM ehub.access")
        db.execute(f"DROP ROLE {role}")


def counted(db):
    # Postgres passes on what a session has counted when it has nothing else to do.
    db.execute("SELECT pg_stat_force_next_flush()")
    db.execute("SELECT pg_stat_clear_snapshot()")
    return {
        reason: answers
        for reason, answers in db.execute("SELECT reason, answers FROM ehub.exact_answers()")
        if answers
    }


def test_exact_answers_are_counted_by_reason(db, url, hub):
    hub.create_space("s", 2).multiset({"a": [1, 2], "b": [2, 1]})
    assert counted(db) == {}
    search = "SELECT * FROM ehub.nearest('s', '[1,2]', 1)"
    for _ in range(3):
        db.execute(search)
    # Where nothing may be written, too.
    with psycopg.connect(url) as reader:
        reader.read_only = True
        reader.execute(search)
        reader.execute("SELECT * FROM ehub.nearest_many('s', ARRAY['[1,2]']::vector[], 1)")
    with psycopg.connect(url, options="-c ehub.mode=exact") as chosen:
        chosen.execute(search)
    db.execute("SELECT ehub.count_exact('too much has changed since then')")
    assert counted(db) == {"no service": 5, "index behind": 1}
    if db.info.server_version >= 160000:
        (last,) = db.execute("SELECT max(last_at) IS NOT NULL FROM ehub.exact_answers()").fetchone()
        assert last


# --- what a dump leaves out


def test_a_dump_without_some_tables_has_the_others(embedded, elsewhere, tmp_path):
    programs, target = elsewhere
    with psycopg.connect(embedded.conninfo, autocommit=True) as db:
        db.execute(TABLE)
        db.execute('CREATE TABLE kept (id int PRIMARY KEY, "an ""e""" vector(2), note text)')
        db.execute(
            "INSERT INTO kept SELECT i, ARRAY[i, 1]::real[], 'n' FROM generate_series(1, 9) i"
        )
        db.execute("SELECT ehub.attach('t', 'e'), ehub.attach('kept', 'an \"e\"', 'k')")
    dump = tmp_path / "dump"
    subprocess.run(
        [programs / "pg_dump", "-Fc", "-T", "t", "-f", dump, embedded.conninfo], check=True
    )
    # It says that what is about the missing table could not be restored, and goes on.
    subprocess.run([programs / "pg_restore", "-d", target, dump], check=False, capture_output=True)
    with ehub.connect(target, data_dir=tmp_path / "data", index="local") as other:
        problems = {finding.subject: finding.problem for finding in other.doctor()}
        assert problems["space t"] == "its table is not in this database"
        assert problems["space k"] == "that it is attached to public.kept is not recorded here"
        other.doctor(mend=True)
        assert other.doctor() == []
        (space,) = other.spaces()
        assert (space.name, space.attached_to) == ("k", "kept")
        space.wait_until_indexed(30)
        assert space.nearest_neighbors(1, vector=[5, 1])[0].key == "5"
        with psycopg.connect(target, autocommit=True) as db:
            db.execute("INSERT INTO kept VALUES (100, '[100,1]')")
        near = space.nearest_neighbors(1, vector=[99, 1], consistency="strong")
        assert near[0].key == "100"


# --- leaving


def test_uninstalling_leaves_the_tables_as_they_were(db, url, hub):
    db.execute(TABLE)
    before = db.execute(
        "SELECT relacl, relhastriggers FROM pg_class WHERE relname = 't'"
    ).fetchone()
    db.execute("SELECT ehub.attach('t', 'e')")
    hub.create_space("s", 2).set("a", [1, 2])
    hub.close()
    runner = CliRunner()
    shown = runner.invoke(app, ["uninstall", url, "--dry-run"])
    assert shown.exit_code == 0, shown
    assert shown.output.splitlines() == [
        "SELECT ehub.detach('t');",
        "DROP SCHEMA spaces, ehub_data, ehub CASCADE;",
    ]
    db.execute("CREATE VIEW mine AS SELECT * FROM spaces.s")
    with contextlib.closing(Database(resolve(url))) as database:
        with pytest.raises(ehub.SchemaError, match="mine: made of ehub's relations"):
            uninstall(database)
    db.execute("DROP VIEW mine")
    refused = runner.invoke(app, ["uninstall", url], input="n\n")
    assert refused.exit_code == 1
    assert db.execute("SELECT to_regnamespace('ehub') IS NOT NULL").fetchone() == (True,)
    gone = runner.invoke(app, ["uninstall", url, "--yes"])
    assert gone.exit_code == 0, gone
    assert db.execute(
        "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^(ehub|spaces)'"
    ).fetchone() == (0,)
    db.execute("UPDATE t SET e = e")
    after = db.execute("SELECT relacl, relhastriggers FROM pg_class WHERE relname = 't'").fetchone()
    assert after[0] == before[0]
    assert db.execute(
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = 't'::regclass"
    ).fetchone() == (0,)
    again = runner.invoke(app, ["uninstall", url])
    assert re.search("has no ehub schema", again.output)
