"""The replay of traces, over ones that are small enough to be counted by hand."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anaphora.policies.lru import LRU


@pytest.fixture(scope="module")
def eviction(script: Callable[[str], Any]) -> Any:
    return script("eviction.py")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "mooncake").mkdir()
    rows = [(1024, [1, 2]), (1100, [1, 2, 3]), (1024, [1, 9]), (600, [1, 2])]
    with gzip.open(tmp_path / "mooncake" / "conversation_first6015.jsonl.gz", "wt") as lines:
        for length, ids in rows:
            lines.write(json.dumps({"input_length": length, "hash_ids": ids}) + "\n")
    (tmp_path / "kv-cache-tester").mkdir()
    with tarfile.open(tmp_path / "kv-cache-tester" / "claude_code_traces_mod8_1.tar.gz", "w:gz") as archive:
        for name in ("one", "two"):
            inner = {"requests": [{"t": 5.0, "in": 130, "hash_ids": [1, 2, 4]}]}
            requests = [{"t": 0.0, "in": 129, "hash_ids": [1, 2, 3]}, inner]
            content = json.dumps({"id": name, "requests": requests}).encode()
            about = tarfile.TarInfo(f"{name}.json")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return tmp_path


@pytest.mark.parametrize("place", ["in_pool", "in_tier"])
def test_what_is_found_is_counted_from_the_beginning_on(eviction: Any, data: Path, place: str) -> None:
    trace = eviction.mooncake(data)
    found = getattr(eviction, place)(trace, LRU(), 100)
    # Of the second prompt two blocks, of the third and fourth the first one: a prompt's last token is always computed.
    assert found.tokens_share == pytest.approx(4 * 512 / (1024 + 1100 + 1024 + 600), abs=1e-4)
    assert 0 < found.time_share < found.tokens_share
    assert getattr(eviction, place)(trace, LRU(), 1).tokens_share < found.tokens_share


@pytest.mark.parametrize("place", ["in_pool", "in_tier"])
def test_sessions_have_names_of_their_own_and_requests_within_requests_count(eviction: Any, data: Path, place: str) -> None:
    trace = eviction.claude_code(data)
    assert [request.num_tokens for request in trace.requests] == [129, 130, 129, 130]
    assert trace.num_blocks == 8
    found = getattr(eviction, place)(trace, LRU(), 100)
    assert found.tokens_share == pytest.approx(2 * 128 / (129 + 130) / 2, abs=1e-4)


def test_without_the_traces_it_says_so(
    eviction: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANAPHORA_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["eviction.py"])
    assert eviction.main() == 0
    assert "ANAPHORA_DATA" in capsys.readouterr().err
