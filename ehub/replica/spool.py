"""Rows on disk between reading them and putting them into a graph."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ehub.replica.log import Batch
from ehub.types import Matrix

_BATCH = 4096
# So much is as well kept in memory, and goes on when the disk is full.
_MEMORY_BYTES = 1 << 28


class Spool:
    """Rows on disk, so that a long build holds neither a transaction nor twice the memory.

    With ``most`` rows, the number that will come at the most, few of them are kept in memory.
    """

    def __init__(self, folder: Path, dims: int, most: int | None = None) -> None:
        self._file: IO[bytes]
        if most is not None and most * dims * 4 <= _MEMORY_BYTES:
            self._file = io.BytesIO()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._dims = dims
        self._keys: list[str] = []
        self._partitions: list[str] = []
        # One text for each partition, however many rows it has.
        self._names: dict[str, str] = {}

    @property
    def rows(self) -> int:
        """Count the rows."""
        return len(self._keys)

    def write(self, batch: Batch) -> None:
        """Add rows; which conditions hold for them is not kept."""
        self._keys += batch.keys
        self._partitions += [self._names.setdefault(name, name) for name in batch.partitions]
        self._file.write(batch.vectors.tobytes())

    def all(self) -> tuple[list[str], Matrix, list[str]]:
        """Return keys, vectors and partitions; the vectors stay in the file, mapped to memory.

        Not of a spool that knows how many rows come.
        """
        if not self._keys:
            return [], np.empty((0, self._dims), np.float32), []
        self._file.flush()
        shape = (len(self._keys), self._dims)
        return self._keys, np.memmap(self._file, np.float32, "r", shape=shape), self._partitions

    def batches(self) -> Iterator[Batch]:
        """Read the rows in the order in which they came."""
        self._file.seek(0)
        for start in range(0, len(self._keys), _BATCH):
            part = slice(start, start + _BATCH)
            keys = self._keys[part]
            data = self._file.read(len(keys) * self._dims * 4)
            vectors = np.frombuffer(data, np.float32).reshape(len(keys), self._dims)
            yield Batch(keys, vectors, self._partitions[part], np.empty((len(keys), 0), np.bool_))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
