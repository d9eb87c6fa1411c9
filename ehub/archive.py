"""Files of snapshots: ``.npz``, which numpy reads, and ``.arrow``, which Arrow reads.

Both hold a description in JSON, and checksums: an ``.npz`` is a zip file and has them for each
array, an ``.arrow`` file gets them with its description.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ehub.errors import DependencyError, InvalidFileError
from ehub.types import Matrix

_FORMAT = 1
_NAME = b"ehub"


def save(
    path: Path,
    description: Mapping[str, Any],
    keys: list[str],
    vectors: Matrix,
    notes: Sequence[str | None],
) -> None:
    """Write rows to a file, which is there whole or not at all.

    ``vectors`` is float32 of shape ``(len(keys), dims)``, ``notes`` JSON text or None.

    Raises:
        InvalidFileError: a suffix other than .npz and .arrow, or the file cannot be written.
        DependencyError: pyarrow is needed and not installed.
    """
    write = {".npz": _write_numpy, ".arrow": _write_arrow}.get(path.suffix)
    if write is None:
        raise _other_suffix(path)
    about = {"format": _FORMAT, **description}
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                write(file, about, keys, vectors, notes)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o666 & ~_umask())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InvalidFileError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: Path) -> tuple[dict[str, Any], list[str], Matrix, list[str | None]]:
    """Read what :func:`save` wrote, with all of its checksums.

    Raises:
        InvalidFileError: it cannot be read, is damaged, or is no snapshot.
        DependencyError: pyarrow is needed and not installed.
    """
    read = {".npz": _read_numpy, ".arrow": _read_arrow}.get(path.suffix)
    if read is None:
        raise _other_suffix(path)
    try:
        about, keys, vectors, notes = read(path)
        if about.pop("format") != _FORMAT:
            raise InvalidFileError(f"{path} is a snapshot of another release of ehub")
        if not len(keys) == len(vectors) == len(notes) or vectors.shape[1] != about["dims"]:
            raise ValueError("its parts do not fit together")
    except OSError as error:
        raise InvalidFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise InvalidFileError(f"{path} is damaged, or not a snapshot: {error}") from error
    except (zlib.error, RuntimeError) as error:
        # zipfile's words for methods and passwords that it was not told of.
        raise InvalidFileError(f"{path} is damaged: {error}") from error
    return about, keys, vectors, notes


# --- numpy


def _write_numpy(
    file: IO[bytes],
    about: Mapping[str, Any],
    keys: list[str],
    vectors: Matrix,
    notes: Sequence[str | None],
) -> None:
    key_text, key_ends = _joined(keys)
    note_text, note_ends = _joined(["" if note is None else note for note in notes])
    np.savez(
        file,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        vectors=vectors,
        keys=key_text,
        key_ends=key_ends,
        metadata=note_text,
        metadata_ends=note_ends,
    )


def _read_numpy(path: Path) -> tuple[dict[str, Any], list[str], Matrix, list[str | None]]:
    with path.open("rb") as file:
        # All checksums, before anything is made of what they are of.
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"the checksum of {bad} is another")
        file.seek(0)
        return _read_parts(file)


def _read_parts(file: IO[bytes]) -> tuple[dict[str, Any], list[str], Matrix, list[str | None]]:
    with np.load(file, allow_pickle=False) as parts:
        about = json.loads(parts["about"].tobytes())
        vectors = np.ascontiguousarray(parts["vectors"], np.float32)
        keys = _parted(parts["keys"], parts["key_ends"])
        notes = _parted(parts["metadata"], parts["metadata_ends"])
    return about, keys, vectors, [note or None for note in notes]


def _joined(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return texts as UTF-8, one after the other, and where each ends."""
    parts = [text.encode() for text in texts]
    ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def _parted(joined: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    data = joined.tobytes()
    bounds = [0, *ends.tolist()]
    if bounds[-1] != len(data) or bounds != sorted(bounds):
        raise ValueError("its texts do not fit together")
    return [data[start:end].decode() for start, end in itertools.pairwise(bounds)]


# --- Arrow


def _write_arrow(
    file: IO[bytes],
    about: Mapping[str, Any],
    keys: list[str],
    vectors: Matrix,
    notes: Sequence[str | None],
) -> None:
    arrow = _arrow()
    flat = arrow.array(vectors.reshape(-1), arrow.float32())
    columns = {
        "key": arrow.array(keys, arrow.large_string()),
        "embedding": arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        "metadata": arrow.array(notes, arrow.large_string()),
    }
    about = {**about, "checksums": {name: _checksum(column) for name, column in columns.items()}}
    table = arrow.table(columns).replace_schema_metadata({_NAME: json.dumps(about)})
    with arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read_arrow(path: Path) -> tuple[dict[str, Any], list[str], Matrix, list[str | None]]:
    arrow = _arrow()
    try:
        with arrow.OSFile(str(path)) as file:
            table = arrow.ipc.open_file(file).read_all()
        table.validate(full=True)
    except arrow.ArrowException as error:
        raise ValueError(error) from error
    about = json.loads((table.schema.metadata or {})[_NAME])
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    for name, checksum in about.pop("checksums").items():
        column = columns[name]
        columns[name] = column = column.chunk(0) if hasattr(column, "chunk") else column
        if _checksum(column) != checksum:
            raise ValueError(f"the checksum of column {name} is another")
    vectors = columns["embedding"].flatten().to_numpy().reshape(-1, about["dims"])
    return about, columns["key"].to_pylist(), vectors, columns["metadata"].to_pylist()


def _checksum(column: Any) -> int:
    if hasattr(column, "flatten"):
        return zlib.crc32(column.flatten().to_numpy().tobytes())
    # Not of the buffers: their padding, and where they start, are nobody's promise.
    return zlib.crc32(json.dumps(column.to_pylist()).encode())


def _arrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DependencyError(
            "a snapshot as .arrow needs pyarrow: pip install 'ehub[parquet]'"
        ) from None
    return pyarrow  # type: ignore[no-any-return]


def _other_suffix(path: Path) -> InvalidFileError:
    return InvalidFileError(f"{path}: a snapshot's file ends in .npz or .arrow")


def _umask() -> int:
    # There is no way to read it alone.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
