"""Staging folders: limits, names, faults of the disk, and sweeping beside those who work."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manylora_store.errors import (
    AdapterInvalidError,
    StoreFullError,
    StoreUnavailableError,
    TooLargeError,
)
from manylora_store.intake.staging import MAX_FILES, Staging, sweep_staging
from unit.store.intake_support import BIN, CONFIG, WEIGHTS

LIMIT = 1000


def test_what_is_received_lies_in_a_private_folder_until_the_end(tmp_path: Path) -> None:
    root = tmp_path / "home" / "staging"
    with Staging(root, LIMIT) as staging:
        with staging.receive(CONFIG) as sink:
            assert sink.write(b"one ") == 4
            sink.write(memoryview(bytearray(b"two")))
        assert staging.received(CONFIG) == staging.path / CONFIG
        assert (staging.path / CONFIG).read_bytes() == b"one two"
        assert staging.received(WEIGHTS) is None
        assert staging.path.stat().st_mode & 0o777 == 0o700
        assert staging.path.parent == root
    assert list(root.iterdir()) == []


def test_the_folder_is_gone_after_an_error_and_with_a_file_left_open(tmp_path: Path) -> None:
    sinks = []

    def fail_in_the_middle() -> None:
        with Staging(tmp_path, LIMIT) as staging:
            sinks.append(staging.receive(CONFIG))
            sinks[0].write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreUnavailableError, match="ended"):
        sinks[0].write(b"the other half")


def test_files_of_no_adapter_are_counted_and_named_but_not_kept(tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        with staging.receive("README.md") as sink:
            sink.write(bytes(600))
        assert list(staging.path.iterdir()) == []
        assert staging.ignored == ("README.md",)
        with staging.receive(CONFIG) as sink, pytest.raises(TooLargeError):
            sink.write(bytes(401))


def test_the_limit_is_for_all_files_together_and_stays_broken(tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        first, second = staging.receive(CONFIG), staging.receive(WEIGHTS)
        first.write(bytes(500))
        second.write(bytes(500))
        with pytest.raises(TooLargeError) as caught:
            second.write(b"x")
        assert caught.value.limit == LIMIT
        assert str(LIMIT) in caught.value.message
        with pytest.raises(TooLargeError):
            first.write(b"")
        assert sum(file.stat().st_size for file in staging.path.iterdir()) == LIMIT


def test_the_limit_holds_anew_for_what_is_made_of_the_files(tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        staging.receive("archive").write(bytes(LIMIT))
        with pytest.raises(TooLargeError):
            staging.expect(1)
        staging.restart_count()
        staging.expect(LIMIT)
        sink = staging.receive(WEIGHTS)
        sink.write(bytes(LIMIT))
        with pytest.raises(TooLargeError):
            sink.write(b"x")


def test_threads_cannot_write_past_the_limit_together(tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        sinks = [staging.receive(name) for name in (CONFIG, WEIGHTS, BIN)]
        refused = []

        def work(index: int) -> None:
            try:
                for _ in range(LIMIT):
                    sinks[index % 3].write(b"abc")
            except TooLargeError:
                refused.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(refused) == list(range(6))
        assert sum(file.stat().st_size for file in staging.path.iterdir()) == LIMIT // 3 * 3


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a/b", "a\\b", ".hidden", "a\0b", "a\nb", "\ud800", "x" * 256],
)
def test_only_plain_file_names_are_taken(name: str, tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        with pytest.raises(AdapterInvalidError, match="plain name"):
            staging.receive(name)
        assert list(staging.path.iterdir()) == []


@pytest.mark.parametrize("name", [CONFIG, "README.md"])
def test_a_file_given_twice(name: str, tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        staging.receive(name)
        with pytest.raises(AdapterInvalidError, match=f"{name}.*given twice"):
            staging.receive(name)


def test_too_many_files(tmp_path: Path) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        for index in range(MAX_FILES):
            staging.receive(f"file-{index}")
        with pytest.raises(AdapterInvalidError, match=str(MAX_FILES)):
            staging.receive(CONFIG)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EFBIG, StoreFullError),
        (errno.EIO, StoreUnavailableError),
    ],
)
def test_a_disk_that_fails_in_the_middle(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Staging(tmp_path, LIMIT) as staging:
        sink = staging.receive(WEIGHTS)
        sink.write(b"first")

        def fail(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(error, match=WEIGHTS):
            sink.write(b"second")
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_before_the_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = tmp_path / "staging"
    root.mkdir()
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(StoreFullError):
        Staging(root, LIMIT).__enter__()
    assert list(root.iterdir()) == []


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("")
    with pytest.raises(StoreUnavailableError):
        Staging(tmp_path / "staging", LIMIT).__enter__()


FULL = """
import resource, sys
from pathlib import Path
from manylora_store.errors import StoreFullError
from manylora_store.intake.staging import Staging
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with Staging(Path(sys.argv[1]), 10**9) as staging:
    sink = staging.receive("adapter_model.safetensors")
    try:
        for _ in range(100):
            sink.write(bytes(3000))
    except StoreFullError as error:
        print(error.message)
        sys.exit(0 if (staging.path / "adapter_model.safetensors").stat().st_size == 100_000 else 2)
"""


def test_a_file_larger_than_the_system_lets_it_be(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "adapter_model.safetensors cannot be written" in result.stdout
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from manylora_store.intake.staging import Staging
with Staging(Path(sys.argv[1]), 10**9) as staging:
    sink = staging.receive("adapter_config.json")
    sink.write(b"half of it")
    print(staging.path, flush=True)
    sys.stdin.read()
"""


def test_a_sweep_takes_the_folders_of_dead_processes_only(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, Staging(tmp_path, LIMIT) as own:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        assert sweep_staging(tmp_path) == 0
        assert (theirs / CONFIG).read_bytes() == b"half of it"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert theirs.is_dir()
        assert sweep_staging(tmp_path) == 1
        assert not theirs.exists()
        assert own.path.is_dir()
        assert sweep_staging(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_halves_and_leaves_what_is_not_of_this_kind(tmp_path: Path) -> None:
    assert sweep_staging(tmp_path / "nowhere") == 0
    (tmp_path / "README").write_text("mine")
    (tmp_path / ("a" * 32)).mkdir()
    (tmp_path / ("a" * 32) / "file").write_text("")
    (tmp_path / ("b" * 32 + ".lock")).write_text("")
    assert sweep_staging(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["README"]


def test_a_sweep_between_making_and_taking_the_lock_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep removes the lock file that was just made; the staging then begins anew."""
    lock = fcntl.flock
    swept = []

    def sweep_first(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append(descriptor)
            assert sweep_staging(tmp_path) == 0
            assert list(tmp_path.iterdir()) == []
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with Staging(tmp_path, LIMIT) as staging:
        assert swept
        assert sweep_staging(tmp_path) == 0
        assert staging.path.is_dir()
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_sweeps_and_stagings_at_the_same_time_never_meet(tmp_path: Path) -> None:
    done = threading.Event()
    problems: list[BaseException] = []
    swept = []

    def sweep() -> None:
        try:
            while not done.is_set():
                swept.append(sweep_staging(tmp_path))
        except BaseException as error:
            problems.append(error)
            raise

    def stage() -> None:
        try:
            for _ in range(60):
                with Staging(tmp_path, LIMIT) as staging:
                    with staging.receive(CONFIG) as sink:
                        sink.write(b"content")
                    assert (staging.path / CONFIG).read_bytes() == b"content"
        except BaseException as error:
            problems.append(error)
            raise

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    workers = [threading.Thread(target=stage) for _ in range(4)]
    for thread in sweepers + workers:
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in sweepers:
        thread.join()
    assert problems == []
    assert sum(swept) == 0
    assert list(tmp_path.iterdir()) == []
