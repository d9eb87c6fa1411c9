"""Grants as their users say them; the audit trail; the doctor; what a revocation ends, and when."""

import threading
import time
import uuid

import numpy as np
import psycopg
import pytest
from oracle import check_neighbors
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub

ROWS = np.random.default_rng(3).standard_normal((300, 4)).astype(np.float32)
TENANTS = {f"k{i}": {"tenant": i % 3} for i in range(300)}


@pytest.fixture
def space(hub):
    space = hub.create_space("s", 4)
    space.multiset(list(TENANTS), ROWS, list(TENANTS.values()))
    return space


@pytest.fixture
def role(url, db, tmp_path):
    """Make roles that can log in, and hubs as them."""
    made, hubs = [], []

    def make(index="none"):
        name = f"ehub Test-{uuid.uuid4().hex[:8]}"
        db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name)))
        made.append(name)
        conninfo = make_conninfo(url, user=name, password="x")
        hubs.append(ehub.connect(conninfo, index=index, data_dir=tmp_path / name))
        return name, hubs[-1]

    yield make
    for hub in hubs:
        hub.close()
    for name in made:
        db.execute(
            sql.SQL(
                "REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0}; DROP ROLE {0}"
            ).format(sql.Identifier(name))
        )


def test_a_day_of_an_administrator(hub, space, role, db):
    builder, builders = role()
    analyst, analysts = role()
    tenant, tenants = role()
    with pytest.raises(ehub.AccessDeniedError):
        builders.create_space("mine", 4)
    hub.grant_create(builder)
    hub.grant_default(analyst, "read")
    mine = builders.create_space("mine", 4)
    mine.set("a", [1, 2, 3, 4])
    assert analysts.get_space("mine").get("a").tolist() == [1, 2, 3, 4]
    mine.grant(tenant, "write", rows={"tenant": 7})
    tenants.get_space("mine").set("b", [1, 1, 1, 1], {"tenant": 7})
    with pytest.raises(ehub.AccessDeniedError, match="ehub whoami"):
        tenants.get_space("mine").set("c", [1, 1, 1, 1], {"tenant": 8})
    with pytest.raises(ehub.AccessDeniedError):
        tenants.get_space("mine").set("a", [1, 1, 1, 1], {"tenant": 7})
    with pytest.raises(ehub.KeyNotFoundError):
        tenants.get_space("mine").get("a")
    assert len(tenants.get_space("mine")) == 1
    # An admin of one space is nobody in another.
    with pytest.raises(ehub.SpaceNotFoundError):
        builders.get_space("s")
    assert {(g.space, g.role, g.privilege, str(g.rows)) for g in mine.grants()} == {
        ("mine", analyst, "read", "None"),
        ("mine", builder, "admin", "None"),
        ("mine", tenant, "write", "{'tenant': 7}"),
    }
    assert [(r.space, r.privilege, r.rows, r.through) for r in tenants.whoami()] == [
        ("mine", "write", {"tenant": 7}, tenant)
    ]
    assert {(r.space, r.privilege) for r in builders.whoami()} == {
        (None, "create"),
        ("mine", "admin"),
    }
    assert {one.name: [g.privilege for g in one.grants] for one in hub.roles()} == {
        builder: ["admin", "create"],
        analyst: ["read", "read"],
        tenant: ["write"],
    }
    hub.revoke_create(builder)
    with pytest.raises(ehub.AccessDeniedError):
        builders.create_space("another", 4)
    hub.revoke_default(analyst)
    hub.create_space("later", 4)
    assert [one.name for one in analysts.spaces()] == ["mine"]
    assert hub.doctor() == []


def test_grants_go_with_versions(space, role):
    reader, readers = role()
    pinned, pinneds = role()
    tenant, tenants = role()
    space.grant(reader, "read")
    space.create_version("v2", from_version="v1")
    space.grant(pinned, "read", version="v2")
    space.grant(tenant, "read", rows={"tenant": 1})
    assert readers.get_space("s", version="v2").rows == 300
    assert pinneds.get_space("s", version="v2").rows == 300
    with pytest.raises(ehub.VersionNotFoundError):
        pinneds.get_space("s", version="v1")
    space.promote("v2")
    assert readers.get_space("s").current.name == "v2"
    assert len(tenants.get_space("s")) == 100
    # By the name it sees the version that it has a right on, as long as the name means that.
    assert pinneds.get_space("s").current.name == "v2"
    space.rollback()
    with pytest.raises(ehub.SpaceNotFoundError):
        pinneds.get_space("s")
    with pytest.raises(ehub.InvalidValueError, match="of a space, not of one version"):
        space.grant(pinned, "admin", version="v2")
    space.revoke(pinned, version="v2")
    with pytest.raises(ehub.NotFoundError):
        pinneds.get_space("s", version="v2")


def test_who_did_what(hub, space, role):
    admin, admins = role()
    space.grant(admin, "admin")
    theirs = admins.get_space("s")
    theirs.create_version("v2")
    theirs.promote("v2")
    theirs.rollback()
    theirs.checkpoint("one")
    assert theirs.history()[0].by == f'"{admin}"'
    assert theirs.checkpoints()[0].created_by == f'"{admin}"'
    trail = theirs.audit()
    assert [entry.action for entry in trail] == [
        "checkpoint",
        "rollback",
        "promote",
        "create_version",
        "grant",
        "create_space",
    ]
    assert (trail[0].role, trail[0].login) == (f'"{admin}"', admin)
    assert trail[2].detail == {"from": "v1", "to": "v2"}
    for statement in ("DELETE FROM ehub.audit", "UPDATE ehub.audit SET role = 'x'"):
        with psycopg.connect(admins.conninfo) as connection:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
    hub.delete_space("s")
    again = hub.create_space("s", 4)
    again.grant(admin, "admin")
    assert [entry.action for entry in theirs.audit()] == ["grant", "create_space"]
    assert "delete_space" in [entry.action for entry in hub.audit()]


def test_the_doctor(hub, space, role, db):
    reader, readers = role()
    tenant, _ = role()
    other, _ = role()
    space.grant(reader, "read")
    space.grant(tenant, "read", rows={"tenant": 1})
    space.grant(tenant, "read", rows={'a"b\\': "c'd$$"})
    assert hub.doctor() == []
    quoted = {name: sql.Identifier(name).as_string(db) for name in (reader, tenant, other)}
    (policy,) = db.execute(
        "SELECT polname FROM pg_policy WHERE pg_get_expr(polqual, polrelid) ~ 'tenant'"
    ).fetchone()
    for statement, found in (
        (f"GRANT DELETE ON ehub_data.v1 TO {quoted[other]}", "has DELETE"),
        ("GRANT SELECT ON spaces.s TO PUBLIC", "everybody has SELECT"),
        (f"REVOKE SELECT ON ehub_data.v1 FROM {quoted[reader]}", "lacks SELECT"),
        (f"ALTER POLICY {policy} ON ehub_data.v1 USING (true)", "was changed"),
        (f"DROP POLICY {policy} ON ehub_data.v1", "is missing"),
        ("CREATE POLICY ehub_999 ON ehub_data.v1 USING (true)", "belongs to no grant"),
        ("ALTER TABLE ehub_data.v1 DISABLE ROW LEVEL SECURITY", "are switched off"),
        ("GRANT EXECUTE ON FUNCTION ehub.service_secret TO PUBLIC", "everybody may call it"),
        (f"GRANT EXECUTE ON FUNCTION ehub.create_space TO {quoted[other]}", "has EXECUTE"),
        ("GRANT CREATE ON SCHEMA ehub_data TO PUBLIC", "may create in it"),
        (f"GRANT SELECT ON ehub.change TO {quoted[other]}", "has SELECT"),
    ):
        db.execute(statement)
        (finding,) = hub.doctor()
        assert found in finding.problem, finding
        assert finding.remedy
        assert hub.doctor(mend=True) == [finding]
        assert hub.doctor() == [], statement
    assert len(readers.get_space("s")) == 300
    # What is not ehub's to decide.
    db.execute("CREATE POLICY own ON ehub_data.v1 AS RESTRICTIVE USING (key <> 'k1')")
    assert [finding.remedy for finding in hub.doctor(mend=True)] == [None]
    db.execute("DROP POLICY own ON ehub_data.v1")
    # A role that is gone takes its privileges along, and leaves what was recorded.
    gone, away = role()
    space.grant(gone, "read")
    away.close()
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(gone)))
    assert "a role that is gone" in hub.doctor()[0].problem
    hub.doctor(mend=True)
    assert hub.doctor() == []
    db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(gone)))
    for refused in (readers.doctor, lambda: readers.doctor(mend=True)):
        with pytest.raises(ehub.AccessDeniedError):
            refused()


def test_a_revocation_ends_it_with_the_next_statement(space, role, url):
    reader, readers = role()
    space.grant(reader, "admin")
    for isolation in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"):
        with psycopg.connect(readers.conninfo, autocommit=True) as connection:
            connection.execute("PREPARE q AS SELECT * FROM ehub.nearest('s', '[1,0,0,0]', 5)")
            connection.execute("PREPARE v AS SELECT * FROM spaces.s")
            connection.execute(f"BEGIN ISOLATION LEVEL {isolation}")
            assert len(connection.execute("EXECUTE q").fetchall()) == 5
            assert len(connection.execute("EXECUTE v").fetchall()) == 300
            started = time.monotonic()
            space.revoke(reader)
            assert time.monotonic() - started < 2
            for statement in (
                "EXECUTE q",
                "EXECUTE v",
                "SELECT * FROM ehub.rows_at('s', 'x')",
                "SELECT ehub.keep_warm('s')",
                "SELECT ehub.grant('s', current_user, 'read')",
            ):
                connection.execute("SAVEPOINT s")
                with pytest.raises(psycopg.Error, match=r"permission denied|there is no space"):
                    connection.execute(statement)
                connection.execute("ROLLBACK TO s")
        space.grant(reader, "admin")


def test_no_transaction_of_a_role_keeps_its_own_right(space, role):
    """It holds the table, whose row policies cannot be changed then."""
    tenant, tenants = role()
    other, others = role()
    space.grant(tenant, "read", rows={"tenant": 1})
    with psycopg.connect(tenants.conninfo) as connection:
        assert connection.execute("SELECT count(*) FROM spaces.s").fetchone() == (100,)
        space.revoke(tenant)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT count(*) FROM spaces.s")
        # Who comes now sees what it was granted, and nothing by what could not be tidied up.
        connection.rollback()
        space.grant(other, "read", rows={"tenant": 2})
        assert len(others.get_space("s")) == 100
    space.grant(tenant, "read", rows={"tenant": 2})
    assert len(tenants.get_space("s")) == 100


def test_what_is_tidied_up_later(hub, space, role, db):
    """And not while somebody manages the space, who may be about to limit somebody."""
    tenant, tenants = role()
    space.grant(tenant, "read", rows={"tenant": 1})

    def left():
        return db.execute(
            "SELECT relrowsecurity, (SELECT count(*) FROM pg_policy) FROM pg_class"
            " WHERE oid = 'ehub_data.v1'::regclass"
        ).fetchone()

    with psycopg.connect(tenants.conninfo) as connection:
        connection.execute("SELECT count(*) FROM spaces.s")
        space.revoke(tenant)
        db.execute("SELECT ehub.tend()")
        assert left() == (True, 1)
    with psycopg.connect(hub.conninfo) as admin:
        admin.execute("SELECT FROM ehub.space FOR NO KEY UPDATE")
        db.execute("SELECT ehub.tend()")
        assert left() == (True, 1)
    db.execute("SELECT ehub.tend()")
    assert left() == (False, 0)
    assert hub.doctor() == []


def test_a_readers_own_index(space, role, db):
    """It follows as the owner's does, and is dropped when the right goes."""
    reader, readers = role("local")
    space.grant(reader, "read")
    theirs = readers.get_space("s")
    theirs.wait_until_indexed(30)
    table = dict(zip(TENANTS, ROWS, strict=True))
    check_neighbors(theirs.nearest_neighbors(5, vector=ROWS[7]), table, "l2", ROWS[7], 5)
    space.set("new", [9, 9, 9, 9])
    found = theirs.nearest_neighbors(1, vector=[9, 9, 9, 9], consistency="strong")
    assert found[0].key == "new"
    folder = next(readers._database.target.data_dir.glob("indexes/*/*"))
    assert folder.is_dir()
    space.revoke(reader)
    deadline = time.monotonic() + 6
    while readers._replica.followed():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ehub.SpaceNotFoundError):
        theirs.nearest_neighbors(1, vector=ROWS[7])
    assert not list(folder.glob("*.hnsw"))
    # A right on some rows is none on an index over all.
    space.grant(reader, "read", rows={"tenant": 1})
    assert theirs.nearest_neighbors(200, vector=ROWS[7])[0].key != "k0"
    assert len(theirs.nearest_neighbors(200, vector=ROWS[7])) == 100
    assert readers._replica.followed() == []


def test_an_index_that_hears_nothing_stops_answering(space, role, monkeypatch):
    from ehub.replica import replica as module

    reader, readers = role("local")
    space.grant(reader, "read")
    theirs = readers.get_space("s")
    theirs.wait_until_indexed(30)
    assert readers._replica.index("s") is not None
    monkeypatch.setattr(module, "_TRUST_SECONDS", -1)
    assert readers._replica.index("s") is None
    assert theirs.nearest_neighbors(1, vector=ROWS[7])[0].key == "k7"


def test_grants_and_revocations_at_the_same_time(hub, space, role):
    """Whatever the order, what is enforced is what is recorded in the end."""
    names = [role()[0] for _ in range(3)]
    errors = []

    def change(seed):
        random = np.random.default_rng(seed)
        for _ in range(12):
            name = names[random.integers(3)]
            rows = [None, {"tenant": 1}, {"tenant": 2}][random.integers(3)]
            try:
                if random.random() < 0.6:
                    space.grant(name, "read", rows=rows)
                else:
                    space.revoke(name)
            except ehub.GrantNotFoundError:
                pass
            except ehub.EhubError as error:
                errors.append(error)

    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    # As a service does now and then.
    with psycopg.connect(hub.conninfo, autocommit=True) as owner:
        while any(thread.is_alive() for thread in threads):
            owner.execute("SELECT ehub.tend()")
    for thread in threads:
        thread.join()
    assert errors == []
    assert hub.doctor() == []


def test_bad_input_changes_nothing(hub, space, role):
    name, _ = role()
    for wrong, error, message in (
        (lambda: space.grant("nobody here", "read"), ehub.RoleNotFoundError, "nobody here"),
        (lambda: space.grant(7, "read"), ehub.InvalidNameError, "not 7"),
        (lambda: space.grant("a\0b", "read"), ehub.InvalidNameError, "NUL"),
        (lambda: space.grant("x'; DROP ROLE y; --", "read"), ehub.RoleNotFoundError, "DROP"),
        (lambda: space.grant("PUBLIC", "read"), ehub.RoleNotFoundError, "group role"),
        (lambda: space.grant("postgres", "read"), ehub.InvalidValueError, "owns schema ehub"),
        (lambda: space.grant(name, "READ"), ehub.InvalidValueError, "not 'READ'"),
        (lambda: space.grant(name, 5), ehub.InvalidValueError, "not '5'"),
        (lambda: space.grant(name, None), ehub.InvalidValueError, "not NULL"),
        (lambda: space.grant(name, "read", version="v9"), ehub.VersionNotFoundError, "'v9'"),
        (lambda: space.grant(name, "read", rows={}), ehub.InvalidValueError, "something in it"),
        (lambda: space.grant(name, "read", rows=[1]), ehub.InvalidMetadataError, "mapping"),
        (lambda: space.grant(name, "read", rows={"a": "x" * 2000}), ehub.InvalidValueError, "1000"),
        (lambda: space.grant(name, "admin", rows={"a": 1}), ehub.InvalidValueError, "all rows"),
        (lambda: space.revoke(name), ehub.GrantNotFoundError, "no such grant"),
        (lambda: space.revoke("nobody here"), ehub.RoleNotFoundError, "nobody here"),
        (lambda: hub.revoke_create(name), ehub.GrantNotFoundError, name),
        (lambda: hub.grant_default(name, "create"), ehub.InvalidValueError, "'create'"),
        (lambda: space.audit("x"), ehub.InvalidValueError, "limit"),
    ):
        with pytest.raises(error, match=message):
            wrong()
    assert hub.grants() == []
    assert {entry.action for entry in hub.audit()} == {"create_space"}
