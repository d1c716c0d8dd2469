"""Which models are served, that the engine computes what transformers computes, and exactness over the real SmolLM2."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from anaphora.backends.engine_model import choose_device, materialise, resolve
from anaphora.errors import ConfigError
from anaphora.types import Message, Request, Sampling, Scope, TextPart

if TYPE_CHECKING:
    from anaphora.testing.engines import Asked, Driver

MakeDriver = Callable[..., "Driver"]
TinyModel = Callable[..., Path]

PROMPTS = (Path(__file__).parent.parent / "data" / "prompts.txt").read_text().splitlines()


def chat(text: str, max_tokens: int) -> Request:
    messages = (Message("user", (TextPart(text),)),)
    return Request("m", messages=messages, max_tokens=max_tokens, sampling=Sampling(temperature=0.0))


# -- families ------------------------------------------------------------------------------------------------------------

SERVED = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    ("Llama", {"num_key_value_heads": 4}),
    ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
    ("Mistral", {"sliding_window": None}),
    ("Phi3", {"pad_token_id": 0}),
]


@pytest.mark.parametrize(("family", "config"), SERVED, ids=str)
def test_greedy_answers_are_those_of_transformers(
    make_driver: MakeDriver, tiny_model: TinyModel, family: str, config: dict[str, Any]
) -> None:
    folder = tiny_model(family, eos_token_id=None, **config)
    driver = make_driver(folder, prefill_chunk=13)
    asked = driver.ask_together(chat(prompt, 12) for prompt in PROMPTS[:6])
    net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for one in asked:
        assert one.job is not None
        sequence = one.job.generations[0]
        logits = net(torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        assert one.tokens[0] == logits[sequence.num_prompt - 1 : -1].argmax(-1).tolist()


REFUSED = [
    ("Mistral", {"sliding_window": 64}, "DynamicSlidingWindowLayer"),
    ("Gemma3Text", {}, "DynamicSlidingWindowLayer"),
    ("Mamba", {}, "LinearAttentionLayer"),
    ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embeddings of type 'dynamic'"),
    ("Granite", {"logits_scaling": 4.0}, "its logits on the engine's attention are off"),
    ("Bloom", {}, "its logits on the engine's attention are off"),
]


@pytest.mark.parametrize(("family", "config", "reason"), REFUSED, ids=str)
def test_a_model_that_cannot_be_cached_correctly_is_refused(
    make_driver: MakeDriver, tiny_model: TinyModel, family: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_driver(tiny_model(family, **config))


# -- folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _deepen(path: Path) -> None:
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", _cut, "cannot load"),
        ("model.safetensors", Path.unlink, "cannot load"),
        ("config.json", _deepen, "lacks 9 of its model's weights"),
        ("config.json", lambda path: path.write_text('{"model_type": "no-such-type"}'), "cannot load"),
        ("config.json", lambda path: path.write_text("{"), "cannot load"),
        ("tokenizer.json", Path.unlink, "cannot load"),
    ],
    ids=["cut", "no weights", "too few weights", "unknown type", "no json", "no tokenizer"],
)
def test_a_damaged_folder_is_a_config_error(
    make_driver: MakeDriver, copy: Path, name: str, damage: Callable[[Path], object], reason: str
) -> None:
    damage(copy / name)
    with pytest.raises(ConfigError, match=reason):
        make_driver(copy)


def test_other_weights_are_another_fingerprint(make_driver: MakeDriver, copy: Path) -> None:
    before = make_driver(copy).core.info.fingerprint
    assert make_driver(copy).core.info.fingerprint == before
    assert make_driver(copy, block_size=32).core.info.fingerprint != before
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert make_driver(copy).core.info.fingerprint != before


@pytest.mark.parametrize("spec", ["/nowhere", "./nowhere", "nowhere", "a/b/c", "~/nowhere"])
def test_a_model_that_is_not_there_is_a_config_error(spec: str) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        resolve(spec)


def test_a_file_or_folder_that_is_no_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"neither a model folder nor a \.gguf file"):
        resolve(str(tmp_path / "notes.txt"))
    fake = tmp_path / "fake.gguf"
    fake.write_text("not a model")
    with pytest.raises(ConfigError, match="cannot load"):
        materialise(resolve(str(fake)), tmp_path / "models", lambda stage: None)
    assert not list((tmp_path / "models").glob("fake*/config.json"))


def test_an_unknown_device_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="abacus"):
        choose_device("abacus")


# -- the real model --------------------------------------------------------------------------------------------------------

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def real(make_driver: MakeDriver, smollm2: Path) -> Iterator[Driver]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield make_driver(smollm2, kv_memory=2**30)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cold(real: Driver) -> list[Asked]:
    """Each prompt's answer, computed alone."""
    return [real.ask(chat(prompt, NEW_TOKENS)) for prompt in PROMPTS]


def assert_same(answers: list[Asked], expected: list[Asked]) -> None:
    different = {
        prompt: (one.tokens[0], other.tokens[0])
        for prompt, one, other in zip(PROMPTS, answers, expected, strict=False)
        if one.tokens != other.tokens
    }
    assert different == {}


def test_the_real_model_says_what_transformers_says(real: Driver, cold: list[Asked], smollm2: Path) -> None:
    net: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for asked in cold[::5]:
        assert asked.job is not None
        sequence = asked.job.generations[0]
        with torch.inference_mode():
            logits = net(torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        assert asked.tokens[0] == logits[sequence.num_prompt - 1 : -1].argmax(-1).tolist()


def test_the_real_model_answers_warm_as_cold(real: Driver, cold: list[Asked]) -> None:
    latest = PROMPTS[-20:]
    known = [real.ask(chat(prompt, NEW_TOKENS)) for prompt in latest]
    assert [asked.tokens for asked in known] == [asked.tokens for asked in cold[-20:]]
    assert all(asked.usage.kv_reused_tokens == asked.usage.prompt_tokens for asked in known)
    real.core._scheduler._ends.forget(Scope())  # so that blocks are reused, and the rest is computed
    warm = [real.ask(chat(prompt, NEW_TOKENS)) for prompt in PROMPTS[:20]]
    warm += real.ask_together(chat(prompt, NEW_TOKENS) for prompt in PROMPTS[20:])
    assert_same(warm, cold)
    assert all(asked.usage.kv_reused_tokens >= (asked.usage.prompt_tokens - 1) // 16 * 16 for asked in warm)


def test_the_real_model_answers_in_a_batch_as_alone(real: Driver, cold: list[Asked]) -> None:
    real.core.forget(Scope())
    together = real.ask_together(chat(prompt, NEW_TOKENS) for prompt in PROMPTS)
    assert_same(together, cold)


def test_the_real_model_answers_after_eviction_as_before(
    make_driver: MakeDriver, smollm2: Path, real: Driver, cold: list[Asked]
) -> None:
    bytes_per_token = real.core.model.kv_shape.bytes_per_token
    small = make_driver(smollm2, kv_memory=1500 * bytes_per_token, prefill_chunk=48, mixed_chunk=24)
    small.ask_together(chat(prompt, 0) for prompt in PROMPTS)  # all of it was cached for a while
    assert_same(small.ask_together(chat(prompt, NEW_TOKENS) for prompt in PROMPTS), cold)
    stats = small.core.stats()
    assert int(stats["kv_blocks_evicted"]) > 3 * int(stats["kv_blocks"])
    small.core._cache.check()


def test_the_real_models_next_turn_finds_prompt_and_answer(real: Driver) -> None:
    question = Message("user", (TextPart("Which planet is the largest one? Answer in a short sentence, please."),))
    sampling = Sampling(temperature=0.0)
    first = real.ask(Request("m", messages=(question,), max_tokens=40, sampling=sampling))
    (choice,) = first.completion.choices
    answer, more = Message("assistant", choice.content), Message("user", (TextPart("And the smallest?"),))
    second = real.ask(Request("m", messages=(question, answer, more), max_tokens=4, sampling=sampling))
    computed = first.usage.prompt_tokens + first.completion.usage.output_tokens - 1
    assert second.completion.usage.kv_reused_tokens == computed // 16 * 16
