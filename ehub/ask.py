"""The commands that search: neighbours, ranges, distances, the graph of all neighbours."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

import ehub
from ehub import jsontext
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


@app.command(context_settings={"ignore_unknown_options": True})
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

    Interrupted, it goes on where it was when it is called again: FILE.part says of what it is.
    """
    with ehub.connect(url) as hub:
        target = hub.resolve(space)
        version = target.current.name if isinstance(target, ehub.Space) else target.name
        about = {"graph": f"{space.partition('@')[0]}@{version}", "k": k}
        last = _begin(file, about, restart)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with file.open("ab") as lines, progress(*columns, TimeRemainingColumn()) as bars:
            task = bars.add_task("waiting for the index", total=None)
            if hub.index != "none":
                target.wait_until_indexed()

            def watch(rows: int, total: int) -> None:
                # What has come so far is there for the next call.
                lines.flush()
                bars.update(task, description="searching", completed=rows, total=total)

            pinned = hub.resolve(str(about["graph"]))
            for key, near in pinned.nearest_neighbors_of_all(k, after=last, watch=watch):
                pairs = [[one.key, one.distance] for one in near]
                line = json.dumps({"key": key, "neighbors": pairs}, ensure_ascii=False)
                lines.write(f"{line}\n".encode())
        _note_of(file).unlink()
        with file.open("rb") as written:
            done = sum(1 for _ in written)
        out.print(f"{file}: {done:,} rows with their {k} nearest", markup=False)


def _note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _begin(file: Path, about: dict[str, object], restart: bool) -> str | None:
    """Prepare the file; returns the last key in it where it is to be gone on with."""
    note = _note_of(file)
    try:
        begun = None if restart or not note.exists() else note.read_text()
        if begun is None and (restart or not file.exists()):
            note.write_text(json.dumps(about))
            file.write_bytes(b"")
            return None
    except OSError as error:
        raise ehub.InvalidFileError(f"{file} cannot be written: {error.strerror}") from None
    if begun is None:
        raise ehub.InvalidFileError(f"{file} is there already; --restart writes over it")
    if begun != json.dumps(about):
        raise ehub.InvalidFileError(
            f"{file} was begun with others: {begun}; --restart writes over it"
        )
    return _last_key(file)


def _last_key(file: Path) -> str | None:
    """Return the key of the last whole line, and cut off what comes after it."""
    last, end = None, 0
    with file.open("r+b") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            last = str(json.loads(line)["key"])
            end += len(line)
        lines.seek(end)
        lines.truncate()
    return last


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
        print(jsontext.write({"query": asked, "neighbors": answers}))
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
        yield jsontext.write(neighbor.metadata)
