"""Tenants that are in somebody's database and not in the file.

Whoever the file does not list is looked up by a function of the application's: by the id that identification found, or
by the hash of an API key that nobody listed. The answer is kept, for the request path must not wait for a database:
what has grown old is served while it is looked up again, and what is known stays known while the database is away. One
look-up at a time for each name, whatever the number of requests; and strangers, of whom there may be any number, push
out strangers only.
"""

from __future__ import annotations

import inspect
import logging
from asyncio import CancelledError, Task, create_task, current_task, get_running_loop, shield, timeout
from collections.abc import Awaitable, Callable, Mapping
from traceback import format_exception_only
from typing import Any, Final, TypeAlias, final

from seawall import advice
from seawall.config import ConfigError
from seawall.config.diagnostics import printable
from seawall.config.runtime import RuntimeTenant, check_tenant
from seawall.decision import Clock
from seawall.rate import SECOND

LookUp: TypeAlias = Callable[[str], "Mapping[str, Any] | None | Awaitable[Mapping[str, Any] | None]"]
"""From a tenant's id, or ``sha256:`` and the hash of an API key, to what the file would say of the tenant (with its
``id``, for a key), or ``None`` for nobody; now or awaited."""

FRESH = 60 * SECOND
"""Nanoseconds for which an answer is taken as it is."""
STRANGE = 10 * SECOND
"""The same for the answer that there is nobody."""
RETRY = 5 * SECOND
"""Nanoseconds after a failure before the next look-up of the same name."""
PATIENCE = 2.0
"""Seconds that a request waits for what is not known yet."""
LONGEST = 30.0
"""Seconds after which a look-up is given up, or those that hang would leave no room for others."""
MOST_KNOWN = 10_000
MOST_ASKED = 256
"""Look-ups at once; who would be one more is taken for what it is without."""

logger = logging.getLogger("seawall")


@final
class Known:
    """A tenant that was found, or with ``written`` ``None`` nobody. ``until`` is when to look it up again."""

    __slots__ = ("generation", "id", "until", "written")

    def __init__(self, id: str, written: RuntimeTenant | None, until: int, generation: int) -> None:  # noqa: A002
        self.id = id
        self.written = written
        self.until = until
        self.generation = generation

    def __repr__(self) -> str:
        return f"<Known {self.id}>" if self.written is not None else "<Known to be nobody>"


class Asked:
    """What is not known has to be asked for."""


ASK: Final = Asked()


@final
class Directory:
    """What is known of tenants by their names. ``clock`` is monotonic nanoseconds."""

    def __init__(self, look_up: LookUp, clock: Clock) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: dict[str, Known] = {}
        self._strangers: dict[str, Known] = {}
        self._asked: dict[str, Task[Known | None]] = {}
        self._generation = 0
        self._away = False

    def __repr__(self) -> str:
        return f"<Directory of {len(self._known)} tenants, {len(self._asked)} asked for>"

    def get(self, name: str) -> Known | None | Asked:
        """The tenant of a name, ``None`` for nobody, or `ASK`. Begins to look up again what has grown old."""
        known = self._known.get(name) or self._strangers.get(name)
        if known is None or known.generation != self._generation:
            return ASK
        if known.until <= self._clock():
            if known.written is None:
                return ASK
            self._begin(name)
        return known if known.written is not None else None

    async def ask(self, name: str) -> Known | None:
        """Look a name up. What was known of it before is the answer while it cannot be."""
        asked = self._begin(name)
        if asked is not None:
            try:
                async with timeout(PATIENCE):
                    return await shield(asked)
            except TimeoutError:
                # Whoever comes next is not held up as well.
                return self._keep(name, f"no answer within {PATIENCE:g} s")
            except CancelledError:
                request = current_task()
                if not asked.cancelled() or request is None or request.cancelling():
                    raise
                return self._keep(name, "it was cancelled")
        return self._known.get(name)

    async def of(self, tenant: str) -> Known | None:
        """The tenant of an id, looked up now: by that, or by an API key that it has come with.

        For operators and not for requests: it goes through all that is known.
        """
        known = await self.ask(tenant)
        if known is not None:
            return known
        for key in [name for name, one in reversed(self._known.items()) if one.id == tenant]:
            known = await self.ask(key)
            if known is not None and known.id == tenant:
                return known
        return None

    def forget(self) -> None:
        """Look up everybody anew. What was known holds while that fails."""
        self._generation += 1

    def _begin(self, name: str) -> Task[Known | None] | None:
        asked = self._asked.get(name)
        if asked is None or asked.get_loop() is not get_running_loop():
            if len(self._asked) >= MOST_ASKED:
                return None
            asked = self._asked[name] = create_task(self._find(name))
        return asked

    async def _find(self, name: str) -> Known | None:
        """Never raises but for being cancelled, for there may be nobody to raise to."""
        try:
            answer: Any = self._look_up(name)
            if inspect.isawaitable(answer):
                async with timeout(LONGEST):
                    answer = await answer
            written = None if answer is None else check_tenant(answer, by_key=name.startswith("sha256:"))
        except ConfigError as error:
            why = "; ".join(found.message for found in error.diagnostics)
            advice.once(
                f"tenants: {why}", f"what tenants= says of somebody is wrong, and does not count: {printable(why)}"
            )
            return self._remember(name)
        except Exception as error:
            return self._keep(name, "".join(format_exception_only(error)).strip(), f" ({advice.place(error)})")
        finally:
            self._asked.pop(name, None)
        if self._away:
            self._away = False
            logger.warning("tenants= works again", extra={"event": "tenants_back"})
        now = self._clock()
        self._known.pop(name, None)
        self._strangers.pop(name, None)
        if written is None:
            _put(self._strangers, name, Known(name, None, now + STRANGE, self._generation))
            return None
        known = Known(written.id or name, written, now + FRESH, self._generation)
        _put(self._known, name, known)
        return known

    def _keep(self, name: str, why: str, place: str = "") -> Known | None:
        """Go on with what was known, and do not ask again at once. Said once, until there is an answer."""
        self._failed(why, place)
        return self._remember(name)

    def _remember(self, name: str) -> Known | None:
        """Take what was known for the answer, for a while."""
        known = self._known.get(name)
        until = self._clock() + RETRY
        if known is None:
            _put(self._strangers, name, Known(name, None, until, self._generation))
        else:
            known.until, known.generation = until, self._generation
        return known

    def _failed(self, why: str, place: str) -> None:
        if not self._away:
            self._away = True
            # No traceback: the standard formatter writes an error's text as it is, with whatever lines it has.
            logger.warning(
                "tenants= has failed, and who was known stays known: %s%s",
                printable(why)[:500],
                place,
                extra={"event": "tenants_away"},
            )


def _put(known: dict[str, Known], name: str, found: Known) -> None:
    known[name] = found
    if len(known) > MOST_KNOWN:
        # The one that has not been looked up for longest.
        del known[next(iter(known))]
