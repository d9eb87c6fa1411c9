"""Huge pages for graphs, so that a search does not spend its time on finding where memory is.

A search reads vectors all over the graph. With pages of 4 KiB the processor remembers the place of
few of them: on embeddings of sentences a search through the service took a sixth less with pages of
2 MiB. Linux gives these to whoever asks, if ``transparent_hugepage`` is ``madvise`` or ``always``.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_HUGE_BYTES = 2 << 20
# Smaller ones gain nothing that could be noticed.
_LEAST_BYTES = 16 << 20
_MADV_HUGEPAGE = 14
# Since Linux 6.1; an error before.
_MADV_COLLAPSE = 25


@contextlib.contextmanager
def huge_pages(filled: bool = False) -> Iterator[None]:
    """Ask for huge pages for the large pieces of memory that are taken meanwhile.

    What is ``filled`` by then is moved to such pages at once. Where that cannot be had, nothing
    happens.
    """
    before = _mapped()
    yield
    for start, end in _mapped():
        for known_start, known_end in before:
            # A new mapping may have grown together with an old one.
            if known_start <= start < known_end:
                start = known_end
            if known_start < end <= known_end:
                end = known_start
        start = -(-start // _HUGE_BYTES) * _HUGE_BYTES
        if end - start >= _LEAST_BYTES:
            # To collapse what is not filled would fill it.
            for advice in (_MADV_HUGEPAGE, *([_MADV_COLLAPSE] if filled else [])):
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice
                )


def _mapped() -> list[tuple[int, int]]:
    """Return from where to where this process has memory that is no file's."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text().splitlines():
            fields = line.split()
            if len(fields) == 5 and fields[1] == "rw-p":
                start, _, end = fields[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found
