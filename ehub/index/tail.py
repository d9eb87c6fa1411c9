"""The newest rows of an index, in a plain array: compared one by one, and so never missed.

A graph may fail to reach a row, most of all an outlier that has just been added beside deleted
ones. Who writes a row and then searches for it expects to find it; so the newest labels are not
left to the graph. An index that has had no more labels than fit here needs no graph at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ehub.types import Matrix

SIZE = 256


class Tail:
    """The vectors of the labels from :attr:`base` on, at most ``2 * SIZE`` of them."""

    def __init__(self, dims: int, base: int = 0) -> None:
        self.base = base
        self._vectors = np.empty((0, dims), np.float32)
        self._live = np.empty(0, np.bool_)

    def __len__(self) -> int:
        """Count the labels from the base on."""
        return len(self._live)

    def extend(self, vectors: Matrix) -> None:
        """Add the vectors of the next labels; the oldest go where there are too many."""
        self._vectors = np.vstack([self._vectors, vectors])
        self._live = np.append(self._live, np.ones(len(vectors), np.bool_))
        surplus = len(self._live) - SIZE
        if surplus > SIZE:
            self._vectors, self._live = self._vectors[surplus:].copy(), self._live[surplus:].copy()
            self.base += surplus

    def bury(self, label: int) -> None:
        """Leave a label out from now on."""
        if label >= self.base:
            self._live[label - self.base] = False

    def below(self, end: int) -> tuple[NDArray[np.int64], Matrix]:
        """Return the labels below ``end`` that are left, and their vectors by row."""
        places = np.flatnonzero(self._live[: max(end - self.base, 0)])
        return places + self.base, self._vectors[places]
