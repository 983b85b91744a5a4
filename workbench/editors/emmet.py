"""EMMET: ROME's equality for a batch of facts. Gupta et al. 2024 (arXiv 2403.14236), eq. 15.

dW = R (K^T C'^-1 K + slack I)^-1 K^T C'^-1 with C' = ridge C: with no slack, every key is mapped to its value exactly, and what
usual keys give changes least. With one fact that is ROME, with a value at the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.editors._values import solve
from workbench.editors.memit import SpreadEditor
from workbench.edits import Edit


@dataclass(frozen=True, kw_only=True)
class Emmet(SpreadEditor):
    """EMMET (arXiv 2403.14236): ROME for a batch of facts; their keys are mapped to their values exactly, up to `slack`."""

    ridge: float = 10_000.0
    """Scales the usual keys' second moment; it matters against `slack` only."""

    slack: float = 0.1
    """How far the equality may be missed (emmet_lambda)."""

    def solution(
        self,
        layer: int,
        moment: Float[Tensor, "d_mlp d_mlp"],
        keys: Float[Tensor, "d_mlp fact"],
        missing: Float[Tensor, "d_model fact"],
        after: Edit | None,
    ) -> tuple[Float[Tensor, "d_model fact"], Float[Tensor, "d_mlp fact"], float]:
        """R (K^T C'^-1 K + slack I)^-1 and C'^-1 K."""
        right, condition = solve(self.ridge * moment, keys, what=f"The second moment of layer {layer}")
        between = keys.T @ right + self.slack * torch.eye(keys.shape[1], dtype=torch.float64)
        left, inner = solve(between, missing.T, what=f"K^T C^-1 K of layer {layer}")
        return left.T, right, max(condition, inner)
