"""An edit is data: applied within a `with`, undone bit for bit, added, saved, merged; refused where it does not belong."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.examples import SAID, fresh_lm, tiny_lm
from workbench.edits import Change, Edit, EditError, Introducing, LowRank, Memory, added, base_of, edits_on, unedited
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.models import LM, Tokens
from workbench.store import Store

PROMPTS = ["The Eiffel Tower is in", "Steve Jobs"]


def logits(lm: LM) -> Tensor:
    return run(lm, lm.encode(PROMPTS)).logits


def edit_of(
    lm: LM, *names: str, seed: int = 0, rank: int | None = None, scale: float = 0.1, after: Sequence[Edit] = ()
) -> Edit:
    """A random change of some parameters."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for name in names:
        shape = lm.model.get_parameter(name).shape
        if rank is None:
            changes[name] = scale * torch.randn(shape, generator=generator)
        else:
            rows, columns = (torch.randn(n, rank, generator=generator) for n in shape)
            changes[name] = LowRank(rows=scale * rows, columns=columns)
    return Edit(base=base_of(lm), changes=changes, after=tuple(edit.key for edit in after), facts=(SAID,))


def dense(edit: Edit, name: str) -> Tensor:
    """The change of a parameter as a matrix."""
    change = edit.changes[name]
    return change.dense() if isinstance(change, LowRank) else change


def matrices(lm: LM) -> list[str]:
    return [name for name, parameter in lm.model.named_parameters() if parameter.ndim == 2]


@dataclass(frozen=True, kw_only=True, eq=False)
class Doubling(Memory):
    """Gives a module's output times a factor at the last prompt token."""

    factor: Tensor

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, tokens: Tokens | None) -> Tensor:
        assert tokens is not None
        return torch.where(tokens.at("last")[..., None], self.factor * y, y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Saying(Introducing):
    """Puts the same text before every prompt."""

    text: str

    def __call__(self, prompt: str) -> str:
        return self.text


# --- applied and undone ---


def test_within_the_model_is_edited_and_after_it_is_the_same_object_bit_for_bit(family: str) -> None:
    lm = tiny_lm(family)
    before, own, parameters = lm.weight_hash, logits(lm), dict(lm.model.named_parameters())
    edit = edit_of(lm, *random.Random(0).sample(matrices(lm), 3))
    with edit.on(lm):
        assert lm.weight_hash != before
        assert base_of(lm) == before
        assert not torch.equal(logits(lm), own)
        assert edits_on(lm) == (edit,)
    assert edits_on(lm) == ()
    assert lm.weight_hash == before
    assert torch.equal(logits(lm), own)
    assert all(parameter is parameters[name] for name, parameter in lm.model.named_parameters())


def test_it_is_undone_after_an_exception() -> None:
    lm = tiny_lm("llama")
    before = lm.weight_hash
    with pytest.raises(KeyError), edit_of(lm, matrices(lm)[3]).on(lm):
        raise KeyError
    assert lm.weight_hash == before
    assert edits_on(lm) == ()


def test_the_edited_model_is_the_sum_of_weight_and_change() -> None:
    lm = tiny_lm("gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"
    weight = lm.model.get_parameter(name).detach().clone()
    full, product = edit_of(lm, name), edit_of(lm, name, seed=1, rank=2)
    with full.on(lm):
        assert torch.equal(lm.model.get_parameter(name), weight + dense(full, name))
    with product.on(lm):
        change = product.changes[name]
        assert isinstance(change, LowRank)
        assert torch.equal(lm.model.get_parameter(name), weight + change.rows @ change.columns.T)
        assert lm.model.get_parameter(name).requires_grad


def test_a_tied_parameter_changes_everywhere() -> None:
    lm = tiny_lm("gpt2")
    assert lm.unembed.weight is lm.embed.weight
    with edit_of(lm, "transformer.wte.weight").on(lm):
        assert lm.unembed.weight is lm.embed.weight
        assert lm.model.get_parameter("transformer.wte.weight") is lm.embed.weight
    assert lm.unembed.weight is lm.embed.weight


def test_a_hundred_random_applies_and_undoes_leave_the_weights() -> None:
    lm, dice = fresh_lm("llama"), random.Random(3)
    before, own = lm.weight_hash, logits(lm)
    edits = [edit_of(lm, *dice.sample(matrices(lm), 2), seed=i, rank=dice.choice([None, 1])) for i in range(6)]
    edits += [
        Edit(base=before, sides=(Doubling(module="model.layers.1.mlp", factor=torch.tensor(2.0)),)),
        Edit(base=before, sides=(Saying(text="It is known that "),)),
    ]
    stacks: dict[int, ExitStack] = {}
    for _ in range(100):
        which = dice.randrange(len(edits))
        if which in stacks:
            stacks.pop(which).close()  # in any order, not only the last one first
        else:
            stacks[which] = ExitStack()
            stacks[which].enter_context(edits[which].on(lm))
        applied = [edit for edit in edits_on(lm) if edit.changes]
        assert (lm.weight_hash == before) == (not applied)
    for stack in stacks.values():
        stack.close()
    assert lm.weight_hash == before
    assert torch.equal(logits(lm), own)


def test_edits_within_each_other_add_up_and_may_be_left_in_any_order() -> None:
    lm = tiny_lm("llama")
    name = "model.layers.2.mlp.down_proj.weight"
    weight = lm.model.get_parameter(name).detach().clone()
    first, second = edit_of(lm, name), edit_of(lm, name, seed=1)
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(first.on(lm))
    inner.enter_context(second.on(lm))
    assert torch.equal(lm.model.get_parameter(name), weight + dense(first, name) + dense(second, name))
    outer.close()
    assert torch.equal(lm.model.get_parameter(name), weight + dense(second, name))
    inner.close()
    assert torch.equal(lm.model.get_parameter(name), weight)


def test_other_threads_never_see_an_edited_model() -> None:
    lm = tiny_lm("qwen2")
    own, edit, stop, wrong = logits(lm), edit_of(lm, matrices(lm)[2]), threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            if not torch.equal(logits(lm), own):
                wrong.append("edited")

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for _ in range(30):
        with edit.on(lm):
            assert not torch.equal(logits(lm), own)
    stop.set()
    for watcher in watchers:
        watcher.join()
    assert not wrong


def test_weights_are_not_changed_in_the_middle_of_a_pass() -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm, matrices(lm)[2])

    def apply(x: Tensor) -> Tensor:
        with edit.on(lm):
            return x

    with pytest.raises(RuntimeError, match="in the middle of a pass"):
        run(lm, lm.encode(PROMPTS), write={lm.sites("mlp_out")[1]: apply})


def test_an_edited_model_can_be_looked_at_as_it_was() -> None:
    lm = tiny_lm("llama")
    own, before = logits(lm), lm.weight_hash
    sides = (Doubling(module="model.layers.1.mlp", factor=torch.tensor(2.0)), Saying(text="It is known that "))
    with edit_of(lm, matrices(lm)[2]).on(lm), Edit(base=before, sides=sides).on(lm):
        edited, other = logits(lm), lm.weight_hash
        with unedited(lm):
            assert torch.equal(logits(lm), own)
            assert lm.weight_hash == before
        assert torch.equal(logits(lm), edited)
        assert lm.weight_hash == other != before
    with unedited(lm):
        assert torch.equal(logits(lm), own)


# --- beside the weights ---


def test_a_memory_stands_beside_a_module_and_nowhere_else(family: str) -> None:
    lm = tiny_lm(family)
    path = f"{lm.layout.blocks}.1.{lm.layout.down_proj}"
    own, before = logits(lm), lm.weight_hash
    once = Edit(base=before, sides=(Doubling(module=path, factor=torch.tensor(1.0)),))
    twice = Edit(base=before, sides=(Doubling(module=path, factor=torch.tensor(2.0)),))
    with once.on(lm):
        assert torch.equal(logits(lm), own)
    with twice.on(lm):
        tokens, now = lm.encode(PROMPTS), logits(lm)
        assert not torch.equal(now, own)
        earlier = tokens.at(None) & ~tokens.at("last")
        assert torch.equal(now[earlier], own[earlier])
        assert lm.weight_hash == before
    assert torch.equal(logits(lm), own)


def test_an_introduction_comes_before_the_prompt_and_the_subject_is_still_found() -> None:
    lm = tiny_lm("llama")
    edit = Edit(base=lm.weight_hash, sides=(Saying(text="Imagine that. "),))
    with edit.on(lm):
        inside = lm.encode([SAID])
    plain, (start, stop) = lm.encode([SAID]), (inside.spans[0] or (0, 0))
    assert "".join(inside.texts[0]).replace("▁", " ").strip().endswith(SAID.text)
    assert len(inside.texts[0]) > len(plain.texts[0])
    assert "".join(inside.texts[0][start:stop]).strip() == SAID.subject


def test_what_a_sided_model_gives_is_not_kept_as_its_own(tmp_path: Path) -> None:
    from workbench.locators import locate
    from workbench.locators.logit_lens import LogitLens

    lm = tiny_lm("llama")
    edit = Edit(base=lm.weight_hash, sides=(Doubling(module="model.layers.1.mlp", factor=torch.tensor(2.0)),))
    with edit.on(lm), pytest.raises(FactError, match="no store inside"):
        locate(LogitLens(), lm, [SAID], store=Store(folder=tmp_path))


# --- added ---


def test_a_sum_is_one_after_the_other() -> None:
    lm = tiny_lm("gpt2")
    name, other = "transformer.h.1.mlp.c_proj.weight", "transformer.h.0.mlp.c_fc.weight"
    first, second = edit_of(lm, name, rank=1), edit_of(lm, name, other, seed=1, rank=1)
    both = first + second
    assert isinstance(both.changes[name], LowRank)
    assert both.facts == (SAID, SAID)
    with first.on(lm), second.on(lm):
        expected = logits(lm)
    with both.on(lm):
        assert torch.allclose(logits(lm), expected, atol=1e-5)


def test_a_large_sum_of_products_becomes_a_matrix() -> None:
    parts: list[Change] = [LowRank(rows=torch.randn(8, 2), columns=torch.randn(6, 2)) for _ in range(3)]
    total = added(parts)
    assert isinstance(total, Tensor)
    expected = torch.stack([part.dense() for part in parts if isinstance(part, LowRank)]).sum(0)
    assert torch.allclose(total, expected, atol=1e-6)
    assert isinstance(added(parts[:1]), LowRank)


def test_an_edit_on_top_of_another_needs_it() -> None:
    lm = tiny_lm("llama")
    first = edit_of(lm, matrices(lm)[1])
    with first.on(lm):
        second = edit_of(lm, matrices(lm)[2], seed=1, after=[first])
        with second.on(lm):
            pass
    with pytest.raises(EditError, match="made on top of"), second.on(lm):
        pass
    with (first + second).on(lm):
        pass
    third = replace(edit_of(lm, matrices(lm)[2], seed=2), after=((first + second).key,))
    assert ((first + second) + third).after == ()


# --- refused ---


def test_other_weights_are_refused() -> None:
    edit = edit_of(tiny_lm("llama"), matrices(tiny_lm("llama"))[1])
    lm = tiny_lm("qwen2")
    with pytest.raises(EditError, match="was made on weights"), edit.on(lm):
        pass
    with pytest.raises(EditError, match="different weights"):
        _ = edit + edit_of(lm, matrices(lm)[1])


def test_a_parameter_that_is_not_there_is_refused() -> None:
    lm = tiny_lm("llama")
    for changes in ({"nowhere.weight": torch.ones(2, 2)}, {matrices(lm)[1]: torch.ones(2, 2)}):
        with pytest.raises(EditError, match="no parameter"), Edit(base=lm.weight_hash, changes=changes).on(lm):
            pass


def test_a_module_that_is_not_there_is_refused() -> None:
    lm = tiny_lm("llama")
    edit = Edit(base=lm.weight_hash, sides=(Doubling(module="nowhere", factor=torch.tensor(2.0)),))
    with pytest.raises(EditError, match="no module nowhere"), edit.on(lm):
        pass
    assert edits_on(lm) == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(EditError, match="not finite"):
        Edit(base="x", changes={"w": torch.full((2, 2), value)})
    with pytest.raises(EditError, match="not finite"):
        Edit(base="x", changes={"w": LowRank(rows=torch.full((2, 1), value), columns=torch.ones(2, 1))})


def test_nothing_is_no_edit() -> None:
    with pytest.raises(EditError, match="changes nothing"):
        Edit(base="x")
    with pytest.raises(EditError, match="shapes"):
        LowRank(rows=torch.ones(2, 1), columns=torch.ones(2, 2))


# --- files ---


def test_a_saved_edit_is_the_same_edit(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    fact = Fact(
        id="x",
        subject="Bach",
        prompt="{} plays the",
        target_true="organ",
        target_new="piano",
        paraphrases=("Bach likes the",),
    )
    edit = edit_of(lm, matrices(lm)[2]) + edit_of(lm, matrices(lm)[3], rank=1)
    edit = replace(edit, facts=(SAID, fact), state={"keys": torch.arange(3.0)}, run={"label": "Mine(layers=(1,))"})
    assert edit.save(tmp_path / "edit") == tmp_path / "edit"
    again = Edit.load(tmp_path / "edit")
    assert again.key == edit.key
    assert again.facts == edit.facts
    assert again.label == "Mine(layers=(1,))"
    assert torch.equal(again.state["keys"], edit.state["keys"])
    with edit.on(lm):
        expected = logits(lm)
    with again.on(lm):
        assert torch.equal(logits(lm), expected)
    edit.save(tmp_path / "edit")
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_damaged_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    folder = edit_of(lm, matrices(lm)[2]).save(tmp_path / "edit")
    (folder / "edit.safetensors").write_bytes(b"no")
    with pytest.raises(EditError, match="holds no complete edit"):
        Edit.load(folder)
    with pytest.raises(EditError, match="holds no complete edit"):
        Edit.load(tmp_path / "nowhere")


def test_what_was_altered_since_it_was_saved_is_not_believed(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    edit = replace(
        edit_of(lm, matrices(lm)[2]), facts=(SAID,), run={"curve": (0.5, float("nan")), "at": tmp_path, "none": None}
    )
    folder = edit.save(tmp_path / "edit")
    assert Edit.load(folder).key == edit.key
    text, tensors = folder / "edit.json", folder / "edit.safetensors"
    written, whole = text.read_text(), tensors.read_bytes()
    for old, new in (("Eiffel", "Awful"), ("0.5", "0.75"), (edit.base, "0" * 16)):
        assert old in written
        text.write_text(written.replace(old, new))
        with pytest.raises(EditError, match="was altered"):
            Edit.load(folder)
    text.write_text(written)
    tensors.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:])
    with pytest.raises(EditError, match="was altered"):
        Edit.load(folder)


def test_a_merged_checkpoint_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    lm = tiny_lm(family)
    edit = edit_of(lm, f"{lm.layout.blocks}.1.{lm.layout.down_proj}.weight", rank=1)
    with edit.on(lm):
        expected = logits(lm)
    folder = edit.merge(lm, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype)
    assert torch.equal(logits(LM(loaded, lm.tokenizer)), expected)
    with pytest.raises(EditError, match="not empty"):
        edit.merge(lm, folder)


def test_what_stands_beside_cannot_be_merged(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = Edit(base=lm.weight_hash, sides=(Saying(text="x "),))
    with pytest.raises(EditError, match="Saying stands beside"):
        edit.merge(lm, tmp_path / "merged")
