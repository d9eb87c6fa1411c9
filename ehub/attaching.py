"""The commands for tables that are there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from numpy.typing import ArrayLike
from rich.progress import SpinnerColumn, TextColumn

import ehub
from ehub.compare import Measured
from ehub.files import EmbeddingFile
from ehub.terminal import Json, SpaceName, Url, out, print_table, progress
from ehub.types import Metric

app = typer.Typer()


@app.command()
def attach(
    table: Annotated[str, typer.Argument(metavar="TABLE", show_default=False)],
    column: Annotated[str, typer.Argument(metavar="COLUMN", show_default=False)],
    name: Annotated[
        str | None, typer.Option(metavar="SPACE", help="By default the name of the table.")
    ] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(help="l2, cosine or ip; by default that of pgvector's index, else l2."),
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="Needed where the column has vectors of several.")
    ] = None,
    m: Annotated[int, typer.Option("--M", help="The links of a node.")] = 16,
    ef_construction: Annotated[int, typer.Option(help="Candidates while linking.")] = 200,
    target_recall: Annotated[float, typer.Option(help="The share of neighbours to find.")] = 0.95,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure it beside pgvector's index.")
    ] = False,
    queries: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To compare with: embeddings, instead of drawn rows."),
    ] = None,
    sample: Annotated[int, typer.Option(help="How many rows to draw as queries.")] = 100,
    k: Annotated[int, typer.Option("-k", help="How many neighbours to compare.")] = 10,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Search a column of embeddings in a table that is there already; no row moves.

    With --compare, also of one that is attached: recall, rate and memory, beside pgvector's index.
    """
    with ehub.connect(url, index=None if compare else "none") as hub:
        space = hub.attached(table, column, metric) if compare and name is None else None
        if space is None:
            space = hub.attach(
                table,
                column,
                name,
                metric=metric,
                dims=dims,
                M=m,
                ef_construction=ef_construction,
                target_recall=target_recall,
            )
        if not compare:
            out.print(
                f"{table} is attached as space {space.name}: {space.dims} dims, {space.metric};"
                " its index is built in the background",
                markup=False,
            )
            return
        vectors = None if queries is None else _read(queries)
        with progress(SpinnerColumn(), TextColumn("{task.description}")) as bars:
            task = bars.add_task("")
            measured = space.compare_with_pgvector(
                vectors,
                k=k,
                sample=sample,
                watch=lambda doing: bars.update(task, description=doing),
            )
    if as_json:
        print(json.dumps([one._asdict() for one in measured]))
        return
    print_table(["", "recall", "queries/s", "memory"], [[*_cells(one)] for one in measured])
    if len(measured) == 1:
        out.print(f"{table} has no index of pgvector's on {column} under {space.metric}")
    out.print(f"nothing was dropped; ehub detach {space.name} undoes it", markup=False)


@app.command()
def detach(space: SpaceName, url: Url = None) -> None:
    """End what attach began; the table is as it was before."""
    with ehub.connect(url, index="none") as hub:
        table = hub.get_space(space).attached_to
        hub.detach(space)
        out.print(f"{table} is detached, and space {space} gone", markup=False)


def _read(file: Path) -> ArrayLike:
    return cast("ArrayLike", [vector for _, vector, _ in EmbeddingFile(file).records()])


def _cells(one: Measured) -> tuple[str, ...]:
    memory = "" if one.memory is None else f"{one.memory / 1e6:,.0f} MB"
    return one.way, f"{one.recall:.3f}", f"{one.rate:,.0f}", memory
