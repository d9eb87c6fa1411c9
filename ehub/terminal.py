"""What all commands say and ask alike: options, tables, progress."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, highlight=False)

Url = Annotated[
    str | None, typer.Option("--database", "-d", metavar="URL", help="postgresql://user@host/db")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SpaceName = Annotated[str, typer.Argument(metavar="SPACE", show_default=False)]
Address = Annotated[
    str,
    typer.Argument(
        metavar="SPACE[@VERSION]", show_default=False, help="Without one, the current version."
    ),
]


def print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print rows of text below their columns' names."""
    table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def progress(*columns: ProgressColumn) -> Progress:
    """Return progress bars on stderr, where somebody looks."""
    # Elsewhere not even their blank last line.
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
