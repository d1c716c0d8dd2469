"""What the prompt optimiser saves on real requests, by the providers' own rules and prices. Prints a table, writes JSON.

Every set of requests (`optimiser_sets.py`) is charged to books of its own: as it is, as LiteLLM marks it by default (the system
prompt and the last message), with the optimiser, and with the day's retention where a model has it. Beside them stands a bound:
each block priced alone by whoever knows the future, with any number of breakpoints, below the price of long prompts. No policy
can be cheaper, and part of the way there is open to none.

    ANAPHORA_DATA=... python benchmarks/optimiser.py [--sessions 87] [--models claude-opus-5,...] [--json FILE] [--only SET]

`--wire` sends one agent session's real bodies to a real `anaphora serve --engine echo --virtual-clock` instead, and compares
what its answers say with the books. `--speed` measures what a plan costs in time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from optimiser_sets import Piece, Sent, Set, prompt_of, sets

from anaphora import breakpoints
from anaphora.backends.echo_lengths import Counter
from anaphora.clock import ManualClock
from anaphora.optimiser import History, Mark, Plan, Settings, apply, plan
from anaphora.optimiser.history import marked
from anaphora.profiles import Profile, find, prices
from anaphora.promises import Books
from anaphora.prompt import TTL_S, Lengths, Prompt
from anaphora.testing.plugin import anaphora_emulator
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic_prompt import read_prompt

MODELS = ("claude-opus-5", "claude-sonnet-5-5", "gpt-4.1", "gpt-5.6-sol")
FIRST_TOKEN_S = 1.0
"""From a request to the moment at which others can read what it wrote (R22)."""


class Sum(msgspec.Struct):
    """What a set cost with one policy."""

    usd: float
    read: float
    """Share of all prompt tokens."""
    written: float
    seconds: float = 0.0


Policy = Callable[[Prompt, Lengths, float], Prompt]


def charge(requests: Sequence[Sent], profile: Profile, policy: Policy) -> Sum:
    books = Books(ManualClock(), max_entries=10**7)
    read = written = total = 0
    usd, spent = Decimal(0), 0.0
    for one in requests:
        prompt, lengths = prompt_of(one.pieces, profile.dialect, profile.name)
        start = time.perf_counter()
        prompt = policy(prompt, lengths, one.time_s)
        spent += time.perf_counter() - start
        made = books.charge(LOCAL_TENANT, prompt, profile, lengths, one.time_s)
        books.visible(made, one.time_s + FIRST_TOKEN_S)
        read, written = read + made.usage.read, written + sum(made.usage.written.values())
        total += prices.total(made.usage)
        cost = prices.cost(profile, made.usage, 0, model=profile.name)
        assert cost is not None
        usd += cost.input
    return Sum(float(usd), read / total, written / total, spent)


def off(prompt: Prompt, lengths: Lengths, now_s: float) -> Prompt:
    return prompt


def litellm(profile: Profile) -> Policy:
    """Its two default points: every message of the system (the last block of each), and the last message. Five minutes."""

    def mark(prompt: Prompt, lengths: Lengths, now_s: float) -> Prompt:
        if profile.accounting == "openai-classic":
            return prompt
        blocks = prompt.blocks
        able = [i for i, block in enumerate(blocks) if block.kind not in ("thinking", "empty", "tool")]
        system = [i for i in able if blocks[i].role == "system"][-1:]
        last = [i for i in able if blocks[i].message == blocks[-1].message][-1:]
        ttl = profile.ttls[0]
        new = [msgspec.structs.replace(b, mark=ttl) if i in system + last else b for i, b in enumerate(blocks)]
        return msgspec.structs.replace(prompt, blocks=tuple(new))

    return mark


def optimised(profile: Profile, *, retain: bool = False) -> Policy:
    history, settings = History(), Settings(mode="on", retain=retain)

    def mark(prompt: Prompt, lengths: Lengths, now_s: float) -> Prompt:
        known = history.know(prompt, profile, now_s)
        found = plan(prompt, lengths, profile, history, now_s, settings, known)
        history.learn(prompt, lengths, profile, known, now_s, found)
        sent = marked(prompt, found.marks, found.fields)
        key, kept = found.fields.get("prompt_cache_key"), found.fields.get("prompt_cache_retention")
        return msgspec.structs.replace(sent, cache_key=key, retention=kept or sent.retention)

    return mark


def bound(requests: Sequence[Sent], profile: Profile) -> float:
    """US dollars. Each block alone: at each time it is asked for it is read, or computed, or written for one of the lifetimes;
    whatever is read may be kept for either lifetime from then on."""
    touches: dict[bytes, list[float]] = {}
    sizes: dict[bytes, int] = {}
    short = 0
    for one in requests:
        prompt, lengths = prompt_of(one.pieces, profile.dialect, profile.name)
        before = 0
        for name, end in zip(breakpoints.chain(prompt, profile), lengths.ends, strict=True):
            if lengths.total < profile.minimum:
                short += end - before
            elif end > before:
                touches.setdefault(name, []).append(one.time_s)
                sizes[name] = end - before
            before = end
    assert profile.price is not None
    tokens = short + sum(size * _least(touches[name], profile) for name, size in sizes.items())
    return float(profile.price.input) * tokens / 1e6


def _least(times: list[float], profile: Profile) -> float:
    read = float(profile.rates.read)
    if profile.accounting == "openai-classic":
        writes = {profile.idle_s: 1.0}
    else:
        writes = {TTL_S[ttl]: float(profile.rates.write[ttl]) for ttl in profile.ttls}
    # By the lifetime that what was asked for has from now on (0: it is not kept): what was paid so far.
    paid = {0.0: 1.0, **writes}
    for before, now in itertools.pairwise(times):
        alive = min((cost for life, cost in paid.items() if now - before < life), default=None)
        least = min(paid.values())
        fresh = {0.0: least + 1.0, **{life: least + cost for life, cost in writes.items()}}
        paid = fresh if alive is None else {life: min(cost, alive + read) for life, cost in fresh.items()}
    return min(paid.values())


def compare(one: Set, model: str) -> dict[str, Sum]:
    profile = find(model, "anthropic" if model.startswith("claude") else "openai")
    policies = {"off": off, "litellm": litellm(profile), "on": optimised(profile)}
    if "24h" in profile.retentions:
        policies["on, a day"] = optimised(profile, retain=True)
    found = {name: charge(one.requests, profile, policy) for name, policy in policies.items()}
    found["bound"] = Sum(bound(one.requests, profile), 0.0, 0.0)
    return found


def wire(data: Path) -> None:
    """The first agent session, body by body, through a server: tokens read, written and plain, on the wire and in the books."""
    first = next(one for one in sets(data, 0)).requests
    session = [one for one in first if one.pieces[0].content == first[0].pieces[0].content]
    profile, counter = find("claude-opus-5", "anthropic"), Counter()
    with contextlib.contextmanager(anaphora_emulator.__wrapped__)() as emulator:
        for name, policy in (("off", off), ("litellm", litellm(profile)), ("on", optimised(profile))):
            books, key, now_s = Books(ManualClock()), emulator.new_key(), session[0].time_s
            charged, said = [0, 0, 0], [0, 0, 0]
            for one in session:
                emulator.advance(one.time_s - now_s)
                now_s = one.time_s
                body = body_of(one, profile.name)
                prompt = read_prompt(body)
                lengths = counter.lengths(prompt)
                wanted = policy(prompt, lengths, now_s)
                marks = [Mark(block.path, block.mark, i) for i, block in enumerate(wanted.blocks) if block.mark]
                sent = apply(body, Plan(tuple(marks)))
                usage = books.charge(LOCAL_TENANT, read_prompt(sent), profile, lengths, now_s)
                books.visible(usage, now_s)
                counts = (usage.usage.read, sum(usage.usage.written.values()), usage.usage.plain)
                charged = [a + b for a, b in zip(charged, counts, strict=True)]
                headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
                answer = httpx2.post(f"{emulator.anthropic_base_url}/v1/messages", json=sent, headers=headers, timeout=30)
                told = answer.raise_for_status().json()["usage"]
                fields = ("cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens")
                said = [a + told[field] for a, field in zip(said, fields, strict=True)]
            agree = "agree" if said == charged else "DIFFER"
            print(f"{name:8} {len(session)} requests: read, written, plain on the wire {said}, in the books {charged}: {agree}")


def body_of(one: Sent, model: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for piece in one.pieces:
        if not messages or messages[-1]["role"] != piece.role:
            messages.append({"role": piece.role, "content": []})
        messages[-1]["content"].append({"type": "text", "text": piece.content.decode()})
    return {"model": model, "max_tokens": 4, "messages": messages}


def speed() -> None:
    """Microseconds for one request of a growing conversation, median; `chain` is what the accounting needs anyway."""
    for model in MODELS:
        profile = find(model, "anthropic" if model.startswith("claude") else "openai")
        for num_blocks in (30, 100, 1000):
            history, times = History(), [list[float]() for _ in range(3)]
            for turn in range(40):
                pieces = (Piece("tools", "tool", b"t" * 2000, 500), Piece("system", "text", b"s" * 4000, 1000))
                more = range(num_blocks - 3 - 78 + turn * 2 if num_blocks > 100 else num_blocks - 3)
                pieces += tuple(Piece(("user", "assistant")[i % 2], "text", b"%d" % i * 50, 100) for i in more)
                pieces += (Piece("user", "text", b"last %d" % turn, 10),)
                prompt, lengths = prompt_of(pieces, profile.dialect, model)
                start = time.perf_counter()
                breakpoints.chain(prompt, profile)
                chained = time.perf_counter()
                known = history.know(prompt, profile, turn * 20.0)
                found = plan(prompt, lengths, profile, history, turn * 20.0, Settings(mode="on"), known)
                planned = time.perf_counter()
                history.learn(prompt, lengths, profile, known, turn * 20.0, found)
                for kind, spent in zip(times, (chained - start, planned - chained, time.perf_counter() - planned), strict=True):
                    kind.append(spent * 1e6)
            chain, planning, learning = map(statistics.median, times)
            print(f"{model:18} {num_blocks:5} blocks: plan {planning:6.0f} (of it chain {chain:5.0f}), learn {learning:5.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=87, help="coding sessions, of 87")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--only", default="", help="sets whose name has this in it")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--wire", action="store_true", help="one session through a real server")
    parser.add_argument("--speed", action="store_true", help="microseconds for one plan")
    args = parser.parse_args()
    if args.speed:
        speed()
        return
    data = os.environ.get("ANAPHORA_DATA")
    if not data:
        parser.error("set ANAPHORA_DATA to the folder with the data sets")
    if args.wire:
        wire(Path(data))
        return
    rows: list[dict[str, object]] = []
    print(f"{'set':66} {'model':18} {'off':>9} {'LiteLLM':>9} {'on':>9} {'a day':>9} {'bound':>9}   read off/LiteLLM/on    µs")
    for one in sets(Path(data), args.sessions):
        if args.only not in one.name:
            continue
        for model in args.models.split(","):
            sums = compare(one, model)
            rows.append({"set": one.name, "model": model, "requests": len(one.requests), **msgspec.to_builtins(sums)})
            day = f"{sums['on, a day'].usd:9.3f}" if "on, a day" in sums else " " * 9
            shares = "/".join(f"{sums[name].read:.1%}" for name in ("off", "litellm", "on"))
            money = " ".join(f"{sums[name].usd:9.3f}" for name in ("off", "litellm", "on"))
            each = sums["on"].seconds / len(one.requests) * 1e6
            print(f"{one.name:66} {model:18} {money} {day} {sums['bound'].usd:9.3f}   {shares:20} {each:5.0f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
