"""The values of the language one by one: names, addresses, paths, keys, dates. Each check says what to write instead.

A check takes the text and raises `ValueError` with a message for people; where the value is also needed in another
form there is a function that gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from itertools import chain

from seawall.notation import close, shorten
from seawall.policy import RESERVED, Network

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_HASH = re.compile(r"sha256:[0-9a-fA-F]{64}")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}")
_DERIVED = re.compile(r"rate-[0-9]+")


def check_name(name: str) -> None:
    if _NAME.fullmatch(name):
        return
    better = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:64]
    hint = f"; did you mean '{better}'?" if _NAME.fullmatch(better) and better != name else ""
    raise ValueError(f"{shorten(name)} is not a name: 1 to 64 of a-z, 0-9, '-' and '_', a letter or digit first{hint}")


def check_limit_name(name: str) -> None:
    check_name(name)
    if name in RESERVED or _DERIVED.fullmatch(name):
        raise ValueError(f"'{name}' is the name of a policy that plans have; give this limit another")


def check_tenant(name: str) -> None:
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise ValueError("a tenant's id is 1 to 128 printable characters")


def check_header(name: str) -> None:
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{shorten(name)} is not a header's name")


def check_state(name: str) -> None:
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise ValueError("a key of scope['state'] is 1 to 64 printable characters")


def check_per(value: str) -> None:
    if value in {"client_ip", "tenant", "global"}:
        return None
    if value.startswith("state:"):
        return check_state(value.removeprefix("state:"))
    near = close(value, ("client_ip", "tenant", "global"))
    hint = f"; did you mean '{near}'?" if near else ""
    raise ValueError(f"{shorten(value)} is not one of client_ip, tenant, global, state:NAME{hint}")


@lru_cache(maxsize=4096)
def network(value: str) -> Network:
    """The addresses that ``value`` stands for."""
    if value == "*":
        raise ValueError("'*' is not a network; write one such as 10.0.0.0/8")
    try:
        return ip_network(value)
    except ValueError:
        pass
    try:
        # Only bits right of the mask are wrong: the commonest mistake, and the one a suggestion can mend.
        meant = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{shorten(value)} is not an address or network such as 10.0.0.0/8 or fd00::/8") from None
    raise ValueError(f"{shorten(value)} has bits right of its mask; did you mean '{meant}'?")


class EverybodyError(ValueError):
    """A network that is every address, where only known ones may be."""

    code = "E041"


def check_trusted(value: str) -> None:
    if value == "*" or network(value).prefixlen == 0:
        raise EverybodyError(
            f"'{value}' would let every caller choose its own address; list the networks of your proxies, "
            "or use trusted_hops"
        )


def covers_everything(networks: Iterable[str]) -> bool:
    """Whether ``networks`` together are all of IPv4 or of IPv6: 0.0.0.0/1 and 128.0.0.0/1 are."""
    known = [network(value) for value in networks]
    four = collapse_addresses(net for net in known if isinstance(net, IPv4Network))
    six = collapse_addresses(net for net in known if isinstance(net, IPv6Network))
    return any(net.prefixlen == 0 for net in chain[Network](four, six))


def is_key_hash(value: str) -> bool:
    """Whether ``value`` is a hash as `seawall hash-key` prints it, and so no secret."""
    return _HASH.fullmatch(value) is not None


def key_digest(value: str) -> bytes:
    """The 32 bytes of a listed key. What is refused is never quoted: it is most likely the key itself."""
    if not is_key_hash(value):
        raise ValueError("a key is listed by its hash, 'sha256:' and 64 hexadecimal digits: run `seawall hash-key`")
    return bytes.fromhex(value[7:])


def expiry(value: str) -> int:
    """The first nanosecond since the epoch that is after ``value``: a day counts to its end, in UTC."""
    try:
        if _DAY.fullmatch(value):
            day = date.fromisoformat(value) + timedelta(days=1)
            moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
        else:
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{shorten(value)} is not a day such as 2027-06-30, or a time in ISO 8601") from None
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def percentage(value: object) -> float:
    """``2%`` as 0.02."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"'{value}' has no '%'; did you mean '{value}%'?")
    if not isinstance(value, str):
        raise ValueError("a percentage is text such as 2%")
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%\s*", value)
    if match is None or not 0 < float(match[1]) <= 100:
        raise ValueError(f"{shorten(value)} is not a percentage above 0% and up to 100%, such as 2%")
    return float(match[1]) / 100


def check_path(path: str) -> None:
    check_exact_path(path, template=True)


def check_exact_path(path: str, *, template: bool = False) -> None:
    if not path.startswith("/"):
        raise ValueError(f"{shorten(path)} does not begin with '/'; did you mean '/{path[:64]}'?")
    if len(path) > 1024 or path.count("/") > 64:
        raise ValueError("a path is at most 1024 characters and 64 segments")
    if not path.isprintable():
        raise ValueError("a path has no control characters")
    if "?" in path or "#" in path:
        raise ValueError(f"{shorten(path)}: only the path is matched; leave out what follows '?' or '#'")
    if "%" in path:
        raise ValueError(f"{shorten(path)}: paths are matched after decoding; write the character instead of '%..'")
    if "//" in path:
        raise ValueError(f"{shorten(path)} has an empty segment; '//' is matched as '/'")
    if not template:
        if "{" in path or "}" in path or "*" in path:
            raise ValueError(f"{shorten(path)} is one exact path: no '{{...}}', no '*'")
        return
    seen: set[str] = set()
    for segment in path[1:].split("/"):
        if _PARAMETER.fullmatch(segment):
            if segment in seen:
                raise ValueError(f"'{segment}' is there twice in {shorten(path)}")
            seen.add(segment)
        elif segment == "*":
            raise ValueError(f"'*' in {shorten(path)}: write '{{name}}' for one segment, '**' for any number")
        elif segment != "**" and ("*" in segment or "{" in segment or "}" in segment):
            raise ValueError(f"{shorten(segment)} in {shorten(path)}: '{{name}}' and '**' are whole segments")


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY", "PURGE")


def check_method(method: str) -> None:
    if method in METHODS:
        return
    if method.upper() in {"WEBSOCKET", "WS"}:
        raise ValueError(f"'{method}' is not a method; WebSocket connections are matched where GET is")
    near = method.upper() if method.upper() in METHODS else close(method.upper(), METHODS)
    if near is not None:
        raise ValueError(f"unknown method {shorten(method)}; did you mean '{near}'?")
    if not _TOKEN.fullmatch(method) or method != method.upper():
        raise ValueError(f"{shorten(method)} is not a method; they are upper case, such as POST")


def check_url(url: str) -> None:
    # The value is not quoted: it may hold a password.
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", url) or not url.isprintable() or len(url) > 2048:
        raise ValueError("a backend's url is scheme://..., such as redis://localhost:6379/0")


_PASSWORDS = (
    re.compile(r"://[^/@\s]*:([^@\s]+)@"),
    re.compile(r"://[^/\s]*?:([^/?\s]+)@"),  # one with an '@' in it that should have been %40
    re.compile(r"[?&]\w*(?:password|secret|token)=([^&\s]+)"),
)


def passwords(url: str) -> list[str]:
    """The passwords in a URL: before its host, and among its options."""
    return [found for pattern in _PASSWORDS for found in pattern.findall(url)]


def check_docs_url(url: str) -> None:
    if not re.fullmatch(r"https?://[^\s<>\"\\^`{|}]+", url) or not url.isascii() or len(url) > 300:
        raise ValueError("docs_url is an http:// or https:// address of at most 300 ASCII characters")


def check_key_prefix(prefix: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", prefix):
        raise ValueError("a key prefix is 1 to 64 of letters, digits, '_', '.', ':' and '-'")


def check_secret(secret: str) -> None:
    if len(secret.strip()) < 8 or len(secret) > 1024 or not secret.isprintable():
        raise ValueError("a secret is 8 to 1024 printable characters")


def check_token(token: str) -> None:
    if not re.fullmatch(r"[!-~]{16,512}", token):
        raise ValueError("a token is 16 to 512 characters of ASCII without spaces")


def check_file(path: str) -> None:
    if not path.isprintable() or not path.strip() or len(path) > 1024 or path.endswith(("/", "\\")):
        raise ValueError("a file's path is 1 to 1024 printable characters")


def check_include(pattern: str) -> None:
    if pattern.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", pattern):
        raise ValueError("an include is relative to the file that has it")
    if not pattern.isprintable() or len(pattern) > 1024:
        raise ValueError("an include is at most 1024 printable characters")
