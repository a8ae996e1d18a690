"""Puts an engine together from a server's settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from manylora_kernels import gpu, native, nf4_linear_in_float, selected_backend
from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.adapters.host_tier import HostTier
from manylora_server.adapters.intake import Intake
from manylora_server.adapters.receipt import ReceiptMeter
from manylora_server.adapters.residency import Residency
from manylora_server.adapters.twins.job import Base
from manylora_server.adapters.twins.policy import AutoMerge
from manylora_server.adapters.twins.twins import Twins
from manylora_server.core.config import EngineConfig, ModelConfig, ServerConfig
from manylora_server.core.errors import ManyloraError, StartupError
from manylora_server.core.observer import EngineObserver
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.engine.engine import Engine
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.limits import EngineLimits
from manylora_server.engine.thread import EngineThread
from manylora_server.export.jobs import ExportService
from manylora_server.model.attention import KVCache
from manylora_server.model.base_view import BaseView
from manylora_server.model.compute_backends import select_compiled_backends
from manylora_server.model.cuda_graphs import DecodeGraphs
from manylora_server.model.loader import LoadedModel, load_model, resolve_device
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.program.attach import attach_program
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import SelfTestResult, run_self_test
from manylora_server.model.slots import AdapterSlots
from manylora_server.model.tokenizer import Tokenizer
from manylora_store.errors import StoreError
from manylora_store.store import AdapterStore

if TYPE_CHECKING:
    from manylora_server.export.export import ServedBase

logger = logging.getLogger(__name__)

# Of the memory that is free once the base is loaded.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.8}
_HOST_SHARE = 0.1
_MERGE_SHARE = {"cpu": 0.25, "cuda": 0.1}


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
    device = resolve_device(model_config.device)
    check_cpu_math(model_config, device)
    # Before loading: a backend may want the weights in a layout of its own.
    select_compiled_backends(device, model_config.cpu_math)
    loaded = load_model(model_config)
    if loaded.quantization == "nf4":
        _log_4bit_backend(loaded.device)
    with nf4_linear_in_float():  # which finds what rounding would hide
        tested = run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, loaded.device)
    logger.info("self-test passed: largest relative logit error %.1e", tested.error)
    store = open_store(config)
    try:
        view = BaseView(loaded.model)
        meter = ReceiptMeter(loaded, tested, view)
        intake = Intake(store, loaded.layout, meter, loaded.dtype, loaded.device)
        for name, source in config.adapters:
            register(intake, name, source)
        return assemble(
            loaded,
            tested,
            view,
            intake,
            Tokenizer.from_folder(loaded.folder),
            model_config.served_name,
            config.engine,
            observer,
            thread,
            lambda engine: _exports(config, loaded.folder, meter, engine),
        )
    except BaseException:
        store.close()
        raise


def open_store(config: ServerConfig) -> AdapterStore:
    """Open the registry and the blobs; ``StartupError`` says why they cannot be."""
    settings = config.store
    try:
        return AdapterStore(
            config.home,
            registry_url=settings.registry_url,
            blobs_url=settings.blobs_url,
            max_adapter_bytes=settings.max_adapter_bytes,
        )
    except StoreError as error:
        raise StartupError(f"--home {config.home}: {error.message}", param="--home") from error


def register(intake: Intake, name: str, source: str) -> None:
    """Register what ``--adapter`` names; ``StartupError`` says what is wrong with it."""
    try:
        record = intake.register(name, source)
    except ManyloraError as error:
        raise StartupError(
            f"--adapter {name}={source}: {error.message}", param="--adapter"
        ) from error
    for warning in record.warnings:
        logger.warning("adapter %s: %s", name, warning)


def assemble(
    loaded: LoadedModel,
    tested: SelfTestResult,
    view: BaseView,
    intake: Intake,
    tokenizer: Tokenizer,
    name: str,
    config: EngineConfig,
    observer: EngineObserver,
    thread: EngineThread,
    exports: Callable[[AsyncEngine], ExportService] | None = None,
) -> AsyncEngine:
    """Return an engine over a loaded and tested base."""
    max_model_len = min(config.max_model_len or loaded.max_positions, loaded.max_positions)
    if config.max_model_len is not None and config.max_model_len > loaded.max_positions:
        raise StartupError(
            f"--max-model-len {config.max_model_len} is more than the model's "
            f"{loaded.max_positions} positions.",
            param="--max-model-len",
        )
    merge_bytes = config.merge_bytes
    if merge_bytes is None:
        merge_bytes = int(_free_bytes(loaded.device) * _MERGE_SHARE[loaded.device.type])
    num_blocks = _num_blocks(loaded, tested, config, max_model_len)
    cache = KVCache(tested.shapes, num_blocks, config.kv_block_tokens, loaded.dtype, loaded.device)
    blocks = KVBlocks(num_blocks, config.kv_block_tokens, prefix_cache=config.prefix_cache)
    modules = AdaptedModules(
        loaded.model, loaded.layout, tested.token_axes, loaded.dtype, loaded.device
    )
    slots = AdapterSlots(modules, config.adapter_slots, observer.on_adapter_eviction)
    host_bytes = config.adapter_host_bytes
    if host_bytes is None:
        host_bytes = int(psutil.virtual_memory().available * _HOST_SHARE)
    host = HostTier(intake.load, host_bytes, observer, intake.warm_up)
    residency = Residency(slots, host, observer)
    catalog = AdapterCatalog(intake.store, intake.base_fingerprint)
    residency.pin(catalog.pinned())
    observer.on_registered(len(catalog))
    runner = ModelRunner(loaded.model, cache, loaded.dtype, loaded.device)
    if loaded.device.type == "cuda" and selected_backend("lora_delta_") == gpu.TRITON:
        runner.graphs = DecodeGraphs(
            loaded.model, cache, lambda: modules.wrapped, loaded.dtype, loaded.device
        )
    policy = AutoMerge() if config.auto_merge else None
    base = Base(loaded, tested, view, modules, runner)
    engine = Engine(
        runner=runner,
        blocks=blocks,
        residency=residency,
        decoder=tokenizer,
        eos_token_ids=loaded.eos_token_ids,
        max_model_len=max_model_len,
        config=config,
        observer=observer,
        twins=Twins(base, residency, merge_bytes, observer, policy),
    )
    limits = EngineLimits(
        max_model_len=max_model_len,
        max_cached_tokens=blocks.capacity * config.kv_block_tokens,
        vocab_size=loaded.vocab_size,
        max_unfinished=config.max_queue + config.max_sequences,
        adapter_slots=config.adapter_slots,
    )
    logger.info(
        "KV cache: %d blocks of %d tokens; context %d tokens; %d adapters registered, %d slots, "
        "%d MiB of host memory for them",
        blocks.capacity,
        config.kv_block_tokens,
        max_model_len,
        len(catalog),
        config.adapter_slots,
        host_bytes // 1024**2,
    )
    return AsyncEngine(
        engine,
        catalog,
        intake,
        tokenizer,
        name,
        limits,
        thread,
        prepare=lambda: attach_program(runner, loaded, tested, modules),
        exports=exports,
    )


def _exports(
    config: ServerConfig, base: Path, meter: ReceiptMeter, engine: AsyncEngine
) -> ExportService:
    def served() -> ServedBase:
        # Compiles adapters, which takes PEFT: not before the first export.
        from manylora_server.export.served import served_base

        return served_base(meter, engine)

    name = config.model.served_name
    return ExportService(config.home / "exports", base, name, engine.adapters, served)


def check_cpu_math(config: ModelConfig, device: torch.device) -> None:
    """Refuse ``--cpu-math int8`` where nothing would be computed that way."""
    if config.cpu_math == "float32":
        return
    if config.quantization == "none":
        reason = "is for a base in 4 bits, and --quantization none keeps it dense"
    elif device.type != "cpu":
        reason = f"is for CPUs, and this server computes on {device.type}"
    elif native.missing is not None:
        reason = f"needs the native kernels, but {native.missing}"
    else:
        return
    raise StartupError(f"--cpu-math {config.cpu_math} {reason}.", param="--cpu-math")


def _log_4bit_backend(device: torch.device) -> None:
    if device.type != "cpu":
        return
    if native.missing is None:
        math = "int8" if selected_backend("nf4_linear") == native.NATIVE_INT8 else "float32"
        logger.info("4-bit layers: native kernels, %s, %s", native.library.isa, math)
    else:
        logger.warning(
            "4-bit layers: unpacked by bitsandbytes at every step, which is many times slower than "
            "the native kernels, but %s",
            native.missing,
        )


def _num_blocks(
    loaded: LoadedModel, tested: SelfTestResult, config: EngineConfig, max_model_len: int
) -> int:
    """Return how many blocks fit the memory, the reserved one included."""
    per_block = KVCache.bytes_per_block(tested.shapes, config.kv_block_tokens, loaded.dtype)
    # More than every running sequence at full length can use would only be waste.
    most = config.max_sequences * -(-max_model_len // config.kv_block_tokens) + 1
    memory = config.kv_cache_bytes
    if memory is None:
        memory = int(_free_bytes(loaded.device) * _KV_SHARE[loaded.device.type])
    count = min(most, memory // per_block)
    if count < 2:
        raise StartupError(
            f"--kv-cache-memory: {memory} bytes hold no block of {config.kv_block_tokens} tokens; "
            f"at least {2 * per_block} bytes are needed.",
            param="--kv-cache-memory",
        )
    return int(count)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
