"""The commands for parts of a space: sub-indexes, partitions, averages."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import ehub
from ehub.terminal import Address, Filter, Json, SpaceName, Url, as_object, out, print_table

app = typer.Typer()

_By = Annotated[str, typer.Option(metavar="FIELD", help="A field of the metadata, like user.id.")]
_Weight = Annotated[
    str | None, typer.Option(metavar="FIELD", help="The field of the rows' weights.")
]


_IndexName = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


@app.command("create-index")
def create_index(
    space: Address,
    name: _IndexName,
    where: Annotated[
        str, typer.Option(metavar="JSON", help="The rows it is over: '{\"stock\": true}'.")
    ],
    m: Annotated[int | None, typer.Option("--M", help="The links of a node.")] = None,
    ef_construction: Annotated[int | None, typer.Option(help="Candidates while linking.")] = None,
    target_recall: Annotated[
        float | None, typer.Option(help="The share of neighbours to find.")
    ] = None,
    url: Url = None,
) -> None:
    """Make an index over just the rows that match; searches of these use it."""
    with ehub.connect(url, index="none") as hub:
        hub.resolve(space).create_index(
            name,
            as_object(where) or {},
            M=m,
            ef_construction=ef_construction,
            target_recall=target_recall,
        )
        out.print(f"index {name} of {space} is built in the background", markup=False)


@app.command("drop-index")
def drop_index(space: Address, name: _IndexName, url: Url = None) -> None:
    """Drop an index that create-index has made."""
    with ehub.connect(url, index="none") as hub:
        hub.resolve(space).drop_index(name)
        out.print(f"index {name} of {space} is dropped", markup=False)


@app.command()
def indexes(space: Address, as_json: Json = False, url: Url = None) -> None:
    """List the sub-indexes of a space."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(space).indexes()
    if as_json:
        print(json.dumps([one._asdict() for one in found], ensure_ascii=False))
        return
    print_table(
        ["index", "where", "state", "rows", "recall"],
        [
            [
                one.name,
                json.dumps(one.where, ensure_ascii=False),
                one.state or "none",
                "" if one.rows is None else f"{one.rows:,}",
                ("" if one.recall is None else f"{one.recall:.3f} ")
                + f"(target {one.target_recall:g})",
            ]
            for one in found
        ],
    )


@app.command()
def partitions(space: Address, as_json: Json = False, url: Url = None) -> None:
    """List the partitions of a space with their numbers of rows."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(space).partitions()
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print_table(["partition", "rows"], [[name, f"{rows:,}"] for name, rows in found.items()])


@app.command("drop-partition")
def drop_partition(
    space: Address,
    partition: Annotated[str, typer.Argument(metavar="VALUE", show_default=False)],
    url: Url = None,
) -> None:
    """Delete all rows of a partition."""
    with ehub.connect(url, index="none") as hub:
        rows = hub.resolve(space).drop_partition(partition)
        out.print(f"{rows:,} rows of {space} are deleted", markup=False)


@app.command()
def average(
    address: Address,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY …]", show_default=False, help="Or all rows.")
    ] = None,
    matching: Filter = None,
    url: Url = None,
) -> None:
    """Print the average of some rows, as a JSON list."""
    with ehub.connect(url, index="none") as hub:
        space = hub.resolve(address)
        if keys and matching is not None:
            raise ehub.InvalidValueError("give either keys or --filter, and not both")
        found = space.average(keys) if keys else space.average(filter=as_object(matching))
    print(json.dumps(None if found is None else found.tolist()))


@app.command()
def averages(
    address: Address,
    by: _By,
    weight: _Weight = None,
    matching: Filter = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Print the averages of the rows with each value of a field."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(address).averages(by=by, weight=weight, filter=as_object(matching))
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
