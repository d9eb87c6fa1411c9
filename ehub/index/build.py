"""Building a graph from all rows at once: in what order, and how good it became."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ehub.index.calibrate import calibrate_build, rows_to_hold_out
from ehub.index.exact import unit
from ehub.index.hnsw import HnswIndex
from ehub.types import Matrix, Metric

_BATCH = 4096


def build_index(
    keys: list[str],
    vectors: Matrix,
    metric: Metric,
    M: int,
    ef_construction: int,
    target_recall: float,
    progress: Callable[[int], None],
) -> HnswIndex:
    """Build and calibrate an index of these rows, of which each key is there once.

    ``vectors`` is float32 of shape ``(len(keys), dims)`` and may be a file that is mapped to
    memory. ``progress`` is told how many rows are done; what it raises ends the build.

    Rows go in by descending distance from their mean. The outliers come first and link to each
    other; later they would find themselves among rows that have nearer ones to link to, and few
    searches would reach them. On GloVe (80,000 words, ``M`` 16, ``ef`` 100) recall@10 is 0.93
    instead of 0.87 under l2, 0.956 instead of 0.948 under cosine, and the build takes no longer.
    """
    index = HnswIndex(vectors.shape[1], metric, M, ef_construction, capacity=len(keys))
    order = _outliers_first(vectors, metric)
    held_out = rows_to_hold_out(len(keys))
    order = order[~np.isin(order, held_out)]
    for start in range(0, len(order), _BATCH):
        progress(start)
        rows = order[start : start + _BATCH]
        index.add([keys[row] for row in rows], vectors[rows])
    index.publish()
    progress(len(order))

    def rows_of(labels: NDArray[np.int64]) -> Matrix:
        return _comparable(vectors[order[labels]], metric)

    aside = vectors[held_out]
    calibrate_build(index, target_recall, rows_of, _comparable(aside, metric))
    index.add([keys[row] for row in held_out], aside)
    index.publish()
    index.settle()
    return index


def _outliers_first(vectors: Matrix, metric: Metric) -> NDArray[np.int64]:
    def batches() -> Iterator[tuple[slice, Matrix]]:
        for start in range(0, len(vectors), _BATCH):
            part = slice(start, start + _BATCH)
            yield part, _comparable(vectors[part], metric)

    total = np.zeros(vectors.shape[1])
    for _, rows in batches():
        total += rows.sum(axis=0, dtype=np.float64)
    mean = (total / max(len(vectors), 1)).astype(np.float32)
    distances = np.empty(len(vectors), np.float32)
    for part, rows in batches():
        apart = rows - mean
        distances[part] = np.einsum("ij,ij->i", apart, apart)
    return np.argsort(-distances, kind="stable")


def _comparable(vectors: Matrix, metric: Metric) -> Matrix:
    return unit(vectors) if metric == "cosine" and len(vectors) else vectors
