"""What one tenant's requests on one route taught: which prefixes come back, how soon, and what the provider holds.

Only digests, times and counts, never a text. Everything is bounded; what was used longest ago goes first. One request costs
time in proportion to its blocks: a look-up for each, and work for those that are new.

A `_Watch` is laid on a prefix whenever it is seen, to learn whether a later request begins with it. Watches lie on the last few
blocks of a request (where does the next turn part from this one?), on the first block that is new (do others come this way
again?) and on the prefixes that several requests shared and then left.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from anaphora import breakpoints
from anaphora.optimiser.chances import EDGES_S, STEPS, Chance, Hazards, expected, shrunk
from anaphora.optimiser.plans import Lane, Mark, Plan
from anaphora.profiles import Profile
from anaphora.prompt import TTL, TTL_S, Lengths, Prompt
from anaphora.types import Scope, Tenant

OFFSETS = 4
"""How many of a request's last blocks are watched: some clients move or rewrite their last one with every turn."""
ANSWER_S = 2.0
"""From a request to its first token: by then others can read what it wrote (R22). So long before its end it is given up."""
_STRENGTH = 2.0
_MAX_STANDING = 16
"""Of one prompt: the first and the latest."""
_MAX_TURN = 2
_VARYING = 4.0
"""So many things that were not seen again for a minute: it is another one each time."""

TALKING, WORKING, HEAD = expected(0.8), expected(0.5), expected(0.5)
"""Before anything was seen: a conversation goes on; a first request with tools may; what stands at the head of a prompt is as
likely as not to be there again."""
ASKING: dict[str, Hazards] = {"anthropic": expected(0.26), "openai": expected(0.3)}
"""A first question without tools may go on or not. In doubt it is left to what the provider does by itself: Anthropic's writes
nothing that is not marked, OpenAI's writes the end of every prompt."""
_MAX_ARRIVALS = 1024

Name = bytes
_K = TypeVar("_K")
_V = TypeVar("_V")


class Known(msgspec.Struct, frozen=True):
    """A prompt as the history knows it."""

    names: tuple[Name, ...]
    """Of the prefix up to each block: equal for equal prefixes of one model and equal parameters."""
    common: int
    """The last block of the longest prefix that was seen before; -1: none was."""
    alive: tuple[int, ...]
    """Blocks behind which an entry should be readable, ascending."""
    standing: tuple[int, ...]
    """Blocks behind which requests parted before, ascending."""
    tools: int
    """The last block of the tools; -1: there are none. So below."""
    head: int
    """The last one of tools and system. OpenAI's first messages of the system are such blocks, too."""
    start: int
    """The last one of the first message behind it: where a conversation begins."""
    turns: int
    """The model's turns so far, up to a few."""

    @property
    def shared(self) -> Name:
        """The longest prefix that was seen before."""
        return self.names[self.common] if self.common >= 0 else b""


class Entry(msgspec.Struct, frozen=True):
    """What the provider's cache should hold behind a prefix."""

    ttl: TTL
    readable_s: float
    expires_s: float

    def readable(self, at_s: float) -> bool:
        return self.readable_s <= at_s < self.expires_s - ANSWER_S


class _Watch:
    __slots__ = ("chances", "name", "open", "step")

    def __init__(self, name: Name, chances: tuple[Chance, ...]) -> None:
        self.name = name
        self.chances = chances
        self.step = 0
        self.open = True

    def close(self, *, came: bool) -> None:
        for chance in self.chances:
            chance.count(self.step, came=came)


class History:
    """One tenant on one route. Not safe for threads: made for one event loop."""

    def __init__(self, owner: str = "", *, max_names: int = 16_384, max_kinds: int = 4_096) -> None:
        """`owner`: the tenant. `max_names`: prefixes that are known. `max_kinds`: of everything else, so many each."""
        self.owner = owner
        self._max_names = max_names
        self._max_kinds = max_kinds
        self._seen: dict[Name, bool] = {}
        """Prefixes, oldest first, and whether something else came behind them."""
        self._standing: OrderedDict[Name, None] = OrderedDict()
        self._entries: OrderedDict[Name, Entry] = OrderedDict()
        self._chances: OrderedDict[tuple[object, ...], Chance] = OrderedDict()
        self._watches: OrderedDict[Name, _Watch] = OrderedDict()
        self._lanes: OrderedDict[tuple[bytes, Name], int] = OrderedDict()
        self._arrivals: OrderedDict[bytes, deque[float]] = OrderedDict()
        """Times of the latest requests, by how their prompts begin."""
        self._due: tuple[deque[tuple[float, _Watch]], ...] = tuple(deque(maxlen=max_names) for _ in range(STEPS))

    def __len__(self) -> int:
        return len(self._seen)

    # -- what is known, for a plan -------------------------------------------------------------------------------------

    def know(self, prompt: Prompt, profile: Profile, now_s: float) -> Known:
        keys = breakpoints.Keys(prompt, profile, breakpoints.chain(prompt, profile), ())
        names = tuple(_short(keys.of_block(i)) for i in range(len(prompt.blocks)))
        seen, entries, standing = self._seen, self._entries, self._standing
        common = next((i for i in range(len(names) - 1, -1, -1) if names[i] in seen or names[i] in standing), -1)
        alive = (i for i, name in enumerate(names) if name in entries and entries[name].readable(now_s))
        parted = [i for i, name in enumerate(names) if name in standing]
        few = parted if len(parted) <= _MAX_STANDING else parted[: _MAX_STANDING // 4] + parted[-_MAX_STANDING * 3 // 4 :]
        return Known(names, common, tuple(alive), tuple(few), *_shape(prompt))

    def entry(self, name: Name) -> Entry:
        return self._entries[name]

    def hazards(self, prompt: Prompt, known: Known) -> list[Hazards]:
        """For the prefix up to each block: when it will be asked for again, as far as can be told.

        Nobody asks for a prefix without what is before it, so chances never rise along the prompt.
        """
        num = len(prompt.blocks)
        prior = _prior(prompt, known)
        new = self._chances.get(("behind", known.shared))
        hazards: list[Hazards] = [prior] * num
        for offset in range(OFFSETS):
            if offset < num:
                levels = [self._chances.get(kind) for kind in self._kinds(prompt, known, offset)]
                hazards[num - 1 - offset] = shrunk(prior, levels, _STRENGTH)
        if num > OFFSETS:
            hazards[: num - OFFSETS] = [hazards[num - OFFSETS]] * (num - OFFSETS)
        first = known.common + 1
        if first < num and new is not None:
            limit = shrunk(hazards[first], (new,), _STRENGTH)
            hazards[first:] = [_less(hazard, limit) for hazard in hazards[first:]]
        if first <= known.head:
            fresh = shrunk(HEAD, (new,), _STRENGTH)
            hazards[first : known.head + 1] = [_more(fresh, hazard) for hazard in hazards[first : known.head + 1]]
        for i in known.standing:
            own = shrunk(HEAD, [self._chances.get(("at", known.names[i]))], _STRENGTH)
            hazards[i] = _more(hazards[i], own)
        behind = hazards[-1]
        for i in range(num - 2, -1, -1):
            own = hazards[i]
            hazards[i] = hazards[i + 1] if own is behind else _more(own, hazards[i + 1])
            behind = own
        return hazards

    def conversation(self, known: Known) -> Name:
        """What all requests of one conversation have in common: how it began."""
        return known.names[known.start] if known.start >= 0 else b""

    def lane(self, beginning: bytes, conversation: Name, per_minute: int | None, now_s: float) -> int:
        """Which of the parts a conversation belongs to, so that none gets more than `per_minute` requests. It stays there."""
        if per_minute is None:
            return 0
        given = self._lanes.get((beginning, conversation))
        if given is not None:
            return given
        recent = sum(at_s > now_s - 60.0 for at_s in self._arrivals.get(beginning, ()))
        lanes = 1
        while lanes * per_minute <= recent:
            lanes *= 2
        return int.from_bytes(conversation[-4:], "big") % lanes

    def varies(self, known: Known) -> bool:
        """What comes behind the known part is another thing with every request: seen often enough, and never twice."""
        chance = self._chances.get(("behind", known.shared))
        return chance is not None and chance.awaited[1] >= _VARYING and not sum(chance.came)

    def _kinds(self, prompt: Prompt, known: Known, offset: int) -> list[tuple[object, ...]]:
        """From the general to the specific: such ends of prompts, those of this application, those of this conversation."""
        kind = ("end", prompt.blocks[-1].kind == "tool_result", known.turns, offset)
        kinds: list[tuple[object, ...]] = [kind]
        if known.head >= 0:
            kinds.append((*kind, known.names[known.head]))
        if known.turns:
            kinds.append(("talk", min(offset, 1), known.names[known.start]))
        return kinds

    # -- learning ------------------------------------------------------------------------------------------------------

    def learn(
        self, prompt: Prompt, lengths: Lengths, profile: Profile, known: Known, now_s: float, plan: Plan | None = None
    ) -> None:
        """A request is sent now, with the plan's marks (None: as the client made it)."""
        self._pass(now_s)
        names, first = known.names, known.common + 1
        for i in range(first):
            watch = self._watches.pop(names[i], None)
            if watch is not None:
                watch.open = False
                watch.close(came=True)
        common, head = known.shared, known.head
        if first < len(names):
            if first and self._seen.get(common, True):
                self._stand(common)
            self._watch(names[first], (self._chance(("behind", common)),), now_s)
        for i in {head, known.tools} - {-1}:
            self._stand(names[i])
        for i in {*known.standing, head} - {-1}:
            self._watch(names[i], (self._chance(("at", names[i])),), now_s)
        for offset in range(min(OFFSETS, len(names) - 1 - head)):
            chances = tuple(self._chance(kind) for kind in self._kinds(prompt, known, offset))
            self._watch(names[-1 - offset], chances, now_s)
        if first and first < len(names):
            self._seen[common] = True
        for i in range(first, len(names)):
            self._seen[names[i]] = i < len(names) - 1
        while len(self._seen) > self._max_names:
            del self._seen[next(iter(self._seen))]
        if plan is not None and plan.lane is not None:
            self._arrive(plan.lane, now_s)
        self._enter(marked(prompt, plan.marks, plan.fields) if plan is not None else prompt, lengths, profile, known, now_s)

    def refreshed(self, prompt: Prompt, lengths: Lengths, profile: Profile, known: Known, now_s: float, plan: Plan) -> None:
        """The provider was asked for `prompt` once more, only so that what it holds lives on: that teaches nothing."""
        self._enter(marked(prompt, plan.marks, plan.fields), lengths, profile, known, now_s)

    def _arrive(self, lane: Lane, now_s: float) -> None:
        beginning = lane.beginning
        _kept(self._lanes, (beginning, lane.conversation), lane.number, self._max_kinds)
        times = self._arrivals.get(beginning)
        _kept(self._arrivals, beginning, deque(maxlen=_MAX_ARRIVALS) if times is None else times, self._max_kinds)
        self._arrivals[beginning].append(now_s)

    def _pass(self, now_s: float) -> None:
        """Whatever was awaited through a whole step of time has not come in it."""
        for step, due in enumerate(self._due):
            while due and due[0][0] <= now_s:
                at_s, watch = due.popleft()
                if not watch.open:
                    continue
                watch.close(came=False)
                watch.step = step + 1
                if watch.step < STEPS:
                    self._due[step + 1].append((at_s + EDGES_S[step + 1] - EDGES_S[step], watch))
                elif self._watches.get(watch.name) is watch:
                    del self._watches[watch.name]

    def _watch(self, name: Name, chances: tuple[Chance, ...], now_s: float) -> None:
        before = self._watches.get(name)
        if before is not None and before.step == 0:
            before.chances += tuple(chance for chance in chances if chance not in before.chances)
            return
        watch = self._watches[name] = _Watch(name, chances)
        self._due[0].append((now_s + EDGES_S[0], watch))
        while len(self._watches) > self._max_kinds:
            self._watches.popitem(last=False)[1].open = False

    def _stand(self, name: Name) -> None:
        _kept(self._standing, name, None, self._max_kinds)

    def _chance(self, kind: tuple[object, ...]) -> Chance:
        found = self._chances.get(kind)
        if found is None:
            found = Chance()
        _kept(self._chances, kind, found, self._max_kinds)
        return found

    def _enter(self, prompt: Prompt, lengths: Lengths, profile: Profile, known: Known, now_s: float) -> None:
        """What the provider reads, refreshes and writes by its rules."""
        planned = breakpoints.plan(prompt, lengths, profile)
        names, entries = known.names, self._entries
        readable = set(known.alive)
        read = next((i for i in planned.lookups if i in readable), -1)
        written = {point.block: point.ttl for point in planned.writes}
        for i in {read, *(i for i in written if i <= read)} - {-1}:
            held = entries.get(names[i]) if i in readable else Entry(written[i], now_s + ANSWER_S, 0.0)
            if held is not None:
                refreshed = Entry(held.ttl, held.readable_s, now_s + TTL_S[held.ttl])
                _kept(entries, names[i], refreshed, self._max_kinds)
        for i, ttl in written.items():
            if i > read:
                entry, before = Entry(ttl, now_s + ANSWER_S, now_s + TTL_S[ttl]), entries.get(names[i])
                if before is not None and before.expires_s > now_s:
                    # Two write it at once: it is readable since the first, for as long as the more patient one paid for (S4).
                    longer = entry if entry.expires_s > before.expires_s else before
                    entry = Entry(longer.ttl, min(entry.readable_s, before.readable_s), longer.expires_s)
                _kept(entries, names[i], entry, self._max_kinds)


class Histories:
    """Those of all tenants and routes, so many at most."""

    def __init__(self, max_histories: int = 256) -> None:
        self._max_histories = max_histories
        self._histories: OrderedDict[tuple[Tenant, str], History] = OrderedDict()

    def of(self, tenant: Tenant, route: str) -> History:
        found = self._histories.get((tenant, route))
        if found is None:
            found = History(tenant)
        _kept(self._histories, (tenant, route), found, self._max_histories)
        return found

    def forget(self, scope: Scope) -> int:
        """Drops what was learned of a tenant, and says of how many routes. Nothing in it has a tag or a single model."""
        gone = [name for name in self._histories if scope.tenant in (None, name[0])]
        for name in gone:
            del self._histories[name]
        return len(gone)


def marked(prompt: Prompt, marks: Sequence[Mark], fields: dict[str, object]) -> Prompt:
    """`prompt` as it is with these marks and fields in its body."""
    blocks = list(prompt.blocks)
    for mark in marks:
        blocks[mark.block] = msgspec.structs.replace(blocks[mark.block], mark=mark.ttl)
    options = fields.get("prompt_cache_options")
    explicit = isinstance(options, dict) and options.get("mode") == "explicit"
    return msgspec.structs.replace(prompt, blocks=tuple(blocks), mode="explicit" if explicit else prompt.mode)


def _kept(held: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    """`value` as the latest one of `most`."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)


def _short(key: bytes) -> Name:
    """Enough of a `breakpoints.Keys` name, which is two digests."""
    return key[:8] + key[32:44]


def _prior(prompt: Prompt, known: Known) -> Hazards:
    if known.turns:
        return TALKING
    return WORKING if known.tools >= 0 else ASKING[prompt.dialect]


def _shape(prompt: Prompt) -> tuple[int, int, int, int]:
    """`Known.tools`, `head`, `start` and `turns`."""
    blocks = prompt.blocks
    tools = head = start = -1
    turns: set[int] = set()
    for i, block in enumerate(blocks):
        if block.section == "tools":
            tools = i
        if head == i - 1 and (block.section != "messages" or block.role in ("system", "developer")):
            head = start = i
        elif block.message == blocks[head + 1].message:
            start = i
        if block.role == "assistant" and len(turns) < _MAX_TURN:
            turns.add(block.message)
    return tools, head, start, len(turns)


def _more(one: Hazards, other: Hazards) -> Hazards:
    return tuple(map(max, one, other))


def _less(one: Hazards, other: Hazards) -> Hazards:
    return tuple(map(min, one, other))
