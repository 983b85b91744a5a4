"""A block in pieces, so that a fast engine computes only what it needs: norm, query, key and value, attention, output, MLP.

`Pieces` is made of the very modules of a Hugging Face block; only the attention between them, rotary embeddings and GPT-2's
GELU are computed here. A row of `WIRINGS` says how a family's block is wired beyond what its `Layout` names; families without a
row (and checkpoints with unusual options) have no pieces, and whoever asks for them calls the whole block instead. Whether the
pieces really make the block is checked against the model's own activations by the sweep, each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from workbench.models import LM, is_plain


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How the blocks of a family are wired. Paths are relative to a block, those of projections and head norms to its attention."""

    norm: str | None
    """The norm before attention; None where attention reads the residual itself."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """The projections to queries, keys and values, or the one that gives all three."""

    fused: Literal["columns", "heads"] = "columns"
    """What one projection gives: all queries, then all keys, then all values; or the three of each head side by side."""

    head_norms: tuple[str, str] | None = None
    """Norms of queries and keys, where the checkpoint has them."""

    norm_whole: bool = False
    """Whether those take all heads together instead of each alone."""

    rotary: Literal["halves", "pairs"] | None = "halves"
    """Which coordinates of a head turn together: i and i + half, or neighbours; None for no rotary embedding."""

    softcap: bool = False
    """Whether scores are capped (by `attn_logit_softcapping`) in eager attention."""

    post_attn: str | None = None
    """The norm of attention's output."""

    mlp: str = "mlp"
    """The MLP."""

    mlp_in: str | None = None
    """Its first projection, where the MLP is two projections with `act` between them."""

    act: str = "mlp.act"
    """The activation between them."""

    post_mlp: str | None = None
    """The norm of the MLP's output."""


_LLAMA = Wiring(norm="input_layernorm")
_POST: Mapping[str, Any] = {"post_attn": "post_attention_layernorm", "post_mlp": "post_feedforward_layernorm"}

WIRINGS: Mapping[str, Wiring] = {
    "gpt2": Wiring(norm="ln_1", qkv=("c_attn",), rotary=None, mlp_in="mlp.c_fc"),
    "gptj": Wiring(norm="ln_1", rotary="pairs", mlp_in="mlp.fc_in"),
    "gpt_neox": Wiring(norm="input_layernorm", qkv=("query_key_value",), fused="heads"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Wiring(norm="input_layernorm", head_norms=("q_norm", "k_norm")),
    "gemma": _LLAMA,
    "gemma2": Wiring(norm="input_layernorm", softcap=True, **_POST),
    "gemma3_text": Wiring(norm="input_layernorm", head_norms=("q_norm", "k_norm"), **_POST),
    "olmo": _LLAMA,
    "olmo2": Wiring(norm=None, head_norms=("q_norm", "k_norm"), norm_whole=True, **_POST),
    "starcoder2": _LLAMA,
    "stablelm": _LLAMA,
    "phi": Wiring(
        norm="input_layernorm", head_norms=("q_layernorm", "k_layernorm"), mlp_in="mlp.fc1", act="mlp.activation_fn"
    ),
    "phi3": Wiring(norm="input_layernorm", qkv=("qkv_proj",)),
    "cohere": Wiring(norm="input_layernorm", rotary="pairs", head_norms=("q_norm", "k_norm")),
}
"""By family. OPT, GPT-Neo, BLOOM and Falcon have none: their attention adds biases of its own, or their MLP is no module."""


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines by position: (pos, 1, turned coordinates), each pair's twice."""


def no_pieces(lm: LM) -> str:
    """Why this model's blocks cannot be taken to pieces, or an empty string where they can."""
    config = lm.model.config.get_text_config()
    if lm.layout.family not in WIRINGS:
        return f"no wiring for {lm.layout.family}"
    if getattr(config, "clip_qkv", None) is not None:
        return "clip_qkv is set"
    if lm.layout.family == "stablelm" and getattr(config, "qk_layernorm", False):
        return "qk_layernorm is set"
    return ""


class Pieces:
    """The pieces of one block. Rows are flat: (row, d_model) and (row, head, d_head); a row is one token of one prompt.

    Args:
        lm: the model.
        layer: which block.
    """

    def __init__(self, lm: LM, layer: int) -> None:
        wiring, layout = WIRINGS[lm.layout.family], lm.layout
        self._wiring, block = wiring, lm.blocks[layer]
        self._attn: Any = _module(block, layout.attn)
        self._norm = _module(block, wiring.norm)
        self._projections = [_module(self._attn, path) for path in wiring.qkv]
        self._head_norms = [getattr(self._attn, path, None) for path in wiring.head_norms or ()]
        self._o, self._post_attn = block.get_submodule(layout.o_proj), _module(block, wiring.post_attn)
        second = None if layout.mid_norm in (None, wiring.mlp) else layout.mid_norm
        if layout.parallel and getattr(block, "post_attention_layernorm", None) is not None:
            second = "post_attention_layernorm"  # a parallel block with a norm of its own for the MLP
        self._shared_norm = layout.parallel and second is None
        self._mlp_norm = _module(block, second)
        self._mlp, self._post_mlp = block.get_submodule(wiring.mlp), _module(block, wiring.post_mlp)
        self._tanh_gelu = wiring.mlp_in is not None and type(block.get_submodule(wiring.act)) is NewGELUActivation
        self._mlp_in = _module(block, wiring.mlp_in)
        self._mlp_out = block.get_submodule(layout.down_proj)
        self.parallel = layout.parallel
        config = lm.model.config.get_text_config()
        self.n_heads = lm.n_heads
        self.d_head = int(getattr(self._attn, "head_dim", 0) or lm.d_model // lm.n_heads)
        self.n_kv = (
            self.n_heads if wiring.fused == "heads" else int(getattr(config, "num_key_value_heads", None) or lm.n_heads)
        )
        self.scaling = float(getattr(self._attn, "scaling", 0) or 1 / self._attn.scale_attn)
        capped = wiring.softcap and config._attn_implementation == "eager"
        self._cap = getattr(self._attn, "attn_logit_softcapping", None) if capped else None

    def rotation(self, call: Mapping[str, Any]) -> Rotation | None:
        """The rotary embedding of a prompt's positions, from the arguments that the model calls the block with."""
        if self._wiring.rotary is None:
            return None
        if (given := call.get("position_embeddings")) is not None:
            cos, sin = given
            return cos[0][:, None], sin[0][:, None]
        table = self._attn.embed_positions[call["position_ids"][0]]  # GPT-J: sines, then cosines, each pair's once
        sin, cos = table.to(self._o.weight.dtype).chunk(2, dim=-1)
        return cos.repeat_interleave(2, -1)[:, None], sin.repeat_interleave(2, -1)[:, None]

    # --- the pieces ---

    def norm(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What attention reads."""
        h: Tensor = x if self._norm is None else self._norm(x)
        return h

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (row, head, d_head), keys and values (row, kv head, d_head), before rotation."""
        if len(self._projections) == 3:
            q, k, v = (projection(h) for projection in self._projections)
            return self._heads(q, 0), self._heads(k, 1), self._heads(v, 2)
        return self._split(self._projections[0](h))

    def q(self, h: Tensor) -> Tensor:
        """Queries alone."""
        if len(self._projections) == 3:
            return self._heads(self._projections[0](h), 0)
        if (part := self._columns(h, slice(0, self.n_heads * self.d_head))) is not None:
            return self._heads(part, 0)
        return self.qkv(h)[0]

    def kv(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values alone."""
        if len(self._projections) == 3:
            return self._heads(self._projections[1](h), 1), self._heads(self._projections[2](h), 2)
        if (part := self._columns(h, slice(self.n_heads * self.d_head, None))) is not None:
            k, v = part.chunk(2, dim=-1)
            return self._heads(k, 1), self._heads(v, 2)
        return self.qkv(h)[1:]

    def rotate(self, x: Float[Tensor, "... pos head d_head"], rotation: Rotation | None, first: int) -> Tensor:
        """Queries or keys turned by their position, the first of which is `first`."""
        if rotation is None:
            return x
        cos, sin = (turn[first : first + x.shape[-3]] for turn in rotation)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self._wiring.rotary == "halves":
            a, b = turned.chunk(2, dim=-1)
            other = torch.cat((-b, a), dim=-1)
        else:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        turned = (turned * cos + other * sin).to(x.dtype)
        return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)

    def attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch pos kv d_head"],
        v: Float[Tensor, "batch pos kv d_head"],
        mask: Float[Tensor, "query pos"] | None,
    ) -> Float[Tensor, "batch query width"]:
        """Softmax attention of some queries over all keys, in float32 or better; the mask is added to the scores."""
        batch, queries, _, _ = q.shape
        grouped = q.reshape(batch, queries, self.n_kv, -1, self.d_head).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = grouped @ k.permute(0, 2, 3, 1)  # (batch, kv, heads of it x query, pos)
        scores = scores.mul_(self.scaling)
        if self._cap is not None:
            scores = (scores / self._cap).tanh() * self._cap
        if mask is not None:
            scores = scores.unflatten(2, (-1, queries)).add_(mask).flatten(2, 3)
        kept = scores if scores.dtype == torch.float64 else scores.float()
        z: Tensor = kept.softmax(-1).to(v.dtype) @ v.transpose(1, 2)
        z = z.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4)
        return z.reshape(batch, queries, self.n_heads * self.d_head)

    def out(self, z: Float[Tensor, "row width"]) -> Float[Tensor, "row d_model"]:
        """What attention adds to the residual."""
        added: Tensor = self._o(z)
        if self._post_attn is not None:
            added = self._post_attn(added)
        return added

    def mlp(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the MLP adds to the residual, from the residual that it reads."""
        h = self.norm(x) if self._shared_norm else x if self._mlp_norm is None else self._mlp_norm(x)
        if self._tanh_gelu and self._mlp_in is not None:
            k = functional.gelu(self._mlp_in(h), approximate="tanh")  # one pass instead of six
            added: Tensor = self._mlp_out(k)
        else:
            added = self._mlp(h)
        return added if self._post_mlp is None else self._post_mlp(added)

    def down(self, k: Float[Tensor, "row d_mlp"]) -> Float[Tensor, "row d_model"]:
        """The same from its neurons' activations."""
        added: Tensor = self._mlp_out(k)
        return added if self._post_mlp is None else self._post_mlp(added)

    # --- shapes ---

    def _columns(self, h: Tensor, columns: slice) -> Tensor | None:
        """Some columns of what a fused projection gives, or None where only the whole can be had."""
        fused: Any = self._projections[0]
        if self._wiring.fused == "heads":
            return None
        bias = None if fused.bias is None else fused.bias[columns]
        if not is_plain(fused):
            return None
        if type(fused) is nn.Linear:
            return functional.linear(h, fused.weight[columns], bias)
        return functional.linear(h, fused.weight[:, columns].T, bias) if type(fused) is Conv1D else None

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._wiring.fused == "heads":
            q, k, v = qkv.unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)
            return q, k, v
        widths = [self.n_heads * self.d_head, self.n_kv * self.d_head, self.n_kv * self.d_head]
        q, k, v = qkv.split(widths, dim=-1)
        return self._heads(q, 0), self._heads(k, 1), self._heads(v, 2)

    def _heads(self, x: Tensor, which: int) -> Tensor:
        """(row, width) as heads, normed where the checkpoint norms queries (0) or keys (1)."""
        norm = self._head_norms[which] if which < len(self._head_norms) else None
        if norm is not None and self._wiring.norm_whole:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.d_head))
        return x if norm is None or self._wiring.norm_whole else norm(x)


def _module(root: nn.Module, path: str | None) -> Any:
    return None if path is None else root.get_submodule(path)
