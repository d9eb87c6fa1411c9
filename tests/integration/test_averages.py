"""Averages: computed, and kept in spaces that follow their source."""

import json
import threading

import numpy as np
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

import ehub
from ehub import cli

ROWS = [
    ("a", [1, 0, 2], {"user": "u1", "score": 2, "deep": {"lang": "en"}}),
    ("b", [0, 1, 1], {"user": "u1", "score": 0.5, "deep": {"lang": "de"}}),
    ("c", [3, 1, 0], {"user": 7, "score": -1}),
    ("d", [1, 1, 1], {"user": True}),
    ("e", [5, 5, 5], {"user": None, "score": 1}),
    ("f", [6, 5, 5], {"user": ["u1"], "score": 1, "deep": {"lang": "en"}}),
    ("g", [7, 5, 5], {}),
]
VECTORS = {key: np.array(vector, np.float64) for key, vector, _ in ROWS}


@pytest.fixture
def space(hub):
    space = hub.create_space("items", 3)
    space.multiset(ROWS)
    return space


@pytest.fixture
def hub(connect):
    return connect(index="none")


def mean(keys, weights=None):
    return np.average([VECTORS[key] for key in keys], axis=0, weights=weights)


def expected(rows, by="user", weight=None):
    """What a space of averages has to hold, by numpy in float64."""
    groups = {}
    for _, vector, note in rows:
        value = note.get(by)
        number = 1 if weight is None else note.get(weight)
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        if value is not None and not isinstance(value, list | dict):
            groups.setdefault(str(value), []).append((np.asarray(vector, np.float64), number))
    found = {}
    for value, members in groups.items():
        vectors, weights = zip(*members, strict=True)
        if sum(weights) != 0:
            note = {"rows": len(members)} | ({} if weight is None else {"weight": sum(weights)})
            found[value] = np.average(vectors, axis=0, weights=weights), note
    return found


def check(kept, rows, by="user", weight=None, *, zero=True):
    """The rows of a space of averages are those; where zero vectors cannot be, without them."""
    wanted = expected(rows, by, weight)
    wanted = {key: one for key, one in wanted.items() if zero or np.any(one[0])}
    found = {key: (vector, note) for key, vector, note in kept.items(metadata=True)}
    assert found.keys() == wanted.keys()
    for key, (vector, note) in found.items():
        np.testing.assert_allclose(vector, wanted[key][0], rtol=2e-6, atol=2e-6)
        assert note == wanted[key][1]


def follows(hub, name, by="user", weight=None):
    source = next(one.source for one in hub.kept_averages() if one.space == name)
    rows = [(k, v, n) for k, v, n in hub.get_space(source).items(metadata=True)]
    check(hub.get_space(name), rows, by, weight)


# --- computed


def test_of_keys(space):
    for keys, weights in (
        (["a"], None),
        (["a", "b", "a"], None),
        (["a", "b"], [1, 3]),
        (["a", "b", "a"], [0.25, 0, -2]),
        (["a", "c"], np.array([1e-90, 2e-90])),
        (["a", "c"], [1e99, 3e99]),
    ):
        found = space.average(keys, weights)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, mean(keys, weights), rtol=1e-6)
    assert space.current.average(["a"]).tolist() == [1, 0, 2]


def test_equal_weights_change_nothing(space):
    rng = np.random.default_rng(1)
    rows = {f"x{i}": rng.standard_normal(3) for i in range(57)}
    space.multiset(rows)
    plain = space.average(list(rows))
    assert plain.tobytes() == space.average(list(rows), [0.3] * 57).tobytes()


def test_of_rows(space, hub, db):
    np.testing.assert_allclose(space.average(), mean(VECTORS), rtol=1e-6)
    np.testing.assert_allclose(space.average(filter={"user": "u1"}), mean("abf"), rtol=1e-6)
    assert space.average(filter={"user": "nobody"}) is None
    assert hub.create_space("empty", 2).average() is None
    assert db.execute("SELECT ehub.average('empty')").fetchone() == (None,)
    (by_pgvector,) = db.execute("SELECT avg(embedding)::text FROM spaces.items").fetchone()
    assert space.average().tolist() == np.float32(eval(by_pgvector)).tolist()


def test_by_field(space):
    found = space.averages("user")
    assert found.keys() == {"u1", 7, True}
    np.testing.assert_allclose(found["u1"], mean("ab"), rtol=1e-6)
    found = space.averages("user", "score")
    assert found.keys() == {"u1", 7}
    np.testing.assert_allclose(found["u1"], mean("ab", [2, 0.5]), rtol=1e-6)
    found = space.averages("deep.lang", filter={"score": {">": 0.7}})
    np.testing.assert_allclose(found["en"], mean("af"), rtol=1e-6)
    assert space.averages("no.such") == {}
    space.multiset([("n1", [1, 1, 1], {"n": 1}), ("n2", [1, 1, 1], {"n": True})])
    with pytest.raises(ehub.InvalidValueError, match="one key"):
        space.averages("n")


def test_bad_values(space, hub, db):
    for call, error, words in (
        (lambda: space.average([]), ehub.InvalidValueError, "empty batch"),
        (lambda: space.average(["a", "zz"]), ehub.KeyNotFoundError, "'zz'"),
        (lambda: space.average(["a"], [1, 2]), ehub.InvalidValueError, "1 keys, 2 weights"),
        (lambda: space.average(["a", "b"], [1, np.nan]), ehub.InvalidValueError, "'b'.*NaN"),
        (lambda: space.average(["a", "b"], [np.inf, 1]), ehub.InvalidValueError, "'a'.*Inf"),
        (lambda: space.average(["a"], [1e200]), ehub.InvalidValueError, "1e-100 to 1e100"),
        (lambda: space.average(["a"], ["x"]), ehub.InvalidValueError, "number"),
        (lambda: space.average(["a"], {"a": 1}), ehub.InvalidValueError, "list"),
        (lambda: space.average("ab"), ehub.InvalidKeyError, "list of keys"),
        (lambda: space.average(["a", "b"], [1, -1]), ehub.InvalidValueError, "sum to zero"),
        (lambda: space.average(["a", "b", "c"], [0.1, 0.2, -0.3]), ehub.InvalidValueError, "zero"),
        (lambda: space.average(weights=[1]), ehub.InvalidValueError, "keys"),
        (lambda: space.average(["a"], filter={"x": 1}), ehub.InvalidValueError, "not both"),
        (lambda: space.average(filter={"a": {"~": 1}}), ehub.InvalidFilterError, "~"),
        (lambda: space.average(filter=[1]), ehub.InvalidFilterError, "mapping"),
        (lambda: space.average(filter={"a": object()}), ehub.InvalidFilterError, "JSON"),
        (lambda: space.averages(""), ehub.InvalidValueError, "by is the name"),
        (lambda: space.averages(7), ehub.InvalidValueError, "by is the name"),
        (lambda: space.averages("x" * 1001), ehub.InvalidValueError, "1000 bytes"),
        (lambda: space.averages("user", "a..b"), ehub.InvalidFilterError, "empty"),
        (lambda: hub.create_average("t", "items", ""), ehub.InvalidValueError, "by is the name"),
        (lambda: hub.create_average("t", "nowhere", "a"), ehub.SpaceNotFoundError, "nowhere"),
        (lambda: hub.create_average("t", "items@v1", "a"), ehub.InvalidNameError, "version"),
        (lambda: hub.create_average("items", "items", "a"), ehub.SpaceExistsError, "items"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert hub.kept_averages() == []
    with pytest.raises(psycopg.Error) as caught:
        db.execute("SELECT ehub.average('items', ARRAY['a', NULL])")
    assert caught.value.sqlstate == "EH008"


def test_what_float32_cannot_hold(hub):
    """Tiny numbers and unlike weights are no errors; what is too large says so."""
    space = hub.create_space("far", 2)
    space.multiset([("x", [1e-38, 1e18], {"w": 1e-99}), ("y", [3e-38, 1], {"w": 1e99})])
    np.testing.assert_allclose(space.average(["x", "y"], [1e-30, 1e30]), [3e-38, 1], rtol=1e-6)
    with pytest.raises(ehub.InvalidValueError, match="too large"):
        space.average(["x", "y", "x"], [1, -1, 1e-25])
    # A weight that cannot be used takes no part, and stops nobody from writing.
    hub.create_average("kept", "far", "v", "w")
    weights = ("1e400", "1e-400", '"7"', "null", "true", "[1]", "1e100", "-1e-100")
    with psycopg.connect(hub.conninfo, autocommit=True) as db:
        for weight in weights:
            note = f'{{"v": {weights.index(weight)}, "w": {weight}}}'
            db.execute("INSERT INTO spaces.far VALUES (%s, '[1e18,1e-38]', %s)", [weight, note])
    assert sorted(hub.get_space("kept")) == ["6", "7"]
    assert sorted(space.averages("v", "w")) == [6, 7]
    np.testing.assert_allclose(hub.get_space("kept").get("7"), [1e18, 1e-38], rtol=1e-6)


def test_accuracy(hub):
    """Against numpy in float64, on 100,000 rows: the last rounding to float32 and little more."""
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((100_000, 20)) + 0.1).astype(np.float32)
    weights = rng.random(100_000)
    space = hub.create_space("many", 20)
    keys = [f"k{i}" for i in range(len(vectors))]
    space.multiset(keys, vectors, [{"g": "all", "w": float(weight)} for weight in weights])
    exact = vectors.astype(np.float64)
    for found, wanted in (
        (space.average(), exact.mean(0)),
        (space.average(keys, weights), np.average(exact, axis=0, weights=weights)),
        (space.averages("g", "w")["all"], np.average(exact, axis=0, weights=weights)),
    ):
        assert np.max(np.abs(found - wanted) / np.abs(wanted)) < 1e-7


# --- kept


def test_follows_all_kinds_of_changes(hub, space, db):
    plain = hub.create_average("plain", "items", "user")
    hub.create_average("taste", "items", "user", "score")
    assert hub.kept_averages() == [
        ehub.KeptAverage("plain", "items", "user", None),
        ehub.KeptAverage("taste", "items", "user", "score"),
    ]
    assert (plain.dims, plain.metric) == (3, "l2")

    def both():
        follows(hub, "plain")
        follows(hub, "taste", weight="score")

    both()
    assert plain.metadata("u1") == {"rows": 2}
    assert "true" in plain
    assert "7" in plain
    space.set("a", [9, 9, 9])
    both()
    space.set("a", [9, 9, 9], {"user": "u2", "score": 3})
    both()
    space.multiset([("b", [1, 2, 3]), ("new", [1, 1, 1], {"user": "u2", "score": -3})])
    both()
    assert "u2" in plain
    assert "u2" not in hub.get_space("taste")
    space.set("long", [1, 2, 3], {"user": "x" * 5000, "score": 1})
    space.set("nothing", [1, 2, 3], {"user": "", "score": 1})
    assert len(plain) == 4
    space.multidelete(["long", "nothing"])
    db.execute("UPDATE spaces.items SET key = key || '2'")
    both()
    with db.transaction(force_rollback=True):
        db.execute("DELETE FROM spaces.items")
    both()
    with db.transaction():
        db.execute('UPDATE spaces.items SET metadata = \'{"user": 1, "score": 1}\'')
        with db.transaction(force_rollback=True):
            db.execute("DELETE FROM spaces.items")
            assert db.execute("SELECT count(*) FROM spaces.plain").fetchone() == (0,)
    both()
    assert list(plain) == ["1"]
    space.delete("c2")
    both()
    space.delete_all()
    assert len(plain) == 0
    space.multiset(ROWS)
    (relation,) = db.execute(
        "SELECT 'ehub_data.v' || version_id FROM ehub.catalogue WHERE space = 'items'"
    ).fetchone()
    db.execute(f"TRUNCATE {relation}")
    assert len(plain) == 0
    space.multiset(ROWS)
    both()


def test_names_of_fields(hub):
    space = hub.create_space("odd", 2)
    names = {"a.b": {"a": {"b": "x"}}, r"a\.b": {"a.b": "x"}, "it's": {"it's": "x"}, 'q"%s': {}}
    names['q"%s'] = {'q"%s': "x"}
    for n, (field, note) in enumerate(names.items()):
        hub.create_average(f"by{n}", "odd", field)
        space.set(f"k{n}", [n, 1], note)
        assert list(hub.get_space(f"by{n}").items())[0][1].tolist() == [n, 1]
        assert space.averages(field)["x"].tolist() == [n, 1]
    # A number is no place in a list.
    hub.create_average("places", "odd", "list.0")
    space.set("list", [1, 1], {"list": ["x"]})
    assert len(hub.get_space("places")) == 0


def test_what_a_metric_cannot_take(hub):
    space = hub.create_space("items", 2, "ip")
    space.multiset([("a", [1, 0], {"g": 1}), ("b", [-1, 0], {"g": 1}), ("c", [1, 1], {"g": 2})])
    cosine = hub.create_average("directions", "items", "g", metric="cosine")
    inner = hub.create_average("sums", "items", "g")
    assert (list(cosine), sorted(inner)) == (["2"], ["1", "2"])
    space.set("b", [0, 1])
    assert sorted(cosine) == ["1", "2"]
    assert cosine.nearest_neighbors(1, vector=[0.5, 0.6])[0].key in ("1", "2")


def test_is_searched_by_its_index(connect, space):
    hub = connect(index="local")
    kept = hub.create_average("taste", "items", "user")
    kept.wait_until_indexed(30)
    hub.get_space("items").set("z", [100, 0, 0], {"user": "far"})
    kept.wait_until_indexed(30)
    assert kept.nearest_neighbors(1, vector=[99, 0, 0])[0].key == "far"


def test_nobody_writes_it(hub, space, db):
    kept = hub.create_average("taste", "items", "user")
    kept.checkpoint("then")
    version = kept.current
    for call in (
        lambda: kept.set("x", [1, 2, 3]),
        lambda: version.multiset({"x": [1, 2, 3]}),
        lambda: kept.delete("u1"),
        lambda: kept.delete_all(),
        lambda: kept.restore("then"),
        lambda: kept.freeze(),
        lambda: kept.create_version("v2"),
        lambda: kept.drop_version("v1"),
        lambda: kept.promote("v1"),
        lambda: kept.rollback(),
        lambda: kept.grant("pg_monitor", "write"),
        lambda: space.download_snapshot().write_to_space("taste", on_conflict="ours"),
    ):
        with pytest.raises(ehub.ReadOnlyError, match="follows its source"):
            call()
    for statement in ("UPDATE {} SET key = 'y'", "TRUNCATE {}", "DELETE FROM {}"):
        with pytest.raises(psycopg.Error) as caught:
            db.execute(statement.format(f"ehub_data.v{relation_of(db, 'taste')}"))
        assert caught.value.sqlstate == "EH025"
    # Nor does somebody's trigger, which is deep enough but not the owner's.
    db.execute("CREATE ROLE ehub_keeper LOGIN PASSWORD 'x'")
    try:
        kept.grant("ehub_keeper", "admin")
        db.execute("CREATE SCHEMA keeper AUTHORIZATION ehub_keeper")
        db.execute(
            "SET ROLE ehub_keeper; CREATE TABLE keeper.t (a int);"
            "CREATE FUNCTION keeper.f() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN DELETE FROM spaces.taste; RETURN NULL; END';"
            "CREATE TRIGGER f AFTER INSERT ON keeper.t EXECUTE FUNCTION keeper.f()"
        )
        with pytest.raises(psycopg.Error) as caught:
            db.execute("INSERT INTO keeper.t VALUES (1)")
        assert caught.value.sqlstate == "EH025"
    finally:
        db.execute("RESET ROLE; DROP OWNED BY ehub_keeper; DROP ROLE ehub_keeper")
    follows(hub, "taste")
    assert len(kept.at("then")) == 3
    with pytest.raises(ehub.InvalidValueError, match="average itself"):
        hub.create_average("again", "taste", "rows")


def relation_of(db, space):
    return db.execute(
        "SELECT version_id FROM ehub.catalogue WHERE space = %s AND current", [space]
    ).fetchone()[0]


def test_checkpoints_of_the_source(hub, space):
    kept = hub.create_average("taste", "items", "user")
    space.checkpoint("before")
    kept.checkpoint("before")
    space.multiset([("a", [0, 0, 9], {"user": "x"}), ("zz", [1, 1, 1], {"user": 7})])
    space.delete("b")
    follows(hub, "taste")
    space.restore("before")
    check(kept, ROWS)
    check(kept.at("before"), ROWS)


def test_versions_go_together(hub, space):
    old = hub.create_space("old", 3)
    old.create_version("v2")
    old.promote("v2")
    old.drop_version("v1", force=True)
    assert [one.name for one in hub.create_average("old_by", "old", "user").versions()] == ["v2"]

    kept = hub.create_average("taste", "items", "user", metric="ip")
    copy = space.create_version("copy", from_version="v1")
    check(kept.version("copy"), ROWS)
    other = space.create_version("other", dims=2, metric="cosine")
    other.multiset([("a", [1, 0], {"user": "o"}), ("b", [0, 1], {"user": "o"})])
    assert (kept.version("copy").metric, kept.version("other").metric) == ("ip", "cosine")
    assert kept.version("other").get("o").tolist() == [0.5, 0.5]
    copy.delete("a")
    assert kept.current.name == "v1"
    check(kept, ROWS)
    space.promote("other")
    assert (kept.current.name, list(kept), kept.dims) == ("other", ["o"], 2)
    space.set("c", [1, 1], {"user": "p"})
    assert sorted(kept) == ["o", "p"]
    space.rollback()
    assert kept.current.name == "v1"
    check(kept, ROWS)
    assert [entry.kind for entry in kept.history()] == ["rollback", "promote"]
    space.drop_version("other", force=True)
    assert [one.name for one in kept.versions()] == ["v1", "copy"]
    copy.freeze()
    with pytest.raises(ehub.FrozenError):
        copy.set("a", [1, 2, 3])
    check(kept.version("copy"), [row for row in ROWS if row[0] != "a"])


def test_deleting(hub, space, db):
    hub.create_average("one", "items", "user")
    hub.create_average("two", "items", "user")
    space.create_version("v2", from_version="v1")
    with pytest.raises(ehub.SpaceInUseError, match="'one', 'two'"):
        hub.delete_space("items")
    hub.delete_space("one")
    space.set("a", [4, 4, 4])
    follows(hub, "two")
    hub.delete_space("two")
    left = db.execute(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'ehub_average%' UNION ALL"
        " SELECT relname FROM pg_class WHERE relnamespace = 'ehub_data'::regnamespace"
        " AND relname ~ '^a[0-9]' UNION ALL"
        " SELECT proname FROM pg_proc WHERE proname LIKE 'follow_v%'"
    ).fetchall()
    assert left == []
    assert hub.kept_averages() == []
    hub.delete_space("items")


def test_roles(hub, space, db, url):
    """Writers of the source change averages that they may not see; grants are those of any space."""
    names = ["ehub_w", "ehub_m", "ehub_r"]
    for name in names:
        db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
    try:
        space.grant("ehub_w", "write", rows={"tenant": 1})
        space.grant("ehub_m", "admin")
        with ehub.connect(make_conninfo(url, user="ehub_m", password="x"), index="none") as maker:
            with pytest.raises(ehub.AccessDeniedError, match="makes no spaces"):
                maker.create_average("taste", "items", "user")
            hub.grant_create("ehub_m")
            maker.create_average("taste", "items", "user").grant("ehub_r", "read")
            assert [g.privilege for g in maker.get_space("taste").grants()] == ["admin", "read"]
            assert [entry.action for entry in maker.get_space("taste").audit()][-2:] == [
                "create_average",
                "create_space",
            ]
        hub.grant_create("ehub_w")
        with ehub.connect(make_conninfo(url, user="ehub_w", password="x"), index="none") as writer:
            with pytest.raises(ehub.AccessDeniedError):
                writer.create_average("mine", "items", "user")
            writer.get_space("items").set("w", [8, 8, 8], {"user": "u1", "tenant": 1})
            # Of the rows that one sees.
            assert writer.get_space("items").average().tolist() == [8, 8, 8]
            with pytest.raises(ehub.KeyNotFoundError):
                writer.get_space("items").average(["w", "a"])
            assert writer.kept_averages() == []
            with pytest.raises(ehub.SpaceNotFoundError):
                writer.get_space("taste")
        follows(hub, "taste")
        with ehub.connect(make_conninfo(url, user="ehub_r", password="x"), index="none") as reader:
            assert [one.space for one in reader.kept_averages()] == ["taste"]
            assert reader.get_space("taste").metadata("u1") == {"rows": 3}
        hub.get_space("taste").revoke("ehub_r")
        hub.get_space("taste").grant("ehub_r", "read", rows={"rows": 1})
        space.create_version("v2", from_version="v1")
        space.promote("v2")
        with ehub.connect(make_conninfo(url, user="ehub_r", password="x"), index="none") as reader:
            assert sorted(reader.get_space("taste")) == ["7", "true"]
        assert hub.doctor() == []
    finally:
        for name in names:
            db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


# --- writers at the same time


def test_neither_of_two_writers_is_lost(hub, space, url):
    hub.create_average("taste", "items", "user")
    with psycopg.connect(url) as one, psycopg.connect(url) as two:
        write = 'INSERT INTO spaces.items VALUES (%s, %s, \'{"user": "u1"}\')'
        one.execute(write, ["x", "[9,0,0]"])
        waiting = threading.Thread(target=lambda: two.execute(write, ["y", "[0,9,0]"]))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        one.commit()
        waiting.join(10)
        two.commit()
    follows(hub, "taste")
    assert hub.get_space("taste").metadata("u1") == {"rows": 4}


def test_writers_of_other_values_do_not_wait(hub, space, url):
    hub.create_average("taste", "items", "user")
    with psycopg.connect(url) as one, psycopg.connect(url) as two:
        two.execute("SET lock_timeout = '2s'")
        write = "INSERT INTO spaces.items VALUES (%s, '[1,1,1]', %s::jsonb)"
        one.execute(write, ["x", '{"user": "one"}'])
        two.execute(write, ["y", '{"user": "two"}'])


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_old_snapshot_fails_and_is_not_wrong(hub, space, url, level):
    def stale(between):
        with psycopg.connect(url) as old:
            old.execute(f"BEGIN ISOLATION LEVEL {level}")
            old.execute("SELECT count(*) FROM spaces.items")
            between()
            with pytest.raises(psycopg.errors.SerializationFailure):
                old.execute(
                    "INSERT INTO spaces.items VALUES ('o', '[1,1,1]', '{\"user\": \"u1\"}')"
                )

    # Also where there were no averages then.
    stale(lambda: (space.set("a", [3, 3, 3]), hub.create_average("taste", "items", "user")))
    stale(lambda: space.set("n", [5, 5, 5], {"user": "u1"}))
    stale(lambda: space.delete("n"))
    follows(hub, "taste")
    with psycopg.connect(url) as fresh:
        fresh.execute(f"BEGIN ISOLATION LEVEL {level}")
        fresh.execute("INSERT INTO spaces.items VALUES ('o', '[1,1,1]', '{\"user\": \"u1\"}')")
    follows(hub, "taste")


def test_many_writers(hub, space, url):
    """Upserts, moves and deletes of rows with the same few values, in single statements."""
    hub.create_average("taste", "items", "user", "score")
    hub.create_average("plain", "items", "user")
    failures, done = [], []

    def work(seed):
        rng = np.random.default_rng(seed)
        with ehub.connect(url, index="none") as mine:
            items = mine.get_space("items")
            for _ in range(25):
                keys = {f"k{i}" for i in rng.integers(0, 60, rng.integers(1, 8))}
                rows = [
                    (
                        key,
                        rng.standard_normal(3),
                        {"user": f"u{rng.integers(5)}", "score": int(rng.integers(1, 4))},
                    )
                    for key in sorted(keys)
                ]
                try:
                    if rng.random() < 0.3:
                        with psycopg.connect(url, autocommit=True) as raw:
                            raw.execute("DELETE FROM spaces.items WHERE key = %s", [rows[0][0]])
                    else:
                        items.multiset(rows)
                    done.append(1)
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    follows(hub, "taste", weight="score")
    follows(hub, "plain")
    assert failures == []
    assert len(done) == 100


def test_created_and_deleted_beside_writers(hub, space, url):
    stop = threading.Event()
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        with ehub.connect(url, index="none") as mine:
            items = mine.get_space("items")
            while not stop.is_set():
                try:
                    items.set(f"k{rng.integers(30)}", rng.standard_normal(3), {"user": f"u{seed}"})
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            hub.create_average("taste", "items", "user")
            space.create_version(f"w{turn}", from_version="v1")
            if turn % 2:
                space.promote(f"w{turn}")
                space.rollback()
            space.drop_version(f"w{turn}", force=True)
            if turn < 3:
                hub.delete_space("taste")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    follows(hub, "taste")


def test_upgrade_makes_the_functions_anew(hub, space, url, db, tmp_path):
    from contextlib import closing

    from ehub.config import Target
    from ehub.database import Database
    from ehub.migrate import migrate

    hub.create_average("taste", "items", "user")
    name = sql.Identifier("ehub_data", f"follow_v{relation_of(db, 'taste')}")
    db.execute(
        sql.SQL(
            "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NULL; END'"
        ).format(name)
    )
    db.execute("UPDATE ehub.setting SET value = 'old' WHERE name = 'sql_digest'")
    with closing(Database(Target(url, tmp_path))) as database:
        assert migrate(database)
    space.set("a", [4, 5, 6])
    follows(hub, "taste")


def test_commands(hub, space, url):
    def run(*words):
        return CliRunner().invoke(cli.app, [*words, "--database", url])

    assert json.loads(run("average", "items", "a", "b").output) == [0.5, 0.5, 1.5]
    assert json.loads(run("average", "items", "--filter", '{"user": 7}').output) == [3, 1, 0]
    assert json.loads(run("average", "items", "--filter", '{"user": 8}').output) is None
    found = json.loads(
        run("averages", "items", "--by", "user", "--weight", "score", "--json").output
    )
    assert found[1] == {"user": 7, "average": [3, 1, 0]}
    assert '"u1"' in run("averages", "items@v1", "--by", "user").output
    made = run("create-average", "taste", "--source", "items", "--by", "user")
    assert "3 averages of items by user" in made.output
    follows(hub, "taste")
    for words in (
        ["average", "items", "a", "--filter", "{}"],
        ["average", "items", "--filter", "{"],
    ):
        assert isinstance(run(*words).exception, ehub.InvalidValueError)
