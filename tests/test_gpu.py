"""On a CUDA device the trace has the CPU's numbers in float32, and nearly so in half precision."""

from __future__ import annotations

import pytest
import torch

from tests.examples import EIFFEL, JOBS, ZURICH, fresh_lm
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

FAMILIES = ("gpt2", "gptj", "llama", "gemma2", "gpt_neox")


def traced(family: str, *, device: str, dtype: torch.dtype) -> Footprint:
    lm = fresh_lm(family)
    torch.nn.Module.to(lm.model, device, dtype)
    return CausalTrace(window=3, samples=4, noise=0.5)(
        LM(lm.model, lm.tokenizer), [EIFFEL, ZURICH, JOBS]
    )  # together on a GPU


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    here, there = (traced(family, device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
    assert (here.table["score"] - there.table["score"]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_near(family: str, dtype: torch.dtype) -> None:
    exact = traced(family, device="cpu", dtype=torch.float32)
    half = traced(family, device="cuda", dtype=dtype)
    assert (exact.table["score"] - half.table["score"]).abs().max() < 0.1
