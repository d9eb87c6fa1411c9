"""Spaces as SQL sees them: views that are written and read like tables."""

import json
import uuid

import psycopg
import pytest
from oracle import table

UPSERT = (
    "INSERT INTO spaces.quickstart (key, embedding, metadata) VALUES (%s, %s, %s)"
    " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding, metadata = EXCLUDED.metadata"
)


@pytest.fixture
def space(hub):
    space = hub.create_space("quickstart", 3)
    space.multiset({"apple": [1, 0, 0], "orange": [1, 1, 0], "potato": [0, 1, 0]})
    return space


def log(db):
    rows = db.execute("SELECT keys FROM ehub.change").fetchall()
    db.execute("DELETE FROM ehub.change")
    return [keys and sorted(keys) for (keys,) in rows]


def test_a_view_takes_upserts_and_orders_by_distance(space, db):
    db.execute(UPSERT, ["pear", "[1,0.1,0]", json.dumps({"kind": "fruit"})])
    db.execute(UPSERT, ["apple", "[5,0,0]", "{}"])
    rows = db.execute(
        "SELECT key, metadata FROM spaces.quickstart ORDER BY embedding <-> '[1,0,0]' LIMIT 2"
    ).fetchall()
    assert rows == [("pear", {"kind": "fruit"}), ("orange", {})]
    assert space.get("apple").tolist() == [5, 0, 0]


def test_what_sql_writes_reaches_the_index(space, db):
    space.wait_until_indexed(30)

    def nearest():
        found = space.nearest_neighbors(10, vector=[1, 0, 0], consistency="strong")
        assert space._replica.index("quickstart") is not None
        return [one.key for one in found]

    db.execute(UPSERT, ["pear", "[1,0.1,0]", "{}"])
    assert nearest() == ["apple", "pear", "orange", "potato"]
    db.execute("UPDATE spaces.quickstart SET embedding = '[9,9,9]' WHERE key = 'apple'")
    assert nearest() == ["pear", "orange", "potato", "apple"]
    db.execute("UPDATE spaces.quickstart SET key = 'plum' WHERE key = 'orange'")
    assert nearest() == ["pear", "plum", "potato", "apple"]
    db.execute("DELETE FROM spaces.quickstart WHERE key IN ('pear', 'plum')")
    assert nearest() == ["potato", "apple"]
    db.execute(
        "MERGE INTO spaces.quickstart AS t USING (VALUES ('fig', '[1,0,0]'::vector)) AS s (key, v)"
        " ON t.key = s.key WHEN NOT MATCHED THEN INSERT (key, embedding) VALUES (s.key, s.v)"
    ) if db.info.server_version >= 170000 else db.execute(UPSERT, ["fig", "[1,0,0]", "{}"])
    assert nearest() == ["fig", "potato", "apple"]
    (version,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
    with db.cursor().copy(f"COPY ehub_data.v{version} (key, embedding) FROM STDIN") as copy:
        copy.write("copied\t[1,0.5,0]\n")
    assert nearest() == ["fig", "copied", "potato", "apple"]
    db.execute(f"TRUNCATE ehub_data.v{version}")
    assert space.nearest_neighbors(10, vector=[1, 0, 0], consistency="strong") == []


def test_the_log_names_the_keys_that_changed_and_no_others(space, db):
    log(db)
    db.execute(UPSERT, ["pear", "[1,0.1,0]", "{}"])
    assert log(db) == [["pear"]]
    db.execute("UPDATE spaces.quickstart SET key = 'plum' WHERE key = 'pear'")
    assert log(db) == [["pear", "plum"]]
    db.execute("UPDATE spaces.quickstart SET embedding = '[1,2,3]' WHERE key < 'p'")
    assert log(db) == [["apple", "orange"]]
    db.execute("DELETE FROM spaces.quickstart WHERE key = 'nope'")
    db.execute("UPDATE spaces.quickstart SET key = key WHERE false")
    assert log(db) == []
    with pytest.raises(ZeroDivisionError), db.transaction():
        db.execute(UPSERT, ["rolled back", "[1,2,3]", "{}"])
        raise ZeroDivisionError
    assert log(db) == []
    db.execute("DELETE FROM spaces.quickstart WHERE key = 'plum'")
    assert log(db) == [["plum"]]


def test_large_statements_are_logged_in_parts(space, db):
    log(db)
    db.execute(
        "INSERT INTO spaces.quickstart SELECT i::text, '[1,2,3]' FROM generate_series(1, 25000) i"
    )
    parts = log(db)
    assert len(parts) == 3
    assert sorted(key for part in parts for key in part) == sorted(map(str, range(1, 25_001)))


def test_a_write_inside_a_savepoint_is_logged_under_the_transaction(space, db):
    log(db)
    with db.transaction():
        (top,) = db.execute("SELECT pg_current_xact_id()::text").fetchone()
        with db.transaction():
            db.execute(UPSERT, ["pear", "[1,0.1,0]", "{}"])
    assert db.execute("SELECT xid::text FROM ehub.change").fetchall() == [(top,)]


def test_a_writer_needs_rights_on_its_space_and_none_on_the_log(space, db):
    role = f"writer_{uuid.uuid4().hex}"
    db.execute(f"CREATE ROLE {role}")
    try:
        db.execute("SELECT ehub.grant('quickstart', %s, 'write')", [role])
        log(db)
        with db.transaction():
            db.execute(f"SET LOCAL ROLE {role}")
            db.execute(UPSERT, ["pear", "[1,0.1,0]", "{}"])
            for statement in (
                "TRUNCATE ehub_data.v1",
                "SELECT * FROM ehub.change",
                "INSERT INTO ehub.change VALUES (1, NULL, '{x}')",
                "SELECT ehub.create_space('other', 3)",
                "SELECT ehub.delete_space('quickstart')",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
                    db.execute(statement)
        assert log(db) == [["pear"]]
    finally:
        db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_spaces_are_made_and_deleted_in_transactions(hub, db):
    with pytest.raises(ZeroDivisionError), db.transaction():
        db.execute("SELECT ehub.create_space('gone', 3)")
        raise ZeroDivisionError
    assert hub.spaces() == []
    db.execute("SELECT ehub.create_space('kept', 3, 'cosine', target_recall => 0.9)")
    space = hub.get_space("kept")
    space.set("a", [1, 2, 3])
    with pytest.raises(ZeroDivisionError), db.transaction():
        db.execute("SELECT ehub.delete_space('kept')")
        raise ZeroDivisionError
    assert table(db, "kept").keys() == {"a"}
    db.execute("SELECT ehub.delete_space('kept')")
    assert hub.spaces() == []
    left = "SELECT relname FROM pg_class WHERE relnamespace::regnamespace::text ~ '^(spaces|ehub_data)$'"
    assert db.execute(left).fetchall() == []
    for name in ("space", "version", "index", "change", "replica"):
        assert db.execute(f"SELECT count(*) FROM ehub.{name}").fetchone() == (0,)


def test_names_that_need_quotes_work_everywhere(hub, db):
    for name in ("Upper", "with-dash", "with.dot", "1st", "select", "_", "x" * 40):
        space = hub.create_space(name, 2)
        space.multiset({"a": [1, 2], "b": [2, 1]})
        assert [one.key for one in space.nearest_neighbors(1, key="a")] == ["b"]
        assert db.execute(f'SELECT count(*) FROM spaces."{name}"').fetchone() == (2,)
    assert len(hub.spaces()) == 7


def test_the_view_of_a_users_own_blocks_deletion_and_says_so(hub, db):
    space = hub.create_space("a", 3)
    space.set("x", [1, 2, 3])
    db.execute("CREATE VIEW public.mine AS SELECT key FROM spaces.a")
    with pytest.raises(Exception, match="depend") as raised:
        hub.delete_space("a")
    assert type(raised.value).__name__ == "DatabaseError"
    assert len(space) == 1


def test_an_index_of_pgvectors_own_does_not_make_exact_searches_approximate(hub, db):
    space = hub.create_space("a", 2)
    space.multiset((str(i), [i, i]) for i in range(300))
    db.execute("CREATE INDEX ON ehub_data.v1 USING hnsw ((embedding::vector(2)) vector_l2_ops)")
    plan = db.execute(
        "EXPLAIN SELECT key, 0.0 + (embedding <-> '[1,1]') AS d FROM spaces.a ORDER BY d, key LIMIT 3"
    ).fetchall()
    assert "hnsw" not in str(plan).lower()
    found = db.execute("SELECT key FROM ehub.nearest_exact('a', '[7,7]', 3)").fetchall()
    assert found == [("7",), ("6",), ("8",)]


def test_rows_one_at_a_time(space, db):
    db.execute("SELECT ehub.set('quickstart', 'pear', '[1,0.1,0]', '{\"kind\": \"fruit\"}')")
    db.execute("SELECT ehub.set('quickstart', 'pear', '[1,0.2,0]')")
    assert db.execute("SELECT ehub.get('quickstart', 'pear')").fetchone() == ("[1,0.2,0]",)
    assert space.metadata("pear") == {"kind": "fruit"}
    db.execute("SELECT ehub.delete('quickstart', 'pear')")
    for statement, state in (
        ("SELECT ehub.get('quickstart', 'pear')", "EH008"),
        ("SELECT ehub.delete('quickstart', 'pear')", "EH008"),
        ("SELECT ehub.get('quickstart', NULL)", "EH008"),
        ("SELECT ehub.get('nowhere', 'pear')", "EH001"),
        ("SELECT ehub.set('nowhere', 'pear', '[1,2,3]')", "EH001"),
        ("SELECT ehub.set('quickstart', 'pear', '[1,2]')", "EH004"),
        ("SELECT ehub.set('quickstart', NULL, '[1,2,3]')", "EH006"),
        ("SELECT ehub.set('quickstart', 'pear', NULL)", "EH004"),
        ("SELECT ehub.set('quickstart', 'pear', '[1,2,3]', '[]')", "EH007"),
        ("SELECT ehub.nearest_many('quickstart', '{}', 1)", "EH005"),
        ("SELECT ehub.nearest_many('quickstart', ARRAY['[1,2]']::vector[], 1)", "EH004"),
        ("SELECT ehub.nearest_many('quickstart', ARRAY[NULL]::vector[], 1)", "EH004"),
        ("SELECT ehub.nearest('quickstart', '[1,2,3]', 0)", "EH005"),
        ("SELECT ehub.nearest('quickstart', '[1,2]', 1)", "EH004"),
        ("SELECT ehub.nearest('quickstart', NULL, 1)", "EH004"),
        ("SELECT ehub.nearest_to('quickstart', 'nobody', 1)", "EH008"),
    ):
        with pytest.raises(psycopg.DatabaseError) as raised:
            db.execute(statement)
        assert raised.value.sqlstate == state, statement
    assert len(space) == 3


def test_without_a_service_searches_are_exact_and_say_why(space, db):
    found = db.execute("SELECT key FROM ehub.nearest('quickstart', '[1,0.1,0]', 2)").fetchall()
    assert found == [("apple",), ("orange",)]
    assert db.execute("SELECT key FROM ehub.nearest_to('quickstart', 'apple', 1)").fetchone() == (
        "orange",
    )
    many = db.execute(
        "SELECT q, key FROM ehub.nearest_many('quickstart', ARRAY['[1,0,0]', '[0,1,0]']::vector[], 1)"
    ).fetchall()
    assert many == [(1, "apple"), (2, "potato")]
    (road,) = db.execute("SELECT in_sql FROM ehub.status").fetchone()
    assert road.startswith("exact: ")
    db.execute("SET ehub.mode = 'index'")
    with pytest.raises(psycopg.DatabaseError, match="the index cannot answer: ") as raised:
        db.execute("SELECT key FROM ehub.nearest('quickstart', '[1,0.1,0]', 2)")
    assert raised.value.sqlstate == "EH009"
