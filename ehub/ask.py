"""The commands that search: neighbours, ranges, distances, the graph of all neighbours."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

import ehub
from ehub.terminal import Address, Filter, Json, Url, as_object, out, print_table, progress

app = typer.Typer()

_What = Annotated[
    str,
    typer.Argument(
        metavar="KEY|VECTOR|-",
        show_default=False,
        help="A stored key, a vector as [1, 0, …], or - for one of them on each line of stdin.",
    ),
]
_One = Annotated[
    str,
    typer.Argument(
        metavar="KEY|VECTOR", show_default=False, help="A stored key, or a vector as [1, 0, …]."
    ),
]
_K = Annotated[int, typer.Option("-k", help="How many neighbours.")]
_Partition = Annotated[
    str | None, typer.Option(metavar="VALUE", help="Only rows of this partition.")
]
_Index = Annotated[str | None, typer.Option(metavar="NAME", help="Only rows of this sub-index.")]
_Metadata = Annotated[bool, typer.Option("--metadata", help="Show metadata.")]


@app.command()
def query(
    space: Address,
    what: _What,
    k: _K = 10,
    matching: Filter = None,
    partition: _Partition = None,
    index: _Index = None,
    metadata: _Metadata = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Find the nearest neighbours of a key or a vector, exactly."""
    among: dict[str, Any] = {
        "filter": as_object(matching),
        "partition": partition,
        "index": index,
        "metadata": metadata,
    }
    with ehub.connect(url, index="none") as hub:
        target = hub.resolve(space)
        lines = (line.rstrip("\n") for line in sys.stdin) if what == "-" else iter([what])
        for line in lines:
            if line:
                found = target.nearest_neighbors(k, **_key_or_vector(line), **among)
                _show(found, metadata, as_json, line, title=line if what == "-" else None)


@app.command()
def like(
    space: Address,
    keys: Annotated[list[str], typer.Argument(metavar="KEY …", show_default=False)],
    unlike: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="And unlike this; several times.")
    ] = None,
    k: _K = 10,
    matching: Filter = None,
    partition: _Partition = None,
    index: _Index = None,
    metadata: _Metadata = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Find what is like some keys and unlike others, exactly."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(space).nearest_neighbors(
            k,
            like=keys,
            unlike=unlike or None,
            filter=as_object(matching),
            partition=partition,
            index=index,
            metadata=metadata,
        )
        _show(found, metadata, as_json, " ".join(keys))


@app.command()
def within(
    space: Address,
    what: _One,
    distance: Annotated[float, typer.Argument(metavar="DISTANCE", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="At most so many rows.")] = None,
    matching: Filter = None,
    partition: _Partition = None,
    index: _Index = None,
    metadata: _Metadata = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Find everything within a distance of a key or a vector, exactly."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(space).within(
            distance,
            **_key_or_vector(what),
            limit=limit,
            filter=as_object(matching),
            partition=partition,
            index=index,
            metadata=metadata,
        )
        _show(found, metadata, as_json, what)


@app.command()
def distance(
    space: Address,
    a: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    url: Url = None,
) -> None:
    """Print the distance of two keys."""
    with ehub.connect(url, index="none") as hub:
        print(f"{hub.resolve(space).distance(a, b):.9g}")


@app.command()
def explain(
    space: Address,
    what: _One,
    k: _K = 10,
    matching: Filter = None,
    partition: _Partition = None,
    index: _Index = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show how a search in SQL is answered, what else could be done, and what each costs."""
    with ehub.connect(url, index="service") as hub:
        target = hub.resolve(space)
        asked = _key_or_vector(what)
        vector = target.get(asked["key"]) if "key" in asked else asked["vector"]
        ways = target.explain_nearest(
            k, vector=vector, filter=as_object(matching), partition=partition, index=index
        )
    if as_json:
        print(json.dumps([way._asdict() for way in ways], ensure_ascii=False))
        return
    print_table(
        ["", "way", "rows that match", "compared", ""],
        [
            [
                "->" if way.chosen else "",
                way.way,
                "" if way.rows is None else f"{way.rows:,}",
                "" if way.compared is None else f"{way.compared:,}",
                way.note or "",
            ]
            for way in ways
        ],
    )


@app.command()
def graph(
    space: Address,
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    k: _K = 10,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where the file is there already.")
    ] = False,
    url: Url = None,
) -> None:
    """Write the nearest neighbours of every row into a file of JSON lines.

    Interrupted, it goes on where it was when it is called again.
    """
    with ehub.connect(url) as hub, _opened(file, restart) as lines:
        target = hub.resolve(space)
        last, done = _last_key(file, lines)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with progress(*columns, TimeRemainingColumn()) as bars:
            task = bars.add_task("waiting for the index", total=None)
            if hub.index != "none":
                target.wait_until_indexed()

            def watch(rows: int, total: int) -> None:
                # What has come so far is there for the next call.
                lines.flush()
                bars.update(task, description="searching", completed=rows, total=total)

            for key, near in target.nearest_neighbors_of_all(k, after=last, watch=watch):
                pairs = [[one.key, one.distance] for one in near]
                line = json.dumps({"key": key, "neighbors": pairs}, ensure_ascii=False)
                lines.write(f"{line}\n".encode())
                done += 1
        out.print(f"{file}: {done:,} rows with their {k} nearest", markup=False)


def _opened(file: Path, restart: bool) -> IO[bytes]:
    try:
        return file.open("w+b" if restart or not file.exists() else "r+b")
    except OSError as error:
        raise ehub.InvalidFileError(f"{file} cannot be written: {error.strerror}") from None


def _last_key(file: Path, lines: IO[bytes]) -> tuple[str | None, int]:
    """Return the key of the last whole line, and the number of lines; leave the file there."""
    last, count, end = None, 0, 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            last = json.loads(line)["key"]
        except (ValueError, KeyError, TypeError):
            raise ehub.InvalidFileError(
                f"{file}, line {count + 1}: not of a graph; --restart writes over it"
            ) from None
        count += 1
        end += len(line)
    lines.seek(end)
    lines.truncate()
    return last, count


def _key_or_vector(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("["):
        try:
            return {"vector": json.loads(text)}
        except ValueError:
            pass  # A key may begin with a bracket.
    return {"key": text}


def _show(
    found: list[ehub.Neighbor], metadata: bool, as_json: bool, asked: str, title: str | None = None
) -> None:
    if as_json:
        answers = [_described(neighbor, metadata) for neighbor in found]
        print(json.dumps({"query": asked, "neighbors": answers}, ensure_ascii=False))
        return
    rows = [[*_cells(neighbor, metadata)] for neighbor in found]
    print_table(["key", "distance", *(["metadata"] if metadata else [])], rows, title)


def _described(neighbor: ehub.Neighbor, metadata: bool) -> dict[str, Any]:
    described = neighbor._asdict()
    if not metadata:
        del described["metadata"]
    return described


def _cells(neighbor: ehub.Neighbor, metadata: bool) -> Iterator[str]:
    yield neighbor.key
    yield f"{neighbor.distance:.6g}"
    if metadata:
        yield json.dumps(neighbor.metadata, ensure_ascii=False)
