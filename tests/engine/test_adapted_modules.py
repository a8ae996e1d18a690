"""Wrapped modules against the equations of ``manylora_store.compiler.canonical``, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_kernels import Segment, SegmentMap
from manylora_server.model.adapted import (
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedModule,
    AdaptedNorm,
)
from manylora_server.model.context import ForwardContext, forward_context
from manylora_store.compiler.canonical import LowRank, ModulePatch, ModuleSpec

IN, OUT, VOCAB = 6, 5, 11
CPU = torch.device("cpu")
# Tokens 0-1 base, 2-4 slot 0, 5 slot 3, 6 base, 7-8 slot 1, 9 slot 2.
SEGMENTS = [Segment(2, 5, 0), Segment(5, 6, 3), Segment(7, 9, 1), Segment(9, 10, 2)]
TOKENS = 10


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rank: int, seed: int, width_in: int = IN, width_out: int = OUT) -> LowRank:
    a, b = noise(rank, width_in, seed=seed), noise(rank, width_out, seed=seed + 1)
    return LowRank(a, b, scaling=-0.5 - seed)


def run(
    module: nn.Module, x: torch.Tensor, segments: Iterable[Segment] = SEGMENTS, rows: int = TOKENS
) -> torch.Tensor:
    plan = SegmentMap(tuple(segments), rows)
    # A module that is no output head must never look at these.
    trap = SegmentMap([Segment(0, rows, 0)], rows)
    with forward_context(ForwardContext(_no_attention, plan, trap)), torch.inference_mode():
        result: torch.Tensor = module(x)
    return result


def install(module: AdaptedModule, slot: int, patch: ModulePatch) -> None:
    module.reserve(slot, patch)
    module.fill(slot, patch)


def _no_attention(*args: Any) -> torch.Tensor:
    raise AssertionError("no attention here")


def row_slots() -> list[int | None]:
    slots: list[int | None] = [None] * TOKENS
    for segment in SEGMENTS:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    return slots


LINEAR_PATCHES = {
    0: ModulePatch(low_rank=low_rank(3, 10)),
    1: ModulePatch(
        low_rank=low_rank(1, 20),
        output_scale=noise(OUT, seed=21),
        shift=noise(OUT, seed=22),
    ),
    2: ModulePatch(
        replacement={"weight": noise(OUT, IN, seed=30), "bias": noise(OUT, seed=31)},
        low_rank=low_rank(5, 32),
    ),
    3: ModulePatch(shift=noise(OUT, seed=40)),
}


def linear(kind: str) -> tuple[nn.Module, ModuleSpec]:
    base: nn.Module
    if kind == "conv1d":
        base = Conv1D(OUT, IN)
        shape: tuple[int, ...] = (IN, OUT)
    else:
        base = nn.Linear(IN, OUT)
        shape = (OUT, IN)
    with torch.no_grad():
        base.weight.copy_(noise(*shape, seed=1))
        base.bias.copy_(noise(OUT, seed=2))
    base.requires_grad_(False)
    spec = ModuleSpec(
        "m", "linear", (OUT, IN), {"weight": shape, "bias": (OUT,)}, transposed=kind == "conv1d"
    )
    return base, spec


def linear_row(
    weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, patch: ModulePatch | None
) -> torch.Tensor:
    """``g * (W x + b + scaling * B A x) + shift`` in float64 for one row."""
    if patch is None:
        return weight.double() @ x.double() + bias.double()
    if patch.replacement is not None:
        weight, bias = patch.replacement["weight"], patch.replacement["bias"]
    y = weight.double() @ x.double() + bias.double()
    if patch.low_rank is not None:
        factors = patch.low_rank
        y += factors.scaling * (factors.a.double() @ x.double()) @ factors.b.double()
    if patch.output_scale is not None:
        y *= patch.output_scale
    if patch.shift is not None:
        y += patch.shift
    return y


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_linear_rows(kind: str) -> None:
    base, spec = linear(kind)
    weight = base.weight.t() if kind == "conv1d" else base.weight
    module = AdaptedLinear(base, spec, torch.float32, CPU)
    for slot, patch in LINEAR_PATCHES.items():
        if kind == "conv1d" and patch.replacement is not None:
            stored = {**patch.replacement, "weight": patch.replacement["weight"].t().contiguous()}
            patch = ModulePatch(low_rank=patch.low_rank, replacement=stored)
        install(module, slot, patch)
    x = noise(1, TOKENS, IN, seed=3)
    got = run(module, x)
    untouched = base(x)
    for token, slot in enumerate(row_slots()):
        patch = None if slot is None else LINEAR_PATCHES[slot]
        expected = linear_row(weight, base.bias, x[0, token], patch)
        torch.testing.assert_close(got[0, token].double(), expected, atol=3e-5, rtol=1e-5)
        if slot is None:
            assert torch.equal(got[0, token], untouched[0, token])
    # Slots are given back one by one, in an order that moves rank rows.
    for removed in (0, 2, 1, 3):
        module.remove(removed)
        got = run(module, x)
        for token, slot in enumerate(row_slots()):
            patch = LINEAR_PATCHES[slot] if slot in module.slots else None  # type: ignore[index]
            expected = linear_row(weight, base.bias, x[0, token], patch)
            torch.testing.assert_close(got[0, token].double(), expected, atol=3e-5, rtol=1e-5)
    assert torch.equal(run(module, x), untouched)
    assert module.ranks.a.shape[0] == 0


def test_a_poisoned_adapter_changes_only_its_own_rows() -> None:
    base, spec = linear("linear")
    module = AdaptedLinear(base, spec, torch.float32, CPU)
    for slot, patch in LINEAR_PATCHES.items():
        install(module, slot, patch)
    x = noise(1, TOKENS, IN, seed=3)
    clean = run(module, x)
    module.remove(0)
    # Finite as it is, but every product overflows.
    poison = torch.full((3, IN), 3e38), torch.full((3, OUT), 3e38)
    install(module, 0, ModulePatch(low_rank=LowRank(*poison, scaling=1.0)))
    got = run(module, x)
    assert not got[0, 2:5].isfinite().any()
    others = [token for token, slot in enumerate(row_slots()) if slot != 0]
    torch.testing.assert_close(got[:, others], clean[:, others])


EMBEDDING_PATCHES = {
    0: ModulePatch(low_rank=low_rank(3, 50, VOCAB, OUT)),
    1: ModulePatch(replacement={"weight": noise(VOCAB, OUT, seed=60)}),
    2: ModulePatch(low_rank=low_rank(2, 70, VOCAB, OUT), output_scale=noise(OUT, seed=71)),
    3: ModulePatch(shift=noise(OUT, seed=72)),
}


def test_embedding_rows() -> None:
    base = nn.Embedding(VOCAB, OUT).requires_grad_(False)
    spec = ModuleSpec("e", "embedding", (VOCAB, OUT), {"weight": (VOCAB, OUT)})
    module = AdaptedEmbedding(base, spec, torch.float32, CPU)
    for slot, patch in EMBEDDING_PATCHES.items():
        install(module, slot, patch)
    ids = torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    got = run(module, ids)
    for token, slot in enumerate(row_slots()):
        patch = ModulePatch() if slot is None else EMBEDDING_PATCHES[slot]
        table = base.weight if patch.replacement is None else patch.replacement["weight"]
        index = int(ids[0, token])
        expected = table[index].double()
        if patch.low_rank is not None:
            column = patch.low_rank.a[:, index].double()
            expected = expected + patch.low_rank.scaling * column @ patch.low_rank.b.double()
        if patch.output_scale is not None:
            expected = expected * patch.output_scale
        if patch.shift is not None:
            expected = expected + patch.shift
        torch.testing.assert_close(got[0, token].double(), expected, atol=1e-5, rtol=1e-5)
    for slot in EMBEDDING_PATCHES:
        module.remove(slot)
    assert torch.equal(run(module, ids), base(ids))


def test_norm_rows() -> None:
    base = nn.LayerNorm(OUT).requires_grad_(False)
    spec = ModuleSpec("n", "norm", (), {"weight": (OUT,), "bias": (OUT,)})
    module = AdaptedNorm(base, spec, torch.float32, CPU)
    own = {"weight": noise(OUT, seed=80), "bias": noise(OUT, seed=81)}
    install(module, 0, ModulePatch(replacement=own))
    x = noise(1, TOKENS, OUT, seed=6)
    got = run(module, x)
    expected = base(x)
    expected[:, 2:5] = nn.functional.layer_norm(x[:, 2:5], (OUT,), own["weight"], own["bias"])
    torch.testing.assert_close(got, expected)


def test_a_norm_whose_bias_was_trained() -> None:
    base = nn.LayerNorm(OUT).requires_grad_(False)
    spec = ModuleSpec("n", "norm", (), {"weight": (OUT,), "bias": (OUT,)})
    module = AdaptedNorm(base, spec, torch.float32, CPU)
    shifts = {0: noise(OUT, seed=82), 1: noise(OUT, seed=83)}
    for slot, shift in shifts.items():
        install(module, slot, ModulePatch(shift=shift))
    x = noise(1, TOKENS, OUT, seed=6)
    expected = base(x)
    for start, end, slot, weight in MIX:
        if slot in shifts:
            expected[:, start:end] += weight * shifts[slot]
    torch.testing.assert_close(run(module, x, MIX), expected)
    module.remove(0)
    module.remove(1)
    assert torch.equal(run(module, x, MIX), base(x))


# Tokens 2 to 4 are of three adapters, 5 of two, 7 of one at half weight.
MIX = [
    *(Segment(2, 5, 0, 0.5), Segment(2, 5, 1, -2.0), Segment(2, 5, 2, 0.25)),
    *(Segment(5, 6, 2, 1.5), Segment(5, 6, 0, 1.0), Segment(7, 8, 1, 0.5)),
]


@pytest.mark.parametrize("module_kind", ["linear", "embedding"])
def test_rows_of_several_adapters_add_them_up(module_kind: str) -> None:
    module: AdaptedModule
    if module_kind == "linear":
        base, spec = linear("linear")
        module = AdaptedLinear(base, spec, torch.float32, CPU)
        x, width = noise(1, TOKENS, IN, seed=3), IN
    else:
        base = nn.Embedding(VOCAB, OUT).requires_grad_(False)
        parameters = {"weight": (VOCAB, OUT)}
        spec = ModuleSpec("e", "embedding", (VOCAB, OUT), parameters)
        module = AdaptedEmbedding(base, spec, torch.float32, CPU)
        x, width = torch.arange(TOKENS)[None] * 7 % VOCAB, VOCAB
    patches = {
        slot: ModulePatch(
            low_rank=LowRank(
                noise(rank, width, seed=90 + slot), noise(rank, OUT, seed=95 + slot), 0.5 + slot
            ),
            shift=None if slot == 1 else noise(OUT, seed=98 + slot),
        )
        for slot, rank in ((0, 3), (1, 16), (2, 5))
    }
    for slot, patch in patches.items():
        install(module, slot, patch)
    expected = base(x).double()
    for start, end, slot, weight in MIX:
        factors, shift = patches[slot].low_rank, patches[slot].shift
        assert factors is not None
        rows = x[0, start:end]
        down = rows @ factors.a.t() if module_kind == "linear" else factors.a[:, rows].t()
        expected[0, start:end] += weight * factors.scaling * down.double() @ factors.b.double()
        if shift is not None:
            expected[0, start:end] += weight * shift
    got = run(module, x, MIX)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)
    outside = [0, 1, 6, 8, 9]
    assert torch.equal(got[0, outside], base(x)[0, outside])


def test_the_order_of_a_sum_does_not_depend_on_who_came_first() -> None:
    base, spec = linear("linear")
    patches = {
        slot: ModulePatch(
            low_rank=LowRank(
                noise(4, IN, seed=slot).to(dtype), noise(4, OUT, seed=10 + slot).to(dtype), 1.0
            )
        )
        for slot, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16))
    }
    x = noise(1, TOKENS, IN, seed=3)
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        module = AdaptedLinear(base, spec, torch.float32, CPU)
        for slot in order:
            install(module, slot, patches[slot])
        results.append(run(module, x, MIX))
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_output_head_goes_by_the_rows_that_are_wanted() -> None:
    base, spec = linear("linear")
    head = ModuleSpec("h", "linear", spec.shape, spec.parameters, is_output_head=True)
    module = AdaptedLinear(base, head, torch.float32, CPU)
    install(module, 1, LINEAR_PATCHES[1])
    x = noise(1, 2, IN, seed=7)
    context = ForwardContext(
        _no_attention, SegmentMap([Segment(0, 9, 1)], 9), SegmentMap([Segment(1, 2, 1)], 2)
    )
    with forward_context(context), torch.inference_mode():
        got = module(x)
    for row, patch in enumerate((None, LINEAR_PATCHES[1])):
        expected = linear_row(base.weight, base.bias, x[0, row], patch)
        torch.testing.assert_close(got[0, row].double(), expected, atol=3e-5, rtol=1e-5)


def test_outside_of_a_step_the_base_runs() -> None:
    base, spec = linear("linear")
    module = AdaptedLinear(base, spec, torch.float32, CPU)
    install(module, 0, LINEAR_PATCHES[0])
    x = noise(1, 4, IN, seed=8)
    assert torch.equal(module(x), base(x))
    with pytest.raises(AssertionError, match="removed first"):
        install(module, 0, LINEAR_PATCHES[0])
