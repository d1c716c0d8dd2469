"""What the gateway adds in front of a provider: time to the first byte, straight and through it, taking turns. Prints JSON.

An upstream streams answers at the pace of a model; so many streams run at the same time, straight to it in one phase, through a
gateway with one worker in another, and through a relay that only copies bytes in a third, which shows what one more process
costs on this machine. What is added is the difference of two distributions' percentiles. Every request is another question, so
that nothing is answered from memory, and every answer is learned and booked.

The upstream plays an answer that the test upstream gave back to everybody, byte for byte, and the client looks for nothing but
the first byte and the last: both share processors with the gateway, and what they use is taken from it.

The first byte is that of the body, which the upstream sends with the head of its answer. As set, 50 streams of 25 tokens a
second are 1,250 events a second, each a chunk and a packet of its own as providers send them, and 28 new requests: a model's
usual pace, and the worst case of events that come one at a time. A first byte waits behind whatever else the worker has to do
at that moment, so the processor time of an event counts for it as much as the way of the request itself; that is why both are
printed, of the relay as well, below which no process can come. It depends less on what else the machine does than times do.
Client, gateway and upstream share the machine's processors: on few of them that costs the gateway more than it would on a
machine of its own.

    python benchmarks/gateway.py [--streams 50] [--rounds 3] [--seconds 10] [--dialect anthropic|openai] [--translated]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import uvloop

ROOT = Path(__file__).parent.parent
TOKENS = 40
WORDS = " ".join(["word"] * TOKENS)
MODELS = {"anthropic": "claude-opus-5", "openai": "gpt-5.6-sol"}
HEADERS = {"authorization": "Bearer key", "anthropic-version": "2023-06-01"}
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50, help="at the same time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--dialect", choices=sorted(PATHS), default="anthropic", help="the client's")
    parser.add_argument("--translated", action="store_true", help="the upstream speaks the other dialect")
    parser.add_argument("--optimiser", choices=("off", "advise", "on"), default="off")
    parser.add_argument("--ledger", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--first", type=float, default=0.2, metavar="SECONDS", help="the upstream's time to the first token")
    parser.add_argument("--relay", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--play", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=25.0, help="its tokens a second, of each stream")
    args = parser.parse_args()
    if args.relay:
        uvloop.run(relay(args.relay))
        return 0
    if args.play:
        uvloop.run(play(Path(args.play), args))
        return 0
    other = {"anthropic": "openai", "openai": "anthropic"}[args.dialect]
    upstream_dialect = other if args.translated else args.dialect
    relaying = [sys.executable, __file__, "--relay"]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        record(folder, upstream_dialect)
        address = stack.enter_context(upstream(folder, args))
        url, process = stack.enter_context(gateway(args, address, upstream_dialect))
        relayed, relaying_process = stack.enter_context(listening([*relaying, address], dict(os.environ)))
        uvloop.run(phase(url, args, 2.0, "warm"))
        sides = {"straight": address, "through": url}
        if not args.translated:
            sides["relayed"] = relayed
        processes = {"through": process, "relayed": relaying_process}
        times: dict[str, list[float]] = {side: [] for side in sides}
        answers = dict.fromkeys(sides, 0)
        cpu_s = dict.fromkeys(processes.keys() & sides, 0.0)
        for number in range(args.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                before_s = {side: used_s(processes[side].pid) for side in cpu_s}
                found, num_answers = uvloop.run(phase(sides[side], args, args.seconds, f"{side}{number}"))
                times[side] += found
                answers[side] += num_answers
                if side in cpu_s:
                    cpu_s[side] += used_s(processes[side].pid) - before_s[side]
                print(f"round {number + 1}: {side}: p50 {1000 * percentile(found, 50):.1f} ms", file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": sys.version,  # one compiled without a profile of its own runs costs a sixth more
        "streams": args.streams,
        "dialect": args.dialect,
        "upstream": upstream_dialect,
        "optimiser": args.optimiser,
        "answers": answers,
        "first_byte_ms": {
            side: {f"p{p}": round(1000 * percentile(found, p), 2) for p in (50, 90, 99)} for side, found in times.items()
        },
        "added_ms": {
            side: {f"p{p}": round(1000 * (percentile(found, p) - percentile(times["straight"], p)), 2) for p in (50, 90, 99)}
            for side, found in times.items()
            if side != "straight"
        },
        "cpu_ms_per_answer": {side: round(1000 * used / max(1, answers[side]), 2) for side, used in cpu_s.items()},
        "cpu_ms_per_event": {side: round(1000 * used / max(1, TOKENS * answers[side]), 3) for side, used in cpu_s.items()},
        "events_per_answer": TOKENS,
    }
    print(json.dumps(report, indent=2))
    return 0


def record(folder: Path, dialect: str) -> None:
    """What the test upstream answers: a list of its models, and a stream."""
    command = [sys.executable, "-m", "anaphora", "testing", "upstream", "--port", "0"]
    question = {"role": "user", "content": WORDS}
    body = {"model": MODELS[dialect], "max_tokens": TOKENS, "stream": True, "messages": [question]}
    if dialect == "openai":
        body["stream_options"] = {"include_usage": True}
    with listening(command, dict(os.environ)) as (url, _), httpx2.Client(base_url=url, headers=HEADERS) as client:
        (folder / "models").write_bytes(client.get("/v1/models").raise_for_status().content)
        (folder / "stream").write_bytes(client.post(PATHS[dialect], json=body).raise_for_status().content)


@contextlib.contextmanager
def upstream(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    pace = ["--first", str(args.first), "--rate", str(args.rate)]
    with listening([sys.executable, __file__, "--play", str(folder), *pace], dict(os.environ)) as (url, _):
        yield url


async def play(folder: Path, args: argparse.Namespace) -> None:
    """Answers with what `record` left there until it is terminated: the first event at once, the second when the model would
    have read the question, and each other one a token later."""
    loop = asyncio.get_running_loop()
    models = (folder / "models").read_bytes()
    events = [event + b"\n\n" for event in (folder / "stream").read_bytes().split(b"\n\n") if event.strip()]
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    chunks[-1] += b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    about = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(models)

    class Playing(asyncio.Protocol):
        def __init__(self) -> None:
            self._asked = b""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self._asked += data
            start, end, body = self._asked.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", start)
            if not end or len(body) < (int(length[1]) if length else 0):
                return
            self._asked = b""
            if start.startswith(b"GET"):
                self._transport.write(about + models)
                return
            self._transport.write(head + chunks[0])
            loop.call_later(args.first, self._say, 1)

        def _say(self, number: int) -> None:
            self._transport.write(chunks[number])
            if number + 1 < len(chunks):
                loop.call_later(1 / args.rate, self._say, number + 1)

    server = await loop.create_server(Playing, "127.0.0.1", 0)
    print(f"playing on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", file=sys.stderr, flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def gateway(args: argparse.Namespace, address: str, dialect: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "anaphora.toml"
        config.write_text(
            f'[gateway]\noptimiser = {{ mode = "{args.optimiser}" }}\n'
            f"[ledger]\nenabled = {str(args.ledger).lower()}\n"
            f'[[gateway.upstreams]]\nname = "provider"\ndialect = "{dialect}"\nbase_url = "{address}"\nkey_env = "BENCH_KEY"\n'
        )
        command = [sys.executable, "-m", "anaphora", "serve", "--config", str(config), "--port", "0", "--cache-dir", folder]
        with listening(command, {**os.environ, "BENCH_KEY": "key"}) as found:
            yield found


@contextlib.contextmanager
def listening(command: list[str], environ: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environ)
    assert process.stderr is not None
    try:
        line = ""
        while "http://" not in line:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} did not start")
        yield "http://" + line.partition("http://")[2].split()[0], process
    finally:
        process.terminate()
        process.communicate()


async def relay(address: str) -> None:
    """Copies bytes both ways until it is terminated."""
    host, _, port = address.removeprefix("http://").partition(":")

    class Other(asyncio.Protocol):
        def __init__(self, client: Client) -> None:
            self._client = client

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._client.connected(cast(asyncio.Transport, transport))

        def data_received(self, data: bytes) -> None:
            self._client.transport.write(data)

        def connection_lost(self, error: Exception | None) -> None:
            self._client.transport.close()

    class Client(asyncio.Protocol):
        def __init__(self) -> None:
            self._early: list[bytes] = []
            self._other: asyncio.Transport | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)
            self._connecting = asyncio.ensure_future(loop.create_connection(lambda: Other(self), host, int(port)))

        def connected(self, transport: asyncio.Transport) -> None:
            self._other = transport
            transport.writelines(self._early)

        def data_received(self, data: bytes) -> None:
            if self._other is None:
                self._early.append(data)
            else:
                self._other.write(data)

        def connection_lost(self, error: Exception | None) -> None:
            if self._other is not None:
                self._other.close()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Client, "127.0.0.1", 0)
    print(f"relaying on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", file=sys.stderr, flush=True)
    await server.serve_forever()


class Answering(asyncio.Protocol):
    """One connection, for one answer after the other."""

    def __init__(self) -> None:
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[float]:
        """Done with the end of the answer: the seconds until the first byte of its body."""
        self._over: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._first_s = 0.0
        self._seen = b""
        self._asked_s = time.perf_counter()
        self._transport.write(request)
        return self._over

    def data_received(self, data: bytes) -> None:
        if not self._first_s:
            self._seen += data
            head, _, data = self._seen.partition(b"\r\n\r\n")
            if not data:
                return
            self._first_s = time.perf_counter() - self._asked_s
            if not head.startswith(b"HTTP/1.1 200 "):
                self._over.set_exception(RuntimeError(self._seen.decode(errors="replace")))
        self._seen = self._seen[-5:] + data
        if self._seen.endswith(b"0\r\n\r\n") and not self._over.done():
            self._over.set_result(self._first_s)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over.done():
            self._over.set_exception(RuntimeError("the connection was closed amid an answer"))


async def phase(url: str, args: argparse.Namespace, seconds: float, name: str) -> tuple[list[float], int]:
    """Times to the first byte, of requests that began after all streams were there, and how many answers came in all."""
    times: list[float] = []
    num_answers = 0
    until_s = time.perf_counter() + seconds
    host, _, port = url.removeprefix("http://").partition(":")
    fields = {**HEADERS, "host": host, "content-type": "application/json"}
    head = f"POST {PATHS[args.dialect]} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in fields.items())

    async def stream(number: int) -> None:
        nonlocal num_answers
        await asyncio.sleep(number * (args.first + TOKENS / args.rate) / args.streams)  # not all in step
        transport, answering = await asyncio.get_running_loop().create_connection(Answering, host, int(port))
        asked = 0
        while time.perf_counter() < until_s:
            question = {"role": "user", "content": f"{name} {number} {asked} {WORDS}"}
            asking = {"model": MODELS[args.dialect], "max_tokens": TOKENS, "stream": True, "messages": [question]}
            body = json.dumps(asking)
            first_s = await answering.ask(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            if asked:  # when the first one was asked, not all streams were there, and no connection either
                times.append(first_s)
            asked += 1
        num_answers += asked
        transport.close()

    await asyncio.gather(*map(stream, range(args.streams)))
    return times, num_answers


def used_s(pid: int) -> float:
    """Processor time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], p: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]


if __name__ == "__main__":
    sys.exit(main())
