"""Patch two prompts: what two subjects make of one sentence, and which activation carries the difference."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_fact import planted_band
from analyses.two_prompts import Pair, pair_of, patch_numbers, proposals, share_range
from pages import _parts as parts
from workbench import drawing, paper, plots
from workbench.asked import Asked
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.forms import FormField
from workbench.jobs import ModelChoice
from workbench.results import Footprint

if TYPE_CHECKING:
    from workbench.models import LM

METHOD = "ActivationPatching"

OPTIONS = ("direction", "score", "kinds", "window", "neurons")
"""The fields that the page asks for among the options, in this order."""

PLACEHOLDERS: dict[str, str] = {"window": "1"}

DIRECTIONS = {
    "denoise": "Clean activations are put into the counterfactual run: what brings the answer back.",
    "noise": "Counterfactual activations are put into the clean run: what takes the answer away.",
}


# -- inputs ------------------------------------------------------------------------------------------------------------


def option_fields() -> tuple[FormField, ...]:
    """The form of the method's hyperparameters."""
    return parts.method_fields(METHOD, OPTIONS, tuple(PLACEHOLDERS))


def choose_other(choice: ModelChoice, fact: Fact) -> dict[str, Any]:
    """The counterfactual subject, as the method's option."""
    model = parts.model_of(choice)
    proposed = proposals_cached(model.result, fact, choice.name, fact.text) if model.status.state == "done" else ()
    chosen = st.session_state.get("substitutes") or st.query_params.get("substitutes")
    if st.session_state.get("substitutes") == "":
        st.session_state["substitutes"] = None  # an opened question without one has an empty text
    subject = st.selectbox(
        "Counterfactual subject",
        list(dict.fromkeys([*proposed, *([chosen] if chosen else [])])),
        index=None,
        key="substitutes",
        bind="query-params",
        accept_new_options=True,
        placeholder="the first that changes the answer" if parts.known_facts(choice.name) else "type another subject",
        help="It takes the subject's place in the counterfactual prompt and needs as many tokens. Proposed are the subjects "
        "of the model's other facts: those of the same relation with another answer first.",
    )
    return {"substitutes": (subject.strip(),)} if subject and subject.strip() else {}


@st.cache_data(show_spinner=False, max_entries=64)
def proposals_cached(_lm: LM, _fact: Fact, model: str, text: str) -> tuple[str, ...]:
    """Subjects that fit, looked up once for each prompt."""
    try:
        return proposals(_lm, _fact, list(parts.known_facts(model).values()))
    except InputError:  # said where the question is checked
        return ()


@st.cache_data(show_spinner=False, max_entries=256)
def pair_cached(_lm: LM, _asked: Asked, weights: str, key: str) -> Pair:
    """Both prompts, run once for each question."""
    return pair_of(_lm, _asked)


# -- the two prompts ---------------------------------------------------------------------------------------------------


def show_pair(pair: Pair | None, found: parts.Found) -> None:
    """What the model says to either prompt."""
    st.markdown("**Next tokens**", help="The most probable first; what the model says to each prompt stands out.")
    if pair is None:
        if not found.model.status.over:
            st.skeleton(height=300)
        return
    st.caption("After the clean prompt")
    parts.show_tokens(pair.clean, key="clean-tokens", most=4)
    st.caption(f"With “{parts.plain(pair.other_subject)}” in the subject's place")
    parts.show_tokens(pair.other, key="other-tokens", most=4)


def show_tokens(pair: Pair) -> None:
    """Both prompts below each other, token by token; where they differ, both are marked."""
    cells = [
        f"<div{' class=differs' if clean != other else ''}>"
        + "".join(f"<span>{html.escape(drawing.token_label(token))}</span>" for token in (clean, other))
        + "</div>"
        for clean, other in zip(pair.clean_tokens, pair.other_tokens, strict=True)
    ]
    st.html(
        "<style>.two-prompts {display: flex; flex-wrap: wrap; gap: 8px 3px} .two-prompts div {display: grid; gap: 3px}"
        ".two-prompts span {text-align: center; padding: 1px 7px; border-radius: 4px; background: rgba(128, 140, 150, .13)}"
        ".two-prompts .differs span {background: rgba(58, 149, 228, .28); font-weight: 600}"
        ".two-prompts .names span {text-align: left; padding: 1px 8px 1px 0; background: none; opacity: .7}</style>"
        "<div class='two-prompts'><div class=names><span>clean</span><span>counterfactual</span></div>"
        f"{''.join(cells)}</div>"
    )


def show_headline(footprint: Footprint) -> None:
    """The score of both prompts and what lies between."""
    told, score = drawing.fact_row(footprint, None), parts.score_name(footprint)
    clean, other, gap = st.columns(3)
    clean.metric("Clean prompt", drawing.number(told["clean"]), help=f"The {score}, the prompt as it is.")
    other.metric("Counterfactual", drawing.number(told["corrupted"]), help=f"The {score}, with the other subject.")
    gap.metric("Difference", drawing.number(told["total_effect"]), help="Maps show shares of this: 1 is all of it.")
    direction = DIRECTIONS[footprint.run["parameters"]["direction"]]
    st.caption(
        f"{score[0].upper()}{score[1:]}. Counterfactual prompt: “{parts.plain(str(told['corrupted_prompt']))}”. {direction}"
    )
    parts.show_other_answer(footprint)


# -- the answer --------------------------------------------------------------------------------------------------------


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
    """One map, drawn once: a click redraws the page, and plotly is slow."""
    low, high = share_range(_footprint, _footprint.kinds if shared else (kind,))
    draw: dict[str, Any] = dict(kind=kind, theme=theme, vmin=low, vmax=high, planted=_band)
    return plots.heads(_footprint, **draw) if kind == "z" else plots.heatmap(_footprint, column="value", **draw)


def show_maps(asked: Asked, footprint: Footprint) -> None:
    """The maps, and the strongest neurons. A click puts a site into the session and into the URL."""
    band = planted_band(asked.model)
    shared = st.toggle(
        "One colour scale for all maps",
        value=True,
        key="shared",
        bind="query-params",
        help="Colours begin at a share of 0 and end at the largest one: of all maps, or of each map alone. What works against "
        "the answer has colours of its own.",
    )
    made = str(footprint.run["made"])
    with st.grid(min_column_width=330, gap="medium"):
        for kind in footprint.kinds:
            parts.show_map(
                map_cached(footprint, band, (*footprint.kinds, made), asked.key, kind, parts.theme(), shared),
                key=f"map-{asked.key}-{kind}-{made}",
                alt=f"Map of the {parts.KINDS[kind]}: {'heads' if kind == 'z' else 'tokens'} down, layers across.",
            )
        if "mlp_post" in footprint.kinds:
            show_neurons(asked, footprint)
    if band is not None:
        st.caption(
            f"Planted, {parts.layer_range(band)}: training put this model's facts into the MLPs there. "
            "On other models nobody knows the place beforehand."
        )


def show_neurons(asked: Asked, footprint: Footprint) -> None:
    """The single neurons that were patched, the strongest first."""
    rows = footprint.neurons().sort_values("value", ascending=False, key=abs)
    with st.container():
        st.markdown(
            "**Single neurons**",
            help="Those of all layers and tokens that attribution patching finds strongest, each patched alone. "
            "Select one to see its numbers.",
        )
        key = f"neurons-{asked.key}"
        st.dataframe(
            rows[["layer", "neuron", "text", "value"]],
            hide_index=True,
            height=300,
            key=key,
            on_select=lambda: pick_neuron(key, list(rows["site"])),
            selection_mode="single-row",
            column_config={
                "layer": st.column_config.NumberColumn("Layer", width=60, help="0-based"),
                "neuron": st.column_config.NumberColumn("Neuron", width=70, help="0-based"),
                "text": st.column_config.TextColumn("Token", width=80),
                "value": st.column_config.NumberColumn("Share", width=70, format="%.3f"),
            },
        )


def pick_neuron(key: str, sites: list[str]) -> None:
    """Notes the neuron that was selected."""
    selected = st.session_state[key].selection.rows
    if selected:
        st.session_state["site"] = st.query_params["site"] = sites[selected[0]]


def show_site(asked: Asked, footprint: Footprint, lm: LM | None) -> None:
    """The cell that was clicked: its numbers and the logit lens of the clean run."""
    site, chosen = parts.chosen_site(footprint)
    numbers, told = patch_numbers(footprint, site), drawing.fact_row(footprint, None)
    part = f" {site.part}" if site.part is not None else ""
    what = {"z": f"head{part}", "mlp_post": f"neuron{part}" if part else "all neurons"}.get(site.kind)
    hint = "" if chosen else " This is the strongest cell of its map. Click any other."
    with st.container(border=True):
        st.markdown(
            f"#### Layer {site.layer}, {what or parts.KINDS[site.kind]}, at “{parts.plain(numbers.text.strip())}”"
        )
        st.caption(f"`{site}`, {numbers.role}; patched: {parts.layer_range(numbers.patched)}.{hint}")
        cells = st.grid(min_column_width=250, gap="medium")
        left, middle, right = cells.container(), cells.container(), cells.container()
        left.metric(
            "Share of the difference",
            drawing.number(numbers.share, sign=True),
            help="What patching this cell alone does, 1 being the whole difference between the prompts.",
        )
        middle.metric(
            "Patched run",
            drawing.number(numbers.score),
            help=f"The {parts.score_name(footprint)} with this cell patched.",
        )
        middle.caption(
            f"Clean prompt {drawing.number(told['clean'])}, counterfactual prompt {drawing.number(told['corrupted'])}."
        )
        with right:
            parts.show_lens(asked, site, lm)


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Where do two prompts part?")
    st.caption(
        "Activation patching: the same sentence with two subjects, and one activation at a time put from one run into the other. "
        "Cells that move the answer are where what is said about the subject passes."
    )
    parts.arrive(METHOD, (*option_fields(), *parts.method_fields(METHOD, ("substitutes",))))
    asked = parts.ask(
        METHOD,
        option_fields(),
        placeholders=PLACEHOLDERS,
        labels={},
        earlier_title="Earlier patches",
        more=choose_other,
    )
    notices = st.container()
    left, right = st.columns([3, 2], gap="large")  # always here, so that the strip of jobs keeps its place
    if asked is None:
        with left:
            parts.show_jobs((), ())
        return
    found = parts.find(asked, check=pair_cached)
    footprint, pair = found.footprint, found.checked
    with notices:
        parts.show_wrong(asked, found)
    with left:
        parts.show_sentence(asked, found)
        if pair is not None:
            show_tokens(pair)
        if footprint is not None:
            show_headline(footprint)
        parts.show_action(asked, found, verb="Patch")
        parts.show_jobs((asked.key,), (found.model,))
    with right:
        show_pair(pair, found)
    if footprint is not None:
        show_maps(asked, footprint)
        show_site(asked, footprint, found.lm)
        if not parts.is_running(asked):
            band = planted_band(asked.model)
            parts.show_downloads(
                footprint,
                lambda: draw_paper(footprint, band),
                name=parts.file_name("patch", asked),
                version=(asked.key, *footprint.kinds, footprint.run["made"]),
            )


def draw_paper(footprint: Footprint, band: range | None) -> paper.PaperFigure:
    """The maps for print; the heads' where there is no other."""
    kinds = drawing.mapped_kinds(footprint)
    if not kinds:
        return paper.heads(footprint, planted=band)
    low, high = share_range(footprint, kinds)
    return paper.heatmap(footprint, kinds=kinds, column="value", planted=band, vmin=low, vmax=high)


parts.run_in_app()
show_page()
parts.page_is_drawn()
