"""The plan for one prompt: which breakpoints, for how long, and which fields. Pure: nothing here changes a history."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import msgspec

from anaphora import breakpoints
from anaphora.optimiser.affinity import AFFINITIES, Affinity, beginning, value
from anaphora.optimiser.chances import within
from anaphora.optimiser.history import History, Known, marked
from anaphora.optimiser.placing import Candidate, Choice, Rates, candidate, choose, rates_of
from anaphora.optimiser.plans import Code, Lane, Mark, Plan, Reason
from anaphora.profiles import Profile
from anaphora.prompt import TTL, Lengths, Prompt

_ENDS = 4
_PER_MTOK = Decimal(1_000_000)


class Settings(msgspec.Struct, frozen=True):
    mode: Literal["off", "advise", "on"] = "off"
    provider: str = ""
    """Whose fields and headers for affinity are used: a name of `affinity.AFFINITIES`. Empty: that of the profile."""
    retain: bool = False
    """Ask a classic model to keep prompts for a day (`prompt_cache_retention`). A decision about data, so never by itself."""


def plan(
    prompt: Prompt,
    lengths: Lengths,
    profile: Profile,
    history: History,
    now_s: float,
    settings: Settings | None = None,
    known: Known | None = None,
) -> Plan:
    """What to add to the body of `prompt`, with a reason for each decision. `known`: what `history.know` said of it."""
    settings = settings or Settings()
    if not prompt.blocks or settings.mode == "off":
        return Plan()
    known = known or history.know(prompt, profile, now_s)
    made = _Planning(prompt, lengths, profile, history, known, now_s)
    if profile.accounting != "openai-classic":
        made.place()
    made.bind(settings)
    marks = profile.max_marks if profile.accounting == "anthropic" else None
    return Plan(tuple(made.marks), made.fields, made.headers, tuple(made.reasons), marks, made.lane)


class _Planning:
    """One plan in the making."""

    def __init__(
        self, prompt: Prompt, lengths: Lengths, profile: Profile, history: History, known: Known, now_s: float
    ) -> None:
        self.prompt, self.lengths, self.profile = prompt, lengths, profile
        self.history, self.known, self.now_s = history, known, now_s
        self.anthropic = prompt.dialect == "anthropic"
        self.marks: list[Mark] = []
        self.fields: dict[str, object] = {}
        self.headers: dict[str, str] = {}
        self.reasons: list[Reason] = []
        self.lane: Lane | None = None

    # -- breakpoints ---------------------------------------------------------------------------------------------------

    def place(self) -> None:
        prompt, ends, known = self.prompt, self.lengths.ends, self.known
        if self.lengths.total < self.profile.minimum:
            self._say("too-short", f"The whole prompt has {self.lengths.total} of the {self.profile.minimum} tokens it needs.")
            return
        rates = rates_of(self.profile)
        own, num_own = self._own()
        implicit = self._implicit()
        read = known.alive[-1] if known.alive else -1
        safe = max((i for i in known.alive if rates.long and self.history.entry(known.names[i]).ttl == rates.long), default=-1)
        candidates = self._candidates(rates, read, own, implicit)
        shorts = [i for i, ttl in own.items() if ttl == rates.short]
        longs = max((i for i, ttl in own.items() if ttl == rates.long), default=-1)
        may_be_long = sum(not self.anthropic or not shorts or c.block < min(shorts) for c in candidates)
        choice = choose(
            candidates,
            rates,
            read=ends[read] if read >= 0 else 0,
            safe=ends[safe] if safe >= 0 else 0,
            may_be_long=may_be_long,
            must_be_long=longs,
        )
        last = candidates[choice.short].block if choice.short is not None else -1
        long = candidates[choice.long].block if choice.long is not None else -1
        long = max(long, longs) if self.anthropic else long
        self._against(candidates, choice, rates)
        stays = implicit is not None and (last == implicit or (implicit <= read and implicit >= 0))
        explicit = implicit is not None and not stays
        if explicit and prompt.options_given and "prompt_cache_options" in prompt.options_given:
            explicit = False  # the client has chosen its mode
        if explicit:
            self.fields["prompt_cache_options"] = {"mode": "explicit"}
            saved = ends[implicit or 0] - max(ends[last] if last >= 0 else 0, ends[read] if read >= 0 else 0)
            tokens = round(max(0, saved) * (rates.write - 1.0))
            self._say(
                "explicit", "Nothing is written but what is marked: the end of this prompt will not be asked for.", "", tokens
            )
        self._mark(last, long, own, rates, num_own=num_own, read=read, explicit=explicit, implicit=implicit, gain=choice)

    def _own(self) -> tuple[dict[int, TTL], int]:
        """The client's breakpoints, the automatic one included (R17, R19), and how many of the allowed ones they take."""
        blocks, automatic = self.prompt.blocks, self.prompt.automatic
        own = {i: block.mark for i, block in enumerate(blocks) if block.mark is not None}
        num = len(own) + (automatic is not None)
        if automatic is not None:
            last = next((i for i in reversed(range(len(blocks))) if self._markable(i)), None)
            if last is not None:
                own.setdefault(last, automatic)
        return own, num

    def _implicit(self) -> int | None:
        """OpenAI: where the provider marks by itself; None: nowhere."""
        if self.anthropic or self.prompt.mode == "explicit":
            return None
        found, _ = breakpoints.message_ends(self.prompt)
        return found[-1] if found else None

    def _candidates(self, rates: Rates, read: int, own: dict[int, TTL], implicit: int | None) -> list[Candidate]:
        """Boundaries beyond what is read where a request may go another way: at most some tens, in order."""
        blocks, ends, known = self.prompt.blocks, self.lengths.ends, self.known
        hazards = self.history.hazards(self.prompt, known)
        new, top = known.common + 1, max(own, default=-1)
        varies = new < len(blocks) and self.history.varies(known)
        places = {
            *known.standing,
            *own,
            known.common,
            new,
            self.known.head,
            *range(max(0, len(blocks) - _ENDS), len(blocks)),
        }
        places |= {i for i in range(max(0, read), len(blocks) - 1) if blocks[i].section != blocks[i + 1].section}
        found: list[Candidate] = []
        for i in sorted(places):
            if not max(read + 1, 0) <= i < len(blocks) or ends[i] < self.profile.minimum:
                continue
            if i != implicit and not self._markable(i):
                continue
            if varies and i >= new:
                hazards[i] = (0.0,) * len(hazards[i])
            found.append(candidate(i, ends[i], hazards[i], rates, stands=i in known.standing, paid=i <= top))
        if varies:
            text = "Every request has something else here: nothing from here on is worth keeping."
            self._say("varying", text, blocks[new].path)
        return found

    def _markable(self, index: int) -> bool:
        block = self.prompt.blocks[index]
        if block.kind in ("empty", "thinking"):
            return False
        if self.anthropic:
            return True
        parts = block.kind in ("text", "image", "audio", "document", "tool_result")
        return (
            parts and block.role != "assistant" and "[" in block.path and ".content" in block.path + _OUTPUT.get(block.kind, "")
        )

    def _mark(
        self,
        last: int,
        long: int,
        own: dict[int, TTL],
        rates: Rates,
        *,
        num_own: int,
        read: int,
        explicit: bool,
        implicit: int | None,
        gain: Choice,
    ) -> None:
        """Takes breakpoints in the order of their worth, as many as there are."""
        blocks = self.prompt.blocks
        slots = self.profile.max_marks - num_own
        if not self.anthropic:
            slots = self.profile.max_marks - (implicit is not None and not explicit) - num_own
        shorts = [i for i, ttl in own.items() if ttl == rates.short]
        least_short = min(shorts, default=len(blocks)) if self.anthropic else len(blocks)

        def ttl_of(block: int) -> TTL:
            return rates.long if rates.long and block <= long and block < least_short else rates.short

        chosen: set[int] = set(own)
        if implicit is not None and not explicit and not (long >= implicit):
            chosen.add(implicit)

        def take(block: int, code: Code, text: str, tokens: float = 0.0) -> None:
            nonlocal slots
            if block < 0 or block in chosen or not self._markable(block) or self.lengths.ends[block] < self.profile.minimum:
                return
            if slots <= 0:
                if not any(reason.code == "no-slot" for reason in self.reasons):
                    self._say("no-slot", "All breakpoints are taken.", blocks[block].path)
                return
            slots -= 1
            chosen.add(block)
            self.marks.append(Mark(blocks[block].path, ttl_of(block), block))
            self._say(code, text, blocks[block].path, round(tokens))

        for block, ttl in own.items():
            self._say("kept", f"The client's own breakpoint ({ttl}).", blocks[block].path)
        take(last, "marked", "Up to here it is likely to be asked for again.", gain.gain)
        take(long if long != last else -1, "marked", "Up to here for the longer lifetime.")
        if read >= 0 and not self._reaches(read):
            w, r = (rates.write, rates.read) if last >= 0 else (1.0, rates.read)
            text = "An entry lies here, which the look-back of the other breakpoints would miss."
            take(read, "reach", text, self.lengths.ends[read] * (w - r))
        head = self.known.head
        stands = [i for i in self.known.standing if i <= max(last, read)]
        for block in sorted(stands, key=lambda i: (i != head, -i)):
            take(block, "marked", "Requests part here; its entry is kept alive.")
        for block in self._turns(last):
            take(block, "marked", "The end of an earlier part: another request may begin like it.")

    def _reaches(self, block: int) -> bool:
        sent = marked(self.prompt, self.marks, self.fields)
        return block in breakpoints.plan(sent, self.lengths, self.profile).lookups

    def _turns(self, last: int) -> list[int]:
        """Ends of parts up to `last` that nothing is known of yet, the latest first: of the turn before, the first message, the
        system prompt."""
        blocks = self.prompt.blocks
        talk = [i for i in range(last) if blocks[i].role != "assistant" and blocks[i + 1].role == "assistant"]
        sections = [i for i in range(last) if blocks[i].section != blocks[i + 1].section]
        first = [self.known.common + 1] if self.known.common + 1 < last else []
        return [*talk[-1:], *reversed(sections), *first, *talk[:1]]

    # -- where it goes -------------------------------------------------------------------------------------------------

    def bind(self, settings: Settings) -> None:
        """Fields and headers by which a provider sends requests with one prefix to one place; and how long it keeps them."""
        name = settings.provider or ("" if self.profile.generic else self.profile.provider)
        affinity = AFFINITIES.get(name)
        if affinity is not None and self.lengths.total >= self.profile.minimum:
            self._bind(name, affinity)
        if (
            settings.retain
            and self.profile.accounting == "openai-classic"
            and "24h" in self.profile.retentions
            and self.prompt.retention is None
        ):
            self.fields["prompt_cache_retention"] = "24h"
            self._say("retention", "Kept for a day instead of minutes, at no charge.")

    def _bind(self, name: str, affinity: Affinity) -> None:
        if affinity.field == "prompt_cache_key" and self.prompt.cache_key is not None:
            self._say("kept", "The client's own prompt_cache_key.")
            return
        partition = 0
        talk = self.history.conversation(self.known)
        if affinity.by == "tenant":
            what = b""
        elif affinity.by == "conversation":
            what = talk
        else:
            what = beginning(self.prompt, self.lengths, self.profile.minimum)
            partition = self.history.lane(what, talk, self.profile.keys_per_minute, self.now_s)
            self.lane = Lane(what, talk, partition)
        found = value(affinity, what, partition)
        if affinity.header:
            self.headers[affinity.header] = found
        else:
            self.fields[affinity.field] = found
        parted = f", part {partition + 1} of those that are too many for one" if partition else ""
        self._say(
            "cache-key", f"{affinity.header or affinity.field} for {name}: what belongs together goes to one place{parted}."
        )

    # -- reasons -------------------------------------------------------------------------------------------------------

    def _against(self, candidates: Sequence[Candidate], choice: Choice, rates: Rates) -> None:
        """Why the rest is not written, and why it is written for so long."""
        rest = candidates[choice.short + 1 :] if choice.short is not None else candidates
        if rest:
            end = candidates[choice.short].end if choice.short is not None else 0
            one = rest[-1]
            lost = (one.end - end) * (one.soon * (1.0 - rates.read) - (rates.write - 1.0))
            text = (
                f"Asked for again within {rates.short} with a chance of {one.soon:.0%}; a write pays from {rates.least:.0%} on."
            )
            self._say("one-shot", text, self.prompt.blocks[one.block].path, round(lost))
        if rates.long is None or choice.short is None:
            return
        one = candidates[choice.long if choice.long is not None else choice.short]
        pause = one.later - one.soon
        text = f"A pause longer than {rates.short}, but not than {rates.long}, has a chance of {pause:.1%}: "
        text += f"kept for {rates.long}." if choice.long is not None else f"not worth {rates.long}."
        self._say("lifetime", text, self.prompt.blocks[one.block].path, round(choice.long_gain))

    def _say(self, code: Code, text: str, path: str = "", tokens: int = 0) -> None:
        price = self.profile.price
        usd = None if price is None else price.input * tokens / _PER_MTOK
        self.reasons.append(Reason(code, text, path, tokens, usd))


_OUTPUT = {"tool_result": ".content"}


def chance_of_return(history: History, prompt: Prompt, known: Known, seconds: float, since_s: float = 0.0) -> float:
    """That the whole prompt is asked for again before `seconds` have passed, if it was not in the first `since_s`."""
    return within(history.hazards(prompt, known)[-1], seconds, since_s)
