"""A real server process over a tiny base with four adapters, and what it must answer.

Every test that talks to it also proves that nothing was left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from support.adapters import adalora, lora, save_adapter
from support.models import build_tokenizer, save_model
from support.oracle import Oracle, greedy
from support.server_process import Run, wait_until_idle
from support.world import BASE, CONTEXT, NEW_TOKENS, Expected, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = save_model("llama", folder / BASE)
    # More positions than support.models gives, so that a request can last for seconds.
    path = folder / BASE / "config.json"
    config = {**json.loads(path.read_text()), "max_position_embeddings": CONTEXT}
    path.write_text(json.dumps(config))
    kinds = {
        "ada": adalora("llama"),
        "dora": lora("llama", r=3, use_dora=True, target_modules="all-linear"),
        "plain": lora("llama"),
        "rs": lora("llama", r=8, use_rslora=True, target_modules="all-linear"),
    }
    adapters = {
        name: save_adapter(base, kind, folder / name, seed)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    return World(folder / BASE, adapters, folder / "home")


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The server that most tests share, started as users start it."""
    run = world.serve(tmp_path_factory.mktemp("server") / "run", forked=False)
    try:
        yield run.until_ready()
    finally:
        run.close()


@pytest.fixture(scope="session")
def client(server: Run) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: Run) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the shared server lives, serves, and holds nothing."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        wait_until_idle(server.url)
        assert server.exit_code is None


@pytest.fixture
def start(world: World, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start servers of a test's own with ``--options``; they end with the test."""
    with ExitStack() as stack:

        def starter(*arguments: str, command: str | None = None, **options: Any) -> Run:
            folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
            # A store of the test's own: what it registers is nobody else's.
            options.setdefault("home", tmp_path / "home")
            if command is None:
                run = world.serve(folder, *arguments, **options)
            else:
                run = world.run(folder, command, *arguments, **options)
            stack.callback(run.close)
            return run

        yield starter


@pytest.fixture(scope="session")
def expect(world: World) -> Callable[..., Expected]:
    """Compute, once, what a request must be answered with: ``expect(adapter, prompt)``."""
    oracle = Oracle(world.base, "nf4", world.adapters)
    tokenizer = build_tokenizer()
    models: dict[str | None, Any] = {}
    known: dict[tuple[str | None, str], Expected] = {}

    def lookup(adapter: str | None, prompt: str) -> Expected:
        key = (adapter, prompt)
        if key not in known:
            if adapter not in models:
                models[adapter] = oracle.model(adapter)
            ids = tokenizer.encode(prompt)
            tokens, logits = greedy(models[adapter], ids, NEW_TOKENS)
            best = logits.topk(2).values
            margin = float((best[:, 0] - best[:, 1]).min())
            assert margin > 1e-3, f"{key}: a near tie, where rounding may decide"
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            known[key] = Expected(ids, tokens, torch.log_softmax(logits, dim=-1), text)
        return known[key]

    return lookup


@pytest.fixture(scope="session")
def digests(http: httpx.Client) -> dict[str, str]:
    models = http.get("/v1/models").raise_for_status().json()["data"]
    return {model["id"]: model["digest"] for model in models if model["parent"]}
