"""``manylora serve``."""

from __future__ import annotations

import ipaddress
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.cli import options
from manylora_server.cli.http_server import address_of, bind, run_server
from manylora_server.cli.keys import read_keys
from manylora_server.cli.logs import announce, configure_logging, startup_errors_reported
from manylora_server.core.collector import collector_paused
from manylora_server.core.config import (
    EngineConfig,
    HttpConfig,
    ModelConfig,
    ServerConfig,
    StoreConfig,
    default_home,
)
from manylora_server.model.deferred_compiler import compiler_deferred
from manylora_server.model.lean_imports import import_transformers

if TYPE_CHECKING:
    import socket

    from manylora_server.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

_DEFAULTS = EngineConfig()
_STORE = StoreConfig()


def serve(
    model: options.Model,
    adapter: options.Adapters = [],  # noqa: B006 - typer reads it, nobody writes to it
    home: options.Home = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    served_model_name: options.ServedModelName = None,
    quantization: options.QuantizationOption = "nf4",
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    cpu_math: options.CpuMathOption = "float32",
    max_model_len: options.MaxModelLen = None,
    max_batch_tokens: options.MaxBatchTokens = _DEFAULTS.max_batch_tokens,
    max_sequences: options.MaxSequences = _DEFAULTS.max_sequences,
    kv_cache_memory: options.KvCacheMemory = None,
    adapter_slots: options.AdapterSlots = _DEFAULTS.adapter_slots,
    adapter_host_memory: options.AdapterHostMemory = None,
    max_adapter_size: options.MaxAdapterSize = None,
    merge_memory: options.MergeMemory = None,
    auto_merge: options.AutoMerge = False,
    registry_url: options.RegistryUrl = None,
    blobs_url: options.BlobsUrl = None,
    api_key_file: options.ApiKeyFile = None,
    admin_key_file: options.AdminKeyFile = None,
    log_format: options.LogFormatOption = "text",
) -> None:
    """Serve a base model and its adapters over HTTP."""
    adapters = options.parse_adapters(adapter)
    configure_logging(log_format)
    with startup_errors_reported():
        http = HttpConfig(
            host=host,
            port=port,
            api_keys=read_keys(api_key_file, "--api-key-file"),
            admin_keys=read_keys(admin_key_file, "--admin-key-file"),
        )
        config = ServerConfig(
            model=ModelConfig(
                model=model,
                served_name=served_model_name or default_served_name(model),
                quantization=quantization,
                dtype=dtype,
                device=device,
                cpu_math=cpu_math,
            ),
            engine=EngineConfig(
                max_model_len=max_model_len,
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                kv_cache_bytes=kv_cache_memory,
                adapter_slots=adapter_slots,
                adapter_host_bytes=adapter_host_memory,
                merge_bytes=merge_memory,
                auto_merge=auto_merge,
            ),
            http=http,
            store=StoreConfig(
                registry_url=registry_url,
                blobs_url=blobs_url,
                max_adapter_bytes=max_adapter_size or _STORE.max_adapter_bytes,
            ),
            adapters=adapters,
            home=home or default_home(),
        )
        metrics = PrometheusMetrics()
        with bind(http) as listener:
            warn_if_open(http)
            with running_engine(config, metrics) as engine:
                serve_engine(engine, metrics, config, listener, log_format)


def default_served_name(model: str) -> str:
    """Return a folder's name, or a hub id as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def warn_if_open(http: HttpConfig) -> None:
    """Log a warning where other machines can reach the server and no key is asked for."""
    if not http.api_keys and not _is_loopback(http.host):
        logger.warning(
            "listening on %s without --api-key-file: whoever reaches this address can use the "
            "model",
            http.host,
        )


@contextmanager
def running_engine(config: ServerConfig, metrics: PrometheusMetrics) -> Iterator[AsyncEngine]:
    """Load everything and run the engine, watched by ``metrics``, until the block ends."""
    # The engine's thread loads; ending the interpreter under it may hang in native code. There is
    # nothing to lose yet, so an interrupt ends the process at once, as a termination does.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with compiler_deferred():
            with collector_paused():
                import_transformers()
                from manylora_server.engine.build import build_engine
            engine = build_engine(config, metrics)
        engine.start()
    finally:
        signal.signal(signal.SIGINT, previous)
    try:
        yield engine
    finally:
        engine.close()


def serve_engine(
    engine: AsyncEngine,
    metrics: PrometheusMetrics,
    config: ServerConfig,
    listener: socket.socket,
    log_format: options.LogFormat,
) -> None:
    """Serve ``engine`` on ``listener`` until a signal; exit code 1 if it stopped at once."""
    from manylora_server.api.app import create_app

    address = address_of(listener)

    def on_ready() -> None:
        count = len(engine.adapters.served())
        plural = "adapter" if count == 1 else "adapters"
        announce(f"serving {engine.model_name} with {count} {plural} on {address}", log_format)
        engine.warm_up()

    app = create_app(engine, config.http, metrics, engine.adapter_service)
    if not run_server(app, engine, config.http, listener, on_ready):
        announce("stopped at once; running requests were cut off", log_format)
        raise typer.Exit(1)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
