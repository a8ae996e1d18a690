"""Listens, serves, and stops without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from manylora_server.core.config import HttpConfig
from manylora_server.core.errors import StartupError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from manylora_server.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

# What closing connections may take after the engine's own limit.
_CLOSING_S = 5


def bind(http: HttpConfig) -> socket.socket:
    """Return a socket bound to ``http``'s address that does not listen yet.

    Done before the model is loaded, so that a wrong address fails in a moment and not in minutes.
    Raises ``StartupError``.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise _cannot_listen(http, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(http, error) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket, with the real port where 0 was asked for."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: FastAPI,
    engine: AsyncEngine,
    http: HttpConfig,
    listener: socket.socket,
    on_ready: Callable[[], None],
) -> bool:
    """Serve until SIGINT or SIGTERM; return false where a second signal cut requests off.

    The first signal stops accepting connections and drains the engine for at most
    ``shutdown_timeout_s``; a second one stops at once. ``on_ready`` is called when requests are
    accepted. Raises ``StartupError`` where another process listens on the address by now.
    """
    try:
        # Two sockets may be bound to one address as long as neither listens.
        listener.listen(2048)
    except OSError as error:
        raise _cannot_listen(http, error) from error
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(http.shutdown_timeout_s) + _CLOSING_S,
    )
    server = _Server(config, engine, http.shutdown_timeout_s, on_ready)
    # uvicorn's own choice of loop: uvloop, where it is installed.
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(server, listener))


class _Server(uvicorn.Server):
    """uvicorn's server, but for its signals (it would raise them again) and the draining."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        drain_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._on_ready = on_ready
        self._draining: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Refuse requests from now on, and make ``serve`` end once the accepted ones have."""
        # uvicorn looks at its flag ten times a second only, and must let nobody in until then.
        self._draining = asyncio.create_task(self._engine.drain(self._drain_s))
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn closes its sockets first and then waits for the answers that the draining engine
        # still gives.
        await super().shutdown(sockets)
        if self._draining is not None:
            await self._draining


async def _serve(server: _Server, listener: socket.socket) -> bool:
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    def on_signal() -> None:
        if server.should_exit:
            # uvicorn would log each request that is cut off as an error of the application.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            serving.cancel()
            return
        server.stop()
        logger.info("stopping: running requests may finish; another signal stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        await serving
    except asyncio.CancelledError:
        return False
    return True


def _cannot_listen(http: HttpConfig, error: OSError) -> StartupError:
    where = f"{http.host} port {http.port}"
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"--port: {where} is in use by another process; choose another port, or 0 for a free "
            "one.",
            param="--port",
        )
    if error.errno == errno.EACCES:
        return StartupError(
            f"--port: {where} needs more rights; choose a port above 1023.", param="--port"
        )
    return StartupError(
        f"--host: cannot listen on {where}: {error.strerror or error}; give an address of this "
        "machine, such as 127.0.0.1 or 0.0.0.0.",
        param="--host",
    )
