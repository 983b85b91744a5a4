"""Compare locators: many methods on the same fact, layer by layer, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import streamlit as st
from plotly.graph_objects import Figure

from analyses.compare_methods import QUICK, agree, collect, compared, questions
from analyses.explore_fact import planted_band
from pages import _parts as parts
from workbench import drawing, paper, plots
from workbench.asked import Asked
from workbench.errors import InputError
from workbench.forms import methods_of
from workbench.results import Footprint, Result
from workbench.sites import ROLES, Role

HERE, ALL = "This fact", "All facts looked at so far"

FORMS: dict[str, Literal["lines", "strips"]] = {"Strips": "strips", "Lines": "lines"}


# -- inputs ------------------------------------------------------------------------------------------------------------


def show_inputs(opened: Asked | None) -> tuple[Asked, ...] | None:
    """One question a method; None where the fact cannot be asked, with one sentence why."""
    left, right = st.columns([1, 2], gap="medium")
    with left:
        choice = parts.choose_model()
        with st.popover("Options", icon=":material/tune:"):
            parts.choose_precision()
    with right:
        try:
            fact = parts.choose_fact(choice.name)
        except InputError as error:
            parts.show_error(error)
            return None
    known = methods_of("workbench.locators")
    usual = [method for method in QUICK if method in known]
    if opened is not None and opened.method not in usual:
        st.session_state["methods"] = [*usual, opened.method]
    methods = st.multiselect(
        "Methods",
        list(known),
        default=usual,
        key="methods",
        bind="query-params",
        format_func=parts.method_words,
        help="Each with its published hyperparameters. The first choice takes seconds; circuits and learned masks take longer.",
    )
    return questions(choice, fact, methods=methods)


@st.cache_resource(show_spinner=False, max_entries=16)
def collect_cached(_asked: Sequence[Asked], version: tuple[object, ...], over_all: bool) -> dict[str, Footprint]:
    """What is stored, read again when a folder has changed."""
    return collect(parts.store(), _asked, others=parts.earlier() if over_all else ())


# -- the methods' work -------------------------------------------------------------------------------------------------


def show_work(asked: Sequence[Asked], found: parts.Found, there: Mapping[str, Footprint]) -> None:
    """The button that starts what is not stored yet; one sentence for each method that cannot."""
    wrong = {one.method: parts.problem_of(one, found.lm) for one in asked} if found.lm is not None else {}
    for one in asked:
        job = parts.workshop().find(one.key)
        if one.method not in there and job is not None and job.status.state == "failed":
            wrong[one.method] = job.status.error
    left = [one for one in asked if one.method not in there and not wrong.get(one.method)]
    waiting = [one for one in left if not parts.is_running(one)]
    if waiting:
        parts.act(
            f"Locate with {len(waiting)} method{'s' * (len(waiting) > 1)}",
            partial(parts.start, *waiting),
            icon=":material/play_arrow:",
            type="primary",
            disabled=found.seen is None,
            key="trace",
        )
    for method, sentence in wrong.items():
        if sentence:
            st.caption(f":orange-badge[{parts.method_words(method)}] {parts.plain(sentence)}")


# -- the answer --------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False, max_entries=64)
def figure_cached(
    _footprints: Sequence[Footprint],
    version: tuple[str, ...],
    kinds: tuple[str, ...] | None,
    token: Role | None,
    form: Literal["lines", "strips"],
    theme: parts.Theme,
    band: tuple[int, ...],
) -> Figure:
    """The comparison, drawn once."""
    return plots.compare(_footprints, kinds=kinds, token=token, form=form, theme=theme, planted=_range(band))


@st.cache_data(show_spinner=False, max_entries=32)
def agree_cached(
    _footprints: Sequence[Footprint], version: tuple[str, ...], kinds: tuple[str, ...] | None, token: Role | None
) -> Result:
    """The agreement of every pair, computed once."""
    return agree(_footprints, kinds=kinds, token=token)


def show_comparison(asked: Sequence[Asked], there: Mapping[str, Footprint], *, is_loaded: bool) -> None:
    """Figure, downloads and agreement of what is there."""
    controls = st.grid(min_column_width=190, gap="small")
    form = controls.segmented_control(
        "Drawn as", list(FORMS), default="Strips", key="form", bind="query-params", required=True
    )
    token = controls.selectbox(
        "Tokens",
        ROLES,
        index=None,
        key="role",
        bind="query-params",
        format_func=drawing.ROLE_WORDS.__getitem__,
        placeholder="the largest of all tokens",
        help="A layer's value is the largest of all tokens, or the mean over the tokens of one role. Methods that look at the "
        "last token only have no other role.",
    )
    kinds = tuple(
        controls.multiselect(
            "Kinds of sites",
            [kind for kind in parts.KINDS if kind != "embed"],
            key="sites",
            bind="query-params",
            placeholder="all",
            format_func=drawing.KIND_WORDS.__getitem__,
        )
    )
    footprints, version = list(there.values()), tuple(footprint.key for footprint in there.values())
    band = planted_band(asked[0].model)
    try:
        table = compared(footprints, kinds=kinds or None, token=token)
        st.plotly_chart(
            figure_cached(
                footprints, version, kinds or None, token, FORMS[form or "Strips"], parts.theme(), tuple(band or ())
            ),
            theme=None,
            key="comparison",
            config=parts.QUIET,
            alt="The methods' effects by layer: " + ", ".join(map(parts.method_words, there)),
        )
    except InputError as error:
        parts.show_error(error)
        return
    st.caption(
        f"{words_of(table)} Each series is divided by its largest size, since methods have different units; layers count from 0."
        + (f" Planted, {parts.layer_range(band)}: where training put this model's facts." if band else "")
    )
    parts.show_downloads(
        table,
        lambda: paper.compare(
            footprints, kinds=kinds or None, token=token, form=FORMS[form or "Strips"], planted=band, size="page"
        ),
        name=parts.file_name("compare", asked[0]),
        version=(*version, form or "", str(token), *kinds),
    )
    show_agreement(asked, footprints, version, kinds, token, is_loaded=is_loaded)


def words_of(table: Result) -> str:
    """How many series and facts there are."""
    series, facts = table.table["label"].nunique(), table.table["fact"].nunique()
    return f"{series} series, {facts} fact{'s: means' if facts > 1 else ''}."


def measure_title(name: str) -> str:
    """What a measure of agreement is called."""
    words = drawing.MEASURE_WORDS[name]
    return words[:1].upper() + words[1:]


def show_agreement(
    asked: Sequence[Asked],
    footprints: Sequence[Footprint],
    version: tuple[str, ...],
    kinds: tuple[str, ...],
    token: Role | None,
    *,
    is_loaded: bool,
) -> None:
    """Every pair of series, compared: as a matrix, as a table, as files."""
    st.markdown(
        "### Do they agree?",
        help="Every pair of series over the layers. A star: closer than chance, by shuffled layers, corrected for the number of "
        "pairs. Neighbouring layers are alike in most methods, which shuffling ignores, so stars are generous.",
    )
    if not is_loaded:
        st.skeleton(height=300)
        return
    try:
        agreed = agree_cached(footprints, version, kinds or None, token)
    except InputError as error:
        st.caption(parts.plain(str(error)))
        return
    measure = str(
        st.selectbox(
            "Measure",
            list(drawing.MEASURE_WORDS),
            key="measure",
            bind="query-params",
            format_func=measure_title,
            label_visibility="collapsed",
            width=320,
        )
    )
    st.plotly_chart(
        plots.agreement(agreed, measure=measure, theme=parts.theme(), title=False),
        theme=None,
        key="agreement",
        config=parts.QUIET,
        alt="Agreement of every pair of series as a matrix.",
    )
    with st.expander("As a table"):
        st.dataframe(agreed.table, hide_index=True)
    parts.show_downloads(
        agreed,
        lambda: paper.agreement(agreed, measure=measure, size="page"),
        name=parts.file_name("agreement", asked[0]),
        version=(*version, str(token), *kinds, measure),
        key="agreement",
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Do methods agree about the place?")
    st.caption(
        "Every method says on its own scale which layers a fact needs. Here they stand side by side: same fact, same layers."
    )
    asked = show_inputs(parts.arrive(None, ()))
    notices = st.container()
    left, right = st.columns([3, 2], gap="large")  # always here, so that the strip of jobs keeps its place
    if not asked:
        with left:
            if asked is not None:
                st.caption("Choose at least one method.")
            parts.show_jobs((), ())
        return
    found = parts.find(asked[0], check=None)
    keys = tuple(one.key for one in asked)
    over_all = st.session_state.get("over", st.query_params.get("over")) == ALL
    there = collect_cached(asked, (*keys, *parts.store_version()), over_all)
    with notices:
        parts.show_wrong(asked[0], found)
    with left:
        parts.show_sentence(asked[0], found)
        show_work(asked, found, there)
        parts.show_jobs(keys, (found.model,))
        st.segmented_control(
            "Facts", [HERE, ALL], default=HERE, key="over", bind="query-params", required=True,
            label_visibility="collapsed",
        )  # fmt: skip
        own = [one for one in asked if one.method in parts.PAGES and one.method in there]
        if own:
            with st.container(horizontal=True, vertical_alignment="center"):
                st.caption("Look closer:", width=90)
                for one in own:
                    st.page_link(Path(__file__).parent / parts.PAGES[one.method], label=parts.method_words(one.method))
    with right:
        parts.show_predictions(found)
    if there:
        show_comparison(asked, there, is_loaded=found.lm is not None)


def _range(band: tuple[int, ...]) -> range | None:
    return range(band[0], band[-1] + 1) if band else None


parts.run_in_app()
show_page()
parts.page_is_drawn()
