"""Events: who is told of what."""

from __future__ import annotations

import ast
import inspect
import textwrap

from anaphora.events import Answered, Event, Evicted, Miss, MissReason, among
from anaphora.server.metrics import Metrics


class Heard:
    def __init__(self, *concerns: type) -> None:
        self.concerns = concerns
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)


def test_everybody_is_told_of_what_concerns_them_in_its_order_and_of_nothing_else() -> None:
    misses, both, nothing = Heard(Miss), Heard(Miss, Evicted), Heard(Answered)
    emit = among((misses, both, nothing))
    events: list[Event] = [Miss("exact", MissReason.ABSENT), Evicted("ram", 1, 2), Miss("words", MissReason.ABSENT)]
    for event in events:
        emit(event)
    assert misses.events == [events[0], events[2]]
    assert both.events == events
    assert nothing.events == []


def test_metrics_are_told_of_every_kind_that_they_count() -> None:
    body = ast.parse(textwrap.dedent(inspect.getsource(Metrics.record)))
    counted = {node.cls.id for node in ast.walk(body) if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name)}
    assert counted == {kind.__name__ for kind in Metrics.concerns}
