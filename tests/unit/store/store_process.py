"""A store used in a process of its own: ``python -m unit.store.store_process JOB HOME URL ...``.

Every job prints one line once it has done what it is for; some then wait for their input to end.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from manylora_store.registry.database import Database
from manylora_store.store import AdapterStore
from unit.store.churn import churn, seeds_by_digest
from unit.store.small_adapters import publish

ROOT = Path(__file__).parents[3]
SOURCES = ("tests", "adapters_store")


def command(job: str, home: Path, url: str, *arguments: object) -> list[str]:
    """Return the command line of ``job``."""
    return [
        sys.executable,
        "-W",
        "error",
        "-m",
        "unit.store.store_process",
        job,
        str(home),
        url,
        *map(str, arguments),
    ]


def environment() -> dict[str, str]:
    """Return this process's environment, with the packages that the jobs import."""
    paths = [str(ROOT / folder) for folder in SOURCES]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def running(job: str, home: Path, url: str, *arguments: object) -> Iterator[str]:
    """Run ``job`` until it prints its line, which is yielded; end its input at the end."""
    process = subprocess.Popen(
        command(job, home, url, *arguments),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()
    assert process.returncode == 0


def hold_the_writers_lock(home: Path, url: str) -> None:
    """Keep every other writer waiting until the input ends."""
    with closing(Database(url, 10.0)) as database, database.write():
        print("held", flush=True)
        sys.stdin.read()


def open_and_publish(home: Path, url: str, name: str, seed: str) -> None:
    """Open the store and publish one adapter."""
    with closing(AdapterStore(home, registry_url=url)) as store:
        print(publish(store, name, int(seed)).record.digest, flush=True)


def stay_in_staging(home: Path, url: str) -> None:
    """Stage an adapter, and keep it until the input ends."""
    with closing(AdapterStore(home, registry_url=url)) as store, store.stage() as staging:
        (staging.path / "adapter_config.json").write_text("{}")
        print(staging.path, flush=True)
        sys.stdin.read()


def churn_and_count(home: Path, url: str, rounds: str, seed: str) -> None:
    """Change the names of ``churn`` at random."""
    with tempfile.TemporaryDirectory() as folder:
        known = seeds_by_digest(Path(folder))
    with closing(AdapterStore(home, registry_url=url)) as store:
        print(churn(store, int(rounds), random.Random(seed), known), flush=True)


JOBS = {
    job.__name__: job
    for job in (hold_the_writers_lock, open_and_publish, stay_in_staging, churn_and_count)
}


if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
