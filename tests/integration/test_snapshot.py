"""Snapshots: local copies as of one instant, their forks, files and ways back."""

import contextlib
import itertools
import threading
import time

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import check_neighbors

import ehub

RANDOM = np.random.default_rng(5)
KEYS = [f"k{i}" for i in range(1500)]
VECTORS = RANDOM.standard_normal((1500, 8)).astype(np.float32)


@pytest.fixture
def space(hub):
    space = hub.create_space("items", 8)
    space.multiset(KEYS, VECTORS, [{"n": i} if i % 2 else None for i in range(1500)])
    return space


@pytest.fixture
def snapshot(space):
    snapshot = space.download_snapshot()
    yield snapshot
    snapshot.close()


def contents(rows):
    return {key: (vector.tobytes(), note) for key, vector, note in rows.items(metadata=True)}


def test_holds_all_of_one_instant(hub, space, snapshot):
    before = contents(space)
    space.set("later", [1] * 8)
    space.delete("k1")
    assert contents(snapshot) == before
    assert len(snapshot) == 1500
    assert snapshot.get("k3").tolist() == VECTORS[3].tolist()
    assert snapshot.metadata("k3") == {"n": 3}
    assert snapshot.metadata("k2") == {}
    assert snapshot.multiget(["k3", "k1"]).tolist() == VECTORS[[3, 1]].tolist()
    assert "later" not in snapshot
    assert sorted(snapshot) == sorted(KEYS)
    again = hub.get_space("items", download_snapshot=True)
    assert len(again) == 1500
    assert "later" in again
    assert repr(again) == "<Snapshot of items@v1: 1,500 rows of 8 dims>"
    assert len(hub.get_space("items", version="v1", download_snapshot=True)) == 1500


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_searches_before_and_with_its_index(hub, metric):
    space = hub.create_space("s", 8, metric)
    space.multiset(KEYS, VECTORS)
    snapshot = space.download_snapshot()
    rows = dict(zip(KEYS, VECTORS, strict=True))
    query = RANDOM.standard_normal(8)
    check_neighbors(snapshot.nearest_neighbors(10, vector=query), rows, metric, query, 10)
    snapshot.wait_until_indexed(60)
    assert snapshot._index is not None
    check_neighbors(
        snapshot.nearest_neighbors(10, vector=query), rows, metric, query, 10, recall=0.9
    )
    found = snapshot.nearest_neighbors(5, key="k7", metadata=True)
    assert "k7" not in {one.key for one in found}
    assert [one.key for one in found] == [one.key for one in space.nearest_neighbors(5, key="k7")]
    assert found[0].metadata == {}
    many = snapshot.multi_nearest_neighbors(3, vectors=VECTORS[:4], metadata=True)
    assert [row[0].key for row in many] == KEYS[:4] or metric == "ip"
    assert len(snapshot.nearest_neighbors(2000, vector=query)) == 1500


def test_arrays_and_batches(snapshot):
    keys, vectors = snapshot.numpy()
    assert vectors.shape == (1500, 8)
    assert vectors.dtype == np.float32
    assert snapshot.numpy()[1] is vectors
    with pytest.raises(ValueError, match="read-only"):
        vectors[0] = 1
    batches = list(snapshot.batches(400))
    assert [len(part) for part, _ in batches] == [400, 400, 400, 300]
    assert [key for part, _ in batches for key in part] == keys
    shuffled = list(snapshot.batches(400, shuffle=True, seed=3))
    assert [key for part, _ in shuffled for key in part] != keys
    assert sorted(key for part, _ in shuffled for key in part) == sorted(keys)
    rows = dict(zip(keys, vectors, strict=True))
    for part, matrix in shuffled:
        assert np.array_equal(matrix, [rows[key] for key in part])
    again = list(snapshot.batches(400, shuffle=True, seed=3))
    assert [part for part, _ in again] == [part for part, _ in shuffled]


def test_a_refresh_brings_what_changed_and_nothing_else(space, snapshot, db):
    snapshot.wait_until_indexed(60)
    keys, before = snapshot.numpy()
    kept = before.copy()
    space.set("new", [9] * 8, {"new": True})
    space.set("k1", [8] * 8)
    space.multidelete(["k2", "k3"])
    db.execute("UPDATE spaces.items SET metadata = '{\"n\": \"x\"}' WHERE key = 'k5'")
    assert snapshot.refresh() == (5, False)
    assert contents(snapshot) == contents(space)
    assert snapshot.nearest_neighbors(2, vector=[9] * 8)[0].key == "new"
    assert {one.key for one in snapshot.nearest_neighbors(1498, vector=[0] * 8)}.isdisjoint(
        {"k2", "k3"}
    )
    # Who has the arrays keeps what they were.
    assert np.array_equal(before, kept)
    assert len(keys) == 1500
    assert snapshot.refresh() == (0, False)
    space.set("newer", [7] * 8)
    future = snapshot.refresh(wait=False)
    assert future.result(30) == (1, False)
    assert "newer" in snapshot


def test_a_refresh_without_the_log_downloads_all(space, snapshot, db):
    space.set("new", [9] * 8)
    db.execute("DELETE FROM ehub.replica WHERE state = 'snapshot'")
    assert snapshot.refresh() == (1501, True)
    assert contents(snapshot) == contents(space)
    (version,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
    db.execute(f"TRUNCATE ehub_data.v{version}")
    assert snapshot.refresh() == (0, True)
    assert len(snapshot) == 0
    space.set("a", [1] * 8)
    assert snapshot.refresh() == (1, False)


def test_the_log_is_kept_for_it_until_it_is_closed(space, snapshot, db):
    def held():
        return db.execute("SELECT count(*) FROM ehub.replica WHERE state = 'snapshot'").fetchone()

    space.set("new", [9] * 8)
    db.execute("SELECT ehub.trim()")
    assert snapshot.refresh() == (1, False)
    assert held() == (1,)
    snapshot.close()
    snapshot.close()
    assert held() == (0,)
    assert len(snapshot) == 1501


def test_a_refresh_follows_the_name(space, snapshot):
    other = space.create_version("v2", dims=3)
    other.set("a", [1, 2, 3])
    fork = snapshot.fork()
    fork.set("mine", [1] * 8)
    space.promote("v2")
    assert snapshot.refresh() == (1, True)
    assert (snapshot.version, snapshot.dims, len(snapshot)) == ("v2", 3, 1)
    assert snapshot.nearest_neighbors(1, vector=[1, 2, 3])[0].key == "a"
    with pytest.raises(ehub.InvalidValueError, match="has 3 dims now"):
        fork.refresh()
    pinned = space.version("v1").download_snapshot()
    space.rollback()
    assert pinned.refresh() == (0, False)


def test_only_a_fork_can_be_written(snapshot):
    for write in (
        lambda: snapshot.set("x", [1] * 8),
        lambda: snapshot.multiset({"x": [1] * 8}),
        lambda: snapshot.delete("k1"),
        lambda: snapshot.multidelete(["k1"]),
        lambda: snapshot.delete_all(),
    ):
        with pytest.raises(ehub.ReadOnlyError, match="fork"):
            write()
    fork = snapshot.fork()
    fork.set("x", [1] * 8, {"x": 1})
    fork.set("k1", [2] * 8)
    fork.delete("k2")
    assert fork.writable
    assert not snapshot.writable
    assert fork.metadata("k1") == {"n": 1}
    assert len(fork) == len(snapshot) == 1500
    assert "x" not in snapshot
    assert snapshot.get("k1").tolist() == VECTORS[1].tolist()
    other = fork.fork()
    other.delete("x")
    assert "x" in fork
    fork.wait_until_indexed(60)
    fork.set("y", [3] * 8)
    assert fork.nearest_neighbors(1, vector=[3] * 8)[0].key == "y"
    assert fork.delete_all() == 1501
    assert fork.nearest_neighbors(3, vector=[3] * 8) == []


def test_writes_a_forks_changes_back(space, snapshot):
    fork = snapshot.fork()
    fork.set("x", [1] * 8, {"x": 1})
    fork.set("k1", [2] * 8)
    fork.delete("k2")
    # What somebody else did to other rows is theirs.
    space.set("k9", [9] * 8)
    space.delete("k8")
    assert fork.write_to_space("items") == (2, 1, [])
    assert space.get("x").tolist() == [1] * 8
    assert "k2" not in space
    assert space.get("k9").tolist() == [9] * 8
    assert "k8" not in space
    assert fork.write_to_space("items") == (0, 0, [])


@pytest.mark.parametrize("policy", ["error", "ours", "theirs"])
@pytest.mark.parametrize("whole", [False, True])
def test_conflicts_are_told_and_settled(space, snapshot, policy, whole):
    fork = snapshot.fork()
    for key in ("changed by both", "added by both", "added alike"):
        fork.set(key, [1] * 8)
    fork.set("k1", [1] * 8)
    fork.set("k2", [1] * 8)
    fork.delete("k3")
    fork.delete("k4")
    fork.set("only ours", [1] * 8)
    fork.refresh()
    space.set("added by both", [2] * 8)
    space.set("added alike", [1] * 8)
    space.set("k1", [2] * 8)
    space.delete("k2")
    space.set("k3", [2] * 8)
    space.delete("k4")
    space.set("only theirs", [2] * 8)
    clashes = ["added by both", "k1", "k2", "k3"] + ["only theirs"] * whole
    before = contents(space)

    def write():
        done = fork.overwrite_space if whole else fork.write_to_space
        return done("items", on_conflict=policy)

    if policy == "error":
        with pytest.raises(ehub.ConflictError, match=f"{len(clashes)} rows are neither") as error:
            write()
        assert error.value.keys == clashes
        assert contents(space) == before
        return
    assert write().conflicts == clashes
    ours = contents(fork)
    if policy == "ours":
        if not whole:
            ours |= {"only theirs": before["only theirs"]}
        assert contents(space) == ours
    else:
        for key in clashes:
            if key in before:
                assert contents(space)[key] == before[key]
            else:
                assert key not in space
        assert contents(space)["only ours"] == ours["only ours"]


def test_a_refresh_does_not_hide_conflicts(space, snapshot):
    fork = snapshot.fork()
    fork.set("k1", [1] * 8)
    space.set("k1", [2] * 8)
    space.set("k2", [2] * 8)
    fork.refresh()
    assert fork.get("k1").tolist() == [1] * 8
    assert fork.get("k2").tolist() == [2] * 8
    with pytest.raises(ehub.ConflictError) as error:
        fork.write_to_space("items")
    assert error.value.keys == ["k1"]


def test_writes_to_new_places(hub, space, snapshot):
    fork = snapshot.fork()
    fork.set("x", [1] * 8)
    assert fork.write_to_space("copy", create=True) == (1501, 0, [])
    assert contents(hub.get_space("copy")) == contents(fork)
    assert fork.write_to_version("v3") == (1501, 0, [])
    assert contents(space.version("v3")) == contents(fork)
    assert space.current.name == "v1"
    with pytest.raises(ehub.SpaceExistsError):
        fork.write_to_space("copy", create=True)
    with pytest.raises(ehub.SpaceNotFoundError):
        fork.write_to_space("nothing")
    # There everything is its own: rows that differ are in the way.
    hub.get_space("copy").set("k1", [3] * 8)
    with pytest.raises(ehub.ConflictError):
        snapshot.write_to_space("copy")
    assert snapshot.overwrite_space("copy", on_conflict="ours") == (1, 1, ["k1", "x"])
    assert contents(hub.get_space("copy")) == contents(snapshot)


def test_a_write_is_one_transaction(space, snapshot, db):
    fork = snapshot.fork()
    fork.set("x", [1] * 8)
    space.freeze()
    with pytest.raises(ehub.FrozenError):
        fork.write_to_space("items")
    with pytest.raises(ehub.FrozenError):
        fork.overwrite_space("items")
    zero = snapshot.fork()
    zero.set("zero", [0] * 8)
    space.create_version("angles", metric="cosine")
    with pytest.raises(ehub.InvalidVectorError):
        zero.write_to_version("angles")
    assert space.version("angles").rows == 0
    with pytest.raises(ehub.InvalidValueError, match="has 3 dims"):
        hub_space = space.create_version("narrow", dims=3)
        fork.write_to_space(hub_space._address)


def test_is_of_one_instant_under_writers(space, url):
    """Rows are moved in pairs all the time; no snapshot and no refresh sees half of a pair."""
    stop, errors = threading.Event(), []

    def swap():
        try:
            with psycopg.connect(url) as connection:
                n = 0
                while not stop.is_set():
                    n += 1
                    for key in ("k1", "k2"):
                        connection.execute(
                            "UPDATE spaces.items SET metadata = %s WHERE key = %s",
                            [f'{{"round": {n}}}', key],
                        )
                    connection.commit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    time.sleep(0.1)
    snapshot = space.download_snapshot()
    for _ in range(30):
        assert snapshot.metadata("k1") == snapshot.metadata("k2")
        snapshot.refresh()
    stop.set()
    thread.join()
    assert errors == []
    snapshot.refresh()
    assert contents(snapshot) == contents(space)


@pytest.mark.parametrize("suffix", ["npz", "arrow"])
def test_files_hold_it_all(hub, space, snapshot, tmp_path, suffix):
    space.multiset([("naïve ✓", [1] * 8, {"é": [None, {"a": 1.0}]}), ("\n", [2] * 8)])
    snapshot.refresh()
    path = tmp_path / f"items.{suffix}"
    snapshot.save(path)
    snapshot.save(path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    loaded = ehub.Snapshot.load(path)
    assert contents(loaded) == contents(snapshot)
    assert (loaded.space, loaded.version, loaded.metric) == ("items", "v1", "l2")
    assert loaded.nearest_neighbors(3, key="k7") == snapshot.nearest_neighbors(3, key="k7")
    for needs in (loaded.refresh, lambda: loaded.write_to_space("items")):
        with pytest.raises(ehub.ConfigurationError, match="knows no database"):
            needs()
    space.delete("k1")
    known = hub.load_snapshot(path)
    assert known.refresh() == (1501, True)
    assert "k1" not in known
    fork = hub.load_snapshot(path).fork()
    fork.set("k5", [5] * 8)
    assert fork.write_to_space("items") == (1, 0, [])


def test_other_programs_read_the_files(snapshot, tmp_path):
    import pyarrow.feather

    keys, vectors = snapshot.numpy()
    snapshot.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as parts:
        assert np.array_equal(parts["vectors"], vectors)
        text, ends = parts["keys"].tobytes(), [0, *parts["key_ends"].tolist()]
        assert [text[a:b].decode() for a, b in itertools.pairwise(ends)] == keys
    snapshot.save(tmp_path / "a.arrow")
    read = pyarrow.feather.read_table(tmp_path / "a.arrow")
    assert read.column("key").to_pylist() == keys
    assert np.array_equal(np.array(read.column("embedding").to_pylist(), np.float32), vectors)


@pytest.mark.parametrize("suffix", ["npz", "arrow"])
def test_damaged_files_are_refused(snapshot, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    snapshot.save(path)
    good = path.read_bytes()
    whole = contents(snapshot)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(place=st.integers(0, len(good) - 1), bit=st.integers(0, 7))
    def flip(place, bit):
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        # What lies between the parts of a file may be anything; what is read is right.
        with contextlib.suppress(ehub.InvalidFileError):
            assert contents(ehub.Snapshot.load(path)) == whole

    flip()
    for size in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ehub.InvalidFileError):
            ehub.Snapshot.load(path)
    for wrong in (tmp_path / f"none.{suffix}", tmp_path / "a.txt", tmp_path):
        with pytest.raises(ehub.InvalidFileError):
            ehub.Snapshot.load(wrong)
    with pytest.raises(ehub.InvalidFileError, match="cannot be written"):
        snapshot.save(tmp_path / "nowhere" / f"a.{suffix}")
    with pytest.raises(ehub.InvalidFileError, match=r"\.npz or \.arrow"):
        snapshot.save(tmp_path / "a.zip")


def test_bad_input_changes_nothing(space, snapshot):
    fork = snapshot.fork()
    before = contents(fork)
    for wrong, error in (
        (lambda: fork.set("", [1] * 8), ehub.InvalidKeyError),
        (lambda: fork.set("x", [1]), ehub.InvalidVectorError),
        (lambda: fork.set("x", [float("nan")] * 8), ehub.InvalidVectorError),
        (lambda: fork.set("x", [1] * 8, metadata=3), ehub.InvalidMetadataError),
        (lambda: fork.multiset([("x", [1] * 8), ("y", [1])]), ehub.InvalidVectorError),
        (lambda: fork.multiset({}), ehub.InvalidValueError),
        (lambda: fork.multidelete(["k1", "unknown"]), ehub.KeyNotFoundError),
        (lambda: fork.multidelete([]), ehub.InvalidValueError),
        (lambda: fork.get("unknown"), ehub.KeyNotFoundError),
        (lambda: fork.nearest_neighbors(0, key="k1"), ehub.InvalidValueError),
        (lambda: fork.nearest_neighbors(1), ehub.InvalidValueError),
        (lambda: fork.nearest_neighbors(1, vector=[1]), ehub.InvalidVectorError),
        (lambda: fork.multi_nearest_neighbors(1, vectors=[]), ehub.InvalidValueError),
        (lambda: list(fork.batches(0)), ehub.InvalidValueError),
        (lambda: fork.write_to_space("items", on_conflict="mine"), ehub.InvalidValueError),
        (lambda: fork.write_to_version("a@b"), ehub.InvalidNameError),
    ):
        with pytest.raises(error):
            wrong()
    assert contents(fork) == before == contents(space)


def test_roles_with_fewer_rights(space, db, url):
    """A reader refreshes too; who sees only some rows downloads those, each time anew."""
    db.execute(
        "CREATE ROLE ehub_test_reader LOGIN PASSWORD 'x';"
        " SELECT ehub.grant('items', 'ehub_test_reader', 'read')"
    )
    try:
        conninfo = psycopg.conninfo.make_conninfo(url, user="ehub_test_reader", password="x")
        with ehub.connect(conninfo, index="none") as hub:
            snapshot = hub.get_space("items").download_snapshot()
            space.set("k1", [1] * 8)
            assert snapshot.refresh() == (1, False)
            with pytest.raises(ehub.AccessDeniedError):
                snapshot.overwrite_space("items", on_conflict="ours")
            db.execute("SELECT ehub.grant('items', 'ehub_test_reader', 'write')")
            fork = snapshot.fork()
            fork.set("k2", [4] * 8)
            assert fork.write_to_space("items") == (1, 0, [])
            db.execute(
                "ALTER TABLE ehub_data.v1 ENABLE ROW LEVEL SECURITY;"
                " CREATE POLICY part ON ehub_data.v1 TO ehub_test_reader USING (key < 'k2')"
            )
            space.set("k999", [1] * 8)
            assert snapshot.refresh().whole
            assert "k999" not in snapshot
            assert all(key < "k2" for key in snapshot)
    finally:
        db.execute("DROP OWNED BY ehub_test_reader; DROP ROLE ehub_test_reader")
