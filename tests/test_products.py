"""Products by oneDNN are torch's own up to rounding, only where they are meant to be, and a sweep is exact with either."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from tests.examples import EIFFEL, tiny_lm
from workbench import products
from workbench.gradients import estimate
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.products import fast_products
from workbench.restoring import restore_by_loop
from workbench.sweep import restore_by_sweep

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN"
)
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes oneDNN the faster one; the shapes of the weights that it was given."""
    seen: list[tuple[int, ...]] = []
    kernel = products._kernel

    def noting(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        return kernel(rows, weight, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_kernel", noting)
    return seen


def _modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(48, 40), nn.Linear(48, 40, bias=False), Conv1D(40, 48)]


@pytest.mark.parametrize("which", range(3))
def test_products_and_their_gradients_are_those_of_float64(which: int, calls: list[tuple[int, ...]]) -> None:
    module = _modules()[which]
    x = torch.randn(5, 7, 48, requires_grad=True)
    toward = torch.randn(5, 7, 40)
    with fast_products(CPU, torch.float32, weights_fixed=True):
        y = module(x)
    (slope,) = torch.autograd.grad((y * toward).sum(), [x])
    assert calls == [(40, 48), (48, 40)]  # forwards and backwards
    exact = _modules()[which].double()(x.double())
    (exact_slope,) = torch.autograd.grad((exact * toward.double()).sum(), [x])
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), exact_slope.double(), rtol=1e-5, atol=1e-5)


def test_parts_of_a_fused_matrix_and_strided_rows(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 3 * 40), torch.randn(9, 12, 48)[:, 2:5]
    with torch.no_grad(), fast_products(CPU, torch.float32):
        found = functional.linear(x, weight[:, 40:80].T, None)
    assert calls == [(40, 48)]
    torch.testing.assert_close(found.double(), x.double() @ weight[:, 40:80].double(), rtol=1e-5, atol=1e-5)


def test_a_product_may_be_changed_in_place(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    linear, toward = nn.Linear(48, 40), torch.randn(3, 7, 40)
    slopes: list[Tensor] = []
    for mode in (fast_products(CPU, torch.float32, weights_fixed=True), contextlib.nullcontext()):
        x = torch.ones(3, 7, 48, requires_grad=True)
        with mode:
            y = linear(x)
            y[..., 0] = 0
            y = functional.silu(y, inplace=True)
        slopes += torch.autograd.grad((y * toward).sum(), [x])
    assert calls
    torch.testing.assert_close(slopes[0], slopes[1])


def _few_rows(linear: nn.Linear) -> object:
    return linear(torch.randn(products.ROWS - 1, 48))


def _float64(linear: nn.Linear) -> object:
    return functional.linear(torch.randn(20, 48).double(), linear.weight.double(), None)


def _weights_learn(linear: nn.Linear) -> object:
    with torch.enable_grad():
        linear(torch.randn(20, 48)).sum().backward()
    return linear.weight.grad


class _Own(Tensor):
    """A tensor of somebody else's, e.g. a quantised weight."""


def _of_another_type(linear: nn.Linear) -> object:
    return functional.linear(torch.randn(20, 48), linear.weight.detach().as_subclass(_Own), None)


def _strided_bias(linear: nn.Linear) -> object:
    return functional.linear(torch.randn(20, 48), linear.weight, torch.randn(80)[::2])


def _bias_of_rows(linear: nn.Linear) -> object:
    return functional.linear(torch.randn(20, 48), linear.weight, torch.randn(20, 40))


def _bias_of_one(linear: nn.Linear) -> object:
    return torch.addmm(torch.randn(1), torch.randn(20, 48), linear.weight.T)


def _autocast(linear: nn.Linear) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(20, 48)).dtype == torch.bfloat16
    return True


def _wrong_width(linear: nn.Linear) -> object:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(torch.randn(20, 47))
    return True


ELSE = [
    _few_rows, _float64, _weights_learn, _of_another_type, _strided_bias, _bias_of_rows, _bias_of_one, _autocast, _wrong_width
]  # fmt: skip


@pytest.mark.parametrize("call", ELSE)
def test_everything_else_is_left_to_torch(call: Callable[[nn.Linear], object], calls: list[tuple[int, ...]]) -> None:
    with torch.no_grad(), fast_products(CPU, torch.float32):
        assert call(nn.Linear(48, 40)) is not None
    assert not calls


def test_only_this_thread_and_only_while_entered(calls: list[tuple[int, ...]]) -> None:
    linear, x = nn.Linear(48, 40), torch.randn(20, 48)

    def apply() -> None:
        with torch.no_grad():
            linear(x)

    with fast_products(CPU, torch.float32):
        other = threading.Thread(target=apply)
        other.start()
        other.join()
    apply()
    assert not calls


@pytest.mark.parametrize(
    ("device", "dtype"), [(CPU, torch.bfloat16), (CPU, torch.float64), (torch.device("cuda"), torch.float32)]
)
def test_there_is_no_choice_elsewhere(device: torch.device, dtype: torch.dtype, calls: Any) -> None:
    assert not isinstance(fast_products(device, dtype), TorchFunctionMode)


def test_torchs_own_switch_turns_it_off(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(fast_products(CPU, torch.float32), TorchFunctionMode)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not isinstance(fast_products(CPU, torch.float32), TorchFunctionMode)


def test_a_library_that_is_hardly_faster_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"torch": 1.0, "onednn": 0.9}
    taken = iter([*times.values(), 1.0, 0.5])
    monkeypatch.setattr(products, "_least_time", lambda call: next(taken))
    measured = products.onednn_is_faster.__wrapped__
    assert (measured(), measured()) == (False, True)


def test_measuring_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert products.onednn_is_faster.__wrapped__() in (True, False)
    assert torch.equal(torch.get_rng_state(), before)


def test_few_numbers_of_rows_occur() -> None:
    rounded = {n: n + products.spare_rows(n) for n in range(1, 2049)}
    assert all(n <= more <= max(8, 1.07 * n) or more - n < 8 for n, more in rounded.items())
    assert all(products.spare_rows(more) == 0 for more in rounded.values())
    assert len(set(rounded.values())) < 100
    assert products.spare_rows_here(11) == 0
    with products._Products(weights_fixed=False), products._Products(weights_fixed=False):
        assert products.spare_rows_here(11) == 5
    assert products.spare_rows_here(11) == 0


@pytest.mark.parametrize("faster", [True, False])
def test_every_family_is_swept_exactly_with_either_library(
    lm: LM, faster: bool, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = CausalTrace(samples=3, noise="s3", window=3).resolved(lm, [EIFFEL])._experiment(lm, EIFFEL)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: faster)
    swept = restore_by_sweep(lm, [made.problem], [made.cells])[0]
    assert bool(calls) is faster
    looped = restore_by_loop(lm, made.problem, made.cells)
    effect = float((looped.cells - looped.corrupted).abs().max())
    assert float((swept.cells - looped.cells).abs().max()) < min(1e-6, 1e-3 * effect)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_estimates_are_the_same_with_either_library(family: str, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    made = CausalTrace(samples=3, noise="s3", window=3).resolved(lm, [EIFFEL])._experiment(lm, EIFFEL)
    fast = estimate(lm, made.problem, made.cells, at="middle")
    assert calls
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    slow = estimate(lm, made.problem, made.cells, at="middle")
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-6)
