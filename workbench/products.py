"""Float32 products of activations and weights by oneDNN, where that is faster than the library that torch takes for them.

torch brings two libraries for CPUs, and gives float32 products to MKL. On processors of other makers than MKL's, which then leaves
their widest instructions unused, oneDNN can be more than twice as fast. Which one is faster is measured once in a process. Both add
up in float32 (unless `torch.set_float32_matmul_precision` says less, to both); their sums differ by rounding.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ROWS = 8
"""Fewer rows than these are left to torch: reading the weights is what takes time there."""

GAIN = 1.2
"""By how much oneDNN must be faster to be taken."""


def fast_products(
    device: torch.device, dtype: torch.dtype, *, weights_fixed: bool = False
) -> contextlib.AbstractContextManager[object]:
    """While this is entered, this thread's products of activations and weights are oneDNN's, where that is faster.

    `torch.backends.mkldnn.enabled = False` switches it off.

    Args:
        device: where the model lies; only on a CPU is there a choice.
        dtype: of its weights; only for float32 is there one.
        weights_fixed: gradients are asked for, but of activations alone, once and backwards: none will reach a weight, also where
            this is entered again within. Otherwise, what is computed while gradients are on is left to torch.
    """
    allowed = bool(torch.backends.mkldnn.enabled)
    if device.type == "cpu" and dtype == torch.float32 and allowed and onednn_is_faster():
        return _Products(weights_fixed=weights_fixed)
    return contextlib.nullcontext()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there and clearly faster on this machine, for a matrix of a million weights and 128 rows."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.inference_mode():
        x, weight = torch.ones(128, 1024), torch.ones(1024, 1024)
        return _least_time(lambda: functional.linear(x, weight)) > GAIN * _least_time(lambda: onednn(x, weight, None))


def _least_time(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` by oneDNN, with the gradient of x alone: x (..., in), weight (out, in), bias (out,) or None."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # a part of a fused matrix, where oneDNN is very slow
        weight = weight.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if spare := spare_rows(n):
        rows = functional.pad(rows, (0, 0, 0, spare))
    if torch.is_grad_enabled():
        product: Tensor = _FixedWeights.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        product = _kernel(rows, weight, bias)
    return product[:n].reshape(*x.shape[:-1], -1)


def _kernel(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _FixedWeights(torch.autograd.Function):
    """The kernel with the gradient of its rows, once. It gives no view of its result: that may be changed in place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _kernel(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _kernel(gradients[0], weight.T, None), None, None


def spare_rows(n: int) -> int:
    """How many rows to add to n, so that few numbers of rows occur.

    oneDNN compiles, and keeps, a kernel for each number of rows and shape of weights, some 0.6 MB. Of numbers above 128, sixteen
    occur between a power of two and the next, and below them multiples of 8.
    """
    step: int = max(8, 2 ** (n.bit_length() - 5))
    return -n % step


_entered: ContextVar[bool] = ContextVar("workbench_fast_products", default=False)


def spare_rows_here(n: int) -> int:
    """The same while this thread's products are oneDNN's, else none: for whoever can add them without a copy."""
    return spare_rows(n) if _entered.get() else 0


class _Products(TorchFunctionMode):
    """Hears every call of torch in this thread, and answers those that are products with weights."""

    def __init__(self, *, weights_fixed: bool) -> None:
        super().__init__()
        self._weights_fixed = weights_fixed
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> _Products:
        self._tokens.append(_entered.set(True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _entered.reset(self._tokens.pop())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and len(args) == 3 and not kwargs:
            x, weight, bias = args
        elif func is torch.addmm and len(args) == 3 and not kwargs and args[1].dim() == 2:  # transformers' Conv1D
            x, weight, bias = args[1], args[2].T, args[0]
        else:
            return func(*args, **(kwargs or {}))
        if not _suits(x, weight, bias) or (torch.is_grad_enabled() and not self._weights_fixed):
            return func(*args)
        return onednn(x, weight.detach(), None if bias is None else bias.detach())


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain float32 matrices on the CPU that fit each other, and enough rows."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in given)
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in given)
        and all(each.layout == torch.strided for each in given)
        and weight.dim() == 2
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= ROWS * x.shape[-1] > 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # the kernel does not look
        and not torch.is_autocast_enabled("cpu")
    )
