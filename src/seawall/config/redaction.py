"""Keeps secrets out of what is shown about a configuration.

A key listed as it is instead of by its hash is a mistake; printing the line to say so would copy the key into a CI log.
So before diagnostics leave, everything that may be a secret is looked for in the data, and neither its lines nor its
text are shown: not for its own mistake and not for another one that happens to stand beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from seawall.config.diagnostics import Diagnostic
from seawall.config.document import Document, Path
from seawall.config.values import is_key_hash, passwords
from seawall.notation import close

_NAMES = ("key", "keys", "hash", "secret", "password", "token")
_SUSPICIOUS = re.compile(r"\b(keys?|hash|secret|\w*password|token)\b|://[^/\s]*@", re.IGNORECASE)

_CUT_OFF = frozenset({"E002", "E003", "E004"})
_MANY = 200
_FAR = 2000
"""Lines above a mistake in which the key is looked for that it belongs to."""


def seal(document: Document) -> list[Diagnostic]:
    """The problems of ``document`` in the order of its text, with their lines, without its secrets."""
    if not document.problems:
        return []
    secrets = list(_secrets(document))
    lines = {line for line, _ in secrets}
    parts = sorted(
        {part for _, text in secrets for part in (text, *text.split()) if len(part) >= 4}, key=len, reverse=True
    )
    cut_off = any(problem.code in _CUT_OFF for problem in document.problems)
    sealed = []
    for problem in sorted(document.problems, key=lambda found: (found.line, found.column)):
        if 0 < problem.line <= len(document.lines) and problem.line not in lines and len(parts) <= _MANY:
            source = document.lines[problem.line - 1]
            if not any(part in source for part in parts) and not (cut_off and _looks_secret(document.lines, problem)):
                problem = replace(problem, source=source)
        sealed.append(_without(problem, parts))
    if document.dropped:
        message = f"{document.dropped:_} more mistakes are not shown"
        sealed.append(Diagnostic(document.name, 0, 0, "error", "E004", message))
    return sealed


def _looks_secret(lines: Sequence[str], problem: Diagnostic) -> bool:
    """Whether a line, or a key above it that it belongs to, speaks of secrets.

    What YAML could not read is not in the data, so there its look has to do.
    """
    line = lines[problem.line - 1]
    if _SUSPICIOUS.search(line):
        return True
    indent, listed = _indent(line), line.lstrip().startswith("-")
    for above in reversed(lines[max(0, problem.line - _FAR) : problem.line - 1]):
        text = above.lstrip()
        depth = _indent(above)
        if not text or text.startswith("#") or depth > indent:
            continue
        if depth < indent or (listed and not text.startswith("-")):
            if _SUSPICIOUS.search(above):
                return True
            indent, listed = depth, text.startswith("-")
    return False


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without(problem: Diagnostic, parts: list[str]) -> Diagnostic:
    message, path = problem.message, problem.path
    for part in parts[:_MANY]:
        if part in message or part in path:
            message, path = message.replace(part, "***"), path.replace(part, "***")
    return problem if message is problem.message else replace(problem, message=message, path=path)


def _secrets(document: Document) -> Iterator[tuple[int, str]]:
    """Texts that may be secrets, and the line on which each begins."""
    root = document.root
    if isinstance(root, dict):
        # Without errors every key is a hash: the walk over all tenants can be spared.
        wrong = any(problem.severity == "error" for problem in document.problems)
        tenants = root.get("tenants") if wrong else None
        for name, tenant in tenants.items() if isinstance(tenants, dict) else ():
            yield from _below(document, tenant, ("tenants", name), secret=False)
        for section in ("backend", "status"):
            yield from _below(document, root.get(section), (section,), secret=False)
    for path, value in document.discarded:
        yield from _below(document, value, path, secret=any(_names_a_secret(str(step)) for step in path))


def _below(document: Document, node: Any, path: Path, *, secret: bool) -> Iterator[tuple[int, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            # What stands where a name should be, below `keys`, may be a key as well.
            if secret and not _names_a_secret(name) and name != "expires":
                yield document.line((*path, name)), name
            yield from _below(
                document, value, (*path, name), secret=name != "expires" and (secret or _names_a_secret(name))
            )
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _below(document, value, (*path, index), secret=secret)
    elif isinstance(node, str):
        if secret:
            if not is_key_hash(node):
                yield document.line(path), node
        else:
            for password in passwords(node):
                yield document.line(path), password


@lru_cache(maxsize=1024)
def _names_a_secret(name: str) -> bool:
    """Whether ``name``, or what it was probably meant to be, holds secrets."""
    return close(name.lower(), _NAMES) is not None
