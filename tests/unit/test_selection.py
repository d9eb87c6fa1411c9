"""Selections of an index against brute force: which rows match changes with every publish."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import check_neighbors

from ehub.index import HnswIndex, Members, calibrate, selection, tail
from ehub.types import Neighbor

METRICS = ["l2", "cosine", "ip"]


def neighbors(found):
    return [Neighbor(*pair) for pair in zip(*found, strict=True)]


def filled(metric, rows=4000, dims=8):
    vectors = np.random.default_rng(0).standard_normal((rows, dims)).astype(np.float32)
    keys = [f"k{i}" for i in range(rows)]
    index = HnswIndex(dims, metric)
    index.add(keys, vectors)
    index.publish()
    calibrate(index, 0.95)
    index.settle()
    return index, dict(zip(keys, vectors, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01, 0.0])
def test_finds_the_nearest_that_match(metric, gathered, share):
    index, table = filled(metric)
    keys = [key for i, key in enumerate(table) if (i * 7919) % 1000 < share * 1000]
    vectors = np.stack([table[key] for key in keys]) if keys else np.empty((0, 8), np.float32)
    index.publish(selections={"s": Members([], keys, vectors if gathered else None)})
    assert len(index.selections()["s"]) == len(keys)
    queries = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    matching = {key: table[key] for key in keys}
    plan = index.plan(10, "s")
    assert plan.rows == len(keys)
    for k in (1, 10, 200):
        singles = [index.search(query[None], k, "s")[0] for query in queries]
        for found in (singles, index.search(queries, k, "s")):
            for query, one in zip(queries, found, strict=True):
                check_neighbors(neighbors(one), matching, metric, query, k, recall=0.7)
    proposed = index.propose(queries[:1], 10, selection="s")
    assert len(proposed.keys[0]) == min(10, len(keys))
    assert set(proposed.keys[0]) <= set(keys)


def test_a_selection_that_lies_apart_is_compared_where_it_can_be(monkeypatch):
    """The graph finds none of its rows near the other ones: with their vectors all are compared."""
    monkeypatch.setattr(selection, "_ROWS_A_CANDIDATE", 1)
    index, table = filled("l2")
    ahead = sorted(table, key=lambda key: table[key][0])[-1500:]
    far = np.array([[-3, *[0] * 7]], np.float32)
    matching = {key: table[key] for key in ahead}
    index.publish(selections={"s": Members([], ahead)})
    for _ in range(30):
        found = index.search(far, 10, "s")
        if found is not None:
            check_neighbors(neighbors(found[0]), matching, "l2", far[0], 10, 0.9)
    assert index.selections()["s"].starved
    monkeypatch.setattr(selection, "_MOST_FETCHED", 100)
    assert not index.selections()["s"].comparable
    vectors = np.stack([table[key] for key in ahead])
    index.publish(selections={"s": Members([], ahead, vectors)})
    check_neighbors(neighbors(index.search(far, 10, "s")[0]), matching, "l2", far[0], 10)


def test_rows_far_from_the_origin_are_told_apart():
    vectors = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32) + 5000
    keys = [f"k{i}" for i in range(2000)]
    index = HnswIndex(8, "l2")
    index.add(keys, vectors)
    index.publish(selections={"s": Members(keys[:50], keys[50:1500], vectors[50:1500])})
    table = dict(zip(keys[:1500], vectors, strict=False))
    for query in vectors[-20:]:
        found = index.search(query[None], 10, "s")
        check_neighbors(neighbors(found[0]), table, "l2", query, 10)


def test_what_a_publish_does_not_name_is_a_selection_no_more():
    index, table = filled("l2", rows=50)
    index.publish(selections={"a": Members([], ["k1"]), "b": Members([], ["k2", "unknown"])})
    assert {name: len(one) for name, one in index.selections().items()} == {"a": 1, "b": 1}
    index.publish(selections={"a": Members([])})
    assert index.search(np.ones((1, 8), np.float32), 5, "b") is None
    assert [found.keys for found in index.search(np.ones((1, 8), np.float32), 5, "a")] == [["k1"]]
    index.deselect()
    assert index.selections() == {}
    assert index.plan(5, "a") is None
    assert index.propose(np.ones((1, 8), np.float32), 5, selection="a") is None
    assert len(table) == 50


class Machine(RuleBasedStateMachine):
    """Rows and which of them match, beside a dict."""

    @initialize(metric=st.sampled_from(METRICS), newest=st.sampled_from([2, tail.SIZE]))
    def begin(self, metric, newest):
        self.size, tail.SIZE = tail.SIZE, newest
        self.metric, self.index, self.rows = metric, HnswIndex(2, metric), {}
        self.staged = {}

    @rule(
        key=st.sampled_from("abcdefghij"),
        x=st.integers(-9, 9),
        y=st.integers(1, 9),
        matches=st.booleans(),
    )
    def put(self, key, x, y, matches):
        if key not in self.staged:
            self.index.add([key], np.array([[x, y]], np.float32))
            self.staged[key] = np.array([x, y], np.float32), matches

    @rule(
        deleted=st.sets(st.sampled_from("abcdefghij"), max_size=3),
        turned=st.sets(st.sampled_from("abcdefghij"), max_size=3),
        anew=st.sampled_from([None, "bare", "gathered"]),
    )
    def publish(self, deleted, turned, anew):
        deleted -= self.staged.keys()
        turned = {key for key in turned - deleted - self.staged.keys() if key in self.rows}
        self.rows |= self.staged
        self.rows |= {key: (self.rows[key][0], not self.rows[key][1]) for key in turned}
        for key in deleted:
            self.rows.pop(key, None)
        changed = {*deleted, *turned, *self.staged}
        matching = {key for key, (_, matches) in self.rows.items() if matches}
        others = vectors = None
        if anew or "s" not in self.index.selections():
            others = sorted(matching - changed)
            if anew == "gathered":
                vectors = np.array([self.rows[key][0] for key in others], np.float32).reshape(-1, 2)
        members = Members(matching & changed, others, vectors)
        self.index.publish(deleted, None, changed, {"s": members})
        self.staged = {}

    @rule()
    def discard(self):
        self.index.discard()
        self.staged = {}

    @invariant()
    def finds_what_matches(self):
        if not hasattr(self, "rows") or "s" not in self.index.selections():
            return
        matching = {key: vector for key, (vector, matches) in self.rows.items() if matches}
        query = np.array([[0.5, 2.5]], np.float32)
        assert len(self.index.selections()["s"]) == len(matching)
        for k in (2, 10):
            found = self.index.search(query, k, "s")
            check_neighbors(neighbors(found[0]), matching, self.metric, query[0], k)

    def teardown(self):
        tail.SIZE = getattr(self, "size", tail.SIZE)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
