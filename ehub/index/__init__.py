"""The index: a graph, its files, its calibration. Knows no Postgres."""

from ehub.index.calibrate import Calibration, calibrate, rows_to_hold_out, with_bias
from ehub.index.hnsw import Found, HnswIndex
from ehub.index.store import IndexStore, Manifest

__all__ = [
    "Calibration",
    "Found",
    "HnswIndex",
    "IndexStore",
    "Manifest",
    "calibrate",
    "rows_to_hold_out",
    "with_bias",
]
