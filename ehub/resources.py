"""The SQL and the migrations: beside the package in the repository, inside it in a wheel."""

from __future__ import annotations

import hashlib
from pathlib import Path


def folder(name: str) -> Path:
    """Return the folder ``sql`` or ``migrations``."""
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
