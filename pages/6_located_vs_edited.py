"""Located versus edited: does the place where a fact is found agree with the place that an edit changes, and does it matter?"""

from __future__ import annotations

import streamlit as st

from pages import _analysis as analysis
from pages import _parts as parts
from workbench import charts_paper
from workbench.results import Result

QUESTIONS = {
    "located_vs_edited": "Is a fact edited where it is located?",
    "weight_change": "Which weights does each editor change, and how?",
    "trace_before_after": "Does an edit move the fact, or cover it?",
    "changed_columns_to_vocabulary": "Does an edit write the new answer in plain words?",
    "subject_vs_relation": "Is a fact found at its subject or at its relation?",
    "superposition": "Which other facts does an edit hit?",
    "planted": "Is a fact found where it is known to be?",
    "does_localization_inform_editing": "Does the located layer say where to edit best?",
}


def show_fact(question: analysis.Question, result: Result) -> None:
    """The same for one fact."""
    from analyses.located_vs_edited import fact_chart

    st.markdown("### One fact")
    names = {fact.id: fact for fact in question.facts if (result.table["fact"] == fact.id).any()}
    one = str(
        st.selectbox(
            "Fact", list(names), key="one-fact", format_func=lambda name: names[name].text, label_visibility="collapsed"
        )
    )
    chart = fact_chart(result, fact=one)
    analysis.show_chart(chart, key="one", version=f"{result.key}-{one}")
    parts.show_downloads(
        result,
        lambda: charts_paper.draw(chart, run=result.run),
        name=f"{analysis.file_name(question)}-one-fact",
        version=(result.key, one),
        key="one",
    )


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## Where is a fact, and where is it edited?")
    st.caption("Locating methods say which layers hold a fact; editing methods change some layers. Here the two meet.")
    analysis.arrive("6_located_vs_edited.py")
    analysis.show_analysis(analysis.choose(QUESTIONS), more={"located_vs_edited": show_fact})


parts.run_in_app()
show_page()
parts.page_is_drawn()
