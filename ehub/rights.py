"""The commands for access: grants, roles, the audit trail, the doctor."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import ehub
from ehub.terminal import Address, Json, Url, out, print_table

app = typer.Typer()

_Role = Annotated[str, typer.Argument(metavar="ROLE", show_default=False)]
_Privilege = Annotated[
    str, typer.Argument(metavar="PRIVILEGE", show_default=False, help="read, write or admin.")
]
_Rows = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help="Only rows whose metadata contains this: '{\"tenant\": 42}'."
    ),
]
_Undo = Annotated[bool, typer.Option("--undo", help="Take it away again.")]


@app.command()
def grant(
    address: Address, role: _Role, privilege: _Privilege, rows: _Rows = None, url: Url = None
) -> None:
    """Give a role a right on a space, or on one version of it."""
    name, _, version = address.partition("@")
    with ehub.connect(url, index="none") as hub:
        hub.get_space(name).grant(
            role,
            privilege,  # type: ignore[arg-type]
            version=version or None,
            rows=_object(rows),
        )
        out.print(f"{role} has {privilege} on {address}", markup=False)


@app.command()
def revoke(
    address: Address,
    role: _Role,
    privilege: Annotated[
        str | None, typer.Argument(metavar="PRIVILEGE", show_default=False, help="All without.")
    ] = None,
    rows: _Rows = None,
    url: Url = None,
) -> None:
    """Take a role's rights on a space away."""
    name, _, version = address.partition("@")
    with ehub.connect(url, index="none") as hub:
        hub.get_space(name).revoke(
            role,
            privilege,  # type: ignore[arg-type]
            version=version or None,
            rows=_object(rows),
        )
        out.print(f"{role} has no {privilege or 'right'} on {address} any more", markup=False)


@app.command("grant-create")
def grant_create(role: _Role, undo: _Undo = False, url: Url = None) -> None:
    """Let a role make spaces, which it manages then."""
    with ehub.connect(url, index="none") as hub:
        if undo:
            hub.revoke_create(role)
        else:
            hub.grant_create(role)
        out.print(f"{role} may {'not ' if undo else ''}make spaces", markup=False)


@app.command("grant-default")
def grant_default(
    role: _Role,
    privilege: Annotated[
        str | None, typer.Argument(metavar="PRIVILEGE", show_default=False)
    ] = None,
    rows: _Rows = None,
    undo: _Undo = False,
    url: Url = None,
) -> None:
    """Give a role a right on every space to come."""
    if (privilege is None) != undo:
        raise ehub.InvalidValueError("give either a privilege or --undo, and not both")
    with ehub.connect(url, index="none") as hub:
        if privilege is None:
            hub.revoke_default(role)
        else:
            hub.grant_default(role, privilege, rows=_object(rows))  # type: ignore[arg-type]
        out.print(f"{role} will have {privilege or 'nothing'} on spaces to come", markup=False)


@app.command()
def grants(
    space: Annotated[
        str | None, typer.Argument(metavar="SPACE", show_default=False, help="All without.")
    ] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """List the grants on a space, or all that you may know of."""
    with ehub.connect(url, index="none") as hub:
        found = hub.grants() if space is None else hub.get_space(space).grants()
    if as_json:
        _print_json(found)
        return
    print_table(
        ["space", "role", "privilege", "rows", "by", "at"],
        [
            [
                _place(one),
                one.role,
                one.privilege,
                _text(one.rows),
                one.granted_by,
                f"{one.granted_at:%Y-%m-%d %H:%M:%S}",
            ]
            for one in found
        ],
    )


@app.command()
def roles(as_json: Json = False, url: Url = None) -> None:
    """List the roles that have grants, and their members."""
    with ehub.connect(url, index="none") as hub:
        found = hub.roles()
    if as_json:
        print(json.dumps([_plain(one) | {"grants": _plain(one.grants)} for one in found]))
        return
    print_table(
        ["role", "login", "members", "grants"],
        [
            [
                one.name,
                "yes" if one.can_login else "no",
                ", ".join(one.members),
                ", ".join(
                    " ".join(filter(None, [g.privilege, _place(g), _text(g.rows)]))
                    for g in one.grants
                ),
            ]
            for one in found
        ],
    )


@app.command()
def whoami(as_json: Json = False, url: Url = None) -> None:
    """Say what you may do, and through which role."""
    with ehub.connect(url, index="none") as hub:
        found = hub.whoami()
    if as_json:
        _print_json(found)
    elif found:
        print_table(
            ["space", "privilege", "rows", "through"],
            [
                [
                    _place(one),
                    one.privilege,
                    _text(one.rows),
                    one.through,
                ]
                for one in found
            ],
        )
    else:
        out.print("nothing yet: `ehub grant SPACE ROLE read`, by who manages the space")


@app.command()
def audit(
    space: Annotated[
        str | None, typer.Argument(metavar="SPACE", show_default=False, help="All without.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many of the last entries.")] = 100,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """List who managed what, when and from where, the last first."""
    with ehub.connect(url, index="none") as hub:
        found = hub.audit(limit) if space is None else hub.get_space(space).audit(limit)
    if as_json:
        _print_json(found)
        return
    print_table(
        ["at", "role", "login", "from", "space", "action", "detail"],
        [
            [
                f"{one.at:%Y-%m-%d %H:%M:%S}",
                one.role,
                one.login,
                " ".join(filter(None, [one.address or "a local socket", one.application])),
                one.space or "",
                one.action,
                ", ".join(f"{name}: {_short(value)}" for name, value in one.detail.items()),
            ]
            for one in found
        ],
    )


@app.command()
def doctor(
    mend: Annotated[bool, typer.Option("--mend", help="Put right what can be.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Find rights, policies, functions and triggers that are not as they should be.

    Exits with 1 if something is left to do.
    """
    with ehub.connect(url, index="none") as hub:
        found = hub.doctor(mend=mend)
    if as_json:
        _print_json(found)
    elif found:
        print_table(
            ["what", "problem", "done" if mend else "--mend would"],
            [[one.subject, one.problem, one.remedy or "nothing: decide yourself"] for one in found],
        )
    else:
        out.print("everything is as it should be")
    if any(one.remedy is None or not mend for one in found):
        raise typer.Exit(1)


def _place(one: ehub.Grant | ehub.Right) -> str:
    if one.space is None:
        return "" if one.privilege == "create" else "(spaces to come)"
    return one.space if one.version is None else f"{one.space}@{one.version}"


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ehub.InvalidMetadataError(f"--rows is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ehub.InvalidMetadataError(f"--rows is a JSON object, not {text}")
    return found


def _text(value: dict[str, Any] | None) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(found: Any) -> Any:
    return json.loads(json.dumps([one._asdict() for one in found], default=str))


def _print_json(found: Any) -> None:
    print(json.dumps([one._asdict() for one in found], default=str, ensure_ascii=False))
