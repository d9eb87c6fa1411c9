"""Building a graph from all rows at once: in what order, and how good it became."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ehub.index.calibrate import calibrate_build, rows_to_hold_out
from ehub.index.exact import comparable
from ehub.index.hnsw import HnswIndex
from ehub.index.lock import PRODUCTS
from ehub.types import Matrix, Metric

_BATCH = 4096
# Rows about as far out as each other; and the means that they are put in order by.
_SHELL = 2048
_MEANS = 8
_ROUNDS = 2


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
    searches would reach them. Of rows about as far out, those that lie together come one after the
    other: what a row is linked to is in the processor's cache still, and later stays close in
    memory. On GloVe (341,000 words, ``M`` 16) that builds in 0.76 of the time that the first order
    alone takes, and in 0.82 of that of rows as they come; recall@10 at ``ef`` 320 is 0.957, 0.952
    and 0.936.
    """
    index = HnswIndex(vectors.shape[1], metric, M, ef_construction, capacity=len(keys))
    order = _outliers_first(vectors, metric)
    # The outermost shell stays as it is: there each row may be alone.
    for start in range(_SHELL, len(order), _SHELL):
        shell = order[start : start + _SHELL]
        order[start : start + _SHELL] = shell[_near_together(comparable(vectors[shell], metric))]
    held_out = rows_to_hold_out(len(keys))
    order = order[~np.isin(order, held_out)]
    for start in range(0, len(order), _BATCH):
        progress(start)
        rows = order[start : start + _BATCH]
        index.add([keys[row] for row in rows], vectors[rows])
    index.publish()
    progress(len(order))

    def rows_of(labels: NDArray[np.int64]) -> Matrix:
        return comparable(vectors[order[labels]], metric)

    aside = vectors[held_out]
    calibrate_build(index, target_recall, rows_of, comparable(aside, metric))
    index.add([keys[row] for row in held_out], aside)
    index.publish()
    index.settle()
    return index


def _outliers_first(vectors: Matrix, metric: Metric) -> NDArray[np.int64]:
    def batches() -> Iterator[tuple[slice, Matrix]]:
        for start in range(0, len(vectors), _BATCH):
            part = slice(start, start + _BATCH)
            yield part, comparable(vectors[part], metric)

    total = np.zeros(vectors.shape[1])
    for _, rows in batches():
        total += rows.sum(axis=0, dtype=np.float64)
    mean = (total / max(len(vectors), 1)).astype(np.float32)
    distances = np.empty(len(vectors), np.float32)
    for part, rows in batches():
        apart = rows - mean
        distances[part] = np.einsum("ij,ij->i", apart, apart)
    return np.argsort(-distances, kind="stable")


def _near_together(rows: Matrix) -> NDArray[np.int64]:
    """Return an order of rows in which near ones follow each other: by a few means, chained."""
    if len(rows) <= _MEANS:
        return np.arange(len(rows))
    means = rows[np.random.default_rng(0).choice(len(rows), _MEANS, replace=False)]
    for _ in range(_ROUNDS):
        nearest = _nearest_mean(rows, means)
        for i in range(_MEANS):
            if (nearest == i).any():
                means[i] = rows[nearest == i].mean(axis=0)
    left = list(range(1, _MEANS))
    chain = [0]
    while left:
        apart = ((means[left] - means[chain[-1]]) ** 2).sum(axis=1)
        chain.append(left.pop(int(apart.argmin())))
    places = np.empty(_MEANS, np.int64)
    places[chain] = np.arange(_MEANS)
    return np.argsort(places[_nearest_mean(rows, means)], kind="stable")


def _nearest_mean(rows: Matrix, means: Matrix) -> NDArray[np.int64]:
    with PRODUCTS.read():
        products = rows @ means.T
    nearest: NDArray[np.int64] = np.argmin((means**2).sum(axis=1) - 2 * products, axis=1)
    return nearest
