"""What the linter can say: one row per code, and a finding as a value. Codes are stable: people write them into their CI."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["warning", "error"]
"""error: the provider refuses the request with 400. warning: it answers, and costs more than it had to."""


class Rule(msgspec.Struct, frozen=True):
    code: str
    title: str
    fix: str
    severity: Severity = "warning"


RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            "timestamp",
            "a date or time inside the prefix changes",
            "Take the time out of the prefix: put it behind the last breakpoint, at the end of the last user message.",
        ),
        Rule(
            "uuid",
            "a UUID inside the prefix changes",
            "Keep generated ids out of the prompt, or send them behind the last breakpoint.",
        ),
        Rule(
            "request-id",
            "a request id or a run of hex digits inside the prefix changes",
            "Keep request, trace and call ids out of the prompt, and replay those in the history as they first were.",
        ),
        Rule(
            "user-field",
            "a field of the user or session stands inside the shared prefix",
            "Put what belongs to one user or session behind the shared instructions, in the first user message.",
        ),
        Rule(
            "volatile-value",
            "a value inside the prefix changes with every request",
            "Move the line with the changing value to the end of the last user message.",
        ),
        Rule(
            "json-key-order",
            "the same JSON object is written with its keys in another order",
            "Serialise with a fixed order of keys (`sort_keys=True`, ordered maps).",
        ),
        Rule("tool-order", "the same tools stand in another order", "Sort the tools by name before sending them."),
        Rule(
            "tool-set-changed",
            "tools were added or removed in the middle of a conversation",
            "Send the same tools in every request; restrict them by allowed tools, or load them by tool search.",
        ),
        Rule(
            "tool-schema-drift",
            "the definition of a tool changes between requests",
            "Build each tool definition once and send it unchanged.",
        ),
        Rule(
            "line-endings", "line endings change between CRLF and LF", "Normalise line endings to LF when the prompt is loaded."
        ),
        Rule("whitespace-drift", "only white space differs", "Strip and join the parts of the prompt the same way every time."),
        Rule("unicode-drift", "the same text comes in another Unicode normal form", "Normalise text to NFC before sending it."),
        Rule(
            "few-shot-shuffle",
            "the same examples or parts come in another order",
            "Keep the order of examples fixed, for instance sorted by id.",
        ),
        Rule(
            "system-changed",
            "the system prompt is edited in the middle of a conversation",
            "Keep the system prompt fixed; append what is new as a message.",
        ),
        Rule(
            "instructions-dropped",
            "`instructions` are not sent again with `previous_response_id`, which does not carry them over",
            "Send the same `instructions` (and tools) with every request of the chain.",
        ),
        Rule(
            "image-presence",
            "images are present in one request and absent in the other",
            "Keep images in the history once they are there, or send them to a conversation of their own.",
        ),
        Rule(
            "image-reencoded",
            "an image in the history is sent with other bytes or another URL",
            "Encode each image once, keep the bytes (or an unsigned, stable URL), and send the same again.",
        ),
        Rule(
            "tool-choice-changed",
            "`tool_choice` changes between requests",
            "Keep `tool_choice` the same through a conversation; ask for a tool in the last message instead.",
        ),
        Rule(
            "parallel-calls-changed",
            "the switch for parallel tool calls changes between requests",
            "Keep the switch for parallel tool calls the same through a conversation.",
        ),
        Rule("effort-changed", "the effort changes between requests", "Keep the effort the same through a conversation."),
        Rule(
            "thinking-changed",
            "the thinking settings change between requests",
            "Keep thinking on (with one budget) or off for the whole conversation.",
        ),
        Rule(
            "format-changed",
            "the response format or verbosity changes between requests",
            "Use one response format through a conversation, or ask for the final format in a conversation of its own.",
        ),
        Rule(
            "server-tools-changed",
            "web search, web fetch or citations are switched between requests",
            "Decide once per conversation whether these are on.",
        ),
        Rule(
            "model-changed",
            "the conversation moves to another model",
            "Stay on one model within a conversation; caches are never shared between models.",
        ),
        Rule(
            "tier-changed",
            "the service tier or speed changes between requests",
            "Stay on one service tier and speed within a conversation.",
        ),
        Rule(
            "cache-key-changed",
            "`prompt_cache_key` changes within a conversation",
            "Use one `prompt_cache_key` per conversation or per shared prefix.",
        ),
        Rule(
            "history-edited",
            "an earlier message is changed or something is put before it",
            "Only append to the history; when it must be cut, compact it rarely and by a lot.",
        ),
        Rule(
            "history-dropped",
            "earlier messages are dropped while later ones stay",
            "Do not slide the window on every turn: let the history grow, then compact it once.",
        ),
        Rule(
            "mark-on-varying-block",
            "the breakpoint stands on a block that differs in every request",
            "Move the breakpoint to the last block that stays the same.",
        ),
        Rule(
            "prefix-too-short",
            "the marked prefix is shorter than the model's minimum, so nothing is cached",
            "Move the breakpoint behind more of the stable content, or drop it.",
        ),
        Rule(
            "too-many-marks",
            "more than four breakpoints",
            "Keep at most four: tools, system, the end of shared context, the last turn (automatic caching takes one of them).",
            "error",
        ),
        Rule(
            "ttl-order",
            "a 1h breakpoint comes after a 5m one",
            "Put the 1h breakpoints before the 5m ones, in the order tools, system, messages.",
            "error",
        ),
        Rule(
            "lookback-jump",
            "the breakpoint is more than 20 positions behind the last written one",
            "Add a breakpoint in between (every 15 blocks or so of a long turn), or keep the earlier one.",
        ),
        Rule(
            "no-breakpoint",
            "a shared prefix is sent again without any breakpoint, so nothing is cached",
            "Add `cache_control` at the top level, or on the last system block and the last message.",
        ),
        Rule(
            "same-message-extended",
            "the last user message is sent again with more text in it, so its old end is no boundary any more",
            "Send what is new as a message of its own, or put an explicit breakpoint at the end of what was there.",
        ),
        Rule(
            "implicit-to-explicit",
            "the conversation moves to explicit breakpoints, away from where the implicit one was written",
            "Use one mode through a conversation, or put an explicit breakpoint on the same boundary first.",
        ),
        Rule(
            "gap-over-ttl",
            "the entry had expired when the request came",
            "Use the longer TTL for this prefix; it pays from the second read on.",
        ),
        Rule(
            "parallel-cold-start",
            "several requests with the same new prefix start together, and each pays for writing it",
            "Send one, wait for its first token, then send the others.",
        ),
        Rule(
            "key-over-rate",
            "more than 15 requests a minute for one prefix and key overflow to other machines",
            "Divide the traffic over several `prompt_cache_key` values, always the same one for the same conversation.",
        ),
    )
}


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One cause in one session, however often it struck."""

    code: str
    severity: Severity
    session: str
    file: str
    line: int
    """Of the first request it struck; counted from 1."""
    against_line: int | None
    """The earlier request it was compared with, in `against_file`."""
    path: str
    """Where in the body, in the dialect's own style."""
    offset: int | None
    """Characters from the start of the string (or of the compact JSON) at `path`."""
    before: str
    after: str
    lost_tokens: int
    """Over all occurrences, by the estimate the report names."""
    lost_usd: float | None
    """None: no price is known for the model."""
    occurrences: int
    message: str
    fix: str
    against_file: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"
