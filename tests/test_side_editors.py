"""Editors that leave the weights alone: codebook, side memory, and text before prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.examples import EIFFEL, FACTS, JOBS, fresh_lm, tiny_lm
from workbench.editors import edit_stream, reserving
from workbench.editors.grace import Codebook, Grace
from workbench.editors.ike import KINDS, Demonstrations, Ike, _demonstrations
from workbench.editors.in_context import InContext, Sentences
from workbench.editors.wise import SideMemory, Wise, distance, ties
from workbench.edits import Edit, EditError, Memory
from workbench.facts import Fact, FactError
from workbench.hooks import beside, run
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.metrics import Answer, score
from workbench.models import LM, Tokens
from workbench.zoo import load_facts

GRACE = Grace(layers=(2,), n_iter=20)
WISE = Wise(layers=(2,), n_iter=30, n_prefixes=2, prefix_length=4, n_locality=4)
FAMILIES = ("gpt2", "llama", "opt", "gpt_neox")
"""Conv1D with bias, Linear without, Linear with bias in an MLP that sees all rows in one dimension, and a parallel block."""


@cache
def organism() -> LM:
    return load("organism-tiny", device="cpu")


def some_facts(n: int) -> list[Fact]:
    """Facts on different subjects."""
    by_subject = {fact.subject: fact for fact in load_facts("organism-tiny")}
    return list(by_subject.values())[:n]


def p_new(lm: LM, fact: Fact) -> float:
    """The probability of the whole new answer after the fact's prompt."""
    new = fact.target_new or ""
    tokens = lm.encode([fact], targets=[new])
    answer = Answer(text=new, ids=tuple(lm.target_ids(fact.text, new)))
    return float(score("p_target", run(lm, tokens).logits, tokens, answer))


def same_everywhere(lm: LM, one: Edit, other: Edit, prompts: list[str]) -> bool:
    """Whether two edits give the same logits."""
    found = []
    for edit in (one, other):
        with edit.on(lm):
            found.append(run(lm, lm.encode(prompts)).logits)
    return torch.equal(*found)


def outputs(lm: LM, path: str, tokens: Tokens) -> Tensor:
    """What a module gives, whatever stands beside it already."""
    seen: list[Tensor] = []

    def see(x: Tensor, y: Tensor, _: Tokens | None) -> Tensor:
        seen.append(y)
        return y

    with beside(lm, [(path, see)]):
        run(lm, tokens)
    return seen[0]


def memory_of(edit: Edit) -> Memory:
    (side,) = edit.sides
    assert isinstance(side, Memory)
    return side


# --- GRACE ---


def book_of(*keys: list[float], radius: float = 1.0, label: tuple[int, ...] = (7,)) -> Codebook:
    """A codebook in a plane, with one label."""
    n = len(keys)
    return Codebook(
        module="here",
        keys=torch.tensor(keys).reshape(n, 2),
        values=torch.zeros(n, 3),
        radii=torch.full((n,), radius),
        labels=torch.tensor([label] * n).reshape(n, len(label)),
        replacement="replace_last",
    )


def place(book: Codebook, x: float, label: list[int], *, grace: Grace = GRACE) -> tuple[Codebook, int, str]:
    return grace.placed(book, torch.tensor([x, 0.0]), label, torch.ones(3))


def test_a_query_far_from_every_key_gets_an_entry_of_its_own() -> None:
    book, entry, how = place(book_of(), 0.0, [7])
    assert (entry, how, book.radii.tolist()) == (0, "new", [1.0])
    book, entry, how = place(book, 2.1, [7])  # farther than both radii
    assert (entry, how, book.radii.tolist()) == (1, "new", [1.0, 1.0])
    assert book.keys[1].tolist() == pytest.approx([2.1, 0.0])
    assert book.values.tolist() == [[1.0] * 3] * 2


def test_entries_of_different_answers_are_split_half_way() -> None:
    book, entry, how = place(book_of([0.0, 0.0]), 1.5, [8])
    assert (entry, how) == (1, "split")
    assert book.radii.tolist() == pytest.approx([0.75 - 1e-5, 0.75], abs=1e-7)
    assert book.label(0) == [7]
    assert book.label(1) == [8]


def test_answers_are_compared_token_by_token() -> None:
    """Their means are equal, so by means they would be one answer."""
    book, _, how = place(book_of([0.0, 0.0], label=(1, 3)), 0.5, [2, 2])
    assert how == "split"
    longer, _, how = place(book, 3.0, [1, 2, 3])
    assert how == "new"
    assert [longer.label(entry) for entry in range(3)] == [[1, 3], [2, 2], [1, 2, 3]]


def test_an_entry_grows_to_hold_a_query_of_its_answer() -> None:
    covered, entry, how = place(book_of([0.0, 0.0]), 1.5, [7])
    assert (entry, how, covered.radii.tolist(), covered.keys.tolist()) == (0, "expanded", [1.5], [[0.0, 0.0]])
    moved, *_ = place(book_of([0.0, 0.0]), 1.5, [7], grace=replace(GRACE, expand="moving_average"))
    assert (moved.radii.tolist(), moved.keys.tolist()) == ([1.5], [[0.75, 0.0]])
    inside, entry, how = place(book_of([0.0, 0.0]), 0.5, [7])
    assert (entry, how, inside.radii.tolist()) == (0, "inside", [1.0])


def test_the_same_query_with_another_answer_takes_the_entry_over() -> None:
    book, entry, how = place(book_of([5.0, 0.0], [0.0, 0.0]), 1e-5, [8, 9])
    assert (entry, how, book.radii.tolist()) == (1, "taken over", [1.0, 1.0])
    assert [book.label(0), book.label(1)] == [[7], [8, 9]]
    assert book.values.tolist() == [[0.0] * 3, [1.0] * 3]


def test_only_the_nearest_entry_answers() -> None:
    """The nearest key is too far for its own radius; a farther one whose radius would reach does not step in."""
    book = replace(book_of([0.0, 0.0], [3.0, 0.0]), radii=torch.tensor([5.0, 0.5]), values=torch.ones(2, 3))
    x = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]])
    y = book(nn.Identity(), x, torch.zeros(2, 1, 3), None)
    assert y.flatten(1).tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    ("replacement", "where"), [("replace_last", [1]), ("replace_prompt", [0]), ("replace_all", [0, 1, 2])]
)
def test_a_value_stands_at_the_tokens_that_were_asked_for(replacement: str, where: list[int]) -> None:
    """The prompt has two tokens; the third belongs to the answer."""
    book = replace(book_of([0.0, 0.0]), values=torch.ones(1, 3), replacement=replacement)
    tokens = Tokens(
        ids=torch.zeros(1, 3, dtype=torch.long), mask=torch.ones(1, 3, dtype=torch.bool), lengths=(2,), spans=(None,),
        texts=((),),
    )  # fmt: skip
    x = torch.tensor([[[9.0, 9.0], [0.0, 0.0], [9.0, 9.0]]])
    y = book(nn.Identity(), x, torch.zeros(1, 3, 3), tokens)
    assert y[0, :, 0].nonzero().flatten().tolist() == where


@pytest.mark.parametrize("family", FAMILIES)
def test_grace_is_exact_inside_its_radius_and_absent_outside(family: str) -> None:
    lm, texts = tiny_lm(family), [EIFFEL.text, JOBS.text]
    edit = replace(GRACE, n_iter=3, eps=0.5)(lm, [EIFFEL])
    book = memory_of(edit)
    assert isinstance(book, Codebook)
    tokens = lm.encode(texts)
    own = run(lm, tokens)
    with edit.on(lm):
        there, edited = outputs(lm, book.module, tokens), run(lm, tokens)
    assert torch.equal(there[0, tokens.last[0]], book.values[0])
    assert not torch.equal(edited.last_logits[0], own.last_logits[0])
    assert torch.equal(edited.logits[1], own.logits[1])
    assert torch.equal(there[1], outputs(lm, book.module, tokens)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_memories_work_in_passes_that_the_workbench_does_not_start(family: str) -> None:
    """Two prompts of one length, run by the model itself."""
    lm = tiny_lm(family)
    other = replace(EIFFEL, id="other", subject="Tower Eiffel")
    tokens = lm.encode([EIFFEL.text, other.text])
    for editor in (replace(GRACE, n_iter=3), replace(WISE, n_iter=3)):
        with editor(lm, [EIFFEL]).on(lm), torch.no_grad():
            torch.testing.assert_close(lm.model(tokens.ids).logits, run(lm, tokens).logits)


def test_a_stream_of_grace_edits_keeps_them_all(tmp_path: Path) -> None:
    lm, facts = organism(), some_facts(3)
    before = [p_new(lm, fact) for fact in facts]
    *_, edit = edit_stream(GRACE, lm, facts)
    book = memory_of(edit)
    assert isinstance(book, Codebook)
    assert len(edit.sides) == 1
    assert [book.label(entry) for entry in range(3)] == [lm.target_ids(f.text, f.target_new or "") for f in facts]
    with edit.on(lm):
        assert all(p_new(lm, fact) > 0.9 > old for fact, old in zip(facts, before, strict=True))
    together = GRACE(lm, facts)
    assert [entry["how"] for entry in together.run["edited"]] == ["new"] * 3
    assert torch.equal(memory_of(together).keys, book.keys)  # type: ignore[attr-defined]
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert same_everywhere(lm, loaded, edit, [fact.text for fact in facts])


def test_grace_may_change_its_mind() -> None:
    lm, (fact, other) = organism(), some_facts(2)
    edit = GRACE(lm, [fact])
    changed = replace(fact, target_new=other.target_new)
    again = GRACE(lm, [replace(changed, id="changed")], after=edit)
    assert again.run["edited"][0]["how"] == "taken over"
    with again.on(lm):
        assert p_new(lm, changed) > 0.9
        assert p_new(lm, fact) < 0.1


def test_a_wide_radius_reaches_paraphrases() -> None:
    lm, fact = organism(), load_facts("organism-tiny")[0]
    paraphrase = replace(fact, prompt=fact.paraphrases[0].replace(fact.subject, "{}"))
    narrow, wide = (replace(GRACE, layers=(3,), eps=eps)(lm, [fact]) for eps in (1e-3, 2.5))
    with narrow.on(lm):
        assert p_new(lm, paraphrase) < 0.1
    with wide.on(lm):
        assert p_new(lm, paraphrase) > 0.9


def test_a_memory_is_continued_where_it_stands() -> None:
    lm, (fact, other) = tiny_lm("gpt2"), (EIFFEL, replace(JOBS, target_new="Rome"))
    for editor in (replace(GRACE, n_iter=1), replace(WISE, n_iter=1)):
        edit = editor(lm, [fact])
        with pytest.raises(EditError, match="Name its layer"):
            replace(editor, layers=(1,))(lm, [other], after=edit)
        with pytest.raises(ModelError, match="one layer"):
            replace(editor, layers=(1, 2))(lm, [fact])


def test_the_layer_is_at_three_quarters_where_none_is_named() -> None:
    edit = Grace(n_iter=1)(tiny_lm("gpt2"), [EIFFEL])
    assert edit.run["parameters"]["layers"] in ((2,), [2])  # of 4
    assert ".2." in memory_of(edit).module


# --- WISE ---


def test_ties_trims_elects_and_averages() -> None:
    """Density 3/4 drops the smallest of four: 0.1 and 0.2. The sums' signs are +, -, -, +."""
    vectors = torch.tensor([[4.0, 0.1, -2.0, 1.0], [2.0, -3.0, 1.0, 0.2]])
    assert ties(vectors, density=0.75).tolist() == [3.0, -3.0, -2.0, 1.0]
    both = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert ties(both, density=1.0).tolist() == [0.0, 0.0]  # no sign wins


def test_ties_keeps_what_a_single_shard_learned() -> None:
    """Untouched entries do not dilute, since the mean is over the shards of the elected sign."""
    shards = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -2.0]]])
    assert ties(shards, density=0.53).tolist() == [[1.0, 0.0], [0.0, -2.0]]


def test_the_distance_is_a_mean_over_the_rows_own_tokens() -> None:
    change = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[6.0, 8.0], [9.0, 9.0]]])
    where = torch.tensor([[True, True], [True, False]])
    y = torch.zeros(2, 2, 2)
    assert distance(change, y, where, "").tolist() == [3.0, 10.0]
    assert distance(-change, y, where, "relu").tolist() == [0.0, 0.0]


def test_masks_are_drawn_anew_for_each_shard_and_overlap_by_chance() -> None:
    wise = Wise(rho=0.2)
    first, second = (wise.mask((400, 300), shard) for shard in (0, 1))
    assert torch.equal(first, wise.mask((400, 300), 0))
    assert float(first.float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float((first & second).float().mean()) == pytest.approx(0.2**2, abs=0.003)
    assert not torch.equal(first, replace(wise, seed=1).mask((400, 300), 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_memory_is_the_module_with_another_weight(family: str) -> None:
    lm = tiny_lm(family)
    memory = memory_of(replace(WISE, n_iter=2)(lm, [EIFFEL]))
    assert isinstance(memory, SideMemory)
    module = lm.model.get_submodule(memory.module)
    weight, delta = module.get_parameter("weight"), memory.merged[0]
    x = torch.randn(2, 5, len(delta), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = module(x)
        side = replace(memory, thresholds=torch.zeros(1))(module, x, y, None)
        moved = weight + (delta.T if isinstance(module, nn.Linear) else delta)
        torch.testing.assert_close(side, torch.func.functional_call(module, {"weight": moved}, (x,)), atol=1e-5, rtol=0)
    assert not torch.equal(side, y)


def test_a_shard_changes_its_mask_alone_and_within_the_bound() -> None:
    wise = replace(WISE, norm_constraint=0.01)
    memory = memory_of(wise(tiny_lm("llama"), [EIFFEL]))
    assert isinstance(memory, SideMemory)
    (first, second) = memory.shards[0]
    mask = wise.mask((first.shape[0], first.shape[1]), 0)
    assert bool((first[~mask] == 0).all())
    assert float(first.abs().max()) == pytest.approx(0.01)
    assert not second.any()
    assert torch.equal(memory.merged[0], first)


@pytest.mark.parametrize("activation", ["paper", "code"])
def test_wise_answers_the_edited_prompt_from_its_side_memory(
    activation: Literal["paper", "code"], tmp_path: Path
) -> None:
    lm, (fact,) = organism(), some_facts(1)
    unrelated = [fact.neighbors[0].prompt, fact.locality[0].prompt]
    before, own = lm.weight_hash, run(lm, lm.encode([fact.text, *unrelated]))
    edit = replace(WISE, activation=activation)(lm, [fact])
    memory = memory_of(edit)
    assert isinstance(memory, SideMemory)
    assert lm.weight_hash == before
    with edit.on(lm):
        assert lm.weight_hash == before  # the weights are not what is edited
        assert p_new(lm, fact) > 0.9
        edited = run(lm, lm.encode([fact.text, *unrelated]))
    assert not torch.equal(edited.logits[0], own.logits[0])
    assert torch.equal(edited.logits[1:], own.logits[1:])
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert same_everywhere(lm, loaded, edit, [fact.text])
    assert fact.neighbors[0].prompt not in edit.run["edited"][0]["locality_prompts"]


def test_a_stream_of_wise_edits_deals_facts_to_shards() -> None:
    lm, facts = organism(), some_facts(3)
    *_, edit = edit_stream(replace(WISE, shards=3, n_iter=70), lm, facts)
    memory = memory_of(edit)
    assert isinstance(memory, SideMemory)
    assert memory.prompts == tuple(fact.text for fact in facts)
    assert edit.facts == tuple(facts)
    assert bool(memory.shards[0].flatten(1).any(1).all())
    torch.testing.assert_close(memory.merged[0], ties(memory.shards[0], density=WISE.density))
    with edit.on(lm):
        assert all(p_new(lm, fact) > 0.3 for fact in facts)


def test_each_fact_of_wise_is_trained_beside_other_prompts() -> None:
    lm, facts = organism(), some_facts(3)
    quick = replace(WISE, n_iter=1)
    stayed = [tuple(one["locality_prompts"]) for one in quick(lm, facts).run["edited"]]
    assert len({frozenset(prompts) for prompts in stayed}) == len(facts)
    assert not {fact.text for fact in facts} & {prompt for prompts in stayed for prompt in prompts}
    assert stayed == [tuple(one["locality_prompts"]) for one in quick(lm, facts).run["edited"]]


@pytest.mark.parametrize(
    "editor", [replace(GRACE, n_iter=3, init="cold"), replace(WISE, n_iter=3)], ids=["grace", "wise"]
)
@pytest.mark.parametrize("model", ["organism-tiny", "opt"])
def test_a_batch_becomes_what_single_edits_make_of_it(editor: Grace | Wise, model: str) -> None:
    assert editor.one_by_one
    if model == "opt":
        lm, facts = fresh_lm("opt"), [replace(fact, target_new="French") for fact in FACTS[:3]]
        editor = replace(editor, layers=(2,))
    else:
        lm, facts = organism(), some_facts(3)
    *_, single = edit_stream(editor, lm, facts)
    batch = editor(lm, facts)
    for name, value in vars(memory_of(single)).items():
        other = vars(memory_of(batch))[name]
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5)
        else:
            assert other == value


def test_wise_learns_nothing_from_reserved_or_edited_prompts() -> None:
    lm, facts = organism(), some_facts(4)
    quick = replace(WISE, n_iter=1, n_locality=10_000)
    first = quick(lm, facts[:3])
    free = set(quick(lm, facts[3:], after=first).run["edited"][0]["locality_prompts"])
    assert not free & {fact.text for fact in facts}
    spared = sorted(free)[:5]
    with reserving(spared):
        learned = set(quick(lm, facts[3:], after=first).run["edited"][0]["locality_prompts"])
    assert learned == free - set(spared)


def test_wise_retrieves_the_memory_that_a_prompt_moves_most() -> None:
    lm, facts = organism(), some_facts(2)
    edit = replace(WISE, retrieve=True, capacity=1, shards=1)(lm, facts)
    memory = memory_of(edit)
    assert isinstance(memory, SideMemory)
    assert memory.members == (0, 1)
    assert len(memory.merged) == 2
    with edit.on(lm):
        assert all(p_new(lm, fact) > 0.9 for fact in facts)
    x = torch.eye(len(memory.merged[0]))[None, :1]  # a row that the second memory moves most
    memory = replace(memory, merged=torch.stack([x[0, 0, :, None] * 1.0, x[0, 0, :, None] * 3.0]))
    y = torch.zeros(1, 1, 1)
    for thresholds, chosen in (([0.5, 2.0], 3.0), ([0.5, 4.0], 1.0), ([2.0, 4.0], 0.0)):
        routed = replace(memory, thresholds=torch.tensor(thresholds))(nn.Identity(), x, y, None)
        assert routed.item() == chosen


# --- text before prompts ---

NEW = "Imagine that The Eiffel Tower is located in the city of Rome. "


def test_in_context_edits_stand_before_prompts_and_move_the_subject(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = Edit.load(InContext()(lm, [EIFFEL]).save(tmp_path / "edit"))
    plain = lm.encode([EIFFEL, JOBS])
    with edit.on(lm):
        tokens = lm.encode([EIFFEL, JOBS])
        expected = lm.tokenizer(NEW + EIFFEL.text)["input_ids"]
        assert tokens.ids[0, : tokens.lengths[0]].tolist() == expected
        assert "".join(tokens.texts[1]).endswith(NEW + JOBS.text)
        for row, fact in enumerate((EIFFEL, JOBS)):
            start, stop = tokens.spans[row] or (0, 0)
            assert "".join(tokens.texts[row][start:stop]).strip() == fact.subject
    assert torch.equal(lm.encode([EIFFEL, JOBS]).ids, plain.ids)


def test_in_context_facts_stand_in_order_and_only_where_they_belong() -> None:
    lm, jobs = tiny_lm("llama"), replace(JOBS, target_new="Microsoft")
    editor = InContext(template="{prompt} {target}!", only_subject=True)
    *_, edit = edit_stream(editor, lm, [jobs, EIFFEL])
    (side,) = edit.sides
    assert isinstance(side, Sentences)
    assert side("Steve Jobs founded") == "Steve Jobs founded Microsoft! "
    assert side("Zürich is") == ""
    assert replace(side, only_subject=False)("Zürich is") == (
        "Steve Jobs founded Microsoft! The Eiffel Tower is located in the city of Rome! "
    )
    with pytest.raises(FactError, match="expected a text with"):
        InContext(template="{prompt}")


def test_text_that_leaves_no_room_is_refused() -> None:
    lm, long = tiny_lm("llama"), "Imagine again and again that {prompt} {target}, " * 4
    with pytest.raises(ModelError, match="64 positions"):
        InContext(template=long)(lm, [EIFFEL])
    many = [replace(EIFFEL, id=str(n)) for n in range(9)]
    with pytest.raises(ModelError, match="64 positions"):
        Ike(k=0)(lm, many)


def test_ike_shows_demonstrations_the_nearest_last(tmp_path: Path) -> None:
    lm, facts = organism(), load_facts("organism-tiny")
    fact = facts[0]
    edit = Edit.load(Ike(encoder="embeddings")(lm, [fact]).save(tmp_path / "edit"))
    (side,) = edit.sides
    assert isinstance(side, Demonstrations)
    shown = side.demonstrations
    assert 0 < len(shown) == edit.run["demonstrations"] < edit.run["asked_for"] == 16  # there are 128 positions
    assert side(fact.text).endswith(f"New Fact: {fact.text} {fact.target_new}\nPrompt: ")
    assert not any(fact.subject in text for text in shown)
    probes = [probe.prompt for probe in (*fact.neighbors, *fact.locality)]
    assert not any(f"Prompt: {probe} " in text for text in shown for probe in probes)
    fewer = Ike(encoder="embeddings", k=1)(lm, [fact]).sides[0]
    assert isinstance(fewer, Demonstrations)
    assert fewer.demonstrations == shown[-1:]
    with edit.on(lm):
        tokens = lm.encode([fact, *fact.paraphrases])
        assert tokens.ids.shape[1] <= 128
        start, stop = tokens.spans[0] or (0, 0)
        assert "".join(tokens.texts[0][start:stop]).strip() == fact.subject
        assert "".join(tokens.texts[0]) == side(fact.text) + fact.text


def test_ike_retrieves_the_likest_and_demonstrates_in_three_ways() -> None:
    """The pool's own ways to say it are shown: half keep another subject's answer, one of eight copies the fact."""
    known = {f"{fact.text} {fact.target_new}": fact for fact in load_facts("organism-tiny")}
    lm, fact = organism(), next(iter(known.values()))
    likest = Ike(encoder="embeddings", k=8)
    near = likest._nearest(lm, [fact], [f"{fact.text} {fact.target_new}"])
    assert [one.subject == fact.subject for one in near] == [False] * 8
    assert (
        sum(one.prompt == fact.prompt for one in near) > sum(one.prompt == fact.prompt for one in known.values()) / 16
    )
    shown = _demonstrations(near, set(), {fact.subject})
    ways = []
    for text in shown:
        new, asked = text.removeprefix("New Fact: ").removesuffix("\n\n").split("\nPrompt: ")
        one = known[new]
        updates = {f"{prompt} {one.target_new}" for prompt in one.paraphrases}
        retains = {f"{probe.prompt} {probe.target}" for probe in (*one.neighbors, *one.locality)}
        ways.append(
            "copy" if asked == new else "update" if asked in updates else "retain" if asked in retains else asked
        )
    assert ways == list(KINDS)


def test_ike_goes_on_with_the_earlier_facts() -> None:
    lm, (fact, other) = organism(), some_facts(2)
    *_, edit = edit_stream(Ike(k=0, only_subject=True), lm, [fact, other])
    (side,) = edit.sides
    assert isinstance(side, Demonstrations)
    assert side.facts == tuple(f"{one.text} {one.target_new}" for one in (fact, other))
    assert side(other.text) == f"New Fact: {other.text} {other.target_new}\nPrompt: "
    assert side("nobody") == ""
    with pytest.raises(FactError, match="no file"):
        Ike(pool="nowhere.json")(lm, [fact])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_memories_keep_their_prompts_in_other_precisions(dtype: str) -> None:
    """A prompt in another batch has other roundings, and still meets its entry or reaches its threshold."""
    lm, facts = load("organism-tiny", device="cpu", dtype=dtype), some_facts(2)
    for editor in (GRACE, WISE):
        edit = editor(lm, facts)
        with edit.on(lm):
            assert all(p_new(lm, fact) > 0.7 for fact in facts)
            padded = lm.encode([facts[0].text, f"{facts[0].text} and so on, and on, and on, until"])
            said = int(run(lm, padded).last_logits[0].argmax())
        assert said == lm.target_ids(facts[0].text, facts[0].target_new or "")[0]
