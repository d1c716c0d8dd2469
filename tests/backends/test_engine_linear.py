import pytest

pytest.importorskip("torch")

import torch

from anaphora.backends import engine_linear
from anaphora.backends.engine_kernels import can_compile
from anaphora.backends.engine_linear import FEW_ROWS, MOST_ROWS, PartOfLinear, ThinLinear, thin_linears

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not can_compile(torch.float32, CPU), reason="numba is not installed")


class Special(torch.nn.Linear):
    """Stands for whatever else inherits from Linear: quantised, adapted, ..."""


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_linear, "LEAST_WEIGHTS", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (16,),
        (1, 16),
        (5, 16),
        (1, 1, 16),
        (1, 7, 16),
        (MOST_ROWS, 16),
        (MOST_ROWS + 1, 16),
        (1, FEW_ROWS, 16),
        (2, FEW_ROWS, 16),
    ],
)
def test_a_thin_layer_computes_what_the_plain_one_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 70, bias=bias)
    thin = ThinLinear(plain)
    rows = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(thin(rows), plain(rows), rtol=1e-5, atol=1e-6)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 12, bias=True)
        self.k_proj = torch.nn.Linear(8, 4, bias=False)
        self.v_proj = torch.nn.Linear(8, 4, bias=True)

    def forward(self, rows: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(rows), self.k_proj(other), self.v_proj(rows)]


def test_layers_computed_together_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    net = Attention()
    rows, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    with torch.inference_mode():
        expected = [net(rows, rows), net(other, rows), net(rows, other)]
        thin_linears(net)
        assert isinstance(net.q_proj, PartOfLinear)
        for got, wanted in zip([net(rows, rows), net(other, rows), net(rows, other)], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_all_plain_linear_layers_are_replaced_and_others_left_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)), Special(4, 4))
    thin_linears(net)
    kinds = [type(module) for module in net.modules() if not isinstance(module, torch.nn.Sequential)]
    assert kinds == [ThinLinear, ThinLinear, Special]


def test_only_float32_on_the_cpu_is_compiled_for() -> None:
    assert not can_compile(torch.bfloat16, CPU)
    assert not can_compile(torch.float32, torch.device("meta"))
