"""The test vectors of prompt caching (their numbers are in the names) through the official SDKs, against a real server.

Against the emulator with its clock, and those that need no clock also against the embedded engine, over the first layers of
the real model: its tokenizer and its template with a fraction of the work. There all clients are of one tenant, each in a
workspace of its own: what they are promised is their own, and what was computed for one of them is not computed again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.server.ruler import ChatMLRuler, EchoRuler, Ruler

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]
Tuple4 = tuple[int, int, int, int]

M5: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
H1: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
MARK: dict[str, Any] = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def words(count: int, word: str = "word") -> str:
    """A text of exactly so many tokens of the emulator."""
    return " ".join([word] * count)


def part(count: int, word: str = "word", **more: Any) -> Any:
    return {"type": "text", "text": words(count, word), **more}


def user(*parts: dict[str, Any]) -> Any:
    return {"role": "user", "content": list(parts)}


def says(count: int) -> Any:
    return {"role": "assistant", "content": [part(count)]}


class Site:
    """A server, and how long things are to it."""

    def __init__(self, url: str, ruler: Ruler, *, emulates: bool) -> None:
        self.url, self.ruler, self.emulates = url, ruler, emulates
        self._num_keys = itertools.count()

    def key(self) -> str:
        """Of somebody who has promised nothing yet."""
        return f"key-{next(self._num_keys)}"

    def wait(self, seconds: float) -> None:
        if self.emulates:
            httpx2.post(f"{self.url}/anaphora/clock", json={"advance_s": seconds}).raise_for_status()
        elif seconds > 1:
            pytest.skip("the real model's time passes as it does")


MODELS = ["claude-opus-5", "claude-opus-5-5", "claude-haiku-5-5", "gpt-4.1", "gpt-5.6-sol"]
NUM_WORKSPACES = 99
WHOLE_MODEL = bool(os.environ.get("WHOLE_MODEL"))
REAL = f"""
[engine]
aliases = {MODELS}
dtype = "float32"
device = "cpu"
kv_memory = "{"4GiB" if WHOLE_MODEL else "256MiB"}"
""" + "".join(f'[[server.keys]]\ntenant = "us"\nworkspace = "w{i}"\nkey = "key-{i}"\n' for i in range(NUM_WORKSPACES))


def shortened(model: Path, folder: Path) -> Path:
    """`model` with its first two layers: a quarter of a minute instead of seven. All of them with WHOLE_MODEL=1 set."""
    if WHOLE_MODEL:
        return model
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return folder


@pytest.fixture(scope="module", params=["emulator", "engine"])
def site(serve: Serve, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if request.param == "emulator":
        with serve("", "--virtual-clock", remember=False) as (url, _):
            yield Site(url, EchoRuler(), emulates=True)
        return
    if find_spec("torch") is None:
        pytest.skip("the embedded engine is not installed")
    folder = shortened(request.getfixturevalue("smollm2"), tmp_path_factory.mktemp("models") / "smollm2")
    flags = ("--engine", "transformers", "--model", str(folder))
    with serve(REAL + "[cache]\nenabled = false\n", *flags, remember=False) as (url, _):
        deadline = monotonic() + 120
        while httpx2.get(f"{url}/ready").status_code != 200:
            assert monotonic() < deadline, "waited in vain"
            sleep(0.05)  # another process: there is no event to wait for
        yield Site(url, ChatMLRuler(folder), emulates=False)


@pytest.fixture
def emulator(site: Site) -> Site:
    """For what only the emulator can do."""
    if not site.emulates:
        pytest.skip("only the emulator does this")
    return site


class Claude:
    """An organisation of its own, asked through Anthropic's SDK."""

    def __init__(self, site: Site) -> None:
        self.site, self.ruler = site, site.ruler
        self.sdk = anthropic.Anthropic(base_url=site.url, api_key=site.key(), max_retries=0)

    def wait(self, seconds: float) -> None:
        self.site.wait(seconds)

    def body(self, **body: Any) -> dict[str, Any]:
        return self.ruler.fit({"model": "claude-opus-5", "max_tokens": 1, **body})

    def send(self, **body: Any) -> anthropic.types.Message:
        message: anthropic.types.Message = self.sdk.messages.create(**self.body(**body))
        return message

    def ask(self, *content: dict[str, Any], **body: Any) -> Tuple4:
        """Input, read, written for 5m, for 1h."""
        return self.counts(self.send(messages=[user(*content)], **body).usage)

    def counts(self, usage: Any) -> Tuple4:
        short = usage.cache_creation.ephemeral_5m_input_tokens
        long = usage.cache_creation.ephemeral_1h_input_tokens
        assert usage.cache_creation_input_tokens == short + long
        return usage.input_tokens - self.ruler.tail, usage.cache_read_input_tokens, short, long

    def count(self, **body: Any) -> int:
        body = {key: value for key, value in self.body(**body).items() if key != "max_tokens"}
        return int(self.sdk.messages.count_tokens(**body).input_tokens) - self.ruler.tail

    def tool(self, count: int, **more: Any) -> Any:
        """A tool of exactly so many tokens."""
        tool = {"name": "look", "description": words(count), "input_schema": {"type": "object"}, **more}
        if not self.site.emulates:
            return tool
        rest = self.count(messages=[user(part(1))], tools=[{**tool, "description": ""}]) - 1
        return {**tool, "description": words(count - rest)}


class GPT:
    """The same through OpenAI's."""

    def __init__(self, site: Site, model: str, *, to_the_end: bool = False) -> None:
        """`to_the_end`: all tokens of a prompt count, with what a template puts behind the last message."""
        self.site, self.model, self.to_the_end = site, model, to_the_end
        self.tail = 0 if to_the_end else site.ruler.tail
        self.sdk = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key(), max_retries=0)

    def wait(self, seconds: float) -> None:
        self.site.wait(seconds)

    def chat(self, *messages: dict[str, Any], **body: Any) -> tuple[int, int, int]:
        """Input, cached, written."""
        fitted = self.site.ruler.fit({"messages": list(messages), **body}, to_the_end=self.to_the_end)
        messages = fitted.pop("messages")
        answer = self.sdk.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            max_completion_tokens=1,
            extra_body=fitted,
        )
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        assert details is not None
        total = answer.usage.prompt_tokens - self.tail
        return total, details.cached_tokens or 0, getattr(details, "cache_write_tokens", None) or 0

    def responses(self, *items: dict[str, Any], **body: Any) -> tuple[int, int, int]:
        fitted = self.site.ruler.fit({"input": list(items), **body})["input"]
        usage = self.sdk.responses.create(model=self.model, input=fitted, max_output_tokens=1, extra_body=body).usage
        assert usage is not None
        details = usage.input_tokens_details
        return usage.input_tokens - self.tail, details.cached_tokens, getattr(details, "cache_write_tokens", None) or 0


@pytest.fixture
def claude(site: Site) -> Iterator[Claude]:
    claude = Claude(site)
    with claude.sdk:
        yield claude


@pytest.fixture
def sol(site: Site) -> Iterator[GPT]:
    gpt = GPT(site, "gpt-5.6-sol")
    with gpt.sdk:
        yield gpt


@pytest.fixture
def classic(site: Site) -> Iterator[GPT]:
    gpt = GPT(site, "gpt-4.1", to_the_end=True)
    with gpt.sdk:
        yield gpt


def system(count: int, **more: Any) -> Any:
    return [part(count, "rules", **more)]


# -- Anthropic ---------------------------------------------------------------------------------------------------------


def test_v01_written_once_then_read(claude: Claude) -> None:
    assert claude.ask(part(50), system=system(1000, **M5)) == (50, 0, 1000, 0)
    claude.wait(1)
    assert claude.ask(part(60), system=system(1000, **M5)) == (60, 1000, 0, 0)


def test_v02_without_marks_nothing_is_cached(claude: Claude) -> None:
    for _ in range(2):
        assert claude.ask(part(50), system=system(1000)) == (1050, 0, 0, 0)


def test_v03_the_minimum(claude: Claude) -> None:
    assert claude.ask(part(50), system=system(511, **M5)) == (561, 0, 0, 0)
    assert claude.ask(part(50), system=system(512, **M5)) == (50, 0, 512, 0)


def test_v04_five_minutes_and_every_read_refreshes(claude: Claude) -> None:
    seen = []
    for wait in (0, 299, 299, 301):
        claude.wait(wait)
        seen.append(claude.ask(part(50), system=system(1000, **M5)))
    assert seen == [(50, 0, 1000, 0), (50, 1000, 0, 0), (50, 1000, 0, 0), (50, 0, 1000, 0)]


def test_v05_an_hour(claude: Claude) -> None:
    seen = []
    for wait in (0, 3599, 3601):
        claude.wait(wait)
        seen.append(claude.ask(part(50), system=system(1000, **H1)))
    assert seen == [(50, 0, 0, 1000), (50, 1000, 0, 0), (50, 0, 0, 1000)]


def test_v06_an_hour_must_not_come_after_five_minutes(claude: Claude) -> None:
    with pytest.raises(anthropic.BadRequestError, match="must not come after a ttl='5m'") as error:
        claude.ask(part(50, **H1), system=system(1000, **M5))
    assert all(word in str(error.value) for word in ("tools", "system", "messages"))


def test_v07_five_marks(claude: Claude) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"A maximum of 4 blocks with cache_control may be provided. Found 5\."):
        claude.ask(*[part(9, **M5)] * 5)


def test_v08_automatic_caching_follows_a_growing_chat(claude: Claude) -> None:
    chat = [user(part(50))]
    seen = []
    for answer in (20, 30, 0):
        seen.append(claude.counts(claude.send(messages=chat, system=system(1000), **M5).usage))
        chat = [*chat, says(answer), user(part(50))]
    assert seen == [(0, 0, 1050, 0), (0, 1050, 70, 0), (0, 1120, 80, 0)]


def test_v09_automatic_beside_explicit_marks(claude: Claude) -> None:
    with pytest.raises(anthropic.BadRequestError):
        claude.ask(*[part(9, **M5)] * 4, part(9), **M5)
    with pytest.raises(anthropic.BadRequestError):
        claude.ask(part(50, **M5), system=system(1000), **H1)
    assert claude.ask(part(50, **M5), system=system(1000), **M5) == (0, 0, 1050, 0)


@pytest.mark.parametrize(("count", "expected"), [(19, (0, 1000, 190, 0)), (20, (0, 0, 1200, 0))])
def test_v10_the_look_back_window(claude: Claude, count: int, expected: Tuple4) -> None:
    claude.ask(part(50), system=system(1000, **M5))
    assert claude.ask(*[part(10)] * (count - 1), part(10, **M5), system=system(1000)) == expected


def test_v11_an_earlier_mark_looks_back_as_well(claude: Claude) -> None:
    claude.ask(part(50), system=system(1000, **M5))
    assert claude.ask(*[part(10)] * 24, part(10, **M5), system=system(1000, **M5)) == (0, 1000, 250, 0)


def test_v12_a_mark_on_a_block_that_varies(claude: Claude) -> None:
    for word in ("one", "two"):
        assert claude.ask(part(50, word, **M5), system=system(1000)) == (0, 0, 1050, 0)


@pytest.mark.parametrize("change", ["description", "order"])
def test_v13_a_changed_tool_loses_everything(claude: Claude, change: str) -> None:
    one, two = claude.tool(150, name="lookone"), claude.tool(150, name="looktwo")
    assert claude.ask(part(50), tools=[one, two], system=system(1000, **M5)) == (50, 0, 1300, 0)
    other = {**one, "description": one["description"].replace("word", "term", 1)}
    tools = [other, two] if change == "description" else [two, one]
    assert claude.ask(part(50), tools=tools, system=system(1000, **M5)) == (50, 0, 1300, 0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"tool_choice": {"type": "none"}}, (0, 1300, 600, 0)),
        ({}, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, (0, 1300, 600, 0)),
        ({}, {"thinking": {"type": "adaptive"}}, (0, 1300, 600, 0)),
        ({"output_config": {"effort": "high"}}, {"output_config": {"effort": "max"}}, (0, 1300, 600, 0)),
        ({}, {"output_config": {"effort": "high"}}, (0, 1900, 0, 0)),
    ],
    ids=["tool_choice", "parallel", "thinking", "effort", "default effort"],
)
def test_v14_parameters_of_the_messages(
    claude: Claude, before: dict[str, Any], after: dict[str, Any], expected: Tuple4
) -> None:
    prompt: dict[str, Any] = {"tools": [claude.tool(300)], "system": system(1000, **M5)}
    assert claude.ask(part(600, **M5), **prompt, **before) == (0, 0, 1900, 0)
    plain, *cached = claude.ask(part(600, **M5), **prompt, **after)
    assert cached == list(expected[1:])
    assert plain == 0 or not claude.site.emulates  # to a real model the choice is said behind the last block


def test_v15_speed_leaves_the_tools(claude: Claude) -> None:
    prompt: dict[str, Any] = {"tools": [claude.tool(600, **M5)], "system": system(1000, **M5)}
    assert claude.ask(part(50), **prompt) == (50, 0, 1600, 0)
    assert claude.ask(part(50), **prompt, extra_body={"speed": "fast"}) == (50, 600, 1000, 0)


def test_v17_what_never_matters(claude: Claude) -> None:
    model = "claude-haiku-5-5"  # newer Opus and Fable models take no sampling parameters at all
    claude.ask(part(50), system=system(1000, **M5), model=model)
    old = {"anthropic-version": "2023-06-01"}
    for change in (
        {"extra_body": {"temperature": 0.5}, "extra_headers": old},
        {"extra_body": {"top_p": 0.5}, "extra_headers": old},
        {"extra_body": {"top_k": 5}, "extra_headers": old},
        {"max_tokens": 9},
        {"stop_sequences": ["stop"]},
        {"metadata": {"user_id": "me"}},
    ):
        assert claude.ask(part(50), system=system(1000, **M5), model=model, **change) == (50, 1000, 0, 0), change


def test_r16_a_server_tools_result_is_a_five_minute_breakpoint_even_between_one_hour_marks(
    emulator: Site, claude: Claude
) -> None:
    tools: Any = [{"type": "web_search_20260318", "name": "web_search"}]
    search: Any = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": words(20)}}
    found: Any = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"text": words(600)}]}
    cited: Any = {"type": "text", "text": words(9), "citations": [{"type": "web_search_result_location", "url": "u"}]}
    turns: Any = [user(part(50)), {"role": "assistant", "content": [search, found, cited]}, user(part(30))]
    usage = claude.send(system=system(1000, **H1), messages=turns, tools=tools).usage
    assert usage.cache_creation is not None
    assert usage.cache_creation.ephemeral_1h_input_tokens > 1000
    assert usage.cache_creation.ephemeral_5m_input_tokens > 600
    again = claude.send(system=system(1000, **H1), messages=[*turns[:2], user(part(31))], tools=tools).usage
    assert again.cache_read_input_tokens == usage.cache_creation_input_tokens
    assert again.cache_creation_input_tokens == 0
    plain = claude.send(system=system(1000), messages=turns, tools=tools).usage  # no mark, so none for the result either
    assert (plain.cache_read_input_tokens, plain.cache_creation_input_tokens) == (0, 0)


def test_search_results_documents_with_citations_and_hidden_thinking_are_accounted_for(emulator: Site, claude: Claude) -> None:
    result: Any = {"type": "search_result", "source": "s", "title": "t", "content": [part(700)], "citations": {"enabled": True}}
    document: Any = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": words(300)},
        "citations": {"enabled": True},
        **M5,
    }
    turns: Any = [
        user(result, document),
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, part(9)]},
    ]
    first = claude.send(messages=[*turns, user(part(5))]).usage
    assert first.cache_creation_input_tokens is not None
    assert first.cache_creation_input_tokens > 1000
    assert claude.send(messages=[*turns, user(part(6))]).usage.cache_read_input_tokens == first.cache_creation_input_tokens
    counted = claude.sdk.messages.count_tokens(model="claude-opus-5", messages=[*turns, user(part(5))])
    assert counted.input_tokens == first.input_tokens + first.cache_creation_input_tokens


@pytest.mark.parametrize("model", ["claude-opus-5", "claude-opus-4-7", "claude-fable-5-1"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k"])
def test_models_that_take_no_sampling_parameters_refuse_them_in_every_version(
    emulator: Site, claude: Claude, model: str, field: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=f"{field}: this parameter is not supported by {model}"):
        claude.send(
            model=model,
            messages=[user(part(5))],
            extra_body={field: 1},
            extra_headers={"anthropic-version": "2023-06-01"},
        )


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (part(9, cache_control={"type": "persistent"}), "does not match any of the expected tags: 'ephemeral'"),
        (part(9, cache_control={"type": "ephemeral", "ttl": "2h"}), "ttl"),
        (part(0, **M5), "cache_control cannot be set for empty text blocks"),
    ],
    ids=["type", "ttl", "empty"],
)
def test_v18_marks_that_are_none(claude: Claude, block: dict[str, Any], text: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=text):
        claude.ask(part(9), block)


def test_v18_thinking_has_no_mark(claude: Claude) -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s", **M5}
    chat = [user(part(9)), {"role": "assistant", "content": [thinking, part(9)]}, user(part(9))]
    with pytest.raises(anthropic.BadRequestError, match=r"thinking\.cache_control: Extra inputs are not permitted"):
        claude.send(messages=chat)


def test_v19_prewarming(claude: Claude) -> None:
    message = claude.send(messages=[user(part(8))], system=system(5120, **M5), max_tokens=0)
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)
    assert claude.counts(message.usage) == (8, 0, 5120, 0)
    assert claude.ask(part(30), system=system(5120, **M5)) == (30, 5120, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        {"stream": True},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {
            "tools": [{"name": "look", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"},
        },
    ],
    ids=["stream", "thinking", "format", "tool_choice"],
)
def test_v19_what_prewarming_does_not_go_with(claude: Claude, body: dict[str, Any]) -> None:
    with pytest.raises(anthropic.BadRequestError):
        claude.ask(part(8), system=system(5120, **M5), max_tokens=0, **body)


def test_v20_a_mark_that_moves_forward(claude: Claude) -> None:
    assert claude.ask(part(600, **M5), system=system(1000, **M5)) == (0, 0, 1600, 0)
    chat = [user(part(600)), says(20), user(part(30, **M5))]
    assert claude.counts(claude.send(messages=chat, system=system(1000)).usage) == (0, 1600, 50, 0)


def test_v21_streams_say_the_same(claude: Claude) -> None:
    for expected in ((50, 0, 1000, 0), (50, 1000, 0, 0)):
        body = claude.body(max_tokens=9, messages=[user(part(50))], system=system(1000, **M5), extra_body={"ignore_eos": True})
        stream = claude.sdk.messages.create(stream=True, **body)
        events: list[Any] = list(stream)
        assert events[0].type == "message_start"
        assert claude.counts(events[0].message.usage) == expected
        [delta] = [event for event in events if event.type == "message_delta"]
        assert delta.usage.output_tokens == 9


def test_v22_diagnostics(claude: Claude) -> None:
    def ask(previous: str | None, *content: dict[str, Any], rules: int = 1000, **body: Any) -> Any:
        message = claude.send(
            messages=[user(*(content or (part(50),)))],
            system=system(rules, **M5),
            extra_body={"diagnostics": {"previous_message_id": previous}},
            **body,
        )
        return message.id, message.to_dict().get("diagnostics", "absent")

    def reason(*args: Any, **body: Any) -> tuple[str, int]:
        diagnostics = ask(first, *args, **body)[1]["cache_miss_reason"]
        return diagnostics["type"], diagnostics.get("cache_missed_input_tokens", 0)

    first, diagnostics = ask(None)
    assert diagnostics is None
    assert ask(first)[1] is None
    kind, missed = reason(rules=1001)
    assert kind == "system_changed"
    assert missed > 0
    assert reason(rules=1001, tools=[claude.tool(50)])[0] == "tools_changed"
    assert reason(model="claude-opus-5-5")[0] == "model_changed"
    assert reason(part(49))[0] == "messages_changed"
    assert ask("msg_none")[1]["cache_miss_reason"]["type"] == "previous_message_not_found"


def test_v22_a_changed_choice_of_tools_is_not_told(claude: Claude) -> None:
    tools = [claude.tool(50)]

    def ask(previous: str | None, **body: Any) -> Any:
        diagnostics = {"diagnostics": {"previous_message_id": previous}}
        return claude.send(messages=[user(part(50))], tools=tools, extra_body=diagnostics, **body)

    first = ask(None)
    changed = ask(first.id, tool_choice={"type": "none"}).to_dict()
    assert changed["diagnostics"]["cache_miss_reason"]["type"] == "unavailable"


# -- OpenAI, classic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "cached"), [(1023, 0), (2006, 1920)])
def test_v23_v24_classic_reads_whole_steps(classic: GPT, tokens: int, cached: int) -> None:
    assert classic.chat(user(part(tokens))) == (tokens, 0, 0)
    assert classic.chat(user(part(tokens))) == (tokens, cached, 0)


@pytest.mark.parametrize(("common", "cached"), [(1200, 1152), (1000, 0)])
def test_v25_v26_classic_compares_tokens(classic: GPT, common: int, cached: int) -> None:
    for word, seen in (("one", 0), ("two", cached)):
        text = words(common) + " " + words(1500 - common, word)
        assert classic.chat({"role": "user", "content": text}) == (1500, seen, 0)


def function(name: str, length: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": words(length), "parameters": {"type": "object"}}}


def test_v27_nothing_before_the_change_is_lost_and_all_behind_it_is(classic: GPT) -> None:
    tools = [function("one", 1100), function("two", 1100)]
    total, cached, _ = classic.chat(user(part(900)), tools=tools)
    assert cached == 0
    assert classic.chat(user(part(900)), tools=tools) == (total, total // 128 * 128, 0)
    assert classic.chat(user(part(900)), tools=tools[::-1])[1] == 0
    if classic.site.emulates:  # the real model takes no other format
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        assert classic.chat(user(part(900)), tools=tools, response_format=schema)[1] == 0
    assert classic.chat(user(part(900)), tools=tools, reasoning_effort="low")[1] == 0
    assert classic.chat(user(part(900, "other")), tools=tools)[1] == (total - 900) // 128 * 128


def test_v27_detail_of_an_image(emulator: Site, classic: GPT) -> None:
    def ask(**detail: str) -> int:
        image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", **detail}}
        return classic.chat(user(part(1280), image))[1]

    assert ask() == 0
    assert ask() == (1280 + 1600) // 128 * 128
    assert ask(detail="low") == 1280


def test_v28_what_never_matters(classic: GPT) -> None:
    classic.chat(user(part(2006)))
    for change in ({"temperature": 0.3}, {"seed": 4}, {"n": 2}, {"max_completion_tokens": 7}):
        assert classic.chat(user(part(2006)), **change)[1] == 1920, change


# -- OpenAI, breakpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_v29_the_guides_example(sol: GPT, api: str) -> None:
    ask = sol.chat if api == "chat" else sol.responses
    k = 1000 if sol.site.emulates else 300  # the real model's context is shorter
    first = [{"role": "developer", "content": words(2 * k)}, {"role": "user", "content": words(10 * k)}]
    assert ask(*first) == (12 * k, 0, 12 * k)
    assert ask(*first, {"role": "user", "content": words(3 * k)}) == (15 * k, 12 * k, 3 * k)


def test_v30_a_message_made_longer_is_a_miss(sol: GPT) -> None:
    assert sol.chat({"role": "user", "content": words(2000)}) == (2000, 0, 2000)
    assert sol.chat({"role": "user", "content": words(3000)}) == (3000, 0, 3000)


def test_v31_explicit_without_marks(sol: GPT) -> None:
    for _ in range(2):
        assert sol.chat(user(part(2000)), prompt_cache_options={"mode": "explicit"}) == (2000, 0, 0)


def test_v32_explicit_with_a_mark(sol: GPT) -> None:
    developer = {"role": "developer", "content": [part(2000, **MARK)]}
    options = {"mode": "explicit"}
    assert sol.chat(developer, user(part(500, "one")), prompt_cache_options=options) == (2500, 0, 2000)
    assert sol.chat(developer, user(part(700, "two")), prompt_cache_options=options) == (2700, 2000, 0)


def test_v33_thirty_minutes_since_the_last_use(sol: GPT) -> None:
    seen = []
    for wait in (0, 1799, 1799, 1801):
        sol.wait(wait)
        seen.append(sol.chat(user(part(2000)))[1])
    assert seen == [0, 2000, 2000, 0]


def test_v34_the_minimum(sol: GPT) -> None:
    for _ in range(2):
        assert sol.chat(user(part(1023))) == (1023, 0, 0)


def test_v35_only_the_latest_four_marks_are_written(sol: GPT) -> None:
    options = {"mode": "explicit"}
    n = 2000 if sol.site.emulates else 1100
    marked = [user(part(n, word, **MARK)) for word in ("red", "green", "blue", "white", "black", "gold")]
    assert sol.chat(*marked, prompt_cache_options=options) == (6 * n, 0, 6 * n)
    assert sol.chat(*marked[:2], prompt_cache_options=options) == (2 * n, 0, 2 * n)
    assert sol.chat(*marked[:3], prompt_cache_options=options) == (3 * n, 3 * n, 0)


# -- who shares what, and the clock ------------------------------------------------------------------------------------


def test_keys_and_models_share_nothing(site: Site) -> None:
    one, two = Claude(site), Claude(site)
    with one.sdk, two.sdk:
        for claude, model in ((one, "claude-opus-5"), (two, "claude-opus-5"), (one, "claude-opus-5-5")):
            assert claude.ask(part(50), system=system(1000, **M5), model=model) == (50, 0, 1000, 0)
        assert one.ask(part(50), system=system(1000, **M5)) == (50, 1000, 0, 0)


def test_forgetting_breaks_the_promises(emulator: Site, claude: Claude) -> None:
    claude.ask(part(50), system=system(1000, **M5))
    head = {"x-api-key": str(claude.sdk.api_key)}
    assert httpx2.post(f"{emulator.url}/anaphora/forget", json={}, headers=head).json()["promises"] == 1
    assert claude.ask(part(50), system=system(1000, **M5)) == (50, 0, 1000, 0)


def test_marks_are_refused_by_models_that_have_none(classic: GPT) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        classic.chat(user(part(2000)), prompt_cache_options={"mode": "explicit"})
    assert error.value.param == "prompt_cache_options"


def test_count_tokens_is_what_is_billed(claude: Claude) -> None:
    prompt: dict[str, Any] = {"tools": [claude.tool(300)], "system": system(100), "messages": [user(part(50))]}
    assert claude.count(**prompt) == 450
    assert claude.counts(claude.send(**prompt).usage) == (450, 0, 0, 0)


def test_the_clock_does_not_go_back(emulator: Site) -> None:
    before = httpx2.post(f"{emulator.url}/anaphora/clock", json={"advance_s": 0}).json()["now_s"]
    assert httpx2.post(f"{emulator.url}/anaphora/clock", json={"advance_s": 2.5}).json()["now_s"] == before + 2.5
    refused = httpx2.post(f"{emulator.url}/anaphora/clock", json={"advance_s": -1})
    assert refused.status_code == 400
    assert "advance_s" in refused.json()["error"]["message"]


def test_the_real_clock_cannot_be_moved(serve: Serve) -> None:
    with serve() as (url, _):
        refused = httpx2.post(f"{url}/anaphora/clock", json={"advance_s": 1})
    assert refused.status_code == 403
    assert "--virtual-clock" in refused.json()["error"]["message"]


def test_clients_that_ask_at_once_each_have_their_own_account(claude: Claude) -> None:
    seen: list[Tuple4] = []
    asking = [threading.Thread(target=lambda: seen.append(claude.ask(part(50), system=system(1000, **M5)))) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert set(seen) <= {(50, 0, 1000, 0), (50, 1000, 0, 0)}
    assert (50, 0, 1000, 0) in seen
    assert claude.ask(part(50), system=system(1000, **M5)) == (50, 1000, 0, 0)
