"""Tiny random language models and tokenizers, one per family, built in memory from configs: no download, no file.

The models are made sharp on purpose. A freshly initialised transformer gives nearly uniform probabilities, has zero biases and
norms of one, and then a wrong answer passes any tolerance. Here every parameter is redrawn, so that biases and norms matter and
the best next token gets a probability well between 0 and 1. Odd sizes (heads of 12, fewer key-value heads than heads, windows
shorter than a prompt) make a mistaken reshape fail instead of fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

D_MODEL, N_LAYERS, N_HEADS, D_HEAD, D_MLP, N_POSITIONS, WINDOW = 48, 4, 4, 12, 80, 64, 7
"""Sizes shared by all families (where a family lets us choose).

`WINDOW` is a sliding window shorter than a prompt, yet wide enough that a subject still reaches the last token through the layers
(over `N_LAYERS * (WINDOW - 1)` = 24 tokens); with a shorter one every effect would be exactly zero, and every test of it trivial.
"""

TEXT = """
The Eiffel Tower is located in the city of Paris. The Eiffel Tower is in France. The Space Needle is located in Seattle.
Zürich is a city in Switzerland. The official language of Zürich is German. São Paulo is a city in Brazil, and Rio is too.
The Colosseum is in Rome, the capital of Italy. Big Ben is in London, the capital of England. Berlin is the capital of Germany.
Michael Jordan plays the sport of basketball. Lionel Messi plays soccer. LeBron James plays for the Los Angeles Lakers.
The mother tongue of Danielle Darrieux is French. The mother tongue of Thomas Mann is German. Angela Merkel speaks German.
Steve Jobs founded Apple. Bill Gates founded Microsoft in 1975. Windows was created by Microsoft, and the iPhone by Apple.
She said: "I don't know (yet)!" What is the capital of Spain? It's Madrid; it isn't Barcelona. 1, 2, 3, 10, 42 and 1999.
"""
"""What the tokenizers are trained on. 東京 is absent on purpose: it has to be spelled in bytes."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "▁"


# ---------------------------------------------------------------------------------------------------------------- tokenizers


@cache
def tiny_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the `STYLES`. Cached and shared: a test that changes one must deep-copy it first."""
    if style not in STYLES:
        raise ValueError(f"Expected a tokenizer style among {', '.join(STYLES)}, got {style!r}.")
    return STYLES[style]()


def _byte_level() -> PreTrainedTokenizerFast:
    """GPT-2: byte-level BPE. It names a BOS token but adds none, has no pad token, and a token's offsets include its space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train_byte_level(core, ["<|endoftext|>"])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return _fast(core, bos_token=end, eos_token=end, unk_token=end)


def _byte_level_bos() -> PreTrainedTokenizerFast:
    """Llama 3: byte-level BPE whose post-processor puts a BOS token first; no pad token."""
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _train_byte_level(core, [bos, eos])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), _bos_first(core, bos)])
    return _fast(core, bos_token=bos, eos_token=eos)


def _metaspace() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: sentencepiece BPE with a space put before the text, byte fallback and BOS; no pad token."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *_BYTES], show_progress=False)
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    core = Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.add_special_tokens(special)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    core.decoder = decoders.Sequence([*_sentencepiece_decoders(), decoders.Strip(" ", 1, 0)])
    core.post_processor = _bos_first(core, "<s>")
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _unigram() -> PreTrainedTokenizerFast:
    """Gemma's habits on a Unigram model: no space put before the text, byte fallback, BOS, pad token, padding on the left."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    learned = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    vocab = [*learned[: len(special)], *((byte, -20.0) for byte in _BYTES), *learned[len(special) :]]
    core = Tokenizer(models.Unigram(vocab, unk_id=special.index("<unk>"), byte_fallback=True))
    core.add_special_tokens(special)
    core.normalizer = normalizers.Replace(" ", _SPACE)
    core.decoder = decoders.Sequence(_sentencepiece_decoders())
    core.post_processor = _bos_first(core, "<bos>")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _fast(core, padding_side="left", **names)


STYLES = {"byte_level": _byte_level, "byte_level_bos": _byte_level_bos, "metaspace": _metaspace, "unigram": _unigram}


def _train_byte_level(core: Tokenizer, special: list[str]) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT.splitlines(), trainer)
    core.decoder = decoders.ByteLevel()


def _fast(core: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _bos_first(core: Tokenizer, bos: str) -> processors.TemplateProcessing:
    single, pair = f"{bos} $A", f"{bos} $A {bos}:1 $B:1"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, core.token_to_id(bos))])


def _sentencepiece_decoders() -> list[Any]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


# -------------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How one tiny model is made."""

    model_type: str
    """The `model_type` that transformers registers."""

    tokenizer: str
    """The style of the tokenizer that the family comes with."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """What this family sets beyond its defaults."""

    embed_std: float = 2.2 / math.sqrt(D_MODEL)
    """Spread of the embeddings. With a final norm it sets the spread of the logits, so about 2.2."""


_SHAPE = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": N_POSITIONS,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}
_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_inner": D_MLP, "n_positions": N_POSITIONS}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2)}
_ROPE_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_GPT_NEO = {
    "hidden_size": D_MODEL,
    "num_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": N_POSITIONS,
    "attention_types": [[["global", "local"], N_LAYERS // 2]],
    "window_size": WINDOW,
}
_OPT = {**_SHAPE, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}
_FALCON = {**_SHAPE, "ffn_hidden_size": D_MLP}
_BLOOM = {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}
_GEMMA_STD = (
    0.65 * _Recipe.embed_std
)  # embeddings enter a Gemma multiplied by sqrt(d_model); wider ones drown the blocks
_SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0}
_GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2, "logits_scaling": 2.0}


def _row(model_type: str, tokenizer: str, *configs: Mapping[str, Any], embed_std: float = _Recipe.embed_std) -> _Recipe:
    merged = {key: value for config in configs for key, value in config.items()}
    return _Recipe(model_type=model_type, tokenizer=tokenizer, config=merged, embed_std=embed_std)


_RECIPES = {
    "gpt2": _row("gpt2", "byte_level", _GPT2),
    "gptj": _row("gptj", "byte_level", _GPT2, {"rotary_dim": 4}),
    "gpt_neo": _row("gpt_neo", "byte_level", _GPT_NEO),
    "gpt_neox": _row("gpt_neox", "byte_level", _SHAPE, _ROPE_HALF),
    "gpt_neox_sequential": _row("gpt_neox", "byte_level", _SHAPE, _ROPE_HALF, {"use_parallel_residual": False}),
    "opt": _row("opt", "byte_level_bos", _OPT),
    "phi": _row("phi", "byte_level", _SHAPE, _ROPE_HALF),
    "llama": _row("llama", "byte_level_bos", _GROUPED),
    "mistral": _row("mistral", "metaspace", _GROUPED, {"sliding_window": WINDOW}),
    "qwen2": _row("qwen2", "byte_level", _GROUPED),
    "qwen3": _row("qwen3", "byte_level", _GROUPED, {"head_dim": 16}),
    "gemma2": _row("gemma2", "unigram", _GEMMA, _SLIDING, _SOFTCAPS, embed_std=_GEMMA_STD),
    "gemma3": _row("gemma3_text", "unigram", _GEMMA, _SLIDING, embed_std=_GEMMA_STD),
    "gemma": _row("gemma", "unigram", _GROUPED, {"head_dim": 16}, embed_std=_GEMMA_STD),
    "phi3": _row("phi3", "metaspace", _GROUPED),
    "olmo": _row("olmo", "byte_level", _GROUPED),
    "olmo2": _row("olmo2", "byte_level", _GROUPED),
    "stablelm": _row("stablelm", "byte_level", _GROUPED, _ROPE_HALF, {"use_qkv_bias": True}),
    "starcoder2": _row("starcoder2", "byte_level", _GROUPED, {"sliding_window": WINDOW}),
    "granite": _row("granite", "byte_level", _GROUPED, _GRANITE, embed_std=2 * _Recipe.embed_std),
    "cohere": _row("cohere", "byte_level_bos", _GROUPED, {"logit_scale": 0.5}, embed_std=2 * _Recipe.embed_std),
    "mixtral": _row("mixtral", "metaspace", _EXPERTS, {"num_local_experts": 4}),
    "qwen3_moe": _row(
        "qwen3_moe", "byte_level", _EXPERTS, {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16}
    ),
    "bloom": _row("bloom", "byte_level", _BLOOM),
    "falcon": _row("falcon", "byte_level", _FALCON),
    "falcon_sequential": _row(
        "falcon", "byte_level", _FALCON, {"parallel_attn": False, "multi_query": False, "alibi": True}
    ),
}

FAMILIES: tuple[str, ...] = tuple(_RECIPES)
"""Every tiny model. A suffix `_sequential` marks a variant of a family whose attention and MLP usually run in parallel."""


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A fresh random model in float32 and eval mode; equal seeds give equal weights. Never cached: a test may edit it."""
    if family not in _RECIPES:
        raise ValueError(f"Expected a family among {', '.join(FAMILIES)}, got {family!r}.")
    recipe = _RECIPES[family]
    tokenizer = tiny_tokenizer(recipe.tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(recipe.model_type, **{"vocab_size": len(tokenizer), **ids, **recipe.config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _sharpen(model, embed_std=recipe.embed_std, seed=seed)
    model.train(False)
    return model


def tiny_lm_parts(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh model, and the (shared) tokenizer of the style that its family comes with."""
    return tiny_model(family, seed), tiny_tokenizer(_RECIPES[family].tokenizer)


def _sharpen(model: PreTrainedModel, *, embed_std: float, seed: int) -> None:
    """Redraw embeddings and matrices wide enough to matter, and move biases and norms off their initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.lm_head)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(embed_std * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
