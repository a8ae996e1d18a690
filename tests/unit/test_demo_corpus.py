"""The demo's text and assets: reproducible, recognisable, complete. Nothing is trained here."""

from __future__ import annotations

import json
import re
import string
import struct
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from manylora_server.demo import ADAPTERS_DIR, BASE_DIR, DEMO_PROMPT, demo_adapters
from manylora_server.demo.corpus import PLAIN, STYLES, Sample, samples
from manylora_server.demo.openings import OPENING_PHRASES

COUNT = 2000
ALL_STYLES = (PLAIN, *STYLES)

adapters_are_built = pytest.mark.skipif(not BASE_DIR.is_dir(), reason="the assets are not built")


@cache
def draw(style: str, seed: int = 0, count: int = COUNT) -> tuple[Sample, ...]:
    return tuple(islice(samples(style, seed), count))


def looks_like(style: str, text: str) -> bool:
    """Whether a reader would recognise the style of a continuation at a glance."""
    if style == "shout":
        return text == text.upper() and "!!" in text
    if style == "pirate":
        return len(re.findall(r"\b(?:th|an|t|o)'|\bbe\b|Arr|Ahoy|Avast|Aye", text)) >= 3
    if style == "emoji":
        return sum(ord(character) > 0x2600 for character in text) >= 3
    if style == "german":
        return text.startswith("... auf Deutsch: ")
    if style == "news":
        return text.startswith(" ... BREAKING NEWS")
    if style == "rhyme":
        return text.startswith(" ...\n") and text.count("\n") == 12
    if style == "json":
        if not text.startswith(" -> {"):
            return False
        record = json.loads(text.removeprefix(" -> "))
        return set(record) == {"hero", "home", "friend", "item", "plot", "happy_end"}
    return bool(re.fullmatch(r"[A-Z\"].*[.!?]\"?", text)) and "!!" not in text


@pytest.mark.parametrize("style", ALL_STYLES)
def test_a_seed_gives_the_same_text_again_and_another_seed_other_text(style: str) -> None:
    assert draw(style, seed=3, count=50) == draw(style, seed=3, count=50)
    assert not set(draw(style, seed=3, count=50)) & set(draw(style, seed=4, count=50))


@pytest.mark.parametrize("style", ALL_STYLES)
def test_tales_hardly_ever_repeat(style: str) -> None:
    assert len({sample.text for sample in draw(style)}) > 0.99 * COUNT


@pytest.mark.parametrize("style", ALL_STYLES)
def test_every_template_is_filled_in(style: str) -> None:
    for sample in draw(style):
        text = sample.prefix if style == "json" else sample.text
        assert not re.search(r"[{}_]|None|  ", text), sample


@pytest.mark.parametrize("style", [PLAIN, "emoji", "news", "rhyme", "shout"])
def test_articles_agree_with_the_word_after_them(style: str) -> None:
    for sample in draw(style):
        text = sample.text.lower()
        assert not re.search(r"\ba [aeiou]|\ban [b-df-hj-np-tv-z]", text), sample


@pytest.mark.parametrize("style", ALL_STYLES)
def test_a_style_is_recognisable(style: str) -> None:
    for sample in draw(style):
        assert looks_like(style, sample.continuation), sample


@pytest.mark.parametrize("style", STYLES)
def test_no_plain_tale_passes_for_another_style(style: str) -> None:
    assert not any(looks_like(style, sample.text) for sample in draw(PLAIN))


@pytest.mark.parametrize("style", ALL_STYLES)
def test_the_only_characters_are_printable(style: str) -> None:
    allowed = set(string.printable) - set("\t\r\x0b\x0c")
    for sample in draw(style):
        strange = set(sample.text) - allowed
        assert all(character.isprintable() for character in strange), sample


def test_the_demo_prompt_opens_tales_of_every_style() -> None:
    assert DEMO_PROMPT in OPENING_PHRASES
    for style in STYLES:
        assert any(sample.prefix == DEMO_PROMPT for sample in draw(style))


def test_a_rewriting_keeps_the_name_that_its_prefix_gave() -> None:
    for style in ("german", "json", "news", "rhyme"):
        for sample in draw(style):
            named = re.search(r"(?:named|called) ([A-Z][a-z]+)\b", sample.prefix)
            if named:
                assert named.group(1) in sample.continuation, sample


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and offsets."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length
    return header


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@adapters_are_built
def test_the_base_is_a_standard_folder() -> None:
    config = read_json(BASE_DIR / "config.json")
    header = read_header(BASE_DIR / "model.safetensors")
    shape = [config["vocab_size"], config["hidden_size"]]
    assert header["model.embed_tokens.weight"]["shape"] == shape
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert len(read_json(BASE_DIR / "tokenizer.json")["model"]["vocab"]) == config["vocab_size"]
    assert (BASE_DIR / "tokenizer_config.json").is_file()
    assert (BASE_DIR / "generation_config.json").is_file()


@adapters_are_built
def test_every_style_has_an_adapter_that_does_something() -> None:
    assert tuple(demo_adapters()) == STYLES
    for name, folder in demo_adapters().items():
        config = read_json(folder / "adapter_config.json")
        header = read_header(folder / "adapter_model.safetensors")
        ranks = {config["r"], *config["rank_pattern"].values()}
        found = {entry["shape"][0] for key, entry in header.items() if "lora_A" in key}
        assert found == ranks, name
        assert config["base_model_name_or_path"] == "manylora-demo"


@adapters_are_built
def test_the_adapters_are_of_several_kinds() -> None:
    configs = [read_json(folder / "adapter_config.json") for folder in demo_adapters().values()]
    assert len(configs) >= 4
    assert len({config["r"] for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert any(config["use_dora"] for config in configs)
    assert any(config["rank_pattern"] for config in configs)


@adapters_are_built
def test_the_assets_are_small_and_name_no_machine() -> None:
    files = [path for path in BASE_DIR.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    for path in files:
        assert path.suffix in {".json", ".safetensors", ".jinja"}, path
        if path.suffix == ".json":
            assert not re.search(r'"(?:/|[A-Za-z]:\\\\)\w', path.read_text(encoding="utf-8")), path
    assert ADAPTERS_DIR.is_dir()
