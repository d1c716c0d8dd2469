from __future__ import annotations

import pytest

from anaphora.routing.base import Load, Replica
from anaphora.routing.expected import Expected
from anaphora.routing.router import Route, Router
from anaphora.testing.routing import chain, fleet


def routed(router: Router, name: str = "a", now_s: float = 0.0) -> Route:
    route = router.route(chain(name, 5), now_s)
    assert route is not None
    return route


def test_only_the_first_end_of_a_request_counts() -> None:
    router = Router(Expected(), fleet("one"))
    route = routed(router)
    assert router.in_flight("one") == 1
    route.first_token(0.5)
    route.ended(1.0, output_tokens=5)
    route.failed(2.0)
    route.ended(3.0, output_tokens=5)
    route.first_token(4.0)
    assert router.in_flight("one") == 0


def test_a_draining_replica_finishes_what_it_has() -> None:
    router = Router(Expected(), fleet("one", "two"))
    route = routed(router)
    router.change(route.replica, draining=True)
    assert {routed(router, "a", float(number)).replica for number in range(5)} == {"one", "two"} - {route.replica}
    route.ended(10.0, output_tokens=5)
    assert router.in_flight(route.replica) == 0


def test_a_removed_replica_is_forgotten_and_its_requests_still_end() -> None:
    router = Router(Expected(), fleet("one"))
    route = routed(router)
    router.remove("one")
    assert router.route(chain("a", 5), 1.0) is None
    assert router.in_flight("one") == 1
    route.first_token(2.0)
    route.ended(3.0, output_tokens=5, cached_tokens=0)
    router.add(Replica("one"))
    assert routed(router, "a", 4.0).choice.cached_tokens == 0
    with pytest.raises(KeyError):
        router.remove("two")


def test_a_removed_replica_that_comes_back_while_its_requests_run_counts_them() -> None:
    router = Router(Expected(), fleet("one"))
    first = routed(router)
    router.remove("one")
    router.add(Replica("one"))
    second = routed(router, "b", 1.0)
    first.ended(2.0, output_tokens=5)
    second.ended(3.0, output_tokens=5)
    assert router.in_flight("one") == 0


def test_a_request_may_be_kept_to_some_replicas() -> None:
    router = Router(Expected(), fleet("one", "two"))
    assert all(router.route(chain(str(number), 5), 0.0, among=["two"]) is not None for number in range(3))
    assert router.in_flight("two") == 3
    assert router.route(chain("a", 5), 0.0, among=[]) is None


def test_reports_of_unknown_replicas_are_ignored() -> None:
    router = Router(Expected(), fleet("one"))
    router.load("gone", Load(1, 1), 0.0)
    router.events("gone", [], 0.0)
    assert [replica.name for replica in router.replicas] == ["one"]
