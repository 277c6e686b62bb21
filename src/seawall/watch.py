"""A configuration that changes while it is in force.

One `Watch` for each file, whoever reads it, so that all middlewares of a file change in one step and never disagree in
the middle of a request. It looks at the content of the file and of what it includes, in the thread of
`seawall.ticker`. What has changed is read, checked and compiled there, aside. Only then it is put in force, on the
event loop that serves, between two steps of it; requests that are being served end by what they began with.

What is wrong changes nothing: the policy in force stays, and the mistake is counted, logged once and shown on the
status page until the file is right again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import sleep, time
from typing import Any, ClassVar, Protocol, final
from weakref import WeakSet, WeakValueDictionary

from seawall import history, ticker
from seawall.config import ConfigError, Diagnostic, Report, check
from seawall.config.differences import differences
from seawall.config.loading import fingerprint
from seawall.notation import instant_text
from seawall.policy import Policy
from seawall.rate import SECOND

logger = logging.getLogger("seawall")

_SETTLES = 0.05
_SETTLINGS = 20
"""Seconds for which content has to stay as it is before it is read, and how often at most that is waited for: editors
and `cp` write a file in pieces."""
_MOST_SAID = 5
"""Mistakes or changes that are logged. All of them are on the status page, and in what `seawall check` says."""
_CHANGES = 10
"""Changes that are remembered for the status page."""
_MOST_SHOWN = 100
_SWAP = 5.0
"""Seconds to wait for the event loop to put a policy in force. It will in any case."""


@final
@dataclass(frozen=True, slots=True)
class ReloadState:
    """How reloads went. Times are seconds since the epoch; ``error`` is the text of what is wrong with the file as it
    is now, ``None`` if nothing is."""

    applied: int = 0
    failed: int = 0
    loaded_at: float = 0.0
    error: str | None = None
    error_at: float | None = None


class Subscriber(Protocol):
    """What works by the policy of a file."""

    def prepare(self, policy: Policy) -> Callable[[], None]:
        """Everything that ``policy`` needs, made aside, as a function that puts it in force and cannot fail.

        Raises `ConfigError` where it cannot be.
        """
        ...

    def reloaded(self, result: str) -> None:
        """Count that the file was read again: ``ok`` or ``failed``."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Where it serves, as far as is known."""
        ...


@final
class Watch:
    """The policy of one file, and whoever works by it."""

    _all: ClassVar[WeakValueDictionary[str, Watch]] = WeakValueDictionary()

    def __init__(self, path: str) -> None:
        self._given, self._absolute = path, os.path.abspath(path)
        report = check(path)
        self.policy = _policy_of(report)
        self._read = self._right = report
        self.state = ReloadState(loaded_at=time())
        self._subscribers: WeakSet[Subscriber] = WeakSet()
        self._busy = threading.RLock()
        self._chore: ticker.Chore | None = None
        self._changes: deque[dict[str, Any]] = deque(maxlen=_CHANGES)
        self._recorded = False
        self._swap = _Swap()

    def __repr__(self) -> str:
        return f"<Watch of {self._given}, {self.state.applied} reloads, {self.state.failed} failed>"

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Watch:
        """The watch of the file at ``path``, which is read now in any case. Raises `ConfigError` if it is wrong."""
        name = os.fsdecode(path)
        known = cls._all.get(os.path.abspath(name))
        if known is not None:
            known.reload()
            return known
        made = cls(name)
        cls._all[made._absolute] = made
        return made

    @property
    def path(self) -> str:
        """The file as it was named, which is what diagnostics speak of, for as long as that leads to it."""
        try:
            return self._given if os.path.abspath(self._given) == self._absolute else self._absolute
        except OSError:  # the working directory is gone
            return self._absolute

    @property
    def every(self) -> float | None:
        """Seconds between two looks; ``None`` for never."""
        period = self.policy.reload_ns
        return None if period is None else period / SECOND

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have ``subscriber`` follow the file from now on, for as long as it lives."""
        self._subscribers.add(subscriber)
        self._schedule()
        if self.policy.history is not None:
            self.look_soon()

    def _schedule(self) -> None:
        every = inf if self.every is None else self.every
        if self._chore is not None and every != self._chore.seconds:
            self._chore.cancel()
            self._chore = None
        if self._chore is None:
            self._chore = ticker.every(every, self.look)

    def look_soon(self) -> None:
        """Have `look` called in the thread for such things, whether or not it is due."""
        if self._chore is not None:
            self._chore.soon()

    def look(self) -> None:
        """Reload if the content has changed since the last look. Never raises for what is wrong with it."""
        with self._busy:
            if not self._recorded:
                self._record(None)
            self._swap.recover(self._loop)
            seen = self._fingerprint()
            if seen != self._read.seen:
                self._settle(seen)
                self._try()

    def reload(self) -> None:
        """Read the file again, now. Raises `ConfigError` if it is wrong; then what was in force still is."""
        with self._busy:
            outcome = self._try()
        if isinstance(outcome, ConfigError):
            raise outcome
        outcome.wait(_SWAP)

    @property
    def files(self) -> tuple[Path, ...]:
        """What was read last, the main file first."""
        return self._read.files

    def _fingerprint(self) -> str:
        return fingerprint(self.path, self._read.includes)

    def _settle(self, seen: str) -> None:
        for _ in range(_SETTLINGS):
            sleep(_SETTLES)
            before, seen = seen, self._fingerprint()
            if before == seen:
                break

    def _try(self) -> ConfigError | threading.Event:
        """What is wrong, or an event: that it is in force."""
        report = self._read = check(self.path)
        before = self.policy
        try:
            policy = _policy_of(report)
            changed = policy.digest != self.policy.digest
            if changed:
                self._apply(policy)
            else:
                self._swap.recover(self._loop)
            self._right = report
        except ConfigError as error:
            self._failed(error)
            return error
        if changed or self.state.error is not None:
            self._succeeded(before)
        return self._swap.done

    def _apply(self, policy: Policy) -> None:
        swap = _Swap(*[one.prepare(policy) for one in list(self._subscribers)])
        self.policy = policy
        self._swap.steps, self._swap = (), swap  # or the loop might come to the one before last
        swap.hand_to(self._loop)
        self._schedule()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that serves, as far as is known."""
        return next((one.loop for one in list(self._subscribers) if one.loop is not None), None)

    def _succeeded(self, before: Policy) -> None:
        changed = before is not self.policy
        digest = self.policy.digest[:12]
        if changed:
            said = self._record(before)
            extra = {"event": "reload", "digest": digest, "changes": len(said)}
            logger.info("%s has changed and is in force (%s): %s", self.path, digest, _some(said), extra=extra)
            for other in list(Watch._all.values()):
                # It may be the same file by another name, or include the same.
                if other is not self and other.every is not None:
                    other.look_soon()
        else:
            logger.info("%s is right again (%s)", self.path, digest, extra={"event": "reload", "digest": digest})
        self._tell("ok")
        # Last, for whoever waits for it wants to find the rest.
        self.state = ReloadState(self.state.applied + changed, self.state.failed, time())

    def changes(self) -> list[dict[str, Any]]:
        """The last changes of the policy, the oldest first: those of the history, or of this process without one."""
        return list(self._changes)

    def _record(self, before: Policy | None) -> list[str]:
        """Note that the policy is in force, after ``before``; the differences in words."""
        policy, now, self._recorded = self.policy, time(), True
        said = [] if before is None else [change.text for change in differences(before, policy)]
        if policy.history is None:
            if before is not None:
                one = {"time": instant_text(now), "digest": policy.digest, "diff": said[:_MOST_SHOWN]}
                self._changes.append(one)
            return said
        path = Path(self._absolute).parent / policy.history
        files = dict(zip(map(str, self._right.files), self._right.hashes, strict=True))
        try:
            history.append(path, policy, files, now, before)
            self._changes = deque((one.as_dict() for one in history.read(path, _CHANGES)), maxlen=_CHANGES)
        except OSError as error:
            logger.warning("the history %s cannot be written: %s", path, error, extra={"event": "history"})
        return said

    def _failed(self, error: ConfigError) -> None:
        heads = [found.head for found in error.diagnostics]
        logger.error(
            "%s is wrong, and what was in force stays: %s",
            self.path,
            _some(heads),
            extra={"event": "reload_failed", "digest": self.policy.digest[:12], "mistakes": len(heads)},
        )
        self._tell("failed")
        self.state = replace(self.state, failed=self.state.failed + 1, error=str(error), error_at=time())

    def _tell(self, result: str) -> None:
        for one in list(self._subscribers):
            one.reloaded(result)


def _some(texts: Sequence[str]) -> str:
    """The first of ``texts`` in one line."""
    more = f"; and {len(texts) - _MOST_SAID} more" if texts[_MOST_SAID:] else ""
    return "; ".join(texts[:_MOST_SAID]) + more if texts else "nothing that anybody would notice"


def _policy_of(report: Report) -> Policy:
    if report.policy is None:
        raise ConfigError(report.errors)
    return report.policy


@final
class _Swap:
    """The ``steps`` by which a policy comes into force, all in one step of an event loop and no more than once."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.steps = steps
        self.done = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        if not steps:
            self.done.set()

    def __repr__(self) -> str:
        return f"<Swap of {len(self.steps)}, {'done' if self.done.is_set() else 'with its loop'}>"

    def __call__(self) -> None:
        steps, self.steps, self._loop = self.steps, (), None
        try:
            for each in steps:
                each()
        finally:
            self.done.set()

    def hand_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Have it done by ``loop``, or here where there is none or this is it."""
        self._loop = loop
        if loop is None or loop is asyncio._get_running_loop() or not loop.is_running():
            return self()
        try:
            loop.call_soon_threadsafe(self)
        except RuntimeError:  # closed in this very moment
            self()
        return None

    def recover(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Hand it to ``loop`` if the one that has it ended before it came to it, or is kept from it by the caller."""
        held = self._loop
        if held is not None and (not held.is_running() or held is asyncio._get_running_loop()):
            self.hand_to(loop)


def reload_all() -> None:
    """Read every configuration file of this process again, now, and put in force what has changed.

    Raises `ConfigError` for those that are wrong; of each of them what was in force stays.
    """
    wrong: list[Diagnostic] = []
    for watch in list(Watch._all.values()):
        try:
            watch.reload()
        except ConfigError as error:
            wrong += error.diagnostics
    if wrong:
        raise ConfigError(wrong)


def on_hangup() -> None:
    """Have a SIGHUP make every file be looked at, unless it means something already. Of use in the main thread only."""
    hangup: Any = getattr(signal, "SIGHUP", None)
    if hangup is None or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(hangup) is signal.SIG_DFL:
        signal.signal(hangup, _look_everywhere)


def _look_everywhere(*_: object) -> None:
    for watch in list(Watch._all.values()):
        watch.look_soon()


_held: list[Watch] = []


def _hold() -> None:
    """Before a fork: have no reload be half done, for the child would have neither the thread that does it nor its
    lock."""
    for watch in list(Watch._all.values()):
        watch._busy.acquire()
        _held.append(watch)


def _let_go() -> None:
    while _held:
        _held.pop()._busy.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go)
