"""Distances, ranges and examples in SQL, against numpy; and what is no such question."""

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors, distances, pytest_approx

import ehub

DIMS = 4
KEYS = [f"k{i}" for i in range(60)]
ROWS = dict(
    zip(KEYS, np.random.default_rng(1).standard_normal((60, DIMS)).astype(np.float32), strict=True)
)


@pytest.fixture(params=["l2", "cosine", "ip"])
def metric(request):
    return request.param


@pytest.fixture
def space(db, metric):
    make(db, metric)
    return metric


def make(db, metric):
    db.execute("SELECT ehub.create_space('s', %s, %s)", [DIMS, metric])
    for i, (key, row) in enumerate(ROWS.items()):
        db.execute(
            "INSERT INTO spaces.s VALUES (%s, %s, jsonb_build_object('i', %s::int))",
            [key, str(row.tolist()), i],
        )


def examples(db, *arguments):
    (vector,) = db.execute(
        "SELECT ehub.example_query('s', %s, %s, %s, %s)::real[]", arguments
    ).fetchone()
    return np.array(vector)


def mean(metric, keys, weights=None):
    rows = np.stack([ROWS[key] for key in keys]).astype(np.float64)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.average(rows, axis=0, weights=weights)


def test_distances_of_pairs(db, space):
    for a, b in (("k0", "k1"), ("k1", "k0"), ("k3", "k3")):
        (found,) = db.execute("SELECT ehub.distance('s', %s, %s)", [a, b]).fetchone()
        assert found == pytest_approx(distances(space, ROWS[a], ROWS[b][None])[0])
    asked = ["k5", "k2", "k9", "k2", "k0"]
    found = db.execute("SELECT * FROM ehub.distances('s', %s)", [asked]).fetchall()
    # In the order in which they were asked for, each key once.
    once = ["k5", "k2", "k9", "k0"]
    pairs = [(a, b) for i, a in enumerate(once) for b in once[i + 1 :]]
    assert [(a, b) for a, b, _ in found] == pairs
    for a, b, distance in found:
        assert distance == pytest_approx(distances(space, ROWS[a], ROWS[b][None])[0])
    assert db.execute("SELECT * FROM ehub.distances('s', '{k1}')").fetchall() == []


def test_everything_within_a_radius(db, space):
    query = ROWS["k7"] * 1.1
    far = distances(space, query, np.stack(list(ROWS.values())))
    for radius in (-1e9, float(np.median(far)), 1e9, "Infinity", "-Infinity"):
        true = [(d, k) for d, k in zip(far, KEYS, strict=True) if d <= float(radius)]
        for complete in (True, False):
            found = db.execute(
                "SELECT key, distance FROM ehub.within('s', %s, %s, complete => %s)",
                [str(query.tolist()), radius, complete],
            ).fetchall()
            assert [key for key, _ in found] == [key for _, key in sorted(true)]
            some = db.execute(
                "SELECT key FROM ehub.within('s', %s, %s, 4, leave_out => '{k7}',"
                ' filter => \'{"i": {"<": 30}}\', complete => %s)',
                [str(query.tolist()), radius, complete],
            ).fetchall()
            few = [k for _, k in sorted(true) if int(k[1:]) < 30 and k != "k7"]
            assert [key for (key,) in some] == few[:4]


def test_neighbours_of_examples(db, space):
    for likes, unlikes, weights, unlike_weights in (
        (["k1"], None, None, None),
        (["k1", "k2", "k3"], None, None, None),
        (["k1", "k2", "k3"], None, [3, 1, 0], None),
        (["k1", "k1", "k3"], None, None, None),
        (["k1", "k2"], ["k4"], None, None),
        (["k1", "k2"], ["k4", "k5"], [1.0, 0.5], [2.0, 1e-3]),
        (["k1", "k2"], [], None, []),
    ):
        expected = mean(space, likes, weights)
        if unlikes:
            expected = 2 * expected - mean(space, unlikes, unlike_weights)
        found = examples(db, likes, unlikes, weights, unlike_weights)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        near = db.execute(
            "SELECT key, distance, metadata FROM ehub.nearest_like("
            "'s', %s, 10, %s, %s, %s, '{\"i\": {\"<\": 40}}')",
            [likes, unlikes, weights, unlike_weights],
        ).fetchall()
        rest = {
            key: row
            for key, row in ROWS.items()
            if key not in [*likes, *(unlikes or [])] and int(key[1:]) < 40
        }
        check_neighbors([ehub.Neighbor(*one) for one in near], rest, space, found, 10)


BAD = [
    ("ehub.distance('s', 'k1', 'nope')", "EH008", "no key 'nope'"),
    ("ehub.distance('s', 'k1', NULL)", "EH008", "no key"),
    ("ehub.distance('none', 'k1', 'k2')", "EH001", "no space 'none'"),
    ("ehub.distances('s', '{k1,nope}')", "EH008", "no key 'nope'"),
    ("ehub.distances('s', '{k1,NULL}')", "EH008", "no key"),
    ("ehub.distances('s', '{}')", "EH005", "no keys were given"),
    ("ehub.distances('s', NULL)", "EH005", "no keys were given"),
    ("ehub.within('s', '[1,1,1,1]', 'NaN')", "EH005", "a distance is a number, not NaN"),
    ("ehub.within('s', '[1,1,1,1]', NULL)", "EH005", "a distance is a number, not NULL"),
    ("ehub.within('s', '[1,1,1,1]', 1, 0)", "EH005", "is a number from 1"),
    ("ehub.within('s', '[1,1]', 1)", "EH004", "4 dims is needed"),
    ("ehub.within('s', '[1,1,1,1]', 1, partition => 'p')", "EH005", "has no partitions"),
    ("ehub.within('s', '[1,1,1,1]', 1, index => 'i')", "EH022", "has no index 'i'"),
    ("ehub.nearest_like('s', '{nope}', 1)", "EH008", "no key 'nope'"),
    ("ehub.nearest_like('s', '{k1}', 1, '{nope}')", "EH008", "no key 'nope'"),
    ("ehub.nearest_like('s', '{}', 1)", "EH005", "no examples were given"),
    ("ehub.nearest_like('s', NULL, 1, '{k1}')", "EH005", "no examples were given"),
    ("ehub.nearest_like('s', '{k1}', 0)", "EH005", "k is a number"),
    ("ehub.nearest_like('s', '{k1}', 1, partition => 'p')", "EH005", "has no partitions"),
    ("ehub.nearest_like('s', '{k1,k2}', 1, NULL, '{1}')", "EH005", "2 examples, 1 weights"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, '{}')", "EH005", "1 examples, 0 weights"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, '{NaN}')", "EH005", "is not negative"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, '{Infinity}')", "EH005", "is not negative"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, '{-1}')", "EH005", "is not negative"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, '{NULL}')", "EH005", "is not negative"),
    ("ehub.nearest_like('s', '{k1,k2}', 1, NULL, '{0,0}')", "EH005", "sum to zero"),
    ("ehub.nearest_like('s', '{k1}', 1, '{k2}', NULL, '{0}')", "EH005", "sum to zero"),
    ("ehub.nearest_like('s', '{k1}', 1, NULL, NULL, '{1}')", "EH005", "weights of no examples"),
    ("ehub.nearest_like('s', '{k1,k2}', 1, NULL, '{1e308,1e308}')", "EH005", "to 1e100"),
    ("ehub.nearest_like('s', '{k1,k2}', 1, NULL, '{1e-308,1e-308}')", "EH005", "from 1e-100"),
    ("ehub.nearest_like('s', '{up,down}', 1)", "EH005", "cancel each other out"),
    ("ehub.nearest('s', '[1,1,1,1]', 0, filter => '{}')", "EH005", "k is a number"),
    ("ehub.nearest('s', '[1,1,1,1]', 1, partition => 'p')", "EH005", "has no partitions"),
    ("ehub.partitions('s')", "EH005", "has no partitions"),
    ("ehub.drop_partition('s', 'p')", "EH005", "has no partitions"),
    ("ehub.drop_index('s', 'i')", "EH022", "has no index 'i'"),
    ("ehub.create_index('s', 'there', '{\"a\": 1}')", "EH023", "has an index 'there' already"),
    ("ehub.create_space('t', 2, partition_by => '')", "EH005", "partition_by is the name"),
    ("ehub.drop_partition('p', 'none')", "EH024", "has no partition 'none'"),
]


def test_what_is_no_question_is_refused(db):
    make(db, "cosine")
    db.execute("INSERT INTO spaces.s VALUES ('up', '[1,0,0,0]'), ('down', '[-1,0,0,0]')")
    db.execute("SELECT ehub.create_index('s', 'there', '{\"a\": 1}')")
    db.execute("SELECT ehub.create_space('p', 1, partition_by => 'p')")
    for call, state, message in BAD:
        with pytest.raises(psycopg.DatabaseError, match=message) as caught:
            db.execute(f"SELECT * FROM {call}").fetchall()
        assert caught.value.sqlstate == state, call
    assert (
        db.execute("SELECT * FROM ehub.nearest('p', '[1]', 3, partition => 'x')").fetchall() == []
    )
    assert db.execute("SELECT * FROM ehub.partitions('p')").fetchall() == []
