"""Makes every asset of the demo again: `python -m manylora_server.demo.train --output DIR`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from manylora_server.demo.tokenizer import train_tokenizer
from manylora_server.demo.train_adapters import ADAPTERS, train_adapter
from manylora_server.demo.train_base import train_base

logger = logging.getLogger(__name__)

BASE = "base"


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer under the class name that every transformers version knows."""
    tokenizer.save_pretrained(folder)
    name = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _edit_json(folder / "tokenizer_config.json", lambda config: config.update(name))


def make_base(output: Path, seed: int) -> None:
    """Train tokenizer and base into `output`/base."""
    folder = output / BASE
    tokenizer = train_tokenizer(seed)
    save_tokenizer(tokenizer, folder)
    train_base(tokenizer, seed).save_pretrained(folder)
    logger.info("wrote %s", folder)


def make_adapter(name: str, output: Path, seed: int) -> None:
    """Train one adapter on the base in `output` into `output`/adapters/`name`."""
    folder = output / "adapters" / name
    base = LlamaForCausalLM.from_pretrained(output / BASE)
    tokenizer = AutoTokenizer.from_pretrained(output / BASE)
    adapter = train_adapter(name, base, tokenizer, seed)
    adapter.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    _edit_json(folder / "adapter_config.json", lambda config: config["target_modules"].sort())
    logger.info("wrote %s", folder)


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    edit(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train what it asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora_server.demo.train", description=__doc__
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[BASE, *ADAPTERS],
        default=[BASE, *ADAPTERS],
        help="parts to train (adapters need the base in the output folder)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (assets: 1)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if BASE in options.only:
        make_base(options.output, options.seed)
    for name in ADAPTERS:
        if name in options.only:
            make_adapter(name, options.output, options.seed)


if __name__ == "__main__":
    main()
