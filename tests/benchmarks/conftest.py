"""Scripts of the folder `benchmarks`, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], Any]:
    """`script("peers/compare.py")`: the module."""

    def load(path: str) -> Any:
        name = "benchmark_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # msgspec looks the names of its types up there
        spec.loader.exec_module(module)
        return module

    return load
