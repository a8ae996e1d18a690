"""Which adapter a request gets (DESIGN section 6)."""

from __future__ import annotations

import pytest

from support.fake_engine import BASE, FakeEngine, record

ALPHA = record("alpha", 0xA1).digest
BETA = record("beta", 0xA2).digest

CHOICES = [
    ({}, None),
    ({"model": BASE}, None),
    ({"model": None}, None),
    ({"model": "alpha"}, "alpha"),
    ({"model": f"{BASE}:alpha"}, "alpha"),
    ({"model": f"alpha@{ALPHA[:8]}"}, "alpha"),
    ({"adapter": None}, None),
    ({"adapter": None, "model": BASE}, None),
    ({"adapter": "beta"}, "beta"),
    ({"adapter": f"beta@{BETA}"}, "beta"),
    ({"adapter": "beta", "model": BASE}, "beta"),
    ({"adapter": "beta", "model": "beta"}, "beta"),
    ({"adapter": {"beta": 1}}, "beta"),
    ({"adapter": {"beta": 1.0}}, "beta"),
    ({"adapter": [{"name": "beta"}]}, "beta"),
    ({"adapter": [{"name": "beta", "weight": 1}]}, "beta"),
    ({"adapter": {f"beta@{BETA[:8]}": 1}}, "beta"),
]


@pytest.mark.parametrize(("body", "name"), CHOICES, ids=str)
def test_choices(api, body, name):
    response = api.complete(**body)
    assert response.status_code == 200, response.text
    content = response.json()
    [request] = api.engine.requests
    assert (request.adapter.name if request.adapter else None) == name
    assert content["model"] == (body.get("model") or BASE)
    if name is None:
        assert content["adapter"] is None
    else:
        digest = api.engine.adapters.get(name).digest
        assert content["adapter"] == [{"name": name, "digest": digest, "weight": 1.0}]


FAULTS = [
    ({"model": "nobody"}, 404, "model_not_found", "model"),
    ({"model": f"{BASE}:nobody"}, 404, "model_not_found", "model"),
    ({"model": "nobody", "adapter": "alpha"}, 404, "model_not_found", "model"),
    ({"model": "alpha@zz"}, 404, "model_not_found", "model"),
    ({"adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
    ({"adapter": f"alpha@{BETA[:8]}"}, 404, "adapter_not_found", "adapter"),
    ({"adapter": "alpha@123"}, 400, "invalid_request", "adapter"),
    ({"adapter": ""}, 400, "invalid_request", "adapter"),
    ({"adapter": 3}, 400, "invalid_request", "adapter"),
    ({"adapter": True}, 400, "invalid_request", "adapter"),
    ({"adapter": "alpha", "model": "beta"}, 400, "invalid_request", "adapter"),
    ({"adapter": None, "model": "beta"}, 400, "invalid_request", "adapter"),
    ({"adapter": {}}, 400, "invalid_request", "adapter"),
    ({"adapter": []}, 400, "invalid_request", "adapter"),
    ({"adapter": {"alpha": "1"}}, 400, "invalid_request", "adapter.alpha"),
    ({"adapter": [{"weight": 1}]}, 400, "invalid_request", "adapter[0].name"),
    ({"adapter": [{"name": "alpha", "wieght": 1}]}, 400, "invalid_request", "adapter[0].wieght"),
    ({"adapter": ["alpha"]}, 400, "invalid_request", "adapter[0]"),
    ({"adapter": {"alpha": 0.5}}, 400, "invalid_request", "adapter"),
    ({"adapter": {"alpha": 0.5, "beta": 0.5}}, 400, "invalid_request", "adapter"),
    ({"adapter": [{"name": "alpha"}, {"name": "alpha"}]}, 400, "invalid_request", "adapter"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), FAULTS, ids=str)
def test_faults(api, error, body, status, code, param):
    response = api.complete(**body)
    assert response.status_code == status, response.text
    found = error(response)
    assert (found["code"], found["param"]) == (code, param)
    assert not api.engine.requests


def test_mixes_are_refused_as_not_supported_yet(api, error):
    found = error(api.complete(adapter={"alpha": 0.5, "beta": 0.5}))
    assert "weighted mixes are not supported yet" in found["message"]


def test_the_base_wins_over_an_adapter_of_its_name(make_api):
    api = make_api(FakeEngine(names=("alpha", BASE)))
    assert api.complete(model=BASE).json()["adapter"] is None
    assert api.complete(model=f"{BASE}:{BASE}").json()["adapter"][0]["name"] == BASE
    assert api.complete(adapter=BASE).json()["adapter"][0]["name"] == BASE
    listed = [model["id"] for model in api.get("/v1/models").json()["data"]]
    assert listed == [BASE, "alpha", f"{BASE}:{BASE}"]


def test_chat_chooses_likewise(api):
    assert api.chat(model="alpha").json()["adapter"][0]["name"] == "alpha"


def test_models_are_listed_base_first(api):
    content = api.get("/v1/models").json()
    assert content["object"] == "list"
    base, alpha, beta = content["data"]
    assert (base["id"], base["parent"], base["root"]) == (BASE, None, BASE)
    assert base["max_model_len"] == 512
    assert (alpha["id"], alpha["parent"], alpha["root"]) == ("alpha", BASE, BASE)
    assert (alpha["digest"], alpha["created"]) == (ALPHA, 1_700_000_161)
    assert beta["id"] == "beta"
    assert {model["object"] for model in content["data"]} == {"model"}


@pytest.mark.parametrize("model", [BASE, "alpha", f"{BASE}:alpha"])
def test_each_model_can_be_asked_for(api, model):
    response = api.get(f"/v1/models/{model}")
    assert response.status_code == 200
    assert response.json()["id"] == model


def test_an_unknown_model(api, error):
    response = api.get("/v1/models/no/body")
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"
