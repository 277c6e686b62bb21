"""`seawall run`: uvicorn's options, what is different here, and no traceback for what is no application."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from uvicorn.main import main as uvicorn_itself

from seawall.cells import METRICS_DIR
from seawall.cli.app import build


class Uvicorn:
    """What `uvicorn.run` is told, and the directory in its environment then."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.directory: str | None = None
        self.existed = False

    def __call__(self, app: str, **options: Any) -> None:
        self.options = {"app": app, **options}
        self.directory = os.environ.get(METRICS_DIR)
        self.existed = self.directory is not None and Path(self.directory).is_dir()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uvicorn:
    """uvicorn, which serves nobody; the current directory has an application."""
    server = Uvicorn()
    monkeypatch.setattr(sys.modules["uvicorn.main"], "run", server)
    monkeypatch.delenv(METRICS_DIR, raising=False)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    (tmp_path / "service.py").write_text("app = None\n")
    monkeypatch.chdir(tmp_path)
    return server


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(build(None), ["run", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_options_are_uvicorn_s(told: Uvicorn) -> None:
    result = invoke("--workers", "3", "service:app", "--port", "0", "--root-path", "/api", "--no-access-log")
    assert (result.exit_code, result.output) == (0, "")
    wanted = {"app": "service:app", "workers": 3, "port": 0, "root_path": "/api", "access_log": False}
    assert told.options.items() >= wanted.items()


def test_several_workers_have_a_directory_for_as_long_as_they_serve(told: Uvicorn) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert invoke("service:app", "--workers", "2").exit_code == 0
    assert told.directory is not None
    assert told.existed
    assert not Path(told.directory).exists()
    assert METRICS_DIR not in os.environ
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("options", [[], ["--workers", "1"], ["--workers", "4", "--reload"]])
def test_one_process_has_none(options: list[str], told: Uvicorn) -> None:
    assert invoke("service:app", *options).exit_code == 0
    assert told.options["app"] == "service:app"
    assert told.directory is None


def test_a_directory_that_is_named_is_left_as_it_is(
    told: Uvicorn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    assert invoke("service:app", "--workers", "2").exit_code == 0
    assert told.directory == str(tmp_path)
    assert tmp_path.is_dir()


def test_the_number_of_workers_may_be_in_the_environment(told: Uvicorn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert invoke("service:app").exit_code == 0
    assert told.directory is not None
    monkeypatch.setenv("WEB_CONCURRENCY", "many")
    result = invoke("service:app")
    assert (result.exit_code, result.stderr) == (2, "seawall: WEB_CONCURRENCY is a number of workers, not 'many'\n")


def test_the_directory_is_removed_when_uvicorn_fails(told: Uvicorn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(app: str, **options: Any) -> None:
        told(app, **options)
        sys.exit(3)

    monkeypatch.setattr(sys.modules["uvicorn.main"], "run", fails)
    assert invoke("service:app", "--workers", "2").exit_code == 3
    assert told.existed
    assert told.directory is not None
    assert not Path(told.directory).exists()


def test_a_sigterm_before_uvicorn_listens_for_it_removes_the_directory(
    told: Uvicorn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(app: str, **options: Any) -> None:
        told(app, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sys.modules["uvicorn.main"], "run", ended)
    assert invoke("service:app", "--workers", "2").exit_code == 128 + signal.SIGTERM
    assert told.directory is not None
    assert not Path(told.directory).exists()


def test_headers_of_proxies_are_seawall_s(told: Uvicorn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("service:app").stderr == ""
    assert told.options["proxy_headers"] is False
    assert invoke("service:app", "--no-proxy-headers").stderr == ""
    result = invoke("service:app", "--proxy-headers")
    assert told.options["proxy_headers"] is True
    assert "identity.client_ip" in result.stderr
    monkeypatch.setenv("UVICORN_PROXY_HEADERS", "1")
    invoke("service:app")
    assert told.options["proxy_headers"] is True
    monkeypatch.delenv("UVICORN_PROXY_HEADERS")
    assert uvicorn_itself.make_context("uvicorn", ["service:app"]).params["proxy_headers"] is True  # it is as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'APP'"),
        (["service"], "'service' is no application: it is module:name, such as app:app"),
        (["service:"], "is no application"),
        ([":app"], "is no application"),
        (["a..b:app"], "is no application"),
        ([".service:app"], "is no application"),
        (["service.py:app"], None),
        (["no-module:app"], "is no application"),
        (["nowhere:app"], "there is no module 'nowhere' in "),
        (["service:app", "--app-dir", "/nowhere"], "there is no module 'service' in /nowhere; --app-dir names"),
        (["service:app", "--nonsense"], "No such option"),
        (["service:app", "--workers", "many"], "'many' is not a valid integer"),
    ],
)
def test_what_is_no_application_is_said_without_a_traceback(
    arguments: list[str], message: str | None, told: Uvicorn
) -> None:
    result = invoke(*arguments)
    if message is None:
        assert result.exit_code == 0  # it may be one: whoever imports it knows
        return
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert told.options == {}


def test_without_uvicorn_it_says_what_to_install(told: Uvicorn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "uvicorn.main")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke("service:app")
    assert result.exit_code == 2
    assert 'pip install "seawall[cli]"' in result.stderr


def test_other_verbs_do_not_count_among_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "metrics"))
    (tmp_path / "seawall.yaml").write_text("version: 1\nplans: {default: {rate: 5/minute}}\n")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(build(None), ["explain", "GET", "/"]).exit_code == 0
    assert not (tmp_path / "metrics").exists()
