"""Real requests with their times, as prompts of blocks, for `optimiser.py`. What is assumed is said for each set."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import msgspec

from anaphora.prompt import Block, BlockKind, Lengths, Prompt, Section

Dialect = Literal["anthropic", "openai"]
PART_TOKENS = 256
"""Of the blocks that turns are cut into where turns are to be wide."""


class Piece(msgspec.Struct, frozen=True):
    role: str
    """`tools`, `system`, `user` or `assistant`."""
    kind: BlockKind
    content: bytes
    tokens: int


class Sent(msgspec.Struct, frozen=True):
    time_s: float
    pieces: tuple[Piece, ...]


class Set(msgspec.Struct, frozen=True):
    name: str
    requests: list[Sent]
    """In order of time."""


def text(role: str, words: str, kind: BlockKind = "text") -> Piece:
    """Four bytes are a token."""
    return Piece(role, kind, words.encode(), -(-len(words.encode()) // 4))


def prompt_of(pieces: tuple[Piece, ...], dialect: Dialect, model: str) -> tuple[Prompt, Lengths]:
    """Neighbours of one role are one message."""
    blocks: list[Block] = []
    ends: list[int] = []
    message, place, total, before = -1, 0, 0, ""
    for piece in pieces:
        joins = piece.role == before
        place = place + 1 if joins else 0
        section: Section = "messages"
        if piece.role in ("tools", "system"):
            section = "tools" if piece.role == "tools" else "system"
        if dialect == "openai" and section == "system":
            section = "messages"
        message += section == "messages" and not joins
        if section == "messages":
            path = f"messages.{message}.content.{place}" if dialect == "anthropic" else f"messages[{message}].content[{place}]"
        else:
            path = f"{section}.{place}" if dialect == "anthropic" else f"{section}[{place}]"
        role = "tool" if dialect == "openai" and piece.kind == "tool_result" else piece.role
        content = f"{piece.role}|".encode() + piece.content
        number = message if section == "messages" else -1
        blocks.append(Block(section, piece.kind, content, path, "" if section == "tools" else role, number))
        total += piece.tokens
        ends.append(total)
        before = piece.role
    return Prompt(dialect=dialect, model=model, blocks=tuple(blocks)), Lengths(tuple(ends), total)


def sets(data: Path, num_sessions: int) -> Iterator[Set]:
    wiki = (data / "tau-bench" / "retail_wiki.md").read_text()
    yield Set("miniswe: 12 agent sessions, recorded text and times", in_time(_miniswe(data)))
    sessions = list(_claude_code(data, num_sessions))
    title = f"{len(sessions)} coding sessions, recorded lengths and times"
    yield Set(f"claude-code: {title}", in_time(_spread(sessions, every_s=3600.0)))
    wide = [[msgspec.structs.replace(one, pieces=_cut(one.pieces)) for one in session] for session in sessions[:20]]
    yield Set(f"wide turns: 20 of them, new text in parts of {PART_TOKENS} tokens", in_time(_spread(wide, every_s=3600.0)))
    yield Set("tau-bench: 69 dialogues, replies after 40 s in the median", in_time(_tau(data, wiki)))
    yield Set("one-shot: 500 questions under one system prompt, one each 20 s", list(_one_shot(data, wiki, every_s=20.0)))
    yield Set("one-shot, slow: the same, one each 15 minutes", list(_one_shot(data, wiki, every_s=900.0)))
    yield Set("documents: 612 questions about 24 articles, one each 10 s", list(_documents(data, wiki)))
    yield Set("nothing shared: 100 long one-shot prompts, one each 20 s", list(_alone(data)))


def in_time(requests: list[Sent]) -> list[Sent]:
    return sorted(requests, key=lambda one: one.time_s)


def _spread(sessions: list[list[Sent]], every_s: float) -> list[Sent]:
    """Sessions whose own clocks start at 0, one beginning after the other."""
    return [
        msgspec.structs.replace(one, time_s=one.time_s + every_s * number)
        for number, session in enumerate(sessions)
        for one in session
    ]


def _members(archive: Path) -> Iterator[tuple[str, io.BufferedReader]]:
    with tarfile.open(archive) as tar:
        for member in sorted(tar, key=lambda one: one.name):
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file


def _miniswe(data: Path) -> list[Sent]:
    """The recording has each call's whole input without the model's turns; those are put back from the outputs."""
    found: list[Sent] = []
    for name, file in _members(data / "lmcache-agent-trace" / "sessions.tar.gz"):
        if "/miniswe/" not in f"/{name}" or not name.endswith(".jsonl"):
            continue
        known: list[tuple[str, str, tuple[Piece, ...]]] = []
        for row in map(json.loads, file):
            whole, pieces = row["input"], tuple[Piece, ...]()
            before = max((one for one in known if whole.startswith(one[0])), key=lambda one: len(one[0]), default=None)
            rest = whole
            if before is not None:
                rest = whole[len(before[0]) :]
                pieces = before[2] + ((text("assistant", before[1]),) if rest else ())
            pieces += tuple(text("user", part) for part in re.split(r"(?=\n\n<returncode>)", rest) if part)
            known.append((whole, row["output"], pieces))
            found.append(Sent(row["timestamp"] / 1e6, pieces))
    return found


def _claude_code(data: Path, num_sessions: int) -> Iterator[list[Sent]]:
    """Blocks have no text, but lengths, and names that are equal for equal prefixes; the kinds of blocks are recorded."""
    for number, (name, file) in enumerate(_members(data / "kv-cache-tester" / "claude_code_traces_mod8_1.tar.gz")):
        if number == num_sessions:
            return
        yield list(_session(name, json.load(file)))


def _session(name: str, trace: dict[str, Any]) -> Iterator[Sent]:
    size = trace["block_size"]
    paths: dict[int, tuple[tuple[Piece, ...], int]] = {}
    """By the hash in which a piece ends: the pieces up to it, and their tokens."""
    answers: dict[int, tuple[list[str], int]] = {}
    for request in trace["requests"]:
        ids = request.get("hash_ids")
        if not ids:
            continue
        place = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in paths), None)
        pieces, total = paths[ids[place]] if place is not None else ((), 0)
        new = len(ids) * size - total
        parts: list[tuple[str, BlockKind, int]] = []
        if not pieces:
            tools = min(trace["tool_tokens"], new)
            parts += [("tools", "tool", tools), ("system", "text", min(trace["system_tokens"], new - tools))]
        elif new and place is not None and ids[place] in answers:
            kinds, out = answers[ids[place]]
            parts += [("assistant", _kind(kind), min(out, new // 2) // len(kinds)) for kind in kinds]
        new -= sum(tokens for _, _, tokens in parts)
        kinds = request["input_types"] or ["text"]
        parts += [
            ("user", _kind(kind), new // len(kinds) + (new % len(kinds) if i == 0 else 0)) for i, kind in enumerate(kinds)
        ]
        for role, kind, tokens in parts:
            if tokens > 0:
                total += tokens
                end = ids[-(-total // size) - 1]
                content = blake2b(f"{name}|{end}|{total}|{role}".encode(), digest_size=16).digest()
                pieces += (Piece(role, kind, content, tokens),)
                paths[end] = (pieces, total)
        answers[ids[-1]] = (request["output_types"], request["out"])
        yield Sent(float(request["t"]), pieces)


def _kind(name: str) -> BlockKind:
    kinds: dict[str, BlockKind] = {
        "tool_result": "tool_result",
        "tool_use": "tool_use",
        "thinking": "thinking",
        "image": "image",
    }
    return kinds.get(name, "text")


def _cut(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """What users and tools said, in parts, as search results and documents come."""
    out: list[Piece] = []
    for piece in pieces:
        if piece.role != "user" or piece.tokens <= PART_TOKENS:
            out.append(piece)
            continue
        for number in range(-(-piece.tokens // PART_TOKENS)):
            tokens = min(PART_TOKENS, piece.tokens - number * PART_TOKENS)
            out.append(Piece("user", "text", piece.content + number.to_bytes(4, "big"), tokens))
    return tuple(out)


_TURN = re.compile(r"^(user|assistant|tool): ", re.MULTILINE)


def _tau(data: Path, wiki: str) -> list[Sent]:
    """Times are assumed: a dialogue begins every two minutes, tools answer in 3 s, people in 40 s in the median."""
    chance = random.Random(7)
    found: list[Sent] = []
    with gzip.open(data / "tau-bench" / "MockRetailDomainEnv-few_shot.jsonl.gz", "rt") as lines:
        for number, line in enumerate(lines):
            parts = _TURN.split(json.loads(line)["messages_display"])[1:]
            pieces: tuple[Piece, ...] = (text("system", wiki),)
            time_s = number * 120.0
            for role, words in zip(parts[::2], parts[1::2], strict=True):
                if role == "assistant":
                    found.append(Sent(time_s, pieces))
                    kind: BlockKind = "tool_use" if words.strip() == "None" else "text"
                    pieces += (text("assistant", f"{words} {number} {len(pieces)}" if kind == "tool_use" else words, kind),)
                else:
                    time_s += 3.0 if role == "tool" else chance.lognormvariate(3.7, 1.2)
                    pieces += (text("user", words, "tool_result" if role == "tool" else "text"),)
    return found


def _one_shot(data: Path, wiki: str, every_s: float) -> Iterator[Sent]:
    with gzip.open(data / "arena-hard" / "arena-hard-v0.1_question.jsonl.gz", "rt") as lines:
        for number, line in enumerate(lines):
            yield Sent(number * every_s, (text("system", wiki), text("user", json.loads(line)["prompt"])))


def _documents(data: Path, wiki: str) -> Iterator[Sent]:
    """An article and a question about it, in two blocks of one message; the questions of one article follow each other."""
    with gzip.open(data / "xquad" / "xquad.en.json.gz", "rt") as file:
        articles = json.load(file)["data"]
    number = 0
    for article in articles:
        context = text("user", "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield Sent(number * 10.0, (text("system", wiki), context, text("user", asked["question"])))
                number += 1


def _alone(data: Path) -> Iterator[Sent]:
    with gzip.open(data / "lost-in-the-middle" / "kv-retrieval-75_first100.jsonl.gz", "rt") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            words = "\n".join(f"{key}: {value}" for key, value in row["ordered_kv_records"])
            yield Sent(number * 20.0, (text("user", f"{words}\nWhat is the value of {row['key']}?"),))
