"""Figures for the screen: plotly, from the same numbers that `workbench.paper` prints.

Every function takes data and returns a figure; nothing is shown. In Streamlit pass `theme=None` to `st.plotly_chart`, so that
the colours chosen here stay. Figures do not change when something in them is selected: draw a selection elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from workbench import drawing
from workbench.drawing import Column, Panel, Theme
from workbench.results import Footprint, Result
from workbench.sites import Role

__all__ = [
    "agreement",
    "average",
    "compare",
    "heads",
    "heatmap",
    "lens",
    "predictions",
    "profile",
    "samples",
    "shared_range",
]

FONT = '"Source Sans", "Source Sans 3", system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
"""Streamlit's own font first, then what each system has."""

_INK: dict[Theme, dict[str, str]] = {
    "light": dict(
        text="#20262e",
        muted="#59626c",
        faint="#dfe2de",
        card="#ffffff",
        mark="#20262e",
        bar="#2a6496",
        ground="#eef0ec",
    ),
    "dark": dict(
        text="#e4e6e3",
        muted="#9aa3ac",
        faint="#343c45",
        card="#1e242b",
        mark="#e4e6e3",
        bar="#4484bd",
        ground="#222931",
    ),
}


def heatmap(
    footprint: Footprint,
    *,
    kind: str,
    fact: str | None = None,
    theme: Theme = "light",
    column: Column = "score",
    vmin: float | None = None,
    vmax: float | None = None,
    planted: range | None = None,
    title: bool = True,
) -> go.Figure:
    """The map of one fact: tokens down, the subject's in bold with `*`; layers across (0-based); a click gives `str(Site)`.

    A click on a heat map reaches no Streamlit page, so an invisible square marker lies over each cell; its `customdata` is the
    site.

    Args:
        footprint: what to draw.
        kind: which of its kinds.
        fact: which fact; None for the only one.
        theme: the page's.
        column: raw scores as ROME draws them, or effects. Effects where there are no scores, or no corrupted run below them.
        vmin: lower end of the colour scale; None: the corrupted run's score, or an effect of 0 (which is the middle of the scale
            where a method without a corrupted run finds effects of both signs).
        vmax: upper end; None: the map's best cell. See `shared_range`.
        planted: layers in which a model is known to hold its facts; marked above the map.
        title: write the kind above the map.

    Raises:
        ResultError: no such fact or kind, or no map of it: it is of single heads or neurons, or of no token.
    """
    panel = drawing.panel(footprint, kind=kind, fact=fact, column=column, vmin=vmin, vmax=vmax)
    return _map(panel, theme=theme, planted=planted, title=title)


def heads(
    footprint: Footprint,
    *,
    kind: str = "z",
    fact: str | None = None,
    token: Role | None = None,
    theme: Theme = "light",
    vmin: float | None = None,
    vmax: float | None = None,
    planted: range | None = None,
    title: bool = True,
) -> go.Figure:
    """The effects of a fact's attention heads: heads down, layers across (both 0-based); a click gives `str(Site)`.

    A cell is the head's largest token, whose site the click gives, or with `token` the mean over the tokens of that role. Other
    arguments as of `heatmap`.

    Raises:
        ResultError: the method looked at no single heads, or no token has this role.
    """
    panel = drawing.heads_panel(footprint, kind=kind, fact=fact, token=token).on(vmin, vmax)
    return _map(panel, theme=theme, planted=planted, title=title)


def average(
    result: Result,
    *,
    kind: str,
    theme: Theme = "light",
    vmin: float | None = None,
    vmax: float | None = None,
    planted: range | None = None,
    title: bool = True,
) -> go.Figure:
    """The map of an average over facts (`analyses.average_trace`): roles of tokens down, layers across.

    Arguments as of `heatmap`; a click gives e.g. `L5.mlp_out@subject_last`.
    """
    panel = drawing.average_panel(result, kind=kind, vmin=vmin, vmax=vmax)
    return _map(panel, theme=theme, planted=planted, title=title)


def shared_range(
    footprint: Result, fact: str | None = None, column: Column = "score", kinds: Iterable[str] | None = None
) -> tuple[float, float]:
    """`vmin` and `vmax` that fit several kinds, so that their maps can be compared by eye. For averages too."""
    return drawing.range_of(footprint, fact=fact, column=column, kinds=kinds)


def profile(
    result: Result,
    *,
    kind: str,
    roles: Sequence[Role] = (),
    theme: Theme = "light",
    planted: range | None = None,
    title: bool = True,
) -> go.Figure:
    """Mean effect by layer, a line for each role of a token, with bands of 95 %.

    Args:
        result: a footprint of several facts (t intervals over facts) or an average (its own bootstrap intervals).
        kind: which kind of sites.
        roles: which roles; none: all that occur.
        theme: the page's.
        planted: layers in which a model is known to hold its facts; shaded.
        title: write the kind above the figure.

    Raises:
        ResultError: there is no such kind or role.
    """
    table, ink = drawing.curves(result, kind=kind, roles=roles), _INK[theme]
    figure = go.Figure()
    if planted:
        _shade(figure, planted, theme)
    for role in dict.fromkeys(table["role"]):
        rows, color = table[table["role"] == role], drawing.ROLE_COLORS[role][theme]
        _band(figure, rows, color=color, group=role)
        figure.add_scatter(
            x=rows["layer"], y=rows["value"], mode="lines+markers", name=drawing.ROLE_WORDS[role], legendgroup=role,
            line=dict(color=color, width=2), marker=dict(color=color, size=5),
            hovertext=[_interval_note(row) for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    _by_layer(
        figure, sorted(set(table["layer"])), ink=ink, value=_safe(drawing.curve_name(result)),
        layer=drawing.layer_title(result, kind=kind),
    )  # fmt: skip
    figure.update_layout(height=400)
    return _dressed(figure, theme=theme, title=drawing.KIND_WORDS.get(kind, kind) if title else "")


def compare(
    footprints: Sequence[Footprint],
    *,
    kinds: Sequence[str] | None = None,
    token: Role | None = None,
    form: Literal["lines", "strips"] = "lines",
    theme: Theme = "light",
    planted: range | None = None,
    title: bool = False,
) -> go.Figure:
    """Several methods by layer (0-based), each normalised fact by fact, as means over facts: see `profiles.layer_profiles`.

    Args:
        footprints: of one model, with at least one fact in common.
        kinds: which kinds of sites; None: all.
        token: the role of the tokens that count; None: the largest of all tokens.
        form: `lines`, methods in colours and kinds in dashes, with bands of 95 % (Student's t over facts; none for a single fact);
            or `strips`, a row of cells for each series, which stays readable for many.
        theme: the page's.
        planted: layers in which a model is known to hold its facts; shaded, or marked above the strips.
        title: write a title above the strips.

    Raises:
        ResultError: nothing to compare, other weights, no fact or no such kind in common, or one series twice.
    """
    if form == "strips":
        panel = drawing.comparison_panel(footprints, kinds=kinds, token=token)
        return _map(panel, theme=theme, planted=planted, title=title)
    table, ink = drawing.comparison(footprints, kinds=kinds, token=token), _INK[theme]
    styles = drawing.series_styles(table)
    figure = go.Figure()
    if planted:
        _shade(figure, planted, theme)
    figure.add_hline(y=0, line=dict(color=ink["faint"], width=1), layer="below")
    for label, (colors, _) in styles.items():
        _band(
            figure,
            table[table["label"] == label],
            color=colors[theme],
            group=label,
            alpha=0.16 if len(styles) <= 6 else 0.08,
        )
    for label, (colors, dash) in styles.items():
        rows, color = table[table["label"] == label], colors[theme]
        figure.add_scatter(
            x=rows["layer"], y=rows["value"], mode="lines+markers", name=_safe(label), legendgroup=label,
            line=dict(color=color, width=2, dash=",".join(f"{2 * length:g}px" for length in dash) or "solid"),
            marker=dict(color=color, size=5),
            hovertext=[_lines(drawing.series_note(row)) for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    _by_layer(
        figure, sorted(set(table["layer"])), ink=ink, value=drawing.comparison_name(table),
        layer=drawing.comparison_layers(footprints, kinds=table["kind"].unique()),
    )  # fmt: skip
    wide = 8 + 7 * max(map(len, styles))  # pixels of a name, so that names stand in columns
    figure.update_layout(
        height=320 + 30 * ((len(styles) + 1) // 2),
        legend=dict(itemwidth=44, entrywidth=wide, entrywidthmode="pixels"),
    )
    return _dressed(figure, theme=theme, margin=dict(l=8, r=8, t=24 if planted else 12, b=8))


def agreement(result: Result, *, measure: str = "spearman", theme: Theme = "light", title: bool = True) -> go.Figure:
    """How well methods agree, every series against every other (`analyses.locator_agreement`); `*`: adjusted p by layers < 0.05.

    Args:
        result: the agreement.
        measure: `spearman`, `kendall`, `overlap` or `distance`.
        theme: the page's.
        title: write the measure above the matrix.

    Raises:
        ResultError: the table is of something else, or has no such measure.
    """
    panel, texts = drawing.agreement_panel(result, measure=measure)
    n = len(panel.labels)
    numbers, row, size = list(range(1, n + 1)), 44 if n <= 6 else 32, 12 if n <= 8 else 10 if n <= 12 else 9
    figure = go.Figure(
        go.Heatmap(
            z=panel.values.to_numpy(), x=numbers, y=numbers, zmin=panel.low, zmax=panel.high, xgap=1, ygap=1,
            colorscale=_scale(panel.colors(theme)), reversescale=panel.reverse,
            customdata=[[_lines(note) if note else "" for note in notes] for notes in panel.notes.to_numpy()],
            hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
            colorbar=dict(thickness=10, outlinewidth=0, xpad=10, ypad=0, len=1, nticks=5, ticks="", tickfont_size=11),
        )
    )  # fmt: skip
    figure.add_scatter(
        x=numbers * n, y=[i for i in numbers for _ in numbers], text=texts.to_numpy().ravel(), mode="text",
        textfont=dict(size=size, color=_on_cells(panel, theme)), hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=numbers, side="top", ticks="", showgrid=False, zeroline=False, fixedrange=True, range=[0.5, n + 0.5]
    )
    figure.update_yaxes(
        tickvals=numbers, ticktext=[_safe(label) for label in panel.labels], range=[n + 0.5, 0.5], ticks="",
        showgrid=False, zeroline=False, automargin=True, fixedrange=True, ticklabelstandoff=4,
    )  # fmt: skip
    top = 58 if title else 28
    figure.update_layout(height=top + 12 + row * n, dragmode=False)
    heading = panel.title[:1].upper() + panel.title[1:]
    return _dressed(figure, theme=theme, title=heading if title else "", margin=dict(l=8, r=8, t=top, b=12))


def predictions(
    top: Sequence[tuple[str, float]], *, theme: Theme = "light", answer: str = "", color: str | None = None
) -> go.Figure:
    """The most probable next tokens, as bars.

    Args:
        top: tokens and probabilities, the most probable first.
        theme: the page's.
        answer: the answer looked for; its bar stands out, the others step back.
        color: of the bars.
    """
    ink = _INK[theme]
    strong = color or ink["bar"]
    is_answer = [not answer or token.strip() == answer.strip() for token, _ in top]
    figure = go.Figure(
        go.Bar(
            x=[p for _, p in top],
            y=list(range(len(top))),
            orientation="h",
            marker=dict(color=[strong if yes else _faded(strong, 0.38) for yes in is_answer], line_width=0),
            text=[_percent(p) for _, p in top],
            textposition="outside",
            textfont=dict(color=ink["muted"], size=12),
            cliponaxis=False,
            hovertext=[f"“{_safe(drawing.visible(token))}” {p:.4g}" for token, p in top],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    labels = [_safe(drawing.shortened(drawing.token_label(token), 24)) for token, _ in top]
    figure.update_yaxes(
        tickvals=list(range(len(top))),
        ticktext=[f"<b>{label}</b>" if answer and yes else label for label, yes in zip(labels, is_answer, strict=True)],
        range=[len(top) - 0.5, -0.5], tickfont=dict(size=13, color=ink["text"]), automargin=True, showgrid=False,
        ticklabelstandoff=4,
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, 1.45 * max([p for _, p in top], default=1.0) or 1.0])
    figure.update_layout(height=16 + 26 * max(1, len(top)), bargap=0.28)
    return _dressed(figure, theme=theme, margin=dict(l=8, r=8, t=4, b=4))


def lens(
    top: Sequence[tuple[str, float]], *, kind: str = "resid_post", theme: Theme = "light", answer: str = ""
) -> go.Figure:
    """What the logit lens reads at a site, as `predictions` in the colour of the site's kind."""
    scale = drawing.SCALES[drawing.HUES.get(kind, "blue")][theme]
    return predictions(top, theme=theme, answer=answer, color=scale[5])


def samples(
    values: Sequence[float],
    clean: float,
    corrupted: float | Sequence[float],
    theme: Theme = "light",
    *,
    name: str = "score",
    kind: str = "resid_post",
) -> go.Figure:
    """Every noise sample's score at one site, between the corrupted and the clean run.

    Args:
        values: one score a sample, with the site restored.
        clean: the clean run's score.
        corrupted: the corrupted run's: its mean, or one score a sample in the same order. Then a line joins each pair, since both
            had the same noise.
        theme: the page's.
        name: what the scores are, e.g. `p(Paris)`.
        kind: of the site, for the colour.
    """
    ink, values = _INK[theme], [float(v) for v in values]
    color = drawing.SCALES[drawing.HUES.get(kind, "blue")][theme][5]
    pairs = [] if isinstance(corrupted, (int, float)) else [float(v) for v in corrupted]
    low = float(corrupted) if isinstance(corrupted, (int, float)) else sum(pairs) / max(1, len(pairs))
    figure = go.Figure()
    everything = [*values, *pairs, low, clean]
    span = max(everything) - min(everything) or 1.0
    apart = abs(clean - low) > 0.3 * span  # then there is room for both words between the lines
    pad = span * (0.04 if apart else 0.3)
    for x, text, dash in ((low, "corrupted", "dot"), (clean, "clean", "solid")):
        figure.add_vline(x=x, line=dict(color=ink["muted"], width=1.2, dash=dash))
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", xanchor="left" if (x == min(low, clean)) == apart else "right",
            text=f"{text} {drawing.number(x)}", showarrow=False, font=dict(size=12, color=ink["muted"]),
        )  # fmt: skip
    if pairs:
        figure.add_scatter(
            x=[x for pair in zip(pairs, values, strict=True) for x in (*pair, None)],
            y=[y for _ in pairs for y in (0, 1, None)],
            mode="lines", line=dict(color=_faded(color, 0.35), width=1), hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(x=pairs, y=[0] * len(pairs), **_dots(ink["muted"], "corrupted"))
        figure.update_yaxes(tickvals=[0, 1], ticktext=["corrupted", "restored"], range=[-0.5, 1.5])
    else:
        figure.update_yaxes(tickvals=[1], ticktext=["restored"], range=[0.4, 1.6])
    figure.add_scatter(x=values, y=[1] * len(values), **_dots(color, "restored"))
    if values:
        mean = sum(values) / len(values)
        figure.add_scatter(
            x=[mean], y=[1], mode="markers", hovertemplate=f"mean {drawing.number(mean)}<extra></extra>",
            marker=dict(symbol="line-ns", size=22, line=dict(color=color, width=3)),
        )  # fmt: skip
    figure.update_yaxes(showgrid=False, zeroline=False, tickfont=dict(color=ink["text"]), automargin=True)
    figure.update_xaxes(
        title_text=_safe(name), showgrid=False, zeroline=False, showline=True, linecolor=ink["faint"],
        automargin=True, range=[min(everything) - pad, max(everything) + pad],
    )  # fmt: skip
    figure.update_layout(height=172 if pairs else 136, showlegend=False, hovermode="closest")
    return _dressed(figure, theme=theme, margin=dict(l=8, r=16, t=24, b=8))


# --- parts ---


def _map(panel: Panel, *, theme: Theme, planted: range | None, title: bool) -> go.Figure:
    """A map with its invisible, clickable markers."""
    ink, values = _INK[theme], panel.values
    n_rows, layers = len(values), [int(layer) for layer in values.columns]
    planted = panel.marked(planted)
    row = _row_height(n_rows)
    few = 7 if max(map(len, panel.labels)) > 14 else 13  # long labels leave less room for the layers' numbers
    short = len(panel.score) <= 14
    bar_title = "<br>".join(map(_safe, [panel.score] if short else drawing.wrapped(panel.score, row * n_rows // 7)))
    figure = go.Figure(
        go.Heatmap(
            z=values.to_numpy(), x=layers, y=list(range(n_rows)), zmin=panel.low, zmax=panel.high,
            colorscale=_scale(panel.colors(theme)), reversescale=panel.reverse, hoverinfo="skip",
            xgap=1 if len(layers) <= 60 else 0, ygap=1,
            colorbar=dict(
                title=dict(text=bar_title, side="top" if short else "right", font=dict(size=12, color=ink["muted"])),
                thickness=10, outlinewidth=0, len=1, lenmode="fraction", y=0.5, xpad=10, ypad=0, nticks=5,
                tickfont=dict(size=11, color=ink["muted"]), ticks="",
            ),
        )
    )  # fmt: skip
    cells = [
        (y, x, r, layer)
        for y, r in enumerate(values.index)
        for x, layer in enumerate(layers)
        if isinstance(panel.sites.at[r, layer], str)
    ]
    figure.add_scatter(
        x=[layer for *_, layer in cells],
        y=[y for y, *_ in cells],
        mode="markers",
        marker=dict(symbol="square", size=min(row, 26) - 2, opacity=0, color=ink["mark"]),
        selected=dict(marker=dict(opacity=0)),
        unselected=dict(marker=dict(opacity=0)),
        customdata=[panel.sites.at[r, layer] for _, _, r, layer in cells],
        hovertext=[_lines(str(panel.notes.at[r, layer])) for _, _, r, layer in cells],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    y, x = panel.estimated.to_numpy(dtype=bool).nonzero()
    if len(x):
        figure.add_scatter(
            x=[layers[i] for i in x], y=y, mode="markers", marker=dict(size=3, color=ink["muted"]), hoverinfo="skip",
            showlegend=False,
        )  # fmt: skip
    figure.update_xaxes(
        title_text=panel.layer_title, tickvals=drawing.layer_ticks(layers, most=few), tickangle=0,
        range=[layers[0] - 0.5, layers[-1] + 0.5],
        ticks="", showgrid=False, zeroline=False, showline=True, mirror=True, linecolor=ink["faint"], fixedrange=True,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(n_rows)), ticktext=[_row_label(panel, i, theme) for i in range(n_rows)],
        range=[n_rows - 0.5, -0.5], ticks="", showgrid=False, zeroline=False, showline=True, mirror=True,
        linecolor=ink["faint"], automargin=True, fixedrange=True, ticklabelstandoff=4,
        tickfont=dict(size=13 if n_rows <= 16 else 12 if n_rows <= 24 else 11),
    )  # fmt: skip
    if planted:
        figure.add_shape(
            type="line", x0=planted[0] - 0.45, x1=planted[-1] + 0.45, yref="paper", ysizemode="pixel", yanchor=1, y0=4, y1=4,
            line=dict(color=ink["mark"], width=2),
        )  # fmt: skip
        figure.add_annotation(**_planted_note(planted, theme), y=1, yshift=12)
    top, bottom = (34 if title else 12) + (16 if planted else 0), 48
    figure.update_layout(
        height=top + bottom + row * n_rows, hovermode="closest", hoverdistance=-1, clickmode="event+select", dragmode=False,
        showlegend=False,
    )  # fmt: skip
    return _dressed(figure, theme=theme, title=panel.title if title else "", margin=dict(l=8, r=8, t=top, b=bottom))


def _by_layer(figure: go.Figure, layers: Sequence[int], *, ink: dict[str, str], value: str, layer: str) -> None:
    """Axes and legend of lines over the layers."""
    figure.update_xaxes(
        title_text=layer, tickvals=drawing.layer_ticks(layers), tickangle=0,
        range=[layers[0] - 0.5, layers[-1] + 0.5], showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    figure.update_yaxes(title_text=value, gridcolor=ink["faint"], griddash="dot", zeroline=False, automargin=True)
    figure.update_layout(hovermode="closest", legend=dict(orientation="h", y=-0.2, yanchor="top", x=0, xanchor="left"))


def _band(figure: go.Figure, rows: pd.DataFrame, *, color: str, group: str, alpha: float = 0.16) -> None:
    """What lies between `low` and `high`, where there is such."""
    around = rows.dropna(subset=["low", "high"])
    if len(around):
        figure.add_scatter(
            x=[*around["layer"], *around["layer"][::-1]], y=[*around["high"], *around["low"][::-1]],
            fill="toself", fillcolor=_faded(color, alpha), line_width=0, mode="lines", hoverinfo="skip",
            legendgroup=group, showlegend=False,
        )  # fmt: skip


def _shade(figure: go.Figure, planted: range, theme: Theme) -> None:
    """The planted band behind lines over the layers."""
    figure.add_vrect(
        x0=planted[0] - 0.5, x1=planted[-1] + 0.5, fillcolor=_INK[theme]["ground"], line_width=0, layer="below"
    )
    figure.add_annotation(**_planted_note(planted, theme), y=1, yshift=10)


def _dressed(figure: go.Figure, *, theme: Theme, title: str = "", margin: dict[str, int] | None = None) -> go.Figure:
    """The figure in the page's ink, on no ground of its own."""
    ink = _INK[theme]
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family=FONT, size=13, color=ink["muted"]),
        margin=margin or dict(l=8, r=8, t=34 if title else 12, b=8),
        hoverlabel=dict(
            bgcolor=ink["card"],
            bordercolor=ink["faint"],
            font=dict(family=FONT, size=13, color=ink["text"]),
            align="left",
        ),
        uirevision="constant",
        separators=".,",
    )
    if title:
        figure.update_layout(
            title=dict(
                text=title, x=0, xref="paper", xanchor="left", y=1, yref="container", yanchor="top", pad=dict(t=8),
                font=dict(size=15, color=ink["text"], weight=600),
            )
        )  # fmt: skip
    figure.update_xaxes(title_font=dict(size=13, color=ink["muted"]), title_standoff=8, tickfont_size=12)
    figure.update_yaxes(title_font=dict(size=13, color=ink["muted"]), title_standoff=8)
    return figure


def _row_height(n_rows: int) -> int:
    """Pixels of a row: roomy for short prompts, still readable for long ones."""
    if n_rows <= 3:
        return 90 // n_rows  # room for the colour bar
    return 26 if n_rows <= 12 else 22 if n_rows <= 18 else 18 if n_rows <= 28 else 16


def _row_label(panel: Panel, row: int, theme: Theme) -> str:
    label, ink = _safe(panel.labels[row]), _INK[theme]
    if panel.strong[row]:
        return f'<span style="color:{ink["text"]}"><b>{label}</b></span>'
    return label


def _planted_note(planted: range, theme: Theme) -> dict[str, Any]:
    return dict(
        x=(planted[0] + planted[-1]) / 2, yref="paper", text="planted", showarrow=False, yanchor="middle",
        font=dict(size=11, color=_INK[theme]["muted"]),
    )  # fmt: skip


def _interval_note(row: dict[str, Any]) -> str:
    note = f"{drawing.ROLE_WORDS[row['role']]} · layer {row['layer']}<br>{drawing.number(row['value'], sign=True)}"
    if not pd.isna(row["low"]):
        note += f" [{drawing.number(row['low'], sign=True)}, {drawing.number(row['high'], sign=True)}]"
    return f"{note}<br>{row['n']} facts"


def _dots(color: str, name: str) -> dict[str, Any]:
    return dict(
        mode="markers",
        marker=dict(color=_faded(color, 0.75), size=9),
        hovertemplate=f"{name} %{{x:.4g}}<extra></extra>",
    )


def _scale(colors: Sequence[str]) -> list[list[Any]]:
    return [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]


def _on_cells(panel: Panel, theme: Theme) -> list[str]:
    """For every cell, black or white: what is read on its colour."""
    share = (panel.values.to_numpy(dtype=float).ravel() - panel.low) / (panel.high - panel.low)
    share = np.nan_to_num(1 - share if panel.reverse else share, nan=0.5).clip(0, 1)
    cells = sample_colorscale(_scale(panel.colors(theme)), share, colortype="tuple")
    return ["#111111" if np.dot(cell, (0.299, 0.587, 0.114)) > 0.55 else "#ffffff" for cell in cells]


def _faded(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else "< 0.1 %"


def _lines(note: str) -> str:
    first, *rest = note.split("\n")
    return "<br>".join([f"<b>{_safe(first)}</b>", *map(_safe, rest)])


def _safe(text: str) -> str:
    """Text that plotly shows as it is: no tags, and no dollar signs that would start a formula."""
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")
