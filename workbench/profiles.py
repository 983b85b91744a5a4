"""Locating methods on one axis: the layer. What `plots.compare` draws and what the analyses of several methods start from.

A *series* is what one method says about one kind of site, e.g. CausalTrace of `mlp_out`. Methods measure in different units, so a
series is also given normalised: its shape over the layers, fact by fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.results import Footprint, ResultError, manifest
from workbench.sites import Role

_PROTOCOL = ("model", "family", "weight_hash", "setup_hash", "n_layers", "dtype", "attention", "bos")
"""What a comparison's manifest takes over from its footprints, as far as they agree."""

_SETTINGS = ("dtype", "attention", "bos")
"""What may differ between footprints of one model beside the methods' parameters."""

_UNSAID = ("kinds", "sigma_note")
"""Parameters that tell no two series apart: a series has one kind, and a note only says where a number came from."""


def layer_profiles(
    footprints: Sequence[Footprint], *, kinds: Sequence[str] | None = None, token: Role | None = None
) -> pd.DataFrame:
    """One number a layer for every series and fact.

    From whole rows; for a kind that has none, from each token's largest head or neuron. Then the maximum over tokens, as in Hase
    et al. 2023 (arXiv 2301.04213, sec. 4.1), or the mean over the tokens of a role. What belongs to no token counts as it is.
    `embed`, which has no layer, is left out.

    Args:
        footprints: of one model, with at least one fact in common.
        kinds: which kinds of sites; None: all.
        token: the role of the tokens that count; None: all tokens.

    Returns:
        A table, series by series, with the columns

        - `method`: its name; where it occurs several times, with the parameters that differ: `CausalTrace (window 3)`
        - `label`: method and kind, the name of the series; `kind`
        - `fact`: id, of the facts that all series have; `layer`: 0-based
        - `value`: the effect, in the method's own unit
        - `normalised`: that over its largest size among the layers of this fact and series: -1 to 1, and 0 where all are 0

    Raises:
        ResultError: nothing to compare, other weights, no fact or no such kind in common, or one series twice.
    """
    methods = method_names(footprints)
    found = {}
    for footprint, method in zip(footprints, methods, strict=True):
        for kind in footprint.kinds:
            if kind == "embed" or (kinds is not None and kind not in kinds):
                continue
            label = f"{method} {kind}"
            if label in found:
                raise ResultError(f"{label} stands there twice with the same parameters. Leave one of them out.")
            rows = _by_layer(footprint, kind, token).assign(method=method, label=label, kind=kind)
            found[label] = rows.set_index("fact", drop=False)
    if not found:
        there = sorted({kind for footprint in footprints for kind in footprint.kinds} - {"embed"})
        raise ResultError(
            f"No footprint has sites of {' or '.join(kinds or ('any layer',))}. They have {', '.join(there)}."
        )
    first, *others = (dict.fromkeys(rows["fact"]) for rows in found.values())
    common = [fact for fact in first if all(fact in other for other in others)]
    if not common:
        where = f" with a token of the role {token}" if token else ""
        raise ResultError(f"The series have no fact{where} in common. Locate the same facts with every method.")
    table = pd.concat([rows.loc[common] for rows in found.values()], ignore_index=True)
    largest = table["value"].abs().groupby([table["label"], table["fact"]]).transform("max")
    table["normalised"] = table["value"] / largest.replace(0.0, 1.0)
    profiles: pd.DataFrame = table[["method", "label", "kind", "fact", "layer", "value", "normalised"]]
    return profiles


def mean_profiles(profiles: pd.DataFrame, *, column: Literal["value", "normalised"] = "normalised") -> pd.DataFrame:
    """The mean over facts of `layer_profiles`, with 95 % intervals of Student's t (NaN for a single fact).

    Returns:
        A table with method, label, kind, layer, value, low, high and n (facts).
    """
    factors = ["method", "label", "kind", "layer"]
    means = profiles.groupby(factors, sort=False)[column].agg(value="mean", se="sem", n="count").reset_index()
    found: pd.DataFrame = with_interval(means).drop(columns="se")
    return found


def with_interval(means: pd.DataFrame) -> pd.DataFrame:
    """A table of means (value, se, n) with `low` and `high`, the ends of 95 % intervals of Student's t; NaN where n is 1."""
    n = means["n"].to_numpy(dtype=float)
    half = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * means["se"].to_numpy(dtype=float)
    found: pd.DataFrame = means.assign(low=means["value"] - half, high=means["value"] + half)
    return found


def mass_centre(values: Float[np.ndarray, "*batch layer"], layers: Float[np.ndarray, " layer"]) -> np.ndarray:
    """Where a profile has its weight, in layers: sum of layer x max(value, 0) over the sum of max(value, 0).

    Returns:
        A number for each profile (0-based, between layers as a rule); NaN where no value is above 0.
    """
    weight = np.maximum(values, 0.0)
    total = weight.sum(-1)
    centre: np.ndarray = np.divide(weight @ layers, total, out=np.full(np.shape(total), np.nan), where=total > 0)
    return centre


def has_role(tokens: pd.Series, role: Role) -> pd.Series:
    """Which rows' tokens have a role; `subject` is any of the subject's."""
    found: pd.Series = tokens.str.startswith("subject_") if role == "subject" else tokens == role
    return found


def method_names(footprints: Sequence[Footprint]) -> list[str]:
    """A name for each footprint's method: its class, and in brackets what tells it from another one of that class.

    Raises:
        ResultError: nothing to compare, other weights, or one fact id with several prompts.
    """
    if not footprints:
        raise ResultError("There is nothing to compare. Give at least one footprint.")
    hashes = {str(footprint.run.get("weight_hash")): footprint.run.get("model") for footprint in footprints}
    if len(hashes) > 1:
        models = " and ".join(f"{name} ({weights})" for weights, name in hashes.items())
        raise ResultError(f"The footprints are of different models: {models}. Compare methods on one model.")
    prompts: dict[Any, Any] = {}
    for fact in (fact for footprint in footprints for fact in footprint.run.get("facts", ())):
        asked = (fact.get("prompt"), fact.get("subject"))
        if prompts.setdefault(fact.get("id"), asked) != asked:
            raise ResultError(
                f"The fact {fact.get('id')!r} is {prompts[fact.get('id')]} in one footprint and {asked} in another. "
                "Give different facts different ids."
            )
    names = [str(footprint.run.get("what")) for footprint in footprints]
    settings = [_settings(footprint.run) for footprint in footprints]
    return [
        name + _difference(own, [other for other, its in zip(settings, names, strict=True) if its == name])
        for name, own in zip(names, settings, strict=True)
    ]


def comparison_manifest(what: str, footprints: Sequence[Footprint], **parameters: Any) -> dict[str, Any]:
    """The manifest of something made from several footprints: `methods` has the parameters and the unit of each.

    Args:
        what: its name.
        footprints: what it was made from.
        parameters: what else was chosen.
    """
    runs = [footprint.run for footprint in footprints]
    model = {
        name: runs[0][name]
        for name in _PROTOCOL
        if name in runs[0] and all(run.get(name) == runs[0][name] for run in runs)
    }
    names = method_names(footprints)
    kept = set.intersection(*(set(footprint.facts) for footprint in footprints))
    facts = [fact for fact in runs[0].get("facts", ()) if fact.get("id") in kept]
    methods = [
        {
            "method": name,
            "key": footprint.key,
            **{entry: run[entry] for entry in ("what", "unit", "parameters") if entry in run},
        }
        for name, footprint, run in zip(names, footprints, runs, strict=True)
    ]
    parameters = {"of": names, **parameters, "results": [footprint.key for footprint in footprints]}
    return manifest(what, model=model, parameters=parameters, facts=facts, methods=methods)


# --- parts ---


def _by_layer(footprint: Footprint, kind: str, token: Role | None) -> pd.DataFrame:
    """Fact, layer and value of a kind; no row where no token has the role."""
    rows = footprint.of(kind=kind)
    whole = rows["head"].isna() & rows["neuron"].isna()
    if whole.any():
        rows = rows[whole]
    if token is not None:
        rows = rows[rows["position"].isna() | has_role(rows["token"], token)]
    places = rows.groupby(["fact", "layer", "position"], dropna=False, sort=False)["value"].max()
    by_layer = places.groupby(["fact", "layer"], sort=False).agg("max" if token is None else "mean")
    found: pd.DataFrame = by_layer.reset_index().sort_values("layer", kind="stable")
    return found


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {name: value for name, value in run.get("parameters", {}).items() if name not in _UNSAID}
    return {**parameters, **{name: run.get(name) for name in _SETTINGS}}


def _difference(own: Mapping[str, Any], all_of_it: Sequence[Mapping[str, Any]]) -> str:
    """What sets one method's settings apart from the others', in brackets; empty where nothing does."""
    names = dict.fromkeys(name for settings in all_of_it for name in settings)
    told = [
        f"{name} {_word(own.get(name))}"
        for name in names
        if any(settings.get(name) != own.get(name) for settings in all_of_it)
    ]
    return f" ({', '.join(told)})" if told else ""


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
