"""Files as they arrive at the store, made by hand so that they can be broken anywhere."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from unit.store.store_support import save_adapter
from unit.store.tiny_models import build_base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
BASE = build_base("llama")


def adapter_files(folder: Path) -> dict[str, bytes]:
    """Return a rank-4 adapter of signed random tensors for ``BASE``, by file name."""
    save_adapter(BASE, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def safetensors(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of ``header``, a JSON object or its text, and ``data``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """Return what a header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_one_of_each_dtype(folder: Path) -> None:
    """Write an adapter with a tensor of every dtype, a scalar and an empty one, all bytes known."""
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    tensors = [
        (f"base_model.model.m{9 - index}.lora_A.weight", dtype, [3, 5], 15 * width)
        for index, (dtype, width) in enumerate(widths.items())
    ]
    tensors += [
        ("base_model.model.é", "F32", [], 4),
        ("base_model.model.none", "F16", [0, 4], 0),
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, dtype, shape, size in tensors:
        header[name] = entry(dtype, shape, len(data), len(data) + size)
        data += hashlib.shake_256(name.encode()).digest(size)
    (folder / WEIGHTS).write_bytes(safetensors(header, data))
    config = {
        "peft_type": "LORA",
        "r": 3,
        "target_modules": ["b", "a"],
        "rank_pattern": {"a": 3, "b": 2},
        "alpha_pattern": {"x": 1.5},
        "base_model_name_or_path": "q",
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config))


def zip_of(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip file of ``members``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(
    members: Mapping[str, bytes] | Sequence[tuple[tarfile.TarInfo, bytes]],
    mode: str = "w:gz",
    tar_format: int = tarfile.PAX_FORMAT,
) -> bytes:
    """Return a tar file of ``members``, compressed as ``mode`` says."""
    if isinstance(members, Mapping):
        members = [(tarfile.TarInfo(name), data) for name, data in members.items()]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tar_format) as archive:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def random_tensors() -> dict[str, torch.Tensor]:
    """Return signed random tensors of several dtypes, one not contiguous."""
    generator = torch.Generator().manual_seed(3)
    return {
        "base_model.model.b": torch.randn(4, 6, generator=generator).T,
        "base_model.model.a": torch.randn(5, generator=generator).to(torch.bfloat16),
        "base_model.model.c": torch.randn((), generator=generator, dtype=torch.float64),
        "base_model.model.d": torch.randn(2, 0, 3, generator=generator).to(torch.float16),
    }
