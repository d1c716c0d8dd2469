"""One question to a running server, in either format, streamed: the answer, and what it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import msgspec

from anaphora.cli.connection import ServerProblem, check
from anaphora.clock import Clock, SystemClock

Write = Callable[[str], None]


class Turn(msgspec.Struct, frozen=True):
    """One answer, and what it took. Times are seconds since the question was sent."""

    text: str
    first_token_s: float | None
    """None where the answer has no text."""
    total_s: float
    prompt_tokens: int
    output_tokens: int
    reused_tokens: int
    """Prompt tokens whose KV was really reused, whatever `usage` says by a provider's rules; 0 of a hit."""
    cache_status: str
    """Without the cache's name, as in `fwd=miss; key="..."`; empty where the server sends none."""
    saved_s: float | None = None
    """What computing the answer had taken, of a hit."""

    @property
    def hit(self) -> bool:
        """Whether the answer was remembered, not computed."""
        return self.cache_status.partition(";")[0] == "hit"

    def summary(self) -> str:
        """One line: `first token 12 ms · 4,096 of 4,130 prompt tokens reused · 20 tokens in 0.51 s · cache: fwd=miss`."""
        first = "no token" if self.first_token_s is None else f"first token {self.first_token_s * 1000:,.0f} ms"
        return (
            f"{first} · {self.reused_tokens:,} of {self.prompt_tokens:,} prompt tokens reused · "
            f"{self.output_tokens:,} tokens in {self.total_s:.2f} s"
            + (f" · cache: {self.cache_status}" if self.cache_status else "")
        )


def ask_openai(client: httpx2.Client, body: dict[str, Any], write: Write, clock: Clock | None = None) -> Turn:
    """Over `/v1/chat/completions`, whose `body` this is; `write` gets the text as it comes. Raises ServerProblem."""
    stream = _Stream(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}, clock)
    usage: dict[str, Any] = {}
    for event in stream.events():
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            stream.take(choice["delta"].get("content"), write)
    return stream.turn(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def ask_anthropic(client: httpx2.Client, body: dict[str, Any], write: Write, clock: Clock | None = None) -> Turn:
    """Over `/v1/messages`, whose `body` this is; `write` gets the text as it comes. Raises ServerProblem."""
    stream = _Stream(client, "/v1/messages", body, clock)
    usage: dict[str, Any] = {}
    for event in stream.events():
        if event["type"] == "message_start":
            usage = event["message"]["usage"]
        elif event["type"] == "message_delta":
            usage = {**usage, **event["usage"]}
        elif event["type"] == "content_block_delta":
            stream.take(event["delta"].get("text"), write)
    prompt = sum(usage.get(name) or 0 for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
    return stream.turn(prompt, usage.get("output_tokens", 0))


class _Stream:
    """A streamed answer on its way: its events, its text, and its times."""

    def __init__(self, client: httpx2.Client, path: str, body: dict[str, Any], clock: Clock | None) -> None:
        self._client = client
        self._path = path
        self._body = {**body, "stream": True}
        self._clock = clock or SystemClock()
        self._started_s = self._clock.monotonic_s()
        self._first_token_s: float | None = None
        self._pieces: list[str] = []
        self._headers: httpx2.Headers

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON of each `data:` line, up to `[DONE]`. Raises ServerProblem where the answer is an error or breaks off."""
        with self._client.stream("POST", self._path, json=self._body, headers={"anthropic-version": "2023-06-01"}) as response:
            check(response)
            self._headers = response.headers
            for line in response.iter_lines():
                if line.startswith("data: [DONE]"):
                    return
                if not line.startswith("data:"):
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise ServerProblem(f"the answer was cut: {event['error'].get('message', event['error'])}")
                yield event

    def take(self, piece: str | None, write: Write) -> None:
        if not piece:
            return
        if self._first_token_s is None:
            self._first_token_s = self._elapsed_s()
        self._pieces.append(piece)
        write(piece)

    def turn(self, prompt_tokens: int, output_tokens: int) -> Turn:
        saved_ms = self._headers.get("x-anaphora-saved-ms")
        return Turn(
            text="".join(self._pieces),
            first_token_s=self._first_token_s,
            total_s=self._elapsed_s(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            reused_tokens=int(self._headers.get("x-anaphora-kv-reused-tokens", 0)),
            cache_status=self._headers.get("cache-status", "").partition(";")[2].strip(),
            saved_s=None if saved_ms is None else int(saved_ms) / 1000,
        )

    def _elapsed_s(self) -> float:
        return self._clock.monotonic_s() - self._started_s
