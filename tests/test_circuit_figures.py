"""The drawn circuit: what is drawn, where it stands, and that screen and paper show the same."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.examples import SAID, TURNED, ZURICH, tiny_lm
from tests.footprints import footprint as trace
from workbench import export, figures_circuit
from workbench.figures_circuit import circuit, paper_circuit
from workbench.locators.circuit_edges import CircuitEdges
from workbench.results import Footprint, ResultError


@cache
def found(family: str = "gpt2") -> Footprint:
    return CircuitEdges(substitutes=(TURNED,), top=150, steps=2)(tiny_lm(family), [SAID])


def drawn(footprint: Footprint, **options: object) -> figures_circuit._Drawn:
    settings = {"top": 40, "threshold": 0.0, "connected": True, **options}
    return figures_circuit._drawn(footprint, SAID.id, **settings)  # type: ignore[arg-type]


def _nearest(at: dict[tuple[float, float], str], x: float, y: float) -> str:
    place = min(at, key=lambda where: abs(where[0] - x) + abs(where[1] - y))
    assert place == pytest.approx((x, y))
    return at[place]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_drawn_edge_is_on_a_path_and_goes_forward(family: str) -> None:
    figure = drawn(found(family))
    at = {(row["x"], row["y"]): row["node"] for row in figure.nodes.to_dict("records")}
    assert len(at) == len(figure.nodes)
    lines = figure.edges.to_dict("records")
    assert all(line["x"][0] < line["x"][-1] for line in lines)
    ends = [tuple(_nearest(at, line["x"][i], line["y"][i]) for i in (0, -1)) for line in lines]
    sources, readers = {source for source, _ in ends}, {reader for _, reader in ends}
    assert sources - readers == {"embed"}
    assert readers - sources == {"logits"}


def test_all_edges_are_drawn_where_they_need_no_path() -> None:
    edges = found().extras["edges"]
    figure = drawn(found(), connected=False, top=25)
    assert len(figure.edges) == 25
    assert figure.edges["share"].is_monotonic_increasing  # the strongest on top
    assert figure.edges["share"].iloc[-1] == 1
    strong = edges["estimate"].abs().iloc[9]
    assert len(drawn(found(), connected=False, threshold=strong).edges) == 10


def test_an_edge_to_a_shared_key_leads_to_the_heads_that_speak() -> None:
    row = {"heads": 2, "target": "L1.z[2-3]", "target_layer": 1, "target_head": 2}
    assert figures_circuit._readers(row, {"L1.z[2]", "L1.z[3]"}) == ["L1.z[2]", "L1.z[3]"]
    assert figures_circuit._readers(row, {"L1.z[3]"}) == ["L1.z[3]"]
    assert figures_circuit._readers(row, set()) == ["L1.z[2]"]


def test_heads_stand_above_the_mlps_at_their_layer() -> None:
    nodes = drawn(found()).nodes
    inner = nodes[nodes["kind"].isin(["z", "mlp_out"])]
    assert (inner["x"].round() == inner["node"].str.extract(r"L(\d+)")[0].astype(float)).all()
    assert (inner.loc[inner["kind"] == "mlp_out", "y"] == 0).all()
    assert (inner.loc[inner["kind"] == "z", "y"] >= 1).all()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screen_and_paper_show_the_same(theme: str) -> None:
    screen = circuit(found(), theme=theme, planted=range(1, 3))  # type: ignore[arg-type]
    ax = paper_circuit(found(), planted=range(1, 3)).axes[0]
    lines = [trace for trace in screen.data if trace.mode == "lines" and trace.x[0] is not None]
    printed = [line for line in ax.lines if np.size(line.get_xdata()) > 1]
    assert len(lines) == len(printed) == len(drawn(found()).edges)
    for line, other in zip(lines, printed, strict=True):
        assert np.array_equal(line.x, other.get_xdata())
        assert np.array_equal(line.y, other.get_ydata())
    labels = sorted(label for trace in screen.data if trace.text is not None for label in trace.text)
    assert labels == sorted(text.get_text() for text in ax.texts)
    assert "0-based" in screen.layout.xaxis.title.text
    assert "0-based" in ax.get_xlabel()


def test_a_click_on_a_part_gives_its_site_and_its_edges_sum() -> None:
    figure = circuit(found())
    clicked = {
        site: note
        for trace in figure.data
        if trace.customdata is not None
        for site, note in zip(trace.customdata, trace.hovertext, strict=True)
    }
    nodes = found().extras["nodes"].set_index("node")["value"]
    assert {"embed", "logits"} < set(clicked) <= {*nodes.index, "logits"}
    site = next(site for site in clicked if ".mlp_out" in site)
    assert f"{nodes[site]:+.3f}".replace("-", "−") in clicked[site]


def test_signs_and_inputs_are_told_apart() -> None:
    figure = circuit(found(), connected=False, top=150)
    names = {trace.name for trace in figure.data if trace.showlegend is None}
    assert {"attention head, by number", "MLP", "against it", "into a query", "into a key"} <= names
    assert any(str(name).startswith("for the answer (widest: ") for name in names)
    lines = [trace.line for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]
    assert {line.dash for line in lines} == {"solid", "dash", "dot"}
    assert len({line.color for line in lines}) == 2


@pytest.mark.parametrize("format_", ["pdf", "svg", "png"])
def test_files_carry_the_protocol_and_are_the_same_every_time(format_: str) -> None:
    one, other = (export.figure_bytes(paper_circuit(found(), size=size), format_) for size in ("column", "column"))
    assert one == other
    word = found().run["weight_hash"].encode()
    assert word in one or b"".join(b"\0" + bytes([c]) for c in word) in one


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ResultError, match="CausalTrace found no edges"):
        circuit(trace())
    with pytest.raises(ResultError, match="'nobody' is none of them"):
        circuit(found(), fact="nobody")
    with pytest.raises(ResultError, match="Lower the threshold"):
        circuit(found(), threshold=1e6)
    with pytest.raises(ResultError, match="make no path"):
        paper_circuit(found(), top=1)
    two = CircuitEdges(corrupt="noise", samples=1, exact=0, steps=1)(tiny_lm("gpt2"), [SAID, ZURICH])
    with pytest.raises(ResultError, match="has 2 facts"):
        circuit(two)
    assert len(circuit(two, fact=ZURICH.id, connected=False).data) > 3
