"""The folder of a result: written under another name beside its goal, then renamed, or gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora_server.core.errors import InvalidRequestError, StorageError
from manylora_store.errors import StoreFullError
from manylora_store.storage_failures import storage_error

PREFIX = ".tmp-manylora-export-"


@contextmanager
def new_folder(goal: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``goal`` if the block ends well, and is removed if it does not.

    Whoever dies within the block leaves the folder, which the next ``sweep`` beside it removes: a
    process that writes holds a lock on its folder.

    Raises:
        InvalidRequestError: ``goal`` is there, or its parent is not.
        StorageError: the file system refuses something, also within the block.
    """
    check_goal(goal)
    with _storage_errors_told(goal):
        sweep(goal.parent)
        folder, lock = _locked_folder(goal.parent)
        try:
            yield folder
            check_goal(goal)
            _to_disk(folder)
            folder.rename(goal)
            _sync(goal.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def check_goal(goal: Path) -> None:
    """Raise ``InvalidRequestError`` unless a new folder can be made at ``goal``."""
    if goal.exists() or goal.is_symlink():
        raise InvalidRequestError(
            f"output: {goal} exists already; name a folder that does not, or remove it first.",
            param="output",
        )
    if not goal.parent.is_dir():
        raise InvalidRequestError(
            f"output: {goal.parent} is no folder, so nothing can be written into it.",
            param="output",
        )


def check_room(folder: Path, needed: int) -> None:
    """Raise ``StorageError`` if the disk of ``folder`` has not ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"output: the export takes {needed} bytes, and the disk of {folder} has {free} left; "
            "make room there, or choose another output or a smaller dtype."
        )


def sweep(parent: Path) -> int:
    """Remove what exports that died have left in ``parent``; return how many there were."""
    removed = 0
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            removed += 1
        except (BlockingIOError, FileNotFoundError):
            # Somebody writes it, or removes it.
            continue
        finally:
            os.close(lock)
    return removed


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it; a sweep that came in between has removed it, so look again."""
    while True:
        folder = parent / f"{PREFIX}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, lock
        os.close(lock)


@contextmanager
def _storage_errors_told(goal: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = storage_error(error, goal)
        hint = "" if isinstance(told, StoreFullError) else "; nothing of it was kept"
        raise StorageError(f"output: {told.message}{hint}.") from error


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
