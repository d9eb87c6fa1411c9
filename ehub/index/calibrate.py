"""From a target recall to the ``ef`` that reaches it: measured, not guessed.

``ef`` (how many candidates a search keeps) trades time for recall, and what it is worth depends on
the data. So queries are answered by comparing everything and by the graph at different ``ef``, and
the smallest one is taken that reaches the target, with a margin for the error of the sample.

What matters is recall on queries that are *not* in the index. A build holds some rows out, measures
with them, and adds them last. Later there are only rows of the index to ask with; they are easier
to answer, because each finds itself and its links. By how much is measured once, after the build,
and taken off from then on (0.006 on GloVe, 0.04 on Gaussian noise with few links).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ehub.index.exact import brute_force
from ehub.types import Matrix

if TYPE_CHECKING:
    from ehub.index.hnsw import HnswIndex

_QUERIES = 500
# Each of them has ten times as many neighbours to find.
_QUERIES_LARGE = 100
# Fewer rows than this are not worth holding any out.
_FEW = 200
_SMALL, _LARGE = 10, 100
_BATCH = 8192
_LOWEST_EF, _HIGHEST_EF = 16, 4096
# One-sided 99 %.
_Z = 2.326


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """What was found out about an index.

    Attributes:
        ef: reaches the target for up to 10 neighbours.
        ef_large: reaches it for 100.
        recall: recall@10 at ``ef``, of queries that are not in the index; None if not measured.
        bias: by how much queries that are in the index do better.
    """

    ef: int
    ef_large: int
    recall: float | None
    bias: float

    @classmethod
    def untried(cls) -> Calibration:
        """Return values for an index that was not measured yet."""
        return cls(ef=200, ef_large=400, recall=None, bias=0.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Read what ``dataclasses.asdict`` wrote."""
        return cls(**values)

    def ef_for(self, k: int) -> int:
        """Return the ef for ``k`` neighbours: a line through the two that were measured."""
        if k <= _SMALL:
            return self.ef
        slope = max(self.ef_large - self.ef, 0) / (_LARGE - _SMALL)
        # Beyond what was measured at least in proportion to k.
        slope = max(slope, 1.0) if k > _LARGE else slope
        return max(k, math.ceil(self.ef + slope * (k - _SMALL)))


def rows_to_hold_out(rows: int, seed: int = 0) -> NDArray[np.int64]:
    """Choose the rows of a build that are added last, in order; none where there are few rows."""
    if rows < _FEW:
        return np.empty(0, np.int64)
    chosen = np.random.default_rng(seed).choice(rows, min(_QUERIES, rows // 20), replace=False)
    return np.sort(chosen)


def calibrate(index: HnswIndex, target: float) -> None:
    """Measure an index with rows of its own, and have it search with the ``ef`` that was found.

    ``target`` is the recall to reach. Costs some seconds at 340,000 rows of 100 dims, and readers
    go on meanwhile. Where no ef up to 4096 reaches it, that one is taken, and the recall in the
    calibration tells.
    """
    labels, queries = index.sample(_QUERIES)
    truth, _ = index.exact(queries, _LARGE + 1)
    trial = _Trial(index, queries, labels, truth)
    index.calibration = _find(index, trial, target, index.calibration.bias)


def calibrate_build(
    index: HnswIndex,
    target: float,
    rows: Callable[[NDArray[np.int64]], Matrix],
    held_out: Matrix,
) -> None:
    """Measure an index with rows that were held out of its build.

    ``rows`` returns the vectors of labels of the index, ``held_out`` are those that it lacks, both
    float32, and of length 1 under cosine. Without any held out, rows of the index serve.
    """
    if not len(held_out):
        calibrate(index, target)
        return
    size = len(index)
    own = np.random.default_rng(0).choice(size, min(_QUERIES, size), replace=False)
    queries = np.vstack([held_out, rows(own)])
    labels = (np.arange(start, min(start + _BATCH, size)) for start in range(0, size, _BATCH))
    batches = ((part, rows(part)) for part in labels)
    truth, _ = brute_force(queries, batches, _LARGE + 1, index.metric)
    n = len(held_out)
    strangers = _Trial(index, held_out, np.full(n, -1, np.int64), truth[:n])
    members = _Trial(index, queries[n:], own, truth[n:])
    found = _find(index, strangers, target, bias=0.0)
    if found.recall is not None:
        recall, _ = members.measure(_SMALL, found.ef)
        found = dataclasses.replace(found, bias=max(0.0, recall - found.recall))
    index.calibration = found


def _find(index: HnswIndex, trial: _Trial, target: float, bias: float) -> Calibration:
    rows = len(index)
    if rows <= _SMALL + 1:
        # Everything is looked at anyway.
        return Calibration(ef=_HIGHEST_EF, ef_large=_HIGHEST_EF, recall=None, bias=bias)
    goal = min(target + bias, 0.9995)
    ef, recall = trial.smallest_ef(_SMALL, goal, _LOWEST_EF)
    ef_large, _ = trial.first(_QUERIES_LARGE).smallest_ef(min(_LARGE, rows - 1), goal, ef)
    return Calibration(ef=ef, ef_large=max(ef, ef_large), recall=recall - bias, bias=bias)


class _Trial:
    """Queries with their true neighbours; each leaves its own label, -1 if none, out."""

    def __init__(
        self,
        index: HnswIndex,
        queries: Matrix,
        own: NDArray[np.int64],
        truth: NDArray[np.int64],
    ) -> None:
        self._index, self._queries, self._own, self._truth = index, queries, own, truth

    def first(self, n: int) -> _Trial:
        """Return the same trial with fewer queries."""
        return _Trial(self._index, self._queries[:n], self._own[:n], self._truth[:n])

    def measure(self, k: int, ef: int) -> tuple[float, float]:
        """Return recall@k at an ``ef``, and its standard error."""
        found = self._index.labels_found(self._queries, k + 1, ef)
        if not found.size:
            return 0.0, 0.0
        shares = np.array(
            [
                len(_others(true, own, k) & _others(got, own, k)) / k
                for own, true, got in zip(self._own, self._truth, found, strict=True)
            ]
        )
        return float(shares.mean()), float(shares.std() / math.sqrt(len(shares)))

    def smallest_ef(self, k: int, goal: float, start: int) -> tuple[int, float]:
        """Return the smallest ef that surely reaches the goal, and recall@k there."""
        ef = below = max(start, k)
        recall, error = self.measure(k, ef)
        while recall - _Z * error < goal and ef < _HIGHEST_EF:
            below, ef = ef, min(ef * 2, _HIGHEST_EF)
            recall, error = self.measure(k, ef)
        # Between the last that failed and the first that passed.
        while ef - below > max(4, ef // 16) and recall - _Z * error >= goal:
            middle = (ef + below) // 2
            tried, tried_error = self.measure(k, middle)
            if tried - _Z * tried_error >= goal:
                ef, recall, error = middle, tried, tried_error
            else:
                below = middle
        return ef, recall


def _others(row: NDArray[np.int64], own: np.int64, k: int) -> set[int]:
    return set([label for label in row.tolist() if label != own][:k])
