"""Models of named shapes with random weights, and a fact to trace in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import tiny_tokenizer
from workbench.loading import load
from workbench.metrics import Answer, Score
from workbench.models import LM, Tokens
from workbench.restoring import Cell, Restoration
from workbench.sites import default_window, window


def _gpt2(n_layer: int, n_embd: int, n_head: int, **other: Any) -> Mapping[str, Any]:
    return {"model_type": "gpt2", "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, **other}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bundled": {},
    "tiny": _gpt2(4, 48, 4, vocab_size=400, bos_token_id=0, eos_token_id=0),
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-8b-slice": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}
"""Configs by name. `bundled` is no config but the trained model organism-mid; the last is 4 of Llama-3-8B's 32 layers."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One fact in one model: everything that decides what has to be computed."""

    shape: str
    """A key of `SHAPES`."""

    tokens: int = 10
    """Length T of the prompt."""

    subject: tuple[int, int] = (1, 3)
    """First and last token of the subject. Before the first, nothing is corrupted."""

    samples: int = 10
    """Noise samples N."""

    device: str = "cpu"
    """Where the model lies."""

    dtype: str = "float32"
    """Of the weights."""


def build(setup: Setup) -> LM:
    """The model, its weights drawn in place so that no second copy is ever in memory."""
    if setup.shape == "bundled":
        return load("organism-mid", device=setup.device, dtype=setup.dtype)
    settings = dict(SHAPES[setup.shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup.dtype))
    sharpen(model)
    return LM(model, tiny_tokenizer("byte_level"), name=setup.shape)


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Redraws all weights so wide that one token gets a probability well above 1 / d_vocab.

    Of a freshly initialised model all probabilities are 2e-5, and wrong maps pass any tolerance.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.empty_like(parameter).normal_(generator=generator))
        else:
            spread = 4.0 if id(parameter) in embeddings else 1.0
            parameter.normal_(0, spread / parameter.shape[-1] ** 0.5, generator=generator)


@torch.no_grad()
def pose(lm: LM, setup: Setup) -> tuple[Restoration, list[Cell]]:
    """A prompt of random tokens, noise of three times the embeddings' spread on its subject, and the cells of the three maps.

    The answer is what clean and corrupted rows together find most probable, so that no score is near zero.
    """
    generator = torch.Generator().manual_seed(1)
    first, last = setup.subject
    ids = torch.randint(lm.d_vocab, (1, setup.tokens), generator=generator)
    noise = torch.zeros(setup.samples, setup.tokens, lm.d_model)
    noise[:, first : last + 1].normal_(generator=generator)
    noise = (3 * float(lm.embed.get_parameter("weight").std()) * noise).to(lm.device, lm.dtype)
    tokens = Tokens(
        ids=ids.to(lm.device),
        mask=torch.ones_like(ids, dtype=torch.bool, device=lm.device),
        lengths=(setup.tokens,),
        spans=((first, last + 1),),
        texts=(tuple(f"t{i}" for i in range(setup.tokens)),),
    )
    embedded = lm.embed(tokens.ids)
    rows = torch.cat((embedded, embedded + noise))
    said = int(lm.model(inputs_embeds=rows).logits[:, -1].float().softmax(-1).mean(0).argmax())
    problem = Restoration(
        clean=tokens,
        corrupted=tokens.repeat(setup.samples),
        noise=noise,
        score=Score(kind="p", answer=Answer(text=f"t{said}", ids=(said,))),
    )
    width = default_window(lm.n_layers)
    cells = [
        Cell(kind=kind, layer=layer, layers=layers, position=position)
        for kind in ("resid_post", "mlp_out", "attn_out")
        for position in range(setup.tokens)
        for layer in range(lm.n_layers)
        for layers in [range(layer, layer + 1) if kind == "resid_post" else window(layer, width, lm.n_layers)]
    ]
    return problem, cells
