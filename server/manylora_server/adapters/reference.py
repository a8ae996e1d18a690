"""The same adapter on the same base as PEFT computes it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from manylora_server.adapters.canary import POSITIONS
from manylora_server.model.base_view import BaseView, show_values
from manylora_server.model.loader import LoadedModel
from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.folder import open_stored
from manylora_store.checkpoint.weights import SAFETENSORS_NAME
from manylora_store.compiler.preparation import prepare
from manylora_store.errors import AdapterInvalidError
from manylora_store.records import AdapterRecord

# Warning filters and torch's generator belong to the process, so one thread at a time.
_one_at_a_time = threading.Lock()
_SHOWN = 500


@dataclass(frozen=True, slots=True)
class PeftRoute:
    """A ``PeftModel`` and the prompts, ready for one pass of the model."""

    model: Any
    prompts: Sequence[Sequence[int]]
    device: torch.device

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Return float32 ``[PROMPTS * len(POSITIONS), vocab]`` on the CPU."""
        ids = torch.tensor(self.prompts, device=self.device)
        # Some models warn of padding where a token of theirs for it comes without a mask.
        mask = torch.ones_like(ids)
        with _refused("run"):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        result: torch.Tensor = logits[:, list(POSITIONS)].flatten(0, 1).float().cpu()
        return result


def peft_route(
    view: BaseView,
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    record: AdapterRecord,
) -> PeftRoute:
    """Load the adapter in ``folder``, which ``record`` is about, as PEFT does.

    That is, by ``PeftModel.from_pretrained`` on a tree of ``view``, in which the parameters that
    PEFT loads into the base's own modules are copies; it cannot load into others.

    Raises:
        AdapterInvalidError: PEFT cannot load it.
    """
    files = open_stored(
        folder / CONFIG_NAME,
        folder / SAFETENSORS_NAME,
        name=record.name,
        source=record.source,
        digest=record.digest,
    )
    _, ledger = prepare(files, loaded.layout)
    tree = view.ordinary_tree(loaded.layout, loaded.dtype, ledger.base)
    with (
        _one_at_a_time,
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=()),
        torch.no_grad(),
        _refused("load"),
    ):
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(folder))
        # Whatever it was trained for, it is served, and must be run, as what the base is.
        config.task_type = "CAUSAL_LM"
        model = PeftModel.from_pretrained(
            tree, str(folder), config=config, torch_device=str(loaded.device)
        )
    show_values(model)
    return PeftRoute(model.eval(), prompts, loaded.device)


@contextmanager
def _refused(verb: str) -> Iterator[None]:
    """Make PEFT's reason, whatever its class, the adapter's: the compiler had accepted it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Some of PEFT's messages list every tensor.
        reason = str(error)[:_SHOWN] or type(error).__name__
        raise AdapterInvalidError(
            f"receipt: PEFT cannot {verb} the adapter on this base: {reason}"
        ) from error
