"""`anaphora testing upstream` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import httpx2
import openai
import pytest

from anaphora.cli import main
from anaphora.testing.upstream import Control

PATIENCE_S = 60


@contextmanager
def upstream(*flags: str, number: signal.Signals = signal.SIGTERM) -> Iterator[Control]:
    """Stopped by a signal in the end, which must be a clean end."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    command = [sys.executable, "-m", "anaphora", "testing", "upstream", "--port", "0", *flags]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "listening on " in line, line + process.stderr.read()
            yield Control(line.split()[-1])
            process.send_signal(number)
            _, rest = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode in {0, 130}
    assert rest == ""


def test_it_answers_both_sdks_by_name_and_at_its_pace() -> None:
    with upstream("--name", "far", "--base-latency", "0.2", "--decode-tokens-per-s", "20") as far:
        with anthropic.Anthropic(base_url=far.anthropic_base_url, api_key="any") as claude:
            raw = claude.messages.with_raw_response.create(
                model="claude-opus-5", max_tokens=5, messages=[{"role": "user", "content": "one two three"}]
            )
        assert raw.headers["x-testing-upstream"] == "far"
        with openai.OpenAI(base_url=far.openai_base_url, api_key="any") as gpt:
            assert gpt.responses.create(model="gpt-4.1", input="hello").output_text == "hello"
        slow, quick = far.requests()
        assert (slow.first_s or 0) > 0.29
        assert (quick.first_s or 0) > 0.19


def test_its_faults_can_be_told_by_flag_and_by_request() -> None:
    told = '{"kind": "429", "share": 1, "count": null, "retry_after_s": 3, "match": {"model": "gpt-4.1"}}'
    with upstream("--fault", "503=0", "--fault", told, "--seed", "7") as busy, httpx2.Client(base_url=busy.url) as client:

        def ask(model: str) -> httpx2.Response:
            return client.post("/v1/completions", json={"model": model, "prompt": "x"})

        assert [ask("gpt-4.1").headers["retry-after"] for _ in range(2)] == ["3", "3"]
        assert ask("gpt-4o").is_success
        busy.fault("500")
        assert ask("gpt-4o").status_code == 500
        assert busy.seen().outcomes == {"fault": 3, "finished": 1, "running": 0}


def test_ctrl_c_ends_it_though_an_answer_stalls() -> None:
    with upstream("--model", "mine", number=signal.SIGINT) as mine:
        mine.fault("stall", after_events=1)
        client = openai.OpenAI(base_url=mine.openai_base_url, api_key="any", max_retries=0)
        stream = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "x"}], stream=True)
        next(iter(stream))
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    client.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fault", "late=0.5"], "--fault late=0.5: no fault is called 'late'"),
        (["--fault", "429=much"], "--fault 429=much: could not convert"),
        (["--fault", '{"kind": 5}'], '--fault {"kind": 5}: Expected `str`'),
        (["--host", "0.0.0.0"], "--host: anybody could tell it what to do"),
        (["--port", "70000"], "--port: 70000 is not"),
        (["--base-latency", "-1"], "not negative"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["testing", "upstream", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("anaphora: error: ")
    assert said in error
    assert error.count("\n") == 1
