"""Real server processes: signals, workers, and what they share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

Serve = Callable[..., AbstractContextManager[tuple[str, Any]]]


def ask(url: str, text: str, **fields: object) -> httpx2.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)


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


def test_a_taken_port_and_an_open_address_without_keys_are_refused_in_words(serve: Serve) -> None:
    with serve() as (url, _):
        port = url.rpartition(":")[2]
        with pytest.raises(AssertionError, match=r"server\.port"), serve("", "--port", port):
            pass
    with pytest.raises(AssertionError, match="API keys"), serve("", "--host", "0.0.0.0"):
        pass
