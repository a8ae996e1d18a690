"""Members of a zip file, streamed into a staging folder."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from manylora_store.checkpoint.zip_directory import open_zip
from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.inflate import CHUNK, RAW_DEFLATE, check_expansion, inflate
from manylora_store.intake.limits import Limits
from manylora_store.intake.members import Kind, Members
from manylora_store.intake.staging import Staging

_DIRECTORY_BYTES = 128 * 2**10
_DIRECTORY_BYTES_PER_MEMBER = 1024
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
# Encrypted, patched, strongly encrypted, with a masked directory.
_UNREADABLE_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000


def unpack_zip(path: Path, staging: Staging, members: Members, limits: Limits) -> None:
    """Stream the wanted members of the zip file ``path`` into ``staging``.

    Sizes in the directory are checked before anything is written, and again by what is there.

    Raises:
        AdapterInvalidError: refused by ``members``, encrypted, corrupt, lying or a bomb.
        TooLargeError: the wanted members are larger than ``staging`` takes.
    """
    size = path.stat().st_size
    directory = _DIRECTORY_BYTES + _DIRECTORY_BYTES_PER_MEMBER * limits.members
    with open_zip(path, directory) as archive:
        listed = archive.infolist()
    wanted = []
    for member in listed:
        target = members.take(member.orig_filename, _kind(member))
        if member.flag_bits & _UNREADABLE_FLAGS:
            raise AdapterInvalidError(
                f"archive: member {member.orig_filename!r} is encrypted or patched"
            )
        if target is not None:
            wanted.append((target, member))
    for _, member in wanted:
        _check_sizes(member, size, limits)
    staging.expect(sum(member.file_size for _, member in wanted))
    for target, member in wanted:
        with staging.receive(target) as sink:
            for piece in _content(path, member, limits):
                sink.write(piece)


def _kind(member: zipfile.ZipInfo) -> Kind:
    mode = stat.S_IFMT(member.external_attr >> 16)
    if mode == stat.S_IFLNK:
        return Kind.LINK
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return Kind.OTHER
    is_folder = mode == stat.S_IFDIR or member.orig_filename.endswith("/")
    return Kind.FOLDER if is_folder else Kind.FILE


def _check_sizes(member: zipfile.ZipInfo, archive_size: int, limits: Limits) -> None:
    name = member.orig_filename
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise AdapterInvalidError(
            f"archive: member {name!r} is compressed by method {member.compress_type}; only stored"
            " and deflated members are accepted"
        )
    if not 0 <= member.header_offset <= archive_size - member.compress_size:
        raise AdapterInvalidError(
            f"archive: member {name!r} is said to take {member.compress_size} bytes from byte"
            f" {member.header_offset} on, of an archive that has {archive_size}"
        )
    check_expansion(member.compress_size, member.file_size, limits, f"archive: member {name!r}")


def _content(path: Path, member: zipfile.ZipInfo, limits: Limits) -> Iterator[bytes]:
    """Yield the member's bytes; at the end its size and checksum must be as announced."""
    what = f"archive: member {member.orig_filename!r}"
    size = checksum = 0
    for piece in _pieces(path, member, limits, what):
        size += len(piece)
        checksum = zlib.crc32(piece, checksum)
        if size > member.file_size:
            break
        yield piece
    if size != member.file_size or checksum != member.CRC:
        raise AdapterInvalidError(
            f"{what} is corrupt: it is not the {member.file_size} bytes of checksum"
            f" {member.CRC:08x} that were announced"
        )


def _pieces(path: Path, member: zipfile.ZipInfo, limits: Limits, what: str) -> Iterator[bytes]:
    left = member.compress_size
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or not header.startswith(_LOCAL_MAGIC):
            raise AdapterInvalidError(f"{what} is corrupt: it is not where the directory says")
        _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        file.seek(name_size + extra_size, 1)

        def read(count: int) -> bytes:
            nonlocal left
            data = file.read(min(count, left))
            left -= len(data)
            return data

        if member.compress_type == zipfile.ZIP_DEFLATED:
            yield from inflate(read, RAW_DEFLATE, limits, what)
        else:
            yield from iter(lambda: read(CHUNK), b"")
