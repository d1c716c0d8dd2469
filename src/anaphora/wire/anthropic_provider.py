"""What only Anthropic's own models can take: what their server tools did, search results, citations, hidden thinking.

A server that stands for those models accepts them and keeps each block as it came, unread; for any other they are refused.
"""

from __future__ import annotations

from anaphora.types import ProviderPart, Role, Tool
from anaphora.wire.anthropic_prompt import check_mark
from anaphora.wire.base import tool_extra
from anaphora.wire.fields import (
    FieldError,
    Json,
    bad_value,
    list_,
    named,
    object_,
    opt_bool,
    opt_list,
    opt_object,
    opt_string,
    string,
)

_USER = ("search_result", "container_upload")
_ASSISTANT = ("server_tool_use", "mcp_tool_use", "redacted_thinking", "compaction", "fallback")
RESULT_PARTS = ("search_result", "tool_reference", "browser_state")
"""Kinds that may stand inside the result of a tool."""


def is_provider_block(kind: str) -> bool:
    return kind in _USER or kind in _ASSISTANT or is_server_result(kind)


def is_server_result(kind: str) -> bool:
    """What a tool of the provider's answered, within the assistant's turn."""
    return kind.endswith("_tool_result")


def provider_block(block: Json, kind: str, role: Role) -> ProviderPart:
    """One block of a message. Its place and what every block of its kind must have are checked, the rest is kept."""
    place: Role = "user" if kind in _USER else "assistant"
    if role != place:
        raise bad_value(f"`{kind}` blocks cannot be in messages of role '{role}'", "type")
    if kind in ("server_tool_use", "mcp_tool_use"):
        named(block, "id")
        named(block, "name")
        object_(block, "input")
    elif kind == "redacted_thinking":
        if block.get("cache_control") is not None:
            raise FieldError("unknown", "redacted_thinking", "cache_control")
        string(block, "data")
    elif is_server_result(kind):
        named(block, "tool_use_id")
        if block.get("content") is None:
            raise FieldError("missing", "content")
    elif kind == "search_result":
        named(block, "source")
        string(block, "title")
        list_(block, "content")
        check_citations(block)
    elif kind == "container_upload":
        named(block, "file_id")
    return opaque(block, kind)


def opaque(block: Json, kind: str) -> ProviderPart:
    """`block` as it is, without its mark."""
    check_mark(block)
    body = {name: value for name, value in block.items() if name not in ("cache_control", "type") and value is not None}
    return ProviderPart(kind, body)


def check_citations(block: Json) -> bool:
    """Whether answers shall cite this block."""
    citations = opt_object(block, "citations") or {}
    try:
        for name, value in citations.items():
            if name != "enabled" and value is not None:
                raise FieldError("unknown", name)
        return opt_bool(citations, "enabled", False)
    except FieldError as error:
        error.under("citations")
        raise


def cited_text(block: Json, role: Role, *, strict: bool) -> ProviderPart | None:
    """A text block that cites, as answers with citations have them; None where it does not."""
    if not opt_list(block, "citations"):
        return None
    if role == "user" and strict:
        raise bad_value("citations are not permitted in messages of role 'user'", "citations")
    string(block, "text")
    return opaque(block, "text")


def provider_tool(tool: Json, kind: str) -> Tool:
    """A tool, or a set of them, that the provider defines and mostly runs itself."""
    check_mark(tool)
    return Tool(name=opt_string(tool, "name") or kind, kind=kind, extra=tool_extra(tool, _TOOL_FIELDS))


_TOOL_FIELDS = frozenset({"type", "name", "cache_control"})
