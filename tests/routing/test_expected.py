"""What follows from the one score."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from anaphora.routing.base import Choice, Load, Price, Question, Replica
from anaphora.routing.expected import Expected, ExpectedOptions
from anaphora.testing.routing import chain, fleet


def pick(strategy: Expected, asked: Question, replicas: list[Replica], now_s: float) -> Choice:
    choice = strategy.pick(asked, replicas, now_s)
    assert choice is not None
    return choice


class World:
    """A strategy, and replicas that take a known time for everything; requests have numbers."""

    def __init__(self, strategy: Expected, replicas: list[Replica]) -> None:
        self.strategy = strategy
        self.replicas = replicas
        self.number = 0

    def begin(self, asked: Question, now_s: float, on: str | None = None) -> tuple[int, str]:
        among = [replica for replica in self.replicas if on in (None, replica.name)]
        choice = pick(self.strategy, asked, among, now_s)
        self.number += 1
        self.strategy.began(self.number, asked, choice, now_s)
        return self.number, choice.replica

    def answer(
        self, asked: Question, now_s: float, *, on: str | None = None, first_s: float = 0.1, cached: int | None = None
    ) -> str:
        number, name = self.begin(asked, now_s, on)
        self.strategy.first_token(number, now_s + first_s)
        self.strategy.ended(number, now_s + first_s + 1.0, output_tokens=100, cached_tokens=cached)
        return name


@given(
    num_turns=st.integers(1, 12),
    added=st.integers(1, 30),
    first=st.integers(0, 40),
    gap_s=st.floats(0, 2000),
    token_s=st.floats(1e-5, 0.1),
)
def test_a_conversation_stays_where_it_began_while_nobody_else_asks_however_slow_the_replicas_are(
    num_turns: int, added: int, first: int, gap_s: float, token_s: float
) -> None:
    world = World(Expected(), fleet("one", "two", "three", capacity_tokens=1_000_000))
    places, now_s, num_known = set(), 0.0, 0
    for turn in range(1, num_turns + 1):
        asked = msgspec.structs.replace(chain("talk", first + added * turn), session="s-1")
        first_s = token_s * (100 + asked.num_tokens - num_known)
        places.add(world.answer(asked, now_s, first_s=first_s))
        now_s += first_s + 1.0 + gap_s
        num_known = asked.num_tokens
    assert len(places) == 1


@given(token_s=st.floats(1e-5, 0.1), num_requests=st.integers(3, 12), apart_s=st.floats(0, 5))
def test_before_anything_is_known_of_their_speed_all_get_alike(token_s: float, num_requests: int, apart_s: float) -> None:
    """And not whoever was asked last, because the one before it waits longer already."""
    world = World(Expected(), fleet("one", "two", "three", capacity_tokens=1_000_000))
    places = [world.begin(chain(f"stranger {number}", 20), apart_s * number)[1] for number in range(num_requests)]
    counts = [places.count(name) for name in ("one", "two", "three")]
    assert max(counts) - min(counts) <= 1


def test_a_time_before_the_first_request_is_taken_to_be_its_own() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=1_000_000))
    place = world.answer(chain("talk", 40), 1e6)
    assert pick(world.strategy, chain("talk", 41), world.replicas, 0.0).replica == place


def test_the_first_answer_of_a_slow_pool_says_what_a_cache_is_worth_there() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=1_000_000))
    place = world.answer(chain("talk", 40), 0.0, first_s=10.0)
    known = pick(world.strategy, chain("talk", 41), world.replicas, 20.0)
    assert known.replica == place
    assert max(known.scores.values()) - min(known.scores.values()) > 10.0
    assert known.reasons["unexplained"] == 0.0  # that it came later than guessed says nothing


def test_a_pool_of_which_nothing_is_known_is_taken_to_be_like_another() -> None:
    replicas = [Replica(name, pool=name) for name in ("one", "two")]
    world = World(Expected(), replicas)
    place = world.answer(chain("talk", 40), 0.0, first_s=10.0)
    assert pick(world.strategy, chain("talk", 41), replicas, 20.0).replica == place


def test_a_prompt_too_short_for_a_block_stays_by_its_session_and_by_no_other_that_looks_alike() -> None:
    world = World(Expected(), fleet("one", "two"))
    mine = msgspec.structs.replace(chain("a", 0, tokens=30), session="session-1")
    place = world.answer(mine, 0.0)
    later = msgspec.structs.replace(chain("a", 2, tokens=180), session="session-1")
    other = msgspec.structs.replace(later, session="session-12")
    assert pick(world.strategy, later, world.replicas, 10.0).replica == place
    assert pick(world.strategy, later, world.replicas, 10.0).cached_tokens > 0
    assert pick(world.strategy, other, world.replicas, 10.0).cached_tokens == 0
    stranger = msgspec.structs.replace(later, tenant="somebody else")
    assert pick(world.strategy, stranger, world.replicas, 10.0).cached_tokens == 0


@given(num_ahead=st.integers(0, 20), more=st.integers(1, 5))
def test_the_score_grows_with_the_queue(num_ahead: int, more: int) -> None:
    scores = []
    for count in (num_ahead, num_ahead + more):
        world = World(Expected(), fleet("one"))
        for number in range(count):
            world.begin(chain(f"stranger {number}", 20), 0.0)
        scores.append(pick(world.strategy, chain("a", 10), world.replicas, 0.0).scores["one"])
    assert scores[0] < scores[1]


@given(known=st.integers(0, 30), more=st.integers(1, 10), ahead=st.integers(0, 5))
def test_the_score_shrinks_with_what_is_cached(known: int, more: int, ahead: int) -> None:
    scores = []
    for count in (known, known + more):
        world = World(Expected(), fleet("one", capacity_tokens=1_000_000))
        world.answer(chain("same", 60, tokens=60 * 64 + 1), 0.0)  # both have learned as much
        for number in range(ahead):
            world.begin(chain(f"stranger {number}", 20), 1e4)
        asked = chain("same", 60, tokens=60 * 64 + 1)
        cut = Question(
            (*asked.blocks[:count], *chain("new", 60).blocks[count:]), asked.ends, asked.num_tokens, asked.output_tokens
        )
        scores.append(pick(world.strategy, cut, world.replicas, 1e4).scores["one"])
    assert scores[1] < scores[0]


def test_a_popular_prefix_spreads_once_the_queue_of_its_holder_outweighs_computing_it_elsewhere() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=1_000_000))
    place = world.answer(chain("first", 40, shared=36), 0.0)
    places = [world.begin(chain(f"user {number}", 40, shared=36), 100.0)[1] for number in range(60)]
    assert places[0] == place
    assert set(places) == {"one", "two"}
    # and it is at home in both then
    found = pick(world.strategy, chain("another", 40, shared=36), world.replicas, 101.0)
    assert found.cached_tokens == 36 * 64


def test_turns_of_one_conversation_at_once_do_not_fill_the_memory_that_they_share() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=10_000))
    place = world.answer(chain("talk", 100), 0.0, first_s=5.0)
    places = {world.begin(chain("talk", 100, tokens=6410 + number), 100.0)[1] for number in range(8)}
    assert places == {place}  # 8 prompts of 6,410 tokens, of which 6,400 are there once


def test_computing_again_counts_more_where_others_would_have_to_wait_for_it() -> None:
    parts = []
    for num_recent in (0, 30):
        world = World(Expected(), fleet("one", capacity_tokens=None))
        for number in range(num_recent):
            world.answer(chain(f"stranger {number}", 2), number / 10)
        world.begin(chain("long", 200), 10.0)
        parts.append(pick(world.strategy, chain("a", 100), world.replicas, 10.0).reasons["behind"])
    assert parts[0] < parts[1] / 10


def test_how_much_comes_to_a_replica_is_known_soon() -> None:
    """And not only when it was watched for as long as it remembers."""
    parts = []
    for num_seconds in (20, 400):
        world = World(Expected(), fleet("one", capacity_tokens=None))
        for second in range(num_seconds):
            world.answer(chain(f"stranger {second}", 100), float(second))
        world.begin(chain("long", 200), float(num_seconds))
        parts.append(pick(world.strategy, chain("a", 100), world.replicas, float(num_seconds)).reasons["behind"])
    assert 0.6 < parts[0] / parts[1] < 1.1


def test_what_is_late_everywhere_is_held_against_nobody() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=1_000_000))
    place = world.answer(chain("talk", 1), 0.0, first_s=2.0)
    assert pick(world.strategy, chain("talk", 2), world.replicas, 10.0).replica == place


def test_a_replica_that_has_restarted_shows_in_its_first_answer() -> None:
    world = World(Expected(), fleet("one", capacity_tokens=1_000_000))
    prompts = [chain(f"talk {number}", 40) for number in range(6)]
    for number, asked in enumerate(prompts):
        world.answer(asked, 10.0 * number, on="one", cached=0)
    assert pick(world.strategy, prompts[0], world.replicas, 100.0).cached_tokens == 40 * 64
    world.answer(prompts[5], 100.0, on="one", cached=0)  # it should have found all of it
    assert pick(world.strategy, prompts[5], world.replicas, 200.0).cached_tokens == 40 * 64  # computed since
    assert pick(world.strategy, prompts[0], world.replicas, 200.0).cached_tokens == 0


def test_what_was_still_being_computed_for_another_is_no_sign_of_a_restart() -> None:
    world = World(Expected(), fleet("one", capacity_tokens=1_000_000))
    world.answer(chain("old", 40), 0.0, cached=0)
    first, _ = world.begin(chain("talk", 40), 10.0)
    second, _ = world.begin(chain("talk", 40), 10.0)
    world.strategy.first_token(first, 11.0)
    world.strategy.first_token(second, 11.0)
    world.strategy.ended(second, 12.0, output_tokens=10, cached_tokens=0)
    assert pick(world.strategy, chain("old", 40), world.replicas, 20.0).cached_tokens == 40 * 64


def test_a_new_start_time_says_that_the_cache_is_empty() -> None:
    world = World(Expected(), fleet("one"))
    world.answer(chain("talk", 40), 0.0)
    again = [msgspec.structs.replace(world.replicas[0], started_s=50.0)]
    assert pick(world.strategy, chain("talk", 40), again, 60.0).cached_tokens == 0


def test_a_slow_replica_is_found_out_and_gets_less() -> None:
    world = World(Expected(), fleet("slow", "fast", capacity_tokens=0))
    counts = {"slow": 0, "fast": 0}
    for number in range(200):
        asked = chain(f"stranger {number}", 100)
        request, name = world.begin(asked, 20.0 * number)
        first_s = 8.0 if name == "slow" else 1.0
        world.strategy.first_token(request, 20.0 * number + first_s)
        world.strategy.ended(request, 20.0 * number + first_s + 2.0, output_tokens=100, cached_tokens=0)
        counts[name] += 1
    assert counts["slow"] < 40


def test_a_failure_is_held_against_a_replica_for_a_while() -> None:
    world = World(Expected(), fleet("one", "two"))
    number, failing = world.begin(chain("a", 10), 0.0)
    world.strategy.failed(number, 1.0)
    assert pick(world.strategy, chain("a", 10), world.replicas, 2.0).replica != failing
    number, _ = world.begin(chain("a", 10), 2.0)
    world.strategy.failed(number, 3.0, fault=False)
    assert pick(world.strategy, chain("a", 10), world.replicas, 3.0).replica != failing


def test_queues_that_others_filled_count_where_metrics_tell_of_them() -> None:
    world = World(Expected(), fleet("one", "two", capacity_tokens=1_000_000))
    place = world.answer(chain("talk", 100), 0.0)
    for number in range(20):
        world.answer(chain(f"stranger {number}", 100), 100.0 + number, cached=0)
    assert pick(world.strategy, chain("talk", 100), world.replicas, 1000.0).replica == place
    world.strategy.load(place, Load(running=20, waiting=200), 1000.0)
    assert pick(world.strategy, chain("talk", 100), world.replicas, 1000.0).replica != place


def test_money_counts_by_its_weight() -> None:
    dear = Replica("dear", pool="a", price=Price(1e-5, 1e-6, 3e-5))
    cheap = Replica("cheap", pool="b", price=Price(1e-6, 1e-7, 3e-6))
    for weight, expected in ((0.0, "dear"), (1.0, "cheap")):
        world = World(Expected(ExpectedOptions(cost_weight=weight)), [dear, cheap])
        for number in range(3):
            world.begin(chain(f"stranger {number}", 200), 0.0, on="cheap")  # busy: the dear one is faster
        assert world.begin(chain("a", 10), 0.0)[1] == expected


def test_a_choice_says_what_it_consists_of() -> None:
    world = World(Expected(), fleet("one", "two"))
    choice = pick(world.strategy, chain("a", 10), world.replicas, 0.0)
    assert {"queue", "prefill", "answer"} <= set(choice.reasons)
    assert choice.expected_s is not None
    assert set(choice.scores) == {"one", "two"}
    assert choice.scores[choice.replica] == min(choice.scores.values())
