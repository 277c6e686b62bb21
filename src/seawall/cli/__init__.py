"""The command line: one file a verb, put together in `seawall.cli.app`.

This module imports nothing of it, so that whoever installed Seawall without the extra ``cli`` is told what to install
instead of being shown a traceback.
"""

from __future__ import annotations

import io
import sys

_EXTRA = frozenset({"typer", "click", "rich", "shellingham"})


def main() -> None:
    """Run `seawall` with the arguments of this process, and end it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tenant's name that the terminal cannot show is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        from seawall.cli.app import build
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(f'seawall: the command line needs {missing}: pip install "seawall[cli]"', file=sys.stderr)
        sys.exit(2)
    build()(prog_name="seawall")
