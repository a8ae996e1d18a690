"""Names, the revisions they mean now, and leases on them; over a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.core.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
    OverloadedError,
)
from manylora_server.core.types import AdapterChoice, AdapterMix
from manylora_server.model.fingerprint import base_fingerprint
from manylora_store.errors import StoreBusyError
from manylora_store.store import AdapterStore
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import publish_unchecked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("catalog")
    base = save_model("llama", root / "base")
    save_model("llama", root / "other", seed=1)
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, lora("llama"), root / name, seed)
    save_adapter(base, lora("llama", use_dora=True), root / "dora", 2)
    return root


@pytest.fixture
def catalog(folder: Path, tmp_path: Path) -> Iterator[AdapterCatalog]:
    """``tone`` means "one" and meant "two" before; ``foreign`` is of another base."""
    for name, content in (("tone", "two"), ("tone", "one"), ("same", "one")):
        publish_unchecked(tmp_path, folder / "base", name, folder / content)
    store = AdapterStore(tmp_path)
    yield AdapterCatalog(store, base_fingerprint(folder / "base"))
    store.close()


def test_a_name_means_its_latest_revision_and_its_digest_any(catalog: AdapterCatalog) -> None:
    now = catalog.resolve("tone")
    newest, before = catalog.store.get("tone").revisions
    assert now == AdapterChoice("tone", newest.digest)
    assert catalog.resolve("same").digest == now.digest
    for length in (8, 20, 64):
        assert catalog.resolve(f"tone@{before.digest[:length]}").digest == before.digest
    with pytest.raises(AdapterNotFoundError):
        catalog.resolve(f"same@{before.digest}")


def test_a_mix_is_leased_as_a_whole_or_not_at_all(catalog: AdapterCatalog) -> None:
    _, before = catalog.store.get("tone").revisions
    one, two = catalog.resolve("same"), catalog.resolve(f"tone@{before.digest}")
    catalog.lease(one, two)
    assert (catalog.in_use("same"), catalog.in_use("tone")) == (1, 1)
    with pytest.raises(AdapterInUseError):
        catalog.begin_removal("tone", drain=False)
    catalog.begin_removal("tone", drain=True)
    with pytest.raises(AdapterNotFoundError):
        catalog.lease(one, two)
    assert catalog.in_use("same") == 1
    assert catalog.most_at_once({one.digest}) == 2
    assert catalog.most_at_once({one.digest, "other"}) == 3
    unused: list[str] = []
    catalog.on_unused = unused.append
    for digest in (one.digest, two.digest):
        catalog.retire(digest)
    assert unused == []
    catalog.release(one, two)
    assert catalog.most_at_once({one.digest}) == 1
    assert sorted(unused) == sorted([one.digest, two.digest])
    assert (catalog.in_use("same"), catalog.in_use("tone")) == (0, 0)


def test_what_is_not_linear_is_refused_in_a_mix_only(
    catalog: AdapterCatalog, folder: Path, tmp_path: Path
) -> None:
    reason = "it scales the outputs of 'model.layers.0.self_attn.q_proj' (DoRA)"
    publish_unchecked(tmp_path, folder / "base", "dora", folder / "dora", unmixable=reason)
    one, dora = catalog.resolve("tone"), catalog.resolve("dora")
    for fine in (((dora, 1.0),), ((one, 0.3),), ((one, 0.3), (dora, 0.0)), ((dora, 1.0), (one, 0))):
        catalog.check_mixable(AdapterMix(fine))
    for refused in (((dora, 0.5),), ((one, 0.3), (dora, 1.0)), ((dora, -1.0),)):
        with pytest.raises(AdapterRefusedError) as caught:
            catalog.check_mixable(AdapterMix(refused))
        assert (caught.value.status, caught.value.code) == (422, "adapter_unsupported")
        assert reason in caught.value.message
        assert caught.value.message.startswith("adapter: 'dora' cannot be part of a mix")


def test_several_names_of_one_content_add_up(catalog: AdapterCatalog) -> None:
    tone, same = catalog.resolve("tone"), catalog.resolve("same")
    mix = AdapterMix(((tone, 0.75), (same, 0.25)))
    assert mix.terms == ((tone.digest, 1.0),)
    assert (mix.plain, mix.key) == (True, tone.digest)
    assert mix.choices == (tone, same)
    assert AdapterMix(((tone, 0.75), (same, -0.75))).key is None


@pytest.mark.parametrize("reference", ["tone@", "tone@1234567", "tone@" + "A" * 8, "tone@x" * 9])
def test_what_is_no_digest_is_refused(catalog: AdapterCatalog, reference: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a digest"):
        catalog.resolve(reference)


def test_an_unknown_name_is_told_what_there_is(catalog: AdapterCatalog) -> None:
    with pytest.raises(AdapterNotFoundError, match="registered are same, tone"):
        catalog.resolve("tune")


def test_an_adapter_of_another_base_is_refused_and_not_listed(
    catalog: AdapterCatalog, folder: Path, tmp_path: Path
) -> None:
    publish_unchecked(tmp_path, folder / "other", "foreign", folder / "two")
    with pytest.raises(AdapterRefusedError) as refused:
        catalog.resolve("foreign")
    assert refused.value.code == "adapter_incompatible"
    assert [name for name, _, _ in catalog.served()] == ["same", "tone"]
    assert len(catalog) == 3


def test_another_process_s_changes_count_at_once(
    catalog: AdapterCatalog, folder: Path, tmp_path: Path
) -> None:
    before = catalog.resolve("tone").digest
    publish_unchecked(tmp_path, folder / "base", "tone", folder / "two")
    assert catalog.resolve("tone").digest != before
    elsewhere = AdapterStore(tmp_path)
    elsewhere.remove("tone")
    elsewhere.close()
    with pytest.raises(AdapterNotFoundError):
        catalog.resolve("tone")


def test_leases_are_counted_by_name(catalog: AdapterCatalog) -> None:
    choice = catalog.resolve("tone")
    catalog.lease(choice)
    catalog.lease(choice)
    assert (catalog.in_use("tone"), catalog.in_use("same")) == (2, 0)
    catalog.release(choice)
    assert catalog.in_use("tone") == 1
    catalog.release(choice)
    assert catalog.in_use("tone") == 0
    with pytest.raises(AssertionError, match="more often"):
        catalog.release(choice)


def test_a_name_in_use_is_removed_only_by_waiting(catalog: AdapterCatalog) -> None:
    choice = catalog.resolve("tone")
    catalog.lease(choice)
    with pytest.raises(AdapterInUseError, match="1 requests use"):
        catalog.begin_removal("tone", drain=False)
    catalog.begin_removal("tone", drain=True)
    for late in (lambda: catalog.resolve("tone"), lambda: catalog.lease(choice)):
        with pytest.raises(AdapterNotFoundError, match="being removed"):
            late()
    with pytest.raises(AdapterNotFoundError):
        catalog.begin_removal("tone", drain=True)
    catalog.release(choice)
    catalog.end_removal("tone")
    # It was not removed after all.
    assert catalog.resolve("tone") == choice


def test_what_was_resolved_before_a_removal_gets_no_lease_after_it(
    catalog: AdapterCatalog, folder: Path, tmp_path: Path
) -> None:
    choice, other = catalog.resolve("tone"), catalog.resolve("same")
    catalog.begin_removal("tone", drain=False)
    catalog.store.remove("tone")
    catalog.end_removal("tone")
    with pytest.raises(AdapterNotFoundError):
        catalog.lease(choice)
    catalog.lease(other)
    assert catalog.in_use("same") == 1


def test_a_retired_revision_is_unused_once_its_last_request_has_ended(
    catalog: AdapterCatalog,
) -> None:
    unused: list[str] = []
    catalog.on_unused = unused.append
    choice = catalog.resolve("tone")
    catalog.lease(choice)
    catalog.retire(choice.digest)
    assert unused == []
    catalog.release(choice)
    assert unused == [choice.digest]
    catalog.retire(choice.digest)
    assert unused == [choice.digest] * 2


def test_a_revision_that_a_name_came_back_to_is_not_let_go(catalog: AdapterCatalog) -> None:
    unused: list[str] = []
    catalog.on_unused = unused.append
    choice = catalog.resolve("tone")
    catalog.lease(choice)
    catalog.retire(choice.digest)
    catalog.restore(choice.digest)
    catalog.release(choice)
    assert unused == []


def test_a_store_that_is_busy_is_told_as_overload(
    catalog: AdapterCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise StoreBusyError("the registry is locked by another process.")

    monkeypatch.setattr(catalog.store, "resolve", busy)
    with pytest.raises(OverloadedError, match="locked"):
        catalog.resolve("tone")


def test_removals_and_requests_from_many_threads_never_overlap(catalog: AdapterCatalog) -> None:
    wrong: list[str] = []
    stop = threading.Event()
    choice = catalog.resolve("same")

    def use() -> None:
        while not stop.is_set():
            try:
                catalog.lease(choice)
            except AdapterNotFoundError:
                continue
            if catalog.removing("same"):
                wrong.append("leased while being removed")
            catalog.release(choice)
            # So that there are moments when nobody has a lease.
            time.sleep(0.001)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    begun = 0
    while begun < 20:
        try:
            catalog.begin_removal("same", drain=False)
        except AdapterInUseError:
            continue
        begun += 1
        if catalog.in_use("same"):
            wrong.append("removed while leased")
        catalog.end_removal("same")
    stop.set()
    for user in users:
        user.join(60)
    assert wrong == []
