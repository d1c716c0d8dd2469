"""What the caches of our own models have promised to whom: entries with a lifetime, and what each request reads and writes.

The life of a request here: `charge` when it starts (R11), `settle` when the engine says how much it really reused, `visible`
when its answer begins: before that nobody can read what it wrote (S4). A request that fails before its answer begins never
gets to `visible` and leaves nothing.

A promise is to account: the entry says "these tokens were computed and are still yours". The engine may have lost them all
the same; then `settle` turns the read into a miss. A read that had to be recomputed is never reported (invariant 6).

Synchronous and in memory: after a restart every promise is gone, and the first request misses, truthfully. The books of one
tenant and workspace hold at most `max_entries` entries; the one that was used longest ago leaves first, and is counted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

import msgspec

from anaphora.breakpoints import STEP, Keys, Plan, chain, classic_read, plan, usage
from anaphora.clock import Clock
from anaphora.diagnosis import Miss, Reason, Sketch, State, diagnose, sketch, why
from anaphora.profiles import Profile
from anaphora.prompt import TTL, TTL_S, CacheUsage, Diagnosis, Lengths, Prompt
from anaphora.types import Keep, Scope, Tenant

DAY_S = 86_400.0
REMEMBERED_S = 3600.0
"""How long an expired entry, or an answer to compare with, is still known, to say what happened."""

__all__ = ["Books", "Charge", "Miss", "Promise", "Reason", "Stats", "Write"]


class Write(msgspec.Struct, frozen=True):
    """A boundary this request writes once its answer begins."""

    key: bytes
    tokens: int
    ttl: TTL | None
    """None: classic, best effort, nothing is promised."""
    idle_s: float
    """Seconds it lives without use,"""
    longest_s: float
    """and at most."""


class Charge(msgspec.Struct, frozen=True):
    """What one request reads and writes."""

    usage: CacheUsage
    diagnosis: Diagnosis | None
    """Only where the request asked for it."""
    miss: Miss | None
    tenant: Tenant
    workspace: str
    profile: Profile
    plan: Plan
    lengths: Lengths
    sketch: Sketch
    started_s: float
    found: tuple[int, ...]
    """Lengths of the entries that could be read, longest first."""
    read_for_s: float | None
    """How long the first of them lives from the request's start on. None: it promises nothing, or there is none."""
    writes: tuple[Write, ...]

    diagnoses: bool
    era: int

    @property
    def keep(self) -> tuple[Keep, ...]:
        """The prefixes of this prompt that are promised, for the engine to keep. Times are from the request's start."""
        read = (Keep(self.found[0], self.read_for_s),) if self.read_for_s is not None else ()
        return (*read, *(Keep(w.tokens, w.idle_s) for w in self.writes if w.ttl is not None))


class Promise(msgspec.Struct, frozen=True):
    """A prefix under protection."""

    key: bytes
    tokens: int
    until_s: float


class Stats(msgspec.Struct, frozen=True):
    entries: int = 0
    protected_tokens: int = 0
    dropped: int = 0
    """Promises that lost their protection because their tenant's quota was full."""
    evicted: int = 0
    """Entries that left because the books were full."""
    broken: int = 0
    """Reads that became misses because the engine had lost the prefix."""


class _Entry(msgspec.Struct):
    model: str
    tokens: int
    own: int
    """Tokens that no shorter promise of the same request covers."""
    ttl: TTL | None
    idle_s: float
    ends_s: float
    """Its life ends then at the latest, however often it is used."""
    expires_s: float
    visible_s: float

    def alive(self, at_s: float) -> bool:
        return at_s < self.expires_s

    def readable(self, at_s: float) -> bool:
        return self.visible_s <= at_s < self.expires_s

    def refresh(self, at_s: float) -> None:
        self.expires_s = max(self.expires_s, min(at_s + self.idle_s, self.ends_s))


class _Account:
    """One tenant and workspace."""

    def __init__(self, recent: int) -> None:
        self.entries: OrderedDict[bytes, _Entry] = OrderedDict()
        """Least recently used first."""
        self.held: OrderedDict[bytes, int] = OrderedDict()
        """Tokens under protection, by key, least recently used first."""
        self.held_tokens = 0
        self.recent: deque[Sketch] = deque(maxlen=recent)
        self.named: OrderedDict[str, Sketch] = OrderedDict()
        self.era = 0
        """How often something of it was forgotten. A charge of an earlier era enters nothing any more (invariant 7)."""


class Books:
    """All promises of one process. Not safe for threads: made for one event loop."""

    def __init__(
        self,
        clock: Clock,
        *,
        max_entries: int = 65_536,
        quota_tokens: int | None = None,
        recent: int = 32,
        max_named: int = 256,
    ) -> None:
        """`quota_tokens`: how many promised tokens of one tenant and workspace are protected from eviction; None: all.
        `recent`: earlier prompts a miss is compared with. `max_named`: answers that diagnostics can refer to."""
        self._clock = clock
        self._max_entries = max_entries
        self._quota_tokens = quota_tokens
        self._recent = recent
        self._max_named = max_named
        self._accounts: dict[tuple[Tenant, str], _Account] = {}
        self._dropped = self._evicted = self._broken = 0

    def charge(
        self,
        tenant: Tenant,
        prompt: Prompt,
        profile: Profile,
        lengths: Lengths,
        started_s: float | None = None,
        *,
        workspace: str = "",
        fingerprint: str = "",
    ) -> Charge:
        """What this request reads and will write, as its provider would account for it. Refreshes what it reads (R12).

        `started_s` (default: now) is when the request arrived. `fingerprint` names the weights behind the model, where they
        are known. ValueError: `lengths` are not those of `prompt`.
        """
        if len(lengths.ends) != len(prompt.blocks):
            raise ValueError(f"{len(lengths.ends)} lengths for {len(prompt.blocks)} blocks")
        now_s = self._clock.now_s() if started_s is None else started_s
        account = self._account(tenant, workspace)
        links = chain(prompt, profile)
        keys = Keys(prompt, profile, links, (tenant, workspace, fingerprint))
        planned = plan(prompt, lengths, profile)
        classic = profile.accounting == "openai-classic"
        writes = tuple(_classic_writes(keys, prompt, lengths, profile) if classic else _marked_writes(keys, planned, lengths))
        lookups = (
            ((write.tokens, write.key) for write in reversed(writes))
            if classic
            else ((lengths.ends[i], keys.of_block(i)) for i in planned.lookups)
        )
        found = tuple(_readable(account, lookups, now_s, all_of_them=not classic))
        longest = found[0][0] if found else 0
        read = classic_read(longest, profile) if classic else longest
        used = {key for _, key in found[:1]} | {write.key for write in writes if write.tokens <= read}
        self._refresh(account, used, now_s)
        counted = usage(planned, lengths, read)
        kept = classic_read(writes[-1].tokens, profile) if classic and writes else max((w.tokens for w in writes), default=0)
        now = sketch(prompt, links, lengths, kept=max(kept, read), started_s=now_s)
        boundaries = ((w.tokens, w.key, "") for w in reversed(writes)) if classic else _boundaries(prompt, keys, lengths)
        states = ((tokens, _state(account, key, now_s), path) for tokens, key, path in boundaries)
        cause: Reason | None = None if writes or planned.lookups else "too_short"
        if not classic and not planned.marked:
            cause = "unmarked"
        miss = why(prompt, now, read, account.recent, states, minimum=profile.minimum, cause=cause)
        diagnosis = None
        if prompt.diagnose and prompt.previous_id is not None:
            diagnosis = diagnose(_named(account, prompt.previous_id, now_s), now, read=read)
        account.recent.append(now)
        return Charge(
            usage=counted,
            diagnosis=diagnosis,
            miss=miss,
            tenant=tenant,
            workspace=workspace,
            profile=profile,
            plan=planned,
            lengths=lengths,
            sketch=now,
            started_s=now_s,
            found=tuple(tokens for tokens, _ in found),
            read_for_s=_left_s(account, found[0][1], now_s) if found else None,
            writes=writes,
            diagnoses=prompt.diagnose,
            era=account.era,
        )

    def settle(self, charge: Charge, kv_reused_tokens: int, block_size: int = 1) -> Charge:
        """`charge` as it is once the engine has said how many leading tokens it really reused (invariant 6).

        The engine reuses whole KV blocks (all of a prompt only where it has seen that very prompt), so up to `block_size`
        tokens less than promised still count as kept. Otherwise the longest promise that was kept is the read, and the rest
        is written again.
        """
        kept = kv_reused_tokens + block_size
        before = charge.usage.read
        if before <= kept:
            return charge
        if charge.profile.accounting == "openai-classic":
            read = classic_read(kept, charge.profile)
        else:
            read = next((tokens for tokens in charge.found if tokens <= kept), 0)
        self._broken += 1
        return msgspec.structs.replace(
            charge,
            usage=usage(charge.plan, charge.lengths, read),
            miss=Miss(reason="recomputed", lost_tokens=before - read, common_tokens=before),
        )

    def visible(self, charge: Charge, at_s: float | None = None) -> None:
        """The answer begins (default: now): what the request wrote can be read from here on."""
        at = self._clock.now_s() if at_s is None else at_s
        account = self._account(charge.tenant, charge.workspace)
        if charge.era != account.era:
            return
        covered = charge.usage.read
        for write in charge.writes:
            entry = account.entries.get(write.key)
            if write.tokens > charge.usage.read or entry is None or not entry.alive(charge.started_s):
                own = max(0, write.tokens - covered)
                self._enter(account, charge, write, own, at)
                covered = max(covered, write.tokens)
        self._shrink(account, charge.started_s)

    def name(self, charge: Charge, response_id: str) -> None:
        """The answer's id, by which later requests may ask for a comparison, and explanations refer to it.

        Anthropic keeps only prompts that asked for diagnostics themselves (with `previous_message_id: null` the first time).
        """
        charge.sketch.response_id = response_id
        account = self._account(charge.tenant, charge.workspace)
        if charge.era != account.era or (charge.sketch.dialect == "anthropic" and not charge.diagnoses):
            return
        named = account.named
        named[response_id] = charge.sketch
        while len(named) > self._max_named:
            named.popitem(last=False)

    def protected(self, tenant: Tenant, workspace: str = "") -> tuple[Promise, ...]:
        """The prefixes that must not be evicted now, least recently used first (S3)."""
        account, now_s = self._accounts.get((tenant, workspace)), self._clock.now_s()
        if account is None:
            return ()
        entries = ((key, account.entries[key]) for key in account.held)
        return tuple(Promise(key=key, tokens=e.tokens, until_s=e.expires_s) for key, e in entries if e.alive(now_s))

    def forget(self, scope: Scope) -> int:
        """Drops every entry and sketch in `scope`, and says how many entries that were. Entries have no tags."""
        if scope.tag is not None:
            return 0
        gone = 0
        for (tenant, _), account in self._accounts.items():
            if scope.tenant not in (None, tenant):
                continue
            doomed = [key for key, entry in account.entries.items() if scope.model in (None, entry.model)]
            for key in doomed:
                _drop(account, key)
            gone += len(doomed)
            account.era += 1
            left = [s for s in account.recent if scope.model not in (None, s.model)]
            account.recent = deque(left, maxlen=self._recent)
            account.named = OrderedDict((i, s) for i, s in account.named.items() if scope.model not in (None, s.model))
        return gone

    @property
    def stats(self) -> Stats:
        return Stats(
            entries=sum(len(account.entries) for account in self._accounts.values()),
            protected_tokens=sum(account.held_tokens for account in self._accounts.values()),
            dropped=self._dropped,
            evicted=self._evicted,
            broken=self._broken,
        )

    # -- entries -------------------------------------------------------------------------------------------------------

    def _account(self, tenant: Tenant, workspace: str) -> _Account:
        account = self._accounts.get((tenant, workspace))
        if account is None:
            account = self._accounts[tenant, workspace] = _Account(self._recent)
        return account

    def _refresh(self, account: _Account, keys: Iterable[bytes], at_s: float) -> None:
        for key in keys:
            entry = account.entries.get(key)
            if entry is not None and entry.readable(at_s):
                entry.refresh(at_s)
                account.entries.move_to_end(key)
                self._hold(account, key, entry, at_s)

    def _enter(self, account: _Account, charge: Charge, write: Write, own: int, at_s: float) -> None:
        started_s = charge.started_s
        entry = _Entry(
            model=charge.sketch.model,
            tokens=write.tokens,
            own=own,
            ttl=write.ttl,
            idle_s=write.idle_s,
            ends_s=started_s + write.longest_s,
            expires_s=started_s + write.idle_s,
            visible_s=at_s,
        )
        before = account.entries.get(write.key)
        if before is not None and before.alive(started_s):
            # Two wrote it at once: it is readable since the first of them, for as long as the more patient one paid for (S4).
            entry.visible_s = min(entry.visible_s, before.visible_s)
            entry.expires_s = max(entry.expires_s, before.expires_s)
            entry.ends_s = max(entry.ends_s, before.ends_s)
            if before.idle_s > entry.idle_s:
                entry.idle_s, entry.ttl = before.idle_s, before.ttl
        account.entries[write.key] = entry
        account.entries.move_to_end(write.key)
        self._hold(account, write.key, entry, started_s)

    def _hold(self, account: _Account, key: bytes, entry: _Entry, at_s: float) -> None:
        """Protects the entry, at the cost of those that were used longest ago where the quota is full."""
        if entry.ttl is None:
            return
        account.held_tokens += entry.own - account.held.pop(key, 0)
        account.held[key] = entry.own
        while self._quota_tokens is not None and account.held_tokens > self._quota_tokens:
            oldest, own = account.held.popitem(last=False)
            account.held_tokens -= own
            self._dropped += account.entries[oldest].alive(at_s)

    def _shrink(self, account: _Account, at_s: float) -> None:
        entries = account.entries
        while entries:
            key = next(iter(entries))
            too_many = len(entries) > self._max_entries
            if not too_many and entries[key].expires_s + REMEMBERED_S > at_s:
                return
            self._evicted += entries[key].alive(at_s)
            _drop(account, key)


def _marked_writes(keys: Keys, planned: Plan, lengths: Lengths) -> Iterator[Write]:
    return (Write(keys.of_block(p.block), lengths.ends[p.block], p.ttl, TTL_S[p.ttl], float("inf")) for p in planned.writes)


def _classic_writes(keys: Keys, prompt: Prompt, lengths: Lengths, profile: Profile) -> Iterator[Write]:
    """Every step of the prompt, or the end of every block where its tokens are not known; shortest first."""
    life = (DAY_S, DAY_S) if prompt.retention == "24h" else (profile.idle_s, profile.longest_s)
    if lengths.steps:
        for end in range(profile.step, len(lengths.steps) * STEP + 1, profile.step):
            if end >= profile.minimum:
                yield Write(keys.of_step(lengths.steps[end // STEP - 1]), end, None, *life)
        return
    for i, end in enumerate(lengths.ends):
        if end >= profile.minimum:
            yield Write(keys.of_block(i), end, None, *life)


def _boundaries(prompt: Prompt, keys: Keys, lengths: Lengths) -> Iterator[tuple[int, bytes, str]]:
    """Every block's end, longest first."""
    return ((lengths.ends[i], keys.of_block(i), prompt.blocks[i].path) for i in range(len(prompt.blocks) - 1, -1, -1))


def _left_s(account: _Account, key: bytes, at_s: float) -> float | None:
    entry = account.entries[key]
    return None if entry.ttl is None else entry.expires_s - at_s


def _state(account: _Account, key: bytes, at_s: float) -> State:
    entry = account.entries.get(key)
    if entry is None:
        return "absent"
    if not entry.alive(at_s):
        return "expired"
    return "readable" if entry.readable(at_s) else "pending"


def _readable(
    account: _Account, lookups: Iterable[tuple[int, bytes]], at_s: float, *, all_of_them: bool
) -> Iterator[tuple[int, bytes]]:
    for tokens, key in lookups:
        entry = account.entries.get(key)
        if entry is not None and entry.readable(at_s):
            yield tokens, key
            if not all_of_them:
                return


def _named(account: _Account, response_id: str, now_s: float) -> Sketch | None:
    found = account.named.get(response_id)
    return found if found is not None and now_s - found.started_s <= REMEMBERED_S else None


def _drop(account: _Account, key: bytes) -> None:
    del account.entries[key]
    account.held_tokens -= account.held.pop(key, 0)
