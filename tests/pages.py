"""A page of the documentation as its reader would use it: from the top to the bottom, in a directory of the page's own.

What is behind the language of a fenced block says what becomes of it:

    ```python              runs, with an application called `app`; the blocks of a page share all other names, and
                           functions called test_* are called
    ```python app.py       the same, and the file is there for what comes below
    ```python theirs       another library's: it has to be Python, and does not run
    ```yaml                a configuration or a part of one, without mistakes; what has none of its keys has to be YAML
    ```yaml seawall.yaml   the same, and the file is there
    ```yaml wrong          has mistakes, which the page shows
    ```console             its `seawall` commands have verbs and options that exist
    ```console run         its commands print what is shown below each, where ``...`` stands for anything

A command that ends with ``&`` is a server; it serves until the page starts the next one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI

import seawall
from seawall.config import check
from seawall.config.schema import File
from seawall.testing import drive
from serving import ROOT, Served, most, serving

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

NOT_RUN = {
    "pip install ": "needs a package index; the wheel and its extras have tests in test_packaging.py",
    "make ": "takes minutes; .ci/run runs them, and a test holds that the targets exist",
    "export ": "each command has the environment of the test",
    "docker ": "a container needs a daemon; stores.py has servers of its own",
}
"""How commands begin that a test cannot run, with the reason."""

BETWEEN_NEIGHBOURS = {"W008"}
"""Warnings that a page's configuration may have: what is about to be explained has a quota in memory."""

_WHOLE = re.compile("^version:", re.MULTILINE)
_PLANS = re.compile("^plans:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: its language, the words behind that, its text, and the line on which it begins."""

    page: Path
    language: str
    words: tuple[str, ...]
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        return next((word for word in self.words if "." in word), None)


@dataclass(frozen=True, slots=True)
class Command:
    """What stands after ``$``, and what the page shows below it."""

    line: str
    shown: str

    @property
    def is_server(self) -> bool:
        return self.line.endswith(" &")

    @property
    def is_run(self) -> bool:
        return not self.line.startswith(tuple(NOT_RUN))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of ``page``, in the order in which they stand there."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S*)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    each = (Block(page, b[1], tuple(b[2].split()), b[3], text[: b.start(3)].count("\n") + 1) for b in found)
    return [block for block in each if not languages or block.language in languages]


def commands(block: Block) -> list[Command]:
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert parts[0] == "", f"{block}: a console block begins with a command"
    joined = (part.replace("\\\n", "") for part in parts[1:])
    return [Command(line, shown) for line, _, shown in (part.partition("\n") for part in joined)]


def matches(shown: str, got: str) -> bool:
    """Whether ``got`` is what is shown, in which ``...`` stands for anything."""
    pattern = ".*".join(map(re.escape, shown.strip("\n").split("...")))
    return re.fullmatch(pattern, got.replace("\r\n", "\n").strip("\n"), re.DOTALL) is not None


def is_slow(page: Path) -> bool:
    """Whether going through ``page`` starts processes."""
    return any("run" in block.words for block in blocks(page, "console"))


def equip(folder: Path, environment: Any) -> None:
    """Let ``folder`` be where a page is tried: ``seawall`` is on the path and is this source.

    ``environment`` is pytest's ``monkeypatch``.
    """
    tools = folder / "tools"
    tools.mkdir()
    (tools / "seawall").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m seawall "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    source = str(ROOT / "src")
    environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    environment.chdir(folder)


def shell(line: str, cwd: Path) -> str:
    """What ``line`` prints."""
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


class Reader:
    """Goes through a page. A server that it was told to start serves until the block of this ends."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.names: dict[str, Any] = {
            "__name__": "page",
            "FastAPI": FastAPI,
            "Seawall": seawall.Seawall,
            "seawall": seawall,
            "app": _application(),
        }
        self._served: Served | None = None
        self._servers = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()

    def read(self) -> None:
        for block in blocks(self.page):
            match block.language:
                case "python":
                    self.python(block)
                case "yaml" if "wrong" not in block.words:
                    self.yaml(block)
                case "console" if "run" in block.words:
                    for command in commands(block):
                        self.run(command, block)
                case _:
                    self.write(block)

    def write(self, block: Block) -> None:
        if block.file is not None:
            path = self.folder / block.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    def python(self, block: Block) -> None:
        code = compile(block.text, str(block), "exec")
        if "theirs" in block.words:
            return
        self.write(block)
        self.names["app"] = _application()
        exec(code, self.names)
        for name in [name for name in self.names if name.startswith("test_")]:
            self.names.pop(name)()
        assert asyncio.run(drive(self.names["app"], "/")).status in (200, 404, 429), block

    def yaml(self, block: Block) -> None:
        self.write(block)
        whole = _WHOLE.search(block.text) is not None
        written = list(yaml.safe_load_all(block.text))
        if not whole and (block.file is not None or not File.model_fields.keys() & written[0].keys()):
            return
        text = block.text
        if not whole:
            plans = "" if _PLANS.search(text) else "plans: {default: {rate: 100/minute}}\n"
            text = f"version: 1\n{plans}{text}"
        (self.folder / "block.yaml").write_text(text, encoding="utf-8")
        found = check(self.folder / "block.yaml").diagnostics
        told = [each for each in found if each.severity == "error" or (whole and each.code not in BETWEEN_NEIGHBOURS)]
        assert told == [], f"{block}: {told[0]}"

    def run(self, command: Command, block: Block) -> None:
        if not command.is_run:
            return
        if command.is_server:
            self._servers.close()
            program, *arguments = shlex.split(command.line.removesuffix(" &"))
            assert "--port" not in arguments, f"{block}: a test has a port of its own"
            words = ["-m", program, *arguments, "--port", "{port}"]
            self._served = self._servers.enter_context(serving(words, self.folder / "log", cwd=self.folder))
        elif self._served is not None and "localhost:8000" in command.line:
            call(command, self._served, self.folder, block)
        else:
            got = shell(command.line, self.folder)
            assert matches(command.shown, got), f"{block}: $ {command.line}\n{got}"


def call(command: Command, served: Served, folder: Path, block: Block) -> None:
    """Compare a call of a server of 100/minute. Where time counts, a slow machine may see what the bound allows."""
    line = command.line.replace("localhost:8000", f"127.0.0.1:{served.port}")
    if "uniq -c" in line:
        started = time.monotonic()
        got = {status: int(count) for count, status in map(str.split, shell(line, folder).splitlines())}
        shown = {status: int(count) for count, status in map(str.split, command.shown.splitlines())}
        assert sum(got.values()) == sum(shown.values()), f"{block}: {got}"
        assert shown["200"] <= got["200"] <= most(shown["200"], 100 / 60, time.monotonic() - started), f"{block}: {got}"
        return
    got_text = ""
    for _ in range(5):  # the first may still find a token that came back
        got_text = shell(line, folder)
        if matches(command.shown, got_text):
            return
    raise AssertionError(f"{block}: $ {command.line}\n{got_text}")


def _application() -> FastAPI:
    app = FastAPI()
    app.get("/")(_home)
    return app


async def _home() -> dict[str, str]:
    return {"hello": "world"}


def named_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each ``seawall ...`` that a page names, in a console block or within a sentence: where, and its words."""
    for block in blocks(page, "console"):
        for command in commands(block):
            for part in re.split(r"\s(?:&&?|\|\|?|;)(?:\s|$)", command.line):
                words = shlex.split(part)
                if words[:1] == ["seawall"]:
                    yield str(block), words[1:]
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"`seawall ([^`]+)`", text):
        yield page.name, found[1].replace("\n", " ").split()
