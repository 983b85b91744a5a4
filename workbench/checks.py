"""Self-checks of a model: does what the hooks read add up? Run once a model, stored with every result.

A failed check means that this checkpoint does not have the shape its family's `Layout` row describes, and every number on it
would be wrong; so it raises.
"""

from __future__ import annotations

import weakref

import torch

from workbench.edits import base_of, unedited
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.metrics import lens_logits
from workbench.models import LM
from workbench.sites import Site

_PROMPTS = ("A first prompt of the check", "Another one that is a little longer than the first one is")

_done: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, dict[str, float]]] = weakref.WeakKeyDictionary()


def self_checks(lm: LM) -> dict[str, float]:
    """The largest relative error of each identity, on two short prompts; of the model without its edits.

    - `reading`: logits with every site read, against the bare model's
    - `identity_patch`: logits with every block's output replaced by itself
    - `additivity`: resid_pre + attn_out + mlp_out against resid_post, in every layer
    - `key_value`: the down projection of `mlp_post` (the sum of key times value vector) against `mlp_out`, in every layer
    - `lens`: final norm and unembedding of the last block's output, against the logits
    - `padding`: a right-padded row against the same prompt alone

    Raises:
        ModelError: one of them is larger than rounding allows.
    """
    base = base_of(lm)  # what an edit changes, or puts beside the weights, is no matter of the model's shape
    if lm.model not in _done or _done[lm.model][0] != base:
        with unedited(lm), torch.no_grad():
            errors = _errors(lm)
        tolerance = {torch.float64: 1e-5, torch.float32: 1e-3}.get(lm.dtype, 5e-2)  # norms and softmax stay in float32
        wrong = ", ".join(f"{name}: {error:.1e}" for name, error in errors.items() if not error <= tolerance)
        if any(error != error for error in errors.values()):
            raise ModelError(
                f"{lm.name} gives NaN on a short prompt in {lm.dtype} with {lm.model.config._attn_implementation} attention "
                f"({wrong}). Use another dtype or attention implementation, or mend its weights."
            )
        if wrong:
            raise ModelError(
                f"{lm.name} does not add up as a {lm.layout.family} should ({wrong}; expected below {tolerance:.0e}). "
                "Its blocks differ from the family's layout, so it cannot be traced."
            )
        _done[lm.model] = base, errors
    return _done[lm.model][1]


def _errors(lm: LM) -> dict[str, float]:
    tokens, alone = lm.encode(_PROMPTS), lm.encode(_PROMPTS[:1])
    inputs = {"input_ids": alone.ids, "attention_mask": alone.mask.long(), "use_cache": False}
    bare = lm.model(**inputs).logits
    read = run(lm, alone, read=("resid_pre", "attn_out", "mlp_out", "resid_post", "mlp_post"))
    same = run(lm, alone, write={site: read[site] for site in lm.sites("resid_post")})
    padded = run(lm, tokens)

    def gap(x: torch.Tensor, y: torch.Tensor) -> float:
        scale = float(y.double().abs().max()) or 1.0
        return float((x.double() - y.double()).abs().max()) / scale

    def at(kind: str, layer: int) -> torch.Tensor:
        return read[Site(layer=layer, kind=kind)]  # type: ignore[arg-type]

    def values(layer: int) -> torch.Tensor:
        out: torch.Tensor = lm.part(layer, lm.layout.down_proj)(at("mlp_post", layer))
        return out if lm.layout.down_proj.startswith(lm.layout.mlp_out) else lm.part(layer, lm.layout.mlp_out)(out)

    layers = range(lm.n_layers)
    return {
        "reading": gap(read.logits, bare),
        "identity_patch": gap(same.logits, bare),
        "additivity": max(
            gap(
                at("resid_pre", i).double() + at("attn_out", i).double() + at("mlp_out", i).double(),
                at("resid_post", i),
            )
            for i in layers
        ),
        "key_value": max(gap(values(i), at("mlp_out", i)) for i in layers),
        "lens": gap(lens_logits(lm, at("resid_post", lm.n_layers - 1)), bare),
        "padding": gap(padded.logits[0, : alone.ids.shape[1]], bare[0]),
    }
