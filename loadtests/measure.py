"""Measures one scenario: verifies first, then times all sides in turn, repeatedly, in one run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests import machine
from loadtests.client import closed_loop, open_client, open_loop
from loadtests.models import SHAPES, AdapterFolder, ensure_adapters, ensure_model
from loadtests.peft_process import PeftProcess, running_peft
from loadtests.report import Run, ratios, summarize
from loadtests.scenarios import Scenario
from loadtests.server_process import running_server
from loadtests.verify import Verification, compare, idle_adapters
from loadtests.workload import Request, WorkloadSpec, base_only, make_requests

logger = logging.getLogger(__name__)

# PEFT answers slowly, so longer workloads are verified on their first requests.
_VERIFIED_REQUESTS = 16

Side = Callable[[Sequence[Request]], Awaitable[Run]]


class WrongAnswersError(Exception):
    """The server's tokens are not those of the reference, or the check itself is void."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a scenario is run.

    ``peft_nf4`` times bitsandbytes' own 4-bit layers, which are slow; ``threads`` are those of the
    server and of PEFT alike (``None``: torch's own choice).
    """

    quantization: str
    peft_nf4: bool
    threads: int | None
    seed: int
    cache: Path
    logs: Path
    server_arguments: Sequence[str]


async def measure(scenario: Scenario, options: Options) -> dict[str, Any]:
    """Return the report. Raises ``WrongAnswersError`` instead of timing wrong answers."""
    described = machine.describe()
    started = time.time()
    shape = SHAPES[scenario.shape]
    logger.info("preparing a model of %s parameters", f"{shape.parameters:,}")
    model = ensure_model(shape, options.cache)
    adapters = ensure_adapters(model, scenario.adapters, scenario.ranks)
    # They were set for a dense base.
    targets = scenario.targets if options.quantization == "none" else {}
    async with (
        asyncio.timeout(scenario.time_limit_s),
        _processes(scenario, options, model, adapters) as (client, peft),
    ):
        bench = _Bench(scenario, options, client, peft, [adapter.name for adapter in adapters])
        await bench.verify()
        sides = await bench.time_sides()
    return {
        "scenario": asdict(scenario),
        "quantization": options.quantization,
        "threads": options.threads,
        "seed": options.seed,
        "server_arguments": list(options.server_arguments),
        "started_unix_s": started,
        "machine": described,
        "model": {**asdict(shape), "parameters": shape.parameters},
        "verification": bench.verification.to_json(),
        "sides": {name: summarize(runs) for name, runs in sides.items()},
        "ratios": ratios(sides, targets),
    }


@asynccontextmanager
async def _processes(
    scenario: Scenario, options: Options, model: Path, adapters: Sequence[AdapterFolder]
) -> AsyncIterator[tuple[httpx.AsyncClient, PeftProcess]]:
    """Run the server and the baseline over the same files."""
    arguments = [str(model), "--quantization", options.quantization]
    arguments += ["--home", str(options.cache / "home")]
    for adapter in adapters:
        arguments += ["--adapter", f"{adapter.name}={adapter.folder}"]
    arguments += options.server_arguments
    base = "float32"
    if options.quantization == "nf4":
        base = "nf4" if options.peft_nf4 else "nf4-rounded"
    folders = {adapter.name: adapter.folder for adapter in adapters}
    environment = {"HF_HUB_OFFLINE": "1"}
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    limit = scenario.time_limit_s
    server_log, peft_log = options.logs / "server.log", options.logs / "peft.log"
    async with (
        running_server(arguments, environment, server_log, limit) as url,
        open_client(url, limit) as client,
        running_peft(model, base, folders, environment, peft_log) as peft,
    ):
        yield client, peft


class _Bench:
    """The sides of one scenario and what they are asked."""

    def __init__(
        self,
        scenario: Scenario,
        options: Options,
        client: httpx.AsyncClient,
        peft: PeftProcess,
        adapters: Sequence[str],
    ) -> None:
        self._scenario = scenario
        self._seed = options.seed
        self._client = client
        self._peft = peft
        self._adapters = adapters
        # With a base in 4 bits PEFT is timed only in 4 bits, too.
        self._times_peft = scenario.peft and (options.quantization == "none" or options.peft_nf4)
        self.verification = Verification()

    async def verify(self) -> None:
        """Compare mixed and base-only answers with PEFT's; warms every side up besides."""
        requests = self._requests(0)[:_VERIFIED_REQUESTS]
        logger.info("verifying the tokens of %d requests, mixed and base-only", len(requests))
        answers = []
        for load in (requests, base_only(requests)):
            got = await closed_loop(self._client, load, self._scenario.clients)
            _, expected = await self._peft.generate(load)
            tokens = [record.tokens for record in got.records]
            await compare(self.verification, load, expected, tokens, self._peft.gap)
            answers.append(expected)
        idle = idle_adapters(requests, *answers)
        if idle:
            raise WrongAnswersError(f"these adapters change no answer, nothing is shown: {idle}")
        self._require_right_answers()

    async def time_sides(self) -> dict[str, list[Run]]:
        """Time every side on new prompts in each repetition, in alternating order."""
        sides = self._sides()
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for repetition in range(1, self._scenario.repetitions + 1):
            requests = self._requests(repetition)
            names = list(sides) if repetition % 2 else list(reversed(sides))
            for name in names:
                load = base_only(requests) if name.endswith("base") else requests
                run = await sides[name](load)
                runs[name].append(run)
                logger.info("repetition %d: %s took %.2f s", repetition, name, run.wall_s)
            if self._times_peft:
                await self._compare_timed(requests, runs)
        self._require_right_answers()
        return runs

    def _sides(self) -> dict[str, Side]:
        sides: dict[str, Side] = {
            "manylora mixed": self._run_server,
            "manylora base": self._run_server,
        }
        if self._times_peft:
            sides |= {"peft mixed": self._run_peft, "peft base": self._run_peft}
        return sides

    def _requests(self, repetition: int) -> list[Request]:
        scenario = self._scenario
        spec = WorkloadSpec(
            requests=scenario.requests,
            vocabulary=SHAPES[scenario.shape].vocabulary,
            popularity=scenario.popularity,
            zipf_exponent=scenario.zipf_exponent,
            prompt_tokens=scenario.prompt_tokens,
            output_tokens=scenario.output_tokens,
            rate=scenario.rate,
            cv=scenario.cv,
        )
        return make_requests(spec, self._adapters, self._seed * 1000 + repetition)

    async def _run_server(self, requests: Sequence[Request]) -> Run:
        if self._scenario.rate is None:
            load = await closed_loop(self._client, requests, self._scenario.clients)
        else:
            load = await open_loop(self._client, requests)
        cached = sum(record.cached_tokens for record in load.records)
        if cached:
            raise WrongAnswersError(f"{cached} prompt tokens came from the prefix cache")
        tokens = [record.tokens for record in load.records]
        prompts = sum(record.prompt_tokens for record in load.records)
        return Run(load.wall_s, prompts, tokens, load.records)

    async def _run_peft(self, requests: Sequence[Request]) -> Run:
        seconds, tokens = await self._peft.generate(requests)
        return Run(seconds, sum(len(request.prompt) for request in requests), tokens, [])

    async def _compare_timed(self, requests: Sequence[Request], runs: dict[str, list[Run]]) -> None:
        for kind, load in (("mixed", requests), ("base", base_only(requests))):
            expected, got = runs[f"peft {kind}"][-1].tokens, runs[f"manylora {kind}"][-1].tokens
            await compare(self.verification, load, expected, got, self._peft.gap)

    def _require_right_answers(self) -> None:
        if not self.verification.passed:
            wrong = "\n".join(map(str, self.verification.mismatches))
            raise WrongAnswersError(f"tokens differ from PEFT's, so no speeds are given:\n{wrong}")
