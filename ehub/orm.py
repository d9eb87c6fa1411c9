"""Nearest neighbours in SQLAlchemy, with an application's own models.

>>> nearest = ehub.orm.nearest(Document.embedding, query, k=10)
>>> session.execute(select(Document, nearest.distance).join(nearest).order_by(nearest.distance))

The column is one that was attached (``ehub attach``, :meth:`Hub.attach` or ``ehub.attach`` in SQL).
All of it is one statement, which the index answers as it answers ``ehub.nearest``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, SupportsIndex, cast, get_args

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    ColumnExpressionArgument,
    Float,
    ForeignKey,
    Integer,
    Select,
    String,
    Subquery,
    Table,
    Text,
    TypeDecorator,
    and_,
    case,
    func,
    literal,
    literal_column,
    null,
    select,
    true,
    type_coerce,
    union_all,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ClauseElement, FromClause
from sqlalchemy.sql.elements import BindParameter, ColumnClause
from sqlalchemy.sql.selectable import (
    Alias,
    LateralFromClause,
    ScalarSelect,
    SelectBase,
    TableValuedAlias,
    TextualSelect,
)
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import NullType

from ehub import values
from ehub.condition import as_filter
from ehub.errors import InvalidValueError
from ehub.models import VectorType
from ehub.types import Metric

# Where a condition is none that the index knows, so many times k rows are looked at first, within
# limits.
_LOOKED_AT = 20
_LEAST_LOOKED_AT = 200
_MOST_LOOKED_AT = 2000


class Nearest(Subquery):
    """The k nearest rows of a table, as :func:`nearest` finds them: their keys and distances.

    A subquery that joins the table by itself, on the primary key. Its columns are in ``c`` too, by
    the name of the primary key and ``distance``; its rows are in no order.
    """

    inherit_cache = True

    @property
    def id(self) -> ColumnElement[Any]:
        """The primary key, of the type that the model gives it."""
        return cast("ColumnElement[Any]", next(iter(self.c)))

    @property
    def distance(self) -> ColumnElement[float]:
        """The distance to the query, pgvector's under the metric; smaller is nearer."""
        return cast("ColumnElement[float]", list(self.c)[1])


class _LateralNearest(Nearest, LateralFromClause):
    """The same, for each row of what is joined before it."""

    _is_lateral = True
    inherit_cache = True


@compiles(_LateralNearest)
def _compile_lateral(element: _LateralNearest, compiler: Any, **options: Any) -> str:
    return f"LATERAL {compiler.visit_subquery(element, **options, lateral=True)}"


def nearest(
    column: ColumnExpressionArgument[Any],
    query: object,
    k: SupportsIndex,
    *,
    where: ColumnExpressionArgument[bool] | None = None,
    space: str | None = None,
    metric: Metric | None = None,
) -> Nearest:
    """Find the k rows of a table that are nearest to a query, as something to join to the table.

    Args:
        column: the attached column of embeddings: ``Document.embedding``, that of an alias, or
            ``table.c.embedding``.
        query: a list, a tuple, a numpy array, a value of pgvector's, or an expression in SQL: a
            scalar subquery, a ``bindparam``, or another table's column; then it is done for each
            row of that table, which is joined before it.
        k: how many.
        where: a condition on columns of the same table, which may have subqueries: the answer is of
            the rows for which it is true, k where there are so many. Comparisons of numbers,
            booleans, strings, UUIDs and enumerations with constants the index knows; of others some
            hundreds of the nearest rows are looked at, and then the table.
        space: the name of the space, instead of the one that the column is attached as.
        metric: which, where the column is attached under several.

    Where the table occurs more than once in a statement, say which it is to be joined to:
    ``.join(nearest, nearest.id == alias.id)``.

    Raises:
        InvalidVectorError: the query is no vector.
        InvalidValueError: k is no such number, the column or condition is none of a table's with a
            primary key of one column, or the metric is none.
    """
    attached = _column(column)
    base, source = _tables(attached)
    if len(base.primary_key.columns) != 1:
        raise InvalidValueError(
            f"{base.fullname} has no primary key of one column, which tells its rows apart"
        )
    count = values.as_count(k)
    element = _element(query)
    if space is not None:
        if metric is not None:
            raise InvalidValueError("give either space= or metric=, and not both of them")
        values.as_name("a space", space)
    elif metric is not None and metric not in get_args(Metric):
        raise InvalidValueError(f"metric is 'l2', 'cosine' or 'ip', not {metric!r}")
    condition = None if where is None else _condition(where, source)
    matching, whole = (None, True) if condition is None else as_filter(condition, base)
    address = _Address(_base(attached), space, metric)
    found: SelectBase
    parameter = _parameter(query, element)
    if (condition is None or whole) and parameter is not None:
        # Most are of this kind, and are made for each search.
        call = _Call(base, address, parameter, count, matching)
        return Nearest._construct(TextualSelect(call, [*_columns(base)]))  # type: ignore[arg-type]
    vector = _vector(query, element, parameter)
    if condition is None or whole:
        found = _asked(base, address, vector, count, matching)
    else:
        found = _looked_at(base, source, attached, address, vector, count, matching, condition)
    kind = _LateralNearest if any(True for _ in _columns_of(vector)) else Nearest
    return kind._construct(_referring(found, base))


class _Call(ClauseElement):
    """The answer to ehub.nearest, as a query: the key as the table has it, and the distance.

    The same as :func:`_asked`, of one piece: that takes a fraction of the time to make and to look
    up among the statements that were compiled before.
    """

    _traverse_internals = [  # noqa: RUF012
        ("base", InternalTraversal.dp_has_cache_key),
        ("arguments", InternalTraversal.dp_clauseelement_list),
    ]

    def __init__(
        self,
        base: Table,
        address: ColumnElement[Any],
        vector: BindParameter[Any],
        k: int,
        matching: str | None,
    ) -> None:
        self.base = base
        self.arguments = [address, vector, _bind(k, _WHOLE)]
        if matching is not None:
            self.arguments.append(_bind(matching, _TEXT))


@compiles(_Call)
def _compile_call(element: _Call, compiler: Any, **options: Any) -> str:
    key, distance = _columns(element.base)
    given = [compiler.process(argument, **options) for argument in element.arguments]
    given[1] = f"CAST({given[1]} AS VECTOR)"
    if len(given) > 3:
        given[3] = f"filter => CAST({given[3]} AS JSONB)"
    quote = compiler.preparer.quote
    return (
        # Of names that are quoted, and parameters.
        f"SELECT {compiler.process(_as_key(_KEY, element.base))} AS {quote(key.name)},"  # noqa: S608
        f" distance AS {quote(distance.name)} FROM ehub.nearest({', '.join(given)})"
    )


def _bind(value: object, kind: Any) -> BindParameter[Any]:
    return BindParameter(None, value, type_=kind, unique=True)


_TEXT, _WHOLE = String(), Integer()
_KEY = literal_column("key", Text)
_columns_of_tables: weakref.WeakKeyDictionary[Table, tuple[Column[Any], Column[Any]]] = (
    weakref.WeakKeyDictionary()
)


def _columns(base: Table) -> tuple[Column[Any], Column[Any]]:
    """Return what the answer about a table has as columns; the first refers to the primary key."""
    found = _columns_of_tables.get(base)
    if found is None:
        key = _key(base)
        name = "distance" if key.name != "distance" else "distance_1"
        found = (
            Column(key.name, key.type, ForeignKey(key), key=key.key),
            Column(name, Float),
        )
        _columns_of_tables[base] = found
    return found


def _asked(
    base: Table,
    address: ColumnElement[Any],
    vector: ColumnElement[Any],
    k: int,
    matching: str | None,
) -> SelectBase:
    """Return the answer to ehub.nearest: the key as the table has it, and the distance."""
    found = _function(address, vector, k, matching)
    return select(*_named(base, _as_key(found.c.key, base), found.c.distance)).correlate(None)


def _looked_at(
    base: Table,
    source: FromClause,
    attached: ColumnElement[Any],
    address: ColumnElement[Any],
    vector: ColumnElement[Any],
    k: int,
    matching: str | None,
    condition: ColumnElement[bool],
) -> SelectBase:
    """Return the nearest rows for which a condition is true.

    They are those among more of the nearest rows, where these are k; else all rows are compared.
    """
    key = source.c[_key(base).key]
    more = max(k, min(_LOOKED_AT * k, _MOST_LOOKED_AT), _LEAST_LOOKED_AT)
    found = _function(address, vector, more, matching)
    near = (
        select(*_named(base, key, found.c.distance))
        .select_from(source)
        .join(found, _as_key(found.c.key, base) == key)
        .where(condition)
        .order_by(found.c.distance)
        .limit(_number(k))
        .correlate(None)
        .cte(nesting=True)
    )
    enough = select(func.count()).select_from(near).scalar_subquery() >= _number(k)
    # In FROM, where the table that a query comes from is not named once more.
    given = (
        func.unnest(postgresql.array([vector], type_=VectorType()))
        .table_valued(Column("query", VectorType()))
        .render_derived()
    )
    target = func.ehub.require_space(address).table_valued(Column("metric", Text))
    compared = (
        select(*_named(base, key, _distance(attached, given.c.query, target.c.metric)))
        .select_from(source)
        .join(given, true())
        .join(target, true())
        .where(condition, ~enough)
        .correlate(None)
        .subquery()
    )
    there, distance = compared.c
    exact = (
        select(there, distance)
        # Not of rows without an embedding, or with one that has no distance.
        .where(distance < literal_column("'NaN'"))
        .order_by(distance, there)
        .limit(_number(k))
        .subquery()
    )
    return union_all(select(*near.c).where(enough), select(*exact.c))


def _named(
    base: Table, key: ColumnElement[Any], distance: ColumnElement[Any]
) -> list[ColumnElement[Any]]:
    name = _key(base).name
    return [key.label(name), distance.label("distance" if name != "distance" else "distance_1")]


def _referring(found: SelectBase, base: Table) -> Select[Any]:
    """Return the same with a first column that refers to the primary key, for joins to find it."""
    inner = found.subquery()
    key = _key(base)
    # Columns of no table are just names; those of a subquery cannot be made to refer to anything.
    return select(
        Column(key.name, key.type, ForeignKey(key), key=key.key),
        Column(list(inner.c)[1].name, Float),
    ).select_from(inner)


def _function(
    address: ColumnElement[Any], vector: ColumnElement[Any], k: int, matching: str | None
) -> TableValuedAlias:
    arguments = [address, vector, _number(k)]
    if matching is not None:
        arguments += [null(), sql_cast(literal(matching, String), postgresql.JSONB)]
    function = func.ehub.nearest(*arguments)
    return function.table_valued(Column("key", Text), Column("distance", Float))


def _distance(
    column: ColumnElement[Any], query: ColumnElement[Any], metric: ColumnElement[Any]
) -> ColumnElement[Any]:
    """Return the distance under a metric; NULL where the dims are not those of the query."""
    embedding = sql_cast(column, VectorType())

    def under(operator: str) -> ColumnElement[Any]:
        return embedding.op(operator, return_type=Float())(query)

    return case(
        (func.vector_dims(embedding) != func.vector_dims(query), null()),
        (metric == "l2", under("<->")),
        (metric == "cosine", under("<=>")),
        else_=under("<#>"),
    )


def _number(k: int) -> BindParameter[int]:
    return literal(k, Integer)


def _parameter(query: object, element: ClauseElement | None) -> BindParameter[Any] | None:
    """Return the query as a parameter of the statement, None where it is another expression."""
    if element is None:
        return _bind(values.as_vector_text(query, "query"), _TEXT)
    if not isinstance(element, BindParameter):
        return None
    if isinstance(element.type, NullType):
        return cast("BindParameter[Any]", type_coerce(element, _VectorText()))
    return element


def _vector(
    query: object, element: ClauseElement | None, parameter: BindParameter[Any] | None
) -> ColumnElement[Any]:
    """Return the query as an expression of pgvector's type ``vector``."""
    if parameter is not None:
        return sql_cast(parameter, VectorType())
    if isinstance(element, SelectBase):
        element = element.scalar_subquery()
    if not isinstance(element, ColumnElement):
        raise InvalidValueError(f"query: an expression of one value is needed, not {query!r}")
    return sql_cast(element, VectorType())


class _VectorText(TypeDecorator[Any]):
    """A vector that comes when the statement is executed, sent as text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: object, dialect: object) -> str | None:
        return None if value is None else values.as_vector_text(value, "query")


class _Address(ColumnElement[str]):
    """What a space goes by: its name, or the column that it is attached to, and the metric."""

    type = String()
    _traverse_internals = [  # noqa: RUF012
        ("column", InternalTraversal.dp_clauseelement),
        ("space", InternalTraversal.dp_clauseelement),
        ("metric", InternalTraversal.dp_string),
    ]

    def __init__(self, column: Column[Any], space: str | None, metric: str | None) -> None:
        self.column = column
        self.space = None if space is None else _bind(space, _TEXT)
        self.metric = metric


@compiles(_Address)
def _compile_address(element: _Address, compiler: Any, **options: Any) -> str:
    if element.space is not None:
        return str(compiler.process(element.space, **options))
    # Quoted as no name is, for a schema may be put there later.
    table = compiler.preparer.format_table(element.column.table)
    named = [element.column.name, *([] if element.metric is None else [element.metric])]
    texts = [compiler.render_literal_value(name, _TEXT) for name in named]
    return f"ehub.space_of(CAST($ehub${table}$ehub$ AS regclass), {', '.join(texts)})"


def _element(argument: object) -> ClauseElement | None:
    """Return the expression that something stands for, None for a plain value."""
    while not isinstance(argument, ClauseElement):
        if not hasattr(argument, "__clause_element__"):
            return None
        argument = argument.__clause_element__()
    return argument


def _column(column: object) -> ColumnClause[Any]:
    element = _element(column)
    if not isinstance(element, ColumnClause):
        raise InvalidValueError(
            f"a column of a table is needed, like Document.embedding, not {column!r}"
        )
    return element


def _base(column: ColumnClause[Any]) -> Column[Any]:
    """Return the column of a table that a column is, or that an alias has from there."""
    bases = [base for base in column.base_columns if isinstance(base, Column)]
    if len(bases) != 1 or not isinstance(bases[0].table, Table):
        raise InvalidValueError(f"a column of a table is needed, not {column}")
    return bases[0]


def _tables(column: ColumnClause[Any]) -> tuple[Table, FromClause]:
    """Return the table that has a column, and the table or alias that the column is taken from."""
    base = _base(column).table
    source = column.table
    direct = isinstance(source, Alias) and isinstance(source.element, Table)
    return base, source if direct and source is not None else base


def _key(base: Table) -> Column[Any]:
    return next(iter(base.primary_key.columns))


def _as_key(key: ColumnElement[str], base: Table) -> ColumnElement[Any]:
    """Return a key, which is text, as the table's primary key."""
    kind = _key(base).type
    stored: Any = kind
    if isinstance(kind, TypeDecorator):
        stored = kind.load_dialect_impl(postgresql.dialect())  # type: ignore[no-untyped-call]
    # A cast would cut off what is longer than the model says.
    return type_coerce(key, kind) if isinstance(stored, String) else sql_cast(key, kind)


def _condition(where: object, source: FromClause) -> ColumnElement[bool]:
    condition = _element(where)
    if not isinstance(condition, ColumnElement):
        raise InvalidValueError(f"where= is a condition, like Document.lang == 'en', not {where!r}")
    if isinstance(condition, ColumnClause) and not isinstance(condition.type, Boolean | NullType):
        raise InvalidValueError(f"where= is a condition, {condition} is of type {condition.type}")
    for column in _columns_of(condition):
        if not source.c.contains_column(column):
            raise InvalidValueError(
                f"where= is about columns of {source.description}, {column} is none:"
                " a subquery can look at other tables"
            )
    return and_(condition)


def _columns_of(expression: ClauseElement) -> Iterator[ColumnClause[Any]]:
    """Yield the columns of tables in an expression, but not those inside of subqueries."""
    if isinstance(expression, SelectBase | ScalarSelect | FromClause):
        return
    if isinstance(expression, ColumnClause):
        if expression.table is not None:
            yield expression
        return
    for child in expression.get_children():
        yield from _columns_of(child)
