"""Knowledge neurons, edited: their value vectors turned from the old answer to the new (Dai et al. 2022, arXiv 2104.08696).

1. The fact's knowledge neurons, as `KnowledgeNeurons` attributes them; the attribution is of the old answer.
2. Which of them: those in the coarse sets of at least `share` of the fact's prompts. As in the paper's settings, the share is
   lowered or raised until `fewest` to `most` are left; among those found in equally many prompts, the largest mean attribution
   decides.
3. The value vector of each, a column of the down projection, gets - lambda_old e(old) + lambda_new e(new): e is a token's row of
   the output embedding (as it acts on the final norm's output), of several tokens their sum. Where the neuron's activation at the
   end of the fact's prompt is negative, it gets the opposite: only so does the new answer gain.

All facts of a batch are attributed on the same model; a neuron of two facts gets both additions.

Code != paper: the paper's and its code's lambdas are 1 and 8, those of EasyEdit 2 and 2 (1 and 1 for answers of several tokens),
whose old answer is what the model says; here it is the fact's `target_true`, where it has one. The paper sets one share for a
relation, so that its facts have 2 to 5 neurons on average; here each fact has its own. BERT's word embedding is input and output
embedding at once; what a value vector adds is read by the output embedding. Its activations are hardly ever negative, and so the
paper has no sign; those of a gated MLP (SwiGLU) are as often as not, and which is arbitrary. `follow_sign=False` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.directions import unembedding
from workbench.editors._gradients import precise
from workbench.editors._values import down_change
from workbench.editors.base import Draft, Editor
from workbench.edits import Change, Edit, EditError, LowRank
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.locators.knowledge_neurons import KnowledgeNeurons, Rule
from workbench.models import LM
from workbench.progress import track
from workbench.sites import Site


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeuronEdit(Editor):
    """Knowledge neurons (arXiv 2104.08696): the value vectors of the fact's few strongest neurons are turned to the new answer.

    The change is zero off those vectors; its rank is the number of facts.

    The manifest tells, by the id of a fact, its `neurons` as (layer, neuron), the one with the most prompts first. The fact's
    paraphrases take part in choosing them: with `prompts=1` they do not, and are free to be tested on.

    Raises:
        ModelError: a family with a norm behind the MLP (Gemma 2 and 3, OLMo 2); see `KnowledgeNeurons`.
        EditError: no neuron has to do with the old answer.
    """

    lambda_old: float = 1.0
    """How often the old answer's embedding is taken away; 2 in EasyEdit."""

    lambda_new: float = 8.0
    """How often the new answer's embedding is added; 2 in EasyEdit."""

    steps: int = 20
    """How many gradients are taken along the way from zero to a layer's activations."""

    rule: Rule = "paper"
    """Where they are taken; see `KnowledgeNeurons`."""

    threshold: float = 0.2
    """Coarse set of a prompt: neurons whose attribution is above this part of the largest one."""

    share: float = 0.7
    """Refined set: neurons in the coarse sets of at least this share of the fact's prompts."""

    prompts: int = 100
    """At most so many prompts of a fact are used: its own, then its paraphrases in their order."""

    fewest: int = 2
    """So many neurons are edited even if fewer are in the refined set, as long as coarse sets have them."""

    most: int = 5
    """No more neurons than this are edited."""

    follow_sign: bool = True
    """Whether what is added to a value vector takes the sign of its neuron's activation at the end of the prompt."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        self._locator()  # refuses what it does not take
        if not 1 <= self.fewest <= self.most:
            raise FactError(f"fewest is {self.fewest} and most is {self.most}, expected 1 <= fewest <= most.")

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The new value vectors' differences from the old, by layer."""
        vectors: list[Tensor] = []
        signs: list[dict[tuple[int, int], float]] = []
        for fact in track(facts, "facts", len(facts)) if len(facts) > 1 else facts:
            found, old = self._neurons(lm, fact)
            new = lm.target_ids(fact.text, fact.target_new or "")
            signs.append(_signs(lm, fact, found) if self.follow_sign else dict.fromkeys(found, 1.0))
            vectors.append(self.lambda_new * _embedding(lm, new) - self.lambda_old * _embedding(lm, old))
        changes: dict[str, Change] = {}
        for layer in sorted({layer for found in signs for layer, _ in found}):
            chosen = [{neuron: sign for (at, neuron), sign in found.items() if at == layer} for found in signs]
            name, change = _columns(lm, layer, chosen, vectors)
            changes[name] = change
        return Draft(
            changes=changes,
            told={"neurons": {fact.id: list(found) for fact, found in zip(facts, signs, strict=True)}},
        )

    def _locator(self, share: float | None = None) -> KnowledgeNeurons:
        return KnowledgeNeurons(
            steps=self.steps,
            rule=self.rule,
            threshold=self.threshold,
            share=self.share if share is None else share,
            prompts=self.prompts,
        )

    def _neurons(self, lm: LM, fact: Fact) -> tuple[list[tuple[int, int]], list[int]]:
        """The neurons to edit, and the tokens of the old answer."""
        n = 1 + len(fact.paraphrases[: self.prompts - 1])
        locator = self._locator(share=1 / n)  # whatever is in any coarse set
        (footprint,) = locator.locate_together(lm, [(fact, locator)])
        found, old = footprint.extras["neurons"], str(footprint.extras["facts"]["answer_ids"][0])
        if found.empty:
            raise EditError(
                f"No neuron has to do with {footprint.extras['facts']['answer'][0]!r} in {fact.text!r}, "
                "so none can be edited. Leave target_true empty to start from what the model says."
            )
        return refined(found, share=self.share * n, fewest=self.fewest, most=self.most), [int(i) for i in old.split()]


def refined(found: pd.DataFrame, *, share: float, fewest: int, most: int) -> list[tuple[int, int]]:
    """The neurons that are edited, as (layer, neuron).

    Args:
        found: neurons in any coarse set: `layer`, `neuron`, how many `prompts` found them, their `mean` attribution.
        share: in how many prompts' coarse sets they should be.
        fewest: how many are taken at least, where there are so many.
        most: how many are taken at most.
    """
    order = found.sort_values(["prompts", "mean"], ascending=False, kind="stable")
    n = min(max(int((found["prompts"] >= share - 1e-9).sum()), fewest), most)
    return [(int(layer), int(neuron)) for layer, neuron in order[["layer", "neuron"]].to_numpy()[:n]]


def _embedding(lm: LM, token_ids: Sequence[int]) -> Float[Tensor, " d_model"]:
    weight, _ = unembedding(lm, token_ids)
    return precise(weight).sum(0)


def _signs(lm: LM, fact: Fact, neurons: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """By neuron, 1 or -1: the sign of its activation at the end of the fact's prompt."""
    sites = [Site(layer=layer, kind="mlp_post", token="last", neuron=neuron) for layer, neuron in neurons]
    met = run(lm, lm.encode([fact]), read=sites)
    return {place: -1.0 if float(met[site]) < 0 else 1.0 for place, site in zip(neurons, sites, strict=True)}


def _columns(
    lm: LM, layer: int, chosen: Sequence[Mapping[int, float]], vectors: Sequence[Tensor]
) -> tuple[str, LowRank]:
    """The change of one layer, from each fact's neurons in it with their signs, and what is added to their value vectors."""
    facts = [i for i, neurons in enumerate(chosen) if neurons]
    added = torch.stack([vectors[i] for i in facts], 1)
    where = torch.zeros(lm.d_mlp, len(facts), dtype=added.dtype, device=added.device)
    for column, i in enumerate(facts):
        for neuron, sign in chosen[i].items():
            where[neuron, column] = sign
    return down_change(lm, layer, left=added, right=where)
