"""Nearest neighbours in SQLAlchemy: against numpy, and against the same SELECT without ehub."""

import asyncio
import contextlib
import datetime
import enum
import subprocess
import sys
import uuid
from decimal import Decimal
from typing import Any

import asyncpg
import numpy as np
import psycopg
import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgvector import HalfVector, Vector
from pgvector.sqlalchemy import HALFVEC, VECTOR, avg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import (
    CHAR,
    REAL,
    BigInteger,
    Column,
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    bindparam,
    delete,
    exists,
    false,
    func,
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
)

import ehub
import ehub.condition

ROWS = 400
DIMS = 4


class Base(DeclarativeBase):
    pass


class Kind(enum.Enum):
    BOOK = "book"
    FILM = "film"


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    embedding: Mapped[Any] = mapped_column(VECTOR(DIMS))


class Document(Base):
    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship()
    lang: Mapped[str | None]
    year: Mapped[int | None]
    small: Mapped[int | None] = mapped_column(SmallInteger)
    price: Mapped[float | None] = mapped_column(Double)
    cost: Mapped[Decimal | None] = mapped_column(Numeric(10, 2))
    live: Mapped[bool | None]
    kind: Mapped[Kind | None]
    tag: Mapped[uuid.UUID | None]
    # Of those that are no filter: the same digits mean something else, or another order.
    rough: Mapped[float | None] = mapped_column(REAL)
    code: Mapped[str | None] = mapped_column(CHAR(4))
    made: Mapped[datetime.datetime | None]
    odd: Mapped[str | None] = mapped_column("or")
    dotted: Mapped[int | None] = mapped_column("a.b\\c %")
    embedding: Mapped[Any] = mapped_column(VECTOR(DIMS), nullable=True)


class Odd(Base):
    __tablename__ = "Odd 'Items' %"
    __table_args__ = ({"schema": "shop floor"},)

    ident: Mapped[uuid.UUID] = mapped_column("Its Key", primary_key=True)
    label: Mapped[str] = mapped_column("The Label")
    vector: Mapped[Any] = mapped_column("Em bedding", HALFVEC(DIMS))


class Guid(TypeDecorator[uuid.UUID]):
    """SQLAlchemy's own recipe, in short."""

    impl = CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect):
        return dialect.type_descriptor(postgresql.UUID())


class Thing(Base):
    __tablename__ = "things"

    distance: Mapped[uuid.UUID] = mapped_column(Guid, primary_key=True)
    embedding: Mapped[Any] = mapped_column(VECTOR(DIMS))


class Word(Base):
    __tablename__ = "words"

    # The model says less than the table has.
    word: Mapped[str] = mapped_column(String(3), primary_key=True)
    embedding: Mapped[Any] = mapped_column(VECTOR(DIMS))


class Medium(Base):
    __tablename__ = "media"

    id: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str]
    embedding: Mapped[Any] = mapped_column(VECTOR(DIMS))
    __mapper_args__ = {  # noqa: RUF012 - SQLAlchemy's own way to say it
        "polymorphic_on": "type",
        "polymorphic_identity": "medium",
    }


class Song(Medium):
    __tablename__ = "songs"

    id: Mapped[int] = mapped_column(ForeignKey(Medium.id), primary_key=True)
    seconds: Mapped[int]
    sound: Mapped[Any] = mapped_column(VECTOR(DIMS))
    __mapper_args__ = {"polymorphic_identity": "song"}  # noqa: RUF012


LANGS = ["en", "de", "fr", "it's", 'a "b"', "ä\\"]
YEARS = [-(2**31), -1, 0, 1, 2, 3, 2**31 - 1]
PRICES = [-np.inf, -1.5, 0.0, 0.1, 0.3, 19.99, 20.0, 1e300, np.inf, np.nan]
COSTS = [Decimal(n) for n in ("-1.5", "0", "0.10", "19.99", "20", "NaN")]
TAGS = [uuid.UUID(int=n) for n in (0, 7, 2**128 - 1)]


def documents():
    random = np.random.default_rng(0)

    def some(values):
        values = [None, *values]
        return values[random.integers(len(values))]

    return [
        {
            "id": n,
            "author_id": n % 3,
            "lang": some(LANGS),
            "year": some(YEARS),
            "small": some([-5, 0, 5]),
            "price": some(PRICES),
            "cost": some(COSTS),
            "live": some([True, False]),
            "kind": some(list(Kind)),
            "tag": some(TAGS),
            "rough": some([0.1, 0.5]),
            "code": some(["en", "de"]),
            "made": some([datetime.datetime(2024, 1, 1), datetime.datetime(2025, 1, 1)]),
            "odd": some(["x", "y"]),
            "dotted": some([1, 2]),
            "embedding": None if n % 17 == 5 else random.normal(size=DIMS).tolist(),
        }
        for n in range(ROWS)
    ]


def vectors(n, seed=1):
    return [row.tolist() for row in np.random.default_rng(seed).normal(size=(n, DIMS))]


QUERY = vectors(1, seed=9)[0]
EVERYTHING = true()


@pytest.fixture
def engine(url):
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sqlalchemy.NullPool
    )
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "shop floor"'))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def filled(engine):
    with Session(engine) as session:
        session.add_all(Author(id=n, name="abc"[n], embedding=v) for n, v in enumerate(vectors(3)))
        session.flush()
        session.execute(sqlalchemy.insert(Document), documents())
        session.commit()
    attach(engine, "documents", "embedding")
    return engine


@pytest.fixture
def session(filled):
    with Session(filled) as session:
        yield session


def attach(engine, table, column, **options):
    arguments = "".join(f", {name} => :{name}" for name in options)
    with engine.begin() as connection:
        return connection.scalar(
            text(f"SELECT ehub.attach(CAST(:table AS regclass), :column{arguments})"),
            {"table": table, "column": column, **options},
        )


@contextlib.contextmanager
def statements(engine):
    seen = []

    def see(connection, cursor, statement, parameters, context, many):
        seen.append(statement)

    sqlalchemy.event.listen(engine, "before_cursor_execute", see)
    try:
        yield seen
    finally:
        sqlalchemy.event.remove(engine, "before_cursor_execute", see)


def expected(session, k=10, where=EVERYTHING, query=QUERY):
    """The same, by pgvector alone."""
    distance = Document.embedding.l2_distance(query)
    return session.execute(
        select(Document.id, distance)
        .where(where, Document.embedding.is_not(None))
        .order_by(distance, Document.id)
        .limit(k)
    ).all()


def found(session, nearest):
    statement = select(Document.id, nearest.distance).join(nearest)
    return session.execute(statement.order_by(nearest.distance, Document.id)).all()


def same(these, those):
    assert [row[0] for row in these] == [row[0] for row in those]
    assert [row[1] for row in these] == pytest.approx([row[1] for row in those])
    return True


# --- joined in every way


def test_neighbours_are_those_that_numpy_finds(session):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, 10)
    rows = session.execute(
        select(Document, nearest.distance).join(nearest).order_by(nearest.distance)
    ).all()
    there = [row for row in documents() if row["embedding"]]
    distances = np.linalg.norm(np.array([row["embedding"] for row in there]) - QUERY, axis=1)
    order = np.argsort(distances)[:10]
    assert [row.Document.id for row in rows] == [there[n]["id"] for n in order]
    assert [row.distance for row in rows] == pytest.approx(distances[order].tolist(), rel=1e-5)


def test_it_is_joined_without_saying_on_what(session):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, k=10)
    alias = aliased(Document)
    of_alias = ehub.orm.nearest(alias.embedding, QUERY, k=10)
    table = Document.__table__
    of_table = ehub.orm.nearest(table.c.embedding, QUERY, k=10)
    cte = select(nearest).cte("near")
    inside = select(Document, nearest.distance).join(nearest).subquery()
    whole = aliased(Document, inside)
    for statement in (
        select(Document.id, nearest.distance).join(nearest),
        select(Document.id, nearest.c.distance).join_from(Document, nearest),
        select(Document.id, nearest.distance).select_from(nearest).join(Document),
        select(Document.id, nearest.distance)
        .outerjoin(nearest)
        .where(nearest.distance.is_not(None)),
        select(alias.id, of_alias.distance).join(of_alias),
        select(alias.id, nearest.distance).join(nearest),
        select(table.c.id, of_table.distance).join(of_table),
        select(table.c.id, of_table.distance).select_from(table.join(of_table)),
        select(nearest.c.id, nearest.distance),
        select(nearest.id, nearest.distance),
        select(Document.id, cte.c.distance).join(cte),
        select(inside.c.id, inside.c.distance),
        select(whole.id, inside.c.distance),
        select(Document.id, nearest.distance).where(Document.id == nearest.id),
        select(Document.id, Author.id, nearest.distance).join(Document.author).join(nearest),
    ):
        rows = session.execute(statement.order_by(text("distance"))).all()
        same([(row[0], row[-1]) for row in rows], expected(session))


def test_it_is_a_subquery_like_any_other(session):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, k=10)
    ids = {row[0] for row in expected(session)}
    for where in (
        Document.id.in_(select(nearest.id)),
        Document.id.in_(select(nearest.c.id)),
        exists().where(nearest.id == Document.id),
    ):
        assert set(session.scalars(select(Document.id).where(where))) == ids
    assert set(session.scalars(select(Document).join(nearest))) == {
        session.get(Document, id_) for id_ in ids
    }
    assert session.scalar(select(func.count()).select_from(nearest)) == 10
    rest = session.execute(delete(Document).where(Document.id.in_(select(nearest.id))))
    assert rest.rowcount == 10
    near = found(session, nearest)
    assert not ids & {row.id for row in near}
    session.rollback()


def test_its_key_is_of_the_models_type(session, engine):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, k=1)
    assert isinstance(nearest.id.type, BigInteger)
    assert isinstance(nearest.distance.type, Float)
    key, distance = session.execute(select(nearest)).one()
    assert type(key) is int
    assert type(distance) is float


def test_several_in_one_statement(session, filled):
    attach(filled, "authors", "embedding", metric="cosine")
    one = ehub.orm.nearest(Document.embedding, QUERY, k=100)
    two = ehub.orm.nearest(Document.embedding, vectors(1)[0], k=100, where=Document.year > 0)
    who = ehub.orm.nearest(Author.embedding, QUERY, k=2)
    rows = session.execute(
        select(Document.id, Author.id, one.distance + two.distance)
        .join_from(Document, Author)
        .join(who)
        .join(one, one.id == Document.id)
        .join(two, two.id == Document.id)
    ).all()
    near = {row.id for row in expected(session, 100)}
    other = {row.id for row in expected(session, 100, Document.year > 0, vectors(1)[0])}
    distance = Author.embedding.cosine_distance(QUERY)
    authors = set(session.scalars(select(Author.id).order_by(distance).limit(2)))
    ids = set(
        session.scalars(
            select(Document.id).where(
                Document.id.in_(near & other), Document.author_id.in_(authors)
            )
        )
    )
    assert {row[0] for row in rows} == ids != set()


def test_statements_that_differ_in_the_table_alone_are_told_apart(session, filled):
    # Their SQL is the same but for the join.
    attach(filled, "authors", "embedding")
    for model in (Document, Author, Document):
        nearest = ehub.orm.nearest(model.embedding, QUERY, k=1)
        statement = select(Document.id, Author.id).join_from(Document, Author).join(nearest)
        assert f"{model.__tablename__}.id = anon_1.id" in str(
            statement.compile(dialect=postgresql.dialect())
        )
        assert len(session.execute(statement).all()) == (1 if model is Document else 133)


def test_any_name_schema_and_key(engine):
    with Session(engine) as session:
        for n, vector in enumerate(vectors(50)):
            session.add(Odd(ident=uuid.UUID(int=n), label=f"l{n % 5}", vector=vector))
            session.add(Thing(distance=uuid.UUID(int=n), embedding=vector))
            session.add(Medium(id=n, embedding=vector))
            session.add(Song(id=n + 50, embedding=vector, seconds=n, sound=vector))
        session.execute(text("ALTER TABLE words ALTER word TYPE text"))
        session.commit()
    Long = Table("words", MetaData(), Column("word", Text), Column("embedding", VECTOR(DIMS)))
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.insert(Long),
            [{"word": f"word{n}", "embedding": v} for n, v in enumerate(vectors(50))],
        )
    attach(engine, '"shop floor"."Odd \'Items\' %"', "Em bedding", name="odd")
    for table in ("things", "words", "media"):
        attach(engine, table, "embedding")
    attach(engine, "songs", "sound")
    with Session(engine) as session:
        order = np.argsort(np.linalg.norm(np.array(vectors(50)) - QUERY, axis=1)).tolist()

        def keys(model, nearest):
            statement = select(model).join(nearest).order_by(nearest.distance)
            return session.scalars(statement).all()

        nearest = ehub.orm.nearest(Odd.vector, QUERY, k=5)
        assert [row.ident.int for row in keys(Odd, nearest)] == order[:5]
        assert session.scalar(select(nearest.c["Its Key"]).limit(1)).int in order[:5]
        for where in (Odd.label == "l3", Odd.label.like("%3")):
            nearest = ehub.orm.nearest(Odd.vector, QUERY, k=5, where=where)
            assert [row.ident.int for row in keys(Odd, nearest)] == [
                n for n in order if n % 5 == 3
            ][:5]
        nearest = ehub.orm.nearest(Thing.embedding, QUERY, k=5)
        assert [row.distance.int for row in keys(Thing, nearest)] == order[:5]
        assert {c.key for c in nearest.c} == {"distance", "distance_1"}
        nearest = ehub.orm.nearest(Word.embedding, QUERY, k=5)
        assert [row.word for row in keys(Word, nearest)] == [f"word{n}" for n in order[:5]]

        # Joined-table inheritance: neighbours are of the table that has the column.
        nearest = ehub.orm.nearest(Song.sound, QUERY, k=5, where=Song.__table__.c.seconds > 2)
        expected = [n for n in order if n > 2][:5]
        assert [row.seconds for row in keys(Song, nearest)] == expected
        nearest = ehub.orm.nearest(Song.sound, QUERY, k=5, where=Song.seconds > 2)
        assert [row.seconds for row in keys(Song, nearest)] == expected
        nearest = ehub.orm.nearest(Song.embedding, QUERY, k=5, where=Song.type == "song")
        assert [row.seconds for row in keys(Song, nearest)] == order[:5]
        nearest = ehub.orm.nearest(Medium.embedding, QUERY, k=4)
        assert sorted(row.id for row in keys(Medium, nearest)) == sorted(
            [*order[:2], *(n + 50 for n in order[:2])]
        )
        alias = aliased(Song)
        nearest = ehub.orm.nearest(alias.sound, QUERY, k=5)
        statement = select(alias.seconds).join(nearest).order_by(nearest.distance)
        assert session.scalars(statement).all() == order[:5]


def test_a_schema_that_is_translated(engine):
    items = Table(
        *("items", MetaData()),
        Column("id", Integer, primary_key=True),
        Column("lang", String),
        Column("embedding", VECTOR(2)),
        schema="tenant",
    )
    for name, value in (("one", [1, 0]), ("two's", [0, 1])):
        options = {"schema_translate_map": {"tenant": name}}
        with engine.connect().execution_options(**options) as connection:
            connection.execute(sqlalchemy.schema.CreateSchema(name))
            items.create(connection)
            connection.execute(items.insert(), {"id": 1, "lang": name, "embedding": value})
            connection.commit()
        quoted = sqlalchemy.sql.quoted_name(name, True)
        attach(engine, f'"{quoted}".items', "embedding", name=name[:3])
    for where in (None, items.c.lang.like("%")):
        nearest = ehub.orm.nearest(items.c.embedding, [1, 0], 1, where=where)
        statement = select(items.c.lang, nearest.distance).join(nearest)
        for name, distance in (("one", 0), ("two's", 2**0.5), ("one", 0)):
            options = {"schema_translate_map": {"tenant": name}}
            with engine.connect().execution_options(**options) as connection:
                assert connection.execute(statement).one() == (name, pytest.approx(distance))


# --- one statement


def test_it_is_one_statement_that_is_compiled_once(session, filled):
    cache = {}
    session.connection(execution_options={"compiled_cache": cache})
    with statements(filled) as seen:
        for n, query in enumerate(vectors(5)):
            nearest = ehub.orm.nearest(Document.embedding, query, 1 + n, where=Document.year == n)
            session.execute(select(Document, nearest.distance).join(nearest)).all()
        assert len(cache) == 1
        for n, query in enumerate(vectors(5)):
            like = Document.lang.like(f"{n}%")
            nearest = ehub.orm.nearest(Document.embedding, query, 1 + n, where=like)
            session.execute(select(Document, nearest.distance).join(nearest)).all()
        assert len(cache) == 2
        where = Document.year == 1
        nearest = ehub.orm.nearest(Document.embedding, bindparam("q"), 3, where=where)
        statement = select(Document.id, nearest.distance).join(nearest).order_by("distance")
        for query in (QUERY, np.array(QUERY), Vector(QUERY)):
            rows = session.execute(statement, {"q": query}).all()
            same(rows, expected(session, 3, where))
        assert len(cache) == 4  # with that of `expected`
    assert len(seen) == 5 + 5 + 6
    for literal in map(str, QUERY):
        assert not any(literal in statement for statement in seen)


def test_pending_changes_are_found(session):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, k=1)
    statement = select(Document).join(nearest)
    session.add(Document(id=10_000, author_id=1, embedding=QUERY))
    document = session.scalars(statement).one()
    assert document.id == 10_000
    document.embedding = [100] * DIMS
    assert session.scalars(statement).one() is not document
    session.rollback()
    assert session.scalars(statement).one().id == expected(session)[0].id


def test_queries_of_every_kind(session):
    ten = expected(session)
    halves = HalfVector(QUERY)
    stored = session.get(Document, ten[0].id)
    for query in (QUERY, tuple(QUERY), np.array(QUERY), np.float32(QUERY), Vector(QUERY)):
        assert same(found(session, ehub.orm.nearest(Document.embedding, query, 10)), ten)
    for query in (halves, halves.to_numpy()):
        near = found(session, ehub.orm.nearest(Document.embedding, query, 10))
        same(near, expected(session, query=halves.to_list()))
    other = aliased(Document)
    of_stored = expected(session, query=stored.embedding)
    for query in (
        sqlalchemy.cast(sqlalchemy.literal(QUERY, VECTOR(DIMS)), VECTOR(DIMS)),
        sqlalchemy.literal(QUERY, VECTOR(DIMS)),
        bindparam("q", QUERY),
        bindparam("q", QUERY, VECTOR(DIMS)),
    ):
        assert same(found(session, ehub.orm.nearest(Document.embedding, query, 10)), ten)
    one = select(other.embedding).where(other.id == stored.id)
    for query in (one, one.scalar_subquery()):
        for where in (None, Document.lang.like("%")):
            nearest = ehub.orm.nearest(Document.embedding, query, 10, where=where)
            same(
                found(session, nearest),
                of_stored
                if where is None
                else expected(session, where=where, query=stored.embedding),
            )


def test_neighbours_of_every_row_of_another_table(session):
    authors = session.scalars(select(Author)).all()
    for where in (None, Document.lang == "en", Document.lang.like("e%")):
        nearest = ehub.orm.nearest(Document.embedding, Author.embedding, 4, where=where)
        rows = session.execute(
            select(Author.id, Document.id, nearest.distance)
            .join_from(Author, nearest, true())
            .join(Document, Document.id == nearest.id)
            .order_by(nearest.distance)
        ).all()
        assert len(rows) == 12
        for author in authors:
            same(
                [row[1:] for row in rows if row[0] == author.id],
                expected(session, 4, true() if where is None else where, author.embedding),
            )


def test_metrics_and_spaces(session, filled):
    attach(filled, "documents", "embedding", name="directions", metric="cosine")
    attach(filled, "documents", "embedding", name="products", metric="ip")
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="attached as"):
        found(session, ehub.orm.nearest(Document.embedding, QUERY, 10))
    session.rollback()
    for metric, name, distance in (
        ("l2", "documents", Document.embedding.l2_distance(QUERY)),
        ("cosine", "directions", Document.embedding.cosine_distance(QUERY)),
        ("ip", "products", Document.embedding.max_inner_product(QUERY)),
    ):
        # The last with an exact search: just two rows match.
        for where in (None, Document.lang.like("e%"), Document.id.in_([1, func.abs(-2)])):
            right = session.execute(
                select(Document.id, distance)
                .where(true() if where is None else where, Document.embedding.is_not(None))
                .order_by(distance)
                .limit(10)
            ).all()
            for said in ({"metric": metric}, {"space": name}, {"space": f"{name}@v1"}):
                nearest = ehub.orm.nearest(Document.embedding, QUERY, 10, where=where, **said)
                same(found(session, nearest), right)


async def asked(connect, driver):
    engine = create_async_engine(
        f"postgresql+{driver}://", async_creator=connect, poolclass=sqlalchemy.NullPool
    )
    async with AsyncSession(engine) as session:
        answers = []
        for where in (None, Document.lang == "en", Document.lang.like("e%")):
            nearest = ehub.orm.nearest(Document.embedding, QUERY, 10, where=where)
            statement = select(Document, nearest.distance).join(nearest)
            rows = (await session.execute(statement.order_by(nearest.distance))).all()
            answers.append([(row.Document.id, row.distance) for row in rows])
        nearest = ehub.orm.nearest(Document.embedding, bindparam("q"), 10)
        statement = select(nearest).order_by(nearest.distance)
        answers.append((await session.execute(statement, {"q": np.array(QUERY)})).all())
        session.add(Document(id=10_000, author_id=1, embedding=QUERY))
        nearest = ehub.orm.nearest(Document.embedding, QUERY, 1)
        assert (await session.scalars(select(Document).join(nearest))).one().id == 10_000
    await engine.dispose()
    return answers


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_async_sessions(session, url, driver):
    parts = conninfo_to_dict(url)
    port = {"port": int(parts["port"])} if "port" in parts else {}

    async def connect():
        if driver == "psycopg":
            return await psycopg.AsyncConnection.connect(url)
        return await asyncpg.connect(
            host=parts.get("host"),
            user=parts.get("user"),
            password=parts.get("password"),
            database=parts["dbname"],
            **port,
        )

    plain, equal, like, bound = asyncio.run(asked(connect, driver))
    same(plain, expected(session))
    same(equal, expected(session, where=Document.lang == "en"))
    same(like, expected(session, where=Document.lang.like("e%")))
    same(bound, plain)


# --- conditions


def simple():
    """Conditions of one column and constants, of all kinds."""
    numbers = st.sampled_from(
        [
            (Document.year, [*YEARS, 1.5, 2**40]),
            (Document.small, [-5, 0, 3, 10**6]),
            (Document.price, [*PRICES, 0, 20, Decimal("0.1")]),
            (Document.cost, [*COSTS, 0, 20, 19.99, 0.1, 1e-7]),
            (Document.rough, [0.1, 0.5, 1]),
            (Document.dotted, [1, 2]),
            (Document.id, [0, 1, 200]),
        ]
    )
    texts = st.sampled_from(
        [
            (Document.lang, [*LANGS, "", "EN", "e"]),
            (Document.code, ["en", "en  ", "de"]),
            (Document.odd, ["x", "z"]),
            (Document.kind, list(Kind)),
            (Document.tag, TAGS),
            (Document.made, [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 6, 1)]),
        ]
    )
    operators = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]

    def of(pair):
        column, values = pair
        one = st.sampled_from(values)
        several = st.lists(one, max_size=3)
        return st.one_of(
            st.builds(
                lambda name, value: getattr(column, name)(value), st.sampled_from(operators), one
            ),
            st.builds(column.in_, several),
            st.builds(column.not_in, several),
            st.builds(column.between, one, one),
            st.builds(lambda a, b: ~column.between(a, b), one, one),
            st.sampled_from([column.is_(None), column.is_not(None)]),
            st.sampled_from(["__eq__", "__ne__"]).map(lambda name: getattr(column, name)(None)),
        )

    flags = st.sampled_from(
        [
            Document.live,
            ~Document.live,
            Document.live.is_(True),
            Document.live.is_(False),
            Document.live.is_not(True),
            Document.live == True,  # noqa: E712
            Document.live != True,  # noqa: E712
            Document.live == False,  # noqa: E712
            Document.live.in_([True]),
            Document.live.is_(None),
            true(),
            false(),
        ]
    )
    general = st.sampled_from(
        [
            Document.lang.like("e%"),
            func.length(Document.lang) == 2,
            Document.author.has(name="a"),
            Document.small + 1 == 6,
            Document.year == Document.small,
            Document.lang.collate("C") > "e",
            Document.author_id.in_(select(Author.id).where(Author.name > "a")),
            exists().where(Author.id == Document.author_id, Author.name == "b"),
            Document.lang.in_(["en", None]),
        ]
    )
    return st.one_of(numbers.flatmap(of), texts.flatmap(of), flags, general)


def conditions():
    return st.recursive(
        simple(),
        lambda inner: st.one_of(
            st.builds(and_, inner, inner),
            st.builds(or_, inner, inner),
            st.builds(not_, inner),
            st.builds(and_, inner, inner, inner),
        ),
        max_leaves=5,
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(where=conditions(), k=st.sampled_from([1, 5, 300]))
def test_a_condition_means_what_it_means_in_sql(session, where, k):
    nearest = ehub.orm.nearest(Document.embedding, QUERY, k, where=where)
    try:
        right = expected(session, k, where)
    except sqlalchemy.exc.DBAPIError:
        # A number that the column's type has not.
        session.rollback()
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            found(session, nearest)
        session.rollback()
    else:
        same(found(session, nearest), right)


def meaning(where):
    return ehub.condition.as_filter(
        ehub.orm._condition(where, Document.__table__), Document.__table__
    )


def test_what_the_index_knows_of_conditions():
    for where, wanted in (
        (Document.lang == "en", '{"lang": "en"}'),
        (Document.lang != "en", '{"lang": {"not in": ["en", null]}}'),
        (Document.lang.in_(["en", "de"]), '{"lang": {"in": ["en", "de"]}}'),
        (and_(Document.live, Document.year < 7), '{"and": [{"live": true}, {"year": {"<": 7}}]}'),
        (~Document.live, '{"live": false}'),
        (Document.year.is_(None), '{"year": null}'),
        (Document.kind == Kind.BOOK, '{"kind": "BOOK"}'),
        (Document.tag == TAGS[0], f'{{"tag": "{TAGS[0]}"}}'),
        (Document.cost >= Decimal("1.50"), None),
        (Document.price < 20, '{"or": [{"price": {"<": 20}}, {"price": {"in": ["-Infinity"]}}]}'),
        (Document.price == 19.99, '{"price": 19.99}'),
        (Document.cost.in_([1.5, 0.25]), '{"cost": {"in": [1.5, 0.25]}}'),
        (Document.cost == Decimal("1e3"), '{"cost": 1000}'),
        (Document.odd == "x", '{"\\\\or": "x"}'),
        (Document.dotted == 1, '{"a\\\\.b\\\\\\\\c %": 1}'),
    ):
        matching, whole = meaning(where)
        assert whole
        assert wanted is None or matching == wanted
    for where in (
        Document.lang > "en",
        Document.lang.like("e%"),
        Document.code == "en",
        Document.rough < 1,
        Document.made > datetime.datetime(2024, 1, 1),
        Document.lang == bindparam("lang"),
        Document.lang == bindparam("lang", "en"),
        Document.lang.in_(["en", None]),
        Document.year < 1.5,
        Document.year == 2**40,
        Document.year == Document.small,
        # All are sent as the first.
        Document.cost.in_([0, Decimal("1.5")]),
        Document.price.in_([0, 1.5]),
        Document.cost == Decimal("0.105"),
        Document.cost == Decimal("1e9"),
        Document.cost == 1e-7,
        Document.lang == "a\0",
        Document.lang.in_([f"{n:0100}" for n in range(1000)]),
    ):
        assert meaning(where) == (None, False)
    # Of a conjunction, what it knows.
    assert meaning(and_(Document.lang == "en", Document.code == "x")) == ('{"lang": "en"}', False)
    assert meaning(or_(Document.lang == "en", Document.code == "x")) == (None, False)


def test_deep_and_long_conditions(session):
    deep = Document.year == 1
    for _ in range(40):
        deep = or_(and_(deep, Document.id < 300), Document.year == 2)
    long = or_(*(Document.id == n for n in range(0, 2000, 2)))
    for where in (deep, long, Document.id.in_(range(0, 20_000, 2))):
        nearest = ehub.orm.nearest(Document.embedding, QUERY, 10, where=where)
        same(found(session, nearest), expected(session, where=where))


def test_constants_of_a_statement_may_be_given_later(session):
    where = Document.lang == bindparam("lang", "en")
    nearest = ehub.orm.nearest(Document.embedding, QUERY, 10, where=where)
    statement = select(Document.id, nearest.distance).join(nearest).order_by(nearest.distance)
    for lang in ("de", "en"):
        rows = session.execute(statement, {"lang": lang}).all()
        same(rows, expected(session, where=Document.lang == lang))


def test_a_condition_on_an_alias(session):
    alias = aliased(Document)
    for where in (alias.lang == "en", alias.lang.like("e%")):
        nearest = ehub.orm.nearest(alias.embedding, QUERY, 10, where=where)
        rows = session.execute(
            select(alias.id, nearest.distance).join(nearest).order_by(nearest.distance)
        ).all()
        same(rows, expected(session, where=Document.lang.like("e%n")))


def test_general_conditions_go_where_simple_ones_go(session):
    first, second = Document.lang.like("e%"), Document.small + 1 > 1
    one = ehub.orm.nearest(Document.embedding, QUERY, 50, where=first)
    two = ehub.orm.nearest(Document.embedding, QUERY, 60, where=second)
    ones = {row.id for row in expected(session, 50, first)}
    twos = {row.id for row in expected(session, 60, second)}
    here, there = select(one).cte("here"), select(two).cte("there")
    for statement, ids in (
        (select(Document.id).join(here).join(there, there.c.id == Document.id), ones & twos),
        (select(Document.id).join(one).join(two, two.id == Document.id), ones & twos),
        (select(one.id).union(select(two.id)), ones | twos),
        (
            select(Document.id).where(
                exists().where(one.id == Document.id), Document.id.not_in(select(two.id))
            ),
            ones - twos,
        ),
    ):
        assert set(session.scalars(statement)) == ids != set()
    # A limit with loaded relationships wraps the statement.
    statement = select(Document, one.distance).join(one).order_by(one.distance).limit(3)
    rows = session.execute(statement.options(joinedload(Document.author))).all()
    same([(row[0].id, row[1]) for row in rows], expected(session, 3, first))


def test_who_may_read_the_table_finds_its_rows(session, db):
    session.rollback()
    db.execute("CREATE ROLE orm_reader; GRANT SELECT ON documents TO orm_reader")
    try:
        session.execute(text("SET ROLE orm_reader"))
        for where in (true(), Document.lang == "en", Document.lang.like("e%")):
            nearest = ehub.orm.nearest(Document.embedding, QUERY, 10, where=where)
            same(found(session, nearest), expected(session, where=where))
        session.close()
    finally:
        db.execute("DROP OWNED BY orm_reader; DROP ROLE orm_reader")


def test_vectors_of_other_dims_are_no_neighbours(engine):
    items = Table(
        *("items", MetaData()),
        Column("id", Integer, primary_key=True),
        Column("label", String),
        Column("embedding", VECTOR()),
    )
    with engine.begin() as connection:
        items.create(connection)
        rows = [{"id": n, "label": "x", "embedding": v} for n, v in enumerate(vectors(50))]
        connection.execute(items.insert(), [*rows, {"id": 50, "label": "x", "embedding": [1, 2]}])
    attach(engine, "items", "embedding", dims=DIMS)
    with engine.begin() as connection:
        for where, n in (
            (None, 50),
            (items.c.label == "x", 50),
            (items.c.label.like("x"), 50),
            (func.abs(items.c.id) > 47, 2),
        ):
            nearest = ehub.orm.nearest(items.c.embedding, QUERY, 60, where=where)
            assert len(connection.execute(select(nearest)).all()) == n


def test_all_rows_are_compared_only_where_too_few_of_the_nearest_match(session):
    far = [row.id for row in expected(session, ROWS)[-3:]]

    def plan(where):
        nearest = ehub.orm.nearest(Document.embedding, QUERY, 3, where=where)
        statement = select(Document.id, nearest.distance).join(nearest)
        same(found(session, nearest), expected(session, 3, where))
        compiled = statement.compile(
            session.get_bind(), compile_kwargs={"render_postcompile": True}
        )
        rows = session.connection().exec_driver_sql(
            f"EXPLAIN (ANALYZE, TIMING OFF) {compiled.string}", compiled.params
        )
        return "\n".join(row[0] for row in rows)

    assert "never executed" in plan(func.abs(Document.id) >= 0)
    exact = plan(func.abs(Document.id).in_(far))
    assert "Seq Scan on documents" in exact
    assert "never executed" in exact  # the other half


# --- with pgvector's own


def test_pgvectors_examples_are_the_same_on_an_attached_table(engine):
    """The README of pgvector-python, section SQLAlchemy."""
    Items = type("Items", (DeclarativeBase,), {})

    class Item(Items):
        __tablename__ = "items"
        id: Mapped[int] = mapped_column(primary_key=True)
        embedding: Mapped[Any] = mapped_column(VECTOR(3))

    Items.metadata.create_all(engine)

    def run():
        with Session(engine) as session:
            session.execute(delete(Item))
            for n in range(30):
                session.add(Item(id=n, embedding=[n % 7, n % 5, n % 3 + 1]))
            session.commit()
            order = Item.embedding.l2_distance([3, 1, 2])
            near = Item.embedding.cosine_distance([3, 1, 2])
            stored = session.get(Item, 3)
            answers = [
                [
                    item.id
                    for item in session.scalars(select(Item).order_by(order, Item.id).limit(5))
                ],
                [
                    item.id
                    for item in session.scalars(select(Item).order_by(near, Item.id).limit(5))
                ],
                session.scalars(select(order).order_by(Item.id)).all(),
                sorted(i.id for i in session.scalars(select(Item).filter(order < 3))),
                [float(value) for value in session.scalars(select(avg(Item.embedding))).first()],
                [float(value) for value in stored.embedding],
            ]
            stored.embedding = [9, 9, 9]
            session.commit()
            answers.append(session.scalars(select(Item.id).filter(order > 9)).all())
            return answers

    before = run()
    index = Index(
        "my_index",
        Item.embedding,
        postgresql_using="hnsw",
        postgresql_with={"m": 16, "ef_construction": 64},
        postgresql_ops={"embedding": "vector_l2_ops"},
    )
    index.create(engine)
    with engine.begin() as connection:
        # So few rows are read in a row by the planner, and the index is approximate.
        connection.execute(text("ANALYZE items"))
    assert attach(engine, "items", "embedding") == "items"
    assert run() == before
    with Session(engine) as session:
        nearest = ehub.orm.nearest(Item.embedding, [3, 1, 2], 5)
        order = Item.embedding.l2_distance([3, 1, 2])
        rows = session.execute(select(Item, nearest.distance, order).join(nearest)).all()
        assert all(row[1] == pytest.approx(row[2]) for row in rows)
        assert sorted(row[1] for row in rows) == pytest.approx(
            session.scalars(select(order).order_by(order).limit(5)).all()
        )
    with engine.begin() as connection:
        connection.execute(text("SELECT ehub.detach('items')"))
    assert run() == before


# --- what is refused


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([], "one vector is needed"),
        ([[1, 2], [3, 4]], "one vector is needed"),
        ([1, float("nan"), 2, 3], "NaN at position 1"),
        ([1, float("inf"), 2, 3], "infinity .* at position 1"),
        ([1, 1e39, 2, 3], "infinity .* at position 1"),
        ("[1,2,3,4]", "list or an array of numbers"),
        (["a", "b"], "list or an array of numbers"),
        (None, "one vector is needed"),
        (object(), "list or an array of numbers"),
    ],
)
def test_a_bad_query_is_refused_when_the_statement_is_made(query, message):
    with pytest.raises(ehub.InvalidVectorError, match=message):
        ehub.orm.nearest(Document.embedding, query, 10)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Document.embedding, QUERY, 0), {}, "k is a number from 1"),
        ((Document.embedding, QUERY, -1), {}, "k is a number from 1"),
        ((Document.embedding, QUERY, "10"), {}, "k is a whole number"),
        ((Document.embedding, QUERY, None), {}, "k is a whole number"),
        ((Document, QUERY, 1), {}, "a column of a table is needed"),
        (("embedding", QUERY, 1), {}, "a column of a table is needed"),
        ((Document.author, QUERY, 1), {}, "a column of a table is needed"),
        ((sqlalchemy.column("embedding"), QUERY, 1), {}, "a column of a table is needed"),
        ((func.lower(Document.lang), QUERY, 1), {}, "a column of a table is needed"),
        ((Document.embedding, QUERY, 1), {"where": "lang = 'en'"}, "where= is a condition"),
        ((Document.embedding, QUERY, 1), {"where": True}, "where= is a condition"),
        ((Document.embedding, QUERY, 1), {"where": {"lang": "en"}}, "where= is a condition"),
        ((Document.embedding, QUERY, 1), {"where": Document.lang}, "where= is a condition"),
        ((Document.embedding, QUERY, 1), {"where": Author.name == "a"}, "columns of documents"),
        (
            (Document.embedding, QUERY, 1),
            {"where": aliased(Document).lang == "a"},
            "columns of documents",
        ),
        ((Document.embedding, QUERY, 1), {"metric": "l3"}, "metric is 'l2', 'cosine' or 'ip'"),
        ((Document.embedding, QUERY, 1), {"metric": "l2", "space": "a"}, "not both"),
        ((Document.embedding, QUERY, 1), {"space": 1}, "a space's name"),
        ((Document.embedding, Document, 1), {}, "a list or an array of numbers"),
        ((Document.embedding, Document.__table__, 1), {}, "an expression of one value"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_statement_is_made(arguments, options, message):
    with pytest.raises(ehub.InvalidValueError, match=message):
        ehub.orm.nearest(*arguments, **options)


def test_a_key_of_several_columns_is_refused():
    pairs = Table(
        *("pairs", MetaData()),
        Column("a", Integer, primary_key=True),
        Column("b", Integer, primary_key=True),
        Column("embedding", VECTOR(3)),
    )
    with pytest.raises(ehub.InvalidValueError, match="no primary key of one column"):
        ehub.orm.nearest(pairs.c.embedding, [1, 2, 3], 1)


def test_what_postgres_refuses(session):
    for nearest, message in (
        (
            ehub.orm.nearest(Author.embedding, QUERY, 1),
            r"embedding of public\.authors is not attached",
        ),
        (ehub.orm.nearest(Document.lang, QUERY, 1), r"lang of public\.documents is not attached"),
        (ehub.orm.nearest(Document.embedding, QUERY, 1, metric="ip"), "not attached under metric"),
        (ehub.orm.nearest(Document.embedding, QUERY, 1, space="no"), "no space 'no'"),
        (ehub.orm.nearest(Document.embedding, [1, 2], 1), "a query of 4 dims is needed"),
        (
            ehub.orm.nearest(Document.embedding, [1, 2], 1, where=Document.lang.like("e%")),
            "a query of 4 dims is needed",
        ),
    ):
        with pytest.raises(sqlalchemy.exc.DBAPIError, match=message):
            session.execute(select(nearest)).all()
        session.rollback()
    nearest = ehub.orm.nearest(Document.embedding, bindparam("q"), 1)
    with pytest.raises(sqlalchemy.exc.StatementError, match="NaN at position 0"):
        session.execute(select(nearest), {"q": [float("nan")]})


def test_who_needs_no_sqlalchemy_does_not_wait_for_it():
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import ehub, sys; print('sqlalchemy' in sys.modules);"
            "ehub.orm.nearest, ehub.models.Space, ehub.alembic.include_name;"
            "print('sqlalchemy' in sys.modules, 'pgvector' in sys.modules);"
            "print(hasattr(ehub, 'no_such_thing'))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True", "False", "False"]
