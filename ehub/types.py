"""The values that users hold in their hands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Metric: TypeAlias = Literal["l2", "cosine", "ip"]
"""``l2`` is pgvector's ``<->``, ``cosine`` its ``<=>``, ``ip`` its ``<#>``."""

Consistency: TypeAlias = Literal["replica", "strong"]
"""``replica``: as of the replica's watermark; ``strong``: all that was committed before."""

IndexPlace: TypeAlias = Literal["local", "service", "none"]
"""``local``: indexes in this process; ``service``: that of the index service, asked by Postgres;
``none``: exact searches by Postgres."""

Vector: TypeAlias = NDArray[np.float32]
"""One embedding, float32, shape ``(dims,)``."""

Matrix: TypeAlias = NDArray[np.float32]
"""Embeddings by row, float32, shape ``(n, dims)``."""

Metadata: TypeAlias = Mapping[str, Any]
"""A JSON object."""


Partition: TypeAlias = str | int | float | bool
"""What a row has in the field that its space is partitioned by; goes by its text."""


class Neighbor(NamedTuple):
    """One row of an answer, nearest first.

    Attributes:
        key: the key of the row.
        distance: pgvector's distance under the space's metric; smaller is nearer.
        metadata: the row's metadata where it was asked for, else None.
    """

    key: str
    distance: float
    metadata: dict[str, Any] | None = None
