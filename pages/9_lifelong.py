"""Lifelong: what is left of a model and its edits after many of them, and under prompts that attack them?"""

from __future__ import annotations

import streamlit as st

from pages import _analysis as analysis
from pages import _parts as parts

QUESTIONS = {
    "lifelong": "What is left after many edits, one after the other?",
    "robustness": "Do edits hold when the question is put differently?",
}


def show_page() -> None:
    """All of it, from top to bottom."""
    st.markdown("## How long do edits last?")
    st.caption(
        "One edit is easy. Here a model is edited again and again, or is asked in ways that shake its new answers."
    )
    analysis.arrive("9_lifelong.py")
    analysis.show_analysis(analysis.choose(QUESTIONS), facts={"lifelong": 40})


parts.run_in_app()
show_page()
parts.page_is_drawn()
