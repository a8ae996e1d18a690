"""The admin calls over a service that keeps its records in memory: shapes, queries, faults."""

from __future__ import annotations

import asyncio
import json

import pytest

from manylora_server.core import errors

A_DIGEST = "0123456789abcdef"


@pytest.fixture
def stocked(api):
    """Three adapters: ``one`` in use, ``two`` on the device, ``three`` of two revisions."""
    for name, source in [("one", "a"), ("two", "b"), ("three", "c"), ("three", "d")]:
        add(api, name, source)
    api.service.script.in_use = {"one"}
    assert api.post("/admin/adapters/two/load").status_code == 200
    return api


def add(api, name: str, source: str):
    response = api.post("/admin/adapters", {"name": name, "source": f"file:/{source}"})
    assert response.status_code == 201
    return response.json()


def names(response) -> list[str]:
    assert response.status_code == 200, response.text
    return [record["name"] for record in response.json()["data"]]


class TestAddingASource:
    def test_answers_with_the_record(self, api):
        record = add(api, "tales", "adapters/tales")
        assert record["name"] == "tales"
        assert record["source"] == "file:/adapters/tales"
        assert record == api.get("/admin/adapters/tales").json()

    def test_the_same_again_is_created_too_and_changes_nothing(self, api):
        assert add(api, "tales", "x") == add(api, "tales", "x")

    def test_other_content_is_a_new_revision(self, api):
        first, second = add(api, "tales", "x"), add(api, "tales", "y")
        assert [r["digest"] for r in second["revisions"]] == [second["digest"], first["digest"]]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "name"),
            ({"name": "x"}, "source"),
            ({"source": "file:/x"}, "name"),
            ({"name": "x", "source": ""}, "source"),
            ({"name": "x", "source": 5}, "source"),
            ({"name": "x", "source": "file:/x", "pin": True}, "pin"),
            ({"name": "a/b", "source": "file:/x"}, "name"),
            ({"name": "-a", "source": "file:/x"}, "name"),
            ({"name": "a" * 129, "source": "file:/x"}, "name"),
            ({"name": "a\n", "source": "file:/x"}, "name"),
            ({"name": "ä", "source": "file:/x"}, "name"),
            ({"name": "", "source": "file:/x"}, "name"),
            ({"name": 5, "source": "file:/x"}, "name"),
            ({"name": "x", "source": "file:/x", "mix": {"a": 1.0}}, "mix"),
            ({"name": "x", "mix": {}}, "mix"),
            ({"name": "x", "mix": {"a": "much"}}, "mix.a"),
            ({"name": "x", "mix": {f"a{i}": 1.0 for i in range(17)}}, "mix"),
            ({"name": "x", "mix": ["a"]}, "mix"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_faults_name_their_field(self, api, error, body, param):
        response = api.post("/admin/adapters", body)
        assert response.status_code == 400
        assert error(response)["param"] == param
        assert not api.service.adapters

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/octet-stream"])
    def test_other_content_types(self, api, error, kind):
        headers = {} if kind is None else {"content-type": kind}
        response = api.post("/admin/adapters", content=b"x", headers=headers)
        assert response.status_code == 400
        message = error(response)["message"]
        assert "multipart/form-data" in message
        assert "application/json" in message

    def test_a_refused_adapter(self, api, error):
        response = api.post("/admin/adapters", {"name": "x", "source": "file:/refused"})
        assert response.status_code == 422
        assert error(response)["code"] == "adapter_invalid"


class TestListing:
    def test_all_by_name(self, stocked):
        response = stocked.get("/admin/adapters")
        assert names(response) == ["one", "three", "two"]
        content = response.json()
        assert (content["object"], content["has_more"], content["next"]) == ("list", False, None)

    def test_nothing(self, api):
        expected = {"object": "list", "data": [], "has_more": False, "next": None}
        assert api.get("/admin/adapters").json() == expected

    def test_pages(self, stocked):
        first = stocked.get("/admin/adapters?limit=2")
        assert names(first) == ["one", "three"]
        assert (first.json()["has_more"], first.json()["next"]) == (True, "three")
        second = stocked.get("/admin/adapters?limit=2&after=three")
        assert names(second) == ["two"]
        assert (second.json()["has_more"], second.json()["next"]) == (False, None)

    def test_a_hundred_by_default(self, api):
        for number in range(101):
            add(api, f"a{number:03}", "x")
        response = api.get("/admin/adapters")
        assert len(names(response)) == 100
        assert response.json()["next"] == "a099"
        assert len(names(api.get("/admin/adapters?limit=1000"))) == 101

    @pytest.mark.parametrize(
        ("residency", "expected"), [("device", ["two"]), ("disk", ["one", "three"]), ("host", [])]
    )
    def test_by_residency(self, stocked, residency, expected):
        assert names(stocked.get(f"/admin/adapters?residency={residency}")) == expected

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=-1", "limit"),
            ("limit=many", "limit"),
            ("limit=", "limit"),
            ("limit=1&limit=2", "limit"),
            ("residency=gpu", "residency"),
            ("residency=", "residency"),
            ("resident=disk", "resident"),
            ("page=2", "page"),
        ],
    )
    def test_queries_at_fault(self, stocked, error, query, param):
        response = stocked.get(f"/admin/adapters?{query}")
        assert response.status_code == 400
        assert error(response)["param"] == param


class TestChanging:
    def test_load(self, stocked):
        record = stocked.post("/admin/adapters/one/load").json()
        assert (record["residency"], record["pinned"]) == ("device", False)

    @pytest.mark.parametrize("body", [{}, {"pin": None}])
    def test_loading_leaves_a_pin_as_it_is(self, stocked, body):
        stocked.post("/admin/adapters/one/pin")
        assert stocked.post("/admin/adapters/one/load", body).json()["pinned"]

    @pytest.mark.parametrize("pin", [True, False])
    def test_load_and_pin(self, stocked, pin):
        record = stocked.post("/admin/adapters/one/load", {"pin": pin}).json()
        assert record["pinned"] == pin

    def test_unload(self, stocked):
        assert stocked.post("/admin/adapters/two/unload").json()["residency"] == "disk"

    def test_pin_and_unpin(self, stocked):
        assert stocked.post("/admin/adapters/one/pin").json()["pinned"]
        assert stocked.get("/admin/adapters/one").json()["pinned"]
        assert not stocked.post("/admin/adapters/one/unpin").json()["pinned"]

    def test_roll_back(self, stocked):
        newer, older = stocked.get("/admin/adapters/three").json()["revisions"]
        body = {"digest": older["digest"][:8]}
        response = stocked.post("/admin/adapters/three/rollback", body)
        assert response.status_code == 200
        assert response.json()["digest"] == older["digest"] != newer["digest"]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "digest"),
            ({"digest": "0123456"}, "digest"),
            ({"digest": "0" * 65}, "digest"),
            ({"digest": "ABCDEF01"}, "digest"),
            ({"digest": "not hexa"}, "digest"),
            ({"digest": None}, "digest"),
            ({"digest": A_DIGEST, "force": True}, "force"),
        ],
    )
    def test_rollbacks_at_fault(self, stocked, error, body, param):
        response = stocked.post("/admin/adapters/three/rollback", body)
        assert response.status_code == 400
        assert error(response)["param"] == param

    def test_a_revision_that_never_was(self, stocked, error):
        response = stocked.post("/admin/adapters/three/rollback", {"digest": A_DIGEST})
        assert response.status_code == 404
        assert error(response)["code"] == "adapter_not_found"

    @pytest.mark.parametrize(
        ("body", "precision"),
        [(None, "bf16"), ({}, "bf16"), ({"precision": "int8"}, "int8"), ({"force": True}, "bf16")],
    )
    def test_merge_and_unmerge(self, stocked, body, precision):
        record = stocked.post("/admin/adapters/one/merge", body).json()
        assert record["merged"] == precision
        assert record["twin"]["delta_share"] == 0.9991
        assert stocked.get("/admin/adapters/one").json() == record
        assert stocked.post("/admin/adapters/one/unmerge").json()["merged"] is None
        assert stocked.get("/admin/adapters/one").json()["twin"] is None

    def test_an_nf4_twin_that_loses_too_much(self, stocked, error):
        response = stocked.post("/admin/adapters/one/merge", {"precision": "nf4"})
        assert response.status_code == 422
        assert error(response)["code"] == "adapter_unsupported"
        assert error(response)["param"] == "precision"
        body = {"precision": "nf4", "force": True}
        assert stocked.post("/admin/adapters/one/merge", body).json()["merged"] == "nf4"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"precision": "fp8"}, "precision"),
            ({"precision": "nf4", "force": "yes"}, "force"),
            ({"dtype": "bf16"}, "dtype"),
        ],
    )
    def test_merges_at_fault(self, stocked, error, body, param):
        response = stocked.post("/admin/adapters/one/merge", body)
        assert response.status_code == 400
        assert error(response)["param"] == param

    @pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin", "unmerge"])
    def test_unknown_fields_and_parameters(self, stocked, error, action):
        response = stocked.post(f"/admin/adapters/one/{action}", {"force": True})
        assert response.status_code == 400
        assert error(response)["param"] == "force"
        response = stocked.post(f"/admin/adapters/one/{action}?pin=true")
        assert response.status_code == 400
        assert error(response)["param"] == "pin"

    @pytest.mark.parametrize("body", [{"pin": "yes"}, {"pin": 1}])
    def test_a_pin_is_a_boolean(self, stocked, error, body):
        response = stocked.post("/admin/adapters/one/load", body)
        assert response.status_code == 400
        assert error(response)["param"] == "pin"

    def test_bodies_of_another_type(self, stocked, error):
        response = stocked.post("/admin/adapters/one/pin", content=b"pin=1")
        assert response.status_code == 400
        assert "application/json" in error(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("DELETE", "?drain=true", None),
        ("POST", "/load", None),
        ("POST", "/unload", None),
        ("POST", "/pin", None),
        ("POST", "/unpin", None),
        ("POST", "/merge", None),
        ("POST", "/unmerge", None),
        ("POST", "/rollback", {"digest": A_DIGEST}),
    ],
)
def test_unknown_names(stocked, error, method, path, body):
    response = stocked.call(method, f"/admin/adapters/nobody{path}", json=body)
    assert response.status_code == 404
    assert error(response)["code"] == "adapter_not_found"


class TestRemoving:
    def test_an_idle_adapter(self, stocked):
        response = stocked.call("DELETE", "/admin/adapters/two")
        assert response.status_code == 200
        expected = {"id": "two", "name": "two", "object": "adapter", "deleted": True}
        assert response.json() == expected
        assert stocked.get("/admin/adapters/two").status_code == 404

    def test_one_in_use_stays(self, stocked, error):
        response = stocked.call("DELETE", "/admin/adapters/one")
        assert response.status_code == 409
        found = error(response)
        assert (found["code"], found["type"]) == ("adapter_in_use", "invalid_request_error")
        assert stocked.get("/admin/adapters/one").json()["in_use"] == 1

    @pytest.mark.parametrize("query", ["drain=maybe", "drain=", "drain", "force=true", "drian=1"])
    def test_queries_at_fault(self, stocked, error, query):
        response = stocked.call("DELETE", f"/admin/adapters/two?{query}")
        assert response.status_code == 400
        assert error(response)["param"] == query.partition("=")[0]
        assert "two" in stocked.service.adapters

    def test_draining_waits(self, stocked):
        service = stocked.service

        async def scenario() -> int:
            removing = asyncio.create_task(delete(stocked, "/admin/adapters/one", b"drain=true"))
            while "one" not in service.draining:
                await asyncio.sleep(0.001)
            assert not removing.done()
            service.script.in_use.clear()
            return (await removing)[0]["status"]

        assert asyncio.run(scenario()) == 200
        assert "one" not in service.adapters

    def test_a_client_that_goes_stops_the_draining(self, stocked):
        service = stocked.service

        async def scenario() -> int:
            gone = asyncio.Event()
            removing = asyncio.create_task(
                delete(stocked, "/admin/adapters/one", b"drain=true", gone)
            )
            while "one" not in service.draining:
                await asyncio.sleep(0.001)
            gone.set()
            return (await removing)[0]["status"]

        assert asyncio.run(scenario()) == 499
        assert not service.draining
        assert "one" in service.adapters


async def delete(api, path: str, query: bytes, gone: asyncio.Event | None = None):
    """Call without a client between, so that it can leave; return what was sent."""
    gone = gone or asyncio.Event()
    sent = []
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "DELETE",
        "path": path,
        "query_string": query,
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    async with asyncio.timeout(10):
        await api.app(scope, receive, send)
    return sent


def test_stats(stocked):
    assert stocked.get("/admin/stats").json() == {"adapters": {"registered": 3}}
    assert stocked.get("/admin/stats?verbose=1").status_code == 400


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (errors.AdapterConflictError("m"), 409),
        (errors.AdapterInUseError("m"), 409),
        (errors.StorageError("m"), 500),
        (errors.OverloadedError("m"), 503),
        (errors.NotReadyError("m"), 503),
    ],
    ids=lambda value: str(value),
)
def test_what_the_service_raises_is_answered(stocked, error, refusal, status):
    stocked.service.script.refusal = refusal
    body = {"name": "x", "source": "file:/x"}
    responses = [
        stocked.get("/admin/adapters"),
        stocked.get("/admin/adapters/one"),
        stocked.get("/admin/stats"),
        stocked.post("/admin/adapters", body),
        stocked.post("/admin/adapters/one/load"),
        stocked.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "file:/x"}),
    ]
    for response in responses:
        assert response.status_code == status
        found = error(response)
        assert (found["code"], found["message"]) == (refusal.code, "m")


def test_the_description_has_the_calls_with_their_bodies_and_queries(api):
    described = api.get("/openapi.json").json()
    paths = described["paths"]
    content = paths["/admin/adapters"]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {"name", "files", "archive"}
    assert form["files"]["items"] == {"type": "string", "format": "binary"}
    reference = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(described["components"]["schemas"][reference]["properties"]) == {
        "name",
        "source",
        "mix",
    }
    parameters = {item["name"] for item in paths["/admin/adapters"]["get"]["parameters"]}
    assert parameters == {"limit", "after", "residency"}
    [drain] = [
        item
        for item in paths["/admin/adapters/{name}"]["delete"]["parameters"]
        if item["in"] == "query"
    ]
    assert drain["name"] == "drain"
    for action in ("load", "unload", "pin", "unpin", "rollback"):
        assert "post" in paths[f"/admin/adapters/{{name}}/{action}"]
    assert "post" in paths["/v1/load_lora_adapter"]
    assert "$defs" not in json.dumps(described)
