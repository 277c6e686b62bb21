"""Cells: the same counts in a list and in mapped files, and sums that are exact whoever dies when."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import cellfiles
from seawall.cellfiles import RESERVED, CellFiles, decoded, encoded
from seawall.cells import METRICS_DIR, Cells, Spec
from seawall.metrics import (
    BACKEND_UP,
    CONFIG_INFO,
    EVICTED_KEYS,
    INFLIGHT,
    QUEUED,
    REQUEST_DURATION,
    REQUESTS,
    TENANT_REQUESTS,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")


class Process:
    """What one process does with its cells. A lock belongs to what has the file open, so one process can be several."""

    def __init__(self, directory: Path, ordinal: int = 0) -> None:
        self.cells = Cells(CellFiles(directory, ordinal))

    def count(self, spec: Spec, *labels: str, by: int = 1) -> None:
        at = self.cells.index(spec, *labels)
        self.cells.values[at] += by

    def counted(self, spec: Spec, *labels: str) -> int:
        """What a scrape of this process says."""
        return self.cells.together().counts.get((spec.name, labels), [0])[0]

    def readings(self, spec: Spec, *labels: str) -> list[float]:
        return sorted(self.cells.together().readings.get((spec.name, labels), []))

    def die(self) -> None:
        """As SIGKILL leaves it: the file is there and nobody holds it."""
        self.cells.end()

    def fold(self) -> None:
        assert self.cells.files is not None
        self.cells.files.fold()


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[int], list[Process]]:
    return lambda count: [Process(tmp_path) for _ in range(count)]


Processes = Callable[[int], list[Process]]


def files(directory: Path, pattern: str = "*.cells") -> list[Path]:
    return sorted(directory.glob(pattern))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "seawall"]


# One process


def test_without_a_directory_counts_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(METRICS_DIR, raising=False)
    found = Cells.of_environment(0, lambda: None)
    assert isinstance(found.values, list)
    assert found.files is None


def test_an_empty_name_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METRICS_DIR, "")
    assert Cells.of_environment(0, lambda: None).files is None


def test_asking_again_for_a_series_gives_the_same_cells(processes: Processes) -> None:
    for found in (Cells(), processes(1)[0].cells):
        one = found.index(REQUESTS, "allowed", "normal")
        assert found.index(REQUESTS, "allowed", "normal") == one
        other = found.index(REQUEST_DURATION, "normal")
        assert found.index(REQUESTS, "shed", "normal") == other + REQUEST_DURATION.cells
        assert len(found) == 3


def test_a_list_and_a_file_count_alike(processes: Processes) -> None:
    draw = random.Random(1)
    listed, mapped = Cells(), processes(1)[0].cells
    for _ in range(500):
        spec, labels = draw.choice([(REQUESTS, ("a", "b")), (REQUEST_DURATION, ("x",)), (INFLIGHT, ("y",))])
        offset, by = draw.randrange(spec.cells), draw.choice([1, 1, -1, 10**9, 10**15])
        for found in (listed, mapped):
            found.values[found.index(spec, *labels) + offset] += by
    assert mapped.together().counts == listed.together().counts
    mapped.clear()
    assert all(set(counts) == {0} for counts in mapped.together().counts.values())


def test_what_serves_nobody_has_no_file(tmp_path: Path) -> None:
    process = Process(tmp_path)
    at = process.cells.index(REQUESTS, "allowed", "normal")
    process.cells.publish([(CONFIG_INFO, ("a", "enforce"), 1.0)])
    process.cells.clear()
    assert process.cells.values[at] == 0
    assert process.counted(REQUESTS, "allowed", "normal") == 0
    assert files(tmp_path, "*") == []
    process.cells.values[at] += 1
    assert len(files(tmp_path)) == 1


def test_whoever_holds_the_values_from_before_the_first_count_counts_on(processes: Processes) -> None:
    (process,) = processes(1)
    found = process.cells
    values, at = found.values, found.index(INFLIGHT, "normal")
    values[at] += 1
    values[at] += 1
    assert values[at] == found.values[at] == 2
    values[at] -= 1
    assert process.counted(INFLIGHT, "normal") == 1


def test_its_beginning_is_told_once(tmp_path: Path) -> None:
    began: list[int] = []
    found = Cells(CellFiles(tmp_path, 0), lambda: began.append(1))
    before = found.values
    for _ in range(3):
        before[found.index(REQUESTS, "allowed", "normal")] += 1
    assert began == [1]


@given(st.floats())
def test_a_reading_is_read_as_it_was_written(value: float) -> None:
    found = decoded(encoded(value))
    assert found is not None
    assert found == value or (value != value and found != found)
    assert decoded(0) is None


def test_a_series_whose_labels_nobody_would_choose_is_read_as_it_was_written(processes: Processes) -> None:
    one, other = processes(2)
    for label in ("\udcff", "a\nb", 'a"b\\', "\x00", "☃", "", "x" * 100_000):
        one.count(TENANT_REQUESTS, label, "allowed")
        assert other.counted(TENANT_REQUESTS, label, "allowed") == 1


# Several processes


def test_whoever_is_asked_knows_what_all_have_counted(processes: Processes) -> None:
    several = processes(4)
    for number, process in enumerate(several):
        process.count(REQUESTS, "allowed", "normal", by=10**number)
        process.count(REQUEST_DURATION, "normal", by=number)
    assert {process.counted(REQUESTS, "allowed", "normal") for process in several} == {1111}
    assert {process.counted(REQUEST_DURATION, "normal") for process in several} == {6}


def test_a_process_that_died_has_counted_and_is_in_no_gauge(processes: Processes) -> None:
    one, other = processes(2)
    for process in (one, other):
        process.count(REQUESTS, "allowed", "normal", by=5)
        process.count(INFLIGHT, "normal", by=3)
        process.cells.publish([(QUEUED, ("normal",), 2.0)])
    assert (one.counted(REQUESTS, "allowed", "normal"), one.counted(INFLIGHT, "normal")) == (10, 6)
    assert one.readings(QUEUED, "normal") == [2.0]
    other.die()
    for _ in range(2):
        assert (one.counted(REQUESTS, "allowed", "normal"), one.counted(INFLIGHT, "normal")) == (10, 3)
        assert one.readings(QUEUED, "normal") == []
        one.fold()


def test_registries_are_told_apart_by_their_order(tmp_path: Path) -> None:
    first, second = Process(tmp_path, 0), Process(tmp_path, 1)
    first.count(REQUESTS, "allowed", "normal")
    second.count(REQUESTS, "allowed", "normal", by=7)
    other_first, other_second = Process(tmp_path, 0), Process(tmp_path, 1)
    assert other_first.counted(REQUESTS, "allowed", "normal") == 1
    assert other_second.counted(REQUESTS, "allowed", "normal") == 7


def test_a_reading_that_is_gone_is_gone_and_one_of_a_counter_stays(processes: Processes) -> None:
    one, other = processes(2)
    one.count(REQUESTS, "allowed", "normal")
    one.cells.publish([(CONFIG_INFO, ("old", "enforce"), 1.0), (EVICTED_KEYS, ("address",), 7.0)])
    assert other.readings(CONFIG_INFO, "old", "enforce") == [1.0]
    one.cells.publish([(CONFIG_INFO, ("new", "enforce"), 1.0), (EVICTED_KEYS, ("address",), 3.0)])
    assert other.readings(CONFIG_INFO, "old", "enforce") == []
    assert other.readings(CONFIG_INFO, "new", "enforce") == [1.0]
    one.cells.publish([])
    assert other.readings(CONFIG_INFO, "new", "enforce") == []
    assert other.counted(EVICTED_KEYS, "address") == 7


def test_a_reading_of_zero_is_one(processes: Processes) -> None:
    one, other = processes(2)
    one.count(REQUESTS, "allowed", "normal")
    one.cells.publish([(QUEUED, ("normal",), 0.0)])
    assert other.readings(QUEUED, "normal") == [0.0]


def test_two_versions_with_other_buckets_are_not_added_up(tmp_path: Path) -> None:
    one, other, third = Process(tmp_path), Process(tmp_path), Process(tmp_path)
    old = Spec(REQUEST_DURATION.name, "histogram", "Old.", ("priority",), (1.0,))
    one.count(REQUEST_DURATION, "normal", by=5)
    other.count(old, "normal", by=7)
    other.count(REQUESTS, "allowed", "normal")
    assert len(one.cells.together().counts[REQUEST_DURATION.name, ("normal",)]) in (REQUEST_DURATION.cells, old.cells)
    assert third.counted(REQUESTS, "allowed", "normal") == 1


# The end of processes


def test_files_of_those_that_died_become_one(tmp_path: Path, processes: Processes) -> None:
    survivor, *others = processes(65)
    survivor.count(REQUESTS, "allowed", "normal")
    for process in others:
        process.count(REQUESTS, "allowed", "normal")
        process.count(REQUEST_DURATION, "normal")
        process.die()
    assert len(files(tmp_path)) == 65
    survivor.fold()
    assert len(files(tmp_path)) == 1
    assert survivor.counted(REQUESTS, "allowed", "normal") == 65
    late = Process(tmp_path)
    assert late.counted(REQUESTS, "allowed", "normal") == 65
    late.count(REQUESTS, "allowed", "normal")
    late.die()
    for _ in range(3):
        survivor.fold()
        assert survivor.counted(REQUESTS, "allowed", "normal") == 66
    assert survivor.counted(REQUEST_DURATION, "normal") == 64


def test_files_of_those_that_live_stay(tmp_path: Path, processes: Processes) -> None:
    one, other = processes(2)
    for process in (one, other):
        process.count(REQUESTS, "allowed", "normal")
    one.fold()
    assert files(tmp_path, "*.folded") == []
    other.count(REQUESTS, "allowed", "normal")
    assert one.counted(REQUESTS, "allowed", "normal") == 3


def test_only_one_folds_at_a_time(tmp_path: Path, processes: Processes) -> None:
    one, other, dead = processes(3)
    dead.count(REQUESTS, "allowed", "normal")
    dead.die()
    with one.cells.alone() as alone, one.cells.alone() as again:
        assert (alone, again) == (True, False)
        other.fold()
        assert files(tmp_path, "*.folded") == []
    other.fold()
    assert len(files(tmp_path, "*.folded")) == 1


def test_a_scrape_with_64_dead_workers_is_quick(processes: Processes) -> None:
    """Below 100 ms with 300 series each, of which it asserts a tenth of the speed."""
    survivor, *others = processes(65)
    for process in others:
        for number in range(60):
            for spec in (REQUESTS, TENANT_REQUESTS, REQUEST_DURATION, INFLIGHT, BACKEND_UP):
                process.cells.index(spec, *(f"{label}{number}" for label in spec.labels))
        process.count(REQUESTS, "allowed", "normal")
        process.die()
    began = time.process_time()
    assert survivor.counted(REQUESTS, "allowed", "normal") == 64
    assert time.process_time() - began < 1.0


class _Killed(BaseException):
    pass


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """Be killed before the n-th change that is made to the directory."""
    left = step
    patch = pytest.MonkeyPatch()

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise _Killed
            return real(*arguments, **options)

        return call

    for name in ("unlink", "replace"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(json, "dump", counted(json.dump))
    try:
        yield
    finally:
        patch.undo()


def test_a_fold_that_is_killed_between_any_two_steps_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    for step in range(12):
        directory = tmp_path / str(step)
        survivor = Process(directory)
        for wave in range(2):
            for _ in range(3):
                process = Process(directory)
                process.count(REQUESTS, "allowed", "normal")
                process.die()
            try:
                with killed_before(step if wave else 99):
                    survivor.fold()
            except _Killed:
                pass
            assert survivor.counted(REQUESTS, "allowed", "normal") == 3 * (wave + 1)
        survivor.fold()
        assert survivor.counted(REQUESTS, "allowed", "normal") == 6
        assert files(directory) == []


@contextmanager
def meanwhile(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Let something happen before the n-th file is opened for reading."""
    real, patch = cellfiles._opened, pytest.MonkeyPatch()
    left = step

    def opened(path: Path) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            action()
        return real(path)

    patch.setattr(cellfiles, "_opened", opened)
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize("step", range(9))
def test_a_scrape_during_which_somebody_folds_is_exact(step: int, processes: Processes) -> None:
    survivor, other, *dead = processes(6)
    for process in (survivor, *dead):
        process.count(REQUESTS, "allowed", "normal")
    dead[0].die()
    survivor.fold()
    for process in dead[1:]:
        process.die()
    with meanwhile(step, survivor.fold):
        assert other.counted(REQUESTS, "allowed", "normal") == 5


STEP = st.tuples(
    st.sampled_from(["count", "count", "enter", "leave", "die", "start", "scrape", "scrape", "fold", "crash", "race"]),
    st.integers(0, 7),
    st.integers(0, 7),
)
SERIES = [
    (REQUESTS, ("allowed", "normal")),
    (REQUESTS, ("shed", "low")),
    (REQUEST_DURATION, ("normal",)),
    (TENANT_REQUESTS, ("acme", "allowed")),
]


@given(steps=st.lists(STEP, max_size=60))
def test_sums_are_exact_and_never_fall_whoever_dies_when(
    steps: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("cells")
    living = [Process(directory)]
    expected: Counter[Any] = Counter()
    inside: dict[Process, int] = {}

    def scrape(process: Process) -> None:
        for spec, labels in SERIES:
            assert process.counted(spec, *labels) == expected[spec, labels]
        assert process.counted(INFLIGHT, "normal") == sum(inside.get(one, 0) for one in living)

    for what, who, how in steps:
        process = living[who % len(living)]
        if what == "count":
            spec, labels = SERIES[how % len(SERIES)]
            process.count(spec, *labels, by=how + 1)
            expected[spec, labels] += how + 1
        elif what in ("enter", "leave"):
            by = 1 if what == "enter" else -1
            process.count(INFLIGHT, "normal", by=by)
            inside[process] = inside.get(process, 0) + by
        elif what == "die" and len(living) > 1:
            living.remove(process)
            process.die()
        elif what == "start":
            living.append(Process(directory))
        elif what == "scrape":
            scrape(process)
        elif what == "fold":
            process.fold()
        elif what == "crash":
            # Also the process that folds is gone, and its file is one of those to be folded.
            try:
                with killed_before(how):
                    process.fold()
            except _Killed:
                if len(living) > 1:
                    living.remove(process)
                    process.die()
        elif what == "race":
            other = Process(directory)
            with meanwhile(how, other.fold):
                scrape(process)
    for process in living:
        scrape(process)
    for process in living:
        process.die()
    last = Process(directory)
    last.fold()
    last.fold()
    for spec, labels in SERIES:
        assert last.counted(spec, *labels) == expected[spec, labels]
    assert files(directory) == []


# Threads


def test_series_may_be_made_in_every_thread_while_others_count(processes: Processes) -> None:
    (process,) = processes(1)
    for found in (Cells(), process.cells):
        start = threading.Barrier(8)

        def work(number: int, found: Cells = found, start: threading.Barrier = start) -> None:
            mine = found.index(REQUESTS, "mine", str(number))
            start.wait()
            for turn in range(300):
                found.values[mine] += 1
                found.values[found.index(REQUESTS, "of all", str(turn))] += 0

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = found.together().counts
        assert len(found) == 308
        assert [counts[REQUESTS.name, ("mine", str(number))] for number in range(8)] == [[300]] * 8
        taken = [at for _, _, at in found.series()]
        assert len(set(taken)) == 308


# What may be in the way


def forge(directory: Path, text: bytes, *, size: int = cellfiles.TEXT + 8 * 1_000) -> Path:
    """A file with this text, whose cells are all 3, that nobody holds."""
    path = directory / f"0.1.{'ab' * 8}.cells"
    with path.open("wb") as file:
        file.write(text)
        file.seek(cellfiles.TEXT)
        file.write((3).to_bytes(8, sys.byteorder) * 1_000)
        file.truncate(size)
    return path


LINE = cellfiles.line("count", (REQUESTS.name, ("allowed", "normal")), 1)


def test_a_file_of_another_process_needs_nothing_but_its_contents(tmp_path: Path, processes: Processes) -> None:
    forge(tmp_path, cellfiles.HEAD + LINE)
    assert processes(1)[0].counted(REQUESTS, "allowed", "normal") == 3


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        LINE,
        b"seawall cells 2\n" + LINE,
        cellfiles.HEAD + b"not json\n" + LINE,
        cellfiles.HEAD + b"\xff\n" + LINE,
        cellfiles.HEAD + b'{"a": 1}\n' + LINE,
        cellfiles.HEAD + b'["count", 1]\n' + LINE,
        cellfiles.HEAD + b'["what", 1, "a"]\n' + LINE,
        cellfiles.HEAD + b'[["count"], 1, "a"]\n' + LINE,
        cellfiles.HEAD + b'["count", 0, "a"]\n' + LINE,
        cellfiles.HEAD + b'["count", true, "a"]\n' + LINE,
        cellfiles.HEAD + b'["count", 1000000, "a"]\n' + LINE,
        cellfiles.HEAD + b'["count", 1, "a", 2]\n' + LINE,
        cellfiles.HEAD + b"[" * 100_000 + b"\n" + LINE,
        cellfiles.HEAD + b'["count",64,"a"]\n' * 20 + LINE,
        cellfiles.HEAD + LINE + b"x" * cellfiles.TEXT,
    ],
)
def test_what_is_no_file_of_cells_is_left_out_and_said_once(
    text: bytes, tmp_path: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    path = forge(tmp_path, text)
    one, other = processes(2)
    other.count(REQUESTS, "allowed", "normal", by=5)
    other.die()
    for _ in range(2):
        assert one.counted(REQUESTS, "allowed", "normal") == 5
        one.fold()
    assert files(tmp_path) == [path]
    (message,) = warnings(caplog)
    assert f"{path} is left out (" in message


@pytest.mark.parametrize("size", [0, 10, 1_000, cellfiles.TEXT, cellfiles.TEXT + 100])
def test_a_file_that_is_cut_off_is_left_out(
    size: int, tmp_path: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    forge(tmp_path, cellfiles.HEAD + LINE, size=size)
    assert processes(1)[0].counted(REQUESTS, "allowed", "normal") == 0
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("kind", ["directory", "pipe", "link", "socket", "foreign"])
def test_what_is_no_file_at_all_is_left_out_and_said_once(
    kind: str,
    tmp_path: Path,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    directory = tmp_path / "cells"
    one, other = Process(directory), Process(directory)
    path = directory / f"0.1.{'ab' * 8}.cells"
    monkeypatch.chdir(directory)  # a socket's path is at most 107 bytes long
    listener = socket.socket(socket.AF_UNIX)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(forge(elsewhere, cellfiles.HEAD + LINE))
    elif kind == "socket":
        listener.bind(path.name)
    else:
        path = directory / "notes.txt"
        path.write_text("mine")
    other.count(REQUESTS, "allowed", "normal", by=5)
    other.die()
    with listener:
        for _ in range(2):
            assert one.counted(REQUESTS, "allowed", "normal") == 5
            one.fold()
    assert path in directory.iterdir()
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_line_that_is_only_half_written_is_none(torn: int, tmp_path: Path, processes: Processes) -> None:
    one, other = processes(2)
    other.count(REQUESTS, "allowed", "normal", by=3)
    other.count(REQUESTS, "shed", "normal", by=4)
    (real,) = files(tmp_path)
    with real.open("r+b") as file:
        end = file.read(1000).index(b"\0")
        file.seek(end - torn)
        file.write(bytes(torn))
    assert one.counted(REQUESTS, "allowed", "normal") == 3
    assert one.counted(REQUESTS, "shed", "normal") == 0


@pytest.mark.parametrize(
    "contents",
    [
        b"garbage",
        b"[]",
        b'{"names": 3, "series": []}',
        b'{"names": [], "series": [["a", 1, [1]]]}',
        b'{"names": [], "series": [["a", [], ["x"]]]}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_folded_file_that_cannot_be_read_is_left_out(
    contents: bytes, tmp_path: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = processes(2)
    other.count(REQUESTS, "allowed", "normal", by=3)
    other.die()
    (tmp_path / "0.folded").write_bytes(contents)
    assert one.counted(REQUESTS, "allowed", "normal") == 3
    assert len(warnings(caplog)) == 1
    one.fold()
    assert one.counted(REQUESTS, "allowed", "normal") == 3
    assert json.loads((tmp_path / "0.folded").read_bytes())["names"]


def test_a_fold_that_fails_is_said_once_and_loses_nothing(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other, third = processes(3)
    for process in (other, third):
        process.count(REQUESTS, "allowed", "normal", by=3)
    other.die()
    one.fold()
    third.die()
    real = os.open

    def locked(path: Path, *arguments: Any) -> int:
        if Path(path).name == "0.folded":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", locked)
        for _ in range(2):
            one.fold()
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        one.fold()
    assert one.counted(REQUESTS, "allowed", "normal") == 6
    assert len(files(tmp_path)) == 1
    assert len(warnings(caplog)) == 1
    one.fold()
    assert one.counted(REQUESTS, "allowed", "normal") == 6
    assert files(tmp_path) == []


def test_a_folded_file_that_may_not_be_read_is_left_out_and_said_once(
    tmp_path: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = processes(2)
    other.count(REQUESTS, "allowed", "normal")
    (tmp_path / "0.folded").symlink_to("elsewhere")
    for _ in range(2):
        assert one.counted(REQUESTS, "allowed", "normal") == 1
    assert len(warnings(caplog)) == 1
    (tmp_path / "0.folded").unlink()
    (tmp_path / "0.folded").mkdir()
    assert one.counted(REQUESTS, "allowed", "normal") == 1


def test_nothing_outside_the_directory_is_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    directory = tmp_path / "cells"
    process = Process(directory)
    document = {"token": "a", "names": ["../precious", str(precious)], "series": []}
    (directory / "0.folded").write_text(json.dumps(document))
    (directory / "0.folded.new").symlink_to(precious)
    dead = Process(directory)
    dead.count(REQUESTS, "allowed", "normal")
    dead.die()
    process.fold()
    assert precious.read_text() == "mine"
    assert process.counted(REQUESTS, "allowed", "normal") == 1


def test_a_process_that_is_short_of_files_fails_and_does_not_leave_counts_out(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter that falls is taken for a restart, and what it had counted is counted again."""
    one, other = processes(2)
    other.count(REQUESTS, "allowed", "normal")

    def short(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", short)
    with pytest.raises(OSError, match="Too many open files"):
        one.cells.together()


def test_a_directory_that_is_gone_leaves_what_this_process_has_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cells"
    process = Process(directory)
    process.count(REQUESTS, "allowed", "normal")
    for path in files(directory, "*"):
        path.unlink()
    directory.rmdir()
    process.count(REQUESTS, "allowed", "normal")
    assert process.counted(REQUESTS, "allowed", "normal") == 2
    assert len(warnings(caplog)) == 1


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    process = Process(directory)
    process.count(REQUESTS, "allowed", "normal")
    process.die()
    process.fold()
    Process(directory).count(REQUESTS, "allowed", "normal")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_a_directory_that_is_none_is_said_and_counts_are_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "file"))
    found = Cells.of_environment(0, lambda: None)
    assert isinstance(found.values, list)
    (message,) = warnings(caplog)
    assert message.startswith(f"{METRICS_DIR}: {tmp_path / 'file'} cannot be used (")
    assert "each process tells only what it has counted itself" in message


def test_a_directory_that_may_not_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    assert Cells.of_environment(0, lambda: None).files is None
    assert "(permission denied)" in warnings(caplog)[0]


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite"])
def test_a_file_that_cannot_be_made_is_said_and_counts_are_a_list(
    call: str, processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, other = processes(2)

    def full(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = process.cells.index(REQUESTS, "allowed", "normal")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for _ in range(3):
            process.cells.values[first] += 1
            process.count(REQUESTS, "shed", "normal")
    assert isinstance(process.cells.values, list)
    assert process.counted(REQUESTS, "allowed", "normal") == 3
    assert process.counted(REQUESTS, "shed", "normal") == 3
    assert len(warnings(caplog)) == 1
    assert "No space left on device" in warnings(caplog)[0]
    assert other.counted(REQUESTS, "allowed", "normal") == 0


@pytest.mark.parametrize("why", ["text", "cells", "disk"])
def test_what_no_longer_has_room_is_said_once_and_not_told(
    why: str, processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = processes(2)
    one.count(REQUESTS, "allowed", "normal")
    if why == "disk":
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    elif why == "cells":
        monkeypatch.setattr(cellfiles, "CELLS", RESERVED + 1_000)
    long = "x" * (100_000 if why == "text" else 20)
    for number in range(3_000 if why == "disk" else 200):
        one.count(REQUESTS, "many", f"{number}{long}")
        one.count(REQUEST_DURATION, f"{number}{long}")
    monkeypatch.undo()
    found = other.cells.together().counts
    told = [labels for name, labels in found if name == REQUESTS.name and labels[0] == "many"]
    assert 0 < len(told) < (3_000 if why == "disk" else 200)
    assert {found[REQUESTS.name, labels][0] for labels in told} == {1}
    assert one.cells.together().counts == found
    assert len(warnings(caplog)) == 1
    one.cells.publish([(QUEUED, ("late",), 1.0)])
    assert one.counted(REQUESTS, "allowed", "normal") == other.counted(REQUESTS, "allowed", "normal") == 1


# After a fork


def in_child(work: Callable[[], None]) -> None:
    """Do something in a child that is forked, which must end well."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_counts_in_a_file_of_its_own_from_nothing(tmp_path: Path, processes: Processes) -> None:
    parent, other = processes(2)
    parent.count(REQUESTS, "allowed", "normal", by=5)
    parent.cells.publish([(QUEUED, ("normal",), 1.0)])
    parent.cells.index(REQUESTS, "shed", "normal")

    def work() -> None:
        assert parent.cells.values[parent.cells.index(REQUESTS, "allowed", "normal")] == 0
        parent.cells.publish([(QUEUED, ("normal",), 9.0)])
        assert len(files(tmp_path)) == 1  # it has not served anybody yet
        parent.count(REQUESTS, "allowed", "normal", by=2)
        parent.count(REQUESTS, "shed", "normal", by=3)
        parent.count(REQUESTS, "expired", "normal", by=4)
        parent.cells.publish([(QUEUED, ("normal",), 9.0)])
        assert len(files(tmp_path)) == 2
        assert parent.counted(REQUESTS, "allowed", "normal") == 7
        assert other.readings(QUEUED, "normal") == [1.0, 9.0]

    in_child(work)
    assert [other.counted(REQUESTS, outcome, "normal") for outcome in ("allowed", "shed", "expired")] == [7, 3, 4]
    assert other.readings(QUEUED, "normal") == [1.0]
    other.fold()
    assert len(files(tmp_path)) == 1
    parent.count(REQUESTS, "allowed", "normal")
    assert other.counted(REQUESTS, "allowed", "normal") == 8


def test_all_series_stay_where_they_are_after_a_fork(tmp_path: Path, processes: Processes) -> None:
    process, other = processes(2)
    placed = [process.cells.index(spec, *spec.labels) for spec in (REQUESTS, REQUEST_DURATION, INFLIGHT)]
    for at in placed:
        process.cells.values[at] += 1
    process.cells.start_anew()
    assert [process.cells.values[at] for at in placed] == [0, 0, 0]
    assert [process.cells.index(spec, *spec.labels) for spec in (REQUESTS, REQUEST_DURATION, INFLIGHT)] == placed
    late = process.cells.index(QUEUED, "late")
    for at in (*placed, late):
        process.cells.values[at] += 1
    assert len(files(tmp_path)) == 2
    assert other.counted(REQUESTS, *REQUESTS.labels) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_outlives_its_parent_does_not_keep_it_alive(tmp_path: Path, processes: Processes) -> None:
    parent, other = processes(2)
    parent.count(REQUESTS, "allowed", "normal")
    parent.count(INFLIGHT, "normal")
    ready, done = os.pipe(), os.pipe()
    with parent.cells.alone():
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        parent.die()
        assert other.counted(INFLIGHT, "normal") == 0
        other.fold()  # nor is the lock of who folds held by a child
        assert files(tmp_path) == []
        assert other.counted(REQUESTS, "allowed", "normal") == 1
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


@pytest.mark.slow
def test_what_was_counted_before_a_sigkill_is_there(tmp_path: Path, processes: Processes) -> None:
    (process,) = processes(1)
    code = """
import sys
from pathlib import Path
from seawall.cellfiles import CellFiles
from seawall.cells import Cells
from seawall.metrics import REQUESTS
cells = Cells(CellFiles(Path(sys.argv[1]), 0))
at = cells.index(REQUESTS, "allowed", "normal")
for number in range(1, 1_000_000_000):
    cells.values[at] += 1
    if number % 1000 == 0:
        print(number, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        told = [other.stdout.readline() for _ in range(50)]
        os.kill(other.pid, signal.SIGKILL)
        told += other.stdout.readlines()
    counted = process.counted(REQUESTS, "allowed", "normal")
    assert int(told[-1]) <= counted
    process.fold()
    assert process.counted(REQUESTS, "allowed", "normal") == counted
    assert files(tmp_path) == []
