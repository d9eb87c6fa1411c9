"""Tables that are there already, attached as spaces: which can be, and what one can do with them."""

import contextlib
import json
import subprocess
import threading
import uuid

import numpy as np
import psycopg
import pytest
from conftest import drop_database
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import check_neighbors
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

VECTORS = {str(i): np.array([i, i % 7, 1], np.float32) for i in range(1, 41)}


def fill(db, name="t", columns="", vectors=VECTORS):
    db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, e vector(3) {columns})")
    with db.cursor().copy(f"COPY {name} (id, e) FROM STDIN") as rows:
        for key, vector in vectors.items():
            rows.write_row((key, str(vector.tolist())))


@pytest.fixture
def roles(db, url):
    """Make roles that can log in, and connections as them."""
    with contextlib.ExitStack() as stack:

        def make():
            name = f"ehub_Who {uuid.uuid4().hex[:8]}"
            who = sql.Identifier(name)
            db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(who))
            stack.callback(
                db.execute, sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(who)
            )
            return who, stack.enter_context(
                psycopg.connect(make_conninfo(url, user=name, password="x"), autocommit=True)
            )

        yield make


# --- what cannot be attached

REFUSED = {
    "no key": ("CREATE TABLE t (id int, e vector(3))", "no primary key of one column"),
    "a key of two": (
        "CREATE TABLE t (a int, b int, e vector(3), PRIMARY KEY (a, b))",
        "no primary key of one column",
    ),
    "another key": (
        "CREATE TABLE t (id date PRIMARY KEY, e vector(3))",
        "primary key of type date",
    ),
    "a numeric key": (
        "CREATE TABLE t (id numeric PRIMARY KEY, e vector(3))",
        "primary key of type numeric",
    ),
    "a domain": (
        "CREATE DOMAIN d AS int; CREATE TABLE t (id d PRIMARY KEY, e vector(3))",
        "primary key of type",
    ),
    "a char": ("CREATE TABLE t (id char(3) PRIMARY KEY, e vector(3))", "of type character"),
    "no vectors": ("CREATE TABLE t (id int PRIMARY KEY, e real[])", "column e of type real"),
    "sparse": (
        "CREATE TABLE t (id int PRIMARY KEY, e sparsevec(3))",
        "column e of type .*sparsevec",
    ),
    "no column": ("CREATE TABLE t (id int PRIMARY KEY, x vector(3))", "no column e"),
    "no rows, no dims": (
        "CREATE TABLE t (id int PRIMARY KEY, e vector)",
        "takes vectors of any dims",
    ),
    "mixed": (
        "CREATE TABLE t (id int PRIMARY KEY, e vector);"
        " INSERT INTO t VALUES (1, '[1]'), (2, '[1,2]')",
        "has some of 1, 2",
    ),
    "a view": (
        "CREATE TABLE s (id int PRIMARY KEY, e vector(3)); CREATE VIEW t AS SELECT * FROM s",
        "is a view",
    ),
    "a materialized view": (
        "CREATE TABLE s (id int PRIMARY KEY, e vector(3));"
        " CREATE MATERIALIZED VIEW t AS SELECT * FROM s",
        "is a materialized view",
    ),
    "a partition": (
        "CREATE TABLE s (id int PRIMARY KEY, e vector(3)) PARTITION BY RANGE (id);"
        " CREATE TABLE t PARTITION OF s DEFAULT",
        "is a partition",
    ),
    "inherited from": (
        "CREATE TABLE t (id int PRIMARY KEY, e vector(3)); CREATE TABLE s () INHERITS (t)",
        "inherit",
    ),
    "inherits": (
        "CREATE TABLE s (id int, e vector(3)); CREATE TABLE t (PRIMARY KEY (id)) INHERITS (s)",
        "inherit",
    ),
    "temporary": ("CREATE TEMPORARY TABLE t (id int PRIMARY KEY, e vector(3))", "is temporary"),
    "unlogged": ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY, e vector(3))", "is unlogged"),
    "one partition unlogged": (
        "CREATE TABLE t (id int PRIMARY KEY, e vector(3)) PARTITION BY RANGE (id);"
        " CREATE UNLOGGED TABLE s PARTITION OF t DEFAULT",
        "is unlogged",
    ),
    "a sequence": ("CREATE SEQUENCE t", "is no table"),
}


def traces(db):
    """What is there of attached tables."""
    return db.execute(
        "SELECT (SELECT count(*) FROM ehub.attachment), (SELECT count(*) FROM ehub.space),"
        " (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal),"
        " (SELECT count(*) FROM pg_proc WHERE pronamespace = 'ehub_data'::regnamespace),"
        " (SELECT string_agg(relacl::text, ' ' ORDER BY oid) FROM pg_class WHERE oid >= 16384"
        "  AND relnamespace = 'public'::regnamespace)"
    ).fetchone()


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, db):
    made, why = REFUSED[what]
    db.execute(made)
    before = traces(db)
    with pytest.raises(psycopg.Error, match=why) as raised:
        db.execute("SELECT ehub.attach('t', 'e')")
    assert raised.value.sqlstate == "EH028"
    assert traces(db) == before


BAD = {
    "the name of a table": ({"table": "nosuch"}, "no table 'nosuch'"),
    "no name of a table": ({"table": "public."}, "public"),
    "a column": ({"column": "x"}, "no column x.*e"),
    "a long name": ({"name": "x" * 41}, "1 to 40"),
    "a name with a space": ({"name": "a b"}, "letters"),
    "no name": ({"name": ""}, "letters"),
    "a name that is there": ({"name": "there"}, "already"),
    "other dims": ({"dims": 4}, "vectors of 3 dims, not 4"),
    "no dims": ({"dims": 0}, "dims"),
    "a metric": ({"metric": "l1"}, "metric"),
    "M": ({"M": 1}, "M"),
    "ef_construction": ({"ef_construction": 1}, "ef_construction"),
    "recall": ({"target_recall": 2}, "recall"),
    "a table of ehub": ({"table": "ehub.space"}, "belongs to ehub"),
    "a table of a space": ({"table": "ehub_data.v1", "column": "embedding"}, "belongs to ehub"),
    "a view of a space": ({"table": "spaces.there", "column": "embedding"}, "belongs to ehub"),
    "Postgres": ({"table": "pg_catalog.pg_class"}, "belongs to Postgres"),
    "a toast table": ({"table": "public.t_pkey"}, "is no table"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, connect, db):
    hub = connect(index="none")
    hub.create_space("there", 3)
    fill(db)
    options, why = BAD[what]
    before = traces(db)
    with pytest.raises(ehub.EhubError, match=why):
        hub.attach(**{"table": "t", "column": "e", **options})
    assert traces(db) == before


def test_attached_twice(connect, db):
    hub = connect(index="none")
    fill(db)
    hub.attach("t", "e")
    for name in (None, "u"):
        with pytest.raises(ehub.SpaceExistsError, match="already"):
            hub.attach("t", "e", name)
    other = hub.attach("t", "e", "u", metric="ip")
    assert (other.metric, len(other)) == ("ip", 40)
    with pytest.raises(ehub.InvalidValueError, match="attached as t and u"):
        hub.attached("t", "e")
    assert hub.attached("t", "e", "ip").name == "u"
    with pytest.raises(ehub.EhubError, match="not attached"):
        hub.create_space("own", 3)
        hub.detach("own")


@pytest.mark.parametrize("first", ["a", "b"])
def test_two_spaces_of_a_table_come_and_go(first, db, roles, connect):
    """Each with triggers of its own; what the service reads with goes with the last of them."""
    who, owner = roles()
    db.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(who))
    fill(owner, columns=", h halfvec(2) DEFAULT '[1,2]'")
    before = traces(db)
    owner.execute("SELECT ehub.attach('t', 'e', 'a'), ehub.attach('t', 'h', 'b')")
    owner.execute("INSERT INTO t VALUES (100, '[1,2,3]', '[5,5]')")
    for space, query in (("a", "[1,2,3]"), ("b", "[5,5]")):
        found = db.execute(f"SELECT key FROM ehub.nearest('{space}', '{query}', 1)").fetchall()
        assert found == [("100",)]
    owner.execute("SELECT ehub.detach(%s)", [first])
    owner.execute("INSERT INTO t VALUES (101, '[9,9,9]')")
    owner.execute("SELECT ehub.detach(%s)", ["b" if first == "a" else "a"])
    assert traces(db)[:4] == before[:4]


# --- who may


@contextlib.contextmanager
def plain_owner(admin, server, tmp_path):
    """A database whose ehub belongs to a role that is no superuser; yields connection strings."""
    name = f"ehub_plain_{uuid.uuid4().hex[:8]}"
    admin.execute(f"CREATE DATABASE {name}")
    admin.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 'x'; GRANT CREATE ON DATABASE {name} TO {name}"
    )
    boss = make_conninfo(server, dbname=name)
    owner = make_conninfo(boss, user=name, password="x")
    try:
        with psycopg.connect(boss, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector; GRANT CREATE ON SCHEMA public TO PUBLIC")
        with contextlib.closing(Database(Target(owner, tmp_path / "owner"))) as database:
            migrate(database)
        yield boss, owner, name
    finally:
        drop_database(admin, name)
        admin.execute(f"DROP ROLE {name}")


def test_an_owner_of_ehub_that_is_no_superuser(admin, server, tmp_path):
    with plain_owner(admin, server, tmp_path) as (boss, owner, name):
        who = f"ehub_who_{uuid.uuid4().hex[:8]}"
        with (
            psycopg.connect(boss, autocommit=True) as db,
            psycopg.connect(boss, autocommit=True) as all_seeing,
        ):
            db.execute(f"CREATE ROLE {who}")
            try:
                db.execute(f"CREATE SCHEMA shut AUTHORIZATION {who}; SET ROLE {who}")
                fill(db, "shut.t")
                before = traces(all_seeing)
                with pytest.raises(psycopg.Error, match="may not use schema shut") as raised:
                    db.execute("SELECT ehub.attach('shut.t', 'e')")
                assert raised.value.diag.message_hint == f"GRANT USAGE ON SCHEMA shut TO {name}"
                assert traces(all_seeing) == before
                db.execute(raised.value.diag.message_hint)
                db.execute("ALTER TABLE shut.t ENABLE ROW LEVEL SECURITY")
                with pytest.raises(psycopg.Error, match="row policies of shut.t hide rows"):
                    db.execute("SELECT ehub.attach('shut.t', 'e')")
                db.execute("ALTER TABLE shut.t DISABLE ROW LEVEL SECURITY")
                acl = "SELECT relacl::text FROM pg_class WHERE oid = 'shut.t'::regclass"
                # Both ways to detach two of them.
                for last in ("a", "b"):
                    db.execute("SELECT ehub.attach('shut.t', 'e', 'a')")
                    db.execute("SELECT ehub.attach('shut.t', 'e', 'b', 'ip')")
                    assert name in db.execute(acl).fetchone()[0]
                    db.execute(f"SELECT ehub.detach('{'b' if last == 'a' else 'a'}')")
                    assert name in db.execute(acl).fetchone()[0]
                    db.execute(f"SELECT ehub.detach('{last}')")
                    assert name not in db.execute(acl).fetchone()[0]
                db.execute("SELECT ehub.attach('shut.t', 'e')")
                with ehub.connect(owner, index="local", data_dir=tmp_path / "data") as hub:
                    space = hub.get_space("t")
                    space.wait_until_indexed(30)
                    near = space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
                    check_neighbors(near, VECTORS, "l2", np.array([7, 0, 1]), 3)
                    # Policies that come later: no index follows it, and nothing is hidden or shown.
                    db.execute("ALTER TABLE shut.t ENABLE ROW LEVEL SECURITY")
                    near = space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
                    assert near == []
                    db.execute("ALTER TABLE shut.t DISABLE ROW LEVEL SECURITY")
                    db.execute(f"REVOKE SELECT ON shut.t FROM {name}")
                    with pytest.raises(ehub.AccessDeniedError, match="permission denied"):
                        space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
                    # It stays listed, as what it is.
                    problem = f"role {name} may not read shut.t: GRANT SELECT ON shut.t TO {name}"
                    (row,) = [row for row in hub.status() if row["space"] == "t"]
                    assert (row["rows"], row["last_error"]) == (None, problem)
                    assert row["in_sql"] == f"exact: {problem}"
                    assert [(f.subject, f.problem) for f in hub.doctor()] == [("space t", problem)]
                db.execute("SELECT ehub.detach('t')")
            finally:
                db.execute(f"RESET ROLE; DROP OWNED BY {who} CASCADE; DROP ROLE {who}")


def test_owners_of_tables_alone_attach_them(db, roles):
    fill(db)
    who, other = roles()
    db.execute(sql.SQL("GRANT ALL ON t TO {}").format(who))
    before = traces(db)
    for call in ("ehub.attach('t', 'e')", "ehub.attach('t', 'e', 'x', 'cosine', 3)"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="does not own"):
            other.execute(f"SELECT {call}")
    assert traces(db) == before
    db.execute("SELECT ehub.attach('t', 'e')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        other.execute("SELECT ehub.detach('t')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        other.execute("SELECT ehub.reattach('t')")
    assert len(other.execute("SELECT * FROM ehub.nearest('t', '[1,1,1]', 5)").fetchall()) == 5
    # A new owner may all of it, the former one nothing.
    db.execute(
        sql.SQL("GRANT CREATE ON SCHEMA public TO {0}; ALTER TABLE t OWNER TO {0}").format(who)
    )
    db.execute("SELECT ehub.tend_attached()")
    other.execute("ALTER TABLE t DISABLE TRIGGER ALL; SELECT ehub.reattach('t')")
    assert db.execute("SELECT problem FROM ehub.attached").fetchone() == (None,)
    other.execute("SELECT ehub.detach('t')")


def test_writers_need_no_rights_but_those_on_the_table(db, roles, hub):
    fill(db)
    space = hub.attach("t", "e")
    space.wait_until_indexed(30)
    who, writer = roles()
    db.execute(sql.SQL("GRANT INSERT ON t TO {}").format(who))
    writer.execute("INSERT INTO t VALUES (100, '[50,50,50]')")
    assert space.nearest_neighbors(1, vector=[50, 50, 50], consistency="strong")[0].key == "100"
    db.execute(
        sql.SQL("REVOKE INSERT ON t FROM {0}; GRANT DELETE, UPDATE (e) ON t TO {0}").format(who)
    )
    writer.execute("UPDATE t SET e = '[60,60,60]'")
    writer.execute("DELETE FROM t")
    assert space.nearest_neighbors(1, vector=[50, 50, 50], consistency="strong") == []
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        writer.execute("SELECT * FROM ehub.nearest('t', '[1,1,1]', 3)")


# --- writers


@pytest.mark.parametrize(
    "name", ["changed", "tg_op", "found", "key", "part", "new_rows", "rows", "n"]
)
@pytest.mark.parametrize("column", ["id", "e"])
def test_columns_of_any_name_are_written(name, column, db):
    """Also those that something in the function of the triggers is called."""
    fill(db)
    db.execute(f'ALTER TABLE t RENAME {column} TO "{name}"')
    key, embedding = (name, "e") if column == "id" else ("id", name)
    db.execute("SELECT ehub.attach('t', %s)", [embedding])
    db.execute(f'INSERT INTO t ("{key}", "{embedding}") VALUES (100, \'[1,2,3]\')')
    db.execute(f'UPDATE t SET "{key}" = 101 WHERE "{key}" = 100')
    db.execute(f'DELETE FROM t WHERE "{key}" = 101')
    db.execute("SET session_replication_role = replica")
    db.execute(f'INSERT INTO t ("{key}", "{embedding}") VALUES (102, \'[1,2,3]\')')
    db.execute(f'DELETE FROM t WHERE "{key}" = 102')
    keys = [set(keys) for (keys,) in db.execute("SELECT keys FROM ehub.change ORDER BY xid")]
    assert keys == [{"100"}, {"100", "101"}, {"101"}, {"102"}, {"102"}]


def test_writers_never_fail(url, db, hub):
    """Whatever becomes of the table between two of their statements."""
    fill(db, columns=", n int")
    space = hub.attach("t", "e")
    space.wait_until_indexed(30)
    failed, stop = [], threading.Event()

    def write(replica):
        names = {"key": "id", "embedding": "e"}
        with psycopg.connect(url, autocommit=True) as writer:
            if replica:
                writer.execute("SET session_replication_role = replica")
            for i in range(10_000):
                if stop.is_set():
                    return
                row = writer.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum IN"
                    " (1, 2) ORDER BY attnum"
                ).fetchall()
                names = {"key": row[0][0], "embedding": row[1][0]}
                try:
                    writer.execute(
                        'INSERT INTO t ("{key}", "{embedding}") VALUES (%s, %s)'
                        ' ON CONFLICT ("{key}") DO UPDATE SET n = 1'.format(**names),
                        [1000 + i % 50 + 100 * replica, "[1,2,3]"],
                    )
                except psycopg.errors.UndefinedColumn:
                    # It was renamed since this writer looked.
                    pass
                except psycopg.Error as error:
                    failed.append(error)
                    return

    writers = [threading.Thread(target=write, args=(replica,)) for replica in (False, True)]
    for writer in writers:
        writer.start()
    try:
        for i in range(15):
            for old, new in (("id", "k"), ("e", "v")):
                there = [new, old] if i % 2 else [old, new]
                db.execute(f"ALTER TABLE t RENAME {there[0]} TO {there[1]}")
            if i % 5 == 2:
                kind = "bigint" if i % 2 else "int"
                db.execute(f"ALTER TABLE t ALTER {'id' if i % 2 else 'k'} TYPE {kind}")
            if i % 3 == 0:
                db.execute("SELECT ehub.tend_attached()")
    finally:
        stop.set()
        for writer in writers:
            writer.join(20)
    assert failed == []
    db.execute("SELECT ehub.tend_attached()")
    space.wait_until_indexed(30)
    rows = db.execute("SELECT count(*) FROM t").fetchone()[0]
    found = space.nearest_neighbors(1000, vector=[1, 2, 3], consistency="strong")
    assert len(found) == rows


def test_the_type_of_the_key_changes_under_a_session(db):
    fill(db)
    db.execute("SELECT ehub.attach('t', 'e'); SET session_replication_role = replica")
    db.execute("INSERT INTO t VALUES (100, '[1,2,3]')")
    db.execute("ALTER TABLE t ALTER id TYPE bigint")
    db.execute("INSERT INTO t VALUES (101, '[1,2,3]')")
    db.execute("ALTER TABLE t ALTER id TYPE text")
    db.execute("INSERT INTO t VALUES ('x', '[1,2,3]')")
    found = db.execute("SELECT key FROM ehub.nearest('t', '[1,2,3]', 3)").fetchall()
    assert sorted(found) == [("100",), ("101",), ("x",)]


# --- what one can do with it


@pytest.fixture(params=["none", "local"])
def space(request, connect, db):
    fill(db, columns=", kind text DEFAULT 'a', n int, at timestamptz DEFAULT '2024-05-06 07:08Z'")
    db.execute("UPDATE t SET n = id, kind = CASE WHEN id % 2 = 0 THEN 'b' ELSE 'a' END")
    db.execute("INSERT INTO t (id, e) VALUES (1000, NULL)")
    hub = connect(index=request.param)
    space = hub.attach("t", "e")
    if request.param == "local":
        space.wait_until_indexed(30)
    space.hub = hub
    return space


def test_what_a_space_can_do(space, db, tmp_path):
    assert (space.attached_to, space.dims, space.metric, len(space)) == ("t", 3, "l2", 40)
    assert "1" in space and "1000" not in space and "x" not in space
    assert space.get("5").tolist() == [5, 5, 1]
    assert space.multiget(["9", "3"]).tolist() == [[9, 2, 1], [3, 3, 1]]
    with pytest.raises(ehub.KeyNotFoundError):
        space.get("1000")
    with pytest.raises(ehub.KeyNotFoundError, match="'05'"):
        space.multiget(["5", "05"])
    notes = {"id": 5, "kind": "a", "n": 5, "at": "2024-05-06T07:08:00"}
    assert space.metadata("5") == notes
    assert dict(space.items()).keys() == set(space) == VECTORS.keys()
    assert ("5", notes) in [(key, note) for key, _, note in space.items(metadata=True)]
    query = np.array([7, 0, 1])
    for options in ({}, {"consistency": "strong"}):
        near = space.nearest_neighbors(5, vector=query, **options)
        check_neighbors(near, VECTORS, "l2", query, 5)
    assert space.nearest_neighbors(1, key="5", metadata=True)[0].metadata["n"] in (4, 6)
    odd = {key: vector for key, vector in VECTORS.items() if int(key) % 2}
    for _ in range(3):
        near = space.nearest_neighbors(4, vector=query, filter={"kind": "a"})
        check_neighbors(near, odd, "l2", query, 4)
    many = space.multi_nearest_neighbors(3, vectors=[query, query])
    assert many[0] == many[1] == space.nearest_neighbors(3, vector=query)
    assert len(space.nearest_neighbors(3, like=["1", "2"], unlike=["30"])) == 3
    assert {n.key for n in space.within(1.5, vector=[5, 5, 1])} == {"4", "5", "6"}
    assert {n.key for n in space.within(1.5, key="5", complete=False)} == {"4", "6"}
    assert space.distance("1", "2") == pytest.approx(2**0.5)
    assert space.distances(["1", "2"]).shape == (2, 2)
    assert space.average(["1", "3"]).tolist() == [2, 2, 1]
    assert space.averages("kind").keys() == {"a", "b"}
    graph = dict(space.nearest_neighbors_of_all(2))
    assert graph.keys() == VECTORS.keys() and all(len(near) == 2 for near in graph.values())
    assert [key for key, _ in space.nearest_neighbors_of_all(1, after="8")] == ["9"]
    space.create_index("odd", {"kind": "a"})
    near = space.nearest_neighbors(3, vector=query, index="odd", consistency="strong")
    check_neighbors(near, odd, "l2", query, 3)
    assert [one.name for one in space.indexes()] == ["odd"]
    space.drop_index("odd")
    assert [version.name for version in space.versions()] == ["v1"]
    assert [row["rows"] for row in space.hub.status() if row["space"] == "t"][0] == 40
    ways = space.explain_nearest(3, vector=query, filter={"nosuch": 1})
    assert sum(way.chosen for way in ways) == 1 and "nosuch" in ways[-1].note
    assert [entry.action for entry in space.audit()] == ["drop_index", "create_index", "attach"]


def test_snapshots_of_attached_tables(space, db):
    snapshot = space.download_snapshot()
    assert len(snapshot) == 40
    db.execute("UPDATE t SET e = '[100,100,100]' WHERE id = 3; DELETE FROM t WHERE id = 4")
    db.execute("UPDATE t SET e = '[1,1,1]' WHERE id = 1000")
    snapshot.refresh()
    assert snapshot.get("3").tolist() == [100, 100, 100]
    assert "4" not in snapshot and "1000" in snapshot
    db.execute("ALTER TABLE t RENAME id TO x")
    db.execute("UPDATE t SET e = '[7,7,7]' WHERE x = 5")
    snapshot.refresh()
    assert snapshot.get("5").tolist() == [7, 7, 7]
    mine = snapshot.fork()
    mine.set("5", [1, 2, 3])
    with pytest.raises(ehub.AttachedError, match="public.t"):
        mine.overwrite_space("t")


CANNOT = {
    "set": lambda s: s.set("1", [1, 2, 3]),
    "multiset": lambda s: s.multiset({"1": [1, 2, 3]}),
    "delete": lambda s: s.delete("1"),
    "multidelete": lambda s: s.multidelete(["1"]),
    "delete_all": lambda s: s.delete_all(),
    "checkpoint": lambda s: s.checkpoint("x"),
    "restore": lambda s: s.restore("x"),
    "drop_checkpoint": lambda s: s.drop_checkpoint("x"),
    "freeze": lambda s: s.freeze(),
    "create_version": lambda s: s.create_version("v2"),
    "rollback": lambda s: s.rollback(),
    "grant": lambda s: s.grant("pg_monitor", "read"),
    "revoke": lambda s: s.revoke("pg_monitor"),
    "average": lambda s: s.hub.create_average("x", "t", "kind"),
    "delete_space": lambda s: s.hub.delete_space("t"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_a_space_cannot_do(what, space, db):
    before = traces(db)
    with pytest.raises(ehub.AttachedError, match=r"space 't' is attached to (public\.)?t: "):
        CANNOT[what](space)
    assert traces(db) == before
    assert len(space) == 40


def test_searches_go_on_when_the_table_is_no_more_what_it_was(space, db):
    near = space.nearest_neighbors(3, vector=[7, 0, 1])
    for there, back in (
        ("DROP COLUMN kind", "ADD COLUMN kind text"),
        ("RENAME TO u", "SET SCHEMA ehub_other"),
        ("ALTER id TYPE text", "ALTER id TYPE int USING id::int"),
        ("DISABLE TRIGGER ALL", "ENABLE TRIGGER ALL"),
    ):
        if "SCHEMA" in back:
            db.execute("CREATE SCHEMA ehub_other")
        name = db.execute("SELECT relation::text FROM ehub.attachment").fetchone()[0]
        for change in (there, back):
            db.execute(f"ALTER TABLE {name} {change}")
            name = db.execute("SELECT relation::text FROM ehub.attachment").fetchone()[0]
            for strong in ("replica", "strong"):
                found = space.nearest_neighbors(3, vector=[7, 0, 1], consistency=strong)
                assert [n.distance for n in found] == [n.distance for n in near]
    db.execute("ALTER TABLE ehub_other.u DROP CONSTRAINT t_pkey")
    for _ in range(2):
        with pytest.raises(ehub.AttachedError, match="no primary key of one column any more"):
            space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
    db.execute("ALTER TABLE ehub_other.u ADD PRIMARY KEY (id)")
    found = space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
    assert [n.distance for n in found] == [n.distance for n in near]
    db.execute("ALTER TABLE ehub_other.u ALTER e TYPE vector(2) USING '[1,2]'")
    with pytest.raises(ehub.AttachedError, match="no vectors of 3 dims any more"):
        space.nearest_neighbors(3, vector=[7, 0, 1], consistency="strong")
    db.execute("ALTER TABLE ehub_other.u DROP COLUMN e")
    with pytest.raises(ehub.AttachedError, match="no column e any more"):
        space.get("1")
    db.execute("DROP TABLE ehub_other.u")
    with pytest.raises(ehub.NotFoundError):
        space.get("1")
    db.execute("SELECT ehub.tend()")
    assert traces(db)[:4] == (0, 0, 0, 0)


def test_a_vector_without_distances_is_not_found(connect, db):
    hub = connect()
    fill(db)
    space = hub.attach("t", "e", metric="cosine")
    space.wait_until_indexed(30)
    db.execute("UPDATE t SET e = '[0,0,0]' WHERE id = 3")
    (version, index) = db.execute(
        "SELECT version_id, index_id FROM ehub.catalogue WHERE space = 't'"
    ).fetchone()
    assert index is not None
    keys = [[str(i) for i in range(1, 41)], [1] * 40]
    # As where an index that is behind proposes it.
    for call, parameters in (
        ("check_v{}('[1,1,1]', %s, pg_current_snapshot(), 100, 50, 50, NULL)", keys[:1]),
        (
            "check_matching_v{}('[1,1,1]', %s, pg_current_snapshot(), 100, 50, 50, NULL, NULL, NULL,"
            " true)",
            keys[:1],
        ),
        (
            "check_many_v{}(ARRAY['[1,1,1]'::vector], %s, %s, pg_current_snapshot(), 100, 50, NULL,"
            " NULL)",
            keys,
        ),
    ):
        found = db.execute(f"SELECT key FROM ehub_data.{call.format(version)}", parameters)
        assert len(found.fetchall()) == 39
    # The strong one first: what this process has seen once it does not forget.
    for consistency in ("strong", "replica"):
        assert len(space.nearest_neighbors(50, vector=[1, 1, 1], consistency=consistency)) == 39
    assert len(space.within(10, vector=[1, 1, 1])) == 39


def test_vectors_of_other_dims_are_not_in_the_space(connect, db):
    db.execute("CREATE TABLE t (id int PRIMARY KEY, e vector)")
    db.execute(
        "INSERT INTO t SELECT i, CASE WHEN i % 2 = 0 THEN ARRAY[i, 1]::vector"
        " ELSE ARRAY[i, 1, 1]::vector END FROM generate_series(1, 40) AS i"
    )
    hub = connect()
    twos, threes = hub.attach("t", "e", "twos", dims=2), hub.attach("t", "e", "threes", dims=3)
    for space in (twos, threes):
        space.wait_until_indexed(30)
        assert len(space) == 20
    db.execute("UPDATE t SET e = '[1000,1]' WHERE id = 1")
    for space, rows in ((twos, 21), (threes, 19)):
        query = [1000] + [1] * (space.dims - 1)
        for consistency in ("strong", "replica"):
            assert len(space.nearest_neighbors(50, vector=query, consistency=consistency)) == rows
        assert len(space.within(1e6, vector=query)) == rows
    assert twos.nearest_neighbors(1, vector=[1000, 1])[0].key == "1"
    assert "1" not in threes


# --- names


NAMES = [
    'a"b',
    "it's",
    "Über Größe",
    "a.b",
    "key",
    "metadata",
    "embedding",
    "pk",
    "c1",
    "t",
    "100%",
]
NAMES += ["s", "rows", "{x}", "$1", "\\", "and", "not", "x" * 63, "%s", "#{", "select"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(name, connect, db):
    """Of schema, table, key, column of embeddings and of metadata, all at once."""
    it = sql.Identifier(name)
    other = sql.Identifier(name[:60] + "_2")
    third = sql.Identifier(name[:60] + "_3")
    db.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(it))
    table = sql.Identifier(name, name)
    db.execute(
        sql.SQL("CREATE TABLE {} ({} int PRIMARY KEY, {} vector(2), {} int)").format(
            table, it, other, third
        )
    )
    db.execute(
        sql.SQL(
            "INSERT INTO {} SELECT i, ARRAY[i, 1]::vector, i % 3 FROM generate_series(1, 30) AS i"
        ).format(table)
    )
    hub = connect()
    space = hub.attach(table.as_string(), name[:60] + "_2", "s")
    assert hub.attached(table.as_string(), name[:60] + "_2").name == "s"
    space.wait_until_indexed(30)
    note = {name: 4, name[:60] + "_3": 1}
    field = (name[:60] + "_3").replace("\\", "\\\\").replace(".", "\\.")
    assert space.metadata("4") == note
    assert len(space) == len(list(space.items(metadata=True))) == 30
    for _ in range(3):
        found = space.nearest_neighbors(2, vector=[4, 1], filter={field: 1}, metadata=True)
        assert [n.key for n in found][0] == "4" and found[0].metadata == note
    space.create_index("few", {field: {"in": [1, 2]}})
    for consistency in ("strong", "replica"):
        found = space.nearest_neighbors(30, vector=[4, 1], index="few", consistency=consistency)
        assert len(found) == 20
    db.execute(
        sql.SQL("UPDATE {} SET {} = '[4,1]', {} = 1 WHERE {} = 6").format(table, other, third, it)
    )
    assert {n.key for n in space.within(0, vector=[4, 1], filter={field: 1})} == {"4", "6"}
    found = db.execute(
        "SELECT key FROM ehub.nearest('s', '[4,1]', 2, filter => %s)", [json.dumps({field: 1})]
    ).fetchall()
    assert {key for (key,) in found} == {"4", "6"}
    assert dict(space.nearest_neighbors_of_all(1)).keys() == set(space)
    assert len(space.download_snapshot()) == 30
    assert space.explain_nearest(3, vector=[4, 1], filter={field: 1})
    hub.detach("s")


@pytest.mark.parametrize("key", ["smallint", "integer", "bigint", "uuid", "text", "varchar(200)"])
def test_keys_that_are_no_keys_of_that_type(key, connect, db):
    db.execute(f"CREATE TABLE t (id {key} PRIMARY KEY, e vector(2))")
    value = {"uuid": str(uuid.uuid4())}.get(key, "7")
    db.execute("INSERT INTO t VALUES (%s, '[1,2]')", [value])
    hub = connect(index="none")
    space = hub.attach("t", "e")
    assert space.get(value).tolist() == [1, 2]
    odd = ["07", " 7", "+7", "7.0", "x", "-0", "9" * 18, "9" * 19, "9" * 30, "-" + "9" * 19, "1e1"]
    odd += [
        value.upper() + " ",
        "{" + value + "}",
        value.replace("-", "") + "0",
        "NULL",
        "'",
        "\\",
        "ü",
    ]
    for other in odd:
        assert other not in space
        with pytest.raises(ehub.KeyNotFoundError):
            space.get(other)
        with pytest.raises(ehub.KeyNotFoundError):
            space.multiget([value, other])
        assert len(space.nearest_neighbors(5, vector=[1, 2])) == 1


# --- metadata


def test_columns_of_many_types(connect, db):
    db.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'it''s'); CREATE DOMAIN small AS int CHECK (VALUE < 10);"
        " CREATE DOMAIN moody AS mood; CREATE TYPE pair AS (a int, b text)"
    )
    columns = {
        "b boolean": (True, True),
        "i2 smallint": (5, 5),
        "i8 bigint": (2**60, 2**60),
        "r real": (0.5, 0.5),
        "f float8": (0.1, 0.1),
        "m numeric": ("12.50", 12.50),
        "nan numeric": ("NaN", "NaN"),
        "inf float8": ("-Infinity", "-Infinity"),
        "v varchar(9)": ("x", "x"),
        "c char(3)": ("x", "x  "),
        "mood mood": ("it's", "it's"),
        "small small": (5, 5),
        "moody moody": ("sad", "sad"),
        "a int[]": ([1, 2], [1, 2]),
        "ta text[]": (["x", None], ["x", None]),
        "j json": ('{"x": [1]}', {"x": [1]}),
        "jb jsonb": ('{"x": [1]}', {"x": [1]}),
        "u uuid": ("00000000-0000-0000-0000-00000000000A", "00000000-0000-0000-0000-00000000000a"),
        "d date": ("2024-05-06", "2024-05-06"),
        "at timestamptz": ("2024-05-06 07:08+02", "2024-05-06T05:08:00"),
        "ts timestamp": ("2024-05-06 07:08", "2024-05-06T07:08:00"),
        "t time": ("07:08", "07:08:00"),
        "net inet": ("10.0.0.1", "10.0.0.1"),
        "nr int4range": ("[1,3)", "[1,3)"),
    }
    nothing = ["p pair", "ma mood[]", "by bytea", "h halfvec(2)", "iv interval", "tr tstzrange"]
    db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, e vector(2), "
        + ", ".join([*columns, *nothing])
        + ", "
        + ", ".join(f"x{i} int DEFAULT {i}" for i in range(60))
        + ")"
    )
    names = [column.split()[0] for column in columns]
    db.execute(
        f"INSERT INTO t (id, e, {', '.join(names)}, p, ma, iv) VALUES (1, '[1,2]',"
        f" {', '.join(['%s'] * len(names))}, ROW(1, 'x'), '{{sad}}', '1 day')",
        [value for value, _ in columns.values()],
    )
    hub = connect(index="none")
    space = hub.attach("t", "e")
    expected = {name: told for name, (_, told) in zip(names, columns.values(), strict=True)}
    expected |= {"id": 1} | {f"x{i}": i for i in range(60)}
    assert space.metadata("1") == expected
    # It is the same to everybody.
    db.execute(
        "SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'; SET IntervalStyle = 'iso_8601'"
    )
    db.execute("SET bytea_output = 'escape'; SET lc_monetary = 'C'; SET search_path = pg_catalog")
    (note,) = db.execute("SELECT metadata FROM ehub.nearest('t', '[1,2]', 1)").fetchone()
    assert note == expected
    for wanted, found in (
        ({"mood": "it's", "moody": "sad", "small": {"<": 6}}, 1),
        ({"at": {">=": "2024-05-06T05:08:00", "<": "2024-05-06T05:08:01"}}, 1),
        ({"a": 2, "ta": "x", "j.x": 1, "jb.x": 1}, 1),
        ({"c": "x"}, 0),
        ({"nan": {">": 5}}, 0),
        ({"inf": {"<": 5}}, 0),
        ({"u": "00000000-0000-0000-0000-00000000000a", "x59": 59, "x0": 0}, 1),
        ({"u": "00000000-0000-0000-0000-00000000000A"}, 0),
        ({"p": {"exists": True}}, 0),
        ({"h": {"exists": True}}, 0),
    ):
        assert len(space.nearest_neighbors(1, vector=[1, 2], filter=wanted)) == found, wanted


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.1, 0.3, -0.0, 1e15, 123456789012345.12, 2**53, 2**53 + 1, 10**18, 1e300]),
)
STRINGS = st.sampled_from(["", "a", "A", "a ", "NaN", "3", "é", "\\", "'", "true", "Infinity"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS)
COLUMNS = {
    "b": ("boolean", st.booleans()),
    "s": ("smallint", st.integers(-3, 3)),
    "i": ("integer", st.integers(-3, 3)),
    "l": ("bigint", st.sampled_from([-3, 0, 1, 2**53, 2**53 + 1, 10**18, 2**63 - 1])),
    "r": ("real", st.sampled_from([0.1, 0.3, 1, -2, "NaN", "Infinity"])),
    "d": (
        "float8",
        st.sampled_from(
            [0.1, 0.3, 1, -2, 0.1 + 0.2, 123456789012345.12, 2**53, "NaN", "-Infinity"]
        ),
    ),
    "m": (
        "numeric",
        st.sampled_from(["0.1", "0.30", "1", "-2", "123456789012345.1234567", "NaN", "1e30"]),
    ),
    "t": ("text", STRINGS),
    "v": ("varchar", STRINGS),
    "c": ("char(3)", st.sampled_from(["a", "A", "3"])),
    "y": ("date", st.sampled_from(["2024-01-02", "2023-01-01"])),
    "j": ("jsonb", SCALARS.map(json.dumps) | st.sampled_from(['[1, "a", null]', '{"x": 1}', "[]"])),
    "a": ("int[]", st.lists(st.none() | st.integers(-3, 3), max_size=3)),
}
FIELDS = st.sampled_from([*COLUMNS, "nosuch", "j.x"])
LONG = st.sampled_from(
    [
        "123456789012345.1234567",
        "123456789012345.12",
        "0.30000000000000004",
        "-0.0",
        "1e30",
        "100e-2",
    ]
)


class Exact(float):
    """A number that is written as it is."""

    def __new__(cls, text):
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __repr__(self):
        return self.text


VALUES = SCALARS | LONG.map(Exact)
ORDERED = st.one_of(
    st.tuples(st.sampled_from(["<", "<=", ">", ">="]), NUMBERS | LONG.map(Exact)),
    st.tuples(st.sampled_from(["<", "<=", ">", ">="]), STRINGS),
    st.tuples(st.sampled_from(["=", "!="]), VALUES),
    st.tuples(st.sampled_from(["in", "not in"]), st.lists(VALUES, max_size=3)),
    st.tuples(st.just("exists"), st.booleans()),
)
CONDITIONS = VALUES | ORDERED.map(lambda one: dict([one]))
TWO = st.tuples(
    st.sampled_from(["<", "<="]), st.sampled_from([">", ">=", "="]), NUMBERS, NUMBERS
).map(lambda one: {one[0]: one[2], one[1]: one[3]})
FILTERS = st.recursive(
    st.dictionaries(FIELDS, CONDITIONS | TWO, min_size=1, max_size=2),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: {"or": parts}),
        st.lists(inner, max_size=3).map(lambda parts: {"and": parts}),
        inner.map(lambda part: {"not": part}),
    ),
    max_leaves=4,
)
ROWS = st.fixed_dictionaries({name: st.none() | values for name, (_, values) in COLUMNS.items()})


def written(value):
    """JSON with numbers as they are written."""
    if isinstance(value, Exact):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def test_filters_are_those_of_json(url, db):
    """A condition on typed columns is what the same is on an object of them."""
    db.execute(
        "CREATE TABLE t (id serial PRIMARY KEY, e vector(2) DEFAULT '[1,2]', "
        + ", ".join(f"{name} {kind}" for name, (kind, _) in COLUMNS.items())
        + ")"
    )
    db.execute("SELECT ehub.attach('t', 'e')")

    @example(
        [dict.fromkeys(COLUMNS) | {"d": 123456789012345.12, "m": "123456789012345.1234567"}],
        [
            {field: condition}
            for field in "dm"
            for text in ("123456789012345.1234567", "123456789012345.13", "123456789012345.12")
            for condition in (Exact(text), {"<": Exact(text)}, {">=": Exact(text)})
        ],
    )
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        rows=st.lists(ROWS, min_size=3, max_size=8),
        filters=st.lists(FILTERS, min_size=3, max_size=8),
    )
    def check(rows, filters):
        with db.transaction(force_rollback=True):
            for row in rows:
                db.execute(
                    f"INSERT INTO t ({', '.join(row)}) VALUES ({', '.join(['%s'] * len(row))})",
                    list(row.values()),
                )
            for one in filters:
                text = written(one)
                expected = db.execute(
                    "SELECT array_agg(id::text) FROM t AS whole WHERE to_jsonb(whole) @@ ehub.filter_path(%s)",
                    [text],
                ).fetchone()[0]
                found = db.execute(
                    "SELECT array_agg(key) FROM ehub.nearest_exact('t', '[1,2]', 100, filter => %s)",
                    [text],
                ).fetchone()[0]
                assert sorted(found or []) == sorted(expected or []), text

    check()


# --- dumps, and nothing that is left


def without_comments(dump):
    """A dump without what is made anew each time."""
    return [line for line in dump.splitlines() if not line.startswith((b"\\", b"--"))]


def test_detaching_leaves_nothing(embedded, elsewhere):
    programs, _ = elsewhere
    with psycopg.connect(embedded.conninfo, autocommit=True) as db:
        fill(db, columns=", kind text")
        db.execute(
            "CREATE TABLE p (id text PRIMARY KEY, e halfvec(2)) PARTITION BY HASH (id);"
            " CREATE TABLE p1 PARTITION OF p FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
            " CREATE TABLE p2 PARTITION OF p FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
            " CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            " CREATE TRIGGER mine AFTER INSERT ON t EXECUTE FUNCTION own();"
            " CREATE INDEX ON t USING hnsw (e vector_cosine_ops)"
        )

        def everything():
            dumped = subprocess.run(
                [programs / "pg_dump", "--schema-only", embedded.conninfo],
                check=True,
                capture_output=True,
            )
            return without_comments(dumped.stdout), traces(db)

        before = everything()
        assert embedded.attach("t", "e").metric == "cosine"
        embedded.attach("t", "e", "other", metric="l2")
        embedded.attach("p", "e")
        assert everything() != before
        for name in ("t", "p", "other"):
            space = embedded.get_space(name)
            space.wait_until_indexed(30)
            space.create_index("few", {"kind": "a"}) if name != "p" else None
        db.execute("ALTER TABLE p DETACH PARTITION p2")
        db.execute("INSERT INTO t VALUES (100, '[1,2,3]'); INSERT INTO p2 VALUES ('x', '[1,2]')")
        db.execute(
            "TRUNCATE p2; ALTER TABLE p ATTACH PARTITION p2 FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        )
        for name in ("t", "other", "p"):
            embedded.detach(name)
        assert everything() == before
        assert db.execute("SELECT count(*) FROM ehub.change").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM ehub.replica").fetchone() == (0,)


def test_a_dump_with_attached_tables(embedded, elsewhere, tmp_path):
    programs, target = elsewhere
    with psycopg.connect(embedded.conninfo, autocommit=True) as db:
        db.execute("CREATE TABLE t (gone text, id int, also int, e vector(3), kind text, n int)")
        db.execute("ALTER TABLE t DROP COLUMN gone, DROP COLUMN also, ADD PRIMARY KEY (id)")
        with db.cursor().copy("COPY t (id, e, n) FROM STDIN") as rows:
            for key, vector in VECTORS.items():
                rows.write_row((key, str(vector.tolist()), int(key) % 4))
        db.execute(
            'CREATE SCHEMA "S\'x"; CREATE TABLE "S\'x"."P q" (id text PRIMARY KEY, e halfvec(3))'
            ' PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF "S\'x"."P q" DEFAULT;'
            " INSERT INTO \"S'x\".\"P q\" VALUES ('a', '[1,2,3]')"
        )
    space = embedded.attach("t", "e")
    space.create_index("few", {"n": {">=": 2}})
    embedded.attach('"S\'x"."P q"', "e", "p")
    space.wait_until_indexed(30)
    dump = tmp_path / "dump"
    subprocess.run([programs / "pg_dump", "-Fc", "-f", dump, embedded.conninfo], check=True)
    subprocess.run([programs / "pg_restore", "--exit-on-error", "-d", target, dump], check=True)
    with ehub.connect(target, data_dir=tmp_path / "data", index="local") as other:
        assert [one.name for one in other.spaces()] == ["p", "t"]
        found, parted = other.get_space("t"), other.get_space("p")
        with psycopg.connect(target, autocommit=True) as db:
            assert db.execute("SELECT problem FROM ehub.attached").fetchall() == [(None,), (None,)]
            query, new = np.array([7, 0, 1]), np.array([7, 0.5, 1])
            for tended in (False, True):
                if tended:
                    db.execute("SELECT ehub.tend()")
                found.wait_until_indexed(30)
                table = {**VECTORS, **({"100": new} if tended else {})}
                for consistency in ("strong", "replica"):
                    near = found.nearest_neighbors(3, vector=query, consistency=consistency)
                    check_neighbors(near, table, "l2", query, 3)
                db.execute("INSERT INTO t VALUES (100, '[7,0.5,1]', 'x', 3) ON CONFLICT DO NOTHING")
                near = found.nearest_neighbors(1, vector=new, index="few", consistency="strong")
                assert near[0].key == "100"
            db.execute('UPDATE "S\'x"."P q" SET e = \'[3,3,3]\'')
            near = parted.nearest_neighbors(1, vector=[3, 3, 3], consistency="strong")
            assert near[0].distance == 0
            outdated = "SELECT bool_or(outdated) FROM ehub.indexes"
            assert db.execute(outdated).fetchone() == (False,)
            other.detach("t")
            other.detach("p")
            assert traces(db)[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("indexes", "metric"),
    [
        (["hnsw (e vector_cosine_ops)"], "cosine"),
        (["ivfflat (e vector_ip_ops)"], "ip"),
        (["hnsw ((e::halfvec(3)) halfvec_cosine_ops)"], "cosine"),
        (["hnsw ((e::halfvec(3)) halfvec_ip_ops) WHERE id > 5"], "ip"),
        (["hnsw ((subvector(e, 1, 2)::vector(2)) vector_cosine_ops)"], "cosine"),
        (["hnsw (e vector_cosine_ops)", "hnsw ((e::halfvec(3)) halfvec_cosine_ops)"], "cosine"),
        (["hnsw ((binary_quantize(e)::bit(3)) bit_hamming_ops)", "hnsw (e vector_ip_ops)"], "ip"),
        (["hnsw (other vector_cosine_ops)", "btree (id)"], "l2"),
        (["hnsw ((other::halfvec(3)) halfvec_cosine_ops)"], "l2"),
        ([], "l2"),
        # What cannot be understood is asked for.
        (["hnsw (e vector_l1_ops)"], "indexes are for .*vector_l1_ops"),
        (
            ["hnsw ((binary_quantize(e)::bit(3)) bit_hamming_ops)"],
            "indexes are for .*bit_hamming_ops",
        ),
        (["hnsw (e vector_l2_ops)", "hnsw (e vector_cosine_ops)"], "indexes are for cosine and l2"),
    ],
)
def test_the_metric_is_that_of_the_indexes(hub, db, indexes, metric):
    db.execute("CREATE TABLE t (id int PRIMARY KEY, e vector(3), other vector(3))")
    for index in indexes:
        db.execute(f"CREATE INDEX ON t USING {index}")
    if metric in ("l2", "cosine", "ip"):
        assert hub.attach("t", "e").metric == metric
    else:
        with pytest.raises(ehub.NotAttachableError, match=metric):
            hub.attach("t", "e")
        assert hub.attach("t", "e", metric="cosine").metric == "cosine"


def test_a_schema_is_named_in_either_way(hub, db):
    db.execute(
        'CREATE SCHEMA "Odd shop"; CREATE TABLE "Odd shop"."My items" (id int PRIMARY KEY, e vector(2))'
    )
    space = hub.attach("My items", "e", "first", schema="Odd shop")
    hub.detach(space.name)
    assert hub.attach('"Odd shop"."My items"', "e", "second").name == "second"
    with pytest.raises(ehub.NotAttachableError, match="no table 'My items'"):
        hub.attach("My items", "e", "third", schema="shop")
