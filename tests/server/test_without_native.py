"""An install that found no compiler: everything works, on PyTorch and bitsandbytes."""

from __future__ import annotations

import httpx
import pytest

from manylora_kernels.native.binding import LIBRARY_VARIABLE
from support.server_process import Run
from support.world import NEW_TOKENS, PROMPTS, World


@pytest.fixture
def bare(world: World, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A process of its own: the library is looked for when the kernels are imported."""
    environment = {LIBRARY_VARIABLE: str(tmp_path / "none.so"), "HF_HUB_OFFLINE": "1"}
    arguments = [f"--adapter={name}={folder}" for name, folder in world.adapters.items()]
    run = Run(
        tmp_path / "run",
        "serve",
        str(world.base),
        "--port=0",
        f"--home={tmp_path / 'home'}",
        *arguments,
        env=environment,
        forked=False,
    )
    yield run.until_ready()
    run.close()


def test_base_and_adapters_answer_as_ever(bare: Run, world: World, expect) -> None:
    assert "run `make native`" in bare.stderr
    for name in [None, *sorted(world.adapters)[:2]]:
        body = {"prompt": PROMPTS[0], "adapter": name, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = httpx.post(f"{bare.url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == expect(name, PROMPTS[0]).text, name
