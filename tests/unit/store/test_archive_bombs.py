"""Archives that would fill disk or memory: refused after little of either, and little work."""

from __future__ import annotations

import io
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_store.errors import AdapterInvalidError, TooLargeError
from manylora_store.intake import inflate
from manylora_store.intake.archive import unpack
from manylora_store.intake.limits import Limits
from manylora_store.intake.staging import Staging
from unit.store.intake_support import CONFIG, WEIGHTS, tar_of, zip_of

GIB = 2**30
MIB = 2**20


def compressed_zeros(count: int, window: int = inflate.RAW_DEFLATE) -> bytes:
    """Return ``count`` zeros, compressed."""
    stream = zlib.compressobj(9, wbits=window)
    block = bytes(MIB)
    out = [stream.compress(block) for _ in range(count // MIB)]
    return b"".join([*out, stream.compress(bytes(count % MIB)), stream.flush()])


def zip_announcing(data: bytes, size: int, checksum: int = 0) -> bytes:
    """Return a zip file whose weight file is ``data``, deflated, said to have ``size`` bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(WEIGHTS, data)
        info = archive.infolist()[0]
        info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, size, checksum
    return out.getvalue()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of everything that is decompressed during a test."""
    sizes: list[int] = []
    step = inflate._step

    def counted(*args: object) -> bytes:
        piece = step(*args)  # type: ignore[arg-type]
        sizes.append(len(piece))
        return piece

    monkeypatch.setattr(inflate, "_step", counted)
    return sizes


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path, 4 * GIB) as staging:
        yield staging


def refuse(
    staging: Staging, content: bytes, error: type[Exception], *, disk: int, match: str
) -> None:
    """Unpacking must fail with ``error`` and leave at most ``disk`` bytes beside the archive."""
    with staging.receive("archive") as sink:
        sink.write(content)
    staging.restart_count()
    tracemalloc.start()
    with pytest.raises(error, match=match):
        unpack(staging.path / "archive", staging)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(f.stat().st_size for f in staging.path.iterdir()) <= disk + len(content)
    assert peak < 8 * MIB


def test_ten_gigabytes_in_ten_kilobytes(staging: Staging, work: list[int]) -> None:
    """As it says itself: 10 kB of deflate that would become 10 GB."""
    data = compressed_zeros(10 * MIB)
    assert len(data) < 11_000
    content = zip_announcing(data, 4 * GIB - 2)
    refuse(staging, content, AdapterInvalidError, disk=0, match=r"bomb.*10\d\d\d bytes")
    assert sum(work) == 0


def test_ten_gigabytes_announced_by_zip64(staging: Staging, work: list[int]) -> None:
    content = zip_announcing(compressed_zeros(10 * MIB), 10 * GIB)
    assert len(content) < 12_000
    refuse(staging, content, AdapterInvalidError, disk=0, match="bomb")
    assert sum(work) == 0


def test_ten_gigabytes_announced_by_a_tar_header(staging: Staging, work: list[int]) -> None:
    info = tarfile.TarInfo(WEIGHTS)
    info.size = 10 * GIB
    plain = info.tobuf(tarfile.GNU_FORMAT) + bytes(9 * MIB)
    stream = zlib.compressobj(9, wbits=inflate.GZIP)
    content = stream.compress(plain) + stream.flush()
    assert len(content) < 11_000
    refuse(staging, content, AdapterInvalidError, disk=0, match=WEIGHTS)
    assert sum(work) <= inflate.CHUNK


def test_a_zip_bomb_that_announces_little(staging: Staging, work: list[int]) -> None:
    """What comes out beyond the announced size is neither written nor even decompressed."""
    content = zip_announcing(compressed_zeros(200 * MIB), 1000)
    refuse(staging, content, AdapterInvalidError, disk=1000, match="corrupt")
    assert sum(work) <= inflate.CHUNK


@pytest.mark.parametrize("name", [WEIGHTS, "README.md"])
def test_a_gzip_bomb(name: str, staging: Staging, work: list[int]) -> None:
    """Wanted or not, its bytes are decompressed in pieces, and only so many of them."""
    info = tarfile.TarInfo(name)
    info.size = 200 * MIB
    head = zlib.compressobj(9, wbits=inflate.GZIP)
    first = head.compress(info.tobuf(tarfile.GNU_FORMAT)) + head.flush()
    # Noise behind the bomb, which is read last, makes the announced size look honest.
    noise = struct.pack("<Q", 7) * 2 + bytes(range(256)) * 60_000
    content = first + compressed_zeros(256 * MIB, inflate.GZIP) + noise
    most = Limits().slack_bytes + 3 * MIB + Limits().expansion * inflate.CHUNK
    refuse(staging, content, AdapterInvalidError, disk=most, match="bomb")
    assert sum(work) <= most


def test_an_archive_that_unpacks_to_more_than_the_limit(tmp_path: Path) -> None:
    with Staging(tmp_path, 50 * MIB) as staging:
        content = tar_of({CONFIG: b"{}", "README.md": bytes(60 * MIB)})
        refuse(staging, content, TooLargeError, disk=2, match=str(50 * MIB))


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_an_adapter_larger_than_the_limit(make: object, tmp_path: Path) -> None:
    with Staging(tmp_path, 50 * MIB) as staging:
        content = make({WEIGHTS: bytes(30 * MIB), CONFIG: bytes(21 * MIB)})  # type: ignore[operator]
        refuse(staging, content, TooLargeError, disk=30 * MIB, match=str(50 * MIB))


def test_overlapping_members_are_each_bounded(staging: Staging) -> None:
    """Two entries of the directory that share their bytes are still two members."""
    data = compressed_zeros(60 * MIB)
    checksum = zlib.crc32(bytes(60 * MIB))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(WEIGHTS, data)
        info = archive.infolist()[0]
        info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, 60 * MIB, checksum
        archive.filelist += [_twin(info, f"other-{index}") for index in range(900)]
    with staging.receive("archive") as sink:
        sink.write(out.getvalue())
    staging.restart_count()
    unpack(staging.path / "archive", staging)
    assert len(staging.ignored) == 900
    assert (staging.path / WEIGHTS).stat().st_size == 60 * MIB
    assert len(list(staging.path.iterdir())) == 2


def _twin(info: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    twin = zipfile.ZipInfo(name)
    twin.compress_type, twin.compress_size = info.compress_type, info.compress_size
    twin.file_size, twin.CRC, twin.header_offset = info.file_size, info.CRC, info.header_offset
    return twin
