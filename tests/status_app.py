"""An application that is nothing but a status page, to be served."""

from __future__ import annotations

from seawall.status import StatusPage
from status_sample import sample

app = StatusPage(sample)
