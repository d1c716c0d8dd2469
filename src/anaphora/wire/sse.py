"""Server-sent events: framing of one event, nothing else."""

from __future__ import annotations

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
"""How OpenAI's older streams end."""


def data(payload: bytes) -> bytes:
    """An event without a name. `payload` is one line of JSON."""
    return b"data: %b\n\n" % payload


def event(name: bytes, payload: bytes) -> bytes:
    """A named event. Anthropic's SDK drops events without a name, OpenAI's Responses clients read either."""
    return b"event: %b\ndata: %b\n\n" % (name, payload)
