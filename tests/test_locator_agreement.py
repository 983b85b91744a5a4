"""Agreement of methods: numbers by hand and by scipy, p-values that are uniform by chance, and what shared layers do not prove."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses.locator_agreement import _adjusted, _permutations, agreement, locator_agreement
from tests.examples import SAID, tiny_lm
from tests.footprints import of_values
from workbench import export
from workbench.locators import AttributionPatching
from workbench.locators.causal_trace import CausalTrace
from workbench.results import Footprint, Result, ResultError, join
from workbench.store import Store


def method(what: str, profiles: Sequence[Sequence[float]] | np.ndarray) -> Footprint:
    """A method's profiles, one a fact."""
    return join([of_values([list(own)], fact=f"fact-{i}", what=what) for i, own in enumerate(profiles)])


def compared(*ways: Footprint, **more: Any) -> Any:
    """The measures of two methods, by name; typed loosely, since pandas' cells may be anything."""
    return agreement(ways, **more).table.set_index("measure")


def pair(first: Sequence[float], second: Sequence[float], **more: Any) -> Any:
    """The measures of two profiles of one fact, by name."""
    return compared(method("A", [first]), method("B", [second]), **more)


def random_methods(n: int, *, facts: int, layers: int, seed: int = 0) -> list[Footprint]:
    values = np.random.default_rng(seed).normal(size=(n, facts, layers))
    return [method(f"Method{i}", own) for i, own in enumerate(values)]


# --- numbers ---


def test_numbers_by_hand() -> None:
    rows = pair([0, 1, 2, 3], [0, 2, 1, 3], k=2)
    assert rows["value"].to_dict() == pytest.approx(
        {"spearman": 0.8, "kendall": 4 / 6, "overlap": 0.5, "distance": 1 / 6}
    )
    # of the 24 orders, the same one and 3 with two neighbours exchanged are as close; 4 of 24 have nothing of the top in common
    assert rows["p"][["spearman", "kendall", "overlap"]].to_dict() == pytest.approx(
        {"spearman": 4 / 24, "kendall": 4 / 24, "overlap": 20 / 24}
    )
    assert (rows["first"] == "A mlp_out").all()
    assert (rows["second"] == "B mlp_out").all()
    assert rows[["low", "high", "others", "p_fact", "p_fact_adjusted"]].isna().all(axis=None)


def test_the_chance_of_a_distance_by_hand() -> None:
    rows = pair([0, 0, 6], [0, 1, 2])
    # the centres are 2 and 5/3; the orders of the second have the centres 5/3, 4/3, 4/3, 2/3, 2/3 and 1/3
    assert rows.at["distance", "value"] == pytest.approx(1 / 3)
    assert rows.at["distance", "p"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_and_their_p_are_scipys(ties: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        first, second = rng.integers(0, 4, (2, 5)) if ties else rng.normal(size=(2, 5))
        rows = pair(first, second)
        for name, other in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            expected = stats.permutation_test(
                (second,), lambda y, x=first, of=other: of(x, y).statistic, permutation_type="pairings",
                alternative="greater", vectorized=False,
            )  # fmt: skip
            assert rows.at[name, "value"] == pytest.approx(other(first, second).statistic)
            assert rows.at[name, "p"] == pytest.approx(expected.pvalue)


def test_the_chance_of_an_overlap_is_hypergeometric() -> None:
    first, second = np.random.default_rng(1).normal(size=(2, 7))
    rows = pair(first, second, k=3, permutations=5040)
    common = round(3 * rows.at["overlap", "value"])
    assert rows.at["overlap", "p"] == pytest.approx(stats.hypergeom.sf(common - 1, 7, 3, 3))


def test_over_facts_there_are_means_with_intervals() -> None:
    ways = [method("A", [[1, 2, 3], [1, 2, 3]]), method("B", [[1, 2, 3], [2, 1, 3]])]
    row = compared(*ways).loc["spearman"]
    assert row["value"] == pytest.approx(0.75)
    assert row["high"] - row["value"] == pytest.approx(12.706205 * 0.25)  # Student's t, 1 degree of freedom
    assert row["n"] == 2
    assert row["others"] == pytest.approx(0.75)  # A's facts are alike
    assert row["p_fact"] == 1


def test_each_fact_is_told_too() -> None:
    ways = [method("A", [[1, 2, 3], [3, 1, 2]]), method("B", [[1, 2, 3], [2, 1, 3]])]
    result = agreement(ways)
    each = result.extras["each"].set_index(["measure", "fact"])
    assert each.at[("spearman", "fact-0"), "value"] == pytest.approx(1)
    assert each.at[("spearman", "fact-1"), "value"] == pytest.approx(0.5)
    assert each.at[("spearman", "fact-0"), "p"] == pytest.approx(1 / 6)
    assert each.at[("spearman", "fact-1"), "p"] == pytest.approx(3 / 6)
    assert each.at[("spearman", "fact-0"), "p_adjusted"] == pytest.approx(2 / 6)
    series = result.extras["series"].set_index(["label", "fact"])
    assert series.at[("A mlp_out", "fact-1"), "peak"] == 0
    assert series.at[("B mlp_out", "fact-1"), "centre"] == pytest.approx(7 / 6)


def test_adjusted_values_are_benjamini_and_hochbergs() -> None:
    adjusted = _adjusted(pd.Series([0.01, 0.04, np.nan, 0.03]))
    assert list(adjusted[[0, 1, 3]]) == pytest.approx([0.03, 0.04, 0.04])
    assert np.isnan(adjusted[2])
    table = agreement(random_methods(5, facts=3, layers=5)).table
    for _, rows in table.groupby("measure"):
        assert list(rows["p_adjusted"]) == pytest.approx(list(stats.false_discovery_control(rows["p"])))
        assert list(rows["p_fact_adjusted"]) == pytest.approx(list(stats.false_discovery_control(rows["p_fact"])))


# --- chance ---


def test_by_chance_every_p_of_a_fact_is_as_likely_as_another() -> None:
    each = agreement(random_methods(2, facts=200, layers=12), permutations=400).extras["each"]
    for name in ("spearman", "kendall", "distance"):
        assert stats.kstest(each[each["measure"] == name]["p"], "uniform").pvalue > 0.01
    overlaps = each[each["measure"] == "overlap"][
        "p"
    ]  # few values: the p of the larger ones are what they should be at most
    for level in (0.05, 0.1, 0.25):
        assert (overlaps <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / 200)


def test_by_chance_few_p_over_facts_are_small() -> None:
    table = agreement(random_methods(16, facts=6, layers=9), permutations=400).table
    for name in ("spearman", "kendall", "distance"):
        for p in ("p", "p_fact"):
            found = table[table["measure"] == name][p]
            assert len(found) == 120
            assert 0.4 < found.mean() < 0.6
            assert (found <= 0.1).mean() < 0.2


def test_the_same_fact_many_times_proves_no_more() -> None:
    first, second = np.random.default_rng(5).normal(size=(2, 6))
    once = pair(first, second)
    often = compared(method("A", [first] * 9), method("B", [second] * 9))
    assert once["p"].to_dict() == pytest.approx(often["p"].to_dict())
    assert (often["p_fact"] == 1).all()


def test_a_common_liking_for_layers_is_no_agreement_about_facts() -> None:
    rng = np.random.default_rng(7)
    liking = 3 * rng.normal(size=8)
    alike = [method(name, liking + 0.3 * rng.normal(size=(12, 8))) for name in ("A", "B")]
    row = compared(*alike).loc["spearman"]
    assert row["p"] < 0.01
    assert row["p_fact"] > 0.05
    assert row["others"] == pytest.approx(row["value"], abs=0.05)
    places = rng.normal(size=(12, 8))
    of_facts = [method(name, places + 0.3 * rng.normal(size=(12, 8))) for name in ("A", "B")]
    row = compared(*of_facts).loc["spearman"]
    assert row["p_fact"] < 0.01
    assert row["value"] > 0.7 > 0.3 > row["others"]


# --- what changes nothing ---


def test_ranks_do_not_change_under_growing_functions_and_centres_not_with_the_unit() -> None:
    first, second = np.random.default_rng(2).normal(size=(2, 4, 6))
    plain = compared(method("A", first), method("B", second))
    bent = compared(method("A", np.exp(first)), method("B", second**3))
    ranked = ["spearman", "kendall", "overlap"]
    pd.testing.assert_frame_equal(plain.loc[ranked], bent.loc[ranked])
    scaled = compared(method("A", 5 * first), method("B", 0.01 * second))
    pd.testing.assert_frame_equal(plain, scaled)


def test_a_method_agrees_with_itself() -> None:
    own = np.random.default_rng(4).normal(size=(5, 6))
    table = compared(method("A", own), method("B", own))
    assert table["value"].to_dict() == pytest.approx({"spearman": 1, "kendall": 1, "overlap": 1, "distance": 0})
    assert table.at["spearman", "p"] == pytest.approx(1 / 720)
    assert table.at["spearman", "p_fact"] == pytest.approx(1 / 120)


def test_the_order_of_methods_turns_pairs_and_nothing_else() -> None:
    ways = random_methods(2, facts=3, layers=5)
    one, other = agreement(ways).table, agreement(ways[::-1]).table
    assert list(one["first"]) == list(other["second"])
    numbers = ["value", "low", "high", "n", "p", "p_adjusted", "others", "p_fact"]
    pd.testing.assert_frame_equal(
        one[one["measure"] != "distance"][numbers], other[other["measure"] != "distance"][numbers]
    )


def test_a_seed_repeats_the_draw() -> None:
    ways = random_methods(2, facts=2, layers=9)
    table = agreement(ways, permutations=50, seed=1).table
    pd.testing.assert_frame_equal(table, agreement(ways, permutations=50, seed=1).table)
    assert not table["p"].equals(agreement(ways, permutations=50, seed=2).table["p"])
    assert table["p"].min() >= 1 / 51


# --- edges ---


def test_all_permutations_where_they_are_few() -> None:
    places, are_all = _permutations(4, 24, 0)
    assert are_all
    assert len({tuple(row) for row in places}) == 24
    places, are_all = _permutations(5, 24, 0)
    assert not are_all
    assert places.shape == (24, 5)
    assert (np.sort(places) == np.arange(5)).all()
    run = agreement(random_methods(2, facts=3, layers=9), permutations=50).run
    assert run["tests"] == {"layers": {"permutations": 50, "all": False}, "facts": {"permutations": 6, "all": True}}


@pytest.mark.parametrize("flat", [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0 + 1e-8, 1.0 - 1e-8]])
def test_a_flat_profile_has_no_ranks(flat: list[float]) -> None:
    rows = pair(flat, [1, 2, 3])
    for name in ("spearman", "kendall", "overlap"):
        assert rows.loc[name, ["value", "p", "p_adjusted"]].isna().all()
        assert rows.at[name, "n"] == 0
    assert np.isnan(rows.at["distance", "value"]) == (max(flat) == 0)


def test_facts_without_a_value_do_not_count() -> None:
    first = [[1, 2, 3, 4], [5, 5, 5, 5], [4, 1, 2, 3]]
    second = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 4, 2, 3]]
    found = compared(method("A", first), method("B", second))
    left = compared(method("A", first[::2]), method("B", second[::2]))
    assert found.at["spearman", "n"] == 2
    numbers = ["value", "low", "high", "n", "p", "others", "p_fact"]
    pd.testing.assert_series_equal(found.loc["spearman", numbers], left.loc["spearman", numbers])


def test_of_one_layer_or_two_there_is_little_to_say() -> None:
    rows = pair([1.0], [2.0])
    assert rows.loc[["spearman", "kendall", "overlap"], "value"].isna().all()
    assert rows.at["distance", "p"] == 1
    rows = pair([1, 2], [3, 4])
    assert rows.at["spearman", "value"] == pytest.approx(1)
    assert rows.at["spearman", "p"] == 0.5


def test_only_layers_that_all_have_count() -> None:
    short = method("B", [[3, 1, 2]])
    run = agreement([method("A", [[1, 2, 3, 9]]), short]).run
    assert run["layers"] == [0, 1, 2]
    later = dataclasses.replace(short, table=short.table.assign(layer=short.table["layer"] + 7))
    with pytest.raises(ResultError, match="no layer in common"):
        agreement([method("A", [[1, 2, 3]]), later])


def test_what_cannot_be_asked_is_said() -> None:
    with pytest.raises(ResultError, match="only series"):
        agreement([method("A", [[1, 2]])])
    ways = [method("A", [[1, 2, 3]]), method("B", [[1, 2, 3]])]
    for k in (0, 3):
        with pytest.raises(ResultError, match=rf"top {k} of 3 layers .* expected 1 to 2"):
            agreement(ways, k=k)


# --- from a model ---


def test_from_facts_to_agreement(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    settings: Mapping[str, Any] = {"samples": 2, "window": 1, "kinds": ("mlp_out", "attn_out")}
    locators = [CausalTrace(**settings), AttributionPatching(**settings)]
    store = Store(folder=tmp_path / "store")
    result = locator_agreement(lm, [SAID], locators=locators, store=store)
    assert len(result.table) == 4 * 6
    assert len(store.manifests()) == 4
    again = locator_agreement(lm, [SAID], locators=locators, store=store, kinds=["mlp_out"])
    assert set(again.table["first"]) == {"CausalTrace mlp_out"}
    result.save(tmp_path / "kept")
    kept = Result.load(tmp_path / "kept")
    pd.testing.assert_frame_equal(kept.table, result.table)
    assert "of CausalTrace, AttributionPatching" in export.protocol_text(kept)
