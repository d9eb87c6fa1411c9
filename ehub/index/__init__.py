"""The index: graphs, how they are built, measured and kept in files. Knows no Postgres."""

from typing import TypeAlias

from ehub.index.build import build_index
from ehub.index.calibrate import Calibration, calibrate
from ehub.index.exact import nearest_of_all
from ehub.index.hnsw import Found, HnswIndex, Members, Plan, Proposed
from ehub.index.partitioned import PartitionedIndex, build_partitioned
from ehub.index.store import IndexStore, Manifest

AnyIndex: TypeAlias = HnswIndex | PartitionedIndex
"""One graph over all rows, or the rows kept apart by partitions."""

__all__ = [
    "AnyIndex",
    "Calibration",
    "Found",
    "HnswIndex",
    "IndexStore",
    "Manifest",
    "Members",
    "PartitionedIndex",
    "Plan",
    "Proposed",
    "build_index",
    "build_partitioned",
    "calibrate",
    "nearest_of_all",
]
