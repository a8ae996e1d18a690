"""What a store knows after adapters were published: names, revisions, lists, files."""

from __future__ import annotations

import gc
import stat
import tracemalloc
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from manylora_store.checkpoint.folder import open_folder
from manylora_store.errors import (
    AmbiguousDigestError,
    UnknownAdapterError,
    UnknownRevisionError,
)
from manylora_store.records import RevisionRef
from manylora_store.store import AdapterStore
from unit.store.conftest import OpenStore
from unit.store.small_adapters import (
    BASE,
    blobs_in,
    digest_of,
    leftovers_in,
    publish,
    record_of,
    staged,
    write_adapter,
)


def test_a_published_adapter_has_all_its_facts(store: AdapterStore) -> None:
    with staged(store, 1, name="poet", source="hf:org/poet@main") as files:
        record = replace(record_of(files), receipt={"difference": 1e-6, "threshold": 0.01})
        published = store.publish("poet", files, record)
    assert published.new_revision
    assert published.previous is None
    expected = replace(
        record,
        revisions=(RevisionRef(record.digest, record.created_at, "hf:org/poet@main"),),
        aliases=("poet",),
    )
    assert published.record == expected
    assert store.get("poet") == expected
    assert store.get("poet").as_dict() == {
        "name": "poet",
        "digest": record.digest,
        "peft_type": "LORA",
        "rank": 1,
        "ranks": {"model.layers.0.self_attn.q_proj": 1},
        "target_modules": ["q_proj"],
        "parameters": 4,
        "bytes": record.bytes,
        "base_model": "org/base",
        "base_fingerprint": BASE,
        "created_at": 1_700_000_000,
        "source": "hf:org/poet@main",
        "unmixable": None,
        "warnings": ["a warning"],
        "receipt": {"difference": 1e-6, "threshold": 0.01},
        "pinned": False,
        "aliases": ["poet"],
        "revisions": [
            {
                "digest": record.digest,
                "created_at": 1_700_000_000,
                "source": "hf:org/poet@main",
            }
        ],
    }


def test_the_stored_files_are_those_published(store: AdapterStore, tmp_path: Path) -> None:
    original = write_adapter(tmp_path / "original", 1)
    digest = publish(store, "a", 1).record.digest
    with store.files(digest) as files:
        assert files.digest == digest
        assert files.config.rank == 1
        assert files.config_path.read_bytes() == (original / "adapter_config.json").read_bytes()
        assert (
            files.weights.path.read_bytes() == (original / "adapter_model.safetensors").read_bytes()
        )


def test_a_restart_changes_nothing(open_store: OpenStore) -> None:
    first = open_store()
    publish(first, "a", 1)
    publish(first, "a", 2)
    publish(first, "b", 3)
    first.set_pinned("b", True)
    before = first.list(limit=10)
    first.close()
    assert open_store().list(limit=10) == before


def test_publishing_the_same_content_again_changes_nothing(store: AdapterStore, home: Path) -> None:
    first = publish(store, "a", 1, source="once")
    blobs = blobs_in(home)
    again = publish(store, "a", 1, source="twice")
    assert not again.new_revision
    assert again.previous is None
    assert again.record == first.record
    assert blobs_in(home) == blobs


def test_the_same_content_in_other_bytes_keeps_the_files_stored(
    store: AdapterStore, home: Path
) -> None:
    first = publish(store, "a", 1)
    blobs = blobs_in(home)
    other = publish(store, "b", 1, padding=3)
    assert other.record.digest == first.record.digest
    assert not other.new_revision
    assert blobs_in(home) == blobs


@pytest.mark.parametrize("padding", [0, 3], ids=["same-bytes", "other-bytes"])
def test_publishing_again_mends_what_is_missing(
    store: AdapterStore, home: Path, padding: int
) -> None:
    digest = publish(store, "a", 1).record.digest
    for blob in blobs_in(home):
        (home / "blobs" / "sha256" / blob[:2] / blob).unlink()
    publish(store, "a", 1, padding=padding)
    with store.files(digest) as files:
        assert files.weights.header
    assert len(blobs_in(home)) == 2


def test_publishing_again_mends_a_truncated_file(store: AdapterStore, home: Path) -> None:
    digest = publish(store, "a", 1).record.digest
    with store.files(digest) as files:
        weights = files.weights.path.resolve()
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4])
    publish(store, "a", 1, padding=3)
    with store.files(digest) as files:
        assert files.weights.path.resolve() != weights
    assert len(blobs_in(home)) == 2


def test_a_later_check_replaces_what_an_earlier_one_found(store: AdapterStore) -> None:
    with staged(store, 1) as files:
        record = replace(record_of(files), receipt={"difference": 1.0})
        store.publish("a", files, record)

    def check_again(**changes: object) -> None:
        with staged(store, 1) as files:
            store.publish("a", files, replace(record_of(files), **changes))  # type: ignore[arg-type]

    check_again(warnings=("another",))
    assert store.get("a").warnings == ("another",)
    assert store.get("a").receipt == {"difference": 1.0}, "no newer receipt of the same base"
    check_again(receipt={"difference": 2.0})
    assert store.get("a").receipt == {"difference": 2.0}
    check_again(base_fingerprint="c" * 64)
    assert store.get("a").base_fingerprint == "c" * 64
    assert store.get("a").receipt is None, "the receipt was of another base"


def test_files_from_elsewhere_are_copied_and_left_alone(
    store: AdapterStore, tmp_path: Path, home: Path
) -> None:
    folder = write_adapter(tmp_path / "mine", 1)
    before = {path: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
    files = open_folder(folder, "a", f"file:{folder}")
    store.publish("a", files, record_of(files))
    for path, (content, status) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_ino == status.st_ino
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(status.st_mode)
        assert path.stat().st_nlink == 1
    assert len(blobs_in(home)) == 2
    assert leftovers_in(home) == []


def test_a_record_of_other_files_is_refused(store: AdapterStore, home: Path) -> None:
    with staged(store, 1) as files, pytest.raises(ValueError, match="the record is of"):
        store.publish("a", files, replace(record_of(files), digest="0" * 64))
    assert store.count() == 0
    assert blobs_in(home) == set()


@pytest.mark.parametrize("name", ["", "a\0b", "é", "a" * 129, "\ud800", "line\nbreak"])
def test_a_name_that_no_registry_holds_is_refused(
    store: AdapterStore, home: Path, name: str
) -> None:
    with staged(store, 1) as files, pytest.raises(ValueError, match="cannot be registered"):
        store.publish(name, files, record_of(files))
    assert store.count() == 0
    assert blobs_in(home) == set()
    for ask in (store.get, store.resolve, store.remove):
        with pytest.raises(UnknownAdapterError, match="no adapter is named"):
            ask(name)


def test_odd_sources_are_stored_as_text(store: AdapterStore) -> None:
    assert publish(store, "a", 1, source="file:/\ud800\0").record.source == "file:/\\ud800\\0"
    assert publish(store, "b", 2, source="ü" * 5000).record.source == "ü" * 4096


def test_resolve_finds_the_current_revision_and_earlier_ones(store: AdapterStore) -> None:
    old = publish(store, "a", 1).record.digest
    new = publish(store, "a", 2).record.digest
    current = store.resolve("a")
    assert (current.name, current.digest, current.base_fingerprint) == ("a", new, BASE)
    assert current.current
    assert store.resolve("a", new[:8]) == current
    assert store.resolve("a", new) == current
    earlier = store.resolve("a", old[:8])
    assert earlier.digest == old
    assert not earlier.current


def test_resolve_says_why_it_finds_nothing(store: AdapterStore) -> None:
    publish(store, "a", 1)
    elsewhere = publish(store, "b", 2).record.digest
    with pytest.raises(UnknownAdapterError, match="no adapter is named 'c'"):
        store.resolve("c")
    with pytest.raises(UnknownAdapterError, match="no adapter is named 'c'"):
        store.resolve("c", elsewhere[:8])
    with pytest.raises(UnknownRevisionError, match=f"'a' never had .* {elsewhere[:8]}"):
        store.resolve("a", elsewhere[:8])
    for malformed in ("", "1234567", "0" * 65, "ABCDEF01", "12345678\n", "%", "\0" * 8):
        with pytest.raises(UnknownRevisionError, match="is no digest"):
            store.resolve("a", malformed)


def test_an_ambiguous_prefix_is_refused(store: AdapterStore) -> None:
    digests = ["12345678" + "0" * 56, "12345678" + "1" * 56, "12345679" + "0" * 56]
    for seed, digest in enumerate(digests):
        with staged(store, seed) as files:
            named = replace(files, digest=digest)
            store.publish("a", named, record_of(named))
    with pytest.raises(AmbiguousDigestError, match="12345678; give more of its 64 digits"):
        store.resolve("a", "12345678")
    with pytest.raises(AmbiguousDigestError):
        store.rollback("a", "12345678")
    assert store.resolve("a", "123456780").digest == digests[0]
    assert store.resolve("a", "12345679").digest == digests[2]


def test_another_open_store_sees_a_change_at_once(open_store: OpenStore) -> None:
    writer, reader = open_store(), open_store()
    for seed in (1, 2):
        digest = publish(writer, "a", seed).record.digest
        assert reader.resolve("a").digest == digest
        assert reader.get("a").digest == digest
    writer.remove("a")
    with pytest.raises(UnknownAdapterError):
        reader.resolve("a")


def test_lists_are_paged_by_name(store: AdapterStore) -> None:
    # Bytes order, whatever the database's locale thinks of case and punctuation.
    names = ["B", "Z-1", "a", "a-1", "a.1", "a_1", "b", "ba", "z"]
    for seed, name in enumerate(reversed(names)):
        publish(store, name, seed)
    assert [record.name for record in store.list(limit=100)] == names
    assert [name for name, _, _ in store.names()] == names
    assert store.count() == len(names)
    seen: list[str] = []
    while page := store.list(limit=2, after=seen[-1] if seen else None):
        assert len(page) <= 2
        seen += [record.name for record in page]
    assert seen == names
    assert [record.name for record in store.list(limit=2, after="a-0")] == ["a-1", "a.1"]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("a", ["ab", "b"]),
        ("a\0", ["ab", "b"]),
        ("aé", ["b"]),
        ("a\x7f", ["b"]),
        ("a\ud800", ["b"]),
        ("é", []),
        ("\n", ["a", "ab", "b"]),
    ],
)
def test_a_page_can_begin_behind_any_text(
    store: AdapterStore, after: str, expected: list[str]
) -> None:
    for seed, name in enumerate(["a", "ab", "b"]):
        publish(store, name, seed)
    assert [record.name for record in store.list(limit=10, after=after)] == expected


def test_lists_can_be_narrowed_to_names(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora_store.registry.queries.CHUNK", 2)
    for seed, name in enumerate("abcdefg"):
        publish(store, name, seed)
    wanted = {"g", "b", "nobody", "d", "\0", "e"}
    found = store.list(limit=10, names=wanted)
    assert [record.name for record in found] == ["b", "d", "e", "g"]
    assert found == [store.get(name) for name in "bdeg"]
    assert [record.name for record in store.list(limit=2, names=wanted)] == ["b", "d"]
    assert [record.name for record in store.list(limit=2, names=wanted, after="d")] == ["e", "g"]
    assert store.list(limit=10, names=[]) == []


def test_names_can_be_narrowed_to_a_base(store: AdapterStore) -> None:
    mine = publish(store, "a", 1).record
    with staged(store, 2) as files:
        store.publish("b", files, record_of(files, base_fingerprint="other"))
    assert store.names(BASE) == [("a", mine.digest, mine.created_at)]
    assert [name for name, _, _ in store.names("other")] == ["b"]
    assert store.names("nobody's") == []
    assert [name for name, _, _ in store.names()] == ["a", "b"]


def test_pins_belong_to_names_and_survive_a_new_revision(store: AdapterStore) -> None:
    publish(store, "a", 1)
    publish(store, "b", 1)
    assert store.set_pinned("a", True).pinned
    assert not store.get("b").pinned
    digest = publish(store, "a", 2).record.digest
    assert store.get("a").pinned
    assert store.pinned() == [("a", digest)]
    assert not store.set_pinned("a", False).pinned
    assert store.pinned() == []
    with pytest.raises(UnknownAdapterError):
        store.set_pinned("nobody", True)


def test_a_revision_is_known_without_a_name(store: AdapterStore, tmp_path: Path) -> None:
    record = publish(store, "a", 1).record
    publish(store, "b", 1)
    revision = store.revision(record.digest)
    assert revision == replace(record, name="", revisions=(), aliases=("a", "b"))
    assert store.revision(digest_of(2, tmp_path)) is None


def test_files_of_an_unknown_revision_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    digest = digest_of(1, tmp_path)
    with pytest.raises(UnknownRevisionError, match=digest), store.files(digest):
        pytest.fail("there is no such revision")


def test_an_open_store_holds_nothing_of_what_is_registered(tmp_path: Path) -> None:
    def bytes_held(folder: Path) -> int:
        with closing(AdapterStore(folder)) as store:
            names = [name for name, _, _ in store.names()]
            tracemalloc.start()
            for name in [*names, "unknown"]:
                with suppress(UnknownAdapterError):
                    store.resolve(name)
            store.list(limit=1000)
            store.sweep()
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return held

    for folder, count in (("few", 1), ("many", 201)):
        with closing(AdapterStore(tmp_path / folder)) as store:
            for seed in range(count):
                publish(store, f"name-{seed}", seed)
    # The first of them pays for the statements.
    bytes_held(tmp_path / "few")
    assert bytes_held(tmp_path / "many") - bytes_held(tmp_path / "few") < 200 * 500
