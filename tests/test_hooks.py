"""Reading changes nothing, writing changes what was named and nothing else, and nothing stays behind."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.examples import EIFFEL, FACTS, PARALLEL, TRACED, fresh_lm, tiny_lm
from workbench.checks import self_checks
from workbench.hooks import patched, run
from workbench.models import LM, ModelError
from workbench.sites import KINDS, Site, SiteError, SiteKind


def kinds_of(lm: LM) -> list[SiteKind]:
    """The kinds of sites that a model has."""
    return [kind for kind in KINDS if kind != "resid_mid" or not lm.layout.parallel]


def bare_logits(lm: LM) -> Tensor:
    """The model's output on a prompt, called as anybody would."""
    with torch.no_grad():
        logits: Tensor = lm.model(input_ids=lm.encode([EIFFEL]).ids).logits
    return logits


def shift(x: Tensor) -> Tensor:
    return x + 1.5 * torch.cos(torch.arange(x.shape[-1]))


# --- reading ---


def test_reading_everything_changes_no_logit(lm: LM) -> None:
    tokens = lm.encode([EIFFEL])
    assert run(lm, tokens, read=kinds_of(lm)).logits.equal(run(lm, tokens).logits)
    torch.testing.assert_close(run(lm, tokens).logits, bare_logits(lm), rtol=0, atol=1e-5)


def test_the_residual_stream_is_transformers_own_hidden_states(lm: LM) -> None:
    tokens = lm.encode([EIFFEL])
    acts = run(lm, tokens, read=("resid_pre", "resid_post"))
    with torch.no_grad():
        hidden = lm.model(input_ids=tokens.ids, output_hidden_states=True).hidden_states
    for layer in range(lm.n_layers):
        torch.testing.assert_close(acts[f"L{layer}.resid_pre"], hidden[layer], rtol=0, atol=1e-4)
        if layer:
            assert acts[f"L{layer}.resid_pre"].equal(acts[f"L{layer - 1}.resid_post"])


def test_a_block_adds_its_attention_and_its_mlp_to_the_residual(lm: LM) -> None:
    acts = run(lm, lm.encode(FACTS), read=("resid_pre", "attn_out", "mlp_out", "resid_post"))
    for layer in range(lm.n_layers):
        pre, attn, mlp, post = (acts[f"L{layer}.{kind}"] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-5, atol=1e-4)
        assert attn.abs().max() > 0.01
        assert mlp.abs().max() > 0.01


def test_writing_resid_mid_moves_the_mlps_input_and_the_residual_beside_it(lm: LM, family: str) -> None:
    if lm.layout.parallel:
        pytest.skip("a parallel block has no such site")
    tokens = lm.encode([EIFFEL])
    for layer in (0, 2):
        site = Site(layer=layer, kind="resid_mid", token=3)
        plain = run(lm, tokens, read=("resid_mid", "resid_pre", "attn_out"))
        moved = run(
            lm, tokens, read=("resid_mid", "mlp_out", "resid_post", "attn_out"), write={site: lambda x: 2 * x + 1}
        )
        before, after = plain[f"L{layer}.resid_mid"], moved[f"L{layer}.resid_mid"]
        torch.testing.assert_close(after[:, 3], 2 * before[:, 3] + 1, rtol=1e-4, atol=1e-4)
        others = [i for i in range(tokens.lengths[0]) if i != 3]
        assert after[:, others].equal(before[:, others])
        assert moved[f"L{layer}.attn_out"].equal(plain[f"L{layer}.attn_out"])
        above = after + moved[f"L{layer}.mlp_out"]
        torch.testing.assert_close(moved[f"L{layer}.resid_post"], above, rtol=1e-4, atol=1e-4)


def test_resid_mid_lies_between_the_halves_and_parallel_blocks_have_none(lm: LM, family: str) -> None:
    tokens = lm.encode(FACTS)
    assert lm.layout.parallel == (family in PARALLEL)
    if lm.layout.parallel:
        with pytest.raises(ModelError, match=r"in parallel .* Use resid_pre or resid_post\."):
            run(lm, tokens, read=("resid_mid",))
        return
    acts = run(lm, tokens, read=("resid_pre", "attn_out", "resid_mid"))
    for layer in range(lm.n_layers):
        mid = acts[f"L{layer}.resid_pre"] + acts[f"L{layer}.attn_out"]
        torch.testing.assert_close(acts[f"L{layer}.resid_mid"], mid, rtol=1e-5, atol=1e-4)


def _matrix(lm: LM, layer: int, path: str) -> tuple[Tensor, Tensor | float]:
    """The (in, out) matrix and the bias of a projection."""
    module = lm.part(layer, path)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return (weight if type(module).__name__ == "Conv1D" else weight.T).detach(), 0.0 if bias is None else bias.detach()


def _output(lm: LM, path: str, layer: int) -> list[Tensor]:
    """What a module gives, by a hook of our own."""
    seen: list[Tensor] = []
    handle = lm.part(layer, path).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    try:
        run(lm, lm.encode([EIFFEL]))
    finally:
        handle.remove()
    return seen


def test_the_sum_of_key_times_value_vectors_is_the_mlps_output(lm: LM) -> None:
    acts = run(lm, lm.encode([EIFFEL]), read=("mlp_post", "mlp_out"))
    for layer in range(lm.n_layers):
        keys = acts[f"L{layer}.mlp_post"]
        values, bias = _matrix(lm, layer, lm.layout.down_proj)
        total = sum(keys[..., i, None] * values[i] for i in range(len(values))) + bias
        (down,) = _output(lm, lm.layout.down_proj, layer)
        torch.testing.assert_close(total, down.view(keys.shape[0], keys.shape[1], -1), rtol=1e-5, atol=1e-4)
        if "layernorm" not in lm.layout.mlp_out:
            torch.testing.assert_close(total, acts[f"L{layer}.mlp_out"], rtol=1e-5, atol=1e-4)


def test_the_heads_outputs_sum_to_attentions_output(lm: LM) -> None:
    acts = run(lm, lm.encode([EIFFEL]), read=("z", "attn_out"))
    for layer in range(lm.n_layers):
        projection, bias = _matrix(lm, layer, lm.layout.o_proj)
        z = acts[f"L{layer}.z"]
        d_head = len(projection) // lm.n_heads
        total: Tensor | float = bias
        for head in range(lm.n_heads):
            columns = slice(head * d_head, (head + 1) * d_head)
            total = total + z[..., columns] @ projection[columns]
        (projected,) = _output(lm, lm.layout.o_proj, layer)
        torch.testing.assert_close(total, projected, rtol=1e-5, atol=1e-4)
        if "layernorm" not in lm.layout.attn_out:
            torch.testing.assert_close(total, acts[f"L{layer}.attn_out"], rtol=1e-5, atol=1e-4)


def test_a_head_is_its_columns_of_z(lm: LM) -> None:
    sites = [Site(layer=2, kind="z", head=head) for head in range(lm.n_heads)]
    acts = run(lm, lm.encode([EIFFEL]), read=("L2.z", *sites))
    assert torch.cat([acts[site] for site in sites], -1).equal(acts["L2.z"])


def test_a_site_that_names_a_token_is_read_at_that_token_of_each_row(gpt2: LM) -> None:
    tokens = gpt2.encode(FACTS)
    acts = run(
        gpt2, tokens, read=("L1.mlp_out", "L1.mlp_out@subject_last", "L1.mlp_out@last", "L1.mlp_out@-2", "L1.z[1]@0")
    )
    whole = acts["L1.mlp_out"]
    for row, (length, span) in enumerate(zip(tokens.lengths, tokens.spans, strict=True)):
        assert span is not None
        assert acts["L1.mlp_out@subject_last"][row].equal(whole[row, span[1] - 1])
        assert acts["L1.mlp_out@last"][row].equal(whole[row, length - 1])
        assert acts["L1.mlp_out@-2"][row].equal(whole[row, length - 2])
    assert acts["L1.z[1]@0"].shape == (len(FACTS), gpt2.d_model // gpt2.n_heads)


def test_the_logits_at_the_last_token_are_those_of_each_row(gpt2: LM) -> None:
    tokens = gpt2.encode(FACTS)
    acts = run(gpt2, tokens)
    for row, length in enumerate(tokens.lengths):
        assert acts.last_logits[row].equal(acts.logits[row, length - 1])


def test_what_was_not_read_is_named(gpt2: LM) -> None:
    acts = run(gpt2, gpt2.encode([EIFFEL]), read=("L1.mlp_out",))
    with pytest.raises(SiteError, match=r"L2\.mlp_out was not read.*read were L1\.mlp_out"):
        acts["L2.mlp_out"]


# --- writing ---


@pytest.mark.parametrize("kind", KINDS)
def test_writing_what_is_there_changes_nothing(lm: LM, kind: SiteKind) -> None:
    if kind not in kinds_of(lm):
        pytest.skip("a parallel block has no such site")
    tokens = lm.encode(FACTS)
    acts = run(lm, tokens, read=(kind,))
    for write in ({site: acts[site] for site in lm.sites(kind)}, dict.fromkeys(lm.sites(kind), torch.clone)):
        torch.testing.assert_close(run(lm, tokens, write=write).logits, acts.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_at_one_token_changes_that_token_and_what_follows_it(lm: LM, kind: SiteKind) -> None:
    if kind not in kinds_of(lm):
        pytest.skip("a parallel block has no such site")
    tokens = lm.encode([EIFFEL])
    place, layer = 4, 0 if kind == "embed" else 1
    whole, here = Site(layer=layer, kind=kind), Site(layer=layer, kind=kind, token=place)
    before = run(lm, tokens, read=(whole,))
    after = run(lm, tokens, read=(whole,), write={here: shift})
    expected = before[whole].clone()
    expected[:, place] = shift(expected[:, place])
    torch.testing.assert_close(after[whole], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.logits[:, :place], before.logits[:, :place], rtol=0, atol=1e-5)
    assert (after.logits[:, place] - before.logits[:, place]).abs().max() > 1e-3


def test_writing_one_head_changes_only_that_head(lm: LM) -> None:
    tokens = lm.encode(FACTS)
    head = Site(layer=1, kind="z", head=2, token="subject_last")
    before = run(lm, tokens, read=("L1.z",))
    after = run(lm, tokens, read=("L1.z",), write={head: torch.zeros(())})
    d_head = before["L1.z"].shape[-1] // lm.n_heads
    expected = before["L1.z"].clone()
    expected[tokens.at("subject_last"), 2 * d_head : 3 * d_head] = 0
    assert after["L1.z"].equal(expected)
    assert (after.logits - before.logits).abs().max() > 1e-4


def test_a_neuron_is_its_column_of_mlp_post(lm: LM) -> None:
    tokens, last = lm.encode(FACTS), lm.d_mlp - 1
    neuron = Site(layer=1, kind="mlp_post", neuron=last, token="subject_last")
    before = run(lm, tokens, read=("L1.mlp_post", neuron))
    assert before["L1.mlp_post"].shape[-1] == lm.d_mlp
    where = tokens.at("subject_last")
    assert before[neuron][:, 0].equal(before["L1.mlp_post"][where][:, last])
    expected = before["L1.mlp_post"].clone()
    expected[where, last] = 0
    assert run(lm, tokens, read=("L1.mlp_post",), write={neuron: torch.zeros(())})["L1.mlp_post"].equal(expected)
    with pytest.raises(SiteError, match=f"neurons 0 to {last}"):
        run(lm, tokens, read=(Site(layer=0, kind="mlp_post", neuron=last + 1),))


@pytest.mark.parametrize(
    ("kind", "reader"), [("attn_out", "resid_post"), ("mlp_out", "resid_post"), ("resid_post", "resid_post")]
)
def test_what_is_written_reaches_the_residual_stream_in_full(lm: LM, kind: SiteKind, reader: SiteKind) -> None:
    """A post-norm, or an addition in place, would change or lose it."""
    tokens, last = lm.encode([EIFFEL]), lm.n_layers - 1
    site, after = Site(layer=last, kind=kind), Site(layer=last, kind=reader)
    sequential_attn = kind == "attn_out" and not lm.layout.parallel
    write: dict[Site, object] = {site: shift}
    if sequential_attn:  # then the MLP reads what was written, and answers differently
        mlp = Site(layer=last, kind="mlp_out")
        write[mlp] = run(lm, tokens, read=(mlp,))[mlp]
    before, now = run(lm, tokens, read=(after,)), run(lm, tokens, read=(after,), write=write)  # type: ignore[arg-type]
    difference = now[after] - before[after]
    torch.testing.assert_close(difference, shift(torch.zeros_like(difference)), rtol=1e-4, atol=1e-4)


def test_restoring_every_block_of_a_corrupted_run_gives_the_clean_logits(lm: LM) -> None:
    tokens = lm.encode([EIFFEL])
    clean = run(lm, tokens, read=("resid_post", "attn_out", "mlp_out", "embed"))
    corrupt = {Site(layer=0, kind="embed", token="subject"): shift}
    assert (run(lm, tokens, write=corrupt).logits - clean.logits).abs().max() > 0.01
    last = Site(layer=lm.n_layers - 1, kind="resid_post")
    restored = run(lm, tokens, write={**corrupt, last: clean[last]})
    torch.testing.assert_close(restored.logits, clean.logits, rtol=0, atol=1e-5)
    embed = Site(layer=0, kind="embed")
    undone = run(lm, tokens, write={**corrupt, embed: clean[embed]})
    torch.testing.assert_close(undone.logits, clean.logits, rtol=0, atol=1e-5)


def test_writes_to_one_place_apply_in_the_order_given(gpt2: LM) -> None:
    tokens, site, again = gpt2.encode([EIFFEL]), Site(layer=1, kind="mlp_out"), Site(layer=1, kind="mlp_out", token=2)
    acts = run(gpt2, tokens, read=(site,), write={site: torch.ones(()), again: lambda x: 3 * x})
    assert acts[site][0, 2].eq(3).all()
    assert acts[site][0, 1].eq(1).all()
    other = run(gpt2, tokens, read=(site,), write={again: lambda x: 3 * x, site: torch.ones(())})
    assert other[site].eq(1).all()


def test_a_tensor_is_brought_to_the_models_dtype() -> None:
    lm = fresh_lm("gpt2")
    lm.model.bfloat16()
    site = Site(layer=1, kind="resid_post")
    acts = run(lm, lm.encode([EIFFEL]), read=(site,), write={site: torch.ones(lm.d_model, dtype=torch.float64)})
    assert acts[site].dtype == torch.bfloat16
    assert acts[site].eq(1).all()


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("L4.mlp_out", "layers 0 to 3"),
        ("L1.z[4]", "heads 0 to 3"),
        ("L1.mlp_out@40", "outside of a prompt"),
    ],
)
def test_places_that_the_model_does_not_have_are_refused(gpt2: LM, site: str, says: str) -> None:
    tokens = gpt2.encode([EIFFEL])
    with pytest.raises(SiteError, match=says):
        run(gpt2, tokens, read=(site,))
    with pytest.raises(SiteError, match=says):
        run(gpt2, tokens, write={Site.parse(site): torch.zeros(())})


@pytest.mark.parametrize("shape", [(47,), (1, 2, 48), (2, 1, 48), (3, 1, 1, 48)])
def test_a_tensor_of_another_shape_is_refused_and_both_shapes_are_named(gpt2: LM, shape: tuple[int, ...]) -> None:
    tokens = gpt2.encode([EIFFEL])
    with pytest.raises(SiteError, match="Expected one that broadcasts to"):
        run(gpt2, tokens, write={Site(layer=1, kind="mlp_out"): torch.zeros(shape)})
    with pytest.raises(SiteError, match="Expected one that broadcasts to"):
        run(gpt2, tokens, write={Site(layer=1, kind="mlp_out", token=1): torch.zeros(shape)})


# --- gradients ---


def test_gradients_flow_through_what_was_written_and_match_a_difference_quotient() -> None:
    lm = fresh_lm("gpt2")  # all of it in float64; a llama norms in float32
    lm.model.double()
    tokens, site = lm.encode([EIFFEL]), Site(layer=1, kind="mlp_out", token="subject_last")
    delta = torch.zeros(lm.d_model, dtype=torch.float64, requires_grad=True)
    direction = torch.cos(torch.arange(lm.d_model).double())

    def answer(step: Tensor, *, grad: bool) -> Tensor:
        return run(lm, tokens, write={site: lambda x: x + step}, grad=grad).last_logits[0, 7]

    answer(delta, grad=True).backward()
    assert delta.grad is not None
    quotient = (answer(1e-5 * direction, grad=False) - answer(-1e-5 * direction, grad=False)) / 2e-5
    torch.testing.assert_close(delta.grad @ direction, quotient, rtol=1e-5, atol=1e-8)


def test_without_gradients_asked_for_nothing_is_kept_for_backward(gpt2: LM) -> None:
    acts = run(gpt2, gpt2.encode([EIFFEL]), read=("resid_post",))
    assert not acts.logits.requires_grad
    assert not any(x.requires_grad for x in acts.sites.values())


# --- patched ---


def test_within_patched_every_pass_is_changed_and_afterwards_none(gpt2: LM) -> None:
    site = Site(layer=1, kind="mlp_out")
    before = bare_logits(gpt2)
    with patched(gpt2, {site: torch.zeros(())}):
        within = bare_logits(gpt2)
        assert run(gpt2, gpt2.encode([EIFFEL]), read=(site,))[site].eq(0).all()
    assert (within - before).abs().max() > 0.01
    assert bare_logits(gpt2).equal(before)


def test_nested_patches_both_apply_and_end_one_after_the_other(gpt2: LM) -> None:
    one, two = Site(layer=1, kind="mlp_out"), Site(layer=2, kind="attn_out")
    tokens = gpt2.encode([EIFFEL])
    both = run(gpt2, tokens, write={one: shift, two: shift}).logits
    only = run(gpt2, tokens, write={one: shift}).logits
    before = run(gpt2, tokens).logits
    with patched(gpt2, {one: shift}):
        with patched(gpt2, {two: shift}):
            assert run(gpt2, tokens).logits.equal(both)
        assert run(gpt2, tokens).logits.equal(only)
        assert run(gpt2, tokens, write={two: shift}).logits.equal(both)
    assert run(gpt2, tokens).logits.equal(before)


def test_of_two_patches_of_one_place_the_inner_one_comes_last(gpt2: LM) -> None:
    site = Site(layer=1, kind="mlp_out")
    with patched(gpt2, {site: torch.ones(())}), patched(gpt2, {site: lambda x: 2 * x}):
        assert run(gpt2, gpt2.encode([EIFFEL]), read=(site,))[site].eq(2).all()


def test_an_error_within_leaves_nothing_behind(gpt2: LM) -> None:
    before, site = bare_logits(gpt2), Site(layer=1, kind="mlp_out")

    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), patched(gpt2, {site: shift}):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        run(gpt2, gpt2.encode([EIFFEL]), write={site: broken})
    with pytest.raises(ZeroDivisionError), patched(gpt2, {site: broken}):
        bare_logits(gpt2)
    assert bare_logits(gpt2).equal(before)


def test_tokens_are_needed_where_a_site_names_one(gpt2: LM) -> None:
    site, tokens = Site(layer=1, kind="mlp_out", token="last"), gpt2.encode([EIFFEL])
    with pytest.raises(SiteError, match="Give tokens="), patched(gpt2, {site: shift}):
        pass
    with patched(gpt2, {site: shift}, tokens):
        within = bare_logits(gpt2)
    assert within.equal(run(gpt2, tokens, write={site: shift}).logits)


def test_a_pass_of_another_shape_than_the_prompts_of_the_patch_is_refused(gpt2: LM) -> None:
    site = Site(layer=1, kind="mlp_out", token="last")
    with patched(gpt2, {site: shift}, gpt2.encode([EIFFEL])), pytest.raises(SiteError, match="other prompts"):
        gpt2.model(input_ids=torch.tensor([[5]]))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "falcon"])
def test_generation_is_patched_at_every_step(family: str) -> None:
    lm = tiny_lm(family)
    tokens, site = lm.encode([EIFFEL]), Site(layer=0, kind="resid_post")

    def generate() -> list[int]:
        quiet = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        ids: Tensor = lm.model.generate(tokens.ids, attention_mask=tokens.mask.long(), **quiet)  # type: ignore[operator]
        return ids[0].tolist()

    plain = generate()
    with patched(lm, {site: torch.neg}):
        changed = generate()
        slow = tokens.ids[0].tolist()
        for _ in range(5):
            slow.append(int(lm.model(input_ids=torch.tensor([slow]), use_cache=False).logits[0, -1].argmax()))
    assert changed == slow
    assert changed != plain
    assert generate() == plain


# --- copies of a model that was used ---


@pytest.mark.parametrize("family", TRACED)
def test_a_copy_works_and_answers_to_no_plan_of_the_original(family: str) -> None:
    lm = tiny_lm(family)
    before, site = bare_logits(lm), Site(layer=1, kind="resid_post")
    run(lm, lm.encode([EIFFEL]))
    with patched(lm, {site: shift}):
        twin = LM(copy.deepcopy(lm.model), lm.tokenizer)
        assert bare_logits(twin).equal(before)
        assert run(twin, twin.encode([EIFFEL])).logits.equal(run(lm, lm.encode([EIFFEL])).logits) is False
    with patched(twin, {site: shift}):
        assert bare_logits(lm).equal(before)
        assert not bare_logits(twin).equal(before)
    self_checks(twin)
    assert twin.weight_hash == lm.weight_hash


def test_a_used_model_is_saved_and_loaded_as_ever(tmp_path: Path, lm: LM) -> None:
    run(lm, lm.encode([EIFFEL]))
    with patched(lm, {Site(layer=1, kind="resid_post"): shift}):
        lm.model.save_pretrained(tmp_path)
    again = LM(AutoModelForCausalLM.from_pretrained(tmp_path), lm.tokenizer)
    assert again.weight_hash == lm.weight_hash
    assert bare_logits(again).equal(bare_logits(lm))


def test_a_used_model_is_pickled_without_its_taps() -> None:
    lm = fresh_lm("gpt2")
    before, stream = run(lm, lm.encode([EIFFEL])).logits, io.BytesIO()
    torch.save(lm.model, stream)
    stream.seek(0)
    again = LM(torch.load(stream, weights_only=False), lm.tokenizer)
    with patched(lm, {Site(layer=1, kind="resid_post"): shift}):
        assert run(again, again.encode([EIFFEL])).logits.equal(before)


def test_names_and_state_of_a_used_model_are_those_of_a_fresh_one(family: str) -> None:
    used, fresh = tiny_lm(family), fresh_lm(family)
    run(used, used.encode([EIFFEL]), read=kinds_of(used))
    assert list(used.model.state_dict()) == list(fresh.model.state_dict())
    assert [name for name, _ in used.model.named_modules()] == [name for name, _ in fresh.model.named_modules()]


def test_two_lms_of_one_model_share_its_taps(gpt2: LM) -> None:
    other, site = LM(gpt2.model, gpt2.tokenizer), Site(layer=1, kind="resid_post")
    hooks = len(gpt2.blocks[1]._forward_hooks)
    with patched(other, {site: shift}):
        once = bare_logits(gpt2)
    assert once.equal(run(gpt2, gpt2.encode([EIFFEL]), write={site: shift}).logits)
    assert len(gpt2.blocks[1]._forward_hooks) == max(hooks, 1)
