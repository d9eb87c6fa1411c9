"""The state of the database as of which an index equals its table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Watermark:
    """A ``pg_snapshot``: the transactions that had ended when it was taken.

    Attributes:
        xmin: every transaction below it had ended.
        xmax: no transaction from it on had ended.
        running: the transactions between the two that had not ended.

    Source: PostgreSQL documentation, "pg_snapshot components".
    """

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Watermark:
        """Read Postgres' text form, ``xmin:xmax:xip,…``; raises ValueError on anything else."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(",") if running else ())))

    def sees(self, xid: int) -> bool:
        """Whether the effects of transaction ``xid``, if it committed, are part of the state."""
        return xid < self.xmax and xid not in self.running

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, sorted(self.running)))}"
