"""What of a client's request goes to a provider beside its meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anaphora.keys import request_key
from anaphora.server.passing import is_stored, native, with_native
from anaphora.types import Request

ASKED = Request(model="m")
BODY = b'{"model": "m"}'


def head(**headers: str) -> dict[bytes, bytes]:
    return {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}


def key(request: Request) -> bytes:
    return request_key(request, fingerprint="f")


def test_the_providers_own_headers_go_and_no_others() -> None:
    given = head(
        anthropic_beta="b",
        anthropic_version="2023-06-01",
        openai_organization="o",
        idempotency_key="i",
        x_session_id="s",
        accept="a",
        cookie="c",
        host="h",
        user_agent="u",
        x_anaphora_tag="t",
        x_forwarded_for="f",
    )
    found = native("anthropic", BODY, given, own_keys=True)
    assert found.headers == (
        ("anthropic-beta", "b"),
        ("anthropic-version", "2023-06-01"),
        ("idempotency-key", "i"),
        ("openai-organization", "o"),
        ("x-session-id", "s"),
    )
    assert found.credential is None


@pytest.mark.parametrize(
    ("given", "credential"),
    [
        (head(x_api_key="k"), ("x-api-key", "k")),
        (head(authorization="Bearer k"), ("authorization", "Bearer k")),
        (head(authorization="Bearer other", x_api_key="k"), ("x-api-key", "k")),
        (head(), None),
    ],
)
def test_a_clients_key_goes_in_the_header_it_came_in_unless_it_is_one_of_ours(
    given: dict[bytes, bytes], credential: tuple[str, str] | None
) -> None:
    assert native("anthropic", BODY, given, own_keys=False).credential == credential
    assert native("anthropic", BODY, given, own_keys=True).credential is None


def test_neither_a_key_nor_a_body_is_ever_shown() -> None:
    found = native("anthropic", b'{"secret words"}', head(x_api_key="secret key"), own_keys=False)
    assert "secret" not in repr(found)
    assert "secret" not in repr(with_native(ASKED, "anthropic", b"secret", head(x_api_key="secret key"), own_keys=False))


def test_only_headers_that_change_the_answer_are_another_question() -> None:
    def asked(**headers: str) -> bytes:
        return key(with_native(ASKED, "anthropic", BODY, head(**headers), own_keys=False))

    assert asked() == asked(anthropic_version="2023-06-01", x_session_id="s", x_api_key="k") == key(ASKED)
    betas = {asked(anthropic_beta="a"), asked(anthropic_beta="b"), asked(openai_beta="a"), asked()}
    assert len(betas) == 4


def test_the_body_itself_is_no_part_of_the_question() -> None:
    assert key(with_native(ASKED, "openai_chat", b'{"model": "m", "user": "me"}', {}, own_keys=True)) == key(ASKED)


@pytest.mark.parametrize(
    ("dialect", "fields", "stored"),
    [
        ("openai_responses", {}, True),
        ("openai_responses", {"store": True}, True),
        ("openai_responses", {"store": None}, True),
        ("openai_responses", {"store": False}, False),
        ("openai_chat", {}, False),
        ("openai_chat", {"store": True}, True),
        ("openai_chat", {"store": "yes"}, False),
        ("anthropic", {"store": True}, False),
    ],
)
def test_which_answers_the_provider_keeps(dialect: str, fields: dict[str, Any], stored: bool) -> None:
    assert is_stored(dialect, json.dumps({"model": "m", **fields}).encode()) is stored
    assert not is_stored(dialect, b"[]")


def test_it_is_known_whether_usage_of_a_stream_was_spoken_of() -> None:
    asked = json.dumps({"stream": True, "stream_options": {"include_usage": True}}).encode()
    assert native("openai_chat", asked, {}, own_keys=True).names_usage
    assert not native("openai_chat", BODY, {}, own_keys=True).names_usage
