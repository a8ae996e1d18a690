"""Settings of a server, fixed at start-up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from platformdirs import user_data_path

from manylora_server.core.errors import StartupError

Quantization = Literal["nf4", "none"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
CpuMath = Literal["float32", "int8"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, option: str) -> int:
    """Return the bytes that ``text`` (``512MiB``, ``4G``, ``1000000``) stands for.

    Units are powers of 1,024 with or without the ``i``. Raises ``StartupError`` naming ``option``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise StartupError(
            f"{option}: {text!r} is not a size; write a number of bytes or, for example, "
            "512MiB or 4GiB.",
            param=option,
        )
    size = int(float(match[1]) * 1024 ** _UNITS[match[2].lower()])
    if size < 1:
        raise StartupError(f"{option}: {text!r} is less than one byte.", param=option)
    return size


def default_home() -> Path:
    """Return where this user's manylora keeps its files."""
    return user_data_path("manylora", appauthor=False)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which base to load, how to hold it, and what 4-bit layers compute in on a CPU.

    ``cpu_math`` is ``int8``: activations are rounded to eight bits (``docs/decisions/0012``).
    """

    model: str
    served_name: str
    quantization: Quantization = "nf4"
    dtype: DTypeName = "auto"
    device: DeviceName = "auto"
    cpu_math: CpuMath = "float32"
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the engine.

    ``max_batch_tokens`` bounds the tokens of one step (prefill and decode together),
    ``max_sequences`` the running sequences, ``max_queue`` the requests that wait;
    ``kv_cache_bytes`` the memory of the paged KV cache (``None``: a share of what is free);
    ``adapter_slots`` the adapters resident on the device at once, ``adapter_host_bytes`` the host
    memory for compiled adapters (``None``: a share of what is free). ``merge_bytes`` is the memory
    for merged twins (``None``: a share of what is free); with ``auto_merge`` the server merges what
    pays by itself.
    """

    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_queue: int = 1024
    kv_cache_bytes: int | None = None
    kv_block_tokens: int = 16
    prefix_cache: bool = True
    adapter_slots: int = 16
    adapter_host_bytes: int | None = None
    merge_bytes: int | None = None
    auto_merge: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_batch_tokens",
            "max_sequences",
            "max_queue",
            "kv_block_tokens",
            "adapter_slots",
        ):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise StartupError(
                    f"{option} must be at least 1, got {getattr(self, name)}.", param=option
                )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise StartupError(
                f"--max-model-len must be at least 2, got {self.max_model_len}.",
                param="--max-model-len",
            )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where adapters are kept: a database by SQLAlchemy URL, files by fsspec URL.

    ``None`` is SQLite and local files in the server's home. ``max_adapter_bytes`` bounds one
    adapter's files.
    """

    registry_url: str | None = None
    blobs_url: str | None = None
    max_adapter_bytes: int = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Where and how to listen. Keys are the files' lines; empty means no key is asked for."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024**2
    shutdown_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything ``manylora serve`` was told."""

    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    home: Path = field(default_factory=default_home)
    adapters: tuple[tuple[str, str], ...] = ()
