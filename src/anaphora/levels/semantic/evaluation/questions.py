"""Questions whose truth is known. Pure."""

from __future__ import annotations

import random
from typing import Literal

import msgspec

Seen = Literal["no", "like them", "yes"]
"""Whether the verifier was trained on these questions, on others that were made the same way, or on neither."""


_FEW = 10
"""Wordings of a topic."""


class Wording(msgspec.Struct, frozen=True):
    """One way to ask something."""

    text: str
    means: str
    """Equal for questions that one answer is right for; where the truth is weak, for those that it may be right for."""
    space: str = ""
    """Only questions of one space are compared."""
    topic: str = ""
    """What is asked more or less often goes by it."""
    kind: str = ""


class DataSet(msgspec.Struct, frozen=True):
    name: str
    cached: tuple[Wording, ...]
    """Were answered before."""
    asked: tuple[Wording, ...]
    encoder: str = "minilm"
    seen: Seen = "no"
    weak: bool = False
    """Questions that mean the same by their label may still need different answers; those that do not, certainly do."""
    exact: bool = True
    """What is asked in the very words of a cached question is the exact level's, so that it is left out."""
    streamed: tuple[Wording, ...] = ()
    """What streams are drawn from. None: there are no streams."""

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(wording.text for wording in (*self.cached, *self.asked, *self.streamed)))


def is_right(asked: Wording, cached: Wording) -> bool:
    """Whether the answer to `cached` is the right one to `asked`; where the truth is weak, whether it may be."""
    return asked.means == cached.means


def sampled(data: DataSet, num: int, seed: int = 1) -> DataSet:
    """About `num` of its questions. A topic with few wordings, such as a pair, comes whole or not at all."""
    dice = random.Random(seed)
    parts = (data.cached, data.asked, data.streamed)
    wordings = dict.fromkeys(wording for part in parts for wording in part)
    topics = sorted({wording.topic for wording in wordings})
    if len(wordings) > _FEW * len(topics):
        chosen = set(dice.sample(sorted(wordings, key=lambda one: (one.topic, one.text)), min(num, len(wordings))))
    else:
        some = set(dice.sample(topics, min(num, len(topics))))
        chosen = {wording for wording in wordings if wording.topic in some}
    cached, asked, streamed = (tuple(one for one in part if one in chosen) for part in parts)
    return msgspec.structs.replace(data, cached=cached, asked=asked, streamed=streamed)
