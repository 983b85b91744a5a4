"""Which MLP outputs does the answer need? They are deleted in the clean run (Hase et al. 2023, arXiv 2301.04213, App. B).

1. Clean run of the prompt: the probability p of the answer.
2. For each layer: the MLP outputs of a window of layers around it are set to zero at the subject's tokens, all of them together.
3. The share of p that is gone, (p - p_zeroed) / p.

Nothing is corrupted, so unlike a causal trace this asks what is necessary and not what is sufficient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.hooks import Write, run
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import Score
from workbench.models import LM
from workbench.restoring import Cell, Restoration
from workbench.results import Footprint
from workbench.sites import Site, SiteKind, window
from workbench.sweep import restore

_KIND: SiteKind = "mlp_out"

_ROWS_AT_ONCE = 16
"""So many layers' windows are run together."""


@dataclass(frozen=True, kw_only=True)
class RepresentationZeroing(Locator):
    """Values are the share of the answer's probability that zeroing deletes: 1 for all of it, negative where zeroing helps.

    `score` is the probability that is left. As published there is one row a layer; it belongs to all tokens of the subject, so to
    no single one (`token` is `all`).
    """

    window: int = 5
    """How many layers are zeroed together, centred on the row's layer and clipped to the model."""

    tokens: Literal["subject", "each"] = "subject"
    """Where: at the subject's tokens together, as published, one row a layer; or at each token of the prompt alone, as a map."""

    score: Literal["p_target", "p"] = "p_target"
    """Probability of the whole answer under teacher forcing, as the paper scores it, or of its first token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        window(0, self.window, 1)

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """What each fact needs, one fact after the other."""
        return [part._footprint(lm, fact, memory) for fact, part in pieces]

    def _footprint(self, lm: LM, fact: Fact, memory: int | None) -> Footprint:
        said = run(lm, lm.encode([fact]))
        answer = find_answer(lm, fact, said)
        whole = (answer.text,) if self.score == "p_target" and len(answer.ids) > 1 else None
        tokens = lm.encode([fact], targets=whole)
        problem = Restoration(
            clean=tokens,
            corrupted=tokens,
            put="zero",
            steps=len(answer.ids) if whole else 1,
            score=Score(kind=self.score, answer=answer),
        )
        clean = float(problem.score(problem.answer_logits(run(lm, tokens).logits))[0])
        if not clean > 0:
            raise FactError(
                f"The probability of {answer.text!r} after {fact.text!r} is {clean}, expected more than 0, so there is nothing to "
                "delete. Ask for a fact that the model knows."
            )
        layers = range(lm.n_layers)
        positions = range(tokens.lengths[0]) if self.tokens == "each" else None
        if positions is None:
            left = _without_subject(lm, problem, [window(layer, self.window, lm.n_layers) for layer in layers])
        else:
            cells = [
                Cell(kind=_KIND, layer=layer, layers=window(layer, self.window, lm.n_layers), position=position)
                for position in positions
                for layer in layers
            ]
            left = restore(lm, [problem], [cells], memory=memory)[0].cells[:, 0]
        scores = left.cpu().double().numpy()
        table = site_rows(
            fact,
            tokens,
            kind=_KIND,
            layer=[*layers] * len(positions or [None]),
            position=None if positions is None else [position for position in positions for _ in layers],
            value=(clean - scores) / clean,
            score=scores,
        )
        return Footprint(
            table=table,
            run=self._manifest(lm, fact, unit=f"share of {self.score} deleted"),
            extras={"facts": fact_row(lm, fact, answer, said=int(said.last_logits[0].argmax()), clean=clean)},
        )


def _without_subject(lm: LM, problem: Restoration, windows: Sequence[range]) -> Float[Tensor, " window"]:
    """The score with the outputs of each window zeroed at all of the subject's tokens; several windows are rows of one run."""
    scores = []
    for first in range(0, len(windows), _ROWS_AT_ONCE):
        some = windows[first : first + _ROWS_AT_ONCE]
        tokens = problem.clean.repeat(len(some))
        writes: dict[Site, Write] = {}
        for layer in range(some[0].start, some[-1].stop):
            rows = torch.tensor([layer in zeroed for zeroed in some], device=lm.device)
            writes[Site(layer=layer, kind=_KIND)] = _zeroed(rows[:, None] & tokens.at("subject"))
        scores.append(problem.score(problem.answer_logits(run(lm, tokens, write=writes).logits)))
    return torch.cat(scores)


def _zeroed(where: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes zero at some (row, pos)."""
    return lambda x: x.masked_fill(where[..., None], 0.0)
