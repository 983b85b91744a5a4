"""What is on the screen is what is in the table; a click finds its site; odd tokens are shown as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analyses.locator_agreement import agreement
from tests.footprints import ODD, average, footprint, of_values, several
from workbench import drawing, plots
from workbench.drawing import Theme
from workbench.profiles import layer_profiles
from workbench.results import Footprint, Result, ResultError, join
from workbench.sites import TOKEN_ROLES, Site

THEMES: tuple[drawing.Theme, ...] = ("light", "dark")


def luminance(color: str) -> float:
    """Relative luminance of a colour, 0 to 1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


# --- the map of a fact ---


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("column", ["score", "value"])
def test_a_heatmap_draws_the_table(kind: str, column: drawing.Column) -> None:
    result = footprint()
    drawn = plots.heatmap(result, kind=kind, column=column).data[0]
    for row in result.of(kind=kind).to_dict("records"):
        assert drawn.z[row["position"]][list(drawn.x).index(row["layer"])] == row[column]


def test_rows_run_down_from_the_first_token_and_name_the_subject() -> None:
    figure = plots.heatmap(footprint(), kind="mlp_out")
    low, high = figure.layout.yaxis.range
    assert low > high, "the axis must be turned, so that the first token is on top"
    labels = figure.layout.yaxis.ticktext
    assert "Eiff*" in labels[1]
    assert "<b>" in labels[3]
    assert labels[0] == "The"
    assert not any("*" in label for label in (labels[0], *labels[4:]))


def test_every_cell_has_a_clickable_marker_that_knows_its_site() -> None:
    result = footprint()
    markers = plots.heatmap(result, kind="attn_out").data[1]
    expected = {(row["layer"], row["position"]): row["site"] for row in result.of(kind="attn_out").to_dict("records")}
    assert {(x, y): site for x, y, site in zip(markers.x, markers.y, markers.customdata, strict=True)} == expected
    assert markers.type == "scatter"
    assert markers.marker.symbol == "square"
    assert markers.marker.opacity == 0
    assert markers.unselected.marker.opacity == markers.selected.marker.opacity == 0
    for site in markers.customdata:
        assert str(Site.parse(site)) == site


def test_a_figure_is_the_same_every_time() -> None:
    assert plots.heatmap(footprint(), kind="mlp_out").to_json() == plots.heatmap(footprint(), kind="mlp_out").to_json()


def test_the_scale_starts_at_the_corrupted_score_and_can_be_shared() -> None:
    result = footprint()
    drawn = plots.heatmap(result, kind="mlp_out").data[0]
    assert drawn.zmin == 0.1
    assert drawn.zmax == result.of(kind="mlp_out")["score"].max()
    vmin, vmax = plots.shared_range(result)
    assert (vmin, vmax) == (0.1, result.table["score"].max())
    shared = plots.heatmap(result, kind="mlp_out", vmin=vmin, vmax=vmax).data[0]
    assert (shared.zmin, shared.zmax) == (vmin, vmax)
    effects = plots.heatmap(result, kind="mlp_out", column="value").data[0]
    assert effects.zmin == 0


def test_where_lower_is_better_the_scale_is_turned() -> None:
    drawn = plots.heatmap(footprint(score="rank"), kind="mlp_out").data[0]
    assert drawn.reversescale
    assert drawn.zmax == 0.1
    assert not plots.heatmap(footprint(score="rank"), kind="mlp_out", column="value").data[0].reversescale


def test_axes_and_bar_say_what_they_are() -> None:
    figure = plots.heatmap(footprint(), kind="mlp_out")
    assert figure.layout.xaxis.title.text == "centre of a window of 3 layers (0-based)"
    assert figure.data[0].colorbar.title.text == "p(Paris)"
    assert plots.heatmap(footprint(), kind="resid_post").layout.xaxis.title.text == "layer (0-based)"
    assert plots.heatmap(footprint(window=1), kind="mlp_out").layout.xaxis.title.text == "layer (0-based)"
    effects = plots.heatmap(footprint(answer="New York"), kind="mlp_out", column="value")
    assert effects.data[0].colorbar.title.text == "effect on p(New York)"


def test_hover_tells_the_numbers_and_the_window() -> None:
    result = footprint()
    markers = plots.heatmap(result, kind="mlp_out").data[1]
    note = dict(zip(markers.customdata, markers.hovertext, strict=True))["L2.mlp_out@3"]
    row = result.table.set_index("site").loc["L2.mlp_out@3"]
    assert f"p(Paris) = {row['score']:.3f} ± {row['se']:.3f}" in note
    assert "subject last" in note
    assert "“␣Tower”" in note
    assert "layers 1–3 together" in note


def test_the_planted_band_is_marked() -> None:
    figure = plots.heatmap(footprint(), kind="mlp_out", planted=range(2, 4))
    (line,) = figure.layout.shapes
    assert 1.5 < line.x0 < 2 < 3 < line.x1 < 3.5
    assert not plots.heatmap(footprint(), kind="mlp_out").layout.shapes


def test_of_several_facts_one_is_named() -> None:
    result = several()
    drawn = plots.heatmap(result, kind="mlp_out", fact="fact-2").data[0]
    assert np.array_equal(drawn.z, result.grid(kind="mlp_out", fact="fact-2", column="score").to_numpy())
    with pytest.raises(ResultError, match="4 facts"):
        plots.heatmap(result, kind="mlp_out")
    with pytest.raises(ResultError, match="no row"):
        plots.heatmap(footprint(), kind="z")


def test_without_scores_effects_are_drawn() -> None:
    result = footprint()
    bare = type(result)(table=result.table.assign(score=float("nan")), run=result.run, extras=result.extras)
    drawn = plots.heatmap(bare, kind="mlp_out")
    assert drawn.data[0].z[0][0] == result.table.set_index("site").loc["L0.mlp_out@0", "value"]
    assert drawn.data[0].colorbar.title.text == "effect on p(Paris)"


@pytest.mark.parametrize(("texts", "n_layers"), [((" A",), 1), ((" A",), 6), (("a", "b", "c"), 1)])
def test_one_row_one_column_one_sample(texts: tuple[str, ...], n_layers: int) -> None:
    figure = plots.heatmap(footprint(texts, subject=(0, 1), n_layers=n_layers, samples=1), kind="mlp_out")
    assert np.shape(figure.data[0].z) == (len(texts), n_layers)
    assert not any("nan" in note.lower() or "±" in note for note in figure.data[1].hovertext)


def test_equal_scores_everywhere_still_make_a_scale() -> None:
    result = footprint()
    flat = type(result)(table=result.table.assign(score=0.1, value=0.0), run=result.run, extras=result.extras)
    for column in ("score", "value"):
        drawn = plots.heatmap(flat, kind="mlp_out", column=column).data[0]
        assert drawn.zmin < drawn.zmax


def test_odd_tokens_are_shown_as_they_are() -> None:
    figure = plots.heatmap(footprint(ODD, subject=(5, 6), answer="$a$ <b>"), kind="mlp_out")
    labels = figure.layout.yaxis.ticktext
    assert labels[:5] == ("&lt;s&gt;", "↵", "&#36;5", "&#36;x&#36;", "#1")
    assert "東京*" in labels[5]
    assert labels[6:] == ("⇥", "␣", "&amp;&lt;b&gt;", "a\u0301", "\\u200b", "NA", "%&#123;x}")
    assert figure.data[0].colorbar.title.text == "p(&#36;a&#36; &lt;b&gt;)"
    assert not any("$" in note for note in figure.data[1].hovertext)


@pytest.mark.parametrize("n", [1, 10, 30, 60])
def test_long_prompts_get_lower_rows_and_no_row_is_lost(n: int) -> None:
    figure = plots.heatmap(footprint([f" t{i}" for i in range(n)], subject=(0, 1), n_layers=2), kind="mlp_out")
    assert len(figure.layout.yaxis.ticktext) == n
    assert figure.layout.height >= 16 * n


# --- words and colours ---


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Paris", "Paris"), ("Paris", "Paris"), (" ", "␣"), ("  x", "␣x"), ("x ", "x␣"), ("\n\n", "↵↵"), ("a\tb", "a⇥b"),
        ("\x00", "\\x00"), ("\u202e", "\\u202e"), ("\u3000", "␣"), ("", ""),
    ],
)  # fmt: skip
def test_labels_of_tokens(text: str, label: str) -> None:
    assert drawing.token_label(text) == label


@pytest.mark.parametrize(("n", "step"), [(1, 1), (13, 1), (14, 2), (26, 2), (28, 5), (48, 5), (96, 10)])
def test_numbers_on_the_layer_axis(n: int, step: int) -> None:
    assert drawing.layer_ticks(range(n)) == list(range(0, n, step))


@pytest.mark.parametrize("hue", drawing.SCALES)
@pytest.mark.parametrize("theme", THEMES)
def test_scales_are_ordered_by_lightness_and_start_at_the_page(hue: str, theme: drawing.Theme) -> None:
    scale = drawing.SCALES[hue][theme]
    steps = np.diff([luminance(color) for color in scale])
    assert (steps < 0).all() if theme == "light" else (steps > 0).all()
    assert scale[0] == {"light": "#ffffff", "dark": "#14181d"}[theme]


def test_every_kind_and_role_has_words_and_a_colour() -> None:
    from workbench.sites import KINDS, ROLES

    assert set(drawing.KIND_WORDS) == set(drawing.HUES) == set(KINDS)
    assert set(drawing.ROLE_WORDS) == set(drawing.ROLE_COLORS) == set(ROLES)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    "draw",
    [
        lambda theme: plots.heatmap(footprint(), kind="mlp_out", theme=theme, planted=range(1, 2)),
        lambda theme: plots.average(average(), kind="mlp_out", theme=theme),
        lambda theme: plots.profile(several(), kind="mlp_out", theme=theme, planted=range(1, 2)),
        lambda theme: plots.predictions([(" Paris", 0.8), ("\n", 1e-5)], theme=theme, answer="Paris"),
        lambda theme: plots.lens([(" Paris", 0.8)], kind="attn_out", theme=theme),
        lambda theme: plots.samples([0.1, 0.2], 0.8, 0.1, theme),
    ],
)
def test_no_figure_has_a_ground_of_its_own(draw: Callable[[Any], go.Figure], theme: drawing.Theme) -> None:
    layout = draw(theme).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"


# --- averages and profiles ---


def test_an_average_draws_the_table_by_role() -> None:
    result = average()
    figure = plots.average(result, kind="attn_out")
    table = result.table[result.table["kind"] == "attn_out"].set_index(["token", "layer"])["value"]
    for y, role in enumerate(TOKEN_ROLES):
        for x, layer in enumerate(figure.data[0].x):
            assert figure.data[0].z[y][x] == table[role, layer]
    assert [
        drawing.ROLE_WORDS[role] in label for role, label in zip(TOKEN_ROLES, figure.layout.yaxis.ticktext, strict=True)
    ]
    assert "L4.attn_out@subject_last" in figure.data[1].customdata
    assert "4 facts" in figure.data[1].hovertext[0]
    assert figure.data[0].colorbar.title.text == "mean effect on p(answer)"


def test_an_average_of_something_else_is_refused() -> None:
    with pytest.raises(ResultError, match="no average"):
        plots.average(footprint(), kind="mlp_out")
    with pytest.raises(ResultError, match="no row of kind"):
        plots.average(average(), kind="z")


def test_a_profile_draws_means_with_intervals_over_facts() -> None:
    result = several()
    figure = plots.profile(result, kind="mlp_out", roles=("last", "subject_last"))
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["Last token", "Last subject token"]
    expected = result.profile(kind="mlp_out", token="last")
    assert np.allclose(lines["Last token"].y, expected["value"])
    band = next(trace for trace in figure.data if trace.fill == "toself" and trace.legendgroup == "last")
    half = (np.array(band.y[:6]) - np.array(band.y[6:])[::-1]) / 2
    assert np.allclose(half, 3.182446 * expected["se"])  # Student's t, 3 degrees of freedom


def test_a_profile_of_an_average_has_its_own_intervals() -> None:
    table = drawing.curves(average(), kind="mlp_out", roles=("last",))
    assert np.allclose(table["high"] - table["low"], 0.2)
    assert list(table.columns) == ["role", "layer", "value", "low", "high", "n"]


def test_a_profile_of_one_fact_has_no_band() -> None:
    figure = plots.profile(footprint(), kind="mlp_out")
    assert not [trace for trace in figure.data if trace.fill]
    assert len(figure.data) == 7
    with pytest.raises(ResultError, match="roles"):
        plots.profile(footprint((" A", "b"), subject=(0, 1)), kind="mlp_out", roles=("further",))


def test_what_belongs_to_no_token_has_no_map_and_no_roles() -> None:
    with pytest.raises(ResultError, match="belongs to no token"):
        plots.heatmap(of_values([[1.0, 2.0]]), kind="mlp_out")
    with pytest.raises(ResultError, match=r"compare\(\)"):
        plots.profile(of_values([[1.0, 2.0]]), kind="mlp_out")


# --- methods without a corrupted run, with signs, with heads ---


def signed(*, lowest: float = -3.0, kind: str = "mlp_out", unit: str = "logit of the answer") -> Footprint:
    """Contributions as of a method without a corrupted run."""
    result = footprint(kinds=(kind,), window=1)
    value = np.linspace(lowest, 2.0, len(result.table))
    facts = result.extras["facts"].drop(columns=["corrupted", "total_effect"])
    run = {**result.run, "what": "Contributions", "parameters": {}, "unit": unit}
    return Footprint(table=result.table.assign(value=value), run=run, extras={"facts": facts})


def with_heads() -> Footprint:
    """Two heads beside whole rows of another kind; head 1 is stronger at every token but the last."""
    result = signed()
    heads = []
    for head, at_last in ((0, 9.0), (1, 1.0)):
        rows = signed(kind="z").table
        site = rows["site"].str.replace(".z", f".z[{head}]", regex=False)
        value = np.where(rows["token"] == "last", at_last, head - rows["layer"])
        heads.append(rows.assign(site=site, head=pd.array([head] * len(rows), dtype="Int64"), value=value))
    table = pd.concat([result.table, *heads], ignore_index=True)
    return Footprint(table=table, run=result.run, extras=result.extras)


def test_without_a_corrupted_run_effects_are_drawn_in_their_own_unit() -> None:
    figure = plots.heatmap(signed(), kind="mlp_out")
    assert figure.data[0].z[0][0] == -3.0
    assert figure.data[0].colorbar.title.text.replace("<br>", " ") == "logit of the answer"
    assert figure.layout.xaxis.title.text == "layer (0-based)"


@pytest.mark.parametrize("theme", THEMES)
def test_a_map_with_both_signs_has_0_in_the_middle(theme: drawing.Theme) -> None:
    drawn = plots.heatmap(signed(), kind="mlp_out", theme=theme).data[0]
    assert (drawn.zmin, drawn.zmax) == (-3.0, 3.0)
    page = drawing.SCALES["green"][theme][0]
    colors = [color for _, color in drawn.colorscale]
    assert drawn.colorscale[len(colors) // 2] == (0.5, page)
    assert colors[0] == drawing.SCALES["purple"][theme][-1]
    assert colors[-1] == drawing.SCALES["green"][theme][-1]
    assert colors.count(page) == 1
    above = plots.heatmap(signed(lowest=0.5), kind="mlp_out", theme=theme).data[0]
    assert (above.zmin, above.zmax) == (0, 2.0)
    assert above.colorscale[0][1] == page


def test_noise_below_a_corrupted_run_stays_at_the_end_of_the_scale() -> None:
    result = footprint()
    assert (result.table["value"] < 0).any()
    assert plots.heatmap(result, kind="mlp_out", column="value").data[0].zmin == 0


@pytest.mark.parametrize("hue", drawing.SCALES)
def test_every_hue_has_another_one_below_0(hue: str) -> None:
    assert drawing.OPPOSITES[drawing.OPPOSITES[hue]] == hue


def test_single_heads_leave_maps_and_scales_of_whole_rows_alone() -> None:
    result = with_heads()
    assert drawing.mapped_kinds(result) == ["mlp_out"]
    drawn = plots.heatmap(result, kind="mlp_out").data[0]
    assert np.shape(drawn.z) == (9, 6)
    assert plots.shared_range(result) == (drawn.zmin, drawn.zmax) == (-3.0, 3.0)
    with pytest.raises(ResultError, match="single heads"):
        plots.heatmap(result, kind="z")


def test_heads_have_a_map_of_their_own() -> None:
    figure = plots.heads(with_heads())
    assert figure.layout.yaxis.ticktext == ("head 0", "head 1")
    assert figure.data[0].z[0].tolist() == [9.0] * 6  # the largest token, here the last
    assert figure.data[0].z[1].tolist() == [1.0] * 6
    assert figure.data[1].customdata[0] == "L0.z[0]@8"
    of_role = plots.heads(with_heads(), token="subject_last").data
    assert of_role[0].z.tolist() == [[-layer for layer in range(6)], [1 - layer for layer in range(6)]]
    assert (of_role[0].zmin, of_role[0].zmax) == (-5.0, 5.0)
    assert of_role[1].customdata[-1] == "L5.z[1]@subject_last"
    assert "0-based" in figure.layout.xaxis.title.text
    with pytest.raises(ResultError, match="no single heads"):
        plots.heads(footprint())


def test_a_band_that_a_map_does_not_show_is_not_marked() -> None:
    assert not plots.heatmap(footprint(), kind="mlp_out", planted=range(7, 9)).layout.shapes
    assert not plots.heatmap(signed(kind="embed"), kind="embed", planted=range(2)).layout.shapes
    (line,) = plots.heatmap(footprint(), kind="mlp_out", planted=range(4, 9)).layout.shapes
    assert line.x1 < 6


# --- methods side by side ---


def methods(n: int, *, facts: int = 3) -> list[Footprint]:
    """Made-up profiles of so many methods."""
    rng = np.random.default_rng(1)
    return [
        join([of_values([list(rng.normal(size=6))], fact=f"fact-{i}", what=f"Method{way}") for i in range(facts)])
        for way in range(n)
    ]


def named_lines(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.name}


def test_a_comparison_draws_normalised_means_with_their_intervals() -> None:
    ways = [several(), *methods(1)]
    figure = plots.compare(ways, planted=range(2, 4))
    profiles = layer_profiles(ways)
    lines = named_lines(figure)
    assert list(lines) == list(profiles["label"].unique())
    for label, line in lines.items():
        own = profiles[profiles["label"] == label].groupby("layer")["normalised"]
        assert np.allclose(line.y, own.mean())
        band = next(trace for trace in figure.data if trace.fill == "toself" and trace.legendgroup == label)
        half = (np.array(band.y[:6]) - np.array(band.y[6:])[::-1]) / 2
        assert np.allclose(half, 4.302653 * own.sem())  # Student's t, 2 degrees of freedom
    shaded = figure.layout.shapes[0]
    assert (shaded.x0, shaded.x1) == (1.5, 3.5)
    assert "0-based" in figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text == "mean normalised effect"


def test_a_comparison_of_one_fact_has_no_band() -> None:
    figure = plots.compare(methods(2, facts=1))
    assert not [trace for trace in figure.data if trace.fill]
    assert figure.layout.yaxis.title.text == "normalised effect"


@pytest.mark.parametrize("theme", THEMES)
def test_no_two_series_of_a_comparison_look_alike(theme: drawing.Theme) -> None:
    table = pd.DataFrame(
        [
            {"method": f"Method{way}", "kind": kind, "label": f"Method{way} {kind}"}
            for way in range(12)
            for kind in ("mlp_out", "attn_out", "z", "resid_post")
        ]
    )
    looks = [(colors[theme], dash) for colors, dash in drawing.series_styles(table).values()]
    assert len(set(looks)) == len(looks) == 48
    lines = named_lines(plots.compare(methods(12), theme=theme)).values()
    assert len({(line.line.color, line.line.dash) for line in lines}) == 12


def test_windows_are_named_on_the_axis_of_a_comparison() -> None:
    one, wide = footprint(window=1, kinds=("mlp_out",)), footprint(window=3, kinds=("mlp_out",))
    assert plots.compare([one]).layout.xaxis.title.text == "layer (0-based)"
    assert plots.compare([one, wide]).layout.xaxis.title.text == "layer, or centre of a window (0-based)"


def test_strips_are_the_same_numbers_a_row_each() -> None:
    ways = methods(5)
    strips, lines = plots.compare(ways, form="strips", planted=range(2, 4)), named_lines(plots.compare(ways))
    assert strips.layout.yaxis.ticktext == tuple(lines)
    assert np.allclose(strips.data[0].z, [line.y for line in lines.values()])
    assert strips.data[0].zmin == -strips.data[0].zmax
    assert len(strips.layout.shapes) == 1


# --- agreement ---


def test_agreement_is_a_symmetric_matrix_without_a_diagonal() -> None:
    result = agreement(methods(4))
    drawn = plots.agreement(result).data[0]
    assert np.isnan(np.diag(drawn.z)).all()
    assert np.array_equal(drawn.z, drawn.z.T, equal_nan=True)
    row = result.table[result.table["measure"] == "spearman"].iloc[0]
    assert drawn.z[0][1] == row["value"]
    assert (drawn.zmin, drawn.zmax) == (-1, 1)
    assert f"adjusted {row['p_adjusted']:.3f}" in drawn.customdata[0][1]


def test_a_star_marks_what_chance_does_not_explain() -> None:
    result = agreement(methods(3))
    table = result.table.assign(p_adjusted=[0.049, 0.05, np.nan] * 4)
    texts = plots.agreement(Result(table=table, run=result.run)).data[1].text.reshape(3, 3)
    assert texts[0][1].endswith("*")
    assert texts[1][0].endswith("*")
    assert not any("*" in text for text in (texts[0][2], texts[1][2]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_are_dark_on_light_cells_and_light_on_dark_ones(theme: Theme) -> None:
    result = agreement(methods(3))
    rows = result.table[result.table["measure"] == "spearman"].index
    table = result.table.copy()
    table.loc[rows, "value"] = [0.0, 1.0, 0.5]
    colors = plots.agreement(Result(table=table, run=result.run), theme=theme).data[1].textfont.color
    none, full = colors[1], colors[2]
    assert (none, full) == (("#111111", "#ffffff") if theme == "light" else ("#ffffff", "#111111"))


def test_near_methods_are_dark_whatever_is_measured() -> None:
    result = agreement(methods(3))
    distance = plots.agreement(result, measure="distance").data[0]
    assert distance.reversescale
    assert distance.zmin == 0
    assert not plots.agreement(result, measure="overlap").data[0].reversescale
    with pytest.raises(ResultError, match="no measure 'pearson'"):
        plots.agreement(result, measure="pearson")
    with pytest.raises(ResultError, match="no agreement"):
        plots.agreement(average())


# --- bars and samples ---


def test_predictions_are_bars_from_the_top() -> None:
    figure = plots.predictions([(" Paris", 0.8), (" $1", 0.1), ("\n", 1e-4)], answer="Paris")
    assert figure.data[0].x == (0.8, 0.1, 1e-4)
    assert figure.layout.yaxis.ticktext == ("<b>Paris</b>", "&#36;1", "↵")
    assert figure.data[0].text == ("80.0 %", "10.0 %", "< 0.1 %")
    assert plots.predictions([]).layout.height > 0


def test_samples_lie_between_their_lines() -> None:
    figure = plots.samples([0.3, 0.5], 0.8, 0.1, name="p(Paris)")
    assert [shape.x0 for shape in figure.layout.shapes] == [0.1, 0.8]
    assert figure.data[0].x == (0.3, 0.5)
    assert figure.data[1].x == (0.4,)
    low, high = figure.layout.xaxis.range
    assert low < 0.1 < 0.8 < high


def test_samples_are_joined_to_their_own_corrupted_score() -> None:
    figure = plots.samples([0.3, 0.5], 0.8, [0.1, 0.2])
    assert figure.data[0].x == (0.1, 0.3, None, 0.2, 0.5, None)
    assert figure.layout.shapes[0].x0 == pytest.approx(0.15)


def test_nothing_to_say_about_a_result_without_extras() -> None:
    result = footprint()
    bare = type(result)(table=result.table, run=result.run)
    figure = plots.heatmap(bare, kind="mlp_out")
    assert figure.data[0].colorbar.title.text == "p(answer)"
    assert figure.data[0].zmin == bare.of(kind="mlp_out")["score"].min()
    assert drawing.range_of(Result(table=pd.DataFrame({"kind": ["z"], "value": [np.nan]}), run={})) == (0.0, 1.0)
