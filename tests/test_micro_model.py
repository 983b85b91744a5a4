"""A model small enough for pencil and paper: every number of its causal trace is worked out by hand.

Words are one-hot in four dimensions, and a norm multiplies a one-hot by 2. Prompt: `Alice likes`; answer: `tea`.

- Layer 0's MLP recognises Alice and writes a 1 to dimension 3 (the retrieved fact). Its attention writes nothing.
- Layer 1's attention looks at all tokens alike. It carries a fact in dimension 3 to dimension 0, and Bob to dimension 1.
- `tea` reads dimension 0, `rum` dimension 1, each with c = ln(3) sqrt(5) / 2; the four other words have logit 0.

Clean: the subject is (1, 0, 0, 1), normed sqrt(2) (1, 0, 0, 1), and its value is 1 in dimension 0. Half of it arrives at `likes`:
(1/2, 0, 1, 0), whose root mean square is sqrt(5)/4, so `tea` has logit ln 3 and p = 3 / (3 + 5).
Corrupted (Bob likes): (0, 1/2, 1, 0) in the same way, so `rum` has logit ln 3, and p(tea) = 1 / (3 + 5).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.facts import Fact
from workbench.hooks import run
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint
from workbench.sites import SiteKind

WORDS = ("[UNK]", "Alice", "Bob", "likes", "tea", "rum")
FACT = Fact(id="alice", subject="Alice", prompt="{} likes", target_true="tea", target_new="rum")
CLEAN, CORRUPTED = 3 / 8, 1 / 8
C = math.log(3) * math.sqrt(5) / 2


def micro_model() -> LM:
    """The model of this file's first lines."""
    sizes: dict[str, Any] = {"vocab_size": 6, "hidden_size": 4, "intermediate_size": 1, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    config = LlamaConfig(**sizes, **heads, hidden_act="relu", rms_norm_eps=0.0, max_position_embeddings=16)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:] = torch.eye(4)[[2, 0, 1, 2, 2, 2]]
        first, second = model.model.layers
        first.mlp.gate_proj.weight[0, 0] = first.mlp.up_proj.weight[0, 0] = (
            0.5  # relu(0.5 * 2) * (0.5 * 2) = 1 for Alice
        )
        first.mlp.down_proj.weight[3, 0] = 1.0
        second.self_attn.v_proj.weight[0, 3] = 1 / math.sqrt(2)  # sqrt(2) of the fact becomes 1
        second.self_attn.v_proj.weight[1, 1] = 0.5  # 2 of Bob becomes 1
        second.self_attn.o_proj.weight[:] = torch.eye(4)
        model.lm_head.weight[WORDS.index("tea"), 0] = model.lm_head.weight[WORDS.index("rum"), 1] = C
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    return LM(model, tokenizer, name="micro")


LM_ = micro_model()


def _trace(**changes: object) -> Footprint:
    settings: dict[str, object] = {"corrupt": "swap", "substitutes": ("Bob",), "window": 1, **changes}
    return CausalTrace(**settings)(LM_, [FACT])  # type: ignore[arg-type]


def _scores(kind: SiteKind, **changes: object) -> list[list[float]]:
    """The scores of a map: tokens down, layers across."""
    grid: list[list[float]] = _trace(kinds=(kind,), **changes).grid(kind=kind, column="score").to_numpy().tolist()
    return grid


def _bob_with_the_fact() -> tuple[float, float]:
    """Logits of tea and rum where Bob's MLP output is Alice's.

    The subject is (0, 1, 0, 1), normed sqrt(2) (0, 1, 0, 1): its value is (1, sqrt(2)/2), and half of it arrives at `likes`:
    (1/2, sqrt(2)/4, 1, 0), whose mean square is (1/4 + 1/8 + 1) / 4 = 11/32.
    """
    scale = 1 / math.sqrt(11 / 32)
    return C * scale / 2, C * scale * math.sqrt(2) / 4


def _p(tea: float, rum: float) -> float:
    return math.exp(tea) / (math.exp(tea) + math.exp(rum) + 4)


P_FACT = _p(*_bob_with_the_fact())


def test_the_clean_and_the_corrupted_run_are_those_worked_out() -> None:
    logits = run(LM_, LM_.encode([FACT])).last_logits[0]
    assert logits.tolist() == pytest.approx([0, 0, 0, 0, math.log(3), 0], abs=1e-6)
    facts = _trace().extras["facts"].iloc[0]
    assert facts["clean"] == pytest.approx(CLEAN)
    assert facts["corrupted"] == pytest.approx(CORRUPTED)
    assert facts["total_effect"] == pytest.approx(1 / 4)
    assert (facts["answer"], facts["said"]) == ("tea", "tea")
    assert bool(facts["correct"])


def test_the_state_carries_the_fact_at_the_subject_first_and_at_the_last_token_then() -> None:
    assert _scores("resid_post") == [pytest.approx([CLEAN, CORRUPTED]), pytest.approx([CORRUPTED, CLEAN])]
    effects = _trace(kinds=("resid_post",)).grid(kind="resid_post").to_numpy().tolist()
    assert effects == [pytest.approx([1 / 4, 0], abs=1e-7), pytest.approx([0, 1 / 4], abs=1e-7)]


def test_the_mlp_retrieves_the_fact_at_the_subject_in_layer_0() -> None:
    assert CORRUPTED < P_FACT < CLEAN
    assert _scores("mlp_out") == [pytest.approx([P_FACT, CORRUPTED]), pytest.approx([CORRUPTED, CORRUPTED])]


def test_attention_carries_the_fact_to_the_last_token_in_layer_1() -> None:
    assert _scores("attn_out") == [pytest.approx([CORRUPTED, CORRUPTED]), pytest.approx([CORRUPTED, CLEAN])]


def test_a_window_of_three_restores_both_layers_around_either() -> None:
    assert _scores("mlp_out", window=3) == [pytest.approx([P_FACT, P_FACT]), pytest.approx([CORRUPTED, CORRUPTED])]
    assert _scores("attn_out", window=3) == [pytest.approx([CORRUPTED, CORRUPTED]), pytest.approx([CLEAN, CLEAN])]


def test_an_even_window_reaches_to_the_side_that_its_rule_says() -> None:
    below = {"window": 2, "window_rule": "rome"}
    above = {"window": 2, "window_rule": "paper"}
    assert _scores("mlp_out", **below)[0] == pytest.approx([P_FACT, P_FACT])
    assert _scores("mlp_out", **above)[0] == pytest.approx([P_FACT, CORRUPTED])
    assert _scores("attn_out", **below)[1] == pytest.approx([CORRUPTED, CLEAN])
    assert _scores("attn_out", **above)[1] == pytest.approx([CLEAN, CLEAN])


def test_with_the_mlp_severed_the_restored_subject_retrieves_nothing() -> None:
    """Alice's embedding is back, but dimension 3 stays empty: (1, 0, 0, 0) has no value, and all six logits are 0."""
    assert _scores("resid_pre")[0] == pytest.approx([CLEAN, CLEAN])
    assert _scores("resid_pre", sever="mlp_out")[0] == pytest.approx([1 / 6, CLEAN])
    assert _scores("resid_post", sever="mlp_out")[0] == pytest.approx([CLEAN, CORRUPTED])


def test_with_attention_severed_nothing_arrives_at_the_last_token() -> None:
    assert _scores("resid_post", sever="attn_out") == [
        pytest.approx([CLEAN, CORRUPTED]),  # held at the subject's token, where no attention matters
        pytest.approx([CORRUPTED, CLEAN]),
    ]
    assert _scores("resid_pre", sever="attn_out")[0] == pytest.approx([CLEAN, CLEAN])


def test_the_other_scores_follow_from_the_same_logits() -> None:
    tea, rum = _bob_with_the_fact()
    expected = {
        "logit_diff": (math.log(3), -math.log(3), tea - rum),
        "logp": (math.log(CLEAN), math.log(CORRUPTED), math.log(P_FACT)),
        "rank": (0, 1, 0),
        "kl": (0, CLEAN * math.log(3) + CORRUPTED * math.log(1 / 3), None),
    }
    for score, (clean, corrupted, with_fact) in expected.items():
        trace = _trace(kinds=("mlp_out",), score=score)
        facts, cell = trace.extras["facts"].iloc[0], trace.grid(kind="mlp_out", column="score").iloc[0, 0]
        sign = -1 if score in ("rank", "kl") else 1
        assert facts["clean"] == pytest.approx(clean, abs=1e-6)
        assert facts["corrupted"] == pytest.approx(corrupted, abs=1e-6)
        assert facts["total_effect"] == pytest.approx(sign * (clean - corrupted), abs=1e-6)
        if with_fact is not None:
            assert cell == pytest.approx(with_fact, abs=1e-6)
            assert trace.grid(kind="mlp_out").iloc[0, 0] == pytest.approx(sign * (with_fact - corrupted), abs=1e-6)
