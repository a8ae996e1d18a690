"""``/admin/exports``: bodies, lists, events and faults, over a service that exports nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manylora_server.core.errors import OverloadedError, StorageError
from support.fake_exports import FakeExportService

BODY = {"adapters": {"alpha": 0.7, "beta@0123456789": 1}, "output": "mine"}


@pytest.fixture
def exports(api) -> FakeExportService:
    return api.engine.export_service


def test_an_export_is_accepted_with_its_defaults(api, exports) -> None:
    response = api.post("/admin/exports", BODY)
    assert response.status_code == 202
    assert response.json() == {"id": "exp-0", "state": "queued", "progress": 0.0}
    [request] = exports.requests
    assert request.adapters == {"alpha": 0.7, "beta@0123456789": 1.0}
    assert (request.recipe.method, request.recipe.density, request.dtype) == ("cat", None, None)
    assert request.output == "mine"
    assert not request.adapter_only


def test_every_field_of_the_contract_counts(api, exports) -> None:
    more = {"method": "dare_ties", "density": 0.4, "dtype": "nf4", "seed": 7, "rank": 3}
    assert api.post("/admin/exports", {**BODY, **more, "adapter_only": True}).status_code == 202
    [request] = exports.requests
    recipe = request.recipe
    assert (recipe.method, recipe.density, recipe.seed, recipe.rank) == ("dare_ties", 0.4, 7, 3)
    assert (request.dtype, request.adapter_only) == ("nf4", True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"adapters": {}}, "adapters"),
        ({"adapters": None}, "adapters"),
        ({"adapters": ["alpha"]}, "adapters"),
        ({"adapters": {"alpha": "much"}}, "adapters.alpha"),
        ({"adapters": {"alpha": True}}, "adapters.alpha"),
        ({"output": None}, "output"),
        ({"output": 5}, "output"),
        ({"method": "slerp"}, "method"),
        ({"dtype": "int8"}, "dtype"),
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": "half"}, "density"),
        ({"rank": 0}, "rank"),
        ({"seed": -1}, "seed"),
        ({"adapter_only": "yes"}, "adapter_only"),
        ({"folder": "x"}, "folder"),
    ],
    ids=str,
)
def test_faults_name_their_field(change: dict[str, Any], param: str, api, error, exports) -> None:
    response = api.post("/admin/exports", {**BODY, **change})
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert error(response)["code"] == "invalid_request"
    assert exports.requests == []


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (OverloadedError("8 exports are waiting already."), 503, "overloaded"),
        (StorageError("output: the disk is full."), 500, "internal"),
    ],
)
def test_refusals_have_their_status(refusal, status, code, api, error, exports) -> None:
    exports.refusal = refusal
    response = api.post("/admin/exports", BODY)
    assert response.status_code == status
    assert error(response)["code"] == code
    assert error(response)["message"] == refusal.message


def test_lists_come_in_pages_newest_first(api) -> None:
    for _ in range(3):
        api.post("/admin/exports", BODY)
    page = api.get("/admin/exports?limit=2").json()
    assert [job["id"] for job in page["data"]] == ["exp-2", "exp-1"]
    assert (page["object"], page["has_more"], page["next"]) == ("list", True, "exp-1")
    rest = api.get("/admin/exports?limit=2&after=exp-1").json()
    assert [job["id"] for job in rest["data"]] == ["exp-0"]
    assert (rest["has_more"], rest["next"]) == (False, None)


def test_one_is_described_and_cancelled(api) -> None:
    api.post("/admin/exports", BODY)
    assert api.get("/admin/exports/exp-0").json()["state"] == "queued"
    response = api.call("DELETE", "/admin/exports/exp-0")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/exports/exp-9"),
        ("DELETE", "/admin/exports/exp-9"),
        ("GET", "/admin/exports/exp-9/events"),
        ("GET", "/admin/exports?after=exp-9"),
    ],
)
def test_an_unknown_one_is_not_found(method: str, path: str, api, error) -> None:
    response = api.call(method, path)
    assert response.status_code == 404
    assert error(response)["code"] == "export_not_found"


def test_events_tell_each_change_until_the_end(api, exports) -> None:
    api.post("/admin/exports", BODY)
    exports.script = [
        {"state": "running", "progress": 0.5, "seconds_left": 3.0},
        {},
        {"state": "done", "progress": 1.0, "seconds_left": 0.0},
    ]
    response = api.get("/admin/exports/exp-0/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    told = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [(job["state"], job["progress"]) for job in told] == [
        ("queued", 0.0),
        ("running", 0.5),
        ("done", 1.0),
    ]


def test_the_description_has_the_calls(api) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {"get", "post"} <= set(paths["/admin/exports"])
    assert {"get", "delete"} <= set(paths["/admin/exports/{identity}"])
    assert "get" in paths["/admin/exports/{identity}/events"]
