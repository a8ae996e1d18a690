"""The command line in processes of its own: started, watched, signalled and stopped."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from manylora_server.api.app import create_app
from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.core.config import HttpConfig

# Generous: they only bound how long a failure takes.
START_S = 120
WAIT_S = 60

_READY = re.compile(r"manylora: serving (\S+) with (\d+) adapters? on (\S+)")

# Starting Python with torch and transformers takes seconds. All runs but a few are therefore
# forked from a process that has imported them and done nothing else.
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    [
        "manylora_server.cli.main",
        "manylora_server.engine.build",
        "manylora_server.api.app",
        "transformers.models.llama.modeling_llama",
    ]
)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    """Return the first truthy result of ``condition``, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"in vain waited for: {what}"
        time.sleep(0.01)
    return result


class Run:
    """One run of ``manylora``. Its output goes to files in ``folder``."""

    def __init__(
        self, folder: Path, *arguments: str, env: dict[str, str], forked: bool = True
    ) -> None:
        folder.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self.url = ""
        if forked:
            self._forked = _forkserver.Process(
                target=_main, args=(arguments, env, str(self._out), str(self._err))
            )
            self._forked.start()
            self.pid: int = self._forked.pid
            return
        self._forked = None
        script = Path(sys.executable).with_name("manylora")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [script, *arguments], stdout=out, stderr=err, env={**os.environ, **env}
            )
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text("utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text("utf-8") if self._err.exists() else ""

    @property
    def exit_code(self) -> int | None:
        """``None`` while the process runs, less than 0 if a signal ended it."""
        return self._process.poll() if self._forked is None else self._forked.exitcode

    def until_ready(self) -> Run:
        """Wait for the line that says where it serves."""

        def ready() -> re.Match[str] | None:
            assert self.exit_code is None, f"it ended with {self.exit_code}:\n{self.stderr}"
            return _READY.search(self.stderr)

        self.url = wait_until(ready, "the server", START_S)[3]
        return self

    def until_logged(self, text: str) -> None:
        wait_until(lambda: text in self.stderr, f"{text!r} in the log")

    def send(self, number: signal.Signals) -> None:
        assert self.exit_code is None, "it has ended already"
        os.kill(self.pid, number)

    def finish(self, seconds: float = WAIT_S) -> int:
        """Return the exit code, once there is one."""
        wait_until(lambda: self.exit_code is not None, "the end of the process", seconds)
        assert self.exit_code is not None
        return self.exit_code

    def close(self) -> None:
        """End the process if it still runs."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.finish()

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)


def samples(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return all of ``/metrics`` by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in families
            for sample in family.samples
        }


def metric(url: str, name: str, **labels: str) -> float:
    """Return one sample; 0 where it has not been counted yet."""
    return samples(url).get((f"manylora_{name}", frozenset(labels.items())), 0.0)


def held(url: str) -> dict[str, float]:
    """Return what a server holds for requests that have not ended."""
    found = samples(url)
    used = frozenset({("state", "used")})
    return {
        "running_sequences": found.get(("manylora_running_sequences", frozenset()), 0.0),
        "queue_depth": found.get(("manylora_queue_depth", frozenset()), 0.0),
        "kv_blocks": found.get(("manylora_kv_blocks", used), 0.0),
    }


def wait_until_idle(url: str) -> None:
    wait_until(lambda: not any(held(url).values()), f"nothing held at {url}")


@contextmanager
def served(engine: Any, **http: Any) -> Iterator[str]:
    """Serve an engine of this process, for settings that the command line does not have."""
    app = create_app(engine, HttpConfig(**http), PrometheusMetrics(), engine.adapter_service)
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    engine.start()
    thread.start()
    try:
        wait_until(lambda: server.started, "the server")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def _main(arguments: tuple[str, ...], env: dict[str, str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(env)
    sys.argv = ["manylora", *arguments]
    from manylora_server.cli.main import main

    main()
