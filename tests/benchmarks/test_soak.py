"""What the soak calls a violation, and how it reads answers: it must be able to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from anaphora.testing.upstream import Upstream


@pytest.fixture(scope="module")
def soak(script: Callable[[str], Any]) -> Any:
    return script("soak.py")


def found(soak: Any, outcome: str, said: str, *attempts: str) -> set[str]:
    """The kinds of violations of one question for `a b c` that was tried so often."""
    question = soak.Question("q1", "chat", "a b c", True, outcome, said)
    tried = {"q1": [soak.Attempt("one", attempt, None) for attempt in attempts]} if attempts else {}
    return set(soak.violations([question], tried, 3))


def test_what_ended_as_it_must_is_no_violation(soak: Any) -> None:
    assert found(soak, "answered", "a b c", "fault", "finished") == set()
    assert found(soak, "error", "", "fault", "left") == set()
    assert found(soak, "error", "a b", "fault") == set()
    assert found(soak, "error", "") == set()  # nobody was asked: a breaker was open
    assert found(soak, "left", "a", "left") == set()
    assert found(soak, "left", "a b c", "finished") == set()


def test_everything_else_is_one(soak: Any) -> None:
    assert found(soak, "silent", "a", "fault") == {"silent"}
    assert found(soak, "broken", "a", "fault") == {"broken"}
    assert found(soak, "hung", "", "fault") == {"hung"}
    assert found(soak, "answered", "a b", "finished") == {"mixed up"}
    assert found(soak, "error", "a x", "fault") == {"mixed up"}
    assert found(soak, "left", "x", "left") == {"mixed up"}
    assert found(soak, "answered", "a b c", "fault") == {"answered by nobody"}
    assert found(soak, "answered", "a b c") == {"answered by nobody"}
    assert found(soak, "error", "", "finished") == {"lost"}
    assert found(soak, "answered", "a b c", "finished", "finished") == {"computed twice"}
    assert found(soak, "error", "", *["fault"] * 4) == {"tried too often"}
    assert found(soak, "error", "", "running") == {"never given up"}
    assert soak.violations([], {"q9": [soak.Attempt("one", "finished", None)]}, 3) == {"never asked": ["q9"]}


def test_growth_is_the_slope_of_a_line(soak: Any) -> None:
    assert soak.slope_per_min([(0, 100), (30, 101), (60, 102)]) == pytest.approx(2)
    assert soak.slope_per_min([(0, 100)]) == 0


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.mark.parametrize("api", ["messages", "chat", "responses"])
def test_it_reads_what_every_endpoint_answers(soak: Any, upstream: Upstream, api: str) -> None:
    upstream.clear()
    question = soak.Question("q1", api, "one two three", False)
    whole = httpx2.post(upstream.url + soak.PATHS[api], json=soak.body_of(question))
    assert soak.whole(api, whole.json()) == "one two three"
    question.stream = True
    ends = ((None, 0, "answered", "one two three"), ("error", 2, "error", "one two "), ("malformed-sse", 1, "", ""))
    for fault, after_events, expected, said in ends:
        if fault is not None:
            upstream.fault(fault, after_events=after_events)
        stream = httpx2.post(upstream.url + soak.PATHS[api], json=soak.body_of(question))
        pieces = [soak.piece(api, line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
        assert [end for _, end in pieces if end][:1] == ([expected] if expected else [])
        assert "".join(text for text, _ in pieces) == said
