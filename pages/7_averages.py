"""Averages: where are facts on average, and which layers should each editor touch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_fact import planted_band
from pages import _analysis as analysis
from pages import _parts as parts
from workbench import drawing, paper, plots
from workbench.facts import Fact
from workbench.results import Result

if TYPE_CHECKING:
    from workbench.models import LM

AVERAGE = "average_trace"

QUESTIONS = {
    AVERAGE: "Where are facts on average?",
    "layers_to_edit": "Which layers should each editor touch?",
}

OPTIONS = ("window", "noise", "samples", "score", "seed")
"""What is asked of the trace."""


# -- the average trace -------------------------------------------------------------------------------------------------


def trace_all(lm: LM, *, facts: Sequence[Fact], options: Mapping[str, Any], known_only: bool) -> Result:
    """The work: single traces are kept, so a run that was stopped goes on."""
    from analyses.average_trace import average_trace
    from workbench.locators.causal_trace import CausalTrace

    return average_trace(lm, facts, trace=CausalTrace.fitted(lm, **options), store=parts.store(), known_only=known_only)


def show_average() -> None:
    """Inputs, work and answer."""
    left, right = st.columns([1, 2], gap="medium")
    with left:
        choice = analysis.choose_model()
        with st.popover("Options", icon=":material/tune:"), st.grid(min_column_width=220, width=560):
            options = analysis.fill_form(
                parts.method_fields("CausalTrace", OPTIONS, empty=("window",)), prefix="average"
            )
            known_only = st.toggle(
                "Only facts that the model knows", value=True, key="average-known", bind="query-params",
                help="Those whose answer is the model's most probable next token, as in ROME's figure.",
            )  # fmt: skip
            parts.choose_precision()
    with right:
        chosen = analysis.ask_facts(choice.name, n=20, typed=False)
    if chosen is None:
        parts.show_jobs((), ())
        return
    facts, source = chosen
    key = f"average-{choice.name}-{choice.dtype}-{known_only}-{options}-{hash(facts)}"
    work = partial(trace_all, facts=facts, options=options, known_only=known_only)
    watched, lm = analysis.show_model(choice)
    job = parts.workshop().find(key)
    result = job.result if job is not None and job.status.state == "done" else None
    title = parts.plain(f"Average trace of {len(facts)} facts on {choice.name.rpartition('/')[2]}")
    analysis.show_work(
        choice, work, key=key, title=title, verb=f"Trace {len(facts)} facts", ready=lm is not None,
        is_done=result is not None, watched=watched,
    )  # fmt: skip
    if result is not None:
        command = ["workbench", "average", "--model", choice.name, *source]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        show_maps(result, key=key, model=choice.name)
        analysis.show_command(analysis.quoted(*command, "--out", "results/average"), result)


@st.cache_resource(show_spinner=False, max_entries=32)
def drawn(_result: Result, key: str, kind: str, form: str, theme: parts.Theme, band: tuple[int, ...]) -> Figure:
    """One figure of an average, drawn once."""
    planted = range(band[0], band[-1] + 1) if band else None
    if form == "map":
        low, high = plots.shared_range(_result, column="value")
        return plots.average(_result, kind=kind, theme=theme, vmin=low, vmax=high, planted=planted)
    return plots.profile(_result, kind=kind, theme=theme, planted=planted)


def show_maps(result: Result, *, key: str, model: str) -> None:
    """Maps of roles by layers, and the same as curves with intervals."""
    band, kinds = planted_band(model), list(dict.fromkeys(result.table["kind"]))
    n = int(result.table["n"].max())
    st.markdown(f"### {n} facts on average")
    for form in ("map", "curves"):
        with st.grid(len(kinds), min_column_width=300):
            for kind in kinds:
                st.plotly_chart(
                    drawn(result, key, kind, form, parts.theme(), tuple(band or ())),
                    theme=None,
                    key=f"average-{form}-{kind}",
                    config=parts.QUIET,
                    alt=f"{drawing.KIND_WORDS.get(kind, kind)}: mean effect by role of the token and layer.",
                )
    st.caption(
        "Rows are roles of tokens; each fact counts once. Layers count from 0. Bands: 95 % bootstrap intervals over facts."
        + (f" Planted, {parts.layer_range(band)}: where training put this model's facts." if band else "")
    )
    parts.show_downloads(
        result, lambda: paper.average(result, planted=band), name="average-trace", version=(key,), key="average"
    )
    analysis.show_tables(result, key="average")


# -- the recommended layers ---------------------------------------------------------------------------------------------


def show_recommended(question: analysis.Question, result: Result) -> None:
    """The recommended layers of every editor, and files with them for EasyEdit."""
    rows = result.extras["recommended"]
    st.markdown(
        "### Recommended layers",
        help="By trace: where facts are found. By sweep: where edits turn out best. Layers count from 0.",
    )
    st.dataframe(
        rows.drop(columns="yaml"),
        hide_index=True,
        key="recommended",
        column_config={
            "editor": st.column_config.TextColumn("Editor"),
            "by": st.column_config.TextColumn("By"),
            "layers": st.column_config.TextColumn("Layers"),
            "score": st.column_config.NumberColumn("Score there", format="%.2f"),
            "low": st.column_config.NumberColumn("From", format="%.2f", help="95 % bootstrap interval over facts."),
            "high": st.column_config.NumberColumn("To", format="%.2f"),
            "as_good": st.column_config.NumberColumn("As good", help="Places within the interval of the best one."),
            "of": st.column_config.NumberColumn("Of places"),
        },
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(
            "**For EasyEdit**",
            help="Files of hyperparameters with these layers and the editor's own settings otherwise.",
        )
        for row in rows[rows["yaml"] != ""].to_dict("records"):
            st.download_button(
                f"{row['editor']}, by {row['by']}",
                data=row["yaml"],
                file_name=f"{row['editor']}-{row['by']}.yaml",
                on_click="ignore",
                key=f"yaml-{row['editor']}-{row['by']}",
            )


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Where are facts, taken together?")
    st.caption(
        "One fact may be an exception. Over many, the layers that matter stand out, and editors can be told of them."
    )
    analysis.arrive("7_averages.py")
    name = analysis.choose(QUESTIONS)
    if name == AVERAGE:
        show_average()
    else:
        analysis.show_analysis(name, more={"layers_to_edit": show_recommended})


parts.run_in_app()
show_page()
parts.page_is_drawn()
