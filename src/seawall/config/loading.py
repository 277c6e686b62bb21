"""From a path, a text or a mapping to a `Report`: everything found wrong, and the policy if nothing was.

Nothing here raises for what a file holds or for a file that is not there. Reading ends early only where going on makes
no sense: an unreadable file, broken YAML. Everything else is collected, so that one run shows every mistake.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from hashlib import sha256
from pathlib import Path
from typing import Any, final

from seawall.config import checks, lint, redaction, schema, values
from seawall.config.compile import compile_policy
from seawall.config.diagnostics import Diagnostic, Format, render
from seawall.config.document import MAX_BYTES, Document, adopt, position, read
from seawall.config.problems import validate
from seawall.notation import shorten
from seawall.policy import Policy

MAX_FILES = 1000
MAX_TOTAL_BYTES = 16 * MAX_BYTES
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What came of checking a configuration.

    ``policy`` is there exactly if there are no errors. ``files`` are the paths that were read or should have been, the
    main one first, ``hashes`` their SHA-256 and ``includes`` the patterns by which others are found. ``seen``
    changes exactly if one of them does, or if there is another: it is made of their content, for a swap of symbolic
    links (a ConfigMap of Kubernetes) may keep times and sizes, and a copy may change them.
    """

    policy: Policy | None
    diagnostics: tuple[Diagnostic, ...]
    files: tuple[Path, ...] = ()
    includes: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    seen: str = ""

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(found for found in self.diagnostics if found.severity == "error")

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return tuple(found for found in self.diagnostics if found.severity == "warning")

    @property
    def unreadable(self) -> bool:
        """Whether a file could not be read at all, which is not a mistake in a file."""
        return any(found.unreadable for found in self.diagnostics)

    def render(self, form: Format = "text") -> str:
        return render(self.diagnostics, form)


def check_path(path: str | os.PathLike[str]) -> Report:
    """What is wrong with the file at ``path`` and with what it includes."""
    name = os.fsdecode(path)
    main, content = _open(name)
    return _finish(main, content, Path(name).parent, [Path(name)])


def check_text(text: str, name: str, base: Path | None) -> Report:
    """What is wrong with ``text``; it includes files relative to ``base``, by default the current directory."""
    main = _parse(name, text.encode(errors="surrogatepass"))
    return _finish(main, text.encode(errors="surrogatepass"), base or Path(), [])


def check_mapping(mapping: Mapping[str, Any], base: Path | None = None) -> Report:
    """What is wrong with a mapping of the shape of the YAML."""
    main = _settings(adopt(mapping, "<mapping>", os.environ))
    content = (
        json.dumps(main.root, default=str, ensure_ascii=False).encode(errors="surrogatepass") if main.complete else b""
    )
    return _finish(main, content, base or Path(), [])


def _open(name: str) -> tuple[Document, bytes]:
    """The file as data. What is wrong with it as a file or as YAML is in its problems."""
    document = Document(name, complete=False)
    try:
        content = _bytes_of(name)
    except (OSError, ValueError) as error:
        # A ValueError is a path with a NUL in it.
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        document.report("E000", f"cannot be read: {why}", unreadable=True)
        return document, b""
    return _parse(name, content), content


def _parse(name: str, content: bytes) -> Document:
    if len(content) > MAX_BYTES:
        document = Document(name, complete=False)
        document.report("E004", f"larger than {MAX_BYTES >> 20} MiB")
        return document
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document = Document(name, "", complete=False)
        before = content[: error.start]
        at = position(before.count(b"\n"), len(before) - before.rfind(b"\n") - 1)
        document.add("E005", f"not UTF-8 text: the byte 0x{content[error.start]:02x}", at)
        return document
    return _settings(read(text, name, os.environ))


def _settings(document: Document) -> Document:
    """``document``, after a look whether it holds settings at all."""
    if document.complete and not isinstance(document.root, dict):
        document.complete = False
        if not document.problems:
            why = "is empty" if document.root is None else "is not a mapping of settings"
            document.report("E006", f"the file {why}; the smallest one is 'version: 1'")
    return document


def _finish(main: Document, content: bytes, base: Path, files: list[Path]) -> Report:
    digest = sha256(content)
    contents = [(file, content) for file in files]
    documents = [main]
    policy: Policy | None = None
    if main.complete:
        file = validate(main, schema.File)
        included: list[dict[str, schema.Tenant]] = []
        total = len(content)
        for path in _included(main, base, files[0] if files else None):
            document, content = _open(os.fspath(path))
            files.append(path)
            contents.append((path, content))
            total += len(content)
            if total > MAX_TOTAL_BYTES:
                main.report("E004", f"all files together are larger than {MAX_TOTAL_BYTES >> 20} MiB", ("include",))
                break
            documents.append(document)
            digest.update(content)
            if document.complete:
                part = _validate_included(document)
                included += [part.tenants] if part is not None else []
        checks.check(main, [document for document in documents[1:] if document.complete])
        if file is not None and not any(document.problems for document in documents):
            policy = compile_policy(file, [file.tenants, *included], digest.hexdigest())
            lint.check(policy, main, documents[1:])
    diagnostics = tuple(found for document in documents for found in redaction.seal(document))
    if policy is not None:
        policy = replace(policy, warnings=tuple(str(found) for found in diagnostics))
    includes = tuple(pattern for _, pattern in _patterns(main))
    hashes = tuple(sha256(content).hexdigest() for _, content in contents)
    return Report(policy, diagnostics, tuple(files), includes, hashes, _mark(contents))


def fingerprint(path: str | os.PathLike[str], includes: Sequence[str]) -> str:
    """The `Report.seen` of the file as it is now, if it still includes others by ``includes``."""
    main = Path(os.fsdecode(path))
    return _mark([(file, _content(file)) for file in (main, *_matches(includes, main.parent, main))])


def _mark(contents: Iterable[tuple[Path, bytes]]) -> str:
    digest = sha256()
    for file, content in contents:
        name = os.fsencode(file)
        digest.update(b"%d:%b%d:%b" % (len(name), name, len(content), content))
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    """What can be read of a file, as far as that matters; nothing of one that cannot be read."""
    try:
        return _bytes_of(file)
    except (OSError, ValueError):
        return b""


def _bytes_of(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file, as far as it matters. A pipe or a device may keep a reader waiting for ever."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file.read(MAX_BYTES + 1)


def _validate_included(document: Document) -> schema.Included | None:
    for key in document.root:
        if key == "tenants":
            continue
        if key == "include":
            message = "an included file does not include others"
        else:
            message = f"an included file has 'tenants' only, not {shorten(key)}"
        document.report("E050", message, (key,), at_key=True)
    return validate(document, schema.Included)


def _included(main: Document, base: Path, own: Path | None) -> Sequence[Path]:
    """The files that ``main`` includes, sorted. A pattern that matches nothing is no mistake."""
    patterns = _patterns(main)
    for place, pattern in patterns:
        if own is not None and any(_same(base / match, own) for match in glob(pattern, root_dir=base)):
            main.report("E050", "the file includes itself", place)
    found = _matches([pattern for _, pattern in patterns], base, own)
    if len(found) > MAX_FILES:
        main.report("E004", f"more than {MAX_FILES} files are included", ("include",))
        return ()
    return found


def _matches(patterns: Iterable[str], base: Path, own: Path | None) -> list[Path]:
    """The files that ``patterns`` find below ``base``, each once, without ``own``, sorted.

    Directories are not what a wildcard is meant for; a name that is one is left to be reported.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for match in glob(pattern, root_dir=base):
            path = base / match
            # Not by methods of the path, which raise where it leads in a circle or into what may not be entered.
            if not (has_magic(pattern) and os.path.isdir(path)) and not (own is not None and _same(path, own)):
                found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def _patterns(main: Document) -> list[tuple[tuple[str | int, ...], str]]:
    """The patterns that ``main`` includes by, and their places. What is wrong with others the schema says."""
    written = main.root.get("include") if isinstance(main.root, dict) else None
    listed = isinstance(written, list)
    return [
        (("include", index) if listed else ("include",), pattern)
        for index, pattern in enumerate(written if isinstance(written, list) else [written])
        if isinstance(pattern, str) and _allowed(pattern)
    ]


def _allowed(pattern: str) -> bool:
    try:
        values.check_include(pattern)
    except ValueError:
        return False
    return bool(pattern)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
