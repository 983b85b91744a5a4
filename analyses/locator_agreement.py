"""Do methods that locate a fact agree about its layers? Every pair of methods, per fact and over facts.

Claim under test (Hase et al. 2023, arXiv 2301.04213, sec. 5; Chang et al. 2024, arXiv 2311.09060): different methods do not point
at the same place. Each series (a method and a kind of site) is a profile over the layers, see `workbench.profiles`. Two of them
are compared by

- `spearman`: rank correlation
- `kendall`: rank correlation, tau-b
- `overlap`: of the k layers of largest value, the share that both have; the lower layer first where values are equal
- `distance`: between the centres of mass, in layers; of the values above 0

A profile that is the same in all layers (see `FLAT`) has no ranks and no top, and one without a value above 0 no centre: such a
pair has no value there (NaN), and its fact does not count.

Two questions are tested, each by permutation and one-sided: could what was found be as close by chance?

1. By layers (`p`): the layers of one of the two profiles are shuffled; over facts, all facts alike, because facts share what a
   method says about layers in general, so that many facts do not stand for many layers. Neighbouring layers are alike in most
   methods, more so with windows, which no shuffle keeps: a small p then says less than it seems to.
2. By facts (`p_fact`): whole profiles of one of the two are shuffled over facts. So the layers keep their order, and what is
   asked is whether the two agree about *this* fact more than about another one (`others`), which a common liking for some
   layers does not explain.

All permutations are gone through where they are few enough; else some are drawn, and p is (1 + as close) / (1 + drawn). `p` of a
fact has no less than 1 over the factorial of the number of layers. Adjusted values are Benjamini and Hochberg's, within a measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from workbench.facts import Fact
from workbench.locators import Locator, locate
from workbench.models import LM
from workbench.profiles import comparison_manifest, layer_profiles, mass_centre, with_interval
from workbench.results import Footprint, Result, ResultError
from workbench.sites import Role
from workbench.store import Store

AT_ONCE = 500
"""Permutations whose shuffled profiles are held in memory."""

FLAT = 1e-6
"""A profile whose values lie closer together than this share of the largest is flat: its order is float32's rounding."""

_CLOSE = 1e-9
"""Two values that differ by less are equal: the same number by another order of sums."""


def locator_agreement(
    lm: LM,
    facts: Sequence[Fact],
    *,
    locators: Sequence[Locator],
    kinds: Sequence[str] | None = None,
    token: Role | None = None,
    k: int | None = None,
    permutations: int = 5000,
    seed: int = 0,
    store: Store | None = None,
    memory: int | None = None,
) -> Result:
    """Locates the facts with every method and compares the methods.

    Args:
        lm: the model.
        facts: the facts.
        locators: the methods.
        kinds: as of `agreement`, like all that follow.
        token: see there.
        k: see there.
        permutations: see there.
        seed: see there.
        store: where single footprints are kept and looked for, so that a stopped run goes on.
        memory: bytes that a method may take for intermediate states; None: half of what is free.

    Returns:
        See `agreement`.

    Raises:
        FactError, ModelError: no facts, or a method cannot run on this model or these facts.
        ResultError: see `agreement`.
    """
    locators = [locator.resolved(lm, facts) for locator in locators]
    footprints = [locate(locator, lm, facts, store=store, memory=memory) for locator in locators]
    return agreement(footprints, kinds=kinds, token=token, k=k, permutations=permutations, seed=seed)


def agreement(
    footprints: Sequence[Footprint],
    *,
    kinds: Sequence[str] | None = None,
    token: Role | None = None,
    k: int | None = None,
    permutations: int = 5000,
    seed: int = 0,
) -> Result:
    """Every pair of series, compared; over the layers and facts that all of them have.

    Args:
        footprints: of one model.
        kinds: which kinds of sites; None: all.
        token: the role of the tokens that count; None: the largest of all tokens. See `workbench.profiles.layer_profiles`.
        k: how many layers are the top; None: a quarter of them, rounded up.
        permutations: how many are drawn where there are more.
        seed: of the draw.

    Returns:
        A Result, one row a pair and measure, with the columns

        - `first`, `second`: labels of the series; `measure`
        - `value`: mean over facts; `low`, `high`: its 95 % interval (Student's t; NaN for a single fact); `n`: facts
        - `p`: of closeness by chance, by layers; `p_adjusted`
        - `others`: the mean over pairs of different facts; `p_fact`: of closeness by chance, by facts; `p_fact_adjusted`. NaN for a
          single fact

        Extras: `each`, one row a fact, pair and measure, with fact, first, second, measure, value, p and p_adjusted (over all facts
        and pairs); `series`, one row a series and fact, with label, method, kind, fact, peak (layer of the largest value) and
        centre (of mass). The manifest's `tests` tells how many permutations there were and whether these were all.

    Raises:
        ResultError: fewer than two series, no layer in common, a k that leaves no choice, or what `layer_profiles` refuses.
    """
    profiles = layer_profiles(footprints, kinds=kinds, token=token)
    grid = profiles.pivot(index=["label", "fact"], columns="layer", values="value").dropna(axis="columns")
    labels, facts, layers = list(profiles["label"].unique()), list(profiles["fact"].unique()), grid.columns.to_numpy()
    if len(labels) < 2:
        raise ResultError(f"{labels[0]} is the only series, so there is nothing to compare it with. Give at least two.")
    if not len(layers):
        raise ResultError("The series have no layer in common. Locate with kinds and layers that overlap.")
    k = math.ceil(len(layers) / 4) if k is None else k
    if not 1 <= k <= max(1, len(layers) - 1):
        raise ResultError(
            f"The top {k} of {len(layers)} layers were asked for, expected 1 to {max(1, len(layers) - 1)}."
        )
    index = pd.MultiIndex.from_product([labels, facts])
    values = grid.loc[index].to_numpy(dtype=float).reshape(len(labels), len(facts), len(layers))
    compared = [
        _compared(measure, n_layers=len(layers), permutations=permutations, seed=seed)
        for measure in _measures(values, layers.astype(float), k)
    ]
    table, each = (pd.concat(parts, ignore_index=True) for parts in zip(*compared, strict=True))
    for rows, column in itertools.product((table, each), ("first", "second")):
        rows[column] = rows[column].map(dict(enumerate(labels)))
    each["fact"] = each["fact"].map(dict(enumerate(facts)))
    run = comparison_manifest(
        "locator_agreement", footprints, kinds=kinds, role=token, k=k, permutations=permutations, seed=seed
    )
    tests = {
        name: {"permutations": len(shuffled), "all": are_all}
        for name, (shuffled, are_all) in (
            ("layers", _permutations(len(layers), permutations, seed)),
            ("facts", _permutations(len(facts), permutations, seed)),
        )
    }
    series = profiles[["label", "method", "kind", "fact"]].drop_duplicates(ignore_index=True)
    series["peak"] = layers[values.argmax(-1)].ravel()
    series["centre"] = mass_centre(values, layers.astype(float)).ravel()
    return Result(
        table=table,
        run={**run, "layers": [int(layer) for layer in layers], "tests": tests},
        extras={"each": each, "series": series},
    )


# --- parts ---


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measure:
    """One way to compare two profiles, in two steps, so that many can be compared at once."""

    name: str
    """Its name in the table."""

    marks: Float[np.ndarray, "series fact mark"]
    """What a profile is compared by; NaN where it cannot be."""

    shuffle: Callable[[Int[np.ndarray, "permutation layer"]], Int[np.ndarray, "permutation mark"]] = lambda places: (
        places
    )
    """Where the marks come from when the layers are shuffled."""

    closeness: Callable[
        [Float[np.ndarray, "some mark"], Float[np.ndarray, "others mark"]], Float[np.ndarray, "some others"]
    ] = lambda some, others: some @ others.T
    """All against all; larger is closer. Of vectors of length 1, the cosine of their angle."""

    sign: int = 1
    """-1 where what is reported is a distance."""


def _measures(
    values: Float[np.ndarray, "series fact layer"], layers: Float[np.ndarray, " layer"], k: int
) -> list[_Measure]:
    """The four measures of profiles. The first three are cosines: of centred ranks, of signs of differences, of tops."""
    n = values.shape[-1]
    flat = np.ptp(values, axis=-1, keepdims=True) <= FLAT * np.abs(values).max(-1, keepdims=True)
    ranks = stats.rankdata(values, axis=-1)
    signs = np.sign(values[..., :, None] - values[..., None, :]).reshape(*values.shape[:-1], n * n)
    top = np.zeros(values.shape)
    np.put_along_axis(top, np.argsort(-values, axis=-1, kind="stable")[..., :k], 1.0, axis=-1)
    mass = np.maximum(values, 0.0)
    total = mass.sum(-1, keepdims=True)

    return [
        _Measure(name="spearman", marks=_unit(ranks - ranks.mean(-1, keepdims=True), flat)),
        _Measure(
            name="kendall",
            marks=_unit(signs, flat),
            shuffle=lambda places: (places[:, :, None] * n + places[:, None, :]).reshape(len(places), -1),
        ),
        _Measure(name="overlap", marks=_unit(top, flat)),
        _Measure(
            name="distance",
            marks=np.divide(mass, total, out=np.full(mass.shape, np.nan), where=total > 0),
            closeness=lambda some, others: -np.abs((some @ layers)[:, None] - (others @ layers)[None, :]),
            sign=-1,
        ),
    ]


def _compared(measure: _Measure, *, n_layers: int, permutations: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of one measure, over facts and for each fact; series and facts by number."""
    marks = measure.marks
    n_series, n_facts, _ = marks.shape
    found = np.stack(
        [measure.closeness(marks[:, fact], marks[:, fact]) for fact in range(n_facts)]
    )  # fact first second
    there = np.isfinite(found)
    shuffled, are_all = _permutations(n_layers, permutations, seed)
    as_close, as_close_over = np.zeros(found.shape), np.zeros(found.shape[1:])
    for start in range(0, len(shuffled), AT_ONCE):
        source = measure.shuffle(shuffled[start : start + AT_ONCE])
        over = np.zeros((n_series, n_series, len(source)))
        for fact, second in itertools.product(range(n_facts), range(n_series)):
            chance = measure.closeness(marks[:, fact], marks[second, fact][source])  # first permutation
            as_close[fact, :, second] += (chance >= found[fact, :, second, None] - _CLOSE).sum(-1)
            over[:, second] += np.nan_to_num(chance)
        total = np.where(there, found, 0.0).sum(0)
        as_close_over += (over >= total[..., None] - _CLOSE * n_facts).sum(-1)
    rows, each = [], []
    for first, second in itertools.combinations(range(n_series), 2):
        own = there[:, first, second]
        values = measure.sign * found[own, first, second] + 0.0  # no -0
        others, p_fact = _by_facts(measure, first, second, np.flatnonzero(own), permutations=permutations, seed=seed)
        pair = {"first": first, "second": second, "measure": measure.name}
        rows.append(
            {
                **pair,
                "value": values.mean() if len(values) else np.nan,
                "se": stats.sem(values) if len(values) > 1 else np.nan,
                "n": len(values),
                "p": _p(as_close_over[first, second], len(shuffled), are_all) if len(values) else np.nan,
                "others": others,
                "p_fact": p_fact,
            }
        )
        p = _p(as_close[:, first, second], len(shuffled), are_all)
        each += [
            {
                "fact": fact,
                **pair,
                "value": measure.sign * found[fact, first, second] + 0.0,
                "p": p[fact] if own[fact] else np.nan,
            }
            for fact in range(n_facts)
        ]
    table = with_interval(pd.DataFrame(rows))
    table = table.assign(p_adjusted=_adjusted(table["p"]), p_fact_adjusted=_adjusted(table["p_fact"]))
    by_fact = pd.DataFrame(each)
    columns = [
        "first",
        "second",
        "measure",
        "value",
        "low",
        "high",
        "n",
        "p",
        "p_adjusted",
        "others",
        "p_fact",
        "p_fact_adjusted",
    ]
    return table[columns], by_fact.assign(p_adjusted=_adjusted(by_fact["p"]))


def _by_facts(
    measure: _Measure, first: int, second: int, facts: np.ndarray, *, permutations: int, seed: int
) -> tuple[float, float]:
    """Mean between different facts, and how often facts paired by chance are as close as each with itself; NaN for one fact."""
    n = len(facts)
    if n < 2:
        return np.nan, np.nan
    between = measure.closeness(measure.marks[first, facts], measure.marks[second, facts])
    shuffled, are_all = _permutations(n, permutations, seed)
    as_close = int((between[np.arange(n), shuffled].sum(-1) >= between.trace() - _CLOSE * n).sum())
    others = (between.sum() - between.trace()) / (n * (n - 1))
    return measure.sign * float(others) + 0.0, float(_p(as_close, len(shuffled), are_all))


@lru_cache(maxsize=64)
def _permutations(n: int, most: int, seed: int) -> tuple[Int[np.ndarray, "permutation place"], bool]:
    """All permutations of n places, where there are no more than `most`, else so many drawn ones; and whether these are all."""
    if math.factorial(n) <= most:
        return np.array(list(itertools.permutations(range(n)))), True
    rows = np.tile(np.arange(n), (most, 1))
    return np.random.default_rng(seed).permuted(rows, axis=1), False


def _p(as_close: Any, permutations: int, are_all: bool) -> Any:
    """The share of permutations that come as close; drawn ones are joined by what was found itself."""
    return as_close / permutations if are_all else (1 + as_close) / (1 + permutations)


def _adjusted(p: pd.Series) -> pd.Series:
    """Benjamini and Hochberg's adjusted values of those that are there."""
    there: pd.Series = p.notna()
    adjusted: pd.Series = p.copy()
    if there.any():
        adjusted[there] = stats.false_discovery_control(p[there])
    return adjusted


def _unit(marks: np.ndarray, without: np.ndarray) -> np.ndarray:
    """Vectors of length 1; NaN for those that are to have no value."""
    length = np.linalg.norm(marks, axis=-1, keepdims=True)
    there = ~without & (length > 0)
    units: np.ndarray = np.divide(marks, length, out=np.full(marks.shape, np.nan), where=there)
    return units
