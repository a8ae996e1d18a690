"""Many threads and processes on the same names: nothing fails, mixes or stays behind."""

from __future__ import annotations

import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unit.store.churn import check_integrity, churn, seeds_by_digest
from unit.store.conftest import OpenStore
from unit.store.small_adapters import blobs_in, publish
from unit.store.store_process import command, environment


def test_threads_on_the_same_names(open_store: OpenStore, home: Path, tmp_path: Path) -> None:
    known = seeds_by_digest(tmp_path / "known")
    # Two of them, as if the threads were of two processes.
    stores = [open_store(), open_store()]
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(
            lambda number: churn(stores[number % 2], 40, random.Random(number), known), range(6)
        )
        assert sum(found) > 10
    check_integrity(stores[0], home, known)


def test_processes_on_the_same_names(
    open_store: OpenStore, registry_url: str, home: Path, tmp_path: Path
) -> None:
    known = seeds_by_digest(tmp_path / "known")
    processes = [
        subprocess.Popen(
            command("churn_and_count", home, registry_url, 40, number),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    found = [int(process.communicate()[0] or -1) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(found) > 10
    check_integrity(open_store(), home, known)


def test_uploads_of_the_same_content_at_once_are_one_revision(
    open_store: OpenStore, home: Path
) -> None:
    store = open_store()
    start = threading.Barrier(8)

    def upload(number: int) -> bool:
        start.wait(60)
        return publish(store, f"name-{number % 4}", 1).new_revision

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(upload, range(8))) == 1
    assert store.current_names(store.resolve("name-0").digest) == [f"name-{n}" for n in range(4)]
    assert len(store.get("name-0").revisions) == 1
    assert len(blobs_in(home)) == 2


def test_resolving_goes_on_while_others_write(open_store: OpenStore) -> None:
    store = open_store()
    known = {publish(store, "a", seed).record.digest for seed in (1, 2)}
    done = threading.Event()

    def resolve() -> int:
        count = 0
        while not done.is_set():
            assert store.resolve("a").digest in known
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        resolving = [threads.submit(resolve) for _ in range(4)]
        for _ in range(10):
            for digest in sorted(known):
                store.rollback("a", digest)
        done.set()
        assert all(future.result() > 0 for future in resolving)
