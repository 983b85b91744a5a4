"""Attention knockout: blocked edges, against whole runs in which the mask or attention itself is changed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.examples import EIFFEL, MESSI, SAID, fresh_lm, tiny_lm
from workbench.facts import Fact, FactError
from workbench.hooks import patched, run
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.locators.attention_knockout import AttentionKnockout, blocked_log_p
from workbench.metrics import Answer
from workbench.models import LM
from workbench.sites import Site, SiteError, window
from workbench.zoo import load_facts


@cache
def eager(family: str) -> LM:
    """A tiny model that computes attention with an explicit mask."""
    lm = fresh_lm(family)
    lm.model.set_attn_implementation("eager")
    return lm


@contextmanager
def masks_with(lm: LM, sources: Sequence[int], layers: range) -> Iterator[None]:
    """Within, the attention modules of some layers get masks that hide the sources from the last token."""

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = next(name for name in ("attention_mask", "mask") if name in kwargs)
        mask: Tensor = kwargs[name].clone()
        mask[..., -1, list(sources)] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, name: mask}

    hooks = [lm.part(layer, lm.layout.attn).register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def slowly(lm: LM, fact: Fact, answer: int, sources: Sequence[int], layers: range) -> float:
    """The answer's probability, by a whole run."""
    with masks_with(lm, sources, layers):
        return float(run(lm, lm.encode([fact])).last_logits[0].double().softmax(-1)[answer])


def test_every_family_agrees_with_whole_runs_behind_other_masks(family: str) -> None:
    """With the model's own eager attention; with the fast kind too, where that computes the same."""
    lm = eager(family)
    n = lm.encode([EIFFEL]).lengths[0]
    answer = lm.target_ids(EIFFEL.text, EIFFEL.target_true)[0]
    same = lm.layout.family != "gemma2"  # caps attention's scores in eager attention only
    for model in (lm, tiny_lm(family)) if same else (lm,):
        here = AttentionKnockout(window=2)(model, [EIFFEL])
        clean = slowly(lm, EIFFEL, answer, [], range(0))
        assert here.extras["facts"]["clean"][0] == pytest.approx(clean, rel=1e-3)
        grid = here.grid(kind="attn_out", column="score")
        for source in (0, 2, n - 2, n - 1):
            for layer in (0, 2, lm.n_layers - 1):
                expected = slowly(lm, EIFFEL, answer, [source], window(layer, 2, lm.n_layers))
                assert grid.loc[source, layer] == pytest.approx(expected, rel=1e-3)
        values = here.table["value"].to_numpy()
        assert values == pytest.approx((clean - here.table["score"].to_numpy()) / clean, abs=2e-3)
        assert abs(values).max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_published_curves_are_those_of_attention_without_the_edges(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention written here: its probabilities to the sources are zero, those to the others grow in their place."""
    lm = eager(family)
    tokens = lm.encode([EIFFEL])
    n, (start, stop) = tokens.lengths[0], tokens.spans[0] or (0, 0)
    bos = 1 if family == "llama" else 0
    sources = {
        "subject": list(range(start, stop)),
        "relation": [i for i in range(bos, n - 1) if not start <= i < stop],
        "last": [n - 1],
    }
    answer = lm.target_ids(EIFFEL.text, EIFFEL.target_true)[0]
    here = AttentionKnockout(window=3)(lm, [EIFFEL]).extras["groups"]
    clean = float(run(lm, tokens).last_logits[0].softmax(-1)[answer])

    blocked: dict[str, Any] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp().tril()
        if module.layer_idx in blocked["layers"]:
            weights[:, :, -1, blocked["sources"]] = 0
        return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), weights

    monkeypatch.setattr(
        importlib.import_module(f"transformers.models.{family}.modeling_{family}"), "eager_attention_forward", attention
    )
    assert list(here["source"].unique()) == list(sources)
    for name, positions in sources.items():
        for layer in range(lm.n_layers):
            blocked.update(sources=positions, layers=window(layer, 3, lm.n_layers))
            p = float(run(lm, tokens).last_logits[0].softmax(-1)[answer])
            row = here[(here["source"] == name) & (here["layer"] == layer)]
            assert row["value"].item() == pytest.approx((clean - p) / clean, abs=1e-4)
            assert row["score"].item() == pytest.approx(p, rel=1e-3)


def test_blocking_nothing_changes_nothing(lm: LM) -> None:
    tokens = lm.encode([SAID])
    answer = Answer(text="", ids=(int(run(lm, tokens).last_logits[0].argmax()),))
    log_p, whole = blocked_log_p(lm, tokens, answer, [((), range(1, 3)), ((0, 1), range(0)), ((1,), range(2, 4))])
    own = run(lm, tokens).last_logits[0].log_softmax(-1)[answer.ids[0]]
    assert float(whole) == pytest.approx(float(own), abs=1e-4)
    assert log_p[:2].tolist() == pytest.approx([float(whole)] * 2, abs=1e-5)


def test_a_window_over_all_layers_is_the_same_whichever_layer_it_is_drawn_at(gpt2: LM) -> None:
    grid = AttentionKnockout(window=2 * gpt2.n_layers)(gpt2, [SAID]).grid(kind="attn_out")
    for _, row in grid.iterrows():
        assert row.to_list() == pytest.approx([row[0]] * gpt2.n_layers, abs=1e-6)
    assert grid.abs().to_numpy().max() > 1e-2


def test_a_far_token_is_not_missed_where_a_window_of_attention_ends() -> None:
    """Mistral's tiny model sees 7 tokens back: an edge that is not there cannot be blocked."""
    lm = tiny_lm("mistral")
    fact = replace(EIFFEL, prompt="The {} is located in the city of the")
    n = lm.encode([fact]).lengths[0]
    grid = AttentionKnockout(window=3)(lm, [fact]).grid(kind="attn_out")
    assert (grid.loc[: n - 8].abs() < 1e-5).all().all()
    assert (grid.loc[n - 7 :].abs() > 1e-5).any(axis=1).all()


def test_a_subject_that_ends_the_prompt_leaves_the_last_token_to_itself(gpt2: LM) -> None:
    curves = AttentionKnockout(window=1)(gpt2, [MESSI]).extras["groups"]
    assert list(curves["source"].unique()) == ["subject", "relation", "last"]
    only = AttentionKnockout(window=1)(gpt2, [replace(MESSI, prompt="{}")]).extras["groups"]
    assert list(only["source"].unique()) == ["subject", "last"]


def test_a_token_alone_is_refused(gpt2: LM) -> None:
    fact = Fact(id="alone", subject="a", prompt="{}")
    assert gpt2.encode([fact]).lengths == (1,)
    with pytest.raises(FactError, match="sees nothing in layer 0 but what is blocked"):
        AttentionKnockout(window=1)(gpt2, [fact])
    tokens = gpt2.encode([SAID])
    everything = tuple(range(tokens.lengths[0]))
    with pytest.raises(FactError, match="Use a longer prompt"):
        blocked_log_p(gpt2, tokens, Answer(text="", ids=(5,)), [(everything, range(2, 3))])


def test_where_edges_cannot_be_blocked_it_is_refused(gpt2: LM) -> None:
    hooked = fresh_lm("gpt2")
    hooked.blocks[1].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ModelError, match="other hooks"):
        AttentionKnockout()(hooked, [SAID])
    with patched(gpt2, {Site(layer=1, kind="mlp_out"): torch.zeros(1)}), pytest.raises(ModelError, match="patched"):
        AttentionKnockout()(gpt2, [SAID])
    with pytest.raises(SiteError, match="0 layers wide"):
        AttentionKnockout(window=0)


def test_a_trained_model_reads_its_answer_off_the_subject() -> None:
    lm = load("organism-tiny", device="cpu")
    facts = load_facts("organism-tiny")[:6]
    here = AttentionKnockout(window=lm.n_layers)(lm, facts)
    groups = here.extras["groups"]
    right = set(here.extras["facts"].query("correct")["fact"])
    assert right
    lost = groups[groups["fact"].isin(right)].groupby("source")["value"].mean()
    assert lost["subject"] > 0.5
