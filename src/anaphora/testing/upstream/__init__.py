"""A provider for tests: it answers, accounts for prompt caching, takes its time, refuses and breaks off as it is told to.

    with Upstream(name="primary") as upstream:
        upstream.fault("429", retry_after_s=1)
        client = anthropic.Anthropic(base_url=upstream.anthropic_base_url, api_key="any")
        ...
        assert [request.outcome for request in upstream.requests()] == ["fault", "finished"]

It is a real server on a free port of 127.0.0.1, in a thread; any number of them may run. `anaphora testing upstream` is the
same as a process of its own, which `Control` tells and asks over HTTP. Guide: docs/testing-upstream.md.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from anaphora.testing.upstream.records import Record
from anaphora.testing.upstream.script import Answer, Fault, Match, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anaphora.testing.upstream.serving import ServedInThread

__all__ = ["Answer", "Control", "Fault", "Match", "Record", "ToolCall", "Upstream"]

_PATIENCE_S = 30.0
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Settled(msgspec.Struct, frozen=True):
    """What a test upstream has seen."""

    settled: bool
    """Nothing was under way any more."""
    outcomes: dict[str, int]
    requests: list[Record]


class Control:
    """Tells a test upstream at `url` what shall happen, and asks what did."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def anthropic_base_url(self) -> str:
        return self.url

    @property
    def openai_base_url(self) -> str:
        return f"{self.url}/v1"

    def fault(self, kind: str, *, match: Match | None = None, **detail: Any) -> None:
        """Let the next request fail; `detail` is the rest of a `Fault`."""
        self._ask("POST", "/testing/faults", Fault(kind, match=match or Match(), **detail))

    def answer(self, text: str = "", *, match: Match | None = None, **detail: Any) -> None:
        """Let the next request be answered with this; `detail` is the rest of an `Answer`."""
        self._ask("POST", "/testing/answers", Answer(text, match=match or Match(), **detail))

    def seen(self, *, after: int = 0, settled_within_s: float = _PATIENCE_S) -> Settled:
        """What arrived after request `after`, once nothing is under way any more or that time has passed."""
        path = f"/testing/requests?after={after}&settled_within_s={settled_within_s}"
        return msgspec.json.decode(self._ask("GET", path, within_s=settled_within_s + _PATIENCE_S), type=Settled)

    def requests(self, path: str = "", *, within_s: float = _PATIENCE_S) -> list[Record]:
        """What arrived, at any path or just this one, once nothing is under way any more. TimeoutError: something still is."""
        seen = self.seen(settled_within_s=within_s)
        if not seen.settled:
            raise TimeoutError(f"requests are still under way after {within_s:g} seconds: {seen.outcomes}")
        return [record for record in seen.requests if path in ("", record.path)]

    def clear(self) -> None:
        """Take back every fault and answer, and forget what arrived. What is cached stays."""
        for what in ("faults", "answers", "requests"):
            self._ask("DELETE", f"/testing/{what}")

    def advance(self, seconds: float) -> None:
        """Move the virtual clock, where it has one."""
        self._ask("POST", "/anaphora/clock", {"advance_s": seconds})

    def _ask(self, method: str, path: str, body: object = None, *, within_s: float = _PATIENCE_S) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(self.url + path, data, method=method)
        with _DIRECTLY.open(request, timeout=within_s) as response:
            answer: bytes = response.read()
        return answer


class Upstream(Control):
    """`with Upstream(...) as upstream`: a test upstream in a thread of this process, gone at the end."""

    def __init__(
        self,
        name: str = "upstream",
        *,
        models: Iterable[str] = (),
        keys: Iterable[str] = (),
        base_latency_s: float = 0.0,
        prefill_tokens_per_s: float = 0.0,
        decode_tokens_per_s: float = 0.0,
        faults: Iterable[Fault] = (),
        seed: int = 0,
        keep: int = 10_000,
        kv_tokens: int = 0,
        virtual_clock: bool = False,
        port: int = 0,
    ) -> None:
        """As `app.Options` and `backend.Pace` tell; a rate of 0 takes no time. `port` 0: any free one."""
        super().__init__("")
        from anaphora.testing.upstream.app import Options
        from anaphora.testing.upstream.backend import Pace

        pace = Pace(base_latency_s, prefill_tokens_per_s, decode_tokens_per_s)
        self.options = Options(
            name, tuple(models), tuple(keys), pace, tuple(faults), seed, keep, kv_tokens, virtual_clock=virtual_clock
        )
        self._port = port
        self._served: ServedInThread | None = None

    def __enter__(self) -> Upstream:
        from anaphora.testing.upstream.serving import ServedInThread

        self._served = ServedInThread(self.options, self._port)
        self.url = self._served.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._served is not None:
            self._served.close()
            self._served = None

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Within, connections are refused: what was under way has ended, and nothing can be told or asked."""
        if self._served is None:
            raise RuntimeError("it is not running")
        self._served.refuse()
        try:
            yield
        finally:
            self._served.listen()
