"""Calendar quotas that outlive a restart: a file with what was used of them, written anew now and then.

Buckets are not in it: they are full again before anybody notices. A snapshot is written beside its place, flushed to
the disk and then renamed, so that there is always a whole one; its last line is a checksum of the others. What was used
since the last one is lost with a process that is killed.

It holds ids and addresses as they are, and is its owner's alone to read.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import IO, Any, ClassVar, final
from weakref import WeakValueDictionary, finalize

from seawall import ticker
from seawall.backends import Key
from seawall.backends.memory import Count, MemoryBackend
from seawall.decision import Clock
from seawall.rate import COUNT_MASK, SECOND

try:
    import fcntl
except ImportError:  # Windows: whoever comes later writes over it
    fcntl = None  # type: ignore[assignment]

EVERY = 30.0
"""Seconds between two snapshots."""
VERSION = 1

logger = logging.getLogger("seawall")


class SnapshotError(ValueError):
    """Why a file is no snapshot."""


def write(path: Path, counts: Iterable[Iterable[Count]]) -> int:
    """Replace the snapshot at ``path`` by one of ``counts``; the number of them. Raises `OSError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, number = sha256(), 0
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for part in (_head(), *map(_lines, counts)):
                number += part.count(b"\n")
                digest.update(part)
                file.write(part)
            file.write(_json({"sha256": digest.hexdigest()}))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return number - 1


def _head() -> bytes:
    return _json({"seawall": "quotas", "version": VERSION})


def _lines(counts: Iterable[Count]) -> bytes:
    return b"".join(_json([name, store, *_written(key), end, used]) for name, store, key, end, used in counts)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _written(key: Key) -> tuple[str, str]:
    return ("t", key) if isinstance(key, str) else ("b", key.hex())


def read(path: Path) -> Iterator[Count]:
    """What is in the snapshot at ``path``; nothing before all of it has been checked. Raises `SnapshotError` for what
    is none and `OSError` for what cannot be read."""
    digest, last = sha256(), b""
    with path.open("rb") as file:
        if not file.readline(1 << 10) == _head():
            raise SnapshotError("it does not begin like a snapshot of quotas")
        digest.update(_head())
        for line in file:
            digest.update(last)
            last = line
        if last != _json({"sha256": digest.hexdigest()}):
            raise SnapshotError("it is not whole: its checksum is another")
        file.seek(0)
        return iter(list(_counts(file)))


def _counts(file: IO[bytes]) -> Iterator[Count]:
    for line in list(file)[1:-1]:
        try:
            name, store, kind, key, end, used = json.loads(line)
            count: Any = (name, store, key if kind == "t" else bytes.fromhex(key), end, used)
        except (ValueError, TypeError, RecursionError) as error:
            raise SnapshotError(f"a line of it is no count: {error}") from None
        if [type(one) for one in (name, store, key, end, used)] != [str, str, str, int, int]:
            raise SnapshotError("a line of it is no count")
        if not (0 <= used <= COUNT_MASK and 0 < end < 1 << 40):
            raise SnapshotError("a count of it is out of range")
        yield count


@final
class Keeper:
    """Keeps the quotas of one backend in one file. Of several processes that want the same file, the first one does."""

    _all: ClassVar[WeakValueDictionary[Path, Keeper]] = WeakValueDictionary()

    def __init__(self, path: Path, backend: MemoryBackend, wall_clock: Clock) -> None:
        self.path = path
        self.backend = backend
        self._wall = wall_clock
        self._process = 0
        """The one that has the lock."""
        self._writing = Lock()
        """As an application ends it writes a snapshot, and the thread for that may be about to."""
        self._said = ""
        self._load()

    def __repr__(self) -> str:
        return f"<Keeper of {self.path}>"

    @classmethod
    def of(cls, path: Path, backend: MemoryBackend, wall_clock: Clock) -> Keeper:
        """The keeper of ``path``, with the backend that it had first: all of one process count together there."""
        known = cls._all.get(path)
        if known is None:
            known = cls._all[path] = cls(path, backend, wall_clock)
            ticker.every(EVERY, known.save)
        return known

    def _load(self) -> None:
        now = self._wall() // SECOND
        try:
            self.backend.restore(count for count in read(self.path) if count[3] > now)
        except FileNotFoundError:
            pass
        except (SnapshotError, OSError, UnicodeDecodeError) as error:
            # Kept for whoever wants to look: the next snapshot would write over it. A directory stays where it is.
            aside = self.path
            if os.path.isfile(self.path):
                with suppress(OSError):
                    aside = self.path.replace(self.path.with_name(f"{self.path.name}.broken"))
            self._say(f"{aside} is no snapshot, and quotas begin anew: {error}")

    def save(self) -> None:
        """Write a snapshot, unless another process keeps one there.

        Who has served nobody, such as the process that workers are forked from, leaves that to who has.
        """
        if self._process != os.getpid() and not any(store["keys"] for store in self.backend.statistics().values()):
            return
        with self._writing:
            self._save()

    def start_anew(self) -> None:
        """After a fork, for somebody may have been writing."""
        self._writing = Lock()

    def _save(self) -> None:
        try:
            if not self._is_mine():
                return self._say(f"{self.path} is kept by another process; the quotas of this one end with it")
            now = self._wall() // SECOND
            counts = self.backend.quotas()
            write(self.path, ([count for count in part if count[3] > now and count[4]] for part in counts))
        except OSError as error:
            return self._say(f"{self.path} cannot be written, so a restart forgets what was used of quotas: {error}")
        self._said = ""

    def _is_mine(self) -> bool:
        if self._process != os.getpid() and fcntl is not None:
            # A lock is its process's own, also after a fork.
            file = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if not isinstance(error, BlockingIOError):
                    raise
                return False
            finalize(self, os.close, file).atexit = False
            self._process = os.getpid()
        return True

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            logger.warning("%s", text, extra={"event": "snapshot"})


def _start_anew() -> None:
    for keeper in list(Keeper._all.values()):
        keeper.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


@atexit.register
def _save_all() -> None:
    """For servers that do not tell their applications when they end."""
    for keeper in list(Keeper._all.values()):
        keeper.save()
