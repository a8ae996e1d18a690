"""What host memory keeps of an adapter: the device's dtype, and nothing that overflows in it."""

from __future__ import annotations

import math

import pytest
import torch

from manylora_server.model.host_copy import adapter_bytes, host_copy
from manylora_store.compiler.canonical import CompiledAdapter, LowRank, ModulePatch
from manylora_store.records import AdapterRecord

RECORD = AdapterRecord(
    name="a",
    digest="0" * 64,
    peft_type="LORA",
    rank=2,
    ranks={},
    target_modules=(),
    parameters=1,
    bytes=1,
    base_model=None,
    created_at=0.0,
    source="",
)


def adapter(value: float = 1.5) -> CompiledAdapter:
    # Not contiguous, as a transposed factor may be.
    b = torch.full((5, 2), value).t()
    weight = torch.full((3, 3), -value)
    return CompiledAdapter(
        RECORD,
        {
            "low": ModulePatch(low_rank=LowRank(torch.ones(2, 4), b, 0.5), shift=torch.ones(5)),
            "whole": ModulePatch(replacement={"weight": weight}),
            "tied": ModulePatch(replacement={"weight": weight}),
        },
    )


@pytest.mark.parametrize("value", [math.pi, 1e-30])
def test_in_the_compiler_s_own_dtype_nothing_is_copied(value: float) -> None:
    source = adapter(value)
    copy = host_copy(source, torch.float32, pinned=False)
    assert {name: copy.patches[name] is patch for name, patch in source.patches.items()} == {
        "low": True,
        "whole": True,
        "tied": True,
    }


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1.5, torch.bfloat16), (2.0**100, torch.bfloat16), (1 + 2.0**-10, torch.float16)],
)
def test_factors_that_16_bits_hold_are_kept_in_16_bits(value: float, dtype: torch.dtype) -> None:
    source = adapter(value)
    copy = host_copy(source, torch.float32, pinned=False)
    before, after = source.patches["low"].low_rank, copy.patches["low"].low_rank
    assert before is not None
    assert after is not None
    assert (after.a.dtype, after.b.dtype) == (dtype, dtype)
    assert torch.equal(after.a.float(), before.a)
    assert torch.equal(after.b.float(), before.b)
    # Everything else is as it was.
    assert copy.patches["low"].shift is source.patches["low"].shift
    assert copy.patches["whole"] is source.patches["whole"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_is_in_the_dtype_and_contiguous(dtype: torch.dtype) -> None:
    source = adapter()
    copy = host_copy(source, dtype, pinned=False)
    low = copy.patches["low"].low_rank
    assert low is not None
    assert (low.scaling, copy.record, list(copy.patches)) == (0.5, RECORD, list(source.patches))
    assert low.b.is_contiguous()
    assert torch.equal(low.b.float(), torch.full((2, 5), 1.5))
    shift, whole = copy.patches["low"].shift, copy.patches["whole"].replacement
    assert shift is not None
    assert whole is not None
    assert {low.a.dtype, low.b.dtype, shift.dtype, whole["weight"].dtype} == {dtype}


@pytest.mark.parametrize("value", [7e4, -1e30, math.inf])
def test_a_value_beyond_the_dtype_is_refused(value: float) -> None:
    with pytest.raises(OverflowError, match="float16"):
        host_copy(adapter(value), torch.float16, pinned=False)


def test_a_tensor_in_two_places_counts_once() -> None:
    # a, b, shift and one weight, in float32.
    assert adapter_bytes(adapter()) == 4 * (2 * 4 + 2 * 5 + 5 + 9)
