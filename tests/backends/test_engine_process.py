"""The engine in a process of its own: killed, orphaned, disconnected and misconfigured, over a tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from anaphora.backends import engine_child
from anaphora.backends.base import Backend
from anaphora.backends.engine import Engine, EngineClient, EngineOptions, EngineSupervisor
from anaphora.backends.engine_ipc import Status
from anaphora.errors import BackendFailed, ConfigError, EngineDied, InvalidRequest, QueueFull
from anaphora.registry import CODECS, Registry
from anaphora.testing.backends import BackendContract
from anaphora.transcript import Collector
from anaphora.types import Begin, Completion, Delta, End, Message, Request, Sampling, Scope, TextPart

PATIENCE_S = 60.0
SECRET = "correct-horse-battery"


def options_for(model: Path, tmp_path: Path, **options: Any) -> EngineOptions:
    given = {"served_name": "tiny", "dtype": "float32", "device": "cpu", "kv_memory": 16 * 2**20, "threads": 1, "niceness": 0}
    return EngineOptions(model=str(model), models_dir=str(tmp_path), **{**given, **options})


def chat(text: str, *, max_tokens: int | None = 8, **fields: Any) -> Request:
    sampling = Sampling(temperature=0.0)
    return Request("tiny", messages=(Message("user", (TextPart(text),)),), max_tokens=max_tokens, sampling=sampling, **fields)


async def complete(backend: Backend, request: Request) -> Completion:
    collector = Collector()
    async for delta in backend.run(request):
        collector.add(delta)
    assert collector.completion is not None
    return collector.completion


async def begun(backend: Backend, request: Request) -> AsyncIterator[Delta]:
    """An answer of which two deltas were read: it is being decoded."""
    deltas = backend.run(request)
    assert isinstance(await anext(deltas), Begin)
    await anext(deltas)
    return deltas


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110  # another process: there is no event to wait for
            await asyncio.sleep(0.01)


async def idle(engine: EngineClient) -> bool:
    stats = await engine.stats()
    return (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)


@asynccontextmanager
async def running(options: EngineOptions) -> AsyncIterator[Engine]:
    engine = Engine(options, wait_ready_s=PATIENCE_S)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.aclose()


@pytest.fixture
def options(endless: Path, tmp_path: Path) -> EngineOptions:
    return options_for(endless, tmp_path)


@pytest.fixture
def unused_port() -> Iterator[int]:
    """Where nobody answers: it is taken, and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def address(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an engine process for those tests that leave it as it was: starting one takes seconds."""
    folder = tmp_path_factory.mktemp("engine")
    options = options_for(endless, folder, kv_memory=2 * 2**20)
    path = str(folder / "e.sock")
    command = [sys.executable, "-m", "anaphora.backends.engine_child", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(options) + b"\n")
        process.stdin.flush()
        yield path
        assert process.poll() is None
        process.stdin.close()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[EngineClient]:
    engine = EngineClient(address, wait_ready_s=PATIENCE_S)
    try:
        await engine.start()
        await engine.models()
        yield engine
    finally:
        await engine.aclose()


class TestContract(BackendContract):
    """What every backend promises."""

    model = "tiny"

    @pytest.fixture(autouse=True)
    def _address(self, address: str) -> None:
        self.address = address

    def make(self) -> Backend:
        return EngineClient(self.address)


def test_after_a_kill_callers_get_a_retryable_error_and_the_engine_comes_back(options: EngineOptions) -> None:
    async def body() -> None:
        async with running(options) as engine:
            expected = await complete(engine, chat("hello"))
            talking = await begun(engine, chat("talk on and on", max_tokens=None))
            counting = asyncio.ensure_future(engine.stats())
            killed = engine.supervisor.pid
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            with pytest.raises(EngineDied) as caught:
                async for _ in talking:
                    pass
            assert caught.value.status == 503
            assert caught.value.retry_after_s is not None
            await asyncio.gather(counting, return_exceptions=True)
            assert not engine.ready()
            again = await complete(engine, chat("hello"))  # waits until it is back
            assert again.choices == expected.choices
            assert engine.supervisor.pid not in (None, killed)
            assert (await engine.stats())["num_restarts"] == 1

    asyncio.run(body())


def test_closing_an_answer_frees_its_place(address: str) -> None:
    async def body() -> None:
        async with connected(address) as engine:
            running_one = await begun(engine, chat("talk on and on", max_tokens=None))
            assert (await engine.stats())["num_requests_running"] == 1
            await running_one.aclose()  # type: ignore[attr-defined]  # the contract promises it
            assert (await engine.stats())["num_requests_running"] == 0  # asked behind the cancellation: no waiting needed

    asyncio.run(body())


def test_a_request_that_is_cancelled_at_once_is_never_left_running(address: str) -> None:
    async def body() -> None:
        async with connected(address) as engine:
            tasks = [asyncio.ensure_future(complete(engine, chat(f"number {i}", max_tokens=None))) for i in range(20)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stats = await engine.stats()
            assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)
            await complete(engine, chat("hello"))

    asyncio.run(body())


def test_a_gateway_that_disconnects_frees_all_its_places_and_no_others(address: str) -> None:
    async def body() -> None:
        async with connected(address) as engine:
            leaver = EngineClient(address)
            await leaver.start()
            answers = [await begun(leaver, chat(f"talk about {i}", max_tokens=None)) for i in range(3)]
            stayer = asyncio.ensure_future(complete(engine, chat("hello", max_tokens=200)))
            assert (await engine.stats())["num_requests_running"] >= 3
            await leaver.aclose()
            for answer in answers:
                with pytest.raises(EngineDied):
                    async for _ in answer:
                        pass
            assert (await stayer).usage.output_tokens == 200
            await until(lambda: idle(engine))

    asyncio.run(body())


def test_a_full_queue_and_a_bad_request_cross_the_socket_as_what_they_are(options: EngineOptions) -> None:
    async def body() -> None:
        async with running(msgspec.structs.replace(options, max_queue=1, max_num_seqs=1)) as engine:
            talking = await begun(engine, chat("talk", max_tokens=None))
            waiting = asyncio.ensure_future(complete(engine, chat("wait", max_tokens=1)))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull) as full:
                await complete(engine, chat("too many"))
            assert full.value.retry_after_s is not None
            await talking.aclose()  # type: ignore[attr-defined]
            await waiting
            with pytest.raises(InvalidRequest) as bad:
                await complete(engine, chat("hello", extra={"response_format": {"type": "json_object"}}))
            assert bad.value.param == "response_format"
            with pytest.raises(InvalidRequest, match="64 bits"):
                await complete(engine, chat("hello", extra={"x": 10**30}))
            await complete(engine, chat("hello"))

    asyncio.run(body())


def test_a_request_that_breaks_the_template_harms_no_other(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / "chat_template.jinja"
    # A division by zero is no TemplateError: nobody expects it.
    source = "{% if messages[-1]['content'] == 'divide' %}{{ 1 // 0 }}{% endif %}"
    template.write_text(source + template.read_text())

    async def body() -> None:
        async with running(options_for(folder, tmp_path)) as engine:
            await engine.models()
            other = asyncio.ensure_future(complete(engine, chat("hello", max_tokens=100)))
            with pytest.raises(BackendFailed, match="division"):
                await complete(engine, chat("divide"))
            await other
            assert engine.supervisor.num_restarts == 0

    asyncio.run(body())


@pytest.fixture
def parent(options: EngineOptions) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that owns an engine, and the engine's pid."""
    code = (
        "import asyncio, msgspec, sys\n"
        "from anaphora.backends.engine import Engine, EngineOptions\n"
        "async def main():\n"
        "    engine = Engine(msgspec.json.decode(sys.argv[1], type=EngineOptions))\n"
        "    await engine.start()\n"
        "    await engine.models()\n"
        "    print(engine.supervisor.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(options).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        yield process, pid
        process.kill()


def test_the_engine_goes_when_its_parent_is_killed(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = parent
    descriptor = os.pidfd_open(pid)
    process.kill()

    async def gone() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()
        asyncio.get_running_loop().remove_reader(descriptor)

    asyncio.run(gone())
    os.close(descriptor)


def test_signals_to_the_whole_group_leave_the_engine_to_its_gateway(options: EngineOptions) -> None:
    async def body() -> None:
        async with running(options) as engine:
            talking = await begun(engine, chat("talk", max_tokens=300))
            assert engine.supervisor.pid is not None
            os.kill(engine.supervisor.pid, signal.SIGINT)
            os.kill(engine.supervisor.pid, signal.SIGTERM)
            deltas = [delta async for delta in talking]
            assert isinstance(deltas[-1], End)
            assert engine.supervisor.num_restarts == 0
            pid = engine.supervisor.pid
        assert engine.supervisor.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(body())


def test_a_forget_that_cannot_be_carried_out_is_an_error_of_its_caller_alone(options: EngineOptions, unused_port: int) -> None:
    away = f"redis://:{SECRET}@127.0.0.1:{unused_port}/0"

    async def body() -> None:
        async with running(msgspec.structs.replace(options, kv_shared=away, kv_disk=0)) as engine:
            await complete(engine, chat("hello"))
            pid = engine.supervisor.pid
            with pytest.raises(BackendFailed, match="could not be forgotten in: valkey"):
                await engine.forget(Scope())
            assert engine.supervisor.pid == pid
            assert (await complete(engine, chat("hello"))).usage.kv_reused_tokens == 0, "the pool has forgotten it"

    asyncio.run(body())


def test_what_the_engine_is_told_cannot_be_read_off_its_command_line(options: EngineOptions, unused_port: int) -> None:
    async def body() -> None:
        away = f"redis://:{SECRET}@127.0.0.1:{unused_port}/0"
        async with running(msgspec.structs.replace(options, kv_shared=away)) as engine:
            await engine.models()
            child = psutil.Process(engine.supervisor.pid)
            assert "anaphora.backends.engine_child" in child.cmdline()
            assert SECRET not in " ".join(child.cmdline()) + str(child.environ())

    asyncio.run(body())


def test_an_engine_that_nobody_tells_anything_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anaphora.backends.engine_child", str(tmp_path / "e.sock")]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert "started by a gateway" in ended.stderr


# -- what it cannot do ---------------------------------------------------------------------------------------------------


async def refusal(options: EngineOptions) -> str:
    """Why an engine with these options will never be ready."""
    statuses: asyncio.Queue[Status] = asyncio.Queue()
    engine = Engine(options, on_status=statuses.put_nowait)
    try:
        await engine.start()
        async with asyncio.timeout(PATIENCE_S):
            while (status := await statuses.get()).refused is None:
                assert not status.ready
        with pytest.raises(BackendFailed, match="cannot run as configured"):
            await complete(engine, chat("hello"))
        assert engine.supervisor.num_restarts == 0
        return status.refused
    finally:
        await engine.aclose()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "/nowhere/at-all"}, "there is no model at"),
        ({"kv_memory": 1000}, "too small"),
        ({"policy": "no-such-policy"}, "no-such-policy"),
        ({"device": "abacus"}, "abacus"),
    ],
    ids=lambda value: str(value),
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(
    options: EngineOptions, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        engine_child._load(msgspec.structs.replace(options, **change), lambda stage: None)


def test_a_broken_codec_of_another_package_matters_only_to_who_asks_for_it(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("broken", "no.such.module:Codec", "anaphora.codecs")
    monkeypatch.setattr(engine_child, "CODECS", Registry("codecs", CODECS.builtin, [broken]))
    engine_child._load(options, lambda stage: None)
    with pytest.raises(ConfigError, match="broken"):
        engine_child._load(msgspec.structs.replace(options, kv_codec="broken"), lambda stage: None)


def test_the_reason_of_a_refusal_reaches_those_who_wait_for_the_engine(options: EngineOptions) -> None:
    assert "too small" in asyncio.run(refusal(msgspec.structs.replace(options, kv_memory=1000)))


def test_without_its_packages_the_engine_says_what_to_install(
    options: EngineOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install 'anaphora[local]'" in asyncio.run(refusal(options))


def test_a_path_too_long_for_a_socket_is_a_config_error(
    options: EngineOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ConfigError, match="TMPDIR"):
        EngineSupervisor(options)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_serve_ends_with_status_2_where_the_engine_refuses(tmp_path: Path, workers: int) -> None:
    command = [sys.executable, "-m", "anaphora", "serve", "--port", "0", "--model", "/nowhere/at-all"]
    command += ["--workers", str(workers), "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert "anaphora: error: there is no model at '/nowhere/at-all'" in done.stderr
