"""What the service answers: candidates for Postgres, and its state for whoever looks."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ehub.index import PartitionedIndex, Proposed
from ehub.replica import LEAST_NEAR, Copy, Replica, Stamp, rows_near
from ehub.service.link import Candidates, Question
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


def _parse(statement: str) -> tuple[str, Question]:
    """Read ``CANDIDATES nonce state index n k ef filter partition queries``, the nonce apart.

    As ``ehub.candidates`` writes it: what may be missing is ``-``, or ``x`` and hexadecimal digits;
    queries are what ``vector_send`` writes, in hexadecimal digits.
    """
    fields = statement.split(" ", _FIELDS - 1)
    if len(fields) != _FIELDS:
        raise StatementError(
            "42601",
            f"CANDIDATES has {_FIELDS - 1} fields, like those that ehub.candidates sends",
        )
    _, nonce, state, index_id, n, k, ef, wanted, partition, queries = fields
    try:
        count = int(n)
        asked = Question(
            *(state, int(index_id), int(k), int(ef)),
            *(_optional(wanted), _optional(partition)),
            _matrix(queries, count) if count > 0 else np.empty((0, 0), np.float32),
        )
    except ValueError as error:
        raise StatementError("42601", f"CANDIDATES: {error}") from None
    if count < 1 or asked.k < 1 or asked.ef < 0:
        raise StatementError("22023", "CANDIDATES: n and k are positive, ef is not negative")
    return nonce, asked


def _matrix(digits: str, n: int) -> Matrix:
    """Read what ``vector_send`` wrote of ``n`` vectors: float32 of shape ``(n, dims)``."""
    data = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if len(data) % n or len(data) // n < 8 or len(data) // n % 4:
        raise ValueError(f"{n} vectors are needed")
    rows = data.reshape(n, -1)[:, 4:]
    return np.ascontiguousarray(rows).view(">f4").astype(np.float32)


def _optional(field: str) -> str | None:
    return None if field == "-" else bytes.fromhex(field.removeprefix("x")).decode()


def _near(asked: Question) -> int:
    """Return how many rows are asked of an index that does not know which match."""
    # Whoever asks for so many has found too few among fewer.
    if asked.filter is None or asked.k >= LEAST_NEAR:
        return asked.k
    return rows_near(asked.k)


def _is_all(found: Proposed, asked: int) -> bool:
    """Whether no row is left that was not found."""
    return all(len(keys) < asked for keys in found.keys)


class Answers:
    """Answers the statements that come through the door."""

    def __init__(self, replica: Replica, metrics: Metrics) -> None:
        self._replica, self._metrics = replica, metrics

    def __call__(self, statement: str) -> Answer:
        """Answer a statement; raises StatementError for one that is not understood."""
        word = statement.split(None, 1)[0].rstrip(";").upper()
        if word == "CANDIDATES":
            return self._candidates(statement)
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

    def _candidates(self, statement: str) -> Answer:
        nonce, asked = _parse(statement)
        found = self.candidates(asked)
        if isinstance(found, str):
            return Answer(_COLUMNS, [[nonce, found, *[None] * 5]])
        counts = "{" + ",".join([str(len(keys)) for keys in found.keys]) + "}"
        keys = array([key for keys in found.keys for key in keys])
        row = [nonce, None, found.watermark, counts, keys, found.described()]
        return Answer(_COLUMNS, [[*row, "t" if found.matching else "f"]])

    def candidates(self, asked: Question) -> Candidates | str:
        """Return what the index proposes; or why it proposes nothing."""
        started = time.perf_counter()
        found = self._propose(asked)
        reason = found if isinstance(found, str) else None
        self._metrics.answered(len(asked.queries), time.perf_counter() - started, reason)
        return found

    def _propose(self, asked: Question) -> Candidates | str:
        copy = self._copy(asked.index_id)
        if copy is None:
            return "the service has no such index yet"
        index = copy.index
        if index is None or index.as_of is None:
            return f"it is {copy.state}"
        queries = asked.queries
        n, dims = queries.shape
        if n * asked.k > _MOST and n * len(index) > _MOST:
            return f"more than {_MOST} keys are asked for"
        if dims != index.dims:
            return f"it is of {index.dims} dims, and the query has {dims}"
        found = None
        matching = True
        if isinstance(index, PartitionedIndex):
            near = _near(asked)
            found = index.propose(queries, near, asked.ef, asked.partition)
            # All that there are, or those that are near.
            matching = asked.filter is None or (found is not None and _is_all(found, near))
        elif asked.partition is not None:
            return "it is not kept by partitions"
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
            return "parts of its graph cannot be reached; it is built anew"
        stamp = found.as_of
        if not isinstance(stamp, Stamp) or asked.state not in (
            stamp.state,
            f"{stamp.state}/{stamp.shape}",
        ):
            copy.doubt()
            return "it follows another life of this database, or of this table"
        return Candidates(found.keys, str(stamp.watermark), found.plan, matching)

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
