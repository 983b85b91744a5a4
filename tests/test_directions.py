"""A logit is a linear function of the state once the norms' divisors are frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from einops import einsum
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from tests.examples import SAID, fresh_lm
from tests.tiny_models import tiny_tokenizer
from workbench.directions import FrozenNorm, frozen_direction, frozen_norm, post_norm, unembedding
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.metrics import lens_logits
from workbench.models import LM

TOKENS = [3, 17, 40]


def last_states(lm: LM) -> Tensor:
    """What leaves the last block at every token of a prompt."""
    states: Tensor = run(lm, lm.encode([SAID]), read=[f"L{lm.n_layers - 1}.resid_post"])[
        f"L{lm.n_layers - 1}.resid_post"
    ][0]
    return states


def uncapped(lm: LM, logits: Tensor) -> Tensor:
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    return logits.double() if cap is None else torch.atanh(logits.double() / cap) * cap


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def test_directions_read_the_models_own_logits(lm: LM) -> None:
    states = last_states(lm)
    logits = uncapped(lm, lens_logits(lm, states))
    for centred in (False, True):
        directions, constants = frozen_direction(lm, states, TOKENS, centred=centred)
        assert directions.shape == (len(states), len(TOKENS), lm.d_model)
        read = einsum(directions, states.double(), "row token d_model, row d_model -> row token") + constants
        expected = logits - logits.mean(-1, keepdim=True) if centred else logits
        assert close(read, expected[:, TOKENS])


def test_the_final_norm_matters(lm: LM) -> None:
    """Reading a state without it gives other numbers."""
    states = last_states(lm)
    weight, bias = unembedding(lm, TOKENS)
    assert not close(states.double() @ weight.double().T + bias, uncapped(lm, lens_logits(lm, states))[:, TOKENS], 1e-2)


def test_the_unembedding_reads_the_norms_output(lm: LM) -> None:
    states = last_states(lm)
    weight, bias = unembedding(lm)
    assert weight.shape == (lm.d_vocab, lm.d_model)
    assert close(lm.final_norm(states).double() @ weight.double().T + bias, uncapped(lm, lens_logits(lm, states)))
    some, some_bias = unembedding(lm, slice(5, 9))
    assert some.equal(weight[5:9])
    assert some_bias.equal(bias[5:9])


class Offset(nn.Module):
    """A norm that subtracts the mean and then another number."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.square().mean(-1, keepdim=True).sqrt() - x.amax(-1, keepdim=True)


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_pieces_sum_to_what_the_norm_gives(make: Any, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = make(width, eps=0.5)
    for parameter in norm.parameters():
        parameter.data = torch.randn(width, generator=generator)
    pieces = torch.randn(4, 3, width, generator=generator, dtype=torch.float64)
    frozen = frozen_norm(norm, pieces.sum(1))
    assert frozen.centred is (make is nn.LayerNorm)
    whole = copy.deepcopy(norm).double()(pieces.sum(1))
    torch.testing.assert_close(frozen.push(pieces).sum(1) + frozen.offset, whole)
    reading = torch.randn(4, width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        (frozen.pull(reading) * pieces[:, 0]).sum(-1), (frozen.push(pieces)[:, 0] * reading).sum(-1)
    )


def test_by_hand() -> None:
    """gamma (2, 1), state (3, 1): mean 2, divisor 1; piece (3, 0) becomes 2 x 1.5 and 1 x -1.5."""
    norm = nn.LayerNorm(2, eps=1e-12)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.25])
    frozen: FrozenNorm = frozen_norm(norm, torch.tensor([[3.0, 1.0]]))
    assert frozen.push(torch.tensor([[3.0, 0.0]]))[0].tolist() == pytest.approx([3.0, -1.5])
    assert frozen.pull(torch.tensor([[1.0, 0.0]]))[0].tolist() == pytest.approx([1.0, -1.0])
    assert frozen.offset.tolist() == [0.5, 0.25]


def test_another_kind_of_norm_is_refused() -> None:
    with pytest.raises(ModelError, match="Offset is neither a LayerNorm nor an RMSNorm"):
        frozen_norm(Offset(), torch.tensor([[1.0, 2.0, 4.0, -3.0], [0.0, 2.0, 1.0, 1.0]]))


def test_a_narrow_opt_and_half_precision() -> None:
    tokenizer = tiny_tokenizer("byte_level_bos")
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=48, word_embed_proj_dim=20, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=80, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    narrow = LM(OPTForCausalLM(config), tokenizer, name="narrow")
    half = fresh_lm("llama")
    half.model.bfloat16()
    for lm, tolerance in ((narrow, 1e-5), (half, 2e-2)):
        states, logits = last_states(lm), run(lm, lm.encode([SAID])).logits[0]
        directions, constants = frozen_direction(lm, states, TOKENS)
        read = einsum(directions, states.double(), "row token d_model, row d_model -> row token") + constants
        assert close(read, logits[:, TOKENS].double(), tolerance)


def test_post_norms_are_found_where_they_are(lm: LM) -> None:
    """A sublayer's last projection gives what is added, unless a norm stands between."""
    found = run(lm, lm.encode([SAID]), read=("z", "mlp_post", "attn_out", "mlp_out"))
    for kind, inner, path in (("attn_out", "z", lm.layout.o_proj), ("mlp_out", "mlp_post", lm.layout.down_proj)):
        norm = post_norm(lm, 1, kind)  # type: ignore[arg-type]
        out = lm.part(1, path)(found[f"L1.{inner}"])
        assert close(out if norm is None else norm(out), found[f"L1.{kind}"])
    expected = lm.layout.family in ("gemma2", "gemma3_text", "olmo2")
    assert (post_norm(lm, 1, "attn_out") is not None) is expected
