"""Checkpoints: what they keep, what they cost, what they refuse."""

import threading
import time

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors

import ehub

ROWS = {f"k{i}": [i, 1, 0] for i in range(100)}


@pytest.fixture
def space(hub):
    space = hub.create_space("s", 3)
    space.multiset((key, vector, {"key": key}) for key, vector in ROWS.items())
    return space


def images(db):
    """How many images are kept, and how much room they take."""
    if db.execute("SELECT to_regclass('ehub_data.h1')").fetchone() == (None,):
        return 0, 0
    return db.execute(
        "SELECT (SELECT count(*) FROM ehub_data.h1), pg_relation_size('ehub_data.h1')"
    ).fetchone()


def contents(rows):
    return {key: (vector.tolist(), note) for key, vector, note in rows.items(metadata=True)}


def test_reads_and_restores(space, db):
    before = contents(space)
    space.checkpoint("before")
    space.multiset([("k1", [5, 5, 5], {}), ("new", [6, 6, 6], {"new": True})])
    space.multidelete(["k2", "k3"])
    db.execute("UPDATE spaces.s SET key = 'renamed' WHERE key = 'k4'")
    then = space.at("before")
    assert contents(then) == before
    assert len(then) == 100
    assert then.get("k2").tolist() == [2, 1, 0]
    assert then.metadata("k1") == {"key": "k1"}
    assert "new" not in then
    assert "k4" in then
    assert "renamed" not in then
    assert then.multiget(["k4", "k1"]).tolist() == [[4, 1, 0], [1, 1, 0]]
    assert sorted(then) == sorted(ROWS)
    with pytest.raises(ehub.KeyNotFoundError, match="'new'"):
        then.get("new")
    table = {key: np.array(row, np.float32) for key, row in ROWS.items()}
    check_neighbors(then.nearest_neighbors(7, vector=[3, 0, 1]), table, "l2", [3, 0, 1], 7)
    found = then.nearest_neighbors(2, key="k2", metadata=True)
    assert {one.key for one in found} == {"k1", "k3"}
    assert found[0].metadata == {"key": found[0].key}
    assert [
        len(row) for row in then.multi_nearest_neighbors(3, vectors=[[0, 0, 0], [1, 1, 1]])
    ] == [3, 3]
    assert space.restore("before") == (4, 2)
    assert contents(space) == before
    assert space.restore("before") == (0, 0)


def test_the_index_follows_a_restore(space):
    space.wait_until_indexed(30)
    space.checkpoint("before")
    space.multiset({"far": [900, 900, 900], "k1": [800, 800, 800]})
    assert space.nearest_neighbors(1, vector=[900, 900, 900])[0].key == "far"
    space.restore("before")
    assert space.nearest_neighbors(1, vector=[900, 900, 900])[0].key == "k99"
    assert space.nearest_neighbors(1, vector=[1, 1, 0])[0].distance == 0


def test_images_are_kept_once_and_given_back(space, db):
    space.set("k1", [9, 9, 9])
    assert images(db) == (0, 0)
    space.checkpoint("one")
    assert images(db) == (0, 0)
    for i in range(5):
        space.multiset({f"k{j}": [i, i, i] for j in range(10)})
    assert images(db)[0] == 10
    space.checkpoint("two")
    space.set("k1", [7, 7, 7])
    assert images(db)[0] == 11
    space.drop_checkpoint("one")
    assert images(db)[0] == 1
    assert space.at("two").get("k1").tolist() == [4, 4, 4]
    space.drop_checkpoint("two")
    assert images(db) == (0, 0)
    space.delete_all()
    assert images(db) == (0, 0)
    # And once more: the triggers are awake again.
    space.set("k1", [1, 2, 3])
    space.checkpoint("one")
    space.delete("k1")
    assert space.at("one").get("k1").tolist() == [1, 2, 3]


def test_dropping_the_latest_leaves_the_earlier_one_right(space):
    space.checkpoint("a")
    space.checkpoint("b")
    space.set("k1", [5, 5, 5])
    space.drop_checkpoint("b")
    space.set("k1", [6, 6, 6])
    assert space.at("a").get("k1").tolist() == [1, 1, 0]
    space.checkpoint("b")
    space.set("k1", [7, 7, 7])
    space.delete("k2")
    space.drop_checkpoint("a")
    assert space.at("b").get("k1").tolist() == [6, 6, 6]
    assert space.at("b").get("k2").tolist() == [2, 1, 0]


def test_a_key_that_goes_and_comes_is_what_it_was(space, db):
    space.checkpoint("a")
    space.delete("k1")
    space.set("k1", [8, 8, 8])
    # In one statement.
    db.execute(
        "WITH gone AS (DELETE FROM spaces.s WHERE key = 'k2' RETURNING key)"
        " INSERT INTO spaces.s (key, embedding) SELECT key, '[7,7,7]' FROM gone"
    )
    db.execute("UPDATE spaces.s SET key = 'k' || (substr(key, 2)::int + 1) WHERE key = 'k99'")
    with db.transaction():
        db.execute("INSERT INTO spaces.s (key, embedding) VALUES ('brief', '[1,1,1]')")
        db.execute("DELETE FROM spaces.s WHERE key = 'brief'")
    assert contents(space.at("a")) == {
        key: ([*map(float, row)], {"key": key}) for key, row in ROWS.items()
    }
    space.restore("a")
    assert sorted(space) == sorted(ROWS)


def test_waits_for_writers_and_holds_for_those_with_old_snapshots(space, url):
    """Who began before the checkpoint writes after it, and its images are kept all the same."""
    with psycopg.connect(url) as writer, psycopg.connect(url) as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM spaces.s")
        writer.execute("DELETE FROM spaces.s WHERE key = 'k1'")
        thread = threading.Thread(target=space.checkpoint, args=["a"])
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        writer.commit()
        thread.join()
        old.execute("DELETE FROM spaces.s WHERE key = 'k2'")
        old.execute("INSERT INTO spaces.s (key, embedding) VALUES ('late', '[1,1,1]')")
        old.commit()
        writer.execute("DELETE FROM spaces.s WHERE key = 'k3'")
        writer.commit()
    then = space.at("a")
    assert "k1" not in then
    assert {"k2", "k3"} <= set(then)
    assert "late" not in then


def test_many_writers_and_checkpoints_at_once(space, url):
    """What a checkpoint holds is what was there at one moment: sums of transfers stay the same."""
    stop, errors = threading.Event(), []

    def move(seed):
        random = np.random.default_rng(seed)
        try:
            with psycopg.connect(url) as connection:
                while not stop.is_set():
                    a, b = sorted(random.choice(20, 2, replace=False))
                    for key, by in ((a, 1), (b, -1)):
                        connection.execute(
                            "UPDATE spaces.s SET embedding = embedding + %s::vector WHERE key = %s",
                            [f"[0,{by},0]", f"k{key}"],
                        )
                    connection.commit()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=move, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for i in range(8):
        space.checkpoint(f"c{i}")
        time.sleep(0.05)
    space.drop_checkpoint("c3")
    space.drop_checkpoint("c7")
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    for one in space.checkpoints():
        then = space.at(one.name)
        assert len(then) == 100
        assert sum(vector[1] for _, vector in then.items()) == 100, one
    space.restore("c2")
    assert contents(space) == contents(space.at("c2"))


def test_a_load_makes_one_of_the_state_before(space):
    before = contents(space)
    space.multiset({"k1": [0, 0, 1], "x": [1, 1, 1]}, checkpoint="import")
    assert contents(space.at("import")) == before
    with pytest.raises(ehub.CheckpointExistsError):
        space.multiset({"y": [1, 1, 1]}, checkpoint="import")
    with pytest.raises(ehub.InvalidVectorError):
        space.multiset({"y": [1]}, checkpoint="other")
    assert "y" not in space
    assert [one.name for one in space.checkpoints()] == ["import"]


def test_is_of_the_version_that_was_current(space):
    space.checkpoint("a")
    then = space.at("a")
    space.create_version("v2")
    space.promote("v2")
    assert len(then) == 100
    assert space.checkpoints() == []
    assert [one.name for one in space.version("v1").checkpoints()] == ["a"]
    with pytest.raises(ehub.CheckpointNotFoundError):
        space.at("a")


def test_names_the_maker(space, db):
    space.checkpoint("a")
    (made,) = space.checkpoints()
    assert (made.name, made.created_by) == ("a", db.info.user)
    assert made.created_at.tzinfo is not None


def test_roles_that_do_not_see_every_row_are_refused(space, db):
    space.checkpoint("a")
    space.delete("k1")
    db.execute("CREATE ROLE ehub_test_reader")
    try:
        db.execute("SET ROLE ehub_test_reader")
        with pytest.raises(psycopg.Error, match="there is no space 's'"):
            db.execute("SELECT * FROM ehub.rows_at('s', 'a')")
        db.execute("RESET ROLE; SELECT ehub.grant('s', 'ehub_test_reader', 'read')")
        db.execute("SET ROLE ehub_test_reader")
        assert len(db.execute("SELECT * FROM ehub.rows_at('s', 'a')").fetchall()) == 100
        for denied in (
            "SELECT * FROM ehub_data.h1",
            "SELECT ehub.checkpoint('s', 'b')",
            "SELECT ehub.restore('s', 'a')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute(denied)
        db.execute(
            "RESET ROLE; ALTER TABLE ehub_data.v1 ENABLE ROW LEVEL SECURITY;"
            " CREATE POLICY part ON ehub_data.v1 USING (key <> 'k2')"
        )
        db.execute("SET ROLE ehub_test_reader")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute("SELECT * FROM ehub.rows_at('s', 'a')")
    finally:
        db.execute("RESET ROLE; DROP OWNED BY ehub_test_reader; DROP ROLE ehub_test_reader")


def test_bad_input_changes_nothing(space):
    space.checkpoint("a")
    then = space.at("a")
    for wrong, error in (
        (lambda: space.checkpoint("a"), ehub.CheckpointExistsError),
        (lambda: space.checkpoint(""), ehub.InvalidNameError),
        (lambda: space.checkpoint("a b"), ehub.InvalidNameError),
        (lambda: space.checkpoint("x" * 61), ehub.InvalidNameError),
        (lambda: space.checkpoint("a\0"), ehub.InvalidNameError),
        (lambda: space.checkpoint(None), ehub.InvalidNameError),
        (lambda: space.at("b"), ehub.CheckpointNotFoundError),
        (lambda: space.restore("b"), ehub.CheckpointNotFoundError),
        (lambda: space.drop_checkpoint("b"), ehub.CheckpointNotFoundError),
        (lambda: then.set("x", [1, 1, 1]), ehub.ReadOnlyError),
        (lambda: then.multiset({"x": [1, 1, 1]}), ehub.ReadOnlyError),
        (lambda: then.delete("k1"), ehub.ReadOnlyError),
        (lambda: then.multidelete(["k1"]), ehub.ReadOnlyError),
        (lambda: then.delete_all(), ehub.ReadOnlyError),
        (lambda: then.nearest_neighbors(1), ehub.InvalidValueError),
        (lambda: then.nearest_neighbors(0, key="k1"), ehub.InvalidValueError),
        (lambda: then.nearest_neighbors(1, vector=[1]), ehub.InvalidVectorError),
        (lambda: then.multi_nearest_neighbors(1, vectors=[]), ehub.InvalidValueError),
        (lambda: then.get("unknown"), ehub.KeyNotFoundError),
    ):
        with pytest.raises(error):
            wrong()
    assert len(space) == 100
    assert [one.name for one in space.checkpoints()] == ["a"]
    space.drop_checkpoint("a")
    with pytest.raises(ehub.CheckpointNotFoundError):
        then.get("k1")


def test_needs_the_present_state(space, db):
    space.checkpoint("a")
    db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(psycopg.Error, match="READ COMMITTED"):
        db.execute("SELECT ehub.restore('s', 'a')")
    db.execute("ROLLBACK")
