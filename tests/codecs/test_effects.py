from __future__ import annotations

import math
import subprocess
import sys

import pytest

from anaphora.codecs.effects import DEFAULT_BOUND, check_default, recorded, smallest_within
from anaphora.errors import ConfigError
from anaphora.registry import CODECS


def test_every_codec_of_ours_is_on_record() -> None:
    assert set(recorded()) == set(CODECS.builtin)


def test_what_is_without_loss_has_no_effect_and_the_rest_has_some() -> None:
    pytest.importorskip("torch")
    for name, effect in recorded().items():
        assert (effect.mean_kl > 0) == CODECS.load(name)().lossy
        assert effect.max_kl >= effect.mean_kl
        assert effect.greedy_agreement > 0.9


def test_a_codec_whose_effect_exceeds_the_bound_is_refused_with_the_figure_and_what_to_do() -> None:
    effect = recorded()["int3"]
    check_default("int3", effect.mean_kl)
    with pytest.raises(ConfigError) as refused:
        check_default("int3", effect.mean_kl * 0.99, bound_setting="the.bound")
    message = str(refused.value)
    assert f"{effect.mean_kl:.1e} nats" in message
    assert "use 'int4', or raise the.bound" in message


def test_what_was_never_measured_is_refused_unless_there_is_no_bound() -> None:
    with pytest.raises(ConfigError, match="not on record"):
        check_default("somebody's", 1.0)
    check_default("somebody's", math.inf)


def test_a_bound_of_zero_leaves_what_is_without_loss() -> None:
    check_default("raw", 0.0)
    check_default("zstd", 0.0)
    assert smallest_within(0.0) == "zstd"
    with pytest.raises(ConfigError):
        check_default("int8", 0.0)


def test_a_bound_that_is_no_number_lets_nothing_through() -> None:
    with pytest.raises(ConfigError):
        check_default("int8", math.nan)


def test_the_default_bound_admits_int4_and_not_int3() -> None:
    check_default("int4", DEFAULT_BOUND)
    with pytest.raises(ConfigError):
        check_default("int3", DEFAULT_BOUND)


def test_looking_at_the_record_loads_no_torch() -> None:
    code = "import sys; from anaphora.codecs.effects import recorded; recorded(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
