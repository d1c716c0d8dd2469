"""Engines in this process, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from anaphora.codecs.base import Codec
    from anaphora.store import Store
    from anaphora.testing.engines import Driver

MakeDriver = Callable[..., "Driver"]
TinyModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices on several cores would spend their time waiting for each other."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def endless(tiny_model: TinyModel) -> Path:
    """A tiny Llama that never ends an answer by itself."""
    return tiny_model("Llama", eos_token_id=None)


@pytest.fixture(scope="session")
def make_driver(tmp_path_factory: pytest.TempPathFactory, endless: Path) -> MakeDriver:
    """`make_driver(model=folder, **EngineOptions)`: an engine in float32, of the endless tiny Llama if no model is given.
    With `store` (and `codec`), its KV blocks go there too."""
    from anaphora.backends.engine import EngineOptions
    from anaphora.backends.engine_core import EngineCore
    from anaphora.registry import POLICIES
    from anaphora.testing.engines import Driver

    models_dir = str(tmp_path_factory.mktemp("models-dir"))

    def make(
        model: Path = endless,
        store: Store | None = None,
        codec: Codec | None = None,
        readable: Mapping[str, Codec] | None = None,
        **options: Any,
    ) -> Driver:
        given = {"dtype": "float32", "device": "cpu", "kv_memory": 16 * 2**20, **options}
        settings = EngineOptions(model=str(model), models_dir=models_dir, **given)
        return Driver(EngineCore(settings, POLICIES.load(settings.policy)(), store=store, codec=codec, readable=readable))

    return make
