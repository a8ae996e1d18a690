"""What a checkpoint's folder holds besides its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manylora_server.export import nf4
from manylora_server.export.plan import MergePlan
from manylora_server.export.weights import WeightFiles

# What belongs to tokenizer and generation, by the names that transformers gives it.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_TEMPLATES = "additional_chat_templates"
# What a loader would look for code in, and what is about the original file.
_DROPPED = ("auto_map", "_name_or_path")


def write_config(folder: Path, plan: MergePlan, weights: WeightFiles) -> None:
    """Write ``config.json``."""
    config = {key: value for key, value in plan.config.items() if key not in _DROPPED}
    # transformers has had two names for it, and reads both.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(weights.dense).removeprefix("torch.")
    if weights.packed:
        config["quantization_config"] = nf4.quantization_config(weights.dense, weights.skipped)
    _write_json(folder / "config.json", config)


def copied_files(base: Path) -> list[Path]:
    """Return the files of ``base`` that the result takes over as they are."""
    found = {path for pattern in _COPIED for path in base.glob(pattern) if path.is_file()}
    found |= {path for path in (base / _TEMPLATES).glob("*") if path.is_file()}
    return sorted(found)


def copy_files(base: Path, folder: Path, plan: MergePlan) -> list[str]:
    """Copy tokenizer, chat template and generation config; return what was not there to copy."""
    for path in copied_files(base):
        target = folder / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if not (folder / "generation_config.json").is_file():
        # What a loader would make of the configuration itself.
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(plan.naming.model.config).save_pretrained(folder)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return ["the base's folder holds no tokenizer, so the export has none"]
    return []


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``README.md``: base, adapters, digests, weights, method, and how exact it is."""
    from huggingface_hub import ModelCard, ModelCardData

    base = report["base"]
    quantized = report["dtype"] == "nf4"
    data = ModelCardData(
        base_model=base["model"],
        base_model_relation="quantized" if quantized else "merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "lora"],
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{_body(report)}\n"
    ModelCard(content, ignore_metadata_errors=True).save(folder / "README.md")


def _body(report: Mapping[str, Any]) -> str:
    base = report["base"]
    rows = [
        f"| {_cell(a['name'])} | {a['weight']:g} | {a['peft_type']} | {a['rank']} "
        f"| `{a['digest']}` |"
        for a in report["adapters"]
    ]
    settings = [f"`{report['method']}`"]
    settings += [
        f"{name} {report[name]}" for name in ("density", "rank", "seed") if report[name] is not None
    ]
    lines = [
        f"# {_cell(base['model'])} with {', '.join(_cell(a['name']) for a in report['adapters'])}",
        "",
        "Adapters merged into the weights of their base model. Load it as any other checkpoint.",
        "",
        f"- **Base:** {_cell(base['model'])} ({base['weights']} weights, {base['dtype']}; "
        f"fingerprint `{base['fingerprint']}`)",
        f"- **Method:** {', '.join(settings)}",
        f"- **Dtype:** {report['dtype']}",
        "",
        "| adapter | weight | type | rank | digest (SHA-256) |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Equivalence",
        "",
        *_equivalence(report["equivalence"]),
    ]
    if report["warnings"]:
        lines += ["", "## Notes", "", *(f"- {_cell(w)}" for w in report["warnings"])]
    return "\n".join(lines)


def _equivalence(equivalence: Mapping[str, Any] | None) -> list[str]:
    if equivalence is None:
        return ["Not measured."]
    lines = [
        "Logits of this checkpoint, loaded anew, against base and adapters unmerged, on "
        f"{equivalence['positions']} positions of {equivalence['prompts']} prompts of random "
        "tokens:",
        "",
    ]
    for key, title in (("same_base", "the base it was made from"), ("served", "as it was served")):
        part = equivalence.get(key)
        if part is None:
            continue
        if "skipped" in part:
            lines.append(f"- {title}: not compared ({_cell(part['skipped'])})")
            continue
        lines.append(
            f"- {title} ({part['base']}): largest difference {part['max_abs_error']:.2e}, relative "
            f"to the logits' range {part['max_relative_error']:.2e}; KL divergence at most "
            f"{part['max_kl']:.2e}; same first choice at {part['top1_agreement']:.1%} of positions"
        )
    return lines


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
