"""Counters of several processes: a file for each in one directory, and one for all that have ended.

A process writes into memory that is mapped from its file, so what it has counted is there after SIGKILL as well. It
holds a lock (flock) on it for as long as it lives: who lives is known by that and never by a number, which another
process may have by now.

    {ordinal}.{pid}.{random}.cells   a process; ``ordinal`` tells apart what is published in several registries
    {ordinal}.folded                 the sums of processes that have ended, and which these are
    {ordinal}.lock                   held by who folds, or hands out what all processes have in common

A file of cells is sparse and has its full size at once, so that it is never mapped anew. First comes text, a line of
JSON for each series: what it is, its name, how many cells it has, its labels. Where its cells are follows from the
lines before it. A series is in the text before anything is counted in it, and a line without an end is none.

**Nothing is counted twice, or lost, whoever dies when.** Files are folded by writing the sums and the names of what is
in them into a new file, which replaces the old one in one step, and only then removed. Whoever reads leaves out what
is named there, and begins again if it was replaced meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EFBIG, EMFILE, ENFILE, ENOMEM, ENOTSUP
from functools import lru_cache
from mmap import mmap
from pathlib import Path
from struct import Struct
from typing import Any, Literal, TypeAlias, cast, final, get_args
from weakref import WeakSet

if sys.platform != "win32":
    import fcntl

Kind: TypeAlias = Literal["count", "gauge", "reading"]
"""``count``: added up over all processes, also those that have ended. ``gauge``: likewise over those that live.
``reading``: a number that a living process has, and that is not counted (`encoded`).
"""
Series: TypeAlias = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels."""
Line: TypeAlias = tuple[Kind, Series, int]
"""A series of a file, and how many cells it has."""

TEXT = 8 << 20
"""Bytes for the text of a file; a series takes some 80."""
CELLS = 1 << 20
"""Cells of a file, of 8 bytes each."""
CHUNK = 1 << 16
"""Bytes that are made sure of at a time: who touches memory that is mapped from a full disk is ended for it."""
RESERVED = 64
"""Cells at the beginning that belong to nobody: there is counted what no longer has room. The most of one series."""
HEAD = b"seawall cells 1\n"

_NAME = re.compile(r"(\d+)\.\d+\.[0-9a-f]{16}\.cells")
_OTHERS = re.compile(r"\d+\.(folded(\.new)?|lock|\d+\.[0-9a-f]{16}\.cells\.new)")
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_KINDS = frozenset(get_args(Kind))
_USELESS = (OSError, ValueError, RecursionError)
_SHORT = frozenset({EMFILE, ENFILE, ENOMEM})
_DOUBLE, _INTEGER = Struct("=d"), Struct("=q")

logger = logging.getLogger("seawall")


def encoded(value: float) -> int:
    """A reading as a cell. 0, which is what a cell begins with, is no reading."""
    bits: int = _INTEGER.unpack(_DOUBLE.pack(value))[0]
    return ~bits


def decoded(cell: int) -> float | None:
    """What `encoded` was given."""
    value: float = _DOUBLE.unpack(_INTEGER.pack(~cell))[0]
    return value if cell else None


def line(kind: Kind, series: Series, cells: int) -> bytes:
    """A series in the text of a file."""
    name, labels = series
    return json.dumps([kind, cells, name, *labels], separators=(",", ":")).encode() + b"\n"


# Processes of one service have mostly the same series, and often in the same order.
@lru_cache(maxsize=8)
def _parsed(text: bytes) -> tuple[Line, ...]:
    """The series of a file. Raises `ValueError` or `RecursionError`."""
    # Of what is written at this moment there may be a part: what has no end is no line.
    head, *lines = text.split(b"\n")[:-1] or [b""]
    if head != HEAD.rstrip() or len(text) >= TEXT:
        raise ValueError("no file of cells")
    return tuple(map(_parsed_line, lines))


@lru_cache(maxsize=1 << 15)
def _parsed_line(text: bytes) -> Line:
    found = json.loads(text)
    if type(found) is not list or len(found) < 3:
        raise ValueError("no series")
    kind, cells, *series = found
    if type(kind) is not str or kind not in _KINDS or type(cells) is not int or not 0 < cells <= RESERVED:
        raise ValueError("no cells")
    name, *labels = _strings(series)
    return cast(Kind, kind), (name, tuple(labels)), cells


def _strings(found: Any) -> list[str]:
    if type(found) is not list or not all(type(one) is str for one in found):
        raise ValueError("no names")
    return cast(list[str], found)


@final
class _Lock:
    """A lock on a file, until it is closed or the process ends. Raises `OSError`, `BlockingIOError` if it is taken."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS | flags, 0o600)
        _held.add(self)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


_held: WeakSet[_Lock] = WeakSet()


def _let_go() -> None:
    """After a fork: what the parent has locked is locked for as long as its children have it open."""
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@final
class CellFile:
    """The cells of this process, in a file that outlives it. ``values[index] += 1`` counts.

    Raises `OSError`, also `append` if there is no room.
    """

    def __init__(self, directory: Path, ordinal: int) -> None:
        self._pid = os.getpid()
        self.name = f"{ordinal}.{self._pid}.{secrets.token_hex(8)}.cells"
        unfinished = directory / f"{self.name}.new"
        self._lock = _Lock(unfinished, os.O_EXCL)
        try:
            os.ftruncate(self._lock.file, TEXT + 8 * CELLS)
            # Opened once more: a mapping keeps what it is of open, in children that were forked as well, and a lock is
            # there for as long as what has it is open.
            file = os.open(unfinished, os.O_RDWR | _FLAGS)
            try:
                self._map = mmap(file, TEXT + 8 * CELLS)
            finally:
                os.close(file)
            self._room = {0: 0, TEXT: TEXT}
            self._text = self._cells = 0
            self.append(HEAD, RESERVED)
            # Under its name it is locked from the first: nobody takes it for one that has ended.
            unfinished.rename(directory / self.name)
        except BaseException:
            self.close()
            with suppress(OSError):
                unfinished.unlink()
            raise
        self.values = memoryview(self._map)[TEXT:].cast("q")

    def __repr__(self) -> str:
        return f"<CellFile {self.name}, {self._cells:,} cells>"

    @property
    def is_mine(self) -> bool:
        """Whether it was this process that made it, and not the one that it was forked from."""
        return self._pid == os.getpid()

    def append(self, text: bytes, cells: int) -> None:
        """Add the `line` of a series, whose cells come after those of all before it."""
        end = self._text + len(text)
        if end >= TEXT or self._cells + cells > CELLS:
            raise OSError(EFBIG, os.strerror(EFBIG))
        self._reserve(TEXT, TEXT + 8 * (self._cells + cells))
        self._reserve(0, end)
        self._map[self._text : end] = text
        self._text = end
        self._cells += cells

    def _reserve(self, region: int, end: int) -> None:
        while (room := self._room[region]) < end:
            self._room[region] += os.pwrite(self._lock.file, bytes(CHUNK - room % CHUNK), room)

    def close(self) -> None:
        """Have ended, as far as others can tell. What is mapped stays for as long as somebody has ``values``."""
        self._lock.close()


@final
class Found:
    """What several processes have counted together, and the readings of each that has them."""

    def __init__(self) -> None:
        self.counts: dict[Series, list[int]] = {}
        self.readings: dict[Series, list[float]] = {}

    def add(self, series: Series, cells: Sequence[int]) -> None:
        """Add what one process has counted. Versions that count in other cells are not added up."""
        known = self.counts.get(series)
        if known is None:
            self.counts[series] = list(cells)
        elif len(known) == len(cells):
            for at, cell in enumerate(cells):
                known[at] += cell

    def add_file(self, lines: Iterable[Line], cells: Sequence[int], *, lives: bool) -> None:
        """Add what is in the file of a process."""
        counts, at = self.counts, RESERVED
        for kind, series, width in lines:
            if kind == "count" or (lives and kind == "gauge"):
                known = counts.get(series)
                if width == 1 and known is not None and len(known) == 1:
                    known[0] += cells[at]  # most are: without the call, half of the time
                else:
                    self.add(series, cells[at : at + width])
            elif lives and (value := decoded(cells[at])) is not None:
                self.readings.setdefault(series, []).append(value)
            at += width


@final
class CellFiles:
    """All files of one ordinal in a directory, which is made if it is not there. Raises `OSError`."""

    def __init__(self, directory: Path, ordinal: int) -> None:
        if sys.platform == "win32":
            raise OSError(ENOTSUP, "not on this system")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
        self._directory = directory
        self._ordinal = ordinal
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"<CellFiles {self._ordinal} in {self._directory}>"

    def __str__(self) -> str:
        return str(self._directory)

    def create(self) -> CellFile:
        """The file of this process. Raises `OSError`."""
        return CellFile(self._directory, self._ordinal)

    def read(self, but: str | None = None) -> Found:
        """What all processes have counted, but for the one whose file is ``but``."""
        while True:
            before = self._readable()
            found, names = self._folded(before)
            for name in self._names():
                if name != but and name not in names:
                    self._add(found, name)
            # Once more for each time that somebody has folded meanwhile.
            if self._readable() == before:
                return found

    def fold(self) -> None:
        """Put what has ended into one file, unless somebody else does so just now."""
        with self.alone() as alone:
            try:
                if alone:
                    self._fold()
            except OSError as error:
                self._say("metrics of several processes: %s keeps the files of those that ended (%s)", error)

    def _fold(self) -> None:
        found, names = self._folded(self._contents())
        for name in names:
            (self._directory / name).unlink(missing_ok=True)
        ended = [name for name in self._names() if self._add(found, name, living=False)]
        if not ended:
            return
        series = [[name, labels, cells] for (name, labels), cells in found.counts.items()]
        document = {"token": secrets.token_hex(8), "names": ended, "series": series}
        unfinished = self._path("folded.new")
        unfinished.unlink(missing_ok=True)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600), "w") as file:
            json.dump(document, file)
        unfinished.replace(self._path("folded"))
        for name in ended:
            (self._directory / name).unlink()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process is within such a block; it is not waited for."""
        try:
            lock = _Lock(self._path("lock"))
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            lock.close()

    def _path(self, what: str) -> Path:
        return self._directory / f"{self._ordinal}.{what}"

    def _names(self) -> list[str]:
        """The files of processes."""
        names = []
        try:
            present = os.listdir(self._directory)
        except OSError as error:
            self._complain(self._directory, error)
            return []
        for name in present:
            match = _NAME.fullmatch(name)
            if match is None:
                if not _OTHERS.fullmatch(name):
                    self._complain(self._directory / name, "it is not Seawall's")
            elif int(match[1]) == self._ordinal:
                names.append(name)
        return names

    def _add(self, found: Found, name: str, *, living: bool = True) -> bool:
        """Add what is in a file, if it can be read; ``living`` is whether also that of a process that lives."""
        path = self._directory / name
        try:
            with _opened(path) as file:
                lives = _is_locked(file)
                if lives and not living:
                    return False
                lines, cells = _read(file)
        except FileNotFoundError:
            return False  # it has just been folded
        except _USELESS as error:
            self._complain(path, error)
            return False
        found.add_file(lines, cells, lives=lives)
        return True

    def _contents(self) -> bytes:
        """The folded file. Raises `OSError` where it is there and cannot be read."""
        path = self._path("folded")
        try:
            with _opened(path) as file:
                return b"".join(iter(lambda: os.read(file, 1 << 20), b""))
        except FileNotFoundError:
            return b""
        except ValueError as error:
            self._complain(path, error)
            return b""

    def _readable(self) -> bytes:
        try:
            return self._contents()
        except OSError as error:
            self._complain(self._path("folded"), error)
            return b""

    def _folded(self, contents: bytes) -> tuple[Found, frozenset[str]]:
        """What those have counted that are in the folded file, and their names."""
        found = Found()
        if not contents:
            return found, frozenset()
        try:
            document = json.loads(contents)
            names = frozenset(filter(_NAME.fullmatch, _strings(document["names"])))
            for name, labels, cells in document["series"]:
                found.add((name, tuple(_strings(labels))), [int(cell) for cell in cells])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            self._complain(self._path("folded"), error)
            return Found(), frozenset()
        return found, names

    def _complain(self, path: Path, why: object) -> None:
        """Say once what is left out. A process that is short of something must not: counters would seem to fall."""
        if isinstance(why, OSError) and why.errno in _SHORT:
            raise why
        self._say("metrics of several processes: %s is left out (%s)", why, path)

    def _say(self, message: str, why: object, path: Path | None = None) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, path or self._directory, why)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("no regular file")
        yield file
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    """Whether the process lives whose file it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _read(file: int) -> tuple[tuple[Line, ...], array[int]]:
    """The series of a file and its cells. Raises `OSError`, `ValueError` or `RecursionError`."""
    chunks = [os.read(file, CHUNK)]
    while chunks[-1] and b"\0" not in chunks[-1] and len(chunks) * CHUNK < TEXT:
        chunks.append(os.read(file, CHUNK))
    found = _parsed(b"".join(chunks).partition(b"\0")[0])
    size = 8 * (RESERVED + sum(width for _, _, width in found))
    os.lseek(file, TEXT, os.SEEK_SET)
    cells = array("q")
    cells.frombytes(os.read(file, size))
    if 8 * len(cells) < size:
        raise ValueError("cut off")
    return found, cells
