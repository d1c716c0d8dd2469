"""Traffic as arrivals: Mooncake's chat service and sessions of Claude Code as recorded, and two small generated loads.

Traces have no texts, but ids of blocks; the ids of a coding session mean nothing in another one.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from anaphora.errors import ConfigError
from anaphora.routing.base import Question, question
from anaphora.routing.simulation import Arrival
from anaphora.types import BlockHash

SESSIONS_APART_S = 120.0
"""Sessions of Claude Code were recorded one by one; here one begins every two minutes."""
MAX_TOKENS = 200_000
"""Longer prompts of the coding sessions are left out: five of a hundred, which need a larger machine than the others."""
_PIECE = 256
"""Tokens of a piece of the sessions' prompts, as the gateway cuts them."""
_SHORT_ANSWER = 12
_COARSE = 8
"""Of the coding sessions' blocks of 64 tokens, so many make one: a prompt has thousands."""


def mooncake(data: Path) -> list[Arrival]:
    """An hour's first half of a chat service: 512 tokens a block, of which all prompts share the first one."""
    path = _found(data / "mooncake" / "conversation_first6015.jsonl.gz")
    with gzip.open(path) as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Arrival(row["timestamp"] / 1e3, _asked("", row["hash_ids"], 512, row["input_length"]), row["output_length"])
        for row in rows
    ]


def claude_code(data: Path, seed: int | None = None) -> list[Arrival]:
    """Sessions of a coding agent: long prompts that grow by a little with every turn. With a seed they come in another order,
    each begun at some moment of its two minutes."""
    path = _found(data / "kv-cache-tester" / "claude_code_traces_mod8_1.tar.gz")
    arrivals: list[Arrival] = []
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".json")), key=lambda m: m.name)
        begins_s = [SESSIONS_APART_S * number for number in range(len(members))]
        if seed is not None:
            rng = Random(seed)
            rng.shuffle(members)
            begins_s = [begin_s + rng.uniform(0, SESSIONS_APART_S) for begin_s in begins_s]
        for begin_s, member in zip(begins_s, members, strict=True):
            file = archive.extractfile(member)
            assert file is not None
            session = json.load(file)
            for row in _all_requests(session["requests"]):
                asked = _asked(session["id"], row["hash_ids"][_COARSE - 1 :: _COARSE], 64 * _COARSE, row["in"])
                arrivals.append(Arrival(begin_s + float(row["t"]), asked, max(1, row["out"])))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def generated(num_sessions: int = 60, seed: int = 1) -> list[Arrival]:
    """Conversations over a handful of long system prompts, which some share; each turn adds to the one before."""
    rng = Random(seed)
    arrivals = []
    begin_s = 0.0
    for session in range(num_sessions):
        begin_s += rng.expovariate(1 / 4.0)
        system = rng.randrange(8)
        chain = [BlockHash(f"system {system}/{index}".encode()) for index in range(8)]
        at_s, num_tokens = begin_s, 512 * len(chain)
        for turn in range(rng.randrange(1, 10)):
            num_tokens += rng.randrange(50, 3000)
            chain += [BlockHash(f"session {session}/{turn}/{index}".encode()) for index in range(len(chain), num_tokens // 512)]
            output_tokens = rng.randrange(20, 600)
            arrivals.append(Arrival(at_s, question(chain, 512, num_tokens), output_tokens))
            num_tokens += output_tokens
            at_s += rng.expovariate(1 / 20.0)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def sessions(num_sessions: int = 6, num_turns: int = 4, seed: int = 1) -> list[Arrival]:
    """Conversations that begin together and have nothing in common; each turn comes within a second of the answer before it,
    and adds a tenth to what it began with."""
    rng = Random(seed)
    arrivals: list[Arrival] = []
    for session in range(num_sessions):
        chain: list[BlockHash] = []
        ends: list[int] = []
        num_tokens, first_tokens = 0, rng.randrange(500, 700)
        for turn in range(num_turns):
            added = first_tokens if turn == 0 else first_tokens // 10
            for end in (*range(num_tokens + _PIECE, num_tokens + added, _PIECE), num_tokens + added):
                chain.append(BlockHash(f"session {session}/{end}".encode()))
                ends.append(end)
            num_tokens += added
            asked = Question(tuple(chain), tuple(ends), num_tokens)
            at_s, after = (rng.uniform(0, 2), None) if turn == 0 else (rng.uniform(0, 1), len(arrivals) - 1)
            arrivals.append(Arrival(at_s, asked, _SHORT_ANSWER, after))
            num_tokens += _SHORT_ANSWER
    return arrivals


def scaled(arrivals: Sequence[Arrival], times: float) -> list[Arrival]:
    """The same, `times` as fast, from 0 on."""
    begin_s = arrivals[0].at_s
    return [Arrival((arrival.at_s - begin_s) / times, arrival.question, arrival.output_tokens) for arrival in arrivals]


def _asked(space: str, ids: Sequence[object], block_size: int, num_tokens: int) -> Question:
    full = ids[: num_tokens // block_size]
    return question([BlockHash(f"{space}/{id}".encode()) for id in full], block_size, num_tokens)


def _all_requests(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if "requests" in row:
            yield from _all_requests(row["requests"])
        elif "hash_ids" in row and 0 < row["in"] <= MAX_TOKENS:
            yield row


def _found(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"ANAPHORA_DATA: there is no {path}")
    return path
