"""`seawall schema`: the language as a JSON Schema, for completion in editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from seawall.cli.terminal import say, write
from seawall.config import json_schema


def run(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there instead of to the terminal.")
    ] = None,
) -> None:
    """Print the JSON Schema of configuration files.

    Editors complete and check seawall.yaml by it. The first line of the file names it:
    # yaml-language-server: $schema=./seawall.schema.json

    \b
    Examples:
      seawall schema -o seawall.schema.json
      seawall schema | jq '.properties | keys'
    """
    if output is None:
        print(schema_text(), end="")
        return
    write(output, schema_text())
    say(f"wrote {output}")


def schema_text() -> str:
    """The schema as a file holds it."""
    return json.dumps(json_schema(), indent=2) + "\n"
