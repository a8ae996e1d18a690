"""The operators as torch sees them, and the registry of their backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from manylora_kernels import (
    RankExtent,
    Segment,
    SegmentMap,
    available_backends,
    backends,
    lora_delta_,
    select_backend,
    selected_backend,
)
from manylora_kernels.half import narrow
from support.nf4 import quantize

OPERATIONS = [
    "half_embedding",
    "half_linear",
    "int8_linear",
    "lora_delta_",
    "nf4_linear",
    "packed_linear",
    "paged_attention",
    "scale_shift_",
    "store_kv_",
]


def nf4_arguments(double: bool, bias: bool) -> tuple[Any, ...]:
    weight, _ = quantize((5, 96), double=double)
    x, given = torch.randn(3, 96), torch.randn(5) if bias else None
    return x, weight.tensors, weight.form, weight.absmax_offset, given


def delta_arguments(tokens: int) -> tuple[Any, ...]:
    segments = [Segment(0, 2, 0), Segment(3, tokens, 1)]
    extents = {0: RankExtent(0, 2, 0.5), 1: RankExtent(2, 3, -1.0)}
    runs = SegmentMap(segments, tokens).resolve(extents)
    assert runs is not None
    y, x, a, b = (torch.randn(shape) for shape in ((tokens, 6), (tokens, 4), (5, 4), (5, 6)))
    grouped = runs.grouped or (None, None, None, None, 0)
    return y, x, a, b, runs.segments, runs.weights, *grouped


def attention_arguments(sinks: bool) -> tuple[Any, ...]:
    return (
        torch.randn(6, 4, 8),
        torch.randn(5, 4, 2, 8),
        torch.randn(5, 4, 2, 6),
        torch.tensor([[1, 0], [2, 3]], dtype=torch.int32),
        torch.tensor([3, 7], dtype=torch.int32),
        torch.tensor([0, 1, 6], dtype=torch.int32),
        1,
        0.3,
        4,
        2.0,
        torch.randn(4) if sinks else None,
    )


CALLS = {
    "half_embedding": (
        "half_embedding",
        lambda: (torch.tensor([4, 0, 3]), narrow(torch.randn(5, 9), torch.bfloat16).tiles, 9),
    ),
    "half_linear": (
        "half_linear",
        lambda: (torch.randn(3, 9), narrow(torch.randn(5, 9), torch.float16).tiles, 5, None),
    ),
    "int8_linear": (
        "int8_linear",
        lambda: (
            torch.randn(3, 9),
            torch.randint(-127, 128, (1, 5, 2, 16), dtype=torch.int8),
            torch.rand(5),
            torch.randn(5),
        ),
    ),
    "nf4_linear, double quantization": ("nf4_linear", lambda: nf4_arguments(True, True)),
    "nf4_linear, float maxima": ("nf4_linear", lambda: nf4_arguments(False, False)),
    "lora_delta_, dense": ("lora_delta_", lambda: delta_arguments(9)),
    "lora_delta_, loop": ("lora_delta_", lambda: delta_arguments(70)),
    "scale_shift_": (
        "scale_shift_",
        lambda: (
            torch.randn(5, 3),
            torch.randn(2, 3),
            torch.randn(2, 3),
            torch.tensor([[1, 4, 1, 0]], dtype=torch.int32),
        ),
    ),
    "store_kv_": (
        "store_kv_",
        lambda: (
            torch.zeros(3, 4, 2, 8),
            torch.zeros(3, 4, 2, 6),
            torch.randn(3, 2, 8),
            torch.randn(3, 2, 6),
            torch.tensor([4, 9, 6]),
        ),
    ),
    "paged_attention": ("paged_attention", lambda: attention_arguments(False)),
    "paged_attention, sinks": ("paged_attention", lambda: attention_arguments(True)),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    operation, arguments = CALLS[call]
    torch.manual_seed(0)
    overload = getattr(torch.ops.manylora, operation).default
    outcome = torch.library.opcheck(overload, arguments())
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reference_is_there_first(operation: str) -> None:
    assert available_backends(operation)[0] == "reference"
    assert selected_backend(operation) in available_backends(operation)


def test_every_declared_operation_has_a_reference() -> None:
    assert sorted(backends.active) == OPERATIONS
    for operation in OPERATIONS:
        assert hasattr(torch.ops.manylora, operation)


def test_selecting_what_does_not_exist_says_what_does() -> None:
    with pytest.raises(LookupError, match=r"no operation is called 'nope'; there are .*store_kv_"):
        select_backend("nope", "reference")
    before = selected_backend("store_kv_")
    with pytest.raises(LookupError, match=r"'nobody' does not implement 'store_kv_'.*reference"):
        select_backend("store_kv_", "nobody")
    assert selected_backend("store_kv_") == before


@pytest.fixture
def spy() -> Iterator[list[str]]:
    """A backend of ``lora_delta_`` that only takes note of its calls; gone afterwards."""
    calls: list[str] = []
    before = selected_backend("lora_delta_")
    select_backend("lora_delta_", "reference")

    @backends.register("lora_delta_", "spy")
    def note(*args: Any) -> None:
        calls.append("called")

    yield calls
    select_backend("lora_delta_", before)
    del backends._implementations["lora_delta_"]["spy"]


def test_a_registered_backend_is_called_only_when_selected(spy: list[str]) -> None:
    assert selected_backend("lora_delta_") == "reference"
    assert available_backends("lora_delta_")[0] == "reference"
    assert "spy" in available_backends("lora_delta_")
    extents = {0: RankExtent(0, 1, 1.0)}
    runs = SegmentMap([Segment(0, 1, 0)], 1).resolve(extents)
    assert runs is not None
    y, x = torch.zeros(1, 2), torch.ones(1, 2)
    lora_delta_(y, x, torch.ones(1, 2), torch.ones(1, 2), runs)
    assert (spy, y.tolist()) == ([], [[2.0, 2.0]])
    select_backend("lora_delta_", "spy")
    lora_delta_(y, x, torch.ones(1, 2), torch.ones(1, 2), runs)
    assert (spy, y.tolist()) == (["called"], [[2.0, 2.0]])
