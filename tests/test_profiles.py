"""Every method becomes one number a layer: whole rows first, then heads; the maximum over tokens; normalised fact by fact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.footprints import footprint, of_values, several
from workbench.profiles import comparison_manifest, layer_profiles, mass_centre, mean_profiles, with_interval
from workbench.results import Footprint, ResultError, join


def named(result: Footprint, what: str, **changes: object) -> Footprint:
    """The same footprint as another method's, or with other parameters."""
    parameters = {**result.run["parameters"], **changes}
    return dataclasses.replace(result, run={**result.run, "what": what, "parameters": parameters})


def values_of(result: Footprint, **more: object) -> list[float]:
    """The profile of the only series and fact."""
    return list(layer_profiles([result], **more)["value"])  # type: ignore[arg-type]


def test_a_layer_has_its_largest_token_as_in_hase() -> None:
    result = footprint()
    profiles = layer_profiles([result])
    assert list(profiles.columns) == ["method", "label", "kind", "fact", "layer", "value", "normalised"]
    for kind in result.kinds:
        own = profiles[profiles["kind"] == kind]
        assert list(own["layer"]) == list(range(6))
        assert np.array_equal(own["value"], result.grid(kind=kind, column="value").max())
    assert list(profiles["label"].unique()) == [f"CausalTrace {kind}" for kind in result.kinds]


@pytest.mark.parametrize("token", ["subject_last", "further", "subject"])
def test_of_a_role_the_mean_counts(token: str) -> None:
    result = footprint(kinds=("mlp_out",))
    rows = result.table[result.table["token"].str.startswith("subject_" if token == "subject" else token)]
    expected = rows.groupby("layer")["value"].mean()
    assert len(rows) == 6 * {"subject_last": 1, "further": 3, "subject": 3}[token]
    assert values_of(result, token=token) == pytest.approx(list(expected))


def test_single_heads_and_neurons_only_count_where_there_is_no_whole() -> None:
    heads = of_values([[1.0, -5.0], [3.0, 2.0]], kind="z", part="head")  # part by layer
    assert values_of(heads) == [3.0, 2.0]
    whole = of_values([[0.5, 0.25]], kind="z")
    both = dataclasses.replace(whole, table=join([whole, heads]).table)
    assert values_of(both) == [0.5, 0.25]
    assert values_of(of_values([[1.0, 4.0], [3.0, 2.0]], kind="mlp_post", part="neuron")) == [3.0, 4.0]


def test_what_belongs_to_no_token_counts_as_it_is() -> None:
    result = of_values([[1.0, 2.0, 4.0]])
    assert result.table["position"].isna().all()
    assert values_of(result) == values_of(result, token="last") == [1.0, 2.0, 4.0]


def test_normalised_keeps_signs_and_the_largest_size_is_1() -> None:
    profiles = layer_profiles([of_values([[1.0, -4.0, 2.0]])])
    assert list(profiles["normalised"]) == [0.25, -1.0, 0.5]
    assert list(layer_profiles([of_values([[0.0, 0.0]])])["normalised"]) == [0.0, 0.0]


def test_each_fact_is_normalised_by_itself() -> None:
    profiles = layer_profiles([several()])
    assert (profiles.groupby(["label", "fact"])["normalised"].max() == 1).all()
    assert profiles.groupby("label")["value"].max().nunique() == 3


def test_methods_are_told_apart_by_what_differs() -> None:
    traces = [footprint(kinds=("mlp_out", "attn_out")), footprint(kinds=("mlp_out",), window=1)]
    other = named(footprint(kinds=("mlp_out",)), "Other")
    labels = layer_profiles([*traces, other])["label"].unique()
    assert list(labels) == [
        "CausalTrace (window 3) mlp_out", "CausalTrace (window 3) attn_out", "CausalTrace (window 1) mlp_out", "Other mlp_out",
    ]  # fmt: skip
    half = dataclasses.replace(traces[0], run={**traces[0].run, "dtype": "bfloat16"})
    methods = layer_profiles([traces[0], half], kinds=["mlp_out"])["method"].unique()
    assert list(methods) == ["CausalTrace (dtype float32)", "CausalTrace (dtype bfloat16)"]


def test_only_facts_that_all_have_are_compared() -> None:
    first, second = several(4), named(several(3), "Other")
    assert list(layer_profiles([first, second])["fact"].unique()) == ["fact-0", "fact-1", "fact-2"]
    assert list(layer_profiles([first, second], kinds=["mlp_out"])["kind"].unique()) == ["mlp_out"]


def test_the_embedding_has_no_layer() -> None:
    result = join([of_values([[1.0]], kind="embed"), of_values([[1.0, 2.0]])])
    assert list(layer_profiles([result])["kind"].unique()) == ["mlp_out"]


def test_what_cannot_be_compared_is_said() -> None:
    one = footprint()
    elsewhere = dataclasses.replace(one, run={**one.run, "weight_hash": "f" * 16, "model": "large"})
    with pytest.raises(ResultError, match="nothing to compare"):
        layer_profiles([])
    with pytest.raises(ResultError, match=r"different models: tiny \(0123456789abcdef\) and large"):
        layer_profiles([one, elsewhere])
    with pytest.raises(ResultError, match="twice"):
        layer_profiles([one, footprint(kinds=("mlp_out",))])
    with pytest.raises(ResultError, match="no fact in common"):
        layer_profiles([one, named(footprint(fact="louvre"), "Other")])
    with pytest.raises(ResultError, match="no fact with a token of the role further in common"):
        layer_profiles([footprint((" A", "b"), subject=(0, 1))], token="further")
    with pytest.raises(ResultError, match="No footprint has sites of z"):
        layer_profiles([one], kinds=["z"])
    with pytest.raises(ResultError, match="different ids"):
        layer_profiles([one, named(footprint(("The", " Louvre", " is"), subject=(1, 2)), "Other")])


def test_means_have_students_intervals() -> None:
    values = [[1.0, 0.5], [1.0, 0.1], [1.0, 0.3]]
    result = join([of_values([own], fact=f"fact-{i}") for i, own in enumerate(values)])
    means = mean_profiles(layer_profiles([result]))
    assert list(means["value"]) == pytest.approx([1.0, 0.3])
    assert list(means["n"]) == [3, 3]
    half = 4.302653 * 0.2 / np.sqrt(3)  # Student's t, 2 degrees of freedom; standard deviation 0.2
    assert list(means["high"] - means["value"]) == pytest.approx([0.0, half], abs=1e-6)
    assert mean_profiles(layer_profiles([of_values([[1.0, 2.0]])]))[["low", "high"]].isna().all(axis=None)
    assert "se" in with_interval(means.assign(se=0.0))


def test_the_centre_of_mass_is_of_what_is_above_0() -> None:
    values = np.array([[0.0, 1.0, 3.0], [2.0, -7.0, 2.0], [0.0, 0.0, 5.0], [-1.0, 0.0, -2.0]])
    centres = mass_centre(values, np.array([0.0, 1.0, 2.0]))
    assert list(centres[:3]) == [1.75, 1.0, 2.0]
    assert np.isnan(centres[3])
    assert mass_centre(7 * values[0], np.array([4.0, 5.0, 6.0])) == 5.75


def test_a_comparison_says_what_it_was_made_from() -> None:
    traces = [several(4), named(several(3), "Other", steps=5)]
    run = comparison_manifest("Comparison", traces, token="last")
    assert run["weight_hash"] == "0123456789abcdef"
    assert [fact["id"] for fact in run["facts"]] == ["fact-0", "fact-1", "fact-2"]
    assert run["parameters"]["results"] == [trace.key for trace in traces]
    assert [method["method"] for method in run["methods"]] == ["CausalTrace", "Other"]
    assert run["methods"][1]["parameters"]["steps"] == 5
    mixed = [traces[0], dataclasses.replace(traces[1], run={**traces[1].run, "dtype": "bfloat16"})]
    assert "dtype" not in comparison_manifest("Comparison", mixed)
