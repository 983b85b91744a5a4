"""What every figure shares, on the screen and on paper: words, colours, ranges, and the very numbers that are drawn."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench import profiles
from workbench.results import Footprint, Result, ResultError
from workbench.sites import TOKEN_ROLES, Role, Site, SiteKind, window

Column = Literal["score", "value"]
"""Which column of a footprint is drawn: the raw `score` as ROME does, or the effect, `value`."""

Theme = Literal["light", "dark"]
"""The page on which a figure stands."""

KIND_WORDS: Mapping[str, str] = {
    "embed": "Token embedding",
    "resid_pre": "State before the block",
    "resid_mid": "State between attention and MLP",
    "resid_post": "State after the block",
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "z": "Outputs of the heads",
    "mlp_post": "Keys of the MLP",
}
"""Titles of maps."""

ROLE_WORDS: Mapping[str, str] = {
    "before_subject": "Before the subject",
    "subject_first": "First subject token",
    "subject_middle": "Middle subject tokens",
    "subject_last": "Last subject token",
    "first_after_subject": "First token after it",
    "further": "Further tokens",
    "last": "Last token",
    "subject": "All subject tokens",
}
"""Rows of averages, in ROME's words (arXiv 2202.05262, Fig. 2)."""

MEASURE_WORDS: Mapping[str, str] = {
    "spearman": "Spearman's correlation",
    "kendall": "Kendall's correlation",
    "overlap": "overlap of the top layers",
    "distance": "distance of the centres (layers)",
}
"""Titles of what `analyses.locator_agreement` measures."""

HUES: Mapping[str, str] = {
    "embed": "blue",
    "resid_pre": "purple",
    "resid_mid": "purple",
    "resid_post": "purple",
    "attn_out": "red",
    "mlp_out": "green",
    "z": "red",
    "mlp_post": "green",
}
"""One family of colour a kind, as in ROME's figures."""

SCALES: Mapping[str, Mapping[Theme, tuple[str, ...]]] = {
    "purple": {
        "light": ("#ffffff", "#e8defe", "#d0bbfe", "#b599f2", "#9a7add", "#7e5ec1", "#62459f", "#472f79", "#2c1d50"),
        "dark": ("#14181d", "#34274c", "#503779", "#6b4ba3", "#8462c8", "#9d7de6", "#b69bfd", "#cdbffe", "#e6e1fe"),
    },
    "green": {
        "light": ("#ffffff", "#c7f0d3", "#94dbaa", "#64c385", "#36a962", "#008c46", "#056d34", "#014f22", "#013313"),
        "dark": ("#14181d", "#0c3920", "#02562d", "#00743c", "#04924b", "#34ae62", "#63c780", "#93dea4", "#c5f3cd"),
    },
    "red": {
        "light": ("#ffffff", "#ffdbd5", "#ffb1a6", "#f28a7f", "#da6860", "#bd4945", "#9a3031", "#741d20", "#4c1013"),
        "dark": ("#14181d", "#4c211b", "#772b24", "#9f3933", "#c44d47", "#e36862", "#fa8883", "#ffb3af", "#fedcda"),
    },
    "blue": {
        "light": ("#ffffff", "#cee8ff", "#9acefe", "#64b2f8", "#3a95e4", "#1178c8", "#005ca1", "#014278", "#002950"),
        "dark": ("#14181d", "#0c324f", "#014a7c", "#0264a5", "#0d7dcf", "#3998ed", "#6ab4fe", "#a2cefe", "#d4e8fe"),
    },
}
"""Sequential scales from the page's own colour up, nine steps of even lightness in OKLCH at one hue each.

Lightness alone orders them, so they read without colour vision and in grey print."""

OPPOSITES: Mapping[str, str] = {"purple": "green", "green": "purple", "red": "blue", "blue": "red"}
"""The hue below 0 where a map has both signs; each pair can be told apart without colour vision."""

ROLE_COLORS: Mapping[str, Mapping[Theme, str]] = {
    "before_subject": {"light": "#7a828b", "dark": "#8d959e"},
    "subject_first": {"light": "#56b4e9", "dark": "#56b4e9"},
    "subject_middle": {"light": "#009e73", "dark": "#12b488"},
    "subject_last": {"light": "#0072b2", "dark": "#3f9bd8"},
    "first_after_subject": {"light": "#e69f00", "dark": "#e6a820"},
    "further": {"light": "#cc79a7", "dark": "#d68cb5"},
    "last": {"light": "#d55e00", "dark": "#e8762a"},
    "subject": {"light": "#0072b2", "dark": "#3f9bd8"},
}
"""Okabe and Ito's palette, a little lighter on dark pages."""

SERIES_COLORS: tuple[Mapping[Theme, str], ...] = (
    {"light": "#0072b2", "dark": "#3f9bd8"},
    {"light": "#d55e00", "dark": "#e8762a"},
    {"light": "#009e73", "dark": "#12b488"},
    {"light": "#b8609a", "dark": "#d68cb5"},
    {"light": "#5c656e", "dark": "#b4bcc4"},
    {"light": "#56b4e9", "dark": "#8fd0f5"},
    {"light": "#c98b00", "dark": "#e6b422"},
    {"light": "#6b4ba3", "dark": "#a98bea"},
)
"""Colours of methods in a comparison: Okabe and Ito's, their yellow and black replaced by what shows on both pages."""

DASHES: tuple[tuple[float, ...], ...] = (
    (), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (10, 3), (3, 1.5), (7, 2, 1.5, 2, 1.5, 2), (12, 2, 4, 2)
)  # fmt: skip
"""Dashes of kinds in a comparison, in lengths drawn and left out; the first is a whole line."""

_MARKS = {" ": "␣", "\n": "↵", "\r": "←", "\t": "⇥"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One map, ready to be drawn."""

    kind: str
    """Kind of the sites."""

    title: str
    """What the map shows, in a few words."""

    values: pd.DataFrame
    """What is drawn: rows down (positions, or roles), layers across (0-based)."""

    sites: pd.DataFrame
    """`str(Site)` of every cell, in the same shape."""

    notes: pd.DataFrame
    """What is said about every cell, in the same shape: plain text of several lines."""

    labels: tuple[str, ...]
    """Names of the rows; a subject token ends in `*`."""

    strong: tuple[bool, ...]
    """Which rows are the subject's."""

    layer_title: str
    """Title of the layer axis."""

    score: str
    """What is drawn, e.g. `p(Paris)`."""

    low: float
    """Value at the lower end of the colour bar."""

    high: float
    """Value at its upper end."""

    estimated: pd.DataFrame
    """Which cells are only estimates, in the same shape."""

    reverse: bool
    """Whether low values are the ones that matter (`rank` and `kl`)."""

    effects: bool = False
    """Whether effects are drawn, so that 0 is the middle of a scale that has both signs."""

    def marked(self, planted: range | None) -> range | None:
        """The part of the planted band that the map shows; None where it shows none, as the embedding, which has no layer."""
        layers = [int(layer) for layer in self.values.columns if layer in (planted or ())]
        return range(layers[0], layers[-1] + 1) if layers and self.kind != "embed" else None

    def on(self, vmin: float | None, vmax: float | None) -> Panel:
        """The same map on another scale; one of effects with both signs reaches as far below 0 as above."""
        low, high = self.low if vmin is None else vmin, self.high if vmax is None else vmax
        if self.effects and low < 0:
            low, high = min(low, -high), max(-low, high)
        return replace(self, low=low, high=high if high > low else low + 1e-9)

    def colors(self, theme: Theme) -> tuple[str, ...]:
        """The colours from the lower end of the scale to its upper end, in even steps; the other way round where `reverse`."""
        hue = HUES.get(self.kind, "blue")
        if self.effects and self.low < 0:
            return (*SCALES[OPPOSITES[hue]][theme][:0:-1], *SCALES[hue][theme])
        return SCALES[hue][theme]


# --- words ---


def visible(text: str) -> str:
    """A token's text with everything in it visible: `␣` for a space, `↵` for a new line, escapes for what cannot be seen."""
    return "".join(_shown(character) for character in text)


def token_label(text: str) -> str:
    """A token as a label: like `visible`, but without the one space that only says that a word begins."""
    bare = text[1:] if text[:1] == " " and text[1:].strip() else text
    return visible(bare)


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def wrapped(text: str, length: int) -> list[str]:
    """The text in lines of about so many letters."""
    return textwrap.wrap(text, max(10, length), break_long_words=False) or [""]


def score_name(result: Result, *, fact: str | None = None, column: str = "score") -> str:
    """What the numbers are, e.g. `p(Paris)`, or `effect on p(Paris)`; without a fact, `p(answer)`."""
    kind = result.run.get("parameters", {}).get("score")
    row = fact_row(result, fact)
    answer, foil = (_word(str(row.get(name) or name)) for name in ("answer", "foil"))
    name = {
        "p": f"p({answer})",
        "p_target": f"p(all of {answer})",
        "logp": f"log p({answer})",
        "logit_diff": f"logit({answer}) − logit({foil})",
        "rank": f"rank of {answer}",
        "kl": "KL to clean (nats)",
    }.get(str(kind), "")
    unit = str(result.run.get("unit") or "")
    guessed = "est. " if unit.startswith("estimated") else ""
    if column == "score":
        return guessed + (name or "score")
    of_score = not unit or unit.endswith(f"indirect effect in {kind}")
    if name and of_score:
        return f"{guessed}effect on {name}"
    what = unit.removesuffix(f" in {kind}")
    return f"{what} in {name}" if name and what != unit and not what.startswith("share") else what or "effect"


def layer_title(result: Result, *, kind: str) -> str:
    """Title of the layer axis: it says from where layers count, and how many were taken together."""
    width = width_of(result, kind)
    return "layer (0-based)" if width == 1 else f"centre of a window of {width} layers (0-based)"


def width_of(result: Result, kind: str) -> int:
    """How many layers were taken together at a site of this kind; 1 where the method has no window."""
    return int(result.run.get("parameters", {}).get("window") or 1) if kind in ("mlp_out", "attn_out") else 1


def restored_layers(result: Result, *, kind: str, layer: int) -> range:
    """The layers that stand behind the cell of one layer."""
    width, run = width_of(result, kind), result.run
    if width == 1 or "n_layers" not in run:
        return range(layer, layer + 1)
    return window(layer, width, int(run["n_layers"]), rule=run["parameters"].get("window_rule", "rome"))


def layer_ticks(layers: Sequence[int], *, most: int = 13) -> list[int]:
    """The layers that get a number: all of them, or multiples of 2, 5, 10 ... so that there are at most so many."""
    span = max(layers) - min(layers) + 1
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, span) if math.ceil(span / s) <= most)
    return [layer for layer in layers if layer % step == 0]


# --- numbers ---


def fact_row(result: Result, fact: str | None) -> dict[str, Any]:
    """What the extra table `facts` says about a fact (the only one, where none is named); empty where it says nothing."""
    facts = result.extras.get("facts")
    if facts is None or "fact" not in facts:
        return {}
    rows = facts if fact is None else facts[facts["fact"] == fact]
    return {str(name): value for name, value in rows.iloc[0].items()} if len(rows) == 1 else {}


def drawn_column(result: Result, column: str) -> str:
    """The column asked for; `value` where there are no scores, or no corrupted run that they could be seen against."""
    is_there = column in result.table and bool(result.table[column].notna().any())
    return column if is_there and _is_restored(result) else "value"


def lower_is_better(result: Result, column: str) -> bool:
    """Whether the drawn numbers fall towards the clean run. Effects never do: their sign is turned."""
    return column == "score" and result.run.get("parameters", {}).get("score") in ("rank", "kl")


def range_of(
    result: Result, *, fact: str | None = None, column: str = "score", kinds: Iterable[str] | None = None
) -> tuple[float, float]:
    """The ends of a colour scale: from the corrupted run's score (ROME's floor), or an effect of 0, to the best cell.

    Cells beyond the corrupted run's end (negative effects) are drawn like the end itself. Where a method has no corrupted run,
    negative effects are no noise: the scale then reaches as far below 0 as above. Single heads and neurons do not count.
    """
    column = drawn_column(result, column)
    rows = _whole(result.table)
    if fact is not None:
        rows = rows[rows["fact"] == fact]
    if kinds is not None:
        rows = rows[rows["kind"].isin([kinds] if isinstance(kinds, str) else list(kinds))]
    values = rows[column].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    if column == "value" and not _is_restored(result):
        return _effect_range(values)
    floor = 0.0 if column == "value" else _corrupted(result, fact, values)
    if lower_is_better(result, column):
        return _widened(min(float(values.min()), floor), floor)
    return _widened(floor, max(float(values.max()), floor))


def panel(
    footprint: Footprint,
    *,
    kind: str,
    fact: str | None = None,
    column: Column = "score",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Panel:
    """The map of one fact and kind: tokens down, the first on top; layers across.

    Raises:
        ResultError: no such rows, only single heads or neurons, nothing that belongs to a token, or several facts and none named.
    """
    if fact is None and len(footprint.facts) == 1:
        fact = footprint.facts[0]
    drawn = drawn_column(footprint, column)
    values = footprint.grid(kind=kind, fact=fact, column=drawn).astype(float)
    tokens = footprint.tokens(fact)
    rows = footprint.whole(fact=fact, kind=kind)
    name = score_name(footprint, fact=fact, column=drawn)
    notes = rows.assign(note=[_cell_note(footprint, row, name, drawn) for row in rows.to_dict("records")])
    strong = tuple(str(role).startswith("subject") for role in tokens["token"][values.index])
    low, high = range_of(footprint, fact=fact, column=drawn, kinds=[kind])
    return Panel(
        kind=kind,
        title=KIND_WORDS.get(kind, kind),
        values=values,
        sites=rows.pivot(index="position", columns="layer", values="site"),
        notes=notes.pivot(index="position", columns="layer", values="note"),
        estimated=notes.assign(estimated=notes.get("estimated", False)).pivot(
            index="position", columns="layer", values="estimated"
        ),
        labels=tuple(
            shortened(token_label(str(text)), 24 - is_subject) + "*" * is_subject
            for text, is_subject in zip(tokens["text"][values.index], strong, strict=True)
        ),
        strong=strong,
        layer_title=layer_title(footprint, kind=kind),
        score=name,
        low=low,
        high=high,
        reverse=lower_is_better(footprint, drawn),
        effects=drawn == "value",
    ).on(vmin, vmax)


def mapped_kinds(footprint: Footprint) -> list[str]:
    """The kinds that have a map: whole rows that belong to tokens."""
    rows = _whole(footprint.table)
    return list(rows[rows["position"].notna()]["kind"].unique())


def heads_panel(footprint: Footprint, *, kind: str = "z", fact: str | None = None, token: Role | None = None) -> Panel:
    """The map of a fact's attention heads: heads down, layers across; at each the largest token, or the mean over a role's tokens.

    Raises:
        ResultError: no single heads of this kind, no token of this role, or several facts and none named.
    """
    fact = str(footprint.table["fact"].iloc[0]) if fact is None and len(footprint.facts) == 1 else fact
    if fact is None:
        raise ResultError(
            f"This footprint has {len(footprint.facts)} facts. Name one of them, e.g. {footprint.facts[0]!r}."
        )
    rows = footprint.heads(fact=fact, kind=kind)
    if token is not None:
        rows = rows[rows["position"].isna() | profiles.has_role(rows["token"], token)]
    if rows.empty:
        at = f" at a token of the role {token}" if token else ""
        raise ResultError(f"{footprint.run.get('what')} has no single heads of {kind!r} for {fact!r}{at}.")
    name = score_name(footprint, fact=fact, column="value")
    places = rows.groupby(["head", "layer"])
    if token is None:
        cells = rows.loc[places["value"].idxmax()]
    else:
        cells = places[["value"]].mean().reset_index().assign(kind=kind, token=token, se=math.nan, text="")
        cells["site"] = [
            str(Site(layer=int(row["layer"]), kind=_kind(kind), head=int(row["head"]), token=token))
            for row in cells.to_dict("records")
        ]
    notes = [_cell_note(footprint, row, name, "value") for row in cells.to_dict("records")]
    values = cells.pivot(index="head", columns="layer", values="value").astype(float)
    low, high = _effect_range(values.to_numpy())
    return Panel(
        kind=kind,
        title=KIND_WORDS.get(kind, kind),
        values=values,
        sites=cells.pivot(index="head", columns="layer", values="site"),
        notes=cells.assign(note=notes).pivot(index="head", columns="layer", values="note"),
        estimated=values.isna() & False,
        labels=tuple(f"head {head}" for head in values.index),
        strong=(False,) * len(values),
        layer_title=layer_title(footprint, kind=kind),
        score=name,
        low=low,
        high=high,
        reverse=False,
        effects=True,
    ).on(None, None)


def average_panel(result: Result, *, kind: str, vmin: float | None = None, vmax: float | None = None) -> Panel:
    """The map of an average over facts: roles of tokens down, in the order of the prompt; layers across.

    Raises:
        ResultError: the table is no average, or has no rows of this kind.
    """
    rows = _average_rows(result, kind)
    values = rows.pivot(index="token", columns="layer", values="value").astype(float)
    roles = [role for role in TOKEN_ROLES if role in values.index]
    name = _average_name(result)
    rows = rows.assign(
        site=[str(Site(layer=row["layer"], kind=_kind(kind), token=row["token"])) for row in rows.to_dict("records")],
        note=[_average_note(result, row, name) for row in rows.to_dict("records")],
    )
    low, high = range_of(result, column="value", kinds=[kind])
    return Panel(
        kind=kind,
        title=KIND_WORDS.get(kind, kind),
        values=values.loc[roles],
        sites=rows.pivot(index="token", columns="layer", values="site").loc[roles],
        notes=rows.pivot(index="token", columns="layer", values="note").loc[roles],
        estimated=values.loc[roles].isna(),
        labels=tuple(ROLE_WORDS[role] for role in roles),
        strong=tuple(role.startswith("subject") for role in roles),
        layer_title=layer_title(result, kind=kind),
        score=name,
        low=low,
        high=high,
        reverse=False,
    ).on(vmin, vmax)


def curves(result: Result, *, kind: str, roles: Sequence[Role] = ()) -> pd.DataFrame:
    """Mean effect by layer, for roles of tokens, with the ends of 95 % intervals.

    Of an average, these are its own numbers. Of a footprint, they are means over facts with Student's t intervals (NaN for a
    single fact).

    Returns:
        One row a role and layer: role, layer, value, low, high, n (facts). Roles that no prompt has are left out.

    Raises:
        ResultError: no row of this kind, or none of these roles.
    """
    if isinstance(result, Footprint):
        present = set(result.of(kind=kind)["token"])
        found = [
            profiles.with_interval(result.profile(kind=kind, token=role)).assign(role=role)
            for role in roles_of(roles, present)
        ]
    else:
        rows = _average_rows(result, kind)
        found = [rows[rows["token"] == role].assign(role=role) for role in roles_of(roles, set(rows["token"]))]
    if not found:
        raise ResultError(
            f"No token of {kind} has one of the roles {', '.join(roles or TOKEN_ROLES)}. Name roles that the prompts have, "
            "or draw what belongs to no token with compare()."
        )
    table: pd.DataFrame = pd.concat(found, ignore_index=True)[["role", "layer", "value", "low", "high", "n"]]
    return table


def roles_of(roles: Sequence[Role], present: set[Any]) -> list[Role]:
    """The roles asked for (all, if none) as far as they are present, in the order of the prompt for all."""
    return [role for role in (roles or TOKEN_ROLES) if role in present]


def comparison(
    footprints: Sequence[Footprint], *, kinds: Sequence[str] | None = None, token: Role | None = None
) -> pd.DataFrame:
    """Several methods by layer: `profiles.layer_profiles`, normalised, as means over facts with 95 % intervals.

    Returns:
        One row a series and layer: method, label, kind, layer, value, low, high, n (facts).
    """
    return profiles.mean_profiles(profiles.layer_profiles(footprints, kinds=kinds, token=token))


def comparison_panel(
    footprints: Sequence[Footprint], *, kinds: Sequence[str] | None = None, token: Role | None = None
) -> Panel:
    """`comparison` as a map: series down, layers across."""
    table = comparison(footprints, kinds=kinds, token=token)
    labels = list(table["label"].unique())
    sites = [str(Site(layer=row["layer"], kind=_kind(row["kind"]), token=token)) for row in table.to_dict("records")]
    notes = [series_note(row) for row in table.to_dict("records")]
    grids = {
        name: table.assign(site=sites, note=notes).pivot(index="label", columns="layer", values=name).loc[labels]
        for name in ("value", "site", "note")
    }
    low, high = _effect_range(table["value"].to_numpy())
    return Panel(
        kind="",
        title="Methods by layer",
        values=grids["value"],
        sites=grids["site"],
        notes=grids["note"],
        estimated=grids["value"].isna() & False,
        labels=tuple(labels),
        strong=(False,) * len(labels),
        layer_title=comparison_layers(footprints, kinds=table["kind"].unique()),
        score=comparison_name(table),
        low=low,
        high=high,
        reverse=False,
        effects=True,
    ).on(None, None)


def comparison_name(table: pd.DataFrame) -> str:
    """Title of the value axis of `comparison`."""
    return "normalised effect" if table["n"].max() == 1 else "mean normalised effect"


def comparison_layers(footprints: Sequence[Footprint], *, kinds: Iterable[str]) -> str:
    """Title of the layer axis that several methods share."""
    widths = {width_of(footprint, kind) for footprint in footprints for kind in set(kinds) & set(footprint.kinds)}
    return "layer (0-based)" if widths <= {1} else "layer, or centre of a window (0-based)"


def series_styles(table: pd.DataFrame) -> dict[str, tuple[Mapping[Theme, str], tuple[float, ...]]]:
    """Colour and dash of every series of `comparison`: methods differ in colour, kinds in dash.

    Where there are more methods than colours, those that share one have other dashes.
    """
    methods, kinds = list(table["method"].unique()), list(table["kind"].unique())
    styles = {}
    for label, method, kind in table[["label", "method", "kind"]].drop_duplicates().itertuples(index=False):
        again, color = divmod(methods.index(method), len(SERIES_COLORS))
        styles[str(label)] = SERIES_COLORS[color], DASHES[(kinds.index(kind) + again * len(kinds)) % len(DASHES)]
    return styles


def agreement_panel(result: Result, *, measure: str = "spearman") -> tuple[Panel, pd.DataFrame]:
    """One measure of `analyses.locator_agreement` as a matrix, series against series, and the texts of its cells.

    A text is the mean over facts, with `*` where its adjusted p by layers is below 0.05. The diagonal is empty.

    Raises:
        ResultError: the table is of something else, or has no such measure.
    """
    missing = [name for name in ("first", "second", "measure", "p_adjusted") if name not in result.table]
    if missing:
        raise ResultError(
            f"This is no agreement of methods: its table lacks {', '.join(missing)}. Make one with analyses.locator_agreement."
        )
    half = result.table[result.table["measure"] == measure]
    if half.empty:
        raise ResultError(f"There is no measure {measure!r}. There are {', '.join(result.table['measure'].unique())}.")
    labels = list(dict.fromkeys([*half["first"], *half["second"]]))
    half = half.assign(
        note=[_agreement_note(row) for row in half.to_dict("records")],
        text=[_agreement_text(row) for row in half.to_dict("records")],
    )
    rows = pd.concat([half, half.rename(columns={"first": "second", "second": "first"})])
    grids = {
        name: rows.pivot(index="first", columns="second", values=name).reindex(index=labels, columns=labels)
        for name in ("value", "note", "text")
    }
    values = grids["value"].astype(float)
    is_distance = measure == "distance"
    most = float(np.nanmax(values, initial=1.0)) if is_distance else 1.0
    panel = Panel(
        kind="",
        title=MEASURE_WORDS.get(measure, measure),
        values=values,
        sites=values.isna(),
        notes=grids["note"].fillna(""),
        estimated=values.isna() & False,
        labels=tuple(f"{label}  {i}" for i, label in enumerate(labels, start=1)),
        strong=(False,) * len(labels),
        layer_title="",
        score=MEASURE_WORDS.get(measure, measure),
        low=0.0 if is_distance or measure == "overlap" else -1.0,
        high=most,
        reverse=is_distance,
        effects=not is_distance,
    )
    texts = grids["text"].fillna("")
    if len(labels) > 8:  # .46 and −.12 fit where 0.46 does not
        texts = texts.replace(r"^(−?)0\.", r"\1.", regex=True)
    return panel, texts


def series_note(row: Mapping[Any, Any]) -> str:
    """What is said about one point of `comparison`."""
    lines = [str(row["label"]), f"layer {row['layer']}", number(row["value"], sign=True)]
    if math.isfinite(row["low"]):
        lines.append(f"95 % interval {number(row['low'], sign=True)} to {number(row['high'], sign=True)}")
    return "\n".join([*lines, f"{row['n']} fact{'s' * (row['n'] != 1)}"])


def curve_name(result: Result) -> str:
    """Title of the axis of `curves`."""
    name = score_name(result, fact=_only_fact(result), column="value")
    return name if len(result.run.get("facts", ())) == 1 else f"mean {name}"


# --- parts ---


def _word(answer: str) -> str:
    """An answer in a title: its spaces stay spaces."""
    return shortened(" ".join(map(visible, answer.split(" "))), 16)


def _shown(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    category = unicodedata.category(character)
    if category == "Cc" or category == "Cf":  # controls, direction marks, joiners
        return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
    if category in ("Zs", "Zl", "Zp"):
        return "␣"
    return character


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a footprint that are no single heads or neurons; all rows of another table."""
    if "head" not in table or "neuron" not in table:
        return table
    rows: pd.DataFrame = table[table["head"].isna() & table["neuron"].isna()]
    return rows


def _is_restored(result: Result) -> bool:
    """Whether the method puts something back into a corrupted run, as far as the result tells."""
    facts = result.extras.get("facts")
    return facts is None or "corrupted" in facts


def _effect_range(values: np.ndarray) -> tuple[float, float]:
    """From 0 to the largest effect; as far below 0 as above where there are negative ones."""
    most = float(np.nanmax(np.abs(values), initial=0.0))
    return _widened(-most if np.nanmin(values) < 0 else 0.0, most)


def _corrupted(result: Result, fact: str | None, values: np.ndarray) -> float:
    facts = result.extras.get("facts")
    if facts is None or "corrupted" not in facts:
        return float(values.min())
    rows = facts if fact is None else facts[facts["fact"] == fact]
    corrupted = rows["corrupted"].to_numpy(dtype=float)
    better = np.nanmax if lower_is_better(result, "score") else np.nanmin
    return float(better(corrupted)) if np.isfinite(corrupted).any() else float(values.min())


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low, low + max(1e-9, abs(low) * 1e-6))


def _cell_note(footprint: Footprint, row: Mapping[Any, Any], name: str, column: str) -> str:
    """The lines about one cell of a fact's map."""
    role = str(row["token"]).replace("_", " ")
    lines = [str(row["site"]), f"“{visible(str(row['text']))}” · {role}" if row["text"] else role]
    if column == "score":
        lines.append(f"{name} = {number(row['score'])}{_plus_minus(row['se'])}")
        lines.append(f"change {number(row['value'], sign=True)}")
    else:
        lines.append(f"{name} = {number(row['value'], sign=True)}{_plus_minus(row['se'])}")
    if row.get("estimated"):
        lines.append("estimated by gradient, not computed")
    return "\n".join([*lines, *_window_note(footprint, row)])


def _average_note(result: Result, row: Mapping[Any, Any], name: str) -> str:
    lines = [
        f"{ROLE_WORDS.get(row['token'], row['token'])} · layer {row['layer']}",
        f"{name} = {number(row['value'], sign=True)}",
    ]
    if math.isfinite(row["low"]):
        lines.append(f"95 % interval {number(row['low'], sign=True)} to {number(row['high'], sign=True)}")
    return "\n".join([*lines, f"{row['n']} facts", *_window_note(result, row)])


def _window_note(result: Result, row: Mapping[Any, Any]) -> list[str]:
    layers = restored_layers(result, kind=str(row["kind"]), layer=int(row["layer"]))
    return [f"layers {layers[0]}–{layers[-1]} together"] if len(layers) > 1 else []


def _agreement_text(row: Mapping[Any, Any]) -> str:
    if not math.isfinite(row["value"]):
        return "–"
    rounded = round(row["value"], 2) + 0.0  # not −0.00
    return f"{rounded:.2f}".replace("-", "−") + "*" * bool(row["p_adjusted"] < 0.05)


def _agreement_note(row: Mapping[Any, Any]) -> str:
    lines = [
        f"{row['first']} and {row['second']}",
        f"{MEASURE_WORDS.get(row['measure'], row['measure'])} {number(row['value'])}",
    ]
    if math.isfinite(row["low"]):
        lines.append(f"95 % interval {number(row['low'])} to {number(row['high'])}")
    lines.append(f"by layers: p {number(row['p'])}, adjusted {number(row['p_adjusted'])}")
    if math.isfinite(row["others"]):
        lines.append(f"between different facts {number(row['others'])}; by facts: p {number(row['p_fact'])}")
    return "\n".join([*lines, f"{row['n']} fact{'s' * (row['n'] != 1)}"])


def number(value: Any, *, sign: bool = False) -> str:
    """A number in three significant digits, or an en dash for none."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.3g}" if abs(value) < 1e-3 and value else f"{value:{'+' if sign else ''}.3f}"
    return text.replace("-", "−")


def short_number(value: Any) -> str:
    """A number on an axis: 1,000 rather than 1000.0."""
    return f"{float(value):,.6g}".replace("-", "−")


def _plus_minus(se: Any) -> str:
    return f" ± {number(se)}" if se is not None and not pd.isna(se) else ""


def _average_rows(result: Result, kind: str) -> pd.DataFrame:
    missing = [name for name in ("kind", "token", "layer", "value", "low", "high", "n") if name not in result.table]
    if missing:
        raise ResultError(
            f"This is no average over facts: its table lacks {', '.join(missing)}. Make one with analyses.average_trace."
        )
    rows: pd.DataFrame = result.table[result.table["kind"] == kind]
    if rows.empty:
        raise ResultError(f"There is no row of kind {kind!r}. Kinds: {', '.join(result.table['kind'].unique())}.")
    return rows


def _average_name(result: Result) -> str:
    return f"mean {score_name(result, column='value')}"


def _only_fact(result: Result) -> str | None:
    facts = result.run.get("facts", ())
    return str(facts[0].get("id")) if len(facts) == 1 else None


def _kind(kind: str) -> SiteKind:
    return kind  # type: ignore[return-value]  # checked by Site
