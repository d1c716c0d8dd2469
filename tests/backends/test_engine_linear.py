import pytest

pytest.importorskip("torch")

import torch

from anaphora.backends import engine_linear
from anaphora.backends.engine_linear import PackedLinear, can_pack, pack_linears

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="torch was built without oneDNN")


class Special(torch.nn.Linear):
    """Stands for whatever else inherits from Linear: quantised, adapted, ..."""


@pytest.mark.parametrize("keep_plain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (5, 16), (1, 1, 16), (1, 7, 16), (3, 300, 16)])
def test_a_packed_layer_computes_what_the_plain_one_does(shape: tuple[int, ...], bias: bool, keep_plain: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 24, bias=bias)
    packed = PackedLinear(plain, keep_plain=keep_plain)
    rows = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), plain(rows), rtol=1e-5, atol=1e-6)


def test_all_plain_linear_layers_are_replaced_and_others_left_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)), Special(4, 4))
    pack_linears(net)
    kinds = [type(module) for module in net.modules() if not isinstance(module, torch.nn.Sequential)]
    assert kinds == [PackedLinear, PackedLinear, Special]


def test_large_models_do_not_hold_their_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_linear, "_KEEP_PLAIN_BYTES", 100)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    pack_linears(net)
    assert net[0]._plain is None


def test_only_float32_on_the_cpu_is_packed() -> None:
    assert not can_pack(torch.bfloat16, CPU)
    assert not can_pack(torch.float32, torch.device("meta"))
