"""Edit a fact: what the model says before and after, which weights were changed, and what moves; edits in a list, to be stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
from plotly.graph_objects import Figure

from analyses.explore_edit import (
    MEASURES,
    EditQuestion,
    Kept,
    List,
    Matrix,
    Place,
    Saying,
    View,
    added_up,
    changed_cells,
    checked,
    editor_fields,
    editor_names,
    editor_words,
    export_model,
    file_stem,
    is_stored,
    lens_moved,
    load_edit,
    made_on,
    make_edit,
    matrix_of,
    moved_neighbors,
    named_folder,
    place_of,
    read_options,
    stacked,
    starting_values,
    view,
    weight_map,
    with_applied,
    with_edit,
    without,
    zip_of,
)
from analyses.explore_fact import Look, planted_band
from pages import _parts as parts
from workbench import drawing, figures_edits, plots
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.forms import FormField
from workbench.jobs import ModelChoice
from workbench.store import results_folder

if TYPE_CHECKING:
    from workbench.edits import Edit
    from workbench.models import LM

METHOD = "Edit"

FIRST = "Rome"
"""The editor that is chosen at first."""

MOVED = {
    "resid_post": "States",
    "mlp_out": "MLP outputs",
    "attn_out": "Attention outputs",
    "lens": "Logit lens",
}
"""Of what the change is shown."""

HELP = {
    "efficacy": "The new answer is more probable than the old one after the fact's own prompt.",
    "paraphrase": "The new answer is more probable than the old one after the fact in other words.",
    "neighborhood": "After the same relation of other subjects, their own answer is more probable than the new one.",
    "other": "After other relations of the subject, the model says what it said before.",
}
"""What the measures count."""

NEURON_COLUMNS: Mapping[str, Any] = {
    "neuron": st.column_config.NumberColumn("Column", width=70, help="The neuron, counted from 0."),
    "share": st.column_config.NumberColumn("Share", format="percent", width=70, help="Of the whole change, |ΔW|²."),
    "relative": st.column_config.NumberColumn(
        "Change", format="%.2f", width=70, help="Length of what is added to the column, divided by its own length."
    ),
    "before": st.column_config.TextColumn("Promoted before", help="The tokens its value vector raises most."),
    "after": st.column_config.TextColumn("Promotes now"),
    "added": st.column_config.TextColumn("What is added", help="The tokens that the change alone raises most."),
}
"""How the table of columns is shown."""

PROMPT_COLUMNS: Mapping[str, Any] = {
    "about": st.column_config.TextColumn("About", width=120),
    "prompt": st.column_config.TextColumn("Prompt"),
    "wanted": st.column_config.TextColumn("Should say", width=110, help="The new answer, or what is true of others."),
    "before": st.column_config.TextColumn("Before", width=110, help="The most probable next token."),
    "after": st.column_config.TextColumn("After", width=110),
}
"""How the table of prompts is shown."""


# -- inputs ------------------------------------------------------------------------------------------------------------


def widget_name(editor: str, field: FormField) -> str:
    """The key of an option's widget, and its name in the URL: fields of several editors may have one name."""
    return f"{editor}-{field.name}"


@st.cache_resource(show_spinner=False)
def all_fields() -> tuple[FormField, ...]:
    """Everything that only this page asks for, by the names that stand in the URL."""
    own = (FormField(name="target", type="text", default="", help=""),)
    names = editor_names()
    which = (FormField(name="editor", type="choice", default=FIRST, help="", choices=names),)
    options = [
        replace(field, name=widget_name(name, field), type="text", default="")
        for name in names
        for field in editor_fields(name)
    ]
    return (*own, *which, *options)


@st.cache_data(show_spinner=False, max_entries=64)
def starting_cached(_lm: LM, weights: str, editor: str) -> dict[str, Any]:
    """What an editor takes where nothing is typed."""
    return starting_values(_lm, editor)


def words_of(value: Any) -> str:
    """A field's value as one would type it."""
    if value is None:
        return "chosen by the method"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "empty"


def ask_options(editor: str, starting: Mapping[str, Any]) -> dict[str, Any]:
    """The editor's form; what comes back are the values that were typed.

    Raises:
        InputError: what was typed is no value of its field.
    """
    fields, typed = editor_fields(editor), {}
    for field in fields:
        value = starting.get(field.name, field.default)
        name, grey = widget_name(editor, field), words_of(value)
        if field.type in ("choice", "switch"):
            choices = [str(one) for one in field.choices] if field.type == "choice" else ["on", "off"]
            found = st.selectbox(
                field.label, choices, index=None, key=name, bind="query-params", help=field.help, placeholder=grey
            )
        else:
            found = st.text_input(field.label, key=name, bind="query-params", help=field.help, placeholder=grey)
        typed[field.name] = found or ""
    return read_options(fields, typed)


def ask_editor() -> str:
    """Which method."""
    name: str | None = st.selectbox(
        "Editor", editor_names(), index=editor_names().index(FIRST), key="editor", bind="query-params"
    )
    return name or FIRST


def show_inputs() -> tuple[ModelChoice, EditQuestion | None, str]:
    """Model, editor, fact and new answer; the question is None where it cannot be asked, with one sentence why."""
    left, right = st.columns([1, 2], gap="medium")
    wrong, options, question = "", {}, None
    with left:
        choice = parts.choose_model()
        model = parts.model_of(choice)
        lm = model.result if model.status.state == "done" else None
        editor = ask_editor()
        with st.popover(f"Options of {editor}", icon=":material/tune:"):
            st.caption(
                "Empty fields take the grey value: the preset of this model, else the paper's. Layers count from 0."
            )
            with st.grid(min_column_width=200, width=520):
                try:
                    options = ask_options(editor, starting_cached(lm, lm.weight_hash, editor) if lm is not None else {})
                except InputError as error:
                    wrong = str(error)
                parts.choose_precision()
        if options:
            st.caption("Changed: " + parts.plain(parts.option_words(options)))
    with right:
        try:
            fact = parts.choose_fact(choice.name)
            own = fact.target_new or ""
            target = st.text_input(
                "New answer",
                key="target",
                bind="query-params",
                placeholder=own or "what the model shall say instead",
                help="What an edit makes the model say after the sentence." + (f" Empty: {own}." if own else ""),
            )
            fact = replace(fact, target_new=(target or "").strip() or own)
            question = EditQuestion(model=choice.name, dtype=choice.dtype, fact=fact, editor=editor, options=options)
        except InputError as error:
            wrong = str(error)
        if wrong:
            parts.show_error(wrong)
    return choice, question, wrong


@st.cache_data(show_spinner=False, max_entries=256)
def problem_of(_lm: LM, _question: EditQuestion, weights: str, key: str) -> str:
    """Why a question cannot be put to a model, in one sentence; empty: it can, as far as is known before the work."""
    try:
        checked(_lm, _question)
    except InputError as error:
        return str(error)
    return ""


# -- the list of edits -------------------------------------------------------------------------------------------------


def edits() -> List:
    """The edits of this session."""
    kept: List = st.session_state.setdefault("edits", ())
    return kept


def change_list(new: List) -> None:
    """Puts another list in the place of this one; `undo` takes it back."""
    st.session_state.setdefault("edits_before", []).append(edits())
    st.session_state["edits"] = new


def undo() -> None:
    """The list as it was before its last change."""
    st.session_state["edits"] = st.session_state["edits_before"].pop()


def toggle(key: str) -> None:
    """Applies an edit, or takes it off."""
    change_list(with_applied(edits(), key, st.session_state[f"on-{key}"]))


def remove(key: str) -> None:
    """Takes an edit out of the list."""
    change_list(without(edits(), key))


def add(edit: Edit) -> None:
    """Puts an edit into the list, applied, and shows it."""
    change_list(with_edit(edits(), edit))
    st.session_state["edit"] = edit.key


def collect() -> None:
    """Puts what workers have finished for this session into its list."""
    waiting: list[str] = st.session_state.setdefault("edits_asked", [])
    for key in list(waiting):
        job = parts.workshop().find(key)
        if job is None or job.status.over:
            waiting.remove(key)
        if job is not None and job.status.state == "done":
            add(job.result)


def start(question: EditQuestion, below: Sequence[Edit]) -> None:
    """Queues an edit."""
    choice = ModelChoice(name=question.model, dtype=question.dtype)
    work = partial(make_edit, question=question, below=tuple(below), store=parts.store())
    parts.workshop().submit(choice, work, key=question.key, title=parts.plain(question.title))
    st.session_state["edits_asked"].append(question.key)


def show_action(lm: LM | None, question: EditQuestion | None, below: List) -> None:
    """The button that makes the edit, or what became of it."""
    if question is None:
        return
    job = parts.workshop().find(question.key)
    if job is not None and not job.status.over:
        return
    wrong = problem_of(lm, question, lm.weight_hash, question.key) if lm is not None else ""
    parts.act(
        "Edit",
        partial(start, question, tuple(one.edit for one in below)),
        icon=":material/edit:",
        type="primary",
        disabled=lm is None or bool(wrong),
        key="make",
    )
    if wrong:
        parts.show_error(wrong)
    elif job is not None and job.status.state == "failed":
        parts.show_error(job.status.error)
    elif job is not None and job.status.state == "stopped":
        st.caption("Stopped. The list of edits is as it was.")
    elif below:
        st.caption(
            f"The next edit is made on top of the {count(len(below), 'edit')} switched on below. "
            "To start from the model itself, switch all off."
        )


def count(n: int, what: str) -> str:
    """A number of things."""
    return f"{n} {what}{'s' * (n != 1)}"


def show_list(lm: LM | None, on: List, waiting: List) -> None:
    """All edits of this session, each to be switched on or off."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("### Edits", width="content")
        st.button(
            "Undo",
            icon=":material/undo:",
            type="tertiary",
            key="undo",
            on_click=undo,
            disabled=not st.session_state.get("edits_before"),
            help="Takes back the last change of this list.",
        )
        with st.popover("Load", icon=":material/folder_open:", type="tertiary"):
            show_load(lm)
    here = [one for one in edits() if lm is not None and one.edit.base == lm.weight_hash]
    if not here:
        st.caption(
            "None yet. Edits stay here until the page is loaded anew; they can be stacked, taken off, and saved."
        )
    stands = {one.key: n + 1 for n, one in enumerate(on)}
    for one in here:
        st.session_state[f"on-{one.key}"] = one.applied
        with st.container(horizontal=True, vertical_alignment="center"):
            st.toggle(parts.plain(one.title), key=f"on-{one.key}", on_change=toggle, args=(one.key,))
            if one.key in stands and len(on) > 1:
                st.badge(f"{stands[one.key]}.", color="blue")
            if one in waiting:
                st.badge("waits for an edit that it was made on", color="orange")
            st.button(
                "Remove", icon=":material/close:", type="tertiary", key=f"remove-{one.key}", on_click=remove, args=(one.key,)
            )  # fmt: skip
    others = len(edits()) - len(here)
    if others and lm is not None:
        st.caption(f"{count(others, 'edit')} of other models: choose their model to see them.")


def show_load(lm: LM | None) -> None:
    """Reads an edit from a file or a folder."""
    saved = sorted(path.parent.name for path in saved_folder().glob("*/edit.json"))
    file = st.file_uploader("A zip file that was downloaded here", type="zip", key="upload")
    place = st.selectbox(
        "Or a folder",
        saved,
        index=None,
        key="folder",
        accept_new_options=True,
        placeholder="saved here, or a path",
    )
    st.button("Load", key="load", disabled=lm is None or not (file or place), on_click=load, args=(lm,))
    show_outcome("load")


def load(lm: LM) -> None:
    """Puts an edit from a file or a folder into the list; for the button."""
    file, place = st.session_state["upload"], str(st.session_state["folder"] or "")
    here = saved_folder() / place if place and (saved_folder() / place / "edit.json").is_file() else Path(place)
    try:
        edit = load_edit(lm, file.getvalue() if file is not None else here.expanduser())
    except InputError as error:
        note_outcome("load", wrong=str(error))
    else:
        add(edit)
        note_outcome("load", said="Loaded and applied; see the list.")


def note_outcome(what: str, *, said: str = "", wrong: str = "") -> None:
    """Keeps what became of a button until one is pressed again: the page may be drawn anew meanwhile."""
    st.session_state["outcome"] = what, said, wrong


def show_outcome(what: str) -> None:
    """What became of a button."""
    of, said, wrong = st.session_state.get("outcome", ("", "", ""))
    if of == what and wrong:
        parts.show_error(wrong)
    elif of == what:
        st.success(parts.plain(said))


def saved_folder() -> Path:
    """Where edits are saved."""
    return results_folder() / "saved_edits"


# -- what workers measure ----------------------------------------------------------------------------------------------


def measured(choice: ModelChoice, work: Callable[[LM], Any], *, key: str, title: str) -> Any:
    """What a worker has measured under a key, or None while it has not; it is started here."""
    workshop = parts.workshop()
    job = workshop.find(key)
    if job is None:
        job = workshop.submit(choice, work, key=key, title=parts.plain(title))
        job.wait(0.6)  # most are done by then, and the page need not be drawn twice
    status = job.status
    if status.state == "done":
        return job.result
    if status.state == "failed":
        parts.show_error(status.error)
    elif status.state == "stopped":
        st.button(
            "Measure it", key=f"again-{key}", icon=":material/refresh:", on_click=measure, args=(choice, work, key, title)
        )  # fmt: skip
    return None


def measure(choice: ModelChoice, work: Callable[[LM], Any], key: str, title: str) -> None:
    """Queues a measurement; for the button."""
    parts.workshop().submit(choice, work, key=key, title=parts.plain(title))


def view_key(lm: LM, fact: Fact, on: List) -> str:
    """The key of the job that asks the edited model."""
    about = EditQuestion(model=lm.name, fact=fact, editor="", below=tuple(one.key for one in on)).key
    return f"view-{lm.weight_hash}-{about}"


def place_key(one: Kept) -> str:
    """The key of the job that finds where an edit is."""
    return f"place-{one.key}"


# -- before and after --------------------------------------------------------------------------------------------------


def show_saying(said: Saying | None, fact: Fact, *, title: str, answer: str, key: str) -> None:
    """Next tokens and a continuation."""
    st.markdown(f"**{title}**")
    if said is None:
        st.skeleton(height=224)
        return
    st.plotly_chart(
        plots.predictions(said.top, theme=parts.theme(), answer=answer),
        theme=None,
        key=key,
        config=parts.QUIET,
        alt=f"{title}, the most probable next tokens: " + ", ".join(f"{text.strip()} {p:.2f}" for text, p in said.top[:5]),
    )  # fmt: skip
    st.markdown(f":gray[{parts.plain(fact.text)}] {parts.plain(said.text.strip())}")


def show_view(found: View | None, seen: Look | None, fact: Fact, on: List) -> None:
    """What the model says without and with the edits that are applied."""
    left, right = st.columns(2, gap="large")
    with left:
        own = Saying(top=seen.top, text="") if seen is not None else None
        show_saying(
            found.before if found is not None else own,
            fact,
            title="The model itself",
            answer=seen.answer if seen is not None else "",
            key="before",
        )
    with right:
        title = f"With {count(len(on), 'edit')}"
        if on:
            show_saying(
                found.after if found is not None else None, fact, title=title, answer=fact.target_new or "", key="after"
            )
        else:
            st.markdown("**Edited**")
            st.caption("No edit is applied." if edits() else "Press Edit, and the edited model answers here.")
    if found is None or not on:
        return
    if not found.after.text.strip().startswith((fact.target_new or "").strip()):
        st.warning(
            f"After the prompt the edited model does not say “{parts.plain((fact.target_new or '').strip())}”. "
            "Take more steps, other layers or another editor, or an answer that the model knows.",
            icon=":material/error:",
        )
    columns = st.columns(max(len(found.counts), 1))
    for column, row in zip(columns, found.counts.to_dict("records"), strict=False):
        column.metric(
            MEASURES[row["measure"]],
            f"{row['after']} of {row['n']}",
            f"before: {row['before']}",
            delta_color="off",
            delta_arrow="off",
            help=HELP[row["measure"]],
        )
    if len(found.counts) < 2:
        st.caption("A sentence of your own has no paraphrases and no neighbors; the bundled facts have.")
    with st.expander("Prompt by prompt"):
        st.dataframe(found.prompts, column_config=PROMPT_COLUMNS, hide_index=True)


# -- where the edit is -------------------------------------------------------------------------------------------------


def choose_edit(here: List) -> Kept:
    """The edit whose place is shown: the one made last, unless another is chosen."""
    keys = {one.key: one for one in here}
    if st.session_state.get("edit") not in keys:
        st.session_state["edit"] = here[-1].key
    if len(here) == 1:
        return here[0]
    key: str | None = st.selectbox(
        "The edit that is looked at below", list(keys), key="edit", format_func=lambda one: keys[one].title
    )
    return keys[key] if key is not None else here[-1]


@st.cache_resource(show_spinner=False, max_entries=32)
def weights_figure(_place: Place, band: tuple[int, ...], key: str, theme: parts.Theme) -> Figure:
    """The map of changed weights, drawn once."""
    values, notes = weight_map(_place)
    changed = [str(row) for row in values.index if values.loc[row].max() > 0]
    return figures_edits.cells(
        values, name="|ΔW| / |W|", theme=theme, hue="green", notes=notes, strong=changed, hooks=_place.hooks,
        planted=range(band[0], band[-1] + 1) if band else None,
    )  # fmt: skip


def pick_cell(key: str) -> None:
    """Notes the matrix that was clicked."""
    for point in st.session_state[key].selection.points:
        if data := point.get("customdata"):
            layer, _, module = str(data[0] if isinstance(data, list) else data).partition(" ")
            st.session_state["cell"] = int(layer), module


def show_weights(lm: LM, one: Kept, place: Place, model: str) -> None:
    """Which matrices an edit changes; a click opens the matrix."""
    st.markdown("### Where is it?")
    if place.weights is not None:
        st.caption("Every matrix of every block: how much of it is changed. Click a cell to open the matrix.")
    for sentence in place.beside:
        st.markdown(f":material/outbound: {parts.plain(sentence)}")
    if place.introduction:
        with st.expander("What stands before the prompt"):
            st.code(place.introduction, language=None, wrap_lines=True)
    if place.weights is None and not place.hooks:
        return
    key = f"weights-{one.key}"
    st.plotly_chart(
        weights_figure(place, tuple(planted_band(model) or ()), one.key, parts.theme()),
        theme=None,
        key=key,
        on_select=partial(pick_cell, key),
        selection_mode="points",
        config=parts.QUIET,
        alt="Relative change of every matrix, by module and layer.",
    )
    if place.hooks:
        st.caption("Ring: the module that the memory stands beside. The weights themselves are unchanged.")
    if place.weights is not None:
        show_matrix(lm, one, place)


@st.cache_resource(show_spinner=False, max_entries=32)
def matrix_cached(_lm: LM, _edit: Edit, _place: Place, key: str, layer: int, module: str) -> Matrix | None:
    """One changed matrix, looked at once."""
    return matrix_of(_lm, _edit, _place, layer=layer, module=module)


def show_matrix(lm: LM, one: Kept, place: Place) -> None:
    """The matrix that was clicked, or the most changed one."""
    changed, cell = changed_cells(place), st.session_state.get("cell")
    if cell is not None and cell not in changed:
        st.caption(
            f"{parts.plain(cell[1])} of layer {cell[0]} is not changed by this edit; this is the most changed one."
        )
    layer, module = cell if cell in changed else changed[0]
    found = matrix_cached(lm, one.edit, place, one.key, layer, module)
    with st.container(border=True):
        st.markdown(f"#### {parts.plain(module)} of layer {layer}")
        if found is None:
            st.caption("Only a bias or a norm is changed there.")
            return
        told = found.told
        st.caption(f"`{found.parameter}`, {found.shape[0]} outputs × {found.shape[1]} inputs; layers count from 0.")
        cells = st.columns(4)
        cells[0].metric("|ΔW| / |W|", drawing.number(told["relative"]), help="Frobenius norms.")
        cells[1].metric("Rank", int(told["rank"]), help=f"Numerical. Stable rank {told['stable_rank']:.1f}.")
        cells[2].metric(
            "In 20 columns" if told["kind"] in ("mlp_out", "attn_out") else "In 20 rows",
            f"{100 * told['share_20']:.0f} %",
            help="Share of |ΔW|² in the 20 most changed ones.",
        )
        cells[3].metric("Cosine", f"{told['cosine']:.4f}", help="Between W and W + ΔW.")
        st.plotly_chart(
            figures_edits.matrix(found.cells, rows=found.rows, columns=found.columns, shape=found.shape, theme=parts.theme()),
            theme=None,
            key="matrix",
            config=parts.QUIET,
            alt="The size of the change in the matrix, with the norms of its columns and rows.",
        )  # fmt: skip
        st.caption(
            "Bars: the norms of the change's columns (above) and rows (right). Stripes are a change of low rank."
        )
        if len(found.neurons):
            st.markdown(
                "**The most changed columns in words**",
                help="A column of a down projection is a neuron's value vector: through the final norm and the unembedding it "
                "says which tokens the neuron promotes.",
            )
            st.dataframe(found.neurons, column_config=NEURON_COLUMNS, hide_index=True)
        else:
            st.caption(
                "Columns can be read as words in down projections of MLPs only, whose columns are value vectors."
            )


# -- what moves --------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False, max_entries=32)
def moved_figures(
    _place: Place, key: str, fact: str, kind: str, band: tuple[int, ...], theme: parts.Theme
) -> tuple[Figure, Figure | None]:
    """The map of tokens and that of neighbors, drawn once."""
    planted = range(band[0], band[-1] + 1) if band else None
    if kind == "lens":
        tokens, grid = _place.moved.tokens(fact), lens_moved(_place, fact=fact)
        names = [f"{n}  {drawing.token_label(str(text))}" for n, text in zip(tokens.index, tokens["text"], strict=True)]
        strong = [name for name, role in zip(names, tokens["token"], strict=True) if str(role).startswith("subject")]
        return (
            figures_edits.cells(
                grid.set_axis(names), name="KL (nats)", theme=theme, strong=strong, planted=planted
            ),
            None,
        )  # fmt: skip
    main = plots.heatmap(_place.moved, kind=kind, fact=fact, theme=theme, title=False, planted=planted)
    rows = moved_neighbors(_place, fact=fact, kind=kind)
    others = None
    if len(rows) > 1:
        others = figures_edits.cells(
            rows, name="|Δx| / |x|", theme=theme, hue=drawing.HUES[kind], strong=(str(rows.index[0]),)
        )
    return main, others


def show_moved(one: Kept, place: Place, model: str) -> None:
    """How far activations move, token by token, and on neighbors."""
    st.markdown(
        "### What moves?",
        help="The same prompt without and with the edit: |x' − x| / |x| at every layer and token. This serves all editors alike, "
        "also those that leave the weights alone.",
    )
    names = {fact.id: fact.subject for fact in one.edit.facts}
    fact: str | None = next(iter(names))
    controls = st.container(horizontal=True)
    kind = controls.segmented_control(
        "Of", list(MOVED), default="resid_post", key="moved", bind="query-params", required=True,
        format_func=MOVED.__getitem__, label_visibility="collapsed",
    )  # fmt: skip
    if len(names) > 1:
        fact = controls.selectbox("Fact", list(names), format_func=names.__getitem__, key="moved-fact")
    fact = fact or next(iter(names))
    main, others = moved_figures(place, one.key, fact, kind, tuple(planted_band(model) or ()), parts.theme())
    cells = st.grid(min_column_width=430, gap="medium")
    with cells.container():
        st.markdown("**On the fact's prompt**")
        st.plotly_chart(main, theme=None, key=f"moved-{kind}", config=parts.QUIET, alt="Change by token and layer.")
        if kind == "lens":
            st.caption("How far the words that the logit lens reads of each state move: KL from before to after.")
    with cells.container():
        if others is not None:
            st.markdown(
                "**At the last token of neighbors**",
                help="The same relation of other subjects. An edit should leave them alone.",
            )
            st.plotly_chart(
                others, theme=None, key=f"neighbors-{kind}", config=parts.QUIET, alt="Change by neighbor and layer."
            )
        elif kind != "lens":
            st.caption("This fact names no neighbors.")


# -- files -------------------------------------------------------------------------------------------------------------


@st.cache_data(show_spinner=False, max_entries=8)
def zip_cached(_edit: Edit, key: str) -> bytes:
    """The edit as a file."""
    return zip_of(_edit)


def show_files(choice: ModelChoice, one: Kept, on: List) -> None:
    """Download, save and export."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Keep it**", width="content")
        st.download_button(
            "ZIP", data=zip_cached(one.edit, one.key), file_name=f"{file_stem(one)}.zip", on_click="ignore", key="zip",
            icon=":material/download:", help="The change as safetensors, the rest as JSON; Load reads it again.",
        )  # fmt: skip
        with st.popover("Save", icon=":material/save:"):
            st.caption(f"Into a new folder of `{saved_folder()}`; Load lists it.")
            st.text_input("Folder", key="save-as", placeholder=file_stem(one))
            st.button("Save", key="save", on_click=save, args=(one,))
            show_outcome(f"save {one.key}")
        with st.popover("Export as a checkpoint", icon=":material/ios_share:"):
            show_export(choice, on)


def show_export(choice: ModelChoice, on: List) -> None:
    """Writes the model with all applied edits."""
    base = results_folder() / "checkpoints"
    st.caption(
        f"The model with {count(len(on), 'applied edit')}, as a folder that from\\_pretrained loads; "
        f"it goes to `{base}`."
    )
    st.text_input("New folder", key="export-as", placeholder="my-edited-model")
    st.button("Export", key="export", disabled=not on, on_click=export, args=(choice, on))
    show_outcome("export")
    job = parts.workshop().find(st.session_state.get("exporting", ""))
    if job is not None and job.status.state == "done":
        st.success(parts.plain(f"Written to {job.result}."))
    elif job is not None and job.status.state == "failed":
        parts.show_error(job.status.error)


def save(one: Kept) -> None:
    """Saves an edit in a new folder; for the button."""
    try:
        folder = one.edit.save(named_folder(saved_folder(), st.session_state["save-as"] or file_stem(one)))
    except (InputError, OSError) as error:
        note_outcome(f"save {one.key}", wrong=str(error))
    else:
        note_outcome(f"save {one.key}", said=f"Saved in {folder}.")


def export(choice: ModelChoice, on: List) -> None:
    """Queues the writing of the edited model; for the button."""
    st.session_state["exporting"], name = "", st.session_state["export-as"] or ""
    edits_on = tuple(one.edit for one in on)
    try:
        folder = named_folder(results_folder() / "checkpoints", name)
        if added_up(edits_on).sides:
            raise FactError(
                "A memory, or text before prompts, cannot be merged into weights. Switch that edit off, or save it instead."
            )
    except InputError as error:
        note_outcome("export", wrong=str(error))
        return
    st.session_state.pop("outcome", None)
    st.session_state["exporting"] = f"export-{folder}"
    work = partial(export_model, edits=edits_on, folder=folder)
    parts.workshop().submit(choice, work, key=f"export-{folder}", title=parts.plain(f"Export {name}"))


# -- the page ----------------------------------------------------------------------------------------------------------


def open_stored(lm: LM | None, question: EditQuestion | None) -> None:
    """An address whose edit was made before shows it at once."""
    if lm is None or question is None or "edits_opened" in st.session_state:
        return
    st.session_state["edits_opened"] = True
    if (
        not edits()
        and not problem_of(lm, question, lm.weight_hash, question.key)
        and is_stored(lm, question, parts.store())
    ):
        start(question, ())
        job = parts.workshop().find(question.key)
        if job is not None:
            job.wait(1)
        collect()


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## What does an edit change?")
    st.caption(
        "An editor makes the model say something else about a subject. Here is what it says then, which weights that took, "
        "and what else moves."
    )
    parts.arrive(METHOD, all_fields())
    collect()
    choice, question, wrong = show_inputs()
    model = parts.model_of(choice)
    lm = model.result if model.status.state == "done" else None
    open_stored(lm, question)
    here = tuple(one for one in edits() if lm is not None and one.edit.base == lm.weight_hash)
    on, waiting = stacked(edits(), lm.weight_hash) if lm is not None else ((), ())
    if question is not None:
        question = replace(question, below=tuple(one.key for one in on))
    fact, seen = question.fact if question is not None else None, None
    if model.status.state == "failed":
        parts.show_error(model.status.error)
        st.button("Try again", on_click=parts.workshop().forget, args=(choice,), icon=":material/refresh:")
    if lm is not None and fact is not None:
        try:
            seen = parts.look_cached(lm, fact, lm.weight_hash, fact.id, fact.text, fact.target_true)
        except InputError as error:
            parts.show_error(error)
            question = fact = None
    if question is not None and fact is not None:
        old = fact.target_true or (seen.answer.strip() if seen is not None else "…")
        st.markdown(f"### {parts.sentence(fact, old)} :gray[becomes] **{parts.plain(fact.target_new or '…')}**")
        st.caption(parts.plain(editor_words(question.editor)))
    show_action(lm, None if wrong else question, on)
    strip = st.container()
    show_list(lm, on, waiting)
    keys: list[str] = [question.key] if question is not None else []
    keys.append(st.session_state.get("exporting", ""))
    if lm is not None and fact is not None:
        filled = replace(fact, target_true=fact.target_true or (seen.answer.strip() if seen is not None else ""))
        keys.append(view_key(lm, filled, on))
        work = partial(view, edits=tuple(kept.edit for kept in on), fact=filled)
        found = measured(choice, work, key=keys[-1], title=f"Answers about {fact.subject}")
        show_view(found, seen, fact, on)
    if lm is not None and here:
        one = choose_edit(here)
        below = made_on(here, one)
        if below is None:
            st.caption("This edit was made on top of others that are not in the list. Load those too.")
        else:
            keys.append(place_key(one))
            place = measured(
                choice, partial(place_of, edit=one.edit, below=below), key=keys[-1], title=f"Footprint of {one.title}"
            )
            if place is not None:
                show_weights(lm, one, place, choice.name)
                show_moved(one, place, choice.name)
        show_files(choice, one, on)
    with strip:
        parts.show_jobs(keys, (model,))


parts.run_in_app()
show_page()
parts.page_is_drawn()
