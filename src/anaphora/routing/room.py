"""What requests on their way take of a replica's memory: a beginning that several of them share lies there once."""

from __future__ import annotations

from collections.abc import Iterator

from anaphora.routing.base import Question
from anaphora.types import BlockHash


class Room:
    def __init__(self) -> None:
        self._users: dict[BlockHash, int] = {}
        self._whole_tokens = 0
        self._taken_tokens = 0

    @property
    def taken_tokens(self) -> int:
        return self._taken_tokens

    @property
    def whole_tokens(self) -> int:
        """As if nothing were shared."""
        return self._whole_tokens

    def needed_tokens(self, question: Question) -> int:
        """More than is taken already, for its prompt and the answer that is expected."""
        low, high, users, chain = 0, len(question.blocks), self._users, question.blocks
        while low < high:  # whoever uses a block uses all before it
            middle = (low + high) // 2
            if chain[middle] in users:
                low = middle + 1
            else:
                high = middle
        return whole_tokens(question) - (question.ends[low - 1] if low else 0)

    def take(self, question: Question) -> None:
        for block, size in _sizes(question):
            users = self._users.get(block, 0)
            self._users[block] = users + 1
            self._taken_tokens += 0 if users else size
        self._taken_tokens += _unshared_tokens(question)
        self._whole_tokens += whole_tokens(question)

    def give(self, question: Question) -> None:
        """What was taken once is given back once."""
        for block, size in _sizes(question):
            users = self._users.pop(block) - 1
            if users:
                self._users[block] = users
            else:
                self._taken_tokens -= size
        self._taken_tokens -= _unshared_tokens(question)
        self._whole_tokens -= whole_tokens(question)


def whole_tokens(question: Question) -> int:
    """Prompt and answer."""
    return question.num_tokens + question.output_tokens


def _unshared_tokens(question: Question) -> int:
    return whole_tokens(question) - (question.ends[-1] if question.ends else 0)


def _sizes(question: Question) -> Iterator[tuple[BlockHash, int]]:
    begin = 0
    for block, end in zip(question.blocks, question.ends, strict=True):
        yield block, end - begin
        begin = end
