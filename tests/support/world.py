"""The tiny base with four adapters that real servers serve, and what they must answer."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import torch

from support.server_process import Run

BASE = "base"
CONTEXT = 4096
NEW_TOKENS = 16
PROMPTS = (
    "Hello",
    "The weather in Zürich is",
    "0123456789" * 4,
    "x",
    "Once upon a time there was a king who",
)
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüezi"})
CHAT_TEXT = "System: Be brief.\nUser: Grüezi\nAssistant:"


@dataclass(frozen=True)
class World:
    """The files that servers start from."""

    base: Path
    adapters: dict[str, Path]
    home: Path

    def serve(self, folder: Path, *arguments: str, **options: Any) -> Run:
        """Start a server with all adapters on a free port; it is not ready yet."""
        named = [f"--adapter={name}={path}" for name, path in self.adapters.items()]
        return self.run(folder, "serve", str(self.base), *named, *arguments, **options)

    def run(self, folder: Path, command: str, *arguments: str, **options: Any) -> Run:
        if command == "serve":
            arguments = ("--port=0", "--device=cpu", "--kv-cache-memory=4MiB", *arguments)
        home = str(options.pop("home", self.home))
        return Run(folder, command, *arguments, env={"MANYLORA_HOME": home}, **options)


@dataclass(frozen=True)
class Expected:
    """What transformers and PEFT continue a prompt with, greedily, and how sure they are."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor
    text: str

    @property
    def chosen(self) -> list[float]:
        """The log-probability of each token."""
        return [float(row[token]) for row, token in zip(self.logprobs, self.tokens, strict=True)]


class Background:
    """Requests that run while a test does something else; closing drops their connections."""

    def __init__(self, url: str) -> None:
        self._address = httpx.URL(url)
        self._connections: list[http.client.HTTPConnection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection that asks for nothing yet."""
        connection = http.client.HTTPConnection(self._address.host, self._address.port, timeout=60)
        connection.connect()
        self._connections.append(connection)
        return connection

    def send(self, **body: Any) -> http.client.HTTPConnection:
        """Send a completions request and wait for nothing."""
        connection = self.connect()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
        )
        return connection

    def stream(self, **body: Any) -> http.client.HTTPConnection:
        return self.send(stream=True, **body)

    def close(self) -> None:
        """Break all connections at once."""
        while self._connections:
            self._connections.pop().close()
