"""A model as a graph: what one part tells another directly, estimated by gradients and patched exactly.

Path patching: Goldowsky-Dill et al. 2023 (arXiv 2304.05969). Edge attribution patching: Nanda 2023; Syed et al. 2023 (arXiv
2310.10348); with integrated gradients, EAP-IG: Hanna et al. 2024 (arXiv 2403.17806, eq. 5).

The residual stream is a sum, so what a part reads is the sum of what every part below it wrote. That gives a graph:

- *Nodes* write: the embedding (what enters the first block), every attention head (its z times its slice of W_O), every MLP.
- *Inputs* read, each before its norm: every head's query, key and value, every MLP, and the final norm before the logits. Where
  several heads share a key and value head, its two inputs belong to that one.
- An *edge* leads from a node to an input above it. In a parallel block the MLP does not read the heads beside it.

1. Clean run and corrupted run on the model itself: every node's output in both.
2. An edge's estimate: (clean - corrupted output of its node) . (gradient of the score at its input), summed over positions: what
   the score would lose, to first order, if that input alone heard the corrupted output. The gradient is the clean run's, or with
   several steps the mean of those at k / steps of the way from the corrupted to the clean embedding, k = 1 .. steps.
3. Exactly: the clean run once more, with (corrupted - clean output) added at that one input; everything above it answers.

Inputs are read and written in a TransformerLens bridge, which alone has them head by head; outputs come from the model itself.
Where the bridge has an input only behind its norm (the MLP where one norm serves attention and MLP; all of BLOOM's attention), the
norm is computed anew from the changed residual stream. Every input is compared with the model's residual stream in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import InputError
from workbench.hooks import Activations, run
from workbench.layouts import ModelError
from workbench.lens_bridge import Hook, agree, bridged, logits
from workbench.models import LM
from workbench.progress import track
from workbench.restoring import Restoration

__all__ = ["Edge", "Graph", "Input", "Node", "Place", "connected", "graph", "reading_heads", "refuse_post_norms"]

Input = Literal["q", "k", "v", "mlp", "logits"]
"""What reads the residual stream."""

ROWS_AT_ONCE = 32
"""Patched runs in one batch."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What writes into the residual stream."""

    layer: int
    """0-based; 0 for the embedding."""

    kind: Literal["embed", "z", "mlp_out"]
    """The embedding, a head, or an MLP."""

    head: int | None = None
    """0-based, for heads only."""

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        return f"L{self.layer}.{self.kind}" + ("" if self.head is None else f"[{self.head}]")


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """Inputs of one sort in one layer: all heads' queries, an MLP's input."""

    layer: int
    """0-based; the number of layers for the logits."""

    input: Input
    """What reads there."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From a node to an input above it."""

    source: Node
    """What writes."""

    place: Place
    """What reads."""

    head: int | None = None
    """Which head reads; for keys and values which key and value head. None for MLP and logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tap:
    """Where a bridge has a place."""

    hook: str
    """The hook point whose tensor is the input, with the heads in a dimension of their own where there are any."""

    norm: nn.Module | None
    """The norm that the hook point comes after; None where it comes before."""

    stream: str
    """The hook point before that norm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A model's graph for one clean prompt and its corrupted copies, open for runs while `graph` is."""

    lm: LM
    """The model."""

    problem: Restoration
    """The clean and the corrupted runs, and the score."""

    nodes: tuple[Node, ...]
    """All nodes in the order in which they write, so that what an input hears is always a first part of them."""

    change: Float[Tensor, "node sample pos d_model"]
    """By how much each node's output differs: corrupted minus clean."""

    clean: float
    """The clean run's score."""

    corrupted: Float[Tensor, " sample"]
    """The corrupted runs' scores."""

    heads: Mapping[Input, int]
    """How many heads read each sort of input; 0 for those without heads."""

    embeddings: tuple[Tensor, Tensor] = field(repr=False)
    """What enters the first block: clean (1, pos, d_model) and corrupted (sample, pos, d_model)."""

    bridge: Any = field(repr=False)
    """TransformerLens' copy of the model."""

    taps: Mapping[Place, _Tap] = field(repr=False)
    """Where the bridge has each place, from the lowest up."""

    @property
    def places(self) -> tuple[Place, ...]:
        """All places, from the lowest up."""
        return tuple(self.taps)

    def below(self, place: Place) -> int:
        """How many of the nodes, from the first on, a place hears."""
        if place.input == "logits":
            return len(self.nodes)
        beside = place.input == "mlp" and not self.lm.layout.parallel
        return 1 + place.layer * (self.lm.n_heads + 1) + beside * self.lm.n_heads

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(self.below(place) * max(1, self.heads[place.input]) for place in self.places)

    def gradients(self, *, steps: int = 1) -> dict[Place, Float[Tensor, "sample pos head d_model"]]:
        """The score's gradient at every input, averaged over `steps` points on the way from corrupted to clean embeddings.

        The clean end is the same for all samples, so with one step there is one row for all. What has no heads has one.
        """
        total: dict[Place, Tensor] = {}
        points = [k / steps for k in range(1, steps + 1)]
        for alpha in track(points, "gradients", steps) if steps > 1 else points:
            for place, gradient in self._gradients(alpha).items():
                total[place] = total[place] + gradient / steps if place in total else gradient / steps
        return total

    def estimates(
        self, gradients: Mapping[Place, Float[Tensor, "sample pos head d_model"]]
    ) -> Iterator[tuple[Place, Float[Tensor, "node head pos"]]]:
        """For each place what the score would lose, to first order, by the edge from each node that it hears; mean over samples."""
        for place, gradient in gradients.items():
            change = self.change[: self.below(place)]
            lost = einsum(change, gradient, "node sample pos d, sample pos head d -> node head pos")
            yield place, -lost / change.shape[1]

    def patched(self, groups: Sequence[Sequence[Edge]], *, scale: float = 1.0) -> Float[Tensor, "group sample"]:
        """The score of the clean run with the edges of a group corrupted and no others, for every group.

        Args:
            groups: edges that are corrupted together; a group of one is path patching along a direct path.
            scale: how much of the difference between corrupted and clean output an input hears.
        """
        n = self.change.shape[1]
        index = {node: i for i, node in enumerate(self.nodes)}
        at_once = max(1, ROWS_AT_ONCE // n)
        batches = [groups[first : first + at_once] for first in range(0, len(groups), at_once)]
        scores = []
        for batch in track(batches, "edges", len(batches)) if len(batches) > 1 else batches:
            added: dict[Place, Tensor] = {}
            for g, group in enumerate(batch):
                for edge in group:
                    if edge.place not in added:
                        shape = (
                            len(batch),
                            *self.change.shape[1:3],
                            max(1, self.heads[edge.place.input]),
                            self.lm.d_model,
                        )
                        added[edge.place] = self.change.new_zeros(shape)
                    added[edge.place][g, :, :, edge.head or 0] += scale * self.change[index[edge.source]]
            scores.append(
                self._scores_with({place: change.flatten(0, 1) for place, change in added.items()}).view(-1, n)
            )
        return torch.cat(scores) if scores else torch.empty(0, n, dtype=torch.float64)

    # --- runs ---

    def _scores_with(self, added: Mapping[Place, Float[Tensor, "row pos head d_model"]]) -> Float[Tensor, " row"]:
        """The clean run's scores with something added at some inputs."""
        streams: dict[str, Tensor] = {}

        def add(place: Place, change: Tensor) -> list[Hook]:
            tap = self.taps[place]

            def write(x: Tensor, hook: Any) -> Tensor:
                mine = change.to(x) if x.dim() == 4 else change[:, :, 0].to(x)
                if tap.norm is None:
                    return x + mine
                stream = streams[tap.stream]
                return tap.norm((stream[:, :, None] if x.dim() == 4 else stream) + mine)  # type: ignore[no-any-return]

            return [*([] if tap.norm is None else [_noting(tap.stream, streams)]), (tap.hook, write)]

        hooks = [hook for place, change in added.items() for hook in add(place, change)]
        rows = len(next(iter(added.values())))
        return self._score(logits(self.bridge, self.problem.clean.repeat(rows), hooks)).cpu().double()

    def _gradients(self, alpha: float) -> dict[Place, Tensor]:
        """At one point of the way: (row, pos, head, d_model), with one row where all are equal."""
        clean, corrupted = self.embeddings
        tokens = self.problem.clean if alpha == 1 else self.problem.corrupted
        point = (clean if alpha == 1 else corrupted.lerp(clean.expand_as(corrupted), alpha)).detach().requires_grad_()
        streams: dict[str, Tensor] = {}
        met: dict[Place, Tensor] = {}

        def enter(x: Tensor, hook: Any) -> Tensor:
            return point

        def meet(place: Place, tap: _Tap) -> list[Hook]:
            def write(x: Tensor, hook: Any) -> Tensor:
                if tap.norm is None:
                    met[place] = x.clone()
                    return met[place]
                stream = streams[tap.stream]
                met[place] = (stream if x.dim() == 3 else stream[:, :, None].expand_as(x)).clone()
                return tap.norm(met[place])  # type: ignore[no-any-return]

            return [*([] if tap.norm is None else [_noting(tap.stream, streams)]), (tap.hook, write)]

        hooks = [(_ENTRY, enter), *(hook for place, tap in self.taps.items() for hook in meet(place, tap))]
        with torch.enable_grad():
            total = self._score(logits(self.bridge, tokens, hooks, grad=True)).sum()
            found = torch.autograd.grad(total, list(met.values()))
        return {
            place: (gradient if gradient.dim() == 4 else gradient[:, :, None]).to(self.change.dtype)
            for place, gradient in zip(met, found, strict=True)
        }

    def _score(self, out: Tensor) -> Tensor:
        return self.problem.score(self.problem.answer_logits(out))


@contextmanager
def graph(lm: LM, problem: Restoration) -> Iterator[Graph]:
    """The graph of a model for one experiment; within, the thread has TransformerLens' copy of the model for itself.

    Raises:
        ModelError: a family with norms after its sublayers, one that TransformerLens cannot do, or whose inputs it cannot give.
        InputError: inside of `torch.inference_mode()`.
    """
    refuse_post_norms(lm)
    if torch.is_inference_mode_enabled():
        raise InputError("Inside of torch.inference_mode() there are no gradients. Leave it.")
    kinds = ["resid_pre", "resid_post", "z", "mlp_out", *([] if lm.layout.parallel else ["resid_mid"])]
    clean = run(lm, problem.clean, read=kinds)
    corrupted = run(lm, problem.corrupted, read=("L0.resid_pre", "z", "mlp_out"), write=problem.corruption())
    with bridged(lm) as bridge, _split(lm, bridge):
        taps, heads = _taps(lm, bridge, clean)
        yield Graph(
            lm=lm,
            problem=problem,
            nodes=_nodes(lm),
            change=_outputs(lm, corrupted) - _outputs(lm, clean),
            clean=float(problem.score(problem.answer_logits(logits(bridge, problem.clean)))[0]),
            corrupted=problem.score(problem.answer_logits(corrupted.logits)).cpu().double(),
            heads=heads,
            embeddings=(clean["L0.resid_pre"], corrupted["L0.resid_pre"]),
            bridge=bridge,
            taps=taps,
        )


def connected(edges: Sequence[Edge], *, heads_per_key: int = 1) -> list[bool]:
    """Which edges lie on a path of these edges from the embedding to the logits.

    Args:
        edges: in any order.
        heads_per_key: how many heads share a key and value head.
    """

    def readers(edge: Edge) -> list[Node | None]:
        """The nodes that an edge's input belongs to; None for the logits."""
        if edge.place.input == "logits":
            return [None]
        if edge.place.input == "mlp":
            return [Node(layer=edge.place.layer, kind="mlp_out")]
        heads = reading_heads(edge, heads_per_key=heads_per_key)
        return [Node(layer=edge.place.layer, kind="z", head=head) for head in heads]

    ends = {edge: readers(edge) for edge in edges}
    upward = sorted(edges, key=lambda edge: (edge.place.layer, edge.place.input == "mlp"))
    fed: set[Node | None] = {Node(layer=0, kind="embed")}
    for edge in upward:  # whoever reads in a layer comes after all that it can hear
        if edge.source in fed:
            fed.update(ends[edge])
    heard: set[Node | None] = {None}
    for edge in reversed(upward):
        if heard.intersection(ends[edge]):
            heard.add(edge.source)
    return [edge.source in fed and bool(heard.intersection(ends[edge])) for edge in edges]


def reading_heads(edge: Edge, *, heads_per_key: int) -> range:
    """The heads whose input an edge's is: one, all that share a key and value head, or none for MLPs and logits."""
    if edge.head is None:
        return range(0)
    if edge.place.input == "q":
        return range(edge.head, edge.head + 1)
    return range(edge.head * heads_per_key, (edge.head + 1) * heads_per_key)


def refuse_post_norms(lm: LM) -> None:
    """Raises where a head has no output of its own in the residual stream.

    Raises:
        ModelError: the family normalises what attention gives before it is added.
    """
    if lm.layout.attn_out not in (lm.layout.attn, lm.layout.o_proj):
        raise ModelError(
            f"{lm.layout.family} normalises the sum of its heads before it is added to the residual stream, so a single head adds "
            "nothing by itself, and there are no edges from heads. Use ActivationPatching or AttributionPatching."
        )


# --- parts ---

_ENTRY = "blocks.0.hook_resid_pre"


def _nodes(lm: LM) -> tuple[Node, ...]:
    nodes = [Node(layer=0, kind="embed")]
    for layer in range(lm.n_layers):
        nodes += [Node(layer=layer, kind="z", head=head) for head in range(lm.n_heads)]
        nodes.append(Node(layer=layer, kind="mlp_out"))
    return tuple(nodes)


def _outputs(lm: LM, acts: Activations) -> Float[Tensor, "node row pos d_model"]:
    """What every node writes into the residual stream, without the output projections' biases; float32 or better."""
    kept = torch.float64 if lm.dtype == torch.float64 else torch.float32
    outputs = [acts["L0.resid_pre"].to(kept)[None]]
    for layer in range(lm.n_layers):
        o_proj = lm.part(layer, lm.layout.o_proj)
        weight = o_proj.get_parameter("weight").detach()
        weight = weight if isinstance(o_proj, Conv1D) else weight.T
        by_head = rearrange(weight.to(kept), "(head d_head) d_model -> head d_head d_model", head=lm.n_heads)
        z = rearrange(acts[f"L{layer}.z"].to(kept), "row pos (head d_head) -> head row pos d_head", head=lm.n_heads)
        outputs.append(einsum(z, by_head, "head row pos d_head, head d_head d_model -> head row pos d_model"))
        outputs.append(acts[f"L{layer}.mlp_out"].to(kept)[None])
    return torch.cat(outputs)


@contextmanager
def _split(lm: LM, bridge: Any) -> Iterator[None]:
    """The bridge with an input of its own for every head."""
    try:
        bridge.set_use_split_qkv_input(True)
    except NotImplementedError as error:
        raise ModelError(
            f"TransformerLens has no inputs of single heads in {lm.layout.family}, so its edges cannot be patched. "
            "Use ActivationPatching or AttributionPatching."
        ) from error
    try:
        yield
    finally:
        bridge.set_use_split_qkv_input(False)


def _taps(lm: LM, bridge: Any, clean: Activations) -> tuple[dict[Place, _Tap], dict[Input, int]]:
    """Where the bridge has every place, and how many heads read there; each compared with the model's residual stream."""
    where = _where(lm, bridge)
    seen: dict[str, Tensor] = {}
    logits(bridge, clean.tokens, [_noting(hook, seen) for hook, _, _ in where.values()])
    taps: dict[Place, _Tap] = {}
    heads = dict.fromkeys(get_args(Input), 0)
    for place, (hook, norm, site) in where.items():
        here, stream = seen.get(hook), clean[site]
        if here is not None and here.dim() == 4:
            heads[place.input] = here.shape[2]
            here = here[:, :, 0]
        if here is not None and agree(here, stream):
            taps[place] = _Tap(hook=hook, norm=None, stream="")
        elif (
            here is not None and norm and agree(here, (module := bridge.get_submodule(norm).original_component)(stream))
        ):
            taps[place] = _Tap(hook=hook, norm=module, stream=f"{norm}.hook_in")
        else:
            raise ModelError(
                f"TransformerLens' {hook} is not what {lm.layout.family} reads there, neither before nor after its norm, so edges "
                "to it cannot be patched. Use ActivationPatching or AttributionPatching."
            )
    return taps, heads


def _where(lm: LM, bridge: Any) -> dict[Place, tuple[str, str, str]]:
    """By place, from the lowest up: a hook point, the norm that it may come after, and the site that is read there."""
    where: dict[Place, tuple[str, str, str]] = {}
    for layer in range(lm.n_layers):
        block, entering = f"blocks.{layer}", f"L{layer}.resid_pre"
        where[Place(layer=layer, input="q")] = (f"{block}.hook_q_input", f"{block}.ln1", entering)
        where[Place(layer=layer, input="k")] = (f"{block}.hook_k_input", f"{block}.ln1", entering)
        where[Place(layer=layer, input="v")] = (f"{block}.hook_v_input", f"{block}.ln1", entering)
        shared = (
            "ln2" not in bridge.blocks[layer].submodules
        )  # one norm for attention and MLP, so theirs cannot be told apart
        hook, norm = (f"{block}.mlp.hook_in", f"{block}.ln1") if shared else (f"{block}.ln2.hook_in", f"{block}.ln2")
        where[Place(layer=layer, input="mlp")] = (hook, norm, entering if lm.layout.parallel else f"L{layer}.resid_mid")
    last = lm.n_layers - 1
    where[Place(layer=lm.n_layers, input="logits")] = (f"blocks.{last}.hook_resid_post", "", f"L{last}.resid_post")
    return where


def _noting(name: str, into: dict[str, Tensor]) -> Hook:
    """A hook that keeps what is there."""

    def note(x: Tensor, hook: Any) -> Tensor:
        into[name] = x
        return x

    return name, note
