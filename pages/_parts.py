"""What several pages need: the process's workers, the choice of a model and of a fact, forms, jobs, maps, downloads, permalinks.

A page on one method is made like this (`1_explore.py`):

1. `arrive(method, fields)` opens the question of a link or button; `ask(...)` draws the inputs and gives the `Asked`.
2. `find(asked)` says what is stored, whether the model is there and what is wrong with the question.
3. `show_wrong`, `show_action` and `show_jobs` start the work and show how far it is.
4. `show_map`, `chosen_site`, `show_lens` and `show_downloads` show the answer.
"""

from __future__ import annotations

import gc
import math
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st
from plotly.graph_objects import Figure
from streamlit import config
from streamlit.errors import StreamlitAPIException
from streamlit.navigation.page import StreamlitPage
from streamlit.runtime.scriptrunner import get_script_run_ctx

from analyses.explore_fact import Lens, Look, default_site, lens_at, look
from workbench import drawing, export, plots, zoo
from workbench.asked import Asked, Listed, Stored, find_stored, list_asked
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.forms import FormField, form_of, methods_of, read_option
from workbench.jobs import Job, ModelChoice, Status, Workshop
from workbench.results import Footprint, Result
from workbench.sites import Site
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

PAGES = {
    "CausalTrace": "1_explore.py",
    "ActivationPatching": "2_patch_two_prompts.py",
    "ValueVectors": "3_value_vectors.py",
    "Edit": "5_edit.py",
}
"""The pages of methods that have one of their own; that of all editors is called Edit."""

COMPARISON = "4_compare_locators.py"
"""The page of all other methods."""

KINDS = {
    "embed": "token embedding",
    "resid_pre": "state before the block",
    "resid_mid": "state between attention and MLP",
    "resid_post": "state after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "output of the heads",
    "mlp_post": "neurons of the MLP",
}
"""Kinds of sites inside of a sentence."""

SCORES = {
    "p": "probability of “{answer}”",
    "p_target": "probability of all of “{answer}”",
    "logp": "log probability of “{answer}” (nats)",
    "logit_diff": "logit of “{answer}” minus “{foil}”",
    "rank": "rank of “{answer}” (0 is the top)",
    "kl": "KL from the clean prediction (nats)",
}
"""Scores inside of a sentence."""

REQUIRED = ("how", "occurrence", "read", "form", "over")
"""Widgets that always have a value, whatever the URL says."""

config.set_option("global.disableWidgetStateDuplicationWarning", True)
"""An opened trace is put into widgets that have defaults; a widget needs its default to keep it out of the URL."""

_importing, _drawn = threading.Lock(), threading.Event()


# -- the app -----------------------------------------------------------------------------------------------------------


def navigation() -> StreamlitPage:
    """The app's pages, each a file `pages/<n>_<name>.py`; the one that is asked for comes back."""
    names = {file: file.stem.partition("_")[2] for file in sorted(Path(__file__).parent.glob("[0-9]*_*.py"))}
    return st.navigation(
        [st.Page(file, title=name.replace("_", " ").capitalize(), url_path=name) for file, name in names.items()],
        position="top",
    )


def run_in_app() -> None:
    """Has a page that was started alone started by the app instead; the URL stays.

    Until a server has seen `st.navigation`, Streamlit takes a folder called pages for an app of its own, and a page that is
    opened by its address runs without `streamlit_app.py`.
    """
    if "in_app" not in st.session_state:
        navigation()
        st.rerun()


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


def store_version() -> list[tuple[str, int]]:
    """What changes when a result is added to the store."""
    here = store()
    folders = [folder for folder in (here.folder, here.bundled) if folder is not None and folder.is_dir()]
    return [(str(folder), folder.stat().st_mtime_ns) for folder in folders]


@st.cache_data(show_spinner=False, max_entries=4)
def _listed(folders: Sequence[tuple[str, int]]) -> list[Listed]:
    """`list_asked`, read again when a folder has changed."""
    return list_asked(store())


def earlier(method: str = "") -> list[Listed]:
    """What was asked before, the newest first: of one method, or of all."""
    listed = _listed(store_version())
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
    asked = st.session_state.get("dtype") or st.query_params.get("dtype")  # its widget is drawn later
    dtype = asked if asked in PRECISIONS else PRECISIONS[0]
    st.session_state["question"] = {"model": name, "dtype": dtype}
    return ModelChoice(name=str(name or zoo.NAMES[0]), dtype=dtype)


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
        st.session_state["question"] |= {"how": KNOWN, "fact": label}
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
    st.session_state["question"] |= {"prompt": text, "subject": subject, "answer": answer}
    if known:
        st.session_state["question"]["how"] = OWN
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
        st.session_state["question"]["occurrence"] = which
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
    if field.type == "number" and isinstance(field.default, float):
        return st.number_input(label, value=value, format="%g", placeholder=placeholder, **shared)
    if field.type in ("integer", "number"):
        lowest = 0 if field.name == "seed" else 1
        return st.number_input(label, min_value=lowest, value=value, step=1, placeholder=placeholder, **shared)
    if field.type in ("texts", "integers"):
        usual = "one, another" if field.type == "texts" else "4, 5"
        text = st.text_input(label, value=value, placeholder=placeholder or usual, **shared)
        try:
            if (text or "").strip():
                return read_option(field, text or "")
        except InputError as error:
            show_error(error)
            return field.default
        return None if field.optional and field.type == "integers" else ()
    return (st.text_input(label, value=value, **shared) or "").strip() or field.default


def _as_typed(field: FormField, value: Any) -> Any:
    """A field's value as its widget holds it."""
    if field.type in ("texts", "integers"):
        return ", ".join(map(str, value or ()))
    if field.type == "choices":
        return list(value)
    return str(value) if field.type == "text" else value


@st.cache_resource(show_spinner=False)
def method_fields(method: str, only: tuple[str, ...], empty: tuple[str, ...] = ()) -> tuple[FormField, ...]:
    """The fields of a method that a page asks for, in the page's order; those in `empty` have no default of their own."""
    fields = {field.name: field for field in form_of(methods_of("workbench.locators")[method], method)}
    return tuple(replace(fields[one], default=None) if one in empty else fields[one] for one in only)


def ask(
    method: str,
    fields: Sequence[FormField],
    *,
    placeholders: Mapping[str, str],
    labels: Mapping[str, str],
    earlier_title: str,
    more: Callable[[ModelChoice, Fact], Mapping[str, Any]] | None = None,
) -> Asked | None:
    """The inputs of a page on one method; None where the question cannot be asked, with one sentence why.

    Args:
        method: class name of the locator.
        fields: its options, of `method_fields`.
        placeholders: what is shown in fields while they are empty.
        labels: what fields are called, where it is not their name.
        earlier_title: what the list of earlier questions is called.
        more: draws further widgets below the fact and gives back further options.
    """
    left, right = st.columns([1, 2], gap="medium")
    with left:
        choice = choose_model()
        buttons = st.container(horizontal=True)
        with buttons.popover("Options", icon=":material/tune:"), st.grid(min_column_width=200, width=520):
            options = fill_form(fields, placeholders, labels)
            choose_precision()
        with buttons.popover(earlier_title, icon=":material/history:"):
            show_earlier(method, "None yet. Everything that was computed is kept and can be opened here again.")
        if options:
            st.caption("Changed: " + plain(option_words(options)))
    with right:
        try:
            fact = choose_fact(choice.name)
        except InputError as error:
            show_error(error)
            return None
        more_options = more(choice, fact) if more else {}
    return Asked(model=choice.name, dtype=choice.dtype, fact=fact, method=method, options={**options, **more_options})


def show_earlier(method: str, none: str) -> None:
    """A button for every question that a method was asked before; `none` is said where there is none."""
    listed = earlier(method)
    if not listed:
        st.caption(none)
    with st.container(height=380 if len(listed) > 8 else "content", border=False, width=520):
        for entry in listed[:60]:
            st.button(
                question_label(entry.asked),
                key=f"open-{entry.key}",
                help=plain(f"{entry.asked.fact.text} (asked {when(entry.made)})"),
                type="tertiary",
                on_click=go_to,
                args=(entry.asked,),
            )


def go_to(asked: Asked) -> None:
    """Has the app show a question, at its next run, on the page of its method; for callbacks, of fragments too."""
    st.session_state["going_to"] = asked


def arrive(method: str | None, fields: Sequence[FormField]) -> Asked | None:
    """What a page begins with, before its widgets: the question of `go_to` is opened, or that of the page before stays.

    Model and fact go along from page to page, and a page that is come back to with them shows the same site again.

    Args:
        method: whose page it is; None for the comparison, which is the page of all methods without one.
        fields: the options the page has widgets for; those not in the question get their defaults.
    """
    st.session_state["noted"] = {}
    _note(workshop().jobs())
    here = PAGES.get(method or "", COMPARISON)
    _drop_nonsense(fields)
    if _is_history():
        st.session_state["site"] = None
    came_from, st.session_state["page"] = st.session_state.get("page", here), here
    if came_from != here:  # options of the same name do not go along
        question, sites = st.session_state.get("question", {}), st.session_state.setdefault("sites_seen", {})
        sites[came_from] = question, st.session_state.pop("site", None)
        was_asked, site = sites.get(here, ({}, None))
        for field in fields:
            st.session_state.pop(field.name, None)
        if not _is_history():
            _tidy("site", *(field.name for field in fields))
            _fill({**question, "site": site if was_asked == question else None}, _defaults(fields))
    asked: Asked | None = st.session_state.get("going_to")
    if asked is None:
        return None
    page = PAGES.get(asked.method, COMPARISON)
    if page != here:
        st.switch_page(
            Path(__file__).parent / page, query_params={}
        )  # the default refuses while widgets are bound to some
    del st.session_state["going_to"]
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
    _fill(values, _defaults(fields))
    return asked


def _is_history() -> bool:
    """Whether the browser goes back or forward: then the URL says everything, also what it does not name."""
    context = get_script_run_ctx()
    return context is not None and context.is_history_navigation


def _drop_nonsense(fields: Sequence[FormField]) -> None:
    """Runs the page again without what stands in the URL and no widget can be given."""
    nonsense = [name for name in REQUIRED if st.query_params.get(name) == ""]
    for field in fields:
        if field.type in ("integer", "number"):
            with suppress(ValueError):  # of what is no number, Streamlit keeps the default itself
                if not math.isfinite(float(st.query_params.get(field.name, "0"))):
                    nonsense.append(field.name)
    _tidy(*nonsense)
    if any(name not in st.query_params for name in nonsense):
        st.rerun()


def _defaults(fields: Sequence[FormField]) -> dict[str, Any]:
    """What widgets hold that the URL does not name."""
    question = {"model": zoo.NAMES[0], "dtype": PRECISIONS[0], "how": KNOWN, "prompt": SENTENCE, "occurrence": "last"}
    return {**question, **{field.name: _as_typed(field, field.default) for field in fields}}


def _fill(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Puts values into widgets that are not drawn yet, and into the URL what differs from their defaults."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        if value in (None, "") and not st.session_state.get(name):
            st.session_state.pop(name, None)  # a widget that is told to be empty would say so in the URL
        else:
            st.session_state[name] = value
        if value in (None, "", defaults.get(name)):
            _tidy(name)
        else:
            named[name] = list(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    try:
        st.query_params.update(named)  # at once: every change is a step of the browser's history
    except StreamlitAPIException:  # Streamlit itself writes what a widget on the page is bound to
        for name, value in named.items():
            with suppress(StreamlitAPIException):
                st.query_params[name] = value


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


def option_words(options: Mapping[str, Any]) -> str:
    """Options in words, e.g. `window 3, kinds z mlp_out`."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name, value in options.items()
    )


def method_words(method: str) -> str:
    """A method's class name in words, e.g. `Causal trace`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method).capitalize()


def question_label(asked: Asked) -> str:
    """A question to a method in a few words, as markdown."""
    changed = option_words(asked.options)
    return plain(f"{asked.fact.subject} on {asked.model}" + (f" ({changed})" if changed else ""))


def job_title(asked: Asked) -> str:
    """A question and its method in a few words, as markdown."""
    return f"{method_words(asked.method)}, {question_label(asked)}"


def file_name(what: str, asked: Asked) -> str:
    """A name for downloads: of letters, digits and dashes."""
    return re.sub(r"[^\w]+", "-", f"{what} {asked.fact.subject} {asked.model.rpartition('/')[2]}").strip("-").lower()


def score_name(footprint: Footprint) -> str:
    """What was measured, in words."""
    told = drawing.fact_row(footprint, None)
    name = SCORES[footprint.run["parameters"]["score"]]
    return name.format(answer=plain(str(told["answer"])), foil=plain(str(told["foil"])))


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


# -- a question and its work -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a question stands."""

    stored: Stored | None
    """What is stored of it."""

    model: Job[LM]
    """The job that loads its model."""

    lm: LM | None
    """The model, once it is there."""

    seen: Look | None
    """What the model says after the prompt, once it is there and nothing is wrong."""

    wrong: str
    """What is wrong with the model or the question, in one sentence; empty: nothing."""

    checked: Any
    """What the page's own check gave back; None while it has not."""

    @property
    def footprint(self) -> Footprint | None:
        """As much of the answer as is stored."""
        return self.stored.footprint if self.stored is not None else None

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of the answer that are not there, while others are."""
        return self.stored.missing if self.stored is not None and self.footprint is not None else ()

    @property
    def stale(self) -> bool:
        """Whether the stored answer is of other weights of the same name."""
        return (
            self.footprint is not None
            and self.lm is not None
            and self.footprint.run["weight_hash"] != self.lm.weight_hash
        )


def model_of(choice: ModelChoice) -> Job[LM]:
    """The job that loads a model; it is loaded where it is not yet."""
    job = workshop().model(choice)
    _note([job])
    return job


@st.cache_data(show_spinner=False, max_entries=256)
def check_options(_lm: LM, _asked: Asked, weights: str, key: str) -> None:
    """Raises where the options cannot be used; computed once."""
    _asked.locator(_lm)


Check = Callable[["LM", Asked, str, str], Any]
"""A look at a question before any long work, given the model, the question, the weights' hash and the question's key."""


def find(asked: Asked, *, check: Check | None = check_options) -> Found:
    """What is stored of a question, and what the model says to it. Its model is loaded where it is not yet.

    Args:
        asked: the question.
        check: raises InputError where something is wrong; None: the options are not looked at.
    """
    model = model_of(choice_of(asked))
    stored, seen, wrong, checked = asked.find(store()), None, model.status.error, None
    lm = model.result if model.status.state == "done" else None
    if lm is not None:
        try:
            said = look_cached(lm, asked.fact, lm.weight_hash, asked.fact.id, asked.fact.text, asked.fact.target_true)
            checked = check(lm, asked, lm.weight_hash, asked.key) if check else None
            seen = said
        except InputError as error:
            wrong = str(error)
    return Found(stored=stored, model=model, lm=lm, seen=seen, wrong=wrong, checked=checked)


@st.cache_data(show_spinner=False, max_entries=256)
def look_cached(_lm: LM, _fact: Fact, weights: str, *version: str) -> Look:
    """What the model says after the prompt, computed once for each version of a fact."""
    return look(_lm, _fact)


def problem_of(asked: Asked, lm: LM) -> str:
    """Why a method cannot answer a question, in one sentence; empty: it can, as far as its options and the model tell."""
    try:
        check_options(lm, asked, lm.weight_hash, asked.key)
    except InputError as error:
        return str(error)
    return ""


@st.cache_data(show_spinner=False, max_entries=256)
def _lens_cached(_lm: LM, _asked: Asked, weights: str, key: str, site: str) -> Lens:
    """The logit lens at one site, computed once."""
    return lens_at(_lm, _asked.fact, site=Site.parse(site))


def act(label: str, work: Callable[[], object], **button: Any) -> None:
    """A button that does something with what the page shows now.

    A callback would do it with what the page showed before: Streamlit calls it first where a field is left by clicking the button.

    Args:
        label: of the button.
        work: what it does; the page is then drawn anew.
        button: further arguments of `st.button`.
    """
    if st.button(label, **button):
        work()
        st.rerun()


def start(*questions: Asked) -> None:
    """Queues questions."""
    here = store()
    for asked in questions:
        workshop().submit(choice_of(asked), partial(asked.compute, store=here), key=asked.key, title=job_title(asked))


def show_wrong(asked: Asked, found: Found) -> None:
    """What is wrong with the model or the question, if anything."""
    if not found.wrong:
        return
    show_error(found.wrong)
    if found.lm is None:
        st.button("Try again", on_click=workshop().forget, args=(choice_of(asked),), icon=":material/refresh:")


def show_action(asked: Asked, found: Found, *, verb: str) -> None:
    """The button that starts the work, called `verb`, or what became of it."""
    if is_running(asked) or (found.footprint is not None and not found.missing and not found.stale):
        return
    job, missing = workshop().find(asked.key), found.missing
    act(
        "Go on" if missing else verb,
        partial(start, asked),
        icon=":material/play_arrow:",
        type="primary",
        disabled=found.seen is None,
        key="trace",
    )
    if job is not None and job.status.state == "failed":
        show_error(job.status.error)
    elif missing:
        st.caption(
            f"Stopped before {' and '.join(KINDS.get(kind, kind) for kind in missing)}. What was finished is kept."
        )
    elif found.stale:
        st.caption("The stored maps below were made with other weights of the same name.")


# -- the answer --------------------------------------------------------------------------------------------------------


def show_sentence(asked: Asked, found: Found) -> None:
    """The headline: the fact and its answer; how probable that is while there is nothing else to say."""
    footprint, seen = found.footprint, found.seen
    told = drawing.fact_row(footprint, None) if footprint is not None else {}
    answer = str(told.get("answer") or (seen.answer if seen else asked.fact.target_true) or "…")
    st.markdown(f"### {sentence(asked.fact, answer)}")
    if footprint is None and seen is not None:
        st.caption(f"Probability of “{plain(seen.answer)}” at the end of the prompt: {drawing.number(seen.answer_p)}.")


def show_other_answer(footprint: Footprint) -> None:
    """A note where the model itself says something else than the answer that is looked for."""
    told = drawing.fact_row(footprint, None)
    if not told["correct"]:
        said = plain(str(told["said"]))
        st.caption(f":orange-badge[Note] The model itself says “{said}”; the maps follow the answer above.")


def show_predictions(found: Found) -> None:
    """The most probable next tokens."""
    st.markdown(
        "**Next tokens**",
        help="What the model says after the sentence, the most probable first; the answer stands out.",
    )
    if found.seen is not None:
        show_tokens(found.seen, key="predictions")
    elif not found.model.status.over:
        st.skeleton(height=224)


def show_tokens(seen: Look, *, key: str, most: int = 8) -> None:
    """The most probable next tokens as bars."""
    st.plotly_chart(
        plots.predictions(seen.top[:most], theme=theme(), answer=seen.answer),
        theme=None,
        key=key,
        config=QUIET,
        alt="The model's most probable next tokens: "
        + ", ".join(f"{text.strip()} {p:.2f}" for text, p in seen.top[:5]),
    )


def show_map(figure: Figure, *, key: str, alt: str) -> None:
    """A map. A click on a cell puts its site into the session and into the URL; see `chosen_site`.

    Args:
        figure: of `plots.heatmap` or `plots.heads`; the same object in every run, so that the selection stays.
        key: names the map, and what was drawn into it.
        alt: what it shows, for those who do not see it.
    """
    st.plotly_chart(
        figure,
        theme=None,
        key=key,
        on_select=partial(_pick_site, key),
        selection_mode="points",
        config=QUIET,
        alt=alt,
    )


def _pick_site(key: str) -> None:
    """Notes the cell that was clicked; a click on nothing keeps the last one."""
    points = st.session_state[key].selection.points
    if points:
        data = points[0]["customdata"]
        st.session_state["site"] = data[0] if isinstance(data, list) else data
        st.query_params["site"] = st.session_state["site"]


def chosen_site(footprint: Footprint) -> tuple[Site, bool]:
    """The cell that was clicked, and True; or the strongest of its map, and False, where none was that the footprint has."""
    chosen = st.session_state.get("site") or st.query_params.get("site")
    with suppress(InputError):
        site = Site.parse(chosen) if chosen else None
        if site is not None and (footprint.table["site"] == str(site)).any():
            st.session_state["site"] = str(site)
            return site, True
    return default_site(footprint), False


def show_lens(asked: Asked, site: Site, lm: LM | None) -> None:
    """What the final norm and the unembedding read at a site; nothing for single heads and neurons, which are no states."""
    if site.kind in ("z", "mlp_post"):
        return
    st.markdown(
        "**Logit lens**",
        help="The clean run's state here, read by the final norm and the unembedding as if it were the last layer's. "
        "For MLP and attention it reads what this layer alone adds, so compare ranks rather than probabilities.",
    )
    if lm is None:
        st.skeleton(height=224)
        return
    try:
        lens = _lens_cached(lm, asked, lm.weight_hash, asked.key, str(site))
    except InputError:  # the maps are of other weights of the same name
        st.caption("The loaded model has no such site.")
        return
    st.plotly_chart(
        plots.lens(lens.top, kind=site.kind, theme=theme(), answer=lens.answer),
        theme=None,
        key="lens-chart",
        config=QUIET,
        alt="The logit lens at this site: " + ", ".join(f"{text.strip()} {p:.2f}" for text, p in lens.top[:5]),
    )


def show_downloads(
    result: Result, draw: Callable[[], export.Savable], *, name: str, version: Sequence[str], key: str = "download"
) -> None:
    """Files of a result, each with its protocol inside, and the protocol to read.

    Args:
        result: its table goes into csv and parquet.
        draw: makes the figure of `workbench.paper` for pdf, svg and png.
        name: of the files, without their ending.
        version: names result and figure: files are made anew when it changes.
        key: sets these buttons apart from others on the page.
    """
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Download**", help="PDF, SVG and PNG are drawn for print. Every file holds its protocol.")
        for form, data in _files(result, draw, (key, *version)).items():
            st.download_button(
                form.upper(), data=data, file_name=f"{name}.{form}", on_click="ignore", key=f"{key}-{form}"
            )
        with st.popover("Protocol", icon=":material/description:"):
            st.markdown(plain(export.protocol_text(result)))
            st.json(dict(result.run), expanded=1)


@st.cache_data(show_spinner=False, max_entries=16)
def _files(_result: Result, _draw: Callable[[], export.Savable], version: tuple[str, ...]) -> dict[str, bytes]:
    """All files. Made before they are asked for: a link that is made on demand is lost when the page is drawn anew."""
    figure = _draw()
    forms: dict[str, bytes] = {form: export.figure_bytes(figure, form) for form in ("pdf", "svg", "png")}
    return {**forms, "csv": export.csv_bytes(_result), "parquet": export.parquet_bytes(_result)}


# -- jobs --------------------------------------------------------------------------------------------------------------


def show_jobs(current: Collection[str], watched: Sequence[Job[Any]], *, in_pieces: bool = True) -> None:
    """Everything that runs, with progress and a stop button; polls while something does, and redraws the page when one ends.

    Args:
        current: keys of the questions on the page; the others get a button that goes there.
        watched: further jobs that the page waits for, e.g. the loading of its model.
        in_pieces: whether the page shows what is there while a job runs, so that it is redrawn for every piece too.
    """
    jobs = [*watched, *workshop().jobs()]
    _note(jobs)
    drawn = [(str(job.key), st.session_state["noted"][str(job.key)]) for job in jobs]
    active = {str(job.key) for job in jobs if not job.status.over}
    st.session_state["unseen"] = {*st.session_state.get("unseen", ()), *active} - set(current)
    st.fragment(_strip, run_every=0.5 if active else None)(current, watched, drawn, in_pieces)


def _note(jobs: Sequence[Job[Any]]) -> None:
    """Keeps what is first seen of jobs while a page is drawn: what changes until it is drawn has it drawn anew."""
    for job in jobs:
        st.session_state["noted"].setdefault(str(job.key), _moment(job))


def _moment(job: Job[Any]) -> tuple[str, int]:
    """What has to change about a job for the page to be drawn anew."""
    status = job.status
    return status.state, status.rounds


def is_running(asked: Asked) -> bool:
    """Whether a worker is at this question, or will be."""
    job = workshop().find(asked.key)
    return job is not None and not job.status.over


def _strip(current: Collection[str], watched: Sequence[Job[Any]], drawn: Sequence[Any], in_pieces: bool) -> None:
    """The body of `show_jobs`."""
    if _importing.locked():
        gc.freeze()  # Streamlit collects garbage after every poll: of several tabs, so often that the import would hardly go on
    jobs = [*watched, *workshop().jobs()]
    now = [(job, job.status) for job in jobs]  # once: a job may end while this is drawn
    deep = 2 if in_pieces else 1
    seen = [(key, moment[:deep]) for key, moment in drawn]
    if [(str(job.key), _moment(job)[:deep]) for job in jobs] != seen or "going_to" in st.session_state:
        st.rerun()
    for job, status in now:
        if not status.over and job in watched:
            st.markdown(f":material/hourglass_top: {plain(job.title)}…")
        elif not status.over:
            with st.container(horizontal=True, vertical_alignment="center"):
                _show_running(job, status)
                if job.key not in current:
                    _show_button(job)
        elif status.state == "done" and job.key not in current and job.key in st.session_state["unseen"]:
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
