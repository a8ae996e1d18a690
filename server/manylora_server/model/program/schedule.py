"""The order in which a replayed pass runs what it recorded.

Products over the same input that stand apart in the model's code (a gate and an up projection have
the activation between them) are brought together: native code then prepares the input once for
all of them, and one's adapters read memory while another's weights are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from manylora_server.model.program.arena import refs_of
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRecording

_PRODUCTS = (torch.ops.manylora.nf4_linear.default, torch.ops.manylora.half_linear.default)


def gather_products(recording: SymbolicRecording) -> SymbolicRecording:
    """Return ``recording`` with every product, and its module's hook, next to the first product
    over the same input, where nothing in between keeps it from moving there."""
    events: list[SymbolicEvent] = []
    for block in _blocks(recording.events):
        place = _place(events, block)
        events[place:place] = block
    return replace(recording, events=tuple(events))


def _blocks(events: Sequence[SymbolicEvent]) -> Iterator[list[SymbolicEvent]]:
    """Yield the events, a product's hook together with the product."""
    block: list[SymbolicEvent] = []
    for event in events:
        if block and _is_hook_of(block[0], event):
            block.append(event)
            continue
        if block:
            yield block
        block = [event]
    if block:
        yield block


def _place(events: Sequence[SymbolicEvent], block: Sequence[SymbolicEvent]) -> int:
    """Return where in ``events`` to put ``block``: at the end unless it can be moved up."""
    product = block[0]
    if not _is_product(product):
        return len(events)
    made = {ref.buffer for event in block for ref in event.outs}
    needed = {ref.buffer for event in block for ref in refs_of(event)} - made
    for place in range(len(events), 0, -1):
        before = events[place - 1]
        is_hook = place > 1 and _is_hook_of(events[place - 2], before)
        if _shares_input(events[place - 2] if is_hook else before, product):
            return place
        # What the block reads must be there, and nobody may have used the memory that it writes.
        if {ref.buffer for ref in before.outs} & needed:
            break
        if {ref.buffer for ref in refs_of(before)} & made:
            break
    return len(events)


def _is_product(event: SymbolicEvent) -> bool:
    return event.kind == "operator" and event.target in _PRODUCTS


def _is_hook_of(product: SymbolicEvent, event: SymbolicEvent) -> bool:
    return (
        _is_product(product)
        and event.kind == "module"
        and event.outs[0].buffer == product.outs[0].buffer
    )


def _shares_input(event: SymbolicEvent, product: SymbolicEvent) -> bool:
    return _is_product(event) and bool(event.args[0] == product.args[0])
