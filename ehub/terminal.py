"""What all commands say and ask alike: options, tables, progress."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from ehub.errors import InvalidFilterError

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

Filter = Annotated[
    str | None,
    typer.Option("--filter", metavar="JSON", help='Only rows that match: \'{"lang": "en"}\'.'),
]


def as_object(text: str | None) -> dict[str, Any] | None:
    """Read the JSON of a filter.

    Raises:
        InvalidFilterError: it is none.
    """
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFilterError(f"filter: not JSON: {error}") from None
    return found


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
