"""Every error code, whatever the failure: routing, bodies, keys, limits, crashes."""

from __future__ import annotations

import json

import pytest

from manylora_server.core import errors
from manylora_server.core.types import FinishReason
from manylora_store.errors import AdapterIncompatibleError
from support.fake_engine import FakeEngine

JSON = {"content-type": "application/json"}


def test_unknown_path(api, error):
    response = api.get("/v2/nothing")
    assert response.status_code == 404
    assert "no such path: GET /v2/nothing" in error(response)["message"]


def test_wrong_method(api, error):
    response = api.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error(response)["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": Infinity}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "the body: should be a JSON object, not an array"),
        (b"null", "the body: should be a JSON object, not null"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_bodies(api, error, content, message):
    response = api.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert message in error(response)["message"]


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_type(api, error, media_type):
    headers = {} if media_type is None else {"content-type": media_type}
    response = api.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 400
    assert "application/json" in error(response)["message"]


def test_content_type_may_have_parameters(api):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert api.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers).is_success


class TestBodyLimit:
    @pytest.fixture
    def small(self, make_api):
        return make_api(max_body_bytes=100)

    @staticmethod
    def body(length: int) -> bytes:
        empty = len(json.dumps({"prompt": ""}))
        return json.dumps({"prompt": "x" * (length - empty)}).encode()

    def test_at_the_limit(self, small):
        response = small.post("/v1/completions", content=self.body(100), headers=JSON)
        assert response.status_code == 200

    def test_announced(self, small, error):
        response = small.post("/v1/completions", content=self.body(101), headers=JSON)
        assert response.status_code == 413
        found = error(response)
        assert found["code"] == "payload_too_large"
        assert "100 bytes" in found["message"]

    def test_counted_where_no_length_is_announced(self, small, error):
        sent = 0

        async def chunks():
            nonlocal sent
            for _ in range(1000):
                sent += 10
                yield b" " * 10

        response = small.post("/v1/completions", content=chunks(), headers=JSON)
        assert response.status_code == 413
        assert error(response)["code"] == "payload_too_large"
        assert sent < 200


class TestKeys:
    @pytest.fixture
    def locked(self, make_api):
        return make_api(api_keys=("first", "second"))

    @pytest.mark.parametrize("key", ["Bearer first", "Bearer second", "bearer second"])
    def test_right(self, locked, key):
        assert locked.get("/v1/models", headers={"authorization": key}).status_code == 200

    @pytest.mark.parametrize(
        "header",
        [None, "", "Bearer", "Bearer ", "Basic first", "first", "Bearer third", b"Bearer \xff"],
    )
    def test_wrong(self, locked, error, header):
        headers = {} if header is None else {"authorization": header}
        response = locked.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        found = error(response)
        assert (found["code"], found["type"]) == ("unauthorized", "authentication_error")
        assert "third" not in response.text

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models/x"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
        ],
    )
    def test_asked_for_before_anything_is_read(self, locked, method, path):
        assert locked.call(method, path).status_code == 401

    @pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version", "/docs"])
    def test_operations_are_open(self, locked, path):
        assert locked.get(path).status_code == 200


REFUSALS = [
    (errors.InvalidRequestError("m"), 400, "invalid_request"),
    (errors.ContextLengthError("m"), 400, "context_length_exceeded"),
    (errors.UnauthorizedError("m"), 401, "unauthorized"),
    (errors.ForbiddenError("m"), 403, "forbidden"),
    (errors.AdapterNotFoundError("m"), 404, "adapter_not_found"),
    (errors.ModelNotFoundError("m"), 404, "model_not_found"),
    (errors.PayloadTooLargeError("m"), 413, "payload_too_large"),
    (errors.AdapterRefusedError(AdapterIncompatibleError("m")), 422, "adapter_incompatible"),
    (errors.NotReadyError("m"), 503, "not_ready"),
    (errors.OverloadedError("m"), 503, "overloaded"),
    (errors.RequestTimeoutError("m"), 504, "timeout"),
    (errors.EngineFailureError("m"), 500, "internal"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("refusal", "status", "code"), REFUSALS, ids=lambda value: str(value))
def test_each_error_of_the_tree(make_api, error, refusal, status, code, stream):
    engine = FakeEngine()
    engine.script.refusal = refusal
    response = make_api(engine).complete(stream=stream)
    assert response.status_code == status
    found = error(response)
    assert (found["code"], found["message"]) == (code, "m")
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        (FinishReason.TIMEOUT, 504, "timeout"),
        (FinishReason.ERROR, 500, "internal"),
        (FinishReason.ABORT, 503, "not_ready"),
    ],
)
def test_requests_that_end_without_a_result(make_api, error, ending, status, code):
    engine = FakeEngine()
    engine.script.fail_after, engine.script.ending = 3, ending
    response = make_api(engine).complete(n=2)
    assert response.status_code == status
    assert error(response)["code"] == code
    assert not engine.running


def test_a_deadline_that_passes(make_api, error):
    engine = FakeEngine()
    engine.script.token_s = 0.02
    response = make_api(engine).complete(timeout_s=0.05)
    assert response.status_code == 504
    assert error(response)["param"] == "timeout_s"


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_is_logged_and_leaks_nothing(make_api, error, caplog, stream):
    engine = FakeEngine()
    engine.script.crash = RuntimeError("secret detail")
    response = make_api(engine).complete(stream=stream)
    assert response.status_code == 500
    found = error(response)
    assert found["code"] == "internal"
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert "Traceback" in caplog.text
