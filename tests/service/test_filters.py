"""Searches among rows that match: by filter, partition and sub-index, beside writers and failures."""

import json
import threading
import time
import uuid

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors
from psycopg import sql

import ehub
from service.conftest import settled
from service.test_nearest import literal, vectors

N = 3000
ROWS = vectors(N, seed=3)
QUERIES = vectors(12, seed=4)
SHARES = {"half": 2, "tenth": 10, "percent": 100}
NOTES = [
    {name: bool(i % share == 0) for name, share in SHARES.items()}
    | {"far": bool(ROWS[i, 0] > 1.3), "tags": [f"t{i % 7}", f"u{i % 3}"], "i": i}
    for i in range(N)
]
FILTERS = {
    "half": {"half": True},
    "tenth": {"tenth": True},
    "percent": {"percent": True},
    "some": {"i": {"in": [5, 7, 2999]}},
    "all": {"i": {">=": 0}},
    "none": {"i": {"<": 0}},
    # Rows that lie together: near them, or far from them.
    "far": {"far": True},
    "not far": {"not": {"far": True}},
    "tags": {"tags": "t3", "or": [{"half": True}, {"tags": {"in": ["u1", "u2"]}}]},
}


def right(note, name):
    """Whether a row matches, in Python's words."""
    return {
        "half": lambda: note.get("half") is True,
        "tenth": lambda: note.get("tenth") is True,
        "percent": lambda: note.get("percent") is True,
        "some": lambda: note.get("i") in (5, 7, 2999),
        "all": lambda: note.get("i", -1) >= 0,
        "none": lambda: note.get("i", 0) < 0,
        "far": lambda: note.get("far") is True,
        "not far": lambda: note.get("far") is not True,
        "tags": lambda: (
            "t3" in note.get("tags", [])
            and (note.get("half") is True or bool({"u1", "u2"} & set(note.get("tags", []))))
        ),
    }[name]()


def found_by(connection, query, k=10, space="s", **options):
    named = "".join(f", {name} => %({name})s" for name in options)
    rows = connection.execute(
        f"SELECT key, distance, metadata FROM ehub.nearest(%(space)s, %(query)s, %(k)s{named})",
        {
            "space": space,
            "query": literal(query),
            "k": k,
            **{n: json.dumps(o) if isinstance(o, dict) else o for n, o in options.items()},
        },
    )
    return [ehub.Neighbor(*row) for row in rows]


def way(connection, wanted, space="s", partition=None, index=None, k=10):
    """How a search is answered, and what there is to say about it."""
    return connection.execute(
        "SELECT way, rows, compared, note FROM ehub.explain_nearest(%s, %s, %s, %s, %s, %s)"
        " WHERE chosen",
        [
            space,
            literal(QUERIES[0]),
            k,
            None if wanted is None else json.dumps(wanted),
            partition,
            index,
        ],
    ).fetchone()


def warm(connection, wanted, space="s", seconds=20):
    """Ask with a filter until the index knows what matches."""
    deadline = time.monotonic() + seconds
    while (how := way(connection, wanted, space)) is None or how[0] not in ("rows", "graph"):
        assert time.monotonic() < deadline, how
        connection.execute("SELECT set_config('ehub.breaker', '', false)")
        time.sleep(0.05)
    return how


def freeze(service):
    """From now on only the log can tell what has changed."""
    for copy in service._replica.followed():
        copy.blocked_until = float("inf")


def check(connection, rows, k=10, recall=0.9, queries=QUERIES, **options):
    """Each answer is of rows that match, k of them, and together they are nearly all the nearest."""
    hits = wanted = 0
    for query in queries:
        near = found_by(connection, query, k, **options)
        check_neighbors(near, rows, "l2", query, k, recall=0)
        if rows:
            order = np.sort(np.linalg.norm(np.stack(list(rows.values())) - query, axis=1))
            hits += sum(one.distance <= order[len(near) - 1] + 1e-5 for one in near)
            wanted += len(near)
    assert hits >= recall * wanted, (hits, wanted)


@pytest.fixture
def space(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        space = hub.create_space("s", 8)
        space.multiset([f"k{i}" for i in range(N)], ROWS, NOTES)
        db.execute(f"ANALYZE ehub_data.v{version_of(db)}")
        settled(db)
        yield space


def version_of(db, space="s"):
    return db.execute(
        "SELECT version_id FROM ehub.catalogue WHERE space = %s AND current", [space]
    ).fetchone()[0]


def matching(name):
    return {f"k{i}": ROWS[i] for i in range(N) if right(NOTES[i], name)}


def test_the_index_answers_like_brute_force(space, db):
    for name, wanted in FILTERS.items():
        rows = matching(name)
        # Before it knows which rows match, and after.
        for k in (1, 10, 200):
            check(db, rows, k, queries=QUERIES[:4], filter=wanted)
        how = warm(db, wanted)
        assert how[1] == len(rows), (name, how)
        with db.transaction(force_rollback=True):
            db.execute("SET LOCAL ehub.mode = 'index'")
            for k in (1, 10, 200):
                check(db, rows, k, filter=wanted)
            many = db.execute(
                "SELECT q, key, distance, metadata FROM ehub.nearest_many('s', %s::vector[], 5, %s)",
                [list(map(literal, QUERIES)), json.dumps(wanted)],
            ).fetchall()
            for q, query in enumerate(QUERIES, 1):
                mine = [ehub.Neighbor(*row[1:]) for row in many if row[0] == q]
                check_neighbors(mine, rows, "l2", query, 5, recall=0.6)
            near = db.execute(
                "SELECT key, distance, metadata FROM ehub.nearest_to('s', 'k0', 10, %s)",
                [json.dumps(wanted)],
            ).fetchall()
            others = {key: row for key, row in rows.items() if key != "k0"}
            check_neighbors(
                [ehub.Neighbor(*row) for row in near], others, "l2", ROWS[0], 10, recall=0.7
            )


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("name", ["half", "percent", "far"])
def test_changes_are_seen_at_once(space, db, url, service, name, known):
    wanted = FILTERS[name]
    if known:
        warm(db, wanted)
    freeze(service)
    rows = matching(name)
    inside, outside = next(iter(rows)), "k1"
    assert outside not in rows
    note = dict.fromkeys(("half", "tenth", "percent", "far"), True)
    query = QUERIES[0]
    with psycopg.connect(url) as other:
        if known:
            other.execute("SET ehub.mode = 'index'")
        other.execute("SELECT ehub.set('s', 'new', %s, %s)", [literal(query), json.dumps(note)])
        other.execute("SELECT ehub.set('s', 'no', %s, '{}')", [literal(query)])
        other.execute(
            "UPDATE spaces.s SET metadata = %s WHERE key = %s", [json.dumps(note), outside]
        )
        other.execute("UPDATE spaces.s SET metadata = '{}' WHERE key = %s", [inside])
        gone = found_by(other, query, 3, filter=wanted)[1].key
        other.execute("DELETE FROM spaces.s WHERE key = %s", [gone])
        after = {key: row for key, row in rows.items() if key not in (inside, gone)}
        after |= {"new": query, outside: ROWS[1]}
        check(other, after, filter=wanted)
        assert found_by(other, query, 1, filter=wanted)[0].key == "new"
        assert found_by(other, ROWS[1], 1, filter=wanted)[0].key == outside
        # Nobody else sees it, before the commit.
        check(db, rows, queries=[query, ROWS[1]], filter=wanted)
        other.commit()
        check(db, after, queries=[query, ROWS[1], *QUERIES[:4]], filter=wanted)
        other.execute("ROLLBACK; BEGIN; DELETE FROM spaces.s WHERE key = 'new'")
        other.rollback()
        check(db, after, queries=[query], filter=wanted)


def test_changes_reach_what_is_known(space, db, service):
    """Rows that come to match or cease to, with the vector as it was."""
    wanted = FILTERS["percent"]
    warm(db, wanted)
    db.execute("UPDATE spaces.s SET metadata = metadata || '{\"percent\": true}' WHERE key < 'k12'")
    db.execute("UPDATE spaces.s SET metadata = '{}' WHERE key > 'k9'")
    db.execute("DELETE FROM spaces.s WHERE key >= 'k8' AND key < 'k85'")
    settled(db)
    rows = dict(
        db.execute(
            "SELECT key, embedding::real[] FROM spaces.s WHERE metadata @> '{\"percent\": true}'"
        )
    )
    rows = {key: np.float32(row) for key, row in rows.items()}
    assert len(rows) > 100
    deadline = time.monotonic() + 10
    while way(db, wanted)[1] != len(rows):
        assert time.monotonic() < deadline, way(db, wanted)
        time.sleep(0.05)
    db.execute("SET ehub.mode = 'index'")
    check(db, rows, filter=wanted)


def test_far_rows_that_come_do_not_stand_in_for_near_ones(space, db, service):
    """Where the index does not know what matches: the new ones alone are not the nearest."""
    freeze(service)
    rows = matching("percent")
    new = {f"new{i}": np.float32([30 + i] * 8) for i in range(60)}
    space.multiset([(key, row, {"percent": True}) for key, row in new.items()])
    check(db, rows | new, recall=1, filter=FILTERS["percent"])
    # And those that went away from near a query.
    near = found_by(db, QUERIES[1], 5, filter=FILTERS["percent"])
    for one in near:
        rows[one.key] = np.float32([50] * 8)
        space.set(one.key, rows[one.key], metadata={"percent": True})
    check(db, rows | new, recall=1, filter=FILTERS["percent"])


def test_a_filter_that_is_none_does_not_keep_others_from_being_known(space, db):
    """Whoever may search may send anything to the service."""
    for _ in range(3):
        with pytest.raises(psycopg.DatabaseError, match='no operator "like"'):
            db.execute(
                "SELECT ehub.candidates('s', ARRAY[%s::vector], 10, %s)",
                ["[1,1,1,1,1,1,1,1]", '{"half": {"like": "x"}}'],
            )
    warm(db, FILTERS["percent"], seconds=10)


def test_a_service_that_went_is_done_without_and_comes_again(process, url, data_dir, db):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        space = hub.create_space("s", 8)
        space.multiset([f"k{i}" for i in range(N)], ROWS, NOTES)
        settled(db)
        wanted, rows = FILTERS["tenth"], matching("tenth")
        warm(db, wanted)
        process.kill()
        deadline = time.monotonic() + 10
        check(db, rows, recall=1, filter=wanted)
        while (how := way(db, wanted))[0] != "exact":
            assert time.monotonic() < deadline, how
        process.start()
        settled(db)
        check(db, rows, filter=wanted)
        warm(db, wanted)
        db.execute("SET ehub.mode = 'index'")
        check(db, rows, filter=wanted)
        db.execute("RESET ehub.mode")
        process.stop()
        check(db, rows, recall=1, filter=wanted)


# --- sub-indexes


def ready(db, name, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        states = db.execute(
            "SELECT state FROM ehub.sub_indexes WHERE index = %s", [name]
        ).fetchall()
        if states and all(state == "ready" for (state,) in states):
            return
        assert time.monotonic() < deadline, states
        time.sleep(0.05)


def chosen(db, wanted, index=None):
    """The name of the index that a search goes by, and what its rows have to match still."""
    return db.execute(
        "SELECT i.name, c.filter FROM ehub.choose_index("
        "current_user::regrole, %s, name => %s, filter => %s, partition => NULL) AS c"
        " JOIN ehub.index AS i ON i.id = c.index_id",
        [version_of(db), index, None if wanted is None else json.dumps(wanted)],
    ).fetchone()


def test_a_sub_index_is_used_by_name_and_where_its_filter_is_implied(space, db):
    db.execute("SELECT ehub.create_index('s', 'halves', %s)", ['{"half": true}'])
    ready(db, "halves")
    (rows,) = db.execute("SELECT rows FROM ehub.sub_indexes").fetchone()
    assert rows == N // 2
    half = matching("half")
    assert chosen(db, {"half": True}) == ("halves", None)
    assert chosen(db, {"half": True, "tenth": True}) == ("halves", {"half": True, "tenth": True})
    assert chosen(db, {"tenth": True}) == (None, {"tenth": True})
    # A search by other fields than it is about goes by none, whatever words it has.
    assert chosen(db, {"not": {"half": True}})[0] is None
    db.execute("SET ehub.mode = 'index'")
    check(db, half, filter={"half": True})
    check(db, half, index="halves")
    check(db, half, index="halves", filter={"i": {">=": 0}})
    both = {key: row for key, row in half.items() if key in matching("tags")}
    db.execute("SET ehub.mode = 'auto'")
    check(db, both, index="halves", filter=FILTERS["tags"])
    check(db, {}, index="halves", filter={"half": False})
    # Changes, also of what is in it.
    db.execute("UPDATE spaces.s SET metadata = '{}' WHERE key = 'k0'")
    db.execute("UPDATE spaces.s SET metadata = '{\"half\": true}' WHERE key = 'k1'")
    del half["k0"]
    half["k1"] = ROWS[1]
    for _ in range(2):
        check(db, half, index="halves", queries=[ROWS[0], ROWS[1]])
        settled(db)
    many = db.execute(
        "SELECT q, key FROM ehub.nearest_many('s', %s::vector[], 1, NULL, NULL, 'halves')",
        [[literal(ROWS[1]), literal(ROWS[2])]],
    ).fetchall()
    assert many == [(1, "k1"), (2, "k2")]
    # Another version has it too.
    space.create_version("v2", from_version="v1")
    assert db.execute(
        "SELECT version, \"where\" FROM ehub.sub_indexes WHERE index = 'halves' ORDER BY version"
    ).fetchall() == [("v1", {"half": True}), ("v2", {"half": True})]
    space.promote("v2")
    ready(db, "halves")
    check(db, half, index="halves")
    db.execute("SELECT ehub.drop_index('s', 'halves')")
    assert db.execute("SELECT version FROM ehub.sub_indexes").fetchall() == [("v1",)]
    with pytest.raises(psycopg.DatabaseError, match="no index 'halves'"):
        found_by(db, QUERIES[0], index="halves")
    check(db, half, filter={"half": True})


@pytest.mark.parametrize(
    "wanted", [{"not": {"half": True}}, {"or": [{"half": True}, {"tenth": True}]}]
)
def test_a_sub_index_of_words_hinders_no_other_search(space, db, wanted):
    db.execute("SELECT ehub.create_index('s', 'words', %s)", [json.dumps(wanted)])
    ready(db, "words")
    assert chosen(db, wanted) == ("words", None)
    for name, other in FILTERS.items():
        check(db, matching(name), queries=QUERIES[:2], filter=other)
    check(db, matching("tags"), queries=QUERIES[:2], filter={"and": [FILTERS["tags"]]})
    check(db, {}, queries=QUERIES[:1], filter={"not": {}, "or": [{"half": True}]})


def test_writers_do_not_wait_for_a_sub_index(space, db, url):
    with psycopg.connect(url) as writer, psycopg.connect(url) as other:
        # Near each other, and no copies: of these a graph finds some.
        a, b = ROWS[0] * np.float32(1.001), ROWS[0] * np.float32(0.999)
        writer.execute("SELECT ehub.set('s', 'a', %s, '{\"half\": true}')", [literal(a)])
        db.execute("SET lock_timeout = '2s'")
        db.execute("SELECT ehub.create_index('s', 'halves', '{\"half\": true}')")
        other.execute("SET lock_timeout = '2s'")
        other.execute("SELECT ehub.set('s', 'b', %s, '{\"half\": true}')", [literal(b)])
        db.execute("SELECT ehub.drop_index('s', 'halves')")
        db.execute("SELECT ehub.create_index('s', 'halves', '{\"half\": true}')")
        writer.commit()
        other.commit()
    ready(db, "halves")
    settled(db)
    found = found_by(db, ROWS[0], 3, index="halves")
    assert {one.key for one in found} == {"a", "b", "k0"}


def test_wrong_names_of_indexes_and_partitions(space, db):
    db.execute("SELECT ehub.create_index('s', 'i', '{\"a\": 1}')")
    for statement, state, message in (
        ("ehub.create_index('s', 'i', '{\"b\": 1}')", "EH023", "has an index 'i' already"),
        ("ehub.create_index('s', 'a b', '{\"b\": 1}')", "EH003", "an index's name is"),
        ("ehub.create_index('s', NULL, '{\"b\": 1}')", "EH003", "an index's name is"),
        ("ehub.create_index('s', 'j', '{\"b\": 1}', m => 1)", "EH005", "M is a number"),
        ("ehub.create_index('t', 'j', '{\"b\": 1}')", "EH001", "no space 't'"),
        ("ehub.drop_index('s', 'j')", "EH022", "space 's' has no index 'j'"),
        ("ehub.drop_index('s', NULL)", "EH022", "space 's' has no index NULL"),
        ("ehub.nearest('s', %(q)s, 1, index => 'j')", "EH022", "space 's' has no index 'j'"),
        ("ehub.nearest_exact('s', %(q)s, 1, index => 'j')", "EH022", "no index 'j'"),
        ("ehub.nearest_many('s', ARRAY[%(q)s::vector], 1, index => 'j')", "EH022", "no index 'j'"),
        ("ehub.within('s', %(q)s, 1, index => 'j')", "EH022", "no index 'j'"),
        ("ehub.explain_nearest('s', %(q)s, 1, index => 'j')", "EH022", "no index 'j'"),
        ("ehub.indexes_for('s', NULL, 'j')", "EH022", "no index 'j'"),
        ("ehub.nearest('s', %(q)s, 1, partition => 'p')", "EH005", "'s' has no partitions"),
        ("ehub.nearest_exact('s', %(q)s, 1, partition => 'p')", "EH005", "has no partitions"),
        ("ehub.within('s', %(q)s, 1, partition => 'p')", "EH005", "has no partitions"),
        ("ehub.explain_nearest('s', %(q)s, 1, partition => 'p')", "EH005", "no partitions"),
        ("ehub.partitions('s')", "EH005", "has no partitions"),
        ("ehub.drop_partition('s', 'p')", "EH005", "has no partitions"),
        ("ehub.nearest('s', %(q)s, 0, filter => '{}')", "EH005", "k is a number"),
    ):
        with pytest.raises(psycopg.DatabaseError, match=message) as caught:
            db.execute(f"SELECT * FROM {statement}", {"q": literal(ROWS[0])})
        assert caught.value.sqlstate == state, statement


# --- partitions


@pytest.fixture
def tenants(url, data_dir, service, db):
    """Two partitions with a graph, and many small ones."""
    of = ["big"] * 6000 + ["large"] * 5500 + [f"small{i % 40}" for i in range(800)]
    rows = vectors(len(of), seed=5)
    db.execute("SELECT ehub.create_space('s', 8, partition_by => 'tenant')")
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        space = hub.get_space("s")
        space.multiset(
            [f"k{i}" for i in range(len(of))],
            rows,
            [{"tenant": name, "half": i % 2 == 0, "i": i} for i, name in enumerate(of)],
        )
        db.execute(f"ANALYZE ehub_data.v{version_of(db)}")
        settled(db)
        yield {
            name: {f"k{i}": rows[i] for i, other in enumerate(of) if other == name}
            for name in set(of)
        }


def test_partitions_are_searched_apart(tenants, db, service):
    db.execute("SET ehub.mode = 'index'")
    for name in ("big", "large", "small1"):
        for k in (1, 10, 100):
            check(db, tenants[name], k, partition=name)
        many = db.execute(
            "SELECT q, key, distance, metadata FROM ehub.nearest_many("
            "'s', %s::vector[], 5, partition => %s)",
            [list(map(literal, QUERIES)), name],
        ).fetchall()
        for q, query in enumerate(QUERIES, 1):
            mine = [ehub.Neighbor(*row[1:]) for row in many if row[0] == q]
            check_neighbors(mine, tenants[name], "l2", query, 5, recall=0.6)
    everything = {key: row for rows in tenants.values() for key, row in rows.items()}
    check(db, everything)
    check(db, {}, partition="nobody")
    db.execute("SET ehub.mode = 'auto'")
    for name in ("big", "small1"):
        some = {key: row for key, row in tenants[name].items() if int(key[1:]) % 2 == 0}
        check(db, some, partition=name, filter={"half": True})
        check(db, {}, partition=name, filter={"half": "x"})
        few = {key: row for key, row in tenants[name].items() if int(key[1:]) % 50 == 0}
        wanted = {"i": {"in": [int(key[1:]) for key in few]}}
        check(db, few, partition=name, filter=wanted)
    # Moved between them, by writers that the index has not seen.
    freeze(service)
    db.execute("UPDATE spaces.s SET metadata = '{\"tenant\": \"small1\"}' WHERE key = 'k0'")
    db.execute("UPDATE spaces.s SET metadata = '{\"tenant\": \"fresh\"}' WHERE key = 'k1'")
    tenants["small1"]["k0"] = tenants["big"].pop("k0")
    fresh = {"k1": tenants["big"].pop("k1")}
    for name in ("big", "small1"):
        check(db, tenants[name], queries=[*QUERIES[:3], tenants["small1"]["k0"]], partition=name)
    check(db, fresh, partition="fresh")
    assert found_by(db, tenants["small1"]["k0"], 1, partition="small1")[0].key == "k0"
    near = db.execute("SELECT key FROM ehub.nearest_to('s', 'k0', 5, partition => 'small1')")
    assert "k0" not in [key for (key,) in near]
    for copy in service._replica.followed():
        copy.blocked_until = 0
    settled(db)
    sizes = dict(db.execute("SELECT * FROM ehub.partitions('s')"))
    assert sizes["big"] == 5998
    assert sizes["fresh"] == 1
    assert db.execute("SELECT ehub.drop_partition('s', 'large')").fetchone() == (5500,)
    with pytest.raises(psycopg.DatabaseError, match="has no partition 'large'") as caught:
        db.execute("SELECT ehub.drop_partition('s', 'large')")
    assert caught.value.sqlstate == "EH024"
    with pytest.raises(psycopg.DatabaseError, match="has no partition NULL"):
        db.execute("SELECT ehub.drop_partition('s', NULL)")
    check(db, {}, partition="large")
    settled(db)
    check(db, {}, partition="large")
    for note in ("{}", '{"tenant": null}', '{"tenant": ["a"]}', '{"tenant": {}}'):
        with pytest.raises(psycopg.DatabaseError, match='needs field "tenant", the partition'):
            db.execute("SELECT ehub.set('s', 'bad', %s, %s)", [literal(ROWS[0]), note])


# --- limited roles


def test_a_limited_role_finds_its_own_alone(tenants, db, url):
    everything = {key: row for rows in tenants.values() for key, row in rows.items()}
    name = f"ehub_filtered_{uuid.uuid4().hex[:8]}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    db.execute("SELECT ehub.create_index('s', 'halves', '{\"half\": true}')")
    ready(db, "halves")
    db.execute("SELECT ehub.grant('s', %s, 'read', rows => '{\"tenant\": \"big\"}')", [name])
    try:
        with psycopg.connect(url, autocommit=True) as limited:
            limited.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(name)))
            own = tenants["big"]
            half = {key: row for key, row in own.items() if int(key[1:]) % 2 == 0}
            for _ in range(2):
                check(limited, own)
                check(limited, own, partition="big")
                check(limited, {}, partition="large")
                check(limited, half, filter={"half": True})
                check(limited, half, index="halves")
                check(limited, half, partition="big", filter={"half": True})
                check(limited, half, partition="big", index="halves")
                check(limited, {}, filter={"tenant": {"!=": "big"}})
                assert limited.execute("SELECT * FROM ehub.partitions('s')").fetchall() == [
                    ("big", 6000)
                ]
                within = limited.execute(
                    "SELECT key FROM ehub.within('s', %s, 1e9, filter => '{\"half\": true}')",
                    [literal(QUERIES[0])],
                ).fetchall()
                assert {key for (key,) in within} == half.keys()
                settled(limited)
                warm(limited, {"half": True})
            limited.execute("SET ehub.mode = 'index'")
            check(limited, half, filter={"half": True})
            check(limited, own, partition="big")
        check(db, {k: v for k, v in everything.items() if int(k[1:]) % 2 == 0}, index="halves")
    finally:
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


# --- within


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_within_is_what_is_within(service, url, data_dir, db, metric):
    with ehub.connect(url, data_dir=data_dir, index="none") as hub:
        space = hub.create_space("s", 8, metric)
        rows = ROWS[:3000]
        space.multiset([f"k{i}" for i in range(3000)], rows, NOTES[:3000])
        settled(db)
    many = rows.astype(np.float64)
    for query in QUERIES[:3]:
        far = {
            "l2": np.linalg.norm(many - query, axis=1),
            "ip": -(many @ query),
            "cosine": 1
            - (many @ query) / np.linalg.norm(many, axis=1) / np.linalg.norm(query.astype(float)),
        }[metric]
        for wanted in (None, "half", "none"):
            ours = [i for i in range(3000) if wanted is None or right(NOTES[i], wanted)]
            for some in (0, 3, 50, 500):
                some = min(some, len(ours))
                order = np.sort(far[ours])
                radius = float(order[:some].max(initial=order.min(initial=0) - 1)) + 1e-6
                true = {f"k{i}" for i in ours if far[i] <= radius}
                for most in (None, 10):
                    for complete in (True, False):
                        found = db.execute(
                            "SELECT key, distance FROM ehub.within('s', %s, %s, %s, %s,"
                            " complete => %s)",
                            [
                                literal(query),
                                radius,
                                most,
                                wanted and json.dumps(FILTERS[wanted]),
                                complete,
                            ],
                        ).fetchall()
                        assert [d for _, d in found] == sorted(d for _, d in found)
                        assert all(d <= radius for _, d in found)
                        keys = {key for key, _ in found}
                        assert len(keys) == len(found) <= (most or 10**9)
                        assert keys <= true
                        expected = min(len(true), most or 10**9)
                        assert len(keys) == expected or (
                            not complete and len(keys) >= 0.9 * expected
                        )
    everything = db.execute(
        "SELECT count(*) FROM ehub.within('s', %s, 'Infinity')", [literal(QUERIES[0])]
    ).fetchone()
    assert everything == (3000,)


def test_within_is_told_what_is_wrong(space, db):
    for arguments, state in (
        ("%(q)s, 'NaN'", "EH005"),
        ("%(q)s, NULL", "EH005"),
        ("%(q)s, 1, 0", "EH005"),
        ("%(q)s, 1, -1", "EH005"),
        ("'[1,2]', 1", "EH004"),
        ("NULL, 1", "EH004"),
    ):
        for complete in ("true", "false"):
            with pytest.raises(psycopg.DatabaseError) as caught:
                db.execute(
                    f"SELECT * FROM ehub.within('s', {arguments}, complete => {complete})",
                    {"q": literal(ROWS[0])},
                )
            assert caught.value.sqlstate == state, arguments


def test_searches_beside_writers_are_of_rows_that_match(space, db, url):
    """Each answer is of rows that match in the answer's own metadata, and full."""
    stop = threading.Event()
    problems = []

    def write(seed):
        random = np.random.default_rng(seed)
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                key = f"k{random.integers(300)}"
                note = {"half": bool(random.random() < 0.5), "i": int(random.integers(10))}
                connection.execute(
                    "UPDATE spaces.s SET metadata = %s WHERE key = %s", [json.dumps(note), key]
                )

    def search(seed, wanted):
        random = np.random.default_rng(seed)
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                found = found_by(connection, ROWS[random.integers(300)], 10, filter=wanted)
                if len(found) != 10 or not all(one.metadata["half"] for one in found):
                    problems.append(found)

    threads = [threading.Thread(target=write, args=[0])] + [
        threading.Thread(target=search, args=[i, wanted])
        for i, wanted in enumerate(({"half": True}, {"half": True, "i": {">=": 0}}))
    ]
    for thread in threads:
        thread.start()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
