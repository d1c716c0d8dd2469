"""Real server processes: signals, workers, and what they share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]


def ask(url: str, text: str, **fields: object) -> httpx2.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_an_answer_comes_in_one_piece(serve: Serve) -> None:
    with serve() as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        request = b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            for _ in range(20):
                connection.sendall(request)
                assert connection.recv(1 << 16).endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(serve: Serve, number: signal.Signals) -> None:
    with serve() as (url, process):
        assert ask(url, "hello").status_code == 200
        process.send_signal(number)
        assert process.wait(timeout=60) == 0


def test_answers_are_there_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    with serve(folder=tmp_path) as (url, process):
        assert "fwd=miss" in ask(url, "remember me").headers["cache-status"]
        process.terminate()
        process.wait(timeout=60)
    with serve(folder=tmp_path) as (url, _):
        answer = ask(url, "remember me")
        assert "hit" in answer.headers["cache-status"]
        assert answer.json()["choices"][0]["message"]["content"] == "remember me"


def test_workers_share_the_socket_and_the_answers_and_end_with_their_parent(serve: Serve) -> None:
    with serve("", "--workers", "2") as (url, process):
        assert ask(url, "shared").status_code == 200
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(url, "shared"), range(32)))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"shared"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx2.ConnectError):
            ask(url, "anybody there?")


def two_workers(url: str, stack: ExitStack) -> tuple[httpx2.Client, httpx2.Client]:
    """A connection to each of two workers with memory of their own: what one has answered is new to the other."""
    question = {"model": "echo", "messages": [{"role": "user", "content": "Who is there?"}], "temperature": 0}
    found: list[httpx2.Client] = []
    until_s = time.monotonic() + 60  # the second one may still be starting
    while len(found) < 2 and time.monotonic() < until_s:
        with ExitStack() as unless_new:
            client = unless_new.enter_context(httpx2.Client(base_url=url, timeout=60))
            if "fwd=miss" in client.post("/v1/chat/completions", json=question).headers["cache-status"]:
                found.append(client)
                stack.push(unless_new.pop_all())
    assert len(found) == 2
    return found[0], found[1]


ALONE = "[cache]\ndisk = 0\n"


def test_what_one_worker_is_told_to_forget_the_others_forget(serve: Serve) -> None:
    with serve(ALONE, "--workers", "2") as (url, _), ExitStack() as stack:
        one, other = two_workers(url, stack)
        body = {"model": "echo", "messages": [{"role": "user", "content": "a secret"}], "temperature": 0}

        def status(client: httpx2.Client) -> str:
            return client.post("/v1/chat/completions", json=body).headers["cache-status"]

        assert [("hit" in status(client)) for client in (one, other, one, other)] == [False, False, True, True]
        assert one.post("/anaphora/forget", json={}).json()["answers"][0]["removed"]["ram"] >= 1
        assert "fwd=miss" in status(other)
        assert "fwd=miss" in status(one)


def test_whichever_worker_is_asked_the_counters_are_those_of_all(serve: Serve) -> None:
    with serve(ALONE, "--workers", "2") as (url, _), ExitStack() as stack:
        clients = two_workers(url, stack)

        def counted(client: httpx2.Client) -> tuple[float, int, int]:
            """Requests by /metrics, those that a histogram saw, and those of the tenant's account."""
            lines = client.get("/metrics").text.splitlines()
            requests = sum(float(line.split()[-1]) for line in lines if line.startswith("anaphora:requests_total"))
            seen = next(line for line in lines if line.startswith("vllm:e2e_request_latency_seconds_count"))
            return requests, int(float(seen.split()[-1])), client.get("/anaphora/stats").json()["answers"]["num_requests"]

        before = counted(clients[0])
        assert before == counted(clients[1])
        for number in range(5):
            body = {"model": "echo", "messages": [{"role": "user", "content": f"Question {number}"}]}
            for client in clients:
                assert client.post("/v1/chat/completions", json=body).status_code == 200
        after = tuple(count + 10 for count in before)
        assert counted(clients[0]) == counted(clients[1]) == after


def test_a_taken_port_and_an_open_address_without_keys_are_refused_in_words(serve: Serve) -> None:
    with serve() as (url, _):
        port = url.rpartition(":")[2]
        with pytest.raises(AssertionError, match=r"server\.port"), serve("", "--port", port):
            pass
    with pytest.raises(AssertionError, match="API keys"), serve("", "--host", "0.0.0.0"):
        pass


@pytest.mark.parametrize("wished", [None, "3"])
def test_numpy_computes_in_one_thread_unless_told_otherwise(wished: str | None) -> None:
    """What it reads when it is imported is set before that."""
    script = """
import os, sys
import anaphora.server.run
from anaphora.cli import main
anaphora.server.run.serve = lambda *_: print("numpy" in sys.modules, os.environ["OPENBLAS_NUM_THREADS"])
main(["serve", "--engine", "echo"])
"""
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environ |= {"OPENBLAS_NUM_THREADS": wished} if wished else {}
    ran = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["False", wished or "1"]
