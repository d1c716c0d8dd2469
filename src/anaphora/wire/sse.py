"""Server-sent events: framing of one event, nothing else."""

from __future__ import annotations

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
"""How OpenAI's older streams end."""


def line(text: bytes) -> bytes:
    """JSON made safe for one line: some clients (httpx `iter_lines`) also break lines at U+0085, U+2028 and U+2029."""
    if text.isascii():
        return text
    return text.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")


def data(payload: bytes) -> bytes:
    """An event without a name. `payload` is JSON."""
    return b"data: %b\n\n" % line(payload)


def event(name: bytes, payload: bytes) -> bytes:
    """A named event. Anthropic's SDK drops events without a name, OpenAI's Responses clients read either."""
    return b"event: %b\ndata: %b\n\n" % (name, line(payload))
