"""`seawall init`: a first configuration, with what can be said in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from seawall.cli.schema import schema_text
from seawall.cli.terminal import fail, say, write

SCHEMA = "seawall.schema.json"

HEAD = f"""\
# yaml-language-server: $schema=./{SCHEMA}
"""

MINIMAL = f"""\
{HEAD}version: 1
plans:
  default: {{rate: 100/minute}}   # for every caller, by client address
"""

FULL = f"""\
{HEAD}# Who may call how much. `seawall check` finds mistakes, `seawall explain GET /path` says what holds for it.
version: 1
mode: enforce                    # shadow counts what would be refused and refuses nothing: a good first week

identity:
  tenant:                        # tried in order; the first that yields a value wins
    - api_key: {{header: X-API-Key}}      # looked up by its hash in tenants.<id>.keys
    # - state: tenant_id                # scope["state"]["tenant_id"], set by your authentication middleware
  anonymous: per-ip              # what a request without a tenant is: per-ip, shared (one bucket for all) or deny (401)
  # client_ip:
  #   trusted_proxies: [10.0.0.0/8]     # your load balancers; without them their address is everybody's
  #   ipv6_prefix: 64                   # one bucket per /64, not per address

defaults:
  plan: free                     # a tenant without a plan
  anonymous_plan: anonymous      # callers without a tenant

plans:
  anonymous: {{rate: 60/minute, priority: low}}   # the first to be refused when more comes than the service can do
  free:
    rate: 10/second              # a token bucket: at most 10 at once, refilled at 10 a second
    concurrency: 10              # requests in flight at once
    # quota: 10_000/day                 # until midnight UTC; {{limit: 10_000/day, zone: Europe/Berlin}} for another
  pro:
    rate: {{limit: 100/second, burst: 300}}
    concurrency: 50

tenants:
  example:
    plan: pro
    # keys:                             # seawall hash-key --generate
    #   - "sha256:..."
    # overrides: {{rate: 500/second}}

routes:                          # top to bottom, the first match wins; what matches none has the caller's plan alone
  - name: probes
    match: {{path: [/healthz, /readyz]}}
    exempt: true                 # never limited, still counted
  - name: login
    match: {{path: /login, methods: [POST]}}
    limits:
      login-ip: {{rate: 5/minute, per: client_ip}}      # besides the caller's plan
  # - name: search
  #   match: {{path: "/v1/search/**"}}
  #   cost: 5                           # takes 5 of the caller's plan

# Overload needs no settings: what can be served in time is, the important first, and the rest is refused with a 503.
# Plans, tenants and routes may have a `priority`; who has none is normal.
# priorities: {{critical: {{}}, normal: {{}}, low: {{}}}}   # the classes, if no others are named here
# shedding: {{algorithm: off}}          # never refuse for overload

metrics:
  path: /metrics                 # for Prometheus
  allow: [127.0.0.1, "::1"]      # who may scrape

# status: {{allow: [127.0.0.1]}}        # a page for people at /-/seawall: what holds, and who is refused
# history: seawall.history.jsonl        # each change of this file: when, and what it means
"""

NEXT = """\
Next, in your application:

    from seawall import Seawall

    app.add_middleware(Seawall, config={path})
"""


def run(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write it.")] = Path("seawall.yaml"),
    minimal: Annotated[bool, typer.Option("--minimal", help="The smallest file that does something.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    with_schema: Annotated[
        bool, typer.Option("--schema/--no-schema", help=f"Write {SCHEMA} beside it, for completion in editors.")
    ] = True,
) -> None:
    """Write a first configuration, with comments that say what else there is.

    \b
    Examples:
      seawall init
      seawall init --minimal deploy/seawall.yaml
    """
    if os.path.isdir(path):
        fail(f"{path} is a directory; name a file in it, such as {path / 'seawall.yaml'}")
    write(path, MINIMAL if minimal else FULL, replace=force)
    say(f"wrote {path}")
    if with_schema:
        _write_schema(path.parent / SCHEMA, force=force)
    print(NEXT.format(path=json.dumps(str(path))))


def _write_schema(path: Path, *, force: bool) -> None:
    """The schema beside the file, unless something else has its name."""
    if os.path.exists(path) and not force:
        say(f"{path} is there already and was kept; `seawall schema -o {path}` renews it")
        return
    write(path, schema_text())
    say(f"wrote {path}")
