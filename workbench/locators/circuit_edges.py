"""Which direct paths between parts carry a fact? Edge attribution patching, with the strongest edges patched exactly.

EAP: Nanda 2023; Syed et al. 2023 (arXiv 2310.10348). EAP-IG: Hanna et al. 2024 (arXiv 2403.17806). Path patching: Goldowsky-Dill et
al. 2023 (arXiv 2304.05969). `workbench.path_patching` says what nodes and edges are, and has the algorithm.

1. A clean and a corrupted prompt, as in a causal trace: another subject of equal token length, or noise on the subject.
2. Every edge of the model is estimated; the `top` strongest are kept as the circuit.
3. The `exact` strongest of them are patched alone, one run each.

An effect is what the clean run's score loses when an edge hears the corrupted run, so positive edges speak for the answer and
negative ones against it. A node's effect is the sum over the edges that leave it: by the chain rule that is attribution patching of
the node, while `strength`, the sum of their sizes, also shows nodes whose edges cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from einops import einsum
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.locators.attribution_patching import MOST_STEPS, AttributionPatching
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import Experiment
from workbench.models import LM
from workbench.path_patching import Edge, Graph, Node, Place, connected, graph, reading_heads, refuse_post_norms
from workbench.results import Footprint

EdgeScore = Literal["logit_diff", "p", "p_target", "logp"]
"""The scores of `workbench.metrics` that rise towards the answer and have a derivative."""


@dataclass(frozen=True, kw_only=True)
class CircuitEdges(Locator):
    """The edges that carry a fact. A value is what the clean score would lose if all edges that leave a node were corrupted.

    Rows are heads (`z`) and MLPs (`mlp_out`) by token; `strength` is the sum of the sizes of their edges. Of the extra tables,
    `edges` has the circuit (with `estimate`, and `exact` where an edge was patched), `nodes` every head and MLP over all tokens.
    """

    corrupt: Literal["swap", "noise"] = "swap"
    """`swap` the subject for another of equal token length, as the papers do, or `noise` on the subject's embeddings."""

    substitutes: tuple[str, ...] = ()
    """For `swap`: subjects to choose from; empty: the other facts' subjects. The first of equal token length is taken."""

    noise: str | float = "s3"
    """For `noise`: grammar of `workbench.noise`: s3, 0.1, u0.1, us3, m, t5."""

    sigma_note: str = ""
    """Filled in when the noise's scale is known: from what it was computed."""

    samples: int = 4
    """Noise samples; effects are means over them."""

    seed: int = 1
    """Seed of the noise."""

    score: EdgeScore = "logit_diff"
    """What is measured at the end of the prompt, see `workbench.metrics`."""

    steps: int = 5
    """Points on the way from the corrupted to the clean embeddings at which gradients are taken: 1 is EAP, more is EAP-IG."""

    top: int = 200
    """How many edges the circuit has: those of the largest estimates, whatever their sign."""

    exact: int = 20
    """How many of them, from the strongest on, are patched exactly."""

    def __post_init__(self) -> None:
        Locator.__post_init__(self)
        if not 1 <= self.steps <= MOST_STEPS:
            raise FactError(f"{self.steps} steps were asked for, expected 1 to {MOST_STEPS}.")
        if self.top < 1 or not 0 <= self.exact <= self.top:
            raise FactError(
                f"top is {self.top} and exact is {self.exact}, expected 1 edge or more, and no more exact ones."
            )
        self._tracing()

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """With the noise's scale, or the subjects to choose from, put in.

        Raises:
            ModelError: the family normalises its heads' sum.
        """
        refuse_post_norms(lm)
        known = self._tracing().resolved(lm, facts)
        if self.corrupt == "swap":
            return replace(self, substitutes=known.substitutes)
        return replace(self, noise=known.noise, sigma_note=known.sigma_note)

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """The circuits of some facts, one after the other."""
        return [part._footprint(lm, fact) for fact, part in pieces]

    def _tracing(self) -> AttributionPatching:
        """Whose clean and corrupted runs these are."""
        return AttributionPatching(
            corrupt=self.corrupt,
            substitutes=self.substitutes,
            noise=self.noise,
            sigma_note=self.sigma_note,
            samples=self.samples,
            seed=self.seed,
            score=self.score,
        )

    def _footprint(self, lm: LM, fact: Fact) -> Footprint:
        experiment = self._tracing()._experiment(lm, fact)
        answer = experiment.answer
        prompt = "" if self.corrupt == "noise" else "".join(experiment.problem.corrupted.texts[0])
        with graph(lm, experiment.problem) as paths:
            gradients = paths.gradients(steps=self.steps)
            edges, strength = self._strongest(paths, gradients)
            lost = paths.clean - paths.patched([[edge] for edge in list(edges)[: self.exact]])
            by_node = _by_node(paths, gradients)
            table = _rows(fact, experiment, paths, by_node, strength)
            circuit = _edge_table(fact, paths, edges, lost.mean(1).tolist())
            nodes = _node_table(fact, paths, by_node, strength, circuit)
            facts = fact_row(
                lm,
                fact,
                answer,
                said=experiment.said,
                clean=paths.clean,
                corrupted=float(paths.corrupted.mean()),
                total_effect=paths.clean - float(paths.corrupted.mean()),
                estimated_total=float(by_node[0].sum(-1).mean()),
                edges=paths.n_edges,
                sigma=np.nan if experiment.sigma is None else experiment.sigma,
                corrupted_prompt=prompt,
            )
        return Footprint(
            table=table,
            run=self._manifest(
                lm,
                fact,
                sigma=experiment.sigma,
                unit=f"estimated loss in {self.score}",
                engine=f"edge attribution, {self.steps} {'step' if self.steps == 1 else 'steps'}",
                heads_per_key=lm.n_heads // paths.heads["k"],
                **({"counterfactuals": {fact.id: prompt}} if prompt else {}),
            ),
            extras={"facts": facts, "edges": circuit, "nodes": nodes},
        )

    def _strongest(self, paths: Graph, gradients: dict[Place, Tensor]) -> tuple[dict[Edge, float], Tensor]:
        """The edges of the largest estimates, the strongest first, without those that are 0; every node's strength by token."""
        strength = torch.zeros(len(paths.nodes), paths.change.shape[2], dtype=paths.change.dtype)
        found: list[tuple[float, int, Place, int]] = []
        for place, by_token in paths.estimates(gradients):
            strength[: len(by_token)] += by_token.abs().sum(1).cpu()
            estimates = by_token.sum(-1)
            sizes, chosen = estimates.abs().flatten().topk(min(self.top, estimates.numel()))
            for size, index in zip(sizes.tolist(), chosen.tolist(), strict=True):
                node, head = divmod(index, estimates.shape[1])
                if size > 0:
                    found.append((float(estimates[node, head]), node, place, head))
        found.sort(key=lambda each: (-abs(each[0]), each[1:]))
        return {
            Edge(source=paths.nodes[node], place=place, head=head if paths.heads[place.input] else None): estimate
            for estimate, node, place, head in found[: self.top]
        }, strength


def _by_node(paths: Graph, gradients: dict[Place, Tensor]) -> Tensor:
    """What the score would lose by all edges that leave a node: (node, sample, pos)."""
    total = torch.zeros(paths.change.shape[:3], dtype=paths.change.dtype, device=paths.change.device)
    for place, gradient in gradients.items():
        n = paths.below(place)
        total[:n] -= einsum(paths.change[:n], gradient.sum(2), "node sample pos d, sample pos d -> node sample pos")
    return total.cpu()


def _rows(fact: Fact, experiment: Experiment, paths: Graph, by_node: Tensor, strength: Tensor) -> pd.DataFrame:
    """A row for every head and MLP at every token of the prompt."""
    tokens = experiment.problem.clean
    length, n = tokens.lengths[0], by_node.shape[1]
    which = sorted(range(1, len(paths.nodes)), key=lambda i: (paths.nodes[i].kind == "mlp_out", i))
    chosen = [paths.nodes[i] for i in which]
    value = by_node[which, :, :length].double()
    se = value.std(1) / n**0.5 if n > 1 else torch.full_like(value[:, 0], torch.nan)
    table = site_rows(
        fact,
        tokens,
        kind=[node.kind for node in chosen for _ in range(length)],
        layer=[node.layer for node in chosen for _ in range(length)],
        head=[pd.NA if node.head is None else node.head for node in chosen for _ in range(length)],
        position=list(range(length)) * len(chosen),
        value=value.mean(1).flatten().numpy(),
        se=se.flatten().numpy(),
    )
    with_strength: pd.DataFrame = table.assign(strength=strength[which, :length].double().flatten().numpy())
    return with_strength


def _edge_table(fact: Fact, paths: Graph, edges: dict[Edge, float], exact: Sequence[float]) -> pd.DataFrame:
    """The circuit, the strongest edge first."""
    shared = paths.lm.n_heads // paths.heads["k"]
    rows = [
        {
            "fact": fact.id,
            "source": str(edge.source),
            "target": _target(edge, shared),
            "input": edge.place.input,
            "source_layer": pd.NA if edge.source.kind == "embed" else edge.source.layer,
            "source_head": pd.NA if edge.source.head is None else edge.source.head,
            "target_layer": pd.NA if edge.place.input == "logits" else edge.place.layer,
            "target_head": pd.NA if edge.head is None else reading_heads(edge, heads_per_key=shared)[0],
            "heads": len(reading_heads(edge, heads_per_key=shared)),
            "estimate": estimate,
            "exact": exact[i] if i < len(exact) else np.nan,
            "connected": is_connected,
        }
        for i, ((edge, estimate), is_connected) in enumerate(
            zip(edges.items(), connected(list(edges), heads_per_key=shared), strict=True)
        )
    ]
    types = {
        "fact": "str", "source": "str", "target": "str", "input": "str", "source_layer": "Int64",
        "source_head": "Int64", "target_layer": "Int64", "target_head": "Int64", "heads": "int64", "estimate": "float64",
        "exact": "float64", "connected": "bool",
    }  # fmt: skip
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(types)).astype(types)
    return table


def _target(edge: Edge, shared: int) -> str:
    """The node that reads, e.g. `L3.z[1]`; where heads share a key and value head, all of them, `L3.z[2-3]`."""
    readers = reading_heads(edge, heads_per_key=shared)
    if edge.place.input == "logits":
        return "logits"
    if not readers:
        return str(Node(layer=edge.place.layer, kind="mlp_out"))
    return f"L{edge.place.layer}.z[{readers[0]}{f'-{readers[-1]}' if len(readers) > 1 else ''}]"


def _node_table(fact: Fact, paths: Graph, by_node: Tensor, strength: Tensor, circuit: pd.DataFrame) -> pd.DataFrame:
    """Every node over all tokens; `circuit` says whether a connected edge of the circuit leaves it."""
    speaking = set(circuit.loc[circuit["connected"], "source"])
    table: pd.DataFrame = pd.DataFrame(
        {
            "fact": fact.id,
            "node": [str(node) for node in paths.nodes],
            "layer": [node.layer for node in paths.nodes],
            "kind": [node.kind for node in paths.nodes],
            "head": pd.array([pd.NA if node.head is None else node.head for node in paths.nodes], dtype="Int64"),
            "value": by_node.double().mean(1).sum(-1).numpy(),
            "strength": strength.double().sum(-1).numpy(),
            "circuit": [str(node) in speaking for node in paths.nodes],
        }
    )
    return table
