"""Explore one fact: what the model says, where a restored state brings the answer back, and what one site knows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_fact import Lens, Look, default_site, doubt, lens_at, look, numbers_at, planted_band
from pages import _parts as parts
from workbench import drawing, export, paper, plots
from workbench.asked import Asked, Stored
from workbench.errors import InputError
from workbench.forms import FormField
from workbench.jobs import Job
from workbench.results import Footprint
from workbench.sites import Site

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

SCORES = {
    "p": "probability of “{answer}”",
    "p_target": "probability of all of “{answer}”",
    "logp": "log probability of “{answer}” (nats)",
    "logit_diff": "logit of “{answer}” minus “{foil}”",
    "rank": "rank of “{answer}” (0 is the top)",
    "kl": "KL from the clean prediction (nats)",
}

SEVERED = {"mlp_out": "MLP", "attn_out": "attention"}

KINDS = {"resid_post": "state after the block", "mlp_out": "MLP output", "attn_out": "attention output"}


# -- inputs ------------------------------------------------------------------------------------------------------------


def show_inputs() -> Asked | None:
    """The question as the widgets have it; None where it cannot be asked, with one sentence why."""
    left, right = st.columns([1, 2], gap="medium")
    with left:
        choice = parts.choose_model()
        buttons = st.container(horizontal=True)
        with buttons.popover("Options", icon=":material/tune:"):
            options = show_options()
        with buttons.popover("Earlier traces", icon=":material/history:"):
            show_earlier()
        if options:
            st.caption("Changed: " + parts.plain(", ".join(f"{name} {value}" for name, value in options.items())))
    with right:
        try:
            fact = parts.choose_fact(choice.name)
        except InputError as error:
            parts.show_error(error)
            return None
    return Asked(model=choice.name, dtype=choice.dtype, fact=fact, options=options)


def option_fields() -> tuple[FormField, ...]:
    """The form of the method's hyperparameters."""
    return parts.method_fields("workbench.locators.causal_trace", "CausalTrace", OPTIONS, tuple(PLACEHOLDERS))


def show_options() -> dict[str, Any]:
    """The method's hyperparameters; those that were changed come back."""
    with st.grid(min_column_width=200, width=520):
        options = parts.fill_form(option_fields(), PLACEHOLDERS, LABELS)
        parts.choose_precision()
    return options


def show_earlier() -> None:
    """A button for every trace that was asked before."""
    listed = parts.earlier("CausalTrace")
    if not listed:
        st.caption("None yet. Every trace is kept and can be opened here again.")
    with st.container(height=380 if len(listed) > 8 else "content", border=False, width=520):
        for entry in listed[:60]:
            st.button(
                parts.trace_label(entry.asked),
                key=f"open-{entry.key}",
                help=parts.plain(f"{entry.asked.fact.text} (asked {parts.when(entry.made)})"),
                type="tertiary",
                on_click=parts.go_to,
                args=(entry.asked,),
            )


# -- the model and its work --------------------------------------------------------------------------------------------


@st.cache_data(show_spinner=False, max_entries=256)
def look_cached(_lm: LM, _asked: Asked, weights: str, key: str) -> Look:
    """What the model says after the prompt, computed once for each question."""
    return look(_lm, _asked.fact)


@st.cache_data(show_spinner=False, max_entries=256)
def lens_cached(_lm: LM, _asked: Asked, weights: str, key: str, site: str) -> Lens:
    """The logit lens at one site, computed once."""
    return lens_at(_lm, _asked.fact, site=Site.parse(site))


def check_question(asked: Asked, lm: LM) -> tuple[Look | None, str]:
    """What the model says, and what is wrong with the question (empty: nothing), before any long work."""
    try:
        seen = look_cached(lm, asked, lm.weight_hash, asked.key)
        check_cached(lm, asked, lm.weight_hash, asked.key)
    except InputError as error:
        return None, str(error)
    return seen, ""


@st.cache_data(show_spinner=False, max_entries=256)
def check_cached(_lm: LM, _asked: Asked, weights: str, key: str) -> None:
    """Raises where the options cannot be used; computed once."""
    _asked.locator(_lm)


def start(asked: Asked) -> None:
    """Queues the trace; for the button."""
    store = parts.store()
    parts.workshop().submit(
        parts.choice_of(asked), partial(asked.compute, store=store), key=asked.key, title=parts.trace_label(asked)
    )


def show_action(asked: Asked, stored: Stored | None, *, ready: bool, stale: bool) -> None:
    """The button that starts the trace, or what became of it."""
    job = parts.workshop().find(asked.key)
    if parts.is_running(asked):
        return
    if stored is not None and stored.footprint is not None and not stored.missing and not stale:
        return
    missing = stored.missing if stored is not None and stored.footprint is not None else ()
    st.button(
        "Go on" if missing else "Trace",
        icon=":material/play_arrow:",
        type="primary",
        disabled=not ready,
        on_click=start,
        args=(asked,),
        key="trace",
    )
    if job is not None and job.status.state == "failed":
        parts.show_error(job.status.error)
    elif missing:
        st.caption(
            f"Stopped before {' and '.join(KINDS.get(kind, kind) for kind in missing)}. What was finished is kept."
        )
    elif stale:
        st.caption("The stored maps below were made with other weights of the same name.")


# -- the answer --------------------------------------------------------------------------------------------------------


def show_headline(asked: Asked, footprint: Footprint | None, seen: Look | None) -> None:
    """The sentence, what the model says, and how far the corruption took it down."""
    told = drawing.fact_row(footprint, None) if footprint is not None else {}
    answer = str(told.get("answer") or (seen.answer if seen else asked.fact.target_true) or "…")
    st.markdown(f"### {parts.sentence(asked.fact, answer)}")
    if footprint is None:
        if seen is not None:
            st.caption(
                f"Probability of “{parts.plain(seen.answer)}” at the end of the prompt: {drawing.number(seen.answer_p)}."
            )
        return
    score = score_name(footprint)
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
    if not told["correct"]:
        said = parts.plain(str(told["said"]))
        st.caption(f":orange-badge[Note] The model itself says “{said}”; the maps follow the answer above.")


def score_name(footprint: Footprint) -> str:
    """What was measured, in words."""
    told = drawing.fact_row(footprint, None)
    name = SCORES[footprint.run["parameters"]["score"]]
    return name.format(answer=parts.plain(str(told["answer"])), foil=parts.plain(str(told["foil"])))


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


def show_predictions(seen: Look | None, model: Job[LM]) -> None:
    """The most probable next tokens."""
    st.markdown(
        "**Next tokens**",
        help="What the model says after the sentence, the most probable first; the answer stands out.",
    )
    if seen is not None:
        st.plotly_chart(
            plots.predictions(seen.top, theme=parts.theme(), answer=seen.answer),
            theme=None,
            key="predictions",
            config=parts.QUIET,
            alt="The model's most probable next tokens: "
            + ", ".join(f"{text.strip()} {p:.2f}" for text, p in seen.top[:5]),
        )
    elif not model.status.over:
        st.skeleton(height=224)


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
            key = f"map-{asked.key}-{kind}-{made}"
            st.plotly_chart(
                map_cached(footprint, band, (*footprint.kinds, made), asked.key, kind, parts.theme(), shared),
                theme=None,
                key=key,
                on_select=partial(pick_site, key),
                selection_mode="points",
                config=parts.QUIET,
                alt=f"Map of the {KINDS.get(kind, kind)}: tokens down, layers across.",
            )
    if band is not None:
        st.caption(
            f"Planted, layers {band[0]} to {band[-1]}: training put this model's facts into the MLPs of these layers. "
            "On other models nobody knows the place beforehand."
        )


def pick_site(key: str) -> None:
    """Notes the cell that was clicked; a click on nothing keeps the last one."""
    points = st.session_state[key].selection.points
    if points:
        data = points[0]["customdata"]
        st.session_state["site"] = data[0] if isinstance(data, list) else data
        st.query_params["site"] = st.session_state["site"]


def show_site(asked: Asked, footprint: Footprint, lm: LM | None) -> None:
    """The cell that was clicked: its numbers, every noise sample, and the logit lens."""
    chosen = st.session_state.get("site") or st.query_params.get("site")
    try:
        site = Site.parse(chosen) if chosen else default_site(footprint)
        numbers = numbers_at(footprint, site)
    except InputError:
        chosen = None
        site = default_site(footprint)
        numbers = numbers_at(footprint, site)
    with st.container(border=True):
        st.markdown(
            f"#### Layer {site.layer}, {KINDS.get(site.kind, site.kind)}, at “{parts.plain(numbers.text.strip())}”"
        )
        hint = "" if chosen else " This is the strongest cell of its map. Click any other."
        st.caption(f"`{site}`, {numbers.role}; restored: {parts.layer_range(numbers.restored)}.{hint}")
        cells = st.grid(min_column_width=250, gap="medium")
        left, middle, right = cells.container(), cells.container(), cells.container()
        with left:
            st.metric(
                "Restored run",
                drawing.number(numbers.score),
                help=f"The {score_name(footprint)} with this cell restored.",
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
            show_lens(asked, site, lm)


def show_lens(asked: Asked, site: Site, lm: LM | None) -> None:
    """What the final norm and the unembedding read at a site."""
    st.markdown(
        "**Logit lens**",
        help="The clean run's state here, read by the final norm and the unembedding as if it were the last layer's. "
        "For MLP and attention it reads what this layer alone adds, so compare ranks rather than probabilities.",
    )
    if lm is None:
        st.skeleton(height=224)
        return
    try:
        lens = lens_cached(lm, asked, lm.weight_hash, asked.key, str(site))
    except InputError:  # the maps are of other weights of the same name
        st.caption("The loaded model has no such site.")
        return
    st.plotly_chart(
        plots.lens(lens.top, kind=site.kind, theme=parts.theme(), answer=lens.answer),
        theme=None,
        key="lens-chart",
        config=parts.QUIET,
        alt="The logit lens at this site: " + ", ".join(f"{text.strip()} {p:.2f}" for text, p in lens.top[:5]),
    )


def show_downloads(asked: Asked, footprint: Footprint) -> None:
    """Files of this trace, each with its protocol inside."""
    name = parts.file_name(asked)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Download**", help="PDF, SVG and PNG are drawn for print. Every file holds its protocol.")
        for form, data in files_cached(
            footprint, planted_band(asked.model), asked.key, *footprint.kinds, footprint.run["made"]
        ).items():
            st.download_button(
                form.upper(), data=data, file_name=f"{name}.{form}", on_click="ignore", key=f"download-{form}"
            )
        with st.popover("Protocol", icon=":material/description:"):
            st.markdown(parts.plain(export.protocol_text(footprint)))
            st.json(dict(footprint.run), expanded=1)


@st.cache_data(show_spinner=False, max_entries=16)
def files_cached(_footprint: Footprint, _band: range | None, *version: str) -> dict[str, bytes]:
    """All files of a trace. Made before they are asked for: a link that is made on demand is lost when the page is drawn anew."""
    figure = paper.heatmap(_footprint, planted=_band)
    forms: dict[str, bytes] = {form: export.figure_bytes(figure, form) for form in ("pdf", "svg", "png")}
    return {**forms, "csv": export.csv_bytes(_footprint), "parquet": export.parquet_bytes(_footprint)}


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Where does a model keep a fact?")
    st.caption(
        "Causal tracing: the subject is corrupted until the model forgets the answer, then one clean state at a time is restored. "
        "Cells that bring the answer back are where the fact passes."
    )
    parts.arrive(option_fields())
    asked = show_inputs()
    notices = st.container()
    left, right = st.columns([3, 2], gap="large")  # always here, so that the strip of jobs keeps its place
    if asked is None:
        with left:
            parts.show_jobs("", ())
        return
    stored, model = asked.find(parts.store()), parts.workshop().model(parts.choice_of(asked))
    footprint = stored.footprint if stored is not None else None
    lm = model.result if model.status.state == "done" else None
    seen, wrong = check_question(asked, lm) if lm is not None else (None, model.status.error)
    stale = footprint is not None and lm is not None and footprint.run["weight_hash"] != lm.weight_hash
    with notices:
        show_wrong(asked, wrong, is_model=lm is None)
    with left:
        show_headline(asked, footprint, seen)
        show_action(asked, stored, ready=seen is not None, stale=stale)
        parts.show_jobs(asked.key, (model,))
    with right:
        show_predictions(seen, model)
    if footprint is not None:
        show_maps(asked, footprint)
        show_site(asked, footprint, lm)
        if not parts.is_running(asked):
            show_downloads(asked, footprint)


def show_wrong(asked: Asked, wrong: str, *, is_model: bool) -> None:
    """What is wrong with the model or the question, if anything."""
    if not wrong:
        return
    parts.show_error(wrong)
    if is_model:
        forget, choice = parts.workshop().forget, parts.choice_of(asked)
        st.button("Try again", on_click=forget, args=(choice,), icon=":material/refresh:")


show_page()
parts.page_is_drawn()
