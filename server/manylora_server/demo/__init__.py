"""The demo that ships with manylora: a small language model of very short tales and its adapters.

Only paths and names live here, so that looking them up needs neither torch nor transformers.
`python -m manylora_server.demo.train` makes all of the assets again from the project's own text.
"""

from __future__ import annotations

from pathlib import Path

ASSETS_DIR = Path(__file__).resolve().parent / "assets"
BASE_DIR = ASSETS_DIR / "base"
ADAPTERS_DIR = ASSETS_DIR / "adapters"

DEMO_PROMPT = "Once upon a time"
"""An opening that the base and every adapter continue, each in its own way."""


def demo_adapters() -> dict[str, Path]:
    """The adapters that ship with the demo: name to folder, sorted by name."""
    folders = (path.parent for path in ADAPTERS_DIR.glob("*/adapter_config.json"))
    return {folder.name: folder for folder in sorted(folders)}
