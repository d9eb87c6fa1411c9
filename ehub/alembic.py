"""Spaces and attached columns in an application's own Alembic migrations.

Once it is imported, in ``env.py``, migrations have ``op.create_embedding_space``,
``op.drop_embedding_space``, ``op.attach_embedding_index`` and ``op.detach_embedding_index``,
online and with ``--sql``. Autogenerate knows the types ``vector`` and ``halfvec`` then, and passes
over what is ehub's:

>>> context.configure(..., include_schemas=True, include_name=ehub.alembic.include_name)

The tables of ehub itself are for ``ehub migrate``, which comes before migrations that use these.
"""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, Operations
from sqlalchemy import Float, Integer, String, TextClause, bindparam, text
from sqlalchemy.dialects.postgresql.base import ischema_names

from ehub.models import HalfvecType, VectorType
from ehub.types import Metric

_SCHEMAS = {"ehub", "ehub_data", "ehub_dblink", "spaces"}

# pgvector's own package says better what they are, before this or after it.
ischema_names.setdefault("vector", VectorType)
ischema_names.setdefault("halfvec", HalfvecType)


def include_name(name: str | None, type_: str, parent_names: object = None) -> bool:
    """Return whether autogenerate should look at something: not at the schemas that are ehub's.

    For ``context.configure(include_name=…)``; in a function of your own, ask this one too.
    """
    return type_ != "schema" or name not in _SCHEMAS


@Operations.register_operation("create_embedding_space")
class CreateEmbeddingSpaceOp(MigrateOperation):
    """Make a space, as ``ehub.create_space`` does."""

    called = "create_embedding_space"

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.options = options

    @classmethod
    def create_embedding_space(
        cls,
        operations: Operations,
        name: str,
        *,
        dims: int,
        metric: Metric | None = None,
        partition_by: str | None = None,
        M: int | None = None,
        ef_construction: int | None = None,
        target_recall: float | None = None,
    ) -> None:
        """Make a space; what is not said is as for :meth:`ehub.Hub.create_space`."""
        operations.invoke(
            cls(
                name,
                dims=dims,
                metric=metric,
                partition_by=partition_by,
                M=M,
                ef_construction=ef_construction,
                target_recall=target_recall,
            )
        )

    def reverse(self) -> DropEmbeddingSpaceOp:
        """Return the operation that deletes the space."""
        return DropEmbeddingSpaceOp(self.name, self)


@Operations.register_operation("drop_embedding_space")
class DropEmbeddingSpaceOp(MigrateOperation):
    """Delete a space with its rows, as ``ehub.delete_space`` does."""

    called = "drop_embedding_space"

    def __init__(self, name: str, reverse: CreateEmbeddingSpaceOp | None = None) -> None:
        self.name = name
        self._reverse = reverse

    @classmethod
    def drop_embedding_space(cls, operations: Operations, name: str) -> None:
        """Delete a space, with its rows."""
        operations.invoke(cls(name))

    def reverse(self) -> CreateEmbeddingSpaceOp:
        """Return the operation that made the space.

        Raises:
            ValueError: this one was not made from that, and knows nothing of its dims.
        """
        if self._reverse is None:
            raise ValueError(f"what space {self.name!r} was like is not known: cannot be reversed")
        return self._reverse


@Operations.register_operation("attach_embedding_index")
class AttachEmbeddingIndexOp(MigrateOperation):
    """Attach a column of a table as a space, as ``ehub.attach`` does."""

    called = "attach_embedding_index"

    def __init__(self, table_name: str, column_name: str, **options: Any) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.options = options

    @classmethod
    def attach_embedding_index(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        metric: Metric | None = None,
        name: str | None = None,
        schema: str | None = None,
        dims: int | None = None,
        M: int | None = None,
        ef_construction: int | None = None,
        target_recall: float | None = None,
    ) -> None:
        """Attach a column; what is not said is as for :meth:`ehub.Hub.attach`."""
        operations.invoke(
            cls(
                table_name,
                column_name,
                metric=metric,
                name=name,
                schema=schema,
                dims=dims,
                M=M,
                ef_construction=ef_construction,
                target_recall=target_recall,
            )
        )

    def reverse(self) -> DetachEmbeddingIndexOp:
        """Return the operation that detaches the column."""
        named = {key: self.options.get(key) for key in ("metric", "name", "schema")}
        return DetachEmbeddingIndexOp(self.table_name, self.column_name, self, **named)


@Operations.register_operation("detach_embedding_index")
class DetachEmbeddingIndexOp(MigrateOperation):
    """Detach a column, as ``ehub.detach`` does: the space is gone, the table stays as it is."""

    called = "detach_embedding_index"

    def __init__(
        self,
        table_name: str,
        column_name: str | None = None,
        reverse: AttachEmbeddingIndexOp | None = None,
        **options: Any,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self._reverse = reverse
        self.options = options

    @classmethod
    def detach_embedding_index(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str | None = None,
        *,
        metric: Metric | None = None,
        name: str | None = None,
        schema: str | None = None,
    ) -> None:
        """Detach what ``attach_embedding_index`` has attached with the same arguments.

        The space is the one with that ``name``; or that of the column, where the ``metric`` says
        which, if there are several; or, of a table alone, the one that is called like the table.
        """
        operations.invoke(cls(table_name, column_name, metric=metric, name=name, schema=schema))

    def reverse(self) -> AttachEmbeddingIndexOp:
        """Return the operation that attaches the column again.

        Raises:
            ValueError: the column is not known.
        """
        if self._reverse is not None:
            return self._reverse
        if self.column_name is None:
            raise ValueError(
                f"the column of {self.table_name!r} is not known: cannot be reversed without it"
            )
        return AttachEmbeddingIndexOp(self.table_name, self.column_name, **self.options)


@Operations.implementation_for(CreateEmbeddingSpaceOp)
def _create_space(operations: Operations, operation: CreateEmbeddingSpaceOp) -> None:
    operations.execute(_call("create_space", {"name": operation.name}, operation.options))


@Operations.implementation_for(DropEmbeddingSpaceOp)
def _drop_space(operations: Operations, operation: DropEmbeddingSpaceOp) -> None:
    operations.execute(_call("delete_space", {"name": operation.name}))


@Operations.implementation_for(AttachEmbeddingIndexOp)
def _attach(operations: Operations, operation: AttachEmbeddingIndexOp) -> None:
    options = {key: value for key, value in operation.options.items() if key != "schema"}
    given = {"relation": _relation(operations, operation), "column": operation.column_name}
    operations.execute(_call("attach", given, options))


@Operations.implementation_for(DetachEmbeddingIndexOp)
def _detach(operations: Operations, operation: DetachEmbeddingIndexOp) -> None:
    name = operation.options.get("name")
    if name is None and operation.column_name is not None:
        given = {"relation": _relation(operations, operation), "column": operation.column_name}
        options = {"metric": operation.options.get("metric")}
        operations.execute(_call("space_of", given, options, "SELECT ehub.detach({})"))
    else:
        given = {"name": operation.table_name if name is None else name}
        operations.execute(_call("detach", given))


def _call(
    function: str,
    given: dict[str, Any],
    options: dict[str, Any] | None = None,
    statement: str = "SELECT {}",
) -> TextClause:
    """Return a statement that calls a function of ehub's, with the options that are set."""
    types = {str: String, int: Integer, float: Float}
    named = {key.lower(): value for key, value in (options or {}).items() if value is not None}
    parts = ["CAST(:relation AS regclass)" if key == "relation" else f":{key}" for key in given]
    parts += [f"{key} => :{key}" for key in named]
    call = f"ehub.{function}({', '.join(parts)})"
    return text(statement.format(call)).bindparams(
        *(
            bindparam(key, value, type_=types.get(type(value), String))
            for key, value in {**given, **named}.items()
        )
    )


def _relation(
    operations: Operations, operation: AttachEmbeddingIndexOp | DetachEmbeddingIndexOp
) -> str:
    """Return the name of the table as SQL writes it; one with a dot is that already."""
    if operation.options.get("schema") is None and "." in operation.table_name:
        return operation.table_name
    quote = operations.get_context().dialect.identifier_preparer.quote
    schema = operation.options.get("schema")
    names = [operation.table_name] if schema is None else [schema, operation.table_name]
    return ".".join(quote(name) for name in names)


@renderers.dispatch_for(CreateEmbeddingSpaceOp)
@renderers.dispatch_for(DropEmbeddingSpaceOp)
@renderers.dispatch_for(AttachEmbeddingIndexOp)
@renderers.dispatch_for(DetachEmbeddingIndexOp)
def _render(context: AutogenContext, operation: Any) -> str:
    context.imports.add("import ehub.alembic")
    given = vars(operation)
    shown = [
        repr(given[key])
        for key in ("name", "table_name", "column_name")
        if given.get(key) is not None
    ]
    shown += [
        f"{key}={value!r}" for key, value in given.get("options", {}).items() if value is not None
    ]
    return f"op.{operation.called}({', '.join(shown)})"
