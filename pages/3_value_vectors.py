"""Value vectors: what each MLP neuron writes towards a fact's answer, a neuron in words, and a search by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_fact import planted_band
from analyses.explore_neurons import (
    Card,
    Neuron,
    Word,
    build_words,
    card_of,
    find_neurons,
    find_prompts,
    has_words,
    keep_prompts,
    named,
    prompts_of,
    read_words,
    sums,
    with_words,
    word_tokens,
)
from pages import _parts as parts
from workbench import drawing, figures_neurons
from workbench.asked import Asked
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.forms import FormField
from workbench.jobs import ModelChoice
from workbench.results import Footprint, Result

if TYPE_CHECKING:
    from workbench.models import LM

METHOD = "ValueVectors"

POSITION = ("token",)
"""The option that is asked for below the fact."""

OPTIONS = ("neurons", "per", "centred", "tokens", "projection")
"""The other fields that the page asks for, in this order."""

LABELS = {
    "token": "Position",
    "neurons": "Strongest neurons",
    "per": "Of",
    "centred": "Centred logits",
    "tokens": "Tokens named",
    "projection": "Words in files",
}
"""What fields are called where their own name says too little."""

Reading = Literal["normed", "plain"]

READINGS: Mapping[Reading, str] = {"normed": "Through the final norm", "plain": "Without the norm"}

COLUMNS: Mapping[str, Any] = {
    "neuron": st.column_config.TextColumn("Neuron", width=68, help="Layer and number, both counted from 0."),
    "k": st.column_config.NumberColumn("k", format="%.3f", width=58, help="The neuron's activation at this token."),
    "contribution": st.column_config.NumberColumn(
        "Contribution", format="%+.3f", width=86, help="k times the value vector's effect on the answer's logit."
    ),
    "share": st.column_config.NumberColumn(
        "Share", format="percent", width=58, help="Of the sum of the sizes of all contributions in its layer."
    ),
    "value": st.column_config.NumberColumn(
        "Value", format="%+.3f", width=72, help="What a unit of activation adds to the token's logit, before the norm's divisor."
    ),
    "rank": st.column_config.NumberColumn(
        "Rank", width=60, help="The token's place among all that the neuron promotes; 0 is the first, empty is far down."
    ),
    "promoted": st.column_config.TextColumn("Promotes", width=118, help="When the activation is positive."),
    "suppressed": st.column_config.TextColumn("Suppresses", width=118, help="When the activation is positive."),
}  # fmt: skip
"""How the tables of neurons are shown."""

PROMPT_COLUMNS: Mapping[str, Any] = {
    "k": st.column_config.NumberColumn("k", format="%+.2f", width=58, help="The neuron's activation there."),
    "text": st.column_config.TextColumn("At", width=72, help="The token."),
    "prompt": st.column_config.TextColumn("Prompt", width="medium"),
    "answer": st.column_config.TextColumn("Answer", width=80),
}
"""How the table of prompts is shown."""


# -- inputs ------------------------------------------------------------------------------------------------------------


def option_fields(names: tuple[str, ...]) -> tuple[FormField, ...]:
    """The form of the method's hyperparameters."""
    return parts.method_fields(METHOD, names)


def ask_position(choice: ModelChoice, fact: Fact) -> dict[str, Any]:
    """The token at which the neurons are looked at."""
    return parts.fill_form(option_fields(POSITION), {}, LABELS)


# -- which neuron ------------------------------------------------------------------------------------------------------

SOURCES = ("figure", "strongest", "search")
"""Where a neuron can be clicked."""


def source_key(source: str, *of: object) -> str:
    """The key of a place to click: another one after a click elsewhere, so that one neuron is marked and not three."""
    return "-".join(map(str, (source, *of, st.session_state.get(f"turn-{source}", 0))))


def choose(neuron: str, source: str) -> None:
    """Puts a neuron into the session and into the URL."""
    st.session_state["neuron"] = st.query_params["neuron"] = neuron
    for other in SOURCES:
        if other != source:
            st.session_state[f"turn-{other}"] = st.session_state.get(f"turn-{other}", 0) + 1


def pick_mark(key: str) -> None:
    """Notes the dot that was clicked; a click on a bar or on nothing keeps the last one."""
    for point in st.session_state[key].selection.points:
        if data := point.get("customdata"):
            choose(str(Neuron.at(data[0] if isinstance(data, list) else data)), "figure")


def pick_row(key: str, source: str, neurons: Sequence[str]) -> None:
    """Notes the row that was clicked; a click that takes the mark away keeps it."""
    for row in st.session_state[key].selection.rows:
        choose(neurons[row], source)


def chosen_neuron(asked: Asked, footprint: Footprint | None) -> tuple[Neuron | None, str]:
    """The neuron that was clicked or stands in the URL, else the strongest one; and why it is that one, in a sentence."""
    before = st.session_state.setdefault("neuron_of", asked.model)
    if before != asked.model:  # its number means nothing in another model
        st.session_state["neuron_of"] = asked.model
        st.session_state.pop("neuron", None)
        st.query_params.pop("neuron", None)
    text = st.session_state.get("neuron") or st.query_params.get("neuron")
    strongest = next(iter(named(footprint.neurons()))) if footprint is not None and len(footprint.neurons()) else None
    if not text:
        return strongest, "The strongest neuron of this fact. Click any other in the figure or in a table."
    st.query_params["neuron"] = text  # gone from it after a visit to another page
    try:
        return Neuron.parse(text), ""
    except InputError as error:
        return strongest, parts.plain(str(error))


def show_table(table: pd.DataFrame, *, source: str, key: str, order: Sequence[str]) -> None:
    """A table of neurons; a click on a row chooses its neuron."""
    neurons = tuple(map(str, named(table)))
    key = source_key(source, key)
    st.dataframe(
        table.assign(neuron=neurons),
        key=key,
        column_order=order,
        column_config=COLUMNS,
        hide_index=True,
        height=36 + 35 * min(len(table), 10),
        row_height=35,
        placeholder="",
        on_select=partial(pick_row, key, source, neurons),
        selection_mode="single-row",
    )


# -- a fact's neurons --------------------------------------------------------------------------------------------------


def show_headline(footprint: Footprint) -> None:
    """The answer's logit, and how much of it comes from the MLPs directly."""
    told, found = drawing.fact_row(footprint, None), sums(footprint)
    logit, layers, neurons = st.columns(3)
    logit.metric(
        "Logit", drawing.number(found.logit), help=f"Of “{parts.plain(str(told['answer']))}”, at the end of the prompt."
    )
    layers.metric(
        "All MLPs", drawing.number(found.layers, sign=True), help="What the MLPs of all layers give to it directly."
    )
    neurons.metric(
        f"{found.n} neurons",
        drawing.number(found.neurons, sign=True),
        help="What the strongest neurons give to it directly; they have the rows and dots below.",
    )
    if footprint.run["parameters"]["token"] != "last":
        st.caption(
            ":orange-badge[Note] At another token than the last, nothing reaches the logits directly. "
            "The values say what the state there would be read as."
        )
    parts.show_other_answer(footprint)


@st.cache_resource(show_spinner=False, max_entries=64)
def figure_cached(_footprint: Footprint, _band: range | None, version: str, key: str, theme: parts.Theme) -> Figure:
    """The figure, drawn once: a click redraws the page, and plotly is slow."""
    return figures_neurons.contributions(_footprint, theme=theme, planted=_band)


def show_figure(asked: Asked, footprint: Footprint) -> None:
    """The contributions by layer. A click on a dot chooses its neuron."""
    band, made = planted_band(asked.model), str(footprint.run["made"])
    key = source_key("figure", asked.key, made)
    st.plotly_chart(
        figure_cached(footprint, band, made, asked.key, parts.theme()),
        theme=None,
        key=key,
        on_select=partial(pick_mark, key),
        selection_mode="points",
        config=parts.QUIET,
        alt="What each layer's MLP contributes to the answer's logit, as bars, and its strongest neurons as dots.",
    )
    words = "Bars: all neurons of a layer together, with the bias. Dots: single neurons; click one."
    if band is not None:
        words += f" Planted, {parts.layer_range(band)}: training put this model's facts into the MLPs there."
    st.caption(words)


def choose_reading() -> Reading:
    """How value vectors are read in words."""
    reading: Reading = st.segmented_control(
        "Value vectors in words",
        list(READINGS),
        format_func=lambda one: READINGS[one],
        default="normed",
        key="read",
        bind="query-params",
        required=True,
        help="A value vector times the unembedding: after the final norm's gain (its divisor set to 1), as the model would "
        "read it, or as it stands in the weights.",
    )
    return reading


@st.cache_data(show_spinner=False, max_entries=64)
def words_cached(_lm: LM, weights: str, neurons: tuple[str, ...], reading: Reading, k: int) -> pd.DataFrame:
    """Neurons in words, read once."""
    return read_words(_lm, [Neuron.parse(one) for one in neurons], projection=reading, k=k)


def show_strongest(asked: Asked, footprint: Footprint, lm: LM | None, reading: Reading) -> None:
    """The neurons with the largest contributions."""
    st.markdown(
        "**Strongest neurons for this fact**", help="Those that contribute most to the answer's logit directly."
    )
    table = footprint.extras["neurons"]
    if table.empty:
        st.caption("No neuron was asked for; see Options.")
        return
    if reading != table["projection"].iloc[0]:
        if lm is None:
            st.skeleton(height=386)
            return
        words = words_cached(
            lm, lm.weight_hash, tuple(map(str, named(table))), reading, int(footprint.run["parameters"]["tokens"])
        )
        table = table.assign(promoted=list(words["promoted"]), suppressed=list(words["suppressed"]))
    show_table(
        table,
        source="strongest",
        key=f"{asked.key}-{reading}",
        order=["neuron", "contribution", "share", "k", "promoted", "suppressed"],
    )


# -- the search --------------------------------------------------------------------------------------------------------


@st.cache_data(show_spinner=False, max_entries=64)
def found_cached(_lm: LM, weights: str, token: int, reading: Reading) -> pd.DataFrame | None:
    """The neurons that promote a token, looked up once."""
    return find_neurons(_lm, token, projection=reading)


def index_key(lm: LM, reading: Reading) -> str:
    """The key of the job that makes the index."""
    return f"vocabulary-{lm.weight_hash}-{reading}"


def show_search(asked: Asked, lm: LM | None, reading: Reading, answer: str) -> None:
    """A word, and the neurons of the model that promote it most."""
    st.markdown(
        "**Neurons that promote a token**",
        help="Of all value vectors of the model, those that raise the token's logit most when their neuron is active; "
        "whatever the fact.",
    )
    if lm is None:
        st.skeleton(height=386)
        return
    if not has_words(lm, projection=reading):
        show_index(asked, lm, reading)
        return
    text = st.text_input(
        "Token",
        key="word",
        bind="query-params",
        placeholder=f"a word, e.g. {answer}" if answer else "a word",
        label_visibility="collapsed",
    )
    if not text:
        st.caption("Type a word. The model's tokens say whether it is one piece or several.")
        return
    try:
        word = word_tokens(lm, text)
    except InputError as error:
        parts.show_error(error)
        return
    token = choose_token(lm, text, word)
    found = found_cached(lm, lm.weight_hash, token, reading)
    if found is not None:
        show_table(
            found,
            source="search",
            key=f"{asked.model}-{token}-{reading}",
            order=["neuron", "value", "rank", "promoted", "suppressed"],
        )


def choose_token(lm: LM, text: str, word: Word) -> int:
    """Which of a word's tokens is meant: the first, unless another is chosen."""
    tokens = {token: drawing.visible(piece) for token, piece in word.tokens}
    if len(tokens) == 1:
        return next(iter(tokens))
    token: int = st.segmented_control(
        "Written as" if word.is_whole else f"“{parts.plain(text.strip())}” is {len(tokens)} tokens",
        list(tokens),
        format_func=lambda one: tokens[one],
        default=next(iter(tokens)),
        key=f"token-{text}",
        required=True,
    )
    return token


def start_index(asked: Asked, key: str, reading: Reading) -> None:
    """Queues the index; for the button."""
    parts.workshop().submit(
        parts.choice_of(asked),
        partial(build_words, projection=reading),
        key=key,
        title=parts.plain(f"Index of {asked.model}"),
    )


def show_index(asked: Asked, lm: LM, reading: Reading) -> None:
    """The button that makes the index, or what became of it; its progress is in the strip of jobs."""
    key = index_key(lm, reading)
    job = parts.workshop().find(key)
    if job is not None and not job.status.over:
        st.caption("The index is being built; see above.")
        return
    st.caption(
        "The search needs an index: all value vectors of this model times its vocabulary. It is made once and kept."
    )
    st.button(
        "Go on with the index" if job is not None and job.status.state == "stopped" else "Build the index",
        icon=":material/search:",
        key="index",
        on_click=start_index,
        args=(asked, key, reading),
    )
    if job is not None and job.status.state == "failed":
        parts.show_error(job.status.error)


# -- a neuron's card ---------------------------------------------------------------------------------------------------


@st.cache_data(show_spinner=False, max_entries=256)
def card_cached(_lm: LM, _asked: Asked, weights: str, key: str, neuron: str) -> Card:
    """A neuron at the fact, looked at once."""
    return card_of(_lm, _asked.fact, Neuron.parse(neuron))


def show_card(asked: Asked, footprint: Footprint | None, lm: LM | None) -> None:
    """The chosen neuron: what it gives to this fact, its tokens in both readings, and the prompts that drive it most."""
    neuron, why = chosen_neuron(asked, footprint)
    if neuron is None:
        return
    with st.container(border=True):
        st.markdown(f"#### Neuron {neuron.neuron} of layer {neuron.layer}")
        st.caption(f"`{neuron}`, both counted from 0. {why}")
        if lm is None:
            st.skeleton(height=370)
            return
        try:
            card = card_cached(lm, asked, lm.weight_hash, asked.key, str(neuron))
        except InputError as error:
            parts.show_error(error)
            return
        answer = str(drawing.fact_row(footprint, None)["answer"]) if footprint is not None else asked.fact.target_true
        contribution, last, strongest = st.columns(3)
        contribution.metric(
            "Contribution (last token)",
            drawing.number(card.contribution, sign=True),
            help="To the answer's logit, directly, at the end of this prompt.",
        )
        last.metric("k (last token)", drawing.number(card.k, sign=True), help="The neuron's activation there.")
        strongest.metric(
            f"k at “{parts.plain(drawing.token_label(card.text))}”",
            drawing.number(card.strongest, sign=True),
            help="Its activation of largest size in this prompt, and the token where that is.",
        )
        cells = st.grid(min_column_width=330, gap="medium")
        for reading, title in READINGS.items():
            with cells.container():
                st.markdown(f"**{title}**")
                st.plotly_chart(
                    figures_neurons.tokens(card.tokens[reading], theme=parts.theme(), answer=answer),
                    theme=None,
                    key=f"tokens-{reading}",
                    config=parts.QUIET,
                    alt=f"Tokens that {neuron} promotes and suppresses, {title.lower()}.",
                )
        with cells.container():
            show_prompts(asked, lm, neuron)


@st.cache_resource(show_spinner=False, max_entries=8)
def prompts_cached(_lm: LM, _facts: Sequence[Fact], weights: str, version: int) -> Result | None:
    """The strongest prompts of all neurons, read again when a result was stored."""
    return find_prompts(_lm, _facts, parts.store())


def prompts_key(lm: LM) -> str:
    """The key of the job that finds the strongest prompts."""
    return f"prompts-{lm.weight_hash}"


def show_prompts(asked: Asked, lm: LM, neuron: Neuron) -> None:
    """Which of the bundled facts drive a neuron most."""
    st.markdown(
        "**Strongest prompts**",
        help="Of the facts this model was taught: where the neuron's activation k is largest in size, and at which token. "
        "Prompts that begin alike count once as far as they do.",
    )
    facts = tuple(parts.known_facts(asked.model).values())
    if not facts:
        st.caption("Only bundled models come with facts to look through.")
        return
    folder, job = parts.store().folder, parts.workshop().find(prompts_key(lm))
    found = prompts_cached(lm, facts, lm.weight_hash, folder.stat().st_mtime_ns if folder.is_dir() else 0)
    if found is not None:
        table = prompts_of(lm, found, {fact.id: fact for fact in facts}, neuron)
        st.dataframe(table, column_config=PROMPT_COLUMNS, hide_index=True, height=36 + 35 * min(len(table), 7))
    elif job is not None and not job.status.over:
        st.caption("They are being looked for; see above.")
    else:
        st.caption(f"All neurons at once, over {len(facts):,} prompts. It is done once and kept.")
        st.button("Find them", icon=":material/search:", key="prompts", on_click=start_prompts, args=(asked, lm, facts))
        if job is not None and job.status.state == "failed":
            parts.show_error(job.status.error)


def start_prompts(asked: Asked, lm: LM, facts: Sequence[Fact]) -> None:
    """Queues the search for the strongest prompts; for the button."""
    parts.workshop().submit(
        parts.choice_of(asked),
        partial(keep_prompts, facts=facts, store=parts.store()),
        key=prompts_key(lm),
        title=parts.plain(f"Strongest prompts of {asked.model}"),
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## What do the neurons write?")
    st.caption(
        "Value vectors: every neuron of an MLP adds its own fixed vector to the state, as strongly as it is active. "
        "Read as tokens, the vector says what the neuron promotes; times the answer, how much it contributes."
    )
    parts.arrive(METHOD, option_fields((*POSITION, *OPTIONS)))
    asked = parts.ask(
        METHOD, option_fields(OPTIONS), placeholders={}, labels=LABELS, earlier_title="Earlier facts", more=ask_position
    )
    notices = st.container()
    left, right = st.columns([3, 2], gap="large")  # always here, so that the strip of jobs keeps its place
    if asked is None:
        with left:
            parts.show_jobs((), ())
        return
    found = parts.find(asked)
    footprint, lm = found.footprint, found.lm
    with notices:
        parts.show_wrong(asked, found)
    with left:
        parts.show_sentence(asked, found)
        if footprint is not None:
            show_headline(footprint)
        parts.show_action(asked, found, verb="Find neurons")
        own = (prompts_key(lm), *(index_key(lm, one) for one in READINGS)) if lm is not None else ()
        parts.show_jobs((asked.key, *own), (found.model,))
    with right:
        parts.show_predictions(found)
    if footprint is not None:
        show_figure(asked, footprint)
    reading = choose_reading()
    tables = st.grid(min_column_width=430, gap="medium")
    with tables.container():
        if footprint is not None:
            show_strongest(asked, footprint, lm, reading)
    with tables.container():
        show_search(asked, lm, reading, found.seen.answer if found.seen else "")
    show_card(asked, footprint, lm)
    if footprint is not None and not parts.is_running(asked):
        parts.show_downloads(
            with_words(footprint),
            lambda: figures_neurons.paper_contributions(footprint, planted=planted_band(asked.model)),
            name=parts.file_name("value-vectors", asked),
            version=(asked.key, footprint.run["made"]),
        )


parts.run_in_app()
show_page()
parts.page_is_drawn()
