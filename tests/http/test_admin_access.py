"""Who may make admin calls: keys, the loopback address, and no page of a browser on it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

ADMIN_CALLS = [
    ("POST", "/admin/adapters"),
    ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/x"),
    ("DELETE", "/admin/adapters/x"),
    ("POST", "/admin/adapters/x/load"),
    ("POST", "/admin/adapters/x/unload"),
    ("POST", "/admin/adapters/x/pin"),
    ("POST", "/admin/adapters/x/unpin"),
    ("POST", "/admin/adapters/x/rollback"),
    ("POST", "/admin/exports"),
    ("GET", "/admin/exports"),
    ("GET", "/admin/exports/x"),
    ("GET", "/admin/exports/x/events"),
    ("DELETE", "/admin/exports/x"),
    ("GET", "/admin/stats"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


def call_from(api, address: str, method: str = "GET", path: str = "/admin/stats", **arguments):
    """Call from a client's ``address``."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=api.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(send())


class TestWithKeys:
    @pytest.fixture
    def locked(self, make_api):
        return make_api(api_keys=("client", "both"), admin_keys=("boss", "both"))

    @pytest.mark.parametrize("key", ["boss", "both"])
    @pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1", "2001:db8::1"])
    def test_the_right_one_opens_from_anywhere(self, locked, key, address):
        headers = {
            "authorization": f"Bearer {key}",
            "host": "models.example",
            "origin": "https://console.example",
        }
        assert call_from(locked, address, headers=headers).status_code == 200

    @pytest.mark.parametrize(("method", "path"), ADMIN_CALLS)
    @pytest.mark.parametrize(
        ("header", "status", "code"),
        [
            (None, 401, "unauthorized"),
            ("Bearer ", 401, "unauthorized"),
            ("Basic boss", 401, "unauthorized"),
            ("Bearer bos", 401, "unauthorized"),
            ("Bearer wrong", 401, "unauthorized"),
            ("Bearer client", 403, "forbidden"),
        ],
    )
    def test_no_other_opens_anything(self, locked, error, method, path, header, status, code):
        headers = {} if header is None else {"authorization": header}
        response = locked.call(method, path, headers=headers)
        assert response.status_code == status
        assert error(response)["code"] == code
        assert ("www-authenticate" in response.headers) == (status == 401)
        assert "boss" not in response.text

    def test_an_admin_key_does_not_open_inference(self, locked):
        headers = {"authorization": "Bearer boss"}
        response = locked.post("/tokenize", {"prompt": "x"}, headers=headers)
        assert response.status_code == 401

    def test_inference_stays_open_where_only_admin_keys_are_set(self, make_api):
        api = make_api(admin_keys=("boss",))
        assert api.post("/tokenize", {"prompt": "x"}).status_code == 200
        assert api.get("/admin/stats").status_code == 401


class TestWithoutKeys:
    @pytest.mark.parametrize(
        "address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "localhost"]
    )
    def test_this_machine_may(self, api, address):
        assert call_from(api, address).status_code == 200

    @pytest.mark.parametrize(
        "address",
        ["192.0.2.1", "10.0.0.1", "0.0.0.0", "::", "2001:db8::1", "::ffff:10.0.0.1", "", "unix"],
    )
    def test_others_may_not(self, api, error, address):
        response = call_from(api, address)
        assert response.status_code == 403
        found = error(response)
        assert (found["code"], found["type"]) == ("forbidden", "permission_error")
        assert "--admin-key-file" in found["message"]

    @pytest.mark.parametrize(("method", "path"), ADMIN_CALLS)
    def test_no_call_is_left_out(self, api, error, method, path):
        assert error(call_from(api, "192.0.2.1", method, path))["code"] == "forbidden"

    def test_a_client_without_an_address_may_not(self, api):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/admin/stats",
            "query_string": b"",
            "headers": [],
        }
        asyncio.run(api.app(scope, receive, send))
        assert sent[0]["status"] == 403

    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "localhost.", "[::1]:8000", "a.localhost"],
    )
    def test_names_of_this_machine(self, api, host):
        assert api.get("/admin/stats", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0:8000",
            "192.0.2.1",
            "[2001:db8::1]",
            "[::1",
            "notlocalhost",
            "",
        ],
    )
    def test_a_name_that_was_bent_to_this_machine(self, api, error, host):
        response = api.get("/admin/stats", headers={"host": host})
        assert response.status_code == 403
        assert error(response)["message"].startswith("host: ")

    @pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost:3000"])
    def test_pages_of_this_machine(self, api, origin):
        assert api.get("/admin/stats", headers={"origin": origin}).status_code == 200

    @pytest.mark.parametrize(
        "origin",
        [
            "https://evil.example",
            "http://localhost.evil.example",
            "http://127.0.0.1@evil.example",
            "null",
            "",
            "http://[::1",
            "file://",
        ],
    )
    def test_pages_of_others(self, api, error, origin):
        headers = {"origin": origin, "content-type": "multipart/form-data; boundary=x"}
        response = api.post("/admin/adapters", content=b"--x--", headers=headers)
        assert response.status_code == 403
        assert error(response)["message"].startswith("origin: ")

    @pytest.mark.parametrize("header", ["x-forwarded-for", "Forwarded", "X-Real-IP"])
    def test_proxies(self, api, error, header):
        response = api.get("/admin/stats", headers={header: "127.0.0.1"})
        assert response.status_code == 403
        assert header.lower() in error(response)["message"]

    def test_inference_asks_for_none_of_it(self, api):
        headers = {"host": "models.example", "origin": "https://app.example"}
        response = call_from(
            api, "192.0.2.1", "POST", "/tokenize", json={"prompt": "x"}, headers=headers
        )
        assert response.status_code == 200
