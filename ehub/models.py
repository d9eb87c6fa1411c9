"""SQLAlchemy models of schema ``ehub``: what Alembic migrates and an ORM may read.

Rows are written by the functions in ``sql/`` alone.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION, INET, JSONB, OID, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import UserDefinedType


class PgSnapshot(UserDefinedType[str]):
    """Postgres' ``pg_snapshot``, as its text."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "pg_snapshot"


class Xid8(UserDefinedType[int]):
    """Postgres' 64-bit transaction id, as its text."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "xid8"


class RegRole(UserDefinedType[str]):
    """Postgres' ``regrole``: the name of a role, kept as its oid."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "regrole"


class RegClass(UserDefinedType[str]):
    """Postgres' ``regclass``: the name of a table, kept as its oid."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "regclass"


class VectorType(UserDefinedType[Any]):
    """pgvector's ``vector``, as its text: for those who have pgvector's own package or not."""

    cache_ok = True

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "VECTOR" if self.dim is None else f"VECTOR({self.dim})"


class HalfvecType(UserDefinedType[Any]):
    """pgvector's ``halfvec``, as its text."""

    cache_ok = True

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def get_col_spec(self, **_: object) -> str:
        """Name the type for DDL."""
        return "HALFVEC" if self.dim is None else f"HALFVEC({self.dim})"


class Base(DeclarativeBase):
    """The base of all models of schema ``ehub``."""

    metadata = MetaData(
        schema="ehub",
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        },
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own way to say it
        int: BigInteger,
        str: Text,
        float: DOUBLE_PRECISION,
        datetime.datetime: TIMESTAMP(timezone=True),
    }


class Space(Base):
    """A named set of embeddings: what an application asks by name."""

    __tablename__ = "space"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    current_version_id: Mapped[int | None] = mapped_column(
        ForeignKey("ehub.version.id", deferrable=True, initially="DEFERRED", use_alter=True)
    )
    created_at: Mapped[datetime.datetime] = mapped_column(server_default=func.now())

    versions: Mapped[list[Version]] = relationship(
        back_populates="space", foreign_keys="Version.space_id", viewonly=True
    )


class Version(Base):
    """One generation of a space, with its own dims, metric and data table ``ehub_data.v<id>``."""

    __tablename__ = "version"
    __table_args__ = (
        UniqueConstraint("space_id", "name"),
        CheckConstraint("dims BETWEEN 1 AND 16000", "dims"),
        CheckConstraint("metric IN ('l2', 'cosine', 'ip')", "metric"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    space_id: Mapped[int] = mapped_column(ForeignKey(Space.id, ondelete="CASCADE"))
    name: Mapped[str]
    dims: Mapped[int] = mapped_column(Integer)
    metric: Mapped[str]
    created_at: Mapped[datetime.datetime] = mapped_column(server_default=func.now())
    frozen_at: Mapped[datetime.datetime | None]
    warm: Mapped[bool] = mapped_column(server_default=true())
    # The field of metadata by whose values rows are searched apart; null without partitions.
    partition_by: Mapped[str | None]

    space: Mapped[Space] = relationship(
        back_populates="versions", foreign_keys=space_id, viewonly=True
    )
    indexes: Mapped[list[SearchIndex]] = relationship(back_populates="version", viewonly=True)
    checkpoints: Mapped[list[Checkpoint]] = relationship(back_populates="version", viewonly=True)


class Promotion(Base):
    """One change of a space's current version, forward or back."""

    __tablename__ = "promotion"
    __table_args__ = (CheckConstraint("kind IN ('promote', 'rollback')", "kind"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    space_id: Mapped[int] = mapped_column(ForeignKey(Space.id, ondelete="CASCADE"))
    at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())
    by: Mapped[str] = mapped_column(server_default=text("CURRENT_USER"))
    kind: Mapped[str]
    from_version: Mapped[str]
    to_version: Mapped[str]
    # What a rollback goes back to; null once that version is dropped.
    from_version_id: Mapped[int | None] = mapped_column(ForeignKey(Version.id, ondelete="SET NULL"))
    undone: Mapped[bool] = mapped_column(server_default=false())


class Checkpoint(Base):
    """A named state of a version's rows; ids ascend in the order of the states."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("version_id", "name"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey(Version.id, ondelete="CASCADE"))
    name: Mapped[str]
    created_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())
    created_by: Mapped[str] = mapped_column(server_default=text("CURRENT_USER"))

    version: Mapped[Version] = relationship(back_populates="checkpoints", viewonly=True)


class SearchIndex(Base):
    """What an HNSW index of a version is to be like; its copies are replicas.

    Over all of its rows; or, with a ``name``, over those that match ``filter``; or, where ``rows``
    is not null, over those whose metadata contains one of these objects.
    """

    __tablename__ = "index"
    __table_args__ = (
        UniqueConstraint("version_id", "name", "rows", postgresql_nulls_not_distinct=True),
        CheckConstraint("(name IS NULL) = (filter IS NULL)", "filter"),
        CheckConstraint("m BETWEEN 2 AND 128", "m"),
        CheckConstraint("ef_construction BETWEEN 4 AND 4096", "ef_construction"),
        CheckConstraint("target_recall BETWEEN 0.5 AND 0.999", "target_recall"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey(Version.id, ondelete="CASCADE"))
    m: Mapped[int] = mapped_column(Integer)
    ef_construction: Mapped[int] = mapped_column(Integer)
    target_recall: Mapped[float]
    rows: Mapped[list[dict[str, Any]] | None] = mapped_column(ARRAY(JSONB))
    name: Mapped[str | None]
    filter: Mapped[dict[str, Any] | None] = mapped_column(JSONB)

    version: Mapped[Version] = relationship(back_populates="indexes", viewonly=True)


class Replica(Base):
    """One copy of an index in one place: what it last acknowledged and said of itself."""

    __tablename__ = "replica"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # No foreign key: whoever writes this row in a transaction that stays open would keep others
    # from dropping the index.
    index_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    role: Mapped[str] = mapped_column(server_default=text("CURRENT_USER"))
    place: Mapped[str]
    state: Mapped[str]
    watermark: Mapped[str] = mapped_column(PgSnapshot)
    nonce: Mapped[uuid.UUID]
    acknowledged_at: Mapped[datetime.datetime] = mapped_column(
        server_default=func.clock_timestamp()
    )
    applied: Mapped[str] = mapped_column(PgSnapshot)
    reported_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())
    expires_at: Mapped[datetime.datetime]
    rows: Mapped[int]
    tombstones: Mapped[int] = mapped_column(server_default=text("0"))
    ef: Mapped[int | None] = mapped_column(Integer)
    recall: Mapped[float | None]
    memory: Mapped[int | None]
    last_error: Mapped[str | None]


class Trimmed(Base):
    """Below which transaction the change log of a version is gone: of several rows the last one.

    A row each time, and no foreign key, so that trimming waits for nobody and nobody for it.
    """

    __tablename__ = "trimmed"
    __table_args__ = (Index(None, "version_id", "below"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    version_id: Mapped[int]
    below: Mapped[int] = mapped_column(Xid8)


class Access(Base):
    """One grant: of a space, of one version of it, or of no space yet.

    Without a space it is the right to make spaces (``create``), or a right on all those to come.
    ``rows`` limits it to rows whose metadata contains that object.
    """

    __tablename__ = "access"
    __table_args__ = (
        UniqueConstraint(
            *("space_id", "version_id", "role", "privilege", "rows"),
            postgresql_nulls_not_distinct=True,
        ),
        CheckConstraint("privilege IN ('read', 'write', 'admin', 'create')", "privilege"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    space_id: Mapped[int | None] = mapped_column(ForeignKey(Space.id, ondelete="CASCADE"))
    version_id: Mapped[int | None] = mapped_column(ForeignKey(Version.id, ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(RegRole)
    privilege: Mapped[str]
    rows: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    granted_by: Mapped[str]
    granted_at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())


class Attachment(Base):
    """A table of somebody's that is a space, by the column with its embeddings.

    The column is known by its name, or where there is none of that name by its number. ``shape``
    stands for what the table was called and had when functions were made for it; ``granted`` says
    that SELECT was given for the service's sake.
    """

    __tablename__ = "attachment"

    version_id: Mapped[int] = mapped_column(
        ForeignKey(Version.id, ondelete="CASCADE"), primary_key=True
    )
    relation: Mapped[str] = mapped_column(RegClass)
    column_name: Mapped[str]
    column_number: Mapped[int] = mapped_column(SmallInteger)
    shape: Mapped[str]
    granted: Mapped[bool]


class Average(Base):
    """A space whose rows are the averages of another one's, by the values of a field of metadata.

    Each version of the source has its like there, under the same name. ``weight`` is the field of
    the weights, null where all rows weigh the same.
    """

    __tablename__ = "average"

    space_id: Mapped[int] = mapped_column(
        ForeignKey(Space.id, ondelete="CASCADE"), primary_key=True
    )
    source_id: Mapped[int] = mapped_column(ForeignKey(Space.id))
    by: Mapped[str]
    weight: Mapped[str | None]


class Audit(Base):
    """One act of managing: who did what to which space, when and from where."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    at: Mapped[datetime.datetime] = mapped_column(server_default=func.clock_timestamp())
    role: Mapped[str]
    login: Mapped[str]
    address: Mapped[str | None] = mapped_column(INET)
    application: Mapped[str]
    # Of a space that may be gone.
    space_id: Mapped[int | None]
    space: Mapped[str | None]
    action: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(JSONB)


class Incarnation(Base):
    """One life of the database: a crash or a promotion empties this table, which is not logged."""

    __tablename__ = "incarnation"
    __table_args__ = {"prefixes": ["UNLOGGED"]}  # noqa: RUF012 - SQLAlchemy's own way to say it

    token: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    started_at: Mapped[datetime.datetime]
    database: Mapped[int] = mapped_column(OID)
    prompt: Mapped[bool]


class Setting(Base):
    """Facts about this installation of ehub."""

    __tablename__ = "setting"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


change = Table(
    "change",
    Base.metadata,
    Column("version_id", BigInteger, nullable=False),
    Column("xid", Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("keys", ARRAY(Text)),
    # Replicas ask for the transactions of a version that their watermark does not see.
    Index("change_version_id_xid_idx", "version_id", "xid"),
)
"""The change log: which keys each transaction changed; ``keys`` is null where all did."""

_EXACT_REASONS = (
    "no_service",
    "service_down",
    "service_unreachable",
    "index_not_ready",
    "index_behind",
    "row_limits",
    "filter",
    "request",
)
for _reason in _EXACT_REASONS:
    # Empty for ever: Postgres counts how often each was read (ehub.count_exact).
    Table(f"exact_{_reason}", Base.metadata)
