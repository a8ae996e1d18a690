"""The GPU's benchmark goes through at tiny sizes where there is no GPU, and gives no speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.triton import requires_triton

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "gpu.py"


@requires_triton
def test_everything_is_checked_and_nothing_timed(tmp_path: Path) -> None:
    report = tmp_path / "result.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"nf4_linear", "lora_delta_", "decode step"}
    assert not any(key in row for row in rows for key in ("s", "wrong"))


@requires_triton
def test_no_speed_is_given_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu as bench

    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench, "seconds", lambda calls: (1.0, 0.5))
    card = bench.Bench(dry=False)
    card.report({"kernel": "k"}, [], 100, "error 1")
    card.report({"kernel": "k"}, [], 100, None)
    wrong, right = card.rows
    assert "s" not in wrong
    assert right["over_floor"] == pytest.approx(1e10)
