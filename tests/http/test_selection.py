"""Which adapter a request gets (DESIGN section 6)."""

from __future__ import annotations

import pytest

from manylora_server.core.types import AdapterMix
from support.fake_engine import BASE, FakeEngine, record

ALPHA = record("alpha", 0xA1).digest
BETA = record("beta", 0xA2).digest
DORA = record("dora", 0xA3).digest

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
    assert content["model"] == (body.get("model") or BASE)
    if name is None:
        assert content["adapter"] is request.adapter is None
    else:
        choice = api.engine.adapters.resolve(name)
        assert request.adapter == AdapterMix.of(choice)
        assert content["adapter"] == [{"name": name, "digest": choice.digest, "weight": 1.0}]


MIXES = [
    ({"alpha": 0.7, "beta": 0.3}, ((ALPHA, 0.7), (BETA, 0.3))),
    ({"beta": 0.3, "alpha": 0.7}, ((ALPHA, 0.7), (BETA, 0.3))),
    ({"alpha": 2, "beta": -1.5}, ((ALPHA, 2.0), (BETA, -1.5))),
    ([{"name": "beta", "weight": 0.5}, {"name": "alpha"}], ((ALPHA, 1.0), (BETA, 0.5))),
    ({"alpha": 0.5}, ((ALPHA, 0.5),)),
    ({f"alpha@{ALPHA[:8]}": 0.5, "beta": 1}, ((ALPHA, 0.5), (BETA, 1.0))),
    # The same content under two names adds up.
    ({"alpha": 0.25, f"alpha@{ALPHA}": 0.5}, ((ALPHA, 0.75),)),
    ({"alpha": 1, "beta": 0}, ((ALPHA, 1.0),)),
    ({"alpha": 0}, ()),
    ({"dora": 1}, ((DORA, 1.0),)),
    ({"dora": 0, "alpha": 1.5}, ((ALPHA, 1.5),)),
    ({"alpha": 1e-300, "beta": 1e6}, ((ALPHA, 1e-300), (BETA, 1e6))),
]


@pytest.mark.parametrize(("adapter", "terms"), MIXES, ids=str)
@pytest.mark.parametrize("call", ["complete", "chat"])
def test_mixes(make_api, call, adapter, terms):
    api = make_api(FakeEngine(names=("alpha", "beta", "dora")))
    response = getattr(api, call)(adapter=adapter, n=2)
    assert response.status_code == 200, response.text
    assert len(api.engine.requests) == 2
    for request in api.engine.requests:
        assert request.adapter.terms == terms
    sent = (
        adapter.items()
        if isinstance(adapter, dict)
        else [(item["name"], item.get("weight", 1.0)) for item in adapter]
    )
    found = [(item["name"], item["weight"]) for item in response.json()["adapter"]]
    # As they came, and each with its digest.
    assert found == [(name.partition("@")[0], weight) for name, weight in sent]
    digests = [item["digest"] for item in response.json()["adapter"]]
    assert digests == [choice.digest for choice, _ in api.engine.requests[0].adapter.members]


def test_a_streamed_mix_says_so_in_every_chunk(api, events):
    chunks = events(api.complete(adapter={"alpha": 0.5, "beta": 0.5}, stream=True))
    assert len(chunks) > 1
    for chunk in chunks:
        assert [item["weight"] for item in chunk["adapter"]] == [0.5, 0.5]


def test_a_model_may_name_the_adapter_that_is_alone_in_the_mix(api, error):
    assert api.complete(model="alpha", adapter={"alpha": 1}).status_code == 200
    for adapter in ({"alpha": 0.5}, {"alpha": 1, "beta": 1}, {"beta": 1}):
        found = error(api.complete(model="alpha", adapter=adapter))
        assert (found["code"], found["param"]) == ("invalid_request", "adapter")
    assert (
        "the mix of 1 'alpha', 1 'beta' contradicts model 'alpha'"
        in error(api.complete(model="alpha", adapter={"alpha": 1, "beta": 1}))["message"]
    )


@pytest.mark.parametrize("adapter", [{"dora": 0.5}, {"dora": 1, "alpha": 1}, {"dora": -1}], ids=str)
def test_what_is_not_linear_is_refused_before_it_is_queued(make_api, error, adapter):
    api = make_api(FakeEngine(names=("alpha", "dora")))
    response = api.complete(adapter=adapter)
    assert response.status_code == 422
    assert error(response)["code"] == "adapter_unsupported"
    assert not api.engine.requests


def test_more_members_than_slots(make_api, error):
    api = make_api(FakeEngine(names=("a", "b", "c", "d")))
    assert api.complete(adapter={"a": 1, "b": 1, "c": 1}).status_code == 200
    response = api.complete(adapter={"a": 1, "b": 1, "c": 1, "d": 1})
    assert response.status_code == 400
    assert "--adapter-slots" in error(response)["message"]


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
    ({"adapter": [{"name": "alpha"}, {"name": "alpha"}]}, 400, "invalid_request", "adapter"),
    ({"adapter": {"alpha": 0.5, "nobody": 0.5}}, 404, "adapter_not_found", "adapter"),
    ({"adapter": {"alpha": 0.5, "nobody": 0}}, 404, "adapter_not_found", "adapter"),
    ({"adapter": {"alpha": True}}, 400, "invalid_request", "adapter.alpha"),
    ({"adapter": {"alpha": None}}, 400, "invalid_request", "adapter.alpha"),
    ({"adapter": {"alpha": 1e7}}, 400, "invalid_request", "adapter.alpha"),
    ({"adapter": {"alpha": -(10**400)}}, 400, "invalid_request", "adapter.alpha"),
    ({"adapter": {"": 1}}, 400, "invalid_request", "adapter."),
    (
        {"adapter": [{"name": "alpha", "weight": False}]},
        400,
        "invalid_request",
        "adapter[0].weight",
    ),
    ({"adapter": {"alpha": 0.5, "beta": 0.5}, "model": "alpha"}, 400, "invalid_request", "adapter"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), FAULTS, ids=str)
def test_faults(api, error, body, status, code, param):
    response = api.complete(**body)
    assert response.status_code == status, response.text
    found = error(response)
    assert (found["code"], found["param"]) == (code, param)
    assert not api.engine.requests


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_weights_that_are_no_numbers(api, error, weight):
    content = f'{{"prompt": "x", "adapter": {{"alpha": {weight}}}}}'
    response = api.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error(response)["code"] == "invalid_request"
    assert not api.engine.requests


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
