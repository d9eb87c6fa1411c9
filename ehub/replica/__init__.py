"""Indexes that follow Postgres: reading its log, one copy of an index, the thread for all."""

from ehub.replica.copy import Copy, Progress, Stamp, State
from ehub.replica.replica import Answering, Replica

__all__ = ["Answering", "Copy", "Progress", "Replica", "Stamp", "State"]
