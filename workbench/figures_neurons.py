"""Figures about MLP neurons, for the screen and for paper: what each layer and each neuron writes, and a neuron in words.

Looks and arguments are those of `workbench.plots` and `workbench.paper`, whose parts are used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workbench import drawing, paper, plots
from workbench.drawing import Theme
from workbench.paper import PaperFigure, Size
from workbench.results import Footprint, ResultError

__all__ = ["contributions", "neuron_label", "paper_contributions", "paper_tokens", "tokens"]

NAMED = 4
"""How many neurons are named on paper at most, where nothing can be pointed at."""


def neuron_label(layer: int, neuron: int) -> str:
    """A neuron's short name, e.g. `L5.17`."""
    return f"L{layer}.{neuron}"


def contributions(
    footprint: Footprint, *, fact: str | None = None, theme: Theme = "light", planted: range | None = None
) -> go.Figure:
    """What each layer's MLP adds to the answer's logit at one token, as bars (layers 0-based), and its strongest neurons as dots.

    A click on a dot gives the neuron's site.

    Args:
        footprint: of `ValueVectors`.
        fact: which fact; None for the only one.
        theme: the page's.
        planted: layers in which a model is known to hold its facts; shaded.

    Raises:
        ResultError: no such fact, several and none named, or no contributions of whole layers.
    """
    layers, neurons, name = _drawn(footprint, fact)
    ink, (rising, falling) = plots._INK[theme], _signs(theme)
    figure = go.Figure()
    if planted:
        plots._shade(figure, planted, theme)
    figure.add_bar(
        x=layers["layer"], y=layers["value"], width=0.72, showlegend=False,
        marker=dict(color=[rising if value >= 0 else falling for value in layers["value"]], opacity=0.55, line_width=0),
        hovertext=[plots._lines(_layer_note(row, name)) for row in layers.to_dict("records")],
        hovertemplate="%{hovertext}<extra></extra>", selected_marker_opacity=0.55, unselected_marker_opacity=0.55,
    )  # fmt: skip
    figure.add_scatter(
        x=neurons["layer"], y=neurons["value"], mode="markers", showlegend=False,
        marker=dict(size=10, color=ink["mark"], opacity=0.85, line=dict(color=ink["card"], width=1)),
        selected_marker_opacity=0.85, unselected_marker_opacity=0.85,
        customdata=list(neurons["site"]),
        hovertext=[plots._lines(_neuron_note(row, name)) for row in neurons.to_dict("records")],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    plots._by_layer(figure, list(layers["layer"]), ink=ink, value=plots._safe(name), layer="layer (0-based)")
    figure.update_yaxes(zeroline=True, zerolinecolor=ink["muted"], zerolinewidth=1, fixedrange=True)
    figure.update_xaxes(fixedrange=True)
    figure.update_layout(height=330, clickmode="event+select", dragmode=False, hoverdistance=12)
    return plots._dressed(figure, theme=theme, margin=dict(l=8, r=8, t=24 if planted else 12, b=8))


def paper_contributions(
    footprint: Footprint, *, fact: str | None = None, planted: range | None = None, size: Size | None = None
) -> PaperFigure:
    """`contributions` for print; the strongest neurons are named.

    Args:
        footprint: of `ValueVectors`.
        fact: which fact; None for the only one.
        planted: layers in which a model is known to hold its facts; shaded.
        size: None: a column.

    Raises:
        ResultError: as `contributions`.
    """
    layers, neurons, name = _drawn(footprint, fact)
    with paper._settings():
        width, height = paper._inches(size, n=1, one=1.7, extra=0.5)
        figure = PaperFigure(
            run=footprint.run, title="Value vectors by layer", figsize=(width, height), layout="constrained"
        )
        ax = figure.subplots()
        if planted:
            ax.axvspan(planted[0] - 0.5, planted[-1] + 0.5, color="#ededed", linewidth=0, zorder=0)
        ax.axhline(0, color=paper._FRAME, linewidth=0.5, zorder=1)
        rising, falling = _signs("light")
        colors = [rising if value >= 0 else falling for value in layers["value"]]
        ax.bar(layers["layer"], layers["value"], width=0.72, color=colors, alpha=0.5, linewidth=0)
        ax.plot(neurons["layer"], neurons["value"], "o", markersize=2.4, color=paper._INK, markeredgewidth=0)
        numbers = [int(layer) for layer in layers["layer"]]
        ax.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
        ax.set_xticks(drawing.layer_ticks(numbers))
        paper._frame(ax, sides=("left", "bottom"))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        paper._write(ax.xaxis.label, "layer (0-based)")
        paper._write(ax.yaxis.label, name)
        _name_strongest(ax, neurons)
        paper._settle(figure)
    return figure


def tokens(table: pd.DataFrame, *, theme: Theme = "light", answer: str = "") -> go.Figure:
    """A value vector in words: the tokens that it promotes to the right, those that it suppresses to the left, strongest on top.

    Args:
        table: one row a token: `direction` (promoted or suppressed), `rank` (from 0), `text`, `value`.
        theme: the page's.
        answer: a token that stands out.
    """
    ink, colors = plots._INK[theme], dict(zip(("promoted", "suppressed"), _signs(theme), strict=True))
    n, reach = _extent(table)
    figure = go.Figure()
    for direction, color in colors.items():
        rows = table[table["direction"] == direction]
        figure.add_bar(
            x=rows["value"], y=rows["rank"], orientation="h", showlegend=False,
            marker=dict(color=color, opacity=0.75, line_width=0),
            text=[_token_text(row, answer, bold=("<b>", "</b>")) for row in rows.to_dict("records")],
            textposition="outside", textfont=dict(size=12, color=ink["text"]), cliponaxis=False,
            hovertext=[f"“{plots._safe(drawing.visible(str(row['text'])))}” {drawing.number(row['value'], sign=True)}"
                       for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        range=[-reach, reach], zeroline=True, zerolinecolor=ink["muted"], zerolinewidth=1, showgrid=False,
        showticklabels=False, fixedrange=True,
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[n - 0.5, -0.5], fixedrange=True)
    for x, xanchor, direction in ((1, "right", "promoted"), (0, "left", "suppressed")):
        figure.add_annotation(
            x=x, xref="paper", xanchor=xanchor, y=1, yref="paper", yanchor="bottom", text=direction, showarrow=False,
            font=dict(size=12, color=ink["muted"]),
        )  # fmt: skip
    figure.update_layout(height=30 + 24 * n, bargap=0.3, barmode="overlay")
    return plots._dressed(figure, theme=theme, margin=dict(l=4, r=4, t=22, b=4))


def paper_tokens(
    tables: Mapping[str, pd.DataFrame],
    *,
    run: Mapping[str, Any],
    title: str = "",
    answer: str = "",
    size: Size | None = None,
) -> PaperFigure:
    """`tokens` for print, several readings of one neuron side by side.

    Args:
        tables: what is written above each, and its tokens as for `tokens`.
        run: the manifest of what is drawn.
        title: of the document.
        answer: a token that stands out.
        size: None: a page, or a column for one reading.
    """
    with paper._settings():
        n = max(_extent(table)[0] for table in tables.values())
        width, height = paper._inches(size, n=len(tables), one=0.13 * n, extra=0.3)
        figure = PaperFigure(run=run, title=title, figsize=(width, height), layout="constrained")
        for ax, (words, table) in zip(
            figure.subplots(1, len(tables), squeeze=False).ravel(), tables.items(), strict=True
        ):
            _draw_tokens(ax, table, answer=answer)
            paper._write(ax.title, words, size=8)
        paper._settle(figure)
    return figure


# --- parts ---


def _drawn(footprint: Footprint, fact: str | None) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """The rows of whole layers, those of single neurons, and what their values are."""
    if fact is None and len(footprint.facts) != 1:
        raise ResultError(
            f"This footprint has {len(footprint.facts)} facts. Name one of them, e.g. {footprint.facts[0]!r}."
        )
    layers = footprint.whole(fact=fact, kind="mlp_post").sort_values("layer")
    answer = drawing._word(str(drawing.fact_row(footprint, fact).get("answer") or "answer"))
    return layers, footprint.neurons(fact=fact), f"direct effect on logit({answer})"


def _signs(theme: Theme) -> tuple[str, str]:
    """Colours of what raises and of what lowers a logit: as in maps of an MLP's effects."""
    hue = drawing.HUES["mlp_post"]
    return drawing.SCALES[hue][theme][5], drawing.SCALES[drawing.OPPOSITES[hue]][theme][5]


def _layer_note(row: Mapping[Any, Any], name: str) -> str:
    return f"layer {row['layer']}, whole MLP\n{name} = {drawing.number(row['value'], sign=True)}"


def _neuron_note(row: Mapping[Any, Any], name: str) -> str:
    return f"{neuron_label(row['layer'], row['neuron'])}\n{name} = {drawing.number(row['value'], sign=True)}"


def _extent(table: pd.DataFrame) -> tuple[int, float]:
    """How many rows of bars, and how far the axis reaches, so that there is room for words beyond the bars."""
    return int(table["rank"].max()) + 1, 2.2 * float(table["value"].abs().max()) or 1.0


def _token_text(row: Mapping[Any, Any], answer: str, *, bold: tuple[str, str]) -> str:
    words = plots._safe(drawing.shortened(drawing.token_label(str(row["text"])), 16))
    if answer and str(row["text"]).strip() == answer.strip():
        words = words.join(bold)
    return f"{words}  {drawing.number(row['value'], sign=True)}"


def _name_strongest(ax: Axes, neurons: pd.DataFrame) -> None:
    """Writes the names of the strongest neurons beside their dots, as far as they lie on no dot and on no other name."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    long, tall = 0.13 * (right - left), 0.05 * (high - low)
    dots = [(float(x), float(y)) for x, y in zip(neurons["layer"], neurons["value"], strict=True)]
    taken: list[tuple[float, float, float]] = []
    for row in neurons.sort_values("value", key=abs, ascending=False).to_dict("records"):
        x, y = float(row["layer"]), float(row["value"])
        for start, stop in ((x, x + long), (x - long, x)):
            free = all(
                abs(y - there) > tall or last <= start or first >= stop
                for first, last, there in [*taken, *((dot, dot, there) for dot, there in dots)]
            )
            if len(taken) < NAMED and free and left <= start and stop <= right:
                taken.append((start, stop, y))
                side = 1 if start == x else -1
                note = ax.annotate(
                    "", (x, y), xytext=(3 * side, 0), textcoords="offset points", va="center",
                    ha="left" if side > 0 else "right",
                )  # fmt: skip
                paper._write(note, neuron_label(row["layer"], row["neuron"]), size=6)
                break


def _draw_tokens(ax: Axes, table: pd.DataFrame, *, answer: str) -> None:
    n, reach = _extent(table)
    for direction, color, side in zip(("promoted", "suppressed"), _signs("light"), (1, -1), strict=True):
        rows = table[table["direction"] == direction]
        ax.barh(rows["rank"], rows["value"], height=0.7, color=color, alpha=0.7, linewidth=0)
        for row in rows.to_dict("records"):
            note = ax.annotate(
                "", (row["value"], row["rank"]), xytext=(2 * side, 0), textcoords="offset points", va="center",
                ha="left" if side > 0 else "right",
            )  # fmt: skip
            words = drawing.shortened(drawing.token_label(str(row["text"])), 16)
            is_answer = bool(answer) and str(row["text"]).strip() == answer.strip()
            paper._write(
                note,
                f"{words} {drawing.number(row['value'], sign=True)}",
                size=6.5,
                weight="bold" if is_answer else "normal",
            )
    ax.axvline(0, color=paper._FRAME, linewidth=0.5)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_yticks([])
    paper._frame(ax, sides=())
