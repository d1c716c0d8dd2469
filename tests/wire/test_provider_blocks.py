"""What only Anthropic's own models can take: accepted by a server that stands for them, refused by any other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from anaphora.errors import InvalidRequest
from anaphora.keys import request_key
from anaphora.types import LOCAL_TENANT, MediaPart, ProviderPart, TextPart, ToolResultPart
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Parsed

Json = dict[str, Any]

M5: Json = {"cache_control": {"type": "ephemeral"}}
SEARCH: Json = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "anaphora"}}
FOUND: Json = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": [{"type": "web_search_result", "url": "https://example.org", "title": "t", "encrypted_content": "e"}],
}
CITED: Json = {
    "type": "text",
    "text": "It is a figure of speech.",
    "citations": [{"type": "web_search_result_location", "url": "https://example.org", "cited_text": "a figure"}],
}
RESULT: Json = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]}
DOCUMENT: Json = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "d"},
    "citations": {"enabled": True},
}
IMAGE: Json = {"type": "image", "source": {"type": "url", "url": "u"}, "transformations": {"oversized_resize": "none"}}
CHUNKS: Json = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "x"}]}}
HIDDEN: Json = {"type": "redacted_thinking", "data": "x"}
UPLOAD: Json = {"type": "container_upload", "file_id": "file_1"}

ASSISTANTS = [SEARCH, FOUND, CITED, HIDDEN, {**SEARCH, "type": "mcp_tool_use"}, {**FOUND, "type": "code_execution_tool_result"}]
USERS = [RESULT, DOCUMENT, IMAGE, CHUNKS, UPLOAD]


def parse(*messages: Json, provider: bool = True, version: str = "2023-06-01", **more: Any) -> Parsed:
    body = {"model": "claude-opus-5", "max_tokens": 1, "messages": list(messages), **more}
    return Anthropic(provider_blocks=provider).parse(msgspec.json.encode(body), tenant=LOCAL_TENANT, version=version)


def said(*blocks: Json) -> tuple[Json, Json]:
    return {"role": "user", "content": "?"}, {"role": "assistant", "content": list(blocks)}


def asked(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks)}


@pytest.mark.parametrize("block", ASSISTANTS, ids=lambda block: block["type"])
def test_blocks_of_the_assistant_are_kept_as_they_came(block: Json) -> None:
    parsed = parse(*said(block))
    part = parsed.request.messages[1].content[0]
    assert part == ProviderPart(block["type"], {name: value for name, value in block.items() if name != "type"})
    with pytest.raises(InvalidRequest, match=r"messages\.1\.content\.0\."):
        parse(*said(block), provider=False)


@pytest.mark.parametrize("block", USERS, ids=lambda block: block["type"])
def test_blocks_of_the_user_are_kept_as_they_came(block: Json) -> None:
    parsed = parse(asked(block))
    part = parsed.request.messages[0].content[0]
    assert part == ProviderPart(block["type"], {name: value for name, value in block.items() if name != "type"})
    with pytest.raises(InvalidRequest, match=r"messages\.0\.content\.0\."):
        parse(asked(block), provider=False)


@pytest.mark.parametrize("kind", ["web_search_20260318", "bash_20250124", "browser_toolset_20260801", "tool_search_tool_bm25"])
def test_tools_of_the_provider_are_kept_as_they_came(kind: str) -> None:
    tool = {"type": kind, "max_uses": 3, **({} if "toolset" in kind else {"name": "it"})}
    (found,) = parse(asked(CITED | {"citations": None}), tools=[tool]).request.tools
    assert (found.kind, found.name, found.extra) == (kind, tool.get("name", kind), {"max_uses": 3})
    with pytest.raises(InvalidRequest, match=r"tools\.0\.type: Input tag"):
        parse(asked(), tools=[tool], provider=False)


def test_a_mark_is_checked_and_leaves_no_trace_in_the_question() -> None:
    plain, marked = parse(*said(SEARCH, FOUND)), parse(*said(SEARCH, {**FOUND, **M5}))
    keys = [request_key(parsed.request, fingerprint="f") for parsed in (plain, marked)]
    assert keys[0] == keys[1]
    assert [block.mark for block in marked.prompt.blocks] == [None, None, "5m"]
    with pytest.raises(InvalidRequest, match="does not match any of the expected tags: 'ephemeral'"):
        parse(*said({**FOUND, "cache_control": {"type": "persistent"}}))
    with pytest.raises(InvalidRequest, match=r"redacted_thinking\.cache_control: Extra inputs are not permitted"):
        parse(*said({**HIDDEN, **M5}))


def test_other_content_is_another_question() -> None:
    one, other = (parse(*said(SEARCH, {**FOUND, "content": content})) for content in ([], [{"type": "x"}]))
    assert request_key(one.request, fingerprint="f") != request_key(other.request, fingerprint="f")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (asked(SEARCH), "cannot be in messages of role 'user'"),
        ({"role": "assistant", "content": [RESULT]}, "cannot be in messages of role 'assistant'"),
        ({"role": "assistant", "content": [{**SEARCH, "id": ""}]}, r"content\.0\.id: must not be empty"),
        ({"role": "assistant", "content": [{**FOUND, "content": None}]}, r"content\.0\.content: Field required"),
        (asked({**RESULT, "citations": {"on": True}}), r"citations\.on: Extra inputs are not permitted"),
        (asked({"type": "hologram"}), "Input tag 'hologram' is not supported here"),
    ],
)
def test_what_anthropic_refuses_is_refused(message: Json, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse(message)


def test_a_users_text_cites_nothing_in_the_latest_version() -> None:
    assert isinstance(parse(asked(CITED)).request.messages[0].content[0], ProviderPart)
    with pytest.raises(InvalidRequest, match=r"content\.0\.citations"):
        parse(asked(CITED), version="2026-10-21")


def test_empty_citations_say_nothing() -> None:
    (message,) = parse(asked({"type": "text", "text": "x", "citations": []})).request.messages
    assert message.content == (TextPart("x"),)
    (message,) = parse(asked({**DOCUMENT, "citations": {"enabled": False}})).request.messages
    assert isinstance(message.content[0], MediaPart)


def test_a_tools_result_may_hold_search_results() -> None:
    call = {"type": "tool_use", "id": "t", "name": "n", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [RESULT, {"type": "tool_reference", "tool_name": "x"}]}
    part = parse(*said(call), asked(result)).request.messages[2].content[0]
    assert isinstance(part, ToolResultPart)
    assert [inner.kind for inner in part.content if isinstance(inner, ProviderPart)] == ["search_result", "tool_reference"]


def test_instructions_may_follow_a_server_tool() -> None:
    instructions = {"role": "system", "content": "Now be brief."}
    assert parse(*said(SEARCH, FOUND), instructions).request.messages[-1].role == "system"
    with pytest.raises(InvalidRequest, match="must follow a user message"):
        parse(*said({"type": "text", "text": "x"}), instructions)
