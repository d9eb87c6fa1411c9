"""ehub.nearest and its kin: what the index proposes, and what comes back."""

import json
import threading
import time

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors, distances, table

import ehub
from service.conftest import settled

DIMS = 8


def vectors(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, DIMS)).astype(np.float32)


def literal(vector):
    return "[" + ",".join(map(repr, np.asarray(vector, np.float32).tolist())) + "]"


def nearest(connection, query, k, space="s", function="nearest"):
    rows = connection.execute(
        f"SELECT key, distance, metadata FROM ehub.{function}(%s, %s, %s)",
        [space, query if isinstance(query, str) else literal(query), k],
    )
    return [ehub.Neighbor(*row) for row in rows]


@pytest.fixture
def space(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir) as hub:
        space = hub.create_space("s", DIMS)
        space.multiset([f"k{i}" for i in range(2000)], vectors(2000))
        settled(db)
        yield space


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_the_index_answers_like_brute_force(service, url, data_dir, db, metric):
    with ehub.connect(url, data_dir=data_dir) as hub:
        space = hub.create_space("s", DIMS, metric)
        space.multiset([f"k{i}" for i in range(3000)], vectors(3000))
        settled(db)
        db.execute("SET ehub.mode = 'index'")
        rows = table(db, "s")
        for query in vectors(20, 1):
            check_neighbors(nearest(db, query, 10), rows, metric, query, 10, recall=0.7)
        found = db.execute(
            "SELECT q, key, distance, metadata FROM ehub.nearest_many('s', %s::vector[], 10)",
            [list(map(literal, vectors(20, 1)))],
        ).fetchall()
        for q, query in enumerate(vectors(20, 1), 1):
            mine = [ehub.Neighbor(*row[1:]) for row in found if row[0] == q]
            check_neighbors(mine, rows, metric, query, 10, recall=0.7)


def test_neighbours_of_a_key_leave_it_out(space, db):
    db.execute("SET ehub.mode = 'index'")
    found = nearest(db, "k7", 10, function="nearest_to")
    rows = table(db, "s")
    query = rows.pop("k7")
    check_neighbors(found, rows, "l2", query, 10, recall=0.8)
    with pytest.raises(psycopg.DatabaseError, match="space 's' has no key 'nobody'"):
        nearest(db, "nobody", 10, function="nearest_to")


def test_it_joins_with_the_users_own_tables(space, db):
    db.execute("CREATE TABLE docs (id text PRIMARY KEY, lang text)")
    db.execute("INSERT INTO docs SELECT key, CASE WHEN key < 'k5' THEN 'en' END FROM spaces.s")
    rows = db.execute(
        "SELECT d.id, n.distance FROM ehub.nearest('s', %s, 50) n JOIN docs d ON d.id = n.key"
        " WHERE d.lang = 'en' ORDER BY n.distance",
        [literal(vectors(1)[0])],
    ).fetchall()
    assert rows[0] == ("k0", 0)
    assert 5 < len(rows) < 50


def test_a_transaction_finds_its_own_writes_and_nobody_elses(space, db, url):
    db.execute("SET ehub.mode = 'index'")
    here, there = [9.0] * DIMS, [-9.0] * DIMS
    with psycopg.connect(url) as other:
        other.execute("SET ehub.mode = 'index'")
        other.execute("SELECT ehub.set('s', 'new', %s, '{\"a\": 1}')", [literal(here)])
        other.execute("SAVEPOINT x")
        other.execute("SELECT ehub.set('s', 'gone', %s)", [literal(here)])
        assert [n.key for n in nearest(other, here, 2)] == ["gone", "new"]
        other.execute("ROLLBACK TO x")
        other.execute("UPDATE spaces.s SET embedding = %s WHERE key = 'k0'", [literal(there)])
        other.execute("SELECT ehub.delete('s', 'k1')")
        assert nearest(other, here, 1) == [("new", 0.0, {"a": 1})]
        assert nearest(other, there, 1)[0][:2] == ("k0", 0.0)
        assert "k1" not in [n.key for n in nearest(other, vectors(2)[1], 5)]
        # Another session sees none of it, before and after.
        for end in (lambda: None, other.rollback):
            end()
            assert nearest(db, vectors(2)[1], 1)[0].key == "k1"
            assert nearest(db, here, 1)[0].key != "new"
            assert nearest(db, there, 1)[0].distance > 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_older_snapshot_gets_what_it_may_see(space, db, url, level):
    with psycopg.connect(url) as reader:
        reader.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        before = table(reader, "s")
        for step in range(5):
            db.execute("DELETE FROM spaces.s WHERE key = %s", [f"k{step}"])
            db.execute("SELECT ehub.set('s', %s, %s)", [f"n{step}", literal([step] * DIMS)])
            db.execute(
                "UPDATE spaces.s SET embedding = %s WHERE key = %s",
                [literal([-step] * DIMS), f"k{step + 100}"],
            )
            settled(db)
            for query in (*vectors(3, step), [step] * DIMS, vectors(10)[step]):
                found = nearest(reader, query, 10)
                check_neighbors(found, before, "l2", np.asarray(query, np.float32), 10)


def test_searches_beside_writers_are_right_rows(space, db, url):
    """Rows carry their vector in their metadata, so each answer can be checked by itself."""
    db.execute("DELETE FROM spaces.s WHERE key >= 'k3'")
    stop = threading.Event()
    problems = []

    def write(seed):
        random = np.random.default_rng(seed)
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                key = f"w{random.integers(200)}"
                vector = random.standard_normal(DIMS).astype(np.float32)
                if random.random() < 0.3:
                    connection.execute("DELETE FROM spaces.s WHERE key = %s", [key])
                else:
                    connection.execute(
                        "SELECT ehub.set('s', %s, %s, %s)",
                        [key, literal(vector), json.dumps({"v": vector.tolist()})],
                    )

    def search(seed, level):
        random = np.random.default_rng(seed)
        with psycopg.connect(url) as connection:
            while not stop.is_set():
                connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
                query = random.standard_normal(DIMS).astype(np.float32)
                rows = table(connection, "s") if level != "READ COMMITTED" else None
                found = nearest(connection, query, 10)
                if rows is None:
                    keys = [n.key for n in found]
                    good = len(found) == 10 and len(set(keys)) == 10
                    for near in found:
                        stated = (near.metadata or {}).get("v")
                        if stated is not None:
                            true = np.linalg.norm(np.array(stated) - query)
                            good &= abs(true - near.distance) < 1e-4
                    if not good:
                        problems.append(found)
                else:
                    try:
                        check_neighbors(found, rows, "l2", query, 10, recall=0.8)
                    except AssertionError as error:
                        problems.append(error)
                connection.rollback()

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    threads += [
        threading.Thread(target=search, args=(seed, level))
        for seed, level in enumerate(["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ"])
    ]
    for thread in threads:
        thread.start()
    time.sleep(8)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    settled(db)
    db.execute("SET ehub.mode = 'index'")
    rows = table(db, "s")
    # What is promised of recall is promised of many queries; one of them may miss two of its ten.
    found = 0
    for query in vectors(20, 5):
        near = nearest(db, query, 10)
        check_neighbors(near, rows, "l2", query, 10, recall=0.5)
        limit = sorted(distances("l2", query, np.stack(list(rows.values()))))[9]
        found += sum(one.distance <= limit + 1e-4 for one in near)
    assert found >= 0.9 * 200


def test_what_the_index_has_not_seen_yet_decides_as_well(space, db, service):
    """Its replica is kept from applying anything: nothing but the log tells of these changes."""
    db.execute("SET ehub.mode = 'index'")
    before = table(db, "s")
    query = vectors(1)[0]
    order = sorted(before, key=lambda key: float(np.linalg.norm(before[key] - query)))
    for copy in service._replica.followed():
        copy.blocked_until = float("inf")
    for round_ in range(4):
        gone = order[round_ * 4 : round_ * 4 + 4]
        db.execute("DELETE FROM spaces.s WHERE key = ANY(%s)", [gone])
        db.execute("SELECT ehub.set('s', %s, %s)", [f"n{round_}", literal(query + 1 + round_)])
        rows = table(db, "s")
        for k in (1, 5, 40):
            check_neighbors(nearest(db, query, k), rows, "l2", query, k, recall=0.8)
        found = db.execute(
            "SELECT q, key, distance, metadata FROM ehub.nearest_many('s', %s::vector[], 5)",
            [[literal(query), literal(-query)]],
        ).fetchall()
        for q, sign in ((1, 1), (2, -1)):
            mine = [ehub.Neighbor(*row[1:]) for row in found if row[0] == q]
            check_neighbors(mine, rows, "l2", sign * query, 5, recall=0.8)


def test_truncate_and_large_changes(space, db):
    db.execute("SET ehub.mode = 'auto'")
    query = vectors(1)[0]
    with db.transaction():
        db.execute("TRUNCATE ehub_data.v1")
        assert nearest(db, query, 5) == []
        db.execute("SELECT ehub.set('s', 'one', %s)", [literal(query)])
        assert [n.key for n in nearest(db, query, 5)] == ["one"]
    assert [n.key for n in nearest(db, query, 5)] == ["one"]
    settled(db)
    db.execute("SET ehub.mode = 'index'")
    assert [n.key for n in nearest(db, query, 5)] == ["one"]
    db.execute("SET ehub.mode = 'auto'")
    db.execute(
        "INSERT INTO spaces.s (key, embedding) SELECT 'x' || i, array_fill(i::real, ARRAY[8])"
        " FROM generate_series(1, 20000) AS i"
    )
    check_neighbors(nearest(db, [77.2] * DIMS, 3), table(db, "s"), "l2", np.full(8, 77.2), 3)


def test_an_empty_space(service, url, data_dir, db):
    with ehub.connect(url, data_dir=data_dir) as hub:
        hub.create_space("s", DIMS)
        settled(db)
        db.execute("SET ehub.mode = 'index'")
        assert nearest(db, [0.0] * DIMS, 5) == []
        assert (
            db.execute(
                "SELECT * FROM ehub.nearest_many('s', %s::vector[], 5)", [[literal([0.0] * DIMS)]]
            ).fetchall()
            == []
        )
        db.execute("SELECT ehub.set('s', 'a', %s)", [literal([1.0] * DIMS)])
        assert [n.key for n in nearest(db, [0.0] * DIMS, 5)] == ["a"]


def test_keys_of_every_kind_come_back(service, url, data_dir, db):
    keys = [
        "NULL",
        "null",
        "{}",
        '"',
        "\\",
        "a,b",
        " ",
        "\n",
        "ü€𝄞",
        "a'b",
        '{"x"}',
        '\\\\"',
        "x" * 900,
    ]
    with ehub.connect(url, data_dir=data_dir) as hub:
        space = hub.create_space("s", DIMS)
        space.multiset(keys, vectors(len(keys)))
        settled(db)
        db.execute("SET ehub.mode = 'index'")
        for key, vector in zip(keys, vectors(len(keys)), strict=True):
            assert nearest(db, vector, 1)[0].key == key
            assert len(nearest(db, key, 99, function="nearest_to")) == len(keys) - 1
        assert {n.key for n in nearest(db, vectors(1)[0], 99)} == set(keys)


def test_settings_choose_the_road(space, db, service):
    query = vectors(1)[0]

    def answers():
        return service.metrics.answers

    db.execute("SET ehub.mode = 'exact'")
    before = answers()
    assert nearest(db, query, 1)[0].key == "k0"
    assert answers() == before
    db.execute("SET ehub.mode = 'index'")
    assert nearest(db, query, 1)[0].key == "k0"
    assert answers() == before + 1
    # With few candidates the graph finds less: the setting arrives.
    rows = table(db, "s")

    def recall():
        right = 0
        for query in vectors(40, 3):
            true = sorted(rows, key=lambda key: float(np.linalg.norm(rows[key] - query)))[:10]
            right += len(set(true) & {n.key for n in nearest(db, query, 10)})
        return right / 400

    calibrated = recall()
    db.execute("SET ehub.ef_search = 10")
    assert recall() < calibrated
    db.execute("SET ehub.ef_search = 2000")
    assert recall() >= max(calibrated, 0.99)
    db.execute("SET ehub.consistency = 'eventual'")
    assert nearest(db, query, 1)[0].key == "k0"
    for name, value in (
        ("mode", "fast"),
        ("consistency", "strng"),
        ("ef_search", "many"),
        ("service_timeout", "-1"),
    ):
        db.execute(f"SET ehub.{name} = '{value}'")
        with pytest.raises(psycopg.DatabaseError, match=f"ehub.{name} is .*{value}"):
            nearest(db, query, 1)
        db.execute(f"RESET ehub.{name}")
    db.execute("SET ehub.mode = 'index'")
    service.close()
    with pytest.raises(psycopg.DatabaseError, match="the index cannot answer") as raised:
        nearest(db, query, 1)
    assert raised.value.sqlstate == "EH009"


def test_a_read_only_transaction_uses_the_index(space, url):
    with psycopg.connect(url) as reader:
        reader.execute("SET TRANSACTION READ ONLY")
        reader.execute("SET LOCAL ehub.mode = 'index'")
        assert nearest(reader, vectors(1)[0], 1)[0].key == "k0"


def test_python_asks_the_service(space, url, data_dir, service):
    with ehub.connect(url, data_dir=data_dir) as hub:
        assert hub.index == "service"
        assert "index: service" in repr(hub)
        space = hub.get_space("s")
        space.set("new", [5] * DIMS, {"a": 1})
        space.wait_until_indexed(30)
        before = service.metrics.queries
        assert space.nearest_neighbors(1, vector=[5] * DIMS) == [("new", 0.0, None)]
        assert space.nearest_neighbors(1, vector=[5] * DIMS, metadata=True)[0].metadata == {"a": 1}
        near = space.nearest_neighbors(3, key="new")
        assert near == space.multi_nearest_neighbors(4, vectors=[[5] * DIMS, [0] * DIMS])[0][1:]
        assert service.metrics.queries == before + 5
        with pytest.raises(ehub.KeyNotFoundError):
            space.nearest_neighbors(3, key="nobody")
    with ehub.connect(url, data_dir=data_dir, index="local") as hub:
        assert hub.index == "local"


def test_status_says_what_sql_searches_do(space, db, service):
    def road():
        rows = db.execute("SELECT in_sql, index_state, place FROM ehub.status").fetchall()
        return rows[0]

    road_, state, place = road()
    assert road_.startswith("by the index service")
    assert state == "ready"
    assert place.startswith("service at 127.0.0.1")
    service.close()
    assert road()[0] == "exact: the index service is not connected"
    db.execute("SELECT ehub.uninstall_service()")
    assert road()[0] == "exact: no index service is installed"
    assert db.execute("SELECT to_regnamespace('ehub_dblink')").fetchone() == (None,)
    assert nearest(db, vectors(1)[0], 1)[0].key == "k0"
    with pytest.raises(ehub.ServiceError, match="ehub install-service"):
        ehub.Space("s", space._database, "service", None).wait_until_indexed()
