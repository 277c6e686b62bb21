"""Access logs as requests: common, combined or JSON, plain or gzip, timed from their start, in the order of time.

A log is written when requests end, so its lines are sorted within a window; and most logs know whole seconds only, so
the lines of one second are spread evenly over it, or every second would look like a burst. What cannot be read is
counted, with where and why.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from gzip import GzipFile
from heapq import heapify, heappop, heapreplace
from io import BufferedReader
from itertools import chain, islice
from operator import itemgetter
from os import fstat
from stat import S_ISREG
from typing import Any, NamedTuple, TypeAlias, cast, final
from urllib.parse import unquote, urlsplit

from seawall.config.diagnostics import printable
from seawall.rate import SECOND
from seawall.replay.fields import Document, Field, Getter, Wanted, getter, of_documents, of_text
from seawall.replay.instants import Instants, read_duration

BLOCK = 1 << 18
"""Bytes that are read at a time, and the longest line that is."""
WINDOW = 50_000
"""Lines by which one may stand too early or too late."""
LEAD = 3_600 * SECOND
"""A file is opened for merging when the others have come as close to its first line as this."""
SAMPLE = 200
SHOWN = 3
ENOUGH = 10_000
"""Unreadable lines after which it is not worth reading on, where most are."""
_SECOND_AT_ONCE = 100_000
_GROUPS = 4
_BLANK = frozenset(("", "-", None))

_LINE = re.compile(
    r'(\S+) (\S+) ([^\[]*) \[([^\]]{1,64})\] "([^"\\]*(?:\\.[^"\\]*)*)" ([0-9]{3}|-) ([0-9]+|-)(?= |$)', re.DOTALL
)
_TOKEN = re.compile(r'(?:([A-Za-z_]\w*)=)?(?:"([^"\\]*(?:\\.[^"\\]*)*)"|([^\s"]\S*))', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|(.))")
_decode = json.JSONDecoder().raw_decode
_METHOD = re.compile(r"[A-Za-z][A-Za-z_-]{0,31}")

Values: TypeAlias = tuple[int, str, str, str, int, str | None, str | None, str | None, tuple[str | None, ...]]
"""A `Request` but for its time."""


class LogError(Exception):
    """A log that cannot be used; its text says which and why, in one or more lines."""


class Unreadable(Exception):
    """A line that cannot be used."""


@final
class Request(NamedTuple):
    """One line. ``at`` is the start in nanoseconds since the epoch, ``took`` nanoseconds, -1 where nobody knows.

    ``path`` is decoded and without its query, ``ip`` the direct peer's address or "" and ``status`` what was answered,
    0 for not known. ``states`` are those of `Wanted.states`.
    """

    at: int
    took: int
    method: str
    path: str
    ip: str
    status: int
    forwarded: str | None
    tenant: str | None
    key: str | None
    states: tuple[str | None, ...]


@final
class AccessLog:
    """One file, or stdin for ``-``. Its numbers are right when `requests` has come to its end.

    ``lines`` are those that are not blank, ``unreadable`` how many of them could not be used, ``examples`` the first of
    those with number and reason. ``fields`` are where things were found, ``absent`` those that were named and that none
    of the first lines has; ``cut`` is why a file ended too early.
    """

    def __init__(self, path: str, wanted: Wanted) -> None:
        self.name = "stdin" if path == "-" else path
        self.form = ""
        self.fields: Mapping[str, Field] = {}
        self.lines = 0
        self.unreadable = 0
        self.examples: list[tuple[int, str]] = []
        self.absent: list[str] = []
        self.cut = ""
        self.instants = Instants()
        self._sample: list[Mapping[str, Any]] | None = None
        self.wanted = wanted
        try:
            self._raw = _stdin() if path == "-" else open(path, "rb")  # noqa: SIM115  # see `close`
        except (OSError, ValueError) as error:
            raise LogError(self._why_not(error)) from None
        try:
            told = fstat(self._raw.fileno())
            self.size = told.st_size if S_ISREG(told.st_mode) and path != "-" else 0
            self._packed = GzipFile(fileobj=self._raw) if self._raw.peek(2)[:2] == b"\x1f\x8b" else None
            self._started, self._entries = self._values()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise LogError(self._why_not(error)) from None
            raise

    def __enter__(self) -> AccessLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; stdin is not ours to close."""
        if self._raw is not getattr(sys.stdin, "buffer", None):
            self._raw.close()

    def __repr__(self) -> str:
        return f"<AccessLog {self.name}: {self.lines} lines, {self.unreadable} of them unreadable>"

    @property
    def position(self) -> int:
        """Bytes of the file that have been read, 0 where that is not known."""
        return self._raw.tell() if self.size and not self._raw.closed else self.size

    def requests(self) -> Iterator[Request]:
        """All requests in the order of their start, give or take `WINDOW` lines."""
        return _sorted(self._timed())

    def _why_not(self, error: Exception) -> str:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return f"{printable(self.name)} cannot be read: {reason}"

    def _blocks(self) -> Iterator[bytes]:
        read: Callable[[int], bytes] = self._raw.read1 if self._packed is None else self._packed.read1
        begun = False
        try:
            while block := read(BLOCK):
                begun = True
                yield block
        except (OSError, EOFError, zlib.error) as error:
            if not begun:
                raise LogError(self._why_not(error)) from None
            self.cut = str(error)

    def _numbered(self) -> Iterator[tuple[int, str]]:
        """Lines with their numbers. One that is too long is there as ``""``, blank ones are not."""
        number, rest, skipping = 0, b"", False
        for block in chain(self._blocks(), (b"\n",)):
            head, newline, tail = block.rpartition(b"\n")
            if not newline:
                rest += block
                if len(rest) > BLOCK:
                    rest, skipping = b"", True
                continue
            lines = (rest + head).decode("utf-8", "replace").split("\n")
            rest = tail
            if number == 0:
                lines[0] = lines[0].removeprefix("\ufeff")
            if skipping:
                number += 1
                skipping = False
                del lines[0]
                yield number, ""
            for number, line in enumerate(lines, number + 1):  # noqa: B020  # it goes on where it was
                if line and not line.isspace():
                    yield number, line

    def _timed(self) -> Iterator[Request]:
        started = self._started
        for at, values in _spread(self._entries):
            took = values[0]
            yield Request(at if started or took < 0 else max(0, at - took), *values)

    def _values(self) -> tuple[bool, Iterator[tuple[int, bool, Values]]]:
        """Whether times are those of the start; and for each line its time, whether in whole seconds, and the rest."""
        lines = self._numbered()
        sample = [*islice(lines, SAMPLE)]
        texts = [line for _, line in sample if line]
        self._array = texts[:1] != [] and texts[0].lstrip()[:1] == "["
        if 2 * sum(line.lstrip()[:1] == "{" for line in texts) >= max(1, len(texts)):
            load = self._understand_documents(texts)
        else:
            load = self._understand_text(texts)
        self.absent = [role for role in self.wanted.fields if not any(self._has(role, load, line) for line in texts)]
        read = self._reader(load)
        self._sample = None
        return "start" in self.fields, self._read(chain(sample, lines), read)

    def _understand_documents(self, texts: Iterable[str]) -> Callable[[str], Document]:
        documents: list[Mapping[str, Any]] = []
        for line in texts:
            try:
                documents.append(_document(line))
            except Unreadable:
                continue
        self.form, self._sample = "JSON", documents
        self.fields, names = of_documents(documents, self.wanted)
        missing = [
            " or ".join(roles)
            for roles in (("time", "start"), ("path", "request"))
            if not any(role in self.fields for role in roles)
        ]
        if documents and missing:
            there = printable(", ".join(names[:40]))
            hint = f"--field {missing[0].partition(' ')[0]}=NAME says which it is"
            raise LogError(f"{printable(self.name)}: no field looks like the {missing[0]}; there are {there}; {hint}")
        return _document

    def _understand_text(self, texts: Iterable[str]) -> Callable[[str], Document]:
        parsed = [found for found in map(_parts, texts) if found is not None]
        self.form = "common or combined"
        self.fields = of_text([values for values, _ in parsed], [named for _, named in parsed], self.wanted)
        names = {field.name for field in self.fields.values()}
        return _whole_text if any(name not in _HEAD for name in names) else _head_of_text

    def _has(self, role: str, load: Callable[[str], Document], line: str) -> bool:
        fetch = self._getter(role)
        try:
            return fetch is not None and fetch(load(line)) is not None
        except Unreadable:
            return False

    def _getter(self, role: str) -> Getter | None:
        field = self.fields.get(role)
        return None if field is None else getter(field, self._sample)

    def _reader(self, load: Callable[[str], Document]) -> Callable[[str], tuple[int, bool, Values]]:
        """What turns a line into values."""
        time_of = self._getter("start") or self._getter("time") or _nothing
        request_of, method_of, path_of = map(self._getter, ("request", "method", "path"))
        ip_of, status_of, duration_of = map(self._getter, ("ip", "status", "duration"))
        forwarded_of, tenant_of, key_of = map(self._getter, ("forwarded", "tenant", "key"))
        states_of = [self._getter(f"state:{name}") for name in self.wanted.states]
        unit = self.fields["duration"].unit if duration_of else None
        escaped = self.form != "JSON"
        verbs = {name: name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
        instant = self.instants.read

        def read(line: str) -> tuple[int, bool, Values]:
            document = load(line)
            try:
                at, whole = instant(time_of(document))
            except ValueError as error:
                raise Unreadable(str(error)) from None
            method: object = "GET"
            target: object
            if request_of is not None:
                method, target = _of_request(request_of(document))
            else:
                target = path_of(document) if path_of is not None else None
                if method_of is not None:
                    method = method_of(document) or method
            if not isinstance(target, str) or not isinstance(method, str):
                raise Unreadable("no request")
            verb = verbs.get(method)
            if verb is None:
                if not _METHOD.fullmatch(method):
                    raise Unreadable("no request")
                verb = method.upper()
            if escaped and "\\" in target:
                target = _unescaped(target)
            ip = ip_of(document) if ip_of is not None else ""
            status = status_of(document) if status_of is not None else 0
            values = (
                read_duration(duration_of(document), unit) if duration_of is not None else -1,
                verb,
                _path(target),
                ip if isinstance(ip, str) else "",
                _number(status),
                None if forwarded_of is None else _text(forwarded_of(document)),
                None if tenant_of is None else _text(tenant_of(document)),
                None if key_of is None else _text(key_of(document)),
                tuple(None if fetch is None else _text(fetch(document)) for fetch in states_of) if states_of else (),
            )
            return at, whole, values

        return read

    def _read(
        self, lines: Iterable[tuple[int, str]], read: Callable[[str], tuple[int, bool, Values]]
    ) -> Iterator[tuple[int, bool, Values]]:
        for number, line in lines:
            self.lines += 1
            try:
                yield read(line)
            except Unreadable as reason:
                self.unreadable += 1
                if len(self.examples) < SHOWN:
                    self.examples.append((number, self._excerpt(line, str(reason))))
                if self.unreadable > ENOUGH and 2 * self.unreadable > self.lines:
                    raise LogError(self._why_unreadable()) from None
        if 2 * self.unreadable > self.lines:
            raise LogError(self._why_unreadable())

    def _excerpt(self, line: str, reason: str) -> str:
        """Why a line is unreadable, and its beginning where that explains it and can hold no API key."""
        if not line:
            return f"longer than {BLOCK:,} bytes"
        if self.form == "JSON" or "key" in self.fields:
            return reason
        return f"{reason}: {printable(line[:80])}{'...' if len(line) > 80 else ''}"

    def _why_unreadable(self) -> str:
        of = f"{self.unreadable:,} of {self.lines:,}"
        head = f"{printable(self.name)}: {of} lines are no lines of an access log in common, combined or JSON format"
        if self._array:
            head += ": a JSON array? It has to be one object a line, as by jq -c '.[]'"
        return "\n".join([head, *(f"  line {number}: {reason}" for number, reason in self.examples)])


def merged(logs: Iterable[AccessLog]) -> Iterator[Request]:
    """The requests of all logs in the order of time, whether one continues another or stands beside it.

    A log is held in memory (its window) only from about its first line on.
    """
    waiting: list[tuple[int, int, Iterator[Request]]] = []
    for number, log in enumerate(logs):
        timed = log._timed()
        first = next(timed, None)
        if first is not None:
            waiting.append((first.at, number, _sorted(chain((first,), timed))))
    waiting.sort(key=itemgetter(0), reverse=True)
    heap: list[tuple[int, int, Request, Iterator[Request]]] = []
    while heap or waiting:
        while waiting and (not heap or waiting[-1][0] <= heap[0][0] + LEAD):
            _, number, requests = waiting.pop()
            first = next(requests)
            heap.append((first.at, number, first, requests))
            heapify(heap)
        _, number, request, requests = heap[0]
        yield request
        if len(heap) == 1 and not waiting:
            yield from requests
            return
        following = next(requests, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (following.at, number, following, requests))


def _sorted(requests: Iterable[Request]) -> Iterator[Request]:
    """In the order of ``at``, as far as none stands more than `WINDOW` lines from its place."""
    held: list[Request] = []
    start = itemgetter(0)
    for request in requests:
        held.append(request)
        if len(held) >= 2 * WINDOW:
            held.sort(key=start)
            yield from held[:WINDOW]
            del held[:WINDOW]
    held.sort(key=start)
    yield from held


def _spread(entries: Iterable[tuple[int, bool, Values]]) -> Iterator[tuple[int, Values]]:
    """The k-th of n lines of a second that knows no fraction came k/n into it."""
    groups: dict[int, list[Values]] = {}
    for at, whole, values in entries:
        if not whole:
            yield at, values
            continue
        group = groups.get(at)
        if group is None:
            if len(groups) >= _GROUPS:
                yield from _evenly(groups, min(groups))
            group = groups[at] = []
        group.append(values)
        if len(group) >= _SECOND_AT_ONCE:
            yield from _evenly(groups, at)
    for at in sorted(groups):
        yield from _evenly(groups, at)


def _evenly(groups: dict[int, list[Values]], at: int) -> Iterator[tuple[int, Values]]:
    group = groups.pop(at)
    for number, values in enumerate(group):
        yield at + number * SECOND // len(group), values


def _stdin() -> BufferedReader:
    if sys.stdin is None:
        raise ValueError("it is closed")
    return cast(BufferedReader, sys.stdin.buffer)


def _nothing(_: Document) -> object:
    return None


_HEAD = frozenset({"ip", "ident", "user", "time", "request", "status", "bytes", *map(str, range(1, 8))})
_NOT_TEXT = "neither common nor combined format"


def _head_of_text(line: str) -> Document:
    """The seven fields that are common."""
    found = _LINE.match(line)
    if found is None:
        raise Unreadable(_NOT_TEXT)
    return found.groups(), {}


def _whole_text(line: str) -> Document:
    """All fields of a line."""
    found = _parts(line)
    if found is None:
        raise Unreadable(_NOT_TEXT)
    return found


def _parts(line: str) -> tuple[list[str], dict[str, str]] | None:
    found = _LINE.match(line)
    if found is None:
        return None
    values, named = [*found.groups()], {}
    for name, quoted, bare in _TOKEN.findall(line, found.end()):
        values.append(quoted or bare)
        if name:
            named[name] = quoted or bare
    return values, named


def _document(line: str) -> Document:
    try:
        line = line.strip()
        document, end = _decode(line)
        if end != len(line):
            raise json.JSONDecodeError("Extra data", line, end)
    except ValueError as error:
        at = f" ({error.msg}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise Unreadable(f"not JSON{at}") from None
    except RecursionError:
        raise Unreadable("JSON that is nested too deeply") from None
    if not isinstance(document, dict):
        raise Unreadable("JSON, but no object")
    return document


def _of_request(line: object) -> tuple[str, str | None]:
    """Method and target of ``GET /path HTTP/1.1``."""
    if not isinstance(line, str):
        raise Unreadable("no request")
    method, _, target = line.partition(" ")
    head, _, version = target.rpartition(" ")
    return method, (head if head and version.startswith("HTTP/") else target) or None


def _unescaped(target: str) -> str:
    """Without the escapes of nginx and Apache, as bytes that are percent-encoded."""
    return _ESCAPE.sub(lambda found: f"%{found[1]}" if found[1] else str(found[2]), target)


def _path(target: str) -> str:
    """The path of a request target as an ASGI server hands it over: without the query, decoded."""
    if target[0:1] != "/" and "://" in target[:16]:
        try:
            target = urlsplit(target).path or "/"
        except ValueError:
            raise Unreadable("no request") from None
    if "?" in target:
        target = target.partition("?")[0]
    return unquote(target) if "%" in target else target


def _text(value: object) -> str | None:
    """The text of a field; nothing for what is not there."""
    if isinstance(value, str):
        return None if value in _BLANK else value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> int:
    """A status code, or 0."""
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 4 else 0
