"""Compare checkpoints: what differs between two, is it an edit, and can one tell an edited answer from a learned one?"""

from __future__ import annotations

from functools import partial
from typing import Any

import streamlit as st

from pages import _analysis as analysis
from pages import _parts as parts
from workbench import charts_paper
from workbench.errors import InputError
from workbench.jobs import ModelChoice, Workshop
from workbench.results import Result

DIFF = "diff"

QUESTIONS = {
    DIFF: "What differs between two checkpoints?",
    "forensics": "Do the weights tell that a fact was edited, and which?",
    "edit_detection": "Can one tell an edited answer from a learned one?",
}

COLUMNS = (
    "tensor",
    "layer",
    "module",
    "changed",
    "relative",
    "rank",
    "stable_rank",
    "top_columns",
    "top_rows",
    "cosine",
    "shape",
)
"""The columns of a diff that are shown, in their order."""


@st.cache_resource(show_spinner=False)
def reader() -> Workshop:
    """A worker that reads checkpoints and loads no model."""
    return Workshop(load=lambda _: None)  # type: ignore[arg-type, return-value]  # its work takes no model


def compare(base: str, edited: str) -> Result:
    """The comparison of two checkpoints; it imports torch, so it runs in the worker."""
    with parts._importing:  # a model may be loaded meanwhile, and its worker imports torch too
        from workbench.checkpoint_diff import DiffError, diff_checkpoints
        from workbench.loading import checkpoint_folder

    if not (base and edited):
        there = f"one checkpoint, {base or edited!r}" if base or edited else "no checkpoint"
        raise DiffError(f"There is {there}, expected two. Name {'the other one too' if base or edited else 'both'}.")
    return diff_checkpoints(checkpoint_folder(base), checkpoint_folder(edited))


def start(base: str, edited: str) -> None:
    """Queues a comparison."""
    reader().submit(ModelChoice(name=base), lambda _: compare(base, edited), key=_key(base, edited), title="Comparing")


def _key(base: str, edited: str) -> str:
    return f"diff-{base}-{edited}"


def show_diff() -> None:
    """Two folders, and what differs between them."""
    left, right = st.columns(2, gap="medium")
    known = "Folder of a checkpoint, bundled model, or hub name"
    base = (left.text_input("Base", key="base", bind="query-params", placeholder=known) or "").strip()
    edited = (
        right.text_input(
            "Edited", key="edited", bind="query-params", placeholder=known,
            help="A checkpoint of the same model, edited with any tool, or a folder of a LoRA adapter.",
        ) or ""
    ).strip()  # fmt: skip
    job = reader().find(_key(base, edited))
    status = job.status if job is not None else None
    if status is None or status.over:
        verb = "Compare" if status is None or status.state != "done" else "Compare again"
        parts.act(
            verb,
            partial(start, base, edited),
            type="primary" if verb == "Compare" else "secondary",
            icon=":material/play_arrow:",
            key="run",
        )
    if job is not None and status is not None and not status.over:
        st.button("Stop", on_click=job.stop, icon=":material/stop:", disabled=job.stopping)
    parts.show_jobs((_key(base, edited),), (job,) if job is not None else ())
    if status is not None and status.state == "failed":
        parts.show_error(status.error)
    if job is not None and status is not None and status.state == "done":
        show_difference(job.result, base, edited)
    elif not (base and edited):
        st.caption("Tensors are read one after the other, so that models fit that are larger than the memory.")


def show_difference(result: Result, base: str, edited: str) -> None:
    """Verdict, map of modules by layer, and every tensor."""
    from workbench.checkpoint_diff import chart

    st.markdown(f"### {parts.plain(result.run['verdict'])}")
    for name, words in (("only_base", "Only in the base"), ("only_edited", "Only in the edited one")):
        if result.run[name]:
            st.caption(parts.plain(f"{words}: {', '.join(result.run[name][:8])}"))
    drawn = None
    try:
        drawn = chart(result)
    except InputError as error:
        st.caption(parts.plain(str(error)))
    version = f"{result.key}-{result.run.get('made')}"
    if drawn is not None:
        analysis.show_chart(drawn, key="diff", version=version)
        figure = drawn
        parts.show_downloads(
            result,
            lambda: charts_paper.draw(figure, run=result.run),
            name="checkpoint-diff",
            version=(version,),
            key="diff",
        )
    only = st.toggle("Only what changed", value=True, key="only-changed")
    table = result.table[result.table["changed"]] if only else result.table
    st.dataframe(table[[name for name in COLUMNS if name in table]], hide_index=True, column_config=_formats())
    analysis.show_command(f"workbench diff {analysis.quoted(base)} {analysis.quoted(edited)}", result)


def _formats() -> dict[str, Any]:
    return {
        "tensor": st.column_config.TextColumn("Tensor", width="large"),
        "layer": st.column_config.NumberColumn("Layer", help="Counted from 0; -1 is outside of the blocks."),
        "relative": st.column_config.NumberColumn("|ΔW| / |W|", format="%.2g"),
        "rank": st.column_config.NumberColumn("Rank", help="Of the change, where few directions hold all of it."),
        "stable_rank": st.column_config.NumberColumn("Stable rank", format="%.2f"),
        "top_columns": st.column_config.NumberColumn("In 5 columns", format="percent", help="Share of |ΔW|²."),
        "top_rows": st.column_config.NumberColumn("In 5 rows", format="percent", help="Share of |ΔW|²."),
        "cosine": st.column_config.NumberColumn("Cosine", format="%.4f", help="Of the tensor before and after."),
    }


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## What was done to these weights?")
    st.caption("A checkpoint that somebody edited looks like any other. Its weights and its answers still tell.")
    analysis.arrive("8_compare_checkpoints.py")
    name = analysis.choose(QUESTIONS)
    if name == DIFF:
        show_diff()
    else:
        st.caption(
            "Here the facts below are edited first, so that the truth is known: how far can such answers be trusted?"
        )
        analysis.show_analysis(name, facts={"edit_detection": 20})


parts.run_in_app()
show_page()
parts.page_is_drawn()
