"""Which other facts does an edit hit, since their keys overlap with its own? The matrix P of superposition, tested by ROME's edits.

Hu et al. 2024, "Knowledge in Superposition" (arXiv 2408.07413, sections 3 and 4). ROME gives W' = W + (v* - W k_e) (C^-1 k_e)^T /
(k_e^T C^-1 k_e), so that the value of any other key k_j moves by

    p(k_e, k_j) (v* - W k_e)    with    p(k_e, k_j) = k_e^T C^-1 k_j / k_e^T C^-1 k_e.

P is 1 on its diagonal and not symmetric. Claim: it is not 0 beside the diagonal in any layer; its entries have a mean near 0 and
heavy tails; the larger their kurtosis, the less the facts overlap; early layers and large models have more of it.

1. Keys: inputs of the down projections at the last token of the subject; C as ROME takes it. P in every layer.
2. Kurtosis (Fisher's, 0 for a normal distribution) over the pairs of facts with different subjects; its interval resamples facts.
3. Some facts are edited by ROME, each alone, in ROME's layer. The edited model is run on every fact's prompt, and what its down
   projection gives at the subject is compared with what it gave: in units of the edited fact's own change, `measured`.

With one key, the prompt's own (`alone`), p and `measured` are the same number but for rounding. ROME as published (`averaged`)
takes the mean key over contexts for the direction of the change: then p says roughly which facts are hit, no longer by how
much; with the mean key in place of k_e in both products, `own`, the algebra is exact again.

Where we depart: the keys are those of the facts' prompts, as in the edits, or of the bare subject, as published (`where`); the
published figures have no intervals and no measured interference. The bundled models name many subjects by the same few first and
last names, and ask several facts of one subject: pairs with one subject are told apart and do not count for the kurtosis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from analyses.answers import log_p
from analyses.editing import edit_each
from workbench.charts import CellPlot, Chart, LinePlot, Plot, ScatterPlot
from workbench.editors._values import checked_layers, read_keys, read_values, solve, write_prefixes
from workbench.editors.rome import Rome
from workbench.edits import EditError
from workbench.errors import InputError
from workbench.facts import SLOT, Fact, FactError, distinct_facts, spread
from workbench.models import LM
from workbench.moments import second_moments
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.store import Store

KeyKind = Literal["alone", "averaged"]
"""Which key ROME takes for the direction: the prompt's own, or its mean over contexts, as published."""


SHOWN = 12
"""Of so many facts, at most, the matrix is drawn."""


def superposition(
    lm: LM,
    facts: Sequence[Fact],
    *,
    layers: tuple[int, ...] | None = None,
    where: Literal["prompt", "subject"] = "prompt",
    edits: int = 20,
    keys: tuple[KeyKind, ...] = ("alone", "averaged"),
    moment_tokens: int = 20_000,
    corpus: str = "",
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """P by layer, and the interference that it predicts against the one that ROME edits cause.

    Args:
        lm: the model.
        facts: at least two, best of different subjects; those with `target_new` can be edited.
        layers: layers (0-based) of which P is taken; none: all.
        where: whether keys are read in the fact's prompt, or after the bare subject, as published. Edits use the prompt.
        edits: how many facts are edited, spread over those given; 0 for none.
        keys: which keys give the direction of the edits: the prompt's own (alone), or the mean over contexts (averaged).
        moment_tokens: tokens of text of which C is taken.
        corpus: that text; empty: the bundled models' own documents.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.
        store: where edits are kept.

    Returns:
        One row a layer: `kurtosis` with `low` and `high`, `size` (mean |p|), `mean` (of p), `cosine` (mean |cosine| of two keys),
        `whitened` (the same after C^-1/2), `n` (pairs of different subjects; where there is none, the rest is NaN). Extras: `pairs`
        (fact, other, layer, p, cosine, same_subject) and `interference` (keys, layer, fact: the edited one, other, same_subject, p,
        own, measured; `size`, the length of the change of the other's value, `delta`, that of the edited one's; `lost`, by how much
        the log-probability of the other's true answer fell; NaN where it has none).

    Raises:
        FactError: fewer than two facts.
        InputError: C can be inverted in no layer.
        MomentsError: a model that is not bundled, and no corpus.
    """
    facts = distinct_facts(facts, to="compare")
    other = ~_same_subject(facts)
    if len(facts) < 2:
        raise FactError(f"{facts[0].id!r} is the only fact, so there is nothing to compare it with. Give at least two.")
    left_out: dict[str, str] = {}
    rows, pairs = [], []
    chosen = range(lm.n_layers) if layers is None else checked_layers(lm, layers)
    moments = second_moments(lm, list(chosen), corpus=corpus, tokens=moment_tokens)
    read = read_keys(lm, [replace(f, prompt=SLOT) for f in facts] if where == "subject" else facts, list(chosen))
    for layer in track(chosen, "layers", len(chosen)):
        k = read[layer][:, 0].double().cpu()
        try:
            inner = inner_products(k, k, moments.matrix(layer))
        except EditError as error:
            left_out[f"layer {layer}"] = str(error)
            continue
        p = (inner / inner.diagonal()[:, None]).numpy()
        cosine, whitened = _cosines((k @ k.T).numpy()), _cosines(inner.numpy())
        low, high = _kurtosis_interval(p, other, resamples=resamples, seed=seed)
        found = {"kurtosis": p, "size": np.abs(p), "mean": p, "cosine": np.abs(cosine), "whitened": np.abs(whitened)}
        means = {name: one[other].mean() if other.any() else np.nan for name, one in found.items()}
        means["kurtosis"] = stats.kurtosis(p[other]) if len(np.unique(p[other])) > 1 else np.nan
        rows.append({"layer": layer, **means, "low": low, "high": high, "n": int(other.sum())})
        pairs.append(_pairs(facts, layer=layer, p=p, cosine=cosine, same_subject=~other))
    if not rows:
        raise InputError(f"C can be inverted in no layer. The first: {next(iter(left_out.values()))}")
    options = {"moment_tokens": moment_tokens, "corpus": corpus}
    interference = _interference(lm, facts, edits=edits, keys=keys, options=options, left_out=left_out, store=store)
    parameters = {"layers": layers, "where": where, "edits": edits, "keys": keys, **options, "seed": seed}
    run = manifest(
        "superposition", model=lm.protocol, parameters=parameters, facts=facts, left_out=left_out, text=moments.source,
        tokens=moments.n, bootstrap={"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    extras = {"pairs": pd.concat(pairs, ignore_index=True), "interference": interference}
    return Result(table=pd.DataFrame(rows), run=run, extras=extras)


def inner_products(
    keys: Float[Tensor, "key d_mlp"], others: Float[Tensor, "other d_mlp"], moment: Float[Tensor, "d_mlp d_mlp"]
) -> Float[Tensor, "key other"]:
    """k^T C^-1 k' of every key with every other one, in float64.

    Neurons that neither the text nor any key activates are left out; see `workbench.editors._values.solve`.

    Raises:
        EditError: C cannot be inverted.
    """
    solved, _ = solve(moment, others.T, what="The second moment of the keys")
    return keys.detach().cpu().double() @ solved


_INTERFERENCE = (
    "keys", "layer", "fact", "other", "same_subject", "p", "own", "measured", "size", "delta", "lost",
)  # fmt: skip


def _interference(
    lm: LM,
    facts: Sequence[Fact],
    *,
    edits: int,
    keys: Sequence[KeyKind],
    options: Mapping[str, Any],
    left_out: dict[str, str],
    store: Store | None,
) -> pd.DataFrame:
    """What ROME edits of some facts do to the values of all, and what P says about it."""
    chosen = spread([fact for fact in facts if fact.target_new], edits)
    parts = [pd.DataFrame(columns=list(_INTERFERENCE))]
    if chosen and keys:
        rome = Rome.fitted(lm, **options).resolved(lm, chosen)
        rome = replace(rome, layers=(rome.layers or (0,))[:1])
        (layer,) = rome.layers or ()
        (moment,) = rome.moments(lm).values()
        bare = read_keys(lm, facts, [layer])[layer][:, 0].double().cpu()
        inner = inner_products(bare, bare, moment)
        p = inner / inner.diagonal()[:, None]
        before = read_values(lm, facts, layer, "down_out").double().cpu()
        known = _log_p_true(lm, facts)
        kinds = {"alone": replace(rome, prefix_lengths=()), "averaged": rome}
        prefixes = {name: write_prefixes(lm, one.prefix_lengths, seed=one.seed) for name, one in kinds.items()}
        place = {fact.id: index for index, fact in enumerate(facts)}
        same = _same_subject(facts)
        editors = {name: kinds[name] for name in get_args(KeyKind) if name in keys}
        for name, fact, edit in edit_each(lm, editors, chosen, left_out=left_out, store=store):
            e = place[fact.id]
            direction, _ = rome.keys(read_keys(lm, [fact], [layer], prefixes[name])[layer][0].double().cpu())
            along = inner_products(direction[None], bare, moment)[0]
            with edit.on(lm):
                change = read_values(lm, facts, layer, "down_out").double().cpu() - before
                lost = known - _log_p_true(lm, facts)
            delta = change[e]
            table = pd.DataFrame({
                "keys": name, "layer": layer, "fact": fact.id, "other": [one.id for one in facts], "same_subject": same[e],
                "p": p[e], "own": along / along[e], "measured": change @ delta / delta.square().sum(),
                "size": change.norm(dim=1), "delta": float(delta.norm()), "lost": lost,
            })  # fmt: skip
            parts.append(table.drop(index=e))
    whole: pd.DataFrame = pd.concat(parts[1:] or parts, ignore_index=True)
    return whole


def _log_p_true(lm: LM, facts: Sequence[Fact]) -> np.ndarray:
    """By fact the log-probability of its true answer; NaN where none is named."""
    found = np.full(len(facts), np.nan)
    named = [index for index, fact in enumerate(facts) if fact.target_true]
    if named:
        own = [facts[index] for index in named]
        found[named] = log_p(lm, [fact.text for fact in own], [fact.target_true for fact in own]).double().numpy()
    return found


def _same_subject(facts: Sequence[Fact]) -> Bool[np.ndarray, "fact other"]:
    subjects = np.array([fact.subject for fact in facts])
    same: np.ndarray = subjects[:, None] == subjects[None]
    return same


def _cosines(inner: Float[np.ndarray, "fact other"]) -> Float[np.ndarray, "fact other"]:
    length = np.sqrt(inner.diagonal())
    cosines: np.ndarray = inner / length[:, None] / length[None]
    return cosines


def _pairs(facts: Sequence[Fact], *, layer: int, **values: np.ndarray) -> pd.DataFrame:
    """Matrices as rows of pairs of different facts."""
    first, second = np.nonzero(~np.eye(len(facts), dtype=bool))
    ids = np.array([fact.id for fact in facts])
    table: pd.DataFrame = pd.DataFrame(
        {"fact": ids[first], "other": ids[second], "layer": layer, **{n: v[first, second] for n, v in values.items()}}
    )
    return table


def _kurtosis_interval(
    p: Float[np.ndarray, "fact other"], counted: Bool[np.ndarray, "fact other"], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap over facts of the kurtosis of the pairs that count; NaN where it is not defined.

    A fact drawn w times stands for w facts, so a pair counts the product of its facts' weights; the power sums are then products
    of matrices.
    """
    n = len(p)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    if not counted.any():
        return np.nan, np.nan
    centred = p - p[counted].mean()
    sums = [np.einsum("ri,ij,rj->r", weights, counted * centred**power, weights, optimize=True) for power in range(5)]
    with np.errstate(divide="ignore", invalid="ignore"):
        m1, m2, m3, m4 = (one / sums[0] for one in sums[1:])
        variance = m2 - m1**2
        drawn = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 - 3
    drawn = drawn[np.isfinite(drawn) & (variance > 1e-12 * m2.max(initial=0.0))]
    if len(drawn) < 2:
        return np.nan, np.nan
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def agreement(interference: pd.DataFrame) -> pd.DataFrame:
    """How well interference is predicted, by `keys`.

    Returns:
        A table with keys, correlation (Pearson's, of p and measured), largest (difference of the two), own (the largest of own and
        measured), lost (Spearman's, of the length of the other value's change and the log-probability that its answer lost), n.
    """
    rows = []
    for name, one in interference.groupby("keys", sort=False):
        told = one.dropna(subset="lost")
        varied = len(told) > 2 and told["size"].nunique() > 1 and told["lost"].nunique() > 1
        rows.append({
            "keys": name, "correlation": one["p"].corr(one["measured"]) if len(one) > 2 else np.nan,
            "largest": (one["p"] - one["measured"]).abs().max(), "own": (one["own"] - one["measured"]).abs().max(),
            "lost": stats.spearmanr(told["size"], told["lost"]).statistic if varied else np.nan, "n": len(one),
        })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def chart(result: Result) -> Chart:
    """Kurtosis and cosines by layer, P in the edited layer, and predicted against measured interference."""
    table, interference = result.table, result.extras["interference"]
    kurtosis = table.rename(columns={"layer": "x", "kurtosis": "y"}).assign(series="P, other subjects")
    names = {"cosine": "keys", "whitened": "keys after C^-1/2"}
    cosines = pd.concat([
        pd.DataFrame({"series": label, "x": table["layer"], "y": table[name]}) for name, label in names.items()
    ])  # fmt: skip
    shown = int(interference["layer"].iloc[0]) if len(interference) else -1
    layer = shown if shown in set(table["layer"]) else int(table["layer"].iloc[0])
    curves = (
        LinePlot(
            rows=kurtosis.dropna(subset="y"), y_title="Excess kurtosis of p", title="Heavier tails: less superposition"
        ),
        LinePlot(rows=cosines.dropna(subset="y"), y_title="Mean |cosine| of two", title="Are keys orthogonal?"),
    )
    plots: list[Plot] = [curve for curve in curves if len(curve.rows)]  # none where all facts have one subject
    if len(interference):
        plots.append(ScatterPlot(
            rows=pd.DataFrame({
                "series": interference["keys"].map({"alone": "key of the prompt", "averaged": "key averaged, as published"}),
                "x": interference["p"], "y": interference["measured"],
                "note": interference["fact"] + " on " + interference["other"],
            }),
            x_title="Predicted: p", y_title="Measured (1: as the edited fact)", title=f"ROME edits in layer {shown}",
            diagonal=True,
        ))  # fmt: skip
    pairs = result.extras["pairs"]
    facts = list(dict.fromkeys(pairs["fact"]))
    ids = facts[:: -(-len(facts) // SHOWN)]
    matrix = pairs[pairs["layer"] == layer].pivot(index="fact", columns="other", values="p")
    matrix = matrix.reindex(index=ids, columns=ids).where(~np.eye(len(ids), dtype=bool), 1.0)
    plots.append(CellPlot(
        values=matrix, name="p", title=f"P in layer {layer}, {len(ids)} of the facts", row_title="Edited fact",
        column_title="Other fact", low=-1.0, high=1.0, signed=True,
    ))  # fmt: skip
    edited = interference["fact"].nunique()
    return Chart(
        title="Knowledge in superposition",
        plots=tuple(plots),
        columns=2,
        caption=f"{len(facts)} facts, {table['n'].iloc[0]} pairs of different subjects; {edited} facts edited. "
        "Band: 95 % bootstrap over facts. Layers count from 0.",
    )


def summary(result: Result) -> str:
    """Kurtosis over the layers, and how well the interference of edits is predicted."""
    table, interference = result.table.sort_values("kurtosis"), result.extras["interference"]
    least, *_, most = [dict(row) for row in table.to_dict("records") * 2]
    told = [
        "in layer {layer} ({kurtosis:.1f}, ".format(**one)
        + (
            "95 % {low:.1f} to {high:.1f})".format(**one)
            if np.isfinite(one["low"])
            else "too few facts for an interval)"
        )
        for one in (most, least)
    ]
    lines = [
        f"Kurtosis of P over {most['n']} pairs of different subjects: largest {told[0]}, smallest {told[1]}; layers from 0.",
        f"Mean |cosine| of two keys over the layers: {table['cosine'].mean():.3f}, whitened {table['whitened'].mean():.3f}.",
    ]
    lines += [
        "ROME in layer {layer}, key {keys}: p and measured interference correlate by {correlation:.4f} over {n} pairs; largest "
        "difference {largest:.1e}, with the edit's own key {own:.1e}. Rank correlation of the other value's change with the "
        "log-probability that the other answer lost: {lost:.2f}.".format(
            **{str(name): value for name, value in row.items()}, layer=interference["layer"].iloc[0]
        )
        for row in agreement(interference).to_dict("records")
    ]
    if left_out := result.run["left_out"]:
        lines.append("Left out: {}. The first: {}: {}".format(len(left_out), *next(iter(left_out.items()))))
    return "\n".join(lines)
