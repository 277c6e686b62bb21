"""From a path to the rule that holds for it, by a table of our own: the application's router is never asked.

Walking `app.routes` looks simpler and is what other limiters do; since FastAPI 0.137 it holds included routers without
a path, which silently unprotects whole applications. So: rules are tried in the order of the file, the first that
matches wins, and what matches none has the default rule, never an exemption.

Spellings of one path must not buy a second bucket or escape a rule, so for limits case, repeated slashes and a slash at
the end do not distinguish. An *exempt* rule is the other way round: it frees exactly the path it names.

Templates become regular expressions here, and users write none, so matching is linear in the path: every ``**`` but the
last is atomic (the leftmost match of what follows it is always as good as any other).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, final

from seawall.policy import Route

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SLASHES = re.compile(r"/{2,}")
_PARAMETER = re.compile(r"\{[^{}/]+\}")

_Methods: TypeAlias = frozenset[str] | None
_Static: TypeAlias = dict[str, list[tuple[int, _Methods]]]
_Dynamic: TypeAlias = tuple[int, _Methods, Callable[[str], object], bool]
"""Position in the file, methods, match, and whether it wants the exact spelling."""


def path_below_root(scope: Mapping[str, Any], root: str = "") -> str:
    """The path as the application's own router sees it: below ``root_path``, by Starlette's rule.

    ``root`` is what an application will put in the place of the scope's, as FastAPI(root_path=...) does.
    """
    path: str = scope["path"]
    root = root or scope.get("root_path", "")
    if not root or not path.startswith(root):
        return path
    if len(path) == len(root):
        return ""
    return path[len(root) :] if path[len(root)] == "/" else path


def has_control_character(path: str) -> bool:
    """Whether ``path`` holds a C0, DEL or C1 control: `/login%0A` reaches the handler of `/login` in some routers."""
    return not path.isprintable() and _CONTROL.search(path) is not None


def normalize(path: str) -> str:
    """One spelling for all spellings of a path that a router may treat as one."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return path.lower().rstrip("/") or "/"


def compile_template(template: str, *, exact: bool = False) -> re.Pattern[str]:
    """A pattern for `fullmatch`: ``{name}`` is one segment that is not empty, ``**`` is zero or more segments.

    >>> bool(compile_template("/v1/events/**").fullmatch("/v1/events"))
    True
    """
    if not exact:
        template = normalize(template)
    segments = template.split("/")[1:]
    chunks: list[str] = [""]
    for segment in segments:
        if segment == "**":
            chunks.append("")
        elif _PARAMETER.fullmatch(segment):
            chunks[-1] += "/[^/]+"
        else:
            chunks[-1] += "/" + re.escape(segment)
    first, *rest = chunks
    pattern = first
    for index, chunk in enumerate(rest):
        if index < len(rest) - 1:
            # Up to the end of a segment: nothing behind it could send the search on from `/ab` to a later `/a`.
            pattern += f"(?>(?:/[^/]*+)*?{chunk}(?![^/]))"
        else:
            pattern += f"(?:/[^/]*+)*{chunk}" if chunk else "(?:/.*)?"
    return re.compile(pattern or "/", re.DOTALL)


def _is_open(head: str) -> bool:
    """Whether the first segment of a template stands for any."""
    return head == "**" or _PARAMETER.fullmatch(head) is not None


@final
class RouteTable:
    """The rules of a policy, compiled: a dict for the paths without parameters, and for the others a list by first
    segment, so that two hundred rules cost what the few that could match cost.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._static: _Static = {}
        self._exact: _Static = {}
        dynamic: list[tuple[str, _Dynamic]] = []
        self._count = 0
        for index, route in enumerate(routes):
            self._count += 1
            for template in route.paths:
                # Exempt templates are spelled exactly, but filed under the head that every spelling has.
                path = template if route.exempt else normalize(template)
                if "{" not in path and "**" not in path:
                    table = self._exact if route.exempt else self._static
                    table.setdefault(path, []).append((index, route.methods))
                else:
                    head = normalize(path).split("/", 2)[1]
                    matches = compile_template(template, exact=route.exempt).fullmatch
                    dynamic.append((head, (index, route.methods, matches, route.exempt)))
        anywhere = [entry for head, entry in dynamic if _is_open(head)]
        self._anywhere = tuple(anywhere)
        self._by_head = {
            head: tuple(sorted([*anywhere, *(e for h, e in dynamic if h == head)], key=lambda entry: entry[0]))
            for head in {head for head, _ in dynamic if not _is_open(head)}
        }
        self._dynamic = bool(dynamic)

    def match(self, path: str, method: str) -> int:
        """The position of the first rule for ``path`` (decoded, below the root) and ``method``; -1 for the default."""
        best = self._count
        if self._exact:
            for index, methods in self._exact.get(path, ()):
                if index < best and (methods is None or method in methods):
                    best = index
        entries = self._static.get(path)
        spelled = path
        if entries is None:
            # `normalize`, but for the calls that most paths do not need.
            spelled = path.lower()
            if "//" in spelled or spelled[-1:] in ("/", ""):
                spelled = normalize(spelled)
            if spelled != path:
                entries = self._static.get(spelled)
        if entries is not None:
            for index, methods in entries:
                if index < best and (methods is None or method in methods):
                    best = index
        if self._dynamic:
            if spelled[0] != "/":
                spelled = "/" + spelled  # `OPTIONS *`, or nonsense: nothing that a router serves, and no way around
            head = spelled.split("/", 2)[1]
            for index, methods, fullmatch, exact in self._by_head.get(head, self._anywhere):
                if index >= best:
                    break
                if (methods is None or method in methods) and fullmatch(path if exact else spelled):
                    return index
        return best if best < self._count else -1
