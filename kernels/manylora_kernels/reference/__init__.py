"""The plain PyTorch backend: the oracle of every other backend, and what runs without them."""

from manylora_kernels.reference import attention, half, int8, int8_rows, linear, lora

__all__ = ["attention", "half", "int8", "int8_rows", "linear", "lora"]
