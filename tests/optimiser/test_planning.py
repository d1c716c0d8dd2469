"""Plans over whole histories: what is marked, for how long, what is left alone, and that a plan never breaks a body."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.optimiser.traffic import M1H, M5, ON, Json, Site, body, marks_in, says, text, user

from anaphora.optimiser import Histories, History, Mark, Plan, Settings, apply, plan
from anaphora.types import LOCAL_TENANT, Tenant
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_prompt import read_chat, read_responses
from anaphora.wire.openai_responses import OpenAIResponses

TOOL: Json = {"name": "look", "input_schema": {"type": "object"}}


def call(number: int) -> Json:
    return {"type": "tool_use", "id": f"t{number}", "name": "look", "input": {}}


def result(number: int) -> Json:
    return {"type": "tool_result", "tool_use_id": f"t{number}", "content": f"found {number}"}


# -- what each rule asks for ---------------------------------------------------------------------------------------------


def test_the_end_of_a_conversation_with_tools_is_marked_and_read_by_the_next_turn() -> None:
    site = Site()
    site.ask(body(user("Find it."), tools=[TOOL]))
    found, usage = site.ask(body(user("Find it."), says(call(1)), user(result(1)), tools=[TOOL]))
    assert max(mark.block for mark in found.marks) == 4
    assert (usage.read, usage.plain) == (3000, 0)


def test_a_prompt_below_the_minimum_gets_no_mark_and_says_so() -> None:
    """R8."""
    found, usage = Site(tokens=100).ask(body(user("Find it."), tools=[TOOL]))
    assert found.marks == ()
    assert [reason.code for reason in found.reasons] == ["too-short"]
    assert usage.written == {}


def test_a_turn_wider_than_the_look_back_is_read_all_the_same() -> None:
    """R5: the entry lies 41 positions before the end of the next prompt; a mark is put where it lies."""
    site = Site()
    site.ask(body(user("Find it."), tools=[TOOL]))
    wide = user(*(f"part {number}" for number in range(40)))
    found, usage = site.ask(body(user("Find it."), says("Here."), wide, tools=[TOOL]))
    assert usage.read == 3000
    assert [reason.path for reason in found.reasons if reason.code == "reach"] == ["messages.0.content.0"]


def test_without_a_history_a_wide_turn_is_marked_where_the_turn_before_ended() -> None:
    """After a restart the gateway knows nothing, but the provider still holds the entry."""
    site = Site()
    site.ask(body(user("Find it."), tools=[TOOL]))
    site.history = History()
    wide = user(*(f"part {number}" for number in range(40)))
    _, usage = site.ask(body(user("Find it."), says("Here."), wide, tools=[TOOL]))
    assert usage.read == 3000


def test_one_shot_questions_under_one_system_prompt_write_only_the_system_prompt() -> None:
    """S7 (i)."""
    site = Site()
    for number in range(40):
        found, usage = site.ask(body(user(f"Question {number}?")), after_s=30.0)
    assert (usage.read, usage.plain, usage.written) == (1000, 1000, {})
    assert [mark.path for mark in found.marks] == ["system"]
    assert {"one-shot", "varying"} & {reason.code for reason in found.reasons}


def test_a_block_that_varies_is_never_marked_once_that_is_known() -> None:
    """S7 (c)."""
    site = Site()
    for number in range(30):
        system = [text("Rules."), text(f"It is {number} o'clock.")]
        found, _ = site.ask(body(user("Find it."), says("Yes."), user("Where?"), system=system), after_s=20.0)
        if number > 20:
            assert {mark.path for mark in found.marks} == {"system.0"}
            assert "varying" in {reason.code for reason in found.reasons}


def test_a_shared_document_is_found_without_being_told() -> None:
    site = Site()
    for number in range(30):
        _, usage = site.ask(body(user("The whole document.", f"Question {number}?")), after_s=20.0)
    assert (usage.read, usage.written) == (2000, {})


def test_long_pauses_are_learned_and_bridged_by_the_longer_lifetime() -> None:
    """S7 (h)."""
    site = Site()
    reads = []
    for number in range(6):
        for turn in range(8):
            turns = [m for i in range(turn) for m in (says(f"a{number}.{i}"), user(f"u{number}.{i}"))]
            found, usage = site.ask(body(user(f"Start {number}."), *turns), after_s=900.0)
            reads.append(usage.read)
    assert {mark.ttl for mark in found.marks} == {"1h"}
    assert reads[-1] == 14_000
    assert [reason.tokens > 0 for reason in found.reasons if reason.code == "lifetime"] == [True]


def test_short_pauses_keep_the_shorter_lifetime() -> None:
    site = Site()
    for number in range(12):
        for turn in range(4):
            turns = [m for i in range(turn) for m in (says(f"a{number}.{i}"), user(f"u{number}.{i}"))]
            found, _ = site.ask(body(user(f"Start {number}."), *turns), after_s=20.0)
    assert {mark.ttl for mark in found.marks} == {"5m"}


def test_a_mark_of_the_clients_own_is_kept_and_counts() -> None:
    """R7."""
    given_marks = [text(f"Rules {number}.", **M5) for number in range(4)]
    site = Site()
    found, _ = site.ask(body(user("Find it."), system=given_marks, tools=[TOOL]))
    assert found.marks == ()
    assert [reason.code for reason in found.reasons].count("kept") == 4
    assert len(list(marks_in(site.sent))) == 4


def test_marks_inside_a_tools_result_are_counted_before_any_is_added() -> None:
    """The prompt shows a result with two marked parts as one block."""
    parts = {"type": "tool_result", "tool_use_id": "t1", "content": [text("a", **M5), text("b", **M5)]}
    site = Site()
    site.ask(body(user("Find it."), says(call(1)), user(parts), says("So."), user("And?"), system=[text("Rules.", **M5)]))
    assert len(list(marks_in(site.sent))) == 4


def test_off_does_nothing_and_advice_tells_what_it_would_do() -> None:
    site = Site()
    prompt, lengths = site.read(body(user("Find it."), tools=[TOOL]))
    assert plan(prompt, lengths, site.profile, site.history, 0.0).empty
    advised = plan(prompt, lengths, site.profile, site.history, 0.0, Settings(mode="advise"))
    assert advised == plan(prompt, lengths, site.profile, site.history, 0.0, ON)
    assert all(reason.usd is not None for reason in advised.reasons)


# -- OpenAI --------------------------------------------------------------------------------------------------------------


def chat(*messages: Json, model: str = "gpt-5.6-sol", **fields: Any) -> Json:
    return {"model": model, "messages": [{"role": "system", "content": "Rules."}, *messages], **fields}


def test_a_model_with_breakpoints_pays_for_no_write_that_nobody_reads() -> None:
    """P2: implicit mode writes the end of every prompt."""
    site = Site("gpt-5.6-sol", tokens=1100)
    for number in range(40):
        found, usage = site.ask(chat({"role": "user", "content": f"Question {number}?"}), after_s=60.0)
    assert found.fields["prompt_cache_options"] == {"mode": "explicit"}
    assert (usage.read, usage.plain, usage.written) == (1100, 1100, {})
    assert site.sent["messages"][0]["content"] == [
        {"type": "text", "text": "Rules.", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    ]


def test_a_conversation_stays_in_implicit_mode() -> None:
    site = Site("gpt-5.6-sol")
    turns: list[Json] = [{"role": "user", "content": "Find it."}]
    for number in range(5):
        found, usage = site.ask(chat(*turns, tools=[{"type": "function", "function": {"name": "look"}}]))
        turns += [{"role": "assistant", "content": f"a{number}"}, {"role": "user", "content": f"u{number}"}]
    assert "prompt_cache_options" not in found.fields
    assert usage.read == 9000


def test_the_mode_a_client_chose_is_left_alone() -> None:
    site = Site("gpt-5.6-sol")
    options = {"mode": "implicit"}
    for number in range(40):
        site.ask(chat({"role": "user", "content": f"Q{number}"}, prompt_cache_options=options), after_s=60.0)
    assert site.sent["prompt_cache_options"] is options


def test_prompts_that_begin_alike_get_one_key_and_no_others() -> None:
    site = Site("gpt-4.1", tokens=600)
    keys = [
        site.ask(chat(*turn, model="gpt-4.1"))[0].fields["prompt_cache_key"]
        for turn in ([user("a"), user("b")], [user("a"), user("c")], [user("x"), user("b")])
    ]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0].isascii()


def test_a_key_of_the_clients_own_is_kept() -> None:
    site = Site("gpt-4.1")
    found, _ = site.ask(chat(user("a"), model="gpt-4.1", prompt_cache_key="mine"))
    assert found.empty
    assert site.sent["prompt_cache_key"] == "mine"


def test_a_hot_prefix_is_split_by_conversation_and_a_conversation_stays_where_it_is() -> None:
    """P12: 15 requests a minute."""
    site = Site("gpt-5.6-sol", tokens=1100)
    keys: dict[int, set[str]] = {}
    for number in range(200):
        talk = number % 20
        found, _ = site.ask(chat(user(f"Talk {talk}."), says(f"a{number // 20}"), user("Go on.")), after_s=0.5)
        keys.setdefault(talk, set()).add(found.fields["prompt_cache_key"])
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) > 1


@pytest.mark.parametrize(
    ("provider", "where", "name"),
    [("xai", "headers", "x-grok-conv-id"), ("mistral", "fields", "prompt_cache_key"), ("openrouter", "fields", "session_id")],
)
def test_other_providers_get_the_hint_they_route_by(provider: str, where: str, name: str) -> None:
    site = Site("gpt-4.1", settings=Settings(mode="on", provider=provider))
    first, _ = site.ask(chat(user("a"), model="gpt-4.1"))
    second, _ = site.ask(chat(user("a"), says("b"), user("c"), model="gpt-4.1"))
    assert getattr(first, where)[name] == getattr(second, where)[name]


def test_tenants_never_share_a_value_that_a_provider_keeps_caches_apart_by() -> None:
    """S5."""
    request = chat(user("a"), model="gpt-4.1")
    values = set()
    for provider in ("openai", "deepseek", "xai"):
        for tenant in ("alice", "bob"):
            site = Site("gpt-4.1", settings=Settings(mode="on", provider=provider))
            site.history = Histories().of(Tenant(tenant), "main")
            found, _ = site.ask(request)
            values |= {*map(str, found.fields.values()), *found.headers.values()}
    assert len(values) == 6


def test_a_prompt_beyond_the_cliff_is_pointed_out() -> None:
    """S7 (g): 272k tokens."""
    site = Site("gpt-5.6-sol", tokens=150_000)
    found, _ = site.ask(chat(user("a"), says("b"), user("c")))
    assert [reason.tokens for reason in found.reasons if reason.code == "dear"] == [-600_000]


def test_what_a_tool_answered_can_be_marked_in_both_of_openais_formats() -> None:
    """An entry that was written there implicitly is read in explicit mode only if it is marked (P7)."""
    call_chat = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        user("a"),
        {"role": "assistant", "tool_calls": [call_chat]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
    ]
    request = chat(*turns)
    prompt = read_chat(request)
    sent = apply(request, Plan((Mark(prompt.blocks[-1].path, "30m", len(prompt.blocks) - 1),)))
    assert _parsed(OpenAIChat(), sent).prompt.blocks[-1].mark == "30m"
    assert _parsed(OpenAIChat(), sent).request == _parsed(OpenAIChat(), request).request
    items: Json = {
        "model": "gpt-5.6-sol",
        "input": [
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "x"},
        ],
    }
    prompt = read_responses(items)
    sent = apply(items, Plan((Mark(prompt.blocks[-1].path, "12h", 2), Mark(prompt.blocks[0].path, "30m", 0))))
    assert [block.mark for block in _parsed(OpenAIResponses(), sent).prompt.blocks] == ["30m", None, "12h"]
    assert _parsed(OpenAIResponses(), sent).request == _parsed(OpenAIResponses(), items).request


def test_a_days_retention_is_only_asked_for_where_the_user_allows_it() -> None:
    request = chat(user("a"), model="gpt-4.1")
    assert "prompt_cache_retention" not in Site("gpt-4.1").ask(request)[0].fields
    allowed = Site("gpt-4.1", settings=Settings(mode="on", retain=True))
    assert allowed.ask(request)[0].fields["prompt_cache_retention"] == "24h"


# -- for every history ---------------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "b", "c", "d"])
own = st.sampled_from([None, None, None, M5, M1H])


@st.composite
def bodies(draw: st.DrawFn) -> Json:
    """Anthropic bodies of all shapes, with marks of the client's own that the API takes."""
    system: Any = draw(words | st.lists(words, min_size=1, max_size=3).map(lambda many: [text(one) for one in many]))
    messages: list[Json] = []
    for turn in range(draw(st.integers(0, 3))):
        messages += [user(draw(words)), draw(st.sampled_from([says("yes"), says(call(turn))]))]
        if messages[-1]["content"][0]["type"] == "tool_use":
            messages.append(user(result(turn), *draw(st.lists(words, max_size=2))))
            messages.append(says({"type": "thinking", "thinking": "so", "signature": "s"}, "Hm."))
    last: Any = draw(words | st.lists(words, min_size=1, max_size=30).map(lambda many: [text(one) for one in many]))
    made = body(*messages, {"role": "user", "content": last}, system=system)
    if draw(st.booleans()):
        made["tools"] = [dict(TOOL), {**TOOL, "name": "other"}]
    places = [block for block in _markable(made) if draw(own) is not None]
    ttls = sorted((draw(st.sampled_from(["5m", "1h"])) for _ in places[:4]), reverse=False)
    for place, ttl in zip(places[:4], ttls, strict=True):  # "1h" sorts first, as the order of marks demands (R13)
        place["cache_control"] = {"type": "ephemeral", "ttl": ttl}
    if len(places) < 4 and "1h" not in ttls and draw(st.booleans()) and not isinstance(last, list):
        made["cache_control"] = {"type": "ephemeral"}
    return made


def _markable(made: Json) -> list[Json]:
    system = made["system"] if isinstance(made["system"], list) else []
    contents = [one["content"] for one in made["messages"] if isinstance(one["content"], list)]
    return [*made.get("tools", []), *system, *(b for content in contents for b in content if b["type"] != "thinking")]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Json, float]]:
    pool = draw(st.lists(bodies(), min_size=1, max_size=4))
    gaps = st.sampled_from([0.0, 1.0, 10.0, 200.0, 1000.0, 5000.0])
    return draw(st.lists(st.tuples(st.sampled_from(pool), gaps), min_size=1, max_size=12))


@settings(max_examples=150, deadline=None)
@given(histories(), st.sampled_from([200, 700, 3000]))
def test_a_plan_is_taken_by_the_api_keeps_the_clients_marks_and_asks_the_same_question(
    requests: list[tuple[Json, float]], tokens: int
) -> None:
    site = Site(tokens=tokens)
    for request, gap in requests:
        before = copy.deepcopy(request)
        found, _ = site.ask(request, gap)
        assert request == before
        sent = _parsed(Anthropic(), site.sent)  # refuses a fifth mark (R7) and 1h behind 5m (R13)
        assert sent.request == _parsed(Anthropic(), request).request
        theirs = {b.path: b.mark for b in site.read(request)[0].blocks if b.mark}
        marks = {b.path: b.mark for b in sent.prompt.blocks if b.mark}
        added = {_as_list(mark.path, sent.prompt): mark.ttl for mark in found.marks}
        assert marks == {**{_as_list(path, sent.prompt): ttl for path, ttl in theirs.items()}, **added}
        assert not added.keys() & theirs.keys()


@settings(max_examples=60, deadline=None)
@given(histories())
def test_the_same_history_makes_the_same_plans(requests: list[tuple[Json, float]]) -> None:
    one, other = Site(), Site()
    assert [one.ask(*request) for request in requests] == [other.ask(*request) for request in requests]


chats = st.builds(
    lambda first, turns, last: chat(
        user(first),
        *(m for turn in turns for m in ({"role": "assistant", "content": turn}, {"role": "user", "content": turn})),
        *([{"role": "user", "content": last}] if last else []),
    ),
    words,
    st.lists(words, max_size=4),
    st.sampled_from(["", "x", "y"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(chats, st.sampled_from([1.0, 60.0, 4000.0])), min_size=1, max_size=12))
def test_a_chat_body_stays_the_same_question_and_is_taken_by_the_model(requests: list[tuple[Json, float]]) -> None:
    site = Site("gpt-5.6-sol", tokens=1100)
    for request, gap in requests:
        found, _ = site.ask(request, gap)
        sent = _parsed(OpenAIChat(), site.sent)
        assert sent.request == _parsed(OpenAIChat(), request).request
        assert site.profile.refusal(sent.prompt) is None
        marks = {b.path: b.mark for b in sent.prompt.blocks if b.mark}
        assert marks == {_as_list(mark.path, sent.prompt): mark.ttl for mark in found.marks}


def _parsed(dialect: Dialect, request: Json) -> Any:
    return dialect.parse(json.dumps(request).encode(), tenant=LOCAL_TENANT)


def _as_list(path: str, prompt: Any) -> str:
    """Where a string became a list with one block."""
    paths = {block.path for block in prompt.blocks}
    return path if path in paths else f"{path}[0]" if "[" in path else f"{path}.0"


def test_key_order_and_everything_else_of_a_body_stays() -> None:
    request = body(user("Find it."), system="Rules.", tools=[TOOL], zeta=1, alpha={"b": 1, "a": 2})
    site = Site()
    found, _ = site.ask(request)
    bare = apply(request, found)
    assert list(bare) == list(request)
    assert json.dumps(bare["alpha"]) == '{"b": 1, "a": 2}'
    assert bare["system"][0]["text"] == "Rules."
    assert request["system"] == "Rules."
