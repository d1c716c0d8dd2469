"""Answers in other words over HTTP: the official SDKs, a real server, the real model, a real encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from anaphora.cli import main

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]
PATIENCE_S = 120.0

CONFIG = """
[server]
keys = [{ tenant = "a", key = "ka" }, { tenant = "b", key = "kb" }]
[engine]
served_name = "smollm2"
dtype = "float32"
device = "cpu"
kv_memory = "256MiB"
[semantic]
mode = "on"
risk = 0.2
audit_share = 0.001
"""
ASKED = "What is the capital of France?"
SAME = "what is the capital of FRANCE"
OTHER_WORDS = "What is France's capital?"
TRAP = "What is the capital of Germany?"
PAIRS = [
    {"question": ASKED, "other": SAME, "same": True},
    {"question": "How do I reset my password?", "other": "how can i reset my password", "same": True},
] * 20
LOOKUP = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def server(serve: Serve, smollm2: Path) -> Iterator[str]:
    with serve(CONFIG, "--engine", "transformers", "--model", str(smollm2)) as (url, _):
        _until(lambda: httpx2.get(f"{url}/ready").status_code == 200)
        teach(url, "ka")
        teach(url, "kb")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="ka", max_retries=0) as client:
            say(client, ASKED)
        _until(lambda: report(url)["questions"]["num_entries"] == 1)
        yield url


@pytest.fixture
def gpt(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="ka", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="ka", max_retries=0) as client:
        yield client


def _until(holds: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not holds():
        assert monotonic() < deadline, "waited in vain"
        sleep(0.05)  # another process: there is no event to wait for


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def teach(url: str, key: str) -> None:
    body = {"model": "smollm2", "pairs": PAIRS}
    response = httpx2.post(f"{url}/anaphora/semantic/evidence", json=body, headers=bearer(key), timeout=PATIENCE_S)
    assert response.json() == {"pairs": 40, "counted": 40}


def report(url: str, key: str = "ka") -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{url}/anaphora/semantic", headers=bearer(key)).json()
    return found


def say(client: openai.OpenAI, text: str, **fields: Any) -> tuple[str, str]:
    """What is answered, and its Cache-Status."""
    before = fields.pop("before", [])
    raw = client.chat.completions.with_raw_response.create(
        model="smollm2",
        messages=[*before, {"role": "user", "content": text}],
        max_completion_tokens=12,
        temperature=0,
        **fields,
    )
    return raw.parse().choices[0].message.content or "", raw.headers["cache-status"]


def test_the_same_question_in_other_words_is_answered_in_openais_dialect(gpt: openai.OpenAI) -> None:
    first, status = say(gpt, ASKED)
    assert "detail" not in status
    for text in (SAME, OTHER_WORDS):
        second, status = say(gpt, text)
        assert second == first
        assert status.startswith("anaphora; hit")
        assert status.endswith("detail=semantic")


def test_it_is_streamed_where_a_stream_is_asked_for(gpt: openai.OpenAI) -> None:
    first, _ = say(gpt, ASKED)
    chunks = gpt.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": OTHER_WORDS}],
        max_completion_tokens=12,
        temperature=0,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == first


def test_it_is_answered_in_anthropics_dialect_too(claude: anthropic.Anthropic, server: str) -> None:
    num_known = report(server)["questions"]["num_entries"]

    def asking(text: str) -> dict[str, Any]:
        return {"model": "smollm2", "max_tokens": 12, "messages": [{"role": "user", "content": text}]}

    first = claude.messages.create(**asking(ASKED)).content[0]
    assert first.type == "text"
    _until(lambda: report(server)["questions"]["num_entries"] > num_known)
    raw = claude.messages.with_raw_response.create(**asking(OTHER_WORDS))
    assert raw.headers["cache-status"].endswith("detail=semantic")
    block = raw.parse().content[0]
    assert block.type == "text"
    assert block.text == first.text
    with claude.messages.stream(**asking(SAME)) as stream:
        assert stream.get_final_text() == first.text


def test_a_trap_is_computed(gpt: openai.OpenAI, server: str) -> None:
    _, status = say(gpt, TRAP)
    assert "fwd=miss" in status
    assert "detail=guarded" in status
    told = httpx2.get(f"{server}/anaphora/explain?limit=1", headers=bearer("ka")).json()["requests"][0]["semantic"]
    assert (told["outcome"], told["step"], told["nearest"]) == ("miss", "guards", ASKED)


@pytest.mark.parametrize(
    "fields",
    [
        {"before": [{"role": "system", "content": "Answer in French."}]},
        {"tools": [LOOKUP]},
        {"before": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    ],
    ids=["system prompt", "tool", "conversation"],
)
def test_under_other_circumstances_it_is_computed(gpt: openai.OpenAI, fields: dict[str, Any]) -> None:
    _, status = say(gpt, OTHER_WORDS, **fields)
    assert "fwd=miss" in status


def test_another_tenant_gets_nothing_of_it(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="kb", max_retries=0) as client:
        _, status = say(client, OTHER_WORDS)
    assert "fwd=miss" in status
    assert {decision["tenant"] for decision in report(server, "kb")["decisions"]} <= {"b"}


def test_a_client_can_refuse_it_or_want_it_surer(gpt: openai.OpenAI) -> None:
    _, status = say(gpt, "Name the capital of France!", extra_headers={"x-anaphora-semantic": "off"})
    assert "fwd=miss" in status
    _, status = say(gpt, "what is the capital of france", extra_headers={"x-anaphora-semantic": "0.0001"})
    assert "detail=shadow" in status
    with pytest.raises(openai.BadRequestError, match="x-anaphora-semantic"):
        say(gpt, ASKED, extra_headers={"x-anaphora-semantic": "2"})


def test_feedback_says_that_an_answer_was_wrong(gpt: openai.OpenAI, server: str) -> None:
    text = "WHAT is the capital of France"
    raw = gpt.chat.completions.with_raw_response.create(
        model="smollm2", messages=[{"role": "user", "content": text}], max_completion_tokens=12, temperature=0
    )
    assert raw.headers["cache-status"].endswith("detail=semantic")
    answer_id = raw.parse().id
    path = f"{server}/anaphora/feedback"
    assert httpx2.post(path, json={"id": answer_id, "correct": False}, headers=bearer("kb")).status_code == 404
    assert httpx2.post(path, json={"id": answer_id, "correct": False}, headers=bearer("ka")).json() == {"recorded": True}
    _, status = say(gpt, text)
    assert "detail=semantic" not in status
    assert httpx2.post(path, json={"id": answer_id}, headers=bearer("ka")).status_code == 400


def test_the_report_and_the_ledger_tell_what_was_given(server: str) -> None:
    found = report(server)
    assert found["outcomes"]["served"] >= 1
    rungs = found["evidence"]["smollm2"]
    assert rungs[0]["threshold"] == 1.0
    assert any(rung["served"] for rung in rungs)

    def recorded() -> bool:
        groups = httpx2.get(f"{server}/anaphora/ledger?by=level", headers=bearer("ka")).json()["groups"]
        return "semantic" in {group["level"] for group in groups}

    _until(recorded)


def test_without_the_setting_there_is_no_such_level(serve: Serve) -> None:
    with serve("") as (url, _):
        response = httpx2.post(f"{url}/anaphora/feedback", json={"id": "x", "correct": True})
        assert response.status_code == 404
        assert "semantic.mode" in response.json()["error"]["message"]


def _compared(url: str) -> bool:
    """Whether the encoder is loaded."""
    body = {"model": "echo", "messages": [{"role": "user", "content": f"Is it {monotonic()} yet?"}]}
    return "failed" not in httpx2.post(f"{url}/v1/chat/completions", json=body).headers["cache-status"]


def test_what_is_computed_anyway_becomes_the_evidence_by_which_answers_are_given(serve: Serve) -> None:
    with serve('[semantic]\nmode = "on"\nrisk = 0.3\naudit_share = 0.01\n') as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            _until(lambda: _compared(url))
            seen = []
            for number in range(1, 40):
                sleep(0.05)  # labels are read back four times a second
                # The echo engine says what it was asked, so the answers are the same, but for case and marks.
                text = f"{'How do I' if number % 2 else 'HOW DO I'} reset my password{'!' * number}"
                raw = client.chat.completions.with_raw_response.create(
                    model="echo", messages=[{"role": "user", "content": text}], temperature=0
                )
                seen.append(raw.headers["cache-status"].partition("detail=")[2])
                if seen[-1] == "semantic":
                    break
        assert seen[:2] == ["", "shadow"]
        assert seen[-1] == "semantic"
        metrics = httpx2.get(f"{url}/metrics").text
        assert 'anaphora:semantic_judged_total{source="shadow",wrong="false"}' in metrics
        assert 'anaphora:semantic_compared_total{outcome="hit",step="risk"}' in metrics


def test_the_command_line_tells_and_teaches(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"question": "How do I pay?", "other": "how do i pay", "same": true}\n\n' * 3)
    with serve('[semantic]\nmode = "shadow"\n') as (url, _):
        assert main(["semantic", "teach", str(file), "--model", "echo", "--url", url]) == 0
        assert capsys.readouterr().out.startswith("3 of 3 pairs count")
        assert main(["semantic", "report", "--url", url]) == 0
        told = capsys.readouterr().out
        assert "mode shadow: at most 1.0% wrong, with 95% confidence" in told
        assert "evidence of echo" in told
        assert main(["semantic", "report", "--json", "--url", url]) == 0
        assert json.loads(capsys.readouterr().out)["evidence"]["echo"][0]["num_audits"] == 3
        assert main(["semantic", "feedback", "req_" + "0" * 24, "--wrong", "--url", url]) == 1
        assert "No answer in other words" in capsys.readouterr().err
        file.write_text("{}\n")
        assert main(["semantic", "teach", str(file), "--model", "echo", "--url", url]) == 2
        assert "line 1" in capsys.readouterr().err
