"""vLLM's calls to load and unload adapters."""

from __future__ import annotations

import asyncio

import pytest

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def load(api, name: str, path: object, **more):
    return api.post(LOAD, {"lora_name": name, "lora_path": str(path), **more})


def source(api, name: str = "sql") -> str:
    return api.get(f"/admin/adapters/{name}").json()["source"]


def test_loading_a_folder(api, tmp_path):
    response = load(api, "sql", tmp_path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == "Success: LoRA adapter 'sql' added successfully."
    assert source(api) == f"file:{tmp_path}"


def test_a_folder_relative_to_the_server(api, tmp_path, monkeypatch):
    (tmp_path / "org" / "sql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load(api, "sql", "org/sql").status_code == 200
    assert source(api) == f"file:{tmp_path}/org/sql"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/sql-lora", "hf:org/sql-lora"),
        ("org/sql-lora@v1.0", "hf:org/sql-lora@v1.0"),
        ("hf:org/sql-lora", "hf:org/sql-lora"),
        ("file:/somewhere", "file:/somewhere"),
    ],
)
def test_other_sources(api, path, expected):
    assert load(api, "sql", path).status_code == 200
    assert source(api) == expected


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./org/sql", "../sql", "sql", "a/b/c", "a b/c"]
)
def test_what_is_neither_a_folder_nor_on_the_hub(api, error, path):
    response = load(api, "sql", path)
    assert response.status_code == 400
    assert error(response)["param"] == "lora_path"


class TestANameThatIsTaken:
    @pytest.fixture(autouse=True)
    def taken(self, api):
        assert load(api, "sql", "org/sql-lora").status_code == 200

    def test_is_refused_in_vllms_words(self, api, error):
        response = load(api, "sql", "org/other")
        assert response.status_code == 400
        found = error(response)
        assert "The lora adapter 'sql' has already been loaded" in found["message"]
        assert found["param"] == "lora_name"
        assert source(api) == "hf:org/sql-lora"

    def test_is_replaced_in_place(self, api):
        assert load(api, "sql", "org/other", load_inplace=True).status_code == 200
        assert source(api) == "hf:org/other"
        assert len(api.get("/admin/adapters/sql").json()["revisions"]) == 2

    def test_may_be_loaded_again_from_where_it_was(self, api):
        assert load(api, "sql", "org/sql-lora").status_code == 200
        assert len(api.get("/admin/adapters/sql").json()["revisions"]) == 1

    def test_a_recorded_revision_is_the_same_place(self, api):
        assert load(api, "new", "org/new@abc123").status_code == 200
        assert load(api, "new", "org/new").status_code == 200
        assert load(api, "new", "org/newer").status_code == 400


@pytest.mark.parametrize("more", [{}, {"lora_int_id": 3}, {"lora_int_id": None}])
def test_unloading(api, tmp_path, more):
    load(api, "sql", tmp_path)
    response = api.post(UNLOAD, {"lora_name": "sql", **more})
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'sql' removed successfully."
    assert api.get("/admin/adapters/sql").status_code == 404


def test_unloading_waits_for_what_runs(api, tmp_path):
    load(api, "sql", tmp_path)
    service = api.service
    service.script.in_use.add("sql")

    async def scenario() -> int:
        asking = asyncio.create_task(asyncio.to_thread(api.post, UNLOAD, {"lora_name": "sql"}))
        while "sql" not in service.draining:
            await asyncio.sleep(0.001)
        service.script.in_use.clear()
        return (await asking).status_code

    assert asyncio.run(scenario()) == 200


def test_unloading_what_is_not_there(api, error):
    response = api.post(UNLOAD, {"lora_name": "sql"})
    assert response.status_code == 404
    assert error(response)["code"] == "adapter_not_found"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (LOAD, {"lora_path": "org/x"}, "lora_name"),
        (LOAD, {"lora_name": "x"}, "lora_path"),
        (LOAD, {"lora_name": "a/b", "lora_path": "org/x"}, "lora_name"),
        (LOAD, {"lora_name": "x", "lora_path": ""}, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "org/x", "base_model": "m"}, "base_model"),
        (
            LOAD,
            {"lora_name": "x", "lora_path": "org/x", "is_3d_lora_weight": True},
            "is_3d_lora_weight",
        ),
        (LOAD, {"lora_name": "x", "lora_path": "org/x", "load_inplace": 1}, "load_inplace"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "x", "lora_int_id": "3"}, "lora_int_id"),
        (UNLOAD, {"lora_name": "x", "force": True}, "force"),
    ],
)
def test_faults_name_their_field(api, error, path, body, param):
    response = api.post(path, body)
    assert response.status_code == 400
    assert error(response)["param"] == param
