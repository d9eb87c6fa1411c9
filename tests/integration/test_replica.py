"""How an index of this process follows the database."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors, table

import ehub

ROWS = {f"k{i}": v for i, v in enumerate(np.random.default_rng(0).standard_normal((400, 8)))}

# How many replicas of the server sleep until the bell rings.
SLEEPS = """
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@pytest.fixture
def space(hub):
    space = hub.create_space("s", 8)
    space.multiset(ROWS)
    space.wait_until_indexed(30)
    # The first save is what later starts begin from.
    until(lambda: (copy := space._replica._meant["s"]).job is None and not copy.unsaved)
    return space


def keys(space, vector, k=1, **options):
    return [one.key for one in space.nearest_neighbors(k, vector=vector, **options)]


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers_from_index(space):
    return space._replica.index(space.name) is not None


def status(db):
    cursor = db.execute("SELECT * FROM ehub.status")
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def test_searches_are_exact_until_the_index_is_ready(hub):
    space = hub.create_space("s", 8)
    space.multiset(ROWS)
    table = {key: np.float32(vector) for key, vector in ROWS.items()}
    check_neighbors(space.nearest_neighbors(7, vector=[1] * 8), table, "l2", [1] * 8, 7)
    space.wait_until_indexed(30)
    assert answers_from_index(space)


def test_a_client_sees_its_own_writes_at_once(space):
    for i in range(50):
        vector = np.full(8, 100.0 + i)
        space.set("mine", vector)
        assert keys(space, vector) == ["mine"]
        space.delete("mine")
        assert keys(space, vector) != ["mine"]
        space.multiset({"a": vector, "b": vector + 0.1})
        assert keys(space, vector, 2) == ["a", "b"]
        space.multidelete(["a", "b"])
    assert answers_from_index(space)


def test_so_does_another_handle_of_the_same_client(hub, space):
    for i in range(20):
        space.set("mine", [200.0 + i] * 8)
        assert keys(hub.get_space("s"), [200.0 + i] * 8) == ["mine"]


def test_strong_reads_see_what_anybody_committed_before(space, db):
    for i in range(50):
        db.execute(
            "INSERT INTO spaces.s VALUES ('theirs', %s) ON CONFLICT (key)"
            " DO UPDATE SET embedding = EXCLUDED.embedding",
            [str([500.0 + i] * 8)],
        )
        found = space.nearest_neighbors(1, vector=[500.0 + i] * 8, consistency="strong")
        assert found == [("theirs", 0.0, None)]


def test_so_do_those_with_a_filter_that_the_index_does_not_know(space, db):
    stop = threading.Event()

    def work():
        # So that whoever follows the database is late.
        while not stop.is_set():
            sum(range(1000))

    db.execute("SET ehub.doorbell = off")
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(20):
            db.execute(
                "INSERT INTO spaces.s VALUES ('theirs', %s, '{\"n\": 1}') ON CONFLICT (key)"
                " DO UPDATE SET embedding = EXCLUDED.embedding",
                [str([500.0 + i] * 8)],
            )
            found = space.nearest_neighbors(
                1, vector=[500.0 + i] * 8, filter={"n": {"<": 2 + i}}, consistency="strong"
            )
            assert found == [("theirs", 0.0, None)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_transaction_shows_all_at_once_and_only_when_it_commits(space, url):
    """Two rows that always move together are never seen apart, and never uncommitted."""
    stop = threading.Event()

    def write():
        with psycopg.connect(url) as writer:
            i = 0
            while not stop.is_set():
                i += 1
                for key in ("left", "right"):
                    writer.execute(
                        "INSERT INTO spaces.s VALUES (%s, %s) ON CONFLICT (key)"
                        " DO UPDATE SET embedding = EXCLUDED.embedding",
                        [key, str([1000.0 + i % 7] * 8)],
                    )
                writer.commit() if i % 3 else writer.rollback()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: keys(space, [1000] * 8)[0] in ("left", "right"))
        for _ in range(2000):
            near = space.nearest_neighbors(2, vector=[1000] * 8)
            assert {one.key for one in near} == {"left", "right"}
            assert near[0].distance == near[1].distance
    finally:
        stop.set()
        thread.join()


def test_the_bell_is_rung_for_sleepers_only(space, db, url):
    with psycopg.connect(url, autocommit=True) as ear:
        ear.execute("LISTEN ehub")

        def write(i):
            db.execute("UPDATE spaces.s SET embedding = %s WHERE key = 'k0'", [str([i] * 8)])

        until(lambda: db.execute(SLEEPS).fetchone() == (1,))
        write(1)
        assert [n.payload for n in ear.notifies(timeout=1, stop_after=1)] == [""]
        # Awake: hundreds of writes ring a few times at most, as it dozes off in between.
        for i in range(300):
            write(i)
        assert len(list(ear.notifies(timeout=0.2))) < 60
        until(lambda: space.nearest_neighbors(1, vector=[299] * 8)[0].distance == 0)
        db.execute("SET ehub.doorbell = off")
        until(lambda: db.execute(SLEEPS).fetchone() == (1,))
        list(ear.notifies(timeout=0.1))
        write(0)
        assert list(ear.notifies(timeout=0.2)) == []
        # The next poll finds it.
        until(lambda: space.nearest_neighbors(1, vector=[0] * 8)[0].distance == 0)


def test_a_transaction_that_stays_open_hides_nothing_of_the_others(space, db, url):
    with psycopg.connect(url) as slow:
        slow.execute("INSERT INTO spaces.s VALUES ('slow', %s)", [str([50] * 8)])
        for i in range(20):
            db.execute("INSERT INTO spaces.s VALUES (%s, %s)", [f"fast{i}", str([60 + i] * 8)])
            assert keys(space, [60 + i] * 8, consistency="strong") == [f"fast{i}"]
        assert keys(space, [50] * 8, consistency="strong") != ["slow"]
        slow.commit()
        assert keys(space, [50] * 8, consistency="strong") == ["slow"]


def test_a_lock_on_one_space_does_not_hold_up_another(hub, space, db, url):
    other = hub.create_space("other", 2)
    other.multiset({"a": [1, 1]})
    other.wait_until_indexed(30)
    with psycopg.connect(url) as slow:
        slow.execute("INSERT INTO spaces.s VALUES ('x', %s)", [str([50] * 8)])
        slow.commit()
        slow.execute("TRUNCATE ehub_data.v1")
        db.execute("INSERT INTO spaces.other VALUES ('b', '[2,2]')")
        until(lambda: keys(other, [2, 2]) == ["b"])
        slow.rollback()
    assert keys(space, [50] * 8, consistency="strong") == ["x"]


def test_a_restart_loads_the_saved_index_and_catches_up(connect, space, db, caplog):
    space._replica.close()
    before = status(db)[0]
    db.execute("INSERT INTO spaces.s VALUES ('later', %s)", [str([70] * 8)])
    db.execute("DELETE FROM spaces.s WHERE key = 'k1'")
    assert status(db)[0]["lag"] == 2
    again = connect().get_space("s")
    states = []
    again.wait_until_indexed(30, watch=lambda progress: states.append(progress.state))
    assert ehub.State.BUILDING not in states
    assert keys(again, [70] * 8) == ["later"]
    assert again._index(True).index.tombstones == 1
    assert len(again._index(True).index) == 400
    assert status(db)[0]["place"] == before["place"]
    assert not caplog.records


@pytest.mark.parametrize("damage", ["graph", "keys", "manifest", "missing", "cut", "parameters"])
def test_a_damaged_index_file_is_built_anew_and_says_so(connect, space, data_dir, damage, caplog):
    space._replica.close()
    (manifest,) = data_dir.glob("indexes/*/*/manifest.json")
    (graph,) = manifest.parent.glob("*.hnsw")
    (names,) = manifest.parent.glob("*.keys")
    if damage == "missing":
        graph.unlink()
    elif damage == "cut":
        graph.write_bytes(graph.read_bytes()[:-1])
    elif damage == "parameters":
        text = json.loads(manifest.read_text())
        text["manifest"]["watermark"] = "5:5:"
        manifest.write_text(json.dumps(text))
    else:
        path = {"graph": graph, "keys": names, "manifest": manifest}[damage]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    again = connect().get_space("s")
    again.wait_until_indexed(30)
    rows = {key: np.float32(vector) for key, vector in ROWS.items()}
    check_neighbors(again.nearest_neighbors(5, vector=[1] * 8), rows, "l2", [1] * 8, 5)
    assert "building the index anew" in caplog.text


def test_a_state_that_the_database_does_not_know_is_compared(connect, space, db, caplog):
    """As after a failover or a restored backup: the acknowledgement is another one."""
    space._replica.close()
    db.execute("UPDATE ehub.replica SET nonce = gen_random_uuid()")
    db.execute("INSERT INTO spaces.s VALUES ('later', %s)", [str([70] * 8)])
    db.execute("DELETE FROM spaces.s WHERE key = 'k1'")
    db.execute("UPDATE spaces.s SET embedding = %s WHERE key = 'k2'", [str([80] * 8)])
    # Nothing in the log tells of it.
    db.execute("DELETE FROM ehub.change")
    again = connect().get_space("s")
    again.wait_until_indexed(30)
    index = again._index(True).index
    assert set(index.keys()) == set(table(db, "s"))
    assert keys(again, [80] * 8, 2) == ["k2", "later"]
    # Compared, not built: only what differed was touched.
    assert index.tombstones == 2


def test_a_state_that_is_lost_while_running_is_compared(space, db, caplog):
    db.execute("UPDATE ehub.replica SET nonce = gen_random_uuid()")
    with db.transaction():
        db.execute("INSERT INTO spaces.s VALUES ('unlogged', %s)", [str([70] * 8)])
        db.execute("DELETE FROM ehub.change WHERE 'unlogged' = ANY (keys)")
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^LISTEN'"
        " AND datname = current_database()"
    )
    until(lambda: keys(space, [70] * 8) == ["unlogged"] and answers_from_index(space))
    assert "not the state it knew" in caplog.text


def test_one_that_is_behind_the_trimmed_log_rebuilds(connect, space, db, caplog):
    space._replica.close()
    db.execute("UPDATE ehub.replica SET expires_at = now() - interval '1 second'")
    db.execute("INSERT INTO spaces.s VALUES ('later', %s)", [str([70] * 8)])
    assert db.execute("SELECT ehub.trim() > 0").fetchone() == (True,)
    again = connect().get_space("s")
    again.wait_until_indexed(30)
    assert keys(again, [70] * 8) == ["later"]
    assert len(again._index(True).index) == 401


def test_the_log_is_kept_for_those_who_need_it_and_no_longer(space, db):
    db.execute("INSERT INTO spaces.s VALUES ('later', %s)", [str([70] * 8)])
    db.execute("SELECT ehub.trim()")
    # The saved state is older than that row.
    assert db.execute("SELECT count(*) FROM ehub.change WHERE 'later' = ANY(keys)").fetchone() == (
        1,
    )
    space._replica.close()
    db.execute("SELECT ehub.trim()")
    assert db.execute("SELECT count(*) FROM ehub.change").fetchone() == (0,)


def test_one_space_at_rest_does_not_hold_the_log_of_another(hub, space, db):
    busy = hub.create_space("busy", 8)
    busy._replica.follow("busy")
    busy.wait_until_indexed(30)
    busy.multiset({f"b{i}": [i] * 8 for i in range(50)})
    hub.close()
    db.execute(
        "UPDATE ehub.replica AS r SET expires_at = now() - interval '1 s' FROM ehub.index AS i"
        " JOIN ehub.catalogue AS c ON c.version_id = i.version_id"
        " WHERE i.id = r.index_id AND c.space = 'busy'"
    )
    before = db.execute(
        "SELECT min(pg_snapshot_xmin(watermark)::text) FROM ehub.replica"
    ).fetchone()
    assert before[0] is not None
    db.execute("SELECT ehub.trim()")
    assert db.execute("SELECT count(*) FROM ehub.change").fetchone() == (0,)


def test_tombstones_lead_to_a_rebuild_while_searches_go_on(space, db):
    for i in range(4):
        db.execute("UPDATE spaces.s SET embedding = embedding + %s::vector", [str([i + 1.0] * 8)])
        assert keys(space, table(db, "s")["k5"], consistency="strong") == ["k5"]
    until(lambda: (i := space._index(False)) is not None and i.index.tombstones < 200)
    assert set(space._index(True).index.keys()) == set(table(db, "s"))


def test_a_large_backlog_is_applied_beside_the_searches(space, db):
    rows = [f"('n{i}', '{[i, *[0] * 7]}')" for i in range(20_000)]
    db.execute(f"INSERT INTO spaces.s VALUES {','.join(rows)}")
    # Strong reads do not wait for it; they are exact.
    started = time.monotonic()
    assert keys(space, [19_999, *[0] * 7], consistency="strong") == ["n19999"]
    assert time.monotonic() - started < 5
    space.wait_until_indexed(60)
    assert len(space._index(True).index) == 20_400


def test_two_processes_share_a_folder_and_one_saves(connect, space, db, url, data_dir):
    script = (
        "import ehub, sys\n"
        "hub = ehub.connect(sys.argv[1], data_dir=sys.argv[2])\n"
        "space = hub.get_space('s')\n"
        "space.wait_until_indexed(30)\n"
        "space.set('other', [90] * 8)\n"
        "print(space.nearest_neighbors(1, vector=[90] * 8)[0].key, flush=True)\n"
        "input()\n"
        "hub.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, url, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "other\n"
        assert keys(space, [90] * 8, consistency="strong") == ["other"]
        rows = status(db)
        assert sorted(row["index_state"] for row in rows) == ["ready", "ready"]
        assert sum(re.search(r" process \d+$", row["place"]) is not None for row in rows) == 1
        process.communicate("\n")
    assert process.returncode == 0
    # One that leaves without a file leaves nothing.
    assert len(status(db)) == 1
    assert len(list(data_dir.glob("indexes/*/*/*.hnsw"))) == 1


def test_a_deleted_space_takes_its_files_with_it(hub, space, data_dir):
    assert list(data_dir.glob("indexes/*/*"))
    until(lambda: list(data_dir.glob("indexes/*/*/*.hnsw")))
    hub.delete_space("s")
    assert not list(data_dir.glob("indexes/*/*/*.hnsw"))


def test_status_tells_rows_index_lag_memory_and_recall(space, db):
    (row,) = status(db)
    assert (row["space"], row["rows"], row["dims"], row["metric"]) == ("s", 400, 8, "l2")
    assert (row["index_state"], row["indexed_rows"], row["lag"]) == ("ready", 400, 0)
    assert row["recall"] >= row["target_recall"] == 0.95
    assert row["ef"] >= 10
    assert row["memory"] > 400 * 8 * 4
    assert row["last_error"] is None


def test_waiting_ends_when_told(hub):
    space = hub.create_space("s", 64)
    space.multiset(
        [str(i) for i in range(20_000)], np.random.default_rng(0).standard_normal((20_000, 64))
    )
    seen = []
    with pytest.raises(TimeoutError, match="was not ready in 0.05 seconds"):
        space.wait_until_indexed(0.05)
    space.wait_until_indexed(120, watch=seen.append)
    building = [one for one in seen if one.state is ehub.State.BUILDING and one.total]
    assert building
    assert all(0 <= one.done <= one.total == 20_000 for one in building)


def test_no_index_can_be_made_where_nothing_can_be_written(url, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with ehub.connect(url, data_dir=blocked) as hub:
        space = hub.create_space("s", 2)
        space.set("a", [1, 2])
        # Exact answers go on; the reason is told.
        assert keys(space, [1, 2]) == ["a"]
        with pytest.raises(ehub.EhubError, match="no index can be made: open: .*file"):
            space.wait_until_indexed()
        assert keys(space, [1, 2]) == ["a"]


def test_the_metric_decides_what_a_saved_index_is_for(hub, space, data_dir):
    """Folders are named by numbers that no other index of the database ever has."""
    hub.delete_space("s")
    again = hub.create_space("s", 8, "cosine")
    again.multiset(ROWS)
    again.wait_until_indexed(30)
    assert len([path for path in data_dir.glob("indexes/*/*") if (path / "id").exists()]) == 2
    assert Path(data_dir, "indexes").is_dir()


def test_a_job_that_is_late_keeps_no_folder_that_was_given_up(space):
    """A space may be deleted while its index is about to be opened."""
    copy = space._replica._meant["s"]
    copy.drop(delete=False)
    assert copy._submit("open", copy._open)
    assert copy.join(10)
    assert copy.store._lock is None


def test_closing_waits_for_no_lock_of_somebody_elses(connect, db, url):
    hub = connect()
    space = hub.create_space("s", 2)
    space.multiset({"a": [1, 2], "b": [3, 4]})
    space.wait_until_indexed(30)
    with psycopg.connect(url) as other:
        # The one makes a build necessary, and the other keeps it from reading the table.
        db.execute("TRUNCATE ehub_data.v1")
        other.execute("TRUNCATE ehub_data.v1")
        deadline = time.monotonic() + 30
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND wait_event_type = 'Lock'"
        while db.execute(waiting).fetchone() != (1,):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = time.monotonic()
        hub.close()
        # It would wait for half a minute.
        assert time.monotonic() - started < 15
