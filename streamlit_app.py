"""The app: `streamlit run streamlit_app.py`. Every file `pages/<n>_<name>.py` is a page of it."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # idle threads of torch sleep instead of keeping the page's script waiting

import streamlit as st

from pages import _parts as parts

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4" shape-rendering="crispEdges">
<path fill="#dce6ef" d="M0 0h4v4H0z"/><path fill="#9dbad3" d="M0 1h1v1H0zm3 2h1v1H3z"/>
<path fill="#2a6496" d="M1 1h2v1H1z"/></svg>"""
"""A small map, drawn here: an icon by name would be fetched from another site."""

st.set_page_config(page_title="Knowledge location workbench", page_icon=ICON, layout="wide")
st.html("<style>.stMainBlockContainer {padding-top: 3.5rem; max-width: 90rem}</style>")

st.session_state["in_app"] = True
parts.navigation().run()
