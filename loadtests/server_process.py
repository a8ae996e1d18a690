"""Runs ``manylora serve`` as a real process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from loadtests.client import open_client

_POLL_S = 0.1
_STOP_S = 60.0
_TAIL_CHARACTERS = 4000


class ServerFailedError(Exception):
    """The server did not start, or did not stop as it should."""


@asynccontextmanager
async def running_server(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, start_timeout_s: float
) -> AsyncIterator[str]:
    """Run ``manylora serve`` with ``arguments``; yields its URL once it is ready.

    ``environment`` is added to this process's own; stderr goes to the file ``log``. On the way
    out the server gets SIGTERM and must exit with 0.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [_manylora(), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, stderr=stderr, env={**os.environ, **environment}
        )
    try:
        await _wait_until_ready(process, url, log, start_timeout_s)
        yield url
        await _stop(process, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _wait_until_ready(
    process: asyncio.subprocess.Process, url: str, log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    async with open_client(url, timeout_s=5) as client:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise ServerFailedError(
                    f"the server exited with {process.returncode} at start:\n{_tail(log)}"
                )
            try:
                response = await client.get("/ready")
            except httpx.TransportError:
                pass
            else:
                if response.status_code == httpx.codes.OK:
                    return
            await asyncio.sleep(_POLL_S)
    raise ServerFailedError(f"the server was not ready after {timeout_s:.0f} s:\n{_tail(log)}")


async def _stop(process: asyncio.subprocess.Process, log: Path) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        code = await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        raise ServerFailedError(
            f"the server still ran {_STOP_S:.0f} s after SIGTERM:\n{_tail(log)}"
        ) from None
    if code != 0:
        raise ServerFailedError(f"the server exited with {code} at the end:\n{_tail(log)}")


def _manylora() -> str:
    """Return the command of the environment that runs this, else the one on the path."""
    beside = shutil.which("manylora", path=str(Path(sys.executable).parent))
    command = beside or shutil.which("manylora")
    if command is None:
        raise ServerFailedError("no command `manylora` found; install the project first")
    return command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
