"""What an adapter may be called."""

from __future__ import annotations

import pytest

from manylora_store.intake.names import AdapterNameError, check_name


@pytest.mark.parametrize("name", ["a", "0", "sql-7b_v1.2", "A" * 128, "a..b", "a."])
def test_a_name(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "a\\b",
        "-a",
        "_a",
        ".a",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "a@b",
        "a:b",
    ],
)
def test_not_a_name(name: str) -> None:
    with pytest.raises(AdapterNameError) as caught:
        check_name(name)
    assert repr(name) in caught.value.message
    assert "1 to 128" in caught.value.message


@pytest.mark.parametrize("length", [129, 300, 10**6])
def test_a_long_name_is_refused_without_being_repeated(length: int) -> None:
    with pytest.raises(AdapterNameError) as caught:
        check_name("a" * length)
    assert len(caught.value.message) < 400
