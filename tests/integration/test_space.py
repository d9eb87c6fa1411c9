"""The Python interface, before there is an index and with it, against brute force."""

import numpy as np
import pytest
from oracle import check_neighbors

import ehub

METRICS = ["l2", "cosine", "ip"]
FRUIT = {"apple": [1, 0, 0], "orange": [1, 1, 0], "potato": [0, 1, 0], "chicken": [-1, -1, 0]}


@pytest.fixture(params=["none", "local"])
def place(request):
    """Who answers: Postgres alone, or an index of this process."""
    return request.param


@pytest.fixture
def make(connect, place):
    """Make a space with rows in it, with its index ready where there is one."""
    hub = connect(index=place)

    def make(rows, dims=3, **options):
        space = hub.create_space("fruit", dims, **options)
        if rows:
            space.multiset(rows)
        if place == "local":
            space.wait_until_indexed(30)
        return space

    return make


def test_sets_gets_and_deletes(make):
    space = make(FRUIT)
    assert space.get("apple").tolist() == [1, 0, 0]
    assert space.get("apple").dtype == np.float32
    space.set("apple", np.array([2, 0, 0]))
    assert space.multiget(["potato", "apple", "potato"]).tolist() == [
        [0, 1, 0],
        [2, 0, 0],
        [0, 1, 0],
    ]
    assert len(space) == 4
    assert "apple" in space
    assert "pear" not in space
    space.delete("apple")
    assert "apple" not in space
    assert space.multidelete(["orange", "potato", "orange"]) == 2
    assert sorted(space.keys()) == list(space) == ["chicken"]
    assert space.delete_all() == 1
    assert len(space) == 0
    assert list(space.items()) == []
    assert space.nearest_neighbors(3, vector=[1, 2, 3]) == []
    assert space


def test_metadata_stays_until_it_is_given_anew(make):
    space = make({})
    space.set("pear", [1, 0.1, 0], metadata={"kind": "fruit", "prices": [1, None, "é"]})
    space.set("pear", [1, 0.2, 0])
    space.multiset([("pear", [1, 0.3, 0]), ("fig", [0, 0, 1], {"kind": "fig"})])
    assert space.metadata("pear") == {"kind": "fruit", "prices": [1, None, "é"]}
    assert dict((k, m) for k, _, m in space.items(metadata=True)) == {
        "pear": space.metadata("pear"),
        "fig": {"kind": "fig"},
    }
    space.set("fig", [0, 0, 1], metadata={})
    assert space.metadata("fig") == {}
    found = space.nearest_neighbors(2, vector=[1, 0, 0], metadata=True)
    assert [one.metadata for one in found] == [space.metadata("pear"), {}]
    assert [one.metadata for one in space.nearest_neighbors(2, vector=[1, 0, 0])] == [None, None]


@pytest.mark.parametrize("form", ["mapping", "pairs", "triples", "arrays", "arrays and metadata"])
def test_multiset_takes_many_forms(make, form):
    space = make({"old": [9, 9, 9], "apple": [5, 5, 5]})
    keys, vectors = list(FRUIT), np.array(list(FRUIT.values()), np.float64)
    notes = [{"n": i} for i in range(4)]
    n = {
        "mapping": lambda: space.multiset(FRUIT),
        "pairs": lambda: space.multiset(iter(FRUIT.items())),
        "triples": lambda: space.multiset(zip(keys, vectors, notes, strict=True)),
        "arrays": lambda: space.multiset(keys, vectors),
        "arrays and metadata": lambda: space.multiset(keys, vectors, metadata=notes),
    }[form]()
    assert n == 4
    assert space.multiget(keys).tolist() == vectors.tolist()
    assert len(space) == 5
    if form in ("triples", "arrays and metadata"):
        assert space.metadata("potato") == {"n": 2}


def test_of_a_key_that_comes_twice_the_last_counts(make):
    space = make({})
    rows = [(f"k{i % 7}", [i, 0, 0], {"i": i} if i % 2 else None) for i in range(12_000)]
    assert space.multiset(rows) == 7
    assert sorted(space.get(f"k{i}")[0] for i in range(7)) == list(range(11_993, 12_000))


def test_a_large_iterator_is_streamed(make):
    space = make({}, dims=4)
    pulled = []

    def rows():
        for i in range(30_000):
            pulled.append(i)
            yield f"row {i}", [i, i, i, 1]

    assert space.multiset(rows()) == len(pulled) == 30_000
    seen = 0
    for key, vector in space.items():
        assert vector.tolist()[0] == int(key.split()[1])
        seen += 1
        if seen == 5000:
            # Reading on while another connection writes, and stopping half way.
            space.set("another", [1, 2, 3, 4])
            break
    assert len(space) == 30_001


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 299, 300, 1000])
def test_neighbours_equal_brute_force(make, metric, k):
    random = np.random.default_rng(0)
    table = {f"k{i}": v for i, v in enumerate(random.standard_normal((300, 12)).astype("f4"))}
    space = make(table, dims=12, metric=metric, target_recall=0.99)
    query = random.standard_normal(12)
    check_neighbors(space.nearest_neighbors(k, vector=query), table, metric, query, k, 0.9)
    queries = random.standard_normal((5, 12))
    batch = space.multi_nearest_neighbors(k, vectors=queries)
    for one, found in zip(queries, batch, strict=True):
        check_neighbors(found, table, metric, one, k, 0.9)
    others = {key: vector for key, vector in table.items() if key != "k7"}
    found = space.nearest_neighbors(k, key="k7")
    check_neighbors(found, others, metric, table["k7"], k, 0.9)


def test_a_key_is_left_out_of_its_own_neighbours_also_among_equals(make):
    space = make({f"same{i}": [1, 1, 1] for i in range(5)})
    found = space.nearest_neighbors(3, key="same2")
    assert len(found) == 3
    assert "same2" not in [one.key for one in found]


def test_batches_with_metadata_keep_their_rows_apart(make):
    space = make([(key, vector, {"of": key}) for key, vector in FRUIT.items()])
    batch = space.multi_nearest_neighbors(
        2, vectors=[[1, 0, 0], [0, 1, 0], [-1, -1, 0]], metadata=True
    )
    assert [[one.key for one in found][0] for found in batch] == ["apple", "potato", "chicken"]
    assert all(one.metadata == {"of": one.key} for found in batch for one in found)


def test_keys_may_be_any_text(make):
    strange = [
        "'; DROP TABLE x; --",
        'a"b',
        "naïve ключ 鍵 🗝",
        " ",
        "a\nb\tc",
        "$$",
        "%s",
        "\\",
        "{}",
    ]
    space = make({key: [i, 0, 1] for i, key in enumerate(strange)})
    assert sorted(space.keys()) == sorted(strange)
    for i, key in enumerate(strange):
        assert space.get(key)[0] == i
        assert space.nearest_neighbors(1, vector=[i, 0, 1])[0].key == key
        space.nearest_neighbors(2, key=key, metadata=True)
        space.delete(key)


def test_a_hub_lists_finds_and_deletes_spaces(hub):
    assert hub.spaces() == []
    made = hub.create_space("b", 4, "cosine", M=8, ef_construction=50, target_recall=0.9)
    hub.create_space("a", dims=3)
    assert [(s.name, s.dims, s.metric) for s in hub.spaces()] == [
        ("a", 3, "l2"),
        ("b", 4, "cosine"),
    ]
    found = hub.get_space("b")
    assert (found.M, found.ef_construction, found.target_recall) == (8, 50, 0.9)
    assert "b" in repr(found)
    hub.delete_space("b")
    with pytest.raises(KeyError):
        hub.get_space("b")
    for call in (
        lambda: made.get("x"),
        lambda: made.set("x", [1, 2, 3, 4]),
        lambda: made.multiset({"x": [1, 2, 3, 4]}),
        lambda: made.nearest_neighbors(1, vector=[1, 2, 3, 4]),
        lambda: made.nearest_neighbors(1, key="x"),
        lambda: len(made),
        lambda: list(made.keys()),
        lambda: made.wait_until_indexed(1),
        lambda: hub.delete_space("b"),
    ):
        with pytest.raises(ehub.SpaceNotFoundError, match="'b'"):
            call()


def test_a_handle_follows_a_space_that_was_made_anew(hub):
    space = hub.create_space("a", 3)
    space.multiset(FRUIT)
    space.wait_until_indexed(30)
    hub.delete_space("a")
    hub.create_space("a", 2, "cosine")
    space.set("x", [1, 1])
    assert space.dims == 2
    assert [one.key for one in space.nearest_neighbors(5, vector=[1, 0])] == ["x"]


def test_a_closed_hub_says_so(connect):
    hub = connect()
    space = hub.create_space("a", 3)
    space.nearest_neighbors(1, vector=[1, 2, 3])
    hub.close()
    hub.close()
    for call in (lambda: space.get("x"), lambda: space.nearest_neighbors(1, vector=[1, 2, 3])):
        with pytest.raises(ehub.UnavailableError, match="closed"):
            call()
