"""Compiles the Triton kernels for a GPU that is not there, from the backend's own launches.

    python -m support.triton_compiler CAPABILITY DTYPE

Nothing runs: every launch is turned into a compilation down to machine code, and what the assembler
says of it is printed, a JSON object a line. In a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from manylora_kernels import NF4Weight, RankExtent, Segment, SegmentMap, gpu
from manylora_kernels.gpu import kv, launch, linear, lora, paged, scale

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Shared memory that one program may have.
SHARED = {80: 163, 86: 99, 90: 227}
LAUNCH = ("num_warps", "num_stages")


def compile_launch(kernel: JITFunction[Any], capability: int, *args: Any, **kwargs: Any) -> None:
    options = {name: kwargs.pop(name) for name in LAUNCH if name in kwargs}
    bound = kernel.signature.bind(*args, **kwargs).arguments
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = built.asm["ptx"]
    result = {
        "kernel": kernel.fn.__name__,
        "shared": built.metadata.shared,
        "fits": built.metadata.shared <= SHARED[capability] * 1024,
        "wgmma": "wgmma" in text,
        "mma": "mma.sync" in text,
        "copies ahead": "cp.async" in text,
        **resources(built.asm["cubin"]),
        **options,
        **{name: value for name, value in bound.items() if isinstance(value, bool)},
    }
    print(json.dumps(result), flush=True)


def resources(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what did not fit into them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def pretend(capability: int) -> None:
    """Let the launchers take CPU tensors for a GPU's, and compile where they would launch."""

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compile_launch(self, capability, *args, **kwargs)

    JITFunction.run = run  # type: ignore[method-assign]
    for module in (kv, linear, lora, paged, scale):
        for name, value in {
            "is_ours": lambda *tensors: True,
            "INTERPRETED": True,
            "_shared_memory": lambda device: SHARED[capability] * 1024,
            "_is_large": lambda device: SHARED[capability] >= 200,
            "dots_in_float32": lambda tensor: False,
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)
    linear._stages = lambda device, bytes_: stages(torch.device("cuda"), bytes_)


stages = linear._stages


def launch_all(dtype: torch.dtype) -> None:
    """Every launch in the forms that a server's steps have."""
    segments = SegmentMap([Segment(0, 20, 0), Segment(20, 21, 1)], 64)
    plan = segments.resolve({0: RankExtent(0, 16, 1.0), 1: RankExtent(16, 40, 1.0)})
    assert plan is not None
    pool, x = torch.empty(64, 4096, dtype=dtype), torch.empty(64, 4096, dtype=dtype)
    nothing = (plan.segments, plan.weights, None, None, None, None, 0)
    lora.lora_delta_triton(x.clone(), x, pool, pool, *nothing, plan.plan)
    table = torch.zeros(1, 4, dtype=torch.int32)
    scale.scale_shift_triton(x.clone(), pool, pool, table)
    for shape in ((4096, 4096), (4100, 4100)):
        blocks = shape[0] * shape[1] // 64 + 1
        weight = NF4Weight(
            packed=torch.empty(shape[0] * shape[1] // 2, 1, dtype=torch.uint8),
            code=torch.empty(16),
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            block_size=64,
            absmax_code=torch.empty(256),
            absmax_scale=torch.empty(blocks // 256 + 1),
        )
        for tokens in (1, 32, 64, 512) if shape[0] == 4096 else (1,):
            x = torch.empty(tokens, shape[1], dtype=dtype)
            linear.nf4_linear_triton(x, weight.tensors, weight.form, 0.1, None)
    for heads, dim in ((32, 128), (8, 256)):
        cache = torch.empty(300, 16, 8, dim, dtype=dtype)
        q = torch.empty(40, heads, dim, dtype=dtype)
        store = torch.empty(40, 8, dim, dtype=dtype)
        kv.store_kv_triton(cache, cache, store, store, torch.zeros(40, dtype=torch.int64))
        tables = torch.zeros(9, 64, dtype=torch.int32)
        contexts = torch.zeros(9, dtype=torch.int32)
        paged.paged_attention_triton(
            q,
            cache,
            cache,
            tables,
            contexts,
            torch.zeros(10, dtype=torch.int32),
            8,
            0.1,
            0,
            0.0,
            None,
        )


if __name__ == "__main__":
    assert not launch.INTERPRETED, "kernels are compiled without Triton's interpreter"
    assert gpu.TRITON
    pretend(int(sys.argv[1]))
    launch_all(getattr(torch, sys.argv[2]))
