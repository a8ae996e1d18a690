"""From an adapter's files to a revision in the store: checked against the base, and measured.

The compiler imports PEFT, which takes seconds, so it is imported when an adapter first needs it, or
by ``warm_up`` before that: a server without one to compile starts without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from manylora_server.adapters.receipt import Measurement, ReceiptMeter
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.model.deferred_compiler import compiler_deferred
from manylora_server.model.host_copy import host_copy
from manylora_store.checkpoint.folder import AdapterFiles
from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter
from manylora_store.intake.names import AdapterNameError, check_name
from manylora_store.intake.open import open_staged
from manylora_store.intake.sources import fetch
from manylora_store.intake.staging import Staging
from manylora_store.records import NEVER_EXAMINED, AdapterRecord, Publication
from manylora_store.store import AdapterStore


@dataclass(frozen=True, slots=True)
class MixMember:
    """A stored adapter in a mix."""

    name: str
    digest: str
    weight: float


def checked_name(name: str) -> str:
    """Return ``name``; ``InvalidRequestError`` if it cannot be an adapter's."""
    try:
        check_name(name)
    except AdapterNameError as error:
        raise InvalidRequestError(error.message, param="name") from error
    return name


class Intake:
    """Checks adapters against one base. Knows neither requests nor slots.

    ``examine`` and ``load`` do tensor work and belong in a thread with one torch thread, or in
    the engine's; a ``Measurement``'s steps belong in the engine's thread.
    """

    def __init__(
        self,
        store: AdapterStore,
        layout: BaseLayout,
        meter: ReceiptMeter,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.store = store
        self.base_fingerprint = layout.fingerprint
        self._layout = layout
        self._meter = meter
        self._dtype = dtype
        self._pinned = device.type == "cuda"

    @staticmethod
    def warm_up() -> None:
        """Import what the first adapter would have to wait for, or does."""
        with compiler_deferred():
            if torch.distributed.is_available():
                # PEFT takes it for imported, which a lean transformers does not see to.
                import torch.distributed.tensor as _  # noqa: F401
            import manylora_store.compiler.compile  # noqa: F401

    def stage(self) -> Staging:
        """Return a new private folder for files on their way in."""
        with store_errors_translated():
            return self.store.stage()

    def open(self, staging: Staging, name: str, source: str) -> AdapterFiles:
        """Open what was received; no tensors are read but for their digest."""
        with store_errors_translated(param="files"):
            return open_staged(staging, name, source)

    def fetch(self, source: str, staging: Staging) -> str:
        """Bring the files that ``source`` names into ``staging``; return the source in full."""
        with store_errors_translated(param="source"):
            return fetch(source, staging)

    def point(self, name: str, files: AdapterFiles) -> Publication | None:
        """Publish ``files`` as ``name`` without examining them, if this base knows them already."""
        with store_errors_translated():
            known = self.store.revision(files.digest)
            if (
                known is None
                or known.base_fingerprint != self.base_fingerprint
                or known.receipt is None
                or known.unmixable == NEVER_EXAMINED
            ):
                return None
            # With its files, which mends what may have become of the stored ones.
            record = replace(known, source=files.source, created_at=time.time())
            return self.store.publish(name, files, record)

    def examine(self, files: AdapterFiles) -> tuple[CompiledAdapter, Measurement]:
        """Compile ``files`` for the base and get its comparison with PEFT ready.

        Raises ``AdapterRefusedError``.
        """
        self.warm_up()
        from manylora_store.compiler.compile import compile_adapter

        with store_errors_translated(param="files"):
            compiled = compile_adapter(files, self._layout)
            return compiled, self._meter.prepare(files.path, compiled)

    def measure(self, step: Callable[[], None]) -> None:
        """Run one of a measurement's steps. Raises ``AdapterRefusedError``."""
        with store_errors_translated(param="files"):
            step()

    def publish(
        self, name: str, files: AdapterFiles, compiled: CompiledAdapter, measured: Measurement
    ) -> Publication:
        """Make the adapter known as ``name``, if the measurement lets it."""
        with store_errors_translated(param="files"):
            receipt = measured.finish().as_dict()
            record = replace(
                compiled.record, base_fingerprint=self.base_fingerprint, receipt=receipt
            )
            return self.store.publish(name, files, record)

    def register(self, name: str, source: str) -> AdapterRecord:
        """Do all of it at once, in this thread, for ``name`` and a ``source``."""
        checked_name(name)
        with self.stage() as staging:
            files = self.open(staging, name, self.fetch(source, staging))
            publication = self.point(name, files)
            if publication is None:
                compiled, measured = self.examine(files)
                for step in measured.steps:
                    self.measure(step)
                publication = self.publish(name, files, compiled, measured)
        return publication.record

    def mix(self, members: Sequence[MixMember], staging: Staging) -> str:
        """Write the exact sum of stored adapters into ``staging`` as one; return its source.

        The sum has no digest to name it by before it is written, so the source names the members:
        ``mix:0.7*a@DIGEST+0.3*b@DIGEST``. Raises ``AdapterRefusedError`` for a member that does
        more than add a low-rank product.
        """
        self.warm_up()
        from manylora_store.compiler.compile import compile_adapter
        from manylora_store.export.adapter_folder import lora_content, write_lora
        from manylora_store.export.combining import Member, combine
        from manylora_store.export.methods import Recipe

        with store_errors_translated(param="mix"):
            compiled = []
            for member in members:
                with self.store.files(member.digest) as files:
                    adapter = compile_adapter(files, self._layout)
                compiled.append(Member(member.name, adapter, member.weight))
            patches = combine(compiled, Recipe("cat"), self._layout).patches
            base_model = compiled[0].adapter.record.base_model
            content = lora_content(patches, self._layout, base_model)
            staging.expect(content.bytes)
            write_lora(content, staging.path)
        parts = (f"{member.weight!r}*{member.name}@{member.digest}" for member in members)
        return f"mix:{'+'.join(parts)}"

    def load(self, digest: str) -> CompiledAdapter:
        """Read a stored revision as host memory keeps it. Raises ``AdapterLoadError`` causes."""
        self.warm_up()
        from manylora_store.compiler.compile import compile_adapter

        with self.store.files(digest) as files:
            compiled = compile_adapter(files, self._layout)
        return host_copy(compiled, self._dtype, pinned=self._pinned)
