"""An upstream as one of a fleet: whether it may be asked, and how it is doing."""

from __future__ import annotations

import msgspec

from anaphora.backends.breaker import Breaker
from anaphora.backends.upstream import Upstream
from anaphora.config import UpstreamConfig
from anaphora.fleet.listening import Listening
from anaphora.routing.base import Price
from anaphora.routing.base import Replica as RoutedReplica


class Replica:
    """An upstream as one of the fleet."""

    __slots__ = ("breaker", "config", "draining", "listening", "says_reads", "started_s", "upstream")

    def __init__(self, upstream: Upstream, config: UpstreamConfig, breaker: Breaker, started_s: float) -> None:
        self.upstream = upstream
        self.config = config
        self.breaker = breaker
        self.draining = False
        """It finishes what it has and is asked nothing new."""
        self.says_reads = False
        """It said once how much of a prompt its cache had: where it says nothing, that was nothing."""
        self.started_s = started_s
        """When it joined."""
        self.listening: Listening | None = None
        """To what its cache says of itself. None: it says nothing."""

    @property
    def name(self) -> str:
        return self.upstream.name

    async def leave(self) -> None:
        """Answer what was asked, and close."""
        if self.listening is not None:
            await self.listening.aclose()
        await self.upstream.leave()

    def may_be_asked(self, now_s: float) -> bool:
        return not self.draining and self.breaker.passes(now_s)

    def routed(self) -> RoutedReplica:
        """As the router knows it."""
        one = self.config
        price = Price(one.price.input / 1e6, one.price.cached / 1e6, one.price.output / 1e6)
        return RoutedReplica(
            one.name,
            pool=one.pool or one.name,
            price=price,
            capacity_tokens=one.kv_tokens or None,
            started_s=self.started_s,
        )

    def state(self, now_s: float) -> ReplicaState:
        options = self.upstream.options
        rest_s = self.breaker.opens_in_s(now_s)
        return ReplicaState(self.name, options.base_url, options.models, self.upstream.num_running, self.draining, rest_s)


class ReplicaState(msgspec.Struct, frozen=True):
    """How a replica is doing."""

    name: str
    base_url: str
    models: tuple[str, ...]
    running: int
    draining: bool
    resting_s: float
    """Seconds for which it is left alone because it failed too often."""


class Target(msgspec.Struct, frozen=True):
    """Somebody who may be asked: a replica, and the model to ask it for."""

    replica: Replica
    model: str

    @property
    def upstream(self) -> Upstream:
        return self.replica.upstream
