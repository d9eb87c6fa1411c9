"""Whatever is wrong gets one clear error that names it, and changes nothing."""

import datetime

import numpy as np
import psycopg
import pytest

import ehub

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["none", "local"])
def space(request, connect):
    hub = connect(index=request.param)
    space = hub.create_space("fruit", 3, "cosine")
    space.multiset([("apple", [1, 0, 0], {"n": 1}), ("orange", [1, 1, 0], {"n": 2})])
    if request.param == "local":
        space.wait_until_indexed(30)
    return space


def state(db):
    return (
        db.execute(
            "SELECT key, embedding::text, metadata FROM spaces.fruit ORDER BY key"
        ).fetchall(),
        db.execute("SELECT space, version_id FROM ehub.catalogue ORDER BY space").fetchall(),
        db.execute("SELECT count(*) FROM ehub.change").fetchone(),
    )


GOOD = [("new", [0, 0, 1])]
PYTHON = {
    "set: too short": (lambda s: s.set("k", [1, 2]), "key 'k'.*3 dims is needed.*2 dims"),
    "set: too long": (lambda s: s.set("k", [1, 2, 3, 4]), "key 'k'.*3 dims is needed.*4 dims"),
    "set: NaN": (lambda s: s.set("k", [1, NAN, 3]), "key 'k'.*NaN at position 1"),
    "set: infinity": (lambda s: s.set("k", [1, 2, -INF]), "key 'k'.*infinity.*position 2"),
    "set: zero": (lambda s: s.set("k", [0, 0, 0]), "key 'k'.*zero vector"),
    "set: tiny": (lambda s: s.set("k", [1e-30, 0, 0]), "key 'k'.*length of 1e-30 is too small"),
    "set: beyond float": (lambda s: s.set("k", [10**400, 0, 0]), "key 'k'.*int too large"),
    "nearest_neighbors: huge": (
        lambda s: s.nearest_neighbors(1, vector=[10**400, 0, 0]),
        "query.*int too large",
    ),
    "multi_nearest_neighbors: huge": (
        lambda s: s.multi_nearest_neighbors(1, vectors=[[10**400, 0, 0]]),
        "int too large",
    ),
    "multiset: None": (lambda s: s.multiset(None), "rows.*not None"),
    "multiset: a number": (lambda s: s.multiset(5), "rows.*not 5"),
    "set: a time in metadata": (
        lambda s: s.set("k", [1, 0, 0], {"n": {"t": datetime.datetime(2024, 1, 1)}}),
        "key 'k': metadata, field 'n', 't' is not JSON: datetime",
    ),
    "set: NaN in metadata": (
        lambda s: s.set("k", [1, 0, 0], {"ok": 1, "a": [1, NAN]}),
        "key 'k': metadata, field 'a' is not JSON",
    ),
    "set: huge": (lambda s: s.set("k", [3e38, 3e38, 0]), "key 'k'.*too large"),
    "set: text": (lambda s: s.set("k", "abc"), "key 'k'.*numbers"),
    "set: empty key": (lambda s: s.set("", [1, 2, 3]), "1 to 1024 bytes"),
    "set: NUL in key": (lambda s: s.set("a\0", [1, 2, 3]), "no NUL"),
    "set: long key": (lambda s: s.set("x" * 2000, [1, 2, 3]), "2000 bytes"),
    "set: no string": (lambda s: s.set(7, [1, 2, 3]), "a key is a string, not int"),
    "set: metadata": (lambda s: s.set("k", [1, 2, 3], metadata=[1]), "key 'k'.*metadata"),
    "set: metadata NaN": (lambda s: s.set("k", [1, 2, 3], {"a": NAN}), "key 'k'.*not JSON"),
    "set: metadata NUL": (lambda s: s.set("k", [1, 2, 3], {"a": "\0"}), "key 'k'.*NUL"),
    "multiset: nothing": (lambda s: s.multiset({}), "empty batch"),
    "multiset: no pairs": (lambda s: s.multiset(iter([])), "empty batch"),
    "multiset: empty arrays": (lambda s: s.multiset([], np.empty((0, 3))), "empty batch"),
    "multiset: a bad row": (
        lambda s: s.multiset([*GOOD, ("bad", [1, NAN, 3])]),
        "key 'bad'.*NaN",
    ),
    "multiset: the last of many rows": (
        lambda s: s.multiset([(f"k{i}", [1, 1, 1]) for i in range(9000)] + [("bad", [1])]),
        "key 'bad'.*1 dims",
    ),
    "multiset: ragged": (lambda s: s.multiset(["a", "b"], [[1, 2, 3], [1, 2]]), "key 'b'"),
    "multiset: counts": (lambda s: s.multiset(["a"], np.ones((2, 3))), "1 keys, 2 vectors"),
    "multiset: no pair": (lambda s: s.multiset([("a",)]), "a row is"),
    "multiset: a string": (lambda s: s.multiset("abc"), "pairs of key and vector, not 'abc'"),
    "multiset: metadata": (lambda s: s.multiset([("a", [1, 2, 3], 5)]), "key 'a'.*metadata"),
    "multiget: unknown": (lambda s: s.multiget(["apple", "nope"]), "no key 'nope'"),
    "multiget: nothing": (lambda s: s.multiget([]), "empty batch"),
    "get: unknown": (lambda s: s.get("nope"), "'fruit' has no key 'nope'"),
    "metadata: unknown": (lambda s: s.metadata("nope"), "'fruit' has no key 'nope'"),
    "delete: unknown": (lambda s: s.delete("nope"), "'fruit' has no key 'nope'"),
    "multidelete: one unknown": (lambda s: s.multidelete(["apple", "nope"]), "no key 'nope'"),
    "multidelete: nothing": (lambda s: s.multidelete([]), "empty batch"),
    "multidelete: a string": (lambda s: s.multidelete("apple"), "not the string"),
    "neighbours: unknown key": (lambda s: s.nearest_neighbors(1, key="nope"), "no key 'nope'"),
    "neighbours: k": (lambda s: s.nearest_neighbors(0, key="apple"), "k is a number"),
    "neighbours: dims": (lambda s: s.nearest_neighbors(1, vector=[1, 2]), "query.*3 dims"),
    "neighbours: NaN": (lambda s: s.nearest_neighbors(1, vector=[1, NAN, 2]), "query.*NaN"),
    "neighbours: zero": (lambda s: s.nearest_neighbors(1, vector=[0, 0, 0]), "query.*zero"),
    "neighbours: both": (
        lambda s: s.nearest_neighbors(1, key="apple", vector=[1, 2, 3]),
        "just one of them",
    ),
    "neighbours: neither": (lambda s: s.nearest_neighbors(1), "just one of them"),
    "neighbours: consistency": (
        lambda s: s.nearest_neighbors(1, key="apple", consistency="weak"),
        "consistency is",
    ),
    "batch: nothing": (lambda s: s.multi_nearest_neighbors(1, vectors=[]), "queries"),
    "batch: no rows": (
        lambda s: s.multi_nearest_neighbors(1, vectors=np.empty((0, 3))),
        "empty batch",
    ),
    "batch: a bad row": (
        lambda s: s.multi_nearest_neighbors(1, vectors=[[1, 2, 3], [INF, 0, 0]]),
        "queries, row 1.*infinity",
    ),
}


@pytest.mark.parametrize("case", PYTHON)
def test_in_python(space, db, case):
    call, message = PYTHON[case]
    before = state(db)
    with pytest.raises(ehub.EhubError, match=message) as raised:
        call(space)
    assert isinstance(raised.value, KeyError if "unknown" in case else ValueError)
    assert state(db) == before
    # And the space goes on.
    space.set("apple", [1, 0, 0])
    assert space.nearest_neighbors(1, vector=[1, 0, 0])[0].key == "apple"


HUB = {
    "a quote": (lambda h: h.create_space("a'b", 3), ehub.InvalidNameError, "a''b"),
    "double quotes": (lambda h: h.create_space('a"b', 3), ehub.InvalidNameError, 'a"b'),
    "a path": (lambda h: h.create_space("../../x", 3), ehub.InvalidNameError, r"\.\./"),
    "no name": (lambda h: h.create_space("", 3), ehub.InvalidNameError, "''"),
    "a long name": (lambda h: h.create_space("x" * 41, 3), ehub.InvalidNameError, "40 letters"),
    "NUL": (lambda h: h.create_space("a\0", 3), ehub.InvalidNameError, "NUL"),
    "a newline": (lambda h: h.create_space("a\n", 3), ehub.InvalidNameError, "40 letters"),
    "no string": (lambda h: h.create_space(None, 3), ehub.InvalidNameError, "None"),
    "twice": (lambda h: h.create_space("fruit", 3), ehub.SpaceExistsError, "'fruit' already"),
    "no dims": (lambda h: h.create_space("x", 0), ehub.InvalidValueError, "dims.*not 0"),
    "many dims": (lambda h: h.create_space("x", 16001), ehub.InvalidValueError, "not 16001"),
    "huge dims": (lambda h: h.create_space("x", 10**30), ehub.InvalidValueError, "dims"),
    "no number": (lambda h: h.create_space("x", "3"), ehub.InvalidValueError, "dims.*'3'"),
    "metric": (lambda h: h.create_space("x", 3, "l1"), ehub.InvalidValueError, "not 'l1'"),
    "M": (lambda h: h.create_space("x", 3, M=1), ehub.InvalidValueError, "M is.*not 1"),
    "ef": (lambda h: h.create_space("x", 3, ef_construction=1), ehub.InvalidValueError, "ef_c"),
    "recall": (lambda h: h.create_space("x", 3, target_recall=1), ehub.InvalidValueError, "0.999"),
    "recall NaN": (lambda h: h.create_space("x", 3, target_recall=NAN), ValueError, "recall"),
    "recall text": (lambda h: h.create_space("x", 3, target_recall="high"), ValueError, "'high'"),
    "get": (lambda h: h.get_space("nope"), ehub.SpaceNotFoundError, "'nope'"),
    "get a path": (lambda h: h.get_space("../x"), ehub.SpaceNotFoundError, "there is no space"),
    "delete": (lambda h: h.delete_space("nope"), ehub.SpaceNotFoundError, "'nope'"),
}


@pytest.mark.parametrize("case", HUB)
def test_of_a_hub(hub, db, case):
    call, kind, message = HUB[case]
    hub.create_space("fruit", 3).set("apple", [1, 0, 0])
    before = state(db)
    with pytest.raises(kind, match=message):
        call(hub)
    assert state(db) == before


SQL = {
    "dims": (
        "INSERT INTO spaces.fruit VALUES ('new', '[0,0,1]'), ('k', '[1,2]')",
        "EH004",
        "space 'fruit', key 'k': a vector of 3 dims is needed, this one has 2",
    ),
    "zero": ("INSERT INTO spaces.fruit VALUES ('k', '[0,0,0]')", "EH004", "key 'k'.*zero vector"),
    "tiny": (
        "UPDATE spaces.fruit SET embedding = '[1e-30,0,0]'",
        "EH004",
        "key .*1e-30 is too small",
    ),
    "huge": ("INSERT INTO spaces.fruit VALUES ('k', '[3e38,0,0]')", "EH004", "too large"),
    "NaN": ("INSERT INTO spaces.fruit VALUES ('k', '[NaN,0,0]')", "22", "NaN not allowed"),
    "infinity": ("INSERT INTO spaces.fruit VALUES ('k', '[Infinity,0,0]')", "22", "infinite value"),
    "no vector": ("INSERT INTO spaces.fruit VALUES ('k', NULL)", "23502", "embedding"),
    "no key": ("INSERT INTO spaces.fruit VALUES (NULL, '[1,2,3]')", "23502", "key"),
    "empty key": (
        "INSERT INTO spaces.fruit VALUES ('', '[1,2,3]')",
        "EH006",
        "key '': a key has 1",
    ),
    "long key": ("INSERT INTO spaces.fruit VALUES (repeat('x', 1025), '[1,2,3]')", "EH006", "1025"),
    "twice": ("INSERT INTO spaces.fruit VALUES ('apple', '[1,2,3]')", "23505", "apple"),
    "metadata": (
        "UPDATE spaces.fruit SET metadata = '[1]' WHERE key = 'apple'",
        "EH007",
        "key 'apple': metadata is a JSON object, not array",
    ),
    "create: quote": ("SELECT ehub.create_space('a''b', 3)", "EH003", "not 'a''b'"),
    "create: null": ("SELECT ehub.create_space(NULL, 3)", "EH003", "not NULL"),
    "create: twice": ("SELECT ehub.create_space('fruit', 3)", "EH002", "'fruit' already"),
    "create: dims": ("SELECT ehub.create_space('x', -1)", "EH005", "'x': dims .* not -1"),
    "create: metric": ("SELECT ehub.create_space('x', 3, 'L2')", "EH005", "not 'L2'"),
    "create: null metric": ("SELECT ehub.create_space('x', 3, NULL)", "EH005", "not NULL"),
    "delete": ("SELECT ehub.delete_space('nope')", "EH001", "no space 'nope'"),
    "delete: null": ("SELECT ehub.delete_space(NULL)", "EH001", "no space NULL"),
    "exact: space": ("SELECT ehub.nearest_exact('nope', '[1,2,3]', 1)", "EH001", "'nope'"),
    "exact: dims": ("SELECT ehub.nearest_exact('fruit', '[1,2]', 1)", "EH004", "3 dims is needed"),
    "exact: null": ("SELECT ehub.nearest_exact('fruit', NULL, 1)", "EH004", "none"),
    "exact: k": ("SELECT ehub.nearest_exact('fruit', '[1,2,3]', 0)", "EH005", "not 0"),
    "exact: zero": ("SELECT ehub.nearest_exact('fruit', '[0,0,0]', 1)", "EH004", "'fruit', query"),
    "exact: key": ("SELECT ehub.nearest_exact_to('fruit', 'nope', 1)", "EH008", "no key 'nope'"),
}


@pytest.mark.parametrize("case", SQL)
def test_in_sql(hub, db, case):
    statement, code, message = SQL[case]
    hub.create_space("fruit", 3, "cosine").set("apple", [1, 0, 0])
    before = state(db)
    with pytest.raises(psycopg.Error, match=message) as raised:
        db.execute(statement)
    assert raised.value.sqlstate.startswith(code)
    assert state(db) == before


def test_copy_into_a_data_table_is_held_to_the_same_rules(hub, db):
    hub.create_space("fruit", 3, "cosine")
    (relation,) = db.execute("SELECT 'ehub_data.v' || version_id FROM ehub.catalogue").fetchone()
    with pytest.raises(psycopg.Error, match=r"key 'k': a vector of 3 dims is needed"):
        with db.cursor().copy(f"COPY {relation} (key, embedding) FROM STDIN") as copy:
            copy.write("good\t[1,2,3]\nk\t[1,2]\n")
    assert len(hub.get_space("fruit")) == 0
