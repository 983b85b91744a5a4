"""Which MLP neurons express a fact? Knowledge neurons, found by integrated gradients (Dai et al. 2022, arXiv 2104.08696).

1. For each prompt of a fact, its own and its paraphrases: the neurons' activations w (`mlp_post`) at the prompt's last token.
2. Layer by layer, the whole layer's w is brought from 0 to its value, alpha w, and the gradient of the answer's probability taken:
   Attr_i = w_i / m * sum over m steps of dP(alpha w) / dw_i (sec. 3.2, Eq. 3). In a layer these sum to P minus P with w = 0.
3. Coarse set of a prompt: the neurons above `threshold` times the largest attribution of all layers.
4. Refined set of the fact: those in the coarse sets of at least the `share` of its prompts (sec. 3.3). A fact without paraphrases
   keeps its coarse set: there is nothing to refine by.

Paper != code: Eq. 1 moves one neuron at a time and holds the others of its layer; the published code moves the layer together,
which is what makes step 2's sum hold and costs one pass a layer instead of one a neuron. We follow the code there. It also lowers
or raises the share until 2 to 5 neurons are left, and asks for at least 3 prompts; the share here is the paper's and stays as it
is. Both look at BERT's [MASK]; in a decoder the answer is predicted at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.directions import post_norm
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.locators.base import NeuronLocator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import Answer
from workbench.models import LM, Tokens
from workbench.products import fast_products
from workbench.progress import track
from workbench.results import Footprint
from workbench.sites import Site
from workbench.sweep.lanes import budget

Rule = Literal["paper", "ends", "middle"]
"""Where the gradients are taken, as parts of the activation:

- `paper`: k / steps for k = 1 .. steps (Eq. 3)
- `ends`: equally spaced from 0 to 1, both included, as code built on the paper's does
- `middle`: (k - 1/2) / steps, whose sum comes nearest to the integral
"""

MOST_STEPS = 10_000
"""More than any path needs; a slip of the keyboard should not run for hours."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeurons(NeuronLocator):
    """Dai et al.'s knowledge neurons. Values are attributions in probability, at the last token of the fact's own prompt.

    Whole rows are sums over a layer's neurons, rows of neurons the refined set. Of an answer of several tokens the first is scored.
    Extra tables: `neurons`, the refined set with its mean attribution and the number of `prompts` that have it; `prompts`, for each
    the probability, the largest attribution and the size of the coarse set.

    Raises:
        ModelError: a family with a norm behind the MLP (Gemma 2 and 3, OLMo 2): it undoes the scaling of step 2.
    """

    steps: int = 20
    """How many gradients are taken along the way from zero to a layer's activations."""

    rule: Rule = "paper"
    """Where they are taken: `paper` at k / steps for k = 1 to steps, `ends` from 0 to 1 inclusive, `middle` halfway in each
    step."""

    threshold: float = 0.2
    """Coarse set: neurons whose attribution is above this part of the largest one of their prompt."""

    share: float = 0.7
    """Refined set: neurons in the coarse sets of at least this share of the fact's prompts."""

    prompts: int = 100
    """At most so many prompts of a fact are used: its own, then its paraphrases in their order. 1: its own alone, no refinement."""

    def __post_init__(self) -> None:
        NeuronLocator.__post_init__(self)
        if not 1 <= self.steps <= MOST_STEPS or (self.rule == "ends" and self.steps == 1):
            least = 2 if self.rule == "ends" else 1
            raise FactError(f"{self.steps} steps were asked for, expected {least} to {MOST_STEPS}.")
        for name in ("threshold", "share"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value <= 1):
                raise FactError(f"{name} is {value!r}, expected a number above 0, up to 1.")
        if self.prompts < 1:
            raise FactError(f"prompts is {self.prompts}, expected 1 or more.")

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """The footprints, one fact after the other."""
        return [part._footprint(lm, fact, memory) for fact, part in pieces]

    def neuron_scores(self, lm: LM, fact: Fact) -> Float[Tensor, "layer d_mlp"]:
        """Mean attribution over the fact's prompts; float64 on the CPU."""
        _, answer, prompts = self._asked(lm, fact)
        return self._attributions(lm, answer, prompts, None).mean(0)

    def _asked(self, lm: LM, fact: Fact) -> tuple[int, Answer, list[tuple[Tokens, int]]]:
        """The token the model itself says, the answer, and each prompt with the answer's first token as it follows there."""
        own = lm.encode([fact])
        clean = run(lm, own)
        answer = find_answer(lm, fact, clean)
        prompts = [(own, answer.ids[0])]
        for text in fact.paraphrases[: self.prompts - 1]:
            first = lm.target_ids(text, answer.text)[0] if fact.target_true else answer.ids[0]
            prompts.append((lm.encode([text]), first))
        return int(clean.last_logits[0].argmax()), answer, prompts

    def _attributions(
        self, lm: LM, answer: Answer, prompts: Sequence[tuple[Tokens, int]], memory: int | None
    ) -> Float[Tensor, "prompt layer d_mlp"]:
        alphas = _alphas(self.steps, self.rule)
        each = track(prompts, "prompts", len(prompts)) if len(prompts) > 1 else prompts
        return torch.stack([integrated_gradients(lm, tokens, first, alphas, memory=memory) for tokens, first in each])

    def _footprint(self, lm: LM, fact: Fact, memory: int | None) -> Footprint:
        said, answer, prompts = self._asked(lm, fact)
        found = self._attributions(lm, answer, prompts, memory).numpy()
        coarse = found > self.threshold * found.max((1, 2), keepdims=True)
        votes = coarse.sum(0)
        layers, neurons = np.nonzero(votes >= self.share * len(prompts) - 1e-9)
        order = np.argsort(-found[0, layers, neurons], kind="stable")
        layers, neurons = layers[order], neurons[order]
        own, last = prompts[0][0], prompts[0][0].lengths[0] - 1
        table = site_rows(
            fact,
            own,
            kind="mlp_post",
            layer=[*range(lm.n_layers), *layers],
            neuron=[*[None] * lm.n_layers, *neurons],
            position=[last] * (lm.n_layers + len(layers)),
            value=[*found[0].sum(1), *found[0, layers, neurons]],
        )
        kept = pd.DataFrame(
            {
                "fact": fact.id,
                "layer": layers,
                "neuron": neurons,
                "position": last,
                "attribution": found[0, layers, neurons],
                "mean": found.mean(0)[layers, neurons],
                "prompts": votes[layers, neurons],
            }
        )
        p = [float(run(lm, tokens).last_logits[0].double().softmax(-1)[first]) for tokens, first in prompts]
        asked = pd.DataFrame(
            {
                "fact": fact.id,
                "prompt": [fact.text, *fact.paraphrases[: len(prompts) - 1]],
                "p": p,
                "largest": found.max((1, 2)),
                "coarse": coarse.sum((1, 2)),
            }
        )
        facts = fact_row(lm, fact, answer, said=said, clean=p[0], prompts=len(prompts), refined=len(layers))
        unit = "attribution in p"
        extras = {"facts": facts, "neurons": kept, "prompts": asked}
        return Footprint(table=table, run=self._manifest(lm, fact, unit=unit), extras=extras)


def integrated_gradients(
    lm: LM, tokens: Tokens, target: int, alphas: Sequence[float], *, memory: int | None = None
) -> Float[Tensor, "layer d_mlp"]:
    """The attribution of every neuron at a prompt's last token: activation times mean gradient of the target's probability.

    Args:
        lm: the model.
        tokens: one prompt.
        target: the token whose probability is looked at.
        alphas: the parts of a layer's activations at which the gradient is taken.
        memory: bytes that intermediate states may take; None: half of what is free.

    Returns:
        Probabilities, in float64 on the CPU.

    Raises:
        InputError: gradients are turned off for good by `torch.inference_mode`.
        ModelError: a norm stands behind the MLP.
    """
    if post_norm(lm, 0, "mlp_out") is not None:
        raise ModelError(
            f"{lm.layout.family} normalises what its MLPs add: as a layer's activations are brought up from zero, all happens "
            "in a jump at the start, which gradients on the way do not see. Use ValueVectors or HardConcrete."
        )
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Inside of torch.inference_mode() there are no gradients, so nothing can be attributed. Leave it."
        )
    sites = lm.sites("mlp_post", "last")
    clean = run(lm, tokens, read=sites)
    rows = _rows_at_once(lm, tokens, memory)
    return torch.stack([_layer_gradients(lm, tokens, target, alphas, site, clean[site][0], rows) for site in sites])


def _layer_gradients(
    lm: LM, tokens: Tokens, target: int, alphas: Sequence[float], site: Site, w: Float[Tensor, " d_mlp"], rows: int
) -> Float[Tensor, " d_mlp"]:
    total = torch.zeros(w.shape, dtype=torch.float64)
    for some in torch.tensor(alphas, dtype=torch.float64).split(rows):
        scaled = (some.to(w)[:, None, None] * w).requires_grad_()
        with torch.enable_grad(), fast_products(lm.device, lm.dtype, weights_fixed=True):  # gradients may have been off
            logits = run(lm, tokens.repeat(len(some)), write={site: scaled}, grad=True).last_logits
            p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)[:, target].sum()
        total += torch.autograd.grad(p, scaled)[0].sum((0, 1)).cpu().double()
    return w.cpu().double() * total / len(alphas)


def _alphas(steps: int, rule: Rule) -> list[float]:
    if rule == "ends":
        return [k / (steps - 1) for k in range(steps)]
    return [(k - {"paper": 0.0, "middle": 0.5}[rule]) / steps for k in range(1, steps + 1)]


def _rows_at_once(lm: LM, tokens: Tokens, memory: int | None) -> int:
    """How many copies of a prompt may run together; what a backward pass keeps of each is estimated from the widths."""
    n = tokens.ids.shape[1]
    numbers = lm.n_layers * (16 * lm.d_model + 6 * lm.d_mlp + 4 * lm.n_heads * n) + 4 * lm.d_vocab
    return max(1, budget(lm, memory) // (4 * n * numbers))
