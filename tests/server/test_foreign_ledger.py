"""What is only passed on is in the books as well: by what its answer says that it took, and never as if it were free."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2
import openai
import pytest
from tests.ledger.entries import rows_of
from tests.server.gateways import Gateway, gateway

from anaphora.ledger.entry import Entry, usd
from anaphora.server.foreign import MAX_LOOKED_AT

PICTURE: Any = {
    "created": 1,
    "data": [{"b64_json": "A" * 300_000}],
    "usage": {
        "input_tokens": 50,
        "output_tokens": 4160,
        "total_tokens": 4210,
        "input_tokens_details": {"text_tokens": 50, "image_tokens": 0},
    },
}
RANKING: Any = {"id": "r1", "model": "judge-1", "results": [], "usage": {"total_tokens": 56}}
WRITTEN: Any = {"text": "hello", "usage": {"type": "duration", "seconds": 9}}
PRICES = """
[[price]]
model = "gpt-image-1"
input = 5
output = 40

[[price]]
model = "judge-*"
input = 1
output = 0
"""


class Provider(ThreadingHTTPServer):
    """Answers at the paths that it was told of, and waits in the middle of one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.go_on = Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Provider

    def do_GET(self) -> None:
        self._send(200, "application/json", json.dumps({"data": [], "usage": {"total_tokens": 9}}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answers: dict[str, tuple[int, str, bytes]] = {
            "/v1/images/generations": (200, "application/json", json.dumps(PICTURE).encode()),
            "/v1/rerank": (200, "application/json; charset=utf-8", json.dumps(RANKING).encode()),
            "/v1/audio/transcriptions": (200, "application/json", json.dumps(WRITTEN).encode()),
            "/v1/audio/speech": (200, "audio/mpeg", bytes(range(256)) * 100),
            "/v1/moderations": (503, "application/json", b'{"error": {"message": "too busy"}}'),
            "/v1/huge": (200, "application/json", b'{"usage": {"total_tokens": 1}, "pad": "%b"}' % (b"x" * MAX_LOOKED_AT)),
        }
        if self.path == "/v1/slow":
            self._begin(200, "application/json", 1000)
            self.wfile.write(b'{"usage": ')
            self.wfile.flush()
            self.server.go_on.wait(30)
            self.close_connection = True
            return
        self._send(*answers[self.path])

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _begin(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def provider() -> Iterator[Provider]:
    server = Provider()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def entries(provider: Provider, tmp_path: Path) -> Callable[..., list[Entry]]:
    """What the book holds after a gateway was asked."""

    def after(ask: Callable[[Gateway], None], toml: str = "") -> list[Entry]:
        prices = tmp_path / "prices.toml"
        prices.write_text(PRICES)
        url = f"http://127.0.0.1:{provider.server_address[1]}"
        toml = f'[ledger]\nprices = "{prices}"\n{toml}\n[[gateway.upstreams]]\nname = "far"\ndialect = "openai"\n'
        toml += f'base_url = "{url}"\nmodels = ["gpt-*", "whisper-*"]\nretries = 0\n'
        with gateway(toml, tmp_path) as served:
            ask(served)
        return rows_of(tmp_path / "cache" / "ledger.db")

    return after


def post(served: Gateway, path: str, **options: Any) -> httpx2.Response:
    headers = {"authorization": "Bearer mine", **options.pop("headers", {})}
    return httpx2.post(f"{served.url}{path}", headers=headers, timeout=60, **options)


def test_what_an_answer_says_that_it_took_is_booked_and_priced_by_its_model(entries: Callable[..., list[Entry]]) -> None:
    def ask(served: Gateway) -> None:
        with served.gpt() as client:
            picture = client.images.generate(model="gpt-image-1", prompt="a cat", extra_headers={"x-anaphora-tag": "cats"})
            assert picture.data is not None
            assert picture.data[0].b64_json == PICTURE["data"][0]["b64_json"]
        assert post(served, "/v1/rerank", json={"model": "judge", "query": "q"}).json() == RANKING
        assert served.url
        with httpx2.Client(headers={"authorization": "Bearer mine"}) as client:
            assert client.get(f"{served.url}/v1/batches").status_code == 200  # which costs nothing

    drawn, ranked = entries(ask)
    assert (drawn.asked, drawn.model, drawn.upstream, drawn.level) == ("gpt-image-1", "gpt-image-1", "far", "passed")
    assert (drawn.input, drawn.output, drawn.tag, drawn.outcome, drawn.priced) == (50, 4160, "cats", "finished", 1)
    assert usd(drawn.paid) == Decimal(50 * 5 + 4160 * 40) / 10**6
    assert drawn.whole_us > 0
    assert drawn.request_id.startswith("req_")
    assert (ranked.asked, ranked.model, ranked.input, ranked.output) == ("judge", "judge-1", 56, 0)
    assert usd(ranked.paid) == Decimal("0.000056")


def test_what_says_nothing_of_it_is_a_row_without_a_price(entries: Callable[..., list[Entry]]) -> None:
    def ask(served: Gateway) -> None:
        with served.gpt() as client:
            speech = client.audio.speech.create(model="gpt-tts", voice="alloy", input="hello")
            assert speech.read() == bytes(range(256)) * 100
            client.audio.transcriptions.create(model="whisper-1", file=("a.wav", io.BytesIO(bytes(200_000))))
        assert len(post(served, "/v1/huge", json={"model": "gpt-image-1"}).content) > MAX_LOOKED_AT

    found = entries(ask)
    assert [(entry.asked, entry.priced, entry.paid, entry.tokens) for entry in found] == [
        ("gpt-tts", 0, 0, 0),
        ("whisper-1", 0, 0, 0),
        ("gpt-image-1", 0, 0, 0),
    ]
    assert {(entry.level, entry.outcome, entry.upstream) for entry in found} == {("passed", "finished", "far")}


def test_a_refusal_costs_nothing_and_what_breaks_off_nobody_knows(
    entries: Callable[..., list[Entry]], provider: Provider
) -> None:
    def ask(served: Gateway) -> None:
        with served.gpt() as client, pytest.raises(openai.InternalServerError, match="too busy"):
            client.moderations.create(model="gpt-mod", input="x")
        headers = {"authorization": "Bearer mine"}
        with httpx2.stream("POST", f"{served.url}/v1/slow", headers=headers, json={"model": "gpt-left"}) as answer:
            assert next(answer.iter_raw()) == b'{"usage": '
        with httpx2.stream("POST", f"{served.url}/v1/slow", headers=headers, json={"model": "gpt-cut"}) as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b'{"usage": '  # at once, though the rest is not there
            provider.go_on.set()
            with pytest.raises(httpx2.RemoteProtocolError):
                list(pieces)

    found = {entry.asked: entry for entry in entries(ask)}
    assert {asked: (entry.outcome, entry.priced, entry.paid) for asked, entry in found.items()} == {
        "gpt-mod": ("failed", 1, 0),
        "gpt-left": ("left", 0, 0),
        "gpt-cut": ("failed", 0, 0),
    }


def test_a_budget_counts_what_was_passed_on(entries: Callable[..., list[Entry]], tmp_path: Path) -> None:
    def ask(served: Gateway) -> None:
        while post(served, "/v1/images/generations", json={"model": "gpt-image-1"}).status_code == 200:
            pass  # the row is written, and counts, a moment behind the answer
        refused = post(served, "/v1/images/generations", json={"model": "gpt-image-1"})
        assert refused.status_code == 429
        assert "$0.01 per day" in refused.json()["error"]["message"]
        looked = httpx2.get(f"{served.url}/v1/files", headers={"authorization": "Bearer mine"})
        assert looked.status_code == 200

    found = entries(ask, '[[ledger.limits]]\ntenant = "*"\nusd_per_day = 0.01\n')
    assert sum(entry.paid for entry in found) > 0
