"""All rules over all requests: findings, one for each cause and session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal

import msgspec

from anaphora import profiles
from anaphora.lint.breaks import Cause, chain_breaks, prefix_breaks
from anaphora.lint.findings import RULES, Finding
from anaphora.lint.flips import flips
from anaphora.lint.layout import Count, Layout, estimate, lay_out
from anaphora.lint.reads import Placed, marks, missed_read, over_rate, place, too_short
from anaphora.lint.requests import Recorded
from anaphora.lint.sessions import LOOK_BACK, Session, common, continued, group, in_time, kinship, predecessor
from anaphora.profiles import Profile, prices
from anaphora.prompt import TTL_S, CacheUsage

MIN_LOST = 200
"""Tokens. A break that costs less each time it strikes is not worth a finding."""

ESTIMATE = "4 bytes of UTF-8 a token, 1,000 tokens an image"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    like: str | None = None
    """Profile for models that none matches: "behave like claude-opus-5-5"."""
    min_lost: int = MIN_LOST


class Report(msgspec.Struct, frozen=True):
    findings: tuple[Finding, ...]
    num_requests: int
    num_sessions: int
    tokens_counted: str
    """How tokens were counted, in words."""


class _Hit(msgspec.Struct, frozen=True):
    session: str
    layout: Layout
    against: Layout | None
    cause: Cause


def lint(
    recorded: Iterable[Recorded], options: Options | None = None, *, count: Count = estimate, counted: str = ESTIMATE
) -> Report:
    """Findings in order of file and line. Pure: the same requests give the same report."""
    options = options or Options()
    layouts = [lay_out(one, count) for one in recorded]
    sessions = group(layouts)
    run = _Run(options, sessions)
    for number, session in enumerate(sessions):
        run.session(session, sessions[:number])
    run.traffic(sessions)
    findings = sorted(run.findings(), key=lambda finding: (finding.file, finding.line, finding.code))
    return Report(tuple(findings), len(layouts), len(sessions), counted)


class _Run:
    """One run's hits, gathered rule by rule."""

    def __init__(self, options: Options, sessions: Sequence[Session]) -> None:
        self._options = options
        self._session_of = {id(layout): session.name for session in sessions for layout in session.layouts}
        self._hits: list[_Hit] = []
        self._broken: set[int] = set()
        """Requests whose prefix broke: why they read little is known already."""
        self._stored: dict[int, int] = {}
        """Tokens that the provider has stored of a chain up to a request, as far as the bodies tell."""
        self._profiles = {
            layout.model: profiles.find(layout.model, "anthropic" if layout.anthropic else "openai", options.like)
            for session in sessions
            for layout in session.layouts
        }

    def session(self, session: Session, others: Sequence[Session]) -> None:
        """What changes between the requests of one session; the first is compared with the first ones of other sessions."""
        for index, layout in enumerate(session.layouts):
            profile = self._profiles[layout.model]
            for cause in marks(layout, profile):
                self._hit(layout, None, cause)
            earlier = session.layouts[:index]
            if layout.partial:
                self._chained(layout, earlier)
                continue
            if not earlier:
                self._first(layout, others)
                continue
            nearest = predecessor(earlier, layout)
            if nearest is not None:
                for cause in flips(earlier, nearest, layout, profile):
                    self._break(nearest, layout, cause)
            kin = predecessor([one for one in earlier if one.model == layout.model], layout)
            if kin is not None and not kin.partial:
                for cause in prefix_breaks(kin, layout):
                    self._break(kin, layout, cause)
        by_model: dict[str, list[Layout]] = {}
        for layout in session.layouts:
            by_model.setdefault(layout.model, []).append(layout)
        for model, members in by_model.items():
            short = too_short(members, self._profiles[model]) if members[0].anthropic else None
            if short is not None:
                self._hit(next(one for one in members if one is not short.against), short.against, short.cause)

    def _chained(self, layout: Layout, earlier: Sequence[Layout]) -> None:
        """A body that continues a stored answer: what comes anew with it is compared with the body that was answered."""
        before = continued(earlier, layout)
        if before is None:
            return
        stored = self._stored.get(id(before), before.total)
        self._stored[id(layout)] = stored + layout.total
        profile = self._profiles[layout.model]
        if stored < max(profile.minimum, self._options.min_lost) or _outlived(before, layout, profile):
            return
        for cause in chain_breaks(before, layout, stored):
            self._broken.add(id(layout))
            self._hit(layout, before, cause)

    def traffic(self, sessions: Sequence[Session]) -> None:
        """What goes wrong between requests of one tenant, whatever their session."""
        ordered = in_time([layout for session in sessions for layout in session.layouts])
        placed: dict[tuple[str, str], list[Placed]] = {}
        for layout in ordered:
            profile = self._profiles[layout.model]
            request = place(layout, profile)
            earlier = placed.setdefault((layout.recorded.tenant, layout.model), [])
            if id(layout) not in self._broken and not layout.partial:
                missed = missed_read(earlier, request, profile)
                if missed is not None and missed.cause.lost_tokens >= self._options.min_lost:
                    self._hit(layout, missed.against, missed.cause)
            earlier.append(request)
            del earlier[:-LOOK_BACK]
        named = [(self._session_of[id(layout)], layout) for layout in ordered]
        for layout, cause, first in over_rate(named, self._profiles):
            self._hit(layout, first, cause)

    def _first(self, layout: Layout, others: Sequence[Session]) -> None:
        recent = [one.layouts[0] for one in others[-LOOK_BACK:] if _same_cache(one.layouts[0], layout)]
        best = max(reversed(recent), key=lambda one: (layout.end(common(one, layout)), kinship(one, layout)), default=None)
        if best is not None and not best.partial:
            for cause in prefix_breaks(best, layout):
                self._break(best, layout, cause)

    def _break(self, before: Layout, after: Layout, cause: Cause) -> None:
        """A hit, if anything that could have been cached and was still alive is lost by it."""
        profile = self._profiles[after.model]
        if cause.lost_tokens < self._options.min_lost or after.total < profile.minimum or _outlived(before, after, profile):
            return
        self._broken.add(id(after))
        self._hit(after, before, cause)

    def _hit(self, layout: Layout, against: Layout | None, cause: Cause) -> None:
        self._hits.append(_Hit(self._session_of[id(layout)], layout, against, cause))

    def findings(self) -> list[Finding]:
        """Hits of one code in one session and section of the body are one finding; so are those between sessions."""
        grouped: dict[tuple[str, str, str, str], list[_Hit]] = {}
        for hit in self._hits:
            within = hit.against is None or self._session_of[id(hit.against)] == hit.session
            session = hit.session if within else ""
            grouped.setdefault((hit.layout.recorded.tenant, session, hit.cause.code, str(hit.cause.place[0])), []).append(hit)
        return [self._finding(hits) for hits in grouped.values()]

    def _finding(self, hits: Sequence[_Hit]) -> Finding:
        first = hits[0]
        rule, recorded = RULES[first.cause.code], first.layout.recorded
        costs = [self._usd(hit) for hit in hits]
        known = [cost for cost in costs if cost is not None]
        return Finding(
            code=rule.code,
            severity=rule.severity,
            session=first.session,
            file=recorded.file,
            line=recorded.line,
            against_file=first.against.recorded.file if first.against is not None else "",
            against_line=first.against.recorded.line if first.against is not None else None,
            path=first.layout.path(first.cause.place),
            offset=first.cause.offset,
            before=first.cause.before,
            after=first.cause.after,
            lost_tokens=sum(hit.cause.lost_tokens for hit in hits),
            lost_usd=float(sum(known, Decimal(0))) if len(known) == len(costs) else None,
            occurrences=len(hits),
            message=rule.title,
            fix=rule.fix,
        )

    def _usd(self, hit: _Hit) -> Decimal | None:
        """What the lost tokens cost more than reading them: written again where the profile charges for writing."""
        profile, tokens = self._profiles[hit.layout.model], hit.cause.lost_tokens
        paid = CacheUsage(plain=tokens)
        if profile.ttls and profile.accounting != "openai-classic" and hit.cause.code != "no-breakpoint":
            paid = CacheUsage(plain=0, written={profile.ttls[0]: tokens})
        costs = [prices.cost(profile, usage, 0, model=hit.layout.model) for usage in (paid, CacheUsage(plain=0, read=tokens))]
        if costs[0] is None or costs[1] is None:
            return None
        return costs[0].input - costs[1].input


def _same_cache(one: Layout, other: Layout) -> bool:
    return one.recorded.tenant == other.recorded.tenant and one.model == other.model


def _outlived(before: Layout, after: Layout, profile: Profile) -> bool:
    """Whatever `before` left in the cache was gone anyway when `after` came."""
    start, then = before.recorded.time_s, after.recorded.time_s
    if start is None or then is None:
        return False
    longest = max((TTL_S[ttl] for ttl in profile.ttls), default=0.0) or 86400.0
    return abs(then - start) > longest
