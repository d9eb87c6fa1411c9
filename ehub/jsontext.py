"""JSON as Postgres has it: of any depth, with integers of any length.

Python's own module stops at the interpreter's recursion limit, and at integers of 4,300 digits;
one row that somebody has written in SQL would make a whole answer fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(
    r"[\s,:]*(?:(?P<open>[\[{])|(?P<close>[\]}])|(?P<string>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<real>-?\d+(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+))|(?P<integer>-?\d+)"
    r"|(?P<word>true|false|null))"
)
_WORDS = {"true": True, "false": False, "null": None}
# Fewer than Python refuses to convert at once.
_DIGITS = 4000


def read(text: str | bytes) -> Any:
    """Read what Postgres wrote as json or jsonb: what ``json.loads`` reads, and what it cannot.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        return _read_step_by_step(text.decode() if isinstance(text, bytes) else text)


def write(value: object) -> str:
    """Write what :func:`read` has read, on one line."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "".join(_written(value))


def _read_step_by_step(text: str) -> Any:
    """Read valid JSON without recursion."""
    found: list[Any] = []
    holders: list[list[Any] | dict[str, Any]] = [found]
    # The name that waits for its value, in each of them that is an object.
    names: list[str | None] = [None]
    position = 0
    while (token := _TOKEN.match(text, position)) is not None:
        position = token.end()
        value: Any
        kind, word = token.lastgroup, token[token.lastgroup or 0]
        if kind == "close":
            holders.pop()
            names.pop()
            continue
        if kind == "string":
            value = json.loads(word)
        elif kind == "open":
            value = {} if word == "{" else []
        elif kind == "integer":
            value = _integer(word)
        else:
            value = float(word) if kind == "real" else _WORDS[word]
        holder, name = holders[-1], names[-1]
        if isinstance(holder, list):
            holder.append(value)
        elif name is None:
            names[-1] = value
        else:
            holder[name] = value
            names[-1] = None
        if kind == "open":
            holders.append(value)
            names.append(None)
    (whole,) = found
    return whole


def _integer(digits: str) -> int:
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits)
    value = 0
    for start in range(0, len(digits), _DIGITS):
        part = digits[start : start + _DIGITS]
        value = value * 10 ** len(part) + int(part)
    return sign * value


def _digits(value: int) -> str:
    if value < 0:
        return "-" + _digits(-value)
    parts = []
    while value >= 10**_DIGITS:
        value, part = divmod(value, 10**_DIGITS)
        parts.append(f"{part:0{_DIGITS}d}")
    return "".join([str(value), *reversed(parts)])


def _written(value: object) -> Iterator[str]:
    """Write without recursion."""
    # What is to be written still, the next one last: values, and texts that stand between them.
    todo: list[tuple[bool, Any]] = [(True, value)]
    while todo:
        is_value, one = todo.pop()
        if not is_value:
            yield one
        elif isinstance(one, dict):
            todo.append((False, "}"))
            for place, (name, held) in reversed(list(enumerate(one.items()))):
                before = ", " if place else ""
                todo.append((True, held))
                todo.append((False, f"{before}{json.dumps(name, ensure_ascii=False)}: "))
            yield "{"
        elif isinstance(one, list):
            todo.append((False, "]"))
            for place, held in reversed(list(enumerate(one))):
                todo.append((True, held))
                if place:
                    todo.append((False, ", "))
            yield "["
        elif isinstance(one, int) and not isinstance(one, bool):
            yield _digits(one)
        else:
            yield json.dumps(one, ensure_ascii=False)
