"""Who may do what: grants, roles, the audit trail, and what the doctor finds.

Postgres enforces all of it; what is here says it to Postgres and reads it back.
"""

from __future__ import annotations

import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import sql

from ehub import values
from ehub.database import Database
from ehub.types import Metadata

Privilege: TypeAlias = Literal["read", "write", "admin"]
"""``read``; ``write``, which is that and changing rows; ``admin``, all that and managing."""


class Grant(NamedTuple):
    """A right of a role.

    Attributes:
        space, version: of what; without a version it is of the space with all its versions, without
            a space of those to come.
        role: the role that has it, and with it its members.
        privilege: ``read``, ``write``, ``admin``, or ``create`` for making spaces.
        rows: only rows whose metadata contains this; None for all rows.
        granted_by, granted_at: who gave it, and when.
    """

    space: str | None
    version: str | None
    role: str
    privilege: str
    rows: dict[str, Any] | None
    granted_by: str
    granted_at: datetime.datetime


class Right(NamedTuple):
    """What one may do, and ``through`` which role: one's own or a group. As in :class:`Grant`."""

    space: str | None
    version: str | None
    privilege: str
    rows: dict[str, Any] | None
    through: str


class Role(NamedTuple):
    """A role that has rights, whether it can log in, and who is a member of it, at any distance."""

    name: str
    can_login: bool
    members: list[str]
    grants: list[Grant]


class AuditEntry(NamedTuple):
    """One act of managing.

    Attributes:
        at: when.
        role, login: as which role, and who had logged in.
        address, application: from where; None and what the client called itself.
        space, action, detail: what was done.
    """

    at: datetime.datetime
    role: str
    login: str
    address: str | None
    application: str
    space: str | None
    action: str
    detail: dict[str, Any]


class Finding(NamedTuple):
    """Something that is not as it should be, and what mending does; None: that is for you."""

    subject: str
    problem: str
    remedy: str | None


def change(
    database: Database,
    function: Literal["grant", "revoke"],
    space: str,
    role: str,
    privilege: str | None,
    version: str | None,
    rows: Metadata | None,
) -> None:
    """Call ``ehub.grant`` or ``ehub.revoke``."""
    statement = sql.SQL("SELECT {}(%s, %s, %s::text, %s::text, %s::jsonb)").format(
        sql.Identifier("ehub", function)
    )
    with database.connection(space) as connection:
        connection.execute(statement, [space, _role(role), privilege, version, as_rows(rows)])


def change_default(
    database: Database,
    function: Literal["grant_default", "revoke_default", "grant_create", "revoke_create"],
    role: str,
    *rest: str | None,
) -> None:
    """Call one of the functions of schema ``ehub`` for what belongs to no space."""
    parameters = [_role(role), *rest]
    statement = sql.SQL("SELECT {}({})").format(
        sql.Identifier("ehub", function),
        sql.SQL(", ").join(map(sql.SQL, ["%s", "%s::text", "%s::jsonb"][: len(parameters)])),
    )
    with database.connection() as connection:
        connection.execute(statement, parameters)


def grants(database: Database, space: str | None = None) -> list[Grant]:
    """Read ``ehub.grants``: of one space, or all that one may know of."""
    with database.connection(space) as connection:
        rows = connection.execute(
            "SELECT space, version, role, privilege, rows, granted_by, granted_at FROM ehub.grants"
            " WHERE %s::text IS NULL OR space = %s",
            [space, space],
        )
        return [Grant(*row) for row in rows]


def roles(database: Database) -> list[Role]:
    """Gather the grants by their roles, with the members of each."""
    by_role: dict[str, list[Grant]] = {}
    for one in grants(database):
        by_role.setdefault(one.role, []).append(one)
    with database.connection() as connection:
        found = connection.execute(
            "SELECT r.rolname, r.rolcanlogin, coalesce((SELECT array_agg(m.rolname ORDER BY 1)"
            " FROM pg_roles AS m WHERE m.oid <> r.oid AND NOT m.rolsuper"
            " AND pg_has_role(m.oid, r.oid, 'USAGE')), '{}')::text[]"
            " FROM pg_roles AS r WHERE r.rolname = ANY(%s) ORDER BY 1",
            [list(by_role)],
        ).fetchall()
    return [Role(name, login, members, by_role[name]) for name, login, members in found]


def whoami(database: Database) -> list[Right]:
    """Read ``ehub.whoami``."""
    with database.connection() as connection:
        rows = connection.execute(
            "SELECT space, version, privilege, rows, through FROM ehub.whoami"
        )
        return [Right(*row) for row in rows]


def audit(database: Database, space: str | None, limit: int) -> list[AuditEntry]:
    """Read ``ehub.audit_trail``, the last entry first."""
    with database.connection(space) as connection:
        rows = connection.execute(
            "SELECT at, role, login, host(address), application, space, action, detail"
            " FROM ehub.audit_trail WHERE %s::text IS NULL OR space = %s LIMIT %s",
            [space, space, limit],
        )
        return [AuditEntry(*row) for row in rows]


def doctor(database: Database, mend: bool) -> list[Finding]:
    """Call ``ehub.drift``, or ``ehub.mend`` and then what is left for a person."""
    with database.connection() as connection:
        found = []
        if mend:
            found = [Finding(*row) for row in connection.execute("SELECT * FROM ehub.mend()")]
        left = connection.execute("SELECT * FROM ehub.drift()")
        return found + [Finding(*row) for row in left]


def as_rows(rows: Metadata | None) -> str | None:
    """Write what limits a grant as JSON; raises InvalidMetadataError for what cannot be."""
    return None if rows is None else values.as_json(rows, "rows")


def _role(role: object) -> str:
    return values.as_name("a role", role)
