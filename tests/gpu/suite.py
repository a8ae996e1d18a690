"""What `make gpu-test` runs, one step after the other, and a JSON of what came out.

    python tests/gpu/suite.py [--only kernels,engine,server,bench]

Written to $OUT/gpu-results.json where OUT is set, else to build/. A step whose packages are not
there is skipped and said to be; the exit code is 1 if a step failed or none could run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("OUT") or ROOT / "build")
_SERVER = ("bitsandbytes", "peft", "transformers", "sqlalchemy", "fsspec", "prometheus_client")


@dataclass(frozen=True)
class Step:
    """One process. ``needs``: packages without which it cannot run."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    tests: bool = True


STEPS = (
    # The tests that run in Triton's interpreter elsewhere.
    Step(
        "kernels",
        tuple(sorted(str(path) for path in ROOT.glob("tests/ops/test_triton_*.py"))),
        ("triton", "bitsandbytes"),
    ),
    Step("engine", ("-m", "gpu", "tests/gpu"), _SERVER),
    # Tests of the whole engine that elsewhere run on the CPU: support.serving reads the device.
    Step("server", ("tests/parity", "tests/engine/test_engine_property.py"), _SERVER),
    Step("bench", ("kernels/bench/gpu.py",), ("triton",), tests=False),
)


def run(step: Step) -> dict[str, Any]:
    """Run one step; its output goes to a log beside the results."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"outcome": "skipped", "missing": missing}
    report = RESULTS / f"gpu-{step.name}.{'xml' if step.tests else 'json'}"
    command = [sys.executable, *step.arguments, "--json", str(report)]
    if step.tests:
        # Other versions of libraries warn of other things.
        options = ["-o", "filterwarnings=default", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):
            options += ["-n", "6"]
        command = [sys.executable, "-m", "pytest", *options, *step.arguments]
    environment = {**os.environ, "MANYLORA_TEST_DEVICE": "cuda"}
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    result: dict[str, Any] = {
        "outcome": "passed" if done.returncode == 0 else "failed",
        "seconds": round(time.monotonic() - begin, 1),
    }
    if report.exists():
        result |= counts(report) if step.tests else {"result": json.loads(report.read_text())}
    return result


def counts(report: Path) -> dict[str, Any]:
    """Return how many tests there were, and which failed."""
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "skipped")}
    return {**numbers, "failed": failed}


def main() -> None:
    """Run the steps, write the JSON, say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(step.name for step in STEPS))
    chosen = parser.parse_args().only.split(",")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-test: torch sees no CUDA device here; nothing was tested")
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "steps": {},
    }
    for step in STEPS:
        if step.name in chosen:
            results["steps"][step.name] = run(step)
            text = json.dumps(results, indent=1) + "\n"
            (RESULTS / "gpu-results.json").write_text(text)
    for name, result in results["steps"].items():
        detail = {key: value for key, value in result.items() if key != "result"}
        print(f"gpu-test: {name}: {json.dumps(detail)}")
    outcomes = {result["outcome"] for result in results["steps"].values()}
    sys.exit(0 if "failed" not in outcomes and "passed" in outcomes else 1)


if __name__ == "__main__":
    main()
