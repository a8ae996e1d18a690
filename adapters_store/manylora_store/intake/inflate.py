"""Decompression in bounded pieces that gives up on a bomb early."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.limits import Limits

CHUNK = 256 * 2**10
RAW_DEFLATE = -15
GZIP = 31

Read = Callable[[int], bytes]
"""Reads up to so many bytes; returns none at the end."""


def inflate(read: Read, window: int, limits: Limits, what: str) -> Iterator[bytes]:
    """Yield what ``read`` gives, decompressed: raw deflate or gzip, by zlib's ``window`` bits.

    Everything that ``read`` gives must belong to the compressed stream; gzip may have several
    streams in a row, and zeros after the last.

    Raises:
        AdapterInvalidError: corrupt, truncated, followed by something else, or expanding beyond
            ``limits``.
    """
    consumed = produced = 0
    stream = zlib.decompressobj(window)
    ended = False
    while not ended:
        data = read(CHUNK)
        ended = not data
        consumed += len(data)
        # At the end of the input, zlib may still hold back output.
        while data or (ended and not stream.eof):
            if stream.eof:
                if window != GZIP:
                    raise AdapterInvalidError(f"{what} is corrupt: data follows its end")
                data = data.lstrip(b"\0")
                if not data:
                    break
                stream = zlib.decompressobj(window)
            piece = _step(stream, data, what)
            data = stream.unused_data if stream.eof else stream.unconsumed_tail
            produced += len(piece)
            check_expansion(consumed, produced, limits, what)
            if piece:
                yield piece
            elif ended and not stream.eof:
                raise AdapterInvalidError(f"{what} is truncated: its compressed data has no end")


def check_expansion(compressed: int, expanded: int, limits: Limits, what: str) -> None:
    """Raise ``AdapterInvalidError`` if ``compressed`` bytes may not become ``expanded`` bytes."""
    if expanded > limits.expanded(compressed):
        raise AdapterInvalidError(
            f"{what} is a decompression bomb: {compressed} bytes become {expanded} or more; at"
            f" most {limits.expansion} times as many and {limits.slack_bytes} are accepted"
        )


def _step(stream: zlib._Decompress, data: bytes, what: str) -> bytes:
    try:
        return stream.decompress(data, CHUNK)
    except zlib.error as error:
        raise AdapterInvalidError(f"{what} is corrupt: {error}") from error
