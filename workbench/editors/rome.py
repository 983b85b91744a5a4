"""ROME: a fact is written into one down projection by a change of rank one. Meng et al. 2022 (arXiv 2202.05262), section 3.1.

1. k*: the key at the last token of the subject, averaged over the prompt alone and after texts that the model writes.
2. v*: a value there that makes the model say the new answer (`find_values`).
3. W' = W + (v* - W k) u^T / (u^T k) with u = C^-1 k* (eq. 2): of all W' that map k to v*, the one that changes least what W does to
   usual keys. C is the keys' second moment, k the key of the bare prompt.

The direction takes the averaged key and the denominator the bare one, as the published code does; `RRome` takes one key for both.
C is inverted in float64 by Cholesky, where the published code inverts in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from workbench.editors._values import (
    ValueEditor,
    down_change,
    down_weight,
    find_values,
    interim,
    read_keys,
    solve,
    told,
    write_prefixes,
)
from workbench.editors.base import Draft
from workbench.edits import Change, Edit, EditError, added
from workbench.facts import Fact
from workbench.models import LM

SMALLEST_COSINE = 1e-3
"""Between the direction and the bare key; below, the change would be hundreds of times what the value asks for."""


@dataclass(frozen=True, kw_only=True)
class Rome(ValueEditor):
    """ROME (arXiv 2202.05262): a change of rank one by which one down projection maps the subject's key to the new answer's value.

    Facts of a batch, and layers where several are named, are edited one after the other.
    """

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The sum of the rank-one changes of all facts and layers."""
        prefixes = write_prefixes(lm, self.prefix_lengths, seed=self.seed)
        moments = self.moments(lm)
        changes: dict[str, Change] = {}
        edited = []
        for fact in facts:
            for layer, moment in moments.items():
                with interim(lm, changes):
                    value = find_values(lm, fact, layer, ["down_out"], self, prefixes)["down_out"]
                    keys = read_keys(lm, [fact], [layer], prefixes)[layer][0].double().cpu()
                    weight = down_weight(lm, layer).double().cpu()
                average, key = self.keys(keys)
                direction, condition = solve(moment, average[:, None], what=f"The second moment of layer {layer}")
                direction = direction[:, 0] / direction.norm()
                along = float(direction @ key)
                if abs(along) < SMALLEST_COSINE * float(key.norm()):
                    raise EditError(
                        f"At layer {layer} the direction C^-1 k* of {fact.id!r} is orthogonal to the prompt's own key (cosine "
                        f"{along / float(key.norm()):.1e}), so the change would explode. Use RRome, or another layer."
                    )
                missing = (value.wanted - value.was).double().cpu() - weight @ (key - keys[0])
                name, change = down_change(lm, layer, left=missing[:, None] / along, right=direction[:, None])
                changes[name] = added([changes[name], change]) if name in changes else change
                edited.append(told(fact, layer, value, condition=condition))
        return Draft(changes=changes, told={"edited": edited})

    def keys(self, keys: Float[Tensor, "context d_mlp"]) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_mlp"]]:
        """Of the keys in all contexts (the bare prompt's first): the one that gives the direction, the one that is mapped to v*."""
        return keys.mean(0), keys[0]
