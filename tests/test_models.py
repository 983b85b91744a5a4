"""Text becomes tokens: padding, BOS, the place of the subject, the tokens of an answer; and weights have a name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from tests.examples import EIFFEL, FACTS, JOBS, MESSI, NO_ROW, SAO_PAULO, TRACED, ZURICH, fresh_lm, tiny_lm
from tests.tiny_models import STYLES, tiny_lm_parts, tiny_model, tiny_tokenizer
from workbench.checks import self_checks
from workbench.facts import Fact
from workbench.hooks import run
from workbench.layouts import LAYOUTS
from workbench.models import LM, ModelError, Tokens
from workbench.sites import ROLES, TOKEN_ROLES, Role, SiteError


def _reader(style: str, bos: bool | None = None) -> LM:
    """A model that is only asked to encode, with a tokenizer of a style."""
    return LM(tiny_model("gpt2"), tiny_tokenizer(style), bos=bos)


# --- padding ---


def test_a_batch_is_padded_on_the_right_whatever_the_tokenizer_prefers() -> None:
    lm = _reader("unigram")
    assert lm.tokenizer.padding_side == "left"
    tokens = lm.encode(FACTS)
    for row, length in enumerate(tokens.lengths):
        assert tokens.mask[row].tolist() == [True] * length + [False] * (tokens.ids.shape[1] - length)
        assert tokens.ids[row, :length].tolist() == lm.encode([FACTS[row]]).ids[0].tolist()
    assert len(set(tokens.lengths)) > 1
    assert tokens.last.tolist() == [length - 1 for length in tokens.lengths]
    assert tokens.positions[0].tolist() == list(range(tokens.ids.shape[1]))


def test_a_padded_batch_equals_its_prompts_one_by_one(lm: LM) -> None:
    batch = run(lm, lm.encode(FACTS))
    for row, fact in enumerate(FACTS):
        alone = run(lm, lm.encode([fact])).logits[0]
        torch.testing.assert_close(batch.logits[row, : len(alone)], alone, rtol=1e-5, atol=2e-5)


def test_encoding_is_what_the_models_own_call_sees(lm: LM) -> None:
    tokens = lm.encode([EIFFEL])
    assert tokens.ids[0].tolist() == lm.tokenizer(EIFFEL.text)["input_ids"]
    with torch.no_grad():
        bare = lm.model(**lm.tokenizer(EIFFEL.text, return_tensors="pt", return_token_type_ids=False)).logits
    torch.testing.assert_close(run(lm, tokens).logits, bare, rtol=0, atol=1e-5)


# --- BOS ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_stands_in_front_once_where_it_was_asked_for(style: str, bos: bool | None) -> None:
    lm = _reader(style, bos)
    ids = lm.encode([EIFFEL]).ids[0].tolist()
    expected = style != "byte_level" if bos is None else bos
    assert ids.count(lm.tokenizer.bos_token_id) == int(expected)
    assert (ids[0] == lm.tokenizer.bos_token_id) == expected
    plain = lm.tokenizer(EIFFEL.text, add_special_tokens=False)["input_ids"]
    assert ids[int(expected) :] == plain


@pytest.mark.parametrize("style", STYLES)
def test_bos_moves_the_subject_by_one_and_changes_no_answer(style: str) -> None:
    without, with_bos = _reader(style, False), _reader(style, True)
    (span,), (moved,) = without.encode([EIFFEL]).spans, with_bos.encode([EIFFEL]).spans
    assert span is not None
    assert moved == (span[0] + 1, span[1] + 1)
    assert without.target_ids(EIFFEL.text, "Paris") == with_bos.target_ids(EIFFEL.text, "Paris")


def test_an_eos_that_the_tokenizer_appends_is_dropped() -> None:
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer("byte_level_bos"))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    both = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=both
    )
    assert tokenizer("Paris")["input_ids"][-1] == tokenizer.eos_token_id
    lm, plain = LM(tiny_model("llama"), tokenizer), _reader("byte_level_bos")
    assert lm.encode([EIFFEL]).ids.tolist() == plain.encode([EIFFEL]).ids.tolist()
    assert lm.target_ids(EIFFEL.text, "Paris") == plain.target_ids(EIFFEL.text, "Paris")


# --- subjects ---

PLACES = [
    *FACTS,
    Fact(id="tokyo", subject="東京", prompt="The city of {} is"),
    Fact(id="tokyo-start", subject="東京", prompt="{}"),
    Fact(id="tokyo-end", subject="東京", prompt="Is it {}"),
    Fact(id="tokyo-half", subject="東", prompt="Is {}京 a city"),
    Fact(id="zurich-half", subject="ürich", prompt="Z{} is"),
    Fact(id="whole-prompt", subject="The Eiffel Tower is located in", prompt="{}"),
    Fact(id="inside-a-token", subject="iff", prompt="The E{}el Tower is"),
    Fact(id="one-letter", subject="P", prompt="The city of {}aris is"),
    Fact(id="quoted", subject="Steve Jobs", prompt='She said: "{}" founded'),
    Fact(id="emoji", subject="👩‍🚀", prompt="The {} is in"),
    Fact(id="accent-combined", subject="Zu\u0308rich", prompt="The city of {} is"),
    Fact(id="spaces", subject="Big Ben", prompt="The  {}  is in"),
    Fact.typed(text="Paris, the city of Paris, is", subject="Paris", id="twice-last"),
    Fact.typed(text="Paris, the city of Paris, is", subject="Paris", id="twice-first", occurrence="first"),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fact", PLACES, ids=lambda fact: fact.id)
def test_the_subjects_tokens_are_the_fewest_that_spell_it(style: str, fact: Fact) -> None:
    lm = _reader(style)
    tokens = lm.encode([fact])
    ids, span = tokens.ids[0].tolist(), tokens.spans[0]
    assert span is not None
    start, stop = span
    before = len(lm.tokenizer.decode(ids[:start], skip_special_tokens=True).replace("\ufffd", "").lstrip())
    assert before <= fact.span[0]

    def spelled(first: int, end: int) -> bool:
        return fact.subject in lm.tokenizer.decode(ids[first:end], skip_special_tokens=True)

    assert spelled(start, stop)
    assert not spelled(start + 1, stop)
    assert not spelled(start, stop - 1)


def test_a_subject_that_stands_twice_has_the_tokens_of_the_place_that_was_meant() -> None:
    text = "Paris, the city of Paris, is"
    first, last = (Fact.typed(text=text, subject="Paris", occurrence=which) for which in ("first", "last"))
    for style in STYLES:
        lm = _reader(style)
        (one,), (other,) = lm.encode([first]).spans, lm.encode([last]).spans
        assert one is not None
        assert other is not None
        assert one[1] <= other[0]


def test_labels_are_the_pieces_of_the_text_and_name_special_tokens() -> None:
    for style in STYLES:
        lm = _reader(style, True)
        labels = lm.encode([EIFFEL]).texts[0]
        assert labels[0] == lm.tokenizer.bos_token
        assert "".join(labels[1:]).replace(" ", "") == EIFFEL.text.replace(" ", "")


def test_texts_without_subject_have_no_span() -> None:
    tokens = _reader("byte_level").encode(["The city of Paris is"])
    assert tokens.spans == (None,)
    assert tokens.roles()[-1] == "last"
    assert set(tokens.roles()[:-1]) == {"before_subject"}
    with pytest.raises(SiteError, match="encoded without one"):
        tokens.at("subject_last")


# --- roles ---


def _roles(prompt_length: int, start: int, stop: int) -> tuple[Role, ...]:
    mask = torch.ones(1, prompt_length, dtype=torch.bool)
    ids = torch.zeros(1, prompt_length, dtype=torch.long)
    texts = (("x",) * prompt_length,)
    return Tokens(ids=ids, mask=mask, lengths=(prompt_length,), spans=((start, stop),), texts=texts).roles()


@pytest.mark.parametrize(
    ("length", "start", "stop", "roles"),
    [
        (8, 1, 4, "before_subject subject_first subject_middle subject_last first_after_subject further further last"),
        (5, 1, 3, "before_subject subject_first subject_last first_after_subject last"),
        (
            4,
            1,
            2,
            "before_subject subject_last first_after_subject last",
        ),  # one token: it is the last one, not also the first
        (
            3,
            0,
            2,
            "subject_first subject_last last",
        ),  # the token after the subject is the last one, not also the first after
        (3, 1, 3, "before_subject subject_first subject_last"),  # a subject at the end keeps its role
        (1, 0, 1, "subject_last"),
    ],
)
def test_every_token_has_the_one_role_of_its_place(length: int, start: int, stop: int, roles: str) -> None:
    assert _roles(length, start, stop) == tuple(roles.split())


@pytest.mark.parametrize("length", range(1, 8))
def test_the_roles_divide_every_prompt(length: int) -> None:
    for start in range(length):
        for stop in range(start + 1, length + 1):
            tokens_roles = _roles(length, start, stop)
            assert len(tokens_roles) == length
            assert set(tokens_roles) <= set(TOKEN_ROLES)
            for role in ("subject_first", "subject_last", "first_after_subject", "last"):
                assert tokens_roles.count(role) <= 1
            assert tokens_roles.count("subject_last") == 1


def test_masks_by_role_agree_with_the_roles_in_a_padded_batch() -> None:
    tokens = _reader("byte_level_bos").encode(FACTS)
    for role in TOKEN_ROLES:
        mask = tokens.at(role)
        for row, length in enumerate(tokens.lengths):
            found = [i for i in range(tokens.ids.shape[1]) if mask[row, i]]
            if role == "last":
                assert found == [length - 1]
            elif role == "subject_first":
                assert found == [tokens.spans[row][0]]  # type: ignore[index]
            else:
                assert found == [i for i, r in enumerate(tokens.roles(row)) if r == role]
    subject = tokens.at("subject")
    assert [int(n) for n in subject.sum(1)] == [stop - start for start, stop in tokens.spans]  # type: ignore[misc]
    assert [int(n) for n in tokens.at(None).sum(1)] == list(tokens.lengths)


def test_positions_count_from_either_end_of_each_prompt() -> None:
    tokens = _reader("byte_level").encode(FACTS)
    assert tokens.at(0).nonzero()[:, 1].tolist() == [0] * len(FACTS)
    assert tokens.at(-1).equal(tokens.at("last"))
    assert tokens.at(-2).nonzero()[:, 1].tolist() == [length - 2 for length in tokens.lengths]
    shortest = min(tokens.lengths)
    for outside in (shortest, -shortest - 1):
        with pytest.raises(SiteError, match="outside of a prompt"):
            tokens.at(outside)


@pytest.mark.parametrize("role", ROLES)
def test_a_target_that_was_appended_has_no_role(role: Role) -> None:
    lm = _reader("byte_level")
    plain, longer = lm.encode([EIFFEL]), lm.encode([EIFFEL], targets=["Paris in France"])
    width = plain.ids.shape[1]
    assert longer.ids.shape[1] > width
    assert longer.at(role)[:, :width].equal(plain.at(role))
    assert not longer.at(role)[:, width:].any()


def test_repeating_a_batch_keeps_rows_in_order() -> None:
    tokens = _reader("byte_level").encode(FACTS)
    twice = tokens.repeat(2)
    assert len(twice) == 2 * len(FACTS)
    assert twice.ids.equal(torch.cat([tokens.ids, tokens.ids]))
    assert twice.spans == tokens.spans * 2
    assert twice.at("subject_last").equal(tokens.at("subject_last").repeat(2, 1))


# --- answers ---


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "target", ["Paris", "São Paulo", "東京", "Zürich is German", "1999", "I don't know", "Zu\u0308rich"]
)
def test_the_tokens_of_an_answer_continue_the_prompt_and_spell_it(style: str, target: str) -> None:
    lm = _reader(style)
    ids = lm.target_ids(EIFFEL.text, target)
    prompt = lm.tokenizer(EIFFEL.text)["input_ids"]
    assert prompt + ids == lm.tokenizer(f"{EIFFEL.text} {target}")["input_ids"]
    assert lm.tokenizer.decode(ids).strip() == target
    assert lm.tokenizer.bos_token_id not in ids
    assert lm.target_ids(EIFFEL.text, f" {target} ") == ids


def test_an_answer_is_appended_up_to_the_token_that_is_only_predicted() -> None:
    lm = _reader("metaspace")
    ids = lm.target_ids(EIFFEL.text, "São Paulo")
    tokens = lm.encode([EIFFEL, ZURICH], targets=["São Paulo", "German"])
    start = tokens.lengths[0]
    assert tokens.lengths == lm.encode([EIFFEL, ZURICH]).lengths
    assert tokens.ids[0, start : start + len(ids) - 1].tolist() == ids[:-1]
    assert int(tokens.mask[0].sum()) == start + len(ids) - 1


@pytest.mark.parametrize("target", ["", "  "])
def test_an_empty_answer_is_refused(target: str) -> None:
    with pytest.raises(ModelError, match="Name the words"):
        _reader("byte_level").target_ids("The city of", target)


def test_an_answer_that_melts_into_the_prompt_is_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("byte_level"))
    tokenizer.add_tokens(["of Paris"])
    with pytest.raises(ModelError, match="has no tokens of its own"):
        LM(tiny_model("gpt2"), tokenizer).target_ids("The city of", "Paris")


# --- what is refused ---


def test_prompts_that_cannot_be_encoded_are_refused_with_a_sentence() -> None:
    lm = _reader("byte_level")
    with pytest.raises(ModelError, match="at least one"):
        lm.encode([])
    with pytest.raises(ModelError, match="prompt is empty"):
        lm.encode([" "])
    with pytest.raises(ModelError, match=r"has 64 positions\. Shorten it"):
        lm.encode(["Paris " * 100])


def test_a_tokenizer_without_offsets_is_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("byte_level"))

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(ModelError, match="slow one"):
        LM(tiny_model("gpt2"), tokenizer)


def test_bos_is_refused_where_the_tokenizer_has_none() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("byte_level"))
    tokenizer.bos_token = None
    assert LM(tiny_model("gpt2"), tokenizer).encode(["Paris"]).lengths
    with pytest.raises(ModelError, match="has no BOS token"):
        LM(tiny_model("gpt2"), tokenizer, bos=True)


@pytest.mark.parametrize("family", NO_ROW)
def test_a_family_without_a_row_is_refused_and_the_known_ones_are_named(family: str) -> None:
    with pytest.raises(ModelError, match=rf"'{family}' is not known; known are .*gpt2.*llama"):
        LM(*tiny_lm_parts(family))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_without_its_head_is_refused(family: str) -> None:
    model, tokenizer = tiny_lm_parts(family)
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        LM(AutoModel.from_config(model.config), tokenizer)


def test_every_row_has_a_tiny_model() -> None:
    assert {tiny_lm(family).layout.family for family in TRACED} == {layout.family for layout in LAYOUTS}


def test_the_text_model_inside_a_multimodal_one_is_found() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "head_dim": 16,
    }
    image = {"image_size": 28, "patch_size": 14, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, **image}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4))
    lm = LM(model, tiny_tokenizer("unigram"))
    assert (lm.n_layers, lm.n_heads, lm.d_model, lm.layout.family) == (4, 4, 48, "gemma3_text")
    self_checks(lm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "falcon"])
def test_the_self_checks_hold_in_every_precision(family: str, dtype: torch.dtype) -> None:
    lm = fresh_lm(family)
    lm.model.to(dtype)  # type: ignore[arg-type]
    assert self_checks(lm).keys() >= {"reading", "identity_patch", "additivity", "key_value", "lens", "padding"}


def test_the_self_checks_refuse_a_model_that_does_not_add_up() -> None:
    """Granite's blocks look like Llama's, but scale what they add."""
    model, tokenizer = tiny_lm_parts("granite")
    model.config.model_type = "llama"  # type: ignore[misc]
    with pytest.raises(ModelError, match=r"does not add up as a llama should \(.*additivity"):
        self_checks(LM(model, tokenizer))


def test_the_self_checks_run_again_when_the_weights_change() -> None:
    lm = fresh_lm("gpt2")
    before = self_checks(lm)
    assert self_checks(lm) is before
    with torch.no_grad():
        next(lm.unembed.parameters())[0, 0] += 1
    assert self_checks(lm) is not before


# --- the name of the weights ---


def test_the_weight_hash_names_the_weights_and_nothing_else() -> None:
    one, same, other = fresh_lm("gpt2"), fresh_lm("gpt2"), fresh_lm("gpt2", seed=1)
    renamed = LM(one.model, one.tokenizer, name="another name", bos=True)
    assert one.weight_hash == same.weight_hash == renamed.weight_hash
    assert one.weight_hash != other.weight_hash
    assert len(one.weight_hash) == 16
    assert int(one.weight_hash, 16) >= 0


def test_the_weight_hash_notices_one_changed_number_and_that_it_was_put_back() -> None:
    lm = fresh_lm("llama")
    before = lm.weight_hash
    weight = lm.part(3, lm.layout.down_proj).weight
    assert isinstance(weight, torch.Tensor)
    old = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = old + 1
        changed = lm.weight_hash
        weight[0, 0] = old
    assert changed != before
    assert lm.weight_hash == before


def test_the_weight_hash_notices_a_replaced_parameter_and_a_new_dtype() -> None:
    lm = fresh_lm("llama")
    before, module = lm.weight_hash, lm.part(0, lm.layout.down_proj)
    old = module.weight
    assert isinstance(old, torch.Tensor)
    module.weight = torch.nn.Parameter(old.detach() + 1)
    assert lm.weight_hash != before
    module.weight = torch.nn.Parameter(old.detach().clone())
    assert lm.weight_hash == before
    lm.model.double()
    assert lm.weight_hash != before


def test_reading_a_model_does_not_change_its_weights(lm: LM) -> None:
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    run(lm, lm.encode([MESSI, JOBS, SAO_PAULO]), read=("resid_post", "mlp_out", "z"))
    assert all(p.equal(before[name]) for name, p in lm.model.named_parameters())


def test_the_protocol_says_what_a_reader_needs_to_repeat_a_run() -> None:
    lm = _reader("byte_level", True)
    assert lm.protocol == {
        "model": lm.name,
        "family": "gpt2",
        "weight_hash": lm.weight_hash,
        "setup_hash": lm.setup_hash,
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 48,
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "float32_products": "highest",
        "bos": True,
    }


@pytest.mark.parametrize("column", [0, 7, 79])
def test_the_hash_sees_a_change_that_autograd_does_not_count(column: int) -> None:
    lm = fresh_lm("llama")
    before = lm.weight_hash
    lm.part(1, lm.layout.down_proj).get_parameter("weight").data[:, column] += 0.5
    assert lm.weight_hash != before
