"""One goes ahead, the others wait for its first token: never longer than told, never for one that failed."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

import pytest
from tests.optimiser.traffic import Json, Site, body, user

from anaphora.optimiser import Cold, FanOut, cold
from anaphora.optimiser.fanout import saved
from anaphora.profiles import find

P = ParamSpec("P")
TOOL: Json = {"name": "look", "input_schema": {"type": "object"}}
SHARED = Cold(writes=((b"head", 5000),), reads=((b"head", 5000),), readable=0, least=512)


def in_a_loop(test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def settled() -> None:
    """Everybody has gone as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


@in_a_loop
async def test_many_at_once_become_one_write_and_reads() -> None:
    fan_out, ahead, sent = FanOut(), asyncio.Event(), list[int]()

    async def one(number: int) -> None:
        turn = fan_out.turn("alice", SHARED)
        await turn.wait()
        sent.append(number)
        await ahead.wait()
        turn.begun()
        turn.over()

    tasks = [asyncio.create_task(one(number)) for number in range(8)]
    await settled()
    assert sent == [0]
    ahead.set()
    await asyncio.gather(*tasks)
    assert sorted(sent) == list(range(8))
    assert len(fan_out) == 0


@in_a_loop
async def test_when_the_first_one_fails_the_next_goes_ahead() -> None:
    fan_out = FanOut()
    turns = [fan_out.turn("alice", SHARED) for _ in range(3)]
    await turns[0].wait()
    waiting = [asyncio.create_task(turn.wait()) for turn in turns[1:]]
    await settled()
    turns[0].over()
    await settled()
    assert [task.done() for task in waiting] == [True, False]
    turns[1].begun()
    assert await waiting[1]


@in_a_loop
async def test_nobody_waits_longer_than_told() -> None:
    fan_out = FanOut()
    await fan_out.turn("alice", SHARED).wait()
    late = fan_out.turn("alice", SHARED)
    assert not await late.wait(longest_s=0.0)
    assert late.waited
    late.over()


@in_a_loop
async def test_a_waiter_that_is_cancelled_leaves_nothing_behind() -> None:
    fan_out = FanOut()
    first, second = fan_out.turn("alice", SHARED), fan_out.turn("alice", SHARED)
    await first.wait()
    task = asyncio.create_task(second.wait())
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    second.over()
    first.over()
    assert len(fan_out) == 0


@in_a_loop
async def test_strangers_and_other_prefixes_do_not_wait() -> None:
    fan_out = FanOut()
    await fan_out.turn("alice", SHARED).wait()
    for scope, need in (
        ("bob", SHARED),
        ("alice", Cold(((b"other", 5000),), ((b"other", 5000),), 0, 512)),
        ("alice", Cold((), ((b"head", 5000),), 4900, 512)),
    ):
        turn = fan_out.turn(scope, need)
        assert await turn.wait()
        assert not turn.waited


@pytest.mark.parametrize("model", ["claude-opus-5", "gpt-5.6-sol", "gpt-4.1"])
@in_a_loop
async def test_two_cold_prompts_of_one_application_share_their_head(model: str) -> None:
    site = Site(model, tokens=1100)
    system = {"role": "system", "content": "Rules."}
    fan_out, turns = FanOut(), []
    for word in ("a", "b"):
        request = body(user(word), tools=[TOOL]) if site.anthropic else {"model": model, "messages": [system, user(word)]}
        prompt, lengths = site.read(request)
        known = site.history.know(prompt, site.profile, site.now_s)
        found, _ = Site(model, tokens=1100).ask(request)
        turns.append(fan_out.turn("alice", cold(prompt, lengths, site.profile, known, found)))
    await turns[0].wait()
    assert not await turns[1].wait(longest_s=0.0)


def test_a_prefix_that_can_be_read_is_waited_for_by_nobody() -> None:
    site = Site()
    request = body(user("a"), tools=[TOOL])
    site.ask(request)
    prompt, lengths = site.read(request)
    need = cold(prompt, lengths, site.profile, site.history.know(prompt, site.profile, site.now_s + 60))
    assert need.writes == ()


def test_what_a_warm_up_saves_grows_with_those_who_read() -> None:
    opus = find("claude-opus-5", "anthropic")
    assert saved(1, 10_000, opus) == 0
    assert saved(11, 10_000, opus) == pytest.approx(10 * 1.15 * 10_000)
