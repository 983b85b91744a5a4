"""Scores on logits, against closed forms and slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from tests.examples import EIFFEL, SAO_PAULO, ZURICH, tiny_lm
from workbench.hooks import run
from workbench.metrics import SCORES, Answer, ScoreKind, lens_logits, score, score_answer, top_tokens
from workbench.models import LM, Tokens


def _tokens(lengths: tuple[int, ...], width: int) -> Tokens:
    mask = torch.tensor([[i < length for i in range(width)] for length in lengths])
    rows = len(lengths)
    ids = torch.zeros(rows, width, dtype=torch.long)
    return Tokens(ids=ids, mask=mask, lengths=lengths, spans=(None,) * rows, texts=((),) * rows)


LOGITS = torch.tensor([[0.0, 0.0, 0.0], [math.log(1.0), math.log(2.0), math.log(5.0)], [9.0, 9.0, 0.0]])[None]
"""The prompt's last token is the second of three; there, the odds are 1 : 2 : 5."""
ONE = _tokens((2,), 3)
ANSWER = Answer(text="b", ids=(1,), foil_id=2, foil_text="c")


def test_every_score_of_one_token_has_its_closed_form() -> None:
    def value(kind: str) -> float:
        return float(score(kind, LOGITS, ONE, ANSWER, clean=torch.zeros(3)))  # type: ignore[arg-type]

    p = 2 / 8
    assert value("p") == pytest.approx(p)
    assert value("p_target") == pytest.approx(p)
    assert value("logp") == pytest.approx(math.log(p))
    assert value("logit_diff") == pytest.approx(math.log(2 / 5))
    assert value("rank") == 1
    assert value("kl") == pytest.approx(sum(math.log((1 / 3) / (odds / 8)) / 3 for odds in (1, 2, 5)))


@pytest.mark.parametrize("kind", SCORES)
def test_a_score_holds_on_to_none_of_the_logits(kind: ScoreKind) -> None:
    """A map keeps one a cell: thousands of views of the vocabulary's probabilities would be gigabytes."""
    answer = Answer(text=" a", ids=(3,), foil_id=5)
    found = score_answer(kind, torch.randn(4, 1, 100), answer, clean=torch.randn(100))
    assert found.untyped_storage().nbytes() == 4 * found.element_size()


def test_the_most_probable_token_has_rank_0_and_the_least_probable_the_last() -> None:
    assert [float(score("rank", LOGITS, ONE, Answer(text="", ids=(i,)))) for i in range(3)] == [2, 1, 0]


def test_kl_of_a_distribution_with_itself_is_0() -> None:
    assert float(score("kl", LOGITS, ONE, ANSWER, clean=LOGITS[0, 1])) == pytest.approx(0, abs=1e-7)


def test_an_answer_of_several_tokens_multiplies_over_its_tokens() -> None:
    tokens = _tokens((1,), 3)
    answer = Answer(text="x y z", ids=(0, 2, 1))
    factors = (1 / 3, 5 / 8, math.exp(9) / (2 * math.exp(9) + 1))
    assert float(score("p_target", LOGITS, tokens, answer)) == pytest.approx(math.prod(factors))
    assert float(score("logp", LOGITS, tokens, answer)) == pytest.approx(math.log(math.prod(factors)), rel=1e-6)
    assert float(score("p", LOGITS, tokens, answer)) == pytest.approx(1 / 3)


def test_each_row_is_scored_at_its_own_last_token() -> None:
    both = _tokens((2, 1), 3)
    answer = Answer(text="c", ids=(2,))
    assert score("p", LOGITS.repeat(2, 1, 1), both, answer).tolist() == pytest.approx([5 / 8, 1 / 3])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("text", ["the Eiffel Tower", "not 東京", "São Paulo"])
def test_the_log_probability_of_an_answer_equals_a_slow_loop_that_appends_token_by_token(
    family: str, text: str
) -> None:
    lm = tiny_lm(family)
    facts = (EIFFEL, ZURICH, SAO_PAULO)
    ids = lm.target_ids(EIFFEL.text, text)
    assert len(ids) > 1
    slow = []
    for fact in facts:
        total, prompt = 0.0, lm.encode([fact]).ids[0].tolist()
        for token in ids:
            with torch.no_grad():
                total += float(lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)[token])
            prompt.append(token)
        slow.append(total)
    answer, tokens = Answer(text=text, ids=tuple(ids)), lm.encode(facts, targets=[text] * 3)
    logits = run(lm, tokens).logits
    assert score("logp", logits, tokens, answer).tolist() == pytest.approx(slow, abs=1e-4)
    assert score("p_target", logits, tokens, answer).tolist() == pytest.approx([math.exp(x) for x in slow], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_a_model_in_half_precision_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 1000, generator=generator)).to(dtype)
    tokens, answer = _tokens((2, 3), 4), Answer(text="x", ids=(7, 8), foil_id=9)
    clean = torch.randn(1000, generator=generator).to(dtype)
    here = score(kind, logits, tokens, answer, clean=clean)  # type: ignore[arg-type]
    exact = score(kind, logits.double(), tokens, answer, clean=clean.double())  # type: ignore[arg-type]
    assert here.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(here.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_score_that_lacks_what_it_compares_with_is_refused() -> None:
    with pytest.raises(ValueError, match="target_new"):
        score("logit_diff", LOGITS, ONE, Answer(text="b", ids=(1,)))
    with pytest.raises(ValueError, match="clean"):
        score("kl", LOGITS, ONE, ANSWER)


def test_the_top_tokens_come_most_probable_first_and_sum_to_one(gpt2: LM) -> None:
    logits = run(gpt2, gpt2.encode([EIFFEL])).last_logits[0]
    every = top_tokens(gpt2, logits, k=10_000)
    assert len(every) == gpt2.d_vocab
    assert [p for _, p in every] == sorted((p for _, p in every), reverse=True)
    assert sum(p for _, p in every) == pytest.approx(1, abs=1e-5)
    assert every[0][0] == gpt2.word(int(logits.argmax()))
    assert every[0][1] == pytest.approx(float(logits.softmax(-1).max()))
    assert top_tokens(gpt2, logits, k=3) == every[:3]


def test_the_lens_on_the_last_block_is_the_models_own_output(lm: LM) -> None:
    acts = run(lm, lm.encode([EIFFEL]), read=("resid_post",))
    last = acts[f"L{lm.n_layers - 1}.resid_post"]
    torch.testing.assert_close(lens_logits(lm, last), acts.logits, rtol=1e-5, atol=1e-4)
    first = acts["L0.resid_post"]
    assert (lens_logits(lm, first) - acts.logits).abs().max() > 0.1
