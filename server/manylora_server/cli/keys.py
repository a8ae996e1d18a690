"""Key files: one key a line; blank lines and lines that start with ``#`` do not count."""

from __future__ import annotations

from pathlib import Path

from manylora_server.core.errors import StartupError


def read_keys(path: Path | None, option: str) -> tuple[str, ...]:
    """Return the keys in ``path``; none without a file. No message ever shows a key.

    Raises ``StartupError`` for a file that cannot be read, holds no key, or holds one that could
    not be sent in a header: a typing error here must not open the server.
    """
    if path is None:
        return ()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartupError(
            f"{option}: {str(path)!r} cannot be read: {reason}; give a text file with one key a "
            "line.",
            param=option,
        ) from error
    keys: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise StartupError(
                f"{option}: {str(path)!r}, line {number}: a key is printable ASCII without spaces.",
                param=option,
            )
        keys.append(key)
    if not keys:
        raise StartupError(
            f"{option}: {str(path)!r} holds no key; write one key a line, or leave the option out "
            "to ask for none.",
            param=option,
        )
    return tuple(keys)
