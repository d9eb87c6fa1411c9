"""Who may not read a space learns nothing of it, by any door of the service."""

import psycopg
import pytest
from psycopg import sql

import ehub
from service.conftest import settled
from service.test_nearest import literal, nearest, vectors

CANDIDATES = "SELECT * FROM ehub.candidates(%s, ARRAY[%s::vector], 5)"


@pytest.fixture
def space(url, data_dir, service, db):
    with ehub.connect(url, data_dir=data_dir) as hub:
        space = hub.create_space("secret", 8)
        space.multiset([f"k{i}" for i in range(500)], vectors(500))
        settled(db, "secret")
        yield space


@pytest.fixture
def role(db, url):
    """Make roles, and connections as them."""
    made = []

    def make(name):
        name = f"ehub_{name}"
        db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        connection = psycopg.connect(url, autocommit=True)
        connection.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(name)))
        made.append((name, connection))
        return name, connection

    yield make
    for name, connection in made:
        connection.close()
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def grant(db, name):
    db.execute("SELECT ehub.grant('secret', %s, 'read')", [name])


def test_a_stranger_learns_nothing(space, db, role):
    _, stranger = role("stranger")
    query = literal(vectors(1)[0])
    unknown = {}
    for name in ("secret", "nosuch"):
        unknown[name] = []
        for statement in (
            "SELECT * FROM ehub.nearest(%s, %s, 3)",
            "SELECT * FROM ehub.nearest_to(%s, 'k1', 3)",
            "SELECT * FROM ehub.nearest_exact(%s, %s, 3)",
            "SELECT * FROM ehub.nearest_exact_to(%s, 'k1', 3)",
            "SELECT * FROM ehub.nearest_many(%s, ARRAY[%s]::vector[], 3)",
            "SELECT ehub.get(%s, 'k1')",
            "SELECT ehub.set(%s, 'k1', %s)",
            "SELECT ehub.delete(%s, 'k1')",
            "SELECT ehub.index_missing(%s, pg_current_snapshot())",
            "SELECT ehub.require_space(%s)",
            "SELECT ehub.merge_staged(%s)",
        ):
            parameters = [name, query][: statement.count("%s")]
            with pytest.raises(psycopg.DatabaseError) as raised:
                stranger.execute(statement, parameters)
            unknown[name].append(str(raised.value).replace(name, "X"))
    # The answer is the same for what is there and what is not.
    assert unknown["secret"] == unknown["nosuch"]
    assert stranger.execute("SELECT * FROM ehub.catalogue").fetchall() == []
    assert stranger.execute("SELECT * FROM ehub.status").fetchall() == []


def test_the_functions_below_check_for_themselves(space, db, role):
    _, stranger = role("stranger")
    for address in ("secret", "secret@v1", "nosuch"):
        answer = stranger.execute(CANDIDATES, [address, literal(vectors(1)[0])]).fetchone()
        assert set(answer) == {None}
    deciding = "SELECT ehub.deciding_keys(1, '1:1:', '{k1}', 1, 1)"
    assert stranger.execute(deciding).fetchone() == (None,)
    for refused in (
        "SELECT ehub.service_secret()",
        "SELECT ehub.install_service('127.0.0.1', 1)",
        "SELECT ehub.uninstall_service()",
        "SELECT * FROM ehub.index_for_search('postgres', 'secret', 1, NULL, NULL, NULL, NULL)",
        "SELECT ehub.ask_by_dblink('', 1, 1, 0, NULL, NULL, '{}', 1)",
        "SELECT * FROM ehub.incarnation",
        "SELECT * FROM ehub.change",
        "SELECT * FROM ehub.replica",
        "SELECT ehub.changes(1, '1:1:')",
        "SELECT ehub.create_space('x', 3)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            stranger.execute(refused)
    seen = stranger.execute(
        "SELECT umoptions FROM pg_user_mappings WHERE srvname = 'ehub_service'"
    ).fetchall()
    assert seen == [(None,)]


def test_a_reader_uses_the_index_and_through_a_wrapper_too(space, db, role):
    name, reader = role("reader")
    grant(db, name)
    reader.execute("SET ehub.mode = 'index'")
    assert nearest(reader, vectors(1)[0], 1, "secret")[0].key == "k0"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute("SELECT ehub.set('secret', 'x', %s)", [literal(vectors(1)[0])])
    # A function with the reader's rights, called by somebody who has none.
    _, stranger = role("stranger")
    db.execute("GRANT CREATE ON SCHEMA public TO ehub_reader")
    reader.execute(
        "CREATE FUNCTION public.search(q vector) RETURNS SETOF text LANGUAGE sql SECURITY DEFINER"
        " AS $$ SELECT key FROM ehub.nearest('secret', q, 3) $$"
    )
    stranger.execute("SET ehub.mode = 'index'")
    rows = stranger.execute("SELECT public.search(%s)", [literal(vectors(1)[0])]).fetchall()
    assert rows[0] == ("k0",)
    # And the other way round: a stranger's function in a reader's session.
    db.execute("GRANT CREATE ON SCHEMA public TO ehub_stranger")
    stranger.execute(
        "CREATE FUNCTION public.steal() RETURNS text LANGUAGE sql SECURITY DEFINER AS $$"
        " SELECT (ehub.candidates('secret', ARRAY['[1,0,0,0,0,0,0,0]'::vector], 5))::text $$"
    )
    assert reader.execute("SELECT public.steal()").fetchone()[0].strip("(,)") == ""


def test_a_row_policy_is_obeyed_and_searches_are_complete(space, db, role):
    name, reader = role("tenant")
    grant(db, name)
    db.execute("UPDATE spaces.secret SET metadata = '{\"tenant\": 1}' WHERE key IN ('k5', 'k400')")
    db.execute("ALTER TABLE ehub_data.v1 ENABLE ROW LEVEL SECURITY")
    db.execute("CREATE POLICY mine ON ehub_data.v1 USING (metadata @> '{\"tenant\": 1}')")
    found = nearest(reader, vectors(1)[0], 10, "secret")
    assert sorted(n.key for n in found) == ["k400", "k5"]
    answer = reader.execute(CANDIDATES, ["secret", literal(vectors(1)[0])]).fetchone()
    assert "no index has just the rows" in str(answer)
    assert reader.execute("SELECT rows FROM ehub.status").fetchone() == (2,)
    assert len(nearest(db, vectors(1)[0], 10, "secret")) == 10


def test_the_port_lets_nobody_in_without_the_secret(space, db, service):
    place = f"host=127.0.0.1 port={service.address.port} dbname=x sslmode=disable"
    for who in ("user=ehub", "user=ehub password=guess", "user=postgres password=x"):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"{place} {who}")
    (secret,) = db.execute("SELECT ehub.service_secret()").fetchone()
    assert len(secret) == 64
    assert secret not in repr(vars(service))


def test_text_arguments_stay_text(space, db):
    evil = "s'; DROP TABLE ehub_data.v1; --"
    for statement, parameters in (
        ("SELECT * FROM ehub.nearest(%s, '[1]', 1)", [evil]),
        ("SELECT * FROM ehub.nearest_to('secret', %s, 1)", [evil]),
        ("SELECT * FROM ehub.nearest_to(%s, 'k1', 1)", ['secret"; DROP TABLE ehub_data.v1; --']),
        ("SELECT ehub.get('secret', %s)", [evil]),
        ("SELECT ehub.delete('secret', %s)", [evil]),
        ("SELECT ehub.set(%s, 'a', '[1]')", [evil]),
        ("SELECT ehub.install_service(%s, 0)", [evil]),
    ):
        with pytest.raises(psycopg.DatabaseError):
            db.execute(statement, parameters)
    for setting in ("mode", "consistency", "ef_search", "service_timeout"):
        db.execute("SELECT set_config(%s, %s, false)", [f"ehub.{setting}", evil])
        with pytest.raises(psycopg.DatabaseError, match=f"ehub.{setting}"):
            nearest(db, vectors(1)[0], 1, "secret")
        db.execute(f"RESET ehub.{setting}")
    answer = db.execute(CANDIDATES, ["secret", "[1,2]"]).fetchone()
    assert "it is of 8 dims, and the query has 2" in str(answer)
    # A reinstalled address with quotes in it is an option of the server, and nothing else.
    db.execute("SELECT ehub.install_service(%s, 1)", ["x', password 'y"])
    (options,) = db.execute(
        "SELECT srvoptions FROM pg_foreign_server WHERE srvname = 'ehub_service'"
    ).fetchone()
    assert "host=x', password 'y" in options
    assert len(space) == 500


def test_a_service_has_a_host_and_a_port(service, db):
    for host, port in (("", 1), ("x", 0), ("x", 65536), (None, 1)):
        with pytest.raises(psycopg.DatabaseError, match="a service has a host and a port"):
            db.execute("SELECT ehub.install_service(%s, %s::int)", [host, port])


def test_what_is_revoked_is_gone_with_the_next_statement(space, db, role):
    """By the index too: in one transaction, of statements that are planned and relations that are locked."""
    name, reader = role("reader")
    reader.prepare_threshold = 0
    query = literal(vectors(1)[0])
    for call in (
        "ehub.nearest('secret', {q}, 3)",
        "ehub.nearest('secret', {q}, 3, filter => '{{}}')",
        "ehub.nearest('secret', {q}, 3, filter => '{{\"not\": {{\"a\": 1}}}}')",
        "ehub.nearest_to('secret', 'k1', 3)",
        "ehub.nearest_many('secret', ARRAY[{q}]::vector[], 3)",
        "ehub.within('secret', {q}, 1e9, 3, complete => false)",
        "generate_series(1, 3) AS g, LATERAL ehub.nearest('secret', {q}, 1 + g)",
    ):
        statement = "SELECT * FROM " + call.format(q=f"'{query}'")
        for level in ("READ COMMITTED", "REPEATABLE READ"):
            grant(db, name)
            reader.execute(f"BEGIN ISOLATION LEVEL {level}")
            for _ in range(7):
                assert reader.execute(statement).fetchall()
            space.revoke(name)
            with pytest.raises(psycopg.Error) as caught:
                reader.execute(statement)
            assert caught.value.sqlstate in ("42501", "EH001"), call
            reader.execute("ROLLBACK")


def test_a_promotion_is_seen_by_every_door_or_by_none(space, db, url):
    """Also where the index proposes, for a transaction that keeps its snapshot."""
    space.create_version("v2", from_version="v1")
    db.execute('UPDATE spaces."secret@v2" SET embedding = embedding + embedding')
    query = literal(2 * vectors(500)[7])
    with psycopg.connect(url, autocommit=True) as session:
        for level in ("REPEATABLE READ", "SERIALIZABLE"):
            settled(db, "secret@v2")
            session.execute(f"BEGIN ISOLATION LEVEL {level}")
            session.execute("SELECT 1")
            space.promote("v2")
            for statement in (
                "SELECT key, distance = 0 FROM ehub.nearest('secret', %s, 1)",
                "SELECT key, distance = 0 FROM ehub.nearest_many('secret', ARRAY[%s]::vector[], 1)",
                "SELECT n.key, s.embedding = %s FROM spaces.secret AS s"
                " JOIN ehub.nearest('secret', s.embedding, 1) AS n USING (key) WHERE s.key = 'k7'",
            ):
                assert session.execute(statement, [query]).fetchone() == ("k7", True)
            session.execute("COMMIT")
            space.promote("v1")
