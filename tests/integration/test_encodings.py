"""Databases in other encodings than UTF-8, and clients that ask for others."""

import contextlib

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.files import EmbeddingFile
from ehub.migrate import migrate


@pytest.fixture
def in_encoding(admin, server, tmp_path):
    """Make a hub of a database in an encoding."""
    made = []
    with contextlib.ExitStack() as stack:

        def make(encoding, **options):
            name = f"ehub_test_{encoding.lower()}_{len(made)}"
            admin.execute(
                f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
                " LC_COLLATE 'C' LC_CTYPE 'C'"
            )
            made.append(name)
            url = make_conninfo(server, dbname=name, **options)
            with contextlib.closing(Database(Target(url, tmp_path / name))) as database:
                migrate(database)
            return stack.enter_context(ehub.connect(url, data_dir=tmp_path / name))

        yield make
    for name in made:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("setter", ["environment", "database", "connection string", "nobody"])
@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SQL_ASCII"])
def test_text_is_what_it_was_whatever_is_set(
    in_encoding, admin, encoding, setter, monkeypatch, tmp_path
):
    if setter == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    options = {"client_encoding": "LATIN1"} if setter == "connection string" else {}
    hub = in_encoding(encoding, **options)
    if setter == "database":
        name = conninfo_to_dict(hub.conninfo)["dbname"]
        admin.execute(f"ALTER DATABASE {name} SET client_encoding = 'LATIN1'")
        hub._database.close()
        hub = ehub.connect(hub.conninfo, data_dir=tmp_path / "again")
    space = hub.create_space("s", 2)
    space.multiset([("äpfel", [1, 0], {"lang": "dé"})])
    space.set("é", [0, 1], metadata={"ü": "ö"})
    file = tmp_path / "more.txt"
    file.write_text("größe 1 1\n", encoding="utf-8")
    space.multiset((key, vector) for key, vector, _ in EmbeddingFile(file).records())
    assert "äpfel" in space
    assert set(space.keys()) == {"äpfel", "é", "größe"}
    assert space.metadata("äpfel") == {"lang": "dé"}
    near = space.nearest_neighbors(1, vector=[0, 1], metadata=True)
    assert (near[0].key, near[0].metadata) == ("é", {"ü": "ö"})
    with psycopg.connect(hub.conninfo, client_encoding="utf8") as db:
        found = db.execute("SELECT key, metadata->>'lang' FROM spaces.s WHERE key ~ 'pfel'")
        assert found.fetchall() == [("äpfel", "dé")]


def test_what_an_encoding_lacks_is_refused(in_encoding):
    space = in_encoding("LATIN1").create_space("s", 2)
    space.set("a", [1, 1])
    message = "space 's', key {}: the database's encoding LATIN1 has no '日'"
    for key, metadata, error in (
        ("日本", None, ehub.InvalidKeyError),
        ("x", {"t": "日本"}, ehub.InvalidMetadataError),
    ):
        for write in (
            lambda key=key, metadata=metadata: space.set(key, [1, 2], metadata=metadata),
            lambda key=key, metadata=metadata: space.multiset(
                [("b", [1, 2]), (key, [1, 2], metadata or {})]
            ),
        ):
            with pytest.raises(error, match=message.format(repr(key))):
                write()
    assert list(space.keys()) == ["a"]
