"""Which members of an archive are taken, and which make it refused, by name and kind alone."""

from __future__ import annotations

import enum

from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME
from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.limits import Limits
from manylora_store.intake.staging import WANTED

MAX_PATH = 4096


class Kind(enum.Enum):
    """What a member is; anything but a file or a folder is refused."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "device or other special file"


class Members:
    """Sees the members of one archive in turn. ``ignored`` are the files that are not taken."""

    def __init__(self, limits: Limits) -> None:
        self.ignored: list[str] = []
        self._limits = limits
        self._seen: set[tuple[str, ...]] = set()
        self._count = 0
        self._folder: tuple[str, ...] | None = None

    def take(self, name: str, kind: Kind) -> str | None:
        """Return the file name to store member ``name`` under, or ``None`` to leave it.

        Raises:
            AdapterInvalidError: the archive is not acceptable with this member.
        """
        self._count += 1
        if self._count > self._limits.members:
            raise AdapterInvalidError(
                f"archive: it has over {self._limits.members} members; an adapter has two files"
            )
        parts = _split(name)
        if kind in (Kind.LINK, Kind.OTHER):
            raise AdapterInvalidError(
                f"archive: member {name!r} is a {kind.value}; only plain files are accepted"
            )
        if kind is Kind.FOLDER:
            return None
        if parts in self._seen:
            raise AdapterInvalidError(f"archive: member {name!r} is given twice")
        self._seen.add(parts)
        if not parts or parts[-1] not in WANTED:
            self.ignored.append("/".join(parts))
            return None
        self._check_folder(parts[:-1])
        return parts[-1]

    def finish(self) -> None:
        """Raise ``AdapterInvalidError`` if no member was taken."""
        if self._folder is None:
            raise AdapterInvalidError(
                f"archive: it has neither {CONFIG_NAME} nor {SAFETENSORS_NAME} nor {BIN_NAME}"
            )

    def _check_folder(self, folder: tuple[str, ...]) -> None:
        if self._folder is None:
            if len(folder) > 1:
                raise AdapterInvalidError(
                    f"archive: the adapter is in folder {'/'.join(folder)!r}; it must be at the top"
                    " or in one folder"
                )
            self._folder = folder
        elif folder != self._folder:
            raise AdapterInvalidError(
                f"archive: it has several adapters, in folders {'/'.join(self._folder) or '.'!r}"
                f" and {'/'.join(folder) or '.'!r}; one is expected"
            )


def _split(name: str) -> tuple[str, ...]:
    if len(name) > MAX_PATH:
        raise AdapterInvalidError(
            f"archive: a member's path has {len(name)} characters; at most {MAX_PATH} are accepted"
        )
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise AdapterInvalidError(
            f"archive: member {name!r} is not accepted; a path within the archive is expected,"
            " with '/' and without '..'"
        )
    return parts
