"""Tensor operations of multi-adapter inference. Knows tensors, no requests; imports only torch.

Each operation is declared once (``library``), documented and checked once (``ops``), and computed
by the backend that ``backends.select`` chose for it; ``reference`` is plain PyTorch and the oracle.
"""

from manylora_kernels.backends import (
    available_backends,
    operations,
    select_backend,
    selected_backend,
)
from manylora_kernels.half import HalfWeight, halve
from manylora_kernels.int8_rows import Int8Weight
from manylora_kernels.nf4 import NF4Weight
from manylora_kernels.ops import (
    half_embedding,
    half_linear,
    int8_linear,
    lora_delta_,
    nf4_linear,
    nf4_linear_in_float,
    packed_linear,
    paged_attention,
    prepare_nf4,
    scale_shift_,
    store_kv_,
)
from manylora_kernels.segments import RankExtent, RankSegments, Segment, SegmentMap

__all__ = [
    "HalfWeight",
    "Int8Weight",
    "NF4Weight",
    "RankExtent",
    "RankSegments",
    "Segment",
    "SegmentMap",
    "available_backends",
    "half_embedding",
    "half_linear",
    "halve",
    "int8_linear",
    "lora_delta_",
    "nf4_linear",
    "nf4_linear_in_float",
    "operations",
    "packed_linear",
    "paged_attention",
    "prepare_nf4",
    "scale_shift_",
    "select_backend",
    "selected_backend",
    "store_kv_",
]
