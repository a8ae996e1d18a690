"""Private folders for files on their way in: bounded, and gone with the process that fills them.

A folder ``<root>/<id>`` belongs to whoever holds the lock on the file ``<root>/<id>.lock``. The
lock is taken before the folder is made and given up after it is removed; the system gives it up
when a process dies. A sweeper therefore removes what it can take the lock of. Lock files are
removed too, so one that was just locked may be no file any more; then its holder holds nothing
(``_take_lock``).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
import uuid
from pathlib import Path
from types import TracebackType

from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME
from manylora_store.errors import AdapterInvalidError, TooLargeError
from manylora_store.intake.files import Sink
from manylora_store.storage_failures import storage_errors

ARCHIVE_NAME = "archive"
WANTED = (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)
MAX_FILES = 1000
_MAX_NAME_BYTES = 255
_ID = re.compile(r"[0-9a-f]{32}")
_LOCK_SUFFIX = ".lock"

logger = logging.getLogger(__name__)


class Staging:
    """One private folder; a context manager. Its methods may be called from any thread.

    Only the files of an adapter and an archive are kept. Others are read to their end, count
    against the limit, and are named in ``ignored``.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        """``root`` is made if need be; ``max_bytes`` bounds all that is received together."""
        self.max_bytes = max_bytes
        self._root = root
        self._path: Path | None = None
        self._lock_file = -1
        self._mutex = threading.Lock()
        self._count = 0
        self._sinks: dict[str, Sink] = {}
        self._ignored: list[str] = []

    @property
    def path(self) -> Path:
        """The folder, within the ``with`` block."""
        if self._path is None:
            raise RuntimeError("a staging has a folder only within its with block")
        return self._path

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of files that came and are not part of an adapter, in the order they came."""
        with self._mutex:
            return tuple(self._ignored)

    def __enter__(self) -> Staging:
        with storage_errors("the staging folder"):
            self._root.mkdir(parents=True, exist_ok=True)
            while self._path is None:
                identity = uuid.uuid4().hex
                lock_file = _take_lock(self._root, identity)
                if lock_file is not None:
                    self._lock_file = lock_file
                    self._path = self._root / identity
            try:
                self._path.mkdir(mode=0o700)
            except OSError:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._mutex:
            sinks = list(self._sinks.values())
        try:
            for sink in sinks:
                sink.close()
        finally:
            self._release()

    def receive(self, filename: str) -> Sink:
        """Begin the file ``filename``; its bytes are written to what is returned.

        Raises:
            AdapterInvalidError: not a plain file name, the second file of this name, or too many.
            StoreFullError: no room for another file.
            StoreUnavailableError: the file cannot be made for another reason.
        """
        _check_filename(filename)
        with self._mutex:
            if filename in self._sinks:
                raise AdapterInvalidError(f"file {filename!r} is given twice")
            if len(self._sinks) >= MAX_FILES:
                raise AdapterInvalidError(
                    f"over {MAX_FILES} files are given; an adapter has two, {CONFIG_NAME} and"
                    f" {SAFETENSORS_NAME}"
                )
            target = None
            if filename in WANTED or filename == ARCHIVE_NAME:
                target = self.path / filename
            else:
                self._ignored.append(filename)
            self._sinks[filename] = sink = Sink(filename, target, self._charge)
            return sink

    def received(self, filename: str) -> Path | None:
        """Return where the file ``filename`` is, if it was received and kept."""
        path = self.path / filename
        return path if path.is_file() else None

    def ignore(self, name: str) -> None:
        """Note that ``name`` came with the adapter and is not part of it."""
        with self._mutex:
            self._ignored.append(name)

    def expect(self, size: int) -> None:
        """Raise ``TooLargeError`` now if ``size`` more bytes would be too many."""
        with self._mutex:
            self._check(self._count + size)

    def restart_count(self) -> None:
        """Let the limit hold anew, for what is made of the files received (unpacked, converted)."""
        with self._mutex:
            self._count = 0

    def discard(self, filename: str) -> None:
        """Remove the received file ``filename``."""
        with storage_errors(filename):
            (self.path / filename).unlink()

    def _charge(self, size: int) -> None:
        """Count ``size`` bytes; once over the limit, every further byte is refused."""
        with self._mutex:
            self._count += size
            self._check(self._count)

    def _check(self, total: int) -> None:
        if total > self.max_bytes:
            raise TooLargeError(
                f"the adapter has over {self.max_bytes} bytes, which is the limit for all of its"
                " files together",
                self.max_bytes,
            )

    def _release(self) -> None:
        path, self._path = self.path, None
        try:
            _remove(path, self._root)
        except OSError as error:
            # The next sweep will have it. What was staged is published or refused already.
            logger.warning("staging folder %s cannot be removed: %s", path, error)
        finally:
            os.close(self._lock_file)


def sweep_staging(root: Path) -> int:
    """Remove the folders below ``root`` whose owners are gone; return how many there were.

    Safe beside stagings and sweeps of any process.

    Raises:
        StoreUnavailableError: a folder cannot be removed.
    """
    removed = 0
    with storage_errors("the staging folder"):
        if not root.is_dir():
            return 0
        names = {entry.name.removesuffix(_LOCK_SUFFIX) for entry in os.scandir(root)}
        for name in sorted(name for name in names if _ID.fullmatch(name)):
            lock_file = _take_lock(root, name)
            if lock_file is None:
                continue
            try:
                removed += (root / name).is_dir()
                _remove(root / name, root)
            finally:
                os.close(lock_file)
    return removed


def _take_lock(root: Path, name: str) -> int | None:
    """Lock ``<root>/<name>.lock``, made if need be; return its descriptor, or ``None`` if taken.

    Between opening and locking, another may have held the lock and removed the file. Then the lock
    is one on nothing, and whoever comes next would make a new file beside it.
    """
    path = root / f"{name}{_LOCK_SUFFIX}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove(folder: Path, root: Path) -> None:
    """Remove ``folder`` and then its lock file; the lock must be held."""
    if folder.is_dir():
        shutil.rmtree(folder)
    (root / f"{folder.name}{_LOCK_SUFFIX}").unlink(missing_ok=True)


def _check_filename(name: str) -> None:
    plain = (
        name.isprintable()
        and not name.startswith(".")
        and not any(separator in name for separator in "/\\")
        and 0 < len(name.encode()) <= _MAX_NAME_BYTES
    )
    if not plain:
        raise AdapterInvalidError(
            f"file name {name[:_MAX_NAME_BYTES]!r} is not accepted; a plain name is expected,"
            f" without a folder, such as {CONFIG_NAME!r}"
        )
