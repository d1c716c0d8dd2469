"""What reached a test upstream, and what became of it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

import msgspec

Outcome = Literal["running", "finished", "fault", "left"]
"""`fault`: a fault ended or spoiled it. `left`: the client was gone before the end."""

_SECRET = frozenset({"authorization", "x-api-key", "api-key", "proxy-authorization", "cookie"})


class Record(msgspec.Struct):
    """One request. Times are seconds since it arrived."""

    number: int
    """From 1, in the order of arrival."""
    method: str
    path: str
    headers: dict[str, str]
    """Names in small letters. Of what is secret only that it was there: `***`."""
    auth: str
    """Which kinds of key came: "bearer", "x-api-key", "bearer x-api-key", or none."""
    model: str
    body: Any
    """JSON if it is, else text; None where there was none."""
    arrived_s: float
    """Unix time."""
    outcome: Outcome = "running"
    fault: str | None = None
    """The kind that was meant for it. An answer that was over sooner finished all the same."""
    status: int | None = None
    """None: no head of an answer went out."""
    num_events: int = 0
    """Of the stream that went out."""
    first_s: float | None = None
    """When the head of the answer went out."""
    left_s: float | None = None
    """When it was noticed that the client is gone."""
    over_s: float | None = None


class Records:
    """The latest `keep` requests, and how many ended in which way."""

    def __init__(self, keep: int) -> None:
        self._records: deque[Record] = deque(maxlen=keep)
        self._outcomes: Counter[str] = Counter()
        self._running: set[int] = set()
        self._num = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    def open(
        self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], model: str, body: bytes, now_s: float
    ) -> Record:
        self._num += 1
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        auth = ("bearer", "authorization"), ("x-api-key", "x-api-key")
        record = Record(
            self._num,
            method,
            path,
            {name: "***" if name in _SECRET else value for name, value in named.items()},
            " ".join(kind for kind, name in auth if name in named),
            model,
            _readable(body),
            now_s,
        )
        self._records.append(record)
        self._running.add(record.number)
        self._quiet.clear()
        return record

    def close(self, record: Record) -> None:
        """It is over, and its outcome is set."""
        self._outcomes[record.outcome] += 1
        self._running.discard(record.number)
        if not self._running:
            self._quiet.set()

    async def settled(self, within_s: float) -> bool:
        """Returns when nothing is under way; False if that takes longer."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), within_s)
        return self._quiet.is_set()

    def after(self, number: int) -> list[Record]:
        return [record for record in self._records if record.number > number]

    def outcomes(self) -> dict[str, int]:
        """How many ended in which way since the last `clear`, and how many are running."""
        return {**self._outcomes, "running": len(self._running)}

    def clear(self) -> None:
        self._records.clear()
        self._outcomes.clear()


def _readable(body: bytes) -> Any:
    if not body:
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return body.decode("utf-8", "replace")
