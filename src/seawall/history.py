"""Which policy held since when: one line of JSON for each change, appended and never rewritten.

Each record holds the SHA-256 of the line before it, so the lines are a chain. Who changes, drops or moves a line breaks
it, and `verify` says where. What a chain cannot show is that somebody wrote all of it anew from some line on, or cut
lines off its end: every hash is there to be computed. Against those who may write to the file, keep the hash of the
last line somewhere else now and then (`seawall history` prints it); whatever comes before it is then as it was.

Several processes of a host may write to one file: they take turns by a lock on it, and of those that bring one and the
same policy the first writes it down. Each compares with the policy that it had itself, so one that is late may repeat a
change. On Windows, which has no such locks, it is for one process.

A line that was cut off, because the power went in the middle of it, is reported by `verify` until the next record
follows on a line of its own, with the hash of the piece. Nothing is ever cleaned away.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from time import monotonic, sleep
from typing import Any, BinaryIO, TypeAlias, final

from seawall.config.differences import differences
from seawall.notation import instant_text
from seawall.policy import Policy

if sys.platform != "win32":
    import fcntl

Path: TypeAlias = str | os.PathLike[str]

GENESIS = "0" * 64
"""What the first record has for the hash of the line before it."""
MOST = 1_000
"""Changes that a record holds. Of more the rest is counted."""

_LONGEST = 1 << 24
"""Bytes of a line. No record is longer; a file that has no line break for so long is none of ours."""
_BLOCK = 1 << 16
_PATIENCE = 2.0
"""Seconds to wait for other processes, each of which needs milliseconds."""
_BEGINNING = b'{"seq": '
_OPEN = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One change. ``time`` is ISO 8601 in UTC, with milliseconds; the hashes are SHA-256, in hexadecimal.

    ``digest`` is that of the policy (`Policy.digest`) and ``files`` has those of its files, ``diff`` says in words what
    is different, and ``by`` which process saw it first. ``hash`` is that of the record's own line and not in it.
    """

    seq: int
    time: str
    digest: str
    files: Mapping[str, str]
    diff: tuple[str, ...]
    by: Mapping[str, str | int]
    previous: str
    hash: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """What is in its line, in that order."""
        return {
            "seq": self.seq,
            "time": self.time,
            "digest": self.digest,
            "files": dict(self.files),
            "diff": list(self.diff),
            "by": dict(self.by),
            "previous": self.previous,
        }


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """What breaks the chain, and in which line, counted from 1."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def append(
    path: Path, policy: Policy, files: Mapping[str, str], now: float, old: Policy | None = None
) -> Record | None:
    """Write down that ``policy`` holds since ``now`` (seconds since the epoch), unless the last record says so already.

    ``files`` has the SHA-256 of each file by its name. ``old`` is the policy that held in this process until now; a
    process that starts has none. The file is made if it is not there, for its owner to write and its group to read.
    It takes the same time however long the file is, and returns when the record is on the disk.

    Raises `OSError` where that cannot be done, also for a file that is no history: one like that is left as it is.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _OPEN, 0o640)
    try:
        _check(descriptor)
        with _locked(descriptor, exclusive=True):
            size = os.fstat(descriptor).st_size
            end = _end(descriptor, size)
            last = end.record
            if last is not None and last.digest == policy.digest:
                return None
            record = Record(
                seq=1 if last is None else last.seq + 1,
                time=instant_text(now),
                digest=policy.digest,
                files=files,
                diff=tuple(_diff(policy, old, first=last is None)),
                by={"pid": os.getpid(), "host": socket.gethostname()},
                previous=sha256(end.content).hexdigest() if size else GENESIS,
            )
            line = json.dumps(record.as_dict()).encode()
            if len(line) > _LONGEST:
                raise OSError(errno.EFBIG, "the names of the files are too long for a record", os.fspath(path))
            _write(descriptor, (b"\n" if size and not end.whole else b"") + line + b"\n", size)
    finally:
        os.close(descriptor)
    if size == 0:
        _sync_directory(path)
    return _parsed(line)


def read(path: Path, last: int | None = None) -> Iterator[Record]:
    """The records, oldest first; with ``last`` so many from the end, without reading the rest.

    Lines that are no records are left out: `verify` speaks of them. Raises `OSError` where the file cannot be read.
    """
    with _opened(path) as (file, size):
        if last is None:
            yield from filter(None, (_parsed(line) for line, _ in _lines(file, size)))
            return
        found = list(islice(filter(None, map(_parsed, _backwards(file.fileno(), size))), last))
    yield from reversed(found)


def verify(path: Path) -> Problem | None:
    """What is wrong with the chain and where, if anything is. Raises `OSError` where the file cannot be read."""
    since, seq, torn, whole = None, 1, 0, True
    with _opened(path) as (file, size):
        for number, (line, ends) in enumerate(_lines(file, size), 1):
            record = _parsed(line)
            if record is None:
                torn, whole = torn or number, ends
                if since is None:
                    since = sha256(line)
                else:
                    since.update(b"\n" + line)
                continue
            continues = record.previous == (GENESIS if since is None else since.hexdigest())
            if torn and not continues:
                return Problem(torn, _UNREADABLE)
            if record.seq != seq:
                return Problem(number, f"this is record {record.seq}, and record {seq} belongs here")
            if not continues:
                before = "nothing" if number == 1 else f"line {number - 1} as it is now"
                return Problem(number, f"it was not written after {before}")
            since, seq, torn = sha256(line), seq + 1, 0
    if torn:
        return Problem(torn, _UNREADABLE if whole else _CUT_OFF)
    return None


_UNREADABLE = "it cannot be read, and no record that follows knows of it"
_CUT_OFF = "it was cut off while it was written; the next record will go on after it"


def _diff(policy: Policy, old: Policy | None, *, first: bool) -> Iterator[str]:
    if old is not None:
        changes = differences(old, policy)
        yield from map(str, changes[:MOST])
        if len(changes) > MOST:
            yield f"... and {len(changes) - MOST:,} more"
        return
    counts = ((policy.plans, "plan"), (policy.tenants, "tenant"), (policy.routes, "route"))
    contents = ", ".join(f"{len(held):,} {noun}{'' if len(held) == 1 else 's'}" for held, noun in counts)
    yield f"first policy: {contents}" if first else f"changed while nothing was running: {contents}"


def _parsed(line: bytes) -> Record | None:
    """The record in a line, if it is one."""
    try:
        match json.loads(line):
            case {
                "seq": int(seq),
                "time": str(time),
                "digest": str(digest),
                "files": dict(files),
                "diff": list(diff),
                "by": dict(by),
                "previous": str(previous),
            } if all(isinstance(text, str) for text in (*files.values(), *diff)):
                return Record(seq, time, digest, files, tuple(diff), by, previous, sha256(line).hexdigest())
    except (ValueError, RecursionError):
        pass
    return None


# The file


@final
@dataclass(frozen=True, slots=True)
class _End:
    """The last record, and all there is from its line on. If it is ``whole``, a line break follows."""

    record: Record | None
    content: bytes
    whole: bool


def _end(descriptor: int, size: int) -> _End:
    pieces: list[bytes] = []
    record = None
    for line in _backwards(descriptor, size):
        pieces.append(line)
        record = _parsed(line)
        if record is not None:
            break
        # What a power cut leaves: nothing, zeros, or the beginning of a record.
        if line.strip(b"\0") and line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
            raise OSError(errno.EINVAL, "it is not a history, and is left as it is")
    whole = pieces[0] == b""
    return _End(record, b"\n".join(reversed(pieces[whole:])), whole)


def _backwards(descriptor: int, end: int) -> Iterator[bytes]:
    """The lines before ``end``, the last one first: what follows the last line break, which may be nothing."""
    pieces: list[bytes] = []
    length = 0
    while end > 0:
        start = max(0, end - _BLOCK)
        os.lseek(descriptor, start, os.SEEK_SET)
        lines = os.read(descriptor, end - start).split(b"\n")
        end = start
        while True:
            pieces.append(lines.pop())
            length += len(pieces[-1])
            if not lines:
                break
            yield b"".join(reversed(pieces))
            pieces, length = [], 0
        if length > _LONGEST:
            raise OSError(errno.EINVAL, "it is not a history, and is left as it is")
    yield b"".join(reversed(pieces))


def _lines(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """The lines of the first ``size`` bytes, and of each whether it has its end."""
    while size > 0 and (line := file.readline(min(size, _LONGEST + 1))):
        size -= len(line)
        yield line.removesuffix(b"\n"), line.endswith(b"\n")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file, and its size while nobody was writing to it."""
    with os.fdopen(os.open(path, os.O_RDONLY | _OPEN), "rb") as file:
        _check(file.fileno())
        size = os.fstat(file.fileno()).st_size
        with suppress(OSError), _locked(file.fileno(), exclusive=False):
            size = os.fstat(file.fileno()).st_size
        yield file, size


def _check(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "it is not a file")


@contextmanager
def _locked(descriptor: int, *, exclusive: bool) -> Iterator[None]:
    if sys.platform == "win32":  # pragma: no cover
        yield
        return
    patience = monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if monotonic() > patience:
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked") from None
            sleep(0.005)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _write(descriptor: int, content: bytes, size: int) -> None:
    """Append all of ``content``, or nothing."""
    left = memoryview(content)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _sync_directory(path: Path) -> None:
    """Have the name of a new file on the disk as well, where directories can be opened."""
    with suppress(OSError):
        descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
