"""A gateway under many streams in front of providers that fail at random: is anything lost, counted twice, or mixed up?

Starts test upstreams that refuse, stall and break off, and a gateway in front of them (or takes one that runs). Every question
has words of its own, which are echoed, so that a word of another stream is seen wherever it turns up. In the end every question
must have come to an end that its client was told of, every answer must have been computed exactly once, and the gateway's
memory must be flat. Prints JSON; the status is 1 where something is not as it must be.

    python benchmarks/soak.py [--minutes 20] [--streams 50] [--upstreams 3]
    python benchmarks/soak.py --command 'anaphora serve --config {config} --port 0 --workers 2'
    python benchmarks/soak.py --minutes 1 --direct       without a gateway: a check of this script itself

Memory is read from /proc (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from anaphora.testing.upstream import Control, Fault, Record

FAULTS = (
    Fault("429", share=0.02, retry_after_s=0.05),
    Fault("500", share=0.02),
    Fault("529", share=0.02),
    Fault("reset", share=0.01),
    Fault("cut", share=0.01, after_events=0),
    Fault("cut", share=0.01, after_events=6),
    Fault("error", share=0.01, after_events=5),
    Fault("malformed-json", share=0.01, after_events=5),
    Fault("malformed-sse", share=0.01, after_events=5),
    Fault("slow", share=0.01, wait_s=0.5),
    Fault("stall", share=0.005),
    Fault("stall", share=0.01, wait_s=0.5),
)
CONFIG = """\
[cache]
dir = "{folder}"
ram = "2MiB"
disk = 0
"""
UPSTREAM = """
[[gateway.upstreams]]
name = "{name}"
dialect = "{dialect}"
base_url = "{url}"
key_env = "SOAK_KEY"
first_s = 5
between_s = 2
total_s = 10
kv_tokens = 100_000
"""
COMMAND = f"{shlex.quote(sys.executable)} -m anaphora serve --config {{config}} --port 0"
MODELS = {"messages": "claude-opus-5", "chat": "gpt-4.1", "responses": "gpt-4.1"}
PATHS = {"messages": "/v1/messages", "chat": "/v1/chat/completions", "responses": "/v1/responses"}
STREAMED_SHARE = 0.8
LEFT_SHARE = 0.03
PATIENCE_S = 60.0
MAX_GROWTH_MIB = 8.0
"""Of the gateway over the second half of the run."""
EXAMPLES = 10
MIB = 1 << 20


class Question(msgspec.Struct):
    token: str
    api: str
    text: str
    """That must come back."""
    stream: bool
    outcome: str = "hung"
    """answered, error, left; or what must not be: silent (an end without a sign of it), broken (the connection), hung."""
    said: str = ""
    status: int = 0
    first_s: float | None = None
    error: str = ""
    """What it was told."""
    whole_s: float = 0.0


class Attempt(msgspec.Struct, frozen=True):
    """A question as it reached an upstream."""

    upstream: str
    outcome: str
    fault: str | None


# -- what must hold ------------------------------------------------------------------------------------------------------


def violations(
    questions: Sequence[Question], attempts: Mapping[str, Sequence[Attempt]], max_attempts: int
) -> dict[str, list[str]]:
    """What is not as it must be, by kind, with the tokens of the questions."""
    found: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        tried = attempts.get(question.token, ())
        finished = sum(attempt.outcome == "finished" for attempt in tried)
        whole = question.said == question.text
        if question.outcome in ("silent", "broken", "hung"):
            found[question.outcome].append(question.token)
        if not (whole if question.outcome == "answered" else question.text.startswith(question.said)):
            found["mixed up"].append(question.token)
        if question.outcome == "answered" and not finished:
            found["answered by nobody"].append(question.token)
        if question.outcome == "error" and finished:
            found["lost"].append(question.token)
        if finished > 1:
            found["computed twice"].append(question.token)
        if len(tried) > max_attempts:
            found["tried too often"].append(question.token)
        if any(attempt.outcome == "running" for attempt in tried):
            found["never given up"].append(question.token)
    unasked = attempts.keys() - {question.token for question in questions}
    if unasked:
        found["never asked"] = sorted(unasked)
    return dict(found)


def slope_per_min(samples: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through (seconds, value)."""
    if len(samples) < 2:
        return 0.0
    return 60 * statistics.linear_regression(*zip(*samples, strict=True)).slope


# -- one question ----------------------------------------------------------------------------------------------------------


def new_question(number: int, random_: random.Random) -> Question:
    token = f"q{number}x{random_.getrandbits(32):08x}"
    text = " ".join(f"{token}.{word}" for word in range(random_.randint(8, 40)))
    return Question(token, random_.choice(list(PATHS)), text, random_.random() < STREAMED_SHARE)


def body_of(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"model": MODELS[question.api], "stream": question.stream}
    if question.api == "responses":
        return {**body, "input": question.text}
    limit = {"max_tokens": 1000} if question.api == "messages" else {}
    return {**body, **limit, "messages": [{"role": "user", "content": question.text}]}


def piece(api: str, data: str) -> tuple[str, str]:
    """(text, how it ends: "answered", "error" or not) of one event."""
    if data == "[DONE]":
        return "", "answered"
    event = json.loads(data)
    kind = event.get("type", "")
    if kind in ("error", "response.failed") or event.get("error"):
        return "", "error"
    if kind in ("message_stop", "response.completed"):
        return "", "answered"
    if kind == "content_block_delta":
        return event["delta"].get("text", ""), ""
    if kind == "response.output_text.delta":
        return event["delta"], ""
    if api == "chat" and event.get("choices"):
        return event["choices"][0]["delta"].get("content") or "", ""
    return "", ""


def whole(api: str, body: dict[str, Any]) -> str:
    if api == "messages":
        return "".join(block["text"] for block in body["content"])
    if api == "chat":
        return str(body["choices"][0]["message"]["content"])
    return "".join(part["text"] for item in body["output"] for part in item["content"])


async def ask(client: httpx2.AsyncClient, question: Question, leave_after: int | None) -> None:
    """Fills in what came of it. Whoever leaves does so after that many events."""
    began_s = time.monotonic()
    try:
        async with (
            asyncio.timeout(PATIENCE_S),
            client.stream("POST", PATHS[question.api], json=body_of(question)) as response,
        ):
            question.status = response.status_code
            if response.status_code != 200:
                question.error = (await response.aread()).decode(errors="replace")
                question.outcome = "error"
            elif not question.stream:
                question.said = whole(question.api, json.loads(await response.aread()))
                question.outcome = "answered"
            else:
                question.outcome = "silent"
                number = 0
                async for data in events(response):
                    question.first_s = question.first_s or time.monotonic() - began_s
                    text, end = piece(question.api, data)
                    question.said += text
                    number += 1
                    question.outcome = question.outcome if question.outcome == "error" else end or question.outcome
                    question.error = question.error or (data if end == "error" else "")
                    if number == leave_after and question.outcome == "silent":
                        question.outcome = "left"
                        return
    except TimeoutError:
        question.outcome = "hung"
    except (httpx2.TransportError, ValueError) as error:
        question.outcome, question.error = "broken", repr(error)
    finally:
        question.whole_s = time.monotonic() - began_s


async def events(response: httpx2.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


# -- the run -----------------------------------------------------------------------------------------------------------------


class Watch:
    """Collects what reached the upstreams, and the gateway's memory, while the run goes on."""

    def __init__(self, upstreams: Sequence[tuple[str, Control]], pid: int | None) -> None:
        self.attempts: dict[str, list[Attempt]] = defaultdict(list)
        self.faults: Counter[str] = Counter()
        self.memory: list[tuple[float, float]] = []
        """(seconds since the beginning, MiB)."""
        self._upstreams = upstreams
        self._seen = dict.fromkeys((name for name, _ in upstreams), 0)
        self._pid = pid
        self._began_s = time.monotonic()

    def look(self, settled_within_s: float = 0.0) -> None:
        """What is still under way is left for the next time, unless this is the last one, which waits for it."""
        if self._pid is not None:
            self.memory.append((time.monotonic() - self._began_s, tree_rss(self._pid) / MIB))
        for name, upstream in self._upstreams:
            for record in upstream.seen(after=self._seen[name], settled_within_s=settled_within_s).requests:
                if record.outcome == "running" and not settled_within_s:
                    break
                self._seen[name] = record.number
                self._take(name, record)

    def _take(self, name: str, record: Record) -> None:
        token = re.search(r"q\d+x[0-9a-f]{8}", json.dumps(record.body))
        self.attempts["?" if token is None else token[0]].append(Attempt(name, record.outcome, record.fault))
        self.faults[record.fault or "none"] += 1


async def run(args: argparse.Namespace, url: str, watch: Watch) -> list[Question]:
    random_ = random.Random(args.seed)
    questions: list[Question] = []
    until_s = time.monotonic() + 60 * args.minutes
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=args.streams)
    headers = {"x-api-key": "soak", "authorization": "Bearer soak", "anthropic-version": "2023-06-01"}

    async def one_after_the_other(client: httpx2.AsyncClient) -> None:
        while time.monotonic() < until_s:
            question = new_question(len(questions), random_)
            questions.append(question)
            leave_after = random_.randint(1, 8) if question.stream and random_.random() < LEFT_SHARE else None
            await ask(client, question, leave_after)

    async def look() -> None:
        while True:
            await asyncio.to_thread(watch.look)
            await asyncio.sleep(2)

    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, headers=headers) as client:
        looking = asyncio.create_task(look())
        await asyncio.gather(*(one_after_the_other(client) for _ in range(args.streams)))
        looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await asyncio.to_thread(watch.look, PATIENCE_S)
    return questions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--upstreams", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default=COMMAND, help="starts the gateway; {config} is its configuration")
    parser.add_argument("--config", help="a template to use instead; {url0}, {url1}, ... and {folder} are put in")
    parser.add_argument("--url", help="a gateway that runs already, in front of upstreams at --upstream-url")
    parser.add_argument("--upstream-url", action="append", default=[], help="of a test upstream; may be given again")
    parser.add_argument("--pid", type=int, help="of the gateway at --url, to watch its memory")
    parser.add_argument("--direct", action="store_true", help="no gateway, and no faults")
    parser.add_argument("--max-attempts", type=int, default=12, help="at upstreams for one question (default: %(default)s)")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.url:
            upstreams = [(f"upstream{number}", Control(url)) for number, url in enumerate(args.upstream_url)]
            url, pid = args.url, args.pid
        else:
            count = 1 if args.direct else args.upstreams
            upstreams = [stack.enter_context(upstream(number, args)) for number in range(count)]
            url, pid = (upstreams[0][1].url, None) if args.direct else stack.enter_context(gateway(upstreams, args))
        watch = Watch(upstreams, pid)
        questions = asyncio.run(run(args, url, watch))
    report = reported(args, questions, watch)
    print(json.dumps(report, indent=2))
    return 1 if report["violations"] else 0


def reported(args: argparse.Namespace, questions: Sequence[Question], watch: Watch) -> dict[str, Any]:
    found = violations(questions, watch.attempts, args.max_attempts)
    half = watch.memory[len(watch.memory) // 2 :]
    growth = slope_per_min(half) * (half[-1][0] - half[0][0]) / 60 if half else 0.0
    if growth > MAX_GROWTH_MIB:
        found["memory"] = [f"{growth:.1f} MiB more over the second half"]
    firsts = sorted(question.first_s for question in questions if question.first_s is not None)
    return {
        "minutes": args.minutes,
        "streams": args.streams,
        "upstreams": args.upstreams,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "questions": len(questions),
        "outcomes": dict(Counter(question.outcome for question in questions)),
        "statuses": {str(status): n for status, n in sorted(Counter(question.status for question in questions).items())},
        "attempts": sum(map(len, watch.attempts.values())),
        "faults": dict(watch.faults),
        "first_event_s": {"p50": firsts[len(firsts) // 2], "p99": firsts[len(firsts) * 99 // 100]} if firsts else None,
        "memory_mib": {"begin": watch.memory[0][1], "end": watch.memory[-1][1], "growth": growth} if watch.memory else None,
        "violations": {
            kind: {"count": len(which), "examples": [example(name, questions, watch) for name in which[:EXAMPLES]]}
            for kind, which in found.items()
        },
    }


def example(name: str, questions: Sequence[Question], watch: Watch) -> dict[str, Any]:
    """Of a violation: the question, and what became of it where."""
    asked = [question for question in questions if question.token == name]
    attempts = [f"{one.upstream}: {one.outcome} ({one.fault})" for one in watch.attempts.get(name, ())]
    return {"question": name, "asked": [msgspec.to_builtins(one) for one in asked], "attempts": attempts}


# -- processes -------------------------------------------------------------------------------------------------------------


@contextmanager
def upstream(number: int, args: argparse.Namespace) -> Iterator[tuple[str, Control]]:
    name = f"upstream{number}"
    command = [sys.executable, "-m", "anaphora", "testing", "upstream", "--port", "0", "--name", name, "--keep", "50000"]
    command += ["--base-latency", "0.02", "--decode-tokens-per-s", "200", "--seed", str(args.seed + number)]
    for fault in () if args.direct else FAULTS:
        command += ["--fault", msgspec.json.encode(fault).decode()]
    with started(command, {}) as (url, _):
        yield name, Control(url)


@contextmanager
def gateway(upstreams: Sequence[tuple[str, Control]], args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(address, process id)."""
    with tempfile.TemporaryDirectory(prefix="anaphora-soak-") as folder:
        if args.config:
            text = Path(args.config).read_text("utf-8").replace("{folder}", folder)
            for number, (_, control) in enumerate(upstreams):
                text = text.replace(f"{{url{number}}}", control.url)
        else:
            text = CONFIG.format(folder=folder)
            for number, (name, control) in enumerate(upstreams):
                text += UPSTREAM.format(name=name, dialect=("anthropic", "openai")[number % 2], url=control.url)
        config = Path(folder, "anaphora.toml")
        config.write_text(text, "utf-8")
        command = shlex.split(args.command.replace("{config}", shlex.quote(str(config))))
        with started(command, {"SOAK_KEY": "soak"}) as (url, pid):
            yield url, pid


@contextmanager
def started(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """A process that says where it is listening; terminated in the end. What else it says goes to our standard error."""
    with subprocess.Popen(command, env={**os.environ, **environ}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "listening on " in line:
                    break
            else:
                raise SystemExit("".join(said))
            reader = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True)
            reader.start()
            yield said[-1].rpartition("listening on ")[2].split()[0], process.pid
        finally:
            process.terminate()


def tree_rss(pid: int) -> int:
    """Bytes of memory of a process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_rss(int(child)) for child in children)


if __name__ == "__main__":
    raise SystemExit(main())
