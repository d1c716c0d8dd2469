"""Whoever was sent the fewest tokens in the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from anaphora.routing.base import Choice, Question, Replica, RequestId
from anaphora.routing.inflight import Counting

WINDOW_S = 60.0


class Usage(Counting):
    """Prompts count when they are sent, answers when they have ended."""

    def __init__(self) -> None:
        super().__init__()
        self._recent: deque[tuple[float, str, int]] = deque()
        self._tokens: dict[str, int] = {}

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        while self._recent and self._recent[0][0] <= now_s - WINDOW_S:
            _, name, num_tokens = self._recent.popleft()
            if name in self._tokens:
                self._tokens[name] -= num_tokens
        return self.least(replicas, lambda replica: self._tokens.get(replica.name, 0))

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        super().began(request, question, choice, now_s)
        self._count(choice.replica, question.num_tokens, now_s)

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        self._count(self.in_flight[request].choice.replica, output_tokens, now_s)
        super().ended(request, now_s, output_tokens=output_tokens, cached_tokens=cached_tokens)

    def removed(self, replica: str) -> None:
        super().removed(replica)
        self._tokens.pop(replica, None)
        self._recent = deque(entry for entry in self._recent if entry[1] != replica)

    def _count(self, replica: str, num_tokens: int, now_s: float) -> None:
        self._recent.append((now_s, replica, num_tokens))
        self._tokens[replica] = self._tokens.get(replica, 0) + num_tokens
