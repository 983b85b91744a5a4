"""Edges: against GPT-2 written out by hand, against patching the model itself, and against what the chain rule says."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, SAID, TURNED, ZURICH, tiny_lm
from workbench import zoo
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.locators.attribution_patching import AttributionPatching
from workbench.locators.circuit_edges import CircuitEdges
from workbench.models import LM, ModelError
from workbench.path_patching import Edge, Graph, Node, Place, connected, graph
from workbench.restoring import Restoration
from workbench.results import Footprint
from workbench.sites import Site

KINDS_OF_BLOCKS = ("gpt2", "gpt_neox", "phi", "llama", "falcon", "bloom")
"""In sequence; parallel with two norms, and with one; shared keys and values, and one for all heads; inputs behind a norm."""


def problem(lm: LM, **options: Any) -> Restoration:
    """A clean and a corrupted run, scored by logit difference."""
    settings = {"score": "logit_diff", "corrupt": "swap", "substitutes": (TURNED,), **options}
    return AttributionPatching(**settings)._experiment(lm, SAID).problem


def estimates(paths: Graph, *, steps: int = 1) -> dict[Edge, float]:
    """The estimate of every edge."""
    found = {}
    for place, by_token in paths.estimates(paths.gradients(steps=steps)):
        for (node, head), estimate in np.ndenumerate(by_token.sum(-1).numpy()):
            which = head if paths.heads[place.input] else None
            found[Edge(source=paths.nodes[node], place=place, head=which)] = float(estimate)
    return found


# --- GPT-2 by hand ---

_Heard = tuple[int, str, int | None]
"""An input: its layer, what reads, and which head."""


def gpt2_by_hand(lm: LM, ids: Tensor, added: Mapping[_Heard, Tensor]) -> tuple[dict[Node, Tensor], Tensor]:
    """Every node's output and the logits, one head after the other, with something added at some inputs."""
    model: Any = lm.model.transformer
    d_head, n = lm.d_model // lm.n_heads, ids.shape[1]
    nothing, causal = torch.zeros(n, lm.d_model), torch.ones(n, n).tril().bool()

    def hear(stream: Tensor, norm: Any, layer: int, reader: str, head: int | None = None) -> Tensor:
        heard: Tensor = norm(stream + added.get((layer, reader, head), nothing))
        return heard

    stream = model.wte(ids[0]) + model.wpe(torch.arange(n))
    nodes = {Node(layer=0, kind="embed"): stream}
    for layer, block in enumerate(model.h):
        w, b = block.attn.c_attn.weight, block.attn.c_attn.bias
        between = stream + block.attn.c_proj.bias
        for head in range(lm.n_heads):
            q, k, v = (
                hear(stream, block.ln_1, layer, reader, head) @ w[:, start : start + d_head] + b[start : start + d_head]
                for reader, start in zip("qkv", range(head * d_head, 3 * lm.d_model, lm.d_model), strict=True)
            )
            pattern = (q @ k.T / d_head**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
            out = pattern @ v @ block.attn.c_proj.weight[head * d_head : (head + 1) * d_head]
            nodes[Node(layer=layer, kind="z", head=head)] = out
            between = between + out
        out = block.mlp(hear(between, block.ln_2, layer, "mlp"))
        nodes[Node(layer=layer, kind="mlp_out")] = out
        stream = between + out
    return nodes, lm.unembed(hear(stream, model.ln_f, lm.n_layers, "logits"))[None]


def test_estimates_and_exact_effects_are_those_of_gpt2_by_hand() -> None:
    lm = tiny_lm("gpt2")
    asked = problem(lm)

    def score(logits: Tensor) -> Tensor:
        return asked.score(asked.answer_logits(logits))[0]

    clean, logits = gpt2_by_hand(lm, asked.clean.ids, {})
    corrupted, _ = gpt2_by_hand(lm, asked.corrupted.ids, {})
    high = score(logits).item()
    with graph(lm, asked) as paths:
        assert list(clean) == list(paths.nodes)
        for node, change in zip(paths.nodes, paths.change, strict=True):
            torch.testing.assert_close(change[0], corrupted[node] - clean[node], rtol=0, atol=1e-5)
        found = estimates(paths)
        exact = paths.clean - paths.patched([[edge] for edge in found])[:, 0]
    assert len(found) == paths.n_edges == 479
    inputs: set[_Heard] = {(edge.place.layer, edge.place.input, edge.head) for edge in found}
    nothing = {heard: torch.zeros(asked.clean.ids.shape[1], lm.d_model, requires_grad=True) for heard in inputs}
    slopes = torch.autograd.grad(score(gpt2_by_hand(lm, asked.clean.ids, nothing)[1]), list(nothing.values()))
    gradients = dict(zip(nothing, slopes, strict=True))
    for i, (edge, estimate) in enumerate(found.items()):
        heard = edge.place.layer, edge.place.input, edge.head
        change = (corrupted[edge.source] - clean[edge.source]).detach()
        assert estimate == pytest.approx(-float((change * gradients[heard]).sum()), abs=1e-4)
        if i % 7 == 0:
            patched = score(gpt2_by_hand(lm, asked.clean.ids, {heard: change})[1]).item()
            assert float(exact[i]) == pytest.approx(high - patched, abs=1e-4)
    assert np.abs(list(found.values())).max() > 0.1


# --- every kind of block ---


@pytest.mark.parametrize("family", KINDS_OF_BLOCKS)
def test_all_edges_into_a_part_together_are_the_corrupted_part(family: str) -> None:
    """Whatever hears nothing but the corrupted run gives what it gives there: patched in the model itself, without a bridge."""
    lm = tiny_lm(family)
    asked = problem(lm)
    corrupted = run(lm, asked.corrupted, read=("attn_out", "mlp_out"))

    def written(kind: Any, layer: int) -> float:
        site = Site(layer=layer, kind=kind)
        logits = run(lm, asked.clean, write={site: corrupted[site]}).logits
        return float(asked.score(asked.answer_logits(logits))[0])

    with graph(lm, asked) as paths:

        def into(layer: int, *inputs: str) -> list[Edge]:
            return [
                Edge(source=source, place=place, head=head if paths.heads[place.input] else None)
                for place in paths.places
                if place.layer == layer and place.input in inputs
                for source in paths.nodes[: paths.below(place)]
                for head in range(max(1, paths.heads[place.input]))
            ]

        groups = [into(lm.n_layers, "logits")]
        groups += [into(layer, "q", "k", "v") for layer in range(lm.n_layers)]
        groups += [into(layer, "mlp") for layer in range(lm.n_layers)]
        scores = paths.patched(groups)[:, 0].tolist()
    expected = [float(paths.corrupted[0])]
    expected += [written("attn_out", layer) for layer in range(lm.n_layers)]
    expected += [written("mlp_out", layer) for layer in range(lm.n_layers)]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("family", KINDS_OF_BLOCKS)
def test_an_estimate_is_the_slope_of_the_exact_effect(family: str) -> None:
    lm = tiny_lm(family)
    with graph(lm, problem(lm)) as paths:
        found = estimates(paths)
        chosen = sorted(found, key=lambda edge: -abs(found[edge]))[::9]
        up, down = (paths.patched([[edge] for edge in chosen], scale=scale)[:, 0] for scale in (1e-2, -1e-2))
    assert {edge.place.input for edge in chosen} == {"q", "k", "v", "mlp", "logits"}
    expected = [found[edge] for edge in chosen]
    assert ((down - up) / 2e-2).tolist() == pytest.approx(expected, abs=2e-3 * max(map(abs, expected)))


@pytest.mark.parametrize(
    ("family", "steps"), [*((family, 1) for family in KINDS_OF_BLOCKS), ("gpt2", 4), ("falcon", 4)]
)
def test_the_edges_that_leave_a_node_add_up_to_attribution_patching_of_the_node(family: str, steps: int) -> None:
    lm = tiny_lm(family)
    options: dict[str, Any] = {"corrupt": "noise", "noise": 0.4, "samples": 3, "score": "logit_diff", "steps": steps}
    here = CircuitEdges(**options)(lm, [SAID])
    there = AttributionPatching(kinds=("z", "mlp_out"), window=1, at="clean", **options)(lm, [SAID])
    for kind in ("z", "mlp_out"):
        ours = here.of(kind=kind).groupby(["layer", "position"])["value"].sum()  # over the heads
        theirs = there.of(kind=kind).set_index(["layer", "position"])["value"]
        np.testing.assert_allclose(ours, theirs[ours.index], rtol=0, atol=1e-4)
    mlps = ["layer", "position", "se"]
    np.testing.assert_allclose(
        here.of(kind="mlp_out")[mlps], there.of(kind="mlp_out").sort_values(mlps[:2])[mlps], atol=1e-4
    )
    assert here.table["value"].abs().max() > 0.1
    assert (here.table["strength"] >= here.table["value"].abs() - 1e-4).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_along_the_whole_way_the_embeddings_edges_add_up_to_the_total_effect(family: str) -> None:
    """The sum misses the integral by a constant over the steps; two sums tell it apart."""
    options: dict[str, Any] = {"substitutes": (TURNED,), "exact": 0}
    few, many = (CircuitEdges(steps=n, **options)(tiny_lm(family), [SAID]).extras["facts"].iloc[0] for n in (32, 64))
    assert abs(many["estimated_total"] - many["total_effect"]) > 5e-3
    extrapolated = 2 * many["estimated_total"] - few["estimated_total"]
    assert extrapolated == pytest.approx(many["total_effect"], abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_corruption_that_changes_nothing_gives_nothing(family: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    found = CircuitEdges(corrupt="noise", noise=1e-30)(lm, [SAID])
    assert (found.table["value"] == 0).all()
    assert found.extras["edges"].empty
    found.save(tmp_path / "nothing")
    again = Footprint.load(tmp_path / "nothing").extras["edges"]
    pd.testing.assert_frame_equal(again, found.extras["edges"])
    same = problem(lm)
    with graph(lm, replace(same, corrupted=same.clean)) as paths:
        edges = estimates(paths)
        assert not any(edges.values())
        assert paths.patched([list(edges)[::5]]).item() == pytest.approx(paths.clean, abs=1e-5)


# --- the tables ---


def test_the_table_of_edges_is_the_circuit() -> None:
    lm = tiny_lm("llama")
    found = CircuitEdges(substitutes=(TURNED,), top=60, exact=5, steps=1)(lm, [SAID])
    edges, facts = found.extras["edges"], found.extras["facts"].iloc[0]
    with graph(lm, problem(lm)) as paths:
        every = estimates(paths)
    sizes = sorted(map(abs, every.values()), reverse=True)
    assert len(edges) == 60
    assert facts["edges"] == len(every)
    np.testing.assert_allclose(edges["estimate"].abs(), sizes[:60], rtol=1e-5)
    assert edges["exact"].notna().tolist() == [True] * 5 + [False] * 55
    assert edges["target"].str.fullmatch(r"L\d\.z\[\d(-\d)?\]|L\d\.mlp_out|logits").all()
    shared = edges[edges["input"].isin(["k", "v"])]
    assert (shared["heads"] == 2).all()
    assert set(shared["target_head"]) <= {0, 2}
    assert shared["target"].str.contains("-").all()
    assert found.run["heads_per_key"] == 2
    assert facts["total_effect"] == pytest.approx(facts["clean"] - facts["corrupted"])


def test_only_paths_from_the_embedding_to_the_logits_are_connected() -> None:
    def edge(source: str, layer: int, reader: Any, head: int | None = None) -> Edge:
        kinds: dict[str, Node] = {
            "embed": Node(layer=0, kind="embed"),
            "head": Node(layer=0, kind="z", head=3),
            "mlp": Node(layer=1, kind="mlp_out"),
        }
        return Edge(source=kinds[source], place=Place(layer=layer, input=reader), head=head)

    circuit = [
        edge("head", 1, "mlp"),  # in the middle of a path
        edge("embed", 0, "v", 1),  # heard by heads 2 and 3
        edge("mlp", 2, "logits"),
        edge("embed", 1, "q", 0),  # of a head that tells nobody
        edge("head", 2, "q", 0),
    ]
    assert connected(circuit, heads_per_key=2) == [True, True, True, False, False]
    assert connected(circuit, heads_per_key=1) == [False] * 5


def test_an_answer_that_begins_like_its_foil_is_refused() -> None:
    alike = replace(EIFFEL, target_new="Paris")
    with pytest.raises(FactError, match="begin with the same token"):
        CircuitEdges(substitutes=(TURNED,))(tiny_lm("gpt2"), [alike])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "expected 1 to"),
        ({"top": 3}, "no more exact"),
        ({"exact": -1}, "no more exact"),
        ({"noise": "x"}, "no noise"),
    ],
)
def test_odd_parameters_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        CircuitEdges(**options)


@pytest.mark.parametrize(
    ("family", "why"), [("gemma2", "normalises the sum of its heads"), ("gptj", "no inputs of single heads")]
)
def test_families_without_such_edges_are_refused_with_the_reason(family: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        CircuitEdges(corrupt="noise", samples=1)(tiny_lm(family), [SAID])


def test_a_subject_without_a_counterpart_is_refused(gpt2: LM) -> None:
    with pytest.raises(FactError, match="substitutes"):
        CircuitEdges()(gpt2, [SAID, ZURICH])


def test_threads_that_share_a_model_get_their_own_numbers() -> None:
    lm = tiny_lm("gpt2")
    locators = [CircuitEdges(corrupt="noise", noise=0.4, samples=2, exact=4, seed=seed) for seed in (1, 2, 3, 4)]
    alone = [locator(lm, [SAID]).extras["edges"] for locator in locators]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda locator: locator(lm, [SAID]).extras["edges"], locators))
    for one, other in zip(alone, together, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_the_circuit_of_a_planted_fact_leads_through_the_mlp_that_holds_it() -> None:
    lm, facts = load("organism-mid"), zoo.load_facts("organism-mid")
    locator = CircuitEdges().resolved(lm, facts)
    fact: Fact = facts[0]
    found = locator(lm, [fact])
    owner = zoo.owners("organism-mid")[fact.subject]
    mlps = found.extras["nodes"].query("kind == 'mlp_out'").set_index("layer")["value"]
    assert mlps.idxmax() == owner
    edges = found.extras["edges"]
    assert edges.loc[0, "source"] == f"L{owner}.mlp_out"
    assert edges[["estimate", "exact"]].corr().iloc[0, 1] > 0.8
