"""Finding Triton, or doing without it; and that the server chooses it on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from manylora_kernels import available_backends, gpu, operations, select_backend, selected_backend
from manylora_server.engine import build
from support.triton import requires_triton

triton = pytest.importorskip("triton", reason="the package triton is not installed")

# How a CPU keeps dense weights.
CPU_ONLY = {"half_embedding", "half_linear", "packed_linear"}
# What merged twins may be kept in; on a GPU they are unpacked by PyTorch, as the README says.
NO_KERNEL = {"int8_linear"}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {operation: selected_backend(operation) for operation in operations()}
    yield
    for operation, backend in before.items():
        select_backend(operation, backend)


@requires_triton
def test_every_operation_has_a_kernel_which_the_server_selects_on_a_gpu() -> None:
    build.select_compiled_backends(torch.device("cuda"))
    for operation in set(operations()) - CPU_ONLY - NO_KERNEL:
        assert gpu.TRITON in available_backends(operation)
        assert selected_backend(operation) == gpu.TRITON
    assert set(gpu.OPERATIONS) == set(operations()) - CPU_ONLY - NO_KERNEL
    build.select_compiled_backends(torch.device("cpu"))
    assert gpu.TRITON not in {selected_backend(operation) for operation in operations()}


def test_kernels_do_not_import_triton_by_themselves() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; import manylora_kernels; print(*sys.modules)"
    command = [sys.executable, "-c", code, *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "triton" not in done.stdout.split()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.missing() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert gpu.missing() == "the device has compute capability 7.5; 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.load() == "the package triton is not installed"
