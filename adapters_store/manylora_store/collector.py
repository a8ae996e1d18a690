"""Removal of files that nothing refers to."""

from __future__ import annotations

import logging
from collections.abc import Collection

from manylora_store.blobs.interface import Blobs
from manylora_store.errors import StoreError
from manylora_store.registry import queries
from manylora_store.registry.database import Database

logger = logging.getLogger(__name__)


class Collector:
    """Deletes blobs, and only ones that no revision refers to for as long as that takes."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    def sweep(self) -> int:
        """Delete every blob that no revision refers to; return how many there were."""
        # In this order: what is put after the first look is not in it, whoever refers to it.
        there = self._blobs.digests()
        with self._database.read() as connection:
            orphans = there - queries.blobs_in_use(connection)
        return self._delete_unused(orphans)

    def after_change(self, digests: Collection[str]) -> None:
        """Delete what is unused among ``digests``, now that a change has been made or has failed.

        Neither depends on whether the files can be deleted; so a failure to delete them is for the
        log, and the files are for the next sweep.
        """
        try:
            self._delete_unused(digests)
        except StoreError:
            logger.warning(
                "files that nothing refers to could not be deleted; the next start tries again",
                exc_info=True,
            )

    def _delete_unused(self, digests: Collection[str]) -> int:
        if not digests:
            return 0
        with self._database.write() as connection:
            unused = set(digests) - queries.blobs_in_use(connection, digests)
            for digest in sorted(unused):
                self._blobs.delete(digest)
        return len(unused)
