"""Low-rank adapters that share a budget of ranks (AdaLoRA; Zhang et al. 2023, arXiv 2303.10512).

1. As `Lora`, with adapters P Lambda Q of `first_r` singular values each, Lambda = 0 at the start (Eq. 3), and with a penalty on
   P^T P - 1 and Q Q^T - 1 (Eq. 4).
2. Every step notes how much each singular value and its vectors matter: |weight x gradient|, smoothed, times its uncertainty
   (sec. 3.2).
3. Between `warm_up` and the last `settle` steps, the least important ones of all matrices are set to zero, until there are `r` a
   matrix on average; a matrix may keep more, or none.
4. The change is (alpha / first_r) P Lambda Q of the values that are left.

Steps 2 and 3 are `peft`'s. Code != paper: its penalty is the mean of the matrices' norms, not the sum of their squares, and it
divides by the number of singular values at the start, not by those that are left; we follow the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.editors.lora import _ADAPTER, Lora
from workbench.facts import FactError


@dataclass(frozen=True, kw_only=True)
class AdaLora(Lora):
    """AdaLoRA (arXiv 2303.10512): low-rank adapters in the attention are trained on the new answer and share a budget of ranks.

    `r` is the mean rank over the adapted matrices that is left in the end; see `Lora` for the rest.
    """

    first_r: int = 12
    """How many singular values an adapter starts with; more than `r`."""

    warm_up: float = 0.15
    """Share of the steps before the first singular value is taken away."""

    settle: float = 0.3
    """Share of the steps, at the end, in which no singular value is taken away any more."""

    orthogonality: float = 0.5
    """Weight of the penalty that keeps the singular vectors orthogonal."""

    def __post_init__(self) -> None:
        Lora.__post_init__(self)
        if self.r >= self.first_r:
            raise FactError(f"r is {self.r} and first_r is {self.first_r}, expected r below first_r.")
        if min(self.warm_up, self.settle) < 0 or self._warm_up + self._settle > self.steps - 2:
            raise FactError(
                f"warm_up is {self.warm_up} and settle is {self.settle}, expected shares that leave 2 of the {self.steps} steps."
            )

    @property
    def _warm_up(self) -> int:
        return int(self.warm_up * self.steps)

    @property
    def _settle(self) -> int:
        return int(self.settle * self.steps)

    def _tuner(self, model: nn.Module, targets: list[str], transposed: bool) -> Any:
        from peft import AdaLoraConfig, AdaLoraModel  # takes seconds

        config = AdaLoraConfig(
            target_r=self.r, init_r=self.first_r, tinit=self._warm_up, tfinal=self._settle, total_step=self.steps,
            lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets, fan_in_fan_out=transposed,
        )  # fmt: skip
        return AdaLoraModel(model, config, _ADAPTER)  # type: ignore[no-untyped-call]

    def _penalty(self, adapters: dict[str, Any]) -> Tensor | float:
        grams = [
            gram
            for adapter in adapters.values()
            for p, q in [(adapter.lora_B[_ADAPTER], adapter.lora_A[_ADAPTER])]
            for gram in (p.T @ p, q @ q.T)
        ]
        one = torch.eye(self.first_r, device=grams[0].device)
        return self.orthogonality * torch.stack([(gram - one).norm() for gram in grams]).mean()

    def _stepped(self, tuner: Any, step: int) -> None:
        tuner.update_and_allocate(step)

    def _product(self, adapter: Any) -> tuple[Float[Tensor, "d_out r"], Float[Tensor, "r d_in"]]:
        values = adapter.lora_E[_ADAPTER][:, 0]
        kept = values != 0
        scale = adapter.scaling[_ADAPTER] / (adapter.ranknum[_ADAPTER] + 1e-5)
        return scale * adapter.lora_B[_ADAPTER][:, kept], (values[:, None] * adapter.lora_A[_ADAPTER])[kept]
