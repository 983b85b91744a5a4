"""Which prompts drive each MLP neuron most? (Geva et al. 2021, arXiv 2012.14913, sec. 3: a key answers to patterns in the prompt.)

The paper ranks a corpus' prefixes by a neuron's activation at their last token. So does this, for all neurons of a model at once
and over the prompts of facts: every beginning of a prompt is a prefix, and counts once, however many prompts share it.

1. Run the prompts, some at a time, and read every neuron at every token.
2. Leave out the tokens whose prefix an earlier prompt had: a causal model says the same there.
3. Of each prompt, take each neuron's activation of largest size; of all prompts, keep the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.facts import Fact, FactError
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.store import Store

if TYPE_CHECKING:
    from workbench.models import LM

AT_ONCE = 48
"""Prompts of a batch; progress is told, and a stop heeded, after each."""


def strongest_prompts(lm: LM, facts: Sequence[Fact], *, k: int = 10) -> Result:
    """The prompts that drive each neuron most, strongest first.

    Args:
        lm: the model.
        facts: whose prompts are run.
        k: how many prompts are kept of each neuron.

    Returns:
        A Result with one row a neuron and prompt: layer, neuron (both 0-based), rank (0: the strongest), fact (id), position (of
        the token with the activation of largest size; from 0) and k, that activation. Where there are fewer distinct prompts, there
        are fewer rows.

    Raises:
        FactError: no facts.
        ModelError: a prompt is too long.
        Cancelled: whoever listens to the progress stopped it.
    """
    import torch

    from workbench.hooks import run

    if not facts:
        raise FactError("There is no fact whose prompt could be run. Give at least one.")
    sites, seen = lm.sites("mlp_post"), set[bytes]()
    kept: list[tuple[torch.Tensor, ...]] = [()] * len(sites)  # of each layer: k, prompt, position; each (prompt, d_mlp)
    batches = [facts[first : first + AT_ONCE] for first in range(0, len(facts), AT_ONCE)]
    for number, batch in enumerate(track(batches, "prompts", len(batches))):
        tokens = lm.encode(batch)
        new = torch.tensor(_new_prefixes(tokens.ids.cpu().numpy(), tokens.at(None).cpu().numpy(), seen))[..., None]
        acts = run(lm, tokens, read=["mlp_post"])
        prompts = torch.arange(len(batch))[:, None] + number * AT_ONCE
        for layer, site in enumerate(sites):
            own = acts[site].float().cpu()
            places = own.abs().where(new, torch.tensor(-1.0)).argmax(1)  # prompt d_mlp
            found = own.gather(1, places[:, None])[:, 0].where(new.any(1), torch.tensor(torch.nan))
            parts = (found, prompts.expand_as(found), places)
            both = parts if not kept[layer] else tuple(map(torch.cat, zip(kept[layer], parts, strict=True)))
            best = both[0].abs().nan_to_num(-1.0).topk(min(k, len(both[0])), dim=0).indices
            kept[layer] = tuple(part.gather(0, best) for part in both)
    table: pd.DataFrame = pd.concat(
        [_rows(layer, *(part.T.numpy() for part in parts)) for layer, parts in enumerate(kept)], ignore_index=True
    )
    table["fact"] = np.array([fact.id for fact in facts])[table.pop("prompt")]
    return Result(table=table.dropna(subset="k").reset_index(drop=True), run=_manifest(lm, facts, k))


def find_strongest_prompts(store: Store, lm: LM, facts: Sequence[Fact], *, k: int = 10) -> Result | None:
    """What is stored of `strongest_prompts`, or None."""
    return store.find(_manifest(lm, facts, k), Result)


def _manifest(lm: LM, facts: Sequence[Fact], k: int) -> dict[str, Any]:
    """The manifest; of each fact it names what the prompt is made of."""
    prompts = [{"id": fact.id, "prompt": fact.prompt, "subject": fact.subject} for fact in facts]
    return manifest("strongest_prompts", model=lm.protocol, parameters={"k": k}, facts=prompts, unit="activation")


def _new_prefixes(ids: np.ndarray, inside: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """Which tokens end a prefix that was not seen before; notes them as seen."""
    new = np.zeros(ids.shape, dtype=bool)
    for row, position in zip(*inside.nonzero(), strict=True):
        prefix = ids[row, : position + 1].tobytes()
        new[row, position] = prefix not in seen
        seen.add(prefix)
    return new


def _rows(layer: int, k: np.ndarray, prompt: np.ndarray, position: np.ndarray) -> pd.DataFrame:
    """One layer's part of the table; each argument is (d_mlp, rank)."""
    neuron, rank = np.divmod(np.arange(k.size), k.shape[1])
    columns = {"prompt": prompt.ravel(), "position": position.ravel(), "k": k.ravel().astype(float)}
    table: pd.DataFrame = pd.DataFrame({"layer": layer, "neuron": neuron, "rank": rank, **columns})
    return table
