"""The prompt optimiser: what to add to a body so that its provider's cache hits, and why. Pure but for the fan-out's waiting.

history = histories.of(tenant, route)
known = history.know(prompt, profile, now_s)
found = plan(prompt, lengths, profile, history, now_s, settings, known)
body = apply(body, found)                       # in mode "on"; in "advise" only the reasons are used
history.learn(prompt, lengths, profile, known, now_s, found)    # in "advise" without `found`: nothing of it was sent
"""

from __future__ import annotations

from anaphora.optimiser.fanout import Cold, FanOut, Turn, cold
from anaphora.optimiser.history import Histories, History, Known
from anaphora.optimiser.pings import Ping, ping_due
from anaphora.optimiser.planning import Settings, plan
from anaphora.optimiser.plans import Mark, Plan, Reason, apply

__all__ = [
    "Cold",
    "FanOut",
    "Histories",
    "History",
    "Known",
    "Mark",
    "Ping",
    "Plan",
    "Reason",
    "Settings",
    "Turn",
    "apply",
    "cold",
    "ping_due",
    "plan",
]
