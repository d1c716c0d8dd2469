"""What of a provider's API Anaphora does not know goes to an upstream and back as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import pytest
from tests.server.conftest import Serve


class Provider(BaseHTTPRequestHandler):
    """Says what it was asked; knows nothing of language models."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        said = json.dumps(
            {
                "method": self.command,
                "path": self.path,
                "body": body.decode("latin-1"),
                "key": self.headers.get("authorization") or self.headers.get("x-api-key"),
                "cookie": self.headers.get("cookie"),
                "type": self.headers.get("content-type"),
                "beta": self.headers.get("anthropic-beta"),
            }
        ).encode()
        self.send_response(201)
        self.send_header("content-type", "application/x-special")
        self.send_header("content-length", str(len(said)))
        self.send_header("set-cookie", "who=first-client")
        self.send_header("x-quota", "7")
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def config(provider: str, *, key: str = "") -> str:
    toml = ""
    for dialect, models in (("anthropic", "claude-*"), ("openai", "gpt-*")):
        toml += f'[[gateway.upstreams]]\nname = "{dialect}"\ndialect = "{dialect}"\n'
        toml += f'base_url = "{provider}"\nmodels = ["{models}"]\n{key}\n'
    return toml


def test_with_keys_of_their_own_clients_may_ask_anything(serve: Serve, provider: str) -> None:
    with serve(config(provider)) as (url, _), httpx2.Client(base_url=url) as client:
        bearer = {"authorization": "Bearer mine"}
        answer = client.post(
            "/v1/files?purpose=batch&x=%20", content=b"\x00\xffdata", headers={**bearer, "content-type": "a/b"}
        )
        assert answer.status_code == 201
        assert answer.headers["x-quota"] == "7"
        assert answer.headers["content-type"] == "application/x-special"
        assert answer.headers["x-anaphora-upstream"] == "openai"
        said = answer.json()
        assert (said["method"], said["path"], said["key"]) == ("POST", "/v1/files?purpose=batch&x=%20", "Bearer mine")
        assert (said["body"], said["type"]) == ("\x00\xffdata", "a/b")

        anthropic = {"x-api-key": "ours", "anthropic-version": "2023-06-01", "anthropic-beta": "files"}
        answer = client.delete("/v1/files/f1", headers=anthropic)
        assert answer.headers["x-anaphora-upstream"] == "anthropic"
        assert (answer.json()["method"], answer.json()["key"], answer.json()["beta"]) == ("DELETE", "ours", "files")
        assert answer.json()["cookie"] is None  # what one client was given is not for the next


def test_with_a_key_of_the_server_only_what_keeps_nothing_may_be_asked(
    serve: Serve, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "secret")
    with serve(config(provider, key='key_env = "PROVIDER_KEY"')) as (url, _), httpx2.Client(base_url=url) as client:
        bearer = {"authorization": "Bearer mine"}
        embedded = client.post("/v1/embeddings", json={"model": "gpt-embed", "input": "a"}, headers=bearer)
        assert embedded.json()["key"] == "Bearer secret"
        refused = client.get("/v1/files", headers=bearer)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "unknown_url"
        assert client.get("/v1/files", headers={"anthropic-version": "2023-06-01"}).json()["type"] == "error"


def test_which_models_there_are_the_upstream_says_where_only_patterns_are_known(
    serve: Serve, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "secret")
    toml = config(provider, key='key_env = "PROVIDER_KEY"') + '[engine]\nkind = "none"\n'
    with serve(toml, "--engine", "none") as (url, _), httpx2.Client(base_url=url) as client:
        assert client.get("/v1/models").json()["path"] == "/v1/models"
        assert client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()["key"] == "secret"
        assert client.get("/v1/models/gpt-x").json()["id"] == "gpt-x"


def test_without_upstreams_there_is_nothing(serve: Serve) -> None:
    with serve("") as (url, _), httpx2.Client(base_url=url) as client:
        assert client.get("/v1/files").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("body", [b"{", b'{"messages": []}', b'{"model": "echo"}'])
def test_a_body_that_nobody_can_read_is_refused_in_the_same_words_with_upstreams_and_without(
    serve: Serve, provider: str, body: bytes
) -> None:
    said = []
    for toml in ("", config(provider)):
        with serve(toml) as (url, _), httpx2.Client(base_url=url) as client:
            answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            said.append(answer.json())
    assert said[0] == said[1]
    if body == b'{"messages": []}':
        assert said[0]["error"]["code"] == "missing_required_parameter"
