"""Which token comes next: sampling for a whole batch at once, each row as if it were alone.

Order of operations (vLLM's): frequency and presence penalties → temperature → top_k → top_p → min_p → one draw.

Every set is defined by values, never by the order in which a sort met equal ones: top_k keeps every token not less likely
than the k-th, top_p the most likely tokens up to its mass and those as likely as the last of them, min_p every token at
least that fraction as likely as the best. The draw is the inverse of the cumulative distribution, in the order of token
ids, of one number from the row's own generator. So a seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import torch

from anaphora.errors import InvalidRequest
from anaphora.types import Sampling

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them leaves nothing but the best token anyway."""
_CHOICE_STRIDE = 0x9E3779B97F4A7C15
_MAX_LOGPROBS = 20
_NUM_BUCKETS = 0x3F80 + 1
"""Upper halves of the float32 numbers from 0 to 1."""


class SamplingPlan(msgspec.Struct, frozen=True):
    """What one sequence's next tokens are drawn by; nothing left unsaid. `top_k` 0 and `top_p` 1 mean off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class Sampled(msgspec.Struct, frozen=True):
    """One drawn token. `logprob` and `top` (token id, log-probability; best first) are of the model's raw distribution,
    before penalties and temperature, and set only where the plan asks for them."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SampledRow:
    """The state of one sequence's sampling: its generator and, for penalties, how often it generated which token."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.plan = plan
        self.counts: dict[int, int] = {}
        self._generator: torch.Generator | None = None
        if not plan.greedy:
            self._generator = torch.Generator()
            if plan.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(plan.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def draw(self) -> float:
        """The row's next number in [0, 1); always from the CPU, so that it is the same on every device."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def saw(self, token: int) -> None:
        if self.plan.penalised:
            self.counts[token] = self.counts.get(token, 0) + 1


def model_defaults(generation_config: Mapping[str, object]) -> SamplingPlan:
    """The plan of a request that says nothing: the model's `generation_config.json` where it sets temperature, top_p,
    top_k or min_p (whatever its `do_sample` says, as in vLLM), else temperature 1 and no cuts."""
    plan = SamplingPlan()
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value = generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            plan = msgspec.structs.replace(plan, **{name: int(value) if name == "top_k" else float(value)})
    return plan


def plan_for(sampling: Sampling, defaults: SamplingPlan | None = None, choice: int = 0) -> SamplingPlan:
    """The plan of choice number `choice` of a request: its own settings, else the model's defaults.

    Choices of one seeded request get seeds of their own, or all `n` would be the same; choice 0 gets the seed itself.
    Raises InvalidRequest (with `param`) where a value is out of range.
    """
    base = defaults or SamplingPlan()
    top_k = base.top_k if sampling.top_k is None else sampling.top_k
    plan = SamplingPlan(
        temperature=base.temperature if sampling.temperature is None else sampling.temperature,
        top_p=base.top_p if sampling.top_p is None else sampling.top_p,
        top_k=0 if top_k == -1 else top_k,  # -1 is vLLM's and llama.cpp's word for off
        min_p=base.min_p if sampling.min_p is None else sampling.min_p,
        seed=None if sampling.seed is None else (sampling.seed + choice * _CHOICE_STRIDE) & 0xFFFF_FFFF_FFFF_FFFF,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logprobs=sampling.logprobs,
    )
    _check("temperature", plan.temperature, plan.temperature >= 0, "at least 0")
    _check("top_p", plan.top_p, 0 < plan.top_p <= 1, "greater than 0 and at most 1")
    _check("top_k", plan.top_k, plan.top_k >= 0, "at least 1, or 0 or -1 for off")
    _check("min_p", plan.min_p, 0 <= plan.min_p <= 1, "between 0 and 1")
    _check("frequency_penalty", plan.frequency_penalty, True, "a finite number")
    _check("presence_penalty", plan.presence_penalty, True, "a finite number")
    if plan.logprobs is not None:
        _check("logprobs", plan.logprobs, 0 <= plan.logprobs <= _MAX_LOGPROBS, f"between 0 and {_MAX_LOGPROBS}")
    return plan


def _check(param: str, value: float, holds: bool, rule: str) -> None:
    if not (holds and math.isfinite(value)):
        raise InvalidRequest(f"{param} must be {rule}, not {value}", param=param)


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[Sampled]:
    """The next token of every row: `logits` is [len(rows), vocabulary], on any device; it is not changed.

    Greedy rows take the most likely token, the lowest id among equals. Each row's state moves on by the token drawn.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sequences")
    raw = logits.float()
    scores = _penalise(raw, rows)
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    hot = [i for i, row in enumerate(rows) if not row.plan.greedy]
    if hot:
        drawn = _draw(scores if len(hot) == len(rows) else scores[hot], [rows[i] for i in hot])
        for i, token in zip(hot, drawn, strict=True):
            tokens[i] = token
    for row, token in zip(rows, tokens, strict=True):
        row.saw(token)
    return _with_logprobs(raw, rows, tokens)


def _penalise(raw: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """`raw` less, for every token a row has generated, frequency_penalty · times + presence_penalty."""
    penalised = [i for i, row in enumerate(rows) if row.plan.penalised and row.counts]
    if not penalised:
        return raw
    scores = raw.clone()
    for i in penalised:
        plan, counts = rows[i].plan, rows[i].counts
        ids = torch.tensor(list(counts), device=raw.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        scores[i, ids] -= (times * plan.frequency_penalty + plan.presence_penalty).to(raw.device)
    return scores


def _draw(scores: torch.Tensor, rows: Sequence[SampledRow]) -> list[int]:
    plans = [row.plan for row in rows]
    vocabulary = scores.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).to(scores.device).unsqueeze(1)

    # The best score becomes 0 before the division, so that no temperature can push a score out of float32's range.
    z = (scores - scores.amax(dim=-1, keepdim=True)) / column([plan.temperature for plan in plans])
    z = _cut_top_k(z, [plan.top_k if 0 < plan.top_k < vocabulary else vocabulary for plan in plans])
    p = torch.softmax(z, dim=-1)
    p = _cut_top_p(p, [plan.top_p for plan in plans])
    if any(plan.min_p > 0 for plan in plans):
        p = p.masked_fill(p < p.amax(dim=-1, keepdim=True) * column([plan.min_p for plan in plans]), 0.0)
    mass = p.cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    at = torch.tensor([row.draw() for row in rows], dtype=torch.float64).to(scores.device).unsqueeze(1) * total
    # Rounding may bring `at` up to `total`, past the last token with any mass.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    drawn: list[int] = torch.searchsorted(mass, at, right=True).squeeze(1).tolist()
    return drawn


def _cut_top_k(z: torch.Tensor, ks: list[int]) -> torch.Tensor:
    vocabulary = z.shape[-1]
    cut = [i for i, k in enumerate(ks) if k < vocabulary]
    if not cut:
        return z
    best = torch.topk(z[cut], max(ks[i] for i in cut), dim=-1).values
    floor = torch.full((len(ks), 1), -torch.inf, device=z.device)
    floor[cut] = best.gather(1, torch.tensor([[ks[i] - 1] for i in cut], device=z.device))
    return z.masked_fill(z < floor, -torch.inf)


def _cut_top_p(p: torch.Tensor, top_ps: list[float]) -> torch.Tensor:
    """Zero what lies outside each row's nucleus: exactly, but without sorting the vocabulary (5 ms a row on a CPU).

    The upper 16 bits of a positive float32 order it, so they are the buckets of a histogram of mass; summed from the top,
    it tells in which bucket the nucleus ends, and only that bucket's tokens (a width of 1/128) are sorted.
    """
    cut = [i for i, top_p in enumerate(top_ps) if top_p < 1]
    if not cut:
        return p
    rows = p if len(cut) == len(top_ps) else p[cut]
    wanted = torch.tensor([top_ps[i] for i in cut], dtype=torch.float64).to(p.device).unsqueeze(1)
    bucket = rows.view(torch.int32) >> 16
    offset = torch.arange(len(cut), device=p.device).unsqueeze(1) * _NUM_BUCKETS
    size = len(cut) * _NUM_BUCKETS
    mass = torch.bincount((bucket + offset).flatten(), rows.double().flatten(), size).view(len(cut), _NUM_BUCKETS)
    from_top = torch.nn.functional.pad(mass.flip(-1).cumsum(dim=-1), (1, 0))
    whole = (from_top[:, 1:] < wanted).sum(dim=-1, keepdim=True)  # buckets that lie in the nucleus as a whole
    inside = bucket == _NUM_BUCKETS - 1 - whole
    num_inside = inside.sum(dim=-1, keepdim=True)
    best = torch.topk(rows.masked_fill(~inside, 0.0), max(1, int(num_inside.max())), dim=-1).values
    before = from_top.gather(1, whole) + best.cumsum(dim=-1, dtype=torch.float64) - best
    kept = torch.minimum((before < wanted).sum(dim=-1, keepdim=True), num_inside)
    floor = torch.zeros((len(top_ps), 1), device=p.device)
    # Rounded sums may never reach a top_p next to 1: then `kept` is 0, and so is the floor.
    floor[cut] = best.gather(1, (kept - 1).clamp(min=0)).masked_fill(kept == 0, 0.0)
    return p.masked_fill(p < floor, 0.0)


def _with_logprobs(raw: torch.Tensor, rows: Sequence[SampledRow], tokens: list[int]) -> list[Sampled]:
    asked = [i for i, row in enumerate(rows) if row.plan.logprobs is not None]
    sampled = [Sampled(token) for token in tokens]
    if not asked:
        return sampled
    logprobs = torch.log_softmax(raw[asked], dim=-1)
    chosen: list[float] = logprobs.gather(1, torch.tensor([[tokens[i]] for i in asked], device=raw.device))[:, 0].tolist()
    most = min(max(rows[i].plan.logprobs or 0 for i in asked), raw.shape[-1])
    best = torch.topk(logprobs, most, dim=-1)
    values: list[list[float]] = best.values.tolist()
    ids: list[list[int]] = best.indices.tolist()
    for i, logprob, top_ids, top_values in zip(asked, chosen, ids, values, strict=True):
        k = rows[i].plan.logprobs or 0
        sampled[i] = Sampled(tokens[i], logprob, tuple(zip(top_ids[:k], top_values[:k], strict=True)))
    return sampled
