"""A right that is revoked is gone with the next statement, wherever that statement was begun.

The worst case each time: one open transaction that has locked all that the statement needs, and a
statement that was prepared and executed several times. There Postgres by itself reads nothing of what
others have changed in its catalogues.
"""

import itertools
import uuid

import psycopg
import pytest
from conftest import drop_database
from psycopg import sql
from psycopg.conninfo import make_conninfo
from test_access_matrix import FUNCTIONS, SECRETS, fill

import ehub
from ehub.config import Target
from ehub.database import Database
from ehub.migrate import migrate

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
# What a role calls that may read, write or see all rows: by the rules of the access matrix.
CALLS = {
    name: rule[:2]
    for name, rule in FUNCTIONS.items()
    if rule[0] in ("read", "write", "whole")
    # Of "split", another space; and two that need a table of their own.
    and "split" not in rule[1]
    and not name.endswith("_staged")
} | {
    "nearest_with_filter": (
        "read",
        "ehub.nearest('secret', '[1,0]', 50, filter => '{\"tenant\": 42}')",
    ),
    "nearest_lateral": (
        "read",
        "generate_series(1, 2) AS g, LATERAL ehub.nearest('secret', '[1,0]', 1 + g)",
    ),
    "within_at_once": ("read", "ehub.within('secret', '[1,0]', 9, complete => false)"),
    "nearest_of_version": ("read", "ehub.nearest('secret@v1', '[1,0]', 50)"),
}
VIEWS = [
    "whoami",
    "grants",
    "catalogue",
    "versions",
    "status",
    "indexes",
    "sub_indexes",
    "checkpoints",
    "promotions",
]


@pytest.fixture(scope="module")
def place(server, admin, tmp_path_factory):
    """A database that a plain role owns, a space with secrets, and a role for each test."""
    database = f"ehub_revocation_{uuid.uuid4().hex[:8]}"
    names = {kind: f"ehub {kind} {uuid.uuid4().hex[:6]}" for kind in (*SECRETS, *KINDS)}
    for name in names.values():
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name)))
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    url = make_conninfo(server, dbname=database)
    store = Database(Target(url, tmp_path_factory.mktemp("owner")))
    migrate(store)
    store.close()
    with ehub.connect(url, index="none") as hub:
        fill(hub, names)
        yield url, names["nobody"], hub
    drop_database(admin, database)
    for name in names.values():
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


KINDS = ("nobody", "group", "reader", "writer", "admin")


class Session:
    """A role that has a right, and an open transaction in which it has used it."""

    def __init__(self, place, privilege, level):
        self.url, self.role, self.hub = place
        self.space = self.hub.get_space("secret")
        self.space.grant(self.role, privilege)
        self.connection = psycopg.connect(
            make_conninfo(self.url, user=self.role, password="x"),
            autocommit=True,
            prepare_threshold=0,
        )
        self.connection.execute("SET ehub.mode = 'auto'")
        self.connection.execute(f"BEGIN ISOLATION LEVEL {level}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.connection.close()
        if any(one["role"] == self.role for one in self.grants()):
            self.space.revoke(self.role)
        with psycopg.connect(self.url, autocommit=True) as boss:
            boss.execute("DELETE FROM spaces.secret WHERE key = 'hush_later'")

    def grants(self):
        return [{"role": grant.role} for grant in self.space.grants()]

    def revoke(self):
        """Take the right away, and then write what it would show."""
        self.space.revoke(self.role)
        self.space.set("hush_later", [1, 0], {"tenant": 42})

    def use(self, statement, times=7):
        """Execute a statement so often that everything is locked and planned that it needs."""
        for _ in range(times):
            found = self.execute(statement)
        return found

    def execute(self, statement):
        return self.connection.execute(statement).fetchall()

    def refuse(self, statement):
        """Execute it, and return the state of its error, or the rows that it had all the same."""
        try:
            with self.connection.transaction():
                return self.execute(statement)
        except psycopg.Error as error:
            return error.sqlstate


@pytest.mark.parametrize("level", LEVELS)
def test_functions(place, level):
    leaks = []
    for name, (rule, call) in CALLS.items():
        if level == "SERIALIZABLE" and "near" not in name:
            # As under REPEATABLE READ.
            continue
        privilege = "write" if rule == "write" else "read"
        statement = f"SELECT * FROM {call} AS t"
        with Session(place, privilege, level) as session:
            if name == "stop_writers" and level != "READ COMMITTED":
                continue
            # A key is deleted once.
            session.use(statement, 1 if name == "delete" else 7)
            if rule != "write":
                # What a writer holds keeps the other one from writing.
                session.revoke()
            else:
                session.space.revoke(session.role)
            for _ in range(2):
                refused = session.refuse(statement)
                if refused not in ("42501", "EH001", "EH011", "22004"):
                    leaks.append((name, refused))
    assert leaks == []


@pytest.mark.parametrize("level", LEVELS)
def test_views(place, level):
    for view in VIEWS:
        statement = f"SELECT * FROM ehub.{view}"
        with Session(place, "read", level) as session:
            session.use(statement)
            session.revoke()
            assert session.execute(statement) == [], view


@pytest.mark.parametrize("level", LEVELS)
def test_cursors(place, level):
    for call in ("ehub.nearest('secret', '[1,0]', 50)", CALLS["nearest_many"][1]):
        with Session(place, "read", level) as session:
            session.use(f"SELECT * FROM {call}")
            session.connection.execute(f"DECLARE c CURSOR FOR SELECT * FROM {call}")
            session.revoke()
            assert session.refuse("FETCH ALL FROM c") in ("42501", "EH001")


@pytest.mark.parametrize("level", LEVELS)
def test_functions_of_somebody_else(place, level):
    """A role's own function, whose statements are planned once, and its DO blocks."""
    url, _, _ = place
    with psycopg.connect(url, autocommit=True) as boss:
        boss.execute(
            "CREATE OR REPLACE FUNCTION public.mine() RETURNS SETOF text LANGUAGE plpgsql AS"
            " $$ BEGIN RETURN QUERY SELECT key FROM ehub.nearest('secret', '[1,0]', 3); END $$"
        )
    with Session(place, "read", level) as session:
        assert len(session.use("SELECT * FROM public.mine()")) == 3
        session.revoke()
        assert session.refuse("SELECT * FROM public.mine()") in ("42501", "EH001")


def test_a_membership_that_is_revoked(place, admin):
    """Rights may come through a group, or with being a member of ehub's owner."""
    url, role, hub = place
    group = f"ehub_group_{uuid.uuid4().hex[:6]}"
    admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(group)))
    space = hub.get_space("secret")
    space.grant(group, "read")
    membership = [sql.Identifier(group), sql.Identifier(role)]
    try:
        admin.execute(sql.SQL("GRANT {} TO {}").format(*membership))
        with psycopg.connect(
            make_conninfo(url, user=role, password="x"), autocommit=True, prepare_threshold=0
        ) as session:
            session.execute("BEGIN")
            for _ in range(7):
                session.execute("SELECT * FROM ehub.whoami").fetchall()
                session.execute("SELECT * FROM ehub.nearest('secret', '[1,0]', 3)").fetchall()
            admin.execute(sql.SQL("REVOKE {} FROM {}").format(*membership))
            assert session.execute("SELECT * FROM ehub.whoami").fetchall() == []
            with pytest.raises(psycopg.Error):
                session.execute("SELECT * FROM ehub.nearest('secret', '[1,0]', 3)")
    finally:
        space.revoke(group)
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(group)))


def test_rights_on_an_attached_table(place):
    """There Postgres' own GRANT and REVOKE decide."""
    url, role, _ = place
    with psycopg.connect(url, autocommit=True) as boss:
        boss.execute("CREATE TABLE public.docs (id int PRIMARY KEY, emb vector(2))")
        boss.execute("INSERT INTO docs SELECT i, ARRAY[i, 0]::real[] FROM generate_series(1, 9) i")
        boss.execute("SELECT ehub.attach('docs', 'emb')")
        who = sql.Identifier(role)
        for call in (
            "ehub.nearest('docs', '[1,0]', 3)",
            "ehub.nearest('docs', '[1,0]', 3, filter => '{\"id\": {\"<\": 5}}')",
            "ehub.nearest_many('docs', ARRAY['[1,0]']::vector[], 3)",
            "ehub.within('docs', '[1,0]', 3)",
            "ehub.get('docs', '1')",
            "ehub.attached",
        ):
            boss.execute(sql.SQL("GRANT SELECT ON docs TO {}").format(who))
            with psycopg.connect(
                make_conninfo(url, user=role, password="x"), autocommit=True, prepare_threshold=0
            ) as session:
                session.execute("BEGIN")
                for _ in range(7):
                    assert session.execute(f"SELECT * FROM {call}").fetchall()
                boss.execute(sql.SQL("REVOKE SELECT ON docs FROM {}").format(who))
                if call == "ehub.attached":
                    assert session.execute(f"SELECT * FROM {call}").fetchall() == []
                    continue
                with pytest.raises(psycopg.Error) as caught:
                    session.execute(f"SELECT * FROM {call}")
                assert caught.value.sqlstate in ("42501", "EH001"), call


def test_who_makes_spaces_and_manages_them(place):
    url, role, hub = place
    space = hub.get_space("secret")
    hub.grant_create(role)
    space.grant(role, "admin")
    with psycopg.connect(
        make_conninfo(url, user=role, password="x"), autocommit=True, prepare_threshold=0
    ) as session:
        session.execute("BEGIN")
        for n in itertools.count():
            with session.transaction(force_rollback=True):
                session.execute("SELECT ehub.keep_warm('secret', false)")
            with session.transaction(force_rollback=True):
                session.execute("SELECT ehub.create_space('made', 2)")
            if n == 6:
                break
        hub.revoke_create(role)
        space.revoke(role)
        for call in ("ehub.keep_warm('secret', false)", "ehub.create_space('made', 2)"):
            with pytest.raises(psycopg.Error) as caught, session.transaction():
                session.execute(f"SELECT {call}")
            assert caught.value.sqlstate in ("42501", "EH001"), call
