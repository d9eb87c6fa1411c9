"""Averages of embeddings, computed by Postgres, and the spaces that keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from ehub import values
from ehub.binary import decode_vector
from ehub.database import Database
from ehub.errors import InvalidValueError
from ehub.types import Metadata, Vector

FieldValue: TypeAlias = str | int | float | bool
"""What a field of metadata can be for averages: a scalar."""


class KeptAverage(NamedTuple):
    """A space of averages.

    Attributes:
        space: its name.
        source: the space whose rows it follows.
        by: the field whose values are its keys.
        weight: the field of the weights, None where all rows weigh the same.
    """

    space: str
    source: str
    by: str
    weight: str | None


def average(
    database: Database,
    address: str,
    keys: Iterable[str] | None,
    weights: Iterable[float] | None,
    filter: Metadata | None,  # noqa: A002 - the word for it
) -> Vector | None:
    """Return the average of some rows of a space or version; None where there are no rows."""
    wanted = None if keys is None else values.as_keys(keys)
    numbers = None
    if weights is not None:
        if isinstance(weights, Mapping | str | bytes) or not isinstance(weights, Iterable):
            raise InvalidValueError(f"weights are a list, one for each key, not {weights!r:.60}")
        numbers = [values.as_number("a weight", weight) for weight in weights]
    with database.connection(address) as connection:
        row = connection.execute(
            "SELECT ehub.average(%s, %s::text[], %s::float8[], %s::jsonb)",
            [address, wanted, numbers, values.as_filter(filter)],
            binary=True,
        ).fetchone()
    return None if row is None or row[0] is None else decode_vector(row[0])


def averages(
    database: Database,
    address: str,
    by: str,
    weight: str | None,
    filter: Metadata | None,  # noqa: A002 - the word for it
) -> dict[FieldValue, Vector]:
    """Return the averages of the rows of a space or version, by the values of a field."""
    fields = [as_field("by", by), None if weight is None else as_field("weight", weight)]
    found: dict[FieldValue, Vector] = {}
    with database.connection(address) as connection:
        rows = connection.execute(
            "SELECT value, average FROM ehub.averages(%s, %s, %s, %s::jsonb)",
            [address, *fields, values.as_filter(filter)],
            binary=True,
        )
        for value, data in rows:
            if value in found:
                raise InvalidValueError(
                    f"space {address!r}: {value!r} and another value of {by!r} are one key of a"
                    " dict; ehub.averages in SQL tells them apart"
                )
            found[value] = decode_vector(data)
    return found


def kept_averages(database: Database) -> list[KeptAverage]:
    """Return the spaces of averages that one may read, by name."""
    with database.connection() as connection:
        rows = connection.execute("SELECT space, source, by, weight FROM ehub.kept_averages")
        return [KeptAverage(*row) for row in rows]


def as_field(what: str, field: object) -> str:
    """Return the name of a field if it is a string that Postgres can read, and check.

    Raises:
        InvalidValueError: it is not; ``what`` says what the field is for.
    """
    if not isinstance(field, str) or "\0" in field:
        raise InvalidValueError(f"{what} is the name of a field of metadata, not {field!r:.60}")
    return field
