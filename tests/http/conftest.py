"""A client for the application over a fake engine; requests run in-process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from manylora_server.api.app import create_app
from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.core.config import HttpConfig
from support.fake_adapters import FakeAdapterService
from support.fake_engine import FakeEngine

# Admin calls look at the host that a client means to call.
BASE_URL = "http://127.0.0.1"


@dataclass
class Api:
    """An application, its engine, and calls to it."""

    engine: FakeEngine
    app: FastAPI
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def service(self) -> FakeAdapterService:
        return self.engine.adapter_service

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.call("GET", path, **arguments)

    def post(self, path: str, body: object = None, **arguments: Any) -> httpx.Response:
        if body is not None:
            arguments["json"] = body
        return self.call("POST", path, **arguments)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Hi", "max_tokens": 100, **body})

    def chat(self, **body: Any) -> httpx.Response:
        message = {"role": "user", "content": "Hi"}
        return self.post("/v1/chat/completions", {"messages": [message], **body})


@pytest.fixture
def make_api() -> Callable[..., Api]:
    def make(engine: FakeEngine | None = None, **http: Any) -> Api:
        engine = engine or FakeEngine()
        service = engine.adapter_service
        return Api(engine, create_app(engine, HttpConfig(**http), PrometheusMetrics(), service))

    return make


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()


@pytest.fixture
def events() -> Callable[[httpx.Response], list[Any]]:
    """Parse a stream strictly: ``data: `` frames, blank lines between, ``[DONE]`` at the end."""

    def parse(response: httpx.Response) -> list[Any]:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        assert response.text.endswith("\n\n")
        frames = response.text[:-2].split("\n\n")
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        assert frames[-1] == "data: [DONE]"
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]

    return parse


@pytest.fixture
def error() -> Callable[[httpx.Response], dict[str, Any]]:
    """Return the error of a response, having checked its shape."""

    def read(response: httpx.Response) -> dict[str, Any]:
        content = response.json()
        assert set(content) == {"error"}
        assert set(content["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]
        return content["error"]

    return read
