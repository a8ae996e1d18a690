"""Members of a tar file, plain or compressed, streamed into a staging folder.

Python's tarfile keeps every header it has seen, reads extended headers whole whatever their size,
and takes a broken header in the middle for the end; so only its reading of single blocks is used.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.files import Sink
from manylora_store.intake.limits import Limits
from manylora_store.intake.members import Kind, Members
from manylora_store.intake.staging import Staging

BLOCK = 512
_MAX_EXTENDED_HEADER = 2**20
_MAX_DIGITS = 20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def unpack_tar(
    data: Iterator[bytes], archive_size: int, staging: Staging, members: Members, limits: Limits
) -> None:
    """Stream the wanted members of a tar file, given as pieces of ``data``, into ``staging``.

    ``archive_size`` is the size of the archive as it was received. All of ``data`` is read, up to
    as many bytes as ``staging`` takes.

    Raises:
        AdapterInvalidError: refused by ``members``, sparse, corrupt, truncated or a bomb.
        TooLargeError: larger than ``staging`` takes.
    """
    stream = _Stream(data)
    extended = _Extended()
    while (block := stream.block()) is not None:
        info = _parse(block)
        if info.type in _EXTENDED:
            _check_size(info, _MAX_EXTENDED_HEADER)
            extended.add(info.type, stream.read(info.size))
            continue
        extended.apply(info)
        target = members.take(info.name, _kind(info))
        _check_size(info, limits.expanded(archive_size))
        if target is None:
            stream.copy(info.size if info.type in _FILES else 0, None)
            continue
        staging.expect(info.size)
        with staging.receive(target) as sink:
            stream.copy(info.size, sink)
    stream.finish()


def looks_like_tar(block: bytes) -> bool:
    """Whether a file that begins with ``block`` (512 bytes) is a tar file."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Stream:
    """Reads pieces of any size in blocks of 512 bytes."""

    def __init__(self, data: Iterator[bytes]) -> None:
        self._data = data
        self._piece = memoryview(b"")

    def block(self) -> bytes | None:
        """Return the next block, or ``None`` if it is the end of the archive."""
        block = b"".join(self._take(BLOCK))
        return block if any(block) else None

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes and pass the rest of their last block."""
        content = b"".join(self._take(size))
        self._pass_padding(size)
        return content

    def copy(self, size: int, sink: Sink | None) -> None:
        """Write ``size`` bytes to ``sink`` (``None``: nowhere) and pass their last block's rest."""
        for piece in self._take(size):
            if sink is not None:
                sink.write(piece)
        self._pass_padding(size)

    def finish(self) -> None:
        """Read what is left, which must be zeros."""
        while True:
            if self._piece.tobytes().strip(b"\0"):
                raise AdapterInvalidError("archive: data follows the end of the tar file")
            piece = next(self._data, None)
            if piece is None:
                return
            self._piece = memoryview(piece)

    def _pass_padding(self, size: int) -> None:
        for _ in self._take(-size % BLOCK):
            pass

    def _take(self, size: int) -> Iterator[memoryview]:
        while size:
            if not self._piece:
                piece = next(self._data, None)
                if piece is None:
                    raise AdapterInvalidError("archive: the tar file is truncated")
                self._piece = memoryview(piece)
            taken, self._piece = self._piece[:size], self._piece[size:]
            size -= len(taken)
            yield taken


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise AdapterInvalidError(f"archive: a tar header is corrupt: {error}") from error


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.type in _FILES:
        return Kind.FOLDER if info.name.endswith("/") else Kind.FILE
    if info.type == tarfile.DIRTYPE:
        return Kind.FOLDER
    return Kind.LINK if info.type in _LINKS else Kind.OTHER


def _check_size(info: tarfile.TarInfo, most: int) -> None:
    if not 0 <= info.size <= most:
        raise AdapterInvalidError(
            f"archive: member {info.name!r} is said to have {info.size} bytes; at most {most} can"
            " be honest there"
        )


class _Extended:
    """What extended headers say of the member that follows them."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._size: int | None = None

    def add(self, kind: bytes, payload: bytes) -> None:
        """Read one extended header."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self._name = _text(payload.partition(b"\0")[0])
        if kind not in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            return
        fields = _pax_fields(payload)
        if any(key.startswith("GNU.sparse.") for key in fields):
            raise AdapterInvalidError("archive: sparse files are not accepted")
        if kind == tarfile.XGLTYPE and {"path", "size"} & set(fields):
            raise AdapterInvalidError("archive: a tar header gives all members one name or size")
        self._name = fields.get("path", self._name)
        if "size" in fields:
            self._size = _decimal(fields["size"])

    def apply(self, info: tarfile.TarInfo) -> None:
        """Change ``info`` by what was read, and forget it."""
        if self._name is not None:
            info.name = self._name
        if self._size is not None:
            info.size = self._size
        self._name = self._size = None


def _pax_fields(payload: bytes) -> dict[str, str]:
    """Return the records of a POSIX extended header, each ``"<length> <key>=<value>\\n"``."""
    fields = {}
    start = 0
    while start < len(payload):
        space = payload.find(b" ", start, start + _MAX_DIGITS + 1)
        stop = start + _decimal(_text(payload[start : max(space, start)]))
        key, equals, value = payload[space + 1 : stop].partition(b"=")
        if not equals or not value.endswith(b"\n") or stop > len(payload):
            raise AdapterInvalidError("archive: an extended tar header is corrupt")
        fields[_text(key)] = _text(value[:-1])
        start = stop
    return fields


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        raise AdapterInvalidError("archive: a number in an extended tar header is corrupt")
    return int(text)
