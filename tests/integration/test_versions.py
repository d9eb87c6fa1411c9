"""Versions beside each other: promoted, rolled back, compared, frozen, dropped."""

import threading
import time

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors

import ehub

RANDOM = np.random.default_rng(4)
KEYS = [f"k{i}" for i in range(300)]
V1 = RANDOM.standard_normal((300, 8)).astype(np.float32)
V2 = RANDOM.standard_normal((300, 5)).astype(np.float32)


@pytest.fixture
def space(hub):
    space = hub.create_space("items", 8)
    space.multiset(KEYS, V1, [{"version": 1}] * 300)
    return space


@pytest.fixture
def second(space):
    version = space.create_version("v2", dims=5, metric="cosine")
    version.multiset(KEYS, V2, [{"version": 2}] * 300)
    return version


@pytest.fixture
def role(db):
    """A role that has no rights yet; what it gets goes with it."""
    db.execute("CREATE ROLE ehub_test_reader")
    yield "ehub_test_reader"
    db.execute("RESET ROLE")
    db.execute("DROP OWNED BY ehub_test_reader; DROP ROLE ehub_test_reader")


def test_versions_have_shapes_of_their_own(hub, space, second):
    assert [(v.name, v.space, v.dims, v.metric, v.rows) for v in space.versions()] == [
        ("v1", "items", 8, "l2", 300),
        ("v2", "items", 5, "cosine", 300),
    ]
    assert [(v.current, v.frozen) for v in space.versions()] == [(True, False), (False, False)]
    assert space.current.name == "v1"
    assert hub.get_space("items", version="v2").get("k3").tolist() == V2[3].tolist()
    assert hub.resolve("items@v2").dims == 5
    assert hub.resolve("items").dims == 8
    check_neighbors(
        second.nearest_neighbors(5, vector=V2[0]),
        dict(zip(KEYS, V2, strict=True)),
        "cosine",
        V2[0],
        5,
    )
    assert repr(second) == "<Version 'items@v2': 5 dims, cosine>"


def test_a_promotion_switches_everything_that_goes_by_the_name(space, second, db):
    assert space.promote("v2")[:2] == ("v1", "v2")
    assert space.dims == 5
    assert space.get("k3").tolist() == V2[3].tolist()
    assert db.execute("SELECT metadata FROM spaces.items LIMIT 1").fetchone() == ({"version": 2},)
    found = space.nearest_neighbors(3, key="k3", metadata=True)
    assert {one.metadata["version"] for one in found} == {2}
    space.set("new", [1] * 5)
    assert "new" in second
    assert space.version("v1").rows == 300
    assert space.rollback()[:2] == ("v2", "v1")
    assert "new" not in space
    assert space.dims == 8
    (back, forth) = space.history()
    assert (forth.kind, forth.from_version, forth.to_version) == ("promote", "v1", "v2")
    assert (back.kind, back.from_version, back.to_version) == ("rollback", "v2", "v1")
    assert back.by == db.info.user
    assert back.at > forth.at


def test_each_rollback_goes_one_promotion_further_back(space):
    for name in ("v2", "v3", "v4"):
        space.create_version(name)
    for name in ("v2", "v3"):
        space.promote(name)
    assert [space.rollback().to_version for _ in range(2)] == ["v2", "v1"]
    with pytest.raises(ehub.VersionNotFoundError, match="no earlier version"):
        space.rollback()
    # What was undone is not gone back to.
    space.promote("v4")
    assert space.rollback().to_version == "v1"


def test_rollback_passes_over_versions_that_were_dropped(space):
    space.create_version("v2")
    space.create_version("v3")
    space.promote("v2")
    space.promote("v3")
    with pytest.raises(ehub.VersionInUseError, match="a rollback would go back to it"):
        space.drop_version("v2")
    space.drop_version("v2", force=True)
    assert space.rollback().to_version == "v1"


def test_dropping_leaves_nothing(space, second, db):
    second.checkpoint("one")
    second.delete("k1")
    with pytest.raises(ehub.VersionInUseError, match="it has checkpoints: one"):
        space.drop_version("v2")
    with pytest.raises(ehub.VersionInUseError, match="is current"):
        space.drop_version("v1", force=True)
    space.drop_version("v2", force=True)
    left = db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace IN ('ehub_data'::regnamespace,"
        " 'spaces'::regnamespace) AND relkind IN ('r', 'v') ORDER BY 1"
    ).fetchall()
    assert left == [("items",), ("items@v1",), ("v1",)]
    functions = "SELECT proname FROM pg_proc WHERE pronamespace = 'ehub_data'::regnamespace"
    assert db.execute(f"{functions} AND proname NOT LIKE '%v1'").fetchall() == []
    with pytest.raises(ehub.VersionNotFoundError):
        second.get("k3")


def test_a_copy_has_the_rows_of_one_moment(space):
    copy = space.create_version("copy", from_version="v1")
    assert copy.rows == 300
    assert copy.multiget(KEYS).tobytes() == V1.tobytes()
    assert copy.metadata("k7") == {"version": 1}
    copy.set("k1", [0] * 8)
    assert space.get("k1").tolist() == V1[1].tolist()
    copy.wait_until_indexed(30)
    assert copy.nearest_neighbors(1, vector=[0] * 8)[0].key == "k1"
    # Another metric is another check of every row.
    assert space.create_version("angles", metric="cosine", from_version="v1").metric == "cosine"
    with pytest.raises(ehub.InvalidValueError, match="zero vector"):
        space.create_version("bad", metric="cosine", from_version="copy")
    assert [version.name for version in space.versions()] == ["v1", "copy", "angles"]


@pytest.mark.parametrize("statement", ["by key", "sql"])
def test_no_reader_sees_a_mixture_or_an_error(connect, url, hub, space, second, statement):
    """Two search by name all the time, a third one promotes and rolls back."""
    space.wait_until_indexed(30)
    stop, errors, seen = threading.Event(), [], [0, 0]

    def check(answer):
        versions = {one["version"] for one in answer}
        assert len(versions) == 1, answer
        assert len(answer) == 10
        seen[versions.pop() - 1] += 1

    def by_key():
        mine = connect(index="local").get_space("items")
        while not stop.is_set():
            found = mine.nearest_neighbors(10, key="k5", metadata=True)
            check([one.metadata for one in found])

    def by_sql():
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                for query in (
                    "SELECT metadata FROM ehub.nearest_to('items', 'k5', 10)",
                    "SELECT i.metadata FROM ehub.nearest_to('items', 'k5', 10) AS n"
                    " JOIN spaces.items AS i USING (key)",
                    "SELECT metadata FROM spaces.items LIMIT 10",
                ):
                    check([note for (note,) in connection.execute(query)])

    def run(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    work = by_key if statement == "by key" else by_sql
    threads = [threading.Thread(target=run, args=[work]) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    for _ in range(10):
        space.promote("v2")
        time.sleep(0.05)
        space.rollback()
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert min(seen) > 5


def test_the_index_of_what_is_promoted_is_warm(connect, space, second, db):
    space.wait_until_indexed(30)
    done = space.promote("v2", wait=30)
    assert done.warm
    # It answers at once: nothing was built after the switch.
    assert space._index(False).entry.version == "v2"
    # The way back is warm too; what is neither is not kept.
    space.create_version("v3")
    assert space.promote("v3", wait=30).warm
    space._replica.refresh()
    kept = db.execute(
        "SELECT version FROM ehub.catalogue WHERE current OR warm ORDER BY version"
    ).fetchall()
    assert kept == [("v2",), ("v3",)]
    assert {copy.entry.version for copy in space._replica.followed()} == {"v2", "v3"}
    space.version("v1").keep_warm()
    space.version("v1").wait_until_indexed(30)
    space.version("v2").keep_warm(False)
    space._replica.refresh()
    assert {copy.entry.version for copy in space._replica.followed()} >= {"v1", "v3"}


def test_a_promotion_that_is_not_warm_says_so(connect, space, second, caplog):
    stranger = connect(index="none").get_space("items")
    assert not stranger.promote("v2").warm
    assert "not ready everywhere" in caplog.text
    with pytest.raises(ehub.WaitTimeoutError, match="was not ready"):
        stranger.promote("v1", wait=0.2)
    assert stranger.current.name == "v2"


def test_a_transaction_that_uses_the_view_holds_nobody_else_up(space, second, url, db):
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM spaces.items")
        with pytest.raises(ehub.WaitTimeoutError, match="spaces.items"):
            space._switch(
                "SELECT * FROM ehub.promote(%s, %s, patience => '0.5 s')",
                ["v2"],
            )
        waits = []
        thread = threading.Thread(target=space.promote, args=["v2"])
        thread.start()
        for _ in range(10):
            started = time.monotonic()
            db.execute("SELECT count(*) FROM spaces.items")
            waits.append(time.monotonic() - started)
            time.sleep(0.05)
        assert max(waits) < 1
        assert reader.execute("SELECT count(*) FROM spaces.items").fetchone() == (300,)
    thread.join()
    assert space.current.name == "v2"


def test_writers_by_name_end_where_they_began(space, second, url):
    copy = space.create_version("v3")
    with psycopg.connect(url) as writer:
        writer.execute("UPDATE spaces.items SET metadata = '{}' WHERE key = 'k1'")
        thread = threading.Thread(target=space.promote, args=["v3"])
        thread.start()
        time.sleep(0.3)
        writer.execute("UPDATE spaces.items SET metadata = '{}' WHERE key = 'k2'")
        writer.commit()
    thread.join()
    assert space.current.name == "v3"
    assert copy.rows == 0
    assert space.version("v1").metadata("k1") == space.version("v1").metadata("k2") == {}


def test_diff_counts_lists_and_measures(space):
    other = space.create_version("v2", from_version="v1")
    other.multidelete(KEYS[:10])
    other.multiset([(f"new{i}", [i] * 8) for i in range(5)])
    other.set("k20", V1[20] + 3)
    other.set("k21", V1[21], {"version": 3})
    diff = space.diff("v1", "v2", k=5, sample=20)
    assert (len(diff.added), len(diff.removed), len(diff.changed), diff.same) == (5, 10, 2, 288)
    assert sorted(diff.added) == [f"new{i}" for i in range(5)]
    assert sorted(diff.removed) == sorted(KEYS[:10])
    assert sorted(diff.changed) == ["k20", "k21"]
    assert diff.drift.median == 0
    assert diff.drift.maximum == pytest.approx(np.sqrt(9 * 8), rel=1e-5)
    assert [moved.key for moved in diff.moved_most] == ["k20"]
    assert len(diff.overlaps) == 20
    assert 0.5 < diff.overlap < 1


def test_the_overlap_is_what_brute_force_says(space, second):
    def nearest(rows, row):
        order = np.argsort(((rows - rows[row]) ** 2).sum(axis=1))
        return {i for i in order[:11] if i != row}

    directions = V2 / np.linalg.norm(V2, axis=1)[:, None]

    chosen = [3, 50, 200]
    diff = space.diff("v1", "v2", keys=[KEYS[i] for i in chosen])
    for i in chosen:
        both = nearest(V1, i) & nearest(directions, i)
        assert diff.overlaps[KEYS[i]] == len(both) / 10
    assert diff.drift is None
    assert diff.moved_most == []
    queries = space.diff("v1", "v2", queries=V1[:4], later_queries=V2[:4], k=300)
    assert queries.overlaps == dict.fromkeys(range(4), 1.0)
    same = space.create_version("same", from_version="v1")
    assert space.diff("v1", same.name, queries=V1[:4]).overlap == 1


def test_a_promotion_can_be_refused_for_its_overlap(space, second):
    with pytest.raises(ehub.OverlapError, match=r"a share of 0\.\d+ of the 10 nearest"):
        space.promote("v2", min_overlap=0.8)
    assert space.current.name == "v1"
    space.create_version("v3", from_version="v1")
    assert space.promote("v3", min_overlap=0.8).to_version == "v3"


WRITES = {
    "insert": "INSERT INTO spaces.items (key, embedding) VALUES ('x', '[1,1,1,1,1,1,1,1]')",
    "upsert": "INSERT INTO spaces.\"items@v1\" (key, embedding) VALUES ('k1', '[1,1,1,1,1,1,1,1]')"
    " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding",
    "update": "UPDATE spaces.items SET metadata = '{}'",
    "delete": "DELETE FROM {table} WHERE key = 'k1'",
    "nothing": "DELETE FROM {table} WHERE key = 'unknown'",
    "truncate": "TRUNCATE {table}",
    "function": "SELECT ehub.set('items', 'k1', '[1,1,1,1,1,1,1,1]')",
    "merge": "MERGE INTO {table} AS t USING (SELECT 'k1' AS key) AS s ON t.key = s.key"
    " WHEN MATCHED THEN DELETE",
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("role", ["origin", "replica"])
def test_a_frozen_version_is_never_written(space, db, write, role):
    space.freeze()
    space.freeze()
    before = db.execute("SELECT key, embedding::text, metadata FROM spaces.items").fetchall()
    (version,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
    db.execute(f"SET session_replication_role = {role}")
    with pytest.raises(psycopg.Error, match="version 'v1' is frozen") as error:
        db.execute(WRITES[write].replace("{table}", f"ehub_data.v{version}"))
    assert error.value.sqlstate == "EH015"
    with pytest.raises(psycopg.Error, match="frozen"), db.cursor() as cursor:
        with cursor.copy(f"COPY ehub_data.v{version} (key, embedding) FROM STDIN") as copy:
            copy.write_row(["x", "[1,1,1,1,1,1,1,1]"])
    after = db.execute("SELECT key, embedding::text, metadata FROM spaces.items").fetchall()
    assert after == before


def test_freezing_waits_for_writers_and_holds_for_those_with_old_snapshots(space, url):
    with psycopg.connect(url) as writer, psycopg.connect(url) as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM spaces.items")
        writer.execute("DELETE FROM spaces.items WHERE key = 'k1'")
        thread = threading.Thread(target=space.freeze)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        writer.commit()
        thread.join()
        assert "k1" not in space
        with pytest.raises(psycopg.Error, match="frozen"):
            old.execute("DELETE FROM spaces.items WHERE key = 'k2'")
    assert len(space) == 299


def test_frozen_survives_and_holds_in_python(connect, space, second):
    space.freeze()
    again = connect(index="none").get_space("items")
    assert again.frozen
    assert not again.version("v2").frozen
    for write in (
        lambda: again.set("x", [1] * 8),
        lambda: again.multiset({"x": [1] * 8}),
        lambda: again.delete("k1"),
        lambda: again.delete_all(),
    ):
        with pytest.raises(ehub.FrozenError, match="version 'v1' is frozen"):
            write()
    again.promote("v2")
    again.set("x", [1] * 5)
    copy = again.create_version("thawed", from_version="v1")
    copy.set("x", [1] * 8)


def test_rights_and_row_policies_go_with_the_name(space, db, role):
    (version,) = db.execute("SELECT version_id FROM ehub.catalogue").fetchone()
    db.execute("SELECT ehub.grant('items', %s, 'read')", [role])
    db.execute(
        f" ALTER TABLE ehub_data.v{version} ENABLE ROW LEVEL SECURITY;"
        f" CREATE POLICY part ON ehub_data.v{version} TO {role} USING (key < 'k2')"
    )
    other = space.create_version("v2", from_version="v1")
    db.execute(f"SET ROLE {role}")
    count = "SELECT count(*), count(*) FILTER (WHERE key < 'k2') FROM spaces.items"
    before = db.execute(count).fetchone()
    assert 0 < before[0] == before[1] < 300
    assert db.execute('SELECT count(*) FROM spaces."items@v2"').fetchone() == before[:1]
    db.execute("RESET ROLE")
    # Also what came after the version was made.
    db.execute(
        f"CREATE POLICY none_of_these ON ehub_data.v{version} AS RESTRICTIVE TO {role}"
        " USING (key <> 'k1')"
    )
    space.promote("v2")
    db.execute(f"SET ROLE {role}")
    assert db.execute(count).fetchone() == (before[0] - 1, before[0] - 1)
    nearest = db.execute("SELECT key FROM ehub.nearest('items', %s, 500)", [str([0] * 8)])
    assert "k1" not in {key for (key,) in nearest}
    assert nearest.rowcount == before[0] - 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute("SELECT ehub.promote('items', 'v1')")
    db.execute("RESET ROLE")
    assert other.rows == 300


@pytest.mark.parametrize("name", ["", "a@b", "x" * 23, "a b", "é", "-a", 7, None, "a\0b"])
def test_names_that_cannot_be(space, name):
    with pytest.raises((ehub.InvalidNameError, ehub.VersionNotFoundError)):
        space.create_version(name)
    with pytest.raises((ehub.InvalidNameError, ehub.VersionNotFoundError)):
        space.version(name)
    assert [version.name for version in space.versions()] == ["v1"]


def test_bad_input_changes_nothing(hub, space, second):
    for wrong, error in (
        (lambda: space.create_version("v2"), ehub.VersionExistsError),
        (lambda: space.create_version("v3", dims=0), ehub.InvalidValueError),
        (lambda: space.create_version("v3", dims="x"), ehub.InvalidValueError),
        (lambda: space.create_version("v3", metric="l7"), ehub.InvalidValueError),
        (lambda: space.create_version("v3", from_version="v9"), ehub.VersionNotFoundError),
        (lambda: space.create_version("v3", 4, from_version="v1"), ehub.InvalidValueError),
        (lambda: space.promote("v9"), ehub.VersionNotFoundError),
        (lambda: space.promote("v1"), ehub.InvalidValueError),
        (lambda: space.promote("v2", min_overlap="much"), ehub.InvalidValueError),
        (lambda: space.drop_version("v9"), ehub.VersionNotFoundError),
        (lambda: space.rollback(), ehub.VersionNotFoundError),
        (lambda: space.version("v9"), ehub.VersionNotFoundError),
        (lambda: hub.get_space("items", version="v9"), ehub.VersionNotFoundError),
        (lambda: hub.get_space("nothing", version="v1"), ehub.SpaceNotFoundError),
        (lambda: hub.resolve("items@"), ehub.VersionNotFoundError),
        (lambda: space.diff("v1", "v9"), ehub.VersionNotFoundError),
        (lambda: space.diff("v1", "v2", keys=["unknown"]), ehub.KeyNotFoundError),
        (lambda: space.diff("v1", "v2", queries=V1[:2]), ehub.InvalidVectorError),
        (
            lambda: space.diff("v1", "v2", queries=V1[:2], later_queries=V2[:1]),
            ehub.InvalidValueError,
        ),
        (lambda: second.set("x", [1] * 8), ehub.InvalidVectorError),
        (lambda: hub.delete_space("items@v1"), ehub.InvalidNameError),
    ):
        with pytest.raises(error):
            wrong()
    assert [(v.name, v.rows, v.current) for v in space.versions()] == [
        ("v1", 300, True),
        ("v2", 300, False),
    ]
    assert space.history() == []


def test_the_models_read_it_all(hub, space, second):
    import sqlalchemy as sa

    from ehub import models

    space.promote("v2")
    space.checkpoint("one")
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(hub.conninfo)
    )
    with sa.orm.Session(engine) as session:
        (found,) = session.scalars(sa.select(models.Space))
        assert [version.name for version in found.versions] == ["v1", "v2"]
        assert [c.name for v in found.versions for c in v.checkpoints] == ["one"]
        (promotion,) = session.scalars(sa.select(models.Promotion))
        assert (promotion.from_version, promotion.to_version) == ("v1", "v2")
    engine.dispose()
