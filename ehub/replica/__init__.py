"""Indexes that follow Postgres: reading its log, one copy of an index, the thread for all."""

from ehub.replica.copy import Copy, Progress, Stamp, State
from ehub.replica.filters import LEAST_NEAR, rows_near
from ehub.replica.replica import Answering, Replica

__all__ = [
    "LEAST_NEAR",
    "Answering",
    "Copy",
    "Progress",
    "Replica",
    "Stamp",
    "State",
    "rows_near",
]
