"""Two servers, each with its own disk, and one Valkey between them."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2
import pytest
from tests.server.conftest import Serve

from anaphora.testing.valkey import ValkeyServer

PATIENCE_S = 60.0


def ask(url: str, text: str) -> str:
    """How the question was answered: hit or miss."""
    body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
    reply = httpx2.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return "hit" if "; hit" in reply.headers["cache-status"] else "miss"


def until_hit(url: str, text: str) -> None:
    """Answers are written behind the reply. To ask for one that is not there yet would compute it: hence `only-if-cached`."""
    body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        reply = httpx2.post(f"{url}/v1/chat/completions", json=body, headers={"cache-control": "only-if-cached"})
        if reply.status_code == 200:
            return
        assert reply.status_code == 504
    pytest.fail("never a hit")


def until_miss(url: str, text: str) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        reply = httpx2.post(f"{url}/v1/chat/completions", json=body, headers={"cache-control": "only-if-cached"})
        if reply.status_code == 504:
            return
    pytest.fail("never a miss")


def test_what_one_server_computed_another_answers_from_and_what_one_forgets_the_other_forgets(
    serve: Serve, valkey: str, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with serve("", "--shared", valkey, folder=folders[0]) as (one, _):
        with serve("", "--shared", valkey, folder=folders[1]) as (two, _):
            assert ask(one, "what is a cache?") == "miss"
            until_hit(two, "what is a cache?")
            assert ask(two, "what is a cache?") == "hit"
            assert ask(two, "and a second question") == "miss"
            until_hit(one, "and a second question")

            receipt = httpx2.post(f"{one}/anaphora/forget", json={}).raise_for_status().json()["answers"][0]
            assert receipt["removed"]["valkey"] == 2
            assert receipt["remaining"] == {"ram": 0, "disk": 0, "valkey": 0}
            assert ask(one, "what is a cache?") == "miss"
            until_miss(two, "and a second question")
            assert ask(two, "and a second question") == "miss"  # its disk had it too
            until_hit(one, "and a second question")

        # While the other machine is off, an erasure reaches what it has on disk all the same: before it reads there again.
        httpx2.post(f"{one}/anaphora/forget", json={}).raise_for_status()
        with serve("", "--shared", valkey, folder=folders[1]) as (two, _):
            assert ask(two, "and a second question") == "miss"


def test_a_server_answers_whether_or_not_the_shared_one_is_there(serve: Serve, valkey: str, tmp_path: Path) -> None:
    with ValkeyServer() as server, serve("", "--shared", server.url, folder=tmp_path) as (url, _):
        assert ask(url, "before") == "miss"
        server.kill()
        assert ask(url, "before") == "hit"
        assert ask(url, "meanwhile") == "miss"
        assert ask(url, "meanwhile") == "hit"
        receipt = httpx2.post(f"{url}/anaphora/forget", json={}).raise_for_status().json()["answers"][0]
        assert receipt["failed"] == ["valkey"]
        assert ask(url, "meanwhile") == "miss"
