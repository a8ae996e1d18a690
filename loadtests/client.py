"""Sends requests to the server and records when each token came."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.tokens import token_ids
from loadtests.workload import Request


class RequestFailedError(Exception):
    """The server refused a request or ended it wrongly."""


@dataclass(slots=True)
class Record:
    """One answered request. Times are ``time.perf_counter`` seconds.

    ``due`` is when the request should have been sent: in an open loop a late sender must not make
    the server look faster.
    """

    adapter: str | None
    due: float
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.due

    @property
    def inter_token_s(self) -> list[float]:
        """Gaps between tokens; those that come in one event are 0 apart."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of one run, in the requests' order, and the time from first send to last."""

    records: list[Record]
    wall_s: float


def open_client(url: str, timeout_s: float) -> httpx.AsyncClient:
    """Return a client that goes straight to ``url``, whatever proxies the environment names."""
    return httpx.AsyncClient(
        base_url=url,
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def closed_loop(client: httpx.AsyncClient, requests: Sequence[Request], clients: int) -> Load:
    """Let ``clients`` clients work through ``requests``, each sending as its last is answered."""
    records: list[Record | None] = [None] * len(requests)
    pending = iter(enumerate(requests))

    async def work() -> None:
        for index, request in pending:
            records[index] = await complete(client, request, time.perf_counter())

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(requests))):
            group.create_task(work())
    return Load([record for record in records if record is not None], time.perf_counter() - start)


async def open_loop(client: httpx.AsyncClient, requests: Sequence[Request]) -> Load:
    """Send each request at its arrival time, whether or not earlier ones are answered."""
    start = time.perf_counter()

    async def send(request: Request) -> Record:
        due = start + request.arrival_s
        await asyncio.sleep(due - time.perf_counter())
        return await complete(client, request, due)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(request)) for request in requests]
    return Load([task.result() for task in tasks], time.perf_counter() - start)


async def complete(client: httpx.AsyncClient, request: Request, due: float) -> Record:
    """Stream one greedy completion of exactly ``request.output_tokens`` tokens."""
    body = {
        "adapter": request.adapter,
        "prompt": list(request.prompt),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record = Record(request.adapter, due)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            text = (await response.aread()).decode(errors="replace")
            raise RequestFailedError(f"HTTP {response.status_code}: {text}")
        usage = await _read_events(response, record)
    if usage is None:
        raise RequestFailedError("the stream ended without usage")
    record.prompt_tokens = usage["prompt_tokens"]
    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    wanted = (len(request.prompt), request.output_tokens, request.output_tokens)
    got = (usage["prompt_tokens"], usage["completion_tokens"], len(record.tokens))
    if got != wanted:
        raise RequestFailedError(
            f"prompt tokens, generated tokens and tokens in the text: expected {wanted}, got {got}"
        )
    return record


async def _read_events(response: httpx.Response, record: Record) -> dict[str, Any] | None:
    usage = None
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise RequestFailedError(f"in the stream: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            new = token_ids(choice["text"])
            record.tokens += new
            record.token_times += [time.perf_counter()] * len(new)
    return usage
