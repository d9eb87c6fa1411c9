"""Indexes that follow Postgres: reading its log, one copy of an index, the thread for all."""

from ehub.replica.copy import Progress, State
from ehub.replica.replica import Replica

__all__ = ["Progress", "Replica", "State"]
