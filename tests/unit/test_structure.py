"""The house rules of DESIGN section 2: who may import whom, and how large a room may be."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "manylora_kernels": ROOT / "kernels" / "manylora_kernels",
    "manylora_store": ROOT / "adapters_store" / "manylora_store",
    "manylora_server": ROOT / "server" / "manylora_server",
}
# Each layer of the server may import itself, those before it, and what its row names.
LAYERS = ["core", "model", "adapters", "export", "engine", "api", "cli"]
LOADTESTS = ROOT / "loadtests"


def imports_of(path: Path) -> set[str]:
    """Return the dotted names of all modules that ``path`` imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            found.add(node.module or "")
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def violations(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for name in sorted(imports_of(path))
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


def test_ground_floors_are_independent() -> None:
    kernels = [
        v
        for path in files(PACKAGES["manylora_kernels"])
        for v in violations(
            path, ("manylora_store", "manylora_server", "transformers", "peft", "bitsandbytes")
        )
    ]
    store = [
        v
        for path in files(PACKAGES["manylora_store"])
        for v in violations(path, ("manylora_kernels", "manylora_server"))
    ]
    assert kernels + store == []


def test_the_server_s_layers_import_downward_only() -> None:
    wrong = []
    for index, layer in enumerate(LAYERS):
        above = tuple(f"manylora_server.{name}" for name in LAYERS[index + 1 :])
        folder = PACKAGES["manylora_server"] / layer
        assert files(folder), f"layer {layer} is missing"
        for path in files(folder):
            wrong += violations(path, above)
    assert wrong == []


def test_core_and_scheduling_know_no_torch() -> None:
    server = PACKAGES["manylora_server"]
    paths = files(server / "core")
    paths += [server / "engine" / name for name in ("scheduler.py", "kv_blocks.py", "sequence.py")]
    assert [v for path in paths for v in violations(path, ("torch", "transformers"))] == []


def test_load_tests_speak_http_only() -> None:
    paths = files(LOADTESTS)
    assert paths
    assert [v for path in paths for v in violations(path, tuple(PACKAGES))] == []


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_rooms_are_small(name: str) -> None:
    large = {
        str(path.relative_to(ROOT)): count
        for path in files(PACKAGES[name])
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert large == {}


def test_version_and_changelog_agree() -> None:
    version = importlib.metadata.version("manylora")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    assert headings, "the changelog has no release"
    assert headings[0].startswith(f"## {version}")
