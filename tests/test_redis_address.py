"""From a URL to where Redis is: what is read, what is refused, and that no secret is ever in what is said."""

from __future__ import annotations

import pickle
import shutil
import ssl
import subprocess
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from redis.connection import parse_url

from seawall.backends.redis.address import Address, AddressError, Endpoint, Tls, parse

LOCAL = Endpoint("localhost", 6379)
SINGLE = Address("single", (LOCAL,))
SECURE = replace(SINGLE, tls=Tls())
SOCKET = Address("single", (Endpoint(path="/run/redis.sock"),))
SENTINELS = Address("sentinel", (Endpoint("s1", 26379), Endpoint("s2", 26380)), service="mymaster")
CLUSTER = Address("cluster", (Endpoint("n1", 6379), Endpoint("n2", 7000)))

GOOD = {
    "redis://localhost": SINGLE,
    "redis://LocalHost/": SINGLE,
    "redis://localhost:6379/0": SINGLE,
    "redis://localhost:/3": replace(SINGLE, db=3),
    "redis://localhost/3/": replace(SINGLE, db=3),
    "redis://localhost?db=3": replace(SINGLE, db=3),
    "redis://localhost/2?db=3&": replace(SINGLE, db=3),
    "redis://localhost/2147483647": replace(SINGLE, db=2**31 - 1),
    "redis://:secret@localhost": replace(SINGLE, password="secret"),
    "redis://app:secret@localhost": replace(SINGLE, username="app", password="secret"),
    "redis://app@localhost": replace(SINGLE, username="app"),
    "redis://a%40b:%2F%3F%23%25%3A%C3%A9%20@localhost": replace(SINGLE, username="a@b", password="/?#%:é "),
    "redis://app:p@s:s+w%zz@localhost": replace(SINGLE, username="app", password="p@s:s+w%zz"),
    "redis://localhost?username=app&password=a+b%2Bc": replace(SINGLE, username="app", password="a b+c"),
    "redis://app:one@localhost?password=two": replace(SINGLE, username="app", password="one"),
    "redis://10.0.0.1:7000": Address("single", (Endpoint("10.0.0.1", 7000),)),
    "redis://redis_1.internal.": Address("single", (Endpoint("redis_1.internal.", 6379),)),
    "redis://bücher.example": Address("single", (Endpoint("bücher.example", 6379),)),
    "redis://[::1]": Address("single", (Endpoint("::1", 6379),)),
    "redis://app:x@[2001:DB8::0:1]:65535/1": Address(
        "single", (Endpoint("2001:db8::1", 65535),), db=1, username="app", password="x"
    ),
    "redis://[fe80::1%25eth0]:6380": Address("single", (Endpoint("fe80::1%eth0", 6380),)),
    "valkey://localhost": SINGLE,
    "rediss://localhost": SECURE,
    "valkeys://localhost": SECURE,
    "unix:///run/redis.sock": SOCKET,
    "unix:///run/redis.sock?db=1": replace(SOCKET, db=1),
    "redis+unix:///run/redis.sock": SOCKET,
    "valkey+unix:///run/redis.sock": SOCKET,
    "unix://app:se%2Fcret@/run/redis.sock": replace(SOCKET, username="app", password="se/cret"),
    "unix:///run/my%20redis@1.sock": Address("single", (Endpoint(path="/run/my redis@1.sock"),)),
    "redis+sentinel://s1,s2:26380/mymaster": SENTINELS,
    "redis+sentinel://s1,s2:26380/mymaster/": SENTINELS,
    "redis+sentinel://s1,s2:26380?service=mymaster": SENTINELS,
    "redis+sentinel://s1,s2:26380/?service=mymaster&db=2": replace(SENTINELS, db=2),
    "valkey+sentinel://s1,s2:26380/mymaster/2": replace(SENTINELS, db=2),
    "redis+sentinel://app:x@s1,s2:26380/mymaster?sentinel_username=look&sentinel_password=y%26z": replace(
        SENTINELS, username="app", password="x", sentinel_username="look", sentinel_password="y&z"
    ),
    "redis+sentinel://[::1],[::2]:5/a.b-c_D": Address(
        "sentinel", (Endpoint("::1", 26379), Endpoint("::2", 5)), service="a.b-c_D"
    ),
    "rediss+sentinel://s1,s2:26380/mymaster": replace(SENTINELS, tls=Tls()),
    "valkeys+sentinel://s1,s2:26380/mymaster": replace(SENTINELS, tls=Tls()),
    "redis+cluster://n1,n2:7000": CLUSTER,
    "redis+cluster://n1,n2:7000/0": CLUSTER,
    "valkey+cluster://app:x@n1,n2:7000/?db=0": replace(CLUSTER, username="app", password="x"),
    "rediss+cluster://n1,n2:7000": replace(CLUSTER, tls=Tls()),
    "valkeys+cluster://n1,n2:7000": replace(CLUSTER, tls=Tls()),
    "rediss://localhost?ssl_cert_reqs=none": replace(SINGLE, tls=Tls(ssl.CERT_NONE, check_hostname=False)),
    "rediss://localhost?ssl_cert_reqs=none&ssl_check_hostname=yes": replace(
        SINGLE, tls=Tls(ssl.CERT_NONE, check_hostname=False)
    ),
    "rediss://localhost?ssl_cert_reqs=optional": replace(SINGLE, tls=Tls(ssl.CERT_OPTIONAL)),
    "rediss://localhost?ssl_cert_reqs=required": SECURE,
    "rediss://localhost?ssl_check_hostname=False": replace(SINGLE, tls=Tls(check_hostname=False)),
    "rediss://localhost?ssl_check_hostname=0": replace(SINGLE, tls=Tls(check_hostname=False)),
    "rediss://localhost?ssl_check_hostname=TRUE": SECURE,
    "rediss://localhost?ssl_min_version=771": SECURE,
    "rediss://localhost?ssl_min_version=772": replace(SINGLE, tls=Tls(min_version=ssl.TLSVersion.TLSv1_3)),
    "rediss://localhost?ssl_min_version=TLSv1.3": replace(SINGLE, tls=Tls(min_version=ssl.TLSVersion.TLSv1_3)),
    "rediss://localhost?ssl_ca_certs=%2Fetc%2Fca.pem&ssl_ca_path=/etc/ca": replace(
        SINGLE, tls=Tls(ca_certs="/etc/ca.pem", ca_path="/etc/ca")
    ),
    "rediss+cluster://n1,n2:7000?ssl_certfile=c.pem&ssl_keyfile=k.pem&ssl_keyfile_password=x": replace(
        CLUSTER, tls=Tls(certfile="c.pem", keyfile="k.pem", keyfile_password="x")
    ),
    "rediss://localhost?ssl_certfile=c.pem&ssl_password=x": replace(
        SINGLE, tls=Tls(certfile="c.pem", keyfile_password="x")
    ),
}

BAD = {
    "": "begins with redis://",
    "localhost:6379": "begins with redis://",
    "http://localhost": "begins with redis://",
    "redis:localhost": "begins with redis://",
    "unix:/run/redis.sock": "begins with redis://",
    "REDIS://localhost": "did you mean 'redis://'",
    "redisx://localhost": "did you mean 'redis://'",
    "redis-sentinel://s1/x": "did you mean 'redis+sentinel://'",
    "rediss+unix:///run/redis.sock": "did you mean 'redis+unix://'",
    "redis://localhost\n": "no control characters",
    "redis://a b@localhost": "a space in a password is written %20",
    "redis://\ud800@localhost": "no control characters",
    "redis://localhost/0#1": "no '#'",
    "redis://": "a host is missing",
    "redis:///0": "a host is missing",
    "redis://:secret@": "a host is missing",
    "redis://:6379": "a host is missing",
    "redis+cluster://n1,": "a host is missing",
    "redis+sentinel://,s1/x": "a host is missing",
    "redis://localhost:0": "a port is 1 to 65535",
    "redis://localhost:65536": "a port is 1 to 65535",
    "redis://localhost:4294967297000": "a port is a number",
    "redis://localhost:-1": "a port is a number",
    "redis://localhost:٣": "a port is a number",
    "redis://::1": "in brackets",
    "redis://[::1": "a server is host or host:port",
    "redis://[]": "a host is a name",
    "redis://[::g]": "a host is a name",
    "redis://[127.0.0.1]": "a host is a name",
    "redis://[::1%25%0A]": "a host is a name",
    "redis://a..b": "a host is a name",
    "redis://" + "a" * 64: "a host is a name",
    "redis://lo%63alhost": "a host is a name",
    "redis://$host": "a host is a name",
    "redis://a,b": "several hosts are for",
    "redis://localhost/a": "a database is a number",
    "redis://localhost/-1": "a database is a number",
    "redis://localhost/1/2": "a database is a number",
    "redis://localhost/2147483648": "a database is a number",
    "redis://localhost/" + "1" * 5000: "a database is a number",
    "redis://localhost/٣": "a database is a number",
    "redis://localhost/a?db=1": "a database is a number",
    "redis://localhost?db=1.5": "a database is a number",
    "redis://localhost?db=": "'db' has no value",
    "redis://localhost?db": "'db' has no value",
    "redis://localhost?db=1&db=1": "'db' is there twice",
    "redis://:%ff@localhost": "not UTF-8",
    "redis://localhost?password=%ff": "not UTF-8",
    "redis://:a/b@localhost": "'/' is written %2F",
    "redis://app:12/b@localhost/0": "'/' is written %2F",
    "redis://:a?b@localhost": "'?' %3F",
    "redis://:a#b@localhost": "'#' %23",
    "unix://": "a unix socket has a path",
    "unix:///": "a unix socket has a path",
    "unix://app:x@": "a unix socket has a path",
    "unix://run/redis.sock": "a unix socket has no host",
    "unix:///run/%00": "no control characters",
    "redis+sentinel://s1": "the service is missing",
    "redis+sentinel://s1/": "the service is missing",
    "redis+sentinel://s1//1": "the service is missing",
    "redis+sentinel://s1/a%2Fb": "a service is named with",
    "redis+sentinel://s1?service=a+b": "a service is named with",
    "redis+sentinel://s1/a?service=b": "the service is there twice",
    "redis+sentinel://s1/a/b": "a database is a number",
    "redis+sentinel://s1/a/1/2": "a database is a number",
    "redis+sentinel://s1?service_name=a": "did you mean 'service'",
    "redis+cluster://n1/1": "no database but 0",
    "redis+cluster://n1?db=1": "no database but 0",
    "redis://localhost?service=a": "'service' is for redis+sentinel:// only",
    "redis+cluster://n1?sentinel_password=a": "'sentinel_password' is for redis+sentinel:// only",
    "redis://localhost?ssl_cert_reqs=required": "'ssl_cert_reqs' needs TLS",
    "unix:///run/redis.sock?ssl_ca_certs=a": "'ssl_ca_certs' needs TLS",
    "rediss://localhost?ssl_cert_reqs=CERT_NONE": "'ssl_cert_reqs' is one of none, optional, required",
    "rediss://localhost?ssl_check_hostname=off": "'ssl_check_hostname' is one of true",
    "rediss://localhost?ssl_min_version=770": "'ssl_min_version' is one of TLSv1.2, TLSv1.3",
    "rediss://localhost?ssl_ca_certs=%00": "'ssl_ca_certs' has control characters",
    "rediss://localhost?ssl_keyfile=k.pem": "a key needs its certificate",
    "rediss://localhost?ssl_password=x": "a key needs its certificate",
    "rediss://localhost?ssl_certfile=c&ssl_password=x&ssl_keyfile_password=x": "'ssl_password' is there twice",
    "rediss://localhost?ssl_ca_cert=a": "option 1 of the url is not known; did you mean 'ssl_ca_certs'?",
    "redis://localhost?db=1&&pasword=1": "option 2 of the url is not known; did you mean 'password'?",
    "redis://localhost?xyzzy=1": "not known; there are db, username",
    "redis://localhost?socket_timeout=1": "'socket_timeout' has no meaning here: the time for a decision is",
    "redis://localhost?max_connections=10": "one connection per node",
    "redis://localhost?decode_responses=true": "'decode_responses' has no meaning here",
    "redis://localhost?protocol=3": "'protocol' has no meaning here",
    "redis://localhost?health_check_interval=30": "'health_check_interval' has no meaning here",
    "redis://localhost?retry_on_timeout=true": "might be charged twice",
    "redis://localhost?ssl=true": "rediss://",
    "rediss://localhost?ssl_ciphers=ALL": "'ssl_ciphers' has no meaning here",
}


@pytest.mark.parametrize("url", GOOD)
def test_a_url_says_where_redis_is(url: str) -> None:
    assert GOOD[url] == parse(url)


@pytest.mark.parametrize("url", BAD, ids=lambda url: ascii(url[:60]))
def test_nonsense_is_refused_with_a_reason(url: str) -> None:
    with pytest.raises(AddressError) as refused:
        parse(url)
    assert BAD[url] in str(refused.value)


authorities = st.text("aA1:@[],.%/é-_0", max_size=12)
queries = st.lists(
    st.builds(
        "{}={}".format,
        st.sampled_from(["db", "username", "password", "ssl_check_hostname", "ssl_cert_reqs", "service", "x"]),
        st.sampled_from(["0", "1", "none", "required", "false", "yes", "a", "a+b", ""]),
    ),
    max_size=3,
).map("&".join)
schemes = st.sampled_from(
    ["redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+cluster://", "redis+unix://"]
)
near_urls = st.builds("{}{}{}?{}".format, schemes, authorities, st.sampled_from(["", "h", "h/0", "h/1", "/a"]), queries)


@given(st.one_of(st.text(), st.builds("{}{}".format, schemes, st.text()), near_urls))
def test_any_text_is_an_address_or_refused_with_words(text: str) -> None:
    try:
        address = parse(text)
    except AddressError:
        return
    assert address.hosts
    for endpoint in address.hosts:
        assert endpoint.path or (endpoint.host.encode("idna") and 1 <= endpoint.port <= 65535)
        assert str(endpoint).isprintable()


def theirs(url: str) -> dict[str, Any]:
    """What redis-py makes of ``url``, with the defaults that it has elsewhere."""
    kwargs: dict[str, Any] = parse_url(url)
    kwargs["tls"] = "SSL" in str(kwargs.pop("connection_class", ""))
    if "path" not in kwargs:
        kwargs = {"host": "localhost", "port": 6379} | kwargs
    return {"db": 0, "username": None, "password": None} | kwargs


def ours(address: Address) -> dict[str, Any]:
    """``address`` in the words of redis-py."""
    (endpoint,) = address.hosts
    where = {"path": endpoint.path} if endpoint.path else {"host": endpoint.host, "port": endpoint.port}
    who = {"username": address.username, "password": address.password}
    return {**where, **who, "db": address.db, "tls": address.tls is not None}


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    scheme=st.sampled_from(["redis", "rediss"]),
    username=names,
    password=names,
    host=st.sampled_from(["localhost", "Redis_1.internal", "10.0.0.1", "[::1]", "[2001:db8::1]"]),
    port=st.one_of(st.just(""), st.integers(1, 65535).map(":{}".format)),
    path=st.one_of(st.sampled_from(["", "/"]), st.integers(0, 2**31 - 1).map("/{}".format)),
    options=st.fixed_dictionaries(
        {},
        optional={
            "db": st.integers(0, 99).map(str),
            "username": st.text("aé &=+", min_size=1),
            "password": st.text("aé &=+", min_size=1),
        },
    ),
)
def test_what_redis_py_reads_is_read_alike(
    scheme: str, username: str, password: str, host: str, port: str, path: str, options: dict[str, str]
) -> None:
    query = "&".join(f"{name}={quote_plus(value)}" for name, value in options.items())
    url = f"{scheme}://{quote(username, safe='')}:{quote(password, safe='')}@{host}{port}{path}?{query}"
    assert theirs(url) == ours(parse(url))


@given(near_urls)
@example("unix://a:b%2Fc@/run/redis%20.sock?db=2")
@example("redis://[FE80::1%25eth0]/1")
def test_whatever_is_accepted_means_the_same_to_redis_py(url: str) -> None:
    assume(url.startswith(("redis://", "rediss://", "unix://")))
    try:
        address = parse(url)
    except AddressError:
        return
    try:
        expected = {name: value for name, value in theirs(url).items() if not name.startswith("ssl_")}
    except ValueError:
        return  # a '[' in a password, say: urllib wants it to be encoded
    if ":" in expected.get("host", ""):
        expected["host"] = str(IPv6Address(expected["host"]))
    assert expected == ours(address)


CANARY = "Zq9"
secrets = st.lists(st.sampled_from([*"/?#@:&=%[],+ ", "%zz", "%ff", "x", "\n", "\ud800", "ssl="]), max_size=4).map(
    lambda marks: CANARY + "".join(mark + CANARY for mark in marks)
)


@given(
    st.sampled_from(
        [
            "redis://app:{}@localhost/0",
            "redis://{}@localhost/0",
            "rediss://:{}@",
            "redis://:{}@localhost:99999",
            "redis://:{}@localhost/x",
            "redis://:{}@a,b",
            "redis://localhost?password={}",
            "redis://localhost?username={}&password={}",
            "redis://localhost?db=x&password={}",
            "redis://localhost?passwort={}",
            "redis://localhost?timeout=1&password={}",
            "redis://localhost?sentinel_password={}",
            "redis:/{}@localhost",
            "redisx://:{}@localhost",
            ":{}@localhost",
            "unix://app:{}@/run/redis.sock",
            "unix://app:{}@redis.sock",
            "redis+sentinel://:{}@s1/x?sentinel_username={}&sentinel_password={}",
            "redis+cluster://:{}@n1,n2/1",
            "rediss://localhost?ssl_password={}",
            "rediss://localhost?ssl_certfile=c&ssl_password={}",
            "rediss://localhost?ssl_certfile=c&ssl_keyfile_password={}",
        ]
    ),
    secrets,
    st.booleans(),
)
def test_a_password_is_in_no_message_and_in_no_repr(url: str, secret: str, encoded: bool) -> None:
    if encoded:
        secret = quote(secret, safe="", errors="replace")
    shown: list[object] = []
    try:
        address = parse(url.replace("{}", secret))
    except AddressError as error:
        chained: BaseException | None = error
        while chained is not None:
            shown += [str(chained), repr(chained), vars(chained)]
            chained = chained.__cause__ or chained.__context__
    else:
        shown += [repr(address), str(address), *map(str, address.hosts)]
    assert CANARY.lower() not in " ".join(map(str, shown)).lower()


def test_an_endpoint_as_text_is_what_one_would_write() -> None:
    written = ["redis.internal:6379", "[::1]:7000", "/run/redis.sock"]
    endpoints = [Endpoint("redis.internal", 6379), Endpoint("::1", 7000), Endpoint(path="/run/redis.sock")]
    assert written == [str(endpoint) for endpoint in endpoints]


def test_addresses_are_values() -> None:
    address = parse("rediss://app:x@localhost/1")
    assert address == parse("rediss://app:x@localhost:6379/1")
    assert address != parse("rediss://app:y@localhost:6379/1")
    assert {address: 1}[pickle.loads(pickle.dumps(address))] == 1


# TLS


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cert.pem`` of localhost, signed by itself, ``key.pem``, ``locked.pem`` (the key, with a password), ``both``."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("pem")
    make = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem -subj /CN=localhost"
    sign = "-addext subjectAltName=DNS:localhost -addext keyUsage=critical,digitalSignature,keyCertSign"
    lock = "rsa -in key.pem -aes256 -passout pass:open-sesame -out locked.pem"
    for command in (f"{make} {sign}", lock):
        subprocess.run([openssl, *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    (folder / "both.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    (folder / "junk.pem").write_text("no certificate")
    return folder


def context(options: str) -> ssl.SSLContext:
    tls = parse(f"rediss://localhost?{options}").tls
    assert tls is not None
    return tls.context()


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str = "localhost") -> str | None:
    """The version that the two agree upon."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1].version()


def serving(pem: Path, **changes: Any) -> ssl.SSLContext:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem / "both.pem")
    for name, value in changes.items():
        setattr(server, name, value)
    return server


def test_without_options_the_systems_authorities_are_trusted_and_names_checked(pem: Path) -> None:
    made = context("")
    assert (ssl.CERT_REQUIRED, True, ssl.TLSVersion.TLSv1_2) == (
        made.verify_mode,
        made.check_hostname,
        made.minimum_version,
    )
    system = ssl.create_default_context()
    assert system.cert_store_stats() == made.cert_store_stats()
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self.signed"):
        shake_hands(made, serving(pem))


@pytest.mark.parametrize("requirement", ["required", "optional"])
def test_a_named_authority_is_trusted_and_the_name_still_checked(pem: Path, requirement: str) -> None:
    made = context(f"ssl_ca_certs={pem}/cert.pem&ssl_cert_reqs={requirement}")
    assert shake_hands(made, serving(pem)) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname"):
        shake_hands(made, serving(pem), "elsewhere")


def test_a_directory_of_authorities_is_trusted(pem: Path) -> None:
    directory = pem / "authorities"
    directory.mkdir()
    digest = subprocess.run(
        ["openssl", "x509", "-hash", "-noout", "-in", pem / "cert.pem"], check=True, capture_output=True, timeout=60
    ).stdout.decode()
    shutil.copy(pem / "cert.pem", directory / f"{digest.strip()}.0")
    assert shake_hands(context(f"ssl_ca_path={directory}"), serving(pem)) == "TLSv1.3"


def test_the_check_of_names_can_be_left_out_alone(pem: Path) -> None:
    made = context(f"ssl_ca_certs={pem}/cert.pem&ssl_check_hostname=false")
    assert shake_hands(made, serving(pem), "elsewhere") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context("ssl_check_hostname=false"), serving(pem))


def test_no_certificate_need_be_trusted_where_none_is_required(pem: Path) -> None:
    assert shake_hands(context("ssl_cert_reqs=none"), serving(pem), "elsewhere") == "TLSv1.3"


def test_the_lowest_version_is_kept(pem: Path) -> None:
    old = serving(pem, maximum_version=ssl.TLSVersion.TLSv1_2)
    assert shake_hands(context(f"ssl_ca_certs={pem}/cert.pem"), old) == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        shake_hands(context(f"ssl_ca_certs={pem}/cert.pem&ssl_min_version=772"), old)


@pytest.mark.parametrize(
    "options",
    [
        "ssl_certfile={}/cert.pem&ssl_keyfile={}/key.pem",
        "ssl_certfile={}/both.pem",
        "ssl_certfile={}/cert.pem&ssl_keyfile={}/locked.pem&ssl_password=open-sesame",
    ],
)
def test_a_certificate_of_ones_own_is_shown(pem: Path, options: str) -> None:
    server = serving(pem, verify_mode=ssl.CERT_REQUIRED)
    server.load_verify_locations(pem / "cert.pem")
    assert shake_hands(context(f"ssl_ca_certs={pem}/cert.pem&" + options.replace("{}", str(pem))), server) == "TLSv1.3"


@pytest.mark.parametrize(
    ("options", "option", "file"),
    [
        ("ssl_ca_certs={}/gone.pem", "ssl_ca_certs", "gone.pem"),
        ("ssl_ca_certs={}", "ssl_ca_certs", ""),
        ("ssl_ca_certs={}/junk.pem", "ssl_ca_certs", "junk.pem"),
        ("ssl_ca_path={}/gone", "ssl_ca_path", "gone"),
        ("ssl_ca_path={}/junk.pem", "ssl_ca_path", "junk.pem"),
        ("ssl_certfile={}/gone.pem&ssl_keyfile={}/key.pem", "ssl_certfile", "gone.pem"),
        ("ssl_certfile={}/cert.pem&ssl_keyfile={}/gone.pem", "ssl_keyfile", "gone.pem"),
        ("ssl_certfile={}/cert.pem", "ssl_certfile", "cert.pem"),
        ("ssl_certfile={}/junk.pem&ssl_keyfile={}/key.pem", "ssl_certfile", "junk.pem"),
        ("ssl_certfile={}/cert.pem&ssl_keyfile={}/locked.pem", "ssl_password", "locked.pem"),
        ("ssl_certfile={}/cert.pem&ssl_keyfile={}/locked.pem&ssl_password=Zq9", "ssl_password", "locked.pem"),
    ],
)
def test_a_file_that_is_no_use_is_named_with_its_option_and_nobody_is_asked_for_a_password(
    pem: Path, options: str, option: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AddressError) as refused:
        context(options.replace("{}", str(pem)))
    message = str(refused.value)
    assert option in message
    assert str(pem / file) in message
    assert CANARY not in message
    assert capfd.readouterr() == ("", "")  # OpenSSL's question
