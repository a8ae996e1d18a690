"""Replayed passes against transformers' own code, for every architecture and many step sizes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manylora_kernels import native, operations, select_backend, selected_backend
from manylora_server.core.config import ModelConfig
from manylora_server.engine.build import select_compiled_backends
from manylora_server.model.attention import KVCache
from manylora_server.model.batch import Chunk
from manylora_server.model.loader import load_model
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.program.attach import attach_program
from manylora_server.model.program.recorder import NotRecordableError, record
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import run_self_test
from support.models import ARCHITECTURES, VOCAB, save_model

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

CPU = torch.device("cpu")
# Which 4-bit expert computes a token is only known once its router has run.
NOT_REPLAYED = {("mixtral", "nf4"), ("qwen3_moe", "nf4")}


@pytest.fixture(autouse=True)
def _compiled() -> object:
    before = {operation: selected_backend(operation) for operation in operations()}
    select_compiled_backends(CPU)
    yield
    for operation, backend in before.items():
        select_backend(operation, backend)


def runner_of(
    architecture: str, quantization: Any, folder: Path, stored: torch.dtype = torch.float32
) -> ModelRunner:
    save_model(architecture, folder, stored=stored)
    loaded = load_model(ModelConfig(str(folder), "base", quantization=quantization, device="cpu"))
    tested = run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, CPU)
    cache = KVCache(tested.shapes, 64, 4, torch.float32, CPU)
    modules = AdaptedModules(loaded.model, loaded.layout, tested.token_axes, torch.float32, CPU)
    runner = ModelRunner(loaded.model, cache, torch.float32, CPU)
    attach_program(runner, loaded, tested, modules)
    return runner


def step(*lengths: int, seed: int = 0, samples: bool = True) -> list[Chunk]:
    """A first chunk of each length, each in blocks of its own."""
    rng = random.Random(seed)
    chunks = []
    block = 1
    for length in lengths:
        blocks = -(-length // 4)
        tokens = rng.choices(range(3, VOCAB), k=length)
        chunks.append(Chunk(tokens, 0, [*range(block, block + blocks)], (), samples))
        block += blocks
    return chunks


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_replayed_logits_are_the_model_s_own(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    runner = runner_of(architecture, quantization, tmp_path)
    program = runner.program
    if (architecture, quantization) in NOT_REPLAYED:
        assert program is None
        return
    assert program is not None
    compare(runner)


# The first two have embeddings tied to their heads, and share 16 bits with them.
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma3_text", "llama"])
def test_so_are_those_of_a_checkpoint_of_16_bits(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    runner = runner_of(architecture, quantization, tmp_path, torch.bfloat16)
    assert runner.program is not None
    compare(runner)


def compare(runner: ModelRunner) -> None:
    """Compare steps of many sizes, replayed, with the model's own code."""
    sizes = [(1,), (1, 1), (3, 1), (17, 1, 1, 6), (90,), (1,) * 8, (2, 2, 2)]
    steps = [step(*lengths, seed=seed) for seed, lengths in enumerate(sizes)]
    replayed = [runner.logits(chunks).clone() for chunks in [*steps, *reversed(steps)]]
    runner.program = None
    for index, chunks in enumerate(steps):
        original = runner.logits(chunks)
        for got in (replayed[index], replayed[-1 - index]):
            error = float((got - original).abs().max() / original.abs().max())
            assert error < 2e-6, (len(chunks), error)


def test_a_token_s_bits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    runner = runner_of("llama", "nf4", tmp_path, torch.bfloat16)
    assert runner.program is not None
    (chunk,) = step(1, seed=3)
    alone = runner.logits([chunk]).clone()
    for others in [(1,), (1,) * 7, (60,), (9, 1, 33)]:
        company = step(*others, seed=4)
        moved = Chunk(chunk.token_ids, 0, [40], (), True)
        got = runner.logits([*company, moved])[-1]
        assert torch.equal(got, alone[0]), others


def test_a_step_without_outputs_fills_the_cache(tmp_path: Path) -> None:
    runner = runner_of("llama", "nf4", tmp_path)
    assert runner.program is not None
    (chunk,) = step(9)
    whole = runner.logits([chunk]).clone()
    first = Chunk(chunk.token_ids[:6], 0, chunk.block_table, (), False)
    rest = Chunk(chunk.token_ids[6:], 6, chunk.block_table, (), True)
    assert runner.logits([first]).shape == (0, VOCAB)
    assert torch.allclose(runner.logits([rest]), whole, atol=1e-5)


def test_a_decode_step_calls_torch_only_around_the_layers(tmp_path: Path) -> None:
    runner = runner_of("llama", "nf4", tmp_path)
    assert runner.program is not None
    # Embedding, rotary angles, choice of rows, head: not one of them in a layer.
    calls = [call for call in runner.program.foreign_calls if not call.isdigit()]
    assert len(calls) <= 8, calls


def test_more_sizes_than_are_remembered(tmp_path: Path) -> None:
    runner = runner_of("llama", "none", tmp_path)
    assert runner.program is not None
    first = runner.logits(step(5)).clone()
    for length in range(1, 61):
        for _ in range(5):
            runner.logits(step(*[1] * (_ + 1), length))
        runner.logits(step(length))
    assert torch.equal(runner.logits(step(5)), first)


class Indifferent(nn.Module):
    """A model whose pass can be made to do what cannot be replayed."""

    def __init__(self, deed: str) -> None:
        super().__init__()
        self.deed = deed
        self.embed = nn.Embedding(8, 4)
        self.seen = torch.zeros(1)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.deed == "reads a value" and float(x.sum()) > 1e9:
            return x
        if self.deed == "writes to the model":
            self.seen.add_(1)
        if self.deed == "squares the size":
            return x @ (x.transpose(1, 2) @ x)
        if self.deed == "remembers the size":
            return x + torch.ones(x.shape[1], 1).to(x.dtype) * len(self.seen)
        return x


@pytest.mark.parametrize("deed", ["reads a value", "writes to the model"])
def test_what_cannot_be_replayed_is_refused(deed: str) -> None:
    model = Indifferent(deed).requires_grad_(False)
    with pytest.raises(NotRecordableError):
        record(lambda ids, positions, rows: model(ids, positions)[0, rows], {}, 23, 5)
