"""Facts by several methods, as one number a layer: where the questions about locating methods start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.locators import Locator, locate
from workbench.models import LM
from workbench.profiles import has_role, layer_profiles, method_names
from workbench.progress import track
from workbench.results import Footprint, Result, join, manifest
from workbench.sites import Role
from workbench.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """What one method says about one kind of site."""

    method: str
    """The method's name."""

    label: str
    """Method and kind."""

    kind: str
    """The kind of site."""

    values: pd.DataFrame
    """A row a fact (its id is the index), a column a layer from 0; NaN where a fact has no value there."""

    neurons: Float[np.ndarray, "fact neuron"] | None = None
    """The values of the neurons that have a row of their own in some fact, NaN where a fact has none; None where no neuron has."""

    @property
    def name(self) -> dict[str, str]:
        """The columns that name it."""
        return {"method": self.method, "label": self.label, "kind": self.kind}


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """Some facts by several methods, each with the facts that it can locate."""

    lm: LM
    """The model."""

    footprints: Sequence[Footprint]
    """One a method, of the facts that it can locate."""

    methods: pd.DataFrame
    """A row a method that was asked: see `locate_each`."""

    facts: Sequence[Fact]
    """What was asked."""

    def series(self, n_layers: int, token: Role | None) -> list[Series]:
        """All series; those of a kind without layers, or without a token of the role, are left out."""
        found = []
        for footprint, method in zip(self.footprints, method_names(self.footprints), strict=True):
            for kind in footprint.kinds:
                if kind == "embed" or (token is not None and not _has(footprint, kind, token)):
                    continue
                profiles = layer_profiles([footprint], kinds=[kind], token=token)
                values = profiles.pivot(index="fact", columns="layer", values="value").reindex(columns=range(n_layers))
                values = values.reindex(profiles["fact"].unique())
                neurons = _neurons(footprint, kind, values.index, token)
                found.append(Series(method=method, label=f"{method} {kind}", kind=kind, values=values, neurons=neurons))
        return found

    def result(self, what: str, table: pd.DataFrame, parameters: Mapping[str, Any], **bootstrap: int) -> Result:
        """A table made from the series, with the methods and how it was made."""
        methods = {
            name: {"unit": footprint.run.get("unit"), "parameters": footprint.run.get("parameters")}
            for footprint, name in zip(self.footprints, method_names(self.footprints), strict=True)
        }
        run = manifest(
            what,
            model=self.lm.protocol,
            parameters=parameters,
            facts=self.facts,
            methods=methods,
            bootstrap={**bootstrap, "level": 0.95, "method": "percentile"},
        )
        return Result(table=table, run=run, extras={"methods": self.methods})


def locate_each(
    lm: LM,
    locators: Sequence[Locator],
    facts: Sequence[Fact],
    *,
    reference: Sequence[Fact],
    store: Store | None = None,
) -> Located:
    """Every fact by every method, fact by fact, so that one that a method cannot locate costs only itself.

    `methods` of what comes back has the columns method, facts (located), left_out (not located), reason (of the first of them),
    seconds (per fact, without those taken from the store).

    Raises:
        FactError: no method can locate any of the facts.
    """
    footprints, told = [], []
    for locator in locators:
        parts: list[Footprint] = []
        reasons: list[str] = []
        try:
            fixed = locator.resolved(
                lm, reference
            )  # a model that the method cannot run on is refused here, or by each fact
            for fact in track(facts, type(locator).__name__, len(facts)):
                try:
                    parts.append(locate(fixed, lm, [fact], store=store))
                except InputError as error:
                    reasons.append(str(error))
        except InputError as error:
            reasons.append(str(error))
        seconds = [(part.run["throughput"]["seconds"], part.run["throughput"]["facts"]) for part in parts]
        computed = sum(count for _, count in seconds)
        told.append(
            {
                "method": type(locator).__name__,
                "facts": len(parts),
                "left_out": len(facts) - len(parts),
                "reason": reasons[0] if reasons else "",
                "seconds": sum(s for s, _ in seconds) / computed if computed else np.nan,
            }
        )
        footprints += [join(parts)] if parts else []
    if not footprints:
        raise FactError(
            f"No method can locate any of the {len(facts)} facts: {told[0]['reason'] if told else 'none given'}"
        )
    return Located(lm=lm, footprints=footprints, methods=pd.DataFrame(told), facts=facts)


def _has(footprint: Footprint, kind: str, token: Role) -> bool:
    return bool(_of_role(footprint.of(kind=kind), token).any())


def _of_role(rows: pd.DataFrame, token: Role) -> pd.Series:
    """Which rows are of a token of this role, or of no token."""
    found: pd.Series = rows["position"].isna() | has_role(rows["token"], token)
    return found


def _neurons(
    footprint: Footprint, kind: str, facts: pd.Index[str], token: Role | None
) -> Float[np.ndarray, "fact neuron"] | None:
    """Each neuron's largest value over tokens, or over those of a role."""
    rows = footprint.neurons(kind=kind)
    rows = rows[rows["fact"].isin(facts) & (True if token is None else _of_role(rows, token))]
    if rows.empty:
        return None
    best = rows.groupby(["fact", "layer", "neuron"])["value"].max().reset_index()
    place = best.groupby(["layer", "neuron"]).ngroup().to_numpy()
    values = np.full((len(facts), place.max() + 1), np.nan)
    values[facts.get_indexer(pd.Index(best["fact"])), place] = best["value"].to_numpy()
    return values


def top(values: Float[np.ndarray, "fact place"], k: int) -> Bool[np.ndarray, "fact place"]:
    """True at each fact's k places of largest value, or fewer where fewer have one; of equal ones the lower place first."""
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=1, kind="stable")
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    found: np.ndarray = chosen & ~np.isnan(values)
    return found
