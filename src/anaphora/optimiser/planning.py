"""The plan for one prompt: which breakpoints, for how long, and which fields. Pure: nothing here changes a history."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import msgspec

from anaphora import breakpoints
from anaphora.optimiser.affinity import AFFINITIES, Affinity, beginning, value
from anaphora.optimiser.chances import NEVER
from anaphora.optimiser.history import OFFSETS, History, Known, marked
from anaphora.optimiser.placing import Candidate, Choice, candidate, choose, rates_of
from anaphora.optimiser.plans import Code, Lane, Mark, Plan, Reason
from anaphora.profiles import Profile
from anaphora.prompt import TTL, Lengths, Prompt

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
    made.warn()
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
        """Marks, and OpenAI's mode."""
        if self.lengths.total < self.profile.minimum:
            self._say("too-short", f"The whole prompt has {self.lengths.total} of the {self.profile.minimum} tokens it needs.")
            return
        ends, alive = self.lengths.ends, self.known.alive
        self.rates = rates = rates_of(self.profile)
        self.own, num_own = self._own()
        self.implicit = self._implicit()
        self.read = alive[-1] if alive else -1
        safe = max((i for i in alive if self.history.entry(self.known.names[i]).ttl == rates.long), default=-1)
        # Anthropic takes no longer lifetime behind a shorter one (R13).
        least_short = min((i for i, ttl in self.own.items() if ttl == rates.short), default=len(ends))
        least_short = least_short if self.anthropic else len(ends)
        last_long = max((i for i, ttl in self.own.items() if ttl == rates.long), default=-1)
        candidates = self._candidates()
        choice = choose(
            candidates,
            rates,
            read=ends[self.read] if self.read >= 0 else 0,
            safe=ends[safe] if safe >= 0 else 0,
            may_be_long=sum(one.block < least_short for one in candidates),
            must_be_long=last_long,
        )
        self._against(candidates, choice)
        last = candidates[choice.short].block if choice.short is not None else -1
        long = candidates[choice.long].block if choice.long is not None else -1
        self._choose_mode(last)
        self.num_slots = self.profile.max_marks - num_own - (self.implicit is not None)
        self.long = min(max(long, last_long if self.anthropic else -1), least_short - 1)
        self._mark(last, long, choice)

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
        """OpenAI: where the provider marks by itself (P2); None: nowhere."""
        if self.anthropic or self.prompt.mode == "explicit":
            return None
        found, _ = breakpoints.message_ends(self.prompt)
        return found[-1] if found else None

    def _choose_mode(self, last: int) -> None:
        """OpenAI writes the end of every prompt, unless it is told to write only what is marked."""
        implicit = self.implicit
        if implicit is None or last == implicit or implicit <= self.read or "prompt_cache_options" in self.prompt.options_given:
            return
        self.fields["prompt_cache_options"] = {"mode": "explicit"}
        written = max(self.lengths.ends[i] if i >= 0 else 0 for i in (last, self.read))
        saved = round((self.lengths.ends[implicit] - written) * (self.rates.write - 1.0))
        self._say("explicit", "Nothing is written but what is marked: the end will not be asked for again.", "", saved)
        self.implicit = None

    def _candidates(self) -> list[Candidate]:
        """Boundaries beyond what is read where a request may go another way: at most some tens, in order."""
        blocks, ends, known = self.prompt.blocks, self.lengths.ends, self.known
        hazards = self.history.hazards(self.prompt, known)
        new, top, num = known.common + 1, max(self.own, default=-1), len(blocks)
        varies = new < num and self.history.varies(known)
        places = {*known.standing, *self.own, known.common, new, known.head, *range(max(0, num - OFFSETS), num)}
        places |= {i for i in range(max(0, self.read), num - 1) if blocks[i].section != blocks[i + 1].section}
        found: list[Candidate] = []
        for i in sorted(places):
            if not self.read < i < num or i < 0 or ends[i] < self.profile.minimum:
                continue
            if i == self.implicit or self._markable(i):
                awaited = NEVER if varies and i >= new else hazards[i]
                found.append(candidate(i, ends[i], awaited, self.rates, stands=i in known.standing, paid=i <= top))
        if varies:
            text = "Every request has something else here: nothing from here on is worth keeping."
            self._say("varying", text, blocks[new].path)
        return found

    def _markable(self, index: int) -> bool:
        block = self.prompt.blocks[index]
        if self.anthropic:
            return block.kind not in ("empty", "thinking")
        # Parts of what users, developers and tools say; not a text that stands for a whole list of messages.
        parts = block.kind in ("text", "image", "audio", "document", "tool_result")
        return parts and block.role in ("user", "system", "tool") and block.path.startswith(("messages[", "input["))

    def _mark(self, last: int, long: int, choice: Choice) -> None:
        """Takes breakpoints in the order of their worth, as many as there are."""
        for block, ttl in self.own.items():
            self._say("kept", f"The client's own breakpoint ({ttl}).", self.prompt.blocks[block].path)
        self._take(last, "marked", "Up to here it is likely to be asked for again.", choice.gain - choice.long_gain)
        self._take(long, "marked", "Up to here for the longer lifetime.")
        if self.read >= 0 and not self._reaches(self.read):
            saved = (self.rates.write if last >= 0 else 1.0) - self.rates.read
            text = "An entry lies here, which the look-back of the other breakpoints would miss."
            self._take(self.read, "reach", text, self.lengths.ends[self.read] * saved)
        stands = [i for i in self.known.standing if i <= max(last, self.read)]
        for block in sorted(stands, key=lambda i: (i != self.known.head, -i)):
            self._take(block, "marked", "Requests part here; its entry is kept alive.")
        for block in self._turns(last):
            self._take(block, "marked", "The end of an earlier part: another request may begin like it.")

    def _take(self, block: int, code: Code, text: str, tokens: float = 0.0) -> None:
        """A breakpoint behind `block`, if it can have one, has none yet, and there is one left."""
        taken = block in self.own or any(mark.block == block for mark in self.marks)
        if block == self.implicit and block > self.long:
            return
        if block < 0 or taken or not self._markable(block) or self.lengths.ends[block] < self.profile.minimum:
            return
        path = self.prompt.blocks[block].path
        if len(self.marks) < self.num_slots:
            ttl = self.rates.long if self.rates.long and block <= self.long else self.rates.short
            self.marks.append(Mark(path, ttl, block))
            self._say(code, text, path, round(tokens))
        elif not any(reason.code == "no-slot" for reason in self.reasons):
            self._say("no-slot", "All breakpoints are taken.", path)

    def _reaches(self, block: int) -> bool:
        if self.anthropic and any(0 <= mark.block - block < self.profile.lookback for mark in self.marks):
            return True  # a position is one block or more
        sent = marked(self.prompt, self.marks, self.fields)
        return block in breakpoints.plan(sent, self.lengths, self.profile).lookups

    def _turns(self, last: int) -> list[int]:
        """Ends of parts up to `last` that nothing is known of yet: of the turn before, the sections, the first message."""
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
            and not self.profile.generic
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
        found = value(affinity, self.history.owner, what, partition)
        if affinity.header:
            self.headers[affinity.header] = found
        else:
            self.fields[affinity.field] = found
        parted = f", part {partition + 1} of those that are too many for one" if partition else ""
        self._say(
            "cache-key", f"{affinity.header or affinity.field} for {name}: what belongs together goes to one place{parted}."
        )

    def warn(self) -> None:
        """S7 (g)."""
        price, total = self.profile.price, self.lengths.total
        if price is not None and price.above is not None and total > price.above:
            text = f"Beyond {price.above:,} tokens all of the request costs {price.above_input} times as much."
            self._say("dear", text, "", round(total * (1 - float(price.above_input))))

    # -- reasons -------------------------------------------------------------------------------------------------------

    def _against(self, candidates: Sequence[Candidate], choice: Choice) -> None:
        """Why the rest is not written, and why it is written for so long."""
        rates = self.rates
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
