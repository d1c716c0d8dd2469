"""Where prompts may be cached, and what equal boundaries are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora import profiles
from anaphora.breakpoints import Breakpoint, Keys, Plan, chain, message_ends, plan, positions, steps, usage
from anaphora.profiles import Profile
from anaphora.prompt import CacheUsage, Lengths, Prompt
from anaphora.testing.prompts import prompt
from anaphora.wire import anthropic_prompt, openai_prompt

OPUS = profiles.find("claude-opus-5", "anthropic")
SOL = profiles.find("gpt-5.6-sol", "openai")


def planned(notation: str, profile: Profile = OPUS, **fields: Any) -> Plan:
    built = prompt(notation, dialect=profile.dialect, **fields)
    return plan(built.prompt, built.lengths, profile)


def written(notation: str, profile: Profile = OPUS, **fields: Any) -> list[int]:
    return [point.block for point in planned(notation, profile, **fields).writes]


def test_every_mark_is_a_breakpoint_and_nothing_else_is() -> None:
    found = planned("tool:600*1h, sys:100*1h, user:50, a:20*5m, user:9")
    assert found.writes == (Breakpoint(0, "1h"), Breakpoint(1, "1h"), Breakpoint(3, "5m"))


def test_the_minimum_counts_the_whole_prefix() -> None:
    assert written("tool:300*5m, sys:211*5m, user:1*5m") == [2]


@pytest.mark.parametrize(
    ("tail", "block"),
    [("user:50", 1), ("user:50, think:20", 1), ("user:50, a:9, think:20, empty:0", 2), ("image:50", 1)],
)
def test_an_automatic_breakpoint_goes_to_the_last_block_that_can_carry_it(tail: str, block: int) -> None:
    assert written("sys:1000, " + tail, automatic="5m") == [block]


def test_automatic_caching_without_any_block_for_it_is_skipped() -> None:
    assert planned("think:1000", automatic="5m") == Plan()


def test_an_automatic_breakpoint_leaves_an_explicit_one_its_own_lifetime() -> None:
    assert planned("sys:1000*1h", automatic="1h").writes == (Breakpoint(0, "1h"),)


def test_runs_of_tool_calls_and_of_their_results_are_one_position_each() -> None:
    built = prompt("user:1, use:1=a, use:1=b, result:1=a, result:1=b, result:1=c, a:1, use:1, result:1")
    assert positions(built.prompt, OPUS) == (0, 1, 1, 2, 2, 2, 3, 4, 5)
    flat = msgspec.structs.replace(OPUS, collapse_tool_runs=False)
    assert positions(built.prompt, flat) == tuple(range(9))


def test_wide_turns_stay_within_the_window_only_where_runs_are_collapsed() -> None:
    wide = "sys:1000, user:1, " + ", ".join(f"use:1={i}" for i in range(30)) + ", result:5*5m"
    assert 0 in planned(wide).lookups
    flat = msgspec.structs.replace(OPUS, collapse_tool_runs=False)
    assert 0 not in planned(wide, flat).lookups


def test_looking_back_ends_after_twenty_positions_of_each_breakpoint() -> None:
    users = ", ".join(f"user:600={i}" for i in range(40))
    assert planned(users + ", user:600*5m").lookups == tuple(range(40, 20, -1))
    assert planned("sys:600*5m, " + users + ", user:600*5m").lookups == (*range(41, 21, -1), 0)


def test_server_tool_results_get_breakpoints_only_in_a_prompt_that_has_one() -> None:
    assert planned("sys:1000*1h, user:9, search:50, search:60=b").writes[1:] == (Breakpoint(2, "5m"), Breakpoint(3, "5m"))
    assert planned("sys:1000, user:9, search:50").writes == ()


# -- OpenAI ------------------------------------------------------------------------------------------------------------


def ends(notation: str) -> tuple[list[int], int | None]:
    return message_ends(prompt(notation, dialect="openai").prompt)


def test_eligible_are_user_messages_the_last_tool_answer_and_the_first_instructions() -> None:
    assert ends("tool:1, sys:1, dev:1, user:1, &image:1, use:1, result:1, result:1=b, a:1, dev:2, user:2") == ([2, 4, 7, 10], 2)
    assert ends("user:1, dev:1, user:2") == ([0, 2], None)
    assert ends("dev:1, a:1") == ([0], 0)


def test_the_implicit_breakpoint_leaves_three_slots_to_marks() -> None:
    marked = ", ".join(f"user:2000*30m={i}" for i in range(5))
    assert written(marked + ", user:5, a:5", SOL) == [2, 3, 4, 5]
    assert written(marked + ", user:5, a:5", SOL, mode="explicit") == [1, 2, 3, 4]


def test_marks_are_looked_up_at_the_first_two_and_the_latest_fifty() -> None:
    marked = ", ".join(f"user:2000*30m={i}" for i in range(60))
    assert planned(marked, SOL, mode="explicit").lookups == (*range(59, 9, -1), 1, 0)


def test_implicit_mode_looks_up_twenty_earlier_message_ends_and_the_developer_block() -> None:
    talk = "dev:2000, " + ", ".join(f"user:9={i}" for i in range(30))
    assert planned(talk, SOL).lookups == (*range(30, 9, -1), 0)


def test_a_profile_may_write_at_the_end_of_the_developer_block_too() -> None:
    assert written("dev:2000, user:9", SOL) == [1]
    assert written("dev:2000, user:9", msgspec.structs.replace(SOL, writes_dev_end=True)) == [0, 1]


# -- keys --------------------------------------------------------------------------------------------------------------


def keys(notation: str, profile: Profile = OPUS, owner: tuple[str, ...] = ("t", "w", ""), **fields: Any) -> list[bytes]:
    made = prompt(notation, dialect=profile.dialect, **fields).prompt
    names = Keys(made, profile, chain(made, profile), owner)
    return [names.of_block(i) for i in range(len(made.blocks))]


SAME = "tool:5, sys:6, user:7, a:8, user:9"
MARKED = "tool:5*1h, sys:6*1h, user:7*5m, a:8, user:9*5m"


def test_marks_are_no_part_of_a_key() -> None:
    assert keys(SAME) == keys(MARKED) == keys(SAME, automatic="5m")


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"system_salt": b"fast"}, 1),
        ({"message_salt": b"none"}, 2),
        ({"model": "claude-opus-5-5"}, 0),
        ({"owner": ("other", "w", "")}, 0),
        ({"owner": ("t", "other", "")}, 0),
        ({"owner": ("t", "w", "weights")}, 0),
        ({"owner": ("tw", "", "")}, 0),
        ({"notation": "tool:5, sys:6, user:7, a:8=x, user:9"}, 3),
        ({"notation": "tool:5=x, sys:6, user:7, a:8, user:9"}, 0),
    ],
)
def test_a_change_reaches_from_its_section_on(change: dict[str, Any], left: int) -> None:
    before, after = keys(SAME), keys(**{"notation": SAME, **change})
    assert [one == other for one, other in zip(before, after, strict=True)] == [True] * left + [False] * (5 - left)


def test_parameters_of_openai_stand_before_everything() -> None:
    for change in ({"message_salt": b"x"}, {"cache_key": "k"}, {"cache_key": ""}):
        assert not set(keys(SAME, SOL)) & set(keys(SAME, SOL, **change))


def test_openais_messages_do_not_run_together() -> None:
    assert keys("user:1, &user:1", SOL) != keys("user:1, user:1", SOL)
    assert keys("user:1, a:1, &use:1", SOL) == keys("user:1, a:1, use:1", SOL)  # Chat and Responses


def test_earlier_thinking_is_stripped_once_the_user_speaks_again() -> None:
    old = profiles.find("claude-opus-4-1", "anthropic")
    first, later = "sys:5, user:1, think:7, use:2, result:3", "sys:5, user:1, think:7, use:2, result:3, user:4"
    assert keys(later)[:5] == keys(first)
    assert keys(first, old)[:2] == keys(later, old)[:2]
    assert not set(keys(first, old)[2:]) & set(keys(later, old)[2:])


def test_thinking_rendered_ahead_loses_the_tools_as_well() -> None:
    ahead = msgspec.structs.replace(OPUS, thinking_ahead=True)
    assert keys(SAME, ahead, salts={"thinking": "on"})[0] != keys(SAME, ahead)[0]
    assert keys(SAME, OPUS, salts={"thinking": "on"})[0] == keys(SAME, OPUS)[0]


@given(st.lists(st.integers(0, 3), max_size=600), st.lists(st.integers(0, 3), max_size=600))
def test_steps_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], two: list[int]) -> None:
    common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    shared = sum(a == b for a, b in zip(steps(one), steps(two), strict=False))
    assert shared == common // 128


# -- usage -------------------------------------------------------------------------------------------------------------


def test_the_billing_rule_of_mixed_lifetimes() -> None:
    """Read up to A, one hour up to B, five minutes up to C."""
    lengths = Lengths(ends=(100, 200, 300, 400), total=450)
    points = Plan(writes=(Breakpoint(0, "1h"), Breakpoint(1, "1h"), Breakpoint(3, "5m")))
    assert usage(points, lengths, 0) == CacheUsage(plain=50, read=0, written={"1h": 200, "5m": 200})
    assert usage(points, lengths, 150) == CacheUsage(plain=50, read=150, written={"1h": 50, "5m": 200})
    assert usage(points, lengths, 300) == CacheUsage(plain=50, read=300, written={"5m": 100})
    assert usage(points, lengths, 400) == CacheUsage(plain=50, read=400)
    assert usage(Plan(), lengths, 0) == CacheUsage(plain=450)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from([None, "5m", "1h", "30m", "12h"])), min_size=1, max_size=8),
    st.integers(0, 500),
    st.floats(0, 1),
)
def test_no_token_is_billed_twice_or_not_at_all(blocks: list[tuple[int, Any]], behind: int, part: float) -> None:
    sums = [sum(tokens for tokens, _ in blocks[: i + 1]) for i in range(len(blocks))]
    lengths = Lengths(ends=tuple(sums), total=sums[-1] + behind)
    points = Plan(writes=tuple(Breakpoint(i, ttl) for i, (_, ttl) in enumerate(blocks) if ttl is not None))
    bill = usage(points, lengths, int(part * sums[-1]))
    assert bill.plain + bill.read + sum(bill.written.values()) == lengths.total
    assert min([bill.plain, *bill.written.values()]) >= 0


def test_an_empty_prompt_has_no_breakpoints() -> None:
    for profile in (OPUS, SOL):
        nothing = Prompt(dialect=profile.dialect, model="m", blocks=(), automatic="5m")
        assert plan(nothing, Lengths(ends=(), total=3), profile) == Plan()


# -- bodies ------------------------------------------------------------------------------------------------------------


def names(read: Any, profile: Profile, body: dict[str, Any]) -> list[bytes]:
    made: Prompt = read(body)
    found = Keys(made, profile, chain(made, profile), ("t", "w", ""))
    return [found.of_block(i) for i in range(len(made.blocks))]


TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Bye"}]
UNIMPORTANT = ({"temperature": 0.3}, {"top_p": 0.5}, {"max_tokens": 7}, {"stream": True}, {"metadata": {"user_id": "u"}})


@pytest.mark.parametrize("change", [*UNIMPORTANT, {"top_k": 3}, {"stop_sequences": ["x"]}], ids=str)
def test_v17_sampling_and_limits_are_no_part_of_a_key_of_anthropics(change: dict[str, Any]) -> None:
    body = {"model": "claude-opus-5", "max_tokens": 9, "system": "Be brief.", "messages": TALK}
    assert names(anthropic_prompt.read_prompt, OPUS, body) == names(anthropic_prompt.read_prompt, OPUS, {**body, **change})


@pytest.mark.parametrize("change", [*UNIMPORTANT, {"seed": 3}, {"n": 2}, {"stop": ["x"]}, {"user": "u"}], ids=str)
def test_v28_sampling_and_limits_are_no_part_of_a_key_of_openais(change: dict[str, Any]) -> None:
    body = {"model": "gpt-5.6-sol", "messages": TALK}
    assert names(openai_prompt.read_chat, SOL, body) == names(openai_prompt.read_chat, SOL, {**body, **change})


def test_chat_and_responses_name_the_same_boundaries() -> None:
    call = {"name": "f", "arguments": "{}"}
    chat: dict[str, Any] = {
        "model": "gpt-5.6-sol",
        "messages": [
            *TALK,
            {"role": "assistant", "content": "So?", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "c", "content": "42"},
        ],
    }
    responses: dict[str, Any] = {
        "model": "gpt-5.6-sol",
        "input": [
            *TALK,
            {"role": "assistant", "content": "So?"},
            {"type": "function_call", "call_id": "c", **call},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
        ],
    }
    assert names(openai_prompt.read_chat, SOL, chat) == names(openai_prompt.read_responses, SOL, responses)
    ends = message_ends(openai_prompt.read_chat(chat))
    assert ends == message_ends(openai_prompt.read_responses(responses)) == ([0, 2, 5], None)


def test_a_string_and_one_text_block_are_the_same() -> None:
    text = {"model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "Hello"}]}
    marked = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    blocks = {
        "model": "m",
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [marked]}],
    }
    assert names(anthropic_prompt.read_prompt, OPUS, text) == names(anthropic_prompt.read_prompt, OPUS, blocks)
