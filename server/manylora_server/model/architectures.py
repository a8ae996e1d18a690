"""Which decoders are served: those seen to give the model's own numbers through our route.

transformers' own flag for attention interfaces is no guarantee in either direction, so this is a
list of model types whose tests pass; the self-test at load checks the checkpoint at hand besides.
"""

from __future__ import annotations

SUPPORTED_MODEL_TYPES = frozenset(
    {
        "cohere2",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo2",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
