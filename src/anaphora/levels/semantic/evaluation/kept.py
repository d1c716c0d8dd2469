"""Questions that were answered, as the steps of the semantic level look for them: every vector compared, so that all ways of
deciding see the same neighbours, whatever an index would find."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from anaphora.keys import digest
from anaphora.levels.semantic.comparing import digest_of
from anaphora.levels.semantic.evaluation.questions import Wording
from anaphora.levels.semantic.forms import form_of
from anaphora.levels.semantic.records import Entry
from anaphora.levels.semantic.texts import prepare
from anaphora.types import Key, Tenant

Vector = npt.NDArray[np.float32]
Vectors = Mapping[str, Vector]
"""By text."""


def space_of(wording: Wording) -> bytes:
    return wording.space.encode()


class Kept:
    """What `comparing.compare` asks. Entries are numbered from 1 on, in the order in which they came."""

    def __init__(self, vectors: Vectors) -> None:
        self.wordings: list[Wording] = []
        self._vectors = vectors
        self._entries: list[Entry] = []
        self._places: dict[tuple[bytes, bytes], int] = {}
        self._rows: dict[bytes, _Rows] = {}

    def add(self, wording: Wording) -> int:
        space, prepared = space_of(wording), prepare(wording.text)
        content = digest_of(prepared)
        identity = len(self._entries) + 1
        key = Key(digest((b"evaluation", str(identity).encode())))
        tenant = Tenant("evaluation")
        self.wordings.append(wording)
        self._entries.append(
            Entry(
                id=identity,
                space=space,
                digest=content,
                key=key,
                text=wording.text,
                form=form_of(prepared),
                tenant=tenant,
                model="",
                stored_at_s=0.0,
            )
        )
        self._places[space, content] = identity
        vector = self._vectors[wording.text]
        self._rows.setdefault(space, _Rows(len(vector))).add(identity, vector)
        return identity

    def wording(self, identity: int) -> Wording:
        return self.wordings[identity - 1]

    def same(self, space: bytes, digest: bytes) -> Entry | None:
        identity = self._places.get((space, digest))
        return None if identity is None else self._entries[identity - 1]

    def near(self, space: bytes, vector: Vector, k: int) -> list[tuple[Entry, float]]:
        rows = self._rows.get(space)
        return [] if rows is None else [(self._entries[identity - 1], cosine) for identity, cosine in rows.nearest(vector, k)]

    def nearest(self, wording: Wording) -> tuple[int, float] | None:
        """The entry of the largest cosine: what a plain semantic cache looks at."""
        rows = self._rows.get(space_of(wording))
        return None if rows is None else rows.nearest(self._vectors[wording.text], 1)[0]


class _Rows:
    """Vectors of one space, in an array that doubles."""

    def __init__(self, dimensions: int) -> None:
        self._ids: list[int] = []
        self._array: Vector = np.zeros((1, dimensions), np.float32)

    def add(self, identity: int, vector: Vector) -> None:
        num = len(self._ids)
        if num == len(self._array):
            self._array = np.concatenate([self._array, np.zeros_like(self._array)])
        self._array[num] = vector
        self._ids.append(identity)

    def nearest(self, vector: Vector, k: int) -> list[tuple[int, float]]:
        cosines = self._array[: len(self._ids)] @ vector
        best = np.argpartition(-cosines, k)[:k] if k < len(cosines) else np.arange(len(cosines))
        # Of equal ones the first that came, so that nothing depends on the order of a partition.
        return [(self._ids[place], float(cosines[place])) for place in sorted(best.tolist(), key=lambda p: (-cosines[p], p))]
