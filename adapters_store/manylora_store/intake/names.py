"""What an adapter may be called."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHOWN = 150


class AdapterNameError(ValueError):
    """Not a name for an adapter; ``message`` says what one looks like."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def check_name(name: str) -> str:
    """Return ``name``.

    Raises:
        AdapterNameError: it does not match ``NAME``.
    """
    if not NAME.fullmatch(name):
        shown = repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…")
        raise AdapterNameError(
            f"name: {shown} is not an adapter name; use 1 to 128 letters, digits, '.', '_' or '-',"
            " the first a letter or digit"
        )
    return name
