"""Where results are written: all or nothing, on full disks too, and within bounds of memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manylora_server.core.errors import InvalidRequestError, ManyloraError, StorageError
from manylora_server.export import equivalence
from manylora_server.export.output import PREFIX, new_folder, sweep
from manylora_server.export.progress import CancelledError, Progress
from support.adapters import lora, save_adapter
from support.exporting import export
from support.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    save_adapter(save_model("llama", folder / "base"), lora("llama"), folder / "a", 1)
    return folder


class TestNewFolder:
    def test_it_becomes_the_goal_when_all_went_well(self, tmp_path: Path) -> None:
        with new_folder(tmp_path / "goal") as folder:
            (folder / "x").write_text("x")
            assert not (tmp_path / "goal").exists()
        assert [path.name for path in tmp_path.rglob("*")] == ["goal", "x"]

    @pytest.mark.parametrize("error", [ValueError, CancelledError, KeyboardInterrupt])
    def test_otherwise_nothing_is_left(self, error: type[BaseException], tmp_path: Path) -> None:
        def write_and_fail() -> None:
            with new_folder(tmp_path / "goal") as folder:
                (folder / "x").write_text("x")
                raise error

        with pytest.raises(error):
            write_and_fail()
        assert list(tmp_path.iterdir()) == []

    def test_a_goal_that_came_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        with (
            pytest.raises(InvalidRequestError, match="exists already"),
            new_folder(tmp_path / "goal"),
        ):
            (tmp_path / "goal").mkdir()
        assert [path.name for path in tmp_path.iterdir()] == ["goal"]

    def test_a_sweep_spares_what_is_being_written(self, tmp_path: Path) -> None:
        dead = tmp_path / f"{PREFIX}dead"
        (dead / "deep").mkdir(parents=True)
        other = tmp_path / "other"
        other.mkdir()
        with new_folder(tmp_path / "goal") as folder:
            assert not dead.exists()
            assert sweep(tmp_path) == 0
            assert folder.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {"goal", "other"}

    def test_sweeps_side_by_side(self, tmp_path: Path) -> None:
        def work(index: int) -> None:
            for turn in range(20):
                with new_folder(tmp_path / f"goal-{index}-{turn}") as folder:
                    (folder / "x").write_text("x")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(tmp_path.glob("goal-*/x"))) == 80
        assert len(list(tmp_path.iterdir())) == 80


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize(("call", "after"), [("posix_fallocate", 0), ("pwrite", 0), ("pwrite", 3)])
def test_a_disk_that_fills_up_leaves_nothing(
    call: str,
    after: int,
    adapter_only: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = getattr(os, call), iter(range(1000))

    def full(*arguments: int) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(*arguments) or 0)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match="the disk is full"):
        export(folder / "base", {folder / "a": 1.0}, tmp_path / "out", adapter_only=adapter_only)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    export(folder / "base", {folder / "a": 1.0}, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_room_is_looked_for_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    with pytest.raises(StorageError, match=r"takes \d+ bytes, and the disk of .* has 400000 left"):
        export(folder / "base", {folder / "a": 1.0}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 1, 7])
def test_cancelled_at_any_step_nothing_is_left(step: int, folder: Path, tmp_path: Path) -> None:
    steps = 0
    shares: list[float] = []

    class Counting(Progress):
        def advance(self, amount: int) -> None:
            nonlocal steps
            if steps == step:
                self.cancel()
            steps += 1
            super().advance(amount)

    progress = Counting(lambda share, left: shares.append(share))
    with pytest.raises(CancelledError):
        export(folder / "base", {folder / "a": 1.0}, tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []
    assert all(share < 1 for share in shares)


def test_progress_grows_to_one_and_says_how_long(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "_PAUSE_S", 0)
    told: list[tuple[float, float | None]] = []
    progress = Progress(lambda share, left: told.append((share, left)))
    export(folder / "base", {folder / "a": 1.0}, tmp_path / "out", progress=progress)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 10
    assert all(left is not None and left >= 0 for _, left in told)
    assert told[-1][1] == 0


def test_cancelled_while_the_result_is_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    progress = Progress(lambda share, left: None)

    def start(*arguments, **options):
        processes.append(popen(*arguments, **options))
        progress.cancel()
        return processes[-1]

    monkeypatch.setattr(equivalence.subprocess, "Popen", start)
    with pytest.raises(CancelledError):
        export(
            folder / "base", {folder / "a": 1.0}, tmp_path / "out", progress=progress, check=True
        )
    assert processes[0].poll() is not None
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_loaded_is_no_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manylora_server.export import export as module

    def broken(target: Path, plan: object, weights: object) -> None:
        (target / "config.json").write_text('{"model_type": "llama"}')

    monkeypatch.setattr(module, "write_config", broken)
    with pytest.raises(ManyloraError, match="cannot be loaded or run again, so it was removed"):
        export(folder / "base", {folder / "a": 1.0}, tmp_path / "out", check=True)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys
from pathlib import Path
from support.exporting import export

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, base, adapter, goal, dtype = map(Path, sys.argv[1:])
export(small / "base", {small / "a": 1.0}, goal / "small", dtype=str(dtype))
before = peak()
report = export(base, {adapter: 1.0}, goal / "large", dtype=str(dtype), max_shard_bytes=2**26)
print(peak() - before, report["bytes"])
"""


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_memory_is_that_of_less_than_two_layers(dtype: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    layer = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    adapter = save_adapter(model, lora("llama"), tmp_path / "a", 1)
    del model
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, folder, tmp_path / "base", adapter, tmp_path, dtype],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tests}"},
    )
    assert done.returncode == 0, done.stderr
    extra, size = map(int, done.stdout.split()[-2:])
    assert size > (5 * layer if dtype == "fp32" else 5 * layer / 8)
    assert extra < 2 * layer, f"{extra} bytes for layers of {layer}"
