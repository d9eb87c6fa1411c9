"""Attached tables that change, in ways that no log has, between two looks of a search at them."""

import threading
import time

import psycopg
import pytest

import ehub
from service.conftest import settled


@pytest.fixture
def writer(url):
    with psycopg.connect(url) as writer:
        yield writer


@pytest.fixture
def table(service, db):
    """One of two partitions; the nearest rows are all in the first one."""
    db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, m int, e vector(2)) PARTITION BY RANGE (id);"
        " CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100);"
        " CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (10000);"
        " INSERT INTO t SELECT i, i % 2, 1 - i % 2, ARRAY[i, 1]::vector"
        " FROM generate_series(0, 3000) AS i; SELECT ehub.attach('t', 'e')"
    )
    settled(db, "t")


ALTERATIONS = {
    "truncated": "TRUNCATE t1",
    "detached": "ALTER TABLE t DETACH PARTITION t1",
    "dropped": "DROP TABLE t1",
    "rewritten": "ALTER TABLE t ALTER e TYPE vector(2) USING ARRAY[3000 - id, 1]::vector",
    "written in secret": "ALTER TABLE t DISABLE TRIGGER ALL; UPDATE t SET e = '[9,9]' WHERE id < 9;"
    " ALTER TABLE t ENABLE ALWAYS TRIGGER ehub_v1_row, ENABLE ALWAYS TRIGGER ehub_v1_truncate;"
    " LOCK TABLE t",
}
SEARCHES = [
    "SELECT key FROM ehub.nearest('t', '[1,1]', 3)",
    "SELECT key FROM ehub.nearest('t', '[1,1]', 3, filter => '{\"n\": 1}')",
    "SELECT key FROM ehub.nearest_many('t', ARRAY['[1,1]'::vector], 3)",
]


@pytest.mark.parametrize("what", ALTERATIONS)
@pytest.mark.parametrize("search", SEARCHES)
def test_what_was_proposed_is_checked_as_of_the_table_that_is_read(what, search, table, db, writer):
    """A search has its candidates and waits for the table, which is another one then."""
    db.execute(search)
    writer.execute(ALTERATIONS[what])
    found = []
    searcher = threading.Thread(target=lambda: found.extend(db.execute(search).fetchall()))
    searcher.start()
    time.sleep(0.3)
    writer.commit()
    searcher.join(10)
    db.execute("SET ehub.mode = 'exact'")
    assert len(found) == 3
    assert found == db.execute(search).fetchall()


def test_a_filter_means_columns_by_the_names_that_they_have(table, db):
    """They change names, and the functions for the table are made anew, before the service looks."""
    search = SEARCHES[1]
    explain = (
        "SELECT note FROM ehub.explain_nearest('t', '[1,1]', 3, filter => '{\"n\": 1}') LIMIT 1"
    )
    db.execute("SELECT ehub.create_index('t', 'few', '{\"m\": 1}')")
    for _ in range(100):
        db.execute(search)
        if "looks among" not in db.execute(explain).fetchone()[0]:
            break
        time.sleep(0.05)
    settled(db, "t")
    with db.transaction():
        db.execute("ALTER TABLE t RENAME n TO x; ALTER TABLE t RENAME m TO n")
        db.execute("ALTER TABLE t RENAME x TO m; SELECT ehub.tend_attached()")
    assert db.execute(search).fetchall() == [("0",), ("2",), ("4",)]
    few = "SELECT key FROM ehub.nearest('t', '[1,1]', 3, index => 'few')"
    assert db.execute(few).fetchall() == [("1",), ("3",), ("5",)]


def test_a_partition_that_is_detached_concurrently(table, db, url):
    """From the moment on when others do not see it any more, which is before it is detached."""
    with psycopg.connect(url) as reader, psycopg.connect(url, autocommit=True) as detacher:
        reader.execute("SELECT count(*) FROM t")
        detaching = threading.Thread(
            target=detacher.execute, args=["ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY"]
        )
        detaching.start()
        pending = "SELECT FROM pg_inherits WHERE inhdetachpending"
        while not db.execute(pending).fetchall():
            time.sleep(0.02)
        for search in SEARCHES:
            (first, *_) = db.execute(search).fetchall()
            assert int(first[0]) in (100, 101)
        reader.rollback()
        detaching.join(10)


@pytest.mark.whole_postgres("ICU")
def test_keys_that_a_collation_takes_for_the_same(service, db, connect):
    """Keys are their bytes: an update may change one to what its own type takes for the same."""
    db.execute(
        "CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        "CREATE TABLE ci (id text COLLATE ci PRIMARY KEY, emb vector(2));"
        "INSERT INTO ci SELECT 'key' || i, ARRAY[i, 0]::real[] FROM generate_series(1, 9) i;"
        "SELECT ehub.attach('ci', 'emb')"
    )
    space = connect(index="local").get_space("ci")
    settled(db, "ci")
    space.wait_until_indexed(30)
    db.execute("UPDATE ci SET id = 'KEY3', emb = '[100,0]' WHERE id = 'key3'")

    def check():
        for query, nearest in (("[3,0]", {"key2", "key4"}), ("[100,0]", {"KEY3"})):
            for statement in (
                "SELECT key FROM ehub.nearest('ci', %s, 1)",
                "SELECT key FROM ehub.nearest_exact('ci', %s, 1)",
                "SELECT key FROM ehub.nearest_many('ci', ARRAY[%s]::vector[], 1)",
                "SELECT key FROM ehub.within('ci', %s, 200, 1, complete => false)",
            ):
                assert db.execute(statement, [query]).fetchone()[0] in nearest
            vector = [float(x) for x in query[1:-1].split(",")]
            found = space.nearest_neighbors(1, vector=vector, consistency="strong")
            assert found[0].key in nearest
        assert "KEY3" in space
        assert "key3" not in space
        with pytest.raises(ehub.KeyNotFoundError, match="key3"):
            space.get("key3")
        keys = ["KEY3", "key4"]
        assert space.multiget(keys).tolist() == [[100, 0], [4, 0]]
        assert space.distances(keys)[0].tolist() == [0, 96]
        left_out = db.execute("SELECT key FROM ehub.nearest('ci', '[100,0]', 1, ARRAY['key3'])")
        assert left_out.fetchone() == ("KEY3",)
        left_out = db.execute("SELECT key FROM ehub.nearest('ci', '[100,0]', 1, ARRAY['KEY3'])")
        assert left_out.fetchone() == ("key9",)

    check()
    settled(db, "ci")
    check()
    # Only its writing.
    db.execute("UPDATE ci SET id = 'KeY9' WHERE id = 'key9'")
    assert db.execute("SELECT key FROM ehub.nearest('ci', '[9,0]', 1)").fetchone() == ("KeY9",)
    db.execute("DELETE FROM ci WHERE id = 'kEy9'")
    assert db.execute("SELECT key FROM ehub.nearest('ci', '[9,0]', 1)").fetchone() == ("key8",)
    db.execute("SET session_replication_role = replica")
    db.execute("UPDATE ci SET id = 'KEY5', emb = '[200,0]' WHERE id = 'key5'")
    assert db.execute("SELECT key FROM ehub.nearest('ci', '[200,0]', 1)").fetchone() == ("KEY5",)
