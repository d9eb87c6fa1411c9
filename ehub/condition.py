"""SQLAlchemy conditions as ehub's filters, where the two surely mean the same.

A condition in SQL is true, false or unknown, a filter is never unknown. So each part becomes two
filters: of the rows for which it is true, and of those for which it is false; what is in neither is
unknown, as NULL is in SQL. The types of columns are believed as the model has them.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias, cast

from sqlalchemy import Table, types
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    False_,
    Grouping,
    Null,
    True_,
    UnaryExpression,
)

Filter: TypeAlias = dict[str, Any]

_ALL: Filter = {"and": []}
_NONE: Filter = {"or": []}

# What Postgres allows of a filter is more: filters that long are for nobody.
_MAX_BYTES = 50_000
_MAX_DEPTH = 25

# Just these classes: what is derived from them may compare in its own way, like CITEXT and CHAR.
_INTEGERS = {
    types.SmallInteger: 2**15,
    types.SMALLINT: 2**15,
    types.Integer: 2**31,
    types.INTEGER: 2**31,
    types.BigInteger: 2**63,
    types.BIGINT: 2**63,
}
_FLOATS = {types.Float, types.FLOAT, types.Double, types.DOUBLE, types.DOUBLE_PRECISION}
_NUMERICS = {types.Numeric, types.NUMERIC, types.DECIMAL}
_BOOLEANS = {types.Boolean, types.BOOLEAN}
_STRINGS = {
    *(types.String, types.VARCHAR, types.Text, types.TEXT),
    *(types.Unicode, types.UnicodeText),
}
_UUIDS = {types.Uuid, types.UUID}
_ENUMS = {types.Enum, postgresql.ENUM}

# Infinity and NaN, which JSON has as strings: Postgres' order puts them before and behind numbers.
_BEFORE = ["-Infinity"]
_BEHIND = ["Infinity", "NaN"]

_NEGATED: dict[Any, Callable[..., Any]] = {
    operators.ne: operators.eq,
    operators.not_in_op: operators.in_op,
    operators.is_not: operators.is_,
    operators.not_between_op: operators.between_op,
}
_COMPARISONS: dict[Any, tuple[str, str]] = {
    operators.lt: ("<", ">="),
    operators.le: ("<=", ">"),
    operators.gt: (">", "<="),
    operators.ge: (">=", "<"),
}


class _Pair(NamedTuple):
    """The rows for which a condition is true, and those for which it is false."""

    yes: Filter
    no: Filter


class _UnsureError(Exception):
    """The condition has no filter that surely means the same."""


def as_filter(where: ColumnElement[bool], table: Table) -> tuple[str | None, bool]:
    """Return what a condition on a table's columns means as a filter, and whether all of it.

    The filter is JSON, or None where there is nothing that it can say. If it is not all of the
    condition, it is of the parts that it can say of those that all have to hold.
    """
    parts = []
    rest = False
    for part in _conjuncts(where):
        try:
            pair = _pair(part, table, 1)
            _write(pair.yes)
        except _UnsureError:
            rest = True
        else:
            parts.append(pair.yes)
    if not parts:
        return None, False
    try:
        return _write(parts[0] if len(parts) == 1 else {"and": parts}), not rest
    except _UnsureError:
        return None, False


def _conjuncts(where: Any) -> list[ClauseElement]:
    if isinstance(where, Grouping):
        return _conjuncts(where.element)
    if isinstance(where, BooleanClauseList) and where.operator is operators.and_:
        return [part for clause in where.clauses for part in _conjuncts(clause)]
    return [where]


def _pair(where: Any, table: Table, depth: int) -> _Pair:
    if depth > _MAX_DEPTH:
        raise _UnsureError
    if isinstance(where, Grouping):
        return _pair(where.element, table, depth)
    if isinstance(where, True_):
        return _Pair(_ALL, _NONE)
    if isinstance(where, False_):
        return _Pair(_NONE, _ALL)
    if isinstance(where, BooleanClauseList):
        pairs = [_pair(clause, table, depth + 1) for clause in where.clauses]
        yes, no = [pair.yes for pair in pairs], [pair.no for pair in pairs]
        if where.operator is operators.and_:
            return _Pair({"and": yes}, {"or": no})
        return _Pair({"or": yes}, {"and": no})
    if isinstance(where, ColumnClause):
        field, kind = _field(where, table)
        if type(kind) not in _BOOLEANS:
            raise _UnsureError
        return _Pair({field: True}, {field: False})
    if isinstance(where, UnaryExpression):
        pair = _pair(where.element, table, depth + 1)
        if where.operator is operators.is_true:
            return pair
        if where.operator in (operators.inv, operators.is_false):
            return _Pair(pair.no, pair.yes)
        raise _UnsureError
    if isinstance(where, BinaryExpression):
        if where.operator in _NEGATED:
            pair = _binary(where, _NEGATED[where.operator], table)
            return _Pair(pair.no, pair.yes)
        return _binary(where, where.operator, table)
    raise _UnsureError


def _binary(where: BinaryExpression[Any], operator: Any, table: Table) -> _Pair:
    field, kind = _field(where.left, table)
    right = _ungrouped(where.right)
    if operator is operators.is_:
        return _is(field, kind, right)
    if operator is operators.eq:
        return _one_of(field, [_value(kind, right)])
    if operator is operators.in_op:
        if not isinstance(right, BindParameter) or not right.expanding:
            raise _UnsureError
        return _one_of(field, [_plain(kind, right.type, value) for value in _constant(right)])
    if operator is operators.between_op:
        if (where.modifiers or {}).get("symmetric"):
            raise _UnsureError
        low, high = (_value(kind, _ungrouped(bound)) for bound in right.get_children())
        above, below = _compared(field, kind, ">=", low), _compared(field, kind, "<=", high)
        return _Pair({"and": [above.yes, below.yes]}, {"or": [above.no, below.no]})
    if operator in _COMPARISONS:
        return _compared(field, kind, _COMPARISONS[operator][0], _value(kind, right))
    raise _UnsureError


def _one_of(field: str, values: Sequence[object]) -> _Pair:
    if not values:
        # Also for NULL.
        return _Pair(_NONE, _ALL)
    wanted: object = values[0] if len(values) == 1 else {"in": list(values)}
    return _Pair({field: wanted}, {field: {"not in": [*values, None]}})


def _is(field: str, kind: Any, right: ClauseElement) -> _Pair:
    value: bool | None
    if isinstance(right, Null):
        value = None
    elif isinstance(right, True_ | False_) and type(kind) in _BOOLEANS:
        value = isinstance(right, True_)
    else:
        raise _UnsureError
    return _Pair({field: value}, {field: {"!=": value}})


def _compared(field: str, kind: Any, operator: str, value: object) -> _Pair:
    if type(kind) not in {*_INTEGERS, *_FLOATS, *_NUMERICS}:
        # The order of strings is that of a collation, the order of times is not that of their text.
        raise _UnsureError

    def compared(operator: str) -> Filter:
        inside = {field: {operator: value}}
        if type(kind) in _INTEGERS:
            return inside
        outside = _BEFORE if operator.startswith("<") else _BEHIND
        return {"or": [inside, {field: {"in": outside}}]}

    opposite = dict(_COMPARISONS.values())[operator]
    return _Pair(compared(operator), compared(opposite))


def _field(column: ClauseElement, table: Table) -> tuple[str, Any]:
    """Return what a filter calls a column of the table, and its type."""
    column = _ungrouped(column)
    if not isinstance(column, ColumnClause):
        raise _UnsureError
    bases = [base for base in column.base_columns if table.c.contains_column(base)]
    if len(bases) != 1:
        raise _UnsureError
    kind = column.type
    if "postgresql" in getattr(kind, "_variant_mapping", ()):
        raise _UnsureError
    name = str(bases[0].name).replace("\\", "\\\\").replace(".", "\\.")
    return ("\\" + name if name in ("and", "or", "not") else name), kind


def _value(kind: Any, right: ClauseElement) -> object:
    if isinstance(right, True_ | False_):
        if type(kind) not in _BOOLEANS:
            raise _UnsureError
        return isinstance(right, True_)
    if not isinstance(right, BindParameter) or right.expanding:
        raise _UnsureError
    return _plain(kind, right.type, _constant(right))


def _constant(parameter: BindParameter[Any]) -> Any:
    """Return a value that no execution changes."""
    if not parameter.unique or parameter.required or parameter.callable is not None:
        raise _UnsureError
    return parameter.value


def _plain(kind: Any, sent_as: Any, value: Any) -> object:
    """Return a value as JSON has it in a column of a type, if it is the same as it is sent."""
    _as_type(sent_as, value)
    return _as_type(kind, value)


def _as_type(kind: Any, value: Any) -> object:
    what = type(kind)
    if what in _INTEGERS and type(value) is int and -_INTEGERS[what] <= value < _INTEGERS[what]:
        return value
    if what in _FLOATS and (kind.precision is None or kind.precision > 24):
        # Not those of four bytes, which have other digits in JSON.
        if type(value) is int and abs(value) <= 2**53:
            return value
        if type(value) is float and math.isfinite(value):
            return value
    if what in _NUMERICS:
        if type(value) in (int, Decimal) and _fits(Decimal(value), kind):
            return value
        # A float is compared as one, which is the same up to so many digits.
        if type(value) is float and (kind.precision or 99) <= 15:
            exact = Decimal(repr(value))
            if _fits(exact, kind) and len(exact.as_tuple().digits) <= 15:
                return exact
    if what in _BOOLEANS and type(value) is bool:
        return value
    if what in _STRINGS and kind.collation is None and type(value) is str and _is_text(value):
        return value
    if what in _UUIDS and getattr(kind, "native_uuid", True) and type(value) is uuid.UUID:
        return str(value)
    if what in _ENUMS and value is not None:
        process = kind.bind_processor(postgresql.dialect())  # type: ignore[no-untyped-call]
        label = value if process is None else process(value)
        if type(label) is str and _is_text(label):
            return label
    raise _UnsureError


def _fits(value: Decimal, kind: Any) -> bool:
    """Whether a value is sent with all of its digits."""
    if not value.is_finite():
        return False
    _, digits, exponent = value.as_tuple()
    decimals = max(-int(exponent), 0)
    whole = len(digits) + int(exponent)
    return (kind.scale is None or decimals <= kind.scale) and (
        kind.precision is None or whole <= kind.precision - (kind.scale or 0)
    )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _ungrouped(element: Any) -> ClauseElement:
    while isinstance(element, Grouping):
        element = element.element
    return cast("ClauseElement", element)


def _write(wanted: Filter) -> str:
    text = _json(wanted)
    if len(text.encode()) > _MAX_BYTES:
        raise _UnsureError
    return text


def _json(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    if isinstance(value, Decimal):
        # As digits: a float would have others.
        return format(value, "f")
    return json.dumps(value, ensure_ascii=False)
