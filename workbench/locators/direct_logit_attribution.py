"""What does each component give to the answer's logit directly? Attribution by the linear way from residual stream to logits.

Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits"); for LayerNorm Nanda et al. (TransformerLens).

1. Run the prompt; the state that leaves the last block at the last token is a sum: what enters the first block, and what the
   attention and the MLP of every layer add to it.
2. Freeze the final norm's divisor at this state; then the answer's logit is linear in it (`workbench.directions`).
3. A component's value is the answer's direction times what it adds. All of them and a constant sum to the logit exactly.
4. Attention's output splits further into heads, z_h W_O^h. What stays over is the projection's bias. Where a norm stands between
   projection and stream (Gemma 2 and 3, OLMo 2), its divisor is frozen too.

Direct means: what later layers make of an addition counts as theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.directions import frozen_direction, frozen_norm, post_norm
from workbench.facts import Fact
from workbench.hooks import run
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer, with_foil
from workbench.models import LM
from workbench.results import Footprint
from workbench.sites import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class DirectLogitAttribution(Locator):
    """The answer's logit, split into embedding, attention, MLPs and single heads at the prompt's last token. Values are logits.

    `embed` stands for all that enters the first block, positions included. Of kind `attn_out` and `mlp_out` there is one row a
    layer, of kind `z` one a head. In the extra table `facts`, `clean` is the logit and `constant` what belongs to no component
    (biases of final norm and unembedding): embed + attn_out + mlp_out + constant == clean. A softcap (Gemma 2) is left out, a logit
    scale (Cohere) is in.

    Raises:
        ModelError: the final norm, or one behind a sublayer, is neither a LayerNorm nor an RMSNorm.
    """

    score: Literal["logit", "logit_diff"] = "logit"
    """The logit of the answer's first token, or how far it is above the foil's: the first token of the fact's `target_new`, or else
    the best other one."""

    centred: bool = True
    """Take from each logit the mean over the vocabulary, since a softmax does not see what raises all logits alike."""

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """One forward pass a fact."""
        return [part._attribute(lm, fact) for fact, part in pieces]

    def _attribute(self, lm: LM, fact: Fact) -> Footprint:
        tokens = lm.encode([fact])
        bottom, top = Site(layer=0, kind="resid_pre"), Site(layer=lm.n_layers - 1, kind="resid_post")
        clean = run(lm, tokens, read=[bottom, "attn_out", "mlp_out", "z", top])
        logits, last = clean.last_logits[0], tokens.lengths[0] - 1
        answer = find_answer(lm, fact, clean)
        if self.score == "logit_diff":
            answer = with_foil(lm, fact, answer, logits)
        ids = [answer.ids[0], *([answer.foil_id] if answer.foil_id is not None else [])]

        state = clean[top][:, last]
        directions, constants = frozen_direction(lm, state, ids, centred=self.centred)
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[: len(ids)]
        direction = einsum(directions[0], signs, "token d_model, token -> d_model")
        constant = float(constants[0] @ signs)

        parts: dict[SiteKind, list[Tensor]] = {
            "embed": [clean[bottom][:, last]],
            "attn_out": [clean[site][:, last] for site in lm.sites("attn_out")],
            "mlp_out": [clean[site][:, last] for site in lm.sites("mlp_out")],
            "z": [_heads(lm, site.layer, clean[site][0, last]) for site in lm.sites("z")],
        }
        tables = []
        for kind, added in parts.items():
            values = (torch.stack([part.cpu() for part in added]).double() @ direction).numpy()
            layer, head = (index.ravel() for index in np.indices(values.shape))
            tables.append(
                site_rows(
                    fact,
                    tokens,
                    kind=kind,
                    layer=layer,
                    head=head if kind == "z" else None,
                    position=[last] * values.size,
                    value=values.ravel(),
                )
            )
        facts = fact_row(
            lm,
            fact,
            answer,
            said=int(logits.argmax()),
            clean=float(state[0].cpu().double() @ direction) + constant,
            constant=constant,
        )
        unit = f"direct contribution to the {'centred ' * self.centred}{self.score.replace('_', ' ')}"
        return Footprint(
            table=pd.concat(tables, ignore_index=True),
            run=self._manifest(lm, fact, unit=unit),
            extras={"facts": facts},
        )


def _heads(lm: LM, layer: int, z: Float[Tensor, " width"]) -> Float[Tensor, "head d_model"]:
    """What each head adds to the residual stream, in float64; together with the biases between it is attn_out."""
    z = z.cpu().double()
    project = copy.deepcopy(lm.part(layer, lm.layout.o_proj)).cpu().double()  # taps do nothing in a copy
    alone = torch.block_diag(*z.chunk(lm.n_heads))
    with torch.no_grad():
        added: Tensor = project(alone) - project(torch.zeros_like(alone[:1]))
        norm = post_norm(lm, layer, "attn_out")
        return added if norm is None else frozen_norm(norm, project(z[None])).push(added[None])[0]
