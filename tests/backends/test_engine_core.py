"""The engine in one process, over a tiny model with random weights: milliseconds a step, and every answer depends on all of
its prompt, so that a wrong key or value anywhere shows up as another token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from anaphora.errors import BackendFailed, ContextTooLong, InvalidRequest, QueueFull
from anaphora.kv.cache import KVCache
from anaphora.kv.ends import PromptEnd, PromptEnds, end_key
from anaphora.types import (
    LOCAL_TENANT,
    BlockHash,
    Finish,
    Message,
    Request,
    Sampling,
    Scope,
    Tenant,
    TextDelta,
    TextPart,
    Tool,
    ToolChoice,
    ToolUsePart,
)

if TYPE_CHECKING:
    from anaphora.testing.engines import Asked, Driver

MakeDriver = Callable[..., "Driver"]

PROMPTS = (Path(__file__).parent.parent / "data" / "prompts.txt").read_text().splitlines()
GREEDY = Sampling(temperature=0.0)
BLOCK = 16
BYTES_PER_TOKEN = 512
"""Of the tiny model in float32."""


def chat(text: str, *, max_tokens: int | None = 10, sampling: Sampling = GREEDY, **fields: Any) -> Request:
    return Request("m", messages=(Message("user", (TextPart(text),)),), max_tokens=max_tokens, sampling=sampling, **fields)


def raw(tokens: Sequence[int], *, max_tokens: int | None = 10, sampling: Sampling = GREEDY, **fields: Any) -> Request:
    return Request("m", prompts=(tuple(tokens),), max_tokens=max_tokens, sampling=sampling, **fields)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 300), k=count)


def text_of(asked: Asked, choice: int = 0) -> str:
    return "".join(part.text for part in asked.completion.choices[choice].content if isinstance(part, TextPart))


def reused(asked: Asked) -> int:
    return asked.completion.usage.kv_reused_tokens


def assert_idle(driver: Driver) -> None:
    """Nothing is running or waiting, and nothing is held for anybody."""
    scheduler = driver.core._scheduler
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler._arena.num_free == scheduler._arena.capacity
    assert driver.core._cache.stats().num_leases == 0
    assert driver.core._cache.stats().num_pending == 0
    driver.core._cache.check()


@pytest.fixture(scope="module")
def plain(make_driver: MakeDriver) -> Driver:
    """Never reuses anything: the reference."""
    return make_driver(prefix_caching=False)


@pytest.fixture
def driver(make_driver: MakeDriver) -> Iterator[Driver]:
    driver = make_driver()
    yield driver
    assert_idle(driver)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cold(plain: Driver) -> list[list[list[int]]]:
    """Each prompt's greedy tokens, computed alone and in one piece."""
    return [plain.ask(chat(prompt)).tokens for prompt in PROMPTS]


def test_there_are_at_least_a_hundred_prompts_and_their_answers_differ(cold: list[list[list[int]]]) -> None:
    assert len(PROMPTS) >= 100
    assert len({str(tokens) for tokens in cold}) > 0.95 * len(PROMPTS)


def test_answers_are_the_same_cold_and_warm(driver: Driver, cold: list[list[list[int]]]) -> None:
    assert [driver.ask(chat(prompt)).tokens for prompt in PROMPTS] == cold
    driver.core._scheduler._ends.forget(Scope())  # so that blocks are reused, and the rest is computed
    warm = [driver.ask(chat(prompt)) for prompt in PROMPTS]
    assert [asked.tokens for asked in warm] == cold
    assert all((asked.usage.prompt_tokens - 1) // BLOCK * BLOCK <= reused(asked) < asked.usage.prompt_tokens for asked in warm)


def test_a_prompt_known_to_its_last_token_is_answered_without_prefill(driver: Driver, cold: list[list[list[int]]]) -> None:
    some = PROMPTS[::3]
    assert [driver.ask(chat(prompt)).tokens for prompt in some] == cold[::3]
    before = prefill_tokens(driver)
    again = [driver.ask(chat(prompt)) for prompt in some] + driver.ask_together(map(chat, some))
    assert [asked.tokens for asked in again] == cold[::3] * 2
    assert all(reused(asked) == asked.usage.prompt_tokens for asked in again)
    assert prefill_tokens(driver) == before


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK])
def test_a_known_prompt_may_end_anywhere_in_a_block(driver: Driver, length: int) -> None:
    prompt = some_tokens(length)
    first, second, warmed = driver.ask(raw(prompt)), driver.ask(raw(prompt)), driver.ask(raw(prompt, max_tokens=0))
    assert second.tokens == first.tokens
    assert (reused(first), reused(second), reused(warmed)) == (0, length, length)


def test_a_known_prompt_whose_blocks_were_evicted_is_computed(make_driver: MakeDriver, cold: list[list[list[int]]]) -> None:
    driver = make_driver(kv_memory=800 * BYTES_PER_TOKEN)
    driver.core._scheduler._ends = PromptEnds(1 << 30)
    for _ in range(2):
        assert [driver.ask(chat(prompt)).tokens for prompt in PROMPTS[:40]] == cold[:40]
    assert_idle(driver)


def test_how_prompts_end_is_kept_within_a_capacity() -> None:
    ends = PromptEnds(2500)
    for number in range(4):
        ends.put(end_key(b"", [number]), PromptEnd(Tenant("a"), torch.zeros(100), torch.zeros(100)))
    assert [end_key(b"", [number]) in ends for number in range(4)] == [False, True, True, True]
    assert ends.get(end_key(b"", [1])) is not None
    ends.put(end_key(b"", [4]), PromptEnd(Tenant("b"), torch.zeros(100), torch.zeros(100)))
    assert [end_key(b"", [number]) in ends for number in range(5)] == [False, True, False, True, True]
    ends.put(end_key(b"", [5]), PromptEnd(Tenant("b"), torch.zeros(1000), torch.zeros(100)))
    assert (len(ends), ends.num_bytes) == (3, 2400)
    assert ends.forget(Scope(tenant=Tenant("a"))) == 2
    assert ends.forget(Scope(tag="t")) == 0
    assert (len(ends), ends.num_bytes) == (1, 800)


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_answers_are_the_same_after_eviction(make_driver: MakeDriver, cold: list[list[list[int]]], policy: str) -> None:
    driver = make_driver(kv_memory=800 * BYTES_PER_TOKEN, policy=policy)
    first = [driver.ask(chat(prompt)).tokens for prompt in PROMPTS]
    again = [driver.ask(chat(prompt)) for prompt in PROMPTS]
    assert first == cold
    assert [asked.tokens for asked in again] == cold
    assert int(driver.core.stats()["kv_blocks_evicted"]) > 5 * int(driver.core.stats()["kv_blocks"])
    assert sum(map(reused, again)) < sum(asked.usage.prompt_tokens for asked in again) / 2
    assert_idle(driver)


def test_answers_are_the_same_in_a_batch(driver: Driver, cold: list[list[list[int]]]) -> None:
    assert [asked.tokens for asked in driver.ask_together(map(chat, PROMPTS))] == cold
    assert [asked.tokens for asked in driver.ask_together(map(chat, PROMPTS))] == cold


@pytest.mark.parametrize(("prefill", "mixed", "block"), [(1, 1, 16), (7, 3, 4), (33, 16, 1), (64, 31, 32), (13, 128, 5)])
def test_answers_are_the_same_whatever_the_chunks(
    make_driver: MakeDriver, cold: list[list[list[int]]], prefill: int, mixed: int, block: int
) -> None:
    driver = make_driver(prefill_chunk=prefill, mixed_chunk=mixed, block_size=block, max_num_seqs=5)
    some = slice(prefill % 3, None, 3)
    for _ in range(2):  # cold, then warm
        assert [asked.tokens for asked in driver.ask_together(map(chat, PROMPTS[some]))] == cold[some]
    assert_idle(driver)


def test_answers_are_the_same_when_sequences_are_preempted(make_driver: MakeDriver, plain: Driver) -> None:
    driver = make_driver(kv_memory=1500 * BYTES_PER_TOKEN, max_num_seqs=8)  # an arena of 750 tokens
    requests = [raw(some_tokens(40 + i, seed=i), max_tokens=400) for i in range(4)]
    expected = [plain.ask(request).tokens for request in requests]
    together = driver.ask_together(requests)
    assert driver.core._scheduler.counters.num_preemptions > 0
    assert [asked.tokens for asked in together] == expected
    assert_idle(driver)


# -- what is reused ----------------------------------------------------------------------------------------------------


def test_the_next_turn_finds_prompt_and_answer(driver: Driver) -> None:
    prompt = some_tokens(50)
    first = driver.ask(raw(prompt, max_tokens=40))
    history = prompt + first.tokens[0]
    second = driver.ask(raw([*history, *some_tokens(20, seed=1)]))
    assert reused(first) == 0
    # The last token was sampled, but never run: it has no KV.
    assert reused(second) == (len(history) - 1) // BLOCK * BLOCK
    assert second.usage.cache_read_input_tokens == reused(second)
    assert second.usage.prompt_tokens == len(history) + 20


def test_blocks_alone_leave_at_least_one_token_to_compute(driver: Driver) -> None:
    prompt = some_tokens(4 * BLOCK)
    driver.ask(raw(prompt))
    driver.core._scheduler._ends.forget(Scope())
    assert reused(driver.ask(raw(prompt))) == 4 * BLOCK - 1


def test_prompts_that_part_within_a_block_share_it_up_to_there(driver: Driver, plain: Driver) -> None:
    prompt = some_tokens(5 * BLOCK)
    driver.ask(raw(prompt))
    for shared in (4 * BLOCK + 1, 2 * BLOCK + 7, BLOCK + BLOCK - 1):
        other = [*prompt[:shared], (prompt[shared] + 1) % 300, *some_tokens(40, seed=shared)]
        asked = driver.ask(raw(other))
        assert reused(asked) == shared
        assert asked.tokens == plain.ask(raw(other)).tokens
    assert driver.ask(raw(prompt)).tokens == plain.ask(raw(prompt)).tokens  # its own blocks are as they were


def loads(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were copied out of the pool, each time."""
    pool = driver.core._scheduler._pool
    counts: list[int] = []
    load = pool.load

    def counted(block_ids: Any, start: int) -> None:
        counts.append(len(block_ids))
        load(block_ids, start)

    monkeypatch.setattr(pool, "load", counted)
    return counts


def test_what_lies_in_the_arena_still_is_not_copied_again(
    driver: Driver, plain: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = loads(driver, monkeypatch)
    prompt = some_tokens(6 * BLOCK)
    driver.ask(raw(prompt))
    other = [*prompt[: 4 * BLOCK], *some_tokens(40, seed=1)]
    for asked in (raw(prompt), raw(other), raw([*other, *some_tokens(30, seed=2)]), raw(other)):
        assert driver.ask(asked).tokens == plain.ask(asked).tokens
    assert counts == [0, 0, 0, 0, 0]
    assert driver.ask(raw(prompt)).tokens == plain.ask(raw(prompt)).tokens
    assert counts[-1] == 1  # the other prompt lies over its last two blocks, of which one is always computed


def test_what_was_computed_over_is_copied(driver: Driver, plain: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = loads(driver, monkeypatch)
    prompt, stranger = some_tokens(6 * BLOCK), some_tokens(9 * BLOCK, seed=1)
    for asked in (raw(prompt), raw(stranger), raw(prompt), raw(stranger)):
        assert driver.ask(asked).tokens == plain.ask(asked).tokens
    assert all(count > 0 for count in counts[2:])


def test_requests_at_once_do_not_share_a_place(driver: Driver, plain: Driver) -> None:
    prompt = some_tokens(6 * BLOCK)
    driver.ask(raw(prompt))
    several = [raw([*prompt, *some_tokens(9, seed=number)]) for number in range(4)]
    assert [asked.tokens for asked in driver.ask_together(several)] == [plain.ask(asked).tokens for asked in several]


def test_nothing_of_a_forgotten_tenant_is_taken_from_the_arena(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = some_tokens(6 * BLOCK)
    driver.ask(raw(prompt))
    assert len(driver.core._scheduler._remains) == 1
    driver.core.forget(Scope(tenant=LOCAL_TENANT))
    assert len(driver.core._scheduler._remains) == 0
    assert reused(driver.ask(raw(prompt))) == 0


def test_prompts_that_part_within_their_first_block_share_nothing(driver: Driver) -> None:
    prompt = some_tokens(5 * BLOCK)
    driver.ask(raw(prompt))
    assert reused(driver.ask(raw([*prompt[: BLOCK - 1], *some_tokens(40, seed=1)]))) == 0


def test_a_part_of_a_block_is_shared_with_no_other_tenant_and_not_after_a_forget(driver: Driver) -> None:
    prompt = some_tokens(5 * BLOCK)
    other = [*prompt[: 2 * BLOCK + 7], *some_tokens(40, seed=1)]
    driver.ask(raw(prompt))
    assert reused(driver.ask(raw(other, tenant=Tenant("other")))) == 0
    driver.core.forget(Scope(tenant=LOCAL_TENANT))
    assert reused(driver.ask(raw(other))) == 0
    assert reused(driver.ask(raw(other, tenant=Tenant("other")))) > 0


def prefill_tokens(driver: Driver) -> int:
    return driver.core._scheduler.counters.request_prefill_kv_computed_tokens


def test_ten_requests_at_once_prefill_their_new_prefix_once(driver: Driver, plain: Driver) -> None:
    prefix = some_tokens(4000)
    requests = [raw([*prefix, *some_tokens(8, seed=i)], max_tokens=4) for i in range(10)]
    together = driver.ask_together(requests)
    assert prefill_tokens(driver) == 4000 + 10 * 8
    assert sum(map(reused, together)) == 9 * 4000
    assert [asked.tokens for asked in together[:3]] == [plain.ask(request).tokens for request in requests[:3]]


def test_who_waits_for_a_prefix_looks_it_up_anew_only_when_it_is_there(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    awaited = KVCache.awaited

    def counted(cache: KVCache, *args: Any, **named: Any) -> BlockHash | None:
        nonlocal looks
        looks += 1
        return awaited(cache, *args, **named)

    monkeypatch.setattr(KVCache, "awaited", counted)
    prefix = some_tokens(4000)
    for number in range(10):
        driver.submit(raw([*prefix, *some_tokens(8, seed=number)], max_tokens=1))
    assert driver.drain() > 8  # steps
    assert looks <= 3 * 10  # and not once in every step


def test_when_the_leader_is_cancelled_another_goes_on_where_it_was(driver: Driver) -> None:
    prefix = some_tokens(4000)
    together = [driver.submit(raw([*prefix, *some_tokens(8, seed=i)], max_tokens=4)) for i in range(10)]
    for _ in range(4):
        driver.core.step()
    assert driver.core._scheduler.num_running == 1
    driver.cancel(together[0])
    driver.drain()
    assert all(asked.done for asked in together[1:])
    assert not together[0].done
    assert prefill_tokens(driver) <= 4000 + 9 * 8 + BLOCK


def test_a_pre_warm_computes_the_prompt_and_says_nothing(driver: Driver) -> None:
    prompt = some_tokens(100)
    warmed = driver.ask(raw(prompt, max_tokens=0))
    assert warmed.completion.choices[0].content == ()
    assert warmed.completion.choices[0].reason == "max_tokens"
    assert warmed.completion.usage.output_tokens == 0
    assert reused(driver.ask(raw(prompt))) == 96


@pytest.mark.parametrize(
    "other", [{"tenant": Tenant("other")}, {"cache_salt": "salt"}, {"tenant": Tenant("other"), "cache_salt": "salt"}]
)
def test_tenants_and_salts_share_nothing(driver: Driver, other: dict[str, Any]) -> None:
    prompt = some_tokens(100)
    first = driver.ask(raw(prompt))
    strange = driver.ask(raw(prompt, **other))
    assert reused(strange) == 0
    assert strange.tokens == first.tokens
    assert reused(driver.ask(raw(prompt))) == reused(driver.ask(raw(prompt, **other))) == 100


def test_what_was_forgotten_is_not_reused(driver: Driver) -> None:
    prompt = some_tokens(100)
    driver.ask(raw(prompt))
    driver.ask(raw(prompt, tenant=Tenant("other")))
    assert driver.core.forget(Scope(tenant=Tenant("other"))) == 6
    assert reused(driver.ask(raw(prompt, tenant=Tenant("other")))) == 0
    assert reused(driver.ask(raw(prompt))) == 100
    assert driver.core.forget(Scope()) > 0
    assert reused(driver.ask(raw(prompt))) == 0


def test_requests_under_way_when_their_tenant_is_forgotten_are_answered_and_leave_nothing(
    make_driver: MakeDriver, plain: Driver
) -> None:
    driver = make_driver(max_num_seqs=1)
    requests = [raw(some_tokens(700, seed=1)), raw(some_tokens(100, seed=2))]
    running, waiting = map(driver.submit, requests)
    driver.core.step()
    assert (driver.core._scheduler.num_running, driver.core._scheduler.num_waiting) == (1, 1)
    driver.core.forget(Scope(tenant=requests[0].tenant))
    driver.drain()
    assert [running.tokens, waiting.tokens] == [plain.ask(request).tokens for request in requests]
    assert driver.core._cache.count(Scope()) == 0
    assert_idle(driver)


def test_forgetting_drops_the_memory_of_encoded_texts(driver: Driver) -> None:
    driver.ask(chat("long enough to be remembered " * 30))
    assert driver.core._template._memo.cache_info().currsize > 0
    driver.core.forget(Scope())
    assert driver.core._template._memo.cache_info().currsize == 0


def test_a_request_that_has_no_room_yet_does_not_count_as_a_use(make_driver: MakeDriver) -> None:
    driver = make_driver(kv_memory=1200 * BYTES_PER_TOKEN)  # an arena of 600 tokens
    prompt = some_tokens(100)
    driver.ask(raw(prompt))
    before = driver.core._cache.stats().query_tokens
    big = driver.submit(raw(some_tokens(350, seed=1), max_tokens=100))
    driver.core.step()
    small = driver.submit(raw(prompt, max_tokens=100))
    for _ in range(10):
        driver.core.step()
    assert driver.core._scheduler.num_waiting == 1
    driver.drain()
    assert driver.core._cache.stats().query_tokens - before == 350 + 100
    assert (big.done, small.done) == (True, True)


# -- taking turns ------------------------------------------------------------------------------------------------------


def test_a_long_prefill_keeps_others_waiting_for_one_chunk_at_most(make_driver: MakeDriver) -> None:
    driver = make_driver(mixed_chunk=64)
    decoding = [driver.submit(raw(some_tokens(20, seed=i), max_tokens=200)) for i in range(3)]
    while not all(asked.tokens[0] for asked in decoding):
        driver.core.step()
    long = driver.submit(raw(some_tokens(3000, seed=9), max_tokens=2))
    assert long.job is not None
    sequence = long.job.generations[0]
    steps = 0
    while not long.tokens[0]:
        lengths = [len(asked.tokens[0]) for asked in decoding]
        computed = sequence.num_computed
        driver.core.step()
        steps += 1
        assert [len(asked.tokens[0]) for asked in decoding] == [length + 1 for length in lengths]
        assert sequence.num_computed - computed <= 64
    assert steps == math.ceil(3000 / 64)
    driver.drain()


def test_a_warm_request_does_not_wait_behind_a_cold_one(driver: Driver) -> None:
    warm = some_tokens(800, seed=1)
    driver.ask(raw(warm))
    cold = driver.submit(raw(some_tokens(6000, seed=2), max_tokens=1))
    driver.core.step()
    quick = driver.submit(raw(warm, max_tokens=1))
    driver.core.step()
    assert quick.done
    assert not cold.done
    driver.drain()


@pytest.mark.parametrize("steps", [0, 1, 3, 30])
def test_a_cancelled_request_frees_its_place_at_once(make_driver: MakeDriver, steps: int) -> None:
    """After 0 steps it waits, after 1 and 3 it prefills, after 30 it is decoding."""
    driver = make_driver(prefill_chunk=64)
    request = raw(some_tokens(1000), max_tokens=500, sampling=Sampling(temperature=0.0, n=2))
    asked = driver.submit(request)
    for _ in range(steps):
        driver.core.step()
    driver.cancel(asked)
    said = len(asked.deltas)
    assert_idle(driver)
    assert not driver.core.step()
    assert len(asked.deltas) == said
    driver.cancel(asked)  # twice does no harm


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(
    driver: Driver, plain: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of memory")

    together = [driver.submit(raw(some_tokens(600, seed=i))) for i in range(3)]
    driver.core.step()
    with monkeypatch.context() as patch:
        patch.setattr(driver.core.model, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            driver.core.step()
    driver.core.fail_all(BackendFailed("lost"))
    assert [type(asked.error) for asked in together] == [BackendFailed] * 3
    assert_idle(driver)
    request = raw(some_tokens(600, seed=1))
    assert driver.ask(request).tokens == plain.ask(request).tokens


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_too_full_a_queue_says_when_to_come_back(make_driver: MakeDriver) -> None:
    driver = make_driver(max_queue=2, max_num_seqs=1)
    waiting = [driver.submit(chat("one")), driver.submit(chat("two"))]
    with pytest.raises(QueueFull) as caught:
        driver.submit(chat("three"))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    driver.drain()
    assert all(asked.done for asked in waiting)
    driver.ask(chat("three"))


def test_requests_on_their_way_to_the_engine_count_as_waiting(make_driver: MakeDriver) -> None:
    core = make_driver(max_queue=2).core
    for i in range(2):
        core.prepare(i, chat("hello"), lambda deltas: None, lambda error: None)
    with pytest.raises(QueueFull):
        core.prepare(2, chat("hello"), lambda deltas: None, lambda error: None)


def test_too_long_a_prompt_is_refused_and_a_long_answer_is_cut(make_driver: MakeDriver) -> None:
    driver = make_driver(kv_memory=600 * BYTES_PER_TOKEN)
    context = driver.core.context
    with pytest.raises(ContextTooLong):
        driver.submit(raw(some_tokens(context)))
    asked = driver.ask(raw(some_tokens(context - 1), max_tokens=None))
    assert asked.completion.usage.output_tokens == 1
    asked = driver.ask(raw(some_tokens(context - 50), max_tokens=1000))
    assert asked.completion.usage.output_tokens == 50
    assert asked.completion.choices[0].reason == "max_tokens"
    assert_idle(driver)


@pytest.mark.parametrize("field", ["response_format", "logit_bias"])
def test_what_the_engine_cannot_honour_is_refused(driver: Driver, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        driver.submit(chat("hello", extra={field: {"type": "json_object"}}))
    assert caught.value.param == field


def test_an_unknown_token_id_is_refused(driver: Driver) -> None:
    with pytest.raises(InvalidRequest):
        driver.submit(raw([5, 100_000]))


# -- how answers end and what they hold ----------------------------------------------------------------------------------


def test_an_answer_ends_with_the_models_own_end(make_driver: MakeDriver, tiny_llama: Path) -> None:
    driver = make_driver(tiny_llama)
    (end,) = driver.core.model.eos_ids
    ended = driver.ask_together(chat(prompt, max_tokens=300) for prompt in PROMPTS[:40])
    reasons = {asked.completion.choices[0].reason for asked in ended}
    assert "end_turn" in reasons
    for asked in ended:
        assert (asked.tokens[0][-1] == end) == (asked.completion.choices[0].reason == "end_turn")
        assert end not in asked.tokens[0][:-1]


def test_a_stop_string_may_lie_across_tokens(driver: Driver) -> None:
    whole = text_of(driver.ask(chat("tell me", max_tokens=60)))
    pieces = [delta.text for delta in driver.ask(chat("tell me", max_tokens=60)).deltas if isinstance(delta, TextDelta)]
    seam = len("".join(pieces[: len(pieces) // 2]))
    stop = whole[seam - 2 : seam + 2]
    asked = driver.ask(chat("tell me", max_tokens=60, sampling=Sampling(temperature=0.0, stop=("not there", stop))))
    assert text_of(asked) == whole[: whole.index(stop)]
    assert asked.completion.choices[0].reason == "stop_sequence"
    assert asked.completion.choices[0].stop_sequence == stop


def test_n_choices_share_their_prompt_and_differ_by_their_seeds(driver: Driver) -> None:
    prompt = some_tokens(200)
    asked = driver.ask(raw(prompt, sampling=Sampling(temperature=1.0, seed=5, n=4)))
    assert len({str(tokens) for tokens in asked.tokens}) == 4
    assert asked.completion.usage.prompt_tokens == 200
    assert asked.completion.usage.output_tokens == 40
    assert prefill_tokens(driver) == 200
    assert [delta.choice for delta in asked.deltas if isinstance(delta, Finish)] == [0, 1, 2, 3]
    greedy = driver.ask(raw(prompt, sampling=Sampling(temperature=0.0, n=2)))
    assert greedy.tokens[0] == greedy.tokens[1]


def test_several_prompts_are_several_choices(driver: Driver, plain: Driver) -> None:
    prompts = [some_tokens(30, seed=i) for i in range(3)]
    asked = driver.ask(Request("m", prompts=tuple(map(tuple, prompts)), max_tokens=5, sampling=GREEDY))
    assert asked.tokens == [plain.ask(raw(prompt, max_tokens=5)).tokens[0] for prompt in prompts]
    assert asked.completion.usage.prompt_tokens == 90


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(driver: Driver) -> None:
    request = chat("roll the dice", sampling=Sampling(temperature=1.0, top_p=0.95, seed=11))
    alone = driver.ask(request).tokens
    others = [chat(prompt, sampling=Sampling(temperature=1.0)) for prompt in PROMPTS[:10]]
    batch = driver.ask_together([*others[:5], request, *others[5:]])
    assert batch[5].tokens == alone
    other = driver.ask(chat("roll the dice", sampling=Sampling(temperature=1.0, top_p=0.95, seed=12)))
    assert other.tokens != alone


def test_logprobs_are_those_of_the_models_distribution(driver: Driver) -> None:
    asked = driver.ask(chat("count", sampling=Sampling(temperature=0.0, logprobs=20)))
    logprobs = asked.completion.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs) == 10
    for entry in logprobs:
        assert entry.logprob == entry.top[0].logprob == max(top.logprob for top in entry.top)
        assert len(entry.top) == 20
        assert 0 < sum(math.exp(top.logprob) for top in entry.top) <= 1 + 1e-5


def test_a_presence_penalty_keeps_tokens_from_coming_twice(driver: Driver) -> None:
    prompt = [7] * 40
    asked = driver.ask(raw(prompt, max_tokens=100, sampling=Sampling(temperature=0.0, presence_penalty=1000.0)))
    assert len(set(asked.tokens[0])) == 100


# -- tools -------------------------------------------------------------------------------------------------------------


def say(driver: Driver, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the model answers `text`, then token 10 for ever."""
    script = driver.core._tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(len(hidden), driver.core.model.vocab_size)
        for row in range(len(hidden)):
            made[row, script.pop(0) if script else 10] = 1.0
        return made

    monkeypatch.setattr(driver.core.model, "logits", logits)


CALL = '<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call>'
TOOLS = (Tool("look"), Tool("listen"))


def test_an_answer_with_one_call_only_ends_behind_it(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    say(driver, f"Well. {CALL}{CALL} and more", monkeypatch)
    asked = driver.ask(chat("hm", max_tokens=300, tools=TOOLS, tool_choice=ToolChoice(parallel=False)))
    (choice,) = asked.completion.choices
    assert choice.reason == "tool_use"
    assert [part.text for part in choice.content if isinstance(part, TextPart)] == ["Well."]
    assert [part.name for part in choice.content if isinstance(part, ToolUsePart)] == ["look"]
    spoken = f"Well. {CALL}"
    assert asked.completion.usage.output_tokens == len(driver.core._tokenizer(spoken)["input_ids"])


def test_parallel_calls_go_on_to_the_end(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    say(driver, f"{CALL}{CALL}", monkeypatch)
    asked = driver.ask(chat("hm", max_tokens=150, tools=TOOLS))
    calls = [part for part in asked.completion.choices[0].content if isinstance(part, ToolUsePart)]
    assert len(calls) == 2
    assert asked.completion.usage.output_tokens == 150


def test_of_a_list_of_bare_calls_only_the_first_is_made(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = '[{"name": "look", "arguments": {}}, {"name": "listen", "arguments": {}}]'
    say(driver, calls, monkeypatch)
    count = len(driver.core._tokenizer(calls)["input_ids"])
    request = chat("hm", max_tokens=count, tools=TOOLS, tool_choice=ToolChoice(parallel=False))
    asked = driver.ask(request)
    assert [part.name for part in asked.completion.choices[0].content if isinstance(part, ToolUsePart)] == ["look"]


# -- everything at once --------------------------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Requests with shared prefixes come, go and are forgotten, over an arena and a cache that are both too small."""

    make: ClassVar[MakeDriver]
    reference: ClassVar[Driver]
    expected: ClassVar[dict[tuple[int, ...], list[int]]]

    @initialize(chunk=st.sampled_from([16, 50, 512]), policy=st.sampled_from(["lru", "gdsf"]))
    def start(self, chunk: int, policy: str) -> None:
        options = {"prefill_chunk": chunk, "mixed_chunk": chunk // 2, "policy": policy, "max_num_seqs": 5}
        self.driver = self.make(kv_memory=1000 * BYTES_PER_TOKEN, **options)
        self.under_way: list[tuple[Request, Asked]] = []
        self.all: list[tuple[Request, Asked]] = []

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 190),  # with `own` and 290 tokens of answer the arena is just full
        own=st.integers(0, 20),
        max_tokens=st.sampled_from([0, 1, 5, 40, 290]),
        n=st.sampled_from([1, 1, 1, 2]),
        tenant=st.sampled_from(["a", "a", "b"]),
    )
    def submit(self, family: int, length: int, own: int, max_tokens: int, n: int, tenant: str) -> None:
        tokens = some_tokens(200, seed=family)[:length] + some_tokens(own, seed=length)
        sampling = Sampling(temperature=0.0, n=n)
        request = raw(tokens, max_tokens=max_tokens, sampling=sampling, tenant=Tenant(tenant))
        asked = self.driver.submit(request)
        self.under_way.append((request, asked))
        self.all.append((request, asked))

    @rule(count=st.sampled_from([1, 2, 10, 60]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.core.step()

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        _, asked = self.under_way.pop(which % len(self.under_way))
        self.driver.cancel(asked)

    @rule(tenant=st.sampled_from([None, Tenant("a"), Tenant("b")]))
    def forget(self, tenant: Tenant | None) -> None:
        self.driver.core.forget(Scope(tenant=tenant))

    @rule()
    def fail(self) -> None:
        self.driver.core.fail_all(BackendFailed("lost"))
        self.under_way = []

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "driver"):
            return
        core = self.driver.core
        core._cache.check()
        scheduler = core._scheduler
        held = sum(s.extent[1] - s.extent[0] for _, s in scheduler._running if s.extent is not None)
        assert held == scheduler._arena.capacity - scheduler._arena.num_free
        assert core._cache.stats().num_leases == scheduler.num_running

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.drain()
        assert_idle(self.driver)
        assert all(asked.done or asked.error for _, asked in self.under_way)
        for request, asked in self.all:
            (prompt,) = request.prompts
            assert not isinstance(prompt, str)
            if prompt not in self.expected:
                self.expected[prompt] = self.reference.ask(raw(prompt, max_tokens=290)).tokens[0]
            for tokens in asked.tokens:
                assert tokens == self.expected[prompt][: len(tokens)]
                assert not asked.done or len(tokens) == request.max_tokens


def test_whatever_happens_answers_are_right_and_nothing_is_lost(make_driver: MakeDriver, plain: Driver) -> None:
    class Machine(SchedulerMachine):
        make = staticmethod(make_driver)
        reference = plain
        expected: ClassVar[dict[tuple[int, ...], list[int]]] = {}

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)),
    )
