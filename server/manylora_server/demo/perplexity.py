"""What eight-bit activations cost: perplexity of the demo's base over tales that it never saw.

    python -m manylora_server.demo.perplexity

Prints the perplexity of the dense base, of the base in NF4, and of the latter in eight bits, and
how far the latter's logits are from NF4's in float32: the root mean square of the differences over
that of the logits, each position's mean removed from both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import cross_entropy

from manylora_kernels import native, select_backend
from manylora_server.core.config import ModelConfig
from manylora_server.demo import BASE_DIR
from manylora_server.demo.corpus import PLAIN, draw_sample
from manylora_server.model.compute_backends import select_compiled_backends
from manylora_server.model.loader import load_model
from manylora_server.model.tokenizer import Tokenizer

SEED = 20260101  # the training's is another one


@torch.inference_mode()
def logits_of(model: torch.nn.Module, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return each text's next-token logits ``[tokens - 1, vocabulary]``."""
    return [model(input_ids=torch.tensor([t]), use_cache=False).logits[0, :-1] for t in texts]


def perplexity(logits: list[torch.Tensor], texts: list[list[int]]) -> float:
    """Return the exponential of the mean loss a token."""
    losses = [
        cross_entropy(rows.double(), torch.tensor(text[1:]), reduction="none")
        for rows, text in zip(logits, texts, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tales", type=int, default=300)
    tales = parser.parse_args().tales
    if native.missing is not None:
        raise SystemExit(f"no native kernels: {native.missing}")
    rng, tokenizer = Random(SEED), Tokenizer.from_folder(BASE_DIR)
    texts = [list(tokenizer.encode(draw_sample(rng, PLAIN).text)) for _ in range(tales)]
    select_compiled_backends(torch.device("cpu"))
    with TemporaryDirectory() as cache:
        config = ModelConfig(str(BASE_DIR), "demo", device="cpu", cache_dir=Path(cache))
        packed = load_model(config).model
    dense = load_model(ModelConfig(str(BASE_DIR), "demo", quantization="none", device="cpu")).model
    in_float = logits_of(packed, texts)
    select_backend("nf4_linear", native.NATIVE_INT8)
    in_int8 = logits_of(packed, texts)
    print(f"{tales} tales, {sum(map(len, texts))} tokens")
    print(f"dense float32  {perplexity(logits_of(dense, texts), texts):.4f}")
    print(f"NF4, float32   {perplexity(in_float, texts):.4f}")
    print(f"NF4, int8      {perplexity(in_int8, texts):.4f}")
    reference, other = torch.cat(in_float).double(), torch.cat(in_int8).double()
    reference, other = (rows - rows.mean(1, keepdim=True) for rows in (reference, other))
    agreement = (reference.argmax(1) == other.argmax(1)).double().mean()
    error = float((other - reference).norm() / reference.norm())
    print(f"logits: relative error {error:.2e}, the same first choice at {agreement:.2%}")


if __name__ == "__main__":
    main()
