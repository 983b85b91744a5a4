"""What the pages about analyses need: a question to one of the catalogue, its work in the background, and its answer.

1. `arrive(file)` is what such a page begins with.
2. `choose(questions)` and `ask(analysis)` draw the inputs; a `Question` comes back.
3. `show_work(question, ...)` starts, stops and watches; `stored(question, lm)` is the answer once it is there.
4. `show_answer(question, result)` shows it: in words, as a figure, as a table, as files, and the command that repeats it.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
from plotly.graph_objects import Figure

from analyses.catalogue import Analysis, all_analyses
from pages import _parts as parts
from workbench import charts_paper, charts_screen, zoo
from workbench.charts import CellPlot, Chart, Plot
from workbench.data import read_facts
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.forms import FormField, methods_of
from workbench.jobs import Job, ModelChoice
from workbench.results import Result, question_key

if TYPE_CHECKING:
    from workbench.models import LM

BUNDLED, FILE, TYPED = "Known facts", "From a file", "My own"

NAMED: Mapping[str, tuple[str, str]] = {
    "editors": ("workbench.editors", "Editor"),
    "locators": ("workbench.locators", "Locator"),
}
"""Options that hold names of methods: where those are, and what they descend from."""

NARROW = 8
"""Columns of a matrix that has room beside another one."""

MOST_LINES, TALL = 16, 380
"""A summary of more lines scrolls, in a box of this height in pixels."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """An analysis of some facts on a model."""

    analysis: Analysis
    """Which."""

    choice: ModelChoice
    """The model."""

    facts: tuple[Fact, ...]
    """The facts."""

    options: Mapping[str, Any]
    """Those that differ from the analysis' own."""

    source: tuple[str, ...]
    """How the command line is told of the facts."""

    @property
    def key(self) -> str:
        """Names the question, also before the model is there."""
        return f"{self.choice.name}-{self.choice.dtype}-{question_key(self.analysis.question({}, self.facts, self.options))}"

    @property
    def title(self) -> str:
        """The question in a few words, as markdown."""
        words = self.analysis.name.replace("_", " ").capitalize()
        return parts.plain(f"{words}, {_count(len(self.facts), 'fact')} on {self.choice.name.rpartition('/')[2]}")

    @property
    def command(self) -> str:
        """What repeats it in a terminal."""
        words = ["workbench", "run", self.analysis.name, "--model", self.choice.name]
        if self.choice.dtype != parts.PRECISIONS[0]:
            words += ["--dtype", self.choice.dtype]
        words += self.source
        for name, value in self.options.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()
            words += ["--set", f"{name}={text if not isinstance(value, str) else value}"]
        return shlex.join([*words, "--out", f"results/{self.analysis.name}"])

    def run(self, lm: LM) -> Result:
        """The answer, from the store where it is there."""
        return self.analysis(lm, self.facts, store=parts.store(), **self.options)

    def find(self, lm: LM) -> Result | None:
        """The answer, where it is stored."""
        return parts.store().find(self.analysis.question(lm.protocol, self.facts, self.options), Result)


# -- inputs ------------------------------------------------------------------------------------------------------------


def arrive(file: str) -> None:
    """What a page begins with, before its widgets: the model goes along from page to page, and so do finished jobs' buttons."""
    st.session_state["noted"] = {}
    parts._note(parts.workshop().jobs())
    came_from, st.session_state["page"] = st.session_state.get("page", file), file
    if came_from != file:
        question = st.session_state.get("question", {})
        parts._fill({name: question.get(name) for name in ("model", "dtype")}, parts._defaults(()))
    asked = st.session_state.get("going_to")
    if asked is not None:
        page = parts.PAGES.get(asked.method, parts.COMPARISON)
        st.switch_page(Path(__file__).parent / page, query_params={})


def choose(questions: Mapping[str, str]) -> str:
    """The name of one of several analyses, chosen by the question that it answers.

    Args:
        questions: by name of the analysis, in plain words.
    """
    asked = st.selectbox(
        "Question",
        list(questions),
        key=f"about-{next(iter(questions))}",
        bind="query-params",
        format_func=questions.__getitem__,
    )
    return str(asked)


def ask(analysis: Analysis, *, facts: int = 10) -> Question | None:
    """Model, facts and options of a question; None where it cannot be asked, with one sentence why.

    Args:
        analysis: which.
        facts: how many there are at first.
    """
    left, right = st.columns([1, 2], gap="medium")
    with left:
        choice = choose_model()
        with st.popover("Options", icon=":material/tune:"), st.grid(min_column_width=220, width=560):
            options = fill_form(analysis.form, prefix=analysis.name)
            parts.choose_precision()
        if options:
            st.caption("Changed: " + parts.plain(parts.option_words(options)))
    with right:
        chosen = ask_facts(choice.name, n=facts)
    if chosen is None:
        return None
    return Question(analysis=analysis, choice=choice, facts=chosen[0], options=options, source=chosen[1])


def ask_facts(model: str, *, n: int, typed: bool = True) -> tuple[tuple[Fact, ...], tuple[str, ...]] | None:
    """As `choose_facts`; None where there are none, with one sentence why."""
    try:
        return choose_facts(model, n=n, typed=typed)
    except (InputError, UnicodeDecodeError) as error:
        parts.show_error(error)
        return None


def choose_model() -> ModelChoice:
    """The model; the fact that other pages look at stays as it is."""
    before = st.session_state.get("question", {})
    choice = parts.choose_model()
    if before.get("model") == choice.name:
        st.session_state["question"] = {**before, **st.session_state["question"]}
    return choice


def choose_facts(model: str, *, n: int, typed: bool = True) -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    """Some facts, and how the command line is told of them.

    Args:
        model: the model's name.
        n: how many there are at first.
        typed: whether a single fact can be typed.

    Raises:
        InputError: there is none, or they cannot be read.
    """
    known = _bundled(model)
    ways = [*([BUNDLED] if known else []), *([TYPED] if typed else []), FILE]
    way = st.segmented_control(
        "Facts",
        ways,
        default=ways[0],
        key="facts-from",
        bind="query-params",
        required=True,
        label_visibility="collapsed",
    )
    if way not in ways:
        way = ways[0]  # what the URL says is of another model
    if way == TYPED:
        return _typed_fact()
    if way == FILE:
        return _facts_of_file()
    count = st.number_input(
        f"How many of {len(known):,} facts that {model} was taught",
        min_value=1,
        max_value=len(known),
        value=min(n, len(known)),
        step=1,
        key=f"n-{n}",
        bind="query-params",
        help="Evenly spread over the list, and so over its relations. More facts take longer and give narrower intervals.",
    )
    every = len(known) // int(count)
    chosen = tuple(known[::every][: int(count)])
    st.caption(
        "For example: " + parts.plain("; ".join(f"“{fact.text} {fact.target_true}”" for fact in chosen[:3])) + "."
    )
    more = ("--every", str(every)) if every > 1 else ()
    return chosen, (*more, "--limit", str(int(count)))


@st.cache_resource(show_spinner=False)
def _bundled(model: str) -> list[Fact]:
    """The facts of a bundled model as the command line counts them; none for other models."""
    return zoo.load_facts(model) if model in zoo.NAMES else []


def _facts_of_file() -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    file = st.file_uploader(
        "Facts", type=["json"], help="JSON: known_1000, CounterFact, or the workbench's own format."
    )
    if file is None:
        raise FactError("There is no file yet. Give a JSON file of facts.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.json"
        path.write_bytes(file.getvalue())
        try:
            facts = tuple(read_facts(path))
        except InputError as error:
            raise FactError(str(error).replace(str(path), file.name)) from error
    limit = int(
        st.number_input(
            "How many of them, from the beginning", min_value=1, value=min(20, len(facts)), max_value=len(facts)
        )
    )
    return facts[:limit], ("--facts", file.name, "--limit", str(limit))


def _typed_fact() -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    text = (
        st.text_input("Sentence up to the answer", value=parts.SENTENCE, key="typed-prompt", bind="query-params") or ""
    )
    columns = st.columns(3)
    words = {
        name: (column.text_input(label, key=f"typed-{name}", bind="query-params", placeholder=holder) or "").strip()
        for column, name, label, holder in zip(
            columns,
            ("subject", "answer", "target"),
            ("Subject", "Answer", "New answer"),
            ("words of the sentence", "what the model says", "e.g. Rome"),
            strict=True,
        )
    }
    if not words["subject"] and text == parts.SENTENCE:
        words["subject"] = "Space Needle"
    fact = Fact.typed(text=text, subject=words["subject"], target_true=words["answer"])
    fact = replace(fact, target_new=words["target"] or None)
    source = ["--prompt", text, "--subject", words["subject"]]
    for name in ("answer", "target"):
        source += [f"--{name}", words[name]] if words[name] else []
    return (fact,), tuple(source)


def fill_form(fields: Sequence[FormField], *, prefix: str) -> dict[str, Any]:
    """Widgets for options; what comes back are the values that differ from the defaults.

    Args:
        fields: the form.
        prefix: sets these widgets apart from those of the same name on other pages.
    """
    values = {field.name: _ask(field, replace(field, name=f"{prefix}-{field.name}")) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def _ask(field: FormField, widget: FormField) -> Any:
    shared: dict[str, Any] = dict(key=widget.name, bind="query-params", help=_sentence(field.help))
    if field.name in NAMED and field.type == "texts":
        known = list(methods_of(*NAMED[field.name]))
        return tuple(st.multiselect(field.label, known, default=list(field.default), wrap=True, **shared))
    if field.type in ("integer", "number"):
        whole = field.type == "integer"
        value = st.number_input(
            field.label, value=field.default, step=1 if whole else None, min_value=0 if whole else None,
            format=None if whole else "%g", placeholder="chosen for the model", **shared,
        )  # fmt: skip
        return value if value is None or not whole else int(value)
    return parts._ask(
        replace(widget, help=_sentence(field.help)), field.label, "chosen for the model" if field.optional else None
    )


def _sentence(text: str) -> str:
    """A docstring's line as a sentence of its own."""
    text = text.strip()
    return text[:1].upper() + text[1:]


# -- work --------------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False, max_entries=32)
def _stored(_question: Question, _lm: LM, key: str, weights: str, version: Sequence[tuple[str, int]]) -> Result | None:
    return _question.find(_lm)


def stored(question: Question, lm: LM | None) -> Result | None:
    """The answer, where it is there and the model too."""
    return _stored(question, lm, question.key, lm.weight_hash, parts.store_version()) if lm is not None else None


def show_model(choice: ModelChoice) -> tuple[Job[LM], LM | None]:
    """The job that loads a model, and the model once it is there; one sentence where it cannot be loaded."""
    job = parts.model_of(choice)
    if job.status.state == "failed":
        parts.show_error(job.status.error)
        st.button("Try again", on_click=parts.workshop().forget, args=(choice,), icon=":material/refresh:")
    return job, job.result if job.status.state == "done" else None


def show_work(
    choice: ModelChoice, work: Callable[[LM], Any], *, key: str, title: str, verb: str, ready: bool, is_done: bool, watched: Job[LM]
) -> None:  # fmt: skip
    """The button that starts the work, what became of it, and how far everything is.

    Args:
        choice: the model.
        work: gets the model.
        key: names the question.
        title: the question in a few words, as markdown.
        verb: what the button is called.
        ready: whether the model is there.
        is_done: whether the answer is.
        watched: the job that loads the model.
    """
    job = parts.workshop().find(key)
    status = job.status if job is not None else None
    if not is_done and (status is None or status.over):
        stopped = status is not None and status.state == "stopped"
        parts.act(
            "Go on" if stopped else verb,
            partial(parts.workshop().submit, choice, work, key=key, title=title),
            icon=":material/play_arrow:",
            type="primary",
            disabled=not ready,
            key="run",
        )
        if status is not None and status.state == "failed":
            parts.show_error(status.error)
        elif stopped:
            st.caption("Stopped. What was finished is kept.")
    parts.show_jobs((key,), (watched,), in_pieces=False)


# -- the answer --------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False, max_entries=64)
def _drawn(_chart: Chart, version: tuple[str, ...], theme: parts.Theme) -> Figure:
    return charts_screen.draw(_chart, theme=theme)


def show_chart(chart: Chart, *, key: str, version: str) -> None:
    """A chart in the page's own layout: what stands side by side gets below each other on a narrow screen.

    Args:
        chart: what to draw.
        key: names it on the page.
        version: names what was drawn.
    """
    for row, group in enumerate(_groups(chart)):
        with st.grid(len(group), min_column_width=300) if len(group) > 1 else st.container():
            for name, part in group:
                part = replace(part, plots=tuple(map(_without_words, part.plots)))
                figure = _drawn(part, (version, key, name, chart.title), parts.theme())
                st.plotly_chart(
                    figure, theme=None, key=f"{key}-{row}-{name}", config=parts.QUIET, alt=_alt(chart, part)
                )
    if caption := charts_screen.caption(chart):
        st.caption(parts.plain(caption))


def _without_words(plot: Plot) -> Plot:
    """A plot that leaves what its cells say to the caption below all plots."""
    return replace(plot, texts_are="") if isinstance(plot, CellPlot) else plot


def _groups(chart: Chart) -> list[list[tuple[str, Chart]]]:
    """The plots in rows: those that share their axis across stay one figure, narrow matrices stand in pairs."""
    rows: list[list[tuple[str, Chart]]] = []
    if chart.columns > 1:
        alone = [(str(i), chart.alone(i)) for i in range(len(chart.plots))]
        return [alone[start : start + chart.columns] for start in range(0, len(alone), chart.columns)]
    joined: list[int] = []
    for i, plot in enumerate(chart.plots):
        joined.append(i)
        if chart.goes_on(i):
            continue
        part = replace(chart.alone(i), plots=tuple(chart.plots[j] for j in joined))
        is_small = isinstance(plot, CellPlot) and plot.values.shape[1] <= NARROW
        beside = is_small and bool(rows) and len(rows[-1]) == 1 and _is_small(rows[-1][0][1])
        if beside:
            rows[-1].append((str(i), part))
        else:
            rows.append([(str(i), part)])
        joined = []
    return rows


def _is_small(chart: Chart) -> bool:
    return all(isinstance(plot, CellPlot) and plot.values.shape[1] <= NARROW for plot in chart.plots)


def _alt(chart: Chart, part: Chart) -> str:
    titles = [plot.title for plot in part.plots if plot.title]
    return ". ".join([chart.title, *titles]) or "A figure."


def show_answer(question: Question, result: Result) -> None:
    """What was found: in words, as a figure, as tables and files, what was left out, and the command that repeats it."""
    key = f"{question.analysis.name}-{result.key}"
    try:
        chart = question.analysis.chart(result)
    except InputError as error:
        parts.show_error(error)
        chart = None
    if chart is not None:
        st.markdown(f"### {parts.plain(chart.title)}")
        show_chart(chart, key="chart", version=key)
    show_words(question.analysis.summary(result))
    show_left_out(result)
    if chart is not None:
        drawn = chart
        parts.show_downloads(
            result,
            lambda: charts_paper.draw(drawn, run=result.run),
            name=file_name(question),
            version=(key,),
            key="analysis",
        )
    show_tables(result, key=key)
    show_command(question.command, result)


def show_words(text: str) -> None:
    """A summary; its first line stands out where it is a heading or all there is."""
    first, _, rest = text.strip().partition("\n")
    if first.endswith(":") or not rest.strip():
        st.markdown(f"**{parts.plain(first)}**")
    else:
        rest = text.strip()
    if rest.strip():
        is_long = rest.count("\n") > MOST_LINES
        st.code(rest, language=None, wrap_lines=True, height=TALL if is_long else "content")


def show_left_out(result: Result) -> None:
    """The facts that could not be used, each with its reason."""
    left_out = result.run.get("left_out") or {}
    if not left_out:
        return
    with st.expander(f"{_count(len(left_out), 'case')} left out, and why"):
        st.dataframe(
            {"What": list(left_out), "Why": [str(why) for why in left_out.values()]}, hide_index=True, key="left-out"
        )


def show_tables(result: Result, *, key: str) -> None:
    """The result's tables, the main one first."""
    tables = {
        "Result": result.table,
        **{name.replace("_", " ").capitalize(): table for name, table in result.extras.items()},
    }
    with st.expander("As a table"):
        name = "Result"
        if len(tables) > 1:
            name = st.segmented_control(
                "Table", list(tables), default="Result", key=f"table-{key}", required=True, label_visibility="collapsed"
            )
        st.dataframe(tables[str(name)], hide_index=True)


def show_command(command: str, result: Result) -> None:
    """The command that repeats it, and what it took."""
    with st.expander("In a terminal"):
        st.code(command, language="bash", wrap_lines=True)
    cost = result.run.get("cost")
    if cost:
        st.caption(f"Took {_time(float(cost['seconds']))}; the process's peak of memory was {cost['peak_mb']:,.0f} MB.")


def quoted(*words: str) -> str:
    """Words of a command line."""
    return shlex.join(words)


def file_name(question: Question) -> str:
    """A name for downloads: of letters, digits and dashes."""
    return f"{question.analysis.name}-{question.choice.name.rpartition('/')[2]}".replace("_", "-").lower()


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


# -- a page of questions -----------------------------------------------------------------------------------------------


def show_analysis(
    name: str,
    *,
    facts: Mapping[str, int] | None = None,
    more: Mapping[str, Callable[[Question, Result], None]] | None = None,
) -> None:
    """The inputs, the work and the answer of an analysis; one sentence where there is none of this name.

    Args:
        name: of the analysis.
        facts: how many facts there are at first, where it is not 10.
        more: draws further parts of the answer of an analysis.
    """
    analysis = all_analyses().get(name)
    if analysis is None:
        st.info("This question cannot be answered here yet: its analysis is not installed. Choose another one.")
        parts.show_jobs((), ())
        return
    question = ask(analysis, facts=(facts or {}).get(name, 10))
    if question is None:
        parts.show_jobs((), ())
        return
    job, lm = show_model(question.choice)
    result = stored(question, lm)
    show_work(
        question.choice, question.run, key=question.key, title=question.title, verb=f"Run on {_count(len(question.facts), 'fact')}",
        ready=lm is not None, is_done=result is not None, watched=job,
    )  # fmt: skip
    if result is not None:
        show_answer(question, result)
        if more and name in more:
            more[name](question, result)
    with st.expander("How this is done", expanded=result is None):
        st.markdown(_as_markdown(analysis.explained))


def _as_markdown(explained: str) -> str:
    """A docstring as markdown; what would begin a formula or a table stays what it is."""
    return re.sub(r"([$|~<])", r"\\\1", explained)
