"""The official SDKs against a real server over the embedded engine: SmolLM2 for what it says, a tiny model for its deaths."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import anthropic
import openai
import pytest

pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]
PATIENCE_S = 120.0

CONFIG = """
[engine]
served_name = "{name}"
dtype = "float32"
device = "cpu"
kv_memory = "512MiB"
"""


def await_ready(url: str) -> None:
    until(lambda: _status(f"{url}/ready") == 200)


def until(holds: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not holds():
        assert monotonic() < deadline, "waited in vain"
        sleep(0.02)  # another process: there is no event to wait for


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def num_running(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith("vllm:num_requests_running"):
                return float(line.split()[-1])
    return 0.0


@pytest.fixture(scope="module")
def real(serve: Serve, smollm2: Path) -> Iterator[str]:
    with serve(CONFIG.format(name="smollm2"), "--engine", "transformers", "--model", str(smollm2)) as (url, _):
        await_ready(url)
        yield url


@pytest.fixture(scope="module")
def oai(real: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ant(real: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real, api_key="any", max_retries=0) as client:
        yield client


SYSTEM = "You are a patient guide in a small museum of clocks. " * 12 + "Answer briefly."


def turns(*texts: str) -> Any:
    """A conversation: user, assistant, user, ..."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# -- the real model --------------------------------------------------------------------------------------------------------


def test_openai_the_second_turn_reuses_the_first(oai: openai.OpenAI) -> None:
    system = [{"role": "system", "content": SYSTEM}]
    options: Any = {"model": "smollm2", "temperature": 0, "max_tokens": 24}
    first = oai.chat.completions.create(messages=system + turns("Which clock is the oldest?"), **options)
    said = first.choices[0].message.content
    assert said
    assert first.usage is not None
    again = system + turns("Which clock is the oldest?", said, "And who made it?")
    raw = oai.chat.completions.with_raw_response.create(messages=again, **options)
    second = raw.parse()
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    reused = int(raw.headers["x-anaphora-kv-reused-tokens"])
    assert reused >= (first.usage.total_tokens - 1) // 16 * 16 - 16
    assert reused < second.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == 0  # by OpenAI's rules it is too short


def test_openai_streams_what_it_says(oai: openai.OpenAI) -> None:
    options: Any = {"model": "smollm2", "temperature": 0, "max_tokens": 16, "messages": turns("Name three colours.")}
    stream = oai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = oai.chat.completions.create(extra_headers={"Cache-Control": "no-cache"}, **options)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_completions_and_responses_answer(oai: openai.OpenAI) -> None:
    completion = oai.completions.create(model="smollm2", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert completion.choices[0].text
    response = oai.responses.create(model="smollm2", input="Say hello.", max_output_tokens=16, temperature=0)
    assert response.output_text


def test_openai_logprobs_and_several_choices(oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(
        model="smollm2", messages=turns("Pick a number."), n=2, seed=3, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_openai_too_long_a_prompt_is_a_400_with_its_code(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        oai.chat.completions.create(model="smollm2", messages=turns("word " * 20_000), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def test_a_request_with_tools_is_answered_in_text_or_by_a_call(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    function: Any = {"name": TOOL["name"], "description": TOOL["description"], "parameters": TOOL["schema"]}
    asked: Any = {"model": "smollm2", "max_tokens": 24, "messages": turns("What is the weather in Oslo?")}
    message = oai.chat.completions.create(tools=[{"type": "function", "function": function}], **asked).choices[0].message
    assert message.content or message.tool_calls
    tool: Any = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["schema"]}
    answer = ant.messages.create(tools=[tool], tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **asked)
    assert answer.content


def test_anthropic_the_second_turn_reuses_the_first(ant: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": SYSTEM * 4 + " Be kind.", "cache_control": {"type": "ephemeral"}}]
    options: Any = {"model": "smollm2", "max_tokens": 24, "system": system}
    first = ant.messages.create(messages=turns("Which clock is the loudest?"), **options)
    (block,) = first.content
    assert block.type == "text"
    second = ant.messages.create(messages=turns("Which clock is the loudest?", block.text, "And the quietest?"), **options)
    assert (second.usage.cache_read_input_tokens or 0) == first.usage.cache_creation_input_tokens
    assert (second.usage.cache_read_input_tokens or 0) > 512


def test_anthropic_streams_what_it_says(real: str) -> None:
    # The latest API version has no temperature, and the SDK no parameter for it: an older one, to get the same answer twice.
    headers = {"anthropic-version": "2023-06-01", "cache-control": "no-cache"}
    options: Any = {"model": "smollm2", "max_tokens": 16, "messages": turns("Name three animals.")}
    options["extra_body"] = {"temperature": 0}
    with anthropic.Anthropic(base_url=real, api_key="any", max_retries=0, default_headers=headers) as client:
        with client.messages.stream(**options) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        whole = client.messages.create(**options)
    (block,) = whole.content
    assert block.type == "text"
    assert text == block.text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_anthropic_a_pre_warm_makes_the_first_real_request_warm(ant: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Pre-warmed. " + SYSTEM * 4, "cache_control": {"type": "ephemeral"}}]
    asked: Any = {"model": "smollm2", "system": system, "messages": turns("Which clock is the smallest?")}
    warmed = ant.messages.create(max_tokens=0, **asked)
    assert warmed.content == []
    assert warmed.usage.output_tokens == 0
    first = ant.messages.create(max_tokens=4, **asked)
    assert (first.usage.cache_read_input_tokens or 0) > 512


def test_anthropic_counts_the_tokens_that_usage_shows(ant: anthropic.Anthropic) -> None:
    asked: Any = {"model": "smollm2", "system": "Be brief.", "messages": turns("How many tokens is this?")}
    counted = ant.messages.count_tokens(**asked)
    usage = ant.messages.create(max_tokens=2, **asked).usage
    total = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert counted.input_tokens == total


def timed(ask: Callable[[], Any]) -> tuple[Any, int, float]:
    """The answer, the KV tokens that were really reused for it, and how long it took."""
    started_s = monotonic()
    raw = ask()
    return raw.parse(), int(raw.headers["x-anaphora-kv-reused-tokens"]), monotonic() - started_s


def test_anthropic_what_usage_calls_a_write_is_slow_and_what_it_calls_a_read_is_fast(ant: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Clocks. " + SYSTEM * 6, "cache_control": {"type": "ephemeral"}}]
    writes: list[float] = []
    reads: list[float] = []
    for question in ("How old are they?", "Who winds them?", "Which is the finest?"):
        answer, reused, seconds = timed(
            lambda question=question: ant.messages.with_raw_response.create(  # type: ignore[misc]  # asked at once
                model="smollm2", max_tokens=1, system=system, messages=turns(question)
            )
        )
        read, written = answer.usage.cache_read_input_tokens, answer.usage.cache_creation_input_tokens
        assert (read == 0) != (written == 0)
        assert reused >= read - 16
        (reads if read else writes).append(seconds)
    assert (len(writes), len(reads)) == (1, 2)
    assert min(reads) < writes[0] / 3


def test_openai_what_usage_calls_cached_is_fast(oai: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Watches. " + SYSTEM * 8}]
    cold: list[float] = []
    warm: list[float] = []
    for question in ("How old are they?", "Who winds them?", "Which is the finest?"):
        answer, reused, seconds = timed(
            lambda question=question: oai.chat.completions.with_raw_response.create(  # type: ignore[misc]  # asked at once
                model="smollm2", max_tokens=1, messages=messages + turns(question)
            )
        )
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached % 128 == 0
        assert reused >= cached - 16
        (warm if cached else cold).append(seconds)
    assert (len(cold), len(warm)) == (1, 2)
    assert min(warm) < cold[0] / 3


def test_a_client_that_goes_away_frees_its_place(real: str, oai: openai.OpenAI) -> None:
    options: Any = {"model": "smollm2", "temperature": 1.0, "max_tokens": 1500}
    stream = oai.chat.completions.create(messages=turns("Tell me a long, long story."), stream=True, **options)
    next(iter(stream))
    assert num_running(real) == 1
    stream.close()
    until(lambda: num_running(real) == 0)


# -- the engine dies -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(serve: Serve, tiny_model: Callable[..., Path]) -> Iterator[tuple[str, Any]]:
    """A server over a tiny model that never ends an answer by itself, and its process."""
    folder = tiny_model("Llama", eos_token_id=None)
    with serve(CONFIG.format(name="tiny"), "--engine", "transformers", "--model", str(folder)) as (url, process):
        await_ready(url)
        yield url, process


def kill_engine(url: str, process: Any, asked: Future[Any] | None = None) -> None:
    """Once a request is being computed."""
    until(lambda: num_running(url) > 0 or (asked is not None and asked.done()))
    assert asked is None or not asked.done(), asked.result()
    (engine,) = [
        child for child in psutil.Process(process.pid).children() if "anaphora.backends.engine_child" in child.cmdline()
    ]
    os.kill(engine.pid, signal.SIGKILL)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def long(text: str, max_tokens: int = 3000) -> Any:
    return {"model": "tiny", "max_tokens": max_tokens, "messages": turns(text)}


def test_openai_a_killed_engine_is_a_503_that_says_when_to_retry(mortal: tuple[str, Any], thread: ThreadPoolExecutor) -> None:
    url, process = mortal
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answer = thread.submit(lambda: client.chat.completions.create(**long("one")))
        kill_engine(url, process, answer)
        with pytest.raises(openai.InternalServerError) as caught:
            answer.result()
        assert caught.value.status_code == 503
        assert float(caught.value.response.headers["retry-after"]) > 0
        short = client.chat.completions.create(**{**long("after"), "max_tokens": 4})  # waits for the new engine
        assert short.choices[0].message.content is not None


def test_openai_a_killed_engine_ends_a_stream_with_an_error(mortal: tuple[str, Any]) -> None:
    url, process = mortal
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = client.chat.completions.create(stream=True, **long("two"))
        next(iter(stream))
        kill_engine(url, process)
        with pytest.raises(openai.APIError, match="please retry"):
            list(stream)


def test_anthropic_a_killed_engine_is_overloaded(mortal: tuple[str, Any], thread: ThreadPoolExecutor) -> None:
    url, process = mortal
    await_ready(url)
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        answer = thread.submit(lambda: client.messages.create(**long("three")))
        kill_engine(url, process, answer)
        with pytest.raises(anthropic.APIStatusError) as caught:
            answer.result()
        assert caught.value.status_code == 529
        assert "overloaded_error" in str(caught.value.body)


def test_anthropic_a_killed_engine_ends_a_stream_with_an_error_event(mortal: tuple[str, Any]) -> None:
    url, process = mortal
    await_ready(url)
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        stream = client.messages.create(stream=True, **long("four"))
        next(iter(stream))
        kill_engine(url, process)
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(stream)
        assert "overloaded_error" in str(caught.value.body)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_an_sdk_that_retries_gets_its_answer_from_the_next_engine(
    mortal: tuple[str, Any], thread: ThreadPoolExecutor, dialect: str
) -> None:
    url, process = mortal
    await_ready(url)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2) as oai,
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=2) as ant,
    ):
        if dialect == "openai":
            asked = thread.submit(lambda: oai.chat.completions.create(**long("five", 800)).usage.completion_tokens)
        else:
            asked = thread.submit(lambda: ant.messages.create(**long("six", 800)).usage.output_tokens)
        kill_engine(url, process, asked)
        assert asked.result() == 800
