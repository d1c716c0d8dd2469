from __future__ import annotations

import pytest

from anaphora.routing.base import Load
from anaphora.routing.reports import load
from anaphora.server.metrics import Metrics

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a model"} 3.0
vllm:num_requests_running{engine="1",model_name="a model"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a model"} 7.0
vllm:num_requests_waiting{engine="1",model_name="a model"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="a model"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a model"} 0.5
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
"""
SGLANG = """\
sglang:num_running_reqs{model_name="m"} 4.0
sglang:num_queue_reqs{model_name="m"} 1.0
sglang:token_usage{model_name="m"} 0.1
"""


@pytest.mark.parametrize(
    ("text", "expected"), [(VLLM, Load(5, 7, 0.5)), (SGLANG, Load(4, 1, 0.1)), ("", None), ("up 1\n", None)]
)
def test_queues_are_read(text: str, expected: Load | None) -> None:
    assert load(text) == expected


@pytest.mark.parametrize("number", ["NaN", "+Inf", "-1", "many"])
def test_numbers_that_are_none_are_passed_over(number: str) -> None:
    assert load(f"vllm:num_requests_running {number}\nvllm:num_requests_waiting 2 1700000000\n") == Load(0, 2)


def test_anaphora_reports_as_vllm_does() -> None:
    page = Metrics().render({"num_requests_running": 2, "num_requests_waiting": 5}, "a model")
    assert load(page.decode()) == Load(2, 5, 0.0)
