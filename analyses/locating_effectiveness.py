"""Do locating methods find what they are for? KLoB's three criteria (Ju et al., arXiv 2309.16535), and places that are known.

Claims: locations should agree for wordings of one fact (*consistency*) and for related facts (*relevance*), and prompts without a
fact should not have a location (*unbiasedness*). For causal tracing, Yao et al.'s survey (arXiv 2401.01286, sec. 5.2) found little
difference between related and unrelated facts once more than five layers are counted. KLoB knows no fact's true place. The bundled
models' places are known, since they were trained into them (`workbench.zoo`), so there a method is right or wrong: `ground_truth`.
A planted place is a known answer to test methods on, not evidence about pretrained models.

`python -m analyses.locating_effectiveness --help` tells how to print the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
import typer
from jaxtyping import Bool, Float
from scipy import stats

from analyses.fact_sets import nonsense as nonsense_facts
from analyses.fact_sets import same_subject, spread, unknown_facts, wordings
from analyses.injection import CHANCE, injection, interval
from analyses.series import Series, locate_each, top
from workbench.cli_parts import check_writable, one_sentence
from workbench.facts import Fact, FactError
from workbench.loading import load
from workbench.locators import Locator, all_locators
from workbench.locators.base import NeuronLocator
from workbench.models import LM
from workbench.results import Result
from workbench.sites import Role
from workbench.store import Store
from workbench.zoo import NAMES, load_facts, organism, owners

Measure = Literal["hit", "distance", "auc", "owner_hit", "owner_distance"]
"""What a fact's profile is compared with the planted place by, see `against_band`."""

MEASURES: tuple[Measure, ...] = get_args(Measure)

PLANTED = tuple(name for name in NAMES if organism(name)["band"] and name != "organism-tiny")
"""The bundled models with a planted band; the tiny one is for tests."""


# -- the two questions -------------------------------------------------------------------------------------------------


def locating_effectiveness(
    lm: LM,
    *,
    locators: Sequence[Locator],
    consistency: Sequence[Sequence[Fact]] = (),
    relevance: Sequence[Sequence[Fact]] = (),
    nonsense: Sequence[Fact] = (),
    reference: Sequence[Fact] = (),
    ks: Sequence[int] | None = None,
    neuron_ks: Sequence[int] = (1, 2, 5, 10, 20),
    token: Role | None = None,
    store: Store | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """KLoB's criteria for every series (a method and a kind of site).

    A fact's location is the k layers with the largest values of its profile (`workbench.profiles`), the lower layer first where
    values are equal; the paper leaves that open. Two locations are as similar as the share of layers that they have in common.
    Where a method has rows for single neurons, the same is measured with the k best neurons, `unit` neurons.

    - consistency and relevance: RSim = max((Sim_cand - Sim_all) / (1 - Sim_all), 0), where Sim_cand is the mean over sets of the
      mean similarity of a set's pairs, and Sim_all the mean over all pairs of facts that are in any set. One floor for the mean,
      not one for each set, which would lift chance above 0. With k = L all locations are equal, so there is no RSim.
    - unbiasedness: RSD = max(1 - SD_nonfactual / SD_factual, 0), each SD the mean over prompts of the standard deviation of the
      scores of one prompt's layers, in the method's own unit. So a method scores well as soon as nonsense gives small values.

    Args:
        lm: the model.
        locators: the methods.
        consistency: sets of facts with the same location: wordings of one fact (`analyses.fact_sets`, `workbench.data.klob`).
        relevance: sets of related facts; a fact may be in several sets.
        nonsense: prompts without a fact.
        reference: the facts that methods take a noise's scale or substitutes from; default: all facts given.
        ks: sizes of the locations, in layers; None: 1 to L.
        neuron_ks: sizes in neurons.
        token: the role of the tokens that count; None: the largest value over tokens.
        store: where single footprints are kept and looked for.
        resamples: bootstrap resamples, of sets for RSim (Sim_all stays), of prompts for RSD.
        seed: of the bootstrap.

    Returns:
        A Result with the columns measure, method, label, kind, unit, k (NA for unbiasedness), value, low and high (95 % percentile
        bootstrap), own (Sim_cand, or SD_nonfactual), all (Sim_all, or SD_factual), n (sets, or nonsense prompts). Extra: `methods`,
        see `locate_each`.

    Raises:
        FactError: nothing was given to compare, or no method can locate any of it.
    """
    grouped: dict[str, list[list[str]]] = {
        "consistency": [[fact.id for fact in one] for one in consistency],
        "relevance": [[fact.id for fact in one] for one in relevance],
    }
    sets = [*consistency, *relevance]
    factual = {fact.id: fact for one in sets for fact in one}
    empty = {fact.id: fact for fact in nonsense}
    if not factual:
        raise FactError("There is no set of facts to compare. Give sets for consistency or for relevance.")
    everything = [*{**factual, **empty}.values()]
    found = locate_each(lm, locators, everything, reference=reference or everything, store=store)
    layers = range(1, lm.n_layers + 1) if ks is None else ks
    rows: list[dict[str, Any]] = []
    for series in found.series(lm.n_layers, token):
        values = series.values
        sizes = [("layers", k, top(values.to_numpy(), k)) for k in layers]
        if series.neurons is not None:
            sizes += [("neurons", k, top(series.neurons, k)) for k in neuron_ks]
        for measure, groups in grouped.items():
            for unit, k, locations in sizes:
                if told := _relative_similarity(values.index, groups, locations, resamples, seed):
                    rows.append({"measure": measure, **series.name, "unit": unit, "k": k, **told})
        with_fact, without = (values[values.index.isin(ids)].to_numpy() for ids in (factual, empty))
        if len(with_fact) and len(without):
            deviation = _relative_deviation(with_fact, without, resamples, seed)
            rows.append({"measure": "unbiasedness", **series.name, "unit": "layers", "k": None, **deviation})
    if not rows:
        raise FactError(
            "No method located two facts of a set, so there is nothing to compare. See which facts were left out."
        )
    table = pd.DataFrame(rows).astype({"k": "Int64"}).sort_values("measure", kind="stable", ignore_index=True)
    told_of = {
        "sets": {name: len(groups) for name, groups in grouped.items()},
        "nonsense": len(empty),
        "token": token,
    }
    return found.result("locating_effectiveness", table, told_of, resamples=resamples, seed=seed)


def ground_truth(
    lm: LM,
    facts: Sequence[Fact],
    *,
    band: range,
    locators: Sequence[Locator],
    owner: Mapping[str, int] | None = None,
    reference: Sequence[Fact] = (),
    token: Role | None = None,
    store: Store | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Whether each series (a method and a kind of site) finds the layers whose MLPs hold the facts.

    Args:
        lm: the model.
        facts: the facts.
        band: the layers that hold them.
        locators: the methods.
        owner: by subject, the one layer of the band that holds its facts; None where that is not known.
        reference: the facts that methods take a noise's scale or substitutes from; default: `facts`.
        token: the role of the tokens that count; None: the largest value over tokens.
        store: where single footprints are kept and looked for.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.

    Returns:
        A Result with the columns method, label, kind, measure (see `against_band`), value (mean over facts), low and high (95 %
        percentile bootstrap over facts), n (facts). The first series, `chance`, is a profile that is the same in all layers, so
        its peak is any layer. Extras: `each`, the same by fact; `methods`, see `locate_each`.

    Raises:
        FactError: no facts, no layer outside or inside of the band, or no method can locate any of the facts.
    """
    inside = np.isin(np.arange(lm.n_layers), band)
    if not facts:
        raise FactError("There is no fact to locate. Give at least one.")
    if inside.all() or inside.sum() < len(band) or not len(band):
        raise FactError(
            f"The band is layers {band.start} to {band.stop - 1} of 0 to {lm.n_layers - 1}; expected some of them and not all."
        )
    found = locate_each(lm, locators, facts, reference=reference or facts, store=store)
    subjects = {fact.id: fact.subject for fact in facts}
    flat = pd.DataFrame(0.0, index=list(subjects), columns=range(lm.n_layers))
    everything = [Series(method=CHANCE, label=CHANCE, kind="", values=flat), *found.series(lm.n_layers, token)]
    rows = [
        {**series.name, "fact": fact, "measure": measure, "value": value}
        for series in everything
        for fact, values in zip(series.values.index, series.values.to_numpy(), strict=True)
        for measure, value in against_band(values, inside, owner=(owner or {}).get(subjects[fact])).items()
    ]
    each = pd.DataFrame(rows)
    factors = ["method", "label", "kind", "measure"]
    summary = []
    for group, own in each.groupby(factors, sort=False):
        values = own["value"].to_numpy()
        low, high = interval(values, resamples=resamples, seed=seed)
        mean = {"value": values.mean(), "low": low, "high": high, "n": len(values)}
        summary.append({**dict(zip(factors, group, strict=True)), **mean})
    told_of = {"band": list(band), "token": token, "owners": owner is not None}
    made = found.result("ground_truth", pd.DataFrame(summary), told_of, resamples=resamples, seed=seed)
    return Result(table=made.table, run=made.run, extras={**made.extras, "each": each})


def against_band(
    values: Float[np.ndarray, " layer"], inside: Bool[np.ndarray, " layer"], *, owner: int | None = None
) -> dict[Measure, float]:
    """How well one profile finds some layers.

    - `hit`: 1 where the layer with the largest value is one of them. Where several share the largest value, the share of those
    - `distance`: layers from the peak to the nearest of them, 0 inside; the mean where there are several peaks
    - `auc`: the probability that one of them has a larger value than a layer outside, a tie counting one half
    - `owner_hit`, `owner_distance`: the same against the one layer `owner`; left out where it is None
    """
    values = np.where(np.isnan(values), -np.inf, values)
    peaks, layers = np.flatnonzero(values == values.max()), np.arange(len(values))
    found: dict[Measure, float] = {
        "hit": float(inside[peaks].mean()),
        "distance": float(np.abs(peaks[:, None] - layers[inside]).min(1).mean()),
        "auc": area_under_curve(values, inside),
    }
    if owner is not None:
        found |= {"owner_hit": float((peaks == owner).mean()), "owner_distance": float(np.abs(peaks - owner).mean())}
    return found


def area_under_curve(values: Float[np.ndarray, " layer"], inside: Bool[np.ndarray, " layer"]) -> float:
    """The share of pairs of a layer inside and one outside in which the one inside has the larger value; ties count one half."""
    n, m = int(inside.sum()), int((~inside).sum())
    return float((stats.rankdata(values)[inside].sum() - n * (n + 1) / 2) / (n * m))


# -- KLoB's numbers ----------------------------------------------------------------------------------------------------


def overlap(sets: Bool[np.ndarray, "fact place"]) -> Float[np.ndarray, "fact fact"]:
    """|A n B| / max(|A|, |B|) for all pairs of sets, which is |A n B| / k where both have k places; 0 where both are empty."""
    counts = sets.astype(float)
    sizes = counts.sum(1)
    found: np.ndarray = counts @ counts.T / np.maximum(np.maximum.outer(sizes, sizes), 1)
    return found


def relative_similarity(own: float, everywhere: float) -> float:
    """RSim of a mean similarity inside of sets and one over all pairs; NaN where all pairs are equal."""
    return max((own - everywhere) / (1 - everywhere), 0.0) if everywhere < 1 else np.nan


def relative_deviation(nonfactual: float, factual: float) -> float:
    """RSD of two mean standard deviations; NaN where facts have no deviation."""
    return max(1 - nonfactual / factual, 0.0) if factual > 0 else np.nan


def _relative_similarity(
    ids: pd.Index[str],
    groups: Sequence[Sequence[str]],
    locations: Bool[np.ndarray, "fact place"],
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """RSim with its parts; None where no set has two facts that were located."""
    place = {fact: i for i, fact in enumerate(ids)}
    located = [[place[fact] for fact in group if fact in place] for group in groups]
    located = [group for group in located if len(group) > 1]
    if not located:
        return None
    members = sorted({i for group in located for i in group})
    similar = overlap(locations)
    within = np.array([np.mean([similar[pair] for pair in combinations(group, 2)]) for group in located])
    among = similar[np.ix_(members, members)]
    everywhere = float(among[np.triu_indices(len(members), 1)].mean())
    everywhere = 1.0 if np.isclose(everywhere, 1.0) else everywhere
    ends = interval(within, resamples=resamples, seed=seed)
    value, low, high = (relative_similarity(own, everywhere) for own in (float(within.mean()), *ends))
    return {"value": value, "low": low, "high": high, "own": within.mean(), "all": everywhere, "n": len(located)}


def _relative_deviation(
    factual: Float[np.ndarray, "fact layer"], nonfactual: Float[np.ndarray, "prompt layer"], resamples: int, seed: int
) -> dict[str, Any]:
    """RSD with its parts."""
    with_fact, without = np.nanstd(factual, axis=1), np.nanstd(nonfactual, axis=1)
    rng = np.random.default_rng(seed)
    drawn = [x[rng.integers(0, len(x), (resamples, len(x)))].mean(1) for x in (without, with_fact)]
    several = min(len(with_fact), len(without)) > 1
    values = [relative_deviation(*pair) for pair in zip(*drawn, strict=True)] if several else [np.nan]
    low, high = np.quantile(values, (0.025, 0.975))
    value = relative_deviation(float(without.mean()), float(with_fact.mean()))
    return {"value": value, "low": low, "high": high, "own": without.mean(), "all": with_fact.mean(), "n": len(without)}


# -- the command line --------------------------------------------------------------------------------------------------


def default_locators(lm: LM, names: Sequence[str] = (), *, without: Sequence[str] = ()) -> list[Locator]:
    """Every method of the workbench, or those of these names, as it is used by default on this model.

    Raises:
        FactError: there is no such method, or none is left.
    """
    return [all_locators()[name].fitted(lm) for name in chosen_methods(names, without=without)]


def chosen_methods(names: Sequence[str] = (), *, without: Sequence[str] = ()) -> list[str]:
    """The names of `default_locators`, which are known before a model is loaded; it raises what that does."""
    known = all_locators()
    for name in (*names, *without):
        if name not in known:
            raise FactError(f"There is no method {name!r}. Use one of {', '.join(known)}.")
    chosen = [name for name in known if (name in names or not names) and name not in without]
    if not chosen:
        raise FactError(f"Without {', '.join(without)} no method is left. Leave out fewer of them.")
    return chosen


def planted_models(names: Sequence[str] = ()) -> list[str]:
    """These bundled models, or all that the command line takes by default.

    Raises:
        FactError: one of them is none that facts were planted in.
    """
    planted = [name for name in NAMES if organism(name)["band"]]
    for name in names:
        if name not in planted:
            raise FactError(f"{name!r} is no bundled model with planted facts. Use one of {', '.join(planted)}.")
    return list(names or PLANTED)


def ground_truth_markdown(result: Result) -> str:
    """The table of `ground_truth` in Markdown: a row a series, the best area under the curve first; means with 95 % intervals."""
    heads: dict[Measure, str] = {
        "hit": "hit@1",
        "distance": "layers to band",
        "auc": "AUC",
        "owner_hit": "hit@1, owner",
        "owner_distance": "layers to owner",
    }
    methods, table = result.extras["methods"], result.table
    seconds = dict(zip(methods["method"], methods["seconds"], strict=True))
    there = [measure for measure in MEASURES if (table["measure"] == measure).any()]
    lines = ["| method | kind | " + " | ".join(heads[m] for m in there) + " | facts | s a fact |"]
    lines.append("|---|---|" + "--:|" * (len(there) + 2))
    order = table[table["measure"] == "auc"].sort_values("value", ascending=False, kind="stable")
    for label in order["label"]:
        own = table[table["label"] == label].set_index("measure")
        method, kind, n = own["method"].iloc[0], own["kind"].iloc[0], own["n"].iloc[0]
        time = f"{seconds[method]:.2f}" if seconds.get(method, np.nan) > 0 else ""
        lines.append(f"| {method} | {kind} | {' | '.join(_cell(own.loc[m]) for m in there)} | {n} | {time} |")
    return "\n".join(lines)


def effectiveness_markdown(result: Result, *, ks: Sequence[int] = (1, 3, 5)) -> str:
    """Some columns of the table of `locating_effectiveness` in Markdown: a row a series."""
    table = result.table[result.table["unit"] == "layers"]
    asked = [(measure, k) for measure in ("consistency", "relevance") for k in ks]
    lines = ["| method | kind | " + " | ".join(f"{measure}, k={k}" for measure, k in asked) + " | unbiasedness |"]
    lines.append("|---|---|" + "--:|" * (len(asked) + 1))
    for (method, kind), own in table.groupby(["method", "kind"], sort=False):
        found = [own[(own["measure"] == measure) & (own["k"] == k)] for measure, k in asked]
        found.append(own[own["measure"] == "unbiasedness"])
        lines.append(f"| {method} | {kind} | {' | '.join('' if r.empty else _cell(r.iloc[0]) for r in found)} |")
    return "\n".join(lines)


def injection_markdown(result: Result) -> str:
    """The table of `analyses.injection.injection` in Markdown: a row a method, recall at the number injected and its multiples."""
    columns = result.table[["scope", "multiple"]].drop_duplicates().sort_values(["scope", "multiple"])
    asked = list(columns.itertuples(index=False, name=None))
    lines = ["| method | " + " | ".join(f"by {scope}, {multiple}x" for scope, multiple in asked) + " | sequences |"]
    lines.append("|---|" + "--:|" * (len(asked) + 1))
    for method, own in result.table.groupby("method", sort=False):
        found = [own[(own["scope"] == scope) & (own["multiple"] == multiple)].iloc[0] for scope, multiple in asked]
        lines.append(f"| {method} | {' | '.join(map(_cell, found))} | {own['n'].iloc[0]} |")
    return "\n".join(lines)


def _cell(row: pd.Series[Any]) -> str:
    """A mean, and its interval where that has a width at two digits; empty where there is no mean."""
    value, low, high = (f"{row[name]:.2f}" for name in ("value", "low", "high"))
    if value == "nan":
        return ""
    return value if low == high else f"{value} [{low}, {high}]"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence()
def main(
    out: Annotated[
        Path, typer.Option(help="Folder for the results; a run that was stopped goes on from what is there.")
    ],
    model: Annotated[
        list[str] | None, typer.Option(help="A planted bundled model; may be repeated. Default: all.")
    ] = None,
    facts: Annotated[int, typer.Option(min=2, help="How many facts, spread over relations.")] = 30,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave this method out; may be repeated.")] = None,
    sets: Annotated[int, typer.Option(min=0, help="KLoB's criteria too, from so many facts and subjects.")] = 0,
    sequences: Annotated[int, typer.Option(min=0, help="Recall of injected neurons too, with so many sequences.")] = 0,
    seed: Annotated[int, typer.Option(help="Which facts, and of the bootstrap.")] = 0,
) -> None:
    """Which methods find the planted layers of the bundled models: tables in Markdown, and the results under `out`."""
    check_writable(out)
    models = planted_models(model or ())
    chosen_methods(method or (), without=without or ())
    for name in models:
        lm, known, store = load(name, device="cpu"), load_facts(name), Store(folder=out / "footprints")
        first, stop = organism(name)["band"]
        locators = default_locators(lm, method or (), without=without or ())
        truth = ground_truth(
            lm,
            spread(known, facts, seed=seed),
            band=range(first, stop),
            locators=locators,
            owner=owners(name),
            reference=known,
            store=store,
            seed=seed,
        )
        truth.save(out / f"{name}-ground-truth")
        typer.echo(
            f"\n{name}: layers {first} to {stop - 1} of 0 to {lm.n_layers - 1}\n\n{ground_truth_markdown(truth)}"
        )
        for row in truth.extras["methods"].to_dict("records"):
            if row["left_out"]:
                typer.echo(f"\n{row['method']} left out {row['left_out']} of {facts} facts. {row['reason']}")
        if sets:
            chosen = spread(known, sets, seed=seed)
            subjects = {fact.subject for fact in chosen}
            found = locating_effectiveness(
                lm,
                locators=locators,
                consistency=wordings(chosen),
                relevance=same_subject([fact for fact in known if fact.subject in subjects]),
                nonsense=nonsense_facts(name, sets, seed=seed),
                reference=known,
                store=store,
                seed=seed,
            )
            found.save(out / f"{name}-effectiveness")
            typer.echo(f"\n{effectiveness_markdown(found)}")
        if sequences:
            seekers = [locator for locator in locators if isinstance(locator, NeuronLocator)]
            recalled = injection(lm, unknown_facts(name, sequences, seed=seed), locators=seekers, seed=seed)
            recalled.save(out / f"{name}-injection")
            typer.echo(f"\n{injection_markdown(recalled)}")


if __name__ == "__main__":
    app()
