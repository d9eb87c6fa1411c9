"""What the answers must be: brute force over a table in a dict, with pgvector's distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import psycopg

import ehub


def distances(metric: str, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    query, rows = np.asarray(query, np.float64), np.asarray(rows, np.float64)
    if metric == "l2":
        return np.linalg.norm(rows - query, axis=1)
    if metric == "ip":
        return -(rows @ query)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return 1 - (rows @ query) / norms


def check_neighbors(
    found: Sequence[ehub.Neighbor],
    table: Mapping[str, np.ndarray],
    metric: str,
    query: np.ndarray,
    k: int,
    recall: float = 1.0,
) -> None:
    """The answer's rows are rows, with their distances, in order, and the nearest ones."""
    keys = list(table)
    assert len(found) == min(k, len(keys))
    assert len({one.key for one in found}) == len(found)
    if not keys:
        return
    true = dict(zip(keys, distances(metric, query, np.stack(list(table.values()))), strict=True))
    for one in found:
        assert one.distance == pytest_approx(true[one.key]), one
    assert [one.distance for one in found] == sorted(one.distance for one in found)
    # By distance, not by key: of two rows at the same distance either will do.
    limit = sorted(true.values())[len(found) - 1]
    right = sum(one.distance <= limit + tolerance(limit) for one in found)
    assert right >= recall * len(found)


def pytest_approx(value: float) -> object:
    import pytest

    return pytest.approx(value, abs=tolerance(value))


def tolerance(value: float) -> float:
    # float32 keeps seven digits; sums of squares lose some.
    return 1e-5 + 1e-5 * abs(value)


def table(connection: psycopg.Connection, space: str) -> dict[str, np.ndarray]:
    """The rows of a space, by a way that shares nothing with ehub's."""
    rows = connection.execute(f"SELECT key, embedding::text FROM spaces.{space}").fetchall()
    return {key: np.array(text.strip("[]").split(","), np.float32) for key, text in rows}
