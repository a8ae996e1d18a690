"""From a base and adapters on disk to a folder: merged weights, or one adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from manylora_server.adapters.canary import POSITIONS
from manylora_server.core.errors import StorageError
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.export.base import BaseCheckpoint, open_base
from manylora_server.export.card import copied_files, copy_files, write_card, write_config
from manylora_server.export.equivalence import Comparison, doubts
from manylora_server.export.job import ExportDtype
from manylora_server.export.output import check_goal, check_room, new_folder
from manylora_server.export.plan import plan_merge
from manylora_server.export.progress import Progress
from manylora_server.export.weights import DTYPES, MAX_SHARD_BYTES, WeightFiles
from manylora_server.model.architectures import SUPPORTED_MODEL_TYPES
from manylora_store.checkpoint.folder import AdapterFiles, open_folder
from manylora_store.compiler.compile import compile_adapter
from manylora_store.export.adapter_folder import lora_content, write_lora
from manylora_store.export.combining import Combination, Member, combine
from manylora_store.export.methods import PRUNING, Recipe

# Configuration, tokenizer and card, and what file systems need for themselves.
_SLACK_BYTES = 2**20
# Loading the result and running the canaries, as a share of writing it.
_CHECK_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class WeightedFiles:
    """An adapter's files, under the name and with the weight that it takes part by."""

    name: str
    weight: float
    files: AdapterFiles


ServedLogits = Callable[[Sequence[WeightedFiles], Recipe], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base that a server has in memory; ``logits`` are those of its own route.

    ``is_source`` says that its weights are those the export is made from.
    """

    description: str
    is_source: bool
    logits: ServedLogits


@dataclass(frozen=True, slots=True)
class Export:
    """What to export: ``base`` (shown as ``model``) with ``adapters``, to the new folder ``goal``.

    ``dtype`` is ``None`` for the base's own. ``adapter_only`` writes the combination as one LoRA
    adapter and no weights of the base. ``polite`` leaves processors to others; without ``check``
    the result is not loaded and compared.
    """

    model: str
    base: Path
    adapters: Sequence[WeightedFiles]
    goal: Path
    recipe: Recipe = field(default_factory=Recipe)
    dtype: ExportDtype | None = None
    adapter_only: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    polite: bool = False
    check: bool = True


def run_export(export: Export, progress: Progress, served: ServedBase | None) -> dict[str, Any]:
    """Do it and return the report, JSON-ready.

    Peak memory is the adapters', eight MiB of rows, and the largest 4-bit matrix unpacked, where
    there is one. In the thread that calls; one of a server must be limited to one torch thread.

    Raises:
        ManyloraError: what is wrong with base, adapters, method, disk or goal.
        CancelledError: ``progress`` was cancelled. In either case nothing is left of it.
    """
    start = time.monotonic()
    check_goal(export.goal)
    with store_errors_translated(param="adapters"), _reading_told():
        base = open_base(export.base)
        members = []
        for adapter in export.adapters:
            progress.check()
            compiled = compile_adapter(adapter.files, base.layout)
            members.append(Member(adapter.name, compiled, adapter.weight))
        combination = combine(members, export.recipe, base.layout)
        report = _report(export, base, members, combination)
        if export.adapter_only:
            _write_adapter(export, base, combination, report, progress)
        else:
            _write_checkpoint(export, base, combination, report, progress, served)
    report["seconds"] = round(time.monotonic() - start, 3)
    return report


def _report(
    export: Export, base: BaseCheckpoint, members: Sequence[Member], combination: Combination
) -> dict[str, Any]:
    recipe = export.recipe
    warnings = [*recipe.unused()]
    for member in members:
        warnings += [f"adapter {member.name}: {text}" for text in member.adapter.record.warnings]
    return {
        "base": {
            "model": export.model,
            "weights": base.kind,
            "dtype": _name(base.dtype),
            "fingerprint": base.layout.fingerprint,
        },
        "adapters": [
            {
                "name": member.name,
                "digest": member.adapter.record.digest,
                "weight": member.weight,
                "peft_type": member.adapter.record.peft_type,
                "rank": member.adapter.record.rank,
            }
            for member in members
        ],
        "method": recipe.method,
        "density": recipe.kept if recipe.method in PRUNING else None,
        "rank": recipe.rank if recipe.method == "svd" else None,
        "seed": recipe.seed if recipe.method.startswith("dare") else None,
        "svd_relative_error": combination.svd_error,
        "kind": "adapter" if export.adapter_only else "checkpoint",
        "warnings": warnings,
    }


def _write_adapter(
    export: Export,
    base: BaseCheckpoint,
    combination: Combination,
    report: dict[str, Any],
    progress: Progress,
) -> None:
    dtype = "fp32" if export.dtype is None else export.dtype
    content = lora_content(
        combination.patches, base.layout, export.model, DTYPES.get(dtype, torch.float32)
    )
    progress.expect(content.bytes)
    check_room(export.goal.parent, content.bytes + _SLACK_BYTES)
    with new_folder(export.goal) as folder:
        write_lora(content, folder)
        progress.advance(content.bytes)
    report |= {"dtype": dtype, "bytes": content.bytes, "rank": content.config["r"]}


def _write_checkpoint(
    export: Export,
    base: BaseCheckpoint,
    combination: Combination,
    report: dict[str, Any],
    progress: Progress,
    served: ServedBase | None,
) -> None:
    plan = plan_merge(base, combination.patches)
    dtype: ExportDtype = export.dtype or _own_dtype(base.dtype)
    weights = WeightFiles(plan, dtype, base.dtype, export.max_shard_bytes)
    copied = sum(path.stat().st_size for path in copied_files(base.folder))
    check_room(export.goal.parent, weights.bytes + copied + _SLACK_BYTES)
    checking = int(_CHECK_SHARE * weights.data_bytes)
    progress.expect(weights.data_bytes + checking)
    report |= {
        "dtype": dtype,
        "bytes": weights.bytes,
        "shards": len(weights.shards),
        "untied": list(plan.untied),
        "added_biases": len(plan.added_biases),
    }
    with new_folder(export.goal) as folder:
        weights.write(folder, progress)
        write_config(folder, plan, weights)
        report["warnings"] += copy_files(base.folder, folder, plan)
        if dtype == "nf4" and base.converted:
            report["warnings"].append(
                "experts are kept in the base's dtype: transformers has no 4-bit form of them"
            )
        if export.check:
            report["equivalence"] = _compare(export, base, combination, folder, progress, served)
            report["warnings"] += doubts(report["equivalence"]["same_base"], dtype)
        else:
            report["equivalence"] = None
        progress.advance(checking)
        write_card(folder, report)


def _compare(
    export: Export,
    base: BaseCheckpoint,
    combination: Combination,
    folder: Path,
    progress: Progress,
    served: ServedBase | None,
) -> dict[str, Any]:
    same_in_memory = served is not None and served.is_source
    servable = base.layout.model_type in SUPPORTED_MODEL_TYPES
    vocab_size = int(base.naming.model.get_input_embeddings().weight.shape[0])
    with ExitStack() as stack:
        adapter = None
        if servable and not same_in_memory:
            scratch = stack.enter_context(TemporaryDirectory(prefix="manylora-check-"))
            adapter = _as_one_adapter(export, base, combination, Path(scratch))
        comparison = Comparison(
            folder,
            vocab_size,
            progress,
            base=export.base,
            adapter=adapter,
            polite=export.polite,
        )
    prompts = comparison.prompts
    result: dict[str, Any] = {"prompts": len(prompts), "computed_in": "float32"}
    result["positions"] = len(prompts) * len(POSITIONS)
    if served is not None:
        try:
            logits = served.logits(export.adapters, export.recipe)
            part = comparison.with_logits(served.description, logits)
        except OverflowError as error:
            # What is exported may have a wider dtype than what is served.
            part = {"skipped": str(error)}
        result["same_base" if served.is_source else "served"] = part
    if not same_in_memory:
        described = f"{base.kind} weights in float32"
        result["same_base"] = (
            comparison.with_base(described)
            if servable
            else {"skipped": f"architecture {base.layout.model_type!r} is not served"}
        )
    return result


def _as_one_adapter(
    export: Export, base: BaseCheckpoint, combination: Combination, scratch: Path
) -> AdapterFiles:
    """Return the files of an adapter that is, unmerged, what was merged."""
    alone = export.adapters[0]
    if len(export.adapters) == 1 and alone.weight == 1 and combination.svd_error is None:
        return alone.files
    write_lora(lora_content(combination.patches, base.layout, None), scratch)
    return open_folder(scratch, "combination", "")


@contextmanager
def _reading_told() -> Iterator[None]:
    """Tell what the file system says where nothing is written yet."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"MODEL or adapters: a file cannot be read: {error}.") from error


def _own_dtype(dtype: torch.dtype) -> ExportDtype:
    found: dict[torch.dtype, ExportDtype] = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
    }
    return found[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
