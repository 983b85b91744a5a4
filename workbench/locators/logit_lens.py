"""At which layer can the answer be read? The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens").

1. Run the prompt; read the state after every block at every token.
2. Put each through the final norm and the unembedding: what the model would say if it stopped there.
3. A cell's value is the answer's probability in that reading. In the last layer, at the last token, it is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact
from workbench.hooks import run
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import lens_logits
from workbench.models import LM
from workbench.results import Footprint

LOGITS_AT_ONCE = 2**22
"""So many logits are held at a time."""


@dataclass(frozen=True, kw_only=True)
class LogitLens(Locator):
    """How readable the answer's first token is after every block, at every token of the prompt. `score` is its probability.

    Further columns: `rank` (how many tokens are more probable; 0 is the top), `entropy` of the reading in nats, and `top`, its most
    probable token. The extra table `facts` has for the last token `first_top1`, the first layer (0-based) at which the answer is
    on top, and `stays_top1`, the one from which it stays there to the end; none where it is not.
    """

    value: Literal["p", "logp", "rank"] = "p"
    """The answer's probability, its logarithm, or minus its rank, so that more is always nearer to the answer."""

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """One forward pass a fact."""
        return [part._read(lm, fact) for fact, part in pieces]

    def _read(self, lm: LM, fact: Fact) -> Footprint:
        tokens = lm.encode([fact])
        sites = lm.sites("resid_post")
        clean = run(lm, tokens, read=sites)
        answer = find_answer(lm, fact, clean)
        states = rearrange([clean[site][0] for site in sites], "layer pos d_model -> (pos layer) d_model")
        found: list[Tensor] = []
        for some in states.split(max(1, LOGITS_AT_ONCE // lm.d_vocab)):
            logits = lens_logits(lm, some)
            log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
            rank = (log_p > log_p[:, [answer.ids[0]]]).sum(-1)
            entropy = torch.special.entr(log_p.exp()).sum(-1)
            found.append(torch.stack([log_p[:, answer.ids[0]], rank, entropy, log_p.argmax(-1)]).double().cpu())
        log_p, rank, entropy, top = torch.cat(found, dim=1)
        values = {"p": log_p.exp(), "logp": log_p, "rank": -rank}[self.value]
        n = tokens.lengths[0]
        table = site_rows(
            fact,
            tokens,
            kind="resid_post",
            layer=repeat(torch.arange(lm.n_layers), "layer -> (pos layer)", pos=n).numpy(),
            position=repeat(torch.arange(n), "pos -> (pos layer)", layer=lm.n_layers).tolist(),
            value=values.numpy(),
            score=log_p.exp().numpy(),
        ).assign(
            rank=rank.long().numpy(), entropy=entropy.numpy(), top=[lm.word(token) for token in top.long().tolist()]
        )
        first, stays = _from(rank.view(n, -1)[-1] == 0)
        facts = fact_row(
            lm,
            fact,
            answer,
            said=int(clean.last_logits[0].argmax()),
            clean=float(values[-1]),
        ).assign(first_top1=pd.array([first], dtype="Int64"), stays_top1=pd.array([stays], dtype="Int64"))
        unit = {"p": "probability", "logp": "log-probability in nats", "rank": "minus the rank"}[self.value]
        return Footprint(
            table=table, run=self._manifest(lm, fact, unit=f"{unit} in the logit lens"), extras={"facts": facts}
        )


def _from(on_top: Bool[Tensor, " layer"]) -> tuple[int | None, int | None]:
    """The first layer that is true, and the first from which all are."""
    layers = on_top.nonzero().flatten().tolist()
    below = (~on_top).nonzero().flatten().tolist()
    stays = below[-1] + 1 if below else 0
    return (layers[0] if layers else None), (stays if stays < len(on_top) else None)
