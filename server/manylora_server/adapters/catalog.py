"""Which revision a name means now, and which revisions requests are using."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Collection

from manylora_server.core.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
)
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.core.types import AdapterChoice, AdapterMix
from manylora_store.errors import (
    AdapterIncompatibleError,
    AdapterUnsupportedError,
    UnknownAdapterError,
)
from manylora_store.records import AdapterRecord
from manylora_store.store import AdapterStore

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_LISTED = 20


class AdapterCatalog:
    """Names to revisions, by asking the store each time, so that other processes' changes count.

    A *lease* says that an accepted request uses a revision under a name. While a name is being
    removed it takes no leases. Thread-safe. ``on_unused`` is called with a digest that was retired
    (no name points at it any more) once its last lease has ended.
    """

    def __init__(self, store: AdapterStore, base_fingerprint: str) -> None:
        self.store = store
        self.base_fingerprint = base_fingerprint
        self.on_unused: Callable[[str], None] = lambda digest: None
        self._lock = threading.Lock()
        self._leases: Counter[tuple[str, str]] = Counter()
        self._mixes: Counter[frozenset[str]] = Counter()
        self._removing: set[str] = set()
        self._retired: set[str] = set()
        self._epoch = 0

    def resolve(self, reference: str) -> AdapterChoice:
        """Return the adapter that ``name`` or ``name@DIGESTPREFIX`` stands for now.

        A digest may be of any revision in the name's history. Raises ``AdapterNotFoundError``,
        ``InvalidRequestError`` for a malformed or ambiguous digest, and ``AdapterRefusedError``
        for an adapter that was registered for another base than the one that is loaded.
        """
        name, at, prefix = reference.partition("@")
        if at and not _DIGEST_PREFIX.fullmatch(prefix):
            raise InvalidRequestError(
                f"adapter: {prefix!r} after '@' is not a digest; give 8 to 64 lower-case hex "
                "digits.",
                param="adapter",
            )
        with self._lock:
            epoch = self._epoch
            self._refuse_removing(name)
        with store_errors_translated(param="adapter"):
            try:
                found = self.store.resolve(name, prefix or None)
            except UnknownAdapterError as error:
                raise AdapterNotFoundError(
                    f"adapter: no adapter is called {name!r}; {self._available()}.",
                    param="adapter",
                ) from error
        self.check_base(name, found.base_fingerprint)
        return AdapterChoice(name, found.digest, epoch)

    def check_base(self, name: str, base_fingerprint: str) -> None:
        """Raise ``AdapterRefusedError`` for a revision that was checked against another base."""
        if base_fingerprint != self.base_fingerprint:
            raise AdapterRefusedError(
                AdapterIncompatibleError(
                    f"adapter: {name!r} was registered for another base than the one that is "
                    "loaded; upload it again to have it checked against this one."
                )
            )

    def get(self, name: str) -> AdapterRecord | None:
        """Return the record registered as ``name``."""
        with store_errors_translated(param="name"):
            try:
                return self.store.get(name)
            except UnknownAdapterError:
                return None

    def served(self) -> list[tuple[str, str, float]]:
        """Return name, digest and time of every adapter of the loaded base, by name."""
        with store_errors_translated():
            return self.store.names(self.base_fingerprint)

    def pinned(self) -> frozenset[str]:
        """Return the digests of the pinned adapters of the loaded base."""
        with store_errors_translated():
            names = {name for name, _ in self.store.pinned()}
        return frozenset(digest for name, digest, _ in self.served() if name in names)

    def __len__(self) -> int:
        with store_errors_translated():
            return self.store.count()

    def check_mixable(self, mix: AdapterMix) -> None:
        """Raise ``AdapterRefusedError`` if ``mix`` weights or sums what is not linear."""
        if mix.plain:
            return
        names = {choice.digest: choice.name for choice, _ in mix.members}
        for digest in mix.digests:
            with store_errors_translated(param="adapter"):
                revision = self.store.revision(digest)
            if revision is None:
                raise AdapterNotFoundError(
                    f"adapter: {names[digest]!r} was removed just now.", param="adapter"
                )
            if revision.unmixable is not None:
                raise AdapterRefusedError(
                    AdapterUnsupportedError(
                        f"adapter: {names[digest]!r} cannot be part of a mix, nor have a weight "
                        f"other than 1: {revision.unmixable}. Only what is added to the base can "
                        "be weighted and summed; name this adapter alone."
                    )
                )

    def lease(self, *choices: AdapterChoice) -> None:
        """Take note that an accepted request uses ``choices``: all of them, or none.

        Raises ``AdapterNotFoundError`` if one was removed since it was resolved.
        """
        with self._lock:
            for choice in choices:
                self._refuse_removing(choice.name)
                if choice.epoch != self._epoch:
                    with store_errors_translated(param="adapter"):
                        self.store.resolve(choice.name, choice.digest)
            for choice in choices:
                self._leases[choice.name, choice.digest] += 1
            if len(choices) > 1:
                self._mixes[frozenset(choice.digest for choice in choices)] += 1

    def release(self, *choices: AdapterChoice) -> None:
        """Take note that a request that had a lease on ``choices`` has ended."""
        unused: list[str] = []
        with self._lock:
            for choice in choices:
                key = (choice.name, choice.digest)
                self._leases[key] -= 1
                assert self._leases[key] >= 0, "released more often than leased"
                if not self._leases[key]:
                    del self._leases[key]
                if choice.digest in self._retired and not self._leased(choice.digest):
                    self._retired.discard(choice.digest)
                    unused.append(choice.digest)
            if len(choices) > 1:
                mix = frozenset(choice.digest for choice in choices)
                self._mixes[mix] -= 1
                if not self._mixes[mix]:
                    del self._mixes[mix]
        for digest in unused:
            self.on_unused(digest)

    def most_at_once(self, digests: Collection[str]) -> int:
        """Return how many adapters ``digests`` and any one of the mixes in use are together."""
        with self._lock:
            return max((len(mix.union(digests)) for mix in self._mixes), default=len(digests))

    def in_use(self, name: str) -> int:
        """Return how many accepted requests use any revision under ``name``."""
        with self._lock:
            return self._in_use(name)

    def removing(self, name: str) -> bool:
        """Whether ``name`` is being removed."""
        with self._lock:
            return name in self._removing

    def begin_removal(self, name: str, *, drain: bool) -> None:
        """Refuse new requests for ``name`` from now on.

        Raises ``AdapterNotFoundError`` if it is being removed already, and ``AdapterInUseError``
        if requests use it and are not to be waited for.
        """
        with self._lock:
            self._refuse_removing(name)
            count = self._in_use(name)
            if count and not drain:
                raise AdapterInUseError(
                    f"name: {count} requests use adapter {name!r} now; try again later, or remove "
                    "it with ?drain=true, which waits for them.",
                    param="name",
                )
            self._removing.add(name)

    def end_removal(self, name: str) -> None:
        """Let ``name`` be used again, if it is still there."""
        with self._lock:
            self._removing.discard(name)
            self._epoch += 1

    def retire(self, digest: str) -> None:
        """Take note that no name points at ``digest`` any more."""
        with self._lock:
            leased = self._leased(digest)
            if leased:
                self._retired.add(digest)
        if not leased:
            self.on_unused(digest)

    def restore(self, digest: str) -> None:
        """Take note that a name points at ``digest`` (again)."""
        with self._lock:
            self._retired.discard(digest)

    def _refuse_removing(self, name: str) -> None:
        if name in self._removing:
            raise AdapterNotFoundError(
                f"adapter: {name!r} is being removed and takes no new requests.", param="adapter"
            )

    def _in_use(self, name: str) -> int:
        return sum(count for (held, _), count in self._leases.items() if held == name)

    def _leased(self, digest: str) -> bool:
        return any(held == digest for _, held in self._leases)

    def _available(self) -> str:
        records = self.store.list(limit=_LISTED)
        if not records:
            return "no adapters are registered"
        names = ", ".join(record.name for record in records)
        more = self.store.count() - len(records)
        return f"registered are {names}" + (f" and {more} more" if more > 0 else "")
