"""Roles that try to get what was not given to them."""

import contextlib
import time
import uuid

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub

# As ehub.me writes when the statement began.
NOW = "(1000000 * date_part('epoch', statement_timestamp()))::bigint"


@pytest.fixture
def space(hub):
    space = hub.create_space("s", 2)
    rows = [(f"mine_{i}", [1, i], {"tenant": 42}) for i in range(5)]
    space.multiset(rows + [(f"hush_{i}", [77, i], {"tenant": 1, "note": "x"}) for i in range(50)])
    return space


@pytest.fixture
def low(url, db, space):
    """A connection as a role that is limited to some rows, and that may create functions."""
    name = f"ehub_low_{uuid.uuid4().hex[:8]}"
    db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
    db.execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {name}")
    space.grant(name, "read", rows={"tenant": 42})
    with psycopg.connect(make_conninfo(url, user=name, password="x"), autocommit=True) as low:
        yield low
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def me(low):
    return low.info.user


def test_a_caller_cannot_be_forged(low, db, space):
    (owner,) = db.execute("SELECT 'postgres'::regrole::oid::text").fetchone()
    for forged in (
        f"'{owner} 1'",
        f"'{owner} ' || {NOW}",
        f"('{owner} ' || {NOW})::ehub.caller",
        "NULL",
        "(SELECT ehub.me() WHERE false)",
        "(SELECT NULL::ehub.caller WHERE false)",
        "''",
    ):
        for call in ("ehub.freeze('s', caller => {})", "ehub.images(1, 1, caller => {})"):
            with pytest.raises(psycopg.Error, match="caller|who calls|does not manage|permission"):
                low.execute("SELECT " + call.format(forged))
    assert not space.frozen


def test_what_says_who_calls_cannot_be_kept(low, db, space):
    """Somebody who was an admin for a moment: what they put aside is worth nothing afterwards."""
    boss = f"ehub_boss_{uuid.uuid4().hex[:8]}"
    db.execute(f"CREATE ROLE {boss}")
    try:
        space.grant(boss, "admin")
        db.execute(f"GRANT {boss} TO {me(low)}; GRANT CREATE ON SCHEMA public TO {boss}")
        low.execute(f"SET ROLE {boss}")
        low.execute("CREATE TABLE public.kept (caller ehub.caller)")
        low.execute("INSERT INTO public.kept VALUES (ehub.me())")
        low.execute(f"GRANT SELECT ON public.kept TO {me(low)}")
        low.execute("RESET ROLE")
        db.execute(f"REVOKE {boss} FROM {me(low)}")
        for call in ("ehub.freeze('s', caller)", "ehub.candidates('s', '{}', 5, caller => caller)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="who calls"):
                low.execute(f"SELECT {call} FROM public.kept")
        assert not space.frozen
    finally:
        db.execute(f"DROP OWNED BY {boss} CASCADE; DROP ROLE {boss}")


def test_shadows_in_the_search_path(low, db, space):
    """Functions, operators, casts, tables and types of its own, before those that are meant."""
    low.execute(
        """
        CREATE TABLE public.took (what text);
        GRANT ALL ON public.took TO PUBLIC;
        CREATE FUNCTION public.took(text) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO public.took VALUES ($1 || ' as ' || current_user); RETURN true; END $$;
        CREATE FUNCTION public.same(text, text) RETURNS boolean LANGUAGE sql AS
            $$ SELECT public.took('=') $$;
        CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = public.same);
        CREATE FUNCTION public.contains(jsonb, jsonb) RETURNS boolean LANGUAGE sql AS
            $$ SELECT public.took('@>') $$;
        CREATE OPERATOR public.@> (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = public.contains);
        CREATE FUNCTION public.format(text, VARIADIC text[]) RETURNS text LANGUAGE sql AS
            $$ SELECT public.took('format')::text $$;
        CREATE FUNCTION public.quote_ident(text) RETURNS text LANGUAGE sql AS
            $$ SELECT public.took('quote_ident')::text $$;
        CREATE FUNCTION public.pg_has_role(oid, oid, text) RETURNS boolean LANGUAGE sql AS
            $$ SELECT public.took('pg_has_role') $$;
        CREATE FUNCTION public.has_table_privilege(oid, text) RETURNS boolean LANGUAGE sql AS
            $$ SELECT public.took('has_table_privilege') $$;
        CREATE TEMPORARY TABLE access (id bigint, role regrole);
        CREATE TEMPORARY TABLE pg_roles (oid oid, rolname name, rolsuper boolean);
        INSERT INTO pg_roles VALUES (10, current_user, true);
        SET search_path = public, pg_temp, pg_catalog;
        """
    )
    assert len(low.execute("SELECT * FROM ehub.nearest('s', '[1,0]', 50)").fetchall()) == 5
    assert len(low.execute("SELECT * FROM spaces.s").fetchall()) == 5
    for call in (
        "ehub.freeze('s')",
        "ehub.restore('s', 'x')",
        f"ehub.grant('s', '{me(low)}', 'admin')",
        "ehub.grant_create('pg_monitor')",
        "ehub.changes(1, '1:1:')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            low.execute(f"SELECT {call}")
    low.execute("SELECT * FROM ehub.status; SELECT * FROM ehub.grants; SELECT ehub.trim()")
    # And when somebody with more rights has them in the path.
    db.execute("SET search_path = public, pg_catalog")
    db.execute("SELECT ehub.checkpoint('s', 'one')")
    db.execute(f"SELECT ehub.grant('s', '{me(low)}', 'write', rows => '{{\"tenant\": 42}}')")
    db.execute("SELECT ehub.restore('s', 'one')")
    db.execute("SELECT * FROM ehub.nearest('s', '[1,0]', 50)")
    db.execute("SELECT ehub.tend(), ehub.trim()")
    assert db.execute("SELECT * FROM public.took").fetchall() == []


def test_a_leaky_function_sees_only_its_own_rows(low, space):
    low.execute(
        "CREATE FUNCTION public.leak(text, jsonb) RETURNS boolean LANGUAGE plpgsql COST 0.0000001"
        " AS $$ BEGIN RAISE NOTICE 'leak % %', $1, $2; RETURN true; END $$"
    )
    told = []
    low.add_notice_handler(lambda notice: told.append(notice.message_primary))
    for statement in (
        "SELECT * FROM spaces.s WHERE public.leak(key, metadata)",
        "SELECT * FROM ehub_data.v1 WHERE public.leak(key, metadata)",
        "SELECT * FROM ehub.nearest('s', '[77,0]', 50) WHERE public.leak(key, metadata)",
        "SELECT * FROM ehub.nearest('s', '[77,0]', 50) n"
        " JOIN spaces.s USING (key) WHERE public.leak(key, n.metadata)",
    ):
        low.execute(statement)
    assert len(told) >= 20
    assert not any("hush" in one for one in told)
    with pytest.raises(psycopg.errors.DivisionByZero):
        low.execute("SELECT 1 / (length(key) - 6) FROM spaces.s")
    low.execute("SELECT 1 / (length(key) - 7) FROM spaces.s WHERE key < 'z' OFFSET 0")


def test_texts_stay_texts(low, db, hub, space):
    evil = [
        "s'; DROP TABLE ehub_data.v1; --",
        's"; DROP TABLE ehub_data.v1; --',
        "$$; DROP TABLE ehub_data.v1; $$",
        "\\'; DROP TABLE ehub_data.v1; --",
        "s@v1'; --",
        "%I%s%L",
    ]
    for connection in (low, db):
        connection.execute("SET standard_conforming_strings = off; SET array_nulls = off")
        for text in evil:
            for call in (
                "ehub.nearest(%s, '[1,0]', 1)",
                "ehub.nearest_to('s', %s, 1)",
                "ehub.get('s', %s)",
                "ehub.set(%s, 'k', '[1,0]')",
                "ehub.grant('s', %s, 'read')",
                "ehub.grant(%s, 'pg_monitor', 'read')",
                "ehub.grant('s', 'pg_monitor', %s)",
                "ehub.grant('s', 'pg_monitor', 'read', version => %s)",
                "ehub.revoke('s', %s)",
                "ehub.grant_create(%s)",
                "ehub.create_version('s', %s)",
                "ehub.promote('s', %s)",
                "ehub.checkpoint('s', %s)",
                "ehub.restore('s', %s)",
                "ehub.delete_space(%s)",
            ):
                with pytest.raises(psycopg.Error) as raised:
                    connection.execute(f"SELECT {call}", [text])
                assert raised.value.sqlstate != "42601", call
    assert len(space) == 55
    # Limits with all of that in them are obeyed, recorded and applied as they are.
    db.execute("RESET standard_conforming_strings; RESET array_nulls")
    for text in evil:
        space.grant(me(low), "read", rows={text: {"in": [text]}})
        space.set("evil", [1, 1], {text: {"in": [text, 1]}})
        assert low.execute("SELECT key FROM spaces.s WHERE key = 'evil'").fetchone() == ("evil",)
        assert len(low.execute("SELECT * FROM ehub.nearest('s', '[1,0]', 50)").fetchall()) == 6
        space.revoke(me(low), "read", rows={text: {"in": [text]}})
        assert low.execute("SELECT key FROM spaces.s WHERE key = 'evil'").fetchone() is None
    space.delete("evil")
    assert hub.doctor() == []
    assert len(space) == 55


def test_a_relation_under_a_spaces_name(low, db, space):
    for statement in (
        "DROP VIEW spaces.s",
        "CREATE VIEW spaces.t AS SELECT 1",
        "ALTER VIEW spaces.s RENAME TO t",
        "CREATE OR REPLACE VIEW spaces.s AS SELECT 'x'::text AS key",
        "CREATE TABLE ehub_data.v2 (key text)",
        "CREATE FUNCTION ehub_data.check_v1() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TRIGGER t INSTEAD OF INSERT ON spaces.s EXECUTE FUNCTION ehub.log_change('1')",
        "CREATE TRIGGER t AFTER INSERT ON ehub_data.v1 EXECUTE FUNCTION ehub.log_change('1')",
        "CREATE TABLE public.t (k text REFERENCES ehub_data.v1)",
        "CREATE POLICY p ON ehub_data.v1 USING (true)",
        "ALTER TABLE ehub_data.v1 DISABLE ROW LEVEL SECURITY",
        "CREATE RULE r AS ON INSERT TO spaces.s DO INSTEAD NOTHING",
        "DO $$ BEGIN LOCK TABLE ehub.incarnation; END $$",
        "SELECT FROM ehub.setting FOR UPDATE",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            low.execute(statement)
    # One of its own, where its path finds it first, is nothing to the functions.
    low.execute(
        "CREATE TABLE public.s (key text, embedding vector, metadata jsonb);"
        " CREATE TEMPORARY TABLE v1 (key text); SET search_path = pg_temp, public"
    )
    assert len(low.execute("SELECT * FROM ehub.nearest('s', '[1,0]', 50)").fetchall()) == 5


def test_forged_doorbells_and_held_locks(low, db, hub, space):
    """Replicas read the log once more, and nothing else happens. True ones tell nothing."""
    space.wait_until_indexed(30)
    low.execute("LISTEN ehub")
    time.sleep(0.3)
    space.set("hush_new", [77, 1])
    told = list(low.notifies(timeout=2, stop_after=1))
    assert [one.payload for one in told] == [""]
    for number in (1, 3, 4, 5):
        low.execute("SELECT pg_try_advisory_lock(1701344610, %s)", [number])
    for i in range(300):
        low.execute("SELECT pg_notify('ehub', %s)", [f"forged {i}"])
        if i % 100 == 0:
            space.set(f"new_{i}", [500 + i, 1])
            found = space.nearest_neighbors(1, vector=[500 + i, 1], consistency="strong")
            assert found[0].key == f"new_{i}"
    db.execute("SELECT ehub.trim()")
    db.execute("SELECT ehub.enter_incarnation(), ehub.recognise()")
    assert low.execute("SELECT pg_try_advisory_lock(1701344610, 1)").fetchone()


def test_what_a_limited_writer_tries(low, db, space):
    space.grant(me(low), "write", rows={"tenant": 42})
    for statement in (
        "UPDATE spaces.s SET metadata = '{\"tenant\": 1}'",
        "INSERT INTO spaces.s VALUES ('new', '[1,1]', '{\"tenant\": 1}')",
        "INSERT INTO spaces.s VALUES ('hush_1', '[1,1]', '{\"tenant\": 42}')"
        " ON CONFLICT (key) DO UPDATE SET embedding = EXCLUDED.embedding RETURNING metadata",
        "TRUNCATE ehub_data.v1",
        "COPY ehub_data.v1 FROM PROGRAM 'true'",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as raised:
            low.execute(statement)
        assert "note" not in str(raised.value)
    with pytest.raises(psycopg.errors.UniqueViolation) as taken:
        low.execute("INSERT INTO spaces.s VALUES ('hush_1', '[1,1]', '{\"tenant\": 42}')")
    assert "77" not in str(taken.value)
    assert low.execute("UPDATE spaces.s SET embedding = '[2,2]'").rowcount == 5
    assert low.execute("DELETE FROM spaces.s").rowcount == 5
    assert len(space) == 50
    space.checkpoint("x")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        low.execute("SELECT * FROM ehub.rows_at('s', 'x')")


def test_its_replica_asks_for_more(low, db, url, space, tmp_path):
    """A client that is not ours: every statement that a replica makes, by a role that may not."""
    with contextlib.closing(ehub.connect(url, data_dir=tmp_path / "own", index="local")) as own:
        own.get_space("s").wait_until_indexed(30)
        ids = db.execute("SELECT id FROM ehub.replica").fetchall()
        assert ids
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            low.execute("SELECT id FROM ehub.replica")
        for statement in (
            "SELECT * FROM ehub.changes(1, '1:1:')",
            "COPY (SELECT keys FROM ehub.change) TO STDOUT",
            "SELECT ehub.acknowledge(gen_random_uuid(), 1, 'x', '1:1:', gen_random_uuid(), 1, '9 y')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                low.execute(statement)
        with low.cursor().copy("COPY (SELECT key FROM ehub_data.v1) TO STDOUT") as copy:
            assert b"hush" not in b"".join(bytes(part) for part in copy)
    # Nor does somebody who may hold the log hold it for long.
    space.grant(me(low), "read")
    low.execute(
        "SELECT ehub.acknowledge(gen_random_uuid(), 1, 'x', pg_current_snapshot(),"
        " gen_random_uuid(), 1, '9 years')"
    )
    (longest,) = db.execute(
        "SELECT max(expires_at) < now() + interval '25 hours' FROM ehub.replica"
    ).fetchone()
    assert longest


def test_names_of_roles_are_names(db, hub, space):
    name = f'x"; DROP TABLE ehub_data.v1; -- {uuid.uuid4().hex[:6]}'
    db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    try:
        space.grant(name, "write", rows={"tenant": 1})
        assert [grant.role for grant in space.grants()] == [name]
        assert hub.doctor() == []
        space.revoke(name)
    finally:
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))
    assert len(space) == 55
