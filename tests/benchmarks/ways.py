"""Several ways to compute the same cells, each as its authors show it. `WAYS` names them.

A way is made once for a model and a fact, and then called with cells; it gives their scores, (cell, sample). What it needs of the
clean run it computes when it is made, so the time of a call is that of its cells.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.models import LM
from workbench.products import fast_products
from workbench.restoring import Cell, Restoration, restore_by_loop
from workbench.sites import SiteKind
from workbench.sweep import restore_by_sweep

Way = Callable[[Sequence[Cell]], Tensor]


@torch.no_grad()
def rome(lm: LM, problem: Restoration) -> Way:
    """ROME's own loop (Meng et al. 2022, arXiv 2202.05262, App. B): a forward pass a cell, which the clean prompt rides along.

    Row 0 is clean, rows 1 to N get the noise. A restored output is copied from row 0 to the others.
    """
    model, ids, noise, answer = twin(lm), *_parts(problem)
    rows = ids.repeat(len(noise) + 1, 1)

    def corrupt(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat((output[:1], output[1:] + noise))

    def one(cell: Cell) -> Tensor:
        def restore(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            out[1:, cell.position] = out[0, cell.position]

        hooks = [model.get_input_embeddings().register_forward_hook(corrupt)]
        hooks += [model.get_submodule(_path(lm, cell.kind, i)).register_forward_hook(restore) for i in cell.layers]
        try:
            logits = model(rows, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return _probability(logits[1:], answer)

    return _each(one)


@torch.no_grad()
def transformer_lens(lm: LM, problem: Restoration) -> Way:
    """TransformerLens: its patching function for a single state, its hooks for windows; the noise is one more hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from transformer_lens import patching
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    model, ids, noise, answer = twin(lm), *_parts(problem)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    _, clean = bridge.run_with_cache(ids, prepend_bos=False)
    rows = ids.repeat(len(noise), 1)

    def corrupt(x: Tensor, hook: Any) -> Tensor:
        return x + noise

    def metric(logits: Tensor) -> Tensor:
        return _probability(logits, answer)

    def one(cell: Cell) -> Tensor:
        if cell.kind == "resid_post":
            index = pd.DataFrame({"layer": [cell.layer], "pos": [cell.position]})
            with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar
                setter = patching.layer_pos_patch_setter
                found = patching.generic_activation_patch(
                    bridge, rows, clean, metric, setter, "resid_post", index_df=index, reduce="none"
                )
            values: Tensor = found.values[0]
            return values

        def restore(x: Tensor, hook: Any) -> Tensor:
            x[:, cell.position] = clean[hook.name][0, cell.position]
            return x

        hooks: list[Any] = [(f"blocks.{layer}.hook_{cell.kind}", restore) for layer in cell.layers]
        return metric(bridge.run_with_hooks(rows, fwd_hooks=hooks))

    def each(cells: Sequence[Cell]) -> Tensor:
        with bridge.hooks(fwd_hooks=[("embed.hook_out", corrupt)]):
            return _each(one)(cells)

    return each


@torch.no_grad()
def nnsight(lm: LM, problem: Restoration) -> Way:
    """nnsight: a trace for a cell, in which the outputs of modules are set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from nnsight import TransformersModel
    model, ids, noise, answer = twin(lm), *_parts(problem)
    embed = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    lens = TransformersModel(model, tokenizer=copy.deepcopy(lm.tokenizer), task="text-generation")
    rows = ids.repeat(len(noise), 1)
    clean: dict[str, Tensor] = {}
    with lens.trace(ids, use_cache=False):
        for layer in range(lm.n_layers):
            for kind in ("attn_out", "mlp_out", "resid_post"):
                path = _path(lm, kind, layer)
                clean[path] = _first(lens.get(path).output).save()

    def one(cell: Cell) -> Tensor:
        with lens.trace(rows, use_cache=False):
            lens.get(embed).output = lens.get(embed).output + noise
            for layer in cell.layers:
                path = _path(lm, cell.kind, layer)
                _first(lens.get(path).output)[:, cell.position] = clean[path][0, cell.position]
            p: Any = _probability(lens.output.logits, answer)
            scores: Tensor = p.save()
        return scores

    return _each(one)


def loop(lm: LM, problem: Restoration) -> Way:
    """The workbench's plain loop, the referee of the sweep."""
    return lambda cells: restore_by_loop(lm, problem, cells).cells


def sweep(lm: LM, problem: Restoration) -> Way:
    """The workbench's sweep."""
    return lambda cells: restore_by_sweep(lm, [problem], [cells])[0].cells


def rome_fast_products(lm: LM, problem: Restoration) -> Way:
    """ROME's loop with the products that the sweep takes: what is left between them is less work."""
    loop = rome(lm, problem)

    @torch.no_grad()
    def each(cells: Sequence[Cell]) -> Tensor:
        with fast_products(lm.device, lm.dtype):
            return loop(cells)

    return each


def sweep_default_products(lm: LM, problem: Restoration) -> Way:
    """The sweep with the products that torch takes by default, as the peers have them."""

    def each(cells: Sequence[Cell]) -> Tensor:
        enabled = bool(torch.backends.mkldnn.enabled)
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        try:
            return sweep(lm, problem)(cells)
        finally:
            torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]

    return each


WAYS: Mapping[str, Callable[[LM, Restoration], Way]] = {
    "rome": rome,
    "rome_fast_products": rome_fast_products,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
    "loop": loop,
    "sweep_default_products": sweep_default_products,
    "sweep": sweep,
}

SWEEPS = ("sweep", "sweep_default_products")
"""Those that compute a whole map at once, and are never timed on some cells."""


def passes(way: str, cells: int, samples: int) -> float:
    """Forward passes of N rows that a call with so many cells takes, by which time and work of some cells become those of all.

    One for each cell; our loop also runs the clean prompt and the corrupted one. (The sweep is never multiplied up.)
    """
    return cells + (1 + 1 / samples if way == "loop" else 0)


def twin(lm: LM) -> Any:
    """A private copy of the model that shares the weights' memory, free of the workbench's hooks.

    The others get one each: TransformerLens renames the parts of the model that it is given.
    """
    shared = {id(tensor): tensor for tensor in [*lm.model.parameters(), *lm.model.buffers()]}
    model = copy.deepcopy(lm.model, shared)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def _parts(problem: Restoration) -> tuple[Tensor, Tensor, int]:
    """The prompt's ids, the noise and the answer's token."""
    assert problem.noise is not None
    return problem.clean.ids, problem.noise, problem.score.answer.ids[0]


def _path(lm: LM, kind: SiteKind, layer: int) -> str:
    """The module whose output is restored."""
    block = f"{lm.layout.blocks}.{layer}"
    return {
        "resid_post": block,
        "mlp_out": f"{block}.{lm.layout.mlp_out}",
        "attn_out": f"{block}.{lm.layout.attn_out}",
    }[kind]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _probability(logits: Tensor, answer: int) -> Tensor:
    return logits[:, -1].float().softmax(-1)[:, answer].clone()


def _each(one: Callable[[Cell], Tensor]) -> Way:
    @torch.no_grad()
    def each(cells: Sequence[Cell]) -> Tensor:
        return torch.stack([one(cell) for cell in cells])

    return each
