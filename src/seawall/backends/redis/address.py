"""From a URL to where Redis is and how one speaks to it.

A URL that redis-py takes means the same here, or is refused with a reason; what redis-py has no URL for (Sentinel,
Cluster) is spelt as in `limits` and its kin. Nothing that is refused is quoted, not even the name of an option that is
not known: it may be the tail of a password that was not percent-encoded.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import AddressValueError, IPv6Address
from typing import Literal, TypeAlias, TypeVar, final
from urllib.parse import unquote_to_bytes

REDIS_PORT = 6379
SENTINEL_PORT = 26379
MAX_DB = 2**31 - 1
"""What the server itself can count to. How many databases it has, it says when one is selected."""

Kind: TypeAlias = Literal["single", "sentinel", "cluster"]

_SCHEMES: Mapping[str, tuple[Kind | Literal["unix"], bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "valkey": ("single", False),
    "valkeys": ("single", True),
    "unix": ("unix", False),
    "redis+unix": ("unix", False),
    "valkey+unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "valkey+sentinel": ("sentinel", False),
    "valkeys+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "valkey+cluster": ("cluster", False),
    "valkeys+cluster": ("cluster", True),
}
"""The form of what follows, and whether connections are encrypted."""

_PORTS: Mapping[Kind, int] = {"single": REDIS_PORT, "sentinel": SENTINEL_PORT, "cluster": REDIS_PORT}

_ENCODED = "in a user name or password '/' is written %2F, '?' %3F, '#' %23, '&' %26 and '%' %25"

_SENTINEL_OPTIONS = ("service", "sentinel_username", "sentinel_password")
_TLS_OPTIONS = (
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_min_version",
)
_OPTIONS = ("db", "username", "password", *_SENTINEL_OPTIONS, *_TLS_OPTIONS)
_ALSO = {"ssl_keyfile_password": "ssl_password"}
_SECRETS = ("username", "password", "sentinel_username", "sentinel_password", "ssl_password")
"""Values that may have any character; all others are printable."""

_WHY_NOT = {
    name: reason
    for reason, names in {
        "the time for a decision is `backend.timeout`": (
            "socket_timeout socket_connect_timeout socket_read_timeout timeout"
        ),
        "there is one connection per node": "max_connections single_connection_client auto_close_connection_pool",
        "a decision is never tried twice: it might be charged twice": (
            "retry retry_on_timeout retry_on_error cluster_error_retry_attempts"
        ),
        "a node that does not answer is found out by the decisions themselves": (
            "health_check_interval check_connection socket_keepalive socket_keepalive_options"
        ),
        "what goes over the connection is written and read by Seawall alone": (
            "protocol decode_responses encoding encoding_errors legacy_responses socket_read_size"
        ),
        "connections are named by Seawall": "client_name lib_name lib_version",
        "every decision writes, and replicas do not": "read_from_replicas load_balancing_strategy",
        "TLS is asked for by the scheme, rediss://": "ssl tls",
        "it has its place before the path, user:password@host:port": "host port user",
        "a cluster or service is decided with as it is found": (
            "skip_full_coverage_check require_full_coverage min_other_sentinels"
        ),
        "only certificates in files are supported, and the system's ciphers and flags": (
            "ssl_ca_data ssl_ciphers ssl_include_verify_flags ssl_exclude_verify_flags ssl_validate_ocsp "
            "ssl_validate_ocsp_stapled ssl_ocsp_context ssl_ocsp_expected_cert"
        ),
    }.items()
    for name in names.split()
}
"""What users of redis-py may have in a URL and what has no meaning here."""

_PLACE = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::([0-9]{0,9}))?")

_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}
_TLS12, _TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
_VERSIONS = {"TLSv1.2": _TLS12, "TLSv1.3": _TLS13, str(_TLS12.value): _TLS12, str(_TLS13.value): _TLS13}
"""redis-py takes the numbers of the protocol only."""

_T = TypeVar("_T")


class AddressError(ValueError):
    """What is wrong with a URL, or with a file that it names. The message quotes nothing of the URL but such a file."""


@final
@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to connect to: a host and a port, or the path of a unix socket. As text it is fit for logs."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@final
@dataclass(frozen=True, slots=True)
class Tls:
    """Who is trusted, and who we are. Without options: the system's authorities, the host's name, TLS 1.2 or later."""

    verify: ssl.VerifyMode = ssl.CERT_REQUIRED
    check_hostname: bool = True
    """False wherever ``verify`` is ``CERT_NONE``."""
    ca_certs: str | None = None
    """A file of authorities that are trusted besides the system's, as in redis-py."""
    ca_path: str | None = None
    """A directory of such files, named by their hashes."""
    certfile: str | None = None
    keyfile: str | None = None
    """The key of ``certfile``, if that does not hold it itself."""
    keyfile_password: str | None = field(default=None, repr=False)
    min_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2

    def context(self) -> ssl.SSLContext:
        """A new context with all of this loaded: read from disk, hence made once per backend. Or an `AddressError`."""
        _read("ssl_ca_certs", self.ca_certs)
        _read("ssl_ca_path", self.ca_path, os.listdir)
        _read("ssl_certfile", self.certfile)
        _read("ssl_keyfile", self.keyfile)
        context = ssl.create_default_context()
        context.check_hostname = self.check_hostname
        context.verify_mode = self.verify
        context.minimum_version = self.min_version
        if self.ca_path is not None:
            context.load_verify_locations(capath=self.ca_path)
        if self.ca_certs is not None:
            try:
                context.load_verify_locations(self.ca_certs)
            except OSError:
                raise AddressError(f"ssl_ca_certs: '{self.ca_certs}' holds no certificates in PEM form") from None
        if self.certfile is not None:
            try:
                # Without a password OpenSSL would ask for one at the terminal, and the service would not start.
                context.load_cert_chain(self.certfile, self.keyfile, self.keyfile_password or "")
            except OSError:
                raise AddressError(
                    f"ssl_certfile, ssl_keyfile: '{self.certfile}' and '{self.keyfile or self.certfile}' are not a "
                    "certificate and its key in PEM form, or ssl_password does not open the key"
                ) from None
        return context


@final
@dataclass(frozen=True, slots=True)
class Address:
    """Where Redis is. For ``single``, ``hosts`` is the one server; else the Sentinels or some nodes to begin with."""

    kind: Kind
    hosts: tuple[Endpoint, ...]
    db: int = 0
    # Names are not shown either: in redis://secret@host the password has the place of one.
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    service: str | None = None
    """The name under which Sentinels know the servers."""
    sentinel_username: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)
    """The Sentinels' own; ``username`` and ``password`` are for the servers only."""
    tls: Tls | None = None
    """For every connection, those to Sentinels too."""


def parse(url: str) -> Address:
    """What ``url`` says; or an `AddressError`. Nothing is resolved, opened or read.

    As in redis-py, an option wins over the path (``/0?db=1``) and user:password@ over the options.

    >>> parse("rediss://app:secret@cache.internal/2").hosts[0].port
    6379
    """
    if " " in url or not url.isprintable():
        raise AddressError("a redis url has no spaces and no control characters; a space in a password is written %20")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        near = _suggestion(scheme, _SCHEMES, "{}://") if separator else ""
        raise AddressError(
            "the url of redis begins with redis://, rediss:// (TLS), redis+sentinel://, redis+cluster:// "
            f"or unix://{near}"
        )
    form, encrypted = _SCHEMES[scheme]
    if "#" in rest:
        raise AddressError(f"a redis url has no '#'; {_ENCODED}")
    before, _, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    options = _options(query)
    if form != "unix" and "@" in path:
        raise AddressError(_ENCODED)
    _check_places(options, form, encrypted)

    userinfo, _, places = authority.rpartition("@")
    username, _, password = userinfo.partition(":")
    service: str | None = None
    if form == "unix":
        hosts: tuple[Endpoint, ...] = (_socket(places, _decoded(slash + path)),)
        path = ""
    else:
        hosts = tuple(_endpoint(place, _PORTS[form]) for place in places.split(","))
        if form == "single" and len(hosts) > 1:
            raise AddressError("several hosts are for redis+sentinel:// and redis+cluster://")
    if form == "sentinel":
        service, path = _service(path.removesuffix("/"), options)
    db = _db(path.removesuffix("/"), options)
    if form == "cluster" and db != 0:
        raise AddressError("a cluster has no database but 0")
    return Address(
        kind="single" if form == "unix" else form,
        hosts=hosts,
        db=db,
        username=_decoded(username) or options.get("username"),
        password=_decoded(password) or options.get("password"),
        service=service,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        tls=_tls(options) if encrypted else None,
    )


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for at, piece in enumerate(filter(None, query.split("&")), start=1):
        written, _, text = piece.partition("=")
        if "@" in written:
            raise AddressError(_ENCODED)
        name = _ALSO.get(written, written)
        if name in _WHY_NOT:
            raise AddressError(f"'{name}' has no meaning here: {_WHY_NOT[name]}")
        if name not in _OPTIONS:
            # Which one is said by its number: a name that is not known is the text of the user, and never shown.
            near = _suggestion(name, _OPTIONS) or f"; there are {', '.join(_OPTIONS)}"
            raise AddressError(f"option {at} of the url is not known{near}")
        if name in options:
            raise AddressError(f"'{name}' is there twice")
        value = _decoded(text.replace("+", " "))
        if not value:
            raise AddressError(f"'{name}' has no value")
        if name not in _SECRETS and not value.isprintable():
            raise AddressError(f"'{name}' has control characters")
        options[name] = value
    return options


def _check_places(options: Iterable[str], form: str, encrypted: bool) -> None:
    for name in options:
        if name in _SENTINEL_OPTIONS and form != "sentinel":
            raise AddressError(f"'{name}' is for redis+sentinel:// only")
        if name in _TLS_OPTIONS and not encrypted:
            raise AddressError(f"'{name}' needs TLS: rediss://, rediss+sentinel:// or rediss+cluster://")


def _endpoint(place: str, port: int) -> Endpoint:
    match = _PLACE.fullmatch(place)
    if match is None:
        hint = "; an IPv6 address is written in brackets, [::1]:6379" if place.count(":") > 1 else ""
        raise AddressError(f"a server is host or host:port, and a port is a number{hint}")
    address, name, digits = match.groups()
    if not place or name == "":
        raise AddressError("a host is missing; write localhost where it is meant")
    if digits and not 1 <= int(digits) <= 65535:
        raise AddressError("a port is 1 to 65535")
    host = _ipv6(address) if name is None else _name(name)
    if host is None:
        raise AddressError("a host is a name, an IPv4 address, or an IPv6 address in brackets")
    return Endpoint(host, int(digits) if digits else port)


def _name(text: str) -> str | None:
    name = text.lower()
    if not re.fullmatch(r"[\w.-]{1,253}", name):
        return None
    try:
        name.encode("idna")  # as the resolver will, whose failure would then be no OSError
    except UnicodeError:
        return None
    return name


def _ipv6(text: str) -> str | None:
    # A zone is written fe80::1%25eth0 (RFC 6874), or bare.
    address = _decoded(text)
    try:
        return str(IPv6Address(address)) if address.isprintable() else None
    except AddressValueError:
        return None


def _socket(places: str, path: str) -> Endpoint:
    if places:
        raise AddressError("a unix socket has no host: unix:///path, or unix://user:password@/path")
    if path.endswith("/") or not path:
        raise AddressError("a unix socket has a path: unix:///run/redis/redis.sock")
    if not path.isprintable():
        raise AddressError("the path of a unix socket has no control characters")
    return Endpoint(path=path)


def _service(path: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The name of the service, and the rest of the path."""
    first, _, rest = path.partition("/")
    service = _decoded(first)
    if "service" in options:
        if path:
            raise AddressError("the service is there twice, in the path and as an option; a database is then ?db=1")
        service = options["service"]
    if not service:
        raise AddressError("the service is missing: redis+sentinel://host:26379/service, or ?service=...")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", service):
        # The characters that sentinel.conf allows.
        raise AddressError("a service is named with letters, digits, '.', '-' and '_'")
    return service, rest


def _db(path: str, options: Mapping[str, str]) -> int:
    """The number of the database; in a path that is there, it must be one even where the option wins."""
    for text in (path, options.get("db", "")):
        if text and not (re.fullmatch(r"[0-9]{1,10}", text) and int(text) <= MAX_DB):
            raise AddressError("a database is a number from 0, such as redis://localhost:6379/0")
    return int(options.get("db") or path or 0)


def _tls(options: Mapping[str, str]) -> Tls:
    verify = _one_of("ssl_cert_reqs", _VERIFY, options, "required")
    check = _one_of("ssl_check_hostname", _BOOLEANS, options, "true")
    certfile, keyfile = options.get("ssl_certfile"), options.get("ssl_keyfile")
    if certfile is None and (keyfile is not None or "ssl_password" in options):
        raise AddressError("a key needs its certificate: ssl_certfile")
    return Tls(
        verify=verify,
        check_hostname=check and verify != ssl.CERT_NONE,
        ca_certs=options.get("ssl_ca_certs"),
        ca_path=options.get("ssl_ca_path"),
        certfile=certfile,
        keyfile=keyfile,
        keyfile_password=options.get("ssl_password"),
        min_version=_one_of("ssl_min_version", _VERSIONS, options, "TLSv1.2"),
    )


def _one_of(name: str, values: Mapping[str, _T], options: Mapping[str, str], default: str) -> _T:
    value = options.get(name, default).lower()
    for spelling, meaning in values.items():
        if spelling.lower() == value:
            return meaning
    raise AddressError(f"'{name}' is one of {', '.join(values)}")


def _decoded(text: str) -> str:
    """``text`` without its percent-encoding."""
    data = unquote_to_bytes(text)
    decoded = data.decode(errors="replace")
    # Compared, not caught: the error of a codec carries all of its input, and is kept as the context of ours.
    if decoded.encode() != data:
        raise AddressError("what is percent-encoded is not UTF-8")
    return decoded


def _suggestion(text: str, known: Iterable[str], form: str = "{}") -> str:
    near = get_close_matches(text[:80].lower(), list(known), 1, 0.6)
    return f"; did you mean '{form.format(near[0])}'?" if near else ""


def _first_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def _read(option: str, path: str | None, read: Callable[[str], object] = _first_byte) -> None:
    """Refuse what cannot be read. OpenSSL does not say which file it was, and of a directory nothing at all."""
    try:
        if path is not None:
            read(path)
    except OSError as error:
        raise AddressError(f"{option}: '{path}' cannot be read: {error.strerror}") from None
