"""A role that is limited to some rows: its searches are complete, fresh, and tell of no others."""

import uuid

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors
from psycopg import sql

import ehub
from service.conftest import settled
from service.test_nearest import literal, nearest, vectors

N = 12_000
# Row i is of the tenants whose share it falls into: large enough for an index of their own, or not.
SHARES = {"half": 2, "tenth": 3, "few": 100}
ROWS = vectors(N, seed=7)
METADATA = [{name: True for name, share in SHARES.items() if i % share == 0} for i in range(N)]
QUERIES = vectors(30, seed=8)


@pytest.fixture
def space(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir) as hub:
        space = hub.create_space("s", 8)
        space.multiset([f"k{i}" for i in range(N)], ROWS, METADATA)
        yield space


@pytest.fixture
def tenant(space, db, url):
    """Make a role that is limited to the rows of a share, and a connection as it."""
    made = []

    def make(share, privilege="read"):
        name = f"ehub_limited_{uuid.uuid4().hex[:8]}"
        db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        space.grant(name, privilege, rows={share: True})
        connection = psycopg.connect(url, autocommit=True)
        connection.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(name)))
        made.append((name, connection))
        return name, connection

    yield make
    for name, connection in made:
        connection.close()
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def table(share):
    return {f"k{i}": ROWS[i] for i in range(0, N, SHARES[share])}


def check(connection, rows, k=10, recall=0.95):
    found = [nearest(connection, query, k) for query in QUERIES]
    right = 0
    for query, near in zip(QUERIES, found, strict=True):
        check_neighbors(near, rows, "l2", query, k, recall=0)
        order = np.sort(np.linalg.norm(np.stack(list(rows.values())) - query, axis=1))
        limit = order[min(k, len(order)) - 1] + 1e-5
        right += sum(one.distance <= limit for one in near)
    assert right >= recall * min(k, len(rows)) * len(QUERIES)


def indexes(db):
    """The shares that have an index of their own."""
    rows = db.execute("SELECT of_rows FROM ehub.status WHERE of_rows IS NOT NULL")
    return {name for (limits,) in rows for name in limits[0]}


@pytest.mark.parametrize("share", SHARES)
def test_it_finds_its_nearest(space, db, tenant, share):
    _, limited = tenant(share)
    large = share != "few"
    if large:
        settled(limited)
        limited.execute("SET ehub.mode = 'index'")
    assert indexes(db) == ({share} if large else set())
    check(limited, table(share))
    check(limited, table(share), k=1)
    # A batch, and the neighbours of a key.
    rows = limited.execute(
        "SELECT q, key, distance FROM ehub.nearest_many('s', ARRAY[%s, %s]::vector[], 5)",
        [literal(QUERIES[0]), literal(QUERIES[1])],
    ).fetchall()
    assert [q for q, _, _ in rows] == [1] * 5 + [2] * 5
    assert {key for _, key, _ in rows} <= table(share).keys()
    near = limited.execute("SELECT key FROM ehub.nearest_to('s', 'k0', 5)").fetchall()
    assert len(near) == 5
    with pytest.raises(psycopg.DatabaseError, match="no key 'k1'"):
        limited.execute("SELECT * FROM ehub.nearest_to('s', 'k1', 5)")


def test_it_sees_its_own_and_others_changes_at_once(space, db, tenant, service):
    """Rows that come to it, leave it, are deleted: with the index as it was before."""
    _, limited = tenant("half", "write")
    settled(limited)
    rows = table("half")
    # From now on only the log can tell.
    for copy in service._replica.followed():
        copy.blocked_until = float("inf")
    limited.execute("SET ehub.mode = 'index'")
    query = QUERIES[0]
    first, second, *_ = [one.key for one in nearest(limited, query, 5)]
    space.set(first, ROWS[0], metadata={"half": False})
    space.delete(second)
    space.set("k1", query, metadata={"half": True, "new": 1})
    space.set("k3", query)
    del rows[first], rows[second]
    rows["k1"] = query
    with limited.transaction():
        limited.execute("SELECT ehub.set('s', 'mine', %s, '{\"half\": true}')", [literal(query)])
        check(limited, rows | {"mine": query}, recall=0.9)
        assert {one.key for one in nearest(limited, query, 2)} == {"k1", "mine"}
        raise psycopg.Rollback
    check(limited, rows, recall=0.9)
    assert nearest(limited, query, 1)[0].key == "k1"
    # What the log says to it is no more than that.
    own = next(copy for copy in service._replica.followed() if not copy.entry.whole)
    keys = limited.execute(
        "SELECT ehub.deciding_keys(%s, %s::pg_snapshot, '{}', 1, 1)",
        [1, str(own.watermark)],
    ).fetchone()
    assert set(keys[0]) == {"k1"}


def test_an_older_snapshot_is_searched_exactly(space, db, tenant):
    _, limited = tenant("half")
    settled(limited)
    limited.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    check(limited, table("half"), recall=1)
    limited.execute("SET LOCAL ehub.mode = 'index'")
    with pytest.raises(psycopg.DatabaseError, match="no index has just the rows"):
        nearest(limited, QUERIES[0], 1)
    limited.execute("ROLLBACK")


def test_several_limits_are_their_union_and_group_rights_count(space, db, tenant):
    name, limited = tenant("tenth")
    settled(limited)
    space.grant(name, "read", rows={"few": True})
    both = {key: ROWS[int(key[1:])] for key in table("tenth").keys() | table("few").keys()}
    settled(limited)
    limited.execute("SET ehub.mode = 'index'")
    check(limited, both)
    space.revoke(name, "read", rows={"few": True})
    settled(limited)
    check(limited, table("tenth"))
    # Whoever is a member of two is searched for exactly.
    other, _ = tenant("half")
    db.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(other), sql.Identifier(name)))
    limited.execute("RESET ehub.mode")
    union = {key: ROWS[int(key[1:])] for key in table("tenth").keys() | table("half").keys()}
    check(limited, union, recall=1)
    # And who sees all rows by another grant does so by the index over all.
    space.grant(other, "read")
    limited.execute("SET ehub.mode = 'index'")
    check(limited, {f"k{i}": row for i, row in enumerate(ROWS)})


def test_status_and_replicas_tell_it_nothing_of_others(space, db, tenant):
    _, limited = tenant("half")
    settled(limited)
    (row,) = limited.execute("SELECT rows, indexed_rows, lag, place FROM ehub.status").fetchall()
    assert row == (N // 2, None, 0, None)
    assert limited.execute("SELECT * FROM ehub.indexes").fetchall() == []
    for refused in (
        "SELECT * FROM ehub.changes(1, '1:1:')",
        "SELECT ehub.acknowledge(gen_random_uuid(), 1, 'x', '1:1:', gen_random_uuid(), 1, '1 h')",
        "SELECT * FROM ehub.images(1, 1)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            limited.execute(refused)
    assert limited.execute(
        "SELECT ehub.hold_log(gen_random_uuid(), 1, '1:1:', 'x', 1),"
        " ehub.changed_since(gen_random_uuid(), gen_random_uuid(), 1, '1:1:')"
    ).fetchone() == (None, None)


def test_an_index_goes_when_no_limit_needs_it_any_more(space, db, tenant):
    name, limited = tenant("half")
    settled(limited)
    assert indexes(db) == {"half"}
    space.revoke(name)
    assert indexes(db) == set()
    assert db.execute(
        "SELECT relrowsecurity FROM pg_class WHERE oid = 'ehub_data.v1'::regclass"
    ).fetchone() == (False,)
    with pytest.raises(psycopg.DatabaseError, match="there is no space 's'"):
        nearest(limited, QUERIES[0], 1)
    # One over rows that have become few goes too, when they are looked after.
    space.grant(name, "read", rows={"half": True})
    settled(limited)
    db.execute("DELETE FROM spaces.s WHERE metadata @> '{\"half\": true}' AND key > 'k11'")
    db.execute("SELECT ehub.tend()")
    assert indexes(db) == set()
    check(limited, {key: row for key, row in table("half").items() if key <= "k11"}, recall=1)
