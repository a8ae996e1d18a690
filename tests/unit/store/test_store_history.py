"""What a name pointed at before: new revisions, rollback, aliases of one revision, removal."""

from __future__ import annotations

from pathlib import Path

import pytest

from manylora_store.errors import UnknownAdapterError, UnknownRevisionError
from manylora_store.store import AdapterStore
from unit.store.small_adapters import blobs_in, digest_of, publish


def history(store: AdapterStore, name: str) -> list[tuple[str, str]]:
    return [(ref.digest, ref.source) for ref in store.get(name).revisions]


def test_a_new_revision_moves_the_name_and_keeps_the_old_one(
    store: AdapterStore, home: Path
) -> None:
    old = publish(store, "a", 1, source="first").record
    moved = publish(store, "a", 2, source="second")
    new = moved.record
    assert moved.new_revision
    assert moved.previous == old.digest
    assert store.get("a").digest == new.digest
    assert store.get("a").source == "second"
    assert history(store, "a") == [(new.digest, "second"), (old.digest, "first")]
    with store.files(old.digest) as files:
        assert files.digest == old.digest
    # Both have the same configuration file.
    assert len(blobs_in(home)) == 3


def test_rollback_brings_an_earlier_revision_back(store: AdapterStore) -> None:
    old = publish(store, "a", 1, source="first").record
    new = publish(store, "a", 2, source="second").record
    before = store.get("a").revisions
    back = store.rollback("a", old.digest[:8])
    assert not back.new_revision
    assert back.previous == new.digest
    assert back.record == store.get("a")
    assert back.record.digest == old.digest
    assert back.record.source == "first"
    assert back.record.created_at == old.created_at
    assert back.record.revisions == before
    assert store.resolve("a").digest == old.digest
    forth = store.rollback("a", new.digest)
    assert forth.record.digest == new.digest
    assert forth.previous == old.digest
    assert store.get("a").revisions == before


def test_rollback_to_the_current_revision_changes_nothing(store: AdapterStore) -> None:
    publish(store, "a", 1)
    current = publish(store, "a", 2).record
    assert store.rollback("a", current.digest).previous is None
    assert store.get("a") == current


def test_rollback_goes_to_the_name_s_own_revisions_only(store: AdapterStore) -> None:
    record = publish(store, "a", 1).record
    elsewhere = publish(store, "b", 2).record.digest
    with pytest.raises(UnknownRevisionError):
        store.rollback("a", elsewhere)
    with pytest.raises(UnknownAdapterError):
        store.rollback("nobody", elsewhere)
    assert store.get("a") == record


def test_a_name_can_point_at_a_stored_revision(store: AdapterStore, tmp_path: Path) -> None:
    digest = publish(store, "a", 1).record.digest
    pointed = store.point("b", digest, "alias of a")
    assert not pointed.new_revision
    assert pointed.previous is None
    assert pointed.record.digest == digest
    assert pointed.record.source == "alias of a"
    assert pointed.record.aliases == ("a", "b")
    assert store.current_names(digest) == ["a", "b"]
    other = publish(store, "c", 2).record.digest
    assert store.point("b", other, "alias of c").previous == digest
    assert store.current_names(digest) == ["a"]
    assert history(store, "b") == [(other, "alias of c"), (digest, "alias of a")]
    unknown = digest_of(3, tmp_path)
    with pytest.raises(UnknownRevisionError, match=unknown):
        store.point("b", unknown, "nowhere")
    assert store.resolve("b").digest == other


def test_no_name_can_point_at_a_revision_whose_files_are_lost(store: AdapterStore) -> None:
    digest = publish(store, "a", 1).record.digest
    with store.files(digest) as files:
        files.weights.path.resolve().unlink()
    with pytest.raises(UnknownRevisionError, match=digest):
        store.point("b", digest, "alias of a")
    publish(store, "a", 1)
    assert store.point("b", digest, "alias of a").record.aliases == ("a", "b")


def test_uploading_old_content_again_is_no_new_revision(store: AdapterStore) -> None:
    first = publish(store, "a", 1, source="first").record
    publish(store, "a", 2, source="second")
    before = store.get("a").revisions
    again = publish(store, "a", 1, source="third")
    assert not again.new_revision
    assert again.record.digest == first.digest
    assert again.record.revisions == before
    assert again.record.source == "first"


def test_removal_forgets_the_history_and_deletes_the_files(store: AdapterStore, home: Path) -> None:
    digests = {publish(store, "a", seed).record.digest for seed in (1, 2)}
    assert store.remove("a") == digests
    with pytest.raises(UnknownAdapterError):
        store.get("a")
    assert store.count() == 0
    assert blobs_in(home) == set()
    for digest in digests:
        assert store.revision(digest) is None
    with pytest.raises(UnknownAdapterError):
        store.remove("a")
    again = publish(store, "a", 3)
    assert again.new_revision
    assert len(again.record.revisions) == 1


def test_removal_keeps_what_another_name_has_or_had(store: AdapterStore, home: Path) -> None:
    shared = publish(store, "a", 1).record.digest
    publish(store, "b", 1)
    own = publish(store, "a", 2).record.digest
    # "b" has only ever had the first; it now goes on to a third.
    third = publish(store, "b", 3).record.digest
    assert store.remove("a") == {own}
    assert store.revision(shared) is not None
    assert store.resolve("b", shared[:8]).digest == shared
    with store.files(shared) as files:
        assert files.digest == shared
    assert store.remove("b") == {shared, third}
    assert blobs_in(home) == set()


def test_removal_keeps_a_file_that_another_revision_shares(store: AdapterStore, home: Path) -> None:
    publish(store, "a", 1)
    kept = publish(store, "b", 2).record.digest
    assert len(blobs_in(home)) == 3
    store.remove("a")
    assert len(blobs_in(home)) == 2
    with store.files(kept) as files:
        assert files.config.rank == 1
