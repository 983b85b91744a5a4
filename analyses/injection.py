"""Does a method find the neurons that something was written into? The INJ benchmark (Chang et al. 2024, arXiv 2311.09060).

Claim: all methods recall more of the injected neurons than chance does, and those of the pruning kind the most. Protocol:

1. Choose a share of all MLP neurons at random, over all layers.
2. On a copy of the model, train only their value vectors (their column of the down projection) with Adam on one sequence, until
   its loss is below 0.05.
3. A method scores all neurons of the changed model for that sequence. Recall@k is the share of the injected neurons among the k
   best: k per layer, as published (`scope` layer), and over the whole model (`scope` model).

Departures: a sequence is a prompt with its answer, and the answer alone is trained, since that is what methods here are asked
about; no dropout while training; what was not memorised is counted and left out; ties are broken by the expectation over all ways
to break them, so that a method that tells no neurons apart has exactly the recall of chance, which is listed beside the methods.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.locators.base import NeuronLocator
from workbench.metrics import Answer, score
from workbench.models import LM
from workbench.progress import track
from workbench.results import Result, manifest

CHANCE = "chance"
"""The name of the row that a method without any scores would have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Injection:
    """A copy of a model that memorised one sequence in a few neurons."""

    lm: LM
    """The copy; nothing but value vectors of `neurons` differs from the model."""

    neurons: Bool[Tensor, "layer d_mlp"]
    """True where a neuron was trained."""

    losses: tuple[float, ...]
    """Mean negative log-likelihood of the answer's tokens in nats, before each step and after the last."""

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.losses) - 1


def inject(
    lm: LM,
    fact: Fact,
    *,
    share: float = 0.01,
    rate: float = 0.01,
    steps: int = 100,
    enough: float = 0.05,
    seed: int = 0,
) -> Injection:
    """Writes a fact's answer into the value vectors of some random neurons of a private copy of the model.

    Args:
        lm: the model; it stays as it is.
        fact: the prompt and its answer (`target_true`).
        share: of all MLP neurons, how many are trained; at least one is.
        rate: Adam's learning rate.
        steps: most steps that are taken.
        enough: the loss in nats below which no further step is taken.
        seed: of the choice of neurons.

    Raises:
        FactError: the fact has no answer, or there is no such share.
    """
    if not fact.target_true:
        raise FactError(f"The fact {fact.id!r} has no answer to write into the model. Give it a target_true.")
    if not 0 < share <= 1 or steps < 1:
        raise FactError(f"share is {share} and steps is {steps}, expected a share above 0, and 1 step or more.")
    total = lm.n_layers * lm.d_mlp
    chosen = random.Random(seed).sample(range(total), max(1, int(total * share)))
    neurons = torch.zeros(total, dtype=torch.bool)
    neurons[chosen] = True
    neurons = neurons.view(lm.n_layers, lm.d_mlp)
    changed = LM(copy.deepcopy(lm.model), lm.tokenizer, name=lm.name, bos=lm.bos)
    answer = Answer(text=fact.target_true, ids=tuple(changed.target_ids(fact.text, fact.target_true)))
    tokens = changed.encode([fact], targets=[answer.text])
    downs = [changed.part(layer, changed.layout.down_proj) for layer in range(changed.n_layers)]
    weights = [down.get_parameter("weight").requires_grad_() for down in downs]
    masks = [
        (mask if isinstance(down, nn.Linear) else mask[:, None]).to(weight)  # Linear is (out, in), Conv1D (in, out)
        for down, mask, weight in zip(downs, neurons, weights, strict=True)
    ]
    optimizer = torch.optim.Adam(weights, lr=rate)
    losses: list[float] = []
    for step in range(steps + 1):
        with torch.enable_grad():
            logits = run(changed, tokens, grad=True).logits
            loss = -score("logp", logits, tokens, answer).sum() / len(answer.ids)
        losses.append(float(loss.detach()))
        if losses[-1] < enough or step == steps:
            break
        for weight, mask, gradient in zip(weights, masks, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient * mask
        optimizer.step()
    for weight in weights:
        weight.grad = None
    return Injection(lm=changed, neurons=neurons, losses=tuple(losses))


def injection(
    lm: LM,
    facts: Sequence[Fact],
    *,
    locators: Sequence[NeuronLocator],
    share: float = 0.01,
    multiples: Sequence[int] = (1, 2, 5),
    rate: float = 0.01,
    steps: int = 100,
    enough: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Injects each fact into neurons of its own and lets every method look for them.

    Args:
        lm: the model; it stays as it is.
        facts: what is injected, each into a fresh copy; best what the model does not know, see `unknown_facts`.
        locators: the methods; two of one class are told apart by their parameters.
        share: of all MLP neurons, how many are injected.
        multiples: recall is measured at these multiples of the number injected.
        rate: Adam's learning rate of the injection.
        steps: its most steps.
        enough: its loss in nats at which a sequence counts as memorised.
        resamples: bootstrap resamples of the facts.
        seed: of the choice of neurons (plus the fact's number) and of the bootstrap.

    Returns:
        A Result with the columns method, scope (layer or model), multiple, k (neurons looked at over the whole model), value (mean
        recall over facts), low and high (95 % percentile bootstrap over facts; NaN for a single one), n (facts memorised). Extras:
        `each`, the same by fact; `facts`, for each fact the loss before and after, steps and whether it was memorised.

    Raises:
        FactError: no facts, or none was memorised.
    """
    times = Counter(type(one).__name__ for one in locators)
    named = {type(one).__name__ if times[type(one).__name__] == 1 else repr(one): one for one in locators}
    if not facts:
        raise FactError("There is no fact to inject. Give at least one.")
    rows: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for index, fact in track(enumerate(facts), "sequences", len(facts)):
        made = inject(lm, fact, share=share, rate=rate, steps=steps, enough=enough, seed=seed + index)
        memorised = made.losses[-1] < enough
        ends = {"before": made.losses[0], "after": made.losses[-1], "steps": made.steps, "memorised": memorised}
        told.append({"fact": fact.id, "prompt": fact.text, "answer": fact.target_true, **ends})
        if not memorised:
            continue
        flat = torch.zeros(lm.n_layers, lm.d_mlp)
        scored = {CHANCE: flat, **{name: one.neuron_scores(made.lm, fact) for name, one in named.items()}}
        for name, scores in scored.items():
            rows += [
                {"method": name, "fact": fact.id, **measured}
                for measured in recalls(scores, made.neurons, share=share, multiples=multiples)
            ]
    if not rows:
        raise FactError(
            f"None of {len(facts)} facts was memorised in {steps} steps. Take more steps, a larger rate or share."
        )
    each = pd.DataFrame(rows)
    factors = ["method", "scope", "multiple"]
    summary = []
    for group, own in each.groupby(factors, sort=False):
        low, high = interval(own["value"].to_numpy(), resamples=resamples, seed=seed)
        mean = {"k": int(own["k"].iloc[0]), "value": own["value"].mean(), "low": low, "high": high, "n": len(own)}
        summary.append({**dict(zip(factors, group, strict=True)), **mean})
    parameters = {"share": share, "multiples": list(multiples), "rate": rate, "steps": steps, "enough": enough}
    run_of = manifest(
        "injection",
        model=lm.protocol,
        parameters={**parameters, "seed": seed, "locators": {name: repr(one) for name, one in named.items()}},
        facts=list(facts),
        n_injected=max(1, int(lm.n_layers * lm.d_mlp * share)),
        bootstrap={"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    )
    return Result(table=pd.DataFrame(summary), run=run_of, extras={"each": each, "facts": pd.DataFrame(told)})


def recalls(
    scores: Float[Tensor, "layer d_mlp"],
    injected: Bool[Tensor, "layer d_mlp"],
    *,
    share: float,
    multiples: Sequence[int] = (1, 2, 5),
) -> list[dict[str, Any]]:
    """Recall of the injected neurons among the best, for each scope and multiple.

    In scope `layer`, each layer gives its best round(multiple x share x d_mlp), at least one; in scope `model`, the whole model
    gives its best, `multiple` times the number injected.
    """
    values, gold = scores.detach().cpu().double().numpy(), injected.cpu().numpy()
    n_layers, d_mlp = gold.shape
    found = []
    for multiple in multiples:
        each = min(d_mlp, max(1, round(multiple * share * d_mlp)))
        by_layer = sum(_hits(values[layer], gold[layer], each) for layer in range(n_layers))
        k = min(gold.size, multiple * int(gold.sum()))
        found += [
            {"scope": "layer", "multiple": multiple, "k": each * n_layers, "value": by_layer / gold.sum()},
            {"scope": "model", "multiple": multiple, "k": k, "value": _hits(values, gold, k) / gold.sum()},
        ]
    return found


def interval(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean, its missing values left out; NaN where fewer than two are there."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _hits(values: np.ndarray, gold: np.ndarray, k: int) -> float:
    """How many gold ones are among the k largest, in expectation over the ways to break ties."""
    values, gold = values.ravel(), gold.ravel()
    edge = np.partition(values, len(values) - k)[len(values) - k]
    above, tied = values > edge, values == edge
    return float((gold & above).sum() + (k - above.sum()) / tied.sum() * (gold & tied).sum())
