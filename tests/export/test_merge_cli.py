"""``manylora merge`` as a process: what it prints, how it ends, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_server.export.output import PREFIX
from support.adapters import lora, save_adapter
from support.exporting import assert_same, load, with_peft
from support.models import save_model
from support.server_process import Run, wait_until

Merge = Callable[..., Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    base = save_model("llama", folder / "base")
    save_adapter(base, lora("llama"), folder / "a", 1)
    save_adapter(base, lora("llama", r=2), folder / "b", 2)
    return folder


@pytest.fixture
def merge(folder: Path, tmp_path: Path) -> Merge:
    def run(*arguments: str, wait: bool = True, **options: Any) -> Run:
        base = options.pop("base", folder / "base")
        output = options.pop("output", tmp_path / "out")
        where = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        started = Run(
            where, "merge", str(base), *arguments, f"--output={output}", env={}, **options
        )
        if wait:
            started.finish()
        return started

    return run


def failed(run: Run, *parts: str) -> None:
    """Assert that it ended with one clear line and left nothing."""
    assert run.exit_code == 1, run.stderr
    assert run.stdout == ""
    line = run.stderr.splitlines()[-1]
    assert line.startswith("manylora: error: "), run.stderr
    for part in parts:
        assert part in line
    assert "Traceback" not in run.stderr


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if not path.name.startswith("run-")]


def test_it_writes_a_checkpoint_and_reports(merge: Merge, folder: Path, tmp_path: Path) -> None:
    run = merge(f"--adapter={folder / 'a'}", "--json", forked=False)
    assert run.exit_code == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["path"] == str(tmp_path / "out")
    assert report["equivalence"]["same_base"]["max_relative_error"] < 1e-4
    assert "100%" in run.stderr
    # Loaded by a process that knows nothing of this project.
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("manylora")]
ids = torch.tensor([[5, 60, 7, 200, 31, 8, 9]])
print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peft = with_peft(folder / "base", folder / "a")
    ids = torch.tensor([[5, 60, 7, 200, 31, 8, 9]])
    expected = peft.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(done.stdout) == expected


def test_fields_are_separated_by_tabs(merge: Merge, folder: Path, tmp_path: Path) -> None:
    run = merge(f"--adapter={folder / 'a'}=0.5", f"--adapter={folder / 'b'}=2", "--no-check")
    assert run.exit_code == 0, run.stderr
    fields = dict(line.split("\t") for line in run.stdout.splitlines())
    assert fields["path"] == str(tmp_path / "out")
    assert json.loads(fields["base"])["weights"] == "dense"
    weights = [(a["name"], a["weight"]) for a in json.loads(fields["adapters"])]
    assert weights == [("a", 0.5), ("b", 2.0)]


def test_an_archive_and_a_file_url_are_adapters_too(
    merge: Merge, folder: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "run-a.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            file.add(folder / "a" / name, name)
    run = merge(f"--adapter={archive}", "--no-check")
    assert run.exit_code == 0, run.stderr
    assert_same(load(tmp_path / "out"), with_peft(folder / "base", folder / "a"))


def test_one_adapter_folder(merge: Merge, folder: Path, tmp_path: Path) -> None:
    run = merge(f"--adapter=file:{folder / 'a'}", "--adapter-only", "--method=svd", "--rank=2")
    assert run.exit_code == 0, run.stderr
    assert "svd_relative_error\t0." in run.stdout
    assert with_peft(folder / "base", tmp_path / "out").peft_config["default"].r == 2


class TestRefusals:
    def test_a_base_that_is_not_there(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        failed(merge(f"--adapter={folder / 'a'}", base=tmp_path / "no"), "MODEL", "no such folder")

    def test_a_base_without_weights(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        bare = tmp_path / "run-base"
        bare.mkdir()
        (bare / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        failed(merge(f"--adapter={folder / 'a'}", base=bare), "MODEL", "holds no weights")

    def test_a_base_that_lacks_a_tensor(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        bad = tmp_path / "run-base"
        bad.mkdir()
        (bad / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        tensors = load_file(folder / "base" / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, bad / "model.safetensors")
        failed(merge(f"--adapter={folder / 'a'}", base=bad), "no tensor for 'model.norm.weight'")

    def test_a_truncated_base(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        bad = tmp_path / "run-base"
        bad.mkdir()
        (bad / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        data = (folder / "base" / "model.safetensors").read_bytes()
        (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
        failed(merge(f"--adapter={folder / 'a'}", base=bad), "MODEL", "cannot be read")

    def test_an_adapter_that_is_not_there(self, merge: Merge, tmp_path: Path) -> None:
        failed(merge("--adapter=nothing-here"), "'nothing-here' is no folder of this machine")

    def test_an_adapter_of_another_base(self, merge: Merge, tmp_path: Path) -> None:
        other = save_model("gpt2", tmp_path / "run-other")
        adapter = save_adapter(other, lora("gpt2"), tmp_path / "run-adapter", 1)
        failed(merge(f"--adapter={adapter}"), "matches no module of the base")

    def test_an_adapter_whose_weights_do_not_match(
        self, merge: Merge, folder: Path, tmp_path: Path
    ) -> None:
        adapter = tmp_path / "run-adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_bytes(
            (folder / "a" / "adapter_config.json").read_bytes()
        )
        tensors = load_file(folder / "a" / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, adapter / "adapter_model.safetensors")
        failed(merge(f"--adapter={adapter}"), name, "[4, 63]", "expects [4, 64]")

    def test_an_output_that_exists(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
        failed(merge(f"--adapter={folder / 'a'}"), "out exists already")
        assert (tmp_path / "out" / "mine").read_text() == "precious"

    def test_an_output_without_a_parent(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        run = merge(f"--adapter={folder / 'a'}", output=tmp_path / "no" / "out")
        failed(run, f"{tmp_path / 'no'} is no folder")

    def test_unequal_ranks(self, merge: Merge, folder: Path, tmp_path: Path) -> None:
        run = merge(f"--adapter={folder / 'a'}", f"--adapter={folder / 'b'}", "--method=ties")
        failed(run, "needs adapters of equal ranks", "a has 4, b has 2", "cat")
        assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    number: signal.Signals, merge: Merge, folder: Path, tmp_path: Path
) -> None:
    run = merge(f"--adapter={folder / 'a'}", wait=False)
    wait_until(lambda: list(tmp_path.glob(f"{PREFIX}*/model.safetensors")), "the first file")
    run.send(number)
    assert run.finish() == 1
    assert run.stderr.splitlines()[-1] == "manylora: interrupted; nothing was kept"
    assert left(tmp_path) == []


def test_a_killed_run_is_swept_by_the_next(merge: Merge, folder: Path, tmp_path: Path) -> None:
    run = merge(f"--adapter={folder / 'a'}", wait=False)
    wait_until(lambda: list(tmp_path.glob(f"{PREFIX}*/model.safetensors")), "the first file")
    run.send(signal.SIGKILL)
    run.finish()
    [remains] = left(tmp_path)
    assert remains.startswith(PREFIX)
    assert merge(f"--adapter={folder / 'a'}", "--no-check").exit_code == 0
    assert left(tmp_path) == ["out"]
    assert_same(load(tmp_path / "out"), with_peft(folder / "base", folder / "a"))
