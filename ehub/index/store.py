"""Index files: written whole or not at all, and believed only after a check.

A folder holds one saved index: ``manifest.json`` names its files, with their sizes and checksums.
Every save writes new files, syncs them, and renames a new manifest over the old one; that rename is
the moment at which the new index counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import signal
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from ehub.errors import IndexFileError
from ehub.index.calibrate import Calibration
from ehub.index.hnsw import HnswIndex
from ehub.index.keys import read_keys
from ehub.index.lock import PRODUCTS
from ehub.index.partitioned import PartitionedIndex
from ehub.types import Metric

_FORMAT = 3
# Of the files that a save writes.
_SUFFIXES = (".hnsw", ".keys", ".partitions", ".vectors", ".new")
# Checksums are taken of parts, side by side.
_PART_BYTES = 1 << 24
# A save writes some 300 MB/s; a child that takes longer than this is stuck.
_CHILD_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a saved index is.

    Attributes:
        name: the part of its file names that belongs to this save.
        build: the parameters that the index was built with; others need another index.
        watermark: the state of the database that it equals, as text.
        nonce: names this save in what was acknowledged to the database.
        rows: its rows.
        calibration: what was measured about it.
        sizes: bytes, by file name; ``checksums``: CRC-32 of the CRC-32 of parts, by file name.
    """

    name: str
    build: dict[str, Any]
    watermark: str
    nonce: str
    rows: int
    calibration: Calibration
    sizes: dict[str, int]
    checksums: dict[str, int]


class IndexStore:
    """The folder of one index.

    One process at a time owns it and may save; others may load.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[bytes] | None = None

    def own(self) -> bool:
        """Try to become the process that saves here; True if it is this one."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    def release(self) -> None:
        """Let another process save here."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def identity(self) -> uuid.UUID:
        """Return the id that the owner of this folder goes by, the same after a restart."""
        path = self.folder / "id"
        with contextlib.suppress(OSError, ValueError):
            return uuid.UUID(path.read_text().strip())
        made = uuid.uuid4()
        _write_synced(path, str(made).encode())
        return made

    def manifest(self) -> Manifest | None:
        """Return what is saved here, None if nothing is.

        Raises:
            IndexFileError: the manifest is damaged or of another format.
        """
        path = self.folder / "manifest.json"
        try:
            outer = json.loads(path.read_bytes())
            body = outer["manifest"]
            if zlib.crc32(_canonical(body)) != outer["checksum"]:
                raise IndexFileError(f"{path} is damaged: its checksum does not fit")
            if body.pop("format") != _FORMAT:
                raise IndexFileError(f"{path} was written by another release")
            body["calibration"] = Calibration.from_dict(body["calibration"])
            return Manifest(**body)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexFileError(f"{path} cannot be read: {error}") from error

    def load(self, manifest: Manifest) -> HnswIndex | PartitionedIndex:
        """Read the saved index, after checking size and checksum of every file.

        It is a partitioned one if ``partition_by`` is among what it was built with, and not None.

        Raises:
            IndexFileError: a file is missing or damaged.
        """
        name, build = manifest.name, manifest.build
        keys_file = f"{name}.keys"
        try:
            others = [file for file in manifest.sizes if file != keys_file]
            with ThreadPoolExecutor(1) as beside:
                # Summing up lets other threads run; meanwhile the keys are read.
                whole = beside.submit(
                    lambda: all(self._is_whole(manifest, file) for file in others)
                )
                known = self._is_whole(manifest, keys_file)
                keys = read_keys(self.folder / keys_file) if known else []
                if not (known and whole.result()):
                    raise IndexFileError(
                        f"{self.folder} is damaged: a size or checksum does not fit"
                    )
            dims, metric = int(build["dims"]), cast("Metric", build["metric"])
            if build.get("partition_by") is not None:
                M, ef_construction = int(build["m"]), int(build["ef_construction"])
                return PartitionedIndex.load(
                    self.folder, name, dims, metric, keys, M, ef_construction
                )
            graph = self.folder / f"{name}.hnsw"
            return HnswIndex.load(graph, dims, metric, keys, manifest.calibration)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise IndexFileError(f"{self.folder} cannot be read: {error}") from error

    def _is_whole(self, manifest: Manifest, name: str) -> bool:
        path = self.folder / name
        size, checksum = manifest.sizes[name], manifest.checksums[name]
        return path.stat().st_size == size and _checksum(path) == checksum

    def size(self) -> int:
        """Return the bytes of the files in the folder."""
        total = 0
        with contextlib.suppress(OSError):
            for file in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    total += file.stat().st_size
        return total

    def begin_save(
        self, index: HnswIndex | PartitionedIndex, build: dict[str, Any], watermark: str
    ) -> Callable[[], Manifest]:
        """Take the state of an index, of which nothing may be staged, and return how to finish.

        The state is that of this call: a forked process, which has the memory as of now and needs
        no copy of anything, writes it while searches and changes go on (hnswlib holds the
        interpreter while it writes). Where there is no fork to rely on, it is written here and
        now. Call the result to wait for the files, sync them and make them count; it returns the
        new manifest, and the one before stays until then.

        Raises:
            IndexFileError: from here or from the result: the disk is full, the folder is gone, or
                another process owns it.
        """
        if self._lock is None:
            raise IndexFileError(f"{self.folder} is saved to by another process")
        name = uuid.uuid4().hex
        files = index.files(name)
        rows, calibration = len(index), index.calibration

        def write() -> None:
            for file, write_file in files.items():
                write_file(self.folder / file)

        child = _fork(write)
        if child is None:
            try:
                write()
            except OSError as error:
                self._sweep()
                raise IndexFileError(f"{self.folder} cannot be written: {error}") from error
        paths = [self.folder / file for file in files]

        def finish() -> Manifest:
            try:
                if child is not None:
                    _wait(child)
                for path in paths:
                    _sync(path)
                _sync(self.folder)
                manifest = Manifest(
                    name=name,
                    build=build,
                    watermark=watermark,
                    nonce=str(uuid.uuid4()),
                    rows=rows,
                    calibration=calibration,
                    sizes={path.name: path.stat().st_size for path in paths},
                    checksums={path.name: _checksum(path) for path in paths},
                )
                body = {"format": _FORMAT, **dataclasses.asdict(manifest)}
                outer = {"manifest": body, "checksum": zlib.crc32(_canonical(body))}
                _write_synced(self.folder / "manifest.json", json.dumps(outer, indent=1).encode())
            except OSError as error:
                raise IndexFileError(f"{self.folder} cannot be written: {error}") from error
            finally:
                self._sweep()
            return manifest

        return finish

    def delete(self) -> None:
        """Remove what is saved; the folder itself stays while others look at it."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove the files that no manifest names: those of the save before, or of a crash."""
        with contextlib.suppress(OSError, IndexFileError):
            manifest = self.manifest()
            named = set(manifest.sizes) if manifest else set()
            for path in self.folder.iterdir():
                if path.suffix in _SUFFIXES and path.name not in named:
                    path.unlink(missing_ok=True)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _checksum(path: Path) -> int:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _checksum_of(content)


def _checksum_of(content: bytes | mmap.mmap) -> int:
    starts = range(0, len(content), _PART_BYTES)
    with memoryview(content) as view:

        def of_part(start: int) -> int:
            return zlib.crc32(view[start : start + _PART_BYTES])

        try:
            with ThreadPoolExecutor() as beside:
                sums = list(beside.map(of_part, starts))
        except RuntimeError:
            # An interpreter that is leaving starts no threads.
            sums = list(map(of_part, starts))
        return zlib.crc32(b"".join(each.to_bytes(4, "big") for each in sums))


def _write_synced(path: Path, data: bytes) -> None:
    """Write a file under another name, sync it, rename it, and sync the folder."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.new")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fork(work: Callable[[], object]) -> int | None:
    """Do some work in a child process, which has the memory as it is now; None if there is none.

    The child touches nothing but the index and its files, and leaves without cleaning up after a
    process that it is not.
    """
    if not sys.platform.startswith("linux"):
        return None
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads: the child must take no lock of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        with PRODUCTS.write():
            child = os.fork()
            if not child:
                # In here: to give the lock back takes another one, which a thread may have held
                # that is not in the child.
                status = 1
                try:
                    work()
                    status = 0
                finally:
                    os._exit(status)
    return child


def _wait(child: int) -> None:
    deadline = time.monotonic() + _CHILD_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise IndexFileError(
                    f"the process that saves an index ended with status {status}; is the disk full?"
                )
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise IndexFileError("the process that saves an index was stuck")
