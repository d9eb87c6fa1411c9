"""Rows on disk between reading them and putting them into a graph."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ehub.types import Matrix

_BATCH = 4096


class Spool:
    """Rows on disk, so that a long build holds neither a transaction nor twice the memory."""

    def __init__(self, folder: Path, dims: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._dims = dims
        self._keys: list[str] = []

    @property
    def rows(self) -> int:
        """Count the rows."""
        return len(self._keys)

    def write(self, keys: list[str], vectors: Matrix) -> None:
        """Add rows; ``vectors`` is float32 of shape ``(len(keys), dims)``."""
        self._keys += keys
        self._file.write(vectors.tobytes())

    def all(self) -> tuple[list[str], Matrix]:
        """Return all rows; the vectors stay in the file, which is mapped to memory."""
        if not self._keys:
            return [], np.empty((0, self._dims), np.float32)
        self._file.flush()
        shape = (len(self._keys), self._dims)
        return self._keys, np.memmap(self._file, np.float32, "r", shape=shape)

    def batches(self) -> Iterator[tuple[list[str], Matrix]]:
        """Read the rows in the order in which they came."""
        self._file.seek(0)
        for start in range(0, len(self._keys), _BATCH):
            keys = self._keys[start : start + _BATCH]
            data = self._file.read(len(keys) * self._dims * 4)
            yield keys, np.frombuffer(data, np.float32).reshape(len(keys), self._dims)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
