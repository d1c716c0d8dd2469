"""Where breakpoints pay, and for how long: the choice between writing nothing, up to here, or up to there. Pure.

All is counted per token, as a share of the plain input price: a write costs `w - 1` more now, and saves `1 - r` if somebody
asks for it while it lives. So it pays from a chance of `(w - 1) / (1 - r)` on: 28 % for five minutes at Anthropic's prices.

The longer lifetime is paid for what is new and protects all that is before it: an entry covers its whole prefix, whatever
lifetime its parts were written with (R14). In a long conversation it therefore pays from a very small chance of a pause on.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anaphora.optimiser.chances import Hazards, within
from anaphora.profiles import Profile
from anaphora.prompt import TTL, TTL_S

_MAX_LIVES = 20.0
"""How often, at most, what stands at many prompts' heads is expected to be asked for while it lives."""


class Rates(msgspec.Struct, frozen=True):
    """A profile's prices as shares of the plain one, for its two lifetimes."""

    read: float
    short: TTL
    write: float
    long: TTL | None
    write_long: float

    @property
    def least(self) -> float:
        """The chance of a read from which on a write pays (S7)."""
        return (self.write - 1.0) / (1.0 - self.read) if self.read < 1.0 else float("inf")


def rates_of(profile: Profile) -> Rates:
    write = {ttl: float(profile.rates.write.get(ttl, 1)) for ttl in profile.ttls}
    by_length = sorted(write, key=TTL_S.__getitem__)
    long = by_length[-1] if len(by_length) > 1 else None
    return Rates(float(profile.rates.read), by_length[0], write[by_length[0]], long, write[long] if long else 0.0)


class Candidate(msgspec.Struct, frozen=True):
    """A boundary that may be marked."""

    block: int
    end: int
    """Tokens up to it."""
    soon: float
    """The chance of its being asked for within the shorter lifetime,"""
    later: float
    """and within the longer one."""
    stands: bool
    """Several requests parted behind it, so it outlives the conversation."""
    paid: bool = False
    """The client's own breakpoint is here or behind it: it is written whatever we do."""


class Choice(msgspec.Struct, frozen=True):
    short: int | None = None
    """Index of the last boundary to be written,"""
    long: int | None = None
    """and of the last one for the longer lifetime."""
    gain: float = 0.0
    """Tokens at the plain input price."""
    long_gain: float = 0.0
    """Part of it that the longer lifetime brings."""


def candidate(block: int, end: int, hazards: Hazards, rates: Rates, *, stands: bool, paid: bool) -> Candidate:
    soon = within(hazards, TTL_S[rates.short])
    later = within(hazards, TTL_S[rates.long]) if rates.long else soon
    return Candidate(block, end, soon, later, stands, paid)


def choose(
    candidates: Sequence[Candidate], rates: Rates, *, read: int, safe: int, may_be_long: int, must_be_long: int = -1
) -> Choice:
    """`candidates` in order, all beyond `read`, the tokens that are read. `safe`: tokens that the longer lifetime protects
    already. `may_be_long`: how many of the candidates may have the longer lifetime, given the client's own marks.
    `must_be_long`: those up to this block are written for the longer lifetime already."""
    best = Choice()
    total, before = 0.0, read
    shorts: list[float] = []
    for one in candidates:
        total += (one.end - before) * _short_value(one, rates)
        shorts.append(total)
        before = one.end
    for index, gain in enumerate(shorts):
        if gain > best.gain or (candidates[index].paid and gain >= best.gain):
            best = Choice(short=index, gain=gain)
    if rates.long is None:
        return best
    extra, before = 0.0, read
    for index, one in enumerate(candidates[:may_be_long]):
        value = _long_value(one, rates, paid=one.block <= must_be_long)
        extra += (one.end - before) * (value - _short_value(one, rates))
        before = one.end
        protects = (one.later - one.soon) * _lost(one, rates) * max(0, read - safe)
        for last in range(index, len(candidates)):
            gain = shorts[last] + extra + protects
            if extra + protects > 0.0 and gain > best.gain:
                best = Choice(last, index, gain, extra + protects)
    return best


def _short_value(one: Candidate, rates: Rates) -> float:
    """Of writing a token for the shorter lifetime."""
    return one.soon * (1.0 - rates.read) - (0.0 if one.paid else rates.write - 1.0)


def _long_value(one: Candidate, rates: Rates, *, paid: bool) -> float:
    """Of writing a token for the longer lifetime. `paid`: the client has, already."""
    lives = min(_MAX_LIVES, 1.0 / max(1e-9, 1.0 - one.later)) if one.stands else 1.0
    price = 0.0 if paid else rates.write_long - 1.0
    if one.soon >= rates.least or one.paid:
        pauses = (one.later - one.soon) * lives
        return one.soon * (1.0 - rates.read) + pauses * _lost(one, rates) - max(0.0, price - (rates.write - 1.0) * one.paid)
    return one.later * lives * ((1.0 - rates.read) if one.stands else _lost(one, rates)) - price


def _lost(one: Candidate, rates: Rates) -> float:
    """What it costs more, per token, to be asked for when the entry is gone: whatever would be done then."""
    if one.soon >= rates.least:
        return rates.write - rates.read
    written = one.later * (rates.write_long - rates.read) > rates.write_long - 1.0
    return (rates.write_long if written else 1.0) - rates.read
