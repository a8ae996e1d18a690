"""The operations' schemas and fake implementations, declared once as torch custom operators.

Every operator calls whichever backend is selected for it, on any device.
"""

from __future__ import annotations

from typing import Any

import torch

from manylora_kernels.backends import active

_SCHEMAS = {
    "nf4_linear": (
        "(Tensor x, Tensor[] weight, int[] form, float absmax_offset, Tensor? bias) -> Tensor"
    ),
    "packed_linear": "(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor",
    "half_embedding": "(Tensor index, Tensor tiles, int columns) -> Tensor",
    "half_linear": "(Tensor x, Tensor tiles, int out_features, Tensor? bias) -> Tensor",
    "int8_linear": "(Tensor x, Tensor tiles, Tensor scale, Tensor? bias) -> Tensor",
    "lora_delta_": (
        "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor segments, Tensor weights, "
        "Tensor? tokens, Tensor? valid, Tensor? rows, Tensor? scales, int step, "
        "Tensor[]? plan=None) -> ()"
    ),
    "scale_shift_": "(Tensor(a!) y, Tensor scale, Tensor shift, Tensor segments) -> ()",
    "store_kv_": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor positions) -> ()"
    ),
    "paged_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, "
        "Tensor query_starts, int num_decodes, float scale, int window, float softcap, "
        "Tensor? sinks) -> Tensor"
    ),
}

_library = torch.library.Library("manylora", "DEF")


def _dispatcher(operation: str) -> Any:
    def call(*args: Any) -> Any:
        return active[operation](*args)

    return call


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")


@torch.library.register_fake("manylora::nf4_linear", lib=_library)
def _nf4_linear_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    form: list[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], form[0])


@torch.library.register_fake("manylora::packed_linear", lib=_library)
def _packed_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("manylora::half_embedding", lib=_library)
def _half_embedding_fake(index: torch.Tensor, tiles: torch.Tensor, columns: int) -> torch.Tensor:
    return tiles.new_empty(index.shape[0], columns, dtype=torch.float32)


@torch.library.register_fake("manylora::half_linear", lib=_library)
def _half_linear_fake(
    x: torch.Tensor, tiles: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("manylora::int8_linear", lib=_library)
def _int8_linear_fake(
    x: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


@torch.library.register_fake("manylora::lora_delta_", lib=_library)
def _lora_delta_fake(*args: Any) -> None:
    return None


@torch.library.register_fake("manylora::scale_shift_", lib=_library)
def _scale_shift_fake(*args: Any) -> None:
    return None


@torch.library.register_fake("manylora::store_kv_", lib=_library)
def _store_kv_fake(*args: Any) -> None:
    return None


@torch.library.register_fake("manylora::paged_attention", lib=_library)
def _paged_attention_fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args: Any
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
