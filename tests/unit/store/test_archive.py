"""Archives: every format gives the same files, and everything out of the ordinary is refused."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.archive import unpack
from manylora_store.intake.limits import Limits
from manylora_store.intake.staging import Staging
from unit.store.intake_support import CONFIG, WEIGHTS, adapter_files, tar_of, zip_of

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return adapter_files(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path, 2**20) as staging:
        yield staging


def receive(staging: Staging, content: bytes, limits: Limits | None = None) -> None:
    """Unpack ``content``; beside the two files, only the archive itself may lie in the folder."""
    with staging.receive("archive") as sink:
        sink.write(content)
    staging.restart_count()
    try:
        unpack(staging.path / "archive", staging, limits)
    finally:
        names = {path.name for path in staging.path.iterdir()}
        assert names <= {"archive", CONFIG, WEIGHTS, "adapter_model.bin"}
        assert len(list(staging.path.parent.iterdir())) == 2


def refuse(staging: Staging, content: bytes, *names: str, limits: Limits | None = None) -> None:
    with pytest.raises(AdapterInvalidError) as caught:
        receive(staging, content, limits)
    for name in ("archive", *names):
        assert name in caught.value.message


FORMATS = {
    "zip": zip_of,
    "zip-stored": lambda members: zip_of(members, zipfile.ZIP_STORED),
    "tar.gz-pax": tar_of,
    "tar.gz-gnu": lambda members: tar_of(members, "w:gz", tarfile.GNU_FORMAT),
    "tar-pax": lambda members: tar_of(members, "w"),
    "tar-ustar": lambda members: tar_of(members, "w", tarfile.USTAR_FORMAT),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "./", "run/", "./run/"])
def test_every_format_gives_the_same_files(
    form: str, folder: str, files: Files, staging: Staging
) -> None:
    members = {f"{folder}{name}": data for name, data in files.items()}
    receive(staging, FORMATS[form](members | {f"{folder}README.md": b"read me"}))
    assert {name: (staging.path / name).read_bytes() for name in files} == files
    assert staging.ignored == (f"{folder.removeprefix('./')}README.md",)


@pytest.mark.parametrize("form", ["zip", "tar.gz-pax", "tar.gz-gnu"])
def test_long_and_foreign_names_of_other_files(form: str, files: Files, staging: Staging) -> None:
    long = "run/" + "deep/" * 40 + "größe" * 20
    receive(staging, FORMATS[form]({long: b"x" * 700} | files))
    assert (staging.path / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert staging.ignored == (long,)


def test_several_gzip_streams_in_a_row_and_padding(files: Files, staging: Staging) -> None:
    plain = tar_of(files, "w")
    middle = len(plain) // 2
    receive(staging, gzip.compress(plain[:middle]) + gzip.compress(plain[middle:]) + bytes(1000))
    assert (staging.path / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_zip_file_behind_a_global_comment_and_zip64(files: Files, staging: Staging) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.comment = b"c" * 60_000
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    receive(staging, out.getvalue())
    assert (staging.path / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_an_uncompressed_git_archive_with_a_global_header(files: Files, staging: Staging) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"comment": "0" * 40}) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"repo-1.0/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    receive(staging, out.getvalue())
    assert (staging.path / CONFIG).read_bytes() == files[CONFIG]


@pytest.mark.parametrize("content", [b"", b"PK", b"BZh91AY&SY", b"\xfd7zXZ\0", bytes(2048)])
def test_something_that_is_no_archive(content: bytes, staging: Staging) -> None:
    refuse(staging, content, "none of .zip, .tar.gz and .tar")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["README.md", f"{CONFIG}.bak", f"{CONFIG}/x", f"x{WEIGHTS}"])
def test_an_archive_without_an_adapter(form: str, name: str, staging: Staging) -> None:
    refuse(staging, FORMATS[form]({name: b"x"}), CONFIG, WEIGHTS, "neither")


@pytest.mark.parametrize("form", ["zip", "tar.gz-pax", "tar-ustar"])
@pytest.mark.parametrize(
    "name",
    [
        f"../{CONFIG}",
        f"run/../../{CONFIG}",
        f"/etc/{CONFIG}",
        "../../outside",
        "run/..",
        f"run\\{CONFIG}",
        "..\\outside",
    ],
)
def test_paths_that_lead_out(form: str, name: str, files: Files, staging: Staging) -> None:
    refuse(staging, FORMATS[form](files | {name: b"x"}), repr(name), "'..'")


def test_a_zip_name_cut_by_a_nul(files: Files, staging: Staging) -> None:
    content = zip_of(files | {"README.mdXnot": b"x"}).replace(b"README.mdXnot", b"README.md\0not")
    refuse(staging, content, "README.md\\x00not")


def test_a_path_of_absurd_length(files: Files, staging: Staging) -> None:
    refuse(staging, tar_of(files | {"x" * 20_000: b"x"}), "20000 characters")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("other", ["b", "run/checkpoint-500", ""])
def test_several_adapters(form: str, other: str, files: Files, staging: Staging) -> None:
    members = {f"run/{name}": data for name, data in files.items()}
    second = f"{other}/{CONFIG}" if other else CONFIG
    refuse(staging, FORMATS[form](members | {second: b"{}"}), "'run'", f"'{other or '.'}'")


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapter_too_deep(form: str, files: Files, staging: Staging) -> None:
    members = {f"a/b/{name}": data for name, data in files.items()}
    refuse(staging, FORMATS[form](members), "'a/b'", "one folder")


def test_a_tar_member_given_twice(files: Files, staging: Staging) -> None:
    members = [(tarfile.TarInfo(name), data) for name, data in files.items()]
    again = (tarfile.TarInfo(f"./{CONFIG}"), b"{}")
    refuse(staging, tar_of([*members, again]), CONFIG, "given twice")


def test_a_zip_member_given_twice(files: Files, staging: Staging) -> None:
    content = zip_of(files | {"adapter_confiX.json": b"{}"})
    refuse(staging, content.replace(b"confiX", b"config"), CONFIG, "given twice")


@pytest.mark.parametrize("target", ["/etc/passwd", WEIGHTS, "../../secret"])
@pytest.mark.parametrize("name", [CONFIG, "README.md"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_file(
    kind: bytes, name: str, target: str, files: Files, staging: Staging
) -> None:
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, target
    refuse(staging, tar_of([(link, b""), (tarfile.TarInfo(WEIGHTS), files[WEIGHTS])]), "link")


@pytest.mark.parametrize(
    "kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"V"]
)
def test_devices_and_the_like_in_a_tar_file(kind: bytes, files: Files, staging: Staging) -> None:
    device = tarfile.TarInfo(CONFIG)
    device.type = kind
    refuse(staging, tar_of([(device, b"")], "w"), CONFIG, "special file")


@pytest.mark.parametrize(
    ("mode", "word"),
    [(stat.S_IFLNK, "link"), (stat.S_IFCHR, "special"), (stat.S_IFIFO, "special")],
)
@pytest.mark.parametrize("name", [CONFIG, "README.md"])
def test_links_and_devices_in_a_zip_file(
    mode: int, word: str, name: str, files: Files, staging: Staging
) -> None:
    out = io.BytesIO(zip_of({WEIGHTS: files[WEIGHTS]}))
    with zipfile.ZipFile(out, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o644) << 16
        archive.writestr(info, "/etc/passwd")
    refuse(staging, out.getvalue(), name, word)


@pytest.mark.parametrize("flag", [0x1, 0x20, 0x40])
def test_an_encrypted_zip_file(flag: int, files: Files, staging: Staging) -> None:
    content = bytearray(zip_of(files))
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= flag
    refuse(staging, bytes(content), CONFIG, "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_of_another_compression(method: int, files: Files, staging: Staging) -> None:
    refuse(staging, zip_of(files, method), "only stored and deflated")


@pytest.mark.parametrize("form", FORMATS)
def test_as_many_members_as_are_accepted(form: str, files: Files, staging: Staging) -> None:
    members = {f"file-{index}": b"" for index in range(9)} | files
    receive(staging, FORMATS[form](members), Limits(members=11))
    assert len(staging.ignored) == 9


@pytest.mark.parametrize("form", FORMATS)
def test_one_member_too_many(form: str, files: Files, staging: Staging) -> None:
    members = {f"file-{index}": b"" for index in range(9)} | files
    refuse(staging, FORMATS[form](members), "10 members", limits=Limits(members=10))


def test_a_zip_directory_that_alone_is_too_large(files: Files, staging: Staging) -> None:
    members = {f"{index}" + "x" * 60_000: b"" for index in range(5)} | files
    refuse(staging, zip_of(members), "directory", limits=Limits(members=10))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_archive(form: str, share: float, files: Files, staging: Staging) -> None:
    content = FORMATS[form](files).rstrip(b"\0")
    refuse(staging, content[: int(len(content) * share)])


def test_a_tar_file_without_its_end(files: Files, staging: Staging) -> None:
    content = tar_of(files, "w", tarfile.USTAR_FORMAT)
    whole = sum(512 + -(-len(data) // 512) * 512 for data in files.values())
    refuse(staging, content[:whole], "truncated")


def test_data_behind_the_end(files: Files, staging: Staging) -> None:
    refuse(staging, tar_of(files, "w") + tar_of({"x": b""}, "w"), "follows the end")


@pytest.mark.parametrize("form", ["zip", "zip-stored", "tar.gz-pax"])
def test_corrupt_content(form: str, files: Files, staging: Staging) -> None:
    content = bytearray(FORMATS[form](files))
    content[len(content) // 2] ^= 0x55
    refuse(staging, bytes(content), "corrupt")


def patched(content: bytes, field: int, value: int, member: int = 1) -> bytes:
    """Return the zip file with a four-byte field of one directory entry changed."""
    changed = bytearray(content)
    at = -1
    for _ in range(member + 1):
        at = changed.index(b"PK\x01\x02", at + 1)
    changed[at + field : at + field + 4] = value.to_bytes(4, "little")
    return bytes(changed)


CHECKSUM, COMPRESSED, SIZE, OFFSET = 16, 20, 24, 42


@pytest.mark.parametrize("change", [-1, 1, 1000])
@pytest.mark.parametrize("field", [COMPRESSED, SIZE])
@pytest.mark.parametrize("form", ["zip", "zip-stored"])
def test_a_zip_file_that_lies_of_sizes(
    form: str, field: int, change: int, files: Files, staging: Staging
) -> None:
    content = FORMATS[form](files)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = archive.infolist()[1]
    true = info.compress_size if field == COMPRESSED else info.file_size
    refuse(staging, patched(content, field, true + change), WEIGHTS)


def test_a_zip_file_that_lies_of_size_and_checksum(files: Files, staging: Staging) -> None:
    """The announced size and checksum are those of a beginning of the content."""
    beginning = files[WEIGHTS][:-100]
    content = patched(zip_of(files), SIZE, len(beginning))
    content = patched(content, CHECKSUM, zlib.crc32(beginning))
    refuse(staging, content, WEIGHTS, str(len(beginning)))


@pytest.mark.parametrize("offset", [1, 2**31, 2**32 - 2])
def test_a_zip_file_that_lies_of_places(offset: int, files: Files, staging: Staging) -> None:
    refuse(staging, patched(zip_of(files), OFFSET, offset), WEIGHTS)


@pytest.mark.parametrize("offset", [2**32, 2**63, 2**64 - 1])
def test_a_zip_file_that_lies_of_places_in_64_bits(
    offset: int, files: Files, staging: Staging
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.filelist[1].header_offset = offset
    refuse(staging, out.getvalue(), WEIGHTS, str(offset))


def test_a_zip_member_said_to_be_larger_than_the_archive(files: Files, staging: Staging) -> None:
    refuse(staging, patched(zip_of(files), COMPRESSED, 10**9), WEIGHTS, "1000000000")


def test_sparse_files_by_extended_header(files: Files, staging: Staging) -> None:
    info = tarfile.TarInfo(WEIGHTS)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    refuse(staging, tar_of([(info, files[WEIGHTS])]), "sparse")


@pytest.mark.parametrize("field", ["path", "size"])
def test_a_tar_file_that_renames_all_members_at_once(
    field: str, files: Files, staging: Staging
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={field: "7"}) as archive:
        archive.addfile(tarfile.TarInfo(CONFIG))
    refuse(staging, out.getvalue(), "one name or size")


@pytest.mark.parametrize(
    "payload", [b"x", b"5 a=\n6 ", b"99 path=x\n", b"-9 path=x\n", b"11 path:xy\n", b"10 path=xy"]
)
def test_a_corrupt_extended_header(payload: bytes, staging: Staging) -> None:
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    refuse(staging, tar_of([(info, payload)], "w"), "extended tar header")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_that_would_fill_memory(kind: bytes, staging: Staging) -> None:
    info = tarfile.TarInfo("pax")
    info.type = kind
    refuse(staging, tar_of([(info, b"x" * (2**20 + 1))]), "pax", str(2**20 + 1))


def test_a_tar_member_of_negative_size(staging: Staging) -> None:
    info = tarfile.TarInfo(CONFIG)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 11 + b"\x00"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    refuse(staging, bytes(block) + bytes(1024), CONFIG, "-256")
