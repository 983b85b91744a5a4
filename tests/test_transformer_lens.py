"""TransformerLens, an independent implementation, gives the same logits and the same patching results on a copy of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, SAID, TURNED, tiny_lm
from workbench.hooks import run
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.noise import Noise, draw
from workbench.sites import SiteKind, window

SAMPLES, SIGMA = 3, 0.4
HOOKS: dict[SiteKind, str] = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest) -> tuple[LM, Any]:
    """A tiny model, and a bridge to a private copy of it: the bridge rewrites what it is given."""
    lm = tiny_lm(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        twin = copy.deepcopy(lm.model)
        bridge = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
    return lm, bridge


def _logits(bridge: Any, ids: Tensor, hooks: list[tuple[str, Callable[..., Tensor]]]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = bridge.run_with_hooks(ids, fwd_hooks=hooks, prepend_bos=False)
    return logits


def test_the_logits_are_the_same(pair: tuple[LM, Any]) -> None:
    lm, bridge = pair
    tokens = lm.encode([EIFFEL])
    torch.testing.assert_close(run(lm, tokens).logits, _logits(bridge, tokens.ids, []), rtol=0, atol=2e-5)


def test_every_site_reads_the_same(pair: tuple[LM, Any]) -> None:
    lm, bridge = pair
    tokens = lm.encode([EIFFEL])
    names: dict[SiteKind, str] = {
        **HOOKS,
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "mlp_post": "mlp.hook_post",
    }
    acts = run(lm, tokens, read=(*names, "z"))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens.ids, prepend_bos=False)
    for layer in range(lm.n_layers):
        for kind, name in names.items():
            torch.testing.assert_close(acts[f"L{layer}.{kind}"], cache[f"blocks.{layer}.{name}"], rtol=0, atol=5e-5)
        z = cache[f"blocks.{layer}.attn.hook_z"]
        torch.testing.assert_close(acts[f"L{layer}.z"], z.reshape(*z.shape[:2], -1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_activation_patching_with_the_same_noise_is_the_same(pair: tuple[LM, Any], width: int) -> None:
    lm, bridge = pair
    trace = CausalTrace(noise=SIGMA, samples=SAMPLES, window=width)(lm, [SAID])
    tokens = lm.encode([SAID])
    span, answer = tokens.spans[0], int(trace.extras["facts"]["answer_ids"][0])
    assert span is not None
    noise = draw(lm, Noise.parse(SIGMA), samples=SAMPLES, tokens=span[1] - span[0], seed=1).float()
    with torch.no_grad():
        _, clean = bridge.run_with_cache(tokens.ids, prepend_bos=False)

    def corrupt(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, span[0] : span[1]] += noise
        return x

    def p(hooks: list[tuple[str, Callable[..., Tensor]]]) -> float:
        logits = _logits(bridge, tokens.ids.repeat(SAMPLES, 1), [("embed.hook_out", corrupt), *hooks])
        return float(logits[:, -1].softmax(-1)[:, answer].mean())

    assert trace.extras["facts"]["corrupted"][0] == pytest.approx(p([]), abs=1e-5)
    for kind, name in HOOKS.items():
        expected = np.zeros((tokens.lengths[0], lm.n_layers))
        for position in range(tokens.lengths[0]):

            def restore(x: Tensor, hook: Any, position: int = position) -> Tensor:
                x = x.clone()
                x[:, position] = clean[hook.name][0, position]
                return x

            for layer in range(lm.n_layers):
                layers = [layer] if kind == "resid_post" else window(layer, width, lm.n_layers)
                expected[position, layer] = p([(f"blocks.{i}.{name}", restore) for i in layers])
        np.testing.assert_allclose(trace.grid(kind=kind, column="score"), expected, rtol=0, atol=1e-5)
        assert np.ptp(expected) > 1e-3


def test_its_own_patching_functions_give_the_same_map_of_a_swapped_subject(pair: tuple[LM, Any]) -> None:
    from transformer_lens import patching

    lm, bridge = pair
    trace = CausalTrace(corrupt="swap", substitutes=(TURNED,), window=1, kinds=("resid_pre", "mlp_out", "attn_out"))(
        lm, [SAID]
    )
    clean_ids, corrupted_ids = lm.encode([SAID]).ids, lm.encode([SAID.prompt.format(TURNED)]).ids
    answer = int(trace.extras["facts"]["answer_ids"][0])
    with torch.no_grad():
        _, clean = bridge.run_with_cache(clean_ids, prepend_bos=False)

        def metric(logits: Tensor) -> Tensor:
            return logits[0, -1].softmax(-1)[answer]

        maps: dict[SiteKind, Tensor] = {
            "resid_pre": patching.get_act_patch_resid_pre(bridge, corrupted_ids, clean, metric),
            "mlp_out": patching.get_act_patch_mlp_out(bridge, corrupted_ids, clean, metric),
            "attn_out": patching.get_act_patch_attn_out(bridge, corrupted_ids, clean, metric),
        }
    for kind, expected in maps.items():
        here = trace.grid(kind=kind, column="score").to_numpy().T
        np.testing.assert_allclose(here, expected.numpy(), rtol=0, atol=1e-5)
        assert np.ptp(here) > 1e-3
