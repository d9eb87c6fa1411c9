"""Owners of tables who would have ehub, or who searches, run something of theirs."""

import contextlib
import threading
import time
import uuid

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

# What is called says as whom.
TOOLS = """
    CREATE TABLE public.took (what text, who text);
    GRANT ALL ON public.took TO PUBLIC;
    CREATE FUNCTION public.took(what text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO public.took VALUES ($1, current_user);
            RETURN $1;
        EXCEPTION WHEN read_only_sql_transaction THEN
            PERFORM pg_notify('took', current_user);
            RETURN $1;
        END $$;
    -- Calls of it are made wherever an expression is made simpler.
    CREATE FUNCTION public.quiet(what text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN RETURN public.took($1); END $$;
    CREATE TYPE public.sly AS ENUM ('1', '2', '3');
    CREATE TYPE public.fake AS (v text);
    CREATE FUNCTION public.sly_text(public.sly) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN RETURN public.took('sly as text'); END $$;
    CREATE FUNCTION public.sly_number(public.sly) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN PERFORM public.took('sly as number'); RETURN 1; END $$;
    CREATE FUNCTION public.sly_json(public.sly) RETURNS json LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN PERFORM public.took('sly as json'); RETURN '1'; END $$;
    CREATE FUNCTION public.fake_vector(public.fake) RETURNS @vector IMMUTABLE LANGUAGE plpgsql AS $$
        BEGIN PERFORM public.took('fake as vector'); RETURN '[1,1]'; END $$;
    CREATE FUNCTION public.fake_text(public.fake) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN RETURN public.took('fake as text'); END $$;
    CREATE CAST (public.sly AS text) WITH FUNCTION public.sly_text AS IMPLICIT;
    CREATE CAST (public.sly AS bigint) WITH FUNCTION public.sly_number AS IMPLICIT;
    CREATE CAST (public.sly AS json) WITH FUNCTION public.sly_json AS IMPLICIT;
    CREATE CAST (public.fake AS text) WITH FUNCTION public.fake_text AS IMPLICIT;
    CREATE CAST (public.fake AS @vector) WITH FUNCTION public.fake_vector AS IMPLICIT;
    CREATE DOMAIN public.mine AS public.sly;
"""
# What a table can become between two looks at it.
BECOMES = {
    "another type of the key": "ALTER TABLE t ALTER id TYPE sly USING id::text::sly",
    "another type of a number": "ALTER TABLE t ALTER n TYPE sly USING '1'",
    "another type of a text": "ALTER TABLE t ALTER note TYPE sly USING '1'",
    "no vectors": "ALTER TABLE t ALTER e TYPE fake USING ROW('x')::fake",
    "a view": "ALTER TABLE t RENAME TO u; CREATE VIEW t AS"
    " SELECT CASE WHEN took('view') IS NULL THEN 1 ELSE id END AS id, n, note, e FROM u;"
    " GRANT SELECT ON t TO PUBLIC",
}


@pytest.fixture
def low(url, db, hub):
    """The owner of a table, who may make functions and types, and is nobody else."""
    name = f"ehub_low_{uuid.uuid4().hex[:8]}"
    db.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 'x'; GRANT CREATE, USAGE ON SCHEMA public TO {name}"
    )
    (vector,) = db.execute("SELECT 'vector'::regtype::text").fetchone()
    with psycopg.connect(make_conninfo(url, user=name, password="x"), autocommit=True) as low:
        low.execute(TOOLS.replace("@vector", vector))
        low.execute("LISTEN took")
        yield low
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.fixture
def table(low):
    low.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, note text, e vector(2));"
        " INSERT INTO t VALUES (1, 1, 'x', '[1,1]'), (2, 2, 'y', '[2,2]')"
    )


def took(db, low):
    """What was called by others than the owner of the table."""
    found = db.execute("SELECT what, who FROM took WHERE who <> %s", [low.info.user]).fetchall()
    return found + [one.payload for one in low.notifies(timeout=0.05)]


def wait_for_lock(db):
    """Wait until somebody waits for a lock."""
    deadline = time.monotonic() + 10
    while not db.execute(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchall():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SEARCHES = [
    "SELECT * FROM ehub.nearest_exact('t', '[1,1]', 5)",
    "SELECT * FROM ehub.nearest_exact('t', '[1,1]', 5, filter => '{{\"n\": 1, \"note\": \"x\"}}')",
    'SELECT * FROM ehub.within(\'t\', \'[1,1]\', 9, filter => \'{{"or": [{{"n": 1}}, {{"note": "x"}}]}}\')',
    "SELECT ehub.get('t', '1')",
    "SELECT * FROM ehub_data.check_v{v}('[1,1]', '{{1,2}}', pg_current_snapshot(), 5, 5, 5, NULL)",
    "SELECT * FROM ehub_data.check_many_v{v}(ARRAY['[1,1]'::vector], '{{1,2}}', '{{1,1}}',"
    " pg_current_snapshot(), 5, 5, NULL, NULL)",
]


@pytest.mark.parametrize("what", BECOMES)
@pytest.mark.parametrize("search", range(len(SEARCHES)))
def test_a_table_that_is_altered_under_a_search(what, search, low, db, url, table):
    """The owner holds the table until somebody else has looked at what it is, and waits for it."""
    low.execute("SELECT ehub.attach('t', 'e')")
    (version,) = db.execute("SELECT version_id FROM ehub.attached").fetchone()
    statement = SEARCHES[search].format(v=version)
    db.execute(statement)
    with psycopg.connect(url, autocommit=True) as searcher:
        # As whoever has planned it before, and as whoever has not.
        for before in (True, False):
            if before:
                searcher.execute(statement)
            said = []

            def run(connection=searcher, said=said):
                try:
                    connection.execute(statement)
                except psycopg.Error as error:
                    said.append(error)

            with low.transaction(force_rollback=before):
                low.execute(BECOMES[what])
                thread = threading.Thread(target=run)
                thread.start()
                wait_for_lock(db)
            thread.join(10)
    assert took(db, low) == []


@pytest.mark.parametrize("what", BECOMES)
def test_a_table_that_is_altered_under_an_index(what, low, db, hub, table):
    """The same to what reads all rows for an index, here as a superuser."""
    low.execute("SELECT ehub.attach('t', 'e')")
    with low.transaction():
        low.execute(BECOMES[what])
        hub._replica.follow("t")
        wait_for_lock(db)
    time.sleep(1)
    assert took(db, low) == []
    # Nor do others suffer from it.
    other = hub.create_space("other", 2)
    other.set("a", [1, 1])
    other.wait_until_indexed(10)


@pytest.mark.parametrize("what", [what for what in BECOMES if what != "a view"])
def test_what_is_written_to_an_altered_table(what, low, db, table):
    """The log has the rights of ehub's owner, and the key for it."""
    low.execute("SELECT ehub.attach('t', 'e')")
    low.execute(BECOMES[what])
    low.execute("DELETE FROM t; INSERT INTO t (id) VALUES ('3')")
    db.execute("SET session_replication_role = replica; INSERT INTO t (id) VALUES ('2')")
    db.execute("RESET session_replication_role")
    assert took(db, low) == []
    db.execute("SELECT ehub.tend_attached()")
    low.execute("UPDATE t SET id = '1' WHERE id = '2'")
    assert took(db, low) == []


def test_types_of_others_are_looked_at_as_they_are(low, db, hub, table):
    low.execute(
        "ALTER TABLE t ADD s sly DEFAULT '2', ADD d mine DEFAULT '3', ADD f fake DEFAULT ROW('x')::fake,"
        " ADD l sly[] DEFAULT '{1}'"
    )
    low.execute("SELECT ehub.attach('t', 'e')")
    space = hub.get_space("t")
    space.wait_until_indexed(30)
    for wanted in (
        {"s": "2"},
        {"d": "3"},
        {"s": {"in": ["1", "2"]}},
        {"not": {"f": 1}},
        {"l": "1"},
    ):
        for _ in range(2):
            found = space.nearest_neighbors(5, vector=[1, 1], filter=wanted, metadata=True)
            assert len(found) == (0 if "l" in wanted else 2)
    assert found == [] and space.metadata("1") == {"id": 1, "n": 1, "note": "x", "s": "2", "d": "3"}
    space.create_index("few", {"s": "2"})
    low.execute("UPDATE t SET s = '1' WHERE id = 1")
    assert len(space.nearest_neighbors(5, vector=[1, 1], index="few", consistency="strong")) == 1
    assert took(db, low) == []


def test_row_policies_are_not_asked(low, db, hub, table):
    low.execute("SELECT ehub.attach('t', 'e')")
    low.execute(
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        " CREATE POLICY p ON t USING (took('policy') IS NULL)"
    )
    space = hub.get_space("t")
    space.wait_until_indexed(30)
    assert len(space.nearest_neighbors(5, vector=[1, 1], consistency="strong")) == 2
    assert len(db.execute(SEARCHES[0]).fetchall()) == 2
    assert took(db, low) == []


NAMES = [
    "$body$;ALTER ROLE {} SUPERUSER;SELECT $body$",
    "$template$;ALTER ROLE {} SUPERUSER;--",
    "$$;ALTER ROLE {} SUPERUSER;SELECT $$",
    "';ALTER ROLE {} SUPERUSER;--",
    '";ALTER ROLE {} SUPERUSER;--',
    "\\';ALTER ROLE {} SUPERUSER;--",
    "%s%I%1$L{{}}",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names(name, low, db, hub):
    name = sql.Identifier(name.format(low.info.user))
    low.execute("SET check_function_bodies = off")
    for column in ("id", "n", "e"):
        low.execute("DROP TABLE IF EXISTS t")
        low.execute("CREATE TABLE t (id int PRIMARY KEY, n int, e vector(2))")
        low.execute(sql.SQL("ALTER TABLE t RENAME {} TO {}").format(sql.Identifier(column), name))
        low.execute(sql.SQL("ALTER TABLE t RENAME TO {}").format(name))
        low.execute(sql.SQL("INSERT INTO {} VALUES (1, 2, '[1,1]')").format(name))
        low.execute(
            "SELECT ehub.attach(%s::text::regclass, %s, 's')",
            [name.as_string(), "e" if column != "e" else name._obj[0]],
        )
        low.execute(sql.SQL("INSERT INTO {} VALUES (2, 2, '[2,1]')").format(name))
        found = low.execute("SELECT key FROM ehub.nearest('s', '[2,1]', 1)").fetchall()
        assert found == [("2",)]
        handle = hub.get_space("s")
        assert (len(handle), len(list(handle.items(metadata=True)))) == (2, 2)
        handle.wait_until_indexed(30)
        assert [n.key for n in handle.nearest_neighbors(2, key="1", metadata=True)] == ["2"]
        low.execute("SELECT ehub.detach('s')")
        low.execute(sql.SQL("DROP TABLE {}").format(name))
    assert low.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (
        False,
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_of_fields_are_names(name, low, db, hub):
    """The same for fields of spaces that are not attached."""
    field = name.format(low.info.user).replace(".", "")
    db.execute("SELECT ehub.grant_create(%s)", [low.info.user])
    low.execute("SET check_function_bodies = off")
    for statement in (
        "SELECT ehub.create_space('own', 2, partition_by => %s)",
        "SELECT ehub.create_average('mean', 'own', %s)",
    ):
        # Some of them are refused.
        with contextlib.suppress(psycopg.Error):
            low.execute(statement, [field])
    assert low.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (
        False,
    )
    for kept in ("mean", "own"):
        with contextlib.suppress(psycopg.Error):
            low.execute("SELECT ehub.delete_space(%s)", [kept])


def test_what_attaching_is_made_of_is_for_owners(low, db, table):
    """Tables of others, and the functions below for them."""
    db.execute(
        "CREATE TABLE theirs (id int PRIMARY KEY, e vector(2)); INSERT INTO theirs VALUES (7, '[7,7]');"
        f" GRANT SELECT, TRIGGER, REFERENCES ON theirs TO {low.info.user}"
    )
    low.execute("SELECT ehub.attach('t', 'e')")
    db.execute("SELECT ehub.attach('theirs', 'e')")
    (boss,) = db.execute("SELECT oid::text FROM pg_roles WHERE rolname = current_user").fetchone()
    ours, theirs = (
        db.execute("SELECT version_id FROM ehub.attached WHERE space = %s", [space]).fetchone()[0]
        for space in ("t", "theirs")
    )
    for statement in (
        "SELECT ehub.attach('theirs', 'e', 'x')",
        "SELECT ehub.add_attached('theirs', 'e', 'x', 'l2', 2, 16, 200, 0.95, false)",
        "SELECT ehub.add_attached('theirs', 'e', 'x', 'l2', 2, 16, 200, 0.95, false,"
        f" '{boss} ' || (1000000 * date_part('epoch', statement_timestamp()))::bigint)",
        "SELECT ehub.detach('theirs')",
        "SELECT ehub.remove_attached('theirs')",
        f"SELECT ehub.remove_attached('theirs', caller => '{boss} 1')",
        "SELECT ehub.attachment_of('theirs')",
        "SELECT ehub.reattach('theirs')",
        f"SELECT ehub.drop_attached_triggers({theirs}, 'theirs', '1 s')",
        f"SELECT ehub.add_attached_triggers({theirs}, 'theirs')",
        f"SELECT ehub.add_attached_triggers({theirs}, 't')",
        f"SELECT ehub.fit_attached({ours})",
        f"SELECT ehub.create_attached_log({ours}, 'id', 'e')",
        f"SELECT ehub.give_attached_log({theirs}, 't')",
        "SELECT ehub.tend_attached()",
        "SELECT ehub.create_index('theirs', 'x', '{\"id\": 7}')",
        "SELECT * FROM ehub.attachment",
        f"CREATE TRIGGER x AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION ehub_data.log_v{theirs}()",
        f"CREATE TRIGGER x AFTER INSERT ON theirs FOR EACH ROW EXECUTE FUNCTION ehub_data.log_v{theirs}()",
        f"DROP FUNCTION ehub_data.log_v{ours}",
        f"ALTER FUNCTION ehub_data.log_v{ours} SET search_path = public",
        f"SELECT ehub_data.log_v{ours}()",
    ):
        with pytest.raises(psycopg.Error):
            low.execute(statement)
    assert db.execute("SELECT count(*) FROM ehub.attached WHERE problem IS NULL").fetchone() == (2,)
    # What says that a table of one's own has changed says nothing of another's.
    low.execute("CREATE TABLE own (id text, x int, id2 text)")
    low.execute(
        f"CREATE TRIGGER x AFTER INSERT ON own FOR EACH ROW EXECUTE FUNCTION ehub_data.log_v{ours}()"
    )
    low.execute("INSERT INTO own VALUES ('2'), ('no number'), (NULL)")
    assert low.execute("SELECT key FROM ehub.nearest('t', '[1,1]', 9)").fetchall() == [
        ("1",),
        ("2",),
    ]
    low.execute("SELECT ehub.detach('t')")
    assert low.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall() == (
        db.execute(
            "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'theirs'::regclass"
        ).fetchall()
    )


def test_who_may_not_read_learns_nothing(low, db, url, hub):
    db.execute(
        "CREATE SCHEMA shut; CREATE TABLE shut.secret (id int PRIMARY KEY, e vector(2));"
        " INSERT INTO shut.secret SELECT i, ARRAY[i, 1]::vector FROM generate_series(1, 9) AS i;"
        " SELECT ehub.attach('shut.secret', 'e')"
    )
    (version,) = db.execute("SELECT version_id FROM ehub.attached").fetchone()
    hub.get_space("secret").wait_until_indexed(30)

    def answers():
        found = []
        for statement in (
            "SELECT * FROM ehub.nearest('secret', '[1,1]', 3)",
            "SELECT * FROM ehub.nearest_exact('secret', '[1,1]', 3)",
            "SELECT ehub.get('secret', '1')",
            f"SELECT ehub.changes({version}, '1:1:')",
            "SELECT ehub.candidates('secret', ARRAY['[1,1]'::vector], 5)",
            f"SELECT ehub.deciding_keys({version}, '1:1:', '{{1}}', 1, 1)",
            f"SELECT * FROM ehub_data.check_v{version}('[1,1]', '{{1}}', '1:1:', 1, 1, 1, NULL)",
        ):
            with contextlib.suppress(psycopg.Error):
                found += low.execute(statement).fetchall()
        # But why there is no answer.
        return [one for one in found if one != (None,) and "None, None, None, None" not in str(one)]

    assert answers() == []
    assert low.execute("SELECT * FROM ehub.catalogue").fetchall() == []
    # SELECT on a table in a schema that is shut is nothing yet.
    db.execute(f"GRANT SELECT ON shut.secret TO {low.info.user}")
    assert answers() == []
    db.execute(
        "ALTER TABLE shut.secret ENABLE ROW LEVEL SECURITY; GRANT USAGE ON SCHEMA shut TO PUBLIC"
    )
    db.execute(f"CREATE POLICY p ON shut.secret TO {low.info.user} USING (id = 1)")
    low_rows = low.execute("SELECT key FROM ehub.nearest('secret', '[9,1]', 3)").fetchall()
    assert low_rows == [("1",)]
    for statement in (
        f"SELECT ehub.changes({version}, '1:1:')",
        f"SELECT keys FROM ehub.images({version}, 1)",
    ):
        with pytest.raises(psycopg.Error):
            low.execute(statement)
