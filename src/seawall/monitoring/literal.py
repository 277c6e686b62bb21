"""YAML that is written and not dumped: with comments, in the order of a reader, and without a library for it."""

from __future__ import annotations

import json
from textwrap import indent


def quoted(text: str) -> str:
    """``text`` as a scalar that nothing can be mistaken for."""
    return json.dumps(text)


def block(text: str, spaces: int) -> str:
    """The literal block scalar of ``text``, indented by ``spaces``: from its ``|`` to its last line.

    It is two columns further in than its key, and says so, for its first line may begin with spaces.
    """
    kept = "-" if not text.endswith("\n") else "+" if text.endswith("\n\n") else ""
    return f"|2{kept}\n" + indent(text, " " * spaces, lambda line: line != "\n").removesuffix("\n")
