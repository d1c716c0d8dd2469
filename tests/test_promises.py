"""The test vectors of prompt caching (their numbers are in the names), on the rules alone: no server, no tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora import profiles
from anaphora.breakpoints import steps
from anaphora.clock import ManualClock
from anaphora.profiles import Profile
from anaphora.promises import Books, Charge
from anaphora.prompt import TTL, Lengths
from anaphora.testing.prompts import prompt
from anaphora.types import Keep, Scope, Tenant

ALICE, BOB = Tenant("alice"), Tenant("bob")
CLAUDE = "claude-opus-5"  # minimum 512
SOL = "gpt-5.6-sol"

Tuple4 = tuple[int, int, int, int]


class Desk:
    """Books with a clock that starts at 0; answers begin at once unless told otherwise."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock(0.0)
        self.books = Books(self.clock, **options)

    def at(self, seconds: float) -> Desk:
        self.clock.advance(seconds - self.clock.now_s())
        return self

    def ask(
        self,
        notation: str,
        *,
        tenant: Tenant = ALICE,
        workspace: str = "",
        profile: Profile | None = None,
        begins_s: float | None = None,
        name: str = "",
        lengths: Lengths | None = None,
        **fields: Any,
    ) -> Charge:
        built = prompt(notation, **fields)
        rules = profile or profiles.find(built.prompt.model, built.prompt.dialect)
        charge = self.books.charge(tenant, built.prompt, rules, lengths or built.lengths, workspace=workspace)
        self.books.visible(charge, begins_s)
        if name:
            self.books.name(charge, name)
        usage = charge.usage
        assert usage.plain + usage.read + sum(usage.written.values()) == (lengths or built.lengths).total
        return charge

    def claude(self, notation: str, **fields: Any) -> Tuple4:
        """Anthropic's tuple: input, read, written for 5m, for 1h."""
        usage = self.ask(notation, **fields).usage
        return usage.plain, usage.read, usage.written.get("5m", 0), usage.written.get("1h", 0)

    def gpt(self, notation: str, **fields: Any) -> tuple[int, int, int]:
        """OpenAI's tuple: all input, cached, written."""
        fields = {"dialect": "openai", "model": SOL, **fields}
        usage = self.ask(notation, **fields).usage
        written = sum(usage.written.values())
        return usage.plain + usage.read + written, usage.read, written

    def classic(self, notation: str, **fields: Any) -> int:
        return self.gpt(notation, **{"model": "gpt-4.1", **fields})[1]


@pytest.fixture
def desk() -> Desk:
    return Desk()


# -- Anthropic ---------------------------------------------------------------------------------------------------------


def test_v01_a_marked_system_prompt_is_written_once_and_read_then(desk: Desk) -> None:
    assert desk.claude("sys:1000*5m, user:50") == (50, 0, 1000, 0)
    assert desk.at(1).claude("sys:1000*5m, user:60") == (60, 1000, 0, 0)


def test_v02_without_marks_nothing_is_cached(desk: Desk) -> None:
    for _ in range(2):
        charge = desk.ask("sys:1000, user:50")
        assert charge.usage.plain == 1050
        assert charge.miss is not None
        assert charge.miss.reason == "unmarked"


def test_v03_below_the_minimum_nothing_is_cached_and_nothing_fails(desk: Desk) -> None:
    charge = desk.ask("sys:511*5m, user:50")
    assert (charge.usage.plain, charge.usage.read, charge.usage.written) == (561, 0, {})
    assert charge.miss is not None
    assert charge.miss.reason == "too_short"
    assert desk.claude("sys:512*5m, user:50") == (50, 0, 512, 0)


def test_v04_every_read_refreshes_five_minutes(desk: Desk) -> None:
    seen = [desk.at(t).claude("sys:1000*5m, user:50") for t in (0, 299, 598, 899)]
    assert seen == [(50, 0, 1000, 0), (50, 1000, 0, 0), (50, 1000, 0, 0), (50, 0, 1000, 0)]


def test_a_lifetime_that_is_exactly_over_is_over(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:50")
    assert desk.at(300).claude("sys:1000*5m, user:50") == (50, 0, 1000, 0)


def test_v05_an_hour_is_an_hour(desk: Desk) -> None:
    seen = [desk.at(t).claude("sys:1000*1h, user:50") for t in (0, 3599, 7200)]
    assert seen == [(50, 0, 0, 1000), (50, 1000, 0, 0), (50, 0, 0, 1000)]


def test_v08_automatic_caching_follows_a_growing_chat(desk: Desk) -> None:
    chat = ["sys:1000, user:50", "a:20, user:50", "a:30, user:50"]
    seen = [desk.claude(", ".join(chat[: n + 1]), automatic="5m") for n in range(3)]
    assert seen == [(0, 0, 1050, 0), (0, 1050, 70, 0), (0, 1120, 80, 0)]


def test_v09_an_automatic_mark_on_a_block_with_the_same_mark_changes_nothing(desk: Desk) -> None:
    assert desk.claude("sys:1000, user:50*5m", automatic="5m") == (0, 0, 1050, 0)


def users(count: int) -> str:
    return ", ".join(f"user:10={i}" for i in range(count))


@pytest.mark.parametrize(("count", "expected"), [(19, (0, 1000, 190, 0)), (20, (0, 0, 1200, 0))])
def test_v10_a_breakpoint_looks_back_twenty_positions_and_no_further(desk: Desk, count: int, expected: Tuple4) -> None:
    desk.claude("sys:1000*5m, user:50")
    assert desk.claude("sys:1000, " + users(count - 1) + ", user:10*5m") == expected


def test_v11_the_next_earlier_mark_looks_back_as_well(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:50")
    assert desk.claude("sys:1000*5m, " + users(24) + ", user:10*5m") == (0, 1000, 250, 0)


def test_v12_a_mark_on_a_block_that_varies_writes_every_time(desk: Desk) -> None:
    assert desk.claude("sys:1000, user:50*5m=one") == (0, 0, 1050, 0)
    charge = desk.ask("sys:1000, user:50*5m=two")
    assert charge.usage.written == {"5m": 1050}
    assert charge.miss is not None
    assert (charge.miss.reason, charge.miss.path) == ("changed", "messages.0.content.1")


@pytest.mark.parametrize("changed", ["tool:100=new, tool:200", "tool:200, tool:100"])
def test_v13_a_changed_or_moved_tool_loses_everything(desk: Desk, changed: str) -> None:
    desk.claude("tool:100, tool:200, sys:1000*5m, user:50")
    assert desk.claude(changed + ", sys:1000*5m, user:50") == (50, 0, 1300, 0)


def test_v14_a_parameter_of_the_messages_loses_the_messages_only(desk: Desk) -> None:
    same = "tool:300, sys:1000*5m, user:600*5m"
    desk.claude(same, message_salt=b"auto", salts={"tool_choice": "auto"})
    assert desk.claude(same, message_salt=b"auto", salts={"tool_choice": "auto"}) == (0, 1900, 0, 0)
    charge = desk.ask(same, message_salt=b"none", salts={"tool_choice": "none"})
    assert (charge.usage.plain, charge.usage.read, charge.usage.written) == (0, 1300, {"5m": 600})
    assert charge.miss is not None
    assert (charge.miss.reason, charge.miss.names, charge.miss.lost_tokens) == ("parameters", ("tool_choice",), 600)


def test_v15_speed_leaves_the_tools(desk: Desk) -> None:
    desk.claude("tool:600*5m, sys:1000*5m, user:50", system_salt=b"standard")
    assert desk.claude("tool:600*5m, sys:1000*5m, user:50", system_salt=b"fast") == (50, 600, 1000, 0)


def test_v16_of_two_that_write_at_once_the_first_makes_it_readable(desk: Desk) -> None:
    assert desk.claude("sys:1000*5m, user:50", begins_s=2) == (50, 0, 1000, 0)
    charge = desk.at(1).ask("sys:1000*5m, user:50", begins_s=3)
    assert charge.usage.read == 0
    assert charge.miss is not None
    assert charge.miss.reason == "not_yet_visible"
    assert desk.at(2.5).claude("sys:1000*5m, user:50") == (50, 1000, 0, 0)


def test_v19_a_prewarming_request_writes_what_the_next_one_reads(desk: Desk) -> None:
    assert desk.claude("sys:5120*5m, user:8") == (8, 0, 5120, 0)
    assert desk.claude("sys:5120*5m, user:30") == (30, 5120, 0, 0)


def test_v20_a_mark_that_moves_forward_finds_the_one_before(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:600*5m")
    assert desk.claude("sys:1000, user:600, a:20, user:30*5m") == (0, 1600, 50, 0)


def test_mixed_lifetimes_bill_the_long_one_up_to_its_mark(desk: Desk) -> None:
    assert desk.claude("tool:600*1h, sys:1000*1h, user:500*5m, user:50") == (50, 0, 500, 1600)
    assert desk.at(301).claude("tool:600*1h, sys:1000*1h, user:500*5m, user:50") == (50, 1600, 500, 0)
    assert desk.at(302).claude("tool:600*1h, sys:1000*1h, user:500, a:30*1h, user:40*5m") == (0, 2100, 40, 30)
    assert desk.at(603).claude("tool:600*1h, sys:1000*1h, user:500, a:31*1h, user:40*5m") == (0, 1600, 40, 531)


def test_a_longer_mark_over_a_living_entry_does_not_upgrade_it(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:50")
    assert desk.at(10).claude("sys:1000*1h, user:50") == (50, 1000, 0, 0)
    assert desk.at(311).claude("sys:1000*1h, user:50") == (50, 0, 0, 1000)


def test_a_mark_inside_what_is_read_refreshes_its_own_entry(desk: Desk) -> None:
    both = "sys:1000*5m, user:600*5m"
    desk.claude(both)
    assert desk.at(200).claude(both) == (0, 1600, 0, 0)
    assert desk.at(400).claude("sys:1000*5m, user:70") == (70, 1000, 0, 0)


def test_an_entry_nobody_reads_is_not_kept_by_a_longer_one(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:600*5m")
    assert desk.at(200).claude("sys:1000, user:600*5m") == (0, 1600, 0, 0)
    assert desk.at(400).claude("sys:1000*5m, user:70") == (70, 0, 1000, 0)


def test_a_request_whose_answer_never_begins_leaves_nothing(desk: Desk) -> None:
    built = prompt("sys:1000*5m, user:50")
    desk.books.charge(ALICE, built.prompt, profiles.find(CLAUDE, "anthropic"), built.lengths)
    assert desk.at(5).claude("sys:1000*5m, user:50") == (50, 0, 1000, 0)


def test_generation_counts_against_the_lifetime(desk: Desk) -> None:
    desk.claude("sys:1000*5m, user:50", begins_s=250)
    assert desk.at(301).claude("sys:1000*5m, user:50") == (50, 0, 1000, 0)


def test_results_of_server_tools_are_breakpoints_of_their_own(desk: Desk) -> None:
    assert desk.claude("sys:1000*1h, user:50, search:700, a:10") == (10, 0, 750, 1000)
    assert desk.claude("sys:1000, user:50, search:700, a:10") == (1760, 0, 0, 0)


@pytest.mark.parametrize(
    ("turn", "fields", "expected"),
    [
        ("sys:1000*5m, user:50", {}, None),
        ("sys:1000*5m, user:50, a:10, user:20", {}, None),
        ("sys:1001*5m, user:50", {}, "system_changed"),
        ("tool:10, sys:1001*5m, user:50", {}, "tools_changed"),
        ("sys:1000*5m, user:50", {"model": "claude-opus-5-5"}, "model_changed"),
        ("sys:1000*5m, user:51", {}, "messages_changed"),
        ("sys:1000*5m", {}, "messages_changed"),
        ("sys:1000*5m, user:50", {"salts": {"tool_choice": "none"}}, "unavailable"),
        ("sys:1000*5m, user:50", {"salts": {"speed": "fast"}}, "model_changed"),
    ],
)
def test_v22_diagnostics_name_the_first_thing_that_differs(
    desk: Desk, turn: str, fields: dict[str, Any], expected: str | None
) -> None:
    first = desk.ask("sys:1000*5m, user:50", diagnose=True, name="msg_1")
    assert first.diagnosis is None
    second = desk.ask(turn, diagnose=True, previous_id="msg_1", **fields)
    if expected is None:
        assert second.diagnosis is None
        return
    assert second.diagnosis is not None
    assert second.diagnosis.reason == expected
    assert (second.diagnosis.missed_tokens > 0) == (expected != "unavailable")


def test_v22_an_answer_that_is_not_known_is_said_so(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:50", name="msg_1")  # did not ask for diagnostics, so it was not kept
    for previous in ("msg_1", "msg_2"):
        charge = desk.ask("sys:1000*5m, user:50", diagnose=True, previous_id=previous)
        assert charge.diagnosis is not None
        assert charge.diagnosis.reason == "previous_message_not_found"


# -- OpenAI, classic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "cached"), [(1023, 0), (2006, 1920)])
def test_v23_v24_classic_reads_whole_steps_above_the_minimum(desk: Desk, tokens: int, cached: int) -> None:
    assert desk.classic(f"user:{tokens}") == 0
    assert desk.classic(f"user:{tokens}") == cached


@pytest.mark.parametrize(("common", "cached"), [(1200, 1152), (1000, 0)])
def test_v25_v26_classic_compares_tokens_not_blocks(desk: Desk, common: int, cached: int) -> None:
    for name, seen in (("one", 0), ("two", cached)):
        tokens = [*range(common), *([ord(name[0])] * (1500 - common))]
        lengths = Lengths(ends=(1500,), total=1500, steps=steps(tokens))
        assert desk.classic(f"user:1500={name}", lengths=lengths) == seen


def test_v27_what_stands_before_the_change_stays_readable(desk: Desk) -> None:
    desk.classic("tool:700, tool:700, user:2000")
    assert desk.classic("tool:700, tool:700, user:2000") == 3328
    assert desk.classic("tool:700, tool:700, user:2000=other") == 1280
    desk = Desk()
    desk.classic("tool:700, tool:800, user:2000")
    assert desk.classic("tool:800, tool:700, user:2000") == 0
    assert desk.classic("tool:700, tool:800, user:2000", message_salt=b"schema") == 0


def test_classic_without_tokens_compares_blocks(desk: Desk) -> None:
    lengths = Lengths(ends=(1500, 2000), total=2000)
    assert desk.classic("user:1500, user:500=a", lengths=lengths) == 0
    assert desk.classic("user:1500, user:500=b", lengths=lengths) == 1408


def test_classic_entries_die_after_ten_idle_minutes_or_an_hour(desk: Desk) -> None:
    seen = [desk.at(t).classic("user:2006") for t in (0, 599, 1198, 1799)]
    assert seen == [0, 1920, 1920, 0]
    desk = Desk()
    seen = [desk.at(t).classic("user:2006") for t in range(0, 4200, 500)]
    assert seen == [0, 1920, 1920, 1920, 1920, 1920, 1920, 1920, 0]
    desk = Desk()
    assert [desk.at(t).classic("user:2006", retention="24h") for t in (0, 80_000)] == [0, 1920]


def test_the_generation_between_matches_every_2048_tokens(desk: Desk) -> None:
    desk.classic("user:5000", model="gpt-5.5")
    assert desk.classic("user:5000", model="gpt-5.5") == 4096


# -- OpenAI, breakpoints -----------------------------------------------------------------------------------------------


def test_v29_the_guides_example(desk: Desk) -> None:
    assert desk.gpt("dev:2000, user:10000") == (12000, 0, 12000)
    assert desk.gpt("dev:2000, user:10000, user:3000") == (15000, 12000, 3000)


def test_v30_the_same_message_made_longer_is_a_miss(desk: Desk) -> None:
    assert desk.gpt("user:2000") == (2000, 0, 2000)
    charge = desk.ask("user:2000, &user:1000", dialect="openai", model=SOL)
    assert charge.usage.written == {"30m": 3000}
    assert charge.miss is not None
    assert charge.miss.reason == "out_of_window"


def test_v31_explicit_mode_without_marks_caches_nothing(desk: Desk) -> None:
    for _ in range(2):
        assert desk.gpt("dev:2000, user:500", mode="explicit") == (2500, 0, 0)


def test_v32_explicit_mode_writes_up_to_its_mark(desk: Desk) -> None:
    assert desk.gpt("dev:2000*30m, user:500", mode="explicit") == (2500, 0, 2000)
    assert desk.gpt("dev:2000*30m, user:700", mode="explicit") == (2700, 2000, 0)


def test_v33_thirty_minutes_since_the_last_use(desk: Desk) -> None:
    seen = [desk.at(t).gpt("user:2000")[1] for t in (0, 1799, 3598, 5399)]
    assert seen == [0, 2000, 2000, 0]


def test_v34_below_the_minimum_nothing_is_written(desk: Desk) -> None:
    for _ in range(2):
        assert desk.gpt("user:1023") == (1023, 0, 0)


def test_v35_of_more_than_four_marks_the_latest_four_are_written(desk: Desk) -> None:
    six = ", ".join(f"user:2000*30m={i}" for i in range(6))
    charge = desk.ask(six, dialect="openai", model=SOL, mode="explicit")
    assert [write.tokens for write in charge.writes] == [6000, 8000, 10000, 12000]


def test_implicit_then_explicit_misses_unless_a_mark_is_on_the_same_boundary(desk: Desk) -> None:
    desk.gpt("dev:2000, user:1000")
    assert desk.gpt("dev:2000*30m, user:1000, user:500", mode="explicit") == (3500, 0, 2000)
    assert desk.gpt("dev:2000, user:1000*30m, user:500", mode="explicit") == (3500, 3000, 0)


def test_a_cache_key_separates(desk: Desk) -> None:
    desk.gpt("user:2000", cache_key="a")
    charge = desk.ask("user:2000", dialect="openai", model=SOL, cache_key="b")
    assert charge.usage.read == 0
    assert charge.miss is not None
    assert charge.miss.reason == "cache_key"
    assert desk.gpt("user:2000", cache_key="a") == (2000, 2000, 0)


def test_twelve_hours_are_billed_apart(desk: Desk) -> None:
    charge = desk.ask("dev:2000*12h, user:1000", dialect="openai", model=SOL)
    assert charge.usage.written == {"12h": 2000, "30m": 1000}
    desk.at(3600)
    assert desk.gpt("dev:2000*12h, user:900") == (2900, 2000, 900)


@pytest.mark.parametrize(
    ("notation", "fields", "reason"),
    [
        ("dev:2000, user:500, user:10", {}, None),
        ("dev:2000, user:501", {}, "input_changed"),
        ("tool:10, dev:2000, user:500", {}, "tools_changed"),
        ("dev:2000, user:500", {"cache_key": "k"}, "prompt_cache_key_changed"),
        ("dev:2000, user:500", {"model": "gpt-6-sol"}, "model_changed"),
        ("dev:2000, user:500", {"message_salt": b"x", "salts": {"effort": "high"}}, "reasoning_effort_changed"),
        ("dev:2000, user:500", {"message_salt": b"x", "salts": {"format": "json"}}, "text_format_changed"),
    ],
)
def test_comparisons_in_openais_words(desk: Desk, notation: str, fields: dict[str, Any], reason: str | None) -> None:
    desk.gpt("dev:2000, user:500", name="resp_1")
    charge = desk.ask(notation, **{"dialect": "openai", "model": SOL, "diagnose": True, "previous_id": "resp_1", **fields})
    if reason is None:
        assert charge.diagnosis is None
        assert charge.usage.read == 2500
        return
    assert charge.diagnosis is not None
    assert charge.diagnosis.reason == reason
    assert charge.diagnosis.missed_tokens > 0
    assert charge.diagnosis.reusable_tokens == 2500


# -- promises and the engine -------------------------------------------------------------------------------------------


def test_a_read_that_was_recomputed_is_reported_as_a_miss(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:600*5m")
    charge = desk.ask("sys:1000*5m, user:600*5m, user:10")
    assert charge.usage.read == 1600
    assert desk.books.settle(charge, 1584, 16) is charge  # whole blocks
    settled = desk.books.settle(charge, 1008, 16)
    assert (settled.usage.plain, settled.usage.read, settled.usage.written) == (10, 1000, {"5m": 600})
    assert settled.miss is not None
    assert (settled.miss.reason, settled.miss.lost_tokens) == ("recomputed", 600)
    assert desk.books.settle(charge, 0, 16).usage.written == {"5m": 1600}
    assert desk.books.stats.broken == 2


def test_what_was_written_again_lives_as_long_as_was_paid_for(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:50")
    built = prompt("sys:1000*1h, user:50")
    charge = desk.at(100).books.charge(ALICE, built.prompt, profiles.find(CLAUDE, "anthropic"), built.lengths)
    desk.books.visible(desk.books.settle(charge, 0, 16))
    assert desk.at(3000).claude("sys:1000*1h, user:50") == (50, 1000, 0, 0)


def test_classic_entries_are_no_promises(desk: Desk) -> None:
    charge = desk.ask("user:2006", dialect="openai", model="gpt-4.1")
    assert charge.keep == ()
    assert desk.books.protected(ALICE) == ()


def test_a_classic_read_shrinks_to_what_was_reused(desk: Desk) -> None:
    desk.classic("user:2006")
    charge = desk.ask("user:2006", dialect="openai", model="gpt-4.1")
    assert desk.books.settle(charge, 1904, 16) is charge
    assert desk.books.settle(charge, 1500, 16).usage.read == 1408
    assert desk.books.settle(charge, 512, 16).usage.read == 0


def test_beyond_the_quota_the_promise_used_longest_ago_is_dropped_and_counted() -> None:
    desk = Desk(quota_tokens=2500)
    desk.ask("sys:1000*5m=a, user:1")
    desk.ask("sys:1000*5m=b, user:1")
    desk.ask("sys:1000*5m=a, user:1")  # used again
    desk.ask("sys:1200*5m=c, user:1")
    assert [promise.tokens for promise in desk.books.protected(ALICE)] == [1000, 1200]
    assert desk.books.stats.dropped == 1
    assert desk.claude("sys:1000*5m=b, user:1") == (1, 1000, 0, 0)  # the account still stands
    assert desk.books.protected(BOB) == ()
    desk.at(301)
    assert desk.books.protected(ALICE) == ()


def test_nested_promises_count_their_common_tokens_once() -> None:
    desk = Desk(quota_tokens=1700)
    desk.ask("sys:1000*5m, user:600*5m")
    assert [promise.tokens for promise in desk.books.protected(ALICE)] == [1000, 1600]
    assert desk.books.stats.protected_tokens == 1600


def test_pins_say_what_to_keep_and_how_long(desk: Desk) -> None:
    assert desk.at(10).ask("sys:1000*1h, user:600*5m, user:1").keep == (Keep(1000, 3600.0), Keep(1600, 300.0))


def test_the_books_are_bounded() -> None:
    desk = Desk(max_entries=10)
    for i in range(30):
        desk.ask(f"sys:1000*5m={i}, user:1")
    assert (desk.books.stats.entries, desk.books.stats.evicted) == (10, 20)


def test_of_full_books_what_was_used_longest_ago_leaves_first() -> None:
    desk = Desk(max_entries=2)
    for name in "abac":
        desk.ask(f"sys:1000*5m={name}, user:1")
    assert desk.claude("sys:1000*5m=a, user:1") == (1, 1000, 0, 0)


def test_dead_entries_leave_by_themselves(desk: Desk) -> None:
    desk.ask("sys:1000*5m=a, user:1")
    desk.at(4000).ask("sys:1000*5m=b, user:1")
    assert (desk.books.stats.entries, desk.books.stats.evicted) == (1, 0)


def test_forgetting_a_tenant_leaves_nothing_of_it(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:1", diagnose=True, name="msg_1")
    desk.ask("sys:1000*5m, user:1", tenant=BOB)
    assert desk.books.forget(Scope(tenant=ALICE)) == 1
    charge = desk.ask("sys:1000*5m, user:1", diagnose=True, previous_id="msg_1")
    assert charge.usage.read == 0
    assert charge.diagnosis is not None
    assert charge.diagnosis.reason == "previous_message_not_found"
    assert charge.miss is not None
    assert charge.miss.reason == "first"
    assert desk.claude("sys:1000*5m, user:1", tenant=BOB) == (1, 1000, 0, 0)


def test_a_request_under_way_brings_nothing_forgotten_back(desk: Desk) -> None:
    built = prompt("sys:1000*5m, user:50", diagnose=True)
    charge = desk.books.charge(ALICE, built.prompt, profiles.find(CLAUDE, "anthropic"), built.lengths)
    desk.books.forget(Scope(tenant=ALICE))
    desk.books.visible(charge)
    desk.books.name(charge, "msg_1")
    assert desk.books.stats.entries == 0
    again = desk.ask("sys:1000*5m, user:50", diagnose=True, previous_id="msg_1")
    assert again.diagnosis is not None
    assert again.diagnosis.reason == "previous_message_not_found"


def test_forgetting_a_model_leaves_the_others(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:1")
    desk.ask("sys:1000*5m, user:1", model="claude-opus-5-5")
    assert desk.books.forget(Scope(model=CLAUDE)) == 1
    assert desk.claude("sys:1000*5m, user:1") == (1, 0, 1000, 0)
    assert desk.claude("sys:1000*5m, user:1", model="claude-opus-5-5") == (1, 1000, 0, 0)


# -- why it missed -----------------------------------------------------------------------------------------------------


def reason(charge: Charge) -> str | None:
    return None if charge.miss is None else charge.miss.reason


def test_the_reason_of_a_miss_is_the_place_where_the_prompt_parts(desk: Desk) -> None:
    first = desk.ask("sys:20=09:00, sys:1000*5m, user:50", name="msg_1")
    assert reason(first) == "first"
    second = desk.at(7).ask("sys:20=09:07, sys:1000*5m, user:50")
    assert second.miss is not None
    assert (second.miss.reason, second.miss.path) == ("changed", "system.0")
    assert (second.miss.lost_tokens, second.miss.earlier_id, second.miss.earlier_s) == (1020, "msg_1", 0.0)


def test_a_chat_that_goes_on_has_missed_nothing(desk: Desk) -> None:
    desk.ask("sys:1000, user:50", automatic="5m")
    assert reason(desk.ask("sys:1000, user:50, a:20, user:50", automatic="5m")) is None


def test_who_reads_up_to_its_own_last_mark_has_missed_nothing(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:50*5m")
    assert reason(desk.ask("sys:1000*5m, user:50")) is None


def test_an_answer_that_never_began_is_no_change_of_the_prompt(desk: Desk) -> None:
    built = prompt("sys:1000*5m, user:50")
    desk.books.charge(ALICE, built.prompt, profiles.find(CLAUDE, "anthropic"), built.lengths)
    assert reason(desk.ask("sys:1000*5m, user:60")) == "no_boundary"


def test_other_reasons_have_other_names(desk: Desk) -> None:
    desk.ask("sys:1000*5m, user:50")
    assert reason(desk.ask("sys:1000*5m, user:50", model="claude-opus-5-5")) == "model"
    assert reason(desk.ask("sys:1000, " + users(25) + ", user:10*5m")) == "out_of_window"
    assert reason(desk.at(301).ask("sys:1000*5m, user:50")) == "expired"
    desk = Desk()
    desk.ask("sys:1000, user:50")
    assert reason(desk.ask("sys:1000*5m, user:50")) == "no_boundary"


# -- always ------------------------------------------------------------------------------------------------------------

LIVES: list[TTL | None] = [None, "5m", "1h"]
WORDS = st.sampled_from(["user", "a", "use", "result", "think", "image"])


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, int, TTL | None, str]]:
    head = [("tool", draw(st.integers(0, 900)), draw(st.sampled_from(LIVES)), "") for _ in range(draw(st.integers(0, 2)))]
    head += [("sys", draw(st.integers(0, 1500)), draw(st.sampled_from(LIVES)), "")]
    turns = st.tuples(WORDS, st.integers(0, 700), st.sampled_from(LIVES), st.sampled_from(["", "x"]))
    return head + draw(st.lists(turns, max_size=12))


def spell(items: list[tuple[str, int, TTL | None, str]], *, marks: bool = True) -> str:
    return ", ".join(
        f"{word}:{tokens}" + (f"*{ttl}" if ttl and marks and word != "think" else "") + (f"={name}" if name else "")
        for word, tokens, ttl, name in items
    )


@given(st.lists(conversations(), min_size=1, max_size=5), st.lists(st.integers(0, 4000), min_size=5, max_size=5))
def test_the_parts_always_add_up_and_nothing_is_read_that_was_not_written(
    talks: list[list[tuple[str, int, TTL | None, str]]], gaps: list[int]
) -> None:
    desk, now, longest = Desk(), 0, 0
    for talk, gap in zip(talks, gaps, strict=False):
        now += gap
        charge = desk.at(now).ask(spell(talk))  # asserts the sum
        assert charge.usage.read <= longest
        assert charge.usage.plain >= 0
        longest = max([longest, *(write.tokens for write in charge.writes)])


@given(conversations(), conversations())
def test_another_tenant_workspace_or_model_never_reads(
    one: list[tuple[str, int, TTL | None, str]], two: list[tuple[str, int, TTL | None, str]]
) -> None:
    desk = Desk()
    for talk in (one, two):
        desk.ask(spell(talk))
    for stranger in ({"tenant": BOB}, {"workspace": "w"}, {"model": "claude-opus-5-5"}):
        assert desk.ask(spell(one), **stranger).usage.read == 0


@given(conversations(), st.integers(0, 4000))
def test_a_longer_lifetime_never_reads_less(talk: list[tuple[str, int, TTL | None, str]], gap: int) -> None:
    reads = []
    for life in LIVES[1:]:
        desk = Desk()
        same = spell([(word, tokens, life if ttl else None, name) for word, tokens, ttl, name in talk])
        desk.ask(same)
        reads.append(desk.at(gap).ask(same).usage.read)
    assert reads[0] <= reads[1]


@given(conversations())
def test_the_same_request_again_reads_all_it_wrote(talk: list[tuple[str, int, TTL | None, str]]) -> None:
    desk = Desk()
    first = desk.ask(spell(talk)).usage
    second = desk.at(1).ask(spell(talk)).usage
    assert second.read == sum(first.written.values())
    assert second.written == {}


@given(conversations(), st.integers(0, 8000), st.integers(1, 64))
def test_a_settled_read_is_never_more_than_was_reused_and_a_block(
    talk: list[tuple[str, int, TTL | None, str]], reused: int, block: int
) -> None:
    desk = Desk()
    desk.ask(spell(talk))
    charge = desk.ask(spell(talk))
    settled = desk.books.settle(charge, reused, block)
    assert settled.usage.read <= reused + block
    assert settled.usage.read <= charge.usage.read
    total = settled.usage.plain + settled.usage.read + sum(settled.usage.written.values())
    assert total == charge.lengths.total
