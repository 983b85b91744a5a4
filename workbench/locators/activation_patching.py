"""Where do two prompts part? Activations of one prompt, put into the run of another (Zhang & Nanda 2023, arXiv 2309.16042).

1. Clean prompt: the fact's. Counterfactual prompt: the same with another subject of as many tokens (symmetric token replacement,
   sec. 2), so that both are texts a model may meet, which a prompt with noise is not.
2. Denoising runs the counterfactual prompt and puts one activation of the clean run into it; noising does it the other way round.
3. What that does to the score of the clean answer, in parts of the difference between the two prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.gradients import estimate_entries
from workbench.hooks import run
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import Experiment, counterparts, find_answer, require_effect, with_best_foil
from workbench.metrics import Answer, Score
from workbench.models import LM, Tokens
from workbench.restoring import Cell, Restoration, Restored
from workbench.results import Footprint
from workbench.sites import SiteKind, window
from workbench.sweep import restore

PatchedKind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_post"]
"""What can be patched: states, sublayers' outputs, single heads (`z`), the MLP's neurons (`mlp_post`)."""

PEERS = 3
"""So many subjects of each relation and length are kept to choose from, each with another answer."""

FACTS_AT_ONCE = 8
"""How many facts are swept together on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ActivationPatching(Locator):
    """Patching between two prompts. Values are shares of the total effect: 0 for nothing, 1 for all of it, in either direction.

    Denoising: (patched - counterfactual) / (clean - counterfactual), how much of the answer this activation brings back (eq. of
    sec. 2). Noising: (clean - patched) / (clean - counterfactual), how much of it is lost with this activation. `score` has the
    patched run's score itself. Nothing keeps a share between 0 and 1: what works against the answer is negative.

    Heads have a row each, and so have the `neurons` that attribution patching finds strongest, beside the rows of the whole
    `mlp_post`.
    """

    kinds: tuple[PatchedKind, ...] = ("resid_pre", "attn_out", "mlp_out")
    """What is patched: states, outputs of attention and MLP, single heads (`z`), the MLP's neurons (`mlp_post`)."""

    direction: Literal["denoise", "noise"] = "denoise"
    """`denoise` puts clean activations into the counterfactual run, `noise` counterfactual ones into the clean run."""

    score: Literal["logit_diff", "p", "logp"] = "logit_diff"
    """What is measured, see `workbench.metrics`. The paper recommends `logit_diff`; its foil is what the model says to the
    counterfactual prompt."""

    window: int = 1
    """How many layers of `attn_out` and `mlp_out` are patched together; other kinds are patched one layer at a time."""

    neurons: int = 20
    """With `mlp_post`: so many single neurons, over all layers and tokens, those with the largest difference times gradient."""

    substitutes: tuple[str, ...] = ()
    """Counterfactual subjects to choose from; empty: the other facts' subjects. Of those of equal token length the first is taken
    that makes the model say something else."""

    relations: tuple[str, ...] = ()
    """Filled in with the relations of substitutes that come from facts; those of a fact's own relation are tried first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(PatchedKind)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(known):
            raise FactError(f"kinds is {self.kinds!r}, expected one or several different ones of {', '.join(known)}.")
        if self.neurons < 0:
            raise FactError(f"{self.neurons} neurons were asked for, expected 0 or more.")
        window(0, self.window, 1)

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """With substitutes to choose from: for each relation and length some subjects with different answers."""
        for kind in self.kinds:
            lm.sites(kind)
        if self.substitutes:
            return self
        groups: dict[tuple[str, int], dict[str, Fact]] = {}
        for fact, span in zip(facts, lm.encode(facts).spans, strict=True):
            assert span is not None  # a Fact always has a subject
            group = groups.setdefault((fact.relation, span[1] - span[0]), {})
            if len(group) < PEERS:
                group.setdefault(fact.target_true or fact.subject, fact)
        chosen = [fact for group in groups.values() for fact in group.values()]
        return replace(
            self,
            substitutes=tuple(fact.subject for fact in chosen),
            relations=tuple(fact.relation for fact in chosen),
        )

    def parts(self) -> tuple[Self, ...]:
        """One for each kind."""
        return tuple(replace(self, kinds=(kind,)) for kind in self.kinds)

    @property
    def part_name(self) -> str:
        """The kinds of sites that are patched."""
        return ", ".join(self.kinds)

    def facts_at_once(self, lm: LM) -> int:
        """Several on a GPU, where one fact's matrices are small."""
        return FACTS_AT_ONCE if lm.device.type == "cuda" else 1

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """The maps of some facts; all kinds of all of them in one sweep."""
        asked: dict[Fact, list[PatchedKind]] = {}
        for fact, part in pieces:
            asked.setdefault(fact, []).extend(part.kinds)
        pairs = [replace(self, kinds=tuple(kinds))._experiment(lm, fact) for fact, kinds in asked.items()]
        patched = restore(lm, [pair.problem for pair in pairs], [pair.cells for pair in pairs], memory=memory)
        found = dict(zip(asked, zip(pairs, patched, strict=True), strict=True))
        return [part._footprint(lm, *found[fact]) for fact, part in pieces]

    def _experiment(self, lm: LM, fact: Fact) -> Experiment:
        """What is run for a fact.

        Raises:
            FactError: no substitute fits, or the two prompts have the same score.
        """
        said = run(lm, lm.encode([fact]))
        answer = find_answer(lm, fact, said)
        whole = (answer.text,) if self.score == "logp" and len(answer.ids) > 1 else None
        tokens = lm.encode([fact], targets=whole)
        other, logits = self._counterfactual(lm, fact, tokens, whole, answer)
        answer = with_best_foil(lm, answer, logits)
        problem = Restoration(
            clean=tokens if self.direction == "denoise" else other,
            corrupted=other if self.direction == "denoise" else tokens,
            steps=len(answer.ids) if whole else 1,
            score=Score(kind=self.score, answer=answer),
        )
        ends = (self._scored(lm, problem, prompt) for prompt in (tokens, other))
        require_effect(*ends, score=self.score, between=f"{fact.text!r} and {''.join(other.texts[0])!r}")
        return Experiment(
            fact=fact,
            problem=problem,
            cells=self._cells(lm, problem),
            answer=answer,
            sigma=None,
            said=int(said.last_logits[0].argmax()),
        )

    def _counterfactual(
        self, lm: LM, fact: Fact, tokens: Tokens, targets: Sequence[str] | None, answer: Answer
    ) -> tuple[Tokens, Tensor]:
        """The other prompt, and its logits where the answer begins."""
        ranked = sorted(
            zip_longest(self.substitutes, self.relations, fillvalue=""), key=lambda pair: pair[1] != fact.relation
        )
        tried = []
        for other in counterparts(lm, fact, tokens, targets=targets, substitutes=[name for name, _ in ranked]):
            logits = run(lm, other).last_logits[0]
            tried.append((other, logits))
            if int(logits.argmax()) != answer.ids[0]:
                return other, logits
        return tried[0]

    def _scored(self, lm: LM, problem: Restoration, tokens: Tokens) -> float:
        return float(problem.score(problem.answer_logits(run(lm, tokens).logits))[0])

    def _cells(self, lm: LM, problem: Restoration) -> list[Cell]:
        length = problem.clean.lengths[0]
        cells = []
        for kind in self.kinds:
            wide = self.window if kind in ("attn_out", "mlp_out") else 1
            for position in range(length):
                for layer in range(lm.n_layers):
                    layers = window(layer, wide, lm.n_layers)
                    heads = range(lm.n_heads) if kind == "z" else (None,)
                    cells += [
                        Cell(kind=kind, layer=layer, layers=layers, position=position, head=head) for head in heads
                    ]
        return cells + (_strongest(lm, problem, self.neurons) if "mlp_post" in self.kinds and self.neurons else [])

    def _footprint(self, lm: LM, pair: Experiment, patched: Restored) -> Footprint:
        """What the scores of a pair say about this one's kinds."""
        mine = [i for i, cell in enumerate(pair.cells) if cell.kind in self.kinds]
        cells = [pair.cells[i] for i in mine]
        scores = patched.cells[mine, 0].cpu().double().numpy()
        target, source = float(patched.corrupted[0]), float(patched.clean)
        clean, corrupted = (source, target) if self.direction == "denoise" else (target, source)
        other = pair.problem.corrupted if self.direction == "denoise" else pair.problem.clean
        table = site_rows(
            pair.fact,
            pair.problem.clean if self.direction == "denoise" else pair.problem.corrupted,
            kind=[cell.kind for cell in cells],
            layer=[cell.layer for cell in cells],
            position=[cell.position for cell in cells],
            head=[cell.head for cell in cells],
            neuron=[cell.neuron for cell in cells],
            value=(scores - target) / (source - target),
            score=scores,
        )
        prompt = "".join(other.texts[0])
        facts = fact_row(
            lm,
            pair.fact,
            pair.answer,
            said=pair.said,
            clean=clean,
            corrupted=corrupted,
            total_effect=clean - corrupted,
            corrupted_prompt=prompt,
        )
        told = self._manifest(
            lm,
            pair.fact,
            unit=f"share of the total effect in {self.score}",
            engine=patched.engine,
            counterfactuals={pair.fact.id: prompt},
        )
        return Footprint(table=table, run=told, extras={"facts": facts})


def _strongest(lm: LM, problem: Restoration, n: int) -> list[Cell]:
    """The neurons, each at one token, that a gradient says would change the score most."""
    kind: SiteKind = "mlp_post"
    size = estimate_entries(lm, problem, kind)[:, 0, : problem.clean.lengths[0]].abs()
    best = size.flatten().topk(min(n, size.numel())).indices
    places = torch.stack(torch.unravel_index(best, size.shape), dim=-1).tolist()
    return [
        Cell(kind=kind, layer=layer, layers=range(layer, layer + 1), position=position, neuron=neuron)
        for layer, position, neuron in places
    ]
