"""Health, readiness, version, docs, request ids, tokenization."""

from __future__ import annotations

import pytest

from manylora_server.version import __version__
from support.fake_engine import BASE, FakeEngine


def test_health_and_readiness(api):
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/ready").json() == {"status": "ready"}


def test_a_server_that_drains_lives_but_is_not_ready(make_api, error):
    api = make_api(FakeEngine(ready=False))
    assert api.get("/health").status_code == 200
    response = api.get("/ready")
    assert response.status_code == 503
    assert error(response)["code"] == "not_ready"
    assert int(response.headers["retry-after"]) > 0


def test_a_dead_engine_is_not_healthy(make_api):
    api = make_api(FakeEngine(dead=True, ready=False))
    assert api.get("/health").status_code == 503
    assert api.get("/ready").status_code == 503


def test_version(api):
    assert api.get("/version").json() == {"version": __version__}


def test_docs_describe_the_bodies(api):
    assert api.get("/docs").status_code == 200
    schema = api.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/CompletionRequest"
    described = schema["components"]["schemas"]
    assert "adapter" in described["CompletionRequest"]["properties"]
    assert {"ChatMessage", "TextPart", "TokenizeRequest"} <= set(described)


@pytest.mark.parametrize("given", ["abc-123", "with space", "x" * 128])
def test_a_sane_request_id_is_kept(api, given):
    assert api.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, b"a\xffb", b"a\x01b"])
def test_otherwise_one_is_made(api, given):
    headers = {} if given is None else {"x-request-id": given}
    made = {api.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(value.startswith("req-") for value in made)


def test_errors_and_streams_carry_the_id_too(api):
    headers = {"x-request-id": "mine"}
    assert api.get("/nowhere", headers=headers).headers["x-request-id"] == "mine"
    body = {"prompt": "x", "stream": True}
    response = api.post("/v1/completions", body, headers=headers)
    assert response.headers["x-request-id"] == "mine"


def test_each_request_is_logged_once_without_its_query(api, caplog):
    caplog.set_level("INFO", logger="manylora_server.access")
    api.get("/health?token=secret")
    [entry] = [item for item in caplog.records if item.name == "manylora_server.access"]
    assert entry.getMessage().startswith("GET /health 200 ")
    assert "secret" not in caplog.text


def test_tokenize_and_back(api):
    tokens = api.post("/tokenize", {"prompt": "Hü"}).json()
    assert tokens["count"] == 3
    assert tokens["max_model_len"] == api.engine.max_model_len
    assert api.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hü"}


def test_special_tokens_are_written_out(api):
    assert api.post("/detokenize", {"tokens": [256, 39]}).json() == {"prompt": "<s>H"}


def test_tokenize_a_conversation(api):
    messages = [{"role": "user", "content": "Hi"}]
    with_prompt = api.post("/tokenize", {"messages": messages}).json()
    without = api.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    text = api.post("/detokenize", {"tokens": with_prompt["tokens"]}).json()["prompt"]
    assert text == "User: Hi\nAssistant:"
    assert with_prompt["count"] - without["count"] == len("Assistant:")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        (
            "/tokenize",
            {"prompt": "x", "messages": [{"role": "user", "content": ""}]},
            400,
            "prompt",
        ),
        ("/tokenize", {"text": "x"}, 400, "text"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
    ],
)
def test_tokenization_faults(api, error, path, body, status, param):
    response = api.post(path, body)
    assert response.status_code == status
    assert error(response)["param"] == param


def test_empty_texts_can_be_tokenized(api):
    assert api.post("/tokenize", {"prompt": "", "model": BASE}).json()["count"] == 0
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
