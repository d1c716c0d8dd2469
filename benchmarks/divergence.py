"""What `codecs.py` and `weights.py` compare: how a model reads on in long documents, and how far that is from how it should."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """Prose, a speech, and an agent at work on a program: longer than the longest context."""
    with gzip.open(root / "war-and-peace" / "war-and-peace.txt.gz", "rt") as file:
        yield "War and Peace", file.read()[20_000:60_000]
    with zipfile.ZipFile(root / "nltk-texts" / "state_union.zip") as archive:
        yield "a State of the Union address", archive.read("state_union/1947-Truman.txt").decode("latin-1")
    with tarfile.open(root / "lmcache-agent-trace" / "sessions.tar.gz") as archive:
        name = min(name for name in archive.getnames() if name.startswith("miniswe/") and name.endswith(".jsonl"))
        file = archive.extractfile(name)
        assert file is not None
        yield "an agent's session", max((json.loads(line)["input"] for line in file), key=len)[:40_000]


class Effect:
    """Divergences of all positions compared, by context."""

    def __init__(self) -> None:
        self._kl: dict[int, list[torch.Tensor]] = {}
        self._same: dict[int, list[torch.Tensor]] = {}

    def add(self, context: int, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Both are log-probabilities [positions, vocabulary]."""
        kl = (expected.exp() * (expected - found)).sum(-1).clamp(min=0.0)
        self._kl.setdefault(context, []).append(kl)
        self._same.setdefault(context, []).append((expected.argmax(-1) == found.argmax(-1)).double())

    def summary(self) -> dict[str, Any]:
        by_context = {str(context): float(f"{torch.cat(kl).mean().item():.2e}") for context, kl in self._kl.items()}
        kl, same = (torch.cat([part for parts in kept.values() for part in parts]) for kept in (self._kl, self._same))
        return {
            "mean_kl": float(f"{kl.mean().item():.2e}"),
            "mean_kl_by_context": by_context,
            "max_kl": float(f"{kl.max().item():.2e}"),
            "greedy_agreement": round(same.mean().item(), 4),
            "positions": len(kl),
        }
