"""The rows of an index that match something: which they are, and their vectors side by side.

A filter that is asked again and again is answered from here. Where few rows match, all of them
are compared, in one product; where many do, the graph is searched for more than is wanted, and what
does not match is left out. A callback into Python for each node that hnswlib visits is no way: 26
queries a second where 1 % of 340,000 rows match.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ehub.index.exact import nearest_among, pairwise, squared_norms
from ehub.index.lock import PRODUCTS
from ehub.types import Matrix, Metric, Vector

# What a row that is compared costs beside a candidate that the graph keeps, measured at 100 dims on
# 340,000 rows: one query reads memory, many at once share what was read.
_ROWS_A_CANDIDATE, _ROWS_A_CANDIDATE_OF_MANY = 50, 250
_MANY = 16
# hnswlib hands a vector out in so many times the time that it takes to compare one that lies here.
_FETCH = 150
# More than so many are not fetched for a query.
_MOST_FETCHED = 3000
# Of what the share of rows that match says must be asked for, this many times as much is.
_MARGIN = 1.5
_FLOATS = 1 << 22
_SPARE = 16
# A graph that cannot find enough for so large a share of the queries is not asked any more.
_PATIENCE = 0.3


class Selection:
    """Labels of an index, and maybe their vectors; for one writer or many readers at a time.

    Args:
        labels: the labels that match, each once.
        vectors: those of the labels, by row; None where all rows are seldom compared.
        capacity: of the index, in labels; grows by itself.
    """

    def __init__(self, labels: NDArray[np.int64], vectors: Matrix | None, capacity: int) -> None:
        self._mask = np.zeros(max(capacity, 64), np.bool_)
        self._mask[labels] = True
        # Those that were listed once; some may match no more.
        self._labels = labels
        self._listed = self._mask.copy()
        self._rows = len(labels)
        self._vectors = vectors
        # Where they lie, with room behind them.
        self._room = np.empty((0, 0), np.float32) if vectors is None else vectors
        # Under l2: a point amid the vectors, and the square of the distance of each to it.
        self._amid: tuple[Vector, NDArray[np.float32]] | None = None
        # Queries that the graph was asked, and those for which it found too few.
        self._asked = self._missed = 0

    def __len__(self) -> int:
        """Count the labels that match."""
        return self._rows

    @property
    def floats(self) -> int:
        """The numbers that its vectors hold, 0 where they are not gathered."""
        return 0 if self._vectors is None else self._vectors.size

    def holds(self, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say of each label whether it matches; of any shape."""
        if labels.size and int(labels.max()) >= len(self._mask):
            return np.where(labels < len(self._mask), self._mask[labels % len(self._mask)], False)
        return self._mask[labels]

    def leave(self, labels: NDArray[np.int64]) -> None:
        """Take labels out that are in."""
        inside = labels[self.holds(labels)]
        self._mask[inside] = False
        self._rows -= len(inside)

    def enter(
        self, labels: NDArray[np.int64], vectors: Callable[[NDArray[np.int64]], Matrix]
    ) -> None:
        """Take labels in; ``vectors`` returns those of labels."""
        top = int(labels.max(initial=-1)) + 1
        if top > len(self._mask):
            more = np.zeros(max(top, len(self._mask) * 3 // 2) - len(self._mask), np.bool_)
            self._mask = np.append(self._mask, more)
            self._listed = np.append(self._listed, more)
        labels = labels[~self._mask[labels]]
        self._mask[labels] = True
        self._rows += len(labels)
        new = labels[~self._listed[labels]]
        self._listed[new] = True
        self._labels = np.append(self._labels, new)
        if self._vectors is not None and len(new):
            self._append(vectors(new))
        if len(self._labels) > 2 * self._rows + 1000:
            self._forget_the_dead()

    def _append(self, vectors: Matrix) -> None:
        """Put vectors behind the others, without a copy of all of them each time."""
        assert self._vectors is not None  # noqa: S101 - the caller has looked
        before, after = len(self._vectors), len(self._vectors) + len(vectors)
        if after > len(self._room):
            self._room = np.empty((after * 5 // 4 + 64, vectors.shape[1]), np.float32)
            self._room[:before] = self._vectors
        self._room[before:after] = vectors
        self._vectors = self._room[:after]
        if self._amid is not None:
            middle, squares = self._amid
            self._amid = middle, np.append(squares, squared_norms(vectors - middle))

    def _forget_the_dead(self) -> None:
        alive = self._mask[self._labels]
        self._labels = self._labels[alive]
        self._listed = self._mask.copy()
        if self._vectors is not None:
            self._vectors = self._room = self._vectors[alive]
            self._amid = None

    def wanted_of_graph(self, wanted: int, rows: int) -> int:
        """How many neighbours to ask a graph of ``rows`` rows for, to find so many that match."""
        return min(rows, int(wanted * rows / max(self._rows, 1) * _MARGIN) + 5)

    @property
    def comparable(self) -> bool:
        """Whether its rows can be compared in acceptable time."""
        return self._vectors is not None or self._rows <= _MOST_FETCHED

    @property
    def starved(self) -> bool:
        """Whether the graph is of little use: its rows lie together, apart from many queries."""
        return self._asked > 20 and self._missed > _PATIENCE * self._asked

    def rows_are_cheaper(self, ef: int, queries: int) -> bool:
        """Whether to compare all rows takes less than a search that keeps ``ef`` candidates."""
        if self.starved:
            return self.comparable
        each = _ROWS_A_CANDIDATE if queries < _MANY else _ROWS_A_CANDIDATE_OF_MANY
        return self._rows * (_FETCH if self._vectors is None else 1) <= each * ef

    def note(self, asked: int, missed: int) -> None:
        """Remember for how many queries the graph has found too few: near them, little matches."""
        if self._asked > 1000:
            self._asked, self._missed = self._asked // 2, self._missed // 2
        self._asked += asked
        self._missed += missed

    def nearest(
        self,
        queries: Matrix,
        k: int,
        metric: Metric,
        vectors: Callable[[NDArray[np.int64]], Matrix],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Compare all rows; returns labels and the graph's own distances, ``(n, min(k, rows))``."""
        k = min(k, self._rows)
        if self._vectors is None:
            labels = self._labels[self._mask[self._labels]]
            return nearest_among(queries, labels, vectors(labels), k, metric)
        step = max(1, _FLOATS // max(1, len(self._labels)))
        if len(queries) <= step:
            places, far = self._nearest_places(queries, self._vectors, k, metric)
            return self._labels[places], far
        near = np.empty((len(queries), k), np.int64)
        far = np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            places, far[part] = self._nearest_places(queries[part], self._vectors, k, metric)
            near[part] = self._labels[places]
        return near, far

    def _squares_of(self, gathered: Matrix) -> tuple[Vector, NDArray[np.float32]]:
        middle: Vector = gathered.mean(axis=0)
        self._amid = middle, squared_norms(gathered - middle)
        return self._amid

    def _nearest_places(
        self, queries: Matrix, gathered: Matrix, k: int, metric: Metric
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        asked = queries
        if metric == "l2":
            # From a point amid them: far from the origin the squares would swallow the distances.
            middle, squares = self._amid or self._squares_of(gathered)
            asked = queries - middle
        with PRODUCTS.read():
            scores: NDArray[np.float32] = asked @ gathered.T
        if metric == "l2":
            scores *= -2
            scores += squares
        else:
            np.subtract(1, scores, out=scores)
        if self._rows < len(self._labels):
            scores[:, ~self._mask[self._labels]] = np.inf
        # Squares lose digits: under l2 they only select, and what they select is compared again.
        some = min(k + _SPARE, self._rows) if metric == "l2" else k
        if some == scores.shape[1]:
            places = np.broadcast_to(np.arange(some), scores.shape)
        else:
            places = np.argpartition(scores, some - 1, axis=1)[:, :some]
        # As np.take_along_axis, which takes as long as all the rest where there is little to do.
        row = np.arange(len(queries))[:, None]
        again = metric == "l2"
        far = pairwise(queries, gathered[places], metric) if again else scores[row, places]
        order = np.argsort(far, axis=1, kind="stable")[:, :k]
        return places[row, order], far[row, order]
