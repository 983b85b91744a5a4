"""What is one MLP neuron about? Its value vector in words, the prompts that drive it most, and what it gives to their answers.

Geva et al. 2021 (arXiv 2012.14913) claim that a neuron's key answers to a pattern in the prompt, and its value vector promotes the
tokens that follow such a pattern: the strongest prompts show the one, the promoted tokens the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from workbench.directions import frozen_norm, post_norm, unembedding
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.models import LM
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.sites import Site
from workbench.vocabulary import Projection, check_neuron, neuron_tokens, value_vectors


def neuron_card(lm: LM, facts: Sequence[Fact], *, layer: int, neuron: int, k: int = 10, memory: int = 2**26) -> Result:
    """A neuron over some facts' prompts.

    Args:
        lm: the model.
        facts: whose prompts are run.
        layer: 0-based.
        neuron: 0-based.
        k: how many promoted, and how many suppressed tokens are named in each projection.
        memory: bytes that a batch of prompts may take for its logits.

    Returns:
        A Result with one row a fact, the strongest prompt first: fact, relation, prompt, answer; k, the activation of largest size
        over the prompt's tokens, with position, text and token (role) of where it is; k_last, the activation at the last token; and
        contribution, what it gives there directly to the logit of the answer's first token, as in `ValueVectors`. Extras:

        - `tokens`: projection, direction (promoted or suppressed), rank, token_id, text, value; see `workbench.vocabulary`
        - `statistics`: of k, k_last and contribution over the facts the mean, sd (of the sample; NaN for one fact), least, most,
          and the share that is above 0

    Raises:
        FactError: no facts.
        VocabularyError: there is no such neuron.
        ModelError: the final norm, or one behind the MLP, is neither a LayerNorm nor an RMSNorm.
    """
    check_neuron(layer, neuron, lm.n_layers, lm.d_mlp)
    facts = list(facts)
    if not facts:
        raise FactError("There is no fact to run the neuron on. Give at least one.")
    longest = lm.encode(facts).ids.shape[1]
    at_once = max(1, memory // (8 * longest * lm.d_vocab))  # logits, and the layer's keys beside them
    batches = [facts[first : first + at_once] for first in range(0, len(facts), at_once)]
    rows = [_rows(lm, batch, layer, neuron) for batch in track(batches, "prompts", len(batches))]
    table = pd.concat(rows, ignore_index=True)
    table = table.sort_values("k", key=lambda strength: -strength.abs(), kind="stable", ignore_index=True)
    numbers = table[["k", "k_last", "contribution"]]
    statistics = pd.DataFrame(
        {
            "measure": numbers.columns,
            "mean": numbers.mean().to_numpy(),
            "sd": numbers.std().to_numpy(),
            "least": numbers.min().to_numpy(),
            "most": numbers.max().to_numpy(),
            "positive": (numbers > 0).mean().to_numpy(),
        }
    )
    parts = {}
    for projection in get_args(Projection):
        found = neuron_tokens(lm, layer, neuron, projection=projection, k=k)
        found.insert(3, "text", [lm.word(token) for token in found["token_id"]])
        parts[projection] = found
    tokens = pd.concat(parts, names=["projection", None]).reset_index("projection").reset_index(drop=True)
    parameters = {"layer": layer, "neuron": neuron, "k": k}
    told = manifest("neuron_card", model=lm.protocol, parameters=parameters, facts=facts, unit="activation; logits")
    return Result(table=table, run=told, extras={"tokens": tokens, "statistics": statistics})


def _rows(lm: LM, facts: Sequence[Fact], layer: int, neuron: int) -> pd.DataFrame:
    """The table's rows for some facts, in one forward pass."""
    tokens = lm.encode(facts)
    site, top = Site(layer=layer, kind="mlp_post"), Site(layer=lm.n_layers - 1, kind="resid_post")
    acts = run(lm, tokens, read=[site, top])
    each, last = torch.arange(len(facts), device=tokens.last.device), tokens.last
    own = acts[site][..., neuron].cpu().double()
    inside = tokens.at(None).cpu()
    places = own.abs().where(inside, torch.tensor(-1.0, dtype=torch.float64)).argmax(1).tolist()
    answers = [_answer(lm, fact, logits) for fact, logits in zip(facts, acts.last_logits, strict=True)]
    keys, states = acts[site][each, last].cpu().double(), acts[top][each, last].cpu().double()
    given = _contributions(lm, layer, neuron, keys, states, [token for token, _ in answers])
    table: pd.DataFrame = pd.DataFrame(
        {
            "fact": [fact.id for fact in facts],
            "relation": [fact.relation for fact in facts],
            "prompt": [fact.text for fact in facts],
            "answer": [text for _, text in answers],
            "k": own[np.arange(len(facts)), places].numpy(),
            "position": places,
            "text": [tokens.texts[row][place] for row, place in enumerate(places)],
            "token": [tokens.roles(row)[place] for row, place in enumerate(places)],
            "k_last": keys[:, neuron].numpy(),
            "contribution": given.numpy(),
        }
    )
    return table


def _contributions(
    lm: LM,
    layer: int,
    neuron: int,
    keys: Float[Tensor, "fact d_mlp"],
    states: Float[Tensor, "fact d_model"],
    token_ids: Sequence[int],
) -> Float[Tensor, " fact"]:
    """What the neuron gives to each fact's token, by the state it ends in."""
    directions = frozen_norm(lm.final_norm, states).pull(unembedding(lm, token_ids)[0])
    norm, values = post_norm(lm, layer, "mlp_out"), value_vectors(lm, layer).cpu().double()
    if norm is not None:
        bias = getattr(lm.part(layer, lm.layout.down_proj), "bias", None)
        outputs = keys @ values + (0 if bias is None else bias.detach().cpu().double())
        directions = frozen_norm(norm, outputs).pull(directions)
    return keys[:, neuron] * einsum(directions, values[neuron], "fact d_model, d_model -> fact")


def _answer(lm: LM, fact: Fact, logits: Float[Tensor, " d_vocab"]) -> tuple[int, str]:
    """The first token of the fact's answer and the answer: its own, or the model's most probable next token."""
    if fact.target_true:
        return lm.target_ids(fact.text, fact.target_true)[0], fact.target_true
    said = int(logits.argmax())
    return said, lm.word(said).strip()
