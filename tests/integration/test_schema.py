"""The schema: migrated equals modelled, and functions are written with care."""

import contextlib
import re

import alembic.autogenerate
import alembic.migration
import psycopg
import pytest
import sqlalchemy
from psycopg import sql
from psycopg.conninfo import make_conninfo

import ehub
from ehub import database as database_module
from ehub import migrate as migrate_module
from ehub.config import Target
from ehub.database import Database
from ehub.models import Base, SearchIndex, Space


@pytest.fixture
def empty(server, admin, tmp_path):
    """A database without ehub."""
    name = "ehub_empty"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield make_conninfo(server, dbname=name)
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def engine(url):
    return sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sqlalchemy.NullPool
    )


# Reflection knows Postgres' xid8 and pg_snapshot by no name.
@pytest.mark.filterwarnings("ignore:Did not recognize type")
def test_the_models_are_what_the_migrations_make(url):
    with engine(url).connect() as connection:
        context = alembic.migration.MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == "ehub",
                "version_table": "migration",
                "version_table_schema": "ehub",
                "compare_type": True,
                "compare_server_default": False,
            },
        )
        assert alembic.autogenerate.compare_metadata(context, Base.metadata) == []


def test_the_release_knows_its_newest_revision():
    assert migrate_module.head() == database_module.SCHEMA_REVISION


def test_the_models_read_what_the_functions_write(hub, url):
    hub.create_space("a", 3, "cosine", M=8)
    with sqlalchemy.orm.Session(engine(url)) as session:
        space = session.scalars(sqlalchemy.select(Space)).one()
        assert (space.name, [v.name for v in space.versions]) == ("a", ["v1"])
        assert space.versions[0].indexes[0].m == 8
        assert session.scalars(sqlalchemy.select(SearchIndex)).one().version.space is space


def test_migrating_twice_changes_nothing_and_keeps_what_is_there(empty, tmp_path):
    database = Database(Target(empty, tmp_path))
    with contextlib.closing(database):
        with pytest.raises(ehub.SchemaError, match="ehub migrate"):
            ehub.connect(empty)
        assert migrate_module.migrate(database)
        with ehub.connect(empty, data_dir=tmp_path) as hub:
            hub.create_space("a", 3).set("x", [1, 2, 3])
        assert not migrate_module.migrate(database)
        with psycopg.connect(empty) as connection:
            # As if an older release's functions were there.
            connection.execute("UPDATE ehub.setting SET value = 'old' WHERE name = 'sql_digest'")
        assert migrate_module.migrate(database)
        with ehub.connect(empty, data_dir=tmp_path) as hub:
            assert hub.get_space("a").get("x").tolist() == [1, 2, 3]


def test_a_newer_schema_is_refused(url, db, tmp_path):
    db.execute("UPDATE ehub.migration SET version_num = '9999'")
    with pytest.raises(ehub.SchemaError, match="9999"):
        ehub.connect(url, data_dir=tmp_path)
    with contextlib.closing(Database(Target(url, tmp_path))) as database:
        with pytest.raises(ehub.SchemaError, match="another release"):
            migrate_module.migrate(database)


def test_pgvector_may_live_in_any_schema(server, admin, tmp_path):
    admin.execute('CREATE DATABASE "ehub_elsewhere"')
    try:
        url = make_conninfo(server, dbname="ehub_elsewhere")
        with psycopg.connect(url) as connection:
            connection.execute('CREATE SCHEMA "ext Q"; CREATE EXTENSION vector SCHEMA "ext Q"')
        with contextlib.closing(Database(Target(url, tmp_path))) as database:
            migrate_module.migrate(database)
        with ehub.connect(url, data_dir=tmp_path) as hub:
            space = hub.create_space("a", 3, "cosine")
            space.multiset({"x": [1, 2, 3], "y": [3, 2, 1]})
            space.set("z", [1, 2, 2])
            assert [one.key for one in space.nearest_neighbors(2, key="x")] == ["z", "y"]
            with pytest.raises(ehub.InvalidValueError):
                space.set("x", [0, 0, 0])
    finally:
        admin.execute('DROP DATABASE "ehub_elsewhere" WITH (FORCE)')


def test_every_function_has_a_pinned_search_path(db):
    loose = db.execute(
        "SELECT p.oid::regprocedure::text FROM pg_proc p"
        " WHERE p.pronamespace = 'ehub'::regnamespace"
        " AND NOT coalesce(p.proconfig, '{}') && ARRAY['search_path=pg_catalog, pg_temp']"
    ).fetchall()
    assert loose == []


def test_few_functions_run_with_their_owners_rights(db):
    definers = db.execute(
        "SELECT proname, prosrc, 'ehub.caller'::regtype = ANY (proargtypes) FROM pg_proc"
        " WHERE prosecdef AND pronamespace = 'ehub'::regnamespace ORDER BY proname"
    ).fetchall()
    assert [name for name, _, knows in definers if not knows] == [
        # For who knows an id that nobody is told; what counts tells nothing.
        *("acknowledged", "count_exact", "forget_replica"),
        # They have nothing to tell that is not for everybody, and believe nobody.
        "log_change",
        *("own_token", "release_log", "report"),
        *("service_missing", "trim", "trimmed_below"),
    ]
    # Who knows the caller asks first what it may do. One who may call create_space may make spaces.
    for name, source, knows in definers:
        if knows:
            asks = re.search(r"ehub\.(require_admin|require_owner|role_of)\(caller", source)
            assert asks, name
            before = source[: asks.start()].removesuffix("ehub.sees_all_rows(")
            assert not re.search(r"ehub\.\w+\(", before.replace("ehub.is_owner(", "")), name


def test_strangers_may_look_but_there_is_nothing_to_see(hub, db):
    space = hub.create_space("a", 3)
    space.checkpoint("one")
    space.create_version("v2")
    space.promote("v2")
    name = "ehub_test_stranger"
    db.execute(f"CREATE ROLE {name}")
    try:
        db.execute(f"SET ROLE {name}")
        tables = db.execute(
            "SELECT c.relname FROM pg_class c WHERE c.relkind IN ('r', 'v', 'p')"
            " AND c.relnamespace IN ('ehub'::regnamespace, 'ehub_data'::regnamespace,"
            " 'spaces'::regnamespace) AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1"
        ).fetchall()
        assert [name for (name,) in tables] == [
            "attached",
            "audit_trail",
            "catalogue",
            "checkpoints",
            "grants",
            "indexes",
            "kept_averages",
            "migration",
            "promotions",
            "setting",
            "status",
            "sub_indexes",
            "versions",
            "whoami",
        ]
        for view in {name for (name,) in tables} - {"migration", "setting"}:
            assert db.execute(f"SELECT * FROM ehub.{view}").fetchall() == []
    finally:
        db.execute("RESET ROLE")
        db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_reading_the_log_uses_its_index(hub, db):
    """Also with one old transaction that still runs: not everything since then is read."""
    hub.create_space("a", 2)
    db.execute(
        "INSERT INTO ehub.change SELECT 1, (i::text)::xid8, ARRAY['k']"
        " FROM generate_series(1000, 200000) i"
    )
    db.execute("ANALYZE ehub.change")
    plan = db.execute(
        "EXPLAIN (ANALYZE, TIMING OFF) SELECT keys FROM ehub.change AS c WHERE c.version_id = 1"
        " AND (c.xid >= pg_snapshot_xmax('1000:199998:1000,1500')"
        " OR c.xid = ANY (ARRAY(SELECT pg_snapshot_xip('1000:199998:1000,1500'))))"
    ).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "change_version_id_xid_idx" in text
    assert "Seq Scan" not in text
    rows = [int(float(n)) for n in re.findall(r"actual rows=([\d.]+)", text)]
    assert max(rows) < 100


def test_what_an_older_release_has_not_made_is_made(hub, db, url, tmp_path):
    """Triggers that came later, and marks of current versions, of spaces of every kind."""
    space = hub.create_space("s", 2)
    space.multiset([("a", [1, 1], {"n": 1})])
    space.checkpoint("one")
    hub.create_average("means", "s", "n")
    hub.create_space("frozen", 2).freeze()
    forgetful = hub.create_space("forgetful", 2)
    forgetful.checkpoint("gone")
    forgetful.drop_checkpoint("gone")
    rows = db.execute(
        "SELECT tgrelid::regclass::text, tgname FROM pg_trigger"
        " WHERE tgname ~ '^ehub.*_row$' AND tgrelid::regclass::text ~ '^ehub_data.v'"
    ).fetchall()
    assert len(rows) == 9
    for table, trigger in rows:
        db.execute(f"DROP TRIGGER {trigger} ON {table}")
    marks = db.execute(
        "SELECT oid::regtype::text FROM pg_type WHERE typname ~ '^current_v'"
    ).fetchall()
    assert len(marks) == 4
    for (mark,) in marks:
        db.execute(f"DROP TYPE {mark}")
    assert {one.remedy for one in hub.doctor()} == {"mark it", "put them right"}
    db.execute("UPDATE ehub.setting SET value = 'old' WHERE name = 'sql_digest'")
    with contextlib.closing(Database(Target(url, tmp_path))) as database:
        assert migrate_module.migrate(database)
    assert hub.doctor() == []
    db.execute("SET session_replication_role = replica")
    db.execute("UPDATE spaces.s SET embedding = '[5,5]'")
    assert db.execute("SELECT embedding::text FROM spaces.means").fetchone() == ("[5,5]",)
    assert space.at("one").get("a").tolist() == [1, 1]
    with pytest.raises(psycopg.Error, match="frozen"):
        db.execute("INSERT INTO spaces.frozen (key, embedding) VALUES ('a', '[1,1]')")
