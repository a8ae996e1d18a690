"""The adapter store: everything that is known about adapters, and their files. Torch-free."""

from __future__ import annotations

import builtins
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy as sa

from manylora_store.blobs.interface import Blobs, IncomingFile
from manylora_store.blobs.local import LocalBlobs
from manylora_store.blobs.opening import open_blobs
from manylora_store.checkpoint.folder import AdapterFiles
from manylora_store.collector import Collector
from manylora_store.errors import StoreError, UnknownRevisionError
from manylora_store.intake.staging import Staging, sweep_staging
from manylora_store.records import (
    AdapterRecord,
    Publication,
    Resolved,
    RevisionFiles,
    SweepReport,
)
from manylora_store.registry import changes, queries
from manylora_store.registry.database import Database
from manylora_store.registry.migrations import migrate
from manylora_store.registry.resolution import resolve
from manylora_store.storage_failures import storage_errors
from manylora_store.stored_files import stored_files


class AdapterStore:
    """Names, revisions and files of adapters, shared by the threads and processes that open it.

    A revision's files are in place before the registry's commit that refers to them, and removed
    after the commit that no longer does, so a crash at any instant leaves the old state or the new
    one, and at worst files that nothing refers to, which the next opening sweeps. Files are put and
    removed under the registry's writers' lock only; that is what makes "nothing refers to it" true
    for as long as it matters.
    """

    def __init__(
        self,
        home: Path,
        *,
        registry_url: str | None = None,
        blobs_url: str | None = None,
        max_adapter_bytes: int = 4 * 2**30,
        busy_timeout: float = 10.0,
    ) -> None:
        """Open the store in folder ``home``, creating or migrating it, and sweep leftovers.

        The registry is SQLite at ``home/registry.sqlite3`` unless ``registry_url`` says otherwise,
        and the files are in ``home/blobs`` unless ``blobs_url`` does. ``max_adapter_bytes`` bounds
        what one upload may bring; a writer waits ``busy_timeout`` seconds for the others.

        Raises:
            StoreError: a URL is at fault, a newer version made the registry, or there are files
                but no registry.
            StoreBusyError, StoreFullError, StoreUnavailableError: as for every other method.
        """
        self._max_adapter_bytes = max_adapter_bytes
        home = home.resolve()
        self._home_staging = home / "staging"
        with storage_errors(home):
            self._home_staging.mkdir(parents=True, exist_ok=True)
        self._blobs: Blobs = (
            LocalBlobs(home / "blobs")
            if blobs_url is None
            else open_blobs(blobs_url, self._scratch)
        )
        self._staging_root = self._blobs.staging_root(self._home_staging).resolve()
        with storage_errors(self._staging_root):
            self._staging_root.mkdir(exist_ok=True)
        self._database = Database(
            sa.URL.create("sqlite", database=str(home / "registry.sqlite3"))
            if registry_url is None
            else registry_url,
            busy_timeout,
        )
        self._collector = Collector(self._database, self._blobs)
        try:
            migrate(self._database, before_creating=self._refuse_files_of_another_registry)
            self.sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the registry's connections."""
        self._database.close()

    def stage(self) -> Staging:
        """Return a private folder to receive an adapter's files in, removed when it is left."""
        return Staging(self._staging_root, self._max_adapter_bytes)

    def publish(self, name: str, staged: AdapterFiles, record: AdapterRecord) -> Publication:
        """Store the revision that ``record`` describes and let ``name`` point at it, or do nothing.

        Files staged here are moved, others copied. What is stored already stays as it is, but for
        facts, base fingerprint and receipt, which are those of the latest check.

        Raises:
            ValueError: ``record`` is not about ``staged``, or ``name`` cannot be registered.
        """
        if record.digest != staged.digest:
            raise ValueError(f"the record is of {record.digest}, the files are of {staged.digest}")
        with self._staged(staged) as paths:
            config, weights = (IncomingFile.measure(path) for path in paths)
            brought = RevisionFiles(config.ref, weights.ref)
            doubtful: set[str] = set()
            try:
                for file in (config, weights):
                    if self._blobs.prepare(file):
                        doubtful.add(file.ref.digest)
                with self._database.write() as connection:
                    stored = queries.files(connection, record.digest)
                    kept = self._choose(stored, brought)
                    if kept is brought:
                        doubtful |= brought.digests()
                        self._blobs.put(config)
                        self._blobs.put(weights)
                    changes.save_revision(connection, record, kept)
                    previous = changes.move_alias(
                        connection, name, record.digest, record.source, record.created_at
                    )
                    published = queries.record(connection, name)
            except BaseException:
                self._collector.after_change(doubtful)
                raise
        replaced = set() if stored is None else stored.digests()
        self._collector.after_change((doubtful | replaced) - kept.digests())
        return Publication(published, new_revision=stored is None, previous=previous)

    def point(self, name: str, digest: str, source: str) -> Publication:
        """Let ``name`` point at the stored revision ``digest`` (64 digits).

        Raises:
            UnknownRevisionError: it is not stored, or its files are lost.
            ValueError: ``name`` cannot be registered.
        """
        with self._database.write() as connection:
            files = queries.files(connection, digest)
            if files is None or not self._are_there(files):
                raise UnknownRevisionError(f"no revision with digest {digest[:64]!r} is stored")
            previous = changes.move_alias(connection, name, digest, source, time.time())
            return Publication(
                queries.record(connection, name), new_revision=False, previous=previous
            )

    def get(self, name: str) -> AdapterRecord:
        """Return the record of ``name``.

        Raises:
            UnknownAdapterError: no such name.
        """
        with self._database.snapshot() as connection:
            return queries.record(connection, name)

    def resolve(self, name: str, digest_prefix: str | None = None) -> Resolved:
        """Return the revision that ``name``, or ``name@digest_prefix``, means at this moment.

        Cheap enough to be asked for every request. A prefix (8 digits or more) may mean any
        revision of the name's history.

        Raises:
            UnknownAdapterError: no such name.
            UnknownRevisionError: no revision of the name has such a digest.
            AmbiguousDigestError: several have.
        """
        with self._database.read() as connection:
            return resolve(connection, name, digest_prefix)

    def revision(self, digest: str) -> AdapterRecord | None:
        """Return what is known of the stored revision ``digest``, with an empty name."""
        with self._database.snapshot() as connection:
            return queries.revision(connection, digest)

    def list(
        self, *, limit: int, after: str | None = None, names: Collection[str] | None = None
    ) -> builtins.list[AdapterRecord]:
        """Return, by name, the first ``limit`` records behind ``after`` and among ``names``."""
        with self._database.snapshot() as connection:
            return queries.page(connection, limit=limit, after=after, names=names)

    def count(self) -> int:
        """Return how many names there are."""
        with self._database.read() as connection:
            return queries.count(connection)

    def names(self, base_fingerprint: str | None = None) -> builtins.list[tuple[str, str, float]]:
        """Return ``(name, digest, created_at)``, sorted; all, or those checked against one base."""
        with self._database.read() as connection:
            return queries.names(connection, base_fingerprint)

    def current_names(self, digest: str) -> builtins.list[str]:
        """Return the names that point at ``digest`` now, sorted."""
        with self._database.read() as connection:
            return queries.current_names(connection, digest)

    def pinned(self) -> builtins.list[tuple[str, str]]:
        """Return ``(name, digest)`` of the pinned names, sorted."""
        with self._database.read() as connection:
            return queries.pinned(connection)

    def files(self, digest: str) -> AbstractContextManager[AdapterFiles]:
        """Return a context manager that gives a stored revision's files.

        They stay readable within its block even if the revision is removed.

        Raises:
            UnknownRevisionError: it is not stored.
            StoreUnavailableError: its files are missing or corrupt.
        """
        return stored_files(self._database, self._blobs, digest)

    def rollback(self, name: str, digest_prefix: str) -> Publication:
        """Let ``name`` point at a revision of its history again.

        Raises:
            UnknownAdapterError, UnknownRevisionError, AmbiguousDigestError: as for ``resolve``.
        """
        with self._database.write() as connection:
            meant = resolve(connection, name, digest_prefix)
            previous = changes.move_alias(connection, name, meant.digest, "", time.time())
            return Publication(
                queries.record(connection, name), new_revision=False, previous=previous
            )

    def set_pinned(self, name: str, pinned: bool) -> AdapterRecord:
        """Mark ``name`` as one to be kept loaded, or not; return its record.

        Raises:
            UnknownAdapterError: no such name.
        """
        with self._database.write() as connection:
            changes.set_pinned(connection, name, pinned)
            return queries.record(connection, name)

    def remove(self, name: str) -> frozenset[str]:
        """Forget ``name`` and its history; return the digests of the revisions that went with it.

        Those are the ones that no other name's history holds; their files are deleted.

        Raises:
            UnknownAdapterError: no such name.
        """
        with self._database.write() as connection:
            forgotten = changes.forget(connection, name)
        self._collector.after_change(forgotten.blobs)
        return forgotten.digests

    def sweep(self) -> SweepReport:
        """Remove what processes that died left behind; leave alone what living ones work on."""
        roots = {self._home_staging, self._staging_root}
        with storage_errors(self._staging_root):
            folders = sum(map(sweep_staging, roots))
        return SweepReport(blobs=self._collector.sweep(), staging_folders=folders)

    def _choose(self, stored: RevisionFiles | None, brought: RevisionFiles) -> RevisionFiles:
        """Return which files a revision is to have; the same content can come as other bytes.

        Those stored, if they are all there, as someone may be reading them. The same files are put
        again, which mends what may have become of them.
        """
        if stored is None or stored == brought:
            return brought
        return stored if self._are_there(stored) else brought

    def _are_there(self, files: RevisionFiles) -> bool:
        return self._blobs.holds(files.config) and self._blobs.holds(files.weights)

    @contextmanager
    def _staged(self, files: AdapterFiles) -> Iterator[tuple[Path, Path]]:
        """Yield the paths of the two files where the blobs can take them from."""
        paths = (files.config_path, files.weights.path)
        if all(path.resolve().is_relative_to(self._staging_root) for path in paths):
            yield paths
            return
        with self._scratch() as folder:
            copies = (folder / "config", folder / "weights")
            for path, copy in zip(paths, copies, strict=True):
                with storage_errors(copy):
                    shutil.copyfile(path, copy)
            yield copies

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with self.stage() as staging:
            yield staging.path

    def _refuse_files_of_another_registry(self) -> None:
        """Keep a new registry, opened by a mistaken URL perhaps, from sweeping all there is."""
        if self._blobs.digests():
            raise StoreError(
                f"there are adapter files, but the registry at {self._database.where} is new: name"
                " the registry they belong to, or move them away"
            )
