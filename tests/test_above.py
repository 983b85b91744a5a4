"""From a block on, the model gives what it gives as a whole: logits, gradients, and with something beside a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, FACTS, fresh_lm
from workbench.above import Above
from workbench.hooks import beside, patched, run
from workbench.models import LM, Tokens
from workbench.sites import Site


def last(tokens: Tokens) -> tuple[Tensor, Tensor]:
    return torch.arange(len(tokens)), tokens.last


def test_the_upper_blocks_alone_give_the_models_logits(lm: LM) -> None:
    tokens = lm.encode(FACTS)
    whole = run(lm, tokens).logits
    for layer in (0, lm.n_layers // 2, lm.n_layers - 1):
        above = Above(lm, tokens, layer)
        for _ in range(2):  # the first pass leaves nothing behind that the second would meet
            torch.testing.assert_close(above.logits(*last(tokens)), whole[last(tokens)], rtol=0, atol=1e-5)


def test_gradients_of_what_is_written_are_the_whole_models(lm: LM) -> None:
    tokens = lm.encode(FACTS)
    layer = lm.n_layers // 2
    delta = torch.full((lm.d_model,), 0.01, requires_grad=True)

    def add(x: Tensor) -> Tensor:
        return x + delta.to(x)

    whole = run(lm, tokens, write={Site(layer=layer, kind="mlp_out"): add}, grad=True).logits[last(tokens)]
    above = Above(lm, tokens, layer).logits(*last(tokens), write={"mlp_out": add})
    expected, found = (torch.autograd.grad(x.log_softmax(-1)[:, 7].sum(), [delta])[0] for x in (whole, above))
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 3])
def test_what_stands_beside_a_module_above_is_told_the_prompts(layer: int) -> None:
    lm = fresh_lm("gpt2")
    tokens = lm.encode([EIFFEL])
    path = f"transformer.h.{layer}.mlp.c_proj"

    def side(x: Tensor, y: Tensor, at: Tokens | None) -> Tensor:
        assert at is not None
        return y + torch.where(at.at("subject_last")[..., None], 1.0, 0.0)

    above = Above(lm, tokens, 1)
    with beside(lm, [(path, side)]):
        torch.testing.assert_close(above.logits(*last(tokens)), run(lm, tokens).last_logits, rtol=0, atol=1e-5)


def test_what_is_patched_below_counts_as_it_was_when_it_was_made() -> None:
    lm = fresh_lm("gpt2")
    tokens = lm.encode([EIFFEL])
    with patched(lm, {Site(layer=0, kind="mlp_out"): lambda x: 2 * x}):
        above, there = Above(lm, tokens, 2), run(lm, tokens).last_logits
    assert (there - run(lm, tokens).last_logits).abs().max() > 1e-3
    torch.testing.assert_close(above.logits(*last(tokens)), there, rtol=0, atol=1e-5)


def test_a_pass_of_other_prompts_before_leaves_no_shape_behind() -> None:
    """OPT's MLP sees the tokens of all prompts in one dimension, and learns from the pass how many prompts there are."""
    lm = fresh_lm("opt")
    some, others = lm.encode([EIFFEL]), lm.encode(FACTS)
    path = f"{lm.layout.blocks}.2.{lm.layout.down_proj}"

    def side(x: Tensor, y: Tensor, at: Tokens | None) -> Tensor:
        assert at is not None
        return y + torch.where(at.at("subject_last")[..., None], 1.0, 0.0)

    with beside(lm, [(path, side)]):
        expected = run(lm, some).last_logits
        above = Above(lm, some, 2)
        run(lm, others)
        torch.testing.assert_close(above.logits(*last(some)), expected, rtol=0, atol=1e-5)


def test_hooks_of_others_above_the_blocks_count() -> None:
    lm = fresh_lm("gpt2")
    tokens = lm.encode(FACTS)
    plain = run(lm, tokens).last_logits

    def halve(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / 2

    lm.final_norm.register_forward_hook(halve)
    expected = run(lm, tokens).last_logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(Above(lm, tokens, 2).logits(*last(tokens)), expected, rtol=0, atol=1e-5)
