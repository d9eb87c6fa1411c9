"""What the service answers: candidates for Postgres, and its state for whoever looks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ehub.index import PartitionedIndex, Proposed
from ehub.replica import LEAST_NEAR, Copy, Replica, Stamp, rows_near
from ehub.service.metrics import Metrics
from ehub.service.pgwire import Answer, Column, StatementError, array
from ehub.types import Matrix

_INT4, _INT8, _SNAPSHOT, _INT4_ARRAY, _TEXT_ARRAY, _BOOL = 23, 20, 5038, 1007, 1009, 16

_COLUMNS = (
    Column("nonce"),
    Column("reason"),
    Column("watermark", _SNAPSHOT),
    Column("counts", _INT4_ARRAY),
    Column("keys", _TEXT_ARRAY),
    Column("plan"),
    Column("matching", _BOOL),
)
_STATUS_COLUMNS = (
    Column("space"),
    Column("index", _INT8),
    Column("state"),
    Column("rows", _INT8),
    Column("watermark", _SNAPSHOT),
    Column("last_error"),
)
_FIELDS = 10
# No answer is longer than this many keys; Postgres goes exact then.
_MOST = 10_000_000


class _Question(NamedTuple):
    """``CANDIDATES nonce state index n k ef filter partition queries``.

    As ``ehub.candidates`` writes it: what may be missing is ``-``, or ``x`` and hexadecimal digits.
    """

    nonce: str
    state: str
    index_id: int
    n: int
    k: int
    ef: int
    filter: str | None
    partition: str | None
    queries: str

    @classmethod
    def parse(cls, statement: str) -> _Question:
        fields = statement.split(" ", _FIELDS - 1)
        if len(fields) != _FIELDS:
            raise StatementError(
                "42601",
                f"CANDIDATES has {_FIELDS - 1} fields, like those that ehub.candidates sends",
            )
        _, nonce, state, index_id, n, k, ef, wanted, partition, queries = fields
        try:
            asked = cls(
                *(nonce, state, int(index_id), int(n), int(k), int(ef)),
                _optional(wanted),
                _optional(partition),
                queries,
            )
        except ValueError as error:
            raise StatementError("42601", f"CANDIDATES: {error}") from None
        if asked.n < 1 or asked.k < 1 or asked.ef < 0:
            raise StatementError("22023", "CANDIDATES: n and k are positive, ef is not negative")
        return asked

    def matrix(self, dims: int) -> Matrix:
        """Read what ``vector_send`` wrote: float32 of shape ``(n, dims)``."""
        try:
            data = np.frombuffer(bytes.fromhex(self.queries), np.uint8)
            rows = data.reshape(self.n, 4 + 4 * dims)[:, 4:]
        except ValueError:
            raise StatementError(
                "22P02", f"CANDIDATES: {self.n} vectors of {dims} dims are needed"
            ) from None
        return np.ascontiguousarray(rows).view(">f4").astype(np.float32)


def _optional(field: str) -> str | None:
    return None if field == "-" else bytes.fromhex(field.removeprefix("x")).decode()


def _near(asked: _Question) -> int:
    """Return how many rows are asked of an index that does not know which match."""
    # Whoever asks for so many has found too few among fewer.
    if asked.filter is None or asked.k >= LEAST_NEAR:
        return asked.k
    return rows_near(asked.k)


def _is_all(found: Proposed, asked: int) -> bool:
    """Whether no row is left that was not found."""
    return all(len(keys) < asked for keys in found.keys)


def _describe(found: Proposed, matching: bool) -> str:
    """Write how it was found, for ``ehub.explain_nearest``."""
    plan = found.plan
    described = {"by": plan.by, "rows": plan.rows, "compared": plan.compared, "note": plan.note}
    if not matching:
        # How many match it does not know.
        described |= {"by": "near", "note": "looks among the nearest for rows that match"}
        del described["rows"]
    return json.dumps(described)


class Answers:
    """Answers the statements that come through the door."""

    def __init__(self, replica: Replica, metrics: Metrics) -> None:
        self._replica, self._metrics = replica, metrics

    def __call__(self, statement: str) -> Answer:
        """Answer a statement; raises StatementError for one that is not understood."""
        word = statement.split(None, 1)[0].rstrip(";").upper()
        if word == "CANDIDATES":
            return self._candidates(_Question.parse(statement))
        answers: dict[str, Callable[[str], Answer]] = {
            "STATUS": self._status,
            "SELECT": self._select,
            "SET": self._set,
        }
        if word not in answers:
            raise StatementError(
                "0A000",
                f"the index service does not know {word[:20]}",
                "it answers CANDIDATES (to Postgres), STATUS and SELECT 1; the data is in Postgres",
            )
        return answers[word](statement)

    def _candidates(self, asked: _Question) -> Answer:
        started = time.perf_counter()
        found, matching = self._propose(asked)
        if isinstance(found, str):
            self._metrics.answered(asked.n, time.perf_counter() - started, found)
            return Answer(_COLUMNS, [[asked.nonce, found, *[None] * 5]])
        self._metrics.answered(asked.n, time.perf_counter() - started, None)
        stamp = found.as_of
        assert isinstance(stamp, Stamp)  # noqa: S101 - else it was refused
        counts = "{" + ",".join([str(len(keys)) for keys in found.keys]) + "}"
        flat = found.keys[0] if asked.n == 1 else [key for keys in found.keys for key in keys]
        plan = _describe(found, matching)
        row = [asked.nonce, None, str(stamp.watermark), counts, array(flat), plan]
        return Answer(_COLUMNS, [[*row, "t" if matching else "f"]])

    def _propose(self, asked: _Question) -> tuple[Proposed | str, bool]:
        """Return what the index proposes, and whether nothing else can match; or why not."""
        copy = self._copy(asked.index_id)
        if copy is None:
            return "the service has no such index yet", False
        index = copy.index
        if index is None or index.as_of is None:
            return f"it is {copy.state}", False
        if asked.n * asked.k > _MOST and asked.n * len(index) > _MOST:
            return f"more than {_MOST} keys are asked for", False
        queries = asked.matrix(index.dims)
        found = None
        matching = True
        if isinstance(index, PartitionedIndex):
            near = _near(asked)
            found = index.propose(queries, near, asked.ef, asked.partition)
            # All that there are, or those that are near.
            matching = asked.filter is None or (found is not None and _is_all(found, near))
        elif asked.partition is not None:
            return "it is not kept by partitions", False
        elif asked.filter is None:
            found = index.propose(queries, asked.k, asked.ef)
        else:
            copy.ask(asked.filter)
            if asked.filter in index.selections():
                found = index.propose(queries, asked.k, asked.ef, asked.filter)
            if found is None:
                near = _near(asked)
                found = index.propose(queries, near, asked.ef)
                matching = found is not None and _is_all(found, near)
        if found is None:
            return "parts of its graph cannot be reached; it is built anew", False
        stamp = found.as_of
        if not isinstance(stamp, Stamp) or asked.state not in (
            stamp.state,
            f"{stamp.state}/{stamp.shape}",
        ):
            copy.doubt()
            return "it follows another life of this database, or of this table", False
        return found, matching

    def _copy(self, index_id: int) -> Copy | None:
        for copy in self._replica.followed():
            if copy.entry.index_id == index_id:
                return copy
        return None

    def _status(self, _statement: str) -> Answer:
        rows = []
        for copy in self._replica.followed():
            index = copy.index
            stamp = None if index is None else index.as_of
            rows.append(
                [
                    copy.entry.address,
                    str(copy.entry.index_id),
                    str(copy.state),
                    None if index is None else str(len(index)),
                    str(stamp.watermark) if isinstance(stamp, Stamp) else None,
                    copy.error,
                ]
            )
        return Answer(_STATUS_COLUMNS, rows)

    def _select(self, statement: str) -> Answer:
        value = statement.split(None, 1)[1:]
        if not value or not value[0].rstrip("; \n").isdigit():
            raise StatementError("0A000", "the index service selects numbers only: SELECT 1")
        return Answer([Column("?column?", _INT4)], [[value[0].rstrip("; \n")]])

    def _set(self, statement: str) -> Answer:
        # What libpq says where the database's encoding is another one.
        words = statement.replace("=", " ").replace("'", " ").upper().rstrip("; \n").split()
        if len(words) < 3 or words[1] != "CLIENT_ENCODING" or words[-1] not in ("UTF8", "UTF-8"):
            raise StatementError("0A000", "the index service speaks UTF-8 and has no settings")
        return Answer([], [], "SET")
