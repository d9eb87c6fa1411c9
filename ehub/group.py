"""The commands for averages."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import ehub
from ehub.terminal import Address, Json, SpaceName, Url, out, print_table

app = typer.Typer()

_Filter = Annotated[
    str | None,
    typer.Option("--filter", metavar="JSON", help='Only rows that match: \'{"lang": "en"}\'.'),
]
_By = Annotated[str, typer.Option(metavar="FIELD", help="A field of the metadata, like user.id.")]
_Weight = Annotated[
    str | None, typer.Option(metavar="FIELD", help="The field of the rows' weights.")
]


@app.command()
def average(
    address: Address,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY …]", show_default=False, help="Or all rows.")
    ] = None,
    matching: _Filter = None,
    url: Url = None,
) -> None:
    """Print the average of some rows, as a JSON list."""
    with ehub.connect(url, index="none") as hub:
        space = hub.resolve(address)
        if keys and matching is not None:
            raise ehub.InvalidValueError("give either keys or --filter, and not both")
        found = space.average(keys) if keys else space.average(filter=_object(matching))
    print(json.dumps(None if found is None else found.tolist()))


@app.command()
def averages(
    address: Address,
    by: _By,
    weight: _Weight = None,
    matching: _Filter = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Print the averages of the rows with each value of a field."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(address).averages(by=by, weight=weight, filter=_object(matching))
    if as_json:
        rows = [{by: value, "average": vector.tolist()} for value, vector in found.items()]
        print(json.dumps(rows, ensure_ascii=False))
        return
    print_table(
        [by, "average"],
        [
            [
                json.dumps(value, ensure_ascii=False),
                "["
                + ", ".join(f"{x:.4g}" for x in vector[:6])
                + (", …]" if len(vector) > 6 else "]"),
            ]
            for value, vector in found.items()
        ],
    )


@app.command("create-average")
def create_average(
    space: SpaceName,
    source: Annotated[str, typer.Option(metavar="SPACE", help="The space that it follows.")],
    by: _By,
    weight: _Weight = None,
    metric: Annotated[
        str | None, typer.Option(help="l2, cosine or ip; by default that of the source.")
    ] = None,
    url: Url = None,
) -> None:
    """Make a space of averages, which follows the rows of another one."""
    with ehub.connect(url, index="none") as hub:
        made = hub.create_average(
            space,
            source,
            by,
            weight,
            metric=metric,  # type: ignore[arg-type]
        )
        out.print(f"space {space}: {len(made):,} averages of {source} by {by}", markup=False)


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ehub.InvalidFilterError(f"filter: not JSON: {error}") from None
    return found
