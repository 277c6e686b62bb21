"""The servers that other tests are run against: they do what their methods say."""

from __future__ import annotations

import hashlib

from stores import Server


def test_a_store_begins_without_keys_scripts_and_statistics(store: Server) -> None:
    digest = store.command("SCRIPT", "LOAD", "return 1")
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [1])
    store.command("SET", "left", "behind for the test below")
    assert store.calls() == {"config|resetstat": 1, "script|load": 1, "script|exists": 1, "dbsize": 1, "set": 1}


def test_a_store_has_forgotten_what_the_test_before_left(store: Server) -> None:
    digest = hashlib.sha1(b"return 1").hexdigest()
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [0])
