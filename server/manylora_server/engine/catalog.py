"""The adapters this server knows, by name and by digest, with their compiled form on the host."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from manylora_server.core.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
    StartupError,
)
from manylora_server.core.types import AdapterChoice
from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import AdapterError
from manylora_store.records import AdapterRecord

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LISTED = 20


class AdapterCatalog:
    """Names to immutable adapters. Thread-safe; entries are only ever added."""

    def __init__(self, layout: BaseLayout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._by_name: dict[str, CompiledAdapter] = {}
        self._by_digest: dict[str, CompiledAdapter] = {}

    def add_folder(self, name: str, source: str) -> AdapterRecord:
        """Compile the PEFT folder ``source`` (a path or ``file:`` URL) and register it as ``name``.

        Raises ``InvalidRequestError`` for a bad name or a missing folder and
        ``AdapterRefusedError`` with the store's own reason.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"name: {name!r} is not an adapter name; use 1 to 128 letters, digits, '.', '_' "
                "or '-', the first a letter or digit.",
                param="name",
            )
        path = Path(source.removeprefix("file:")).expanduser()
        if not path.is_dir():
            raise InvalidRequestError(
                f"source: adapter {name!r}: no such folder: {source!r}.", param="source"
            )
        try:
            compiled = compile_adapter(open_folder(path, name, source), self._layout)
        except AdapterError as error:
            raise AdapterRefusedError(error, param="source") from error
        with self._lock:
            if name in self._by_name:
                raise StartupError(f"--adapter: the name {name!r} is given twice.")
            self._by_name[name] = compiled
            self._by_digest.setdefault(compiled.record.digest, compiled)
        return compiled.record

    def resolve(self, reference: str) -> AdapterChoice:
        """Return the adapter that ``name`` or ``name@DIGESTPREFIX`` stands for now.

        Raises ``AdapterNotFoundError``, or ``InvalidRequestError`` for a malformed digest.
        """
        name, at, prefix = reference.partition("@")
        if at and not _DIGEST_PREFIX.fullmatch(prefix):
            raise InvalidRequestError(
                f"adapter: {prefix!r} after '@' is not a digest; give 8 to 64 lower-case hex "
                "digits.",
                param="adapter",
            )
        with self._lock:
            compiled = self._by_name.get(name)
            names = sorted(self._by_name)
        if compiled is None:
            raise AdapterNotFoundError(
                f"adapter: no adapter is called {name!r}; {_available(names)}.", param="adapter"
            )
        digest = compiled.record.digest
        if at and not digest.startswith(prefix):
            raise AdapterNotFoundError(
                f"adapter: {name!r} has no revision {prefix!r}; its digest is {digest}.",
                param="adapter",
            )
        return AdapterChoice(name, digest)

    def get(self, name: str) -> AdapterRecord | None:
        """Return the record registered as ``name``."""
        with self._lock:
            compiled = self._by_name.get(name)
        return None if compiled is None else compiled.record

    def records(self) -> list[AdapterRecord]:
        """Return all records, by name."""
        with self._lock:
            return [self._by_name[name].record for name in sorted(self._by_name)]

    def loader(self, digest: str) -> Callable[[], CompiledAdapter]:
        """Return a function that yields the compiled adapter with this digest."""
        return lambda: self._by_digest[digest]

    def __len__(self) -> int:
        with self._lock:
            return len(self._by_name)


def _available(names: list[str]) -> str:
    if not names:
        return "no adapters are registered"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"registered are {', '.join(names[:_LISTED])}{more}"
