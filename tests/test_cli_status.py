"""`seawall status` and `seawall top`: what they print, how they end, and what they make of who is no Seawall."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
from prometheus_client import CollectorRegistry
from rich.console import Console

from harness import config, hello
from seawall import Seawall
from seawall.cli import status, top
from seawall.cli.terminal import console
from serving import free_port
from status_app import served
from status_sample import CALM, FAILED, HOSTILE, NOON, hostile, sample
from test_cli import environment, invoke

Answer = tuple[int, str, bytes]


@contextmanager
def answering(answer: Callable[[str], Answer]) -> Iterator[str]:
    """A server of what ``answer`` makes of a path; its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, form, body = answer(self.path)
            self.send_response(code)
            self.send_header("Location" if form.startswith("/") else "Content-Type", form)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serving(document: Callable[[], Any]) -> Any:
    """A server of a document at the default path, and of nothing elsewhere."""

    def answer(path: str) -> Answer:
        if path != status.DEFAULT_PATH:
            return 404, "text/plain", b"Not Found"
        return 200, "application/json", json.dumps(document()).encode()

    return answering(answer)


def numbered(**changes: Any) -> Callable[[], dict[str, Any]]:
    """Documents in which 100 more requests are allowed each time."""
    looks = count()

    def document() -> dict[str, Any]:
        said = sample(**changes)
        said["requests"]["allowed"] += 100 * next(looks)
        return said

    return document


# status


def test_status_prints_what_a_service_says() -> None:
    with serving(lambda: sample(held=CALM)) as host:
        result = invoke("status", host)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"http://{host}/-/seawall: all is well"
    assert lines[2] == "attention - The configuration has 1 warning."
    for line in (
        "reload    4 applied, 0 failed, in force since 2026-03-04T08:30:01.000Z",
        "requests  allowed 513,885, limited 12,354, shed 2,216, denied 48, exempt 8,640",
        "refused   rate 12,044, quota 310, overload 2,216, denied 48",
        "            globex (tenant) 9,310: rate 8,900, overload 410",
        "blocked   initech until 2026-03-04T12:10:00Z",
        "overload  limit 31 (lag), lag 12.3 ms, utilization 118 %",
        "            in flight: critical 2, normal 21, low 4",
        "backend   memory",
    ):
        assert line in lines
    assert re.search(r"^policy    enforce, [0-9a-f]{12}, 3 tenants, 4 plans, 2 routes$", result.stdout, re.MULTILINE)
    assert "/etc/seawall/tenants.d/sales.yaml" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held": CALM, "reload": FAILED}, "1 thing needs attention"),
        ({"held": CALM, "up": False}, "1 thing needs attention"),
        ({}, "1 thing needs attention"),
        ({"reload": FAILED, "up": False}, "3 things need attention"),
    ],
)
def test_status_ends_with_1_where_something_needs_attention(changes: dict[str, Any], words: str) -> None:
    with serving(lambda: sample(**changes)) as host:
        result = invoke("status", host)
        assert invoke("status", host, "--format", "json").exit_code == 1
    assert (result.exit_code, words in result.stdout) == (1, True)


def test_status_shows_the_diagnostics_of_a_reload_as_they_are() -> None:
    with serving(lambda: sample(reload=FAILED)) as host:
        stdout = invoke("status", host).stdout
    assert "! The last reload failed at 2026-03-04 11:58:20 UTC" in stdout
    assert "   11 |   free: {rate: 10_000/dya, concurency: 5}\n" in stdout


def test_status_prints_the_document_as_json() -> None:
    with serving(lambda: sample(held=CALM)) as host:
        result = invoke("status", host, "--format", "json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, sample(held=CALM))


def test_status_says_less_of_a_service_that_has_less() -> None:
    held = {"backend": {}, "overload": {}, "streams": {}}
    with serving(lambda: sample(held=held, counts=(), refused=(), blocked=(), workers=4)) as host:
        stdout = invoke("status", host).stdout
    assert "overload  nothing is shed\n" in stdout
    assert "refused   nobody\n" in stdout
    assert "blocked" not in stdout
    assert stdout.endswith("counts are of 4 processes\n")


def test_what_strangers_choose_does_not_reach_the_terminal() -> None:
    with serving(hostile) as host:
        stdout = invoke("status", host).stdout
    assert r"escape\x1b[2J" in stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", stdout)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost", "http://localhost/-/seawall"),
        ("localhost:8000", "http://localhost:8000/-/seawall"),
        ("[::1]:8000", "http://[::1]:8000/-/seawall"),
        ("http://localhost:8000/", "http://localhost:8000/-/seawall"),
        ("https://example.org/status?x=1#y", "https://example.org/status?x=1"),
        ("localhost:8000/status", "http://localhost:8000/status"),
    ],
)
def test_a_host_alone_has_the_page_at_the_default_path(given: str, address: str) -> None:
    assert status.address_of(given) == address


@pytest.mark.parametrize(
    "given",
    [
        *("", " ", "http://", "ftp://localhost/", "file:///etc/passwd", "localhost:http", "localhost:70000"),
        *("localhost:0", "http://[::1", "localhost/a b", "localhost/\n", "localhost/\u05d0"),
        "http://user:secret@localhost/",
    ],
)
def test_what_is_no_address_ends_with_2(given: str) -> None:
    for verb in ("status", "top"):
        result = invoke(verb, given)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("seawall: ")
        assert "secret" not in result.stderr


def fails(answer: Callable[[str], Answer] | None, host: str = "") -> str:
    """The message with which both verbs end where they are answered so."""
    with answering(answer) if answer else _nothing(host) as address:
        results = [invoke("status", address), invoke("top", address, "--once")]
    assert [(result.exit_code, result.stdout) for result in results] == [(2, ""), (2, "")]
    assert results[0].stderr == results[1].stderr
    return str(results[0].stderr)


@contextmanager
def _nothing(host: str) -> Iterator[str]:
    yield host


def test_a_service_that_is_not_there_ends_with_2() -> None:
    assert "cannot be reached: Connection refused" in fails(None, f"127.0.0.1:{free_port()}")
    assert "cannot be reached: " in fails(None, "nobody.invalid")


def test_a_peer_that_is_not_allowed_is_told_why_that_may_be() -> None:
    message = fails(lambda _: (404, "text/plain", b"Not Found"))
    assert "answers 404: nothing is there (status.path), or this machine is not one of status.allow" in message


@pytest.mark.parametrize("code", [204, 401, 403, 429, 500, 503])
def test_another_answer_is_named(code: int) -> None:
    assert f"answers {code}, which a status page does not" in fails(lambda _: (code, "text/plain", b""))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"version": "1"}',
        json.dumps({**sample(), "requests": {"allowed": "many"}}).encode(),
        json.dumps({**sample(), "attention": [{"level": "alert"}]}).encode(),
        json.dumps({**sample(), "policy": {**sample()["policy"], "files": [1]}}).encode(),
        json.dumps({**sample(), "backend": {**sample()["backend"], "up": 1}}).encode(),
        json.dumps({**sample(), "refused": {"caller": "x"}}).encode(),
        json.dumps({**sample(), "pid": True}).encode(),
    ],
)
def test_what_is_no_status_page_of_seawall_is_said_to_be_none(body: bytes) -> None:
    assert "is something else than the status page of Seawall" in fails(lambda _: (200, "application/json", body))


def test_what_a_document_has_besides_is_left_alone() -> None:
    said = {
        **sample(held=CALM),
        "more": [1],
        "overload": {"limit": "all"},
        "reload": {**sample()["reload"], "error": 7},
    }
    with serving(lambda: said) as host:
        result = invoke("status", host)
        assert invoke("top", host, "--once", "--interval", "0.1").exit_code == 0
    assert result.exit_code == 0
    assert "overload  nothing is shed\n" in result.stdout


def test_an_answer_without_an_end_is_cut() -> None:
    body = b" " * (5 << 20) + json.dumps(sample(held=CALM)).encode()
    assert "something else" in fails(lambda _: (200, "application/json", body))


def test_a_redirection_is_followed() -> None:
    def answer(path: str) -> Answer:
        if path == "/moved":
            return 307, "/-/seawall", b""
        return 200, "application/json", json.dumps(sample(held=CALM)).encode()

    with answering(answer) as host:
        assert invoke("status", f"http://{host}/moved").exit_code == 0


@contextmanager
def speaking(words: bytes | None) -> Iterator[str]:
    """A server that says ``words`` to whoever connects, or nothing, and does not hang up."""
    held: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                held.append(peer)
                if words is not None:
                    peer.recv(4_096)
                    peer.sendall(words)
                    peer.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for peer in held:
                peer.close()


@pytest.mark.parametrize("words", [b"", b"220 mail.example.org ESMTP\r\n"])
def test_who_does_not_speak_http_is_said_not_to(words: bytes) -> None:
    with speaking(words) as host:
        result = invoke("status", host)
    assert result.exit_code == 2
    assert re.search("does not speak HTTP|cannot be reached", result.stderr)


def test_who_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TIMEOUT", 0.1)
    with speaking(None) as host:
        result = invoke("status", host)
    assert result.exit_code == 2
    assert result.stderr.endswith("does not answer within 0.1 s\n")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serving(lambda: sample(held=CALM)) as host:
        assert invoke("status", host).exit_code == 0


@pytest.mark.slow
def test_both_verbs_read_what_an_application_says() -> None:
    settings = config(plans={"default": {"rate": "1/hour"}}, status={"path": "/-/seawall", "allow": ["127.0.0.1"]})
    with served(Seawall(hello, settings, registry=CollectorRegistry())) as origin:
        for expected in (200, 429):
            connection = http.client.HTTPConnection(urlsplit(origin).netloc)
            connection.request("GET", "/")
            assert connection.getresponse().status == expected
            connection.close()
        told = invoke("status", origin)
        assert told.exit_code == 0
        assert "requests  allowed 1, limited 1" in told.stdout
        assert "127.0.0.1 (address) 1: rate 1\n" in told.stdout
        line = invoke("top", origin, "--once", "--interval", "0.1").stdout
        assert re.search(r"limited 0\.0/s .* most refused 127\.0\.0\.1 1\n$", line)
        assert invoke("status", f"{origin}/elsewhere").exit_code == 2


# top, line by line


def test_top_prints_how_much_there_is_a_second() -> None:
    with serving(numbered()) as host:
        result = invoke("top", host, "--once", "--interval", "0.1")
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    rate = re.match(r"2026-03-04T12:00:00.000Z  allowed ([\d,.]+)/s  limited 0.0/s  shed 0.0/s  denied 0.0/s", line)
    assert rate is not None
    # 100 requests in 0.1 s or, on a busy machine, a bit more.
    assert 10 < float(rate[1].replace(",", "")) <= 1_000
    assert line.endswith("in flight 27/31  queued 11  most refused globex 9,310  Shedding now: some of class low.")


def test_a_line_leaves_out_what_there_is_none_of() -> None:
    pace = top.Pace(sample(held={"overload": {}}, counts=(), refused=()))
    assert top.line(pace) == "2026-03-04T12:00:00.000Z"


def test_counts_that_begin_anew_have_no_rate() -> None:
    pace = top.Pace(sample())
    assert pace.rates is None
    pace.add(sample(counts=()))
    assert pace.rates is None
    assert "allowed" not in top.line(pace)
    pace.add(sample())
    assert pace.rates is not None
    assert pace.rates["allowed"] > 0
    pace.add(sample(counts=()))
    pace.add(sample(counts=()))
    assert pace.rates == dict.fromkeys(pace.rates, 0.0)


def fetching(*looks: Any) -> Callable[[str], Any]:
    """Documents, and exceptions in their place."""
    left = iter(looks)

    def fetch(_: str) -> Any:
        if isinstance(look := next(left), BaseException):
            raise look
        return look

    return fetch


def test_top_says_what_is_wrong_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = status.Unreachable("it is away")
    monkeypatch.setattr(top, "fetch", fetching(away, sample(), KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        top.follow("http://localhost/", sample(), 0.0, once=False)
    said = capsys.readouterr()
    assert said.err == "seawall: it is away\n"
    assert len(said.out.splitlines()) == 1
    monkeypatch.setattr(top, "fetch", fetching(away))
    with pytest.raises(typer.Exit) as ended:
        top.follow("http://localhost/", sample(), 0.0, once=True)
    assert ended.value.exit_code == 2


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9", "soon"])
def test_an_interval_that_makes_no_sense_ends_with_2(interval: str) -> None:
    assert invoke("top", "localhost", "--interval", interval).exit_code == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pipe is told to end in another way there")
def test_top_in_a_pipe_ends_quietly_when_nobody_reads_any_more() -> None:
    with serving(numbered()) as host:
        command = [sys.executable, "-m", "seawall", "top", host, "--interval", "0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert b"allowed" in process.stdout.readline()
            process.stdout.close()
            assert process.wait(30) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pipe is told to end in another way there")
def test_top_in_a_pipe_ends_with_ctrl_c() -> None:
    with serving(numbered()) as host:
        command = [sys.executable, "-m", "seawall", "top", host, "--interval", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            assert b"allowed" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")


# top, on a screen


def painted(document: dict[str, Any], trouble: str = "", width: int = 120) -> str:
    pace = top.Pace(sample(counts=()))
    pace.add(document)
    pace.rates = {"allowed": 1_234.56, "limited": 3.0}
    screen = console(open(os.devnull, "w"))  # noqa: SIM115  # closed below
    screen.width = width
    with screen.file, screen.capture() as capture:
        screen.print(top.view("http://localhost/", pace, trouble))
    return " ".join(capture.get().split())


def test_the_screen_shows_what_needs_attention_first_and_then_the_rates() -> None:
    text = painted(sample(reload=FAILED), "it is away")
    assert text.index("What is shown is old: it is away") < text.index("The last reload failed at")
    assert text.index("Shedding now: some of class low.") < text.index("requests per second in all")
    for fact in (
        "allowed 1,234.6/s 513,885",
        "limited 3.0/s 12,354",
        "limit 31 (lag), lag 12.3 ms, utilization 118 %",
        "low 4 9 ",
        "2,204",
        "globex tenant 9,310 rate 8,900, overload 410",
        "acme tenant 310 quota 310",
    ):
        assert fact in text


def test_a_screen_of_hostile_names_is_a_screen() -> None:
    text = painted(hostile(), HOSTILE[5])
    assert r"escape\x1b[2J" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert "<script>" in text


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import pty
        import termios

        self._ours, self._theirs = pty.openpty()
        self._modes = termios.tcgetattr(self._theirs)
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "seawall", *arguments],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=environment(TERM="xterm-256color", COLUMNS="100", LINES="40", NO_COLOR=""),
            start_new_session=True,
        )

    def until(self, words: bytes) -> None:
        deadline = time.monotonic() + 30
        while words not in self.output:
            assert time.monotonic() < deadline, self.output
            self._read(0.1)

    def _read(self, seconds: float) -> None:
        if select.select([self._ours], [], [], seconds)[0]:
            self.output += os.read(self._ours, 65_536)

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def ended(self) -> int:
        """How it ends, once all that it had to say is read."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            self._read(0.05)
        self._read(0.05)
        return self.process.returncode

    @property
    def is_restored(self) -> bool:
        """Whether the screen, the cursor and the modes are as they were."""
        import termios

        back = self.output.rindex(b"\x1b[?1049l") > self.output.rindex(b"\x1b[?1049h")
        shown = self.output.rindex(b"\x1b[?25h") > self.output.rindex(b"\x1b[?25l")
        return back and shown and termios.tcgetattr(self._theirs) == self._modes

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda terminal: terminal.press(b"xq"), 0),
        (lambda terminal: terminal.process.send_signal(signal.SIGINT), 0),
        (lambda terminal: terminal.process.send_signal(signal.SIGTERM), 128 + signal.SIGTERM),
    ],
    ids=["q", "ctrl-c", "sigterm"],
)
def test_top_leaves_the_terminal_as_it_was(leave: Callable[[Terminal], None], code: int) -> None:
    with serving(numbered()) as host:
        terminal = Terminal("top", host, "--interval", "0.1")
        try:
            terminal.until(b"513,885")
            terminal.until(b"514,085")  # and 100 more, twice
            assert b"\x1b[?1049h" in terminal.output
            leave(terminal)
            assert terminal.ended() == code
            assert terminal.is_restored
            assert b"Traceback" not in terminal.output
        finally:
            terminal.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_the_screen_says_when_the_service_has_gone() -> None:
    terminal = None
    try:
        with serving(numbered()) as host:
            terminal = Terminal("top", host, "--interval", "0.1")
            terminal.until(b"513,885")
        terminal.until(b"What is shown is old")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert terminal.is_restored
    finally:
        if terminal is not None:
            terminal.close()


def test_without_a_keyboard_top_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with top._keys() as pressed:
        assert pressed(1.5) == ""
    assert waited == [1.5]


def test_watching_ends_with_q_and_not_with_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "fetch", fetching(sample(), status.Unreachable("it is away"), sample()))
    keys = iter(["", "x", "", "Q"])
    with open(os.devnull, "w") as nowhere:
        top.watch("http://localhost/", sample(), 1.0, lambda _: next(keys), Console(file=nowhere, force_terminal=True))
    assert next(keys, None) is None


def test_the_samples_are_of_one_instant() -> None:
    assert sample()["time"] == hostile()["time"] == "2026-03-04T12:00:00.000Z"
    assert NOON > 0
