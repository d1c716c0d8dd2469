"""What the ledger costs: processor time for each cached answer, and how long sums over a large book take. Prints JSON.

In this process: what recording costs the event loop's thread, and all of it together (pricing, the row, the transaction).
Over HTTP: processor time of a server that answers from its cache with the ledger on and off, the two taking turns (Linux only).
Medians over the rounds.

    python benchmarks/ledger.py [--requests 4000] [--rounds 5] [--rows 1000000]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from anaphora.clock import SystemClock
from anaphora.events import Answered
from anaphora.ledger.book import Book
from anaphora.ledger.entry import Entry
from anaphora.ledger.prices import Prices
from anaphora.ledger.query import Query
from anaphora.ledger.recorder import Recorder
from anaphora.types import Tenant, Usage

MODEL = "claude-opus-5-5"
MARK = "listening on "
BODY = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "What does a cache do? " * 20}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=4000, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large book")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anaphora-bench-") as folder:
        figures = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "recording": recording(Path(folder), args.requests, args.rounds),
            "http": over_http(Path(folder), args.requests, args.rounds),
            "sums": sums(Path(folder), args.rows, args.rounds),
        }
    print(json.dumps(figures, indent=2))


def recording(folder: Path, num: int, rounds: int) -> dict[str, float]:
    """Microseconds of processor time for each event."""
    prices = Prices(addresses={"anthropic": "https://api.anthropic.com"}, emulates=True)
    hits = [answered("hit", 100) for _ in range(num)]
    computed = [answered("miss", number) for number in range(num)]  # none like another: nothing is priced from memory
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name, events in (("hit", hits), ("computed", computed)):
            recorder = Recorder(folder / f"{name}-{turn}.db", prices, SystemClock(), tell=lambda event: None)
            before_s = time.process_time()
            for event in events:
                recorder.record(event)
            between_s = time.process_time()
            recorder.start()
            recorder.close()
            whole_s = time.process_time() - before_s
            found.setdefault(f"{name}_on_the_loop_us", []).append((between_s - before_s) / num * 1e6)
            found.setdefault(f"{name}_altogether_us", []).append(whole_s / num * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def answered(source: str, tokens: int) -> Answered:
    usage = Usage(input_tokens=tokens, output_tokens=40, cache_read_input_tokens=2000 + tokens)
    upstream = "" if source == "hit" else "anthropic"
    return Answered(
        Tenant("bench"),
        MODEL,
        source,
        "finished",
        usage,
        ("end_turn",),
        0.01,
        0.005,
        upstream=upstream,
        request_id="req_0",  # type: ignore[arg-type]
    )


def over_http(folder: Path, num: int, rounds: int) -> dict[str, float]:
    """Microseconds of the server's processor time for each cached answer."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    with ExitStack() as stack:
        places = {name: stack.enter_context(serving(folder / name, name == "with")) for name in found}
        for url, _ in places.values():
            ask(url, 500)
        for _ in range(rounds):
            for name, (url, pid) in places.items():
                before_s = processor_s(pid)
                ask(url, num)
                time.sleep(1.5)  # the ledger writes behind the answers
                found[name].append((processor_s(pid) - before_s) / num * 1e6)
    medians = {f"{name}_ledger_us": round(statistics.median(values), 1) for name, values in found.items()}
    return {**medians, "difference_us": round(medians["with_ledger_us"] - medians["without_ledger_us"], 1)}


def ask(url: str, num: int) -> None:
    """One after the other on one connection."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    body = json.dumps(BODY)
    for _ in range(num):
        connection.request("POST", "/v1/messages", body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
    connection.close()


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(folder: Path, enabled: bool) -> Iterator[tuple[str, int]]:
    environ = os.environ | {"ANAPHORA_CACHE_ENABLED": "true", "ANAPHORA_LEDGER_ENABLED": str(enabled).lower()}
    command = [sys.executable, "-m", "anaphora", "serve", "--engine", "echo", "--port", "0", "--cache-dir", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    try:
        yield process.stderr.readline().partition(MARK)[2].strip(), process.pid
    finally:
        process.terminate()
        process.communicate()


def sums(folder: Path, num: int, rounds: int) -> dict[str, float]:
    """Seconds, and bytes for each row."""
    book = Book(folder / "large.db", writes=True)
    for start in range(0, num, 10_000):
        book.append(
            Entry(
                at_us=1_800_000_000_000_000 + number * 2_000_000,
                request_id=f"req_{number:024x}",
                tenant=f"tenant-{number % 20}",
                workspace="",
                tag="",
                asked=MODEL,
                model=MODEL,
                upstream="anthropic",
                level="computed" if number % 3 else "exact",
                outcome="finished",
                input=number % 5000,
                output=number % 700,
                first_us=400_000,
                whole_us=2_000_000,
                paid=number * 1000,
            )
            for number in range(start, min(num, start + 10_000))
        )
    day = Query(from_us=1_800_000_000_000_000 + num * 2_000_000 - 86_400_000_000)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, by, query in (
            ("by_tenant_and_day_s", ("tenant", "day"), Query()),
            ("last_day_of_one_tenant_s", ("level",), Query(day.from_us, None, "tenant-3")),
        ):
            began_s = time.perf_counter()
            book.groups(by, query)
            found.setdefault(name, []).append(time.perf_counter() - began_s)
    book.close()
    size = (folder / "large.db").stat().st_size
    return {"rows": num, "bytes_per_row": round(size / num, 1)} | {
        name: round(statistics.median(values), 3) for name, values in found.items()
    }


if __name__ == "__main__":
    main()
