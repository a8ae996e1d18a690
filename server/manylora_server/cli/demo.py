"""``manylora demo``: the model and adapters that ship with the project, without a network."""

from __future__ import annotations

import asyncio
import json
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.cli import options
from manylora_server.cli.http_server import address_of, bind
from manylora_server.cli.logs import configure_logging, startup_errors_reported
from manylora_server.cli.serve import running_engine, serve_engine, warn_if_open
from manylora_server.core.config import (
    CpuMath,
    EngineConfig,
    HttpConfig,
    ModelConfig,
    ServerConfig,
    default_home,
)
from manylora_server.core.errors import StartupError
from manylora_server.core.observer import StepStats
from manylora_server.core.types import AdapterMix, Request, SamplingParams

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine

SERVED_NAME = "manylora-demo"
DEMO_TOKENS = 128

Once = Annotated[bool, typer.Option("--once", help="Exit after the completions.")]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one adapter made of the prompt; ``adapter`` is ``None`` for the base."""

    adapter: str | None
    text: str


class MixMetrics(PrometheusMetrics):
    """Also counts the steps whose batch held rows of different adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.mixed_steps = 0
        self.most_adapters = 0

    def on_step(self, stats: StepStats) -> None:
        """Take note of a finished step."""
        super().on_step(stats)
        self.steps += 1
        self.mixed_steps += stats.distinct_adapters > 1
        self.most_adapters = max(self.most_adapters, stats.distinct_adapters)

    def summary(self) -> str:
        """Return what the batches held, in one line."""
        return (
            f"{self.mixed_steps} of {self.steps} steps ran several adapters in one batch, "
            f"up to {self.most_adapters} at once beside the base."
        )


def demo(
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    once: Once = False,
    home: options.Home = None,
    cpu_math: options.CpuMathOption = "float32",
    log_format: options.LogFormatOption = "text",
) -> None:
    """Complete one prompt by the demo's base and adapters in one mixed batch, then serve them."""
    configure_logging(log_format)
    with startup_errors_reported(), ExitStack() as stack:
        config = _config(HttpConfig(host=host, port=port), home, cpu_math)
        listener = None if once else stack.enter_context(bind(config.http))
        metrics = MixMetrics()
        engine = stack.enter_context(running_engine(config, metrics))
        _show(engine, metrics)
        if listener is not None:
            warn_if_open(config.http)
            typer.echo(f"Ask an adapter yourself:\n\n{_curl(engine, address_of(listener))}\n")
            serve_engine(engine, metrics, config, listener, log_format)


def _config(http: HttpConfig, home: Path | None, cpu_math: CpuMath) -> ServerConfig:
    from manylora_server.demo import BASE_DIR, demo_adapters

    adapters = demo_adapters()
    if not (BASE_DIR / "config.json").is_file() or not adapters:
        raise StartupError(
            f"the demo's files are missing from {BASE_DIR.parent}; install manylora again, or make "
            "them with: python -m manylora_server.demo.train"
        )
    return ServerConfig(
        model=ModelConfig(model=str(BASE_DIR), served_name=SERVED_NAME, cpu_math=cpu_math),
        engine=EngineConfig(adapter_slots=max(16, len(adapters))),
        http=http,
        adapters=tuple((name, str(path)) for name, path in adapters.items()),
        # Its adapters must not turn up among the operator's own.
        home=(home or default_home()) / "demo",
    )


def _show(engine: AsyncEngine, metrics: MixMetrics) -> None:
    from manylora_server.demo import DEMO_PROMPT

    for completion in asyncio.run(_complete_all(engine, DEMO_PROMPT)):
        typer.echo(_header(engine, completion.adapter))
        typer.echo(f"{DEMO_PROMPT}{completion.text.rstrip()}\n")
    typer.echo(f"{metrics.summary()}\n")


async def _complete_all(engine: AsyncEngine, prompt: str) -> list[Completion]:
    """Complete ``prompt`` by the base and by every adapter at once, greedily."""
    names = [None, *(name for name, _, _ in engine.adapters.served())]
    return await asyncio.gather(*(_complete(engine, prompt, name) for name in names))


async def _complete(engine: AsyncEngine, prompt: str, adapter: str | None) -> Completion:
    request = Request(
        request_id=f"demo-{adapter or ''}",
        prompt_token_ids=tuple(engine.tokenizer.encode(prompt)),
        sampling=SamplingParams(max_tokens=DEMO_TOKENS, temperature=0.0),
        adapter=None if adapter is None else AdapterMix.of(engine.adapters.resolve(adapter)),
    )
    texts = [output.text async for output in engine.generate(request)]
    return Completion(adapter, "".join(texts))


def _header(engine: AsyncEngine, adapter: str | None) -> str:
    record = None if adapter is None else engine.adapters.get(adapter)
    if record is None:
        title = f"{engine.model_name} (the base)"
    else:
        title = f"{record.name} ({record.peft_type}, rank {record.rank}, {record.digest[:8]})"
    return f"── {title} ".ljust(72, "─")


def _curl(engine: AsyncEngine, address: str) -> str:
    from manylora_server.demo import DEMO_PROMPT

    body = {
        "model": engine.model_name,
        "adapter": engine.adapters.served()[0][0],
        "prompt": DEMO_PROMPT,
        "max_tokens": DEMO_TOKENS,
    }
    return (
        f"curl {address}/v1/completions -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
