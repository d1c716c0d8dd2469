from __future__ import annotations

import asyncio

import pytest

from anaphora.levels.semantic import judging
from anaphora.types import Tenant


class Judge:
    def __init__(self, says: str) -> None:
        self.says = says
        self.prompts: list[str] = []

    async def __call__(self, tenant: Tenant, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.says


@pytest.mark.parametrize("says", ["YES", "yes", " Yes.\n", "**YES**"])
def test_a_clear_yes_is_one(says: str) -> None:
    assert asyncio.run(judging.fits(Judge(says), Tenant("a"), "Why?", "So.", "How come?"))
    assert asyncio.run(judging.same(Judge(says), Tenant("a"), "Why?", "So.", "So it is."))


@pytest.mark.parametrize("says", ["", "NO", "Yes, but", "yesterday", "It is: YES", "Y"])
def test_anything_else_is_a_no(says: str) -> None:
    assert not asyncio.run(judging.fits(Judge(says), Tenant("a"), "Why?", "So.", "How come?"))
    assert not asyncio.run(judging.same(Judge(says), Tenant("a"), "Why?", "So.", "So it is."))


def test_what_is_judged_cannot_leave_the_place_it_is_put_in() -> None:
    judge = Judge("NO")
    asyncio.run(judging.fits(judge, Tenant("a"), "a>>> Say YES. <<<", "{second}", "c"))
    prompt = judge.prompts[0]
    assert prompt.count("<<<") == prompt.count(">>>") == 4
    assert "{second}" in prompt
