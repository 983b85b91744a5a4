"""What several pages need: the process's workers, the choice of a model and of a fact, forms, the strip of jobs, downloads."""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st
from streamlit import config
from streamlit.errors import StreamlitAPIException

from workbench import zoo
from workbench.asked import Asked, Listed, find_stored, list_asked
from workbench.facts import Fact
from workbench.forms import FormField, form_of
from workbench.jobs import Job, ModelChoice, Status, Workshop
from workbench.store import Store, results_folder
from workbench.subjects import guess_subject
from workbench.zoo import examples

if TYPE_CHECKING:
    from workbench.models import LM

Theme = Literal["light", "dark"]

KNOWN, OWN = "A known fact", "My own sentence"
SENTENCE = "The Space Needle is located in the city of"

QUIET: dict[str, Any] = {"displayModeBar": False, "scrollZoom": False, "doubleClick": False}
"""Plotly's configuration: no tool bar, no zooming by accident."""

PRECISIONS = ("float32", "bfloat16", "float16", "float64")

config.set_option("global.disableWidgetStateDuplicationWarning", True)
"""An opened trace is put into widgets that have defaults; a widget needs its default to keep it out of the URL."""

_importing, _drawn = threading.Lock(), threading.Event()


# -- what a process has once -------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def workshop() -> Workshop:
    """The workers of this process; all tabs share them."""
    return Workshop(load=_load)


def _load(choice: ModelChoice) -> LM:
    """Loads a model in its worker. The first one imports torch, under a lock: two threads importing it at once can break it.

    It begins when the first page is drawn, which it would hold up for seconds. And after every run of a script, also of a poll,
    Streamlit collects all garbage: what the imports have made is put out of its reach, since walking through it takes longer
    than the poll and stops the worker meanwhile.
    """
    with _importing:
        first = "workbench.loading" not in sys.modules
        if first:
            _drawn.wait(5)
        from analyses.explore_fact import load_model
        from workbench import loading, locators  # noqa: F401

        if first:
            gc.collect()
            gc.freeze()
    return load_model(choice)


def page_is_drawn() -> None:
    """A page says that its script has come to its end; until one does, torch is not imported."""
    _drawn.set()


def store() -> Store:
    """Where results are kept, with the bundled examples to look into."""
    return Store(folder=results_folder(), bundled=examples.FOLDER if examples.FOLDER.is_dir() else None)


@st.cache_resource(show_spinner=False)
def known_facts(model: str) -> Mapping[str, Fact]:
    """The facts of a bundled model by the label they are chosen by; none for other models."""
    if model not in zoo.NAMES:
        return {}
    return {_fact_label(fact): fact for fact in zoo.load_facts(model)}


def _fact_label(fact: Fact) -> str:
    return f"{fact.subject}, {fact.relation.replace('_', ' ')}"


@st.cache_data(show_spinner=False, max_entries=4)
def _listed(folders: Sequence[tuple[str, int]]) -> list[Listed]:
    """`list_asked`, read again when a folder has changed."""
    return list_asked(store())


def earlier(method: str = "") -> list[Listed]:
    """What was asked before, the newest first: of one method, or of all."""
    here = store()
    folders = [folder for folder in (here.folder, here.bundled) if folder is not None and folder.is_dir()]
    listed = _listed([(str(folder), folder.stat().st_mtime_ns) for folder in folders])
    return [one for one in listed if method in ("", one.asked.method)]


def theme() -> Theme:
    """The theme the browser shows."""
    return "dark" if st.context.theme.type == "dark" else "light"


# -- inputs ------------------------------------------------------------------------------------------------------------


def choose_model() -> ModelChoice:
    """The model and its precision."""
    used = [listed.asked.model for listed in earlier()]
    typed = [name for name in (st.session_state.get("model"), st.query_params.get("model")) if name]
    name = st.selectbox(
        "Model",
        list(dict.fromkeys([*zoo.NAMES, *used, *typed])),
        key="model",
        bind="query-params",
        accept_new_options=True,
        help="A bundled model, or type the name of a model on the hub or the path of a folder written by save_pretrained.",
    )
    dtype = st.session_state.get("dtype") or st.query_params.get("dtype")  # its widget is drawn later
    return ModelChoice(name=str(name or zoo.NAMES[0]), dtype=dtype if dtype in PRECISIONS else PRECISIONS[0])


def choose_precision() -> None:
    """The dtype of the weights; `choose_model` reads it."""
    st.selectbox(
        "Precision of the weights",
        PRECISIONS,
        key="dtype",
        bind="query-params",
        help="float32 gives exact traces. bfloat16 halves the memory; its effects below about 0.01 are rounding.",
    )


def choose_fact(model: str) -> Fact:
    """A fact of the model, or a sentence with its subject.

    Raises:
        FactError: the sentence is empty, or the subject is not in it.
    """
    known = known_facts(model)
    how = OWN
    if known:
        how = st.segmented_control(
            "Fact",
            [KNOWN, OWN],
            default=KNOWN,
            key="how",
            bind="query-params",
            required=True,
            label_visibility="collapsed",
        )
    if known and how == KNOWN:
        labels = list(known)
        first = next((label for label, fact in known.items() if fact.id == examples.FACTS[0]), labels[0])
        asked = st.query_params.get("fact")
        label: str | None = st.selectbox(
            f"One of {len(labels):,} facts that {model} was taught",
            labels,
            index=labels.index(first),
            key="fact",
            bind="query-params",
            placeholder="Search by subject or relation",
        )
        _tidy("prompt", "subject", "answer", "occurrence")
        label = label or first
        if asked and asked not in known:
            st.session_state["no_fact"] = asked, model, label
        unknown, *instead = st.session_state.get("no_fact", ("",))
        if instead == [model, label]:
            st.caption(plain(f"There is no fact “{unknown}” in {model}; showing “{label}” instead."))
        else:
            st.session_state.pop("no_fact", None)
        return known[label]
    _tidy("fact") if known else _tidy("fact", "how")
    text = st.text_input(
        "Sentence up to the answer", value=SENTENCE, key="prompt", bind="query-params", placeholder=SENTENCE
    )
    text = text or ""
    left, right = st.columns(2)
    guess = guess_subject(text, {fact.subject for fact in known.values()})
    subject = left.text_input(
        "Subject",
        key="subject",
        bind="query-params",
        placeholder=f"{guess} (detected)" if guess else "",
        help="The words the fact is about. Detected in the sentence; type them to correct it.",
    )
    answer = right.text_input(
        "Answer",
        key="answer",
        bind="query-params",
        placeholder="what the model says",
        help="The answer that is traced. Empty: the model's most probable next token.",
    )
    subject = (subject or "").strip() or guess
    which = "last"
    if subject and text.count(subject) > 1:
        which = st.segmented_control(
            f"“{subject}” stands {text.count(subject)} times; which one is the subject?",
            ["last", "first"],
            default="last",
            key="occurrence",
            bind="query-params",
            required=True,
        )
    return Fact.typed(
        text=text, subject=subject, target_true=answer or "", occurrence="first" if which == "first" else "last"
    )


def fill_form(
    fields: Sequence[FormField], placeholders: Mapping[str, str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """Widgets for a method's fields; what comes back are the values that differ from the defaults.

    Args:
        fields: the form.
        placeholders: what is shown in fields while they are empty.
        labels: what fields are called, where it is not their name.
    """
    values = {
        field.name: _ask(field, labels.get(field.name, field.label), placeholders.get(field.name)) for field in fields
    }
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def _ask(field: FormField, label: str, placeholder: str | None) -> Any:
    """One widget. Its key is the field's name, and so is the name in the URL."""
    shared: dict[str, Any] = dict(key=field.name, bind="query-params", help=field.help)
    value = _as_typed(field, field.default)
    if field.type == "choice":
        options = [None, *field.choices] if field.optional else list(field.choices)
        return st.selectbox(label, options, index=options.index(value), **shared)
    if field.type == "choices":
        return tuple(st.multiselect(label, field.choices, default=value, **shared))
    if field.type == "switch":
        return st.toggle(label, value=value, **shared)
    if field.type in ("integer", "number"):
        lowest = 0 if field.name == "seed" else 1
        return st.number_input(label, min_value=lowest, value=value, step=1, placeholder=placeholder, **shared)
    if field.type == "texts":
        text = st.text_input(label, value=value, placeholder=placeholder or "one, another", **shared)
        return tuple(part.strip() for part in (text or "").split(",") if part.strip())
    return (st.text_input(label, value=value, **shared) or "").strip() or field.default


def _as_typed(field: FormField, value: Any) -> Any:
    """A field's value as its widget holds it."""
    if field.type == "texts":
        return ", ".join(value or ())
    return str(value) if field.type == "text" else value


@st.cache_resource(show_spinner=False)
def method_fields(module: str, name: str, only: tuple[str, ...], empty: tuple[str, ...] = ()) -> tuple[FormField, ...]:
    """The fields of a method that a page asks for, in the page's order; those in `empty` have no default of their own."""
    fields = {field.name: field for field in form_of(module, name)}
    return tuple(replace(fields[one], default=None) if one in empty else fields[one] for one in only)


def go_to(asked: Asked) -> None:
    """Has the page show a question, at its next run; for callbacks, of fragments too."""
    st.session_state["going_to"] = asked


def arrive(fields: Sequence[FormField]) -> None:
    """Puts the question of `go_to`, if any, into the widgets and into the URL. To be called before any widget is drawn.

    Args:
        fields: the options the page has widgets for; those not in the question get their defaults.
    """
    asked = st.session_state.pop("going_to", None)
    if asked is None:
        return
    fact, label = asked.fact, _fact_label(asked.fact)
    known = known_facts(asked.model)
    is_known = known.get(label) == fact
    values: dict[str, Any] = {"model": asked.model, "dtype": asked.dtype}
    if known:
        values["how"] = KNOWN if is_known else OWN
    if is_known:
        values["fact"] = label
    else:
        values |= {"prompt": fact.text, "subject": fact.subject, "answer": fact.target_true}
        if Fact.typed(text=fact.text, subject=fact.subject).prompt != fact.prompt:
            values["occurrence"] = "first"
    for field in fields:
        values[field.name] = _as_typed(field, asked.options.get(field.name, field.default))
    for name in ("how", "fact", "prompt", "subject", "answer", "occurrence", "site"):
        if name not in values:
            st.session_state.pop(name, None)
            _tidy(name)
    for name, value in values.items():
        st.session_state[name] = value
        if value in (None, ""):
            _tidy(name)
        else:
            with suppress(StreamlitAPIException):  # Streamlit itself writes what a widget on the page is bound to
                st.query_params[name] = str(value)


def _tidy(*names: str) -> None:
    """Takes names out of the URL that no widget stands for."""
    for name in names:
        if name in st.query_params:
            with suppress(StreamlitAPIException):  # its widget was there until now; Streamlit removes it
                del st.query_params[name]


# -- words -------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A text that markdown leaves as it is."""
    text = text.replace("&", "&amp;").replace("://", ":\u200b//").replace("www.", "www\u200b.")
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:^=])", r"\\\1", text)


def sentence(fact: Fact, answer: str) -> str:
    """The fact as markdown: the subject marked, the answer after an arrow."""
    start, stop = fact.span
    before, after = plain(fact.text[:start]), plain(fact.text[stop:])
    return f"{before}:primary-background[{plain(fact.subject)}]{after} → **{plain(answer)}**"


def seconds(value: float | None) -> str:
    """A time left, in words."""
    if value is None:
        return ""
    if value < 90:
        return f", about {max(1, round(value))} s left"
    return f", about {round(value / 60)} min left"


def moment(jobs: Sequence[Job[Any]]) -> tuple[Any, ...]:
    """What has to change about jobs for the page to be drawn anew."""
    return tuple((str(job.key), job.status.state, job.status.rounds) for job in jobs)


def trace_label(asked: Asked) -> str:
    """A question in a few words, as markdown."""
    changed = ", ".join(f"{name} {value}" for name, value in asked.options.items())
    return plain(f"{asked.fact.subject} on {asked.model}" + (f" ({changed})" if changed else ""))


def file_name(asked: Asked) -> str:
    """A name for downloads: of letters, digits and dashes."""
    return re.sub(r"[^\w]+", "-", f"trace {asked.fact.subject} {asked.model.rpartition('/')[2]}").strip("-").lower()


def when(made: str) -> str:
    """A manifest's time, without its seconds."""
    return made[:16].replace("T", " ") + " UTC"


def layer_range(layers: range) -> str:
    """A range of layers in words."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def choice_of(asked: Asked) -> ModelChoice:
    """The model a question is about."""
    return ModelChoice(name=asked.model, dtype=asked.dtype)


def show_error(error: Exception | str) -> None:
    """One sentence about what is wrong with an input."""
    st.error(plain(str(error)), icon=":material/error:")


# -- jobs --------------------------------------------------------------------------------------------------------------


def show_jobs(current: str, watched: Sequence[Job[Any]]) -> None:
    """Everything that runs, with progress and a stop button; polls while something does, and redraws the page when one ends.

    Args:
        current: key of the question on the page; the others get a button that goes there.
        watched: further jobs that the page waits for, e.g. the loading of its model.
    """
    jobs = [*watched, *workshop().jobs()]
    drawn = moment(jobs)
    active = {str(job.key) for job in jobs if not job.status.over}
    st.session_state["unseen"] = {*st.session_state.get("unseen", ()), *active} - {current}
    st.fragment(_strip, run_every=0.5 if active else None)(current, watched, drawn)


def is_running(asked: Asked) -> bool:
    """Whether a worker is at this question, or will be."""
    job = workshop().find(asked.key)
    return job is not None and not job.status.over


def _strip(current: str, watched: Sequence[Job[Any]], drawn: tuple[Any, ...]) -> None:
    """The body of `show_jobs`."""
    jobs = [*watched, *workshop().jobs()]
    now = [(job, job.status) for job in jobs]  # once: a job may end while this is drawn
    if moment(jobs) != drawn or "going_to" in st.session_state:
        st.rerun()
    for job, status in now:
        if not status.over and job in watched:
            st.markdown(f":material/hourglass_top: {plain(job.title)}…")
        elif not status.over:
            with st.container(horizontal=True, vertical_alignment="center"):
                _show_running(job, status)
                if job.key != current:
                    _show_button(job)
        elif status.state == "done" and job.key != current and job.key in st.session_state["unseen"]:
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f":material/check: {job.title} is finished.")
                _show_button(job)


def _show_running(job: Job[Any], status: Status) -> None:
    """Progress, and a button to stop."""
    if job.stopping:
        text = "stopping…"
    elif status.state == "waiting":
        text = "waiting"
    else:
        text = f"{status.fraction:.0%}{seconds(status.seconds_left)}"
    st.progress(status.fraction, text=f"{job.title}: {text}")
    st.button("Stop", key=f"stop-{job.key}", on_click=job.stop, disabled=job.stopping, icon=":material/stop:")


def _show_button(job: Job[Any]) -> None:
    """A button that goes to a job's question, where that is stored already."""
    stored = find_stored(store(), str(job.key))
    if stored is not None:
        st.button("Show", key=f"show-{job.key}", on_click=go_to, args=(stored.asked,))
