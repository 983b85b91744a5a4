"""Explore one fact: what the model says, where a restored state brings the answer back, and what one site knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_fact import doubt, numbers_at, planted_band
from pages import _parts as parts
from workbench import drawing, paper, plots
from workbench.asked import Asked
from workbench.forms import FormField
from workbench.results import Footprint

if TYPE_CHECKING:
    from workbench.models import LM

OPTIONS = (
    "window", "noise", "samples", "seed", "score", "corrupt", "substitutes", "sever", "sigma_from", "window_rule", "replace",
)  # fmt: skip
"""The fields of `CausalTrace` that the page asks for, in this order."""

PLACEHOLDERS = {"window": "10, and 3 below 24 layers"}

LABELS = {
    "score": "Score",
    "corrupt": "Corruption",
    "sever": "Severed path",
    "sigma_from": "Sigma from",
    "window_rule": "Even windows",
    "replace": "Noise replaces embedding",
}
"""What fields are called where their own name says too little."""

SEVERED = {"mlp_out": "MLP", "attn_out": "attention"}


# -- inputs ------------------------------------------------------------------------------------------------------------


def option_fields() -> tuple[FormField, ...]:
    """The form of the method's hyperparameters."""
    return parts.method_fields("CausalTrace", OPTIONS, tuple(PLACEHOLDERS))


# -- the answer --------------------------------------------------------------------------------------------------------


def show_headline(asked: Asked, footprint: Footprint) -> None:
    """How far the corruption took the answer down, and what should be known about that."""
    told, score = drawing.fact_row(footprint, None), parts.score_name(footprint)
    clean, corrupted, gap = st.columns(3)
    clean.metric("Clean run", drawing.number(told["clean"]), help=f"The {score}, the prompt as it is.")
    corrupted.metric(
        "Corrupted run",
        drawing.number(told["corrupted"]),
        help=f"The {score}, {corruption(footprint)}."
        + (
            f" Standard error {drawing.number(told['corrupted_se'])}."
            if told["corrupted_se"] == told["corrupted_se"]
            else ""
        ),
    )
    gap.metric("Lost", drawing.number(told["total_effect"]), help="What restoring a cell of a map can bring back.")
    st.caption(f"{score[0].upper()}{score[1:]}, {corruption(footprint)}.")
    if severed := SEVERED.get(footprint.run["parameters"].get("sever", "none")):
        st.caption(
            f"Severed path: {severed} outputs of the restored token are held at their corrupted values in all layers, "
            "and have no map of their own."
        )
    if footprint.run["parameters"].get("sigma_note") and not parts.known_facts(asked.model):
        st.caption(
            "The noise's scale comes from this subject alone; on a bundled model it comes from the subjects of all its facts."
        )
    if why := doubt(footprint):
        st.caption(f":orange-badge[Note] {why}")
    parts.show_other_answer(footprint)


def corruption(footprint: Footprint) -> str:
    """How the subject was corrupted, in words."""
    options, sigma = footprint.run["parameters"], footprint.run.get("sigma")
    if options["corrupt"] == "swap":
        other = drawing.fact_row(footprint, None).get("corrupted_prompt")
        return "with another subject in its place" + (
            f": “{parts.plain(other)}”" if isinstance(other, str) and other else ""
        )
    scale = f"σ = {sigma:.3g}" if sigma is not None else options["noise"]
    asked = f" ({parts.plain(options['sigma_note'])})" if options.get("sigma_note") else ""
    return f"with noise {scale}{asked} on the subject, {options['samples']} samples"


@st.cache_resource(show_spinner=False, max_entries=128)
def map_cached(
    _footprint: Footprint,
    _band: range | None,
    version: tuple[str, ...],
    key: str,
    kind: str,
    theme: parts.Theme,
    shared: bool,
) -> Figure:
    """One heatmap, drawn once: a click redraws the page, and plotly is slow."""
    low, high = plots.shared_range(_footprint) if shared else (None, None)
    return plots.heatmap(_footprint, kind=kind, theme=theme, vmin=low, vmax=high, planted=_band)


def show_maps(asked: Asked, footprint: Footprint) -> None:
    """The heatmaps. A click on a cell puts its site into the session and into the URL."""
    band = planted_band(asked.model)
    shared = st.toggle(
        "One colour scale for all maps",
        value=True,
        key="shared",
        bind="query-params",
        help="Colours begin at the corrupted run and end at the best cell: of all maps, or of each map alone.",
    )
    made = str(footprint.run["made"])
    with st.grid(min_column_width=330, gap="medium"):
        for kind in footprint.kinds:
            parts.show_map(
                map_cached(footprint, band, (*footprint.kinds, made), asked.key, kind, parts.theme(), shared),
                key=f"map-{asked.key}-{kind}-{made}",
                alt=f"Map of the {parts.KINDS.get(kind, kind)}: tokens down, layers across.",
            )
    if band is not None:
        st.caption(
            f"Planted, {parts.layer_range(band)}: training put this model's facts into the MLPs there. "
            "On other models nobody knows the place beforehand."
        )


def show_site(asked: Asked, footprint: Footprint, lm: LM | None) -> None:
    """The cell that was clicked: its numbers, every noise sample, and the logit lens."""
    site, chosen = parts.chosen_site(footprint)
    numbers = numbers_at(footprint, site)
    with st.container(border=True):
        st.markdown(
            f"#### Layer {site.layer}, {parts.KINDS.get(site.kind, site.kind)}, at “{parts.plain(numbers.text.strip())}”"
        )
        hint = "" if chosen else " This is the strongest cell of its map. Click any other."
        st.caption(f"`{site}`, {numbers.role}; restored: {parts.layer_range(numbers.restored)}.{hint}")
        cells = st.grid(min_column_width=250, gap="medium")
        left, middle, right = cells.container(), cells.container(), cells.container()
        with left:
            st.metric(
                "Restored run",
                drawing.number(numbers.score),
                help=f"The {parts.score_name(footprint)} with this cell restored.",
            )
            is_sure = numbers.se == numbers.se  # else it is NaN: there is one sample
            st.metric(
                "Change",
                drawing.number(numbers.change, sign=True) + (f" ± {drawing.number(numbers.se)}" if is_sure else ""),
                help="Against the corrupted run" + (", ± one standard error over the samples." if is_sure else "."),
            )
            st.caption(numbers.share)
        with middle:
            if footprint.run["parameters"]["corrupt"] == "swap":
                st.markdown("**Samples**", help="The corrupted run, and the same with this cell restored.")
            else:
                st.markdown(
                    "**Noise samples**", help="Each sample corrupted, and the same noise with this cell restored."
                )
            st.plotly_chart(
                plots.samples(
                    numbers.samples,
                    numbers.clean,
                    numbers.corrupted,
                    theme=parts.theme(),
                    name=drawing.score_name(footprint),
                    kind=site.kind,
                ),
                theme=None,
                key="samples-chart",
                config=parts.QUIET,
                alt="The score of every sample with this cell restored, beside the corrupted run.",
            )
        with right:
            parts.show_lens(asked, site, lm)


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Where does a model keep a fact?")
    st.caption(
        "Causal tracing: the subject is corrupted until the model forgets the answer, then one clean state at a time is restored. "
        "Cells that bring the answer back are where the fact passes."
    )
    parts.arrive("CausalTrace", option_fields())
    asked = parts.ask(
        "CausalTrace", option_fields(), placeholders=PLACEHOLDERS, labels=LABELS, earlier_title="Earlier traces"
    )
    notices = st.container()
    left, right = st.columns([3, 2], gap="large")  # always here, so that the strip of jobs keeps its place
    if asked is None:
        with left:
            parts.show_jobs((), ())
        return
    found = parts.find(asked)
    footprint = found.footprint
    with notices:
        parts.show_wrong(asked, found)
    with left:
        parts.show_sentence(asked, found)
        if footprint is not None:
            show_headline(asked, footprint)
        parts.show_action(asked, found, verb="Trace")
        parts.show_jobs((asked.key,), (found.model,))
    with right:
        parts.show_predictions(found)
    if footprint is not None:
        show_maps(asked, footprint)
        show_site(asked, footprint, found.lm)
        if not parts.is_running(asked):
            band = planted_band(asked.model)
            parts.show_downloads(
                footprint,
                lambda: paper.heatmap(footprint, planted=band),
                name=parts.file_name("trace", asked),
                version=(asked.key, *footprint.kinds, footprint.run["made"]),
            )


parts.run_in_app()
show_page()
parts.page_is_drawn()
