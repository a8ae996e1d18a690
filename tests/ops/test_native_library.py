"""Finding the native library, or doing without it."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora_kernels import native, operations, select_backend, selected_backend
from manylora_kernels.native.binding import (
    ISA_VARIABLE,
    LIBRARY_VARIABLE,
    LibraryMissingError,
    NativeLibrary,
)
from manylora_server.core.config import ModelConfig
from manylora_server.core.errors import StartupError
from manylora_server.engine import build

CPU = torch.device("cpu")
# What computes an operation where the library cannot.
FALL_BACKS = {
    "lora_delta_": "reference",
    "half_linear": "reference",
    "nf4_linear": "bitsandbytes",
    "paged_attention": "reference",
    "store_kv_": "reference",
}
compiled = pytest.mark.skipif(native.missing is not None, reason=f"{native.missing}")


@pytest.fixture(autouse=True)
def _restored() -> object:
    before = {operation: selected_backend(operation) for operation in operations()}
    yield
    for operation, backend in before.items():
        select_backend(operation, backend)


def imported(variable: str, value: str) -> subprocess.CompletedProcess[str]:
    """Import the kernels in a process of its own, with an environment variable set."""
    code = (
        "import sys, os; sys.path[:0] = sys.argv[3:]; os.environ[sys.argv[1]] = sys.argv[2];"
        "from manylora_kernels import available_backends, native;"
        "print(available_backends('nf4_linear')); print(native.missing or native.library.isa)"
    )
    command = [sys.executable, "-c", code, variable, value, *sys.path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_the_library_the_other_backends_remain(tmp_path: Path) -> None:
    backends, missing = imported(LIBRARY_VARIABLE, str(tmp_path / "none.so")).stdout.splitlines()
    assert backends == "('reference', 'bitsandbytes', 'reference-int8')"
    assert "none.so cannot be loaded" in missing
    assert "`make native`" in missing


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(LibraryMissingError, match=r"text\.so cannot be loaded"):
        NativeLibrary(tmp_path / "text.so")


def test_a_library_with_another_interface_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.missing is not None:
        pytest.skip(native.missing)
    monkeypatch.setattr("manylora_kernels.native.binding.INTERFACE", -1)
    with pytest.raises(LibraryMissingError, match="built from other sources"):
        NativeLibrary(native.library.path)


@compiled
def test_an_instruction_set_can_be_forced() -> None:
    assert imported(ISA_VARIABLE, "portable").stdout.splitlines()[1] == "portable"
    refused = imported(ISA_VARIABLE, "sse9")
    assert refused.returncode != 0
    assert "MANYLORA_NATIVE_ISA is 'sse9'; this machine runs portable" in refused.stderr


@compiled
def test_torch_s_own_threads_are_found() -> None:
    assert native.library.has_threads


@compiled
def test_the_server_prefers_native_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    build.select_compiled_backends(CPU)
    assert {selected_backend(name) for name in FALL_BACKS} == {native.NATIVE}
    build.select_compiled_backends(torch.device("cuda"))
    assert {name: selected_backend(name) for name in FALL_BACKS} == FALL_BACKS
    with caplog.at_level(logging.INFO):
        build._log_4bit_backend(CPU)
    assert f"native kernels, {native.library.isa}, float32" in caplog.text
    build.select_compiled_backends(CPU, "int8")
    assert selected_backend("nf4_linear") == native.NATIVE_INT8


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"quantization": "none"}, "cpu", "is for a base in 4 bits"),
        ({}, "cuda", "is for CPUs, and this server computes on cuda"),
        ({}, "cpu", "needs the native kernels, but there are none"),
    ],
)
def test_int8_is_refused_where_it_would_change_nothing(
    settings: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", "there are none")
    config = ModelConfig("m", "m", cpu_math="int8", **settings)
    with pytest.raises(StartupError, match=message) as caught:
        build.check_cpu_math(config, torch.device(device))
    assert caught.value.param == "--cpu-math"
    build.check_cpu_math(replace(config, cpu_math="float32"), torch.device(device))


def test_the_server_says_that_they_are_missing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", "they are not built here; run `make native`")
    build.select_compiled_backends(CPU)
    assert {name: selected_backend(name) for name in FALL_BACKS} == FALL_BACKS
    build._log_4bit_backend(CPU)
    assert "run `make native`" in caplog.text
