"""From a target recall to the ``ef`` that reaches it: measured, not guessed.

``ef`` (how many candidates a search keeps) trades time for recall, and what it is worth depends on
the data. So rows of the index are drawn as queries, their true neighbours are computed by comparing
everything, and the smallest ``ef`` is taken at which the found ones reach the target. A drawn
row is left out of its own answer; queries that are not in the index do about as well (within 0.01
on GloVe, 341k words), and a margin of sampling error is added on top.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ehub.index.hnsw import HnswIndex

QUERIES = 400
_SMALL, _LARGE = 10, 100
_LOWEST_EF, _HIGHEST_EF = 16, 4096
# One-sided 95 %.
_Z = 1.645


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """What was found out about an index.

    Attributes:
        ef: reaches the target for up to 10 neighbours.
        ef_large: reaches it for 100.
        recall: recall@10 as measured at ``ef``; None where nothing was measured.
        rows: the rows of the index then.
    """

    ef: int
    ef_large: int
    recall: float | None
    rows: int

    @classmethod
    def untried(cls) -> Calibration:
        """Return values for an index that was not measured yet."""
        return cls(ef=200, ef_large=400, recall=None, rows=0)

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


def calibrate(index: HnswIndex, target: float, seed: int = 0) -> Calibration:
    """Measure an index and return the ef values that reach the ``target`` recall.

    Costs about a second at 340,000 rows of 100 dims. Readers of the index go on meanwhile. Where
    no ef up to 4096 reaches the target, that one is taken, and ``recall`` tells.
    """
    rows = len(index)
    labels, queries = index.sample(QUERIES, seed)
    if rows <= _SMALL + 1:
        return Calibration(ef=_HIGHEST_EF, ef_large=_HIGHEST_EF, recall=None, rows=rows)
    # One more than is compared: each query finds itself.
    large = min(_LARGE, rows - 1)
    truth, _ = index.exact(queries, large + 1)
    ef, recall = _smallest_ef(index, labels, queries, truth, _SMALL, target)
    ef_large, _ = _smallest_ef(index, labels, queries, truth, large, target, start=ef)
    return Calibration(ef=ef, ef_large=max(ef, ef_large), recall=recall, rows=rows)


def _smallest_ef(
    index: HnswIndex,
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    truth: NDArray[np.int64],
    k: int,
    target: float,
    start: int = _LOWEST_EF,
) -> tuple[int, float]:
    def measure(ef: int) -> tuple[float, float]:
        found = index.labels_found(queries, k + 1, ef)
        shares = np.array(
            [
                len(_others(true, label, k) & _others(got, label, k)) / k
                for label, true, got in zip(labels, truth, found, strict=True)
            ]
        )
        return float(shares.mean()), float(shares.std() / math.sqrt(len(shares)))

    ef = max(start, k)
    recall, error = measure(ef)
    below = ef
    while recall - _Z * error < target and ef < _HIGHEST_EF:
        below, ef = ef, min(ef * 2, _HIGHEST_EF)
        recall, error = measure(ef)
    # Between the last that failed and the first that passed.
    while ef - below > max(4, ef // 16) and recall - _Z * error >= target:
        middle = (ef + below) // 2
        tried = measure(middle)
        if tried[0] - _Z * tried[1] >= target:
            ef, (recall, error) = middle, tried
        else:
            below = middle
    return ef, recall


def _others(row: NDArray[np.int64], itself: np.int64, k: int) -> set[int]:
    return set([label for label in row.tolist() if label != itself][:k])
