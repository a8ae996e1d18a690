"""At load: the model through our route against the model as transformers runs it.

A handful of tokens of two sequences, in chunks that mix prefill and decode, must give the logits
of the model's own eager attention. An architecture for which they do not is refused at start-up,
not found out by its users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from manylora_server.core.errors import StartupError
from manylora_server.model.attention import IMPLEMENTATION, KVCache, LayerShape, ShapeProbe
from manylora_server.model.batch import Chunk
from manylora_server.model.context import ForwardContext, empty_segments, forward_context
from manylora_server.model.runner import ModelRunner

_BLOCK_TOKENS = 4
_LENGTHS = (11, 7)
# Steps as (sequence, start, end); the third decodes one sequence while the other prefills.
_STEPS = (
    ((0, 0, 6),),
    ((0, 6, 10), (1, 0, 3)),
    ((0, 10, 11), (1, 3, 6)),
    ((1, 6, 7),),
)


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """What the test learned.

    Each attention layer's KV shapes; for each norm, by name, the axis of its input that counts
    tokens; and the relative logit error: the largest in float32, the median token's in 16 bits.
    """

    shapes: dict[int, LayerShape]
    token_axes: dict[str, int]
    error: float


@torch.inference_mode()
def run_self_test(
    model: Any, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> SelfTestResult:
    """Switch ``model`` to our attention and return the test's result.

    Raises ``StartupError`` if the model cannot be switched or its logits differ by more than the
    dtype's rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(vocab_size, (length,), generator=generator).tolist() for length in _LENGTHS
    ]
    name = model.config.model_type
    model.set_attn_implementation("eager")
    expected = [
        model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()
        for tokens in sequences
    ]
    model.set_attn_implementation(IMPLEMENTATION)
    probe = ShapeProbe()
    token_axes = _probe(model, probe, vocab_size, device)
    if not probe.shapes:
        raise StartupError(
            f"architecture {name!r} does not call transformers' attention interface."
        )
    blocks = [[1, 2, 3], [4, 5]]
    cache = KVCache(probe.shapes, 6, _BLOCK_TOKENS, dtype, device)
    runner = ModelRunner(model, cache, dtype, device)
    errors: list[float] = []
    for step in _STEPS:
        chunks = [
            Chunk(
                token_ids=sequences[index][start:end],
                start=start,
                block_table=blocks[index][: -(-end // _BLOCK_TOKENS)],
                adapters=(),
                sample=True,
            )
            for index, start, end in step
        ]
        logits = runner.logits(chunks)
        for row, (index, _, end) in zip(logits, step, strict=True):
            errors.append(relative_error(row, expected[index][end - 1]))
    # In 16 bits a router's near-tie may fall the other way for a token. What is wired wrongly is
    # wrong for all of them, so there the median decides.
    error = max(errors) if dtype == torch.float32 else median(errors)
    limit = 1e-3 if dtype == torch.float32 else 6e-2
    if not error <= limit:
        raise StartupError(
            f"architecture {name!r}: logits through the server's attention differ from the "
            f"model's own by {error:.2e} of their range (allowed: {limit:.0e}). This checkpoint "
            "would be served wrongly."
        )
    return SelfTestResult(probe.shapes, token_axes, error)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the range of ``expected``; infinity for NaN."""
    scale = expected.abs().max().clamp_min(1e-6)
    difference = float((got - expected).abs().max() / scale)
    return difference if math.isfinite(difference) else math.inf


def _probe(model: Any, probe: ShapeProbe, vocab_size: int, device: torch.device) -> dict[str, int]:
    """Run a few tokens past ``probe``; return the axis of each norm's input that counts them."""
    # A number that is no model's count of heads, so that the token axis cannot be mistaken.
    count = 17
    axes: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:

            def record(_: Any, inputs: tuple[torch.Tensor], *, name: str = name) -> None:
                if count in inputs[0].shape:
                    axes[name] = inputs[0].shape.index(count)

            hooks.append(module.register_forward_pre_hook(record))
    ids = torch.arange(count, device=device)[None] % vocab_size
    positions = torch.arange(count, device=device)[None]
    try:
        with forward_context(ForwardContext(probe, empty_segments(count), empty_segments(count))):
            model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return axes
