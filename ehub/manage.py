"""The commands for versions, checkpoints and snapshots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

import ehub
from ehub.terminal import Address, Json, SpaceName, Url, out, print_table, progress

app = typer.Typer()

_VersionName = Annotated[str, typer.Argument(metavar="VERSION", show_default=False)]
_CheckpointName = Annotated[str, typer.Argument(metavar="CHECKPOINT", show_default=False)]


@app.command()
def versions(space: SpaceName, as_json: Json = False, url: Url = None) -> None:
    """List the versions of a space."""
    with ehub.connect(url, index="none") as hub:
        rows = [
            {
                "version": version.name,
                "dims": version.dims,
                "metric": version.metric,
                "rows": version.rows,
                "current": version.current,
                "frozen": version.frozen,
            }
            for version in hub.get_space(space).versions()
        ]
    if as_json:
        print(json.dumps(rows))
        return
    print_table(
        ["version", "dims", "metric", "rows", ""],
        [
            [
                *(str(row[name]) for name in ("version", "dims", "metric")),
                f"{row['rows']:,}",
                ", ".join(word for word in ("current", "frozen") if row[word]),
            ]
            for row in rows
        ],
    )


@app.command("create-version")
def create_version(
    space: SpaceName,
    version: _VersionName,
    dims: Annotated[int | None, typer.Option(help="By default those of the current one.")] = None,
    metric: Annotated[str | None, typer.Option(help="l2, cosine or ip.")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="VERSION", help="Copy the rows of this one.")
    ] = None,
    url: Url = None,
) -> None:
    """Make a version of a space beside the current one."""
    with ehub.connect(url, index="none") as hub:
        made = hub.get_space(space).create_version(
            version,
            dims,
            metric,  # type: ignore[arg-type]
            from_version=source,
        )
        out.print(f"version {version}: {made.dims} dims, {made.metric}, {made.rows:,} rows")
        out.print(f"ehub load FILE {space}@{version} loads it")


@app.command("drop-version")
def drop_version(
    space: SpaceName,
    version: _VersionName,
    force: Annotated[
        bool, typer.Option("--force", help="Also where a rollback or checkpoints need it.")
    ] = False,
    url: Url = None,
) -> None:
    """Drop a version with its rows."""
    with ehub.connect(url, index="none") as hub:
        hub.get_space(space).drop_version(version, force=force)
        out.print(f"version {version} of {space} is gone")


@app.command()
def promote(
    space: SpaceName,
    version: _VersionName,
    wait: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Wait for its index to be ready.")
    ] = None,
    min_overlap: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Refuse where fewer of the 10 nearest stay the same."),
    ] = None,
    url: Url = None,
) -> None:
    """Make a version the current one, in one moment."""
    with ehub.connect(url, index="none") as hub:
        _print_switch(
            space, hub.get_space(space).promote(version, wait=wait, min_overlap=min_overlap)
        )


@app.command()
def rollback(space: SpaceName, url: Url = None) -> None:
    """Go back to the version that was current before."""
    with ehub.connect(url, index="none") as hub:
        _print_switch(space, hub.get_space(space).rollback())


def _print_switch(space: str, switched: ehub.Switched) -> None:
    out.print(f"{space} is {switched.to_version} now, and was {switched.from_version}")


@app.command()
def history(space: SpaceName, as_json: Json = False, url: Url = None) -> None:
    """List the promotions and rollbacks of a space, the last one first."""
    with ehub.connect(url, index="none") as hub:
        entries = hub.get_space(space).history()
    if as_json:
        print(json.dumps([entry._asdict() for entry in entries], default=str))
        return
    print_table(
        ["at", "by", "", "from", "to"],
        [
            [f"{e.at:%Y-%m-%d %H:%M:%S}", e.by, e.kind, e.from_version, e.to_version]
            for e in entries
        ],
    )


@app.command()
def freeze(address: Address, url: Url = None) -> None:
    """Refuse all writes to a version from now on, for good."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(address)
        found.freeze()
        name = found.current.name if isinstance(found, ehub.Space) else found.name
        out.print(f"version {name} of {address.partition('@')[0]} is frozen")


@app.command("keep-warm")
def keep_warm(
    address: Address,
    off: Annotated[bool, typer.Option("--off", help="Keep none.")] = False,
    url: Url = None,
) -> None:
    """Keep indexes of a version that is not current, or keep none."""
    with ehub.connect(url, index="none") as hub:
        hub.resolve(address).keep_warm(not off)
        out.print(f"{'no indexes' if off else 'indexes'} of {address} are kept")


@app.command()
def diff(
    space: SpaceName,
    earlier: Annotated[str, typer.Argument(metavar="EARLIER", show_default=False)],
    later: Annotated[str, typer.Argument(metavar="LATER", show_default=False)],
    k: Annotated[int, typer.Option("-k", help="Compare so many neighbours.")] = 10,
    sample: Annotated[int, typer.Option(help="Of so many keys.")] = 100,
    most: Annotated[int, typer.Option(help="Show so many keys that moved most.")] = 10,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Compare two versions: what differs, how far vectors moved, which answers stay the same."""
    with ehub.connect(url) as hub:
        found = hub.get_space(space).diff(earlier, later, k=k, sample=sample, most=most)
        if as_json:
            about = {
                "added": len(found.added),
                "removed": len(found.removed),
                "changed": len(found.changed),
                "same": found.same,
                "drift": found.drift and found.drift._asdict(),
                "moved_most": dict(found.moved_most),
                "overlap": found.overlap,
                "overlaps": found.overlaps,
            }
            print(json.dumps(about, ensure_ascii=False))
            return
        rows = [
            ["added", f"{len(found.added):,}"],
            ["removed", f"{len(found.removed):,}"],
            ["changed", f"{len(found.changed):,}"],
            ["the same", f"{found.same:,}"],
        ]
        if found.drift is not None:
            rows += [
                [f"moved, {name.replace('_', ' ')}", f"{value:.6g}"]
                for name, value in found.drift._asdict().items()
            ]
        if found.overlap is not None:
            rows.append([f"overlap of the {k} nearest", f"{found.overlap:.3f}"])
        print_table([f"{earlier} → {later}", "keys"], rows)
        # Where no distance between the vectors is defined, by what became of their neighbours.
        if found.moved_most:
            print_table(
                ["moved most", "distance"],
                [[moved.key, f"{moved.distance:.6g}"] for moved in found.moved_most],
            )
        else:
            least = sorted(found.overlaps.items(), key=lambda one: one[1])[:most]
            print_table(
                ["moved most (of the sample)", "overlap"],
                [[str(key), f"{share:.2f}"] for key, share in least],
            )


@app.command()
def checkpoint(address: Address, name: _CheckpointName, url: Url = None) -> None:
    """Remember the rows of a version as they are now."""
    with ehub.connect(url, index="none") as hub:
        hub.resolve(address).checkpoint(name)
        out.print(f"ehub restore {address} {name} puts {address} back to this moment")


@app.command()
def checkpoints(address: Address, as_json: Json = False, url: Url = None) -> None:
    """List the checkpoints of a version, the oldest first."""
    with ehub.connect(url, index="none") as hub:
        found = hub.resolve(address).checkpoints()
    if as_json:
        print(json.dumps([one._asdict() for one in found], default=str))
        return
    print_table(
        ["checkpoint", "at", "by"],
        [[one.name, f"{one.created_at:%Y-%m-%d %H:%M:%S}", one.created_by] for one in found],
    )


@app.command()
def restore(address: Address, name: _CheckpointName, url: Url = None) -> None:
    """Put the rows of a version back to what they were at a checkpoint."""
    with ehub.connect(url, index="none") as hub:
        done = hub.resolve(address).restore(name)
        out.print(f"{done.written:,} rows written, {done.deleted:,} deleted")


@app.command("drop-checkpoint")
def drop_checkpoint(address: Address, name: _CheckpointName, url: Url = None) -> None:
    """Forget a checkpoint."""
    with ehub.connect(url, index="none") as hub:
        hub.resolve(address).drop_checkpoint(name)
        out.print(f"checkpoint {name} of {address} is gone")


@app.command()
def snapshot(
    address: Address,
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    url: Url = None,
) -> None:
    """Download all rows as of one instant into a file, .npz or .arrow."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with (
        ehub.connect(url, index="none") as hub,
        progress(*columns, TimeRemainingColumn()) as bars,
    ):
        task = bars.add_task("downloading", total=None)

        def watch(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        taken = hub.resolve(address).download_snapshot(watch)
        taken.close()
        bars.update(task, description="writing", total=None)
        taken.save(file)
    out.print(f"{len(taken):,} rows of {taken.space}@{taken.version} are in {file}")


@app.command("write-snapshot")
def write_snapshot(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    address: Address,
    create: Annotated[bool, typer.Option("--create", help="Make the space.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="What is not in the file is deleted.")
    ] = False,
    on_conflict: Annotated[
        str, typer.Option(help="Rows that others have changed: error, ours or theirs.")
    ] = "error",
    url: Url = None,
) -> None:
    """Write a snapshot from a file to a space, in one transaction."""
    with ehub.connect(url, index="none") as hub:
        taken = hub.load_snapshot(file)
        policy: Literal["error", "ours", "theirs"] = on_conflict  # type: ignore[assignment]
        if overwrite:
            if create:
                raise ehub.InvalidValueError("give either --create or --overwrite, and not both")
            done = taken.overwrite_space(address, on_conflict=policy)
        else:
            done = taken.write_to_space(address, create=create, on_conflict=policy)
        out.print(f"{done.written:,} rows written, {done.deleted:,} deleted")
        if done.conflicts:
            which = "overwritten" if on_conflict == "ours" else "left alone"
            out.print(f"{len(done.conflicts):,} rows that others had changed were {which}")
