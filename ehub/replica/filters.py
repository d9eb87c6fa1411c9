"""The filters that searches of one index have had, and which of them are worth a selection.

A selection takes a look at the whole table, and memory; a filter that comes once is not worth it.
One that comes again within some minutes is, until it has not come for long or others are preferred.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ehub.database import Connection
from ehub.index import HnswIndex
from ehub.replica.log import Behind, Entry, filter_conditions, stream_rows, take_snapshot
from ehub.types import Matrix
from ehub.watermark import Watermark

_AGAIN_SECONDS = 600.0
_IDLE_SECONDS = 3600.0
_MOST, _AT_ONCE = 64, 8
# Filters that were seen are remembered, many times as many as are selected; not very long ones.
_REMEMBERED = 1000
_LONGEST = 4000
# Where it is not known what matches: so many near rows for each that is wanted, and some at least.
_NEAR, LEAST_NEAR = 20, 200
# So large a share of all rows is found by the graph, and need not be compared.
_COMPARED_SHARE = 0.3
# The vectors of all selections are no more than those of the graph; of a small one, a few at least.
_LEAST_FLOATS = 10_000_000


class Selected(NamedTuple):
    """What a job has read for selections, as of one snapshot.

    Attributes:
        epoch: the connection to the database that it was read for.
        conditions: by filter, what it is in SQL.
        rows: by filter, the keys that match, and their vectors where they will be compared.
    """

    epoch: int
    watermark: Watermark
    conditions: dict[str, str]
    rows: dict[str, tuple[list[str], Matrix | None]]


class Filters:
    """Remembers filters, by their text. Any thread may call :meth:`ask`, the owner the rest."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        # When each was asked last, the latest at the end; and those that were asked again.
        self._asked: dict[str, float] = {}
        self._again: set[str] = set()
        self.conditions: dict[str, str] = {}
        """Those that the index has a selection for, and what they are in SQL."""

    def ask(self, text: str) -> bool:
        """Remember that a search has this filter; True if there is something to do now."""
        if len(text) > _LONGEST:
            return False
        now = time.monotonic()
        with self._mutex:
            before = self._asked.pop(text, None)
            self._asked[text] = now
            new = before is not None and now - before < _AGAIN_SECONDS and text not in self._again
            if new:
                self._again.add(text)
            if len(self._asked) > _REMEMBERED:
                oldest = next(iter(self._asked))
                del self._asked[oldest]
                self._again.discard(oldest)
            return new

    def due(self, index: HnswIndex) -> dict[str, bool]:
        """Return some filters to select now, and whether their vectors are needed at any rate."""
        with self._mutex:
            again = list(self._again)
        present = index.selections()
        wanted = {text: False for text in again if text not in present}
        for text, selection in present.items():
            if selection.starved and not selection.comparable:
                wanted[text] = True
        return dict(itertools.islice(wanted.items(), _AT_ONCE))

    def keep(self, index: HnswIndex, coming: int = 0) -> dict[str, str]:
        """Return the conditions of the selections to go on with, where ``coming`` floats come."""
        now = time.monotonic()
        present = index.selections()
        room = _room(index) - coming
        kept: dict[str, str] = {}
        with self._mutex:
            for text in reversed(self._asked):
                if text not in present or text not in self.conditions:
                    continue
                room -= present[text].floats
                if len(kept) < _MOST and room >= 0 and now - self._asked[text] < _IDLE_SECONDS:
                    kept[text] = self.conditions[text]
                else:
                    # It has to come twice again.
                    self._again.discard(text)
        return kept


def read_selected(
    connection: Connection,
    entry: Entry,
    index: HnswIndex,
    due: dict[str, bool],
    epoch: int,
    go_on: Callable[[], None],
) -> Selected:
    """Read, in the connection's transaction, which rows match filters, as :meth:`Filters.due` says.

    Vectors stay within their room. ``go_on`` is called now and then; what it raises ends the work.
    """
    snapshot = take_snapshot(connection)
    conditions = filter_conditions(connection, entry, list(due))
    rows: dict[str, tuple[list[str], Matrix | None]] = {}
    room = _room(index)
    for text, needed in due.items():
        if text not in conditions:
            raise Behind("its space is gone, or not to be read any more")
        keys: list[str] = []
        parts = [np.empty((0, entry.dims), np.float32)]
        left = room
        for batch in stream_rows(connection, entry, conditions[text]):
            go_on()
            keys += batch.keys
            left -= batch.vectors.size
            if left >= 0 and (needed or _are_compared(len(keys), index)):
                parts.append(batch.vectors)
            else:
                parts.clear()
        if parts:
            room = left
        rows[text] = keys, np.vstack(parts) if parts else None
    return Selected(epoch, snapshot, conditions, rows)


def _room(index: HnswIndex) -> int:
    """Return how many numbers the vectors of all selections of an index may be."""
    return max(len(index) * index.dims, _LEAST_FLOATS)


def _are_compared(rows: int, index: HnswIndex) -> bool:
    """Whether a selection of so many rows is worth their vectors."""
    return rows * index.dims <= _COMPARED_SHARE * _room(index)


def rows_near(k: int) -> int:
    """Return how many near rows to look among for ``k`` that match a filter that is not known."""
    return max(_NEAR * k, LEAST_NEAR)
