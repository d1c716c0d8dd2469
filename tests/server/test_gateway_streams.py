"""Streams through a gateway that break off, or whose clients do; and who shares an answer with whom."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.server.gateways import CLAUDE, GPT, Gateway, gateway, the_one, upstream
from tests.server.speakers import Chat, Failed, Messages, Responses, Said, Speaker, Wishes, heard, user

from anaphora.testing.upstream import Control, Upstream
from anaphora.types import Message, TextPart

SLOW_CLAUDE, SLOW_GPT = "claude-haiku-4-5", "gpt-5.4-mini"
"""Models that take a while for each word."""

_numbers = itertools.count()


@pytest.fixture(scope="module")
def provider() -> Iterator[Upstream]:
    """Of either dialect."""
    with Upstream("provider") as one:
        yield one


@pytest.fixture(scope="module")
def slow() -> Iterator[Upstream]:
    with Upstream("slow", decode_tokens_per_s=20) as one:
        yield one


@pytest.fixture(scope="module")
def served(provider: Upstream, slow: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    toml = (
        "[gateway]\nbreaker_failures = 1000\n" + upstream("claude", provider, "claude-*") + upstream("gpt", provider, "gpt-*")
    )
    toml += upstream("slow-claude", slow, SLOW_CLAUDE) + upstream("slow-gpt", slow, SLOW_GPT)
    with gateway(toml, tmp_path_factory.mktemp("gateway")) as served:
        yield served


@pytest.fixture(autouse=True)
def _nothing_seen(provider: Upstream, slow: Upstream) -> None:
    provider.clear()
    slow.clear()


@pytest.fixture(scope="module")
def messages(served: Gateway) -> Iterator[Messages]:
    with served.claude() as client:
        yield Messages(client)


@pytest.fixture(scope="module")
def chat(served: Gateway) -> Iterator[Chat]:
    with served.gpt() as client:
        yield Chat(client)


@pytest.fixture(scope="module")
def responses(served: Gateway) -> Iterator[Responses]:
    with served.gpt() as client:
        yield Responses(client)


WAYS = [
    (Messages, CLAUDE),
    (Messages, GPT),
    (Chat, GPT),
    (Chat, CLAUDE),
    (Responses, GPT),
    (Responses, CLAUDE),
]


@pytest.fixture(params=WAYS, ids=[f"{kind.__name__} of {model}" for kind, model in WAYS])
def way(request: pytest.FixtureRequest, messages: Messages, chat: Chat, responses: Responses) -> tuple[Speaker, str]:
    kind, model = request.param
    speakers: list[Speaker] = [messages, chat, responses]
    return next(speaker for speaker in speakers if isinstance(speaker, kind)), model


def question(text: str = "a question that was never asked before") -> tuple[Message, ...]:
    return user(f"{text} {next(_numbers)}")


def words(talk: tuple[Message, ...]) -> str:
    [part] = talk[0].content
    assert isinstance(part, TextPart)
    return part.text


def streamed(speaker: Speaker, model: str, talk: tuple[Message, ...]) -> tuple[list[str], str]:
    """What came, and which error ended it."""
    pieces: list[str] = []
    try:
        with closing(speaker.stream(model, talk)) as stream:
            for piece in stream:
                assert isinstance(piece, str), "the stream ended as if all were well"
                pieces.append(piece)
    except (anthropic.APIError, openai.APIError) as error:
        return pieces, f"{error.message} {error.body}"
    except Failed as failure:
        return pieces, str(failure)
    return pieces, ""


# -- streams that break off ----------------------------------------------------------------------------------------------

BREAKS = {
    "cut": "cut|broke|closed|payload",
    "reset": "cut|broke|closed|payload|reset",
    "malformed-json": "malformed",
    "malformed-sse": "malformed|cut",
    "error": "overloaded|told to answer",
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_stream_that_breaks_ends_with_an_error_and_is_not_remembered(
    way: tuple[Speaker, str], provider: Control, kind: str
) -> None:
    speaker, model = way
    talk = question()
    provider.fault(kind, after_events=4 if model == CLAUDE or not isinstance(speaker, Responses) else 7)
    pieces, error = streamed(speaker, model, talk)
    assert any(word in error.lower() for word in BREAKS[kind].split("|")), error
    assert words(talk).startswith("".join(pieces))
    if kind != "reset":  # which throws away what was under way
        assert pieces
    assert heard(speaker.stream(model, talk))[1].text == words(talk)
    assert [record.outcome for record in provider.requests()] == ["fault", "finished"]
    assert speaker.ask(model, talk).text == words(talk)
    assert len(provider.requests()) == 2  # the whole one was remembered


@pytest.mark.parametrize("kind", ["cut", "reset", "malformed-json"])
def test_a_whole_answer_that_breaks_is_an_error_and_is_not_remembered(
    way: tuple[Speaker, str], provider: Control, kind: str
) -> None:
    speaker, model = way
    talk = question()
    provider.fault(kind)
    failures = (anthropic.InternalServerError, openai.InternalServerError)
    with pytest.raises(failures, match=r"Error code: 50[02].*(broke the connection|malformed)"):
        speaker.ask(model, talk)
    assert speaker.ask(model, talk).text == words(talk)
    assert [record.outcome for record in provider.requests()] == ["fault", "finished"]


# -- clients that leave ----------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_ends_it_at_the_provider(way: tuple[Speaker, str], slow: Control) -> None:
    speaker, model = way
    model = SLOW_CLAUDE if model == CLAUDE else SLOW_GPT
    with closing(speaker.stream(model, question("many " * 100))) as stream:
        assert next(stream) == "many "
    assert the_one(slow).outcome == "left"


def test_a_client_that_does_not_wait_for_a_whole_answer_ends_it(served: Gateway, provider: Control) -> None:
    provider.fault("slow", count=2)  # until the client leaves
    with served.claude(timeout=0.3) as claude, pytest.raises(anthropic.APITimeoutError):
        Messages(claude).ask(GPT, question())
    with served.gpt(timeout=0.3) as gpt, pytest.raises(openai.APITimeoutError):
        Chat(gpt).ask(GPT, question())
    assert [record.outcome for record in provider.requests()] == ["left", "left"]


def test_asynchronous_clients_stream_and_leave(served: Gateway, slow: Control) -> None:
    async def main() -> None:
        claude = anthropic.AsyncAnthropic(base_url=served.url, api_key="any", max_retries=0)
        gpt = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        asked: Any = [{"role": "user", "content": "leave " * 100}]
        async with claude, gpt:
            async with claude.messages.stream(model=SLOW_GPT, max_tokens=500, messages=asked) as stream:
                assert await anext(aiter(stream.text_stream)) == "leave "
            async with await gpt.chat.completions.create(model=SLOW_CLAUDE, messages=asked, stream=True) as chunks:
                async for chunk in chunks:
                    if chunk.choices and chunk.choices[0].delta.content:
                        break

    asyncio.run(main())
    assert [record.outcome for record in slow.requests()] == ["left", "left"]


def test_who_leaves_a_shared_answer_takes_it_from_nobody(messages: Messages, responses: Responses, slow: Control) -> None:
    for speaker, model in ((messages, SLOW_CLAUDE), (responses, SLOW_GPT)):
        slow.clear()
        talk = question("shared by two and by nobody else but those two who asked")
        with closing(speaker.stream(model, talk)) as stays:
            assert next(stays) == "shared "
            with closing(speaker.stream(model, talk)) as leaves:
                assert next(leaves) == "shared "
            assert heard(stays)[1].text == words(talk)
        assert the_one(slow).outcome == "finished"


# -- who shares an answer ----------------------------------------------------------------------------------------------------


def test_the_same_question_at_the_same_time_reaches_the_provider_once(way: tuple[Speaker, str], slow: Control) -> None:
    speaker, model = way
    model = SLOW_CLAUDE if model == CLAUDE else SLOW_GPT
    talk = question("all at once and with not one of them too late")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: heard(speaker.stream(model, talk))[1], range(8)))
    assert [answer.text for answer in answers] == [words(talk)] * 8
    assert the_one(slow).outcome == "finished"


def test_usage_is_told_to_whoever_asked_for_it_of_those_who_share(served: Gateway, slow: Control) -> None:
    text = words(question("shared usage of two who asked for it in their own ways"))
    asked: Any = [{"role": "user", "content": text}]
    with served.gpt() as gpt, ExitStack() as stack:
        create: Callable[..., Any] = gpt.chat.completions.create
        without = stack.enter_context(create(model=SLOW_GPT, messages=asked, stream=True))
        told = stack.enter_context(create(model=SLOW_GPT, messages=asked, stream=True, stream_options={"include_usage": True}))
        usages = [[chunk.usage for chunk in stream if not chunk.choices] for stream in (without, told)]
    assert usages[0] == []
    assert [usage.completion_tokens for usage in usages[1]] == [len(text.split())]


def test_a_repeated_question_never_leaves_the_machine_whatever_the_dialect(
    messages: Messages, chat: Chat, responses: Responses, provider: Control
) -> None:
    speakers: list[Speaker] = [messages, chat, responses]
    for model in (CLAUDE, GPT):
        for first in speakers:
            provider.clear()
            talk = question()
            answers = [first.ask(model, talk)]
            for speaker in speakers:
                answers += [speaker.ask(model, talk), heard(speaker.stream(model, talk))[1]]
            assert {(said.text, said.reason, said.prompt, said.output) for said in answers} == {_outline(answers[0])}
            assert the_one(provider).outcome == "finished"


def _outline(said: Said) -> tuple[object, ...]:
    return said.text, said.reason, said.prompt, said.output


def test_the_directives_of_a_client_are_kept_to(way: tuple[Speaker, str], provider: Control) -> None:
    speaker, model = way
    talk = question()

    def num_asked(directive: str) -> int:
        speaker.ask(model, talk, Wishes(headers={"cache-control": directive}))
        return len(provider.requests())

    assert [num_asked(directive) for directive in ("no-store", "max-age=9", "max-age=9")] == [1, 2, 2]
    assert [num_asked(directive) for directive in ("no-cache", "only-if-cached")] == [3, 3]


def test_a_refusal_is_not_remembered(way: tuple[Speaker, str], provider: Control) -> None:
    speaker, model = way
    talk = question()
    provider.answer("No.", reason="refusal", count=2)
    for _ in range(2):
        said = speaker.ask(model, talk)
        assert said.text == "No."
        assert said.reason == "refusal" or isinstance(speaker, Responses)
    assert len(provider.requests()) == 2


def test_what_the_provider_keeps_for_the_client_is_not_recalled(served: Gateway, provider: Control) -> None:
    with served.gpt() as gpt:
        for model in (GPT, GPT, CLAUDE, CLAUDE):  # the other provider is asked in a dialect without such a thing
            gpt.responses.create(model=model, input="kept over there")
    assert [record.model for record in provider.requests()] == [GPT, GPT, CLAUDE]


def test_several_workers_answer_and_share_what_they_know(provider: Upstream, tmp_path: Path) -> None:
    toml = upstream("claude", provider, "claude-*") + upstream("gpt", provider, "gpt-*")
    with gateway(toml, tmp_path, "--workers", "2") as served:
        talk = question()
        with served.claude() as claude:
            assert Messages(claude).ask(GPT, talk).text == words(talk)
        provider.clear()

        def ask(number: int) -> str:
            with served.gpt() as gpt:  # a connection of its own, to either worker
                speaker = Chat(gpt)
                own = question(f"worker {number}")
                assert heard(speaker.stream(CLAUDE, own))[1].text == words(own)
                return speaker.ask(GPT, talk).text

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(24))) == {words(talk)}
        assert {record.model for record in provider.requests()} == {CLAUDE}
        assert len(provider.requests()) == 24
