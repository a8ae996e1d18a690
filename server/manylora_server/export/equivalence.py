"""How close a merged checkpoint is to base and adapters unmerged, on the canary prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from manylora_server.adapters.canary import POSITIONS, canary_prompts
from manylora_server.core.errors import InvalidRequestError, ManyloraError
from manylora_server.export.check_process import Task
from manylora_server.export.progress import Progress
from manylora_store.checkpoint.folder import AdapterFiles

_POLL_S = 0.1
_SHOWN = 2000
# Of the logits' range, at the median position. What rounding weights to NF4 does depends on the
# model, so there is nothing to expect of it.
_EXPECTED = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 6e-2}


class Comparison:
    """The logits of one checkpoint, taken once in a process of its own, and what they differ by.

    Raises:
        ManyloraError: transformers cannot load the checkpoint, or its logits are not finite.
        CancelledError: as ``progress`` does; the process is gone then.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        progress: Progress,
        *,
        base: Path | None,
        adapter: AdapterFiles | None,
        polite: bool,
    ) -> None:
        self.prompts = canary_prompts(vocab_size)
        with tempfile.TemporaryDirectory(prefix="manylora-check-") as scratch:
            result = Path(scratch) / "result.safetensors"
            task = Task(
                exported=str(folder),
                prompts=self.prompts,
                positions=POSITIONS,
                result=str(result),
                polite=polite,
                parent=os.getpid(),
                base=None if base is None or adapter is None else str(base.resolve()),
                config="" if adapter is None else str(adapter.config_path.resolve()),
                weights="" if adapter is None else str(adapter.weights.path.resolve()),
                digest="" if adapter is None else adapter.digest,
            )
            _run(task, Path(scratch), progress)
            with safe_open(result, framework="pt") as file:
                self._missing: dict[str, str] = json.loads(file.metadata()["missing"])
            self._logits = load_file(result)
        bad = int((~self._logits["exported"].isfinite()).sum())
        if bad:
            raise InvalidRequestError(
                f"adapters: {bad} logits of the merged model are not finite; choose smaller "
                "weights or another method.",
                param="adapters",
            )

    def with_base(self, base: str) -> dict[str, Any]:
        """Compare with the base that was loaded beside the checkpoint."""
        reason = self._missing.get("exported") or self._missing.get("fused")
        if reason is not None:
            return {"skipped": reason}
        return {"base": base, **differences(self._logits["fused"], self._logits["exported"])}

    def with_logits(self, base: str, logits: torch.Tensor) -> dict[str, Any]:
        """Compare with ``logits`` that were had elsewhere."""
        reason = self._missing.get("exported")
        if reason is not None:
            return {"skipped": reason}
        return {"base": base, **differences(logits, self._logits["exported"])}


def differences(expected: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """Return what tells two ``[positions, vocab]`` of logits apart.

    Relative errors are of the range (largest less smallest) of a position's expected logits;
    ``kl`` is of the distribution ``got`` from ``expected``, in nats.
    """
    scale = (expected.amax(1) - expected.amin(1)).clamp_min(1e-6)
    error = (got - expected).abs().amax(1)
    relative = error / scale
    p, q = expected.double().log_softmax(1), got.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).clamp_min(0)
    return {
        "max_abs_error": float(error.max()),
        "max_relative_error": float(relative.max()),
        "median_relative_error": float(relative.median()),
        "max_kl": float(kl.max()),
        "mean_kl": float(kl.mean()),
        "top1_agreement": float((expected.argmax(1) == got.argmax(1)).double().mean()),
    }


def doubts(part: dict[str, Any], dtype: str) -> Sequence[str]:
    """Return a warning if a checkpoint is farther from its own base than rounding explains."""
    most = _EXPECTED.get(dtype)
    median = part.get("median_relative_error")
    if most is None or median is None or median <= most:
        return ()
    return (
        f"equivalence: logits differ from the unmerged ones by {median:.1e} of their range; at "
        f"most {most:.0e} was to be expected of {dtype}",
    )


def _run(task: Task, scratch: Path, progress: Progress) -> None:
    path = scratch / "task.json"
    path.write_text(json.dumps(asdict(task)), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if task.polite:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.check_process", str(path)]
    with (scratch / "log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A terminal's interrupt is for this process, which then ends that one.
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                progress.check()
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            log.seek(0)
            told = log.read().decode(errors="replace").strip()[-_SHOWN:]
            raise ManyloraError(
                "equivalence: the checkpoint that was written cannot be loaded or run again, so it "
                f"was removed: {told or f'the process ended with {process.returncode}'}"
            )
