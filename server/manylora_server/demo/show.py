"""Prints what the demo writes, to be read by a person: `python -m manylora_server.demo.show`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from manylora_server.demo import DEMO_PROMPT

PROMPTS = (
    DEMO_PROMPT,
    "Long ago",
    "One rainy night",
    "Once upon a time there was a small fox named Nell who lived by the river.",
    "In a land far away there lived a brave",
)


def load(assets: Path, nf4: bool) -> Any:
    """The base, dense or as the server holds it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        assets / "base",
        dtype=torch.float32,
        quantization_config=quantization if nf4 else None,
    ).eval()


def complete(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, greedy: bool
) -> list[str]:
    """`count` completions of `prompt`, each with its prompt; an unfinished one ends in [...]."""
    inputs = tokenizer([prompt] * count, return_tensors="pt", return_token_type_ids=False)
    choice: dict[str, Any] = {"do_sample": False}
    if not greedy:
        choice = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    with torch.inference_mode():
        output = model.generate(**inputs, **choice, max_new_tokens=250)
    ended = (output == tokenizer.convert_tokens_to_ids(tokenizer.eos_token)).any(dim=1)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        text if end else f"{text} [...]" for text, end in zip(texts, ended.tolist(), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print completions of the base, then of every adapter."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora_server.demo.show", description=__doc__
    )
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--nf4", action="store_true", help="round the base to 4 bits")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--count", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--prompt", action="append", help="instead of the usual ones; repeatable")
    parser.add_argument("--only", nargs="+", help="base or names of adapters")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.assets / "base")
    names = ["base", *sorted(path.name for path in (options.assets / "adapters").glob("*"))]
    for name in names:
        if options.only and name not in options.only:
            continue
        model = load(options.assets, options.nf4)
        if name != "base":
            model = PeftModel.from_pretrained(model, options.assets / "adapters" / name).eval()
        torch.manual_seed(options.seed)
        print(f"== {name}")
        for prompt in options.prompt or PROMPTS:
            for text in complete(model, tokenizer, prompt, options.count, options.greedy):
                print(f"-- {text}")


if __name__ == "__main__":
    main()
