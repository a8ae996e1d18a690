"""Sizes as functions of a step's size, and memory shared by buffers that do not meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora_server.model.program.affine import SAMPLES, Affine, NotAffineError, solve
from manylora_server.model.program.arena import plan_arena
from manylora_server.model.program.schedule import gather_products
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRecording, SymbolicRef

numbers = st.integers(-1000, 1000)


@given(numbers, numbers, numbers)
def test_an_affine_number_is_found_from_its_samples(c: int, t: int, n: int) -> None:
    wanted = Affine(c, t, n)
    assert solve([wanted.at(*sample) for sample in SAMPLES]) == wanted


@pytest.mark.parametrize("function", [lambda t, n: t * t, lambda t, n: t * n, lambda t, n: t // 2])
def test_what_is_not_affine_is_refused(function: object) -> None:
    assert callable(function)
    with pytest.raises(NotAffineError):
        solve([function(t, n) for t, n in SAMPLES])


def ref(buffer: int) -> SymbolicRef:
    return SymbolicRef(buffer, Affine(0), (Affine(1),), (Affine(1),), torch.float32)


def event(inputs: list[int], output: int) -> SymbolicEvent:
    return SymbolicEvent("operator", "", tuple(map(ref, inputs)), {}, (ref(output),))


@given(st.data())
def test_no_buffer_is_overwritten_before_its_last_reader(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    sizes = tuple(
        Affine(data.draw(st.integers(0, 64)) * 4, data.draw(st.integers(0, 8)) * 4)
        for _ in range(count)
    )
    events = [
        event(data.draw(st.lists(st.integers(0, index - 1), max_size=3)), index)
        for index in range(1, count)
    ]
    recording = SymbolicRecording(tuple(events), sizes, {"x": ref(0)}, ref(count - 1))
    plan = plan_arena(recording)
    tokens, outputs = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 5))
    places, end = plan.addresses(tokens, outputs)
    # What each byte was last written for; readers must find their own buffers whole.
    owner: list[int] = [-1] * max(1, end)

    def span(buffer: int) -> range:
        start = places[plan.slot_of[buffer]]
        return range(start, start + sizes[buffer].at(tokens, outputs))

    def write(buffer: int) -> None:
        assert span(buffer).stop <= end
        for byte in span(buffer):
            owner[byte] = buffer

    write(0)
    for number, happening in enumerate(events, 1):
        write(number)
        for argument in happening.args:
            assert all(owner[byte] == argument.buffer for byte in span(argument.buffer))
    assert all(owner[byte] == count - 1 for byte in span(count - 1))


PRODUCT = torch.ops.manylora.half_linear.default


def product(x: int, out: int) -> SymbolicEvent:
    return SymbolicEvent("operator", PRODUCT, (ref(x),), {}, (ref(out),))


def hook(x: int, out: int) -> SymbolicEvent:
    return SymbolicEvent("module", f"module {out}", (ref(x),), {}, (ref(out),))


def gathered(*events: SymbolicEvent) -> tuple[SymbolicEvent, ...]:
    buffers = tuple(Affine(4) for _ in range(10))
    return gather_products(SymbolicRecording(events, buffers, {"x": ref(0)}, ref(9))).events


def test_a_product_moves_with_its_hook_to_the_first_over_the_same_input() -> None:
    gate, gate_hook, activation = product(0, 1), hook(0, 1), event([1], 2)
    up, up_hook, joined = product(0, 3), hook(0, 3), event([2, 3], 9)
    assert gathered(gate, gate_hook, activation, up, up_hook, joined) == (
        gate,
        gate_hook,
        up,
        up_hook,
        activation,
        joined,
    )


def test_a_product_does_not_pass_what_writes_its_input() -> None:
    events = (product(0, 1), hook(0, 1), event([1], 0), product(0, 3), hook(0, 3))
    assert gathered(*events) == events


def test_a_product_does_not_pass_what_uses_the_memory_it_writes() -> None:
    events = (product(0, 1), event([3], 2), product(0, 3), event([1, 2, 3], 9))
    assert gathered(*events) == events


def test_products_over_other_inputs_and_other_events_keep_their_order() -> None:
    events = (product(0, 1), hook(0, 1), product(1, 2), event([2], 3), product(3, 4), hook(3, 4))
    assert gathered(*events) == events
