"""Names as the registry's columns hold them: 1 to 128 characters from space to tilde.

What may be registered is narrower (``intake.names``); this keeps from a database what it would
choke on.
"""

from __future__ import annotations

import re

from manylora_store.errors import UnknownAdapterError
from manylora_store.registry.schema import NAME_LENGTH

_ODD = re.compile(r"[^ -~]")


def can_be_a_name(name: str) -> bool:
    """Return whether the name column takes ``name``."""
    return 0 < len(name) <= NAME_LENGTH and _ODD.search(name) is None


def comparable(text: str) -> str:
    """Return text that every database takes and that divides the names as ``text`` does."""
    odd = _ODD.search(text)
    if odd is None:
        return text
    # DEL follows the tilde, so it is behind every name that goes on from here.
    return text[: odd.start()] + ("" if odd.group() < " " else "\x7f")


def unknown(name: str) -> UnknownAdapterError:
    """Return the error that says so."""
    return UnknownAdapterError(f"no adapter is named {name[:NAME_LENGTH]!r}")
