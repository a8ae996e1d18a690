"""A process of its own that loads a merged checkpoint as anybody would, and runs the canaries.

``python -m manylora_server.export.check_process TASK.json`` reads a ``Task`` and writes its
``result``: a safetensors file with ``exported`` and ``fused`` logits (float32), and in its
metadata, as JSON, why one of the two is missing, if so. What is told of a checkpoint is therefore
told of its files, and no memory of the server's is used.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

# Of the memory that is free.
_SHARE = 0.7
_NICE = 10
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Task:
    """What to run: ``prompts`` through the checkpoint in ``exported``, and through the base.

    ``positions`` are those whose logits are wanted. ``base`` is ``None``, or a checkpoint to run
    with the adapter that ``config`` and ``weights`` are the files of, as the server would.
    Without the process ``parent`` nobody wants to know.
    """

    exported: str
    prompts: Sequence[Sequence[int]]
    positions: Sequence[int]
    result: str
    polite: bool
    parent: int
    base: str | None
    config: str
    weights: str
    digest: str


class NoMemoryError(Exception):
    """A model does not fit the memory that is free."""


@torch.inference_mode()
def exported_logits(task: Task) -> torch.Tensor:
    """Load the checkpoint with transformers alone; layer by layer where memory is short."""
    from transformers import AutoModelForCausalLM

    folder = Path(task.exported)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = "quantization_config" in config
    needed = _float32_bytes(folder, packed)
    fits = needed < _SHARE * psutil.virtual_memory().available
    if packed and not fits:
        raise NoMemoryError(f"{needed} bytes are needed to load it in 4 bits")
    with tempfile.TemporaryDirectory(prefix="manylora-check-") as scratch:
        placed: dict[str, Any] = {"device_map": {"": "cpu"}} if packed else {}
        if not fits:
            placed = {"device_map": {"": "disk"}, "offload_folder": scratch}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **placed).eval()
        if packed:
            _compute_in_float32(model)
        ids = torch.tensor(task.prompts)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        logits: torch.Tensor = output.logits[:, list(task.positions)].flatten(0, 1).float()
        return logits.contiguous()


def fused_logits(task: Task) -> torch.Tensor:
    """Run base and adapter, unmerged, through the server's own modules, kernels and attention."""
    from manylora_server.adapters.canary import own_route
    from manylora_server.core.config import ModelConfig
    from manylora_server.model.base_view import BaseView
    from manylora_server.model.compute_backends import select_compiled_backends
    from manylora_server.model.loader import load_model
    from manylora_server.model.self_test import run_self_test
    from manylora_store.checkpoint.folder import open_stored
    from manylora_store.compiler.compile import compile_adapter

    assert task.base is not None
    folder = Path(task.base)
    needed = _float32_bytes(folder, "quantization_config" in (folder / "config.json").read_text())
    if needed >= _SHARE * psutil.virtual_memory().available:
        raise NoMemoryError(f"{needed} bytes are needed to load the base")
    select_compiled_backends(torch.device("cpu"))
    loaded = load_model(
        ModelConfig(task.base, "base", quantization="none", dtype="float32", device="cpu")
    )
    tested = run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, loaded.device)
    files = open_stored(
        Path(task.config), Path(task.weights), name="adapter", source="", digest=task.digest
    )
    compiled = compile_adapter(files, loaded.layout)
    view = BaseView(loaded.model)
    return own_route(view, loaded, tested, task.prompts, compiled).logits().contiguous()


def main() -> None:
    """Run the task in the file that is named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    threading.Thread(target=_end_with, args=(task.parent,), daemon=True).start()
    if task.polite:
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    tensors: dict[str, torch.Tensor] = {}
    missing: dict[str, str] = {}
    try:
        tensors["exported"] = exported_logits(task)
    except NoMemoryError as error:
        missing["exported"] = f"too little memory: {error}"
    if task.base is not None:
        try:
            tensors["fused"] = fused_logits(task)
        except NoMemoryError as error:
            missing["fused"] = f"too little memory: {error}"
        except Exception as error:  # noqa: BLE001 - the reason goes into the report
            missing["fused"] = f"{type(error).__name__}: {error}"
    tensors.setdefault("exported", torch.zeros(0))
    save_file(tensors, task.result, {"missing": json.dumps(missing)})


def _end_with(parent: int) -> None:
    """End this process soon after ``parent`` was killed; it had no chance to say so."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def _float32_bytes(folder: Path, packed: bool) -> int:
    """Return what the weights in ``folder`` take once loaded in float32 (4-bit ones stay so)."""
    from manylora_server.export.sources import checkpoint_tensors

    total = 0
    for tensor in checkpoint_tensors(folder).values():
        form = tensor.form
        wide = form.dtype.is_floating_point and not packed
        total += form.bytes * 4 // form.dtype.itemsize if wide else form.bytes
    return total


def _compute_in_float32(model: Any) -> None:
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
            # Or it would round to bfloat16 on processors with such instructions.
            module.support_avx512bf16_for_cpu = False


if __name__ == "__main__":
    main()
