"""Does an edit write the new answer legibly into the value vectors that it changes most? They are read in words, before and after.

Zhang et al. 2024, the survey "A Comprehensive Study of Knowledge Editing" (arXiv 2401.01286, section 5.1, Figure 7); reading a
value vector by the unembedding is from Dar et al. 2022 (arXiv 2209.02535). Claim: MEND has the new object among the first 50 tokens
in over 90 % of the cases before the edit, and as the first one in over 90 % after it; MEMIT's Hit@50 goes from 59.7 % to 70.2 %;
ROME and FT-L show no increase. (Figures as the text gives them; the curve is an image.)

1. Every fact is edited alone by every editor. Only facts that all editors edit with success count, as in the survey.
2. The `columns` value vectors (columns of down projections) whose change is longest, over all layers that the edit changes.
3. Each is read in the vocabulary before and after, and so is its change; the rank of the new answer's first token is noted.
4. Hit@k: the rank is among the first k. `any`: of at least one of the columns; `mean`: the share of the columns.

The survey does not say whether the final norm comes first, nor how the columns are put together, so both are shown: `normed` and
`plain` (see `workbench.vocabulary.Projection`), `any` and `mean`. Where we depart: `random`, as many other value vectors of the
same layers, says what is to be expected in a small vocabulary, and `change` what the edit adds. A neuron may act with a negative
activation, which turns what its vector says around; `acting` reads each with the sign that it has on the fact's subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.answers import log_p
from analyses.editing import edit_each, fitted_editors
from analyses.injection import interval
from workbench.charts import Chart, DotPlot
from workbench.editors._values import down_path, read_keys
from workbench.edits import Edit
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.store import Store
from workbench.vocabulary import Projection, project, readable, value_vectors, words

SHOWN = 5
"""How many of the first tokens of each vector are kept for reading."""


def changed_columns_to_vocabulary(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    columns: int = 5,
    hits: tuple[int, ...] = (1, 5, 10, 50),
    successful: bool = True,
    acting: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Hit@k of the new answer in the columns that edits change most.

    Args:
        lm: the model.
        facts: with `target_new`.
        editors: names of editors that change down projections.
        columns: how many columns of the largest change are read.
        hits: the k of Hit@k.
        successful: whether only facts count that every editor edits so that the new answer beats the old one.
        acting: whether a vector is read with the sign of its neuron's activation at the subject's last token, before the edit.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap and of the random columns.
        store: where edits are kept.

    Returns:
        One row an editor, `projection` (normed, plain), `reading` (before, after, change, random), `over` (any, mean) and `k`, with
        `value` (Hit@k, 0 to 1), `low`, `high` and `n` (facts). Extra `each`: a row an editor, fact, column, projection and reading
        with layer, neuron, moved (length of the change), answer (its first token), rank (from 0) and words (the first tokens).

    Raises:
        FactError: no facts, a count below 1, or an unknown editor.
        InputError: no fact is left.
    """
    facts = distinct_facts(facts, to="edit")
    if columns < 1 or not hits or min(hits) < 1:
        raise FactError(f"columns is {columns} and hits are {hits}, expected 1 or more each.")
    left_out: dict[str, str] = {}
    parts: list[pd.DataFrame] = []
    won: dict[tuple[str, str], bool] = {}
    rng = np.random.default_rng(seed)
    for name, fact, edit in edit_each(lm, fitted_editors(lm, editors), facts, left_out=left_out, store=store):
        layers = changed_layers(lm, edit)
        if not layers:
            left_out[f"{name}: {fact.id}"] = f"{name} changes no down projection, so no value vector changes."
            continue
        moved, before, after = most_changed(lm, edit, layers, n=columns)
        others = [(layer, int(rng.integers(lm.d_mlp))) for layer, _ in moved]
        signs = {
            places: _signs(lm, fact, places) if acting else torch.ones(len(places)) for places in (moved, tuple(others))
        }
        random = torch.stack([value_vectors(lm, layer, [neuron])[0] for layer, neuron in others]).float()
        readings = {"before": before, "after": after, "change": after - before}
        own = [(reading, moved, vectors) for reading, vectors in readings.items()]
        lengths = (after - before).norm(dim=1)
        for reading, places, vectors in (*own, ("random", tuple(others), random)):
            table = _read(lm, fact, places, vectors * signs[places][:, None].to(vectors))
            parts.append(table.assign(
                editor=name, fact=fact.id, reading=reading, moved=np.nan if reading == "random" else np.tile(lengths.cpu(), 2)
            ))  # fmt: skip
        won[name, fact.id] = _wins(lm, fact, edit)
    used = list(dict.fromkeys(name for name, _ in won))
    if successful:
        for (name, fact_id), succeeded in won.items():
            if not succeeded:
                left_out[f"{name}: {fact_id}"] = "After the edit the old answer is still the more probable one."
    counted = [f.id for f in facts if all(won.get((name, f.id), False) or not successful for name in used)]
    each = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["fact"])
    each = each[each["fact"].isin(counted)].reset_index(drop=True)
    if each.empty:
        raise InputError(f"No fact is left. The first: {next(iter(left_out.values()), 'none was given')}")
    rows = []
    factors = ["editor", "projection", "reading"]
    for group, one in each.groupby(factors, sort=False):
        for k in hits:
            by_fact = (one["rank"] < k).groupby(one["fact"], sort=False)
            for over, values in (("any", by_fact.any().astype(float)), ("mean", by_fact.mean())):
                low, high = interval(values.to_numpy(), resamples=resamples, seed=seed)
                rows.append({
                    **dict(zip(factors, group, strict=True)), "over": over, "k": k, "value": values.mean(), "low": low,
                    "high": high, "n": len(values),
                })  # fmt: skip
    parameters = {
        "editors": editors,
        "columns": columns,
        "hits": hits,
        "successful": successful,
        "acting": acting,
        "seed": seed,
    }
    run = manifest(
        "changed_columns_to_vocabulary", model=lm.protocol, parameters=parameters, facts=facts, left_out=left_out,
        d_vocab=lm.d_vocab, bootstrap={"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    return Result(table=pd.DataFrame(rows), run=run, extras={"each": each})


def changed_layers(lm: LM, edit: Edit) -> tuple[int, ...]:
    """The layers whose down projections an edit changes."""
    return tuple(layer for layer in range(lm.n_layers) if f"{down_path(lm, layer)}.weight" in edit.changes)


def most_changed(
    lm: LM, edit: Edit, layers: Sequence[int], *, n: int
) -> tuple[tuple[tuple[int, int], ...], Float[Tensor, "column d_model"], Float[Tensor, "column d_model"]]:
    """The n value vectors that an edit moves farthest, the farthest first: layer and neuron of each, and what they were and are."""
    before = torch.stack([value_vectors(lm, layer) for layer in layers]).float()
    with edit.on(lm):
        after = torch.stack([value_vectors(lm, layer) for layer in layers]).float()
    n = min(n, before.shape[0] * before.shape[1])
    top = (after - before).norm(dim=-1).flatten().topk(n).indices
    places = tuple((layers[int(i) // before.shape[1]], int(i) % before.shape[1]) for i in top)
    return places, before.flatten(0, 1)[top], after.flatten(0, 1)[top]


def token_ranks(lm: LM, values: Float[Tensor, "column d_vocab"], token: int) -> Int[np.ndarray, " column"]:
    """How many tokens have a larger value than this one, in every row."""
    ranks: np.ndarray = (values > values[:, token, None]).sum(1).cpu().numpy()
    return ranks


def _read(
    lm: LM, fact: Fact, places: Sequence[tuple[int, int]], vectors: Float[Tensor, "column d_model"]
) -> pd.DataFrame:
    """The rank of the new answer in vectors at some places, for both projections."""
    token = lm.target_ids(fact.text, fact.target_new or "")[0]
    parts = []
    for projection in get_args(Projection):
        read = [readable(lm, layer, vectors[i : i + 1], projection=projection) for i, (layer, _) in enumerate(places)]
        values = project(lm, torch.cat(read))
        parts.append(pd.DataFrame({
            "projection": projection, "column": range(len(places)), "layer": [layer for layer, _ in places],
            "neuron": [neuron for _, neuron in places], "answer": lm.word(token), "rank": token_ranks(lm, values, token),
            "words": [words(lm, row.tolist()) for row in values.topk(min(SHOWN, lm.d_vocab)).indices],
        }))  # fmt: skip
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table


def _signs(lm: LM, fact: Fact, places: Sequence[tuple[int, int]]) -> Float[Tensor, " column"]:
    """The signs of neurons' activations at the subject's last token; 1 for one that is silent."""
    keys = read_keys(lm, [fact], sorted({layer for layer, _ in places}))
    found = torch.stack([keys[layer][0, 0, neuron] for layer, neuron in places])
    return torch.where(found < 0, -1.0, 1.0)


def _wins(lm: LM, fact: Fact, edit: Edit) -> bool:
    """Whether the new answer is more probable than the old one after the edit; where none is named, whether it gained."""
    answer = fact.target_new or ""
    if not fact.target_true:
        own = float(log_p(lm, [fact.text], [answer])[0])
        with edit.on(lm):
            return float(log_p(lm, [fact.text], [answer])[0]) > own
    with edit.on(lm):
        new, old = log_p(lm, [fact.text] * 2, [answer, fact.target_true]).tolist()
    return bool(new > old)


def chart(result: Result) -> Chart:
    """Hit@k before and after, at the smallest and the largest k, for both projections and both ways to put columns together."""
    table = result.table[result.table["reading"] != "change"]
    table = table[table["k"].isin([table["k"].min(), table["k"].max()])]
    plots = []
    for (projection, over), one in table.groupby(["projection", "over"], sort=False):
        norm = "with" if projection == "normed" else "without"
        rows = pd.DataFrame({
            "label": one["editor"] + ", k = " + one["k"].astype(str), "series": one["reading"], "x": one["value"],
            "low": one["low"], "high": one["high"],
        })  # fmt: skip
        plots.append(
            DotPlot(rows=rows, x_title="Hit@k of the new answer", title=f"{over} of the columns, {norm} the final norm")
        )
    n, columns = table["n"].max(), result.extras["each"]["column"].max() + 1
    return Chart(
        title="The most changed columns in words",
        plots=tuple(plots),
        columns=2,
        caption=f"{n} facts; the {columns} value vectors that each edit changes most. Intervals: 95 % bootstrap over facts. "
        "Random: other value vectors of the same layers, before the edit.",
    )


def summary(result: Result) -> str:
    """Hit@k before and after by editor, with the final norm and over any column."""
    table = result.table[(result.table["projection"] == "normed") & (result.table["over"] == "any")]
    lines = []
    for editor, one in table.groupby("editor", sort=False):
        values = one.set_index(["reading", "k"])["value"]
        told = "; ".join(
            f"Hit@{k} {values['before', k]:.2f} -> {values['after', k]:.2f} (change alone {values['change', k]:.2f}, random "
            f"{values['random', k]:.2f})"
            for k in dict.fromkeys(one["k"])
        )
        lines.append(f"{editor}, {int(one['n'].iloc[0])} facts, any column, normed: {told}.")
    if left_out := result.run["left_out"]:
        lines.append("Left out: {}. The first: {}: {}".format(len(left_out), *next(iter(left_out.items()))))
    return "\n".join(lines)
