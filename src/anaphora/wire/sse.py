"""Server-sent events: framing, nothing else."""

from __future__ import annotations

import re
from typing import NamedTuple

from anaphora.errors import BackendFailed

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
"""How OpenAI's older streams end."""

MAX_EVENT_BYTES = 1 << 26
"""An upstream's event that is longer is no event: it would fill the memory."""


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


class Event(NamedTuple):
    raw: bytes
    """As it came, the empty line behind it included."""
    name: str
    data: bytes | None
    """None: nothing but comments."""


class Splitter:
    """Cuts a body into its events, however its chunks were cut. Every byte is looked at once.

    Lines end in LF, CRLF or CR, and in nothing else: U+2028 inside JSON is a letter.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._line = 0  # where the unfinished line begins
        self._scan = 0  # no line ends before here
        self._lone_cr = False  # so did the last line end
        self._fields = _Fields()
        self._first = True
        self.events: list[Event] = []
        """Those of the latest chunk. They are good even if `feed` raised for what came behind them."""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end in `chunk`. Raises BackendFailed for what is no event stream."""
        events = self.events = []
        whole = 0  # how much of the chunk is events of the usual form, as it nearly always is
        if not self._buffer and not self._lone_cr:
            while (usual := _USUAL(chunk, whole)) is not None:
                start, whole = whole, usual.end()
                name, data = usual.groups()
                events.append(Event(chunk[start:whole], "" if name is None else name.decode("ascii"), data))
                self._first = False
            if whole == len(chunk):
                return events
        self._buffer += chunk[whole:]
        taken = 0  # where the unfinished event begins
        while (found := _LINE_END.search(self._buffer, self._scan)) is not None:
            lone_cr = found.end() - found.start() == 1 and self._buffer[found.start()] == _CR
            if lone_cr and found.end() == len(self._buffer) and not self._lone_cr:
                self._scan = found.start()  # perhaps the first half of a CRLF
                break
            self._lone_cr = lone_cr
            text = bytes(self._buffer[self._line : found.start()])
            self._line = self._scan = found.end()
            if self._first:
                text = text.removeprefix(_BYTE_ORDER_MARK)
                self._first = False
            if text:
                self._fields.add(text)
            else:
                events.append(self._fields.event(bytes(self._buffer[taken : found.end()])))
                taken = found.end()
                self._fields = _Fields()
        else:
            self._scan = len(self._buffer)
        if taken:
            del self._buffer[:taken]
            self._line -= taken
            self._scan -= taken
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise BackendFailed(f"The upstream's stream is malformed: one event has more than {MAX_EVENT_BYTES} bytes.")
        return events


_LINE_END = re.compile(rb"\r\n|\n|\r")
_CR = ord("\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_USUAL = re.compile(rb"(?:event: ([ -~]*)\n)?data: ([^\r\n]*)\n\n").match
"""Nearly every event."""


class _Fields:
    """What the lines of one event say."""

    __slots__ = ("data", "name")

    def __init__(self) -> None:
        self.name = ""
        self.data: list[bytes] = []

    def add(self, text: bytes) -> None:
        field, _, value = text.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self.data.append(value)
        elif field == b"event":
            self.name = value.decode("utf-8", "replace")
        elif field not in (b"", b"id", b"retry"):
            raise BackendFailed(f"The upstream's stream is malformed: {field[:40]!r} is no field of an event.")

    def event(self, raw: bytes) -> Event:
        return Event(raw, self.name, b"\n".join(self.data) if self.data else None)
