"""The same requests through transformers and PEFT: a static batch with ``adapter_names``.

Run as a process of its own (``python -m loadtests.peft_baseline MODEL``), which answers one line
of JSON on stdout for each line of JSON on stdin, until stdin ends:

    {"op": "generate", "prompts": [[…]], "adapters": [folder or null, …], "counts": [n, …]}
        → {"seconds": s, "tokens": [[…]]}
    {"op": "gap", "prompt": […], "adapter": folder or null, "pair": [i, j]}
        → {"gap": |logit_i - logit_j| / max |logit|}
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BaseKind = Literal["float32", "nf4-rounded", "nf4"]

# PEFT's own name for "no adapter" in a mixed batch.
_NO_ADAPTER = "__base__"
_BATCH = 16


class PeftBaseline:
    """A plain base and, beside it, one that PEFT has put adapters on.

    ``kind``: ``float32`` as stored; ``nf4-rounded`` holds in float32 the values that 4-bit storage
    can hold, for exact comparisons at float32's speed; ``nf4`` is bitsandbytes' own 4-bit layer.
    """

    def __init__(self, folder: Path, kind: BaseKind) -> None:
        self._folder = folder
        self._kind = kind
        self._plain = load_base(folder, kind)
        self._adapted: Any = None
        self._names: dict[str, str] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        counts: Sequence[int],
    ) -> tuple[float, list[list[int]]]:
        """Return the seconds that greedy generation took and each prompt's new tokens.

        Static batches of 16, left-padded; a batch runs until its longest answer is complete.
        Without any adapter the plain base runs, else PEFT's mixed batch.
        """
        names = [self._load(adapter) for adapter in adapters]
        mixed = any(adapter is not None for adapter in adapters)
        tokens: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), _BATCH):
            rows = slice(first, first + _BATCH)
            tokens += self._batch(prompts[rows], names[rows] if mixed else None, counts[rows])
        return time.perf_counter() - start, tokens

    @torch.inference_mode()
    def gap(self, prompt: Sequence[int], adapter: str | None, pair: Sequence[int]) -> float:
        """Return how far two candidates for the token after ``prompt`` are apart.

        The distance of their logits relative to the largest logit, computed without a batch.
        """
        name = self._load(adapter)
        model = self._plain
        if adapter is not None:
            model = self._adapted
            model.set_adapter(name)
        logits = model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1]
        return float((logits[pair[0]] - logits[pair[1]]).abs() / logits.abs().max())

    def _load(self, folder: str | None) -> str:
        """Return PEFT's name for the adapter, loaded on first use."""
        if folder is None:
            return _NO_ADAPTER
        if folder not in self._names:
            name = f"adapter{len(self._names)}"
            if self._adapted is None:
                base = load_base(self._folder, self._kind)
                self._adapted = PeftModel.from_pretrained(base, folder, name).eval()
            else:
                self._adapted.load_adapter(folder, name)
            self._names[folder] = name
        return self._names[folder]

    @torch.inference_mode()
    def _batch(
        self, prompts: Sequence[Sequence[int]], names: list[str] | None, counts: Sequence[int]
    ) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        model = self._plain if names is None else self._adapted
        extra = {} if names is None else {"adapter_names": names}
        output = model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max(counts),
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        answers = output[:, width:].tolist()
        return [answer[:count] for answer, count in zip(answers, counts, strict=True)]


def load_base(folder: Path, kind: BaseKind) -> Any:
    """Load the base with float32 arithmetic."""
    if kind != "nf4":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if kind == "nf4-rounded":
            _round_to_nf4(model)
        return model
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()


def _round_to_nf4(model: Any) -> None:
    """Replace every linear weight but the output layer's by what NF4 keeps of it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = dequantize_4bit(packed, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--base", choices=get_args(BaseKind), default="float32")
    arguments = parser.parse_args()
    # Whatever a library prints must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    baseline = PeftBaseline(arguments.model, arguments.base)
    for line in sys.stdin:
        message = json.loads(line)
        if message.pop("op") == "gap":
            answer: dict[str, Any] = {"gap": baseline.gap(**message)}
        else:
            seconds, tokens = baseline.generate(**message)
            answer = {"seconds": seconds, "tokens": tokens}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
