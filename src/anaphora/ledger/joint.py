"""What a tenant uses of several servers together, as one value that they all change. Pure.

    now_s      the latest moment at which it was changed: time does not go back, whoever's clock is asked
    counts     what all of them have used, as `limits` counts
    servers    whose own counts are in it, the latest to speak last
    leases     what each process has reserved for answers under way

A server that is not in it yet (it is new, or the value was lost) adds what it has used by its own counts. What a process has
reserved is taken back once nothing was heard of it for `LEASE_S`; if it is there after all, it reserves it again. Where it does
not know that it has reserved something, since the reply was lost, it takes that back itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from anaphora.config import LimitConfig
from anaphora.ledger.limits import NOTHING, Counts, Used, joined, spent

LEASE_S = 600.0
_NUM_SERVERS = 256
"""That are remembered; one that was silent for so many others adds its own counts again."""
_HOUR_S = 3600
_BUDGETS = LimitConfig(tenant="*")
"""No rates: after so long a time a bucket is full again in any case."""

ByHour = dict[int, Used]
"""Amounts by the hour in which they began: an hour's, a day's and a month's budgets are those hours'."""


class Lease(msgspec.Struct, frozen=True, array_like=True):
    process: int
    until_s: float
    held: ByHour


class Joint(msgspec.Struct, frozen=True, array_like=True):
    now_s: float = 0.0
    counts: Counts = NOTHING
    servers: tuple[int, ...] = ()
    leases: tuple[Lease, ...] = ()

    def held(self, *, but: int) -> Used:
        """What all processes but that one have reserved."""
        return total(used for lease in self.leases if lease.process != but for used in lease.held.values())


class Party(msgspec.Struct, frozen=True):
    """Who changes it: a process of a server, what that server has used by its own counts, and what this process said last
    that it holds."""

    server: int
    process: int
    own: Counts
    told: ByHour


def entered(joint: Joint, party: Party, now_s: float) -> Joint:
    """As `party` finds it: itself in it, and nothing held by whoever has fallen silent."""
    now_s = max(now_s, joint.now_s)
    counts = joint.counts
    alive = [lease for lease in joint.leases if lease.until_s > now_s or lease.process == party.process]
    for lease in joint.leases:
        if lease not in alive:
            counts = charged(_BUDGETS, counts, negative(lease.held), now_s)
    if party.server not in joint.servers:
        counts = joined(counts, party.own, now_s)
    else:
        held = next((lease.held for lease in alive if lease.process == party.process), {})
        counts = charged(_BUDGETS, counts, added(party.told, negative(held)), now_s)
    others = [server for server in joint.servers if server != party.server]
    return Joint(now_s, counts, (*others[-_NUM_SERVERS + 1 :], party.server), tuple(alive))


def left(joint: Joint, party: Party, counts: Counts, held: ByHour) -> Joint:
    """As `party` leaves it: with `counts`, and `held` by that process."""
    leases = tuple([lease for lease in joint.leases if lease.process != party.process])
    if held:
        leases += (Lease(party.process, joint.now_s + LEASE_S, held),)
    return msgspec.structs.replace(joint, counts=counts, leases=leases)


def charged(limits: LimitConfig, counts: Counts, amounts: ByHour, now_s: float) -> Counts:
    for hour, used in amounts.items():
        counts = spent(limits, counts, used, hour * _HOUR_S, now_s)
    return counts


def of_hour(at_s: float, used: Used) -> ByHour:
    return {int(at_s // _HOUR_S): used}


def added(amounts: ByHour, more: ByHour) -> ByHour:
    """Without the hours of which nothing remains."""
    sums = {hour: total([amounts.get(hour, Used()), more.get(hour, Used())]) for hour in {**amounts, **more}}
    return {hour: used for hour, used in sums.items() if used != Used()}


def negative(amounts: ByHour) -> ByHour:
    return {hour: Used(-used.requests, -used.tokens, -used.usd) for hour, used in amounts.items()}


def total(amounts: Iterable[Used]) -> Used:
    requests = tokens = usd = 0
    for used in amounts:
        requests, tokens, usd = requests + used.requests, tokens + used.tokens, usd + used.usd
    return Used(requests, tokens, usd)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Joint).decode


def packed(joint: Joint) -> bytes:
    return _encode(joint)


def unpacked(data: bytes) -> Joint:
    """What is not a value of ours counts as lost."""
    try:
        joint = _decode(data) if data else Joint()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Joint()
    return joint if len(joint.counts) == len(NOTHING) else Joint()
