"""Overload control without HTTP: how much the service can do now, and whom that is for.

`laws` say how many requests at a time, `queue` who goes first, `thresholds` who is refused at the door, `retry` when to
come back; `limiter` is the turnstile that asks them. All of it is pure: time comes as an argument, the event loop as an
object with ``call_soon`` and ``call_later``, so that tests and the simulation run the objects that serve.
"""
