"""Which neurons does the answer need when as many as possible must close? A learned mask over all MLP neurons.

Gates: Louizos et al. 2018 (arXiv 1712.01312, eq. 10 to 12). As a locator: Chang et al. 2024 (arXiv 2311.09060), where methods
borrowed from pruning were best. Hyperparameters are those of the authors' code for their INJ benchmark.

1. Every neuron gets a gate with one parameter, log alpha; all start alike.
2. A step draws u uniformly and opens each gate by z = clamp(s (r - l) + l, 0, 1) with l = -0.1, r = 1.1 and
   s = sigmoid((log u - log(1 - u) + log alpha) / beta). Prompt and answer run once, all neurons times their gates, at every token.
3. Adam follows the gradient of loss + penalty x open: the mean negative log-likelihood of the answer's tokens, and the mean over
   neurons of the probability that a gate is not 0, sigmoid(log alpha - beta log(-l / r)).
4. A neuron's score is sigmoid(log alpha): near 1 where closing it costs the answer, lower where the penalty won.

No weight of the model changes. Departures: the loss is over the answer alone, as everywhere here, not over a whole memorised text;
and there is no early stop, since with these numbers the published one is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.hooks import Write, run
from workbench.locators.base import NeuronLocator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import Answer, score
from workbench.models import LM
from workbench.progress import track
from workbench.results import Footprint
from workbench.sites import Site

LOW, HIGH = -0.1, 1.1
"""How far the gates are stretched before they are clamped, so that 0 and 1 are reached."""

MOST_STEPS = 10_000
"""More than any mask needs; a slip of the keyboard should not run for hours."""

RANGES: Mapping[str, tuple[float, float]] = {"rate": (1e-12, 10), "penalty": (0, 1e9), "temperature": (1e-3, 1e3)}
"""What hyperparameters may be; beyond, float32 makes no numbers of the gates, or no difference."""

_SHIFT = math.log(-LOW / HIGH)


@dataclass(frozen=True, kw_only=True)
class HardConcrete(NeuronLocator):
    """A layer's value is the mean score of its neurons; the neurons with the largest scores have a row of their own.

    Values lie between 0 and 1; `score` is log alpha. A mask belongs to no token.
    """

    steps: int = 100
    """Steps of Adam; each is one forward and one backward pass."""

    rate: float = 0.01
    """Adam's learning rate; with it, log alpha moves by at most about `rate` a step."""

    penalty: float = 1000.0
    """What an open share of 1 costs, in nats: lambda of the paper."""

    temperature: float = 0.6667
    """Beta, published as 2/3: the lower, the nearer a drawn gate is to 0 or 1."""

    start: float = 0.5
    """How far open every gate is before the first step, between 0 and 1."""

    neurons: int = 20
    """How many neurons get a row of their own."""

    seed: int = 0
    """Seed of the draws; every fact gets the same."""

    def __post_init__(self) -> None:
        NeuronLocator.__post_init__(self)
        if not 1 <= self.steps <= MOST_STEPS:
            raise FactError(f"{self.steps} steps were asked for, expected 1 to {MOST_STEPS}.")
        if self.neurons < 0:
            raise FactError(f"{self.neurons} neurons were asked for, expected 0 or more.")
        if not 0 <= self.seed < 2**32:
            raise FactError(f"The seed is {self.seed}, expected 0 to {2**32 - 1}.")
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise FactError(f"{name} is {getattr(self, name)}, expected {least:g} to {most:g}.")
        if not 0 < self.start < 1:
            raise FactError(f"start is {self.start}, expected a share between 0 and 1.")

    def neuron_scores(self, lm: LM, fact: Fact) -> Float[Tensor, "layer d_mlp"]:
        """Sigmoid of log alpha, between 0 and 1; float32 on the CPU."""
        return self._log_alpha(lm, fact, find_answer(lm, fact, run(lm, lm.encode([fact])))).sigmoid()

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """One mask a fact."""
        return [part._footprint(lm, fact) for fact, part in pieces]

    def _footprint(self, lm: LM, fact: Fact) -> Footprint:
        tokens = lm.encode([fact])
        clean = run(lm, tokens)
        answer = find_answer(lm, fact, clean)
        log_alpha = self._log_alpha(lm, fact, answer).double()
        scores = log_alpha.sigmoid()
        top = np.argsort(-scores.flatten().numpy(), kind="stable")[: self.neurons]
        layers, whole = np.arange(lm.n_layers), [None] * lm.n_layers
        table = site_rows(
            fact,
            tokens,
            kind="mlp_post",
            layer=[*layers, *(top // lm.d_mlp)],
            neuron=[*whole, *(top % lm.d_mlp)],
            position=None,
            value=[*scores.mean(1).tolist(), *scores.flatten()[top].tolist()],
            score=[*log_alpha.mean(1).tolist(), *log_alpha.flatten()[top].tolist()],
        )
        said, p = int(clean.last_logits[0].argmax()), float(score("p", clean.logits, tokens, answer))
        return Footprint(
            table=table,
            run=self._manifest(lm, fact, unit="sigmoid of the gate's log alpha"),
            extras={"facts": fact_row(lm, fact, answer, said=said, clean=p)},
        )

    def _log_alpha(self, lm: LM, fact: Fact, answer: Answer) -> Float[Tensor, "layer d_mlp"]:
        """The gates' parameters after the last step."""
        if torch.is_inference_mode_enabled():
            raise FactError(
                "Inside of torch.inference_mode() there are no gradients, so no mask can be learned. Leave it."
            )
        tokens = lm.encode([fact], targets=[answer.text] if fact.target_true else None)
        shape, p = (lm.n_layers, lm.d_mlp), (self.start - LOW) / (HIGH - LOW)
        generator = torch.Generator().manual_seed(self.seed)
        log_alpha = torch.full(shape, math.log(p / (1 - p)), device=lm.device, requires_grad=True)
        optimizer = torch.optim.Adam([log_alpha], lr=self.rate)
        for _ in track(range(self.steps), "steps of the mask", self.steps):
            u = torch.rand(shape, generator=generator).clamp(1e-4, 1 - 1e-4).to(lm.device)
            with torch.enable_grad():  # whoever calls may have turned it off
                drawn = ((u.logit() + log_alpha) / self.temperature).sigmoid()
                gates = (drawn * (HIGH - LOW) + LOW).clamp(0, 1).to(lm.dtype)
                write: dict[Site, Write] = {
                    site: partial(torch.mul, gates[site.layer]) for site in lm.sites("mlp_post")
                }
                logits = run(lm, tokens, write=write, grad=True).logits
                loss = -score("logp", logits, tokens, answer).sum() / len(answer.ids)
                opened = (log_alpha - self.temperature * _SHIFT).sigmoid().mean()
                (log_alpha.grad,) = torch.autograd.grad(loss + self.penalty * opened, [log_alpha])
            optimizer.step()
        return log_alpha.detach().cpu()
