"""SQL, migrations and the extension: beside the package in the repository, in it in a wheel."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

# What a semicolon in it ends nothing: a comment, a quoted name or text, a body between dollars.
_OPAQUE = re.compile(r"""--[^\n]*|"[^"]*"|'(?:[^']|'')*'|(\$\w*\$).*?\1""", re.DOTALL)


def folder(name: str) -> Path:
    """Return the folder ``sql``, ``migrations`` or ``extension``."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def sql_files() -> list[Path]:
    """Return the files of functions, triggers and views, in the order to run them."""
    # The rights on all of it come last.
    return sorted(folder("sql").glob("*.sql"), key=lambda file: (file.stem == "usage", file.name))


def sql_digest() -> str:
    """Return what tells one set of these files from another."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sql_files())).hexdigest()


def sql_statements() -> Iterator[str]:
    """Return the statements of these files, in the order to run them, without their comments."""
    for file in sql_files():
        text = file.read_text()
        start = place = 0
        while place < len(text):
            opaque = _OPAQUE.match(text, place)
            if opaque is not None:
                place = opaque.end()
                continue
            if text[place] == ";":
                yield _without_comments(text[start:place])
                start = place + 1
            place += 1


def _without_comments(statement: str) -> str:
    lines = statement.strip().splitlines()
    while lines and (not lines[0] or lines[0].startswith("--")):
        del lines[0]
    return "\n".join(lines)
