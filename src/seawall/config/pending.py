"""What the language has and this version does not do yet. A release that does it deletes the row.

Such settings are checked like all others, so that a file written today is right tomorrow; but nobody may believe to be
protected by them, so each is warned about once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from seawall.config.document import Document, Path


@final
@dataclass(frozen=True, slots=True)
class Pending:
    """A setting, by its path (``*`` is any entry), and what the warning says.

    With ``off``, it is not warned about where it is switched off.
    """

    path: tuple[str, ...]
    message: str
    off: str | None = None


PENDING = (
    Pending(("status",), "'status' is checked but not served by this version"),
)


def check(main: Document) -> None:
    """Warn about each pending setting that is written, at the first place that has it."""
    for pending in PENDING:
        for path, value in _found(main.root, pending.path, ()):
            if value == pending.off:
                continue
            main.report("W100", pending.message, path, at_key=True, severity="warning")
            break


def _found(node: Any, pattern: tuple[str, ...], path: Path) -> Iterator[tuple[Path, Any]]:
    if not pattern:
        yield path, node
    elif pattern[0] == "*":
        for step, inner in enumerate(node) if isinstance(node, list) else node.items():
            yield from _found(inner, pattern[1:], (*path, step))
    elif pattern[0] in node:
        yield from _found(node[pattern[0]], pattern[1:], (*path, pattern[0]))
