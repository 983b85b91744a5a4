"""AlphaEdit: MEMIT within the null space of usual keys. Fang et al. 2025 (arXiv 2410.02355), section 3.

P projects onto the directions in which usual keys have next to no strength: the eigenvectors of C whose eigenvalue is below a
threshold. dW = R K^T P (K_p K_p^T P + K K^T P + ridge I)^-1 (eq. 14), so that dW P = dW: usual keys give what they gave, and so do
the keys K_p of earlier edits, which an edit carries along.

Solved in the basis of the null space, where the matrix is symmetric. C is always the model's own before any edit, so that an editor
takes its eigenvectors once for all that it edits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.editors._values import read_keys, solve
from workbench.editors.memit import SpreadEditor, fact_keys, spread_over
from workbench.edits import Edit, EditError
from workbench.facts import Fact
from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(SpreadEditor):
    """AlphaEdit (arXiv 2410.02355): as MEMIT, but only in directions that usual keys do not use; what they give stays."""

    threshold: float = 0.02
    """Directions in which the second moment of usual keys has an eigenvalue below this count as unused."""

    ridge: float = 10.0
    """Weight of the squared change in the least-squares problem (L2): the larger, the smaller the change."""

    def n_layers(self, lm: LM) -> int:
        """As MEMIT."""
        return spread_over(lm)

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This editor with its layers fixed; what it knows of null spaces goes along."""
        fixed = super().resolved(lm, facts)
        fixed.__dict__["_known"] = self._known
        return fixed

    @cached_property
    def _known(self) -> dict[int, tuple[str, Float[Tensor, "d_mlp rank"]]]:
        """By layer, the moment whose null space was taken last (its digest), and the basis."""
        return {}

    def _basis(self, moment: Float[Tensor, "d_mlp d_mlp"], layer: int) -> Float[Tensor, "d_mlp rank"]:
        """`null_space`, once a moment: its eigenvectors cost far more than an edit."""
        digest = hashlib.blake2b(moment.contiguous().numpy().data, digest_size=16).hexdigest()
        if layer not in self._known or self._known[layer][0] != digest:
            self._known[layer] = digest, null_space(moment, self.threshold, layer=layer)
        return self._known[layer][1]

    def solution(
        self,
        layer: int,
        moment: Float[Tensor, "d_mlp d_mlp"],
        keys: Float[Tensor, "d_mlp fact"],
        missing: Float[Tensor, "d_model fact"],
        after: Edit | None,
    ) -> tuple[Float[Tensor, "d_model fact"], Float[Tensor, "d_mlp fact"], float]:
        """R and U (U^T (K K^T + K_p K_p^T) U + ridge I)^-1 U^T K, with U the basis of the null space."""
        basis = self._basis(moment, layer)
        inside = basis.T @ keys
        if after is not None and (kept := after.state.get(_name(layer))) is not None:
            inside_all = torch.cat([inside, basis.T @ kept.double().T], 1)
        else:
            inside_all = inside
        matrix = inside_all @ inside_all.T + self.ridge * torch.eye(basis.shape[1], dtype=torch.float64)
        right, condition = solve(matrix, inside, what=f"K K^T in the null space of layer {layer}")
        return missing, basis @ right, condition

    def remembered(
        self, lm: LM, facts: Sequence[Fact], layers: Sequence[int], prefixes: Sequence[str]
    ) -> dict[str, Tensor]:
        """The keys of these facts in the edited model, by layer."""
        return {_name(layer): fact_keys(keys).float() for layer, keys in read_keys(lm, facts, layers, prefixes).items()}


def null_space(moment: Float[Tensor, "d_mlp d_mlp"], threshold: float, *, layer: int) -> Float[Tensor, "d_mlp rank"]:
    """The eigenvectors of C with eigenvalues below the threshold.

    Raises:
        EditError: there is none.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    small = values < threshold
    if not bool(small.any()):
        raise EditError(
            f"No eigenvalue of C at layer {layer} is below {threshold:g} (the smallest is {float(values[0]):.2g}), so there is "
            "no null space. Take a larger threshold."
        )
    basis: Tensor = vectors[:, small]
    return basis


def _name(layer: int) -> str:
    return f"keys.{layer}"
