"""Searches in Python among rows that match, by examples and ranges, against brute force."""

import contextlib
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import check_neighbors, distances, pytest_approx

import ehub

DIMS = 8
LANGUAGES = ["en", "de", "fr"]
FILTERS = {
    "half": ({"even": True}, lambda note: note.get("even") is True),
    "third": ({"lang": "en"}, lambda note: note.get("lang") == "en"),
    "few": ({"price": {"<": 2}}, lambda note: note.get("price", 99) < 2),
    "along": ({"along": True}, lambda note: note.get("along") is True),
    "two": (
        {"lang": {"in": ["en", "de"]}, "price": {">=": 10, "<": 40}},
        lambda note: note.get("lang") in ("en", "de") and 10 <= note.get("price", -1) < 40,
    ),
    "other": ({"not": {"lang": "en"}}, lambda note: note.get("lang") != "en"),
    "nothing": ({"lang": "xx"}, lambda note: False),
}


def fill(space, rows, seed=0):
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, DIMS)).astype(np.float32)
    notes = [
        {"lang": LANGUAGES[i % 3], "price": i % 100, "even": i % 2 == 0, "along": bool(v[0] > 1.5)}
        for i, v in enumerate(vectors)
    ]
    keys = [f"k{i}" for i in range(rows)]
    space.multiset(keys, vectors, notes)
    return {key: (v, note) for key, v, note in zip(keys, vectors, notes, strict=True)}


def those(table, holds):
    return {key: vector for key, (vector, note) in table.items() if holds(note)}


def known(space, matching, query, seconds=20):
    """Search until the index knows which rows match."""
    deadline = time.monotonic() + seconds
    while True:
        space.nearest_neighbors(1, vector=query, filter=matching)
        ways = space.explain_nearest(10, vector=query, filter=matching)
        if ways[0].chosen:
            return ways[0]
        assert time.monotonic() < deadline, ways
        time.sleep(0.05)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("place", ["none", "local"])
def test_filters_leave_k_rows_that_match(connect, place, metric):
    space = connect(index=place).create_space("s", DIMS, metric)
    table = fill(space, 3000)
    if place == "local":
        space.wait_until_indexed(60)
    queries = np.random.default_rng(1).standard_normal((6, DIMS)).astype(np.float32)
    for matching, holds in FILTERS.values():
        left = those(table, holds)
        for turn in ("first", "again", "known"):
            if turn == "known" and place == "local":
                assert known(space, matching, queries[0]).rows == len(left)
            for query in queries:
                found = space.nearest_neighbors(10, vector=query, filter=matching, metadata=True)
                check_neighbors(found, left, metric, query, 10, recall=0.7)
                assert all(holds(one.metadata) for one in found)
        many = space.multi_nearest_neighbors(5, vectors=queries, filter=matching)
        for query, found in zip(queries, many, strict=True):
            check_neighbors(found, left, metric, query, 5, recall=0.6)


def test_a_filter_is_right_at_once_after_every_change(connect, db):
    space = connect(index="local").create_space("s", DIMS)
    fill(space, 1000)
    space.wait_until_indexed(60)
    matching = {"lang": "new"}
    origin = np.zeros(DIMS, np.float32)
    known(space, matching, origin)
    assert space.nearest_neighbors(3, vector=origin, filter=matching) == []
    space.set("a", origin, {"lang": "new"})
    assert [one.key for one in space.nearest_neighbors(3, vector=origin, filter=matching)] == ["a"]
    # Only the metadata changes.
    space.set("k7", space.get("k7"), {"lang": "new"})
    assert len(space.nearest_neighbors(3, vector=origin, filter=matching)) == 2
    space.set("a", origin, {"lang": "old"})
    assert [one.key for one in space.nearest_neighbors(3, vector=origin, filter=matching)] == ["k7"]
    db.execute("UPDATE spaces.s SET metadata = '{\"lang\": \"new\"}' WHERE key < 'k2'")
    strong = space.nearest_neighbors(5000, vector=origin, filter=matching, consistency="strong")
    (n,) = db.execute(
        'SELECT count(*) FROM spaces.s WHERE metadata @> \'{"lang": "new"}\''
    ).fetchone()
    assert len(strong) == n
    db.execute("DELETE FROM spaces.s WHERE key = 'k7'")
    strong = space.nearest_neighbors(5000, vector=origin, filter=matching, consistency="strong")
    assert len(strong) == n - 1
    db.execute("TRUNCATE ehub_data.v1")
    assert space.nearest_neighbors(3, vector=origin, filter=matching, consistency="strong") == []


def test_sub_indexes_are_used_by_name_and_where_a_filter_implies_theirs(connect, db):
    hub = connect(index="local")
    space = hub.create_space("s", DIMS)
    table = fill(space, 3000)
    space.create_index("english", {"lang": "en"}, M=8, target_recall=0.9)
    with pytest.raises(ehub.IndexExistsError, match="english"):
        space.create_index("english", {"lang": "de"})
    (made,) = space.indexes()
    assert made[:5] == ("english", {"lang": "en"}, 8, 200, 0.9)
    space.wait_until_indexed(60)
    query = np.random.default_rng(1).standard_normal(DIMS).astype(np.float32)
    deadline = time.monotonic() + 30
    while (way := space.explain_nearest(10, vector=query, index="english")[0]).chosen is False:
        assert time.monotonic() < deadline, way
        time.sleep(0.1)
    assert "english" in way.note
    english = those(table, lambda note: note["lang"] == "en")
    check_neighbors(
        space.nearest_neighbors(10, vector=query, index="english"), english, "l2", query, 10, 0.7
    )
    assert "english" in known(space, {"lang": "en"}, query).note
    narrower = {"lang": "en", "price": {"<": 10}}
    way = known(space, narrower, query)
    assert "english" in way.note
    left = those(table, lambda note: note["lang"] == "en" and note["price"] < 10)
    check_neighbors(
        space.nearest_neighbors(10, vector=query, filter=narrower), left, "l2", query, 10
    )
    assert "english" not in known(space, {"lang": "de"}, query).note
    # It follows its rows, of which some come and some go by their metadata alone.
    space.set("k0", table["k0"][0], {"lang": "de"})
    space.set("k1", table["k1"][0], {"lang": "en"})
    english["k1"] = table["k1"][0]
    del english["k0"]
    for key in ("k0", "k1"):
        near = space.nearest_neighbors(
            1, vector=table[key][0], index="english", consistency="strong"
        )
        assert (near[0].key == key) == (key == "k1")
    v2 = space.create_version("v2", from_version="v1")
    assert [one.name for one in v2.indexes()] == ["english"]
    space.drop_index("english")
    assert space.indexes() == []
    with pytest.raises(ehub.IndexNotFoundError, match="english"):
        space.nearest_neighbors(1, vector=query, index="english")
    with pytest.raises(ehub.IndexNotFoundError, match="english"):
        space.drop_index("english")


@pytest.mark.parametrize("place", ["none", "local"])
def test_partitions_are_searched_apart(connect, place):
    hub = connect(index=place)
    space = hub.create_space("s", DIMS, partition_by="tenant")
    assert space.partition_by == "tenant"
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3000, DIMS)).astype(np.float32)
    tenants = ["large" if i % 2 else i % 50 for i in range(3000)]
    space.multiset(
        (f"k{i}", v, {"tenant": t, "n": i})
        for i, (v, t) in enumerate(zip(vectors, tenants, strict=True))
    )
    if place == "local":
        space.wait_until_indexed(60)
    query = random.standard_normal(DIMS).astype(np.float32)
    of = {t: {f"k{i}": vectors[i] for i in range(3000) if tenants[i] == t} for t in set(tenants)}
    for tenant in ("large", 0, 48):
        found = space.nearest_neighbors(10, vector=query, partition=tenant)
        check_neighbors(found, of[tenant], "l2", query, 10, 0.8)
    assert space.partitions() == {"large": 1500, **{str(t): 60 for t in range(0, 50, 2)}}
    assert space.nearest_neighbors(5, vector=query, partition="nobody") == []
    everything = {f"k{i}": v for i, v in enumerate(vectors)}
    check_neighbors(space.nearest_neighbors(10, vector=query), everything, "l2", query, 10, 0.8)
    few = {key: v for key, v in of["large"].items() if int(key[1:]) < 100}
    found = space.nearest_neighbors(10, vector=query, partition="large", filter={"n": {"<": 100}})
    check_neighbors(found, few, "l2", query, 10)
    # A row moves: at one moment it is in the one and not in the other.
    space.set("k0", vectors[0], partition="large")
    assert space.metadata("k0") == {"tenant": "large"}
    assert space.nearest_neighbors(1, vector=vectors[0], partition="large")[0].key == "k0"
    assert space.nearest_neighbors(1, vector=vectors[0], partition=0)[0].key != "k0"
    assert space.nearest_neighbors(1, key="k0", partition=0)[0].key in of[0]
    assert space.drop_partition(48) == 60
    assert space.nearest_neighbors(5, vector=query, partition="48") == []
    with pytest.raises(ehub.PartitionNotFoundError, match="'48'"):
        space.drop_partition(48)
    for row in (
        ("x", vectors[0]),
        ("x", vectors[0], {"tenant": None}),
        ("x", vectors[0], {"tenant": []}),
    ):
        with pytest.raises(ehub.InvalidMetadataError, match='"tenant", the partition'):
            space.multiset([row])
    assert "x" not in space


@pytest.mark.parametrize("place", ["none", "local"])
def test_partitions_go_by_the_text_that_postgres_gives_a_value(connect, place):
    space = connect(index=place).create_space("s", 2, partition_by="t")
    values = [
        1e20,
        1e-7,
        1.5e300,
        -0.0,
        0.1,
        10**25,
        7,
        True,
        "",
        "é'\"",
        np.int64(8),
        np.float32(0.5),
    ]
    for i, value in enumerate(values):
        space.set(f"k{i}", [i, 1], partition=value)
    if place == "local":
        space.wait_until_indexed(30)
    for i, value in enumerate(values):
        found = space.nearest_neighbors(9, vector=[0, 0], partition=value)
        assert [one.key for one in found] == [f"k{i}"], value
        # Without metadata a row keeps its own, and so its place.
        space.set(f"k{i}", [i, 2])
        space.multiset({f"k{i}": [i, 3]})
        assert space.get(f"k{i}").tolist() == [i, 3]
        assert space.drop_partition(value) == 1
    with pytest.raises(ehub.InvalidValueError, match="partition 'a', and 'b' in the metadata"):
        space.set("x", [1, 1], {"t": "b"}, partition="a")
    with pytest.raises(ehub.InvalidMetadataError, match="nothing"):
        space.set("x", [1, 1])
    with pytest.raises(ehub.InvalidValueError, match="a partition is text"):
        space.nearest_neighbors(1, vector=[1, 1], partition="\ud800")


def test_values_of_numpy_are_values(connect):
    space = connect(index="none").create_space("s", 2)
    space.set("a", [1, 1], {"n": np.int64(3), "x": np.float32(0.5)})
    assert space.metadata("a") == {"n": 3, "x": 0.5}
    found = space.nearest_neighbors(
        1, vector=[1, 1], filter={"n": np.int64(3), "x": {"<": np.float64(1)}}
    )
    assert [one.key for one in found] == ["a"]


def test_names_and_values_may_look_like_anything(connect):
    """What is special to SQL, to formats and to placeholders."""
    name, value = "te%n'ant\"{x}\\ %s", "50% {0} %s ' \\"
    hub = connect(index="local")
    space = hub.create_space("s", 2, partition_by=name)
    space.set("a", [1, 2], partition=value)
    space.wait_until_indexed(30)
    space.set("b", [1, 3], partition=value)
    found = space.nearest_neighbors(3, vector=[1, 2], partition=value, consistency="strong")
    assert [one.key for one in found] == ["a", "b"]
    plain = hub.create_space("t", 2)
    plain.create_index("i", {name.replace("\\", "\\\\"): value})
    plain.multiset([("a", [1, 2], {name: value}), ("b", [1, 3], {"x": "%s"})])
    plain.wait_until_indexed(30)
    assert known(plain, {"x": {"in": [1, "%s"]}}, [1, 2]).rows == 1
    plain.set("c", [1, 4], {name: value})
    for among in ({"index": "i"}, {"filter": {name.replace("\\", "\\\\"): value}}):
        found = plain.nearest_neighbors(3, vector=[1, 2], consistency="strong", **among)
        assert [one.key for one in found] == ["a", "c"]


def test_an_index_by_partitions_comes_back_after_a_restart(connect, db):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((600, DIMS)).astype(np.float32)
    with connect(index="local") as hub:
        space = hub.create_space("s", DIMS, partition_by="tenant")
        space.multiset((f"k{i}", v, {"tenant": i % 7}) for i, v in enumerate(vectors))
        space.wait_until_indexed(60)
    db.execute("UPDATE spaces.s SET metadata = '{\"tenant\": 8}' WHERE key = 'k0'")
    with connect(index="local") as hub:
        space = hub.get_space("s")
        space.wait_until_indexed(60)
        found = space.nearest_neighbors(5, vector=vectors[0], partition=8)
        assert [one.key for one in found] == ["k0"]
        assert len(space.nearest_neighbors(100, vector=vectors[0], partition=0)) == 85
        assert "k0" not in {
            one.key for one in space.nearest_neighbors(100, vector=vectors[0], partition=0)
        }


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("place", ["none", "local"])
def test_what_is_like_examples(connect, place, metric):
    space = connect(index=place).create_space("s", DIMS, metric)
    table = fill(space, 500)
    if place == "local":
        space.wait_until_indexed(60)

    def mean(weights):
        rows = np.stack([table[key][0].astype(np.float64) for key in weights])
        if metric == "cosine":
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return np.average(rows, axis=0, weights=list(weights.values()))

    liked, unliked = {"k1": 3.0, "k2": 1.0}, {"k3": 0.5}
    query = 2 * mean(liked) - mean(unliked)
    rest = {key: v for key, (v, _) in table.items() if key not in ("k1", "k2", "k3")}
    found = space.nearest_neighbors(10, like=liked, unlike=unliked)
    check_neighbors(found, rest, metric, query, 10, 0.9)
    rest["k3"] = table["k3"][0]
    query = mean({"k1": 1, "k2": 1})
    check_neighbors(space.nearest_neighbors(10, like=["k1", "k2"]), rest, metric, query, 10, 0.9)
    left = {key: v for key, v in rest.items() if table[key][1]["lang"] == "de"}
    found = space.nearest_neighbors(10, like=["k1", "k2"], filter={"lang": "de"})
    check_neighbors(found, left, metric, query, 10, 0.9)


@pytest.mark.parametrize("place", ["none", "local"])
def test_distances_and_everything_within_one(connect, place):
    space = connect(index=place).create_space("s", DIMS, "cosine")
    table = fill(space, 2000)
    if place == "local":
        space.wait_until_indexed(60)
    keys = ["k5", "k0", "k5", "k9"]
    rows = np.stack([table[key][0] for key in keys])
    true = np.stack([distances("cosine", row, rows) for row in rows])
    np.testing.assert_allclose(space.distances(keys), true, atol=1e-6)
    assert space.distance("k5", "k0") == pytest_approx(true[0, 1])
    whole = {key: vector for key, (vector, _) in table.items()}
    apart = dict(
        zip(whole, distances("cosine", table["k3"][0], np.stack(list(whole.values()))), strict=True)
    )
    radius = sorted(apart.values())[150] + 1e-7
    near = {key for key, distance in apart.items() if distance <= radius} - {"k3"}
    assert {one.key for one in space.within(radius, key="k3")} == near
    found = space.within(radius, key="k3", complete=False)
    assert {one.key for one in found} <= near
    assert len(found) >= 0.9 * len(near)
    assert len(space.within(radius, key="k3", limit=7)) == 7
    assert space.within(radius, vector=table["k3"][0], limit=1)[0].key == "k3"
    few = space.within(radius, key="k3", filter={"lang": "en"}, metadata=True)
    assert {one.key for one in few} == {key for key in near if table[key][1]["lang"] == "en"}
    assert few[0].metadata["lang"] == "en"
    assert space.within(-0.5, key="k3") == space.within(0, key="k3", filter={"lang": "xx"}) == []


@pytest.mark.parametrize("place", ["none", "local"])
def test_the_graph_of_all_neighbours_goes_on_where_it_was(connect, place):
    space = connect(index=place).create_space("s", DIMS)
    table = {key: vector for key, (vector, _) in fill(space, 700).items()}
    if place == "local":
        space.wait_until_indexed(60)
    told = []
    rows = space.nearest_neighbors_of_all(5, watch=lambda done, total: told.append((done, total)))
    first = [next(rows) for _ in range(300)]
    rows.close()
    rest = list(space.nearest_neighbors_of_all(5, after=first[-1][0]))
    graph = dict(first + rest)
    assert list(graph) == sorted(table)
    assert told[0] == (0, 700)
    for key, near in graph.items():
        others = {other: vector for other, vector in table.items() if other != key}
        check_neighbors(near, others, "l2", table[key], 5, 0.4)
    whole = sum(len({n.key for n in near} & truth(table, key)) for key, near in graph.items())
    assert whole >= 0.95 * 5 * 700


def truth(table, key):
    apart = distances("l2", table[key], np.stack(list(table.values())))
    return {list(table)[i] for i in np.argsort(apart)[1:6]}


BAD = {
    "operator": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, filter={"a": {"~": 1}}),
        ehub.InvalidFilterError,
        '"~"',
    ),
    "list": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, filter=["a"]),
        ehub.InvalidFilterError,
        "list",
    ),
    "not json": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, filter={"a": float("nan")}),
        ehub.InvalidFilterError,
        "JSON",
    ),
    "string and number": (
        lambda s: s.nearest_neighbors(1, key="k1", filter={"a": {"<": 1, ">": "b"}}),
        ehub.InvalidFilterError,
        "do not compare",
    ),
    "many": (
        lambda s: s.multi_nearest_neighbors(1, vectors=[[1] * DIMS], filter={"a": {"in": 3}}),
        ehub.InvalidFilterError,
        '"in"',
    ),
    "no partitions": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, partition="a"),
        ehub.InvalidValueError,
        "no partitions",
    ),
    "no partitions to set": (
        lambda s: s.set("x", [1] * DIMS, partition="a"),
        ehub.InvalidValueError,
        "no partitions",
    ),
    "no partitions to list": (lambda s: s.partitions(), ehub.InvalidValueError, "no partitions"),
    "partition": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, partition=[1]),
        ehub.InvalidValueError,
        "a partition is",
    ),
    "index": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, index="nope"),
        ehub.IndexNotFoundError,
        "'nope'",
    ),
    "index of nothing": (lambda s: s.create_index("i", {}), ehub.InvalidFilterError, "match"),
    "index's name": (lambda s: s.create_index("a b", {"a": 1}), ehub.InvalidNameError, "'a b'"),
    "index's M": (lambda s: s.create_index("i", {"a": 1}, M=1), ehub.InvalidValueError, "M is"),
    "like nothing": (lambda s: s.nearest_neighbors(1, like=[]), ehub.InvalidValueError, "empty"),
    "like a stranger": (
        lambda s: s.nearest_neighbors(1, like=["k1", "nope"]),
        ehub.KeyNotFoundError,
        "'nope'",
    ),
    "like a string": (lambda s: s.nearest_neighbors(1, like="k1"), ehub.InvalidKeyError, "'k1'"),
    "unlike alone": (
        lambda s: s.nearest_neighbors(1, vector=[1] * DIMS, unlike=["k1"]),
        ehub.InvalidValueError,
        "like=",
    ),
    "weights: nan": (
        lambda s: s.nearest_neighbors(1, like={"k1": float("nan")}),
        ehub.InvalidValueError,
        "weight",
    ),
    "weights: zero": (
        lambda s: s.nearest_neighbors(1, like={"k1": 0, "k2": 0}),
        ehub.InvalidValueError,
        "sum to zero",
    ),
    "weights: text": (
        lambda s: s.nearest_neighbors(1, like={"k1": "x"}),
        ehub.InvalidValueError,
        "'x'",
    ),
    "radius": (lambda s: s.within(float("nan"), key="k1"), ehub.InvalidValueError, "NaN"),
    "radius: text": (lambda s: s.within("far", key="k1"), ehub.InvalidValueError, "'far'"),
    "limit": (lambda s: s.within(1, key="k1", limit=0), ehub.InvalidValueError, "limit is"),
    "within of two": (
        lambda s: s.within(1, key="k1", vector=[1] * DIMS),
        ehub.InvalidValueError,
        "just one",
    ),
    "within of a stranger": (lambda s: s.within(1, key="nope"), ehub.KeyNotFoundError, "'nope'"),
    "distance": (lambda s: s.distance("k1", "nope"), ehub.KeyNotFoundError, "'nope'"),
    "distances": (lambda s: s.distances(["k1", "nope"]), ehub.KeyNotFoundError, "'nope'"),
    "distances of None": (lambda s: s.distances(None), ehub.InvalidKeyError, "None"),
    "average of a number": (lambda s: s.average(["k1"], 2), ehub.InvalidValueError, "list"),
    "average of too much": (
        lambda s: s.average(["k1"], [10**400]),
        ehub.InvalidValueError,
        "number",
    ),
    "averages by nothing": (lambda s: s.averages(""), ehub.InvalidValueError, "by is the name"),
    "distances of nothing": (lambda s: s.distances([]), ehub.InvalidValueError, "no keys"),
    "graph": (lambda s: list(s.nearest_neighbors_of_all(0)), ehub.InvalidValueError, "not 0"),
    "explain": (
        lambda s: s.explain_nearest(1, vector=[1] * DIMS, filter={"a": {"<": None}}),
        ehub.InvalidFilterError,
        "null",
    ),
}


@pytest.mark.parametrize("place", ["none", "local"])
def test_bad_input_is_named_and_changes_nothing(connect, place):
    hub = connect(index=place)
    space = hub.create_space("s", DIMS)
    fill(space, 20)
    if place == "local":
        space.wait_until_indexed(30)
    for call, error, words in BAD.values():
        with pytest.raises(error, match=words):
            call(space)
    with pytest.raises(ehub.InvalidValueError, match="partition_by"):
        hub.create_space("t", DIMS, partition_by="")
    assert len(space) == 20
    assert [one.name for one in hub.spaces()] == ["s"]


def test_fields_that_no_row_has_are_pointed_out(connect):
    space = connect(index="none").create_space("s", DIMS)
    fill(space, 20)
    ways = space.explain_nearest(3, vector=[1] * DIMS, filter={"lagn": "en", "price": 1})
    assert [way.note for way in ways if way.way == "note"] == ["no row of a sample has field lagn"]
    assert [way.chosen for way in ways if way.way == "exact"] == [True]


def test_searches_go_on_beside_a_writer(connect):
    """Selections follow while readers read: what is found matches, and nothing fails."""
    hub = connect(index="local")
    space = hub.create_space("s", DIMS)
    table = fill(space, 2000)
    space.wait_until_indexed(60)
    query = np.ones(DIMS, np.float32)
    known(space, {"lang": "en"}, query)
    stop = threading.Event()
    failed = []

    def write():
        random = np.random.default_rng(3)
        while not stop.is_set():
            keys = [f"k{i}" for i in random.choice(2000, 20, replace=False)]
            notes = [{"lang": LANGUAGES[i % 3]} for i in random.integers(0, 3, 20)]
            try:
                space.multiset(keys, random.standard_normal((20, DIMS)).astype(np.float32), notes)
            except Exception as error:
                failed.append(error)
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert len(space.nearest_neighbors(10, vector=query, filter={"lang": "en"})) == 10
    finally:
        stop.set()
        writer.join()
    assert not failed
    left = {k: v for k, v, note in space.items(metadata=True) if note["lang"] == "en"}
    found = space.nearest_neighbors(50, vector=query, filter={"lang": "en"}, consistency="strong")
    check_neighbors(found, left, "l2", query, 50, 0.9)
    assert len(table) == 2000


class Model(RuleBasedStateMachine):
    """A space with partitions, one with filters and a sub-index, and a dict beside them."""

    connect = None

    @initialize()
    def begin(self):
        self.hub = Model.connect(index="local")
        for name in ("m", "p"):
            with contextlib.suppress(ehub.SpaceNotFoundError):
                self.hub.delete_space(name)
        self.plain = self.hub.create_space("m", 2)
        self.plain.create_index("ones", {"t": 1})
        self.parted = self.hub.create_space("p", 2, partition_by="t")
        self.rows = {}
        for space in (self.plain, self.parted):
            space.wait_until_indexed(30)

    @rule(
        keys=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4, unique=True),
        t=st.integers(0, 2),
        x=st.floats(-9, 9, width=16),
        y=st.floats(-9, 9, width=16),
    )
    def put(self, keys, t, x, y):
        rows = [(key, [x + i, y], {"t": t}) for i, key in enumerate(keys)]
        for space in (self.plain, self.parted):
            space.multiset(rows)
        self.rows.update({key: (np.array(v, np.float32), note["t"]) for key, v, note in rows})

    @rule(key=st.sampled_from("abcdefgh"), t=st.integers(0, 2))
    def move(self, key, t):
        if key in self.rows:
            vector = self.rows[key][0]
            self.plain.set(key, vector, {"t": t})
            self.parted.set(key, vector, partition=t)
            self.rows[key] = vector, t

    @rule(key=st.sampled_from("abcdefgh"))
    def remove(self, key):
        if self.rows.pop(key, None) is not None:
            self.plain.delete(key)
            self.parted.delete(key)

    @rule(t=st.integers(0, 2))
    def drop(self, t):
        gone = {key for key, (_, of) in self.rows.items() if of == t}
        if gone:
            assert self.parted.drop_partition(t) == len(gone)
            self.plain.multidelete(gone)
            self.rows = {key: row for key, row in self.rows.items() if key not in gone}

    @invariant()
    def searches_find_just_what_matches(self):
        if not hasattr(self, "rows"):
            return
        query = np.array([0.5, 0.25], np.float32)
        for t in range(3):
            left = {key: v for key, (v, of) in self.rows.items() if of == t}
            answers = [
                self.plain.nearest_neighbors(9, vector=query, filter={"t": t}),
                self.parted.nearest_neighbors(9, vector=query, partition=t),
            ]
            if t == 1:
                answers.append(self.plain.nearest_neighbors(9, vector=query, index="ones"))
            for found in answers:
                check_neighbors(found, left, "l2", query, 9)
        whole = {key: v for key, (v, _) in self.rows.items()}
        check_neighbors(self.parted.nearest_neighbors(9, vector=query), whole, "l2", query, 9)


def test_a_table_of_rows_that_move(connect):
    Model.connect = staticmethod(connect)
    Model.TestCase.settings = settings(
        max_examples=8,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Model.TestCase("runTest").runTest()
