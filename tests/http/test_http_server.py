"""A whole server process: its ready line, signals, draining, exit codes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

TESTS = Path(__file__).resolve().parent.parent

# ``manylora serve`` with a fake in the place of the engine.
PROGRAM = """
import contextlib
import sys
sys.path.insert(0, {tests!r})
from support.fake_engine import FakeEngine
from manylora_server.cli import serve
from manylora_server.cli.main import app

def start(config, metrics):
    engine = FakeEngine()
    engine.script.token_s = {token_s}
    return contextlib.nullcontext(engine)

serve.running_engine = start
original = serve.HttpConfig
serve.HttpConfig = lambda **fields: original(shutdown_timeout_s={drain_s}, **fields)
app(["serve", "org/base", "--port", "0", *sys.argv[1:]])
"""


class Server:
    """A running process; ``url`` is where it says it serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = self._wait_for(r"manylora: serving org/base with 2 adapters on (\S+)")

    def _read(self) -> None:
        self.lines.extend(self.process.stderr)

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in list(self.lines):
                if found := re.fullmatch(pattern, line.strip()):
                    return found[1]
            time.sleep(0.01)
        raise AssertionError(f"the server does not start: {self.lines}")

    def finish(self) -> int:
        code = self.process.wait(20)
        self._reader.join()
        return code


@contextmanager
def running(*arguments: str, token_s: float = 0.0, drain_s: float = 5.0) -> Iterator[Server]:
    program = PROGRAM.format(tests=str(TESTS), token_s=token_s, drain_s=drain_s)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Server(process)
        finally:
            process.kill()


def complete(url: str, results: list[httpx.Response]) -> threading.Thread:
    """Ask in a thread of its own and return once the engine works on it."""

    def ask() -> None:
        body = {"prompt": "Hi", "max_tokens": 100}
        results.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    return thread


def test_a_signal_stops_an_idle_server():
    with running() as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0
        assert server.process.stdout.read() == ""
        assert not any("Traceback" in line for line in server.lines)


def test_running_requests_finish_first():
    results: list[httpx.Response] = []
    with running(token_s=0.1) as server:
        asking = complete(server.url, results)
        server.process.send_signal(signal.SIGINT)
        asking.join()
        assert server.finish() == 0
    assert results[0].status_code == 200
    assert results[0].json()["choices"][0]["finish_reason"] == "stop"


def test_what_does_not_finish_in_time_is_told():
    results: list[httpx.Response] = []
    with running(token_s=0.5, drain_s=0.5) as server:
        asking = complete(server.url, results)
        server.process.send_signal(signal.SIGTERM)
        asking.join()
        assert server.finish() == 0
    assert results[0].status_code == 503
    assert results[0].json()["error"]["code"] == "not_ready"


def test_a_second_signal_stops_at_once():
    with running(token_s=60) as server, httpx.Client() as client:
        request = client.build_request(
            "POST", f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=30
        )

        def ask() -> None:
            try:
                client.send(request)
            except httpx.RemoteProtocolError:
                return

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.finish() == 1
        assert time.monotonic() - started < 3
        asking.join()
        assert any("stopped at once" in line for line in server.lines)
