"""What a careful reader would call ordinary traffic is no finding."""

from __future__ import annotations

import copy
import random

import pytest
from tests.lint.sample import Line, bodies, chain, chat, report, responses, session


def codes(lines: list[Line]) -> list[str]:
    return [finding.code for finding in report(lines).findings]


@pytest.mark.parametrize("model", ["gpt-4.1", "gpt-5.5", "gpt-5.6-sol", "smollm2"])
def test_a_conversation_that_grows_is_clean_in_every_dialect(model: str) -> None:
    assert codes(session()) == codes(chat(model)) == codes(responses(model)) == []


def test_it_is_clean_without_session_ids_and_times() -> None:
    assert codes([{"request": body} for body in bodies(session())]) == []
    assert codes(bodies(session())) == []


def test_interleaved_conversations_of_one_program_are_clean() -> None:
    first, second = bodies(session()), bodies(session())
    for body in second:
        body["messages"][0]["content"][0]["text"] = "The night audit prints the city tax twice. Why?"
    mixed = [body for pair in zip(first, second, strict=True) for body in pair]
    assert codes(mixed) == []
    random.Random(7).shuffle(mixed)
    assert codes(sorted(mixed, key=lambda body: len(body["messages"]))) == []


def test_a_program_with_other_tools_and_instructions_in_the_same_session_is_clean() -> None:
    lines = session()
    title = copy.deepcopy(lines[4])
    title["request"]["tools"] = []
    title["request"]["system"] = [{"type": "text", "text": "Give this conversation a title of at most five words."}]
    assert codes([*lines[:5], title, *lines[5:]]) == []


def test_a_compaction_is_clean() -> None:
    lines = session()
    for line in lines:
        line["request"]["messages"][0]["content"][0]["text"] += " For context, the whole log of the night: " + "x = 1; " * 2000
    for line in lines[5:]:
        rest = line["request"]["messages"][7:]
        line["request"]["messages"] = [{"role": "user", "content": "Summary so far: nights() replaced the day."}, *rest]
    assert codes(lines) == []


def test_an_answer_asked_for_again_and_another_last_message_are_clean() -> None:
    lines = session()
    again = copy.deepcopy(lines[4])
    other = copy.deepcopy(lines[7])
    other["request"]["messages"][-1]["content"][0]["text"] = "Thanks, that is all."
    assert codes([*lines[:5], again, *lines[5:], other]) == []


def test_sampling_and_limits_may_change() -> None:
    lines = session()
    for number, body in enumerate(bodies(lines)):
        body |= {"max_tokens": 1000 + number, "temperature": number / 10, "stream": bool(number % 2), "metadata": {"n": number}}
    assert codes(lines) == []


def test_defaults_written_out_change_nothing() -> None:
    lines = session()
    bodies(lines)[5] |= {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}, "speed": "standard"}
    assert codes(lines) == []


def test_moving_marks_and_text_as_string_or_block_change_nothing() -> None:
    lines = session()
    body = bodies(lines)[6]
    body["messages"][0]["content"] = body["messages"][0]["content"][0]["text"]
    body["messages"][2]["content"][0]["cache_control"] = {"type": "ephemeral"}
    assert codes(lines) == []


def test_a_date_that_changes_when_everything_had_expired_anyway_is_clean() -> None:
    lines = session()
    for number, line in enumerate(lines):
        line["timestamp"] = 1_770_000_000 + 86_400 * number
        line["session"] = f"day-{number}"
        line["request"]["system"][0]["text"] += f"\nToday is 2026-03-{2 + number:02}."
    assert codes(lines) == []


def test_different_tenants_share_nothing_so_nothing_is_lost_between_them() -> None:
    lines = session()
    for number, line in enumerate(lines):
        line |= {"tenant": f"tenant-{number}", "session": f"session-{number}"}
        line["request"]["system"][0]["text"] += f"\nUser: {number}"
    assert codes(lines) == []


def test_short_prompts_are_clean_however_they_change() -> None:
    lines = session()[:3]
    for number, body in enumerate(bodies(lines)):
        body |= {"tools": [], "system": f"Now: 2026-03-02T09:{number:02}:00Z. Mend faults."}
    assert codes(lines) == []


def test_two_releases_of_one_prompt_are_clean() -> None:
    lines, others = session(), session()
    for line in others:
        line["session"] = "new release"
        system = line["request"]["system"][0]
        system["text"] = system["text"].replace("No apologies", "No excuses")
        line["request"]["messages"][0]["content"][0]["text"] = "The night audit prints the city tax twice. Why?"
    assert codes(lines + others) == []


def test_tool_results_cleared_once_to_make_room_are_clean() -> None:
    lines = session()[2:]
    for number, body in enumerate(bodies(lines)):
        body["messages"][2]["content"][0]["content"] = "a line of the log\n" * 3000 if number < 3 else "[cleared]"
    assert codes(lines) == []


def test_many_documents_after_one_short_instruction_are_clean() -> None:
    lines = session()[:6]
    for number, line in enumerate(lines):
        words = " ".join(f"word{number}{index}" for index in range(900))
        line["session"] = f"document-{number}"
        line["request"]["messages"][0]["content"][0]["text"] = f"Summarise document {number}: {words}"
    assert codes(lines) == []


@pytest.mark.parametrize("model", ["gpt-4.1", "gpt-5.6-sol"])
def test_a_chain_of_stored_answers_is_clean(model: str) -> None:
    lines = chain(model)
    assert codes(lines) == []
    for line in lines:
        del line["response"]
    assert codes(lines) == []


def test_another_agent_that_takes_over_a_chain_is_clean() -> None:
    lines = chain()
    for body in bodies(lines)[4:]:
        body["instructions"] = "You write release notes. Be brief, and say who is affected."
        body["tools"] = []
    assert codes(lines) == []


def test_two_chains_from_one_stored_answer_are_clean() -> None:
    lines, others = chain(), chain()
    for number, line in enumerate(others[4:], 4):
        line["response"] = {"id": f"branch_{number}"}
        line["request"]["previous_response_id"] = f"branch_{number - 1}" if number > 4 else "resp_3"
    assert codes([line for pair in zip(lines[4:], others[4:], strict=True) for line in pair]) == []
    assert codes([*lines, *others[4:]]) == []


def test_a_standing_last_message_behind_a_growing_history_is_clean() -> None:
    lines = session()
    for body in bodies(lines):
        body["messages"][-1]["content"][-1].pop("cache_control", None)
        body["messages"].append({"role": "user", "content": "What is left to do? Answer as JSON. " + "Be exact. " * 100})
    assert codes(lines[::2]) == []
