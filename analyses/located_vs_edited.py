"""Is a fact edited where it is located? Locators and editors side by side: where each says, or puts, how much of a fact, by layer.

Claim under test (Hase et al. 2023, arXiv 2301.04213): where causal tracing finds a fact says next to nothing about where it is best
edited. ROME and MEMIT (arXiv 2202.05262, sec. 2 and 3; 2210.07229, sec. 4.2) chose their layers by tracing. This analysis asks the
question before that one, which both leave open: do the two places agree at all, for which methods, and fact by fact or in general?

1. Every fact is located by every locator, and edited alone by every editor. What each says is one number a layer: of a locator the
   largest effect over tokens (`workbench.profiles`), of an edit how much it changes there.
2. Both become *mass*: negative values count 0, and each fact's layers add up to 1.
3. For every locator and editor the two profiles of a fact are compared: `overlap` (sum of the smaller of the two, 0 to 1),
   `spearman` (of the layers' masses), `earth_mover` (in layers: how far mass has to be carried; 1-Wasserstein) and `peak_distance`
   (in layers; of equal peaks the lower one). Means over facts, 95 % percentile bootstraps over facts.
4. Two permutation tests, one-sided. `p`: the layers of the edits' profiles are shuffled, for all facts alike: could layers chosen
   without looking agree as well? Neighbouring layers are alike, which no shuffle keeps, so that a small p says less than it seems
   to. `p_fact`: whole edited profiles are shuffled over facts: does an edit agree with *its* fact more than with another one?

How to read it. In the reading `weights`, edited mass is the relative norm |dW| / |W| of a layer's changed matrices. Which layers
these are is mostly the editor's hyperparameter: a preset, or a trace that the editor itself made. That it agrees with a locator is
then no finding about a fact but about whoever chose the layer, and where all facts are edited in one layer the profile is the same
for all, so that `p_fact` is 1. The extra table `editors` tells who chose. The reading `activations` is a second one: how much the
MLP's outputs move on the fact's own prompt, |x' - x| / |x|, the largest over tokens. It differs from fact to fact, and holds for
editors that change no weight (memories, texts before the prompt), which are read so in either case; the column `source` says which.
What follows the edited layer moves along, so that this mass lies higher than the change that causes it.

A locator that restores windows of layers (CausalTrace) smears its mass over them, and its overlap with a single layer is bounded by
that. In the bundled organisms facts were planted in a band of layers, and their editors' presets were put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from analyses.editing import edit_each, fitted_editors
from analyses.injection import interval
from workbench import zoo
from workbench.charts import CellPlot, Chart, LinePlot
from workbench.cli_parts import planted_band
from workbench.edit_footprints import KINDS_SHOWN, functional_footprint, weight_footprint
from workbench.editors.base import Editor
from workbench.edits import Edit
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts
from workbench.locators import Locator, locate, locator_named
from workbench.models import LM
from workbench.profiles import layer_profiles, mass_centre
from workbench.results import Footprint, Result, manifest
from workbench.sites import Role, SiteKind
from workbench.store import Store

MEASURES = {
    "overlap": "shared mass, 0 to 1",
    "spearman": "rank correlation of layers",
    "earth_mover": "mass to carry, layers",
    "peak_distance": "distance of peaks, layers",
}
"""How a located and an edited profile are compared, and in which unit."""

CLOSER_WHEN_SMALL = ("earth_mover", "peak_distance")
"""Those that are distances."""

_CLOSE = 1e-9
"""Two values that differ by less are equal: the same number by another order of sums."""


def located_vs_edited(
    lm: LM,
    facts: Sequence[Fact],
    *,
    locators: tuple[str, ...] = (
        "CausalTrace",
        "ActivationPatching",
        "RepresentationZeroing",
        "DirectLogitAttribution",
    ),
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    reading: Literal["weights", "activations"] = "weights",
    kinds: tuple[SiteKind, ...] = ("mlp_out", "mlp_post"),
    token: Role | None = None,
    permutations: int = 2000,
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Locates and edits every fact, and compares where.

    Args:
        locators: the locating methods.
        editors: the editing methods, with the presets of this model.
        reading: what counts as edited: the change of the weights, or that of the activations on the fact's prompt.
        kinds: the kinds of sites that are looked at; a locator's other ones are left out.
        token: located at tokens of this role; none: at whatever token the effect is largest.
        permutations: how many shuffles are drawn for each test.
        resamples: bootstrap resamples of the facts.
        seed: of shuffles and resamples.

    Returns:
        One row a fact, method, kind and layer: `value` in the method's own unit, `located` or `edited` mass (the other one is
        missing), and `source`: `locator`, `weights` or `activations`. Extras:

        - `agreement`: locator, kind, editor, measure, value (mean over facts), low, high, n, p, p_adjusted (Benjamini and Hochberg,
          within a measure), others (mean between different facts), p_fact, p_fact_adjusted
        - `each`: the same by fact: fact, locator, kind, editor, measure, value
        - `profiles`: side, method, kind, layer, mass (mean over facts), low, high, n
        - `places`: side, method, kind, fact, peak, centre (of mass), planted (share of the mass in the planted layers)
        - `editors`: editor, layers (that it changed), chosen (who chose them), source

    Raises:
        FactError: no fact could both be located by one of the locators and edited by one of the editors.
    """
    facts = distinct_facts(facts, to="locate and edit")
    left_out: dict[str, str] = {}
    located = [_located(lm, facts, name, kinds, token, left_out, store) for name in locators]
    edited, told = _edited(lm, facts, fitted_editors(lm, editors), reading, kinds, left_out, store)
    rows = pd.concat([*located, edited], ignore_index=True)
    if not len(rows) or rows.groupby("fact")["side"].nunique().max() < 2:
        why = next(iter(left_out.values()), "no locator and editor was named")
        raise FactError(f"No fact could be both located and edited. The first reason: {why}")
    rows["mass"] = _masses(rows)
    grids = {
        (str(side), str(method), str(kind)): own.pivot(index="fact", columns="layer", values="mass").dropna()
        for (side, method, kind), own in rows.groupby(["side", "method", "kind"], sort=False)
    }
    band = planted_band(lm.name)
    agreement, each = _agreement(grids, permutations=permutations, resamples=resamples, seed=seed)
    extras = {
        "agreement": agreement, "each": each, "profiles": _profiles(grids, resamples=resamples, seed=seed),
        "places": _places(grids, band), "editors": told,
    }  # fmt: skip
    run = manifest(
        "located_vs_edited", model=lm.protocol, facts=facts, left_out=left_out,
        parameters={
            "locators": locators, "editors": editors, "reading": reading, "kinds": kinds, "token": token,
            "permutations": permutations, "resamples": resamples, "seed": seed,
        },
        planted=list(band) if band else None,
    )  # fmt: skip
    table = rows.assign(
        located=rows["mass"].where(rows["side"] == "located"), edited=rows["mass"].where(rows["side"] == "edited")
    )
    columns = ["fact", "layer", "kind", "method", "located", "edited", "value", "source"]
    return Result(table=table[columns], run=run, extras=extras)


def masses(values: Float[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch layer"]:
    """Profiles as shares that add up to 1, negative values as 0; NaN where none is above 0."""
    weight = np.maximum(values, 0.0)
    total = weight.sum(-1, keepdims=True)
    found: np.ndarray = np.divide(weight, total, out=np.full(weight.shape, np.nan), where=total > 0)
    return found


def compare(
    located: Float[np.ndarray, "*batch layer"], edited: Float[np.ndarray, "*batch layer"]
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """The `MEASURES` of profiles of masses, which are broadcast against each other; `spearman` is NaN where one is flat."""
    return _compare(located, _ranks(located), edited, _ranks(edited))


def chart(result: Result) -> Chart:
    """Located above, edited below the axis, by layer; and which locator agrees with which editor."""
    run, profiles = result.run, result.extras["profiles"]
    agreement = result.extras["agreement"].assign(row=lambda table: table["locator"] + " " + table["kind"])
    matrices = tuple(
        CellPlot(
            values=_matrix(own, "value"), texts=_matrix(own, "text"), notes=_matrix(own, "note"),
            texts_are="mean, and p of a shuffle of the layers", name=unit,
            title=f"{measure.replace('_', ' ').capitalize()}: locator against editor",
            row_title="Locator", column_title="Editor", low=0.0 if measure != "spearman" else -1.0,
            high=1.0 if measure in ("overlap", "spearman") else None, signed=measure == "spearman",
        )
        for measure, unit in MEASURES.items()
        for own in [_in_words(agreement[agreement["measure"] == measure])]
    )  # fmt: skip
    n, kinds = int(result.extras["agreement"]["n"].max()), profiles["kind"].unique()
    return Chart(
        title="Located and edited",
        plots=(_overlay(profiles, run, title="Where facts are located, and where they are edited"), *matrices),
        caption=f"Shares of mass{' in ' + kinds[0] if len(kinds) == 1 else ''} by layer (0-based), means over {n} facts with "
        "95 % bootstrap intervals; above the axis located, "
        f"below it edited ({_source(result)}). {_chosen(result)}".strip(),
    )


def fact_chart(result: Result, *, fact: str) -> Chart:
    """The same for one fact.

    Raises:
        FactError: the result has no such fact.
    """
    rows = result.table[result.table["fact"] == fact]
    if rows.empty:
        raise FactError(f"There is no fact {fact!r}. Take one of {', '.join(result.table['fact'].unique()[:5])}.")
    side = np.where(rows["located"].notna(), "located", "edited")
    own = rows.assign(side=side, mass=rows["located"].fillna(rows["edited"])).dropna(subset="mass")
    each = result.extras["each"]
    each = each[each["fact"] == fact].assign(row=lambda table: table["locator"] + " " + table["kind"])
    overlap = each[each["measure"] == "overlap"].assign(text=lambda table: table["value"].map("{:.2f}".format))
    return Chart(
        title=f"Located and edited: {fact}",
        plots=(
            _overlay(own, result.run, title=fact),
            CellPlot(
                values=_matrix(overlap, "value"), texts=_matrix(overlap, "text"), name=MEASURES["overlap"],
                title="Overlap: locator against editor", row_title="Locator", column_title="Editor", low=0.0, high=1.0,
            ),
        ),
        caption=f"One fact: shares of mass by layer (0-based), above the axis located, below it edited ({_source(result)}).",
    )  # fmt: skip


def summary(result: Result) -> str:
    """For every locator and editor how well they agree; and whether anything is known about single facts."""
    agreement, places = result.extras["agreement"], result.extras["places"]
    lines = [f"Located mass against edited mass ({_source(result)}), means over facts [95 % interval]:"]
    for (locator, kind, editor), own in agreement.groupby(["locator", "kind", "editor"], sort=False):
        of = own.set_index("measure").loc[list(MEASURES)]
        told = ", ".join(f"{name.replace('_', ' ')} {_value(row)}" for name, row in of.iterrows())
        p, p_fact = of.loc["overlap", ["p_adjusted", "p_fact_adjusted"]]
        lines.append(f"  {locator} {kind} / {editor}: {told}; adjusted p {p:.2g}, by facts {p_fact:.2g}")
    lines.append(
        "p: as large an overlap with the layers shuffled; by facts: with the facts shuffled, each edit against another's place."
    )
    band = result.run.get("planted")
    if band:
        chance = len(band) / int(result.run["n_layers"])
        lines.append(
            f"Share of the mass in the planted layers {', '.join(map(str, band))} "
            f"(layers count from 0; evenly spread: {chance:.2f}):"
        )
        means = places.groupby(["side", "method", "kind"], sort=False)["planted"].mean().reset_index()
        lines += [f"  {row.side}: {row.method} {row.kind} {row.planted:.2f}" for row in means.itertuples()]
    return "\n".join([*lines, _chosen(result).strip()]).strip()


# --- located and edited ---


def _located(
    lm: LM, facts: Sequence[Fact], name: str, kinds: Sequence[SiteKind], token: Role | None, left_out: dict[str, str],
    store: Store | None,
) -> pd.DataFrame:  # fmt: skip
    """One locator's profiles; the facts that it cannot take go into `left_out`."""
    nothing: pd.DataFrame = pd.DataFrame()
    cls: type[Locator] = locator_named(name)
    own = tuple(kind for kind in getattr(cls, "kinds", ()) if kind in kinds)
    known = zoo.load_facts(lm.name) if lm.name in zoo.NAMES else facts
    try:
        locator = cls.fitted(lm, **({"kinds": own} if own else {})).resolved(lm, known)
        found = locate(locator, lm, facts, store=store, skip=True)
        profiles = layer_profiles([found], kinds=kinds, token=token)
    except InputError as error:
        left_out |= {f"{name}: {fact.id}": str(error) for fact in facts}
        return nothing
    left_out |= {f"{name}: {fact}": why for fact, why in found.run.get("left_out", {}).items()}
    rows: pd.DataFrame = _every_layer(lm, profiles).assign(method=name, side="located", source="locator")
    return rows


def _edited(
    lm: LM, facts: Sequence[Fact], editors: dict[str, Editor], reading: str, kinds: Sequence[SiteKind],
    left_out: dict[str, str], store: Store | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """All editors' profiles, and what is told of each editor."""
    kind: SiteKind = next((kind for kind in kinds if kind in KINDS_SHOWN), "resid_post")
    parts: list[pd.DataFrame] = []
    layers: dict[str, set[int]] = {}
    sources: dict[str, str] = {}
    for name, fact, edit in edit_each(lm, editors, facts, left_out=left_out, store=store):
        source = reading if edit.changes else "activations"
        try:
            rows = _by_weights(lm, edit) if source == "weights" else _by_activations(lm, edit, kind)
        except InputError as error:
            left_out[f"{name}: {fact.id}"] = str(error)
            continue
        parts.append(rows.assign(fact=fact.id, method=name, side="edited", source=source))
        sources[name] = source
        layers[name] = layers.get(name, set()) | changed_layers(lm, edit)
    told = [
        {
            "editor": name, "layers": ", ".join(map(str, sorted(layers[name]))), "source": sources[name],
            "chosen": "the preset or the editor's default" if _is_set(editors[name]) else "the editor, by a trace",
        }
        for name in layers
    ]  # fmt: skip
    columns = ["editor", "layers", "chosen", "source"]
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()), pd.DataFrame(told, columns=columns)


def _is_set(editor: Editor) -> bool:
    """Whether the layers of an editor do not come from a trace of the facts: those that trace have `n_layers` to find."""
    return getattr(editor, "layers", None) is not None or not hasattr(editor, "n_layers")


def changed_layers(lm: LM, edit: Edit) -> set[int]:
    """The layers of the blocks whose weights change, or beside which something stands."""
    start = f"{lm.layout.blocks}."
    names = [*edit.changes, *(str(getattr(side, "module", "")) for side in edit.sides)]
    return {int(name.removeprefix(start).split(".")[0]) for name in names if name.startswith(start)}


def _by_weights(lm: LM, edit: Edit) -> pd.DataFrame:
    """By layer the relative norm of all changed matrices together; 0 where none is changed."""
    matrices = weight_footprint(lm, edit).extras["matrices"]
    squares = matrices.assign(new=matrices["norm"] ** 2, old=matrices["base_norm"] ** 2)
    sums = squares.groupby("layer")[["new", "old"]].sum()
    value = np.sqrt(sums["new"] / sums["old"]).reindex(range(lm.n_layers), fill_value=0.0)
    kind = " + ".join(dict.fromkeys(matrices["kind"]))
    found: pd.DataFrame = pd.DataFrame({"layer": range(lm.n_layers), "kind": kind, "value": value.to_numpy()})
    return found


def _by_activations(lm: LM, edit: Edit, kind: SiteKind) -> pd.DataFrame:
    """By layer how much one kind of site moves at the token where it moves most."""
    found: Footprint = functional_footprint(lm, edit, neighbors=False)
    rows: pd.DataFrame = _every_layer(lm, layer_profiles([found], kinds=[kind]))[["layer", "kind", "value"]]
    return rows


def _every_layer(lm: LM, profiles: pd.DataFrame) -> pd.DataFrame:
    """Profiles by fact and kind with a row for every layer; 0 where a method says nothing of a layer."""
    index = ["fact", "kind", "layer"]
    pairs = profiles[["fact", "kind"]].drop_duplicates()
    every = pairs.merge(pd.DataFrame({"layer": range(lm.n_layers)}), how="cross")
    merged: pd.DataFrame = every.merge(profiles[[*index, "value"]], on=index, how="left").fillna({"value": 0.0})
    return merged


def _masses(rows: pd.DataFrame) -> pd.Series:
    """The mass of every row; all layers of a profile are there."""
    weight = rows["value"].clip(lower=0.0)
    total = weight.groupby([rows[name] for name in ("side", "method", "kind", "fact")]).transform("sum")
    found: pd.Series = (weight / total).where(total > 0)
    return found


# --- agreement ---


def _ranks(masses: np.ndarray) -> np.ndarray:
    """Centred ranks of length 1 along the last dimension; NaN where all are equal."""
    ranks = stats.rankdata(masses, axis=-1)
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    unit: np.ndarray = np.divide(centred, length, out=np.full(centred.shape, np.nan), where=length > 0)
    return unit


def _compare(
    located: np.ndarray, located_ranks: np.ndarray, edited: np.ndarray, edited_ranks: np.ndarray
) -> dict[str, np.ndarray]:
    """As `compare`; ranks are given, since a shuffle of layers shuffles them alike."""
    return {
        "overlap": np.minimum(located, edited).sum(-1),
        "spearman": (located_ranks * edited_ranks).sum(-1),
        "earth_mover": np.abs(np.cumsum(located - edited, -1)).sum(-1),
        "peak_distance": np.abs(located.argmax(-1) - edited.argmax(-1)).astype(float),
    }


def _agreement(
    grids: dict[tuple[str, str, str], pd.DataFrame], *, permutations: int, resamples: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every locator against every editor: over facts, and by fact."""
    rows, each = [], []
    for (side, locator, kind), a in grids.items():
        for (other, editor, _), b in grids.items():
            facts = a.index.intersection(b.index, sort=False)
            if side != "located" or other != "edited" or not len(facts):
                continue
            name = {"locator": locator, "kind": kind, "editor": editor}
            first, second = a.loc[facts].to_numpy(), b.loc[facts].to_numpy()
            found, chance = compare(first, second), _chance(first, second, permutations=permutations, seed=seed)
            for measure, values in found.items():
                low, high = interval(values, resamples=resamples, seed=seed)
                there = np.isfinite(values)
                mean = float(values[there].mean()) if there.any() else np.nan
                rows.append({
                    **name, "measure": measure, "value": mean, "low": low, "high": high, "n": int(there.sum()),
                    **chance[measure],
                })  # fmt: skip
                each.append(pd.DataFrame({"fact": facts, **name, "measure": measure, "value": values}))
    table = pd.DataFrame(rows)
    for p in ("p", "p_fact"):
        table[f"{p}_adjusted"] = table.groupby("measure")[p].transform(_adjusted)
    columns = ["value", "low", "high", "n", "p", "p_adjusted", "others", "p_fact", "p_fact_adjusted"]
    return table[["locator", "kind", "editor", "measure", *columns]], pd.concat(each, ignore_index=True)


def _chance(located: np.ndarray, edited: np.ndarray, *, permutations: int, seed: int) -> dict[str, dict[str, float]]:
    """By measure: `p` of a shuffle of layers, `others` between different facts, and `p_fact` of a shuffle of facts."""
    rng = np.random.default_rng(seed)
    (n, n_layers), ranks, edited_ranks = located.shape, _ranks(located), _ranks(edited)
    found = {name: _mean(values) for name, values in compare(located, edited).items()}
    as_close = dict.fromkeys(found, 0)
    for order in rng.permuted(np.tile(np.arange(n_layers), (permutations, 1)), axis=1):
        shuffled = _compare(located, ranks, edited[:, order], edited_ranks[:, order])
        for name, values in shuffled.items():
            as_close[name] += _is_as_close(name, _mean(values), found[name])
    between = _compare(located[:, None], ranks[:, None], edited[None], edited_ranks[None])
    told: dict[str, dict[str, float]] = {}
    shuffles = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    for name, pairs in between.items():
        p_fact = others = np.nan
        if n > 1:
            chance = _mean(pairs[np.arange(n), shuffles])
            p_fact = (1 + int(_is_as_close(name, chance, found[name]).sum())) / (1 + permutations)
            others = float(_mean(pairs[~np.eye(n, dtype=bool)]))
        p = (1 + int(as_close[name])) / (1 + permutations) if np.isfinite(found[name]) else np.nan
        told[name] = {"p": p, "others": others, "p_fact": p_fact if np.isfinite(found[name]) else np.nan}
    return told


def _mean(values: np.ndarray) -> Any:
    """Along the last dimension, of those that are there; NaN where none is."""
    there = np.isfinite(values)
    count = there.sum(-1)
    return np.divide(np.where(there, values, 0.0).sum(-1), count, out=np.full(np.shape(count), np.nan), where=count > 0)


def _is_as_close(measure: str, value: Any, found: Any) -> Any:
    if measure in CLOSER_WHEN_SMALL:
        return value <= found + _CLOSE
    return value >= found - _CLOSE


def _adjusted(p: pd.Series) -> pd.Series:
    """Benjamini and Hochberg's adjusted values of those that are there."""
    there: pd.Series = p.notna()
    adjusted: pd.Series = p.copy()
    if there.any():
        adjusted[there] = stats.false_discovery_control(p[there])
    return adjusted


def _profiles(grids: dict[tuple[str, str, str], pd.DataFrame], *, resamples: int, seed: int) -> pd.DataFrame:
    """Mean masses by layer."""
    rows = []
    for (side, method, kind), grid in grids.items():
        for layer in grid.columns:
            low, high = interval(grid[layer].to_numpy(), resamples=resamples, seed=seed)
            mean = float(grid[layer].mean())
            rows.append({
                "side": side, "method": method, "kind": kind, "layer": int(layer), "mass": mean, "low": low, "high": high,
                "n": len(grid),
            })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows).dropna(subset="mass", ignore_index=True)
    return found


def _places(grids: dict[tuple[str, str, str], pd.DataFrame], band: range | None) -> pd.DataFrame:
    """Where each profile of each fact has its peak, its centre, and how much of it is in the planted layers."""
    parts = []
    for (side, method, kind), grid in grids.items():
        values, layers = grid.to_numpy(), grid.columns.to_numpy()
        parts.append(
            pd.DataFrame({
                "side": side, "method": method, "kind": kind, "fact": grid.index, "peak": layers[values.argmax(-1)],
                "centre": mass_centre(values, layers.astype(float)),
                "planted": values[:, list(band)].sum(-1) if band else np.nan,
            })
        )  # fmt: skip
    found: pd.DataFrame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return found


# --- words and pictures ---


def _overlay(profiles: pd.DataFrame, run: Any, *, title: str) -> LinePlot:
    """Curves by layer; what is edited points down."""
    sign = np.where(profiles["side"] == "located", 1.0, -1.0)
    kinds = " " + profiles["kind"] if profiles["kind"].nunique() > 1 else ""
    rows = pd.DataFrame({
        "series": profiles["side"] + ": " + profiles["method"] + kinds,
        "x": profiles["layer"], "y": sign * profiles["mass"],
        "note": [f"{mass:.0%} of the mass" for mass in profiles["mass"]],
    })  # fmt: skip
    if "low" in profiles and profiles["low"].notna().any():
        ends = np.sort(np.stack([sign * profiles["low"], sign * profiles["high"]]), axis=0)
        rows = rows.assign(low=ends[0], high=ends[1])
    band = run.get("planted")
    return LinePlot(
        rows=rows, y_title="Share of mass (edited: down)", title=title, mirrored=True,
        shade=range(band[0], band[-1] + 1) if band else None,
    )  # fmt: skip


def _in_words(own: pd.DataFrame) -> pd.DataFrame:
    """With what is written into a cell, and what is said of it."""
    text = [f"{row.value:.2f}\np {row.p:.2g}" for row in own.itertuples()]
    note = [
        f"{row.row} / {row.editor}: {_value(row)}, n {row.n}; p {row.p:.2g} (adjusted {row.p_adjusted:.2g}), by facts "
        f"{row.p_fact:.2g} (adjusted {row.p_fact_adjusted:.2g}); other facts {row.others:.2f}"
        for row in own.itertuples()
    ]
    found: pd.DataFrame = own.assign(text=text, note=note)
    return found


def _matrix(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Locators down, editors across, in order of appearance."""
    matrix = rows.pivot(index="row", columns="editor", values=column)
    found: pd.DataFrame = matrix.loc[rows["row"].unique(), rows["editor"].unique()]
    return found


def _value(row: Any) -> str:
    return f"{row.value:.2f}" + (f" [{row.low:.2f}, {row.high:.2f}]" if np.isfinite(row.low) else "")


def _source(result: Result) -> str:
    """What counts as edited, for a caption."""
    own = result.table[result.table["edited"].notna()]
    words = {"weights": "change of weights", "activations": "change of activations on the prompt"}
    return ", ".join(
        f"{words[str(source)]}" + ("" if own["source"].nunique() == 1 else f" for {', '.join(rows['method'].unique())}")
        for source, rows in own.groupby("source", sort=False)
    )


def _chosen(result: Result) -> str:
    """A warning where the edited layers are no measurement."""
    told = result.extras["editors"]
    told = told[told["source"] == "weights"]
    if told.empty:
        return ""
    by = told.assign(who=told["editor"] + " " + told["layers"].astype(str)).groupby("chosen", sort=False)["who"]
    who = "; ".join(f"{'; '.join(own)} ({chosen})" for chosen, own in by)
    return f"Layers that editors change are settings, not measurements: {who}. "
