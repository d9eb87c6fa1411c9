"""Transactions that keep their snapshot, and versions that come, go and become current meanwhile.

A view is what it is at the moment, rows are what they were. Whatever a name means to one door, it means
to all of them, for reading and for writing.
"""

import contextlib

import psycopg
import pytest

LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
Q = "'[9,9]'::vector"
# Each says which version it reads: v1 has row a at (1, 1), v2 at (9, 9), v3 at (5, 5).
DOORS = {
    "the view": "SELECT embedding::text FROM spaces.s WHERE key = 'a'",
    "get": "SELECT ehub.get('s', 'a')::text",
    "nearest": f"SELECT distance FROM ehub.nearest('s', {Q}, 1)",
    "nearest_exact": f"SELECT distance FROM ehub.nearest_exact('s', {Q}, 1)",
    "nearest_to": "SELECT key || distance FROM ehub.nearest_to('s', 'a', 1)",
    "nearest_many": f"SELECT distance FROM ehub.nearest_many('s', ARRAY[{Q}], 1)",
    "filter": f"SELECT distance FROM ehub.nearest('s', {Q}, 1, filter => '{{\"n\": 1}}')",
    "within": f"SELECT distance FROM ehub.within('s', {Q}, 100)",
    "distance": "SELECT ehub.distance('s', 'a', 'b')",
    "average": "SELECT ehub.average('s', '{a}')::text",
    "average of all": "SELECT average::text FROM ehub.averages('s', 'n')",
    "space of averages": "SELECT embedding::text FROM spaces.means",
    "average, get": "SELECT ehub.get('means', '1')::text",
    "catalogue": "SELECT version FROM ehub.catalogue WHERE space = 's' AND current",
    "versions": "SELECT version FROM ehub.versions WHERE space = 's' AND current",
    "status": "SELECT version FROM ehub.status WHERE space = 's' AND current",
}
ANSWERS = {
    place: {
        "the view": f"[{x},{x}]",
        "get": f"[{x},{x}]",
        **dict.fromkeys(
            ("nearest", "nearest_exact", "nearest_many", "filter", "within"),
            pytest.approx((9 - x) * 2**0.5),
        ),
        "nearest_to": f"b{ {1: 1, 5: 5, 9: 9}[x] }",
        "distance": x,
        "average": f"[{x},{x}]",
        "average of all": f"[{x},{x}]",
        "space of averages": f"[{x},{x}]",
        "average, get": f"[{x},{x}]",
        **dict.fromkeys(("catalogue", "versions", "status"), place),
    }
    for place, x in (("v1", 1), ("v2", 9), ("v3", 5))
}


@pytest.fixture
def space(hub, db):
    space = hub.create_space("s", 2)
    hub.create_average("means", "s", "n")
    space.create_version("v2")
    for version, x in (("v1", 1), ("v2", 9)):
        fill(space, version, x)
    return space


def fill(space, version, x):
    space.version(version).multiset([("a", [x, x], {"n": 1}), ("b", [x, 0], {})])


@pytest.fixture
def session(url):
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def begin(session, level):
    """Begin a transaction with a snapshot, in which nothing of ehub was read."""
    session.execute(f"BEGIN ISOLATION LEVEL {level}")
    session.execute("SELECT 1")


def seen(session):
    return {door: session.execute(statement).fetchone()[0] for door, statement in DOORS.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_every_door_opens_to_the_version_that_was_promoted(space, session, level):
    for first in DOORS:
        begin(session, level)
        space.promote("v2")
        # Whichever comes first does not matter.
        assert session.execute(DOORS[first]).fetchone()[0] == ANSWERS["v2"][first]
        assert seen(session) == ANSWERS["v2"]
        session.execute("COMMIT")
        space.promote("v1")


@pytest.mark.parametrize("level", LEVELS)
def test_a_rollback_is_one_too(space, session, level):
    space.promote("v2")
    begin(session, level)
    space.rollback()
    assert seen(session) == ANSWERS["v1"]


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_written_is_found(space, session, level):
    begin(session, level)
    space.promote("v2")
    session.execute("SELECT ehub.set('s', 'new', '[7,7]', '{}')")
    session.execute("INSERT INTO spaces.s (key, embedding) VALUES ('newer', '[8,8]')")
    for statement in (
        "SELECT key FROM ehub.nearest('s', '[7,7]', 1)",
        "SELECT key FROM ehub.nearest('s@v2', '[7,7]', 1)",
    ):
        assert session.execute(statement).fetchone() == ("new",)
    assert session.execute("SELECT ehub.get('s', 'newer')::text").fetchone() == ("[8,8]",)
    session.execute("SELECT ehub.delete('s', 'newer')")
    session.execute("COMMIT")
    assert "new" in space.version("v2")
    assert "new" not in space.version("v1")
    assert "newer" not in space


@pytest.mark.parametrize("level", LEVELS)
def test_who_has_read_by_the_name_reads_the_same_version_to_the_end(space, db, session, level):
    for door in DOORS.keys() - {"catalogue", "versions", "status"}:
        begin(session, level)
        assert session.execute(DOORS[door]).fetchone()[0] == ANSWERS["v1"][door]
        # Whoever promotes waits, as for somebody who has read the view, and gives up.
        with pytest.raises(psycopg.Error) as caught:
            db.execute("SELECT ehub.promote('s', 'v2', patience => '0.1 s')")
        assert caught.value.sqlstate == "EH018"
        assert seen(session) == ANSWERS["v1"]
        session.execute("COMMIT")
    db.execute("SELECT ehub.promote('s', 'v2', patience => '0.1 s')")


@pytest.mark.parametrize("level", LEVELS)
def test_a_version_that_the_snapshot_does_not_see_is_not_half_there(space, session, level):
    begin(session, level)
    space.create_version("v3")
    fill(space, "v3", 5)
    space.promote("v3")
    for door, statement in DOORS.items():
        if door.startswith(("the view", "space of", "catalogue", "versions", "status", "average,")):
            continue
        with pytest.raises(psycopg.errors.SerializationFailure, match="space 's'"):
            with session.transaction():
                session.execute(statement)
    with pytest.raises(psycopg.errors.SerializationFailure):
        with session.transaction():
            session.execute("SELECT ehub.set('s', 'new', '[7,7]')")
    # Its own rows can be read by its address.
    assert session.execute("SELECT ehub.get('s@v1', 'a')::text").fetchone() == ("[1,1]",)
    with pytest.raises(psycopg.errors.SerializationFailure):
        with session.transaction():
            session.execute("SELECT ehub.get('s@v3', 'a')")
    # No version of the space is current to it.
    for door in ("catalogue", "versions", "status"):
        assert session.execute(DOORS[door]).fetchone() is None
    session.execute("ROLLBACK")
    begin(session, level)
    assert seen(session) == ANSWERS["v3"]


@pytest.mark.parametrize("level", LEVELS)
def test_versions_and_spaces_that_go(hub, space, session, level):
    begin(session, level)
    space.promote("v2")
    space.drop_version("v1", force=True)
    assert seen(session) == ANSWERS["v2"]
    with pytest.raises(psycopg.Error) as caught, session.transaction():
        session.execute("SELECT ehub.get('s@v1', 'a')")
    assert caught.value.sqlstate == "EH011"
    session.execute("COMMIT")
    begin(session, level)
    hub.delete_space("means")
    hub.delete_space("s")
    with pytest.raises(psycopg.Error) as caught, session.transaction():
        session.execute(DOORS["get"])
    assert caught.value.sqlstate == "EH001"
    # One of the same name is another space.
    fill(hub.create_space("s", 2), "v1", 1)
    with pytest.raises(psycopg.errors.SerializationFailure), session.transaction():
        session.execute(DOORS["get"])


@pytest.mark.parametrize("level", LEVELS)
def test_who_reads_by_the_address_of_a_version_keeps_nobody_waiting(space, db, session, level):
    begin(session, level)
    assert session.execute("SELECT ehub.get('s@v1', 'a')::text").fetchone() == ("[1,1]",)
    db.execute("SELECT ehub.promote('s', 'v2', patience => '0.2 s')")
    assert session.execute("SELECT ehub.get('s@v1', 'a')::text").fetchone() == ("[1,1]",)


def test_somebody_without_rights_keeps_nobody_waiting(space, db, admin, session):
    admin.execute("CREATE ROLE ehub_test_stranger")
    try:
        session.execute("SET ROLE ehub_test_stranger")
        begin(session, "REPEATABLE READ")
        with contextlib.suppress(psycopg.Error), session.transaction():
            session.execute("SELECT ehub.get('s', 'a')")
        session.execute("SELECT ehub.hold_current('s')")
        db.execute("SELECT ehub.promote('s', 'v2', patience => '0.2 s')")
    finally:
        session.execute("ROLLBACK")
        session.execute("RESET ROLE")
        admin.execute("DROP ROLE ehub_test_stranger")


def test_one_statement_sees_one_version_under_read_committed(space, db, session):
    session.execute("BEGIN")
    with session.pipeline():
        slow = session.execute(
            "SELECT ehub.get('s', 'a')::text, pg_sleep(0.5), ehub.get('s', 'a')::text"
        )
        session.execute("SELECT 1")
        space.promote("v2")
        assert slow.fetchone() in (("[1,1]", "", "[1,1]"),)
    assert seen(session) == ANSWERS["v2"]


def test_a_promotion_in_the_same_transaction(space, db):
    with db.transaction():
        db.execute("SELECT ehub.promote('s', 'v2')")
        assert seen(db) == ANSWERS["v2"]
        with db.transaction(force_rollback=True):
            db.execute("SELECT ehub.rollback('s')")
            assert seen(db) == ANSWERS["v1"]
        assert seen(db) == ANSWERS["v2"]


def test_the_mark_of_the_current_version_is_looked_after(hub, space, db):
    ids = dict(db.execute("SELECT version, version_id FROM ehub.catalogue WHERE space = 's'"))
    db.execute(
        f"DROP TYPE ehub_data.current_v{ids['v1']};CREATE TYPE ehub_data.current_v{ids['v2']} AS ()"
    )
    assert [(one.subject, one.remedy) for one in hub.doctor()] == [("space s", "mark it")]
    hub.doctor(mend=True)
    assert hub.doctor() == []
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert seen(db) == ANSWERS["v1"]
