"""The production limiter on the simulated loop: what the ASGI shell does, without HTTP."""

from __future__ import annotations

from benchmarks.overload.engine import Loop, Request
from seawall.decision import Outcome
from seawall.overload.limiter import ADMITTED, WAITS, Algorithm, Class, Limiter, Settings
from seawall.overload.queue import DONE, Claim

CLASSES = (Class("critical"), Class("normal"), Class("low"), Class("background"))
OUTCOMES = {"success": Outcome.SUCCESS, "ignored": Outcome.IGNORED, "dropped": Outcome.DROPPED}


class Seawall:
    """Seawall's overload control with its defaults."""

    def __init__(
        self,
        algorithm: Algorithm = "adaptive",
        *,
        classes: tuple[Class, ...] = CLASSES,
        groups: int = 8,
        initial: int = 20,
    ) -> None:
        self.name = "seawall" if algorithm == "adaptive" else f"seawall-{algorithm}"
        self._settings = Settings(algorithm, initial=initial, classes=classes, groups=groups)

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        self._loop = loop
        self.changes: list[tuple[int, str, int]] = []
        self.limiter = Limiter(self._settings, clock=loop.clock, timers=loop, changed=self._changed)

    def _changed(self, reason: str) -> None:
        self.changes.append((self._loop.now, reason, self.limiter.limit))

    def arrive(self, request: Request) -> bool | None:
        loop, limiter = self._loop, self.limiter
        request.ticket = claim = Claim()
        claim.state = DONE
        claim.klass = request.priority
        claim.owner = request.tenant
        claim.group = request.group
        claim.deadline = request.deadline_ns
        now = loop.now
        if claim.deadline and now >= claim.deadline:
            return False
        if limiter.screen(claim, now):
            return False
        reason = limiter.enter(claim, now)
        if reason is ADMITTED:
            return True
        if reason is not WAITS:
            return False
        claim.wake = lambda why: request.refuse(why) if why else request.start(self._woken)
        return None

    def _woken(self, request: Request) -> bool:
        """Whether a waiter that was let in begins after all, asked one iteration later, when its task wakes."""
        if request.gone:
            self.limiter.release(request.ticket, Outcome.IGNORED, self._loop.now)
            return False
        return not self.limiter.start(request.ticket, self._loop.now)

    def finish(self, request: Request, outcome: str) -> None:
        self.limiter.release(request.ticket, OUTCOMES[outcome], self._loop.now)

    def started_response(self, request: Request) -> None:
        self.limiter.release(request.ticket, Outcome.IGNORED, self._loop.now)

    def stats(self) -> dict[str, float]:
        limiter = self.limiter
        return {
            "limit": limiter.limit,
            "in_flight": limiter.in_flight,
            "waiting": len(limiter.line),
            "lag": limiter.lag / 1e6,
            "cut": -1 if limiter.thresholds.klass is None else limiter.thresholds.klass,
            "ration": limiter.thresholds.ration,
        }
