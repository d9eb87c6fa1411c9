"""Migrations of an application beside those of ehub: both ways round, and what autogenerate says."""

import contextlib
import io
import subprocess
import sys
import textwrap

import alembic.autogenerate
import alembic.command
import alembic.config
import alembic.script
import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate.api import AutogenContext
from alembic.migration import MigrationContext
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy.dialects.postgresql.base import ischema_names

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

ENV = """
import sqlalchemy
from alembic import context
import ehub.alembic
from pgvector.sqlalchemy import HALFVEC, VECTOR

metadata = sqlalchemy.MetaData()
sqlalchemy.Table(
    "documents", metadata,
    sqlalchemy.Column("id", sqlalchemy.BigInteger, primary_key=True),
    sqlalchemy.Column("lang", sqlalchemy.Text),
    sqlalchemy.Column("embedding", VECTOR(3)),
)
sqlalchemy.Table(
    "Odd Items", metadata,
    sqlalchemy.Column("id", sqlalchemy.Uuid, primary_key=True),
    sqlalchemy.Column("half", HALFVEC(3)),
    schema="shop",
)

def include_name(name, type_, parents):
    return name != "ignored" and ehub.alembic.include_name(name, type_, parents)

options = dict(target_metadata=metadata, include_schemas=True, include_name=include_name)
if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with context.config.attributes["engine"].connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""

TABLES = '''
"""Tables of the application."""
import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC, VECTOR

revision, down_revision = "one", None

def upgrade():
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.execute("CREATE SCHEMA shop")
    op.execute("CREATE TABLE ignored (id int)")
    op.create_table(
        "documents",
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("lang", sa.Text),
        sa.Column("embedding", VECTOR(3)),
    )
    op.create_table(
        "Odd Items",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("half", HALFVEC(3)),
        schema="shop",
    )

def downgrade():
    op.drop_table("Odd Items", schema="shop")
    op.drop_table("documents")
    op.execute("DROP TABLE ignored")
    op.execute("DROP SCHEMA shop")
'''

SPACES = '''
"""What ehub searches."""
from alembic import op

revision, down_revision = "two", "one"

def upgrade():
    op.attach_embedding_index("public.documents", "embedding")
    op.attach_embedding_index(
        "documents", "embedding", metric="cosine", name="directions", M=8, target_recall=0.9
    )
    op.attach_embedding_index("Odd Items", "half", metric="ip", name="odd", schema="shop", dims=3)
    op.create_embedding_space("it.s", dims=4)
    op.create_embedding_space(
        "tenants", dims=4, metric="cosine", partition_by="ten'ant",
        M=8, ef_construction=100, target_recall=0.9,
    )

def downgrade():
    op.drop_embedding_space("tenants")
    op.drop_embedding_space("it.s")
    op.detach_embedding_index("Odd Items", "half", schema="shop")
    op.detach_embedding_index("documents", "embedding", metric="cosine")
    op.detach_embedding_index("documents")
'''

MADE = [
    ("directions", 3, "cosine", 8, None),
    ("documents", 3, "l2", 16, None),
    ("it.s", 4, "l2", 16, None),
    ("odd", 3, "ip", 16, None),
    ("tenants", 4, "cosine", 8, "ten'ant"),
]


@pytest.fixture
def bare(server, admin):
    """A database without ehub, and without an application."""
    admin.execute(sql.SQL("CREATE DATABASE ehub_bare"))
    yield make_conninfo(server, dbname="ehub_bare")
    admin.execute(sql.SQL("DROP DATABASE ehub_bare WITH (FORCE)"))


@pytest.fixture
def application(tmp_path):
    """Return the Alembic configuration of an application on a database."""
    folder = tmp_path / "application"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENV)
    (folder / "versions" / "one.py").write_text(TABLES)
    (folder / "versions" / "two.py").write_text(SPACES)
    engines = []

    def configure(url):
        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: psycopg.connect(url),
            poolclass=sqlalchemy.NullPool,
        )
        engines.append(engine)
        config = alembic.config.Config(stdout=io.StringIO(), output_buffer=io.StringIO())
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes["engine"] = engine
        return config

    yield configure
    for engine in engines:
        engine.dispose()


def spaces(url):
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT space, dims, metric, m, partition_by FROM ehub.catalogue ORDER BY space"
        ).fetchall()


def migrated(url, tmp_path):
    with contextlib.closing(Database(Target(url, tmp_path / "data"))) as database:
        return migrate(database)


@pytest.mark.parametrize("first", ["ehub", "application"])
def test_both_histories_go_their_ways(bare, application, tmp_path, first):
    config = application(bare)
    if first == "application":
        alembic.command.upgrade(config, "one")
    assert migrated(bare, tmp_path)
    alembic.command.upgrade(config, "head")
    assert spaces(bare) == MADE
    assert not migrated(bare, tmp_path)
    # Autogenerate says nothing, neither of ehub nor of pgvector's types.
    alembic.command.check(config)

    with ehub.connect(bare, data_dir=tmp_path / "data", index="none") as hub:
        with psycopg.connect(bare) as connection:
            connection.execute("INSERT INTO documents VALUES (7, 'en', '[1,2,3]')")
        near = hub.get_space("directions").nearest_neighbors(1, vector=[2, 4, 6])
        assert [one.key for one in near] == ["7"]

    alembic.command.downgrade(config, "one")
    assert spaces(bare) == []
    with psycopg.connect(bare) as connection:
        assert connection.execute("SELECT * FROM documents").fetchall() != []
        assert (
            connection.execute(
                "SELECT FROM pg_trigger WHERE tgrelid = 'documents'::regclass"
            ).fetchall()
            == []
        )
    alembic.command.upgrade(config, "head")
    assert spaces(bare) == MADE
    alembic.command.downgrade(config, "base")
    assert spaces(bare) == []
    assert not migrated(bare, tmp_path)


def test_migrations_as_sql(bare, application, tmp_path):
    config = application(bare)
    migrated(bare, tmp_path)
    alembic.command.upgrade(config, "head", sql=True)
    script = config.output_buffer.getvalue()
    assert "SELECT ehub.attach(CAST('public.documents' AS regclass), 'embedding')" in script
    with psycopg.connect(bare, autocommit=True) as connection:
        connection.execute(script)
    assert spaces(bare) == MADE
    config.output_buffer.seek(0)
    config.output_buffer.truncate()
    alembic.command.downgrade(config, "head:base", sql=True)
    with psycopg.connect(bare, autocommit=True) as connection:
        connection.execute(config.output_buffer.getvalue())
    assert spaces(bare) == []


def operations():
    """One of each, as it is called, with what it is called in reverse."""
    attach = ehub.alembic.AttachEmbeddingIndexOp
    create = ehub.alembic.CreateEmbeddingSpaceOp
    detach = ehub.alembic.DetachEmbeddingIndexOp
    return [
        (
            create("a", dims=3, metric="cosine", partition_by=None),
            "op.create_embedding_space('a', dims=3, metric='cosine')",
            "op.drop_embedding_space('a')",
        ),
        (
            create("a", dims=3).reverse(),
            "op.drop_embedding_space('a')",
            "op.create_embedding_space('a', dims=3)",
        ),
        (
            attach("t", "e", metric="ip", name="it's", schema="s", M=8),
            "op.attach_embedding_index('t', 'e', metric='ip', name=\"it's\", schema='s', M=8)",
            "op.detach_embedding_index('t', 'e', metric='ip', name=\"it's\", schema='s')",
        ),
        (
            attach("t", "e", M=8).reverse(),
            "op.detach_embedding_index('t', 'e')",
            "op.attach_embedding_index('t', 'e', M=8)",
        ),
        (
            detach("t", "e", metric="ip"),
            "op.detach_embedding_index('t', 'e', metric='ip')",
            "op.attach_embedding_index('t', 'e', metric='ip')",
        ),
    ]


def test_operations_are_written_into_migrations_and_back(url):
    with psycopg.connect(url) as driver:
        engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: driver)
        with engine.connect() as connection:
            context = AutogenContext(MigrationContext.configure(connection))
            for operation, forward, back in operations():
                assert alembic.autogenerate.render_op_text(context, operation) == forward
                reverse = operation.reverse()
                assert alembic.autogenerate.render_op_text(context, reverse) == back
                assert alembic.autogenerate.render_op_text(context, reverse.reverse()) == forward
    assert context.imports == {"import ehub.alembic"}
    for operation in (
        ehub.alembic.DropEmbeddingSpaceOp("a"),
        ehub.alembic.DetachEmbeddingIndexOp("a"),
    ):
        with pytest.raises(ValueError, match="'a' .*cannot be reversed"):
            operation.reverse()


def test_what_autogenerate_writes_can_be_run(bare, application, tmp_path):
    config = application(bare)
    migrated(bare, tmp_path)
    alembic.command.upgrade(config, "one")

    def add(context, revision, directives):
        attach = ehub.alembic.AttachEmbeddingIndexOp("documents", "embedding", metric="cosine")
        directives[0].upgrade_ops.ops.append(attach)
        directives[0].downgrade_ops = directives[0].upgrade_ops.reverse()

    (tmp_path / "application" / "versions" / "two.py").unlink()
    (tmp_path / "application" / "script.py.mako").write_text(
        textwrap.dedent("""\
            from alembic import op
            ${imports if imports else ""}

            revision, down_revision = ${repr(up_revision)}, ${repr(down_revision)}

            def upgrade():
                ${upgrades}

            def downgrade():
                ${downgrades}
            """)
    )
    alembic.command.revision(config, "attach", autogenerate=True, process_revision_directives=add)
    alembic.command.upgrade(config, "head")
    assert spaces(bare) == [("documents", 3, "cosine", 16, None)]
    alembic.command.downgrade(config, "one")
    assert spaces(bare) == []


def test_names_are_left_out_by_schema_alone():
    for name in ("ehub", "ehub_data", "spaces", "ehub_dblink"):
        assert not ehub.alembic.include_name(name, "schema", {})
        assert ehub.alembic.include_name(name, "table", {"schema_name": None})
    for name in (None, "public", "ehub2"):
        assert ehub.alembic.include_name(name, "schema", {})


def test_pgvectors_own_types_stay():
    assert ischema_names["vector"].__module__.startswith("pgvector.")
    # Without it, there are types all the same; it may come later.
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c"),
            "import ehub.alembic, sys;"
            "from sqlalchemy.dialects.postgresql.base import ischema_names as names;"
            "assert 'pgvector' not in sys.modules;"
            "print(names['vector'](3).get_col_spec(), names['halfvec']().get_col_spec());"
            "import pgvector.sqlalchemy;"
            "print(names['vector'] is pgvector.sqlalchemy.VECTOR)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["VECTOR(3)", "HALFVEC", "True"]


def test_types_are_reflected_without_pgvectors_package(url, db, monkeypatch):
    monkeypatch.setitem(ischema_names, "vector", ehub.models.VectorType)
    monkeypatch.setitem(ischema_names, "halfvec", ehub.models.HalfvecType)
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a vector(3), b halfvec(4), c vector)")
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sqlalchemy.NullPool
    )
    columns = {c["name"]: c["type"] for c in sqlalchemy.inspect(engine).get_columns("t")}
    assert [str(columns[name]) for name in "abc"] == ["VECTOR(3)", "HALFVEC(4)", "VECTOR"]
    metadata = sqlalchemy.MetaData()
    reflected = sqlalchemy.Table("t", metadata, autoload_with=engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_schemas": True, "include_name": ehub.alembic.include_name},
        )
        assert alembic.autogenerate.compare_metadata(context, metadata) == []
        reflected.c.a.type = ehub.models.VectorType(5)
        (changes,) = alembic.autogenerate.compare_metadata(context, metadata)
        assert changes[0][0] == "modify_type"
    engine.dispose()
