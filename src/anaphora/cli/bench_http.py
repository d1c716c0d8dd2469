"""The part of `anaphora bench prefix` over HTTP: a cached answer against a bare endpoint, idle and while tokens are generated.

Servers run as processes of their own and take turns under `wrk`, so that both sides meet the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from anaphora.config import Config
from anaphora.errors import AnaphoraError

Progress = Callable[[str], None]

_BODY = {
    "model": "",
    "messages": [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "What does a cache in front of a language model do, and when does it not help?"},
    ],
    "temperature": 0,
    "max_tokens": 48,
}
_ROUNDS = 3
_SECONDS = 4
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Figures, or why there are none. Latencies in seconds."""
    if shutil.which("wrk") is None:
        return {"skipped": "wrk is not installed (Debian: apt install wrk)"}
    with tempfile.TemporaryDirectory(prefix="anaphora-bench-") as folder:
        return {**_against_bare(Path(folder), progress), **_under_generation(config, Path(folder), progress)}


def _against_bare(folder: Path, progress: Progress) -> dict[str, Any]:
    with _serving(folder / "echo", "--engine", "echo", "--model", "echo") as url:
        script, answer = _prime(url, "echo", folder)
        (folder / "answer.json").write_bytes(answer)
        with _started([sys.executable, "-m", "anaphora.server.bare", str(folder / "answer.json")]) as bare_url:
            rates: dict[str, list[float]] = {"hit": [], "bare": []}
            for i in range(_ROUNDS):
                progress(f"cached answers over HTTP against a bare endpoint ({i + 1}/{_ROUNDS})")
                for name, target in (("hit", url), ("bare", bare_url)):
                    rates[name].append(_wrk(target, script, connections=16)["requests_per_s"])
            alone = _wrk(url, script, connections=1)
    hit, bare = statistics.median(rates["hit"]), statistics.median(rates["bare"])
    return {"hit_requests_per_s": hit, "bare_requests_per_s": bare, "hit_of_bare": hit / bare, "hit_p50_s": alone["p50_s"]}


def _under_generation(config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
    flags = ("--model", config.engine.model, "--dtype", config.engine.dtype)
    models = Path(config.cache.dir).expanduser() / "models"
    cache = folder / "engine"
    cache.mkdir()
    models.mkdir(parents=True, exist_ok=True)
    (cache / "models").symlink_to(models)
    progress("loading the model behind a server")
    with _serving(cache, *flags) as url:
        model = _wait_ready(url)
        script, _ = _prime(url, model, folder)
        idle: list[float] = []
        busy: list[float] = []
        for i in range(_ROUNDS):
            progress(f"cached answers while tokens are generated ({i + 1}/{_ROUNDS})")
            idle.append(_wrk(url, script, connections=1)["p99_s"])
            with _generating(url, model):
                busy.append(_wrk(url, script, connections=1)["p99_s"])
    idle_s, busy_s = statistics.median(idle), statistics.median(busy)
    return {"idle_p99_s": idle_s, "generating_p99_s": busy_s, "generating_of_idle": busy_s / idle_s}


@contextlib.contextmanager
def _serving(cache: Path, *flags: str) -> Iterator[str]:
    command = [sys.executable, "-m", "anaphora", "serve", "--port", "0", "--cache-dir", str(cache), *flags]
    with _started(command) as url:
        yield url


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[str]:
    """A server process that prints where it listens; ended on the way out."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    environ["ANAPHORA_CACHE_ENABLED"] = "true"  # the echo engine remembers no answers on its own
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, cwd=tempfile.gettempdir())
    assert process.stderr is not None
    try:
        lines = []
        while "listening on " not in (line := process.stderr.readline()):
            lines.append(line)
            if not line:
                raise AnaphoraError(f"{' '.join(command[1:4])} did not start: {''.join(lines)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe fills and the server stops
        yield line.partition("listening on ")[2].strip()
    finally:
        process.terminate()
        process.wait()


def _wait_ready(url: str) -> str:
    """The id of the model served, once it is."""
    with httpx2.Client(base_url=url, timeout=600.0) as client:
        return str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])


def _prime(url: str, model: str, folder: Path) -> tuple[Path, bytes]:
    """Have the question answered once; a wrk script that asks it again, and the cached answer's bytes."""
    body = json.dumps({**_BODY, "model": model})
    with httpx2.Client(base_url=url, timeout=600.0) as client:
        for _ in range(2):
            response = client.post("/v1/chat/completions", content=body).raise_for_status()
    if "hit" not in response.headers.get("cache-status", ""):
        raise AnaphoraError(f"the answer was not cached: cache-status is {response.headers.get('cache-status')!r}")
    script = folder / f"{model}.lua"
    script.write_text(f'wrk.method = "POST"\nwrk.body = [==[{body}]==]\nwrk.headers["Content-Type"] = "application/json"\n')
    return script, response.content


@contextlib.contextmanager
def _generating(url: str, model: str) -> Iterator[None]:
    """One stream of tokens after another, as long as the block lasts."""
    stop = threading.Event()

    def generate() -> None:
        number = 0
        with httpx2.Client(base_url=url, timeout=600.0) as client:
            while not stop.is_set():
                number += 1
                body = {
                    "model": model,
                    "prompt": f"{number}. Once upon a time",
                    "max_tokens": 200,
                    "stream": True,
                    "ignore_eos": True,
                }
                with client.stream("POST", "/v1/completions", json=body) as response:
                    for _ in response.iter_raw():
                        if stop.is_set():
                            break

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _wrk(url: str, script: Path, *, connections: int) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{_SECONDS}s", "--latency", "-s", str(script), f"{url}/v1/chat/completions"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text:
        raise AnaphoraError(f"not every answer was a success:\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    found = {name: re.search(rf"{name}%\s+([\d.]+)(us|ms|s|m)\b", text) for name in ("50", "99")}
    if rate is None or found["50"] is None or found["99"] is None:
        raise AnaphoraError(f"wrk printed no figures:\n{text}")
    return {
        "requests_per_s": float(rate[1]),
        **{f"p{name}_s": float(match[1]) * _UNITS[match[2]] for name, match in found.items() if match is not None},
    }
