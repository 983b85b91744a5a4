"""The circuit of a fact, for the screen and for paper: heads and MLPs over the layers, and the edges that carry the answer.

Looks and arguments are those of `workbench.plots` and `workbench.paper`, whose parts are used here. Layers run across, each with
its heads (circles) above its MLP (square); within a layer the MLP stands to the right of the heads, since it reads after them.
Only parts with an edge are drawn, so the rows are no scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from workbench import drawing, paper, plots
from workbench.drawing import Theme
from workbench.paper import PaperFigure, Size
from workbench.results import Footprint, ResultError

__all__ = ["circuit", "paper_circuit"]

POINTS = 17
"""Points of a drawn edge."""

_SIGNS: Mapping[Theme, tuple[str, str]] = {"light": ("#0072b2", "#d55e00"), "dark": ("#3f9bd8", "#e8762a")}
"""Okabe and Ito's blue for edges that speak for the answer, their vermilion for those against it."""

_DASHES: Mapping[str, tuple[str, Any]] = {"q": ("dash", (0, (4, 2))), "k": ("dot", (0, (1, 1.5)))}
"""How edges into queries and keys are dashed, for plotly and for matplotlib; all others are solid."""

_BENDS: Mapping[str, float] = {"q": -0.16, "k": 0.0, "v": 0.16}
"""By how much the edges of one pair of parts bend apart, in rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """What is drawn, in units of layers across and of rows up."""

    nodes: pd.DataFrame
    """One row a part: node, kind, label, x, y, note."""

    edges: pd.DataFrame
    """One row a line, the weakest first: x and y (arrays), share (of the strongest, 0 to 1), positive, input, note."""

    layers: Sequence[int]
    """All layers of the model."""

    rows: int
    """How many rows there are, that of the MLPs included."""

    widest: str
    """The strength of the strongest edge, which is drawn widest."""


def circuit(
    footprint: Footprint,
    *,
    fact: str | None = None,
    theme: Theme = "light",
    top: int = 40,
    threshold: float = 0.0,
    connected: bool = True,
    planted: range | None = None,
) -> go.Figure:
    """The strongest edges of one fact: width by strength, blue for the answer and orange against it; layers across (0-based).

    A click on a part gives its site.

    Args:
        footprint: of `CircuitEdges`.
        fact: which fact; None for the only one.
        theme: the page's.
        top: how many edges are drawn at most.
        threshold: edges below this size are left out, in the score's unit.
        connected: leave out drawn edges that lie on no path from the embedding to the logits.
        planted: layers in which a model is known to hold its facts; shaded.

    Raises:
        ResultError: no table of edges, no such fact, several and none named, or no edge that strong.
    """
    drawn = _drawn(footprint, fact, top=top, threshold=threshold, connected=connected)
    ink, figure = plots._INK[theme], go.Figure()
    if planted:
        plots._shade(figure, planted, theme)
    for row in drawn.edges.to_dict("records"):
        color = _SIGNS[theme][0 if row["positive"] else 1]
        figure.add_scatter(
            x=row["x"], y=row["y"], mode="lines", showlegend=False, opacity=0.35 + 0.6 * row["share"],
            line=dict(color=color, width=0.8 + 5.2 * row["share"], dash=_DASHES.get(row["input"], ("solid",))[0]),
            hovertext=[plots._lines(row["note"])] * POINTS, hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    for kind, (symbol, _, color, size, place) in _marks(theme).items():
        rows = drawn.nodes[drawn.nodes["kind"] == kind]
        if len(rows):
            figure.add_scatter(
                x=rows["x"], y=rows["y"], mode="markers+text", showlegend=False, text=rows["label"],
                textposition=place, textfont=dict(size=11, color=ink["text"]),
                marker=dict(symbol=symbol, size=size, color=ink["card"], opacity=1, line=dict(color=color, width=2)),
                customdata=list(rows["node"]), hovertext=[plots._lines(note) for note in rows["note"]],
                hovertemplate="%{hovertext}<extra></extra>", selected_marker_opacity=1, unselected_marker_opacity=1,
            )  # fmt: skip
    _explain(figure, drawn, theme)
    figure.update_xaxes(
        title_text="layer (0-based)", tickvals=drawing.layer_ticks(drawn.layers), tickangle=0, range=_extent(drawn),
        showgrid=False, zeroline=False, fixedrange=True,
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.9, drawn.rows - 0.3], fixedrange=True)
    figure.update_layout(
        height=130 + 52 * drawn.rows, clickmode="event+select", dragmode=False, hovermode="closest", hoverdistance=8,
        legend=dict(
            orientation="h", y=0, yref="container", yanchor="bottom", x=0, xanchor="left", itemclick=False, itemdoubleclick=False
        ),
    )  # fmt: skip
    return plots._dressed(figure, theme=theme, margin=dict(l=8, r=8, t=24 if planted else 12, b=84))


def paper_circuit(
    footprint: Footprint,
    *,
    fact: str | None = None,
    top: int = 40,
    threshold: float = 0.0,
    connected: bool = True,
    planted: range | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """`circuit` for print.

    Args:
        footprint: of `CircuitEdges`.
        fact: which fact; None for the only one.
        top: how many edges are drawn at most.
        threshold: edges below this size are left out, in the score's unit.
        connected: leave out drawn edges that lie on no path from the embedding to the logits.
        planted: layers in which a model is known to hold its facts; shaded.
        size: None: a page.

    Raises:
        ResultError: as `circuit`.
    """
    drawn = _drawn(footprint, fact, top=top, threshold=threshold, connected=connected)
    with paper._settings():
        width, height = paper._inches(size or "page", n=1, one=0.33 * drawn.rows, extra=0.85)
        figure = PaperFigure(run=footprint.run, title="Circuit", figsize=(width, height), layout="constrained")
        ax = figure.subplots()
        if planted:
            ax.axvspan(planted[0] - 0.5, planted[-1] + 0.5, color="#ededed", linewidth=0, zorder=0)
        _draw(ax, drawn, scale=max(0.7, min(1.0, width / 7)))
        ax.set_xlim(*_extent(drawn))
        ax.set_ylim(-0.9, drawn.rows - 0.4)
        ax.set_xticks(drawing.layer_ticks(drawn.layers))
        ax.set_yticks([])
        paper._frame(ax, sides=("bottom",))
        paper._write(ax.xaxis.label, "layer (0-based)")
        legend = figure.legend(
            handles=_handles(drawn), loc="outside lower center", ncols=4 if width > 5 else 2, frameon=False, fontsize=7,
            handlelength=2.2, columnspacing=1.2, labelspacing=0.25, borderaxespad=0,
        )  # fmt: skip
        for text in legend.get_texts():
            paper._write(text, text.get_text())
        paper._settle(figure)
    return figure


# --- what is drawn ---


def _drawn(footprint: Footprint, fact: str | None, *, top: int, threshold: float, connected: bool) -> _Drawn:
    fact, edges = _chosen(footprint, fact, top=top, threshold=threshold)
    ends = [(row, reader) for row in edges for reader in _readers(row, {str(row["source"]) for row in edges})]
    ends = _on_paths(ends) if connected else ends
    if not ends:
        raise ResultError(
            f"The {len(edges)} strongest edges of {fact!r} make no path from the embedding to the logits. "
            "Draw more of them (top), or all (connected=False)."
        )
    present = {str(row["source"]) for row, _ in ends} | {reader for _, reader in ends}
    name, n_layers = drawing.score_name(footprint, fact=fact, column="value"), int(footprint.run["n_layers"])
    nodes = _placed(present, _effects(footprint, fact), n_layers, name)
    places = {row["node"]: (row["x"], row["y"]) for row in nodes.to_dict("records")}
    strongest = max(abs(row["estimate"]) for row, _ in ends)
    lines = []
    for row, reader in sorted(ends, key=lambda end: abs(end[0]["estimate"])):
        x, y = _curve(places[str(row["source"])], places[reader], _BENDS.get(row["input"], 0.0))
        share, positive = abs(row["estimate"]) / strongest, row["estimate"] > 0
        lines.append(dict(x=x, y=y, share=share, positive=positive, input=row["input"], note=_edge_note(row, name)))
    return _Drawn(
        nodes=nodes,
        edges=pd.DataFrame(lines),
        layers=range(n_layers),
        rows=max(2, 1 + round(nodes["y"].max())),
        widest=f"{drawing.number(strongest)} in {footprint.run['parameters']['score']}",
    )


def _chosen(footprint: Footprint, fact: str | None, *, top: int, threshold: float) -> tuple[str, list[dict[Any, Any]]]:
    """The fact, and its strongest edges."""
    if "edges" not in footprint.extras:
        raise ResultError(f"{footprint.run.get('what')} found no edges. Draw a footprint of CircuitEdges.")
    fact = footprint.facts[0] if fact is None and len(footprint.facts) == 1 else fact
    if fact not in footprint.facts:
        raise ResultError(
            f"This footprint has {len(footprint.facts)} facts, {fact!r} is none of them. Name one, e.g. {footprint.facts[0]!r}."
        )
    edges = footprint.extras["edges"]
    edges = edges[(edges["fact"] == fact) & (edges["estimate"].abs() >= threshold)]
    if edges.empty:
        raise ResultError(f"No edge of {fact!r} has a strength of {threshold:g}. Lower the threshold.")
    return str(fact), edges.sort_values("estimate", key=abs, ascending=False).head(top).to_dict("records")


def _on_paths(ends: list[tuple[dict[Any, Any], str]]) -> list[tuple[dict[Any, Any], str]]:
    """The edges that lie on a path from the embedding to the logits: dead ends are cut off until there are none."""
    sources, readers = {str(row["source"]) for row, _ in ends}, {reader for _, reader in ends}
    kept = [
        (row, reader)
        for row, reader in ends
        if (row["source"] == "embed" or row["source"] in readers) and (reader == "logits" or reader in sources)
    ]
    return kept if len(kept) == len(ends) else _on_paths(kept)


def _effects(footprint: Footprint, fact: str) -> Mapping[str, float]:
    """By part, the sum over the edges that leave it."""
    nodes = footprint.extras["nodes"]
    mine = nodes[nodes["fact"] == fact]
    return dict(zip(mine["node"], mine["value"], strict=True))


def _readers(row: Mapping[Any, Any], speaking: set[str]) -> list[str]:
    """The parts that an edge leads to: of heads that share a key and value head those that speak, or the first."""
    if row["heads"] == 0:
        return [str(row["target"])]
    first = int(row["target_head"])
    heads = [f"L{row['target_layer']}.z[{head}]" for head in range(first, first + int(row["heads"]))]
    return [head for head in heads if head in speaking] or heads[:1]


def _placed(present: set[str], effects: Mapping[str, float], n_layers: int, name: str) -> pd.DataFrame:
    """Where each part stands: MLPs in row 0, a layer's heads above it in their order, the ends in row 1."""
    rows = []
    for node, x in (("embed", -1.0), ("logits", float(n_layers))):
        if node in present:
            rows.append(dict(node=node, kind=node, label=node, x=x, y=1.0))
    for layer in range(n_layers):
        prefix = f"L{layer}.z["
        heads = sorted(int(node[len(prefix) : -1]) for node in present if node.startswith(prefix))
        for y, head in enumerate(heads, start=1):
            rows.append(dict(node=f"{prefix}{head}]", kind="z", label=str(head), x=layer - 0.2, y=float(y)))
        if f"L{layer}.mlp_out" in present:
            rows.append(dict(node=f"L{layer}.mlp_out", kind="mlp_out", label="M", x=layer + 0.2, y=0.0))
    table = pd.DataFrame(rows)
    noted: pd.DataFrame = table.assign(note=[_node_note(row, effects, name) for row in table.to_dict("records")])
    return noted


def _curve(start: tuple[float, float], end: tuple[float, float], bend: float) -> tuple[np.ndarray, np.ndarray]:
    """An edge as a gentle S; between parts of one row an arc below the MLPs or above the heads, which passes the others by."""
    (x0, y0), (x1, y1) = start, end
    t = np.linspace(0, 1, POINTS)
    level = y0 == y1 and x1 - x0 > 0.5
    lift = (-1 if y0 == 0 else 1) * min(0.75, 0.2 + 0.06 * (x1 - x0)) if level else 0.15 * (y0 == 0)
    rise = 0.5 * t + 0.5 * (3 * t**2 - 2 * t**3)
    return x0 + (x1 - x0) * t, y0 + (y1 - y0) * rise + 4 * (lift + bend) * t * (1 - t)


def _edge_note(row: Mapping[Any, Any], name: str) -> str:
    words = {"q": "query of ", "k": "key of ", "v": "value of "}
    lines = [f"{row['source']} → {words.get(row['input'], '')}{row['target']}"]
    lines.append(f"{name}: {drawing.number(row['estimate'], sign=True)}")
    if not pd.isna(row["exact"]):
        lines.append(f"patched alone: {drawing.number(row['exact'], sign=True)}")
    return "\n".join(lines)


def _node_note(row: Mapping[Any, Any], effects: Mapping[str, float], name: str) -> str:
    words = {
        "z": f"head {row['label']}",
        "mlp_out": "MLP",
        "embed": "what enters the first block",
        "logits": "final norm",
    }
    lines = [str(row["node"]), words[row["kind"]]]
    if row["node"] in effects:
        lines.append(f"all its edges, {name}: {drawing.number(effects[row['node']], sign=True)}")
    return "\n".join(lines)


# --- how ---


def _extent(drawn: _Drawn) -> tuple[float, float]:
    """The ends of the layer axis, with room for the names of the two ends."""
    n = len(drawn.layers)
    return -1.2 - 0.07 * n, n + 0.2 + 0.07 * n


def _marks(theme: Theme) -> Mapping[str, tuple[str, str, str, int, str]]:
    """By kind of part: plotly's symbol, matplotlib's, colour, pixels, place of the label."""
    heads, mlps = (drawing.SCALES[drawing.HUES[kind]][theme][5] for kind in ("z", "mlp_out"))
    ends = plots._INK[theme]["muted"]
    return {
        "z": ("circle", "o", heads, 22, "middle center"),
        "mlp_out": ("square", "s", mlps, 22, "middle center"),
        "embed": ("diamond", "D", ends, 12, "middle left"),
        "logits": ("diamond", "D", ends, 12, "middle right"),
    }


def _words(drawn: _Drawn) -> list[tuple[str, str, str]]:
    """The legend: what is explained (a kind of part, a sign, an input), by which mark, in which words."""
    kinds, inputs = set(drawn.nodes["kind"]), set(drawn.edges["input"])
    words = [("part", "z", "attention head, by number"), ("part", "mlp_out", "MLP")]
    words = [each for each in words if each[1] in kinds]
    signs = set(drawn.edges["positive"])
    words += [("sign", "0", f"for the answer (widest: {drawn.widest})")] * (True in signs)
    words += [("sign", "1", "against it")] * (False in signs)
    return words + [("input", key, f"into a {word}") for key, word in (("q", "query"), ("k", "key")) if key in inputs]


def _explain(figure: go.Figure, drawn: _Drawn, theme: Theme) -> None:
    """The legend, by traces without points."""
    ink = plots._INK[theme]
    for what, key, words in _words(drawn):
        look: dict[str, Any]
        if what == "part":
            symbol, _, color, *_ = _marks(theme)[key]
            marker = dict(symbol=symbol, size=12, color=ink["card"], line=dict(color=color, width=2))
            look = dict(mode="markers", marker=marker)
        else:
            color = _SIGNS[theme][int(key)] if what == "sign" else ink["muted"]
            look = dict(mode="lines", line=dict(color=color, width=3, dash=_DASHES.get(key, ("solid",))[0]))
        figure.add_scatter(x=[None], y=[None], name=plots._safe(words), hoverinfo="skip", **look)


def _draw(ax: Axes, drawn: _Drawn, *, scale: float) -> None:
    """Edges and parts; `scale` is 1 where a part may be as large as on a page."""
    for row in drawn.edges.to_dict("records"):
        ax.plot(
            row["x"], row["y"], color=_SIGNS["light"][0 if row["positive"] else 1], alpha=0.35 + 0.6 * row["share"],
            linewidth=scale * (0.4 + 2.8 * row["share"]), linestyle=_DASHES.get(row["input"], ("", "-"))[1],
            solid_capstyle="butt", dash_capstyle="butt", zorder=2,
        )  # fmt: skip
    for row in drawn.nodes.to_dict("records"):
        _, marker, color, size, place = _marks("light")[row["kind"]]
        ax.plot(
            [row["x"]], [row["y"]], marker, markersize=0.4 * size * scale, markerfacecolor="#ffffff", markeredgecolor=color,
            markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
        aside = {"middle left": -1, "middle right": 1}.get(place, 0)
        note = ax.annotate(
            "", (row["x"], row["y"]), xytext=(4 * aside, 0), textcoords="offset points", va="center_baseline", zorder=4,
            ha=("right", "center", "left")[1 + aside],
        )  # fmt: skip
        paper._write(note, row["label"], size=6.5 if aside else 5.5)


def _handles(drawn: _Drawn) -> list[Line2D]:
    handles = []
    for what, key, words in _words(drawn):
        if what == "part":
            _, marker, color, *_ = _marks("light")[key]
            look: dict[str, Any] = dict(
                linestyle="",
                marker=marker,
                markersize=6,
                markerfacecolor="#ffffff",
                markeredgecolor=color,
                markeredgewidth=0.8,
            )
        else:
            color = _SIGNS["light"][int(key)] if what == "sign" else paper._MUTED
            look = dict(color=color, linewidth=1.4, linestyle=_DASHES.get(key, ("", "-"))[1])
        handles.append(Line2D([], [], label=words, **look))
    return handles
