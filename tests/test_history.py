"""The record of what held since when: it loses nothing, and says where it was touched."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall import history
from seawall.config import load_mapping
from seawall.history import GENESIS, MOST, Problem, Record, append, read, verify
from seawall.policy import Policy

if sys.platform != "win32":
    import fcntl

NOON = 1_772_625_600.0
"""2026-03-04, 12:00 UTC."""


def policy(rate: int = 1, **more: Any) -> Policy:
    return load_mapping({"version": 1, "plans": {"default": {"rate": f"{rate}/second"}}, **more})


def record(path: Path, rate: int, old: Policy | None = None, now: float = NOON) -> Record | None:
    made = policy(rate)
    return append(path, made, {"seawall.yaml": made.digest}, now, old)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seawall.history.jsonl"


@pytest.fixture
def five(path: Path) -> list[bytes]:
    """Five records in a file, as its lines."""
    for rate in range(1, 6):
        record(path, rate, None if rate == 1 else policy(rate - 1), NOON + rate)
    return path.read_bytes().splitlines(keepends=True)


# What is written


def test_the_first_record_says_what_there_is(path: Path) -> None:
    first = policy(tenants={"acme": {}, "globex": {}}, routes=[{"name": "all", "match": {"path": "/**"}}])
    made = append(path, first, {"seawall.yaml": "ab" * 32}, NOON + 0.0625)
    assert made is not None
    assert json.loads(path.read_text()) == {
        "seq": 1,
        "time": "2026-03-04T12:00:00.062Z",
        "digest": first.digest,
        "files": {"seawall.yaml": "ab" * 32},
        "diff": ["first policy: 1 plan, 2 tenants, 1 route"],
        "by": {"pid": os.getpid(), "host": socket.gethostname()},
        "previous": GENESIS,
    }
    assert made.as_dict() == json.loads(path.read_text())
    assert list(made.as_dict()) == list(json.loads(path.read_text()))


def test_a_change_is_in_words_and_knows_the_line_before(path: Path) -> None:
    record(path, 1)
    before = path.read_bytes()
    made = record(path, 2, policy(1))
    assert made is not None
    assert made.seq == 2
    assert made.diff == ("plan default: rate 1/second -> 2/second (0 tenants and anonymous callers)",)
    assert made.previous == sha256(before.removesuffix(b"\n")).hexdigest()
    assert made.hash == sha256(path.read_bytes().splitlines()[1]).hexdigest()
    assert path.read_bytes().startswith(before)
    assert verify(path) is None


def test_what_changed_while_nothing_was_running_is_recorded_as_that(path: Path) -> None:
    record(path, 1)
    made = record(path, 2)
    assert made is not None
    assert made.diff == ("changed while nothing was running: 1 plan, 0 tenants, 0 routes",)


def test_a_change_of_nothing_but_the_text_is_recorded_without_words(path: Path) -> None:
    old = policy()
    append(path, old, {}, NOON)
    made = append(path, replace(old, digest="cd" * 32), {}, NOON, old)
    assert made is not None
    assert (made.digest, made.diff) == ("cd" * 32, ())


def test_a_restart_with_the_same_policy_adds_nothing(path: Path) -> None:
    record(path, 1)
    before = path.read_bytes()
    assert record(path, 1) is None
    assert record(path, 1, policy(7)) is None
    assert path.read_bytes() == before


def test_a_policy_that_comes_back_is_a_change(path: Path) -> None:
    for rate in (1, 2, 1):
        record(path, rate, policy(9))
    assert [made.seq for made in read(path)] == [1, 2, 3]


def test_a_record_of_a_process_that_runs_begins_a_new_file_with_the_change(path: Path) -> None:
    made = record(path, 2, policy(1))
    assert made is not None
    assert (made.seq, made.previous, len(made.diff)) == (1, GENESIS, 1)
    assert made.diff[0].startswith("plan default: rate 1/second")


def test_a_long_diff_is_capped(path: Path) -> None:
    record(path, 1)
    many = {f"t{at}": {} for at in range(MOST + 234)}
    made = append(path, policy(tenants=many), {}, NOON, policy())
    assert made is not None
    assert len(made.diff) == MOST + 1
    assert made.diff[-1] == "... and 234 more"


def test_no_text_of_a_file_is_a_line_of_its_own(path: Path) -> None:
    made = append(path, policy(tenants={"a\u00e9 '\"{": {}}), {"caf\u00e9\n{}\udc80": "x"}, NOON, policy())
    assert made is not None
    assert path.read_bytes().count(b"\n") == 1
    assert path.read_bytes().isascii()
    assert next(read(path)) == made


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_others_cannot_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        record(path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_it_is_on_the_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.append((found.st_ino, found.st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    record(path, 1)
    assert synced[0] == (path.stat().st_ino, path.stat().st_size)
    assert synced[1][0] == path.parent.stat().st_ino
    record(path, 2)
    assert synced[2:] == [(path.stat().st_ino, path.stat().st_size)]


def test_appending_reads_the_end_of_the_file_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 20_000
    with path.open("wb") as file:
        previous = GENESIS
        for seq in range(1, count + 1):
            made = Record(seq, "2026-03-04T12:00:00.000Z", f"{seq:064}", {}, ("words " * 20,), {}, previous)
            line = json.dumps(made.as_dict()).encode()
            previous = sha256(line).hexdigest()
            file.write(line + b"\n")
    assert path.stat().st_size > 5_000_000
    amounts: list[int] = []
    real = os.read

    def counting(descriptor: int, length: int) -> bytes:
        amounts.append(length)
        return real(descriptor, length)

    monkeypatch.setattr(os, "read", counting)
    made = record(path, 1, policy(2))
    assert made is not None
    assert made.seq == count + 1
    assert sum(amounts) <= 200_000
    assert [last.seq for last in read(path, 3)] == [count - 1, count, count + 1]
    assert sum(amounts) <= 400_000
    assert verify(path) is None


# What is read


def test_records_are_read_oldest_first_and_a_few_from_the_end(path: Path, five: list[bytes]) -> None:
    everything = list(read(path))
    assert [made.seq for made in everything] == [1, 2, 3, 4, 5]
    assert [made.time[11:19] for made in everything] == [f"12:00:0{second}" for second in range(1, 6)]
    assert [made.hash for made in everything[:-1]] == [made.previous for made in everything[1:]]
    for last in range(7):
        assert list(read(path, last)) == everything[len(everything) - min(last, 5) :]


@pytest.mark.parametrize("block", [1, 7, 100, 511])
def test_where_a_block_ends_does_not_matter(
    block: int, path: Path, five: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_BLOCK", block)
    assert list(read(path, 4)) == list(read(path))[1:]
    assert record(path, 6, policy(5)) == list(read(path))[-1]
    assert verify(path) is None


def test_a_file_that_is_not_there_is_an_os_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        verify(path)
    with pytest.raises(FileNotFoundError):
        list(read(path))


def test_an_empty_file_is_a_history_without_records(path: Path) -> None:
    path.write_bytes(b"")
    assert verify(path) is None
    assert list(read(path)) == list(read(path, 3)) == []
    assert record(path, 1) is not None
    assert verify(path) is None


# The chain


def test_a_chain_that_nobody_touched_is_whole(path: Path, five: list[bytes]) -> None:
    assert verify(path) is None


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("0 1 3 4", Problem(3, "this is record 4, and record 3 belongs here")),
        ("1 2 3 4", Problem(1, "this is record 2, and record 1 belongs here")),
        ("0 2 1 3 4", Problem(2, "this is record 3, and record 2 belongs here")),
        ("0 1 1 2 3 4", Problem(3, "this is record 2, and record 3 belongs here")),
        ("0 1 2 3", None),
    ],
)
def test_a_line_that_is_not_where_it_was_is_found(
    order: str, problem: Problem | None, path: Path, five: list[bytes]
) -> None:
    """But for one: that lines are missing at the end cannot be seen without having kept a hash."""
    path.write_bytes(b"".join(five[int(at)] for at in order.split()))
    assert verify(path) == problem


def test_a_change_of_a_line_is_found_in_the_next(path: Path, five: list[bytes]) -> None:
    five[2] = five[2].replace(b"2/second", b"9/second")
    path.write_bytes(b"".join(five))
    assert str(verify(path)) == "line 4: it was not written after line 3 as it is now"


def test_another_beginning_is_found(path: Path, five: list[bytes]) -> None:
    five[0] = five[0].replace(GENESIS.encode(), b"1" * 64)
    path.write_bytes(b"".join(five))
    assert verify(path) == Problem(1, "it was not written after nothing")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b'{"seq": 3}', b"[" * 100_000, b"\xff", b'{"seq": ' + b"9" * 5000]
)
def test_a_line_that_cannot_be_read_is_found(content: bytes, path: Path, five: list[bytes]) -> None:
    for at in (0, 2, 4):
        path.write_bytes(b"".join([*five[:at], content + b"\n", *five[at + 1 :]]))
        assert verify(path) == Problem(at + 1, "it cannot be read, and no record that follows knows of it")
        assert len(list(read(path))) == 4


@pytest.mark.parametrize("wrong", ["seq", "time", "digest", "files", "diff", "by", "previous"])
def test_a_record_has_all_its_fields_with_their_types(wrong: str, path: Path, five: list[bytes]) -> None:
    one = json.loads(five[-1])
    for changed in (
        {name: value for name, value in one.items() if name != wrong},
        one | {wrong: None},
        one | {wrong: {"a": 1} if wrong == "files" else [1]},
    ):
        path.write_bytes(b"".join(five[:-1]) + json.dumps(changed).encode() + b"\n")
        assert verify(path) == Problem(5, "it cannot be read, and no record that follows knows of it")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_byte_that_is_changed_before_the_last_line_is_found(
    at: int, value: int, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not path.exists():
        for rate in range(1, 5):
            record(path, rate, policy(rate + 1))
    content = path.read_bytes()
    at %= content.rindex(b"\n", 0, -1)
    other = path.with_suffix(".other")
    other.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
    assert (verify(other) is None) == (other.read_bytes() == content)


# Power cuts


def test_a_record_cut_off_anywhere_is_reported_and_nothing_is_lost(path: Path, five: list[bytes]) -> None:
    """The piece stays, the next record is on its own line and vouches for it."""
    whole, last = b"".join(five[:-1]), five[-1]
    for length in range(1, len(last) - 1, 13):
        path.write_bytes(whole + last[:length])
        assert verify(path) == Problem(5, "it was cut off while it was written; the next record will go on after it")
        made = record(path, 7, policy(6))
        assert made is not None
        assert made.seq == 5
        assert path.read_bytes().startswith(whole + last[:length] + b"\n{")
        assert verify(path) is None
        assert [one.seq for one in read(path)] == [1, 2, 3, 4, 5]


def test_a_record_that_lacks_nothing_but_its_end_counts(path: Path, five: list[bytes]) -> None:
    path.write_bytes(b"".join(five).removesuffix(b"\n"))
    assert verify(path) is None
    made = record(path, 7, policy(6))
    assert made is not None
    assert made.seq == 6
    assert verify(path) is None


@pytest.mark.parametrize(
    "piece", [b"\0" * 300, b"{", b'{"seq": 1, "ti', b"\n", b'{"seq"\n{"seq": 1', b'{"seq": 1, "ti\n']
)
def test_a_piece_of_the_first_record_is_no_obstacle(piece: bytes, path: Path) -> None:
    path.write_bytes(piece)
    assert verify(path) is not None
    for rate in (1, 2):
        made = record(path, rate)
        assert made is not None
        assert made.seq == rate
    assert verify(path) is None


def test_the_record_before_a_piece_is_still_in_the_chain(path: Path, five: list[bytes]) -> None:
    """Twice cut off, and the change is found in the record before both pieces, and in either of them."""
    path.write_bytes(b"".join(five) + b'{"seq": 6,\n{"seq": 6, "time"')
    record(path, 7, policy(6))
    assert verify(path) is None
    content = path.read_bytes()
    for old, new in ((b"5/second", b"9/second"), (b"6,\n", b"7,\n"), (b'"time"\n', b'"tame"\n')):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        assert verify(path) == Problem(6, "it cannot be read, and no record that follows knows of it")


def test_a_write_that_fails_leaves_nothing_behind(
    path: Path, five: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(descriptor: int, content: Any) -> int:
        if len(content) > 100:
            return real(descriptor, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        record(path, 7)
    assert path.read_bytes() == b"".join(five)
    monkeypatch.undo()
    assert record(path, 7) is not None
    assert verify(path) is None


def test_a_write_in_pieces_is_a_whole_record(path: Path, five: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:10]))
    assert record(path, 7) is not None
    assert verify(path) is None


# Files that are none of ours


@pytest.mark.parametrize(
    "content",
    [
        b"version: 1\nplans: {}\n",
        b"version: 1",
        b'{"seq": 1}\nversion: 1\n',
        b"\n\nx",
        b"x" * 100_000,
        b'{"version": 1}\n',
    ],
    ids=["yaml", "one line", "last line", "blanks", "long", "json"],
)
def test_what_is_no_history_is_left_as_it_is(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(OSError, match="it is not a history, and is left as it is"):
        record(path, 1)
    assert path.read_bytes() == content


def test_a_file_without_lines_is_not_read_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LONGEST", 200_000)
    path.write_bytes(b'{"seq": ' + b" " * 1_000_000)
    with pytest.raises(OSError, match="not a history"):
        record(path, 1)
    assert verify(path) == Problem(1, "it was cut off while it was written; the next record will go on after it")


def test_a_record_is_never_too_long_to_be_read(path: Path, five: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LONGEST", 1_000)
    with pytest.raises(OSError, match="too long"):
        append(path, policy(7), {"x" * 1_000: "y"}, NOON)
    assert path.read_bytes() == b"".join(five)


@pytest.mark.skipif(os.name == "nt", reason="no FIFOs")
def test_a_directory_and_a_pipe_are_refused_at_once(path: Path, tmp_path: Path) -> None:
    os.mkfifo(path)
    for which in (path, tmp_path):
        for act in (lambda which=which: record(which, 1), lambda which=which: verify(which)):
            with pytest.raises(OSError, match=r"not a file|directory"):
                act()


# Several at once


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_lock_that_is_kept_is_not_waited_for_for_ever(
    path: Path, five: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_PATIENCE", 0.02)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process keeps it locked"):
            record(path, 7)
        assert len(list(read(path))) == 5
    assert record(path, 7) is not None


WRITER = """
import sys
from seawall import history
from seawall.history import append
from seawall.policy import Policy
from dataclasses import replace

history._PATIENCE = 60.0  # this machine may be busy
path, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for at in range(rounds):
    append(path, Policy(digest=f"shared {at}"), {"f": "0"}, 1.7e9, Policy())
    append(path, Policy(digest=f"{name} {at}"), {"f": "0"}, 1.7e9, Policy())
"""


@pytest.fixture
def writers(path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    source = str(Path(history.__file__).parents[1])
    command = [sys.executable, "-c", WRITER, str(path)]
    running = [
        subprocess.Popen(
            [*command, name, "50"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        for name in "abcd"
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_four_processes_write_one_chain(path: Path, writers: list[subprocess.Popen[str]]) -> None:
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    assert verify(path) is None
    records = list(read(path))
    own = [made.digest for made in records if not made.digest.startswith("shared")]
    assert sorted(own) == sorted(f"{name} {at}" for name in "abcd" for at in range(50))
    assert all(one.digest != other.digest for one, other in pairwise(records))
    assert len({made.by["pid"] for made in records}) == 4
