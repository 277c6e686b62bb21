"""What is allowed and probably not meant."""

from __future__ import annotations

from collections.abc import Sequence

from seawall.config.document import Document
from seawall.policy import Policy


def check(policy: Policy, main: Document, included: Sequence[Document]) -> None:
    """Note what ``policy`` is warned about in the documents it came from."""
