"""Files of embeddings: GloVe and word2vec text, npy and npz, CSV, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from ehub.errors import DependencyError, EhubError, InvalidFileError

Record: TypeAlias = tuple[str, ArrayLike, dict[str, Any] | None]
"""A key, a vector, and metadata or None where the format has no place for it."""

FORMATS = ("text", "npy", "npz", "csv", "jsonl", "parquet")

_SUFFIXES = {
    ".txt": "text",
    ".vec": "text",
    ".glove": "text",
    ".npy": "npy",
    ".npz": "npz",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
# A field of a CSV file has the text of a vector: of 16,000 dims at most.
_FIELD_BYTES = 1 << 24
# What a column of keys or of vectors is called where nobody says so.
_KEY_NAMES = ("key", "id", "word")
_VECTOR_NAMES = ("vector", "embedding", "vectors", "embeddings")


class EmbeddingFile:
    """A file of embeddings, read from its beginning to its end.

    Args:
        path: the file; ``.gz`` is unpacked on the way.
        format: one of ``text`` (GloVe or word2vec: a key and its numbers on each line), ``npy``
            (a matrix; the keys are the lines of ``keys_path``, else row numbers), ``npz`` (arrays
            of keys and of vectors), ``csv``, ``jsonl`` and ``parquet`` (a column of keys, one of
            vectors, the rest metadata). By default the suffix tells.
        key: the name of the column or array of keys; ``vector``: that of the vectors.
        keys_path: a text file with a key on each line, for ``npy``.
        allow_partial: whether text may have other rows than its first line promises.

    Raises:
        InvalidFileError: there is no such file, or its format cannot be told.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: str | None = None,  # noqa: A002 - the word for it
        key: str | None = None,
        vector: str | None = None,
        keys_path: Path | None = None,
        allow_partial: bool = False,
    ) -> None:
        self.path = path
        self._partial = allow_partial
        if not path.is_file():
            raise InvalidFileError(f"there is no file {path}")
        suffixes = [suffix.lower() for suffix in path.suffixes]
        self._packed = suffixes[-1:] == [".gz"]
        suffix = (suffixes[-2:-1] if self._packed else suffixes[-1:]) or [""]
        chosen = format or _SUFFIXES.get(suffix[0])
        if chosen not in FORMATS:
            raise InvalidFileError(
                f"{path}: the format is one of {', '.join(FORMATS)}; the name does not tell which"
            )
        self.format = chosen
        self._key, self._vector, self._keys_path = key, vector, keys_path
        self._size = path.stat().st_size
        self._position: Callable[[], int] = lambda: 0

    def progress(self) -> float:
        """Return the share of the file that has been read, from 0 to 1."""
        return min(1.0, self._position() / self._size) if self._size else 1.0

    def records(self) -> Iterator[Record]:
        """Read the file.

        Raises:
            InvalidFileError: it cannot be read; the line, row or column is named.
            DependencyError: Parquet needs the extra ``ehub[parquet]``.
        """
        readers: dict[str, Callable[[IO[bytes]], Iterator[Record]]] = {
            "text": self._text,
            "npy": self._npy,
            "npz": self._npz,
            "csv": self._csv,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
        }
        try:
            with contextlib.ExitStack() as stack:
                raw = stack.enter_context(self.path.open("rb"))
                self._position = raw.tell
                stack.callback(setattr, self, "_position", lambda: self._size)
                source = stack.enter_context(gzip.open(raw, "rb")) if self._packed else raw
                yield from readers[self.format](cast("IO[bytes]", source))
        except EhubError:
            raise
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise InvalidFileError(f"{self.path} cannot be read: {error}") from error

    def _text(self, source: IO[bytes]) -> Iterator[Record]:
        dims = rows = 0
        promised: int | None = None
        for number, raw in enumerate(source, 1):
            line = raw.rstrip()
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                words = line.split()
                headed = len(words) == 2 and not line[:1].isspace()
                if headed and all(word.isdigit() for word in words):
                    # word2vec's text starts with the numbers of rows and dims.
                    promised, dims = map(int, words)
                    continue
            if not line:
                continue
            place = f"{self.path}, line {number}"
            if not dims:
                # Keys may have spaces in them, but where a tab ends them.
                key, tab, rest = line.partition(b"\t")
                dims = len(rest.split()) if tab else len(line.split(b" ")) - 1
            key, *values = line.rsplit(None, dims)
            if line[:1].isspace():
                raise InvalidFileError(f"{place}: there is no key before the numbers")
            try:
                vector = np.array(values, np.float32)
            except ValueError as error:
                raise InvalidFileError(f"{place}: {error}") from None
            if not dims or len(vector) != dims:
                raise InvalidFileError(
                    f"{place}: a key and {dims or 'some'} numbers are needed, there are"
                    f" {len(vector)}"
                )
            try:
                name = key.decode()
            except UnicodeDecodeError as error:
                raise InvalidFileError(f"{place}: the key is not UTF-8: {error}") from None
            rows += 1
            yield name, vector, None
        if promised is not None and rows != promised and not self._partial:
            raise InvalidFileError(
                f"{self.path}: its first line promises {promised:,} rows, and there are {rows:,}:"
                " it may have been cut off; allow_partial (--allow-partial) takes what there is"
            )

    def _npy(self, source: IO[bytes]) -> Iterator[Record]:
        matrix = self._array(lambda: np.load(source, allow_pickle=False), "the array")
        keys: Iterable[str] = map(str, range(len(matrix)))
        if self._keys_path is not None:
            # Lines end with a newline here and with nothing else, which keys may hold.
            text = self._keys_path.read_text(encoding="utf-8-sig")
            lines = text.removesuffix("\n").split("\n") if text else []
            if len(lines) != len(matrix):
                raise InvalidFileError(
                    f"{self._keys_path} has {len(lines)} keys, {self.path} {len(matrix)} vectors"
                )
            keys = lines
        for key, vector in zip(keys, matrix, strict=True):
            yield key, vector, None

    def _npz(self, source: IO[bytes]) -> Iterator[Record]:
        # It is a zip archive, which is read from its end.
        with np.load(io.BytesIO(source.read()), allow_pickle=False) as arrays:
            key = self._choose(arrays.files, self._key, (*_KEY_NAMES, "keys", "words"), "keys")
            vector = self._choose(arrays.files, self._vector, _VECTOR_NAMES, "vectors")
            keys = self._array(lambda: arrays[key], f"array {key!r}", ndim=1)
            matrix = self._array(lambda: arrays[vector], f"array {vector!r}")
        if len(keys) != len(matrix):
            raise InvalidFileError(f"{self.path}: {len(keys)} keys, {len(matrix)} vectors")
        if keys.dtype.kind not in "SUiu":
            raise InvalidFileError(
                f"{self.path}: array {key!r}: keys are text or integers, not {keys.dtype}"
            )
        for number, (name, row) in enumerate(zip(keys.tolist(), matrix, strict=True), 1):
            yield self._key_of(name, key, f"row {number}"), row, None

    def _csv(self, source: IO[bytes]) -> Iterator[Record]:
        csv.field_size_limit(_FIELD_BYTES)
        with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
            lines = csv.DictReader(text)
            columns = list(lines.fieldnames or ())
            if "" in columns:
                raise InvalidFileError(
                    f"{self.path}, line 1: column {columns.index('') + 1} has no name"
                )
            key = self._choose(columns, self._key, _KEY_NAMES, "keys")
            vector = self._choose(columns, self._vector, _VECTOR_NAMES, "vectors")
            try:
                for row in lines:
                    place = f"line {lines.line_num}"
                    if None in row or None in row.values():
                        raise InvalidFileError(
                            f"{self.path}, {place}: {len(columns)} fields are needed"
                        )
                    yield self._record(row, key, vector, place)
            except csv.Error as error:
                raise InvalidFileError(f"{self.path}, line {lines.line_num}: {error}") from error

    def _jsonl(self, source: IO[bytes]) -> Iterator[Record]:
        key, vector = self._key, self._vector
        for number, line in enumerate(source, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidFileError(f"{self.path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise InvalidFileError(f"{self.path}, line {number}: an object is needed")
            key = self._choose(list(row), key, _KEY_NAMES, "keys", f"line {number}")
            vector = self._choose(list(row), vector, _VECTOR_NAMES, "vectors", f"line {number}")
            yield self._record(row, key, vector, f"line {number}")

    def _parquet(self, source: IO[bytes]) -> Iterator[Record]:
        try:
            import pyarrow.lib
            import pyarrow.parquet
        except ImportError:
            raise DependencyError(
                "reading Parquet needs pyarrow: pip install 'ehub[parquet]'"
            ) from None
        try:
            file = pyarrow.parquet.ParquetFile(source)
            columns = list(file.schema_arrow.names)
            key = self._choose(columns, self._key, _KEY_NAMES, "keys")
            vector = self._choose(columns, self._vector, _VECTOR_NAMES, "vectors")
            number = 0
            for batch in file.iter_batches(4096):
                for row in self._microseconds(batch, number).to_pylist():
                    number += 1
                    yield self._record(row, key, vector, f"row {number}")
        except pyarrow.lib.ArrowException as error:
            raise InvalidFileError(f"{self.path} cannot be read: {error}") from error

    def _microseconds(self, batch: Any, rows: int) -> Any:
        """Give times in nanoseconds in Python's microseconds, where nothing is lost by it."""
        import pyarrow

        for at, field in enumerate(batch.schema):
            kind = field.type
            if not pyarrow.types.is_timestamp(kind) or kind.unit != "ns":
                continue
            try:
                column = batch.column(at).cast(pyarrow.timestamp("us", kind.tz))
            except pyarrow.ArrowInvalid:
                raise InvalidFileError(
                    f"{self.path}, rows {rows + 1} to {rows + len(batch)}, column {field.name!r}:"
                    " there are times below microseconds, which Postgres does not have either"
                ) from None
            batch = batch.set_column(at, field.name, column)
        return batch

    def _record(self, row: dict[str, Any], key: str, vector: str, place: str) -> Record:
        name, values = row.pop(key), row.pop(vector)
        if isinstance(values, str):
            # A vector in a text field: pgvector's and JSON's form, or numbers between spaces.
            text = values.strip()
            try:
                listed = text.startswith("[")
                values = json.loads(text) if listed else [float(part) for part in text.split()]
            except (ValueError, RecursionError):
                raise InvalidFileError(
                    f"{self.path}, {place}, {vector!r}: a vector as text is [0.1, 0.2] or 0.1 0.2,"
                    f" not {text[:40]!r}"
                ) from None
        if name is None or values is None:
            raise InvalidFileError(f"{self.path}, {place}: no {key if name is None else vector!r}")
        metadata = {
            field: self._plain(value, f"{place}, {field!r}") for field, value in row.items()
        }
        return self._key_of(name, key, place), values, metadata

    def _key_of(self, value: object, column: str, place: str) -> str:
        """Return a key: text as it is, integers in digits."""
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise InvalidFileError(f"{self.path}, {place}, {column!r}: {error}") from None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InvalidFileError(
                f"{self.path}, {place}, {column!r}: a key is text or an integer, not"
                f" {type(value).__name__}"
            )
        return str(value)

    def _plain(self, value: Any, place: str) -> Any:
        """Return a value of a file as JSON has it: the same as of a column of an attached table."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return {str(name): self._plain(part, place) for name, part in value.items()}
        if isinstance(value, list):
            if value and all(isinstance(part, tuple) and len(part) == 2 for part in value):
                # A map, as pyarrow has it.
                return {str(name): self._plain(part, place) for name, part in value}
            return [self._plain(part, place) for part in value]
        if isinstance(value, datetime.datetime):
            if value.tzinfo is not None:
                value = value.astimezone(datetime.UTC).replace(tzinfo=None)
            return value.isoformat()
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            number = int(value) if value == value.to_integral_value() else float(value)
            if decimal.Decimal(repr(number)) == value:
                return number
            raise InvalidFileError(f"{self.path}, {place}: {value} has more digits than a float")
        if isinstance(value, uuid.UUID):
            return str(value)
        raise InvalidFileError(
            f"{self.path}, {place}: {type(value).__name__} is nothing that metadata can hold"
        )

    def _choose(
        self, names: list[str], asked: str | None, usual: Iterable[str], what: str, place: str = ""
    ) -> str:
        candidates = (asked,) if asked is not None else usual
        for name in candidates:
            if name in names:
                return name
        where = f"{self.path}, {place}" if place else f"{self.path}"
        raise InvalidFileError(
            f"{where}: which of {', '.join(map(repr, names)) or 'no columns'} has the {what}?"
            f" Looked for {' or '.join(map(repr, candidates))}"
        )

    def _array(self, load: Callable[[], Any], what: str, ndim: int = 2) -> Any:
        try:
            array = load()
        except ValueError as error:
            raise InvalidFileError(f"{self.path}: {what}: {error}") from None
        if not isinstance(array, np.ndarray) or array.ndim != ndim:
            raise InvalidFileError(f"{self.path}: {what} needs {ndim} dimensions")
        return array
