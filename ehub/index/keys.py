"""Keys in a file: UTF-8, each with a NUL behind it, which no text of Postgres has inside."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_BATCH = 4096


def write_keys(path: Path, keys: Iterable[str]) -> None:
    """Write keys, some at a time: they are not copied as a whole.

    Raises:
        OSError: the disk is full, or the folder gone.
    """
    left = iter(keys)
    with path.open("wb") as file:
        while batch := list(islice(left, _BATCH)):
            file.write("\0".join([*batch, ""]).encode())


def read_keys(path: Path) -> list[str]:
    """Read what :func:`write_keys` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it is not text.
    """
    keys = path.read_bytes().decode().split("\0")
    # What follows the last NUL.
    keys.pop()
    return keys
