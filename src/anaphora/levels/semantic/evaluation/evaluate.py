"""One data set through every way of deciding: a filled cache, and streams from cold. Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from anaphora.levels.semantic.comparing import Verifies
from anaphora.levels.semantic.evaluation import streams
from anaphora.levels.semantic.evaluation.filled import Filled, Thresholds, judged, look_up
from anaphora.levels.semantic.evaluation.kept import Vectors
from anaphora.levels.semantic.evaluation.questions import DataSet, Seen
from anaphora.levels.semantic.evaluation.streams import Replayed, Summed
from anaphora.levels.semantic.evaluation.ways import DEFAULTS
from anaphora.levels.semantic.risk import Policy
from anaphora.levels.semantic.texts import Prepared
from anaphora.levels.semantic.vcache import separable_variance

Progress = Callable[[str], None]


class Settings(msgspec.Struct, frozen=True):
    risks: tuple[float, ...] = (0.01, 0.05)
    """The first is the budget that cosines are chosen for."""
    confidence: float = 0.95
    audit_share: float = 0.05
    num_streams: int = 3
    num_asked: int = 10_000
    """Of one stream."""


class Streams(msgspec.Struct, frozen=True):
    num_asked: int
    """Of one stream, those in words that were computed before included."""
    exponent: float
    """Of Zipf's law, by which topics are asked."""
    rows: list[Summed]


class Evaluated(msgspec.Struct, frozen=True):
    data_set: str
    encoder: str
    seen: Seen
    weak: bool
    filled: Filled
    streams: Streams | None


class Remembering:
    """A verifier that is asked about a pair once."""

    def __init__(self, verifier: Verifies) -> None:
        self._verifier = verifier
        self._known: dict[tuple[str, str, float], float] = {}

    def probability(self, a: Prepared, b: Prepared, similarity: float) -> float:
        pair = (a.text, b.text, similarity)
        if pair not in self._known:
            self._known[pair] = self._verifier.probability(a, b, similarity)
        return self._known[pair]


async def evaluate(
    data: DataSet,
    vectors: Vectors,
    verifier: Verifies,
    thresholds: Thresholds,
    settings: Settings,
    *,
    unrelated: float,
    progress: Progress,
) -> Evaluated:
    remembering = Remembering(verifier)
    progress(f"{data.name}: {len(data.asked):,} questions asked of {len(data.cached):,} answered ones")
    looked = await look_up(data, vectors, remembering, thresholds, unrelated=unrelated)
    filled = judged(data, looked, budget=settings.risks[0])
    told = None
    if data.streamed and settings.num_streams:
        best = next(row.threshold for row in filled.rows if row.way.startswith("cosine, at most"))
        told = await _streams(data, vectors, remembering, settings, best, unrelated, progress)
    return Evaluated(data.name, data.encoder, data.seen, data.weak, filled, told)


async def _streams(
    data: DataSet,
    vectors: Vectors,
    verifier: Verifies,
    settings: Settings,
    best: float | None,
    unrelated: float,
    progress: Progress,
) -> Streams:
    """`best`: the cosine that was best for the filled cache."""
    runs: dict[str, list[Replayed]] = {}

    def note(run: Replayed) -> None:
        runs.setdefault(run.way, []).append(run)

    cosines = dict(DEFAULTS) if best is None else {f"cosine, at most {settings.risks[0]:.0%} wrong above": best, **DEFAULTS}
    for seed in range(1, settings.num_streams + 1):
        stream = list(streams.drawn(data.streamed, settings.num_asked, seed))
        for risk in settings.risks:
            progress(f"{data.name}: stream {seed} of {settings.num_streams}, risk {risk:.0%}")
            policy = Policy(risk, settings.confidence, settings.audit_share)
            note(await streams.ours(stream, vectors, verifier, policy=policy, unrelated=unrelated, seed=seed))
        variance = separable_variance(streams.nearest_cosines(stream[:2_000], vectors) or [0.0], seed=seed)
        note(streams.by_vcache(stream, vectors, variance, budget=settings.risks[0], seed=seed))
        for way, threshold in cosines.items():
            note(streams.by_cosine(way, stream, vectors, threshold))
    return Streams(settings.num_asked, streams.ZIPF, [streams.summed(of) for of in runs.values()])
