"""Every kernel compiles to machine code, for which no GPU is needed, and the result fits one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.triton import requires_triton

pytestmark = requires_triton
# What multiplies matrices; on 9.0 some of it by wgmma.
PRODUCTS = {"_shrink", "_expand", "_linear", "decode", "prefill"}


def compiled(capability: int, dtype: str, cache: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    del environment["TRITON_INTERPRET"]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-m", "support.triton_compiler", str(capability), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="on a GPU the tests themselves compile"
)
@pytest.mark.parametrize(("capability", "dtype"), [(80, "float16"), (90, "bfloat16")])
def test_kernels_fit_the_gpu_and_use_its_matrix_units(
    capability: int, dtype: str, tmp_path: Path
) -> None:
    results = compiled(capability, dtype, tmp_path)
    assert {result["kernel"] for result in results} > PRODUCTS
    for result in results:
        assert result["fits"], result
        assert result["stack"] <= 256, result
        if result["kernel"] in PRODUCTS:
            assert result["mma"] or result["wgmma"], result
