"""Do locators find the layers where facts are known to be, and does it matter to an editor?

The bundled models hold their facts in the MLPs of a band of layers, since they were trained so (docs/ground_truth.md); and what an
editor wrote is where it wrote it. Both are places that are known, on models made for it; neither says where a pretrained model
keeps its facts.

1. Every locator against the band, with each kind of site that it has, and over the tokens in four ways: the largest of all, and the
   mean at the subject's last token, over the subject, and at the last token. `default` is how its paper reads it, `best` what finds
   the band most often (chosen on these very facts, so an upper bound).
2. Every fact is edited at every layer by each editor. Efficacy: the new answer is more probable than the old one (ROME, arXiv
   2202.05262, sec. 3.4); after paraphrases likewise; specificity: after neighbors' prompts their own answer is still more probable
   than the new one. In layers below, inside and above the band. ROME says what it is told in every layer from which the answer can
   still be reached, inside the band or not: that an edit works does not show where the fact was.
3. A fact is overwritten by each editor at some layers, and each locator is asked on the edited model where the new answer is:
   hit@1, whether its largest value is at a layer that the edit changed, and the distance to the next of these layers. `untouched`
   is the hit of the same locator on the model without the edit: what it would have said anyway.

Editors are those of `analyses.layer_edits` in 2 (the prompt alone) and themselves, so set, in 3. A model without planted layers has
only 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.editing import edit_one
from analyses.injection import interval
from analyses.layer_edits import Ascent, EditorName, Moments, edit_every_layer, layer_editor, log_p_with, spans_of
from analyses.locating_effectiveness import against_band
from analyses.series import Located, locate_each
from workbench import zoo
from workbench.charts import CellPlot, Chart, DotPlot, LinePlot, Plot
from workbench.editors.memit import spread_over
from workbench.edits import Edit
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts, spread
from workbench.locators import Locator, locator_named
from workbench.models import LM
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.sites import Role
from workbench.store import Store

LocatorName = Literal[
    "ActivationPatching", "AttentionKnockout", "AttributionPatching", "CausalTrace", "CircuitEdges", "DirectLogitAttribution",
    "HardConcrete", "KnowledgeNeurons", "LogitLens", "RepresentationZeroing", "SubjectRelation", "ValueVectors",
]  # fmt: skip

TOKENS: dict[str, Role | None] = {
    "largest": None, "subject_last": "subject_last", "subject": "subject", "last": "last",
}  # fmt: skip
"""How a profile over layers is made of a map, by name."""

PAPERS: dict[str, tuple[str, str]] = {
    "ActivationPatching": ("resid_pre", "largest"),
    "AttentionKnockout": ("attn_out", "largest"),
    "AttributionPatching": ("mlp_out", "largest"),
    "CausalTrace": ("mlp_out", "subject_last"),
    "CircuitEdges": ("mlp_out", "largest"),
    "DirectLogitAttribution": ("mlp_out", "last"),
    "HardConcrete": ("mlp_post", "largest"),
    "KnowledgeNeurons": ("mlp_post", "largest"),
    "LogitLens": ("resid_post", "last"),
    "RepresentationZeroing": ("mlp_out", "largest"),
    "SubjectRelation": ("mlp_out", "subject_last"),
    "ValueVectors": ("mlp_post", "last"),
}
"""By locator, the kind of site and the tokens that its paper reads a layer from."""

EDIT_MEASURES = ("efficacy", "paraphrase", "specificity")
"""Columns of the extra table `edits` that are shares; larger is better."""


def planted(
    lm: LM,
    facts: Sequence[Fact],
    *,
    locators: tuple[LocatorName, ...] = (
        "AttributionPatching",
        "CausalTrace",
        "CircuitEdges",
        "DirectLogitAttribution",
        "LogitLens",
        "RepresentationZeroing",
    ),
    editors: tuple[EditorName, ...] = ("FT", "ROME", "MEMIT"),
    bound: float | None = None,
    probes: int = 2,
    inserted: int = 5,
    layers: tuple[int, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Scores locators against the planted layers, edits at every layer inside and outside of them, and asks where edits are.

    Args:
        lm: the model; a bundled one with a planted band, or any other for the third question alone.
        facts: with `target_true` and `target_new`; paraphrases and neighbors as far as they are there.
        locators: the methods that are asked.
        editors: FT and ROME change one layer, FT5 and MEMIT a window of them.
        bound: the most by which fine-tuning changes a weight, and twice of what FT5 may; none: no bound.
        probes: how many paraphrases and how many neighbors are scored.
        inserted: how many of the facts are overwritten one by one and then looked for.
        layers: where (0-based); none: a quarter and two thirds of the way up.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.
        store: where footprints, edits and scores of edits are kept.

    Returns:
        One row a number, with part (`locators`, `editors`, `inserted`), who (locator or editor), by (`default` and `best`;
        `below`, `inside`, `above`, or `across` an edge; the editor), where (the aggregation; empty; the layer), measure, value
        (mean over facts), low, high (95 % percentile bootstrap over facts) and n. Extras by fact: `locators`, `edits`, `inserted`;
        and `methods`, see `locate_each`.

    Raises:
        InputError: no fact can be used.
    """
    facts = [fact for fact in distinct_facts(facts, to="locate") if fact.target_true and fact.target_new]
    if not facts:
        raise FactError("No fact has both a target_true and a target_new. Give both answers.")
    if wrong := [layer for layer in layers if not 0 <= layer < lm.n_layers]:
        raise FactError(f"Layer {wrong[0]} was named, expected one of 0 to {lm.n_layers - 1}.")
    band = band_of(lm.name)
    left_out: dict[str, str] = {}
    ask = [locator_named(name).fitted(lm) for name in locators]
    bundled = Path(lm.name).name in zoo.NAMES  # then noise and substitutes do not depend on which facts were chosen
    reference = zoo.load_facts(Path(lm.name).name) if bundled else facts
    located = locate_each(lm, ask, facts, reference=reference, store=store)
    each: dict[str, pd.DataFrame] = {"locators": pd.DataFrame(), "edits": pd.DataFrame()}
    summaries = []
    if band is not None:
        each["locators"] = _against(located, band)
        each["edits"] = _edited(lm, facts, editors, band, bound, probes, left_out, store)
        summaries.append(_locators(each["locators"], resamples, seed))
        if not each["edits"].empty:
            summaries.append(_editors(each["edits"], resamples, seed))
    some = spread(facts, inserted)
    places = sorted({max(0, round(lm.n_layers * share) - 1) for share in (1 / 4, 2 / 3)})
    each["inserted"] = _inserted(lm, some, reference, ask, editors, layers or places, bound, located, left_out, store)
    if not each["inserted"].empty:
        summaries.append(_looked_for(each["inserted"], resamples, seed))
    if not summaries:
        raise FactError(
            f"No fact can be edited and located. The first: {next(iter(left_out.values()), 'none was given')}"
        )
    run_ = manifest(
        "planted", model=lm.protocol, parameters={"locators": locators, "editors": editors}, facts=facts, left_out=left_out,
        band=None if band is None else [band.start, band.stop],
        note="" if band is not None else f"{lm.name} has no planted layers, so only edits are looked for.",
        bootstrap={"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    return Result(table=pd.concat(summaries, ignore_index=True), run=run_, extras={**each, "methods": located.methods})


def band_of(name: str) -> range | None:
    """The planted layers of a bundled model, by its name or folder; None for any other."""
    name = Path(name).name
    band = zoo.organism(name).get("band") if name in zoo.NAMES else None
    return range(*band) if band else None


def _rows(
    part: str, who: str, by: str, where: str, values: dict[str, Any], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row a measure: the mean over facts with its interval."""
    rows = []
    for measure, own in values.items():
        numbers = np.asarray(own, dtype=float)
        numbers = numbers[np.isfinite(numbers)]
        low, high = interval(numbers, resamples=resamples, seed=seed)
        value = float(numbers.mean()) if len(numbers) else np.nan
        told = {"measure": measure, "value": value, "low": low, "high": high, "n": len(numbers)}
        rows.append({"part": part, "who": who, "by": by, "where": where, **told})
    return rows


# --- 1: locators against the band ---


def _against(located: Located, band: range) -> pd.DataFrame:
    """A row a locator, kind, aggregation and fact: hit, distance and auc."""
    n_layers = located.lm.n_layers
    inside = np.isin(np.arange(n_layers), band)
    rows = []
    for name, token in TOKENS.items():
        for one in located.series(n_layers, token):
            for fact, values in zip(one.values.index, one.values.to_numpy(), strict=True):
                found = against_band(values, inside)
                measured = {"hit": found["hit"], "distance": found["distance"], "auc": found["auc"]}
                rows.append({"method": one.method, "kind": one.kind, "tokens": name, "fact": fact, **measured})
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _locators(each: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Each locator as its paper reads it and at its best."""
    rows: list[dict[str, Any]] = []
    for method, own in each.groupby("method", sort=False):
        means = own.groupby(["kind", "tokens"], sort=False)[["hit", "auc"]].mean()
        best = max(means.index, key=lambda place: tuple(means.loc[place]))
        for by, place in (("default", PAPERS.get(str(method), best)), ("best", best)):
            mine = own[(own["kind"] == place[0]) & (own["tokens"] == place[1])]
            values = {measure: mine[measure].to_numpy() for measure in ("hit", "distance", "auc")}
            rows += _rows("locators", str(method), by, f"{place[0]}, {place[1]}", values, resamples, seed)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


# --- 2: editors at every layer ---


def _edited(
    lm: LM,
    facts: Sequence[Fact],
    editors: Sequence[EditorName],
    band: range,
    bound: float | None,
    probes: int,
    left_out: dict[str, str],
    store: Store | None,
) -> pd.DataFrame:
    """A row an editor, fact and layer with `EDIT_MEASURES`, `p_new`, and where what is changed lies: see `place_of`."""
    width = spread_over(lm)
    moments: dict[str, Moments] = {}
    chosen = {name: layer_editor(lm, name, bound=bound) for name in editors}
    parts = []
    for fact in track(facts, "facts", len(facts)):
        settings = {name: repr(editor) for name, editor in chosen.items()}
        asked = manifest(
            "Edits at every layer, success", model=lm.protocol, facts=[fact],
            parameters={"editors": settings, "width": width, "probes": probes},
        )  # fmt: skip
        kept = store.find(asked, Result) if store is not None else None
        try:
            table = kept.table if kept is not None else _success(lm, fact, chosen, moments, width, probes)
        except InputError as error:
            left_out[f"editors: {fact.id}"] = str(error)
            continue
        if store is not None and kept is None:
            store.save(Result(table=table, run=asked))
        parts.append(table)
    whole: pd.DataFrame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not parts:
        return whole
    spans = {name: spans_of(lm, name, width=width) for name in editors}
    whole["place"] = [
        place_of(spans[name][layer], band) for name, layer in zip(whole["editor"], whole["layer"], strict=True)
    ]
    return whole


def place_of(span: range, band: range) -> str:
    """Whether changed layers lie `below`, `inside` or `above` the band; `across` its edge where some of them are in it."""
    if span.stop <= band.start:
        return "below"
    if span.start >= band.stop:
        return "above"
    return "inside" if span.start >= band.start and span.stop <= band.stop else "across"


def _success(lm: LM, fact: Fact, editors: Any, moments: dict[str, Moments], width: int, probes: int) -> pd.DataFrame:
    """The rows of one fact."""
    new, old = fact.target_new or "", fact.target_true
    own = Ascent.of(lm, fact, new)
    edits = edit_every_layer(own, editors, moments, width=width)
    rows = [(name, layer) for name, made in edits.items() for layer in made]
    every = [edits[name][layer] for name, layer in rows]

    def log_p(prompt: Fact | str, answer: str) -> Float[np.ndarray, " row"]:
        """The mean log-probability of an answer's tokens with each edit."""
        ascent = own if prompt is fact and answer == new else Ascent.of(lm, prompt, answer)
        found: np.ndarray = log_p_with(ascent, every).mean(1).double().cpu().numpy()
        return found

    def wins(pairs: Sequence[tuple[Fact | str, str, str]]) -> Any:
        """How often the first answer is more probable."""
        return np.mean([log_p(prompt, a) > log_p(prompt, b) for prompt, a, b in pairs], axis=0) if pairs else np.nan

    neighbors = [one for one in fact.neighbors if one.target != new][:probes]
    table: pd.DataFrame = pd.DataFrame(rows, columns=["editor", "layer"]).assign(
        fact=fact.id,
        efficacy=wins([(fact, new, old)]),
        paraphrase=wins([(text, new, old) for text in fact.paraphrases[:probes]]),
        specificity=wins([(one.prompt, one.target, new) for one in neighbors]),
        p_new=np.exp(log_p(fact, new)),
    )
    return table


def _editors(each: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """By editor, below, inside and above the band: means over each fact's layers, then over facts."""
    rows: list[dict[str, Any]] = []
    for (editor, place), own in each.groupby(["editor", "place"], sort=False):
        means = own.groupby("fact")[[*EDIT_MEASURES, "p_new"]].mean()
        rows += _rows(
            "editors", str(editor), str(place), "", {str(c): means[c].to_numpy() for c in means}, resamples, seed
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


# --- 3: edits, looked for ---


def _inserted(
    lm: LM,
    some: Sequence[Fact],
    reference: Sequence[Fact],
    ask: Sequence[Locator],
    editors: Sequence[EditorName],
    layers: Sequence[int],
    bound: float | None,
    located: Located,
    left_out: dict[str, str],
    store: Store | None,
) -> pd.DataFrame:
    """A row a locator, editor, layer and fact: hit, distance, and the hit without the edit."""
    width = spread_over(lm)
    untouched = _profiles(located)
    steps = [(name, layer, fact) for name in editors for layer in layers for fact in some]
    rows = []
    for name, layer, fact in track(steps, "facts", len(steps)):
        span = spans_of(lm, name, width=width)[layer]
        try:
            edit = edit_one(lm, _at(lm, name, span, bound), fact, store=store)
            after = _asked_of(lm, edit, ask, fact, reference, store)
        except InputError as error:
            left_out[f"{name} at {layer}: {fact.id}"] = str(error)
            continue
        for missed in after.methods[after.methods["left_out"] > 0].to_dict("records"):
            left_out[f"{missed['method']} after {name} at {layer}: {fact.id}"] = str(missed["reason"])
        inside = np.isin(np.arange(lm.n_layers), span)
        for (method, _), values in _profiles(after).items():
            against = against_band(values, inside) if not inside.all() else {"hit": 1.0, "distance": 0.0}
            before = untouched.get((method, fact.id))
            rows.append({
                "locator": method, "editor": name, "layer": layer, "fact": fact.id, "hit": against["hit"],
                "distance": against["distance"],
                "untouched": np.nan if before is None else _hit(before, inside),
            })  # fmt: skip
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _at(lm: LM, name: EditorName, span: range, bound: float | None) -> Any:
    """An editor at some layers."""
    return replace(layer_editor(lm, name, bound=bound), layers=tuple(span))


def _asked_of(
    lm: LM, edit: Edit, ask: Sequence[Locator], fact: Fact, reference: Sequence[Fact], store: Store | None
) -> Located:
    """Where the edited model has the new answer."""
    turned = replace(fact, target_true=fact.target_new or "", target_new=fact.target_true)
    with edit.on(lm):
        return locate_each(lm, ask, [turned], reference=reference, store=store)


def _profiles(located: Located) -> dict[tuple[str, str], Float[np.ndarray, " layer"]]:
    """By locator and fact, the profile as its paper reads it."""
    found: dict[tuple[str, str], Float[np.ndarray, " layer"]] = {}
    for name, token in TOKENS.items():
        for one in located.series(located.lm.n_layers, token):
            if PAPERS.get(one.method, (one.kind, "largest")) == (one.kind, name):
                found |= {
                    (one.method, fact): row for fact, row in zip(one.values.index, one.values.to_numpy(), strict=True)
                }
    return found


def _hit(values: Float[np.ndarray, " layer"], inside: np.ndarray) -> float:
    values = np.where(np.isnan(values), -np.inf, values)
    return float(inside[values == values.max()].mean())


def _looked_for(each: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    known = each["untouched"].notna().groupby([each["locator"], each["editor"]]).transform("any")
    each = each[each["untouched"].notna() | ~known]  # with and without the edit, the same facts
    for (locator, editor, layer), own in each.groupby(["locator", "editor", "layer"], sort=False):
        values = {measure: own[measure].to_numpy() for measure in ("hit", "distance", "untouched")}
        rows += _rows("inserted", str(locator), str(editor), str(layer), values, resamples, seed)
    for (locator, editor), own in each.groupby(["locator", "editor"], sort=False):
        means = own.groupby("fact")[["hit", "distance", "untouched"]].mean()
        values = {str(measure): means[measure].to_numpy() for measure in means}
        rows += _rows("inserted", str(locator), str(editor), "all", values, resamples, seed)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


# --- what is shown ---


def chart(result: Result) -> Chart:
    """Locators against the band, edits by layer, and which locators find which edits."""
    table = result.table
    plots: list[Plot] = []
    n_layers = int(result.run["n_layers"])
    if result.run["band"]:
        band = range(*result.run["band"])
        hits = table[(table["part"] == "locators") & (table["measure"] == "hit")]
        dots = hits.assign(label=hits["who"], series=hits["by"], x=hits["value"], note=hits["where"])
        plots.append(
            DotPlot(
                rows=dots[["label", "series", "x", "low", "high", "note"]],
                x_title="Facts whose peak is in the band (hit@1)",
                title="Which locators find the planted layers?",
                lines={"chance": len(band) / n_layers},
            )
        )
        edits = result.extras["edits"]
        for measure, title in (
            (("efficacy", "Edits that work"), ("specificity", "Neighbors that stay")) if len(edits) else ()
        ):
            rows = []
            for (editor, layer), own in edits.groupby(["editor", "layer"], sort=False):
                low, high = interval(own[measure].to_numpy())
                rows.append({"series": editor, "x": layer, "y": own[measure].mean(), "low": low, "high": high})
            plots.append(LinePlot(rows=pd.DataFrame(rows), y_title=measure.capitalize(), title=title, shade=band))
    looked = table[(table["part"] == "inserted") & (table["measure"] == "hit") & (table["where"] != "all")]
    if len(looked):
        named = looked.assign(edit=looked["by"] + " at " + looked["where"])
        cells = named.pivot(index="who", columns="edit", values="value")[list(dict.fromkeys(named["edit"]))]
        plots.append(
            CellPlot(
                values=cells,
                name="hit@1",
                title="Which locators find an edit?",
                row_title="Locator",
                column_title="Editor at layer (0-based)",
                texts=cells.map(lambda value: f"{value:.2f}"),
                low=0.0,
                high=1.0,
            )
        )
    caption = (
        f"{len(result.run['facts'])} facts of {result.run['model']}; bands and bars: 95 % bootstrap over facts. Layers count "
        f"from 0. {result.run['note']}"
    )
    return Chart(title="Places that are known", plots=tuple(plots), columns=2, caption=caption.strip())


def summary(result: Result) -> str:
    """What was found in each of the three parts."""
    table = result.table

    def cell(row: Any) -> str:
        return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    lines = [result.run["note"]] if result.run["note"] else []
    own = table[(table["part"] == "locators") & (table["measure"] == "hit")]
    if len(own):
        band = range(*result.run["band"])
        chance = len(band) / int(result.run["n_layers"])
        lines.append(f"Peak in the planted layers {band.start} to {band.stop - 1} (hit@1; chance {chance:.2f}):")
        lines += [f"  {row['who']:>22} {row['by']:>7} {cell(row)}  {row['where']}" for row in own.to_dict("records")]
    own = table[table["part"] == "editors"]
    if len(own):
        lines.append("Edits of layers below, across an edge of, inside and above the band (means over layers):")
        for (editor, measure), rows in own[own["measure"] != "p_new"].groupby(["who", "measure"], sort=False):
            told = ", ".join(f"{row['by']} {cell(row)}" for row in rows.to_dict("records"))
            lines.append(f"  {editor:>5} {measure:>11}: {told}")
    own = table[(table["part"] == "inserted") & (table["where"] == "all")]
    if len(own):
        lines.append("An edit's layers are the locator's peak (hit@1; without the edit; layers away):")
        for (who, by), rows in own.groupby(["who", "by"], sort=False):
            values = rows.set_index("measure")
            hit, untouched, away = (cell(values.loc[name]) for name in ("hit", "untouched", "distance"))
            lines.append(f"  {who:>22} {by:>5}: {hit}; {untouched}; {away}")
    return "\n".join(lines)
