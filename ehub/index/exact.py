"""Nearest neighbours by comparing everything, in batches: what approximations are measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ehub.index.lock import PRODUCTS
from ehub.types import Matrix, Metric

# Of an intermediate array: 16 MB.
_FLOATS = 1 << 22
_BATCH = 8192
_SPARE = 16


def brute_force(
    queries: Matrix, batches: Iterable[tuple[NDArray[np.int64], Matrix]], k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the ``k`` nearest rows of each query, nearest first.

    ``batches`` are labels with their rows, float32; under cosine rows and queries have length 1.
    Returns labels and distances (squared under l2, 1 minus the product otherwise), each of shape
    ``(len(queries), min(k, rows))``.
    """
    best = np.empty((len(queries), 0), np.int64)
    nearest = np.empty((len(queries), 0), np.float32)
    for batch, rows in batches:
        distances = _compare(queries, rows, metric)
        if nearest.shape[1] == k:
            # Most rows are farther than the k that are known.
            labels, distances = _below(distances, nearest.max(axis=1), batch)
        else:
            labels = np.broadcast_to(batch, distances.shape)
        best = np.hstack([best, labels])
        nearest = np.hstack([nearest, distances])
        if best.shape[1] > k:
            keep = np.argpartition(nearest, k - 1, axis=1)[:, :k]
            best = np.take_along_axis(best, keep, axis=1)
            nearest = np.take_along_axis(nearest, keep, axis=1)
    order = np.argsort(nearest, axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(nearest, order, axis=1)


def nearest_among(
    queries: Matrix, labels: NDArray[np.int64], rows: Matrix, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Answer as :func:`brute_force` from few rows, with all digits of the distances.

    The expansion that makes brute force fast loses some between vectors that are long and close;
    so it only selects, and what it selects is compared once more.
    """
    k = min(k, len(rows))
    if len(queries) * rows.size <= _FLOATS // 4:
        # So few that all of them can be compared with all digits.
        distances = pairwise(queries, rows[None], metric)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return labels[order], np.take_along_axis(distances, order, axis=1)
    near = np.empty((len(queries), k), np.int64)
    far = np.empty((len(queries), k), np.float32)
    if not k:
        return near, far
    step = max(1, _FLOATS // max(1, k * rows.shape[1]))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        places, _ = brute_force(part, [(np.arange(len(rows)), rows)], k, metric)
        distances = pairwise(part, rows[places], metric)
        order = np.argsort(distances, axis=1, kind="stable")
        near[start : start + step] = labels[np.take_along_axis(places, order, axis=1)]
        far[start : start + step] = np.take_along_axis(distances, order, axis=1)
    return near, far


def nearest_of_all(
    queries: Matrix, vectors: Matrix, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the ``k`` nearest of each query among vectors as they were stored, with all digits.

    Returns rows and pgvector's distances, nearest first, each of shape ``(n, min(k, rows))``.
    """

    def batches() -> Iterator[tuple[NDArray[np.int64], Matrix]]:
        for start in range(0, len(vectors), _BATCH):
            part = np.arange(start, min(start + _BATCH, len(vectors)))
            yield part, comparable(vectors[part], metric)

    def vectors_of(rows: NDArray[np.int64]) -> Matrix:
        return comparable(vectors[rows], metric)

    queries = comparable(queries, metric)
    near, far = nearest_in_batches(queries, batches(), vectors_of, k, metric)
    return near, pgvector_distances(far, metric)


def nearest_in_batches(
    queries: Matrix,
    batches: Iterable[tuple[NDArray[np.int64], Matrix]],
    rows: Callable[[NDArray[np.int64]], Matrix],
    k: int,
    metric: Metric,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Answer as :func:`nearest_among` from more rows than anybody holds in one array.

    ``batches`` are labels with their rows, and ``rows`` returns those of some labels again. There
    is at least one query.
    """
    # As nearest_among: the formula that selects loses digits, so some more are compared with all.
    selected, _ = brute_force(queries, batches, k + _SPARE, metric)
    found = [
        nearest_among(query[None], labels, rows(labels), k, metric)
        for query, labels in zip(queries, selected, strict=True)
    ]
    near, far = (np.vstack(parts) for parts in zip(*found, strict=True))
    return near, far


def comparable(vectors: Matrix, metric: Metric) -> Matrix:
    """Return vectors in the form in which they are compared: under cosine, of length 1."""
    return _unit(vectors) if metric == "cosine" else vectors


def _unit(vectors: Matrix) -> Matrix:
    if len(vectors) == 1:
        # The same for one, in a third of the time, which every search takes.
        wide = vectors.astype(np.float64)
        one: Matrix = (wide / math.sqrt(np.add.reduce(wide[0] * wide[0]))).astype(np.float32)
        return one
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    scaled: Matrix = (vectors / norms[:, None]).astype(np.float32)
    return scaled


def pairwise(queries: Matrix, rows: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Return the distance of each query to rows of its own, of shape ``(n or 1, k, dims)``."""
    if metric != "l2":
        with PRODUCTS.read():
            products: NDArray[np.float32] = (rows @ queries[:, :, None])[:, :, 0]
        return 1 - products
    apart = rows - queries[:, None]
    squares: NDArray[np.float32] = np.einsum("ikd,ikd->ik", apart, apart)
    return squares


def squared_norms(vectors: Matrix) -> NDArray[np.float32]:
    """Return the product of each row with itself, float32 of shape ``(n,)``."""
    squares: NDArray[np.float32] = np.einsum("ij,ij->i", vectors, vectors)
    return squares


def pgvector_distances(distances: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
    """Translate a graph's distances, as above, into pgvector's, which are float64."""
    wide = distances.astype(np.float64)
    if metric == "l2":
        return np.sqrt(wide)
    if metric == "cosine":
        # Rounding can take the product of two unit vectors past 1.
        return np.clip(wide, 0, 2)
    return wide - 1


def _below(
    distances: NDArray[np.float32], limits: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return by row what is below the row's limit, and infinity where others have more of it."""
    row, column = np.nonzero(distances < limits[:, None])
    counts = np.bincount(row, minlength=len(distances))
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(distances), int(counts.max(initial=0)))
    near, far = np.zeros(shape, np.int64), np.full(shape, np.inf, np.float32)
    near[row, place], far[row, place] = labels[column], distances[row, column]
    return near, far


def _compare(queries: Matrix, rows: Matrix, metric: Metric) -> NDArray[np.float32]:
    if metric == "l2":
        # Around their own middle: far from the origin the squares would swallow the distances.
        middle = queries.mean(axis=0)
        queries, rows = queries - middle, rows - middle
    with PRODUCTS.read():
        products: NDArray[np.float32] = queries @ rows.T
    if metric != "l2":
        return 1 - products
    distances = -2 * products
    distances += squared_norms(rows)[None]
    distances += squared_norms(queries)[:, None]
    return distances
