"""Two servers that differ in one thing, driven with the same load in turn, in one run."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from loadtests.client import closed_loop, open_client
from loadtests.models import AdapterFolder
from loadtests.report import Run, summarize
from loadtests.server_process import running_server
from loadtests.workload import Request

logger = logging.getLogger(__name__)

_START_S = 600.0
_REQUEST_S = 1800.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, and the seconds from its start until it was ready."""

    client: httpx.AsyncClient
    start_s: float

    async def stats(self) -> dict[str, Any]:
        """Return what the server says of itself."""
        response = await self.client.get("/admin/stats")
        response.raise_for_status()
        stats: dict[str, Any] = response.json()
        return stats


@asynccontextmanager
async def serving(
    model: Path, home: Path, arguments: Sequence[str], log: Path
) -> AsyncIterator[Server]:
    """Run a server over ``model`` with the adapters that ``home`` holds."""
    command = [str(model), "--quantization", "none", "--home", str(home), *arguments]
    start = time.perf_counter()
    async with (
        running_server(command, {"HF_HUB_OFFLINE": "1"}, log, _START_S) as url,
        open_client(url, _REQUEST_S) as client,
    ):
        yield Server(client, time.perf_counter() - start)


async def register(server: Server, adapters: Sequence[AdapterFolder]) -> float:
    """Register ``adapters`` over HTTP unless they are; return the seconds that one took."""
    start = time.perf_counter()
    for number, adapter in enumerate(adapters, 1):
        body = {"name": adapter.name, "source": f"file:{adapter.folder}"}
        response = await server.client.post("/admin/adapters", json=body)
        if response.status_code != httpx.codes.CREATED:
            raise RuntimeError(f"{adapter.name}: HTTP {response.status_code}: {response.text}")
        if number % 200 == 0:
            logger.info("registered %d of %d", number, len(adapters))
    return (time.perf_counter() - start) / max(1, len(adapters))


Side = Callable[[int], Awaitable[Run]]


async def run_load(server: Server, requests: Sequence[Request], clients: int) -> Run:
    """Let ``clients`` clients work through ``requests``."""
    load = await closed_loop(server.client, requests, clients)
    prompts = sum(record.prompt_tokens for record in load.records)
    return Run(load.wall_s, prompts, [record.tokens for record in load.records], load.records)


async def alternate(sides: Mapping[str, Side], repetitions: int) -> dict[str, list[Run]]:
    """Run every side once to warm up, then ``repetitions`` times, in alternating order."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        names = list(sides) if repetition % 2 else list(reversed(sides))
        for name in names:
            run = await sides[name](repetition)
            if repetition:
                runs[name].append(run)
            logger.info("repetition %d: %s took %.2f s", repetition, name, run.wall_s)
    return runs


def compared(runs: Mapping[str, Sequence[Run]], above: str, below: str) -> dict[str, Any]:
    """Return both sides' figures and the ratios ``above / below`` of what matters."""
    sides = {name: summarize(of) for name, of in runs.items()}

    def ratio(value: Callable[[Run], float]) -> dict[str, Any]:
        pairs = zip(runs[above], runs[below], strict=True)
        top, bottom = (median(value(run) for run in runs[name]) for name in (above, below))
        return {"ratio": top / bottom, "by_repetition": [value(a) / value(b) for a, b in pairs]}

    return {
        "sides": sides,
        "ratios": {
            "generated tokens/s": ratio(lambda run: run.generated_per_s),
            "median time to first token": ratio(
                lambda run: median(record.first_token_s for record in run.records)
            ),
        },
    }
