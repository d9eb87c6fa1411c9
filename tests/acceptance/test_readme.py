"""The README: every example and every command in it is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

import ehub

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture
def roles(db):
    """The roles that the examples grant rights to."""
    names = ("analyst", "tenant_42", "tester")
    for name in names:
        db.execute(f"CREATE ROLE {name}")
    yield
    for name in names:
        db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_access(roles, url, db, tmp_path, monkeypatch):
    monkeypatch.setenv("EHUB_DATABASE_URL", url)
    monkeypatch.setenv("EHUB_DATA_DIR", str(tmp_path))
    exec(compile(blocks("python")[4], "README.md", "exec"), {})
    answers = [db.execute(one).fetchall() for one in blocks("sql")[2].split(";\n") if one.strip()]
    assert answers[3] == [
        ("articles", "analyst", "read", None),
        ("articles", "tenant_42", "write", {"tenant": 42}),
    ]
    assert answers[4][-1] == ("articles", "admin", "postgres")
    assert answers[5][0][1:] == (
        "grant",
        {"role": "tenant_42", "privilege": "write", "rows": {"tenant": 42}},
    )
    assert answers[7] == []


def test_python(url, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EHUB_DATABASE_URL", url)
    monkeypatch.setenv("EHUB_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first, day, among, orm, _access = blocks("python")
    exec(compile(first, "README.md", "exec"), {})
    assert "apple [1. 0. 0.]" in capsys.readouterr().out
    names = {}
    exec(compile(day, "README.md", "exec"), names)
    assert "Written(written=1, deleted=0, conflicts=[])" in capsys.readouterr().out
    assert len(names["diff"].removed) == 50
    assert ehub.Snapshot.load("words.npz").get("word7").tolist() == [1] * 8
    exec(compile(among, "README.md", "exec"), {})
    assert "True" in capsys.readouterr().out
    exec(compile(orm, "README.md", "exec"), {"__name__": "application"})
    assert capsys.readouterr().out == "en 1.0\n"


def test_sql_among_which_rows(hub, db):
    answers = [
        db.execute(one).fetchall() if one.strip().startswith("SELECT") else db.execute(one)
        for one in blocks("sql")[0].split(";\n")
        if one.strip()
    ]
    assert answers[2] == [("a",), ("c",)]
    assert answers[3][-1][:2] == (True, "exact")
    assert answers[5] == [("b",)]
    assert answers[12] == [("[1,0.33333334]",)]
    assert [row[0] for row in answers[13]] == ["de", "en"]
    assert [(key, note) for key, _, note in answers[16]] == [
        ("ann", {"rows": 2, "weight": 35}),
        ("bob", {"rows": 1, "weight": 7}),
    ]
    assert answers[19:22] == [[("a",)], [("acme", 1)], [(1,)]]
    assert hub.spaces() == []


def test_sql_of_your_own_tables(hub, db):
    answers = [
        db.execute(one).fetchall() if one.startswith("SELECT") else db.execute(one)
        for one in blocks("sql")[1].split(";\n")
        if one
    ]
    assert [key for key, _ in answers[4]] == [1, 2]
    assert answers[5] == [
        ("1", {"id": 1, "lang": "en", "price": 5}),
        ("4", {"id": 4, "lang": "en", "price": 30}),
    ]
    assert answers[7] == [("documents", "documents", "embedding", None)]
    assert hub.spaces() == []


def test_sql(hub, db):
    _among, _tables, _access, example = blocks("sql")
    answers = [
        db.execute(one).fetchall() if one.strip().startswith("SELECT") else db.execute(one)
        for one in example.split(";\n")
        if one.strip()
    ]
    assert answers[3] == [("[0,1,0]",)]
    assert [key for key, _, _ in answers[4]] == ["apple", "pear"]
    assert [key for key, _ in answers[5]] == ["pear", "plum"]
    assert [row[:2] for row in answers[6]] == [
        (1, "apple"),
        (1, "pear"),
        (2, "plum"),
        (2, "pear"),
    ]
    assert answers[12] == [("apple", "changed", 1.0)]
    assert [answer[0][:2] for answer in answers[14:16]] == [("v1", "v2"), ("v2", "v1")]
    assert len(answers[19]) == 2
    assert hub.spaces() == []


def test_commands(roles, url, db, tmp_path):
    db.execute(
        "CREATE TABLE documents (id int PRIMARY KEY, embedding vector(3));"
        "INSERT INTO documents SELECT i, ARRAY[i, 1, 1]::vector FROM generate_series(1, 50) AS i;"
        "CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops)"
    )
    words = {"king": 1, "queen": 2, "prince": 3}
    (tmp_path / "glove.6B.100d.txt").write_text(
        "".join(f"{word} {' '.join([str(n), *['1'] * 99])}\n" for word, n in words.items())
    )
    setup, install, commands, _service = blocks("sh")
    assert [line.split("#")[0].split() for line in setup.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    assert install.startswith("pip install 'ehub[embedded]'")
    environment = {
        **os.environ,
        "EHUB_DATABASE_URL": url,
        "EHUB_DATA_DIR": str(tmp_path / "data"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for command in commands.splitlines():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("command", re.findall(r"^\| `ehub ([\w-]+)", README, re.M))
def test_the_table_of_commands(command):
    ehub_program = str(Path(sys.executable).with_name("ehub"))
    help_text = subprocess.run(
        [ehub_program, command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Usage: ehub" in help_text


def test_no_command_is_left_out():
    help_text = subprocess.run(
        [str(Path(sys.executable).with_name("ehub")), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    listed = set(re.findall(r"^[│ ]\s?(\w[\w-]*)  ", help_text, re.M))
    assert listed == set(re.findall(r"^\| `ehub ([\w-]+)", README, re.M))


def test_the_layout_is_what_is_there():
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", README, re.S)
    named = set(re.findall(r"(\w+\.py)", layout)) | set(re.findall(r"^\s+(\w+)/", layout, re.M))
    there = {path.name for path in (ROOT / "ehub").iterdir()} - {
        "__init__.py",
        "__pycache__",
        "py.typed",
    }
    assert named == there


def test_the_example_in_the_package(url, tmp_path, monkeypatch):
    import doctest

    monkeypatch.setenv("EHUB_DATABASE_URL", url)
    monkeypatch.setenv("EHUB_DATA_DIR", str(tmp_path))
    assert doctest.testmod(ehub).failed == 0
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT name FROM ehub.space").fetchall() == [("quickstart",)]
