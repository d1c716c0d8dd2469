"""Test upstreams that are really served, and both official SDKs in front of one."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from anaphora.testing.upstream import Upstream


@pytest.fixture(scope="module")
def running() -> Iterator[Upstream]:
    with Upstream("one") as upstream:
        yield upstream


@pytest.fixture
def upstream(running: Upstream) -> Upstream:
    """One that was told nothing yet, and has seen nothing."""
    running.clear()
    return running


@pytest.fixture
def claude(upstream: Upstream) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=upstream.anthropic_base_url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(upstream: Upstream) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=upstream.openai_base_url, api_key="secret", max_retries=0) as client:
        yield client
