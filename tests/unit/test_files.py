"""What each form of file becomes, and what is refused by line, column and type."""

import csv
import datetime
import decimal
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ehub import InvalidFileError
from ehub.files import EmbeddingFile

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def read(tmp_path):
    def read(name, data, **options):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return [
            (key, np.asarray(vector, np.float32).tolist(), metadata)
            for key, vector, metadata in EmbeddingFile(path, **options).records()
        ]

    return read


ROWS = [("a", [1, 2, 3], None), ("b", [4, 5, 6], None)]


@pytest.mark.parametrize(
    "data",
    [
        b"a 1 2 3\nb 4 5 6\n",
        BOM + b"a 1 2 3\nb 4 5 6",
        b"2 3\na 1 2 3\nb 4 5 6",
        BOM + b"2 3\na 1 2 3\nb 4 5 6",
        b"a\t1\t2\t3\nb\t4\t5\t6\n",
        b"2\t3\na\t1\t2\t3\nb\t4\t5\t6\n",
        b"a\t1 2 3\nb\t4 5 6",
        b"2 3\r\na 1 2 3 \r\nb  4 5 6 \r\n\r\n",
    ],
)
def test_text(read, data):
    assert read("a.txt", data) == ROWS
    assert read("a.vec.gz", gzip.compress(data)) == ROWS


def test_keys_of_text_may_have_spaces(read):
    data = "2 2\nnew york 1 2\n. . . 3 4\n"
    assert [key for key, _, _ in read("a.txt", data)] == ["new york", ". . ."]
    assert [key for key, _, _ in read("b.txt", "new york\t1\t2\nx y\t3\t4\n")] == [
        "new york",
        "x y",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"400000 3\na 1 2 3\n",
            "promises 400,000 rows, and there are 1: it may have been cut off",
        ),
        (b"1 3\na 1 2 3\nb 4 5 6\n", "promises 1 rows, and there are 2"),
        (b"a 1 2 3\n 4 5 6\n", "line 2: there is no key before the numbers"),
        (b"\t1\t2\n", "line 1: there is no key"),
        (b"a 1 2\n\xff\xfe 4 5\n", "line 2: the key is not UTF-8"),
        (b"a 1 2\nb 4\n", "line 2"),
        (b"a 1 2\nb 4 x\n", "line 2: could not convert"),
        (b"2 3\na 1 2\nb 1 2 3\n", "line 2: a key and 3 numbers are needed"),
        (b"a\n", "line 1: a key and some numbers are needed"),
    ],
)
def test_text_that_is_refused(read, data, message):
    with pytest.raises(InvalidFileError, match=message):
        read("a.txt", data)


def test_a_part_is_taken_on_request(read):
    assert read("a.txt", b"9 3\na 1 2 3\nb 4 5 6", allow_partial=True) == ROWS


def test_the_keys_of_an_array(read, tmp_path):
    np.save(tmp_path / "m.npy", np.array([[1, 2], [3, 4]], np.float32))
    for data, keys in (
        (BOM + "ä\nb\n".encode(), ["ä", "b"]),
        ("a\u2028x\nb\x85y".encode(), ["a\u2028x", "b\x85y"]),
    ):
        (tmp_path / "keys.txt").write_bytes(data)
        file = EmbeddingFile(tmp_path / "m.npy", keys_path=tmp_path / "keys.txt")
        assert [key for key, _, _ in file.records()] == keys


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (np.array([b"a", "é".encode()]), ["a", "é"]),
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array([7, -1]), ["7", "-1"]),
        (np.array([2**63, 1], np.uint64), [str(2**63), "1"]),
        (np.array([1.0, 2.0]), "keys are text or integers, not float64"),
        (np.array([True, False]), "keys are text or integers, not bool"),
        (np.array([b"a", b"\xff"]), "row 2, 'keys': 'utf-8' codec"),
    ],
)
def test_npz(tmp_path, keys, found):
    np.savez(tmp_path / "a.npz", keys=keys, vectors=np.ones((2, 3)))
    file = EmbeddingFile(tmp_path / "a.npz")
    if isinstance(found, str):
        with pytest.raises(InvalidFileError, match=found):
            list(file.records())
    else:
        assert [key for key, _, _ in file.records()] == found


def test_csv(read):
    long = "[" + ", ".join(["0.12345678901234"] * 16_000) + "]"
    data = BOM.decode() + f'key,vector,note\na,"{long}",x\nb,0.1 0.2,\n'
    (first, second) = read("a.csv", data)
    assert len(first[1]) == 16_000
    assert second[1:] == ([np.float32(0.1), np.float32(0.2)], {"note": ""})
    for data, message in (
        ("key,vector,\na,1 2,x\n", "line 1: column 3 has no name"),
        (",key,vector\n0,a,1 2\n", "line 1: column 1 has no name"),
        (
            "key,vector\na,[0.1 0.2]\n",
            r"line 2, 'vector': a vector as text is \[0.1, 0.2\] or 0.1 0.2",
        ),
        ("key,vector\na,1 2,3\n", "line 2: 2 fields are needed"),
    ):
        with pytest.raises(InvalidFileError, match=message):
            read("a.csv", data)
    assert csv.field_size_limit() > 131_072


@pytest.mark.parametrize("key", [[1], True, 1.5, {"a": 1}])
def test_keys_of_json_are_text_or_integers(read, key):
    line = json.dumps({"key": key, "vector": [1, 2]})
    with pytest.raises(InvalidFileError, match="line 1, 'key': a key is text or an integer, not "):
        read("a.jsonl", line)
    assert read("a.jsonl", '{"key": 7, "vector": [1, 2]}') == [("7", [1, 2], {})]
    assert read("a.jsonl", BOM + b'{"key": "a", "vector": [1, 2]}') == [("a", [1, 2], {})]


def parquet(path, **columns):
    columns = {"key": ["a"], "vector": [[1.0, 2.0]], **columns}
    pyarrow.parquet.write_table(pa.table(columns), path)
    return list(EmbeddingFile(path).records())[0][2]


NEW_YORK = datetime.timezone(datetime.timedelta(hours=-5))
NOON = datetime.datetime(2024, 3, 10, 15, 0, 0)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pa.array([NOON]), "2024-03-10T15:00:00"),
        (pa.array([NOON], pa.timestamp("s")), "2024-03-10T15:00:00"),
        (pa.array([NOON], pa.timestamp("ns")), "2024-03-10T15:00:00"),
        (pa.array([NOON.replace(tzinfo=NEW_YORK)]), "2024-03-10T20:00:00"),
        (pa.array([NOON], pa.timestamp("us", "Asia/Tokyo")), "2024-03-10T15:00:00"),
        (pa.array([NOON.replace(microsecond=5)]), "2024-03-10T15:00:00.000005"),
        (pa.array([NOON.date()]), "2024-03-10"),
        (pa.array([NOON.time()]), "15:00:00"),
        (pa.array([[("k", 1), ("l", 2)]], pa.map_(pa.string(), pa.int64())), {"k": 1, "l": 2}),
        (
            pa.array([[("t", NOON)]], pa.map_(pa.string(), pa.timestamp("us"))),
            {"t": "2024-03-10T15:00:00"},
        ),
        (
            pa.array([{"a": NOON, "b": [NOON.date()]}]),
            {"a": "2024-03-10T15:00:00", "b": ["2024-03-10"]},
        ),
        (pa.array([decimal.Decimal("1.50")]), 1.5),
        (pa.array([decimal.Decimal("12345678901234567890")]), 12345678901234567890),
        (pa.array([[1, 2]]), [1, 2]),
        (pa.array([[]], pa.list_(pa.int64())), []),
        (pa.array([None], pa.timestamp("ns")), None),
        (pa.array(["x"]).dictionary_encode(), "x"),
    ],
)
def test_parquet(tmp_path, column, value):
    assert parquet(tmp_path / "a.parquet", x=column) == {"x": value}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"ok"]), "row 1, 'x': bytes is nothing that metadata can hold"),
        (pa.array([datetime.timedelta(1)]), "row 1, 'x': timedelta is nothing"),
        (pa.array([1], pa.timestamp("ns")), "column 'x': there are times below microseconds"),
        (pa.array([decimal.Decimal("0.12345678901234567890")]), "has more digits than a float"),
    ],
)
def test_parquet_that_is_refused(tmp_path, column, message):
    with pytest.raises(InvalidFileError, match=message):
        parquet(tmp_path / "a.parquet", x=column)


def test_keys_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    for keys, found in ((pa.array([b"a"]), "a"), (pa.array([5]), "5")):
        pyarrow.parquet.write_table(pa.table({"key": keys, "vector": [[1.0]]}), path)
        assert next(EmbeddingFile(path).records())[0] == found
    pyarrow.parquet.write_table(pa.table({"key": [NOON], "vector": [[1.0]]}), path)
    with pytest.raises(InvalidFileError, match="a key is text or an integer, not datetime"):
        next(EmbeddingFile(path).records())
