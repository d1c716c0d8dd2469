"""Both official SDKs ask a gateway in front of two providers: one suite for every way from a dialect to another.

What the provider was asked is read again and compared with what the client said: nothing may be lost or made up on the way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest
from tests.server.gateways import CLAUDE, GPT, Gateway, arrived, gateway, the_one, upstream
from tests.server.provided import COMPLETION, MESSAGE, RESPONSE
from tests.server.speakers import Chat, Messages, Responses, Speaker, Wishes, heard, user

from anaphora.testing.upstream import ToolCall, Upstream
from anaphora.types import MediaPart, Message, TextPart, Tool, ToolChoice, ToolResultPart, ToolUsePart

CHAT_ONLY = "chat-model"
WAYS = {
    "anthropic to anthropic": (Messages, CLAUDE),
    "anthropic to openai": (Messages, GPT),
    "chat to openai": (Chat, GPT),
    "chat to anthropic": (Chat, CLAUDE),
    "responses to openai": (Responses, GPT),
    "responses to anthropic": (Responses, CLAUDE),
    "responses to a server with chat alone": (Responses, CHAT_ONLY),
}
LOOK = Tool("look", "Looks something up.", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})
COUNT = Tool("count", "Counts.", {"type": "object", "properties": {}})
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKJUVPRgo="


_numbers = itertools.count()


def fresh(text: str) -> str:
    """A question that was not asked before, in any dialect."""
    return f"{text} {next(_numbers)}"


class Way(msgspec.Struct):
    speaker: Speaker
    model: str
    upstream: Upstream
    """That the model is at, and that has seen nothing yet."""

    @property
    def passed(self) -> bool:
        """The provider gets the client's own body, and the client the provider's own answer."""
        return (
            self.upstream.requests()[-1].path
            == {
                "anthropic": "/v1/messages",
                "openai_chat": "/v1/chat/completions",
                "openai_responses": "/v1/responses",
            }[self.speaker.dialect]
        )


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[Upstream, Upstream]]:
    with Upstream("anthropic") as one, Upstream("openai") as other:
        yield one, other


@pytest.fixture(scope="module")
def served(upstreams: tuple[Upstream, Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    one, other = upstreams
    toml = upstream("anthropic", one, "claude-*") + upstream("openai", other, "gpt-*")
    toml += upstream("chat", other, CHAT_ONLY, apis=["chat"], rename={CHAT_ONLY: GPT})
    with gateway(toml, tmp_path_factory.mktemp("gateway")) as served:
        yield served


def ways(fits: Callable[[type[Any], str], bool]) -> pytest.MarkDecorator:
    """Only those for which a test makes sense."""
    params = [pytest.param(way, id=name) for name, way in WAYS.items() if fits(*way)]
    return pytest.mark.parametrize("way", params, indirect=True)


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def way(request: pytest.FixtureRequest, served: Gateway, upstreams: tuple[Upstream, Upstream]) -> Iterator[Way]:
    kind, model = request.param
    at = upstreams[0] if model == CLAUDE else upstreams[1]
    at.clear()
    with served.claude() if kind is Messages else served.gpt() as client:
        yield Way(kind(client), model, at)


# -- plain questions ---------------------------------------------------------------------------------------------------


def test_a_whole_answer_comes_with_its_usage(way: Way) -> None:
    question = fresh("a whole answer")
    said = way.speaker.ask(way.model, user(question))
    assert (said.text, said.reason) == (question, "end")
    num_words = len(question.split())
    assert (said.prompt, said.output, said.read, said.written) == (num_words, num_words, 0, 0)
    record = the_one(way.upstream)
    assert arrived(record).messages == user(question)
    assert record.outcome == "finished"


def test_a_streamed_answer_comes_in_pieces_and_ends_with_its_usage(way: Way) -> None:
    question = fresh("a streamed answer")
    pieces, said = heard(way.speaker.stream(way.model, user(question)))
    num_words = len(question.split())
    assert pieces == re.findall(r"\S+\s*", question)
    assert (said.text, said.reason) == (question, "end")
    assert said.output == num_words <= said.prompt
    assert the_one(way.upstream).body["stream"] is True


def test_the_first_piece_is_there_while_the_provider_still_writes(way: Way) -> None:
    at_event = {"/v1/messages": 3, "/v1/chat/completions": 2, "/v1/responses": 5}
    path = "/v1/messages" if way.model == CLAUDE else "/v1/responses" if isinstance(way.speaker, Responses) else ""
    path = "/v1/chat/completions" if way.model == CHAT_ONLY or not path else path
    way.upstream.fault("stall", after_events=at_event[path])  # until the client leaves
    with closing(way.speaker.stream(way.model, user(fresh("first piece")))) as pieces:
        assert next(pieces) == "first "
        assert way.upstream.seen(settled_within_s=0).outcomes["running"] == 1
    assert the_one(way.upstream).outcome == "left"


def test_system_prompts_and_earlier_turns_arrive(way: Way) -> None:
    talk = (
        Message("system", (TextPart(fresh("Answer like a pirate.")),)),
        *user("What is the time?"),
        Message("assistant", (TextPart("Rum o'clock."),)),
        *user("And in Greenwich?"),
    )
    assert way.speaker.ask(way.model, talk).text == "And in Greenwich?"
    assert arrived(the_one(way.upstream)).messages == talk


def test_an_answer_stops_at_the_limit_and_says_so(way: Way) -> None:
    pieces, said = heard(way.speaker.stream(way.model, user(fresh("one two three four")), Wishes(max_tokens=2)))
    assert (pieces, said.reason, said.output) == (["one ", "two "], "limit", 2)
    assert arrived(the_one(way.upstream)).max_tokens == 2


@ways(lambda kind, _: kind is not Responses)  # which has none
def test_stop_sequences_arrive_and_cut_the_answer(way: Way) -> None:
    said = way.speaker.ask(way.model, user(fresh("up to here and no further")), Wishes(stop=("and",)))
    assert (said.text.strip(), said.reason) == ("up to here", "end")
    assert arrived(the_one(way.upstream)).sampling.stop == ("and",)


def test_a_temperature_arrives(way: Way) -> None:
    way.speaker.ask(way.model, user(fresh("how warm is it")), Wishes(temperature=0.25))
    assert arrived(the_one(way.upstream)).sampling.temperature == 0.25


def test_a_json_schema_for_the_answer_arrives(way: Way) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
    way.upstream.answer('{"a": "b"}')
    assert json.loads(way.speaker.ask(way.model, user(fresh("as JSON")), Wishes(schema=schema)).text) == {"a": "b"}
    assert f'"schema":{msgspec.json.encode(schema).decode()}' in msgspec.json.encode(the_one(way.upstream).body).decode()


# -- tools -------------------------------------------------------------------------------------------------------------


def test_tools_arrive_and_one_that_is_demanded_is_called(way: Way) -> None:
    question = fresh("look this up")
    said = way.speaker.ask(way.model, user(question), Wishes(tools=(COUNT, LOOK), choice=ToolChoice("tool", "look")))
    assert (said.calls, said.reason) == ([("look", {"text": question})], "calls")
    asked = arrived(the_one(way.upstream))
    assert [(tool.name, tool.description, tool.parameters) for tool in asked.tools] == [
        (tool.name, tool.description, tool.parameters) for tool in (COUNT, LOOK)
    ]
    assert (asked.tool_choice.mode, asked.tool_choice.name) == ("tool", "look")


@pytest.mark.parametrize("streamed", [False, True])
def test_several_tools_are_called_at_once_behind_a_text(way: Way, streamed: bool) -> None:
    way.upstream.answer("Let me see.", tools=(ToolCall("look", {"text": "é \u2028"}), ToolCall("count"), ToolCall("look")))
    wishes = Wishes(tools=(LOOK, COUNT))
    question = user(fresh("several"))
    said = (
        heard(way.speaker.stream(way.model, question, wishes))[1] if streamed else way.speaker.ask(way.model, question, wishes)
    )
    assert said.text == "Let me see."
    assert said.calls == [("look", {"text": "é \u2028"}), ("count", {}), ("look", {})]
    assert said.reason == "calls"


def test_results_of_tools_arrive_in_their_place(way: Way) -> None:
    talk = (
        *user(fresh("What is on the table, and how much of it?")),
        Message(
            "assistant",
            (TextPart("I look."), ToolUsePart("call_1", "look", '{"text":"table"}'), ToolUsePart("call_2", "count", "{}")),
        ),
        Message("user", (ToolResultPart("call_1", (TextPart("apples"),)), ToolResultPart("call_2", (TextPart("4"),)))),
    )
    way.upstream.answer("Four apples.")
    assert way.speaker.ask(way.model, talk, Wishes(tools=(LOOK, COUNT))).text == "Four apples."
    assert arrived(the_one(way.upstream)).messages == talk


@ways(lambda kind, _: kind is Messages)  # the only dialect that says so
def test_that_a_tool_failed_arrives(way: Way) -> None:
    talk = (
        *user(fresh("Look at the table.")),
        Message("assistant", (ToolUsePart("call_1", "look", "{}"),)),
        Message("user", (ToolResultPart("call_1", (TextPart("no table"),), is_error=True),)),
    )
    way.upstream.answer("There is none.")
    way.speaker.ask(way.model, talk, Wishes(tools=(LOOK,)))
    asked = arrived(the_one(way.upstream)).messages
    if way.passed:
        assert asked == talk
    else:
        [result] = asked[-1].content
        assert isinstance(result, ToolResultPart)
        assert result.content == (TextPart("The tool call failed:"), TextPart("no table"))


# -- media -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [MediaPart("image", "image/png", {"base64": PIXEL}), MediaPart("image", "", {"url": "https://example.com/a.png"})],
    ids=["bytes", "address"],
)
def test_images_arrive(way: Way, image: MediaPart) -> None:
    question = fresh("What is this?")
    talk = (Message("user", (TextPart(question), image)),)
    way.upstream.answer("A pixel.")
    assert way.speaker.ask(way.model, talk).text == "A pixel."
    [message] = arrived(the_one(way.upstream)).messages
    text, media = message.content
    assert text == TextPart(question)
    assert isinstance(media, MediaPart)
    assert (media.kind, media.media_type, media.source) == (image.kind, image.media_type, image.source)


def test_documents_arrive(way: Way) -> None:
    document = MediaPart("document", "application/pdf", {"base64": PDF})
    way.upstream.answer("A page.")
    assert way.speaker.ask(way.model, (Message("user", (document, TextPart(fresh("And this?")))),)).text == "A page."
    media, _ = arrived(the_one(way.upstream)).messages[0].content
    assert isinstance(media, MediaPart)
    assert (media.kind, media.media_type, media.source) == (document.kind, document.media_type, document.source)


def test_a_big_body_arrives_whole(way: Way) -> None:
    image = MediaPart("image", "image/png", {"base64": "QUJD" * 1_000_000})
    way.upstream.answer("Big.")
    assert way.speaker.ask(way.model, (Message("user", (image, TextPart(fresh("How big?")))),)).text == "Big."
    media, _ = arrived(the_one(way.upstream)).messages[0].content
    assert isinstance(media, MediaPart)
    assert media.source == image.source


def test_text_of_every_kind_comes_back_as_it_was(way: Way) -> None:
    text = fresh("") + "Grüße 你好 🏴‍☠️ \u2028 \x85 \\ \" ' <&> \r\n\t\x01 end"
    way.upstream.answer(text, count=2)
    assert way.speaker.ask(way.model, user(fresh("whole"))).text == text
    assert heard(way.speaker.stream(way.model, user(fresh("streamed"))))[1].text == text
    assert way.speaker.ask(way.model, user(text)).text == text
    assert arrived(way.upstream.requests()[-1]).messages == user(text)


# -- prompt caching ----------------------------------------------------------------------------------------------------


def test_what_was_read_from_a_cache_and_written_is_told_in_the_clients_words(way: Way) -> None:
    body = MESSAGE if way.model == CLAUDE else COMPLETION
    if isinstance(way.speaker, Responses) and way.model == GPT:
        body = RESPONSE
    way.upstream.answer(body=body)
    question = user(fresh("usage"))
    said = way.speaker.ask(way.model, question)
    assert (said.text, said.prompt, said.read, said.output) == ("hi", 60, 30, 3)
    assert said.written == 20
    again = way.speaker.ask(way.model, question)
    assert (again.text, again.prompt, again.output) == ("hi", 60, 3)
    assert len(way.upstream.requests()) == 1


@ways(lambda kind, model: kind is not Messages and model != CLAUDE)  # which caches what is marked
def test_a_prompt_that_the_provider_has_cached_is_told_as_read(way: Way) -> None:
    talk = user(fresh("a long story, told again and again, and then again, ") * 200)
    way.upstream.answer("Yes.")
    way.speaker.ask(way.model, talk)
    said = way.speaker.ask(way.model, (*talk, Message("assistant", (TextPart("Yes."),)), *user("And then?")))
    assert said.read >= 1024


# -- how it is all asked -----------------------------------------------------------------------------------------------


def test_a_model_has_another_name_at_the_provider(served: Gateway, upstreams: tuple[Upstream, Upstream]) -> None:
    upstreams[1].clear()
    with served.gpt() as client, served.claude() as claude:
        client.chat.completions.create(model=CHAT_ONLY, messages=[{"role": "user", "content": "renamed"}])
        answer = claude.messages.create(model=CHAT_ONLY, max_tokens=9, messages=[{"role": "user", "content": "renamed too"}])
    assert answer.model == CHAT_ONLY
    assert [record.model for record in upstreams[1].requests()] == [GPT, GPT]


def test_both_sdks_list_the_models_that_are_named(served: Gateway) -> None:
    with served.gpt() as gpt, served.claude() as claude:
        assert [model.id for model in gpt.models.list()] == [model.id for model in claude.models.list()] == [CHAT_ONLY]
        assert gpt.models.retrieve(GPT).id == GPT  # of a pattern
        assert claude.models.retrieve(CLAUDE).id == CLAUDE


def test_tokens_are_counted_by_the_provider(served: Gateway, upstreams: tuple[Upstream, Upstream]) -> None:
    upstreams[0].clear()
    with served.claude() as claude:
        counted = claude.messages.count_tokens(model=CLAUDE, messages=[{"role": "user", "content": "one two three"}])
    assert counted.input_tokens == 3
    assert the_one(upstreams[0]).path == "/v1/messages/count_tokens"


def test_many_ask_at_once_and_each_gets_its_own_answer(served: Gateway, upstreams: tuple[Upstream, Upstream]) -> None:
    async def main() -> None:
        import anthropic
        import openai

        claude = anthropic.AsyncAnthropic(base_url=served.url, api_key="any", max_retries=0)
        gpt = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)

        async def message(model: str, text: str) -> str:
            async with claude.messages.stream(
                model=model, max_tokens=99, messages=[{"role": "user", "content": text}]
            ) as stream:
                return await stream.get_final_text()

        async def chat(model: str, text: str) -> str:
            stream = await gpt.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        async def response(model: str, text: str) -> str:
            return (await gpt.responses.create(model=model, input=text)).output_text

        async with claude, gpt:
            asked: list[Any] = []
            for number in range(10):
                for ask in (message, chat, response):
                    asked += [(ask, model, f"{ask.__name__} {model} number {number}") for model in (CLAUDE, GPT)]
            answers = await asyncio.gather(*(ask(model, text) for ask, model, text in asked))
            assert answers == [text for _, _, text in asked]

    asyncio.run(main())
