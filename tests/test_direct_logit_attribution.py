"""Direct logit attribution: the parts sum to the logit, and are what TransformerLens says they are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from tests.examples import EIFFEL, SAID, fresh_lm, tiny_lm
from workbench.directions import frozen_direction, post_norm
from workbench.hooks import Activations, run
from workbench.locators.direct_logit_attribution import DirectLogitAttribution
from workbench.models import LM
from workbench.results import Footprint
from workbench.sites import Site


def whole_rows(here: Footprint) -> float:
    """Sum over the components that make the residual stream, and the constant."""
    table = here.table[here.table["kind"] != "z"]
    assert table["head"].isna().all()
    return float(table["value"].sum() + here.extras["facts"]["constant"][0])


def before_cap(lm: LM, read: Activations) -> torch.Tensor:
    """The model's own logits at the prompt's last token, a softcap undone."""
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    logits = read.last_logits[0].double()
    return logits if cap is None else torch.atanh(logits / cap) * cap


def test_all_parts_sum_to_the_models_own_logit(lm: LM) -> None:
    logits = before_cap(lm, run(lm, lm.encode([EIFFEL])))
    answer = lm.target_ids(EIFFEL.text, EIFFEL.target_true)[0]
    foil = lm.target_ids(EIFFEL.text, EIFFEL.target_new or "")[0]
    cases = (
        (DirectLogitAttribution(centred=False), logits[answer]),
        (DirectLogitAttribution(), logits[answer] - logits.mean()),
        (DirectLogitAttribution(score="logit_diff"), logits[answer] - logits[foil]),
        (DirectLogitAttribution(score="logit_diff", centred=False), logits[answer] - logits[foil]),
    )
    for locator, expected in cases[: 2 if foil == answer else 4]:  # a tokenizer may begin both with the same token
        here = locator(lm, [EIFFEL])
        scale = max(float(logits.abs().max()), float(here.table["value"].abs().max()))
        assert whole_rows(here) == pytest.approx(float(expected), rel=0, abs=1e-5 * scale)
        assert here.extras["facts"]["clean"][0] == pytest.approx(float(expected), rel=0, abs=1e-5 * scale)
        assert here.extras["facts"]["foil"][0] == ("Rome" if locator.score == "logit_diff" else "")


def test_heads_and_the_projections_bias_sum_to_attention(lm: LM) -> None:
    here = DirectLogitAttribution()(lm, [SAID])
    tokens, top = lm.encode([SAID]), Site(layer=lm.n_layers - 1, kind="resid_post")
    last = tokens.lengths[0] - 1
    state = run(lm, tokens, read=[top])[top][:, last]
    directions, _ = frozen_direction(lm, state, [int(here.extras["facts"]["answer_ids"][0])], centred=True)
    heads = here.of(kind="z")
    assert len(heads) == lm.n_layers * lm.n_heads
    for layer, value in here.of(kind="attn_out")["value"].reset_index(drop=True).items():
        bias = getattr(lm.part(int(str(layer)), lm.layout.o_proj), "bias", None)
        left_over = 0.0 if bias is None else float(directions[0, 0] @ bias.detach().double())
        total = heads[heads["layer"] == layer]["value"].sum() + left_over
        assert total == pytest.approx(value, rel=0, abs=1e-5 * here.table["value"].abs().max())


def test_a_heads_part_is_what_attention_lacks_without_it(lm: LM) -> None:
    if post_norm(lm, 0, "attn_out") is not None:
        pytest.skip("without a head the norm behind the projection divides by another number")
    here = DirectLogitAttribution(centred=False)(lm, [SAID])
    tokens, top = lm.encode([SAID]), Site(layer=lm.n_layers - 1, kind="resid_post")
    last = tokens.lengths[0] - 1
    clean = run(lm, tokens, read=[top, "attn_out"])
    directions, _ = frozen_direction(lm, clean[top][:, last], [int(here.extras["facts"]["answer_ids"][0])])
    for layer, head in ((0, 1), (2, 3)):
        site = Site(layer=layer, kind="attn_out")
        without = run(lm, tokens, read=[site], write={Site(layer=layer, kind="z", head=head): torch.zeros(1)})
        lacking = (clean[site] - without[site])[0, last].double() @ directions[0, 0]
        rows = here.of(kind="z")
        value = rows[(rows["layer"] == layer) & (rows["head"] == head)]["value"].item()
        assert value == pytest.approx(float(lacking), rel=0, abs=1e-5 * here.table["value"].abs().max())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformer_lens_splits_the_logit_alike(family: str) -> None:
    """Its library folds the norms into the weights and centres the unembedding; the parts must not depend on that."""
    lm = tiny_lm(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        twin = copy.deepcopy(lm.model)
        bridge: Any = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
        bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)  # z as it is here
        bridge.set_use_attn_result(True)
    here = DirectLogitAttribution()(lm, [SAID])
    answer = int(here.extras["facts"]["answer_ids"][0])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(lm.encode([SAID]).ids, prepend_bos=False)
        stack, labels = cache.decompose_resid(return_labels=True, pos_slice=-1)
        parts = dict(zip(labels, cache.logit_attrs(stack, tokens=answer, pos_slice=-1)[:, 0].tolist(), strict=True))
        heads = cache.logit_attrs(cache.stack_head_results(pos_slice=-1), tokens=answer, pos_slice=-1)[:, 0].tolist()
    for kind in ("attn_out", "mlp_out"):
        expected = [parts[f"{layer}_{kind}"] for layer in range(lm.n_layers)]
        assert here.of(kind=kind)["value"].tolist() == pytest.approx(expected, rel=0, abs=1e-5)
    assert here.of(kind="embed")["value"].item() == pytest.approx(parts["embed"] + parts.get("pos_embed", 0), abs=1e-5)
    assert here.of(kind="z")["value"].tolist() == pytest.approx(heads, rel=0, abs=1e-5)


def test_centred_parts_do_not_see_what_raises_all_logits_alike() -> None:
    lm = fresh_lm("gptj")
    plain, centred = DirectLogitAttribution(centred=False), DirectLogitAttribution()
    before = [locator(lm, [SAID]).table["value"] for locator in (plain, centred)]
    with torch.no_grad():
        lm.unembed.get_parameter("weight").add_(torch.randn(1, lm.d_model, generator=torch.Generator().manual_seed(0)))
    after = [locator(lm, [SAID]).table["value"] for locator in (plain, centred)]
    assert (before[0] - after[0]).abs().max() > 0.1
    assert (before[1] - after[1]).abs().max() < 1e-4


def test_the_foil_is_the_best_other_token_where_the_fact_names_none(gpt2: LM) -> None:
    here = DirectLogitAttribution(score="logit_diff")(gpt2, [SAID])
    best, second = run(gpt2, gpt2.encode([SAID])).last_logits[0].topk(2)[0].tolist()
    assert here.extras["facts"]["clean"][0] == pytest.approx(best - second, abs=1e-4)


def test_everything_is_at_the_prompts_last_token(gpt2: LM) -> None:
    table = DirectLogitAttribution()(gpt2, [SAID]).table
    last = gpt2.encode([SAID]).lengths[0] - 1
    assert set(table["position"]) == {last}
    assert table["site"].tolist()[:2] == [f"embed@{last}", f"L0.attn_out@{last}"]
    assert table["site"].iloc[-1] == f"L3.z[3]@{last}"
