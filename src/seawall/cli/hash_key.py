"""`seawall hash-key`: the form in which a configuration holds an API key."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated

import typer

from seawall.cli.terminal import fail, say
from seawall.identity import key_digest

MAX_KEY = 4_096
SHORT = 20
"""Below so many characters a key that people make up can be found again from its hash."""


def run(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="The key. Better left out: it stays in the shell's history.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Make a new key, with 256 random bits.")] = False,
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="TEXT", help="What the new key begins with.  [default: sw_]")
    ] = None,
) -> None:
    """Print the hash of an API key, ready for a tenant's 'keys'.

    Without KEY it is read from stdin, or asked for without showing it. Seawall itself never stores a key, so one that
    was generated is shown this once.

    \b
    Examples:
      seawall hash-key --generate --prefix acme_
      seawall hash-key < key.txt
      op read op://vault/acme/key | seawall hash-key
    """
    if generate:
        if key is not None:
            fail("--generate makes a key, so none is given")
        _generate("sw_" if prefix is None else prefix)
        return
    if prefix is not None:
        fail("--prefix belongs to --generate")
    if key is None:
        key = _read()
    else:
        say("this key is now in your shell's history; leave it out and it is asked for")
    _check(key)
    if len(key) < SHORT:
        say(f"a key of fewer than {SHORT} characters may be guessed; --generate makes a strong one")
    print(key_hash(key))


def key_hash(key: str) -> str:
    """What stands under ``keys:`` for ``key``."""
    return f"sha256:{key_digest(key.encode()).hex()}"


def _generate(prefix: str) -> None:
    key = prefix + secrets.token_urlsafe(32)
    _check(key)
    say("give the key to the caller, it is shown this once; the hash goes under the tenant's keys:")
    print(f"key:  {key}")
    print(f"hash: {key_hash(key)}")


def _read() -> str:
    if sys.stdin.isatty():
        answer: str = typer.prompt("API key", hide_input=True, err=True)
        return answer
    raw = sys.stdin.buffer.read(MAX_KEY + 3)
    return raw.decode("latin-1").removesuffix("\n").removesuffix("\r")


def _check(key: str) -> None:
    """End the verb for what could never be sent in a header and so never match. The key itself is not shown."""
    if not key:
        fail("the key is empty")
    if len(key) > MAX_KEY:
        fail(f"a key is at most {MAX_KEY} characters")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        fail("a key travels in a header: printable ASCII, one line, no blanks around it")
