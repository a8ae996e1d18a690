"""Where an adapter can be named instead of sent: a folder of this machine, or a hub repository."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME
from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.hub import snapshot
from manylora_store.intake.staging import Staging

_CHUNK = 2**20
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>.*)")
_EXPECTED = "expected is a folder ('/dir' or 'file:/dir') or 'hf:org/repo[@revision]'"


def fetch(source: str, staging: Staging) -> str:
    """Copy the adapter's files that ``source`` names into ``staging``; nothing else is read.

    ``source`` is the path of a folder, ``file:`` and such a path, or ``hf:org/repo[@revision]``.
    Return it in full: the folder's absolute path, the repository at its commit.

    Raises:
        AdapterInvalidError: a malformed source, no such folder, repository or revision, or
            something in a file's place that is none.
        TooLargeError: the files are larger than ``staging`` takes.
        StoreFullError: no room on the disk.
        StoreUnavailableError: the hub cannot be reached, or a file cannot be read.
    """
    if not source.isprintable():
        raise AdapterInvalidError(f"source: {source!r} has characters that cannot be shown")
    match = _SCHEME.fullmatch(source)
    scheme = match["scheme"].lower() if match else "file"
    rest = match["rest"] if match else source
    if scheme == "hf":
        repository, _, revision = rest.partition("@")
        folder, commit = snapshot(source, repository, revision or None, staging)
        _copy(source, folder, staging)
        return f"hf:{repository}@{commit}"
    if scheme != "file":
        raise AdapterInvalidError(f"source: {source!r} has scheme {scheme!r}; {_EXPECTED}")
    folder = _folder(source, rest)
    _copy(source, folder, staging)
    return f"file:{folder}"


def _folder(source: str, path: str) -> Path:
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise AdapterInvalidError(
                f"source: {source!r} names host {host!r}; a folder of this machine is expected,"
                " such as 'file:/dir'"
            )
        path = slash + path
    try:
        folder = Path(path).expanduser().absolute() if path else None
        is_folder = folder is not None and folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterInvalidError(f"source: {source!r} cannot be looked up: {error}") from error
    if folder is None or not is_folder:
        raise AdapterInvalidError(f"source: {source!r} is no folder of this machine; {_EXPECTED}")
    return folder


def _copy(source: str, folder: Path, staging: Staging) -> None:
    """Copy the configuration and one weight file; links are followed, as hub caches have them."""
    weights = SAFETENSORS_NAME if (folder / SAFETENSORS_NAME).exists() else BIN_NAME
    for name in (CONFIG_NAME, weights):
        try:
            # Not to be kept waiting by a pipe that has this name.
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(source, name, error) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterInvalidError(f"source: {name} in {source!r} is not a regular file")
            staging.expect(status.st_size)
            with staging.receive(name) as sink:
                while piece := _read(descriptor, source, name):
                    sink.write(piece)
        finally:
            os.close(descriptor)


def _read(descriptor: int, source: str, name: str) -> bytes:
    try:
        return os.read(descriptor, _CHUNK)
    except OSError as error:
        raise _unreadable(source, name, error) from error


def _unreadable(source: str, name: str, error: OSError) -> AdapterInvalidError:
    return AdapterInvalidError(f"source: {name} in {source!r} cannot be read: {error.strerror}")
