"""TransformerLens on a private copy: the same logits, an untouched model, and one copy at a time."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from tests.examples import EIFFEL, TRACED, fresh_lm, tiny_lm
from tests.tiny_models import tiny_lm_parts
from workbench import lens_bridge
from workbench.hooks import patched, run
from workbench.layouts import ModelError
from workbench.lens_bridge import bridged, logits, release
from workbench.models import LM
from workbench.sites import Site

OTHER_LOGITS = ("falcon_sequential",)
"""What TransformerLens 4.3 gets wrong: a Falcon with ALiBi whose attention and MLP follow each other."""


@pytest.mark.parametrize("family", [family for family in TRACED if family not in OTHER_LOGITS])
def test_the_copy_gives_the_models_logits(family: str) -> None:
    lm = tiny_lm(family)
    tokens = lm.encode([EIFFEL])
    with bridged(lm) as bridge:
        here = logits(bridge, tokens)
    torch.testing.assert_close(here, run(lm, tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", OTHER_LOGITS)
def test_a_copy_that_gives_other_logits_is_refused(family: str) -> None:
    with (
        pytest.raises(ModelError, match=r"gives logits that are off by 0\.\d+, expected at most 0\.0001"),
        bridged(tiny_lm(family)),
    ):
        pass


def test_a_model_that_the_library_does_not_know_is_refused() -> None:
    class Stranger(GPT2LMHeadModel):
        pass

    model, tokenizer = tiny_lm_parts("gpt2")
    stranger = Stranger._from_config(model.config)  # type: ignore[no-untyped-call]  # of transformers
    with pytest.raises(ModelError, match="makes no bridge to gpt2"), bridged(LM(stranger, tokenizer)):
        pass


def test_the_model_stays_what_it_was(tmp_path: Path) -> None:
    lm = fresh_lm("llama")
    tokens = lm.encode([EIFFEL])
    before, names = run(lm, tokens).logits, [name for name, _ in lm.model.named_modules()]
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    attention = lm.model.config._attn_implementation
    with bridged(lm) as bridge:
        bridge.set_use_split_qkv_input(True)
    assert [name for name, _ in lm.model.named_modules()] == names
    assert lm.model.config._attn_implementation == attention
    assert all(value.equal(weights[name]) for name, value in lm.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    assert run(lm, tokens).logits.equal(before)
    twin = LM(copy.deepcopy(lm.model), lm.tokenizer)
    assert run(twin, tokens).logits.equal(before)
    lm.model.save_pretrained(tmp_path)
    saved = LM(AutoModelForCausalLM.from_pretrained(tmp_path), lm.tokenizer)
    assert saved.weight_hash == lm.weight_hash


def test_changed_weights_get_a_new_copy_and_others_do_not() -> None:
    lm = fresh_lm("gpt2")
    tokens = lm.encode([EIFFEL])
    with bridged(lm) as first, bridged(lm) as again:
        assert again is first
    weight = lm.part(1, lm.layout.down_proj).get_parameter("weight")
    kept = weight.detach().clone()
    for factor in (1.5, 1.0):
        weight.data.copy_(factor * kept)
        with bridged(lm) as changed:
            assert changed is not first
            torch.testing.assert_close(logits(changed, tokens), run(lm, tokens).logits, rtol=0, atol=1e-4)


def test_one_copy_is_held_and_it_goes_with_its_model() -> None:
    def held() -> list[Any]:
        return [bridge for _, bridge in lens_bridge._held.values()]

    release()
    lms = [fresh_lm("gpt2"), fresh_lm("gpt2", seed=1)]
    copies = []
    for lm in lms:
        with bridged(lm) as bridge:
            copies.append(weakref.ref(bridge))
    assert len(held()) == 1
    del lm, bridge
    gc.collect()
    assert [here() is None for here in copies] == [True, False]
    lms.clear()
    gc.collect()
    assert not held()
    assert copies[1]() is None


def test_release_lets_the_copy_go() -> None:
    with bridged(tiny_lm("gpt2")):
        pass
    release()
    assert not lens_bridge._held


def test_a_patched_model_is_refused(gpt2: LM) -> None:
    with (
        patched(gpt2, {Site(layer=0, kind="mlp_out"): torch.zeros(1)}),
        pytest.raises(ModelError, match=r"Leave patched\(\) first"),
        bridged(gpt2),
    ):
        pass


def test_half_precision_is_compared_in_its_own_steps() -> None:
    model, tokenizer = tiny_lm_parts("gpt2")
    lm = LM(model.bfloat16(), tokenizer)
    with bridged(lm) as bridge:
        assert next(bridge.original_model.parameters()).dtype == torch.bfloat16


def test_the_library_is_imported_only_when_it_is_needed() -> None:
    code = (
        "import sys; from workbench.locators import all_locators; assert 'CircuitEdges' in all_locators(); "
        "import workbench.lens_bridge; print('transformer_lens' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
