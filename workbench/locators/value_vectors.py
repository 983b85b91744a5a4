"""What does every MLP neuron write towards the answer? Attribution to value vectors (Geva et al. 2022, arXiv 2203.14680, sec. 3).

An MLP's output is a sum over neurons, k_i v_i: the coefficient k_i is the neuron's activation (`mlp_post`), the value vector v_i
its column of the down projection (Geva et al. 2021, arXiv 2012.14913; read in words: Dar et al. 2022, arXiv 2209.02535).

1. Run the prompt; at one token note every k_i and the state that leaves the last block.
2. Freeze the final norm's divisor at that state; the answer's logit is then a direction d times the state, plus a constant.
3. A neuron's value is k_i v_i . d. Over a layer they sum, with the down projection's bias, to the MLP's direct contribution. Where
   a norm stands between MLP and residual stream (Gemma 2 and 3, OLMo 2), its divisor is frozen too.

Direct means: what later layers make of it counts as theirs. At another token than the last, nothing of this reaches the logits
directly; the values then say what the state there would be read as (the logit lens).
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

from workbench.directions import frozen_direction, frozen_norm, post_norm
from workbench.facts import Fact, FactError
from workbench.hooks import Activations, run
from workbench.locators.base import NeuronLocator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import Answer
from workbench.models import LM, Tokens
from workbench.results import Footprint
from workbench.sites import Role, Site
from workbench.vocabulary import Projection, extreme_tokens, value_vectors, words


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """What the MLPs of a model give directly to a logit, at one token of a prompt. Float64, on the CPU."""

    coefficients: Float[Tensor, "layer d_mlp"]
    """k, the activation of every neuron."""

    neurons: Float[Tensor, "layer d_mlp"]
    """Direct contribution of every neuron, in logits."""

    biases: Float[Tensor, " layer"]
    """That of the down projection's bias, and of a post-norm's."""

    layers: Float[Tensor, " layer"]
    """That of the MLP's output as a whole: the sum of both, up to rounding."""


@dataclass(frozen=True, kw_only=True)
class ValueVectors(NeuronLocator):
    """Direct contributions of MLP neurons to the logit of the answer's first token. Values are logits, before a softcap (Gemma 2).

    Whole rows are the layers' MLPs, biases included; rows of single neurons those with the largest contributions. Extra tables:

    - `neurons`: the same neurons with their coefficient `k`, `contribution`, its `share` (by the sum of the sizes of all
      contributions of the layer), and the tokens that v promotes and suppresses where k is positive; else it is the other way round
    - `layers`: each layer's `contribution`, what of it is the `bias`, and the sum of its neurons' `sizes`

    Raises:
        ModelError: the final norm, or one behind the MLP, is neither a LayerNorm nor an RMSNorm.
    """

    token: Role = "last"
    """Where: a role that exactly one token of the prompt has."""

    neurons: int = 20
    """How many neurons get a row of their own: those with the largest contributions."""

    per: Literal["model", "layer"] = "model"
    """Whether so many of the whole model, or of each layer."""

    centred: bool = False
    """Take from the logit the mean over the vocabulary, since a softmax does not see what raises all logits alike."""

    projection: Projection = "normed"
    """How value vectors are read in words: with the final norm (`normed`, its divisor 1 and its offset left out), or `plain`."""

    tokens: int = 5
    """How many promoted, and how many suppressed tokens are named of each neuron."""

    def __post_init__(self) -> None:
        NeuronLocator.__post_init__(self)
        if self.neurons < 0 or self.tokens < 1:
            raise FactError(
                f"neurons is {self.neurons} and tokens {self.tokens}, expected 0 or more neurons and at least 1 token."
            )

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This very method, once every prompt was seen to have the token."""
        for fact in facts:
            self._position(fact, lm.encode([fact]))
        return self

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """One forward pass a fact."""
        return [part._footprint(lm, fact) for fact, part in pieces]

    def neuron_scores(self, lm: LM, fact: Fact) -> Float[Tensor, "layer d_mlp"]:
        """Every neuron's direct contribution; float64 on the CPU."""
        return self._attributed(lm, fact)[-1].neurons

    def _attributed(self, lm: LM, fact: Fact) -> tuple[Tokens, int, Activations, Answer, Contributions]:
        tokens = lm.encode([fact])
        position = self._position(fact, tokens)
        top = Site(layer=lm.n_layers - 1, kind="resid_post")
        clean = run(lm, tokens, read=["mlp_post", "mlp_out", top])
        answer = find_answer(lm, fact, clean)
        found = contributions(
            lm,
            keys=torch.stack([clean[site][0, position].cpu() for site in lm.sites("mlp_post")]),
            outputs=torch.stack([clean[site][0, position].cpu() for site in lm.sites("mlp_out")]),
            state=clean[top][0, position],
            token=answer.ids[0],
            centred=self.centred,
        )
        return tokens, position, clean, answer, found

    def _position(self, fact: Fact, tokens: Tokens) -> int:
        places = tokens.at(self.token)[0].nonzero().flatten().tolist()
        if len(places) != 1:
            raise FactError(
                f"{len(places)} tokens of {fact.text!r} are {self.token!r}, expected 1. Choose e.g. 'last' or 'subject_last'."
            )
        return int(places[0])

    def _footprint(self, lm: LM, fact: Fact) -> Footprint:
        tokens, position, clean, answer, found = self._attributed(lm, fact)
        layers, neurons = self._largest(found.neurons.numpy())
        value = found.neurons.numpy()[layers, neurons]
        sizes = found.neurons.abs().sum(1).numpy()
        table = site_rows(
            fact,
            tokens,
            kind="mlp_post",
            layer=[*range(lm.n_layers), *layers],
            neuron=[*[None] * lm.n_layers, *neurons],
            position=[position] * (lm.n_layers + len(layers)),
            value=[*found.layers.tolist(), *value],
        )
        named = self._words(lm, layers, neurons)
        largest = pd.DataFrame(
            {
                "fact": fact.id,
                "layer": layers,
                "neuron": neurons,
                "position": position,
                "k": found.coefficients.numpy()[layers, neurons],
                "contribution": value,
                "share": value / sizes[layers],
                "promoted": [promoted for promoted, _ in named],
                "suppressed": [suppressed for _, suppressed in named],
                "projection": self.projection,
            }
        )
        each = pd.DataFrame(
            {
                "fact": fact.id,
                "layer": range(lm.n_layers),
                "contribution": found.layers.tolist(),
                "bias": found.biases.tolist(),
                "sizes": sizes,
            }
        )
        logits = clean.last_logits[0].double()
        p = float(logits.softmax(-1)[answer.ids[0]])
        facts = fact_row(lm, fact, answer, said=int(logits.argmax()), clean=p, logit=float(logits[answer.ids[0]]))
        unit = f"direct contribution to the {'centred ' * self.centred}logit"
        extras = {"facts": facts, "neurons": largest, "layers": each}
        return Footprint(table=table, run=self._manifest(lm, fact, unit=unit), extras=extras)

    def _largest(self, values: Float[np.ndarray, "layer d_mlp"]) -> tuple[np.ndarray, np.ndarray]:
        """Layers and neurons of the largest values, the largest first."""
        order = np.argsort(-values, axis=None if self.per == "model" else 1, kind="stable")[..., : self.neurons]
        if self.per == "layer":
            order = (order + values.shape[1] * np.arange(len(values))[:, None]).ravel()
            order = order[np.argsort(-values.ravel()[order], kind="stable")]
        layers, neurons = np.divmod(order, values.shape[1])
        return layers, neurons

    def _words(self, lm: LM, layers: np.ndarray, neurons: np.ndarray) -> list[tuple[str, str]]:
        """Promoted and suppressed tokens of some neurons."""
        named: dict[tuple[int, int], tuple[str, str]] = {}
        for layer in set(layers.tolist()):
            own = neurons[layers == layer].tolist()
            ids, _ = extreme_tokens(lm, layer, own, projection=self.projection, k=self.tokens)
            for neuron, promoted, suppressed in zip(own, *ids, strict=True):
                named[layer, neuron] = words(lm, promoted), words(lm, suppressed)
        return [named[place] for place in zip(layers.tolist(), neurons.tolist(), strict=True)]


def contributions(
    lm: LM,
    *,
    keys: Float[Tensor, "layer d_mlp"],
    outputs: Float[Tensor, "layer d_model"],
    state: Float[Tensor, " d_model"],
    token: int,
    centred: bool = False,
) -> Contributions:
    """What every neuron gives to a token's logit directly, at one position of one run.

    Args:
        lm: the model.
        keys: `mlp_post` there, layer by layer.
        outputs: `mlp_out` there.
        state: what leaves the last block there; the final norm's divisor is frozen at it.
        token: whose logit.
        centred: of the logit, its difference from the mean over the vocabulary.

    Raises:
        ModelError: a norm that is neither a LayerNorm nor an RMSNorm.
    """
    direction = frozen_direction(lm, state[None], [token], centred=centred)[0][0, 0]
    keys, neurons, biases = keys.double(), [], []
    for layer, k in enumerate(keys):
        values, bias = (
            value_vectors(lm, layer).cpu().double(),
            getattr(lm.part(layer, lm.layout.down_proj), "bias", None),
        )
        bias = torch.zeros(lm.d_model, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
        towards, constant = direction, 0.0
        norm = post_norm(lm, layer, "mlp_out")
        if norm is not None:
            frozen = frozen_norm(norm, (k @ values + bias)[None])
            towards, constant = frozen.pull(direction[None])[0], float(frozen.offset @ direction)
        neurons.append(k * (values @ towards))
        biases.append(float(bias @ towards) + constant)
    return Contributions(
        coefficients=keys,
        neurons=torch.stack(neurons),
        biases=torch.tensor(biases, dtype=torch.float64),
        layers=outputs.double() @ direction,
    )
