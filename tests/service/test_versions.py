"""Versions through the index service: each has its index, and a promotion is warm."""

import threading
import time

import psycopg
import pytest

import ehub
from service.conftest import settled
from service.test_nearest import literal, nearest, vectors


@pytest.fixture
def space(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir, index="service") as hub:
        space = hub.create_space("s", 8)
        space.multiset([(f"k{i}", v, {"v": 1}) for i, v in enumerate(vectors(1500))])
        second = space.create_version("v2")
        second.multiset([(f"k{i}", v, {"v": 2}) for i, v in enumerate(vectors(1500, seed=3))])
        settled(db)
        settled(db, "s@v2")
        yield space


def test_a_version_is_searched_through_its_own_index(space, db):
    db.execute("SET ehub.mode = 'index'")
    query = vectors(1, seed=9)[0]
    for address, note in (("s", 1), ("s@v1", 1), ("s@v2", 2)):
        found = nearest(db, query, 10, address)
        assert {one.metadata["v"] for one in found} == {note}
        assert [one.key for one in nearest(db, "k7", 3, address, "nearest_to")]
    assert space.version("v2").nearest_neighbors(3, key="k7")
    states = db.execute("SELECT version, index_state FROM ehub.status ORDER BY 1").fetchall()
    assert states == [("v1", "ready"), ("v2", "ready")]


def test_a_promotion_is_warm_and_no_search_notices(space, db, url):
    """Searches that may not go exact: none fails, and each answer is of one version."""
    stop, errors, seen = threading.Event(), [], set()

    def search(seed):
        query = literal(vectors(1, seed=seed)[0])
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("SET ehub.mode = 'index'")
                while not stop.is_set():
                    rows = connection.execute(
                        "SELECT n.metadata ->> 'v', i.metadata ->> 'v'"
                        " FROM ehub.nearest('s', %s, 10) AS n JOIN spaces.s AS i USING (key)",
                        [query],
                    ).fetchall()
                    answer = {note for row in rows for note in row}
                    assert len(rows) == 10
                    assert len(answer) == 1, rows
                    seen.update(answer)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=search, args=[seed]) for seed in (21, 22)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        assert space.promote("v2", wait=10).warm
        time.sleep(0.03)
        assert space.rollback().warm
        time.sleep(0.03)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen == {"1", "2"}


def test_a_restore_is_followed(space, db):
    space.checkpoint("before")
    space.multiset({"far": [50] * 8})
    settled(db)
    assert space.nearest_neighbors(1, vector=[50] * 8)[0].key == "far"
    space.restore("before")
    db.execute("SET ehub.mode = 'index'")
    assert nearest(db, [50] * 8, 1)[0].key != "far"


def test_what_is_not_kept_warm_is_searched_exactly(space, db):
    space.version("v2").keep_warm(False)
    deadline = time.monotonic() + 30
    while db.execute("SELECT count(*) FROM ehub.status WHERE version = 'v2'").fetchone() != (0,):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(nearest(db, vectors(1)[0], 10, "s@v2")) == 10
    db.execute("SET ehub.mode = 'index'")
    with pytest.raises(psycopg.Error, match="no such index yet"):
        nearest(db, vectors(1)[0], 10, "s@v2")
    assert not space.promote("v2").warm
