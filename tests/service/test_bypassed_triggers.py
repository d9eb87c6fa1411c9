"""Writes that fire no triggers, or others: noticed by the index, or refused."""

import contextlib
import re
import time
import uuid

import psycopg
import pytest
from conftest import drop_database
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub
from service.conftest import settled

ROWS = (
    "INSERT INTO spaces.s SELECT 'k' || i, ARRAY[i, 0]::real[], jsonb_build_object('n', i % 3)"
    " FROM generate_series(1, 100) AS i"
)


@pytest.fixture
def space(service, connect, db):
    hub = connect(index="none")
    space = hub.create_space("s", 2)
    db.execute(ROWS)
    settled(db)
    return space


def relation(db, space="s"):
    (name,) = db.execute(
        "SELECT 'ehub_data.v' || version_id FROM ehub.catalogue WHERE space = %s AND current",
        [space],
    ).fetchone()
    return name


def nearest(db, query, k=1):
    found = db.execute("SELECT key FROM ehub.nearest('s', %s::vector, %s)", [query, k])
    return [key for (key,) in found]


def check(db):
    """Every search gives what an exact one gives; in the end by the index."""
    for _ in range(2):
        for query in ("[500,0]", "[3,0]", "[50,0]", "[600,0]"):
            exact = db.execute(
                "SELECT key FROM ehub.nearest_exact('s', %s::vector, 5)", [query]
            ).fetchall()
            assert nearest(db, query, 5) == [key for (key,) in exact]
        settled(db)


CHANGES = (
    "INSERT INTO {t} (key, embedding) VALUES ('new', '[500,0]')",
    "UPDATE {t} SET embedding = '[600,0]' WHERE key = 'k3'",
    "UPDATE {t} SET key = 'renamed' WHERE key = 'k50'",
    "DELETE FROM {t} WHERE key IN ('k1', 'k2')",
    "TRUNCATE {t}",
)


def test_as_replication_writes(space, db):
    db.execute("SET session_replication_role = replica")
    for change in CHANGES:
        db.execute(change.format(t=relation(db)))
        check(db)


@pytest.mark.parametrize("how", ["ALL", "USER"])
def test_with_triggers_switched_off_for_a_moment(space, db, how):
    t = relation(db)
    # As pg_restore --disable-triggers does, which switches on those too that were off.
    db.execute(f"ALTER TABLE {t} DISABLE TRIGGER {how}")
    for change in CHANGES[:-1]:
        db.execute(change.format(t=t))
    db.execute(f"ALTER TABLE {t} ENABLE TRIGGER {how}")
    # At once: no search goes by the index before that was compared.
    check(db)


def test_with_triggers_switched_off_for_good(space, db):
    t = relation(db)
    db.execute(f"ALTER TABLE {t} DISABLE TRIGGER ehub_log_update; DROP TRIGGER ehub_log_row ON {t}")
    db.execute(CHANGES[1].format(t=t))
    assert nearest(db, "[600,0]") == ["k3"]
    status = db.execute("SELECT DISTINCT in_sql FROM ehub.status").fetchone()[0]
    # The service puts that right, and compares its index then.
    known = "switched off|^exact: its index in the service is|^by the index service"
    assert re.search(known, status)
    check(db)
    assert db.execute("SELECT * FROM ehub.drift()").fetchall() == []


def test_a_table_that_was_restored(space, db):
    """pg_restore --clean --table: another table of that name, whose triggers come after its rows."""
    t = relation(db)
    db.execute(
        f"CREATE TABLE kept AS SELECT * FROM {t}; DELETE FROM kept WHERE key = 'k50';"
        "INSERT INTO kept VALUES ('new', '[500,0]', '{}')"
    )
    (number,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
    with db.transaction():
        db.execute(f"ALTER TABLE {t} DISABLE TRIGGER ALL; TRUNCATE {t}")
        db.execute(f"INSERT INTO {t} SELECT * FROM kept")
        db.execute(f"ALTER TABLE {t} ENABLE TRIGGER ALL")
    check(db)
    assert nearest(db, "[500,0]") == ["new"]
    # Rewritten.
    db.execute(f"VACUUM FULL {t}")
    check(db)
    assert number


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("ALTER TABLE {t} SET UNLOGGED", "is unlogged"),
        (
            "CREATE TABLE parent (key text NOT NULL, embedding vector NOT NULL, metadata jsonb NOT NULL);"
            "ALTER TABLE {t} INHERIT parent",
            "a part of another table",
        ),
    ],
)
def test_a_table_that_is_made_another_kind_of_table(space, db, change, why):
    db.execute(change.format(t=relation(db)))
    (said,) = db.execute("SELECT DISTINCT in_sql FROM ehub.status").fetchone()
    assert why in said
    deadline = time.monotonic() + 20
    while "is failed" not in str(index_missing(db)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if "parent" in change:
        db.execute("UPDATE parent SET embedding = '[500,0]' WHERE key = 'k1'")
    assert nearest(db, "[500,0]") == (["k1"] if "parent" in change else ["k100"])


def index_missing(db):
    return db.execute("SELECT ehub.index_missing('s', pg_current_snapshot())").fetchone()[0]


def test_images_of_checkpoints_and_averages_follow(space, connect, db):
    hub = connect(index="none")
    space.checkpoint("before")
    hub.create_average("means", "s", "n")
    before = dict(space.at("before").items())
    db.execute("SET session_replication_role = replica")
    for change in CHANGES:
        db.execute(change.format(t=relation(db)))
        assert {k: v.tolist() for k, v in space.at("before").items()} == {
            k: v.tolist() for k, v in before.items()
        }
        means = db.execute("SELECT key, embedding::text FROM spaces.means ORDER BY 1").fetchall()
        assert (
            means
            == db.execute(
                "SELECT value #>> '{}', average::text FROM ehub.averages('s', 'n') ORDER BY 1"
            ).fetchall()
        )
    with pytest.raises(psycopg.Error, match="is an average"):
        db.execute(f"DELETE FROM {relation(db, 'means')}")
    space.freeze()
    for change in CHANGES:
        with pytest.raises(psycopg.Error, match="is frozen"):
            db.execute(change.format(t=relation(db)))


@pytest.fixture
def subscription(space, url, db, admin, template):
    """Another database whose rows of the space come here by logical replication."""
    name = f"ehub_published_{uuid.uuid4().hex[:8]}"
    admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    there = make_conninfo(url, dbname=name)
    with psycopg.connect(there, autocommit=True) as other:
        other.execute("SELECT ehub.create_space('s', 2)")
        assert relation(other) == relation(db)
        other.execute(f"CREATE PUBLICATION rows FOR TABLE {relation(other)}")
        other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        db.execute(
            sql.SQL(
                "CREATE SUBSCRIPTION rows CONNECTION {} PUBLICATION rows"
                " WITH (create_slot = false, copy_data = false, slot_name = {})"
            ).format(sql.Literal(there), sql.Literal(name))
        )
        yield other
    db.execute("ALTER SUBSCRIPTION rows DISABLE")
    db.execute("ALTER SUBSCRIPTION rows SET (slot_name = NONE)")
    db.execute("DROP SUBSCRIPTION rows")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            admin.execute("SELECT pg_drop_replication_slot(%s)", [name])
            break
        time.sleep(0.1)
    drop_database(admin, name)


def arrived(other, db, seconds=20):
    """Wait until what was written there has been applied here."""
    deadline = time.monotonic() + seconds
    t = relation(db)
    rows = f"SELECT key, embedding::text FROM {t} WHERE key !~ '^k' ORDER BY 1"
    while other.execute(rows).fetchall() != db.execute(rows).fetchall():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.whole_postgres("wal_level = logical")
def test_logical_replication(subscription, space, connect, db):
    other, t = subscription, relation(db)
    hub = connect(index="none")
    hub.create_average("means", "s", "n")
    space.checkpoint("before")
    other.execute(
        "INSERT INTO spaces.s SELECT 'r' || i, ARRAY[500, i]::real[], '{\"n\": 0}'"
        " FROM generate_series(1, 20) i"
    )
    arrived(other, db)
    assert nearest(db, "[500,7]") == ["r7"]
    settled(db)
    for change in (
        "UPDATE spaces.s SET embedding = '[700,0]' WHERE key = 'r1'",
        "UPDATE spaces.s SET key = 'r100' WHERE key = 'r2'",
        "DELETE FROM spaces.s WHERE key = 'r3'",
    ):
        other.execute(change)
        arrived(other, db)
        for query in ("[700,0]", "[500,2]", "[500,3]"):
            exact = db.execute("SELECT key FROM ehub.nearest_exact('s', %s::vector, 3)", [query])
            assert nearest(db, query, 3) == [key for (key,) in exact]
        settled(db)
    assert sorted(space.at("before")) == sorted(f"k{i}" for i in range(1, 101))
    assert (
        db.execute("SELECT key, embedding::text FROM spaces.means ORDER BY 1").fetchall()
        == db.execute(
            "SELECT value #>> '{}', average::text FROM ehub.averages('s', 'n') ORDER BY 1"
        ).fetchall()
    )
    # A frozen version is not changed by replication either.
    space.freeze()
    other.execute("INSERT INTO spaces.s (key, embedding) VALUES ('late', '[1,1]')")
    time.sleep(1)
    assert db.execute(f"SELECT count(*) FROM {t} WHERE key = 'late'").fetchone() == (0,)
    assert isinstance(space, ehub.Space)
