"""Where an edit changes a model: the footprint that it leaves, in the same columns as those that locators find.

- `weight_footprint`: which matrices of which layers, by how much, and of what structure. For edits of weights.
- `functional_footprint`: how much every state and every part's output moves on the edited prompts, token by token. For all edits,
  also those that leave the weights alone.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.edits import Edit, EditError, LowRank
from workbench.facts import Fact
from workbench.hooks import run
from workbench.locators.tables import site_rows
from workbench.metrics import lens_logits
from workbench.models import LM, Tokens
from workbench.results import Footprint, manifest
from workbench.sites import SiteKind

TOP = (1, 5, 20)
"""Of how many of the most changed neurons the share of the change is told."""

KINDS_SHOWN: tuple[SiteKind, ...] = ("resid_post", "mlp_out", "attn_out")
"""Kinds of sites in a functional footprint."""


def kind_of(lm: LM, path: str) -> SiteKind:
    """Which site a module of a block acts on: the first one that changes when the module's weights do."""
    layout = lm.layout
    if path == layout.down_proj:
        return "mlp_out"
    if path == layout.o_proj:
        return "attn_out"
    if path == layout.attn or path.startswith(f"{layout.attn}."):
        return "z"
    if path.split(".")[0] == layout.down_proj.split(".")[0] or path.startswith(("mlp", "fc")):
        return "mlp_post"
    return "resid_post"


def weight_footprint(lm: LM, edit: Edit) -> Footprint:
    """How much an edit changes the weights behind each site.

    Returns:
        One row a layer and kind of site, for every edited fact (a batch's change is shared by its facts), `value` the relative
        Frobenius norm |dW| / |W| of the changed matrices that act there; 0 where none is changed. The extra table `matrices` has
        one row a parameter: `norm`, `relative`, `rank` (numerical), `spectrum` (the ten largest singular values), `stable_rank`
        (|dW|_F^2 / |dW|_2^2), `share_1`, `share_5`, `share_20` (of |dW|_F^2 in the most changed neurons), `neurons` (those, by
        index), and `cosine` (between W and W + dW).

    Raises:
        EditError: the edit changes no weights of a block, or does not belong to this model.
    """
    edit.check(lm)
    rows = [_matrix(lm, name, change) for name, change in edit.changes.items()]
    matrices = pd.DataFrame(row for row in rows if row["layer"] >= 0)
    if matrices.empty:
        raise EditError("This edit changes no weights of a block. Look at its functional footprint.")
    squares = matrices.assign(new=matrices["norm"] ** 2, old=matrices["base_norm"] ** 2)
    sums = squares.groupby(["kind", "layer"])[["new", "old"]].sum()
    everywhere = pd.MultiIndex.from_product([sums.index.unique("kind"), range(lm.n_layers)], names=["kind", "layer"])
    sites = sums.reindex(everywhere, fill_value=0.0).reset_index()
    facts = edit.facts or (Fact.typed(text="an edit", subject="edit"),)
    tables = [
        site_rows(
            fact, lm.encode([fact]), kind=list(sites["kind"]), layer=sites["layer"].to_numpy(), position=None,
            value=np.sqrt(sites["new"] / sites["old"].where(sites["old"] > 0, 1.0)).to_numpy(),
        )
        for fact in facts
    ]  # fmt: skip
    return Footprint(
        table=pd.concat(tables, ignore_index=True),
        run=_manifest(lm, edit, "Weight footprint", "relative change |ΔW| / |W|"),
        extras={"matrices": matrices},
    )


def functional_footprint(lm: LM, edit: Edit, *, neighbors: bool = True) -> Footprint:
    """How much an edit moves what the model computes on the prompts of its facts.

    Where the edit puts text before prompts, a prompt's own tokens are compared, counted from its end.

    Args:
        lm: the model, without the edit.
        edit: the edit.
        neighbors: also measure the prompts of `Fact.neighbors`.

    Returns:
        One row a layer, kind (states, MLP and attention outputs) and token, `value` the relative change |x' - x| / |x|; the
        further column `cosine` is that of x and x'. The extra table `neighbors` has the same at the last token of each neighbor
        (fact, prompt, layer, kind, value, cosine); `lens` has KL(lens before || lens after) of every state in nats (fact, layer,
        position, kl).

    Raises:
        EditError: the edit does not belong to this model, or has no facts.
    """
    edit.check(lm)
    if not edit.facts:
        raise EditError("This edit tells of no facts, so there are no prompts to measure it on.")
    found, others, lenses = [], [], []
    for fact in edit.facts:
        tokens, before, after = _both(lm, edit, fact)
        layers, positions = np.meshgrid(np.arange(lm.n_layers), np.arange(tokens.lengths[0]), indexing="ij")
        for kind in KINDS_SHOWN:
            change, cosine = _moved(before[kind], after[kind])
            found.append(
                site_rows(
                    fact, tokens, kind=kind, layer=layers.ravel(), position=positions.ravel(),
                    value=change.ravel(),
                ).assign(cosine=cosine.ravel())
            )  # fmt: skip
        lenses.append(
            pd.DataFrame({
                "fact": fact.id, "layer": layers.ravel(), "position": positions.ravel(),
                "kl": _lens_kl(lm, before["resid_post"], after["resid_post"]).ravel(),
            })
        )  # fmt: skip
        for probe in fact.neighbors if neighbors else ():
            _, own, new = _both(lm, edit, probe.prompt)
            for kind in KINDS_SHOWN:
                change, cosine = _moved(own[kind][:, -1:], new[kind][:, -1:])
                others.append(
                    pd.DataFrame({
                        "fact": fact.id, "prompt": probe.prompt, "layer": np.arange(lm.n_layers), "kind": kind,
                        "value": change.ravel(), "cosine": cosine.ravel(),
                    })
                )  # fmt: skip
    extras = {"lens": pd.concat(lenses, ignore_index=True)}
    if others:
        extras["neighbors"] = pd.concat(others, ignore_index=True)
    return Footprint(
        table=pd.concat(found, ignore_index=True),
        run=_manifest(lm, edit, "Functional footprint", "relative change |Δx| / |x|"),
        extras=extras,
    )


def _manifest(lm: LM, edit: Edit, what: str, unit: str) -> dict[str, Any]:
    return manifest(
        what, model=lm.protocol, parameters={"edit": edit.key, "editor": edit.label}, facts=edit.facts, unit=unit
    )


def _matrix(lm: LM, name: str, change: Tensor | LowRank) -> dict[str, Any]:
    """What is told of one changed parameter; layer -1 outside of the blocks."""
    weight = lm.model.get_parameter(name).detach().double().cpu()
    delta = (change.dense() if isinstance(change, LowRank) else change).double().cpu()
    found = re.fullmatch(rf"{re.escape(lm.layout.blocks)}\.(\d+)\.(.+)\.(\w+)", name)
    layer, path = (int(found[1]), found[2]) if found else (-1, "")
    by_neuron = _by_neuron(lm, layer, path, delta)
    order = by_neuron.argsort(descending=True)
    total = float(by_neuron.sum())
    values = singular_values(change) if delta.ndim == 2 else delta.norm()[None]
    return {
        "parameter": name, "layer": layer, "module": path, "kind": kind_of(lm, path) if found else "",
        "norm": float(delta.norm()), "base_norm": float(weight.norm()), "relative": float(delta.norm() / weight.norm()),
        "rank": int((values > values[0] * 1e-6).sum()), "spectrum": values[:10].tolist(),
        "stable_rank": float((values**2).sum() / values[0] ** 2),
        **{f"share_{k}": float(by_neuron[order[:k]].sum()) / total for k in TOP},
        "neurons": order[: max(TOP)].tolist(),
        "cosine": float((weight * (weight + delta)).sum() / (weight.norm() * (weight + delta).norm())),
    }  # fmt: skip


def singular_values(change: Tensor | LowRank) -> Float[Tensor, " n"]:
    """Of a change, the largest first; of a product by its small factors. float64 on the CPU."""
    if isinstance(change, LowRank):
        rows, columns = change.rows.double().cpu(), change.columns.double().cpu()
        small: Tensor = torch.linalg.qr(rows).R @ torch.linalg.qr(columns).R.T
    else:
        small = change
    values: Tensor = torch.linalg.svdvals(small.double().cpu())
    return values


def _by_neuron(lm: LM, layer: int, path: str, delta: Tensor) -> Float[Tensor, " n"]:
    """|dW|^2 by input of a module that writes to the stream (a column of W), by output of any other."""
    if delta.ndim != 2 or layer < 0:
        return delta.flatten() ** 2
    outputs_first = isinstance(lm.part(layer, path), (nn.Linear, nn.Embedding))
    writes = kind_of(lm, path) in ("mlp_out", "attn_out")
    return (delta**2).sum(0 if outputs_first == writes else 1)


def _both(
    lm: LM, edit: Edit, item: Fact | str
) -> tuple[
    Tokens, dict[SiteKind, Float[Tensor, "layer pos d_model"]], dict[SiteKind, Float[Tensor, "layer pos d_model"]]
]:
    """A prompt's tokens, and its activations without and with the edit."""
    tokens = lm.encode([item])
    before = _read(lm, tokens)
    with edit.on(lm):
        after = _read(lm, lm.encode([item]))
    n = tokens.lengths[0]
    return tokens, before, {kind: x[:, -n:] for kind, x in after.items()}


def _read(lm: LM, tokens: Tokens) -> dict[SiteKind, Float[Tensor, "layer pos d_model"]]:
    acts = run(lm, tokens, read=KINDS_SHOWN)
    return {kind: torch.stack([acts[site][0] for site in lm.sites(kind)]).float().cpu() for kind in KINDS_SHOWN}


def _moved(before: Tensor, after: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Relative change and cosine along the last dimension; 0 and 1 where nothing moved."""
    change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
    return change.numpy(), torch.cosine_similarity(before, after, dim=-1).numpy()


def _lens_kl(lm: LM, before: Tensor, after: Tensor) -> np.ndarray:
    """KL(before || after) of what the lens reads, in nats."""
    old, new = (lens_logits(lm, x.to(lm.device)).float().log_softmax(-1) for x in (before, after))
    found: np.ndarray = (old.exp() * (old - new)).sum(-1).clamp(min=0).cpu().numpy()
    return found
