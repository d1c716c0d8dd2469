"""An encoder on its own thread: what it is fed, and who waits for what."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from anaphora.backends.encoders.base import Encoder, Kind
from anaphora.backends.encoders.encoding import Encoders, Encoding, TextTooLong
from anaphora.batching import BatchingOptions
from anaphora.errors import BackendFailed, ConfigError
from anaphora.registry import ENCODERS

if TYPE_CHECKING:
    from anaphora.backends.encoders.base import Vectors


class Letters:
    """Counts the letters of a text, as many tokens; can be held, and can fail."""

    name, dimensions, max_tokens, fingerprint = "letters", 2, 10, "f"
    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ("query", "passage")

    def __init__(self, *, threads: int = 1) -> None:
        self.batches: list[tuple[Kind, list[str]]] = []
        self.threads: set[str] = set()
        self.go = threading.Event()
        self.go.set()
        self.busy = threading.Event()

    def encode(self, texts: Sequence[str], kind: Kind = "") -> Vectors:
        self.threads.add(threading.current_thread().name)
        self.batches.append((kind, list(texts)))
        self.busy.set()
        assert self.go.wait(60)
        if "bad" in texts:
            raise ValueError("bad")
        return np.array([[len(text), 1] for text in texts], np.float32)

    def num_tokens(self, text: str, kind: Kind = "") -> int:
        return len(text)


def make(encoder: Letters) -> Encoding:
    """Everything seems to take a second: too long to be computed at once, on the thread that asks."""
    seconds = itertools.count(0.0)
    return Encoding(lambda: encoder, options=BatchingOptions(most_tokens=20, most_items=4), used_s=lambda: next(seconds))


def test_all_callers_share_one_thread_and_each_gets_its_own_rows_in_order() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        found = await asyncio.gather(*(encoding.encode(["a" * size, "bbb", "a"]) for size in range(1, 9)))
        for size, (vectors, num_tokens) in enumerate(found, start=1):
            assert vectors[:, 0].tolist() == num_tokens == [size, 3, 1]

    asyncio.run(main())
    encoding.close()
    assert len(encoder.threads) == 1
    assert len(encoder.batches) < 24
    assert all(len(texts) <= 4 for _, texts in encoder.batches)


def test_while_one_batch_is_computed_the_next_gathers() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        encoder.go.clear()
        one = asyncio.create_task(encoding.encode(["a"]))
        await asyncio.to_thread(encoder.busy.wait, 60)
        others = [asyncio.create_task(encoding.encode([text])) for text in ("b", "c")]
        other_kind = asyncio.create_task(encoding.encode(["d"], "passage"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        encoder.go.set()
        await asyncio.gather(one, *others, other_kind)

    asyncio.run(main())
    encoding.close()
    assert encoder.batches == [("", ["a"]), ("", ["b", "c"]), ("passage", ["d"])]


def test_a_text_that_is_too_long_is_cut_or_refused_before_anything_is_computed() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        with pytest.raises(TextTooLong) as refused:
            await encoding.encode(["a", "a" * 11], whole=True)
        assert (refused.value.number, refused.value.num_tokens) == (1, 11)
        assert encoder.batches == []
        vectors, num_tokens = await encoding.encode(["a" * 11])
        assert (len(vectors), num_tokens) == (1, [11])

    asyncio.run(main())
    encoding.close()


def test_an_encoder_that_fails_fails_those_of_the_batch_and_goes_on() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        with pytest.raises(BackendFailed, match="bad"):
            await encoding.encode(["bad"])
        assert (await encoding.encode(["a"]))[1] == [1]

    asyncio.run(main())
    encoding.close()


def test_what_nobody_waits_for_any_more_is_not_computed_further() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        encoder.go.clear()
        one = asyncio.create_task(encoding.encode(["a" * 10] * 9))
        await asyncio.to_thread(encoder.busy.wait, 60)
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        encoder.go.set()
        await encoding.encode(["b"])

    asyncio.run(main())
    encoding.close()
    assert sum(len(texts) for _, texts in encoder.batches) <= 4


def test_who_asks_while_it_is_closed_or_afterwards_is_told() -> None:
    encoder = Letters()
    encoding = make(encoder)

    async def main() -> None:
        encoder.go.clear()
        asking = [asyncio.create_task(encoding.encode(["a" * 10] * 3))]
        await asyncio.to_thread(encoder.busy.wait, 60)
        asking.append(asyncio.create_task(encoding.encode(["b"])))
        await asyncio.sleep(0)
        encoding._queue.put(None)  # as `close` does, which then waits
        encoder.go.set()
        await asyncio.to_thread(encoding.close)
        asking.append(asyncio.create_task(encoding.encode(["c"])))
        for failed in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(failed, BackendFailed)

    asyncio.run(main())


class Meter:
    """Processor time, of which more passes from one look to the next."""

    def __init__(self) -> None:
        self.takes_s = 0.0
        self._used_s = 0.0

    def __call__(self) -> float:
        self._used_s += self.takes_s
        return self._used_s


def test_what_a_text_takes_is_the_median_of_the_latest_batches() -> None:
    meter = Meter()
    encoding = Encoding(Letters, options=BatchingOptions(most_tokens=20, most_items=4), used_s=meter)

    async def main() -> None:
        assert encoding.text_s is None
        for takes_s, expected_s in ((9.0, 9.0), (2.0, 5.5), (2.0, 2.0), (4.0, 3.0)):
            meter.takes_s = takes_s
            await encoding.encode(["a"])
            assert encoding.text_s == pytest.approx(expected_s)
        meter.takes_s = 4.0
        for _ in range(15):
            await encoding.encode(["a", "b"])
        assert encoding.text_s == pytest.approx(2.0)

    asyncio.run(main())
    encoding.close()


def test_what_is_computed_faster_than_handed_over_is_computed_by_whoever_asks() -> None:
    encoder, meter = Letters(), Meter()
    encoding = Encoding(lambda: encoder, options=BatchingOptions(most_tokens=20, most_items=4), used_s=meter)

    async def main() -> None:
        await encoding.encode(["a"])
        encoder.threads.clear()
        vectors, num_tokens = await encoding.encode(["aa", "aaa"], whole=True)
        assert (vectors[:, 0].tolist(), num_tokens) == ([2, 3], [2, 3])
        assert encoder.threads == {threading.current_thread().name}
        with pytest.raises(TextTooLong):
            await encoding.encode(["a" * 11], whole=True)
        with pytest.raises(BackendFailed, match="bad"):
            await encoding.encode(["bad"])
        encoder.threads.clear()
        meter.takes_s = 9.0  # from now on the thread has to
        for _ in range(20):
            await encoding.encode(["a"])
        encoder.threads.clear()
        await encoding.encode(["a"])
        assert threading.current_thread().name not in encoder.threads

    asyncio.run(main())
    encoding.close()


def test_long_texts_and_those_that_come_while_it_computes_are_for_the_thread() -> None:
    encoder = Letters()
    encoding = Encoding(lambda: encoder, used_s=lambda: 0.0)

    async def main() -> None:
        await encoding.encode(["a"])
        encoder.threads.clear()
        await encoding.encode(["a" * 2001])
        encoder.go.clear()
        encoder.busy.clear()
        one = asyncio.create_task(encoding.encode(["a" * 2001]))
        await asyncio.to_thread(encoder.busy.wait, 60)
        two = asyncio.create_task(encoding.encode(["b"]))
        await asyncio.sleep(0)
        encoder.go.set()
        await asyncio.gather(one, two)
        assert threading.current_thread().name not in encoder.threads

    asyncio.run(main())
    encoding.close()


def test_an_encoder_that_cannot_be_loaded_fails_every_request_with_the_reason() -> None:
    def make() -> Encoder:
        raise ValueError("no such file")

    async def main() -> None:
        encoding = Encoding(make)
        for _ in range(2):
            with pytest.raises(BackendFailed, match="no such file"):
                await encoding.encode(["a"])
        encoding.close()

    asyncio.run(main())


def test_one_process_has_one_thread_for_each_encoder() -> None:
    encoders = Encoders(ENCODERS.load)
    assert encoders.get("minilm") is encoders.get("minilm")
    assert encoders.get("minilm") is not encoders.get("static")
    encoders.close()


def test_a_package_that_is_missing_is_said_before_anything_is_asked() -> None:
    class Needy(Letters):
        needs = ("os", "no_such_package")

    with pytest.raises(ConfigError, match=r"letters needs no_such_package: install anaphora\[embeddings\]"):
        Encoders(lambda name: Needy).get("letters")
