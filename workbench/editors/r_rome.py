"""R-ROME: ROME with the same key in all places. Gupta et al. 2024 (arXiv 2403.07175).

ROME's published code takes the key averaged over contexts for the direction and the bare prompt's for the denominator; where the
two differ much the change explodes, and single edits ruin the model. Here one key k stands in both places and in W k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from workbench.editors.rome import Rome


@dataclass(frozen=True, kw_only=True)
class RRome(Rome):
    """R-ROME (arXiv 2403.07175): ROME with one key in all places of its formula, so that single edits do not explode."""

    key: Literal["average", "prompt"] = "average"
    """Which key: the mean over the prompt alone and after the texts, the code's default; or the prompt's own."""

    def keys(self, keys: Float[Tensor, "context d_mlp"]) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_mlp"]]:
        """One key, twice."""
        key = keys.mean(0) if self.key == "average" else keys[0]
        return key, key
