"""Which direction of the residual stream says a token: its logit as a linear function, with the norms' scales frozen.

A LayerNorm or RMSNorm divides by a number that depends on its whole input. Held at the value of one run ("frozen"), what is left is
linear, so that a logit splits exactly into what each addition to the residual stream gives to it (direct logit attribution;
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Nanda et al., TransformerLens' `apply_ln_to_stack`).

With g = gain x e_o (elementwise; e_o the token's row of the unembedding) and sigma the final norm's divisor at state h:

    logit(o) = (g - mean(g)) . h / sigma + (offset of the norm . e_o + bias of the unembedding)

An RMSNorm subtracts no mean. A logit scale (Cohere) and a narrower output (OPT's `project_out`) are in e_o; a softcap (Gemma 2) is
left out, so the logit is the one before it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from workbench.layouts import ModelError
from workbench.models import LM

_TOLERANCE = 1e-3
"""How far a norm may be from its frozen form, in parts of its largest output; one of another make is off by about 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenNorm:
    """A norm whose divisor is held at what some states made it: norm(state) == push(state) + offset. In float64, on the CPU."""

    gain: Float[Tensor, "row d_model"]
    """What each coordinate is multiplied by, the divisor of the row's state in it."""

    offset: Float[Tensor, " d_model"]
    """What is added in the end: the norm's bias, zero where it has none."""

    centred: bool
    """Whether the mean over the coordinates is subtracted first (LayerNorm) or not (RMSNorm)."""

    def push(self, piece: Float[Tensor, "row ... d_model"]) -> Float[Tensor, "row ... d_model"]:
        """What the norm makes of pieces of each row's state: linear, and of the state itself it is norm(state) - offset."""
        return self._centre(piece.cpu().double()) * self._beside(piece)

    def pull(self, reading: Float[Tensor, "row ... d_model"]) -> Float[Tensor, "row ... d_model"]:
        """The transpose of `push`: reading . push(piece) == pull(reading) . piece."""
        return self._centre(reading.cpu().double() * self._beside(reading))

    def _beside(self, x: Tensor) -> Tensor:
        return self.gain.reshape(len(self.gain), *[1] * (x.dim() - 2), -1)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def frozen_norm(norm: nn.Module, state: Float[Tensor, "row d_model"]) -> FrozenNorm:
    """A LayerNorm or RMSNorm of any make with its divisor held at the value that each row's state gives it.

    Its parts are found by trying, since every family spells them differently: the offset is what it makes of zero, the gain what
    it makes of coordinates of 1 and -1, and it is centred if constants vanish.

    Raises:
        ModelError: it is no such norm.
    """
    norm, state = copy.deepcopy(norm).cpu().double(), state.detach().cpu().double()
    ones = torch.ones(1, state.shape[-1], dtype=torch.float64)
    signs = ones - 2 * (torch.arange(state.shape[-1]) % 2)
    with torch.no_grad():
        offset = norm(0 * ones)
        outputs = norm(state) - offset
        centred = bool((norm(ones) - offset).abs().max() <= _TOLERANCE * (norm(signs) - offset).abs().max())
        gain = (norm(signs) - offset) / (signs - signs.mean() if centred else signs)
    bare = FrozenNorm(gain=gain.expand_as(state), offset=offset[0], centred=centred)
    pushed = bare.push(state)
    tiny = torch.finfo(torch.float64).tiny
    divided = (outputs * pushed).sum(-1, keepdim=True) / (pushed * pushed).sum(-1, keepdim=True).clamp(min=tiny)
    if not (divided * pushed - outputs).abs().max() <= _TOLERANCE * outputs.abs().max():
        raise ModelError(
            f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm, so a logit does not split into parts. "
            "Use a method that runs the model instead, e.g. CausalTrace."
        )
    return FrozenNorm(gain=gain * divided, offset=offset[0], centred=centred)


def unembedding(
    lm: LM, tokens: Sequence[int] | slice = slice(None)
) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, " token"]]:
    """What reads the logits of some tokens off the final norm's output: logit = weight . output + bias, before a softcap.

    In the model's dtype and on its device, with a logit scale and OPT's `project_out` multiplied in. Ask for a slice of the
    vocabulary at a time where all of it would not fit into memory.
    """
    chosen = tokens if isinstance(tokens, slice) else list(tokens)
    with torch.no_grad():
        weight, bias = lm.unembed.get_parameter("weight")[chosen], _bias(lm, chosen)
        return _project(lm, weight) * _scale(lm), bias * _scale(lm)


def frozen_direction(
    lm: LM, state: Float[Tensor, "row d_model"], token_ids: Sequence[int], *, centred: bool = False
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "row token"]]:
    """What reads tokens' logits off a state that leaves the last block, and off every piece of it.

    Args:
        lm: the model.
        state: at whose values the final norm's divisor is frozen.
        token_ids: which tokens.
        centred: of each logit, its difference from the mean logit of the whole vocabulary, which is all that a softmax sees.

    Returns:
        Directions and constants, with direction . state + constant == logit (before a softcap). Float64, on the CPU.

    Raises:
        ModelError: the final norm is neither a LayerNorm nor an RMSNorm.
    """
    norm = frozen_norm(lm.final_norm, state)
    weight, bias = (x.cpu().double() for x in unembedding(lm, token_ids))
    if centred:
        mean_weight, mean_bias = _mean_token(lm)
        weight, bias = weight - mean_weight, bias - mean_bias
    directions = norm.pull(weight.expand(len(state), *weight.shape))
    constants = einsum(weight, norm.offset, "token d_model, d_model -> token") + bias
    return directions, constants.expand(len(state), -1)


def post_norm(lm: LM, layer: int, kind: Literal["attn_out", "mlp_out"]) -> nn.Module | None:
    """The norm between a sublayer's last projection and the residual stream (Gemma 2 and 3, OLMo 2), or None."""
    layout = lm.layout
    added, projected = (layout.attn_out, layout.o_proj) if kind == "attn_out" else (layout.mlp_out, layout.down_proj)
    return None if projected.startswith(added) else lm.part(layer, added)


def _mean_token(lm: LM) -> tuple[Float[Tensor, "1 d_model"], Float[Tensor, " 1"]]:
    """The mean of `unembedding` over the vocabulary."""
    weight = lm.unembed.get_parameter("weight").detach()
    sums = [rows.cpu().double().sum(0, keepdim=True) for rows in weight.split(4096)]  # not all in float64 at once
    mean = torch.stack(sums).sum(0) / lm.d_vocab
    bias = _bias(lm, slice(None)).cpu().double().mean(0, keepdim=True)
    return _project(lm, mean) * _scale(lm), bias * _scale(lm)


def _project(lm: LM, weight: Float[Tensor, "token width"]) -> Float[Tensor, "token d_model"]:
    """Rows of the unembedding as readings of the final norm's output, to which an OPT with narrower embeddings applies a matrix."""
    holder: Any = lm.model.get_submodule(lm.layout.final_norm.rpartition(".")[0])
    between = getattr(holder, "project_out", None)
    return weight if between is None else weight @ between.weight.detach().to(weight)


def _bias(lm: LM, tokens: list[int] | slice) -> Float[Tensor, " token"]:
    bias, weight = getattr(lm.unembed, "bias", None), lm.unembed.get_parameter("weight")
    return weight.new_zeros(len(weight))[tokens] if bias is None else bias.detach()[tokens]


def _scale(lm: LM) -> float:
    return float(getattr(lm.model.config.get_text_config(), "logit_scale", None) or 1.0)
