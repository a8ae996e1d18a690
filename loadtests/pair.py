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
    command = [str(model), "--home", str(home), *arguments]
    start = time.perf_counter()
    async with (
        running_server(command, {"HF_HUB_OFFLINE": "1"}, log, _START_S) as url,
        open_client(url, _REQUEST_S) as client,
    ):
        yield Server(client, time.perf_counter() - start)


async def names(server: Server) -> list[str]:
    """Return the names of all registered adapters, page by page."""
    found: list[str] = []
    after: str | None = None
    while True:
        parameters = {"limit": "500"} | ({} if after is None else {"after": after})
        response = await server.client.get("/admin/adapters", params=parameters)
        response.raise_for_status()
        page = response.json()
        found += [entry["name"] for entry in page["data"]]
        after = page["next"]
        if not page["has_more"]:
            return found


async def register(server: Server, adapters: Sequence[AdapterFolder]) -> float | None:
    """Register those of ``adapters`` that are not; return the seconds that one took, if any."""
    known = set(await names(server))
    missing = [adapter for adapter in adapters if adapter.name not in known]
    start = time.perf_counter()
    for number, adapter in enumerate(missing, 1):
        body = {"name": adapter.name, "source": f"file:{adapter.folder}"}
        response = await server.client.post("/admin/adapters", json=body)
        if response.status_code != httpx.codes.CREATED:
            raise RuntimeError(f"{adapter.name}: HTTP {response.status_code}: {response.text}")
        if number % 200 == 0:
            logger.info("registered %d of %d", number, len(missing))
    return (time.perf_counter() - start) / len(missing) if missing else None


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


def compared(runs: Mapping[str, Sequence[Run]], above: str) -> dict[str, Any]:
    """Return all sides' figures, and the ratios of the side ``above`` to each of the others."""

    def ratio(below: str, value: Callable[[Run], float]) -> dict[str, Any]:
        pairs = zip(runs[above], runs[below], strict=True)
        top, bottom = (median(value(run) for run in runs[name]) for name in (above, below))
        return {"ratio": top / bottom, "by_repetition": [value(a) / value(b) for a, b in pairs]}

    values: dict[str, Callable[[Run], float]] = {
        "generated tokens/s": lambda run: run.generated_per_s,
        "median time to first token": lambda run: median(r.first_token_s for r in run.records),
    }
    return {
        "sides": {name: summarize(of) for name, of in runs.items()},
        "ratios": {
            f"{name}, {above} / {below}": ratio(below, value)
            for below in runs
            if below != above
            for name, value in values.items()
        },
    }
