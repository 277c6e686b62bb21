"""`seawall run`: uvicorn, with metrics that are right under several workers."""

from __future__ import annotations

import copy
import os
import signal
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

import typer

from seawall.cells import METRICS_DIR
from seawall.cli.terminal import fail, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import click

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of this verb: whatever it does not know is uvicorn's."""

IN_MEMORY = Path("/dev/shm")  # where Linux has a file system without a disk


def run(context: typer.Context) -> None:
    """Serve an application with uvicorn: seawall run APP [OPTIONS], where OPTIONS are those of uvicorn.

    Each of several workers knows what all of them have counted, so a scrape of any is one of all: also after workers
    were killed, replaced or restarted. For that they share a directory, which SEAWALL_METRICS_DIR names, or which is
    made, in memory where there is such a place, and removed at the end.

    uvicorn does not read X-Forwarded-For here, unless --proxy-headers says so: it would replace the address of whoever
    is connected, and by that Seawall knows whom to believe (identity.client_ip in the configuration).

    `uvicorn --help` lists the options. The exit code is uvicorn's, or 2 if there is no such application.

    \b
    Examples:
      seawall run app:app --workers 4
      seawall run app:create --factory --host 0.0.0.0 --port 8080 --workers 2
      SEAWALL_METRICS_DIR=/run/shop seawall run app:app --workers 4
    """
    try:
        from uvicorn.main import main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "uvicorn":
            raise
        fail('this needs uvicorn: pip install "seawall[cli]"')
    served(main).main(context.args, prog_name="seawall run")


def served(uvicorn: click.Command) -> click.Command:
    """uvicorn's own command line, with what is different here."""
    command = copy.copy(uvicorn)
    command.params = [copy.copy(param) for param in uvicorn.params]
    for param in command.params:
        if param.name == "proxy_headers":
            param.default = False
    serve: Callable[..., Any] = uvicorn.callback  # type: ignore[assignment]

    def callback(**options: Any) -> None:
        must_exist(options["app"], options["app_dir"])
        if options["proxy_headers"]:
            say(
                "seawall: --proxy-headers has uvicorn replace the address of whoever is connected; "
                "remove identity.client_ip from the configuration, or this option"
            )
        with shared_directory(workers(options)):
            serve(**options)

    command.callback = callback
    return command


def must_exist(app: str, folder: str) -> None:
    """End the verb if there is no module of such an application. uvicorn's workers would find out one by one."""
    module, _, attribute = app.partition(":")
    first, *rest = module.split(".")
    if not attribute or not all(name.isidentifier() for name in (first, *rest)):
        fail(f"{app!r} is no application: it is module:name, such as app:app")
    sys.path.insert(0, folder)
    try:
        # Not more than the first: whatever is in a package would be run to find out.
        found = find_spec(first)
    finally:
        sys.path.remove(folder)
    if found is None:
        fail(f"there is no module {first!r} in {Path(folder).absolute()}; --app-dir names another folder")


def workers(options: dict[str, Any]) -> int:
    """How many processes will serve."""
    if options["reload"]:
        return 1
    told = options["workers"] or os.environ.get("WEB_CONCURRENCY", "1")
    try:
        return int(told)
    except ValueError:
        fail(f"WEB_CONCURRENCY is a number of workers, not {told!r}")


@contextmanager
def shared_directory(processes: int) -> Iterator[None]:
    """A directory for the metrics of several processes, in the environment of those that begin in this block."""
    if processes < 2 or os.environ.get(METRICS_DIR):
        yield
        return
    # Until uvicorn has handlers of its own: the directory must not stay.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parent = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else gettempdir()
    with TemporaryDirectory(prefix="seawall-metrics-", dir=parent, ignore_cleanup_errors=True) as directory:
        os.environ[METRICS_DIR] = directory
        try:
            yield
        finally:
            del os.environ[METRICS_DIR]
            signal.signal(signal.SIGTERM, before)
