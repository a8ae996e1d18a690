"""Saved mixes: the exact sum of registered adapters as an adapter of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_server.core.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
)
from manylora_server.engine.async_engine import AsyncEngine
from support.adapters import lora, save_adapter
from support.exporting import export, load
from support.models import save_model
from support.oracle import greedy
from support.serving import build, request

PROMPT = [5, 60, 7, 200, 31, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixes")
    base = save_model("llama", folder / "base")
    save_adapter(base, lora("llama"), folder / "a", 1)
    save_adapter(base, lora("llama", r=7, target_modules=["v_proj", "up_proj"]), folder / "b", 2)
    save_adapter(base, lora("llama", modules_to_save=["norm"]), folder / "whole", 3)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    names = ("a", "b", "whole")
    home = tmp_path_factory.mktemp("home")
    engine = build(folder / "base", home, adapters={n: folder / n for n in names})
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def test_a_mix_is_an_adapter_like_any_other(
    engine: AsyncEngine, folder: Path, tmp_path: Path
) -> None:
    status = asyncio.run(engine.adapter_service.add_mix("blend", {"a": 0.7, "b": -0.3}))
    record = status.record
    digests = {name: engine.adapters.resolve(name).digest for name in ("a", "b")}
    assert record.source == f"mix:0.7*a@{digests['a']}+-0.3*b@{digests['b']}"
    assert record.rank == 11
    assert set(record.target_modules) == {"q_proj", "v_proj", "up_proj"}
    assert record.receipt is not None
    assert record.receipt["relative_logit_error"] < 1e-4

    async def answer() -> list[int]:
        wanted = request("r", PROMPT, engine.adapters.resolve("blend"), max_tokens=6)
        return [token async for out in engine.generate(wanted) for token in out.token_ids]

    export(folder / "base", {folder / "a": 0.7, folder / "b": -0.3}, tmp_path / "out")
    tokens, _ = greedy(load(tmp_path / "out"), PROMPT, 6)
    assert asyncio.run(answer()) == tokens


def test_the_same_mix_again_is_the_same_revision(engine: AsyncEngine) -> None:
    service = engine.adapter_service
    first = asyncio.run(service.add_mix("twice", {"a": 0.25})).record
    again = asyncio.run(service.add_mix("twice", {"a": 0.25})).record
    other = asyncio.run(service.add_mix("twice", {"a": 0.5})).record
    assert first.digest == again.digest != other.digest
    assert [revision.digest for revision in other.revisions] == [other.digest, first.digest]


def test_a_member_that_is_no_product_is_refused(engine: AsyncEngine) -> None:
    with pytest.raises(AdapterRefusedError, match="'whole' can only be taken alone") as caught:
        asyncio.run(engine.adapter_service.add_mix("bad", {"a": 1.0, "whole": 1.0}))
    assert caught.value.param == "mix"
    with pytest.raises(AdapterRefusedError, match="cannot be written as one LoRA"):
        asyncio.run(engine.adapter_service.add_mix("bad", {"whole": 1.0}))
    with pytest.raises(AdapterNotFoundError):
        asyncio.run(engine.adapter_service.add_mix("bad", {"a": 1.0, "nobody": 1.0}))
    with pytest.raises(InvalidRequestError, match="weight of 'a' is inf"):
        asyncio.run(engine.adapter_service.add_mix("bad", {"a": float("inf")}))
    assert engine.adapters.get("bad") is None
    assert engine.adapters.in_use("a") == 0


def test_a_mix_survives_the_removal_of_its_members(engine: AsyncEngine, folder: Path) -> None:
    service = engine.adapter_service
    asyncio.run(service.add_source("gone", str(folder / "b")))
    asyncio.run(service.add_mix("kept", {"gone": 0.5}))
    asyncio.run(service.remove("gone", drain=False))

    async def answer() -> int:
        wanted = request("r2", PROMPT, engine.adapters.resolve("kept"), max_tokens=2)
        return sum([len(out.token_ids) async for out in engine.generate(wanted)])

    assert asyncio.run(answer()) == 2
