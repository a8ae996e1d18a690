"""The PEFT baseline in a process of its own, so that neither memory nor threads mix."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loadtests.workload import Request

_LINE_LIMIT = 2**26


class BaselineFailedError(Exception):
    """The baseline's process ended early."""


class PeftProcess:
    """Asks the running baseline. ``folders`` maps adapter names to their folders."""

    def __init__(
        self, process: asyncio.subprocess.Process, folders: Mapping[str, Path], log: Path
    ) -> None:
        self._process = process
        self._folders = folders
        self._log = log

    async def generate(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """Return the seconds that ``requests`` took in static batches, and their tokens."""
        answer = await self._ask(
            op="generate",
            prompts=[request.prompt for request in requests],
            adapters=[self._folder(request.adapter) for request in requests],
            counts=[request.output_tokens for request in requests],
        )
        return answer["seconds"], answer["tokens"]

    async def gap(self, prompt: Sequence[int], adapter: str | None, pair: Sequence[int]) -> float:
        """Return the relative distance of two candidates' logits after ``prompt``."""
        folder = self._folder(adapter)
        answer = await self._ask(op="gap", prompt=prompt, adapter=folder, pair=pair)
        gap: float = answer["gap"]
        return gap

    def _folder(self, adapter: str | None) -> str | None:
        return None if adapter is None else str(self._folders[adapter])

    async def _ask(self, **message: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(message).encode() + b"\n")
        line = await stdout.readline()
        if not line:
            raise BaselineFailedError(
                f"the PEFT baseline ended:\n{self._log.read_text(errors='replace')[-4000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def running_peft(
    model: Path,
    base: str,
    folders: Mapping[str, Path],
    environment: Mapping[str, str],
    log: Path,
) -> AsyncIterator[PeftProcess]:
    """Run the baseline over ``model``, held as ``base``; its stderr goes to ``log``.

    ``environment`` is added to this process's own.
    """
    command = [sys.executable, "-m", "loadtests.peft_baseline", str(model), "--base", base]
    root = Path(__file__).resolve().parents[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            cwd=root,
            env={**os.environ, **environment},
            limit=_LINE_LIMIT,
        )
    try:
        yield PeftProcess(process, folders, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
