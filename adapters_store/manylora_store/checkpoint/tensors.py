"""The tensors of a weight file, read by its header."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manylora_store.checkpoint.weights import WeightFile, open_data


def read_tensors(weights: WeightFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in the dtype it is stored in, in the header's order.

    Each has memory of its own, so the file may go away while they live.

    Raises:
        AdapterInvalidError: the file cannot be read, or has become shorter.
    """
    with open_data(weights.path) as file:
        for name, info in weights.header.items():
            tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            if info.size:
                data = tensor.view(-1).view(torch.uint8).numpy().data
                file.read_into(data, info.offset)
            yield name, tensor
