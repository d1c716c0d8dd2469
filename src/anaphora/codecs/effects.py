"""What codecs do to a model's answers, as measured, and whether that is within a bound. Needs no torch.

The record, `effects.toml`, is made by `benchmarks/codecs.py --record`: SmolLM2 reads on after long documents whose KV went
through a codec, and its next-token distributions are compared with those over the exact KV. Other models differ; the order of
magnitude is what a bound is about.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from importlib import resources

import msgspec

from anaphora.errors import ConfigError

DEFAULT_BOUND = 0.005
"""Nats of mean divergence."""


class Effect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bits_per_value: float
    """Of the KV it was measured on."""
    mean_kl: float
    """Kullback-Leibler divergence of the next-token distributions from the exact ones, in nats, mean over all positions."""
    max_kl: float
    greedy_agreement: float
    """Share of the positions at which the most likely token is the same."""
    positions: int


@functools.cache
def recorded() -> Mapping[str, Effect]:
    """By the codec's name in the registry; all zeros for those without loss."""
    text = (resources.files(__package__) / "effects.toml").read_text()
    return msgspec.convert(tomllib.loads(text), dict[str, Effect])


def check_default(
    codec: str, bound: float, *, setting: str = "cache.kv_codec", bound_setting: str = "cache.kv_codec_bound"
) -> None:
    """Raises ConfigError where the codec of that name may not be what all KV is stored in: its mean divergence is beyond
    `bound`, in nats, or was never measured. The message names the settings. Within infinity is everything."""
    if bound == math.inf:
        return
    effect = recorded().get(codec)
    if effect is None:
        raise ConfigError(
            f"{setting} = {codec!r}: what it does to a model's answers is not on record; measure it with benchmarks/codecs.py, "
            f"then set {bound_setting} = inf to use it"
        )
    if not effect.mean_kl <= bound:
        raise ConfigError(
            f"{setting} = {codec!r}: it was measured to change next-token distributions by {effect.mean_kl:.1e} nats (mean "
            f"Kullback-Leibler divergence on SmolLM2), and {bound_setting} allows {bound:.1e}; use {smallest_within(bound)!r}, "
            f"or raise {bound_setting}"
        )


def smallest_within(bound: float) -> str:
    """The codec on record that takes the fewest bits of those whose mean divergence is at most `bound`."""
    fitting = {name: effect for name, effect in recorded().items() if effect.mean_kl <= bound}
    return min(fitting, key=lambda name: fitting[name].bits_per_value, default="raw")
