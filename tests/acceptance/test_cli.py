"""The command line, as its users run it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psycopg
import pytest

EHUB = str(Path(sys.executable).with_name("ehub"))
WORDS = {"king": [1, 0, 0], "queen": [1, 0.1, 0], "été": [0, 1, 0], "new york": [0, 0, 1]}


@pytest.fixture
def run(url, data_dir):
    def run(*arguments, code=0, stdin="", **variables):
        done = subprocess.run(
            [EHUB, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={
                **os.environ,
                "EHUB_DATABASE_URL": url,
                "EHUB_DATA_DIR": str(data_dir),
                "COLUMNS": "200",
                **variables,
            },
        )
        assert done.returncode == code, done.stderr + done.stdout
        return done

    return run


def rows(url, space="s"):
    with psycopg.connect(url) as connection:
        return {
            key: ([float(n) for n in text.strip("[]").split(",")], metadata)
            for key, text, metadata in connection.execute(
                f"SELECT key, embedding::text, metadata FROM spaces.{space}"
            )
        }


def glove(path, words=WORDS, header=False):
    lines = [f"{word} {' '.join(map(str, vector))}" for word, vector in words.items()]
    if header:
        lines.insert(0, f"{len(words)} 3")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_files(folder):
    keys, matrix = list(WORDS), np.array(list(WORDS.values()), np.float64)
    yield glove(folder / "glove.txt"), None, []
    yield glove(folder / "word2vec.vec", header=True), None, []
    packed = folder / "packed.txt.gz"
    packed.write_bytes(gzip.compress((folder / "glove.txt").read_bytes()))
    yield packed, None, []
    np.savez(folder / "a.npz", keys=np.array(keys), vectors=matrix)
    yield folder / "a.npz", None, []
    np.save(folder / "a.npy", matrix)
    (folder / "names.txt").write_text("\n".join(keys), encoding="utf-8")
    yield folder / "a.npy", None, ["--keys", folder / "names.txt"]
    notes = [{"n": i, "tags": ["x"]} for i in range(4)]
    records = [
        {"word": key, "v": vector, **note}
        for key, vector, note in zip(keys, matrix.tolist(), notes, strict=True)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    yield folder / "a.jsonl", notes, ["--vector", "v"]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    yield folder / "a.parquet", notes, ["--key", "word", "--vector", "v"]
    lines = [f'{key},"{vector}",{i}' for i, (key, vector) in enumerate(WORDS.items())]
    (folder / "a.csv").write_text("key,embedding,n\n" + "\n".join(lines), encoding="utf-8")
    yield folder / "a.csv", [{"n": str(i)} for i in range(4)], []


def test_every_format_loads_the_same(run, url, tmp_path):
    for number, (path, notes, options) in enumerate(write_files(tmp_path)):
        done = run("load", path, f"s{number}", *options)
        assert done.stdout.startswith("4 rows of 3 dims in "), path
        found = rows(url, f"s{number}")
        assert {key: vector for key, (vector, _) in found.items()} == WORDS, path
        if notes:
            assert [found[key][1] for key in WORDS] == notes, path
    assert len(json.loads(run("spaces", "--json").stdout)) == number + 1


def test_load_into_a_space_that_is_there_updates_it(run, url, tmp_path):
    run("load", glove(tmp_path / "a.txt"), "s", "--metric", "cosine")
    run("load", glove(tmp_path / "b.txt", {"king": [9, 9, 9], "new": [1, 1, 1]}), "s")
    assert rows(url)["king"][0] == [9, 9, 9]
    assert len(rows(url)) == 5
    assert json.loads(run("spaces", "--json").stdout) == [
        {"space": "s", "dims": 3, "metric": "cosine", "rows": 5, "attached_to": None}
    ]


def test_query_takes_keys_vectors_and_lines(run, tmp_path):
    run("load", glove(tmp_path / "a.txt"), "s")
    assert run("query", "s", "king", "-k", 2).stdout.split() == [
        "key",
        "distance",
        "queen",
        "0.1",
        "new",
        "york",
        "1.41421",
    ]
    answer = json.loads(run("query", "s", "[1, 0, 0]", "-k", 1, "--json", "--metadata").stdout)
    assert answer == {
        "query": "[1, 0, 0]",
        "neighbors": [{"key": "king", "distance": 0.0, "metadata": {}}],
    }
    lines = run("query", "s", "-", "-k", 1, "--json", stdin="queen\n\n[0,0,2]\nété\n").stdout
    assert [json.loads(line)["neighbors"][0]["key"] for line in lines.splitlines()] == [
        "king",
        "new york",
        "queen",
    ]


def things(path, n=60):
    """A file of rows whose other fields are their metadata."""
    lines = [
        {"key": f"w{i:03}", "vector": [i, i % 7, 1], "lang": ["en", "de"][i % 2], "tenant": i % 3}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_searches_among_rows_that_match(run, tmp_path):
    run("load", things(tmp_path / "a.jsonl"), "s", "--key", "key", "--vector", "vector")
    answer = json.loads(
        run("query", "s", "w000", "-k", 3, "--filter", '{"lang": "de"}', "--json").stdout
    )
    assert [one["key"] for one in answer["neighbors"]] == ["w001", "w003", "w007"]
    answer = json.loads(
        run("like", "s", "w010", "w012", "--unlike", "w050", "-k", 2, "--json").stdout
    )
    assert not {"w010", "w012", "w050"} & {one["key"] for one in answer["neighbors"]}
    answer = json.loads(run("within", "s", "w010", "1.5", "--json").stdout)
    assert {one["key"] for one in answer["neighbors"]} == {"w009", "w011"}
    assert run("distance", "s", "w000", "w007").stdout == "7\n"
    assert "exact" in run("explain", "s", "w000", "--filter", '{"lang": "de"}').stdout
    ways = json.loads(run("explain", "s", "[1,2,3]", "--json").stdout)
    assert [way["way"] for way in ways if way["chosen"]] == ["exact"]
    assert "english" in run("create-index", "s", "english", "--where", '{"lang": "en"}').stdout
    assert '{"lang": "en"}' in run("indexes", "s").stdout
    (index,) = json.loads(run("indexes", "s", "--json").stdout)
    assert (index["name"], index["where"]) == ("english", {"lang": "en"})
    answer = json.loads(run("query", "s", "w001", "-k", 1, "--index", "english", "--json").stdout)
    assert answer["neighbors"][0]["key"] in ("w000", "w002")
    run("drop-index", "s", "english")
    assert json.loads(run("indexes", "s", "--json").stdout) == []


def test_partitions(run, tmp_path):
    columns = ("--key", "key", "--vector", "vector", "--partition-by", "tenant")
    run("load", things(tmp_path / "a.jsonl"), "s", *columns)
    assert json.loads(run("partitions", "s", "--json").stdout) == {"0": 20, "1": 20, "2": 20}
    answer = json.loads(run("query", "s", "w000", "-k", 2, "--partition", "1", "--json").stdout)
    assert [one["key"] for one in answer["neighbors"]] == ["w001", "w004"]
    assert run("drop-partition", "s", "1").stdout == "20 rows of s are deleted\n"
    assert "w" not in run("query", "s", "[1,1,1]", "--partition", "1").stdout
    assert "no partition '1'" in run("drop-partition", "s", "1", code=1).stderr
    run("load", things(tmp_path / "a.jsonl"), "t", "--key", "key", "--vector", "vector")
    assert (
        "not partitioned by"
        in run("load", things(tmp_path / "a.jsonl"), "t", *columns, code=1).stderr
    )


def test_the_graph_of_all_neighbours_goes_on_where_it_was(run, tmp_path):
    run("load", things(tmp_path / "a.jsonl"), "s", "--key", "key", "--vector", "vector")
    file, note = tmp_path / "graph.jsonl", tmp_path / "graph.jsonl.part"
    assert "60 rows with their 3 nearest" in run("graph", "s", file, "-k", 3).stdout
    whole = file.read_text()
    assert not note.exists()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["key"] for line in lines] == [f"w{i:03}" for i in range(60)]
    assert all(len(line["neighbors"]) == 3 for line in lines)
    # Cut off in the middle of a line, as by a kill.
    file.write_text(whole[: len(whole) // 2])
    note.write_text('{"graph": "s@v1", "k": 3}')
    assert "begun with others" in run("graph", "s", file, "-k", 4, code=1).stderr
    assert "60 rows" in run("graph", "s", file, "-k", 3).stdout
    assert file.read_text() == whole
    file.write_text("something else\n")
    assert "is there already" in run("graph", "s", file, code=1).stderr
    assert file.read_text() == "something else\n"
    run("graph", "s", file, "-k", 3, "--restart")
    assert file.read_text() == whole
    run("graph", "nope", tmp_path / "other.jsonl", code=1)
    assert not (tmp_path / "other.jsonl").exists()


def test_index_and_status_tell_how_it_is(run, tmp_path):
    words = {f"w{i}": v for i, v in enumerate(np.random.default_rng(0).random((500, 3)).tolist())}
    run("load", glove(tmp_path / "a.txt", words), "s")
    (row,) = json.loads(run("status", "--json").stdout)
    assert (row["rows"], row["index_state"]) == (500, None)
    assert run("index", "s").stdout.startswith("the index of s is ready after ")
    (row,) = json.loads(run("status", "--json").stdout)
    assert (row["index_state"], row["indexed_rows"], row["lag"]) == ("ready", 500, 0)
    assert row["recall"] >= 0.95
    text = run("status").stdout
    for part in ("s", "500", "l2", "ready, 500 rows", "0 keys", "(target 0.95)"):
        assert part in text


def test_migrate_makes_the_schema_and_says_so(run, server, admin):
    admin.execute("CREATE DATABASE ehub_cli")
    try:
        from psycopg.conninfo import make_conninfo

        fresh = make_conninfo(server, dbname="ehub_cli")
        assert "ehub migrate" in run("spaces", "-d", fresh, code=1).stderr
        assert "of this release now" in run("migrate", fresh).stdout
        assert "up to date" in run("migrate", fresh).stdout
        assert run("spaces", "-d", fresh).stdout.startswith("no spaces yet")
    finally:
        admin.execute("DROP DATABASE ehub_cli WITH (FORCE)")


WRONG = [
    (["query", "nope", "king"], "there is no space 'nope'"),
    (["query", "s", "nope"], "space 's' has no key 'nope'"),
    (["query", "s", "[1,2]"], "3 dims is needed"),
    (["query", "s", "[1,2,NaN]"], "NaN at position 2"),
    (["query", "s", "[0,0,oops"], "has no key"),
    (["query", "s", "king", "-k", "0"], "k is a number from 1"),
    (["query", "s", "king", "--filter", "{"], "filter: not JSON"),
    (["query", "s", "king", "--filter", '{"a": {"~": 1}}'], 'there is no operator "~"'),
    (["query", "s", "king", "--partition", "a"], "no partitions"),
    (["query", "s", "king", "--index", "nope"], "no index 'nope'"),
    (["like", "s", "nope"], "no key 'nope'"),
    (["within", "s", "king", "nan"], "a distance is a number"),
    (["distance", "s", "king", "nope"], "no key 'nope'"),
    (["explain", "s", "nope"], "no key 'nope'"),
    (["graph", "s", "nowhere/graph.jsonl"], "cannot be written"),
    (["create-index", "s", "i", "--where", "[1]"], "an object is needed|a mapping"),
    (["create-index", "s", "i", "--where", "{}"], "over the rows that match"),
    (["drop-index", "s", "nope"], "no index 'nope'"),
    (["partitions", "s"], "no partitions"),
    (["drop-partition", "s", "a"], "no partitions"),
    (["load", "nope.txt", "s"], "there is no file nope.txt"),
    (["load", "a.xyz", "s"], "the format is one of text"),
    (["load", "a.txt", "s", "--format", "yaml"], "the format is one of text"),
    (["load", "a.txt", "bad'name"], "bad''name"),
    (["load", "a.txt", "other", "--metric", "l1"], "metric is l2, cosine or ip, not 'l1'"),
    (["load", "a.txt", "s", "--metric", "cosine"], "has metric l2"),
    (["load", "empty.txt", "new"], "holds no embeddings"),
    (["load", "ragged.txt", "new"], "line 3: a key and 3 numbers|line 3: could not convert"),
    (["load", "text.txt", "new"], "line 2: could not convert"),
    (["load", "nan.txt", "new"], "space 'new', key 'b': NaN at position 1"),
    (["load", "two.txt", "s"], "key 'a': a vector of 3 dims is needed"),
    (["load", "bad.jsonl", "new"], "line 2: "),
    (["load", "nokey.jsonl", "new"], "which of 'x', 'vector' has the keys"),
    (["load", "bad.csv", "new"], "which of 'a', 'b' has the keys"),
    (["load", "short.csv", "new"], "line 3"),
    (["load", "bad.npy", "new"], "bad.npy"),
    (["load", "bad.npz", "new"], "bad.npz"),
    (["load", "bad.parquet", "new"], "bad.parquet"),
    (["load", "bad.txt.gz", "new"], "bad.txt.gz cannot be read"),
    (["load", "cut.txt.gz", "new"], "cut.txt.gz cannot be read"),
    (["spaces", "-d", "mysql://x:secret@y/z"], "starts with postgresql://"),
    (["spaces", "-d", "postgresql//x:secret@y/z"], "URL cannot be read"),
    (["spaces", "-d", "postgresql://u:secret@127.0.0.1:1/z"], "Postgres cannot be reached"),
]


def test_what_is_wrong_is_one_line_that_says_so_and_changes_nothing(
    run, url, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    glove(tmp_path / "a.txt")
    for name, text in {
        "a.xyz": "x",
        "empty.txt": "",
        "ragged.txt": "a 1 2 3\nb 1 2 3\nc 1 2\n",
        "text.txt": "a 1 2 3\nb 1 two 3\n",
        "nan.txt": "a 1 2 3\nb 1 nan 3\n",
        "two.txt": "a 1 2\n",
        "bad.jsonl": '{"key": "a", "vector": [1]}\n{oops\n',
        "nokey.jsonl": '{"x": 1, "vector": [1]}\n',
        "bad.csv": "a,b\n1,2\n",
        "short.csv": "key,vector\na,1 2\nb\n",
        "bad.npy": "x",
        "bad.npz": "x",
        "bad.parquet": "x",
        "bad.txt.gz": "x",
    }.items():
        Path(name).write_text(text)
    Path("cut.txt.gz").write_bytes(gzip.compress(b"a 1 2 3\n" * 1000)[:-20])
    run("load", "a.txt", "s")
    before = rows(url)
    for arguments, message in WRONG:
        done = run(*arguments, code=1)
        assert done.stdout == "", arguments
        assert done.stderr.startswith("error: "), arguments
        assert any(part in done.stderr for part in message.split("|")), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert "secret" not in done.stderr
    assert rows(url) == before
    assert [one["space"] for one in json.loads(run("spaces", "--json").stdout)] == ["s"]


def test_a_typo_in_an_option_is_told(run):
    for arguments in (["qeury"], ["query", "s"], ["query", "s", "k", "--kk", "3"], ["load", "x"]):
        assert "Traceback" not in run(*arguments, code=2).stderr


def test_a_load_that_is_interrupted_leaves_nothing(run, url, data_dir, tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("".join(f"w{i} {i} 1 2\n" for i in range(300_000)))
    process = subprocess.Popen(
        [EHUB, "load", str(path), "s", "-d", url],
        env={**os.environ, "EHUB_DATA_DIR": str(data_dir)},
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process, psycopg.connect(url, autocommit=True) as connection:
        deadline = time.monotonic() + 60
        while connection.execute("SELECT 1 FROM ehub.space").fetchone() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 130
    assert json.loads(run("spaces", "--json").stdout) == []


def test_psql_reaches_the_database(run, url):
    if url.partition("host=")[2].startswith("/"):
        done = run("psql", "-d", "embedded", "--", "-Atc", "SELECT 1 + 1")
        assert done.stdout.strip() == "2"


def test_the_demonstration_finds_what_is_meant(run):
    text = run("demo").stdout
    for part in ("docstrings", "zipfile", "SELECT key", "json.dumps", "Go on with"):
        assert part in text
    # Twice is no problem, and leaves the same.
    assert "zipfile" in run("demo").stdout
    (row,) = json.loads(run("status", "--json").stdout)
    assert row["space"] == "stdlib"
    assert row["rows"] > 2000


def test_a_table_is_attached_measured_and_detached(run, url, tmp_path):
    random = np.random.default_rng(0)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, lang text, embedding vector(4))")
        for number, vector in enumerate(random.normal(size=(300, 4))):
            db.execute(
                "INSERT INTO documents VALUES (%s, 'en', %s)", [number, str(vector.tolist())]
            )
        db.execute("CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops)")
    # The metric is that of pgvector's index.
    assert "documents: 4 dims, cosine" in run("attach", "documents", "embedding").stdout
    np.save(tmp_path / "queries.npy", random.normal(size=(20, 4)))
    for options in ([], ["--queries", tmp_path / "queries.npy", "-k", "3"]):
        ours, theirs = json.loads(
            run("attach", "documents", "embedding", "--compare", "--json", *options).stdout
        )
        assert ours["way"] == "ehub, in this process"
        assert "documents_embedding_idx, hnsw.ef_search 40" in theirs["way"]
        for one in (ours, theirs):
            assert one["recall"] > 0.9
            assert one["rate"] > 0
            assert one["memory"] > 0
    text = run("attach", "documents", "embedding", "--compare").stdout
    assert "nothing was dropped" in text
    (space,) = json.loads(run("spaces", "--json").stdout)
    assert space["attached_to"] == "documents"
    assert space["rows"] == 300
    answer = json.loads(run("query", "documents", "7", "-k", "2", "--json").stdout)
    assert len(answer["neighbors"]) == 2
    for arguments, message in (
        (["attach", "documents", "embedding"], "attached under metric cosine already"),
        (["attach", "documents", "embeding"], "has no column embeding (it has embedding)"),
        (["attach", "document", "embedding"], "no table 'document'"),
        (["attach", "documents", "embedding", "--name", "a b"], "a space's name"),
        (["detach", "document"], "no space 'document'"),
    ):
        assert message in run(*arguments, code=1).stderr
    assert "documents is detached" in run("detach", "documents").stdout
    assert json.loads(run("spaces", "--json").stdout) == []
