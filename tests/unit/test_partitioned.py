"""The partitioned index against brute force, through its public methods."""

import resource
import shutil
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import check_neighbors

from ehub.errors import IndexFileError
from ehub.index import (
    Calibration,
    IndexStore,
    PartitionedIndex,
    build_partitioned,
    partitioned,
    tail,
)
from ehub.types import Neighbor

METRICS = ["l2", "cosine", "ip"]
DIMS = 8
BUILD = {"dims": DIMS, "metric": "cosine", "m": 16, "ef_construction": 200, "partition_by": "who"}
# One with a graph, some without, and names as people make them.
SIZES = {"large": 400, "small": 60, "": 30, "Ünï ☃ 💥": 20, "a\n\t\"'/..\\": 3, "one": 1, " ": 2}


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch):
    monkeypatch.setattr(partitioned, "_LARGE", 100)
    monkeypatch.setattr(partitioned, "_SMALL", 40)


def vectors_of(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, DIMS)).astype(np.float32)


def graphs(index):
    return {name for name, rows in index.sizes().items() if rows > partitioned._LARGE}


class Table:
    """What the index must equal: vectors and partitions by key."""

    def __init__(self, sizes=None, seed=0):
        owners = [name for name, rows in (sizes or SIZES).items() for _ in range(rows)]
        np.random.default_rng(seed).shuffle(owners)
        self.rows = {
            f"ключ {i}": (vector, owner)
            for i, (vector, owner) in enumerate(
                zip(vectors_of(len(owners), seed), owners, strict=True)
            )
        }

    def columns(self, keys=None):
        keys = list(self.rows if keys is None else keys)
        vectors = [self.rows[key][0] for key in keys]
        matrix = np.stack(vectors) if keys else np.empty((0, DIMS), np.float32)
        return keys, matrix, [self.rows[key][1] for key in keys]

    def of(self, partition):
        return {
            key: vector
            for key, (vector, owner) in self.rows.items()
            if partition is None or owner == partition
        }

    def sizes(self):
        owners = [owner for _, owner in self.rows.values()]
        return {owner: owners.count(owner) for owner in owners}

    def check(self, index, query, k=5, partitions=None, recall=1.0):
        assert len(index) == len(self.rows)
        assert set(index.keys()) == set(self.rows)
        assert index.sizes() == self.sizes()
        for partition in [*self.sizes(), None, "nobody"] if partitions is None else partitions:
            (found,) = index.search(query[None], k, partition)
            neighbors = [Neighbor(*pair) for pair in zip(*found, strict=True)]
            rows = self.of(partition)
            check_neighbors(neighbors, rows, index.metric, query, k, recall)
            proposed = index.propose(query[None], k, 0, partition)
            assert (proposed.keys, proposed.as_of) == ([found.keys], index.as_of)


def filled(metric="l2", sizes=None):
    table = Table(sizes)
    index = PartitionedIndex(DIMS, metric)
    index.add(*table.columns())
    index.publish()
    return index, table


def built(metric="l2", sizes=None, told=None):
    table = Table(sizes)
    progress = (lambda _: None) if told is None else told.append
    index = build_partitioned(*table.columns(), metric, 16, 200, 0.95, progress)
    return index, table


@pytest.mark.parametrize("make", [filled, built])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 60, 10_000])
def test_finds_the_nearest_of_a_partition_and_of_all(make, metric, k):
    index, table = make(metric)
    assert graphs(index) == {"large"}
    for query in vectors_of(10, seed=1):
        table.check(index, query, k, recall=0.9)


@pytest.mark.parametrize("metric", METRICS)
def test_many_queries_at_once_are_answered_as_one_by_one(metric, monkeypatch):
    monkeypatch.setattr(partitioned, "_EXACT_BATCH", 25)
    monkeypatch.setattr(partitioned, "_QUERIES", 7)
    index, _ = filled(metric)
    queries = vectors_of(20, seed=1)
    for partition in [None, "large", "small", "nobody"]:
        together = index.search(queries, 10, partition)
        for query, found in zip(queries, together, strict=True):
            (alone,) = index.search(query[None], 10, partition)
            assert alone.keys == found.keys
            assert alone.distances == pytest.approx(found.distances, abs=1e-5)
        assert index.search(queries[:0], 10, partition) == []


def test_an_empty_index_answers_with_nothing():
    index = PartitionedIndex(3, "l2")
    for partition in (None, "nobody"):
        assert index.search(np.ones((2, 3), np.float32), 5, partition) == [([], []), ([], [])]
    index.publish(["unknown"], as_of=7)
    assert (len(index), index.sizes(), index.tombstones, index.memory) == (0, {}, 0, 0)
    assert index.propose(np.ones((1, 3), np.float32), 5)[:2] == ([[]], 7)
    assert index.calibration.recall == 1


def test_vectors_of_another_length_are_refused():
    index, _ = filled()
    for bad in (np.ones((1, 7), np.float32), np.ones(8, np.float32), np.ones((1, 8))):
        with pytest.raises(ValueError, match="shape"):
            index.search(bad, 1, "small")
        with pytest.raises(ValueError, match="shape"):
            index.add(["key"], bad, ["small"])
    with pytest.raises(ValueError, match="zip"):
        index.add(["key", "other"], vectors_of(2), ["small"])


def test_over_all_a_wider_search_finds_no_less():
    index, table = filled(sizes={"a": 1500, "b": 1500, "c": 50})
    for query in vectors_of(10, seed=1):
        exact = index.propose(query[None], 10, 2000)
        assert set(exact.keys[0]) == set(
            sorted(table.rows, key=lambda key: np.linalg.norm(table.rows[key][0] - query))[:10]
        )
        assert len(index.propose(query[None], 10, 3, "a").keys[0]) == 10


@pytest.mark.parametrize("metric", METRICS)
def test_a_vector_comes_back_bit_for_bit_wherever_it_has_been(metric):
    index, table = filled(metric)
    before = {key: index.vector(key).tobytes() for key in table.rows}
    if metric != "cosine":
        assert before == {key: vector.tobytes() for key, (vector, _) in table.rows.items()}
    # To the other side of the limits and back.
    small, large = list(table.of("small")), list(table.of("large"))
    for moved, to in ((large[:100], "small"), (large[100:], ""), (small, "")):
        for key in moved:
            table.rows[key] = (table.rows[key][0], to)
        index.add(*table.columns(moved))
        index.publish()
    assert graphs(index) == {""}
    assert {key: index.vector(key).tobytes() for key in table.rows} == before
    assert not index.differing(*table.columns()).any()
    assert index.vector("unknown") is None


def test_tells_which_rows_differ():
    index, table = filled("cosine")
    assert not index.differing(*table.columns()).any()
    large, small = list(table.of("large"))[:3], list(table.of("small"))[:3]
    keys, vectors, owners = table.columns([*large, *small, "ключ 0"])
    keys[-1] = "unknown"
    vectors[[0, 3]] += 1
    owners[1], owners[4] = "small", "nobody"
    assert index.differing(keys, vectors, owners).tolist() == [True, True, False] * 2 + [True]


def test_staged_rows_are_in_no_answer_until_all_of_them_are():
    index, table = filled()
    query = vectors_of(1, seed=1)[0]
    moved = [*list(table.of("large"))[:20], *list(table.of("small"))[:20]]
    index.add([f"new {i}" for i in range(300)], np.tile(query, (300, 1)), ["small"] * 300)
    index.add(*table.columns(moved)[:2], ["new"] * len(moved))
    table.check(index, query, recall=0.8)
    index.publish(["new 0"], as_of=3)
    for key in moved:
        table.rows[key] = (table.rows[key][0], "new")
    table.rows |= {f"new {i}": (query, "small") for i in range(300)}
    table.check(index, query, 400, recall=0.99)
    assert index.as_of == 3


def test_what_is_discarded_never_appears():
    index, table = filled()
    keys = list(table.rows)[:200]
    for owner in ("large", "small", "new"):
        index.add(keys, vectors_of(200, seed=2), [owner] * 200)
        index.discard()
        index.publish()
        table.check(index, vectors_of(1, seed=1)[0], 50, recall=0.9)
    assert graphs(index) == {"large"}


def test_partitions_come_to_have_a_graph_and_lose_it():
    index = PartitionedIndex(DIMS, "l2")
    table = Table({"a": 100})
    index.add(*table.columns())
    index.publish()
    assert index.calibration == Calibration(ef=0, ef_large=0, recall=1.0, bias=0.0)
    table.rows["more"] = (vectors_of(1, seed=1)[0], "a")
    index.add(*table.columns(["more"]))
    assert index.uncalibrated == 0
    index.publish()
    assert (index.uncalibrated, index.calibration) == (1, Calibration.untried())
    index.calibrate_graphs(0.95)
    assert (index.uncalibrated, index.calibration.recall > 0.9) == (0, True)
    for left in (41, 40, 39, 0):
        for key in list(table.rows)[left:]:
            del table.rows[key]
        index.publish(set(index.keys()) - set(table.rows))
        table.check(index, vectors_of(1, seed=2)[0], 50)
        assert (index.tombstones > 0) == (left >= 40)
    assert index.memory == 0


def test_graphs_that_changed_are_measured_again():
    index, table = built(sizes={"a": 300, "b": 300})
    assert index.uncalibrated == 0
    told = []
    index.calibrate_graphs(0.95, told.append)
    assert told == [0]
    changed = list(table.of("a"))[:61]
    index.add(changed, vectors_of(61, seed=3), ["a"] * 61)
    index.publish()
    assert index.uncalibrated == 1
    index.calibrate_graphs(0.95, told.append)
    assert (index.uncalibrated, told) == (0, [0, 0, 300])


@pytest.mark.parametrize("metric", METRICS)
def test_worn_graphs_are_rebuilt_from_their_rows_while_they_change(metric, monkeypatch):
    monkeypatch.setattr(partitioned, "_CATCH_UP", 10)
    index, table = built(metric, sizes={"a": 900, "b": 300, "c": 50})
    random = np.random.default_rng(0)
    changed = list(table.of("a"))[:300]
    table.rows |= {key: (random.standard_normal(DIMS).astype("f4"), "a") for key in changed}
    index.add(*table.columns(changed))
    index.publish()
    assert (index.worn, index.tombstones) == (1, 300)
    rounds = iter(range(3))

    def meanwhile(_):
        if next(rounds, None) is not None:
            keys = [*random.choice(list(table.of("a")), 30, replace=False)]
            table.rows |= {key: (random.standard_normal(DIMS).astype("f4"), "a") for key in keys}
            gone, moved, *_ = set(table.of("a")) - set(keys)
            del table.rows[gone]
            table.rows[moved] = (table.rows[moved][0], "b")
            index.add(*table.columns([*keys, moved]))
            index.publish([gone])

    index.compact(0.95, meanwhile)
    assert index.worn == 0
    assert index.tombstones < 150
    for query in vectors_of(5, seed=5):
        table.check(index, query, recall=0.8)
    assert not index.differing(*table.columns()).any()


def test_a_rebuild_waits_for_what_is_staged():
    index, table = built(sizes={"a": 300})
    index.publish(list(table.rows)[:100])
    index.add(["new"], vectors_of(1), ["a"])
    work = threading.Thread(target=index.compact, args=(0.95,))
    work.start()
    work.join(0.2)
    assert work.is_alive()
    index.publish()
    work.join(30)
    assert (index.tombstones, "new" in index, len(index)) == (0, True, 201)


def test_a_build_tells_how_far_it_is_and_can_be_ended():
    told = []
    index, table = built(told=told)
    assert told == sorted(told)
    assert told[-1] == len(table.rows)
    assert index.uncalibrated == 0

    class Ended(Exception):
        pass

    def end(rows):
        if rows:
            raise Ended

    with pytest.raises(Ended):
        build_partitioned(*table.columns(), "l2", 16, 200, 0.95, end)
    empty = build_partitioned([], np.empty((0, DIMS), "f4"), [], "l2", 16, 200, 0.95, told.append)
    assert (len(empty), empty.sizes()) == (0, {})


def test_says_that_a_graph_could_not_reach_enough_rather_than_answer_with_less():
    index = PartitionedIndex(2, "l2", M=2, ef_construction=4)
    index.add([str(i) for i in range(2000)], np.ones((2000, 2), np.float32), ["a"] * 2000)
    index.add(["other"], np.ones((1, 2), np.float32), ["b"])
    index.publish()
    for partition in ("a", None):
        found = index.search(np.ones((1, 2), np.float32), 1500, partition)
        assert found is None or len(found[0].keys) == 1500
        assert index.disconnected or found is not None
    assert index.search(np.ones((1, 2), np.float32), 1500, "b")[0].keys == ["other"]


def test_readers_see_a_publish_of_all_partitions_at_one_moment():
    """Every answer is of one published state, in which each key is in one partition."""
    index = PartitionedIndex(4, "l2")
    random = np.random.default_rng(0)
    keys = [str(i) for i in range(150)]

    def write(number):
        # All rows of a generation are at one place, in an order of partitions that goes round:
        # now and then one of them has a graph.
        vectors = np.full((150, 4), number) + random.standard_normal((150, 4)) / 100
        owners = [str((number + (i >= 120)) % 3) for i in range(150)]
        index.add(keys, vectors.astype(np.float32), owners)
        index.publish(as_of=number)

    write(0)
    wrong = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            found = index.propose(np.zeros((1, 4), np.float32), 200)
            if sorted(found.keys[0]) != sorted(keys):
                wrong.append(found)
            (near,) = index.search(np.zeros((1, 4), np.float32), 200)
            generations = {round(distance / 2) for distance in near.distances}
            if len(generations) != 1 or len(near.keys) != 150:
                wrong.append(generations)
            sizes = index.sizes()
            if sorted(sizes.values()) != [30, 120]:
                wrong.append(sizes)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 40):
        write(number)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


class PartitionedMachine(RuleBasedStateMachine):
    """Adds, moves and deletions in any order, against a dict."""

    @initialize(
        metric=st.sampled_from(METRICS),
        seed=st.integers(0, 1000),
        newest=st.sampled_from([3, tail.SIZE]),
    )
    def begin(self, metric, seed, newest):
        self.limits = partitioned._LARGE, partitioned._SMALL, tail.SIZE
        # So low that partitions get graphs and lose them; and graphs answer for themselves.
        partitioned._LARGE, partitioned._SMALL, tail.SIZE = 8, 4, newest
        self.random = np.random.default_rng(seed)
        self.index = PartitionedIndex(DIMS, metric)
        self.table = Table({"a": 0})
        self.staged = {}

    @rule(
        keys=st.lists(st.integers(0, 40).map(str), min_size=1, max_size=15, unique=True),
        owners=st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    )
    def stage(self, keys, owners):
        keys = [key for key in keys if key not in self.staged]
        vectors = self.random.standard_normal((len(keys), DIMS)).astype(np.float32)
        partitions = [owners[i % len(owners)] for i in range(len(keys))]
        self.index.add(keys, vectors, partitions)
        self.staged |= dict(zip(keys, zip(vectors, partitions, strict=True), strict=True))

    @rule(keys=st.lists(st.integers(0, 40).map(str), min_size=1, max_size=15, unique=True))
    def move(self, keys):
        keys = [key for key in keys if key in self.table.rows and key not in self.staged]
        moved = {key: (self.table.rows[key][0], str(self.random.choice([*"abc"]))) for key in keys}
        if moved:
            self.index.add(keys, *self.table.columns(keys)[1:2], [moved[key][1] for key in keys])
            self.staged |= moved

    @rule(keys=st.lists(st.integers(0, 40).map(str), max_size=30))
    def publish(self, keys):
        self.index.publish(set(keys))
        for key in keys:
            self.table.rows.pop(key, None)
        self.table.rows |= self.staged
        self.staged = {}

    @rule()
    def discard(self):
        self.index.discard()
        self.staged = {}

    @rule()
    def look_after(self):
        self.index.calibrate_graphs(0.95)
        if not self.staged:
            self.index.compact(0.95)
            assert self.index.worn == 0

    @invariant()
    def equals_the_table(self):
        if hasattr(self, "table"):
            query = self.random.standard_normal(DIMS).astype(np.float32)
            self.table.check(self.index, query)
            assert not self.index.differing(*self.table.columns()).any()

    def teardown(self):
        if hasattr(self, "limits"):
            partitioned._LARGE, partitioned._SMALL, tail.SIZE = self.limits


TestPartitionedMachine = PartitionedMachine.TestCase
TestPartitionedMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def store(tmp_path):
    store = IndexStore(tmp_path / "folder")
    assert store.own()
    yield store
    store.release()


@pytest.mark.parametrize("sizes", [{}, {"one": 1}, {"large": 101}, SIZES])
@pytest.mark.parametrize("fork", [True, False])
def test_what_is_saved_is_what_is_loaded(store, sizes, fork, monkeypatch):
    if not fork:
        monkeypatch.setattr("ehub.index.store._fork", lambda _: None)
    table = Table(sizes) if sizes else Table({"nobody": 0})
    index = PartitionedIndex(DIMS, "cosine")
    index.add(*table.columns())
    index.publish()
    gone = list(table.rows)[1:4]
    index.publish(gone)
    for key in gone:
        del table.rows[key]
    index.calibrate_graphs(0.95)
    manifest = store.begin_save(index, BUILD, "5:7:6")()
    assert store.manifest() == manifest
    assert (manifest.rows, manifest.calibration) == (len(index), index.calibration)
    again = store.load(manifest)
    assert isinstance(again, PartitionedIndex)
    assert (again.calibration, again.tombstones) == (index.calibration, index.tombstones)
    assert (again.uncalibrated, again.memory) == (index.uncalibrated, index.memory)
    query = vectors_of(1, seed=1)[0]
    table.check(again, query, recall=0.9)
    assert not again.differing(*table.columns()).any()
    for partition in ["small", "", "nobody"]:
        assert again.search(query[None], 20, partition) == index.search(query[None], 20, partition)
    # And it can be changed, and saved once more.
    owners = ["large"] * 60 + ["new"] * 60
    table.rows |= {
        f"new {i}": row for i, row in enumerate(zip(vectors_of(120, 2), owners, strict=True))
    }
    again.add(*table.columns(f"new {i}" for i in range(120)))
    again.publish()
    table.check(store.load(store.begin_save(again, BUILD, "6:7:6")()), query, recall=0.9)
    graphs_there = {path.suffix for path in store.folder.iterdir()}
    assert graphs_there <= {"", ".json", ".keys", ".vectors", ".partitions", ".hnsw"}
    assert len([*store.folder.glob("*.keys")]) == 1


def test_changes_after_the_save_began_are_not_in_it(store):
    index, table = filled("cosine")
    finish = store.begin_save(index, BUILD, "5:7:6")
    index.add([f"later {i}" for i in range(500)], vectors_of(500), ["small"] * 500)
    index.publish(list(table.rows)[:300])
    table.check(store.load(finish()), vectors_of(1, seed=1)[0], recall=0.9)


@pytest.mark.parametrize("suffix", ["hnsw", "keys", "vectors", "partitions"])
def test_damage_is_found_before_the_file_is_believed(store, suffix):
    index, _ = filled("cosine", {"a": 150, "b": 120, "c": 20})
    manifest = store.begin_save(index, BUILD, "5:7:6")()
    paths = [*store.folder.glob(f"*.{suffix}")]
    assert len(paths) == (2 if suffix == "hnsw" else 1)
    for path in paths:
        data = path.read_bytes()
        for position in np.linspace(0, len(data) - 1, 10).astype(int):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(IndexFileError, match="damaged"):
                store.load(manifest)
        for size in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            with pytest.raises(IndexFileError, match="damaged"):
                store.load(manifest)
        path.unlink()
        with pytest.raises(IndexFileError, match="cannot be read"):
            store.load(manifest)
        path.write_bytes(data)
    assert len(store.load(manifest)) == 290


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("sizes", [{"a": 5000}, {f"{i}": 100 for i in range(50)}])
def test_a_full_disk_is_noticed_and_keeps_what_was_saved(store, sizes, fork, monkeypatch):
    index, table = filled("cosine")
    manifest = store.begin_save(index, BUILD, "5:7:6")()
    files = sorted(store.folder.iterdir())
    if not fork:
        monkeypatch.setattr("ehub.index.store._fork", lambda _: None)
    large, _ = filled("cosine", sizes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files cannot grow beyond this: hnswlib itself says nothing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(IndexFileError, match="disk full|cannot be written"):
            store.begin_save(large, BUILD, "9:9:")()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.manifest() == manifest
    table.check(store.load(manifest), vectors_of(1, seed=1)[0], recall=0.9)
    assert sorted(store.folder.iterdir()) == files


@pytest.mark.parametrize("fork", [True, False])
def test_a_folder_that_is_gone_is_an_error(store, fork, monkeypatch):
    if not fork:
        monkeypatch.setattr("ehub.index.store._fork", lambda _: None)
    shutil.rmtree(store.folder)
    with pytest.raises(IndexFileError, match="ended with|cannot be written"):
        store.begin_save(filled()[0], BUILD, "5:7:6")()
