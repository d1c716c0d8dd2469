"""How often `anaphora lint` cries wolf on real sessions whose prompts only ever grow, and how often it finds a planted fault.

Reads the data sets under $ANAPHORA_DATA (folders `lmcache-agent-trace` and `tau-bench`), turns each session into requests of
each dialect, and prints what the linter finds: every such finding is one to read and judge. Then plants one fault at a time in
the dialogues of tau-bench that have at least six requests.

    ANAPHORA_DATA=/path/to/data python benchmarks/lint_precision.py [--show]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tarfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anaphora.lint import Report, lint, read

Message = dict[str, object]
Line = dict[str, object]
Plant = Callable[[int, list[Message]], list[Message]]
MODELS = {"anthropic": "claude-opus-5-5", "openai 5.6": "gpt-5.6-sol", "openai classic": "gpt-4.1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print every finding")
    show = parser.parse_args().show
    root = os.environ.get("ANAPHORA_DATA")
    if root is None:
        print("set ANAPHORA_DATA to the folder of the data sets", file=sys.stderr)
        return 2
    corpora: dict[str, Callable[[Path, str], Iterator[Line]]] = {
        "miniswe, turns": miniswe_turns,
        "miniswe, turns, no session ids": lambda path, model: anonymous(miniswe_turns(path, model)),
        "miniswe, one text": miniswe_texts,
        "tau-bench": tau_bench,
        "tau-bench, interleaved": lambda path, model: interleaved(tau_bench(path, model)),
        "airline, turns": airline_turns,
        "airline, turns, no session ids": lambda path, model: anonymous(airline_turns(path, model)),
        "teams of agents": teams,
        "teams of agents, no session ids": lambda path, model: anonymous(teams(path, model)),
    }
    print(f"{'corpus':32} {'dialect':16} {'requests':>8} {'sessions':>8} {'findings':>8} {'seconds':>8}")
    for name, corpus in corpora.items():
        for dialect, model in MODELS.items():
            lines = [json.dumps(line, ensure_ascii=False) for line in corpus(Path(root), model)]
            started = time.perf_counter()
            report = lint(read(name.replace(" ", "-"), lines))
            took = time.perf_counter() - started
            counts = f"{report.num_requests:8} {report.num_sessions:8} {len(report.findings):8} {took:8.2f}"
            print(f"{name:32} {dialect:16} {counts} {_codes(report)}")
            for finding in report.findings if show else ():
                print("   ", finding)
    print(f"\n{'planted in tau-bench, openai 5.6':32} {'dialogues':>9} {'found':>8} {'other findings':>15}")
    for code, plant in PLANTS.items():
        num, found, others = planted(Path(root), code, plant)
        print(f"{code:32} {num:9} {found:8} {others:15}")
    return 0


def planted(root: Path, code: str, plant: Plant) -> tuple[int, int, int]:
    """Dialogues, each linted alone with one fault in it; those in which it is found; and findings of anything else."""
    dialogues: dict[str, list[tuple[Line, list[Message]]]] = {}
    for line, messages in _dialogues(root):
        dialogues.setdefault(str(line["session"]), []).append((line, messages))
    num = found = others = 0
    for requests in dialogues.values():
        if len(requests) < 6:
            continue
        lines = [
            {**line, "request": {"model": MODELS["openai 5.6"], "messages": plant(number, messages)}}
            for number, (line, messages) in enumerate(requests)
        ]
        codes = Counter(finding.code for finding in lint(read("planted", map(json.dumps, lines))).findings)
        num, found, others = num + 1, found + (code in codes), others + codes.total() - codes[code]
    return num, found, others


def _in_policy(text: Callable[[int, str], str]) -> Plant:
    return lambda number, messages: [{**messages[0], "content": text(number, str(messages[0]["content"]))}, *messages[1:]]


def _shuffled(number: int, policy: str) -> str:
    parts = policy.split("\n\n")
    return "\n\n".join([parts[0], *parts[2:], parts[1]] if number % 2 else parts)


PLANTS: dict[str, Plant] = {
    "timestamp": _in_policy(lambda number, policy: f"Now: 2026-03-02T09:{number:02}:05Z\n{policy}"),
    "uuid": _in_policy(lambda number, policy: f"Conversation {uuid.UUID(int=number)}\n{policy}"),
    "request-id": _in_policy(lambda number, policy: f"{policy}\nTrace req_{number:08}x"),
    "volatile-value": _in_policy(lambda number, policy: f"Turns left: {30 - number}\n{policy}"),
    "line-endings": _in_policy(lambda number, policy: policy.replace("\n", "\r\n") if number > 2 else policy),
    "whitespace-drift": _in_policy(lambda number, policy: policy.replace("\n\n", "\n\n\n", number % 2)),
    "few-shot-shuffle": _in_policy(_shuffled),
    "system-changed": _in_policy(lambda number, policy: f"{'Be brief. ' if number > 2 else ''}{policy}"),
    "history-dropped": lambda number, messages: [messages[0], *messages[1:][-9:]],
}


def miniswe_turns(root: Path, model: str) -> Iterator[Line]:
    """Conversations of an agent that mends programs."""
    yield from _grown(root, "miniswe/", model)


def airline_turns(root: Path, model: str) -> Iterator[Line]:
    """Conversations of an airline's agent and, in the same session, of the simulated customer. Behind one long policy, as
    their prompts had one that was not recorded (tau-bench's retail policy stands for it)."""
    policy = (root / "tau-bench" / "retail_wiki.md").read_text("utf-8")
    yield from _grown(root, "taubench/", model, [{"role": "system", "content": policy}])


def _grown(root: Path, folder: str, model: str, start_with: Sequence[Message] = ()) -> Iterator[Line]:
    """Each recorded text, cut where an earlier one ended, with the recorded answers in between."""
    for name, calls in _calls(root, folder):
        fresh: tuple[str, str, list[Message]] = ("", "", list(start_with))
        known: list[tuple[str, str, list[Message]]] = []
        for call in calls:
            text = str(call["input"])
            before = [one for one in known if one[0] and text.startswith(one[0])]
            start = max(before, key=lambda one: len(one[0]), default=fresh)
            answer: list[Message] = [{"role": "assistant", "content": start[1] or "(nothing)"}] if start[0] else []
            messages: list[Message] = [*start[2], *answer, {"role": "user", "content": text[len(start[0]) :] or "(nothing)"}]
            known.append((text, str(call["output"]), messages))
            yield _line(model, messages, name, float(str(call["timestamp"])))


def teams(root: Path, model: str) -> Iterator[Line]:
    """An orchestrator, a web surfer and others, who share sessions; the recorded texts name the role of every message."""
    for name, calls in _calls(root, "magagent/"):
        for call in calls:
            _, *parts = _ROLE.split(str(call["input"]))
            messages: list[Message] = [
                {"role": "user" if role == "tool" else role, "content": text.rstrip("\n") or "(nothing)"}
                for role, text in zip(parts[::2], parts[1::2], strict=True)
            ]
            if messages:
                yield _line(model, messages, name, float(str(call["timestamp"])))


_ROLE = re.compile(r"^(user|assistant|system|tool): ", re.MULTILINE)


def miniswe_texts(root: Path, model: str) -> Iterator[Line]:
    """The recorded text as one user message, which grows from call to call."""
    for name, calls in _calls(root, "miniswe/"):
        for call in calls:
            yield _line(model, [{"role": "user", "content": call["input"]}], name, float(str(call["timestamp"])))


def tau_bench(root: Path, model: str) -> Iterator[Line]:
    """Dialogues of an agent with one long policy: a request for every turn of the assistant, seven seconds apart,
    one dialogue every four minutes."""
    for line, messages in _dialogues(root):
        yield _line(model, messages, str(line["session"]), float(str(line["timestamp"])))


def _dialogues(root: Path) -> Iterator[tuple[Line, list[Message]]]:
    folder = root / "tau-bench"
    policy = (folder / "retail_wiki.md").read_text("utf-8")
    with gzip.open(folder / "MockRetailDomainEnv-few_shot.jsonl.gz", "rt", encoding="utf-8") as rows:
        for number, row in enumerate(rows):
            messages: list[Message] = [{"role": "system", "content": policy}]
            for turn in _turns(json.loads(row)["messages_display"]):
                if turn["role"] == "assistant" and messages[-1]["role"] != "assistant":
                    time_us = 1.7e15 + 1e6 * (7 * len(messages) + 240 * number)
                    yield {"timestamp": time_us, "session": f"dialogue-{number}"}, messages
                messages = [*messages, turn]


def interleaved(lines: Iterator[Line]) -> Iterator[Line]:
    """The first requests of all sessions, then all the second ones, ...: in one file, without ids and times."""
    rounds: dict[str, int] = Counter()
    placed = []
    for line in lines:
        rounds[str(line["session"])] += 1
        placed.append((rounds[str(line["session"])], line))
    for _, line in sorted(placed, key=lambda pair: pair[0]):
        yield {"request": line["request"]}


def anonymous(lines: Iterator[Line]) -> Iterator[Line]:
    for line in lines:
        yield {name: value for name, value in line.items() if name != "session"}


def _calls(root: Path, folder: str) -> Iterator[tuple[str, list[dict[str, object]]]]:
    with tarfile.open(root / "lmcache-agent-trace" / "sessions.tar.gz") as archive:
        for member in archive:
            if folder in member.name and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                calls = [json.loads(line) for line in content]
                yield member.name, sorted(calls, key=lambda call: int(str(call["timestamp"])))


def _turns(text: str) -> Iterator[Message]:
    """`user: ...`, `assistant: ...`, `tool: ...`; a tool's result is the user's turn, a call is shown as None."""
    turn: Message | None = None
    for line in text.split("\n"):
        role, colon, rest = line.partition(": ")
        if colon and role in ("user", "assistant", "tool"):
            if turn is not None:
                yield turn
            shown = "user" if role == "tool" else role
            turn = {"role": shown, "content": "(calls a tool)" if rest == "None" else rest or "(nothing)"}
        elif turn is not None:
            turn["content"] = f"{turn['content']}\n{line}"
    if turn is not None:
        yield turn


def _line(model: str, messages: list[Message], session: str, time_us: float) -> Line:
    body: Line = {"model": model, "messages": messages}
    if model.startswith("claude"):
        system = [message["content"] for message in messages if message["role"] == "system"]
        rest = [message for message in messages if message["role"] != "system"]
        body = {"model": model, "max_tokens": 1024, "cache_control": {"type": "ephemeral"}, "messages": rest}
        if system:
            # As Anthropic's guide has it: the part that all conversations share is marked, and so is the end of each.
            body["system"] = [{"type": "text", "text": system[0], "cache_control": {"type": "ephemeral"}}]
    return {"timestamp": time_us, "session": session, "request": body}


def _codes(report: Report) -> str:
    codes = Counter(finding.code for finding in report.findings)
    return ", ".join(f"{code} {num}" for code, num in codes.most_common())


if __name__ == "__main__":
    sys.exit(main())
