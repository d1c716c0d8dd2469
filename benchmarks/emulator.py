"""How many requests a second the emulator accounts for, with one process, against a bare Starlette endpoint. Prints JSON.

`anaphora serve --engine echo` and the bare endpoint (it reads the body and returns the emulator's own answer's bytes) take
turns under `wrk`, with the same bodies, so that both meet the same machine. Medians over the rounds; ratios are of one run.
Processor time per request is the server's own (Linux only); unlike the rate it does not depend on what else the machine does.

    python benchmarks/emulator.py [--seconds 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ROOT = Path(__file__).parent.parent
RULES = "\n".join(f"- Rule {number}: read the ticket, look for the order, and say what happens next." for number in range(105))
"""About 2,000 tokens."""
MARK = {"cache_control": {"type": "ephemeral"}}
CONNECTIONS = 16
NUMBER = "4807526976"
"""Stands in a body where every request has another number."""


class Load(msgspec.Struct, frozen=True):
    name: str
    path: str
    body: str


class Rate(msgspec.Struct, frozen=True):
    requests_per_s: float
    cpu_s: float
    """For one request."""


def loads() -> list[Load]:
    return [
        Load("short prompt, the same each time", "/v1/messages", _anthropic("You are a clerk.", "What is open?")),
        Load("short prompt, another question each time", "/v1/messages", _anthropic("You are a clerk.", f"What of {NUMBER}?")),
        Load("2,000 tokens, the same each time", "/v1/messages", _anthropic(RULES, "What is open?")),
        Load("2,000 tokens, another question each time", "/v1/messages", _anthropic(RULES, f"What of {NUMBER}?")),
        Load("2,000 tokens, all of them new each time", "/v1/messages", _anthropic(f"{NUMBER}\n{RULES}", "What is open?")),
        Load("2,000 tokens, another question, gpt-5.6-sol", "/v1/chat/completions", _openai("gpt-5.6-sol")),
        Load("2,000 tokens, another question, gpt-4.1", "/v1/chat/completions", _openai("gpt-4.1")),
    ]


def _anthropic(system: str, question: str) -> str:
    body = {
        "model": "claude-opus-5",
        "max_tokens": 8,
        "system": [{"type": "text", "text": system, **MARK}],
        "messages": [{"role": "user", "content": question}],
    }
    return json.dumps(body)


def _openai(model: str) -> str:
    turns = [{"role": "system", "content": RULES}, {"role": "user", "content": f"What of {NUMBER}?"}]
    return json.dumps({"model": model, "max_completion_tokens": 8, "messages": turns})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="loads whose name has this in it")
    parser.add_argument("--bare", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(Path(args.bare))
        return
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed (Debian: apt install wrk)")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    rows = [measure(load, args.rounds, args.seconds) for load in loads() if args.only in load.name]
    print(json.dumps({"commit": commit.stdout.strip(), "machine": machine, "loads": rows}, indent=2))


def measure(load: Load, rounds: int, seconds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="anaphora-bench-") as name:
        folder = Path(name)
        emulator = [sys.executable, "-m", "anaphora", "serve", "--engine", "echo", "--port", "0", "--cache-dir", name]
        with started(emulator) as served:
            url, _ = served
            answer = httpx2.post(url + load.path, content=load.body, timeout=60.0).raise_for_status()
            (folder / "answer.json").write_bytes(answer.content)
            with started([sys.executable, __file__, "--bare", str(folder / "answer.json")]) as plain:
                script = folder / "load.lua"
                script.write_text(_lua(load))
                rates: dict[str, list[Rate]] = {"emulator": [], "bare": []}
                for _ in range(rounds):
                    for who, (target, process) in (("emulator", served), ("bare", plain)):
                        rates[who].append(wrk(target + load.path, script, seconds, process))
    row: dict[str, object] = {"load": load.name}
    for who, of_who in rates.items():
        row[f"{who}_requests_per_s"] = statistics.median(rate.requests_per_s for rate in of_who)
        row[f"{who}_cpu_s"] = statistics.median(rate.cpu_s for rate in of_who)
    print(row, file=sys.stderr, flush=True)
    return row


def _lua(load: Load) -> str:
    headers = 'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
    before, number, after = load.body.partition(NUMBER)
    if not number:
        return f"{headers}wrk.body = [==[{before}]==]\n"
    # Numbers of one length, so that prompts are of one length.
    body = 'before .. string.format("%.0f", n) .. after'
    return (
        f"{headers}local n = {int(NUMBER)}\nlocal before, after = [==[{before}]==], [==[{after}]==]\n"
        f"function request()\n  n = n + 1\n  return wrk.format(nil, nil, nil, {body})\nend\n"
    )


def wrk(url: str, script: Path, seconds: int, process: int) -> Rate:
    before = cpu_s(process)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if rate is None or "Non-2xx" in text:
        raise SystemExit(f"not every answer was a success:\n{text}")
    done = re.search(r"(\d+) requests in", text)
    assert done is not None
    return Rate(float(rate[1]), (cpu_s(process) - before) / int(done[1]))


def cpu_s(process: int) -> float:
    """Seconds of processor time that the process has taken so far; not a number where the system does not tell."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.exists():
        return float("nan")
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[tuple[str, int]]:
    """(where it listens, process id) of a server that prints the first; ended on the way out."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if "listening on " not in line:
            raise SystemExit(f"{command} did not start: {line}")
        yield line.partition("listening on ")[2].strip(), process.pid
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def bare(answer: Path) -> None:
    """The yardstick: one endpoint that returns fixed bytes and does nothing else."""
    content = answer.read_bytes()

    async def endpoint(request: Request) -> Response:
        await request.body()
        return Response(content, media_type="application/json")

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=["POST"])])
    settings = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None)
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    main()
