"""Puts an engine together from a server's settings."""

from __future__ import annotations

import logging
from dataclasses import replace

import psutil
import torch

from manylora_kernels import available_backends, select_backend
from manylora_server.core.config import EngineConfig, ServerConfig
from manylora_server.core.errors import ManyloraError, StartupError
from manylora_server.core.observer import EngineObserver
from manylora_server.engine.async_engine import AsyncEngine, EngineLimits
from manylora_server.engine.catalog import AdapterCatalog
from manylora_server.engine.engine import Engine
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.thread import EngineThread
from manylora_server.model.attention import KVCache
from manylora_server.model.loader import LoadedModel, load_model
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import SelfTestResult, run_self_test
from manylora_server.model.slots import AdapterSlots
from manylora_server.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Of the memory that is free once the base is loaded.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.8}


def build_engine(config: ServerConfig, observer: EngineObserver) -> AsyncEngine:
    """Load the base, test it, compile the adapters and return an engine that is not yet started.

    Raises ``StartupError`` with what is wrong and what would be right.
    """
    thread = EngineThread()
    try:
        return thread.call(lambda: _build(config, observer, thread))
    except BaseException:
        thread.finish_with(lambda: None)
        raise


def _build(config: ServerConfig, observer: EngineObserver, thread: EngineThread) -> AsyncEngine:
    model_config = config.model
    if model_config.cache_dir is None:
        model_config = replace(model_config, cache_dir=config.home / "quantized")
    loaded = load_model(model_config)
    select_compiled_backends()
    tested = run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, loaded.device)
    logger.info("self-test passed: largest relative logit error %.1e", tested.error)
    adapters = AdapterCatalog(loaded.layout)
    for name, source in config.adapters:
        try:
            record = adapters.add_folder(name, source)
        except StartupError:
            raise
        except ManyloraError as error:
            raise StartupError(
                f"--adapter {name}={source}: {error.message}", param="--adapter"
            ) from error
        for warning in record.warnings:
            logger.warning("adapter %s: %s", name, warning)
    return assemble(
        loaded,
        tested,
        adapters,
        Tokenizer.from_folder(loaded.folder),
        model_config.served_name,
        config.engine,
        observer,
        thread,
    )


def assemble(
    loaded: LoadedModel,
    tested: SelfTestResult,
    adapters: AdapterCatalog,
    tokenizer: Tokenizer,
    name: str,
    config: EngineConfig,
    observer: EngineObserver,
    thread: EngineThread,
) -> AsyncEngine:
    """Return an engine over a loaded and tested base."""
    max_model_len = min(config.max_model_len or loaded.max_positions, loaded.max_positions)
    if config.max_model_len is not None and config.max_model_len > loaded.max_positions:
        raise StartupError(
            f"--max-model-len {config.max_model_len} is more than the model's "
            f"{loaded.max_positions} positions.",
            param="--max-model-len",
        )
    num_blocks = _num_blocks(loaded, tested, config, max_model_len)
    cache = KVCache(tested.shapes, num_blocks, config.kv_block_tokens, loaded.dtype, loaded.device)
    blocks = KVBlocks(num_blocks, config.kv_block_tokens, prefix_cache=config.prefix_cache)
    modules = AdaptedModules(
        loaded.model, loaded.layout, tested.token_axes, loaded.dtype, loaded.device
    )
    slots = AdapterSlots(modules, config.adapter_slots, observer.on_adapter_eviction)
    engine = Engine(
        runner=ModelRunner(loaded.model, cache, loaded.dtype, loaded.device),
        blocks=blocks,
        slots=slots,
        load=adapters.loader,
        decoder=tokenizer,
        eos_token_ids=loaded.eos_token_ids,
        max_model_len=max_model_len,
        config=config,
        observer=observer,
        host_adapters=lambda: len(adapters),
    )
    limits = EngineLimits(
        max_model_len=max_model_len,
        max_cached_tokens=blocks.capacity * config.kv_block_tokens,
        vocab_size=loaded.vocab_size,
        max_unfinished=config.max_queue + config.max_sequences,
    )
    logger.info(
        "KV cache: %d blocks of %d tokens; context %d tokens; %d adapter slots",
        blocks.capacity,
        config.kv_block_tokens,
        max_model_len,
        config.adapter_slots,
    )
    return AsyncEngine(engine, adapters, tokenizer, name, limits, thread)


def select_compiled_backends() -> None:
    """Let bitsandbytes' compiled operator unpack 4-bit weights where the package has one."""
    if "bitsandbytes" in available_backends("nf4_linear"):
        import bitsandbytes  # noqa: F401 - registers the operator

        select_backend("nf4_linear", "bitsandbytes")


def _num_blocks(
    loaded: LoadedModel, tested: SelfTestResult, config: EngineConfig, max_model_len: int
) -> int:
    """Return how many blocks fit the memory, the reserved one included."""
    per_block = KVCache.bytes_per_block(tested.shapes, config.kv_block_tokens, loaded.dtype)
    # More than every running sequence at full length can use would only be waste.
    most = config.max_sequences * -(-max_model_len // config.kv_block_tokens) + 1
    memory = config.kv_cache_bytes
    if memory is None:
        if loaded.device.type == "cuda":
            free = torch.cuda.mem_get_info(loaded.device)[0]
        else:
            free = psutil.virtual_memory().available
        memory = int(free * _KV_SHARE[loaded.device.type])
    count = min(most, memory // per_block)
    if count < 2:
        raise StartupError(
            f"--kv-cache-memory: {memory} bytes hold no block of {config.kv_block_tokens} tokens; "
            f"at least {2 * per_block} bytes are needed.",
            param="--kv-cache-memory",
        )
    return int(count)
