"""Any history of add, abort and step: nothing lost, nothing leaked, no token changed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from manylora_server.core.types import AdapterMix, FinishReason, Request, RequestOutput
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.engine.engine import Engine
from manylora_server.engine.kv_blocks import KVBlocks
from support.adapters import lora, save_adapter
from support.mixing import mix_of
from support.models import VOCAB, save_model
from support.serving import build, inner, request, run, tokens_of

ADAPTERS = 4
NEW = 14
BLOCK = 4


@dataclass(frozen=True)
class World:
    folder: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    alone: dict[tuple[int, str | None], list[int]]

    def engine(self, home: Path, **limits: int) -> AsyncEngine:
        """Return an engine whose KV memory is full of NaN, except for block 0."""
        engine = build(self.folder, home, adapters=self.adapters, kv_block_tokens=BLOCK, **limits)
        poison(inner(engine))
        return engine


def poison(core: Engine) -> None:
    cache = core._runner.cache  # type: ignore[attr-defined]
    for keys, values in cache.layers.values():
        keys[1:] = math.nan
        values[1:] = math.nan


MIXES: dict[str, dict[str, float]] = {
    "half": {"a2": 0.5},
    "two": {"a0": 0.7, "a1": -0.3},
    "other two": {"a1": 0.4, "a3": 1.2},
    "three": {"a0": 0.5, "a2": 0.25, "a3": -1.0},
}


def choice(engine: AsyncEngine, name: str | None) -> AdapterMix | None:
    if name is None:
        return None
    return mix_of(engine, MIXES.get(name, {name: 1.0}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("property")
    base = save_model("llama", root / "base")
    adapters = {
        f"a{i}": save_adapter(
            base, lora("llama", r=1 + 2 * i, target_modules="all-linear"), root / f"a{i}", i
        )
        for i in range(ADAPTERS)
    }
    rng = random.Random(0)
    prompts = [rng.choices(range(3, VOCAB), k=length) for length in (1, 4, 9, 17, 25)]
    # Two that share a long prefix.
    prompts.append([*prompts[4][:16], 5, 6, 7])
    made = World(root / "base", adapters, prompts, {})
    engine = made.engine(root / "home")
    inner(engine).scheduler.blocks = KVBlocks(20, BLOCK, prefix_cache=False)
    for number, prompt in enumerate(prompts):
        for name in (None, *adapters, *MIXES):
            wanted = request("it", prompt, choice(engine, name), max_tokens=NEW)
            made.alone[number, name] = tokens_of(run(inner(engine), {0: [wanted]})["it"])
    return made


def draw(
    rng: random.Random, world: World, engine: AsyncEngine, request_id: str, slots: int
) -> tuple[tuple[int, str | None], Request]:
    number = rng.randrange(len(world.prompts))
    mixes = [name for name, weights in MIXES.items() if len(weights) <= slots]
    name = rng.choice([None, *world.adapters, *mixes])
    made = request(
        request_id, world.prompts[number], choice(engine, name), max_tokens=rng.randint(1, NEW)
    )
    deadline = rng.choices([None, made.arrival + 3600, made.arrival - 1], [8, 3, 1])[0]
    return (number, name), replace(made, priority=rng.randint(-1, 1), deadline=deadline)


@pytest.mark.parametrize("seed", range(10))
def test_any_history(seed: int, world: World, tmp_path: Path) -> None:
    rng = random.Random(seed)
    slots = rng.randint(1, 4)
    engine = world.engine(
        tmp_path,
        adapter_slots=slots,
        adapter_host_bytes=rng.choice([1, 2**30]),
        max_batch_tokens=rng.choice([1, 5, 13, 40]),
        max_sequences=rng.choice([2, 5, 9]),
    )
    core = inner(engine)
    core.scheduler.blocks = KVBlocks(rng.choice([12, 16, 24]), BLOCK, prefix_cache=seed % 4 != 0)
    origin: dict[str, tuple[int, str | None]] = {}
    asked: dict[str, Request] = {}
    outputs: dict[str, list[RequestOutput]] = {}

    def collect(made: list[RequestOutput]) -> None:
        for output in made:
            outputs.setdefault(output.request_id, []).append(output)
        core.check_integrity()

    for number in range(35):
        request_id = f"r{number}"
        origin[request_id], asked[request_id] = draw(rng, world, engine, request_id, slots)
        core.add(asked[request_id])
        if rng.random() < 0.25:
            victim = rng.choice(list(asked))
            ended = core.abort(victim)
            known = any(o.finish_reason for o in outputs.get(victim, []))
            assert (ended is None) == known
            collect([] if ended is None else [ended])
        for _ in range(rng.randint(0, 4)):
            collect(core.step())
    steps = 0
    while core.has_work:
        collect(core.step())
        if core.stalled:
            core.residency.host.wait(60)
        steps += 1
        assert steps < 3000, "a request starves"

    assert outputs.keys() == asked.keys(), "a request was lost"
    for request_id, pieces in outputs.items():
        check_request(asked[request_id], pieces, world.alone[origin[request_id]])
    assert core.scheduler.blocks.used == 0
    assert core.scheduler.blocks.available == core.scheduler.blocks.capacity
    slots = core.residency.slots
    assert not any(slots.references(digest) for digest in slots.resident)
    assert core.step() == []


def check_request(asked: Request, pieces: list[RequestOutput], alone: list[int]) -> None:
    reasons = [piece.finish_reason for piece in pieces]
    assert all(reason is None for reason in reasons[:-1]), "something came after the end"
    tokens = tokens_of(pieces)
    assert tokens == alone[: len(tokens)], (asked.request_id, "other requests changed its tokens")
    last = pieces[-1]
    assert last.completion_tokens == len(tokens)
    assert last.prompt_tokens == len(asked.prompt_token_ids)
    assert 0 <= last.cached_tokens < last.prompt_tokens
    assert last.error is None
    if asked.deadline is not None and asked.deadline < asked.arrival:
        assert last.finish_reason in (FinishReason.TIMEOUT, FinishReason.ABORT)
        assert tokens == []
    elif last.finish_reason is not FinishReason.ABORT:
        assert last.finish_reason is FinishReason.LENGTH
        assert len(tokens) == asked.sampling.max_tokens


def test_a_prompt_of_which_one_token_is_computed_at_a_time(world: World, tmp_path: Path) -> None:
    """A chunk of one token beside a long decode must not read blocks it has not reached."""
    engine = world.engine(tmp_path, max_batch_tokens=2, max_sequences=4)
    core = inner(engine)
    first = request("decoding", world.prompts[3], max_tokens=NEW)
    second = request("prefill", world.prompts[4], max_tokens=2)
    outputs = run(core, {0: [first], 12: [second]})
    assert tokens_of(outputs["decoding"]) == world.alone[3, None]
    assert tokens_of(outputs["prefill"]) == world.alone[4, None][:2]


def test_a_prefix_is_reused_by_digest_and_never_by_another_adapter(
    world: World, tmp_path: Path
) -> None:
    engine = world.engine(tmp_path)
    core = inner(engine)
    for name, cached in (("a0", 0), ("a0", 24), ("a1", 0), (None, 0), ("a1", 24), ("a0", 24)):
        wanted = request("it", world.prompts[4], choice(engine, name), max_tokens=3)
        outputs = run(core, {0: [wanted]})["it"]
        assert outputs[-1].cached_tokens == cached
        assert tokens_of(outputs) == world.alone[4, name][:3]
