"""``AdapterService`` without a store or an engine: records in memory, uploads in real files.

Only for tests of the HTTP layer and the command line; nothing is checked but that files came.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from manylora_server.core.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterRefusedError,
    ManyloraError,
)
from manylora_server.core.store_errors import store_errors_translated
from manylora_store.errors import (
    AdapterInvalidError,
    AdapterUnsupportedError,
    StoreError,
    TooLargeError,
)


class FakeSink:
    def __init__(self, staging: FakeStaging, file: BinaryIO) -> None:
        self._staging = staging
        self._file = file

    def write(self, data: bytes) -> None:
        self._staging.count(len(data))
        self._file.write(data)

    def close(self) -> None:
        self._file.close()
        self._staging.open -= 1


class FakeStaging:
    """A folder with the files of one upload; ``limit`` bounds their bytes."""

    def __init__(self, root: Path | None, script: Script) -> None:
        self._root = root
        self._script = script
        self._bytes = 0
        self.open = 0
        self.path = Path()

    def __enter__(self) -> FakeStaging:
        if self._script.staging_fails is not None:
            raise self._script.staging_fails
        self.path = Path(tempfile.mkdtemp(dir=self._root))
        return self

    def __exit__(self, *_: object) -> None:
        assert self.open == 0, "a file is still open"
        shutil.rmtree(self.path)

    def receive(self, filename: str) -> FakeSink:
        if PurePosixPath(filename).name != filename or "\\" in filename or filename in (".", ".."):
            raise AdapterInvalidError(f"{filename!r}: a file's name must not hold a path.")
        path = self.path / filename
        if path.exists():
            raise AdapterInvalidError(f"{filename!r}: came twice.")
        self.open += 1
        return FakeSink(self, path.open("wb"))

    def count(self, size: int) -> None:
        self._bytes += size
        self.expect(0)

    def expect(self, size: int) -> None:
        limit = self._script.upload_limit
        if self._bytes + size > limit:
            raise TooLargeError(f"the files are larger than the limit of {limit} bytes.", limit)

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.path.iterdir())}


TWIN = {
    "bytes": 3 * 2**20,
    "storage": "bfloat16",
    "delta_share": 0.9991,
    "error": {"kl_divergence": 2.5e-5},
}


@dataclass(frozen=True)
class FakeStatus:
    name: str
    digest: str
    source: str
    number: int
    residency: str = "disk"
    pinned: bool = False
    merged: str | None = None
    in_use: int = 0
    revisions: tuple[Mapping[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "peft_type": "LORA",
            "rank": 4,
            "ranks": {"model.layers.0.self_attn.q_proj": 4},
            "target_modules": ["q_proj"],
            "parameters": 1024,
            "bytes": 4096,
            "base_model": None,
            "created_at": 1_700_000_000 + self.number,
            "source": self.source,
            "residency": self.residency,
            "pinned": self.pinned,
            "merged": self.merged,
            "twin": self.merged and TWIN,
            "in_use": self.in_use,
            "aliases": [self.name],
            "revisions": [dict(revision) for revision in self.revisions],
            "receipt": {"max_difference": 1e-6},
            "warnings": [],
        }


@dataclass
class Script:
    """How the service behaves: limits, refusals, and adapters that requests are using."""

    upload_limit: int = 64 * 1024**2
    staging_fails: StoreError | None = None
    refusal: ManyloraError | None = None
    in_use: set[str] = field(default_factory=set)


class FakeAdapterService:
    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, for tests that share a server."""
        # Where uploads are staged; the system's own folder unless a test looks into it.
        self.root: Path | None = None
        self.script = Script()
        self.adapters: dict[str, FakeStatus] = {}
        # The files that each accepted upload brought, and names whose removal waits.
        self.uploads: list[tuple[str, dict[str, bytes]]] = []
        self.draining: set[str] = set()
        self._number = 0

    def stage(self) -> FakeStaging:
        return FakeStaging(self.root, self.script)

    async def add(self, name: str, staging: FakeStaging, source: str) -> FakeStatus:
        content = staging.content()
        with store_errors_translated(param="files"):
            if len(content) > 1 and "adapter_config.json" not in content:
                raise AdapterInvalidError("adapter_config.json: is missing.")
        self.uploads.append((name, content))
        return self._publish(name, repr(content), source)

    async def add_source(self, name: str, source: str) -> FakeStatus:
        return self._publish(name, source, source)

    async def add_mix(self, name: str, mix: Mapping[str, float]) -> FakeStatus:
        for member in mix:
            self._get(member)
        return self._publish(name, repr(mix), f"mix:{dict(mix)}")

    async def remove(self, name: str, *, drain: bool) -> None:
        self._get(name)
        if name in self.script.in_use and not drain:
            raise AdapterInUseError(f"adapter: {name!r} is used by 1 request.", param="adapter")
        self.draining.add(name)
        try:
            while name in self.script.in_use:
                await asyncio.sleep(0.005)
        finally:
            self.draining.discard(name)
        del self.adapters[name]

    async def load(self, name: str, *, pin: bool | None) -> FakeStatus:
        pinned = self._get(name).pinned if pin is None else pin
        return self._change(name, residency="device", pinned=pinned)

    async def unload(self, name: str) -> FakeStatus:
        return self._change(name, residency="disk")

    async def set_pinned(self, name: str, pinned: bool) -> FakeStatus:
        return self._change(name, pinned=pinned)

    async def merge(self, name: str, precision: str, *, force: bool) -> FakeStatus:
        self._get(name)
        if precision == "nf4" and not force:
            lost = AdapterUnsupportedError("precision: 3.0% of it would survive.")
            raise AdapterRefusedError(lost, param="precision")
        return self._change(name, merged=precision)

    async def unmerge(self, name: str) -> FakeStatus:
        return self._change(name, merged=None)

    async def rollback(self, name: str, digest: str) -> FakeStatus:
        known = [revision["digest"] for revision in self._get(name).revisions]
        found = [full for full in known if full.startswith(digest)]
        if not found:
            raise AdapterNotFoundError(f"digest: {name!r} has no {digest!r}.", param="digest")
        return self._change(name, digest=found[0])

    async def describe(self, name: str) -> FakeStatus:
        return self._get(name)

    async def list(
        self, *, limit: int, after: str | None, residency: str | None
    ) -> tuple[list[FakeStatus], bool]:
        self._check()
        names = [name for name in sorted(self.adapters) if after is None or name > after]
        found = [self._get(name) for name in names]
        found = [status for status in found if residency in (None, status.residency)]
        return found[:limit], len(found) > limit

    async def stats(self) -> dict[str, Any]:
        self._check()
        return {"adapters": {"registered": len(self.adapters)}}

    def _publish(self, name: str, content: str, source: str) -> FakeStatus:
        self._check()
        if "refused" in content:
            raise AdapterRefusedError(AdapterInvalidError("q_proj.lora_A: has NaN."), param="files")
        digest = hashlib.sha256(content.encode()).hexdigest()
        old = self.adapters.get(name)
        revisions = () if old is None else old.revisions
        if old is None or old.digest != digest:
            self._number += 1
            created = 1_700_000_000 + self._number
            revisions = ({"digest": digest, "created_at": created}, *revisions)
        self.adapters[name] = FakeStatus(name, digest, source, self._number, revisions=revisions)
        return self.adapters[name]

    def _change(self, name: str, **changes: Any) -> FakeStatus:
        self.adapters[name] = replace(self._get(name), **changes)
        return self.adapters[name]

    def _get(self, name: str) -> FakeStatus:
        self._check()
        if name not in self.adapters:
            raise AdapterNotFoundError(f"adapter: no {name!r}.", param="adapter")
        return replace(self.adapters[name], in_use=int(name in self.script.in_use))

    def _check(self) -> None:
        if self.script.refusal is not None:
            raise self.script.refusal
