"""The index against brute force, through its public methods."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import check_neighbors

from ehub.index import HnswIndex, build_index, calibrate, tail
from ehub.types import Neighbor

METRICS = ["l2", "cosine", "ip"]
NEWEST = tail.SIZE


def neighbors(found):
    return [Neighbor(*pair) for pair in zip(*found, strict=True)]


def filled(metric="l2", rows=500, dims=8, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((rows, dims)).astype(np.float32)
    keys = [f"k{i}" for i in range(rows)]
    index = HnswIndex(dims, metric)
    index.add(keys, vectors)
    index.publish()
    return index, dict(zip(keys, vectors, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 100, 499, 500, 10_000])
def test_finds_the_nearest_with_pgvectors_distances(metric, k):
    index, table = filled(metric)
    calibrate(index, 0.99)
    queries = np.random.default_rng(1).standard_normal((20, 8)).astype(np.float32)
    for query, found in zip(queries, index.search(queries, k), strict=True):
        check_neighbors(neighbors(found), table, metric, query, k, recall=0.9)


def test_an_empty_index_answers_with_nothing():
    index = HnswIndex(3, "l2")
    assert index.search(np.ones((2, 3), np.float32), 5) == [([], []), ([], [])]
    index.publish(["unknown"])
    assert len(index) == 0


def test_queries_of_another_length_are_refused_before_hnswlib_reads_beyond_them():
    index, _ = filled()
    for bad in (np.ones((1, 7), np.float32), np.ones(8, np.float32), np.ones((1, 8))):
        with pytest.raises(ValueError, match="shape"):
            index.search(bad, 1)


def test_staged_rows_are_in_no_answer_until_all_of_them_are():
    index, table = filled(rows=100)
    query = table["k0"]
    # Nearer than anything else, and more than anybody would ask for.
    noise = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    index.add([f"new{i}" for i in range(300)], query + noise / 1000)
    (found,) = index.search(query[None], 10)
    check_neighbors(neighbors(found), table, "l2", query, 10)
    assert "new0" not in index
    index.publish(["k0"])
    (found,) = index.search(query[None], 10)
    assert all(key.startswith("new") for key in found.keys)
    assert len(index) == 399


def test_says_that_it_could_not_reach_enough_rather_than_answer_with_less():
    index = HnswIndex(2, "l2", M=2, ef_construction=4)
    index.add([str(i) for i in range(2000)], np.ones((2000, 2), np.float32))
    index.publish()
    for k in (1, 300, 1999, 2000):
        found = index.search(np.ones((1, 2), np.float32), k)
        assert found is None or len(found[0].keys) == k
        assert index.disconnected or found is not None


def test_small_indexes_that_deletions_cut_apart_still_answer_exactly():
    random = np.random.default_rng(0)
    for _ in range(20):
        index = HnswIndex(3, "l2", M=2, ef_construction=4)
        far = 1000 + random.standard_normal((150, 3)).astype(np.float32)
        keys = [str(i) for i in range(150)]
        index.add(keys, far)
        index.publish()
        gone = random.permutation(150)[:120]
        index.publish([str(i) for i in gone])
        left = {str(i): far[i] for i in set(range(150)) - set(gone.tolist())}
        (found,) = index.search(far[:1], 20)
        check_neighbors(neighbors(found), left, "l2", far[0], 20)


def test_an_outlier_is_found_by_who_has_just_added_it():
    index, table = filled(rows=3000)
    calibrate(index, 0.9)
    for i in range(200):
        far = np.full((2, 8), 100.0 + i) + [[0], [0.1]]
        index.add(["a", "b"], far.astype(np.float32))
        index.publish()
        assert index.search(far[:1].astype(np.float32), 2)[0].keys == ["a", "b"]
        index.publish(["a", "b"])
        if i % 20 == 0:
            query = table[f"k{i}"]
            (found,) = index.search(query[None], 10)
            check_neighbors(neighbors(found), table, "l2", query, 10, recall=0.5)


def test_what_is_discarded_never_appears():
    index, table = filled(rows=100)
    index.add(["k1", "new"], np.tile(table["k0"], (2, 1)))
    index.discard()
    index.publish()
    (found,) = index.search(table["k0"][None], 100)
    check_neighbors(neighbors(found), table, "l2", table["k0"], 100)
    assert index.tombstones == 2


def test_a_vector_comes_back_bit_for_bit():
    index, table = filled()
    assert index.vector("k7").tobytes() == table["k7"].tobytes()
    assert index.vector("unknown") is None


def test_tells_which_rows_differ():
    index, table = filled("cosine", rows=3)
    vectors = np.stack([table["k0"], table["k1"] + 1, table["k2"], table["k2"]])
    assert index.differing(["k0", "k1", "k2", "other"], vectors).tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_grows_beyond_its_capacity():
    index = HnswIndex(2, "l2", capacity=1)
    for start in range(0, 3000, 100):
        part = np.arange(start, start + 100, dtype=np.float32)
        index.add([str(i) for i in range(start, start + 100)], np.stack([part, part], axis=1))
        index.publish()
    (found,) = index.search(np.array([[1234.2, 1234.2]], np.float32), 3)
    assert found.keys == ["1234", "1235", "1233"]


def test_readers_and_a_writer_at_once():
    """Every answer is of one published state: all rows of a generation, or none."""
    index = HnswIndex(4, "l2")
    generation = 20
    random = np.random.default_rng(0)

    def rows(number):
        return [f"{number}:{i}" for i in range(generation)], random.standard_normal(
            (generation, 4)
        ).astype(np.float32)

    index.add(*rows(0))
    index.publish()
    wrong = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            (found,) = index.search(np.zeros((1, 4), np.float32), 2 * generation)
            numbers = {key.split(":")[0] for key in found.keys}
            if len(found.keys) != generation or len(numbers) != 1:
                wrong.append(found.keys)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 60):
        keys, vectors = rows(number)
        index.add(keys, vectors)
        index.publish([f"{number - 1}:{i}" for i in range(generation)])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


class IndexMachine(RuleBasedStateMachine):
    """Adds, replacements and deletions in any order, against a dict."""

    @initialize(
        metric=st.sampled_from(METRICS),
        seed=st.integers(0, 1000),
        newest=st.sampled_from([3, NEWEST]),
    )
    def begin(self, metric, seed, newest):
        # With few rows kept apart, the graph answers too.
        tail.SIZE = newest
        self.metric = metric
        self.random = np.random.default_rng(seed)
        self.index = HnswIndex(5, metric)
        self.table = {}
        self.staged = {}

    @rule(keys=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=12, unique=True))
    def stage(self, keys):
        vectors = self.random.standard_normal((len(keys), 5)).astype(np.float32)
        self.index.add(keys, vectors)
        self.staged.update(zip(keys, vectors, strict=True))

    @rule(keys=st.lists(st.integers(0, 30).map(str), max_size=12))
    def publish(self, keys):
        deleted = [key for key in keys if key not in self.staged]
        self.index.publish(deleted)
        for key in deleted:
            self.table.pop(key, None)
        self.table |= self.staged
        self.staged = {}

    @rule()
    def discard(self):
        self.index.discard()
        self.staged = {}

    def teardown(self):
        tail.SIZE = NEWEST

    @invariant()
    def equals_the_table(self):
        if not hasattr(self, "table"):
            return
        assert set(self.index.keys()) == set(self.table)
        query = self.random.standard_normal(5).astype(np.float32)
        (found,) = self.index.search(query[None], 5)
        check_neighbors(neighbors(found), self.table, self.metric, query, 5)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("target", [0.8, 0.95])
def test_calibration_reaches_its_target_on_queries_that_are_not_in_the_index(metric, target):
    # Few links and no structure: rows of such an index are much easier to find than others.
    rows = np.random.default_rng(0).standard_normal((6000, 32)).astype(np.float32)
    index = build_index([str(i) for i in range(6000)], rows, metric, 6, 40, target, lambda _: None)
    built = index.calibration
    assert built.recall >= target
    check_recall(index, target)
    assert sorted(map(int, index.keys())) == list(range(6000))

    # Once more as data moves, when there are only rows of the index to ask with.
    assert built.bias > 0 or target > 0.9
    calibrate(index, target)
    assert abs(index.calibration.ef - built.ef) <= 0.3 * built.ef
    check_recall(index, target)


def check_recall(index, target):
    queries = np.random.default_rng(7).standard_normal((400, 32)).astype(np.float32)
    for k in (10, 100):
        truth, _ = index.exact(queries, k)
        found = index.labels_found(queries, k, index.calibration.ef_for(k))
        recall = np.mean([len({*a} & {*b}) / k for a, b in zip(truth, found, strict=True)])
        # Both are samples, whose error is larger where recall is lower, and the rows that were
        # held out have made the index larger since.
        assert recall >= target - (1 - target) / 4


def test_calibration_tells_where_the_target_is_out_of_reach():
    random = np.random.default_rng(0)
    index = HnswIndex(64, "ip", M=2, ef_construction=4)
    index.add([str(i) for i in range(8000)], random.standard_normal((8000, 64)).astype(np.float32))
    index.publish()
    calibrate(index, 0.999)
    assert index.calibration.ef == 4096
    assert index.calibration.recall < 0.999


@pytest.mark.parametrize("rows", [0, 1, 2, 11, 12, 101])
def test_calibration_of_few_rows(rows):
    index = HnswIndex(4, "l2")
    if rows:
        vectors = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
        index.add([str(i) for i in range(rows)], vectors)
    index.publish()
    calibrate(index, 0.95)
    assert [len(one.keys) for one in index.search(np.ones((1, 4), np.float32), 10)] == [
        min(rows, 10)
    ]


@pytest.mark.parametrize("rows", [0, 1, 199, 200, 5000])
def test_a_build_holds_all_rows_and_tells_how_far_it_is(rows):
    vectors = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    told = []
    keys = [str(i) for i in range(rows)]
    index = build_index(keys, vectors, "l2", 16, 200, 0.95, told.append)
    assert sorted(index.keys()) == sorted(keys)
    for key, vector in list(zip(keys, vectors, strict=True))[::50]:
        assert index.vector(key).tobytes() == vector.tobytes()
    assert told == sorted(told)


def test_outliers_are_found_better_when_they_come_first():
    """Rows of very different lengths, as of words: the order of insertion makes the graph."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((8000, 24)) * random.lognormal(0, 0.7, (8000, 1))
    rows = rows.astype(np.float32)
    keys = [str(i) for i in range(8000)]
    plain = HnswIndex(24, "l2")
    plain.add(keys, rows)
    plain.publish()
    calibrate(plain, 0.95)
    built = build_index(keys, rows, "l2", 16, 200, 0.95, lambda _: None)
    assert built.calibration.ef < plain.calibration.ef
