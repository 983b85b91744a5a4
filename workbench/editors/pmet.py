"""PMET: MEMIT with a target that attention helps to reach. Li et al. 2024 (arXiv 2308.08742).

At the last of the layers two deltas are searched together, at the outputs of attention and of the MLP; attention's takes on what
is not the MLP's to know and is then dropped. The MLP's is spread as MEMIT does, by the square root of the layers left (sec. 4.3).
The published code also eases the loss of answers that are on top already; that is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from workbench.editors._values import Place
from workbench.editors.memit import Memit


@dataclass(frozen=True, kw_only=True)
class Pmet(Memit):
    """PMET (arXiv 2308.08742): as MEMIT, with a value that is searched together with one for attention, which is then dropped."""

    def places(self) -> tuple[Place, ...]:
        """The MLP's output, which is written, and attention's, which is not."""
        return ("down_out", "attn_out")

    def share(self, left: int) -> float:
        """The square root's share."""
        return 1 / sqrt(left)
