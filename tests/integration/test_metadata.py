"""Metadata that SQL can write and Python's json cannot read come back whole, and keep no others back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ehub
from ehub.files import EmbeddingFile

LONG = int("9" * 4000) * 10**1001
LONG_TEXT = "9" * 4000 + "0" * 1001
DEPTH = 3000


def depth(value):
    n = 0
    while isinstance(value, list):
        n, value = n + 1, (value[0] if value else None)
    return n


@pytest.fixture(params=["own", "attached"])
def space(request, hub, db):
    rows = (
        "SELECT * FROM (VALUES ('plain', '[1,0]'::vector, '{\"a\": 1}'::jsonb),"
        f" ('long', '[2,0]', '{{\"a\": {LONG_TEXT}}}'),"
        f" ('deep', '[3,0]', '{{\"a\": {'[' * DEPTH}{']' * DEPTH}}}')) AS v (key, e, m)"
    )
    if request.param == "own":
        hub.create_space("s", 2)
        db.execute(f"INSERT INTO spaces.s {rows}")
    else:
        db.execute("CREATE TABLE t (id text PRIMARY KEY, e vector(2), m jsonb)")
        db.execute(f"INSERT INTO t {rows}; SELECT ehub.attach('t', 'e', 's')")
    return hub.get_space("s")


def check(notes):
    notes = {key: note.get("m", note)["a"] for key, note in notes.items()}
    assert notes["plain"] == 1
    assert notes["long"] == LONG
    assert depth(notes["deep"]) == DEPTH


def test_all_doors(space, hub, db):
    for key in ("plain", "long", "deep"):
        assert space.metadata(key)
    for where in ({}, {"consistency": "strong"}):
        near = space.nearest_neighbors(3, vector=[0, 0], metadata=True, **where)
        check({one.key: one.metadata for one in near})
    space.wait_until_indexed(30)
    for asked in ({}, {"filter": {"not": {"b": 1}}}):
        near = space.nearest_neighbors(3, vector=[0, 0], metadata=True, **asked)
        check({one.key: one.metadata for one in near})
    check({one.key: one.metadata for one in space.within(9, vector=[0, 0], metadata=True)})
    check({key: note for key, _, note in space.items(metadata=True)})
    snapshot = space.download_snapshot()
    check({key: note for key, _, note in snapshot.items(metadata=True)})
    if space.attached_to is None:
        space.checkpoint("now")
        check({key: note for key, _, note in space.at("now").items(metadata=True)})


def test_the_command_line(space, url):
    for arguments in (["--json"], []):
        ran = subprocess.run(
            [
                *(Path(sys.executable).with_name("ehub"), "query", "s", "[0,0]", "--metadata"),
                *("-k", "3", "--database", url, *arguments),
            ],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        assert "[[[[" in ran.stdout
        if arguments:
            assert LONG_TEXT in ran.stdout


def test_what_python_cannot_write_is_refused_and_named(hub):
    space = hub.create_space("s", 2)
    nested = []
    for _ in range(DEPTH):
        nested = [nested]
    for note in ({"a": nested}, {"a": LONG}):
        with pytest.raises(ehub.InvalidMetadataError, match="'k'"):
            space.set("k", [1, 2], note)
        with pytest.raises(ehub.InvalidMetadataError, match="'k'"):
            space.multiset([("other", [1, 1], {}), ("k", [1, 2], note)])
    assert len(space) == 0


def test_a_file_that_cannot_be_read_names_its_line(hub, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"key": "a", "vector": [1, 2]})
    file.write_text(
        f'{good}\n{{"key": "b", "vector": [1, 2], "a": {"[" * 100000}{"]" * 100000}}}\n'
    )
    with pytest.raises(ehub.InvalidFileError, match="line 2"):
        list(EmbeddingFile(file).records())
