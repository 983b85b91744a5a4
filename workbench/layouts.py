"""Where each model family keeps its parts: one `Layout` row per family, and the only place that knows.

To add a family, add a row (and its tiny model to `tests/tiny_models.py`); the self-checks and the contract tests tell whether
the row is right. Paths are module paths in transformers 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import InputError


class ModelError(InputError):
    """A model that cannot be loaded or used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Module paths of one family. Paths of parts are relative to a block."""

    family: str
    """The `model_type` of the family's config."""

    blocks: str
    """The list of blocks."""

    final_norm: str
    """The norm between the last block and the unembedding."""

    attn: str
    """The attention module."""

    attn_out: str
    """The module whose output attention adds to the residual stream: `attn` itself, its output projection, or a post-norm."""

    o_proj: str
    """Attention's output projection; its input is `z`."""

    mlp_out: str
    """The module whose output the MLP adds to the residual stream."""

    down_proj: str
    """The MLP's down projection; its input is `mlp_post`, the key k."""

    mid_norm: str | None
    """The module whose input is `resid_mid`; None where attention and MLP read the same residual (a parallel block)."""

    parallel_if: tuple[str, ...] = ()
    """Config flags that make the block of a checkpoint parallel, whatever `mid_norm` says."""

    in_place: bool = False
    """Whether the block adds into its sublayers' output tensors, so that what is read or written there must be a copy."""

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same residual, so that there is no `resid_mid`."""
        return self.mid_norm is None


def _llama_like(family: str, **other: Any) -> Layout:
    parts = {
        "blocks": "model.layers",
        "final_norm": "model.norm",
        "attn": "self_attn",
        "attn_out": "self_attn",
        "o_proj": "self_attn.o_proj",
        "mlp_out": "mlp",
        "down_proj": "mlp.down_proj",
        "mid_norm": "post_attention_layernorm",
    }
    return Layout(family=family, **{**parts, **other})


_POST_NORMS = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
"""Gemma 2 and 3 and OLMo 2 normalise a sublayer's output before they add it."""

_GPT2_BLOCK: dict[str, Any] = {
    "blocks": "transformer.h",
    "final_norm": "transformer.ln_f",
    "attn": "attn",
    "attn_out": "attn",
    "mlp_out": "mlp",
}

_BLOOM_BLOCK: dict[str, Any] = {
    "blocks": "transformer.h",
    "final_norm": "transformer.ln_f",
    "attn": "self_attention",
    "attn_out": "self_attention.dense",
    "o_proj": "self_attention.dense",
    "mlp_out": "mlp.dense_4h_to_h",
    "down_proj": "mlp.dense_4h_to_h",
    "mid_norm": "post_attention_layernorm",
}
"""BLOOM's attention and MLP modules return the residual with their own part in it, so the projections are what counts."""

LAYOUTS: tuple[Layout, ...] = (
    Layout(family="gpt2", **_GPT2_BLOCK, o_proj="attn.c_proj", down_proj="mlp.c_proj", mid_norm="ln_2"),
    Layout(family="gptj", **_GPT2_BLOCK, o_proj="attn.out_proj", down_proj="mlp.fc_out", mid_norm=None),
    Layout(family="gpt_neo", **_GPT2_BLOCK, o_proj="attn.attention.out_proj", down_proj="mlp.c_proj", mid_norm="ln_2"),
    Layout(
        family="gpt_neox",
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attn="attention",
        attn_out="attention",
        o_proj="attention.dense",
        mlp_out="mlp",
        down_proj="mlp.dense_4h_to_h",
        mid_norm="post_attention_layernorm",
        parallel_if=("use_parallel_residual",),
    ),
    Layout(
        family="opt",
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attn="self_attn",
        attn_out="self_attn",
        o_proj="self_attn.out_proj",
        mlp_out="fc2",
        down_proj="fc2",
        mid_norm="final_layer_norm",
    ),
    _llama_like(
        "phi",
        o_proj="self_attn.dense",
        down_proj="mlp.fc2",
        final_norm="model.final_layernorm",
        mid_norm=None,
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma"),
    _llama_like("gemma2", **_POST_NORMS, mid_norm="pre_feedforward_layernorm"),
    _llama_like("gemma3_text", **_POST_NORMS, mid_norm="pre_feedforward_layernorm"),
    _llama_like("phi3"),
    _llama_like("olmo"),
    _llama_like("olmo2", **_POST_NORMS, mid_norm="mlp"),
    _llama_like("starcoder2", down_proj="mlp.c_proj"),
    _llama_like("stablelm", parallel_if=("use_parallel_residual",)),
    _llama_like("cohere", mid_norm=None),
    Layout(family="bloom", **_BLOOM_BLOCK),
    Layout(family="falcon", **_BLOOM_BLOCK, parallel_if=("parallel_attn", "new_decoder_architecture"), in_place=True),
)
"""One row per family. Mixtures of experts (mixtral, qwen3_moe) have no row: their experts have no one down projection whose input
is a key. granite has none: it scales what its sublayers add."""


def layout_for(config: Any) -> Layout:
    """The row for a model's config.

    Raises:
        ModelError: the family has no row.
    """
    config = config.get_text_config()
    rows = {layout.family: layout for layout in LAYOUTS}
    if config.model_type not in rows:
        raise ModelError(
            f"The family {config.model_type!r} is not known; known are {', '.join(sorted(rows))}. "
            "Add a row to workbench/layouts.py for it."
        )
    layout = rows[config.model_type]
    if any(getattr(config, flag, False) for flag in layout.parallel_if):
        layout = replace(layout, mid_norm=None)
    return layout


def layout_of(model: Any) -> Layout:
    """The row for a model, with the paths of this very model: a multimodal wrapper's text model lies one level deeper.

    Raises:
        ModelError: the family has no row, or the model does not have the row's parts (e.g. loaded without its head).
    """
    if hasattr(model, "_orig_mod"):
        raise ModelError("A compiled model hides its blocks. Hand in the model itself (model._orig_mod).")
    layout = layout_for(model.config)
    modules = dict(model.named_modules())
    if layout.blocks not in modules:
        deeper: dict[str, Any] = {part: f"model.language_{getattr(layout, part)}" for part in ("blocks", "final_norm")}
        layout = replace(layout, **deeper)  # model.layers -> model.language_model.layers
    if layout.blocks not in modules or layout.final_norm not in modules or model.get_output_embeddings() is None:
        raise ModelError(
            f"This {type(model).__name__} has no {layout.blocks!r} and output embedding, expected a causal {layout.family} model. "
            "Load it with AutoModelForCausalLM."
        )
    return layout
