"""The prompt optimiser at work: a body on its way to an upstream gets what its provider's cache needs, and goes in its turn.

What was decided, also in mode "advise", is told in one `Optimised` event. Lengths are estimates: what a token is only the
provider knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from anaphora import profiles
from anaphora.backends.echo_lengths import Counter
from anaphora.backends.pinging import Pinging, Sent
from anaphora.clock import Clock
from anaphora.events import Emit, Optimised
from anaphora.optimiser import FanOut, Histories, History, Known, Plan, Settings, Turn, apply, cold, plan
from anaphora.optimiser.rewrites import Change, move_volatile_lines, sort_schema_keys, sort_tools
from anaphora.profiles import Profile
from anaphora.prompt import Lengths, Prompt
from anaphora.types import Request, Scope
from anaphora.wire.anthropic_prompt import read_prompt
from anaphora.wire.fields import Json
from anaphora.wire.openai_prompt import read_chat, read_responses

Mode = Literal["off", "advise", "on"]
Rewrite = Literal["tools", "schemas", "volatile"]

_READERS: dict[str, Callable[[Json], Prompt]] = {
    "anthropic": read_prompt,
    "openai_chat": read_chat,
    "openai_responses": read_responses,
}
_REWRITES: dict[Rewrite, Callable[[Json], tuple[Json, list[Change]]]] = {
    "tools": sort_tools,
    "schemas": sort_schema_keys,
    "volatile": move_volatile_lines,
}


class OptimiserOptions(msgspec.Struct, frozen=True):
    mode: Mode = "off"
    rewrites: tuple[Rewrite, ...] = ()
    """Changes of the order of things in a body, which nobody gets without asking for them."""
    provider: str = ""
    """Whose fields and headers keep what belongs together in one place, where it is not the model's own provider."""
    retain: bool = False
    """Have classic models of OpenAI keep prompts for a day."""
    like: str = ""
    """The profile whose rules hold for models that none is known for."""


class Sending:
    """One body on its way. `wait` before it is sent, `begun` at the first token of its answer, `over` in any case."""

    def __init__(self, body: Json, headers: dict[str, str], summary: str, turn: Turn | None, learn: Callable[[], None]) -> None:
        self.body = body
        self.headers = headers
        self.summary = summary
        """Of what was decided, for a header of the answer."""
        self._turn = turn
        self._learn = learn

    async def wait(self) -> None:
        """Where another request is just writing the same prefix, until that can be read."""
        if self._turn is not None:
            await self._turn.wait()
        self._learn()

    def begun(self) -> None:
        if self._turn is not None:
            self._turn.begun()

    def over(self) -> None:
        if self._turn is not None:
            self._turn.over()


class Optimising:
    """For one event loop; upstreams share it, histories and turns are apart for each of them."""

    def __init__(self, *, clock: Clock, emit: Emit, pinging: Pinging | None = None) -> None:
        self.pinging = Pinging(0, clock=clock, emit=emit) if pinging is None else pinging
        self._clock = clock
        self._emit = emit
        self._histories = Histories()
        self._fan_out = FanOut()
        self._counter = Counter()

    def prepare(self, request: Request, dialect: str, body: Json, upstream: str, options: OptimiserOptions) -> Sending | None:
        """`body` as it is to be sent for `request`. None: it goes as it is, and nothing is learned of it."""
        reader = _READERS.get(dialect)
        if options.mode == "off" or reader is None:
            return None
        active = options.mode == "on"
        changes: list[Change] = []
        sent = body
        if active:
            for kind in options.rewrites:
                sent, made = _REWRITES[kind](sent)
                changes += made
        prompt = reader(sent)
        profile = profiles.find(prompt.model, prompt.dialect, options.like or None)
        lengths = self._counter.lengths(prompt)
        route = f"{upstream}\0{prompt.model}"
        history = self._histories.of(request.tenant, route)
        now_s = self._clock.now_s()
        known = history.know(prompt, profile, now_s)
        found = plan(prompt, lengths, profile, history, now_s, Settings(options.mode, options.provider, options.retain), known)
        self._tell(request, upstream, prompt.model, options.mode, found, changes)
        used = found if active else None
        turn = None
        if active:
            need = cold(prompt, lengths, profile, known, found)
            turn = self._fan_out.turn(f"{request.tenant}\0{route}", need)
            if not found.empty:
                sent = apply(sent, found)
        headers = dict(found.headers) if active else {}
        learn = self._learner(history, prompt, lengths, profile, used)
        kept = Sent(request, upstream, prompt, lengths, profile, history, found, dict(sent)) if active else None

        def leave() -> None:
            learn()
            if kept is not None:
                self.pinging.sent(kept)

        return Sending(sent, headers, _summary(options.mode, found), turn, leave)

    def forget(self, scope: Scope) -> int:
        self.pinging.forget(scope)
        return self._histories.forget(scope)

    def _learner(
        self, history: History, prompt: Prompt, lengths: Lengths, profile: Profile, used: Plan | None
    ) -> Callable[[], None]:
        def learn() -> None:
            now_s = self._clock.now_s()
            known: Known = history.know(prompt, profile, now_s)
            history.learn(prompt, lengths, profile, known, now_s, used)

        return learn

    def _tell(self, request: Request, upstream: str, model: str, mode: Mode, found: Plan, changes: Sequence[Change]) -> None:
        request_id = "" if request.native is None else request.native.request_id
        reasons = [msgspec.to_builtins(reason, str_keys=True) for reason in found.reasons]
        reasons += [{"code": change.kind, "path": change.path, "text": change.text} for change in changes]
        marks = tuple(f"{mark.path} ({mark.ttl})" for mark in found.marks)
        self._emit(Optimised(request.tenant, request_id, model, upstream, mode, marks, tuple(reasons)))


def _summary(mode: Mode, found: Plan) -> str:
    saved = sum(reason.tokens for reason in found.reasons if reason.tokens > 0)
    return f"{mode}; marks={len(found.marks)}; saves={saved}"
