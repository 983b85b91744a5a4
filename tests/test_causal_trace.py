"""Causal tracing equals ROME's protocol written anew, and keeps the identities that any causal trace must keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.examples import EIFFEL, FACTS, SAID, TURNED, ZURICH, fresh_lm, tiny_lm
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.locators.causal_trace import CausalTrace
from workbench.metrics import Answer, ScoreKind, score
from workbench.models import LM, ModelError
from workbench.noise import Noise, NoiseError, draw, subject_sigma
from workbench.results import Footprint
from workbench.sites import Site, SiteError, SiteKind, default_window

ROME_FACTS = (
    SAID,
    Fact(id="start", subject="Steve Jobs", prompt="{} founded"),
    Fact(id="end", subject="Lionel Messi", prompt="This is {}"),
)
"""Without answers: ROME scores what the model says."""

STATES: tuple[SiteKind, ...] = ("resid_post",)


# --- ROME's protocol, written anew with hooks of its own: nothing of the workbench is used below this line ---


class Rome:
    """The protocol of reference for GPT-2: sigma from all subjects, one batch of a clean and ten noised rows, a hook per module."""

    def __init__(self, model: Any, tokenizer: Any, subjects: list[str], *, samples: int = 10) -> None:
        self.model, self.tokenizer, self.samples = model, tokenizer, samples
        table = model.transformer.wte.weight.detach()
        self.sigma = 3 * torch.cat([table[tokenizer.encode(subject)] for subject in subjects]).std().item()

    def subject_range(self, ids: list[int], subject: str) -> tuple[int, int]:
        """Character counting over the tokens decoded one by one."""
        pieces = [self.tokenizer.decode([i]) for i in ids]
        begin = "".join(pieces).index(subject)
        ends = np.cumsum([len(piece) for piece in pieces])
        start = int(np.argmax(ends > begin))
        return start, int(np.argmax(ends >= begin + len(subject))) + 1

    @contextmanager
    def hooked(self, modules: list[tuple[nn.Module, Any]]) -> Iterator[None]:
        def as_hook(change: Any) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> Any:
                x = (out[0] if isinstance(out, tuple) else out).clone()
                change(x)
                return (x, *out[1:]) if isinstance(out, tuple) else x

            return hook

        handles = [module.register_forward_hook(as_hook(change)) for module, change in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def p(self, ids: list[int], span: tuple[int, int], changes: list[tuple[nn.Module, Any]]) -> np.ndarray:
        """Softmax at the last token of all rows; row 0 is clean."""
        noise = self.sigma * np.random.RandomState(1).randn(self.samples, span[1] - span[0], self.model.config.n_embd)

        def corrupt(x: Tensor) -> None:
            x[1:, span[0] : span[1]] += torch.from_numpy(noise).to(x)

        with torch.no_grad(), self.hooked([(self.model.transformer.wte, corrupt), *changes]):
            batch = torch.tensor([ids] * (self.samples + 1))
            out: np.ndarray = self.model(input_ids=batch).logits[:, -1].softmax(-1).numpy()
        return out

    def modules(self, kind: str, layer: int, window: int) -> list[nn.Module]:
        blocks = self.model.transformer.h
        if kind == "state":
            return [blocks[layer]]
        layers = range(max(0, layer - window // 2), min(len(blocks), layer - (-window // 2)))
        return [getattr(blocks[i], kind) for i in layers]

    def trace(self, prompt: str, subject: str, kind: str, window: int, sever: str | None = None) -> dict[str, Any]:
        ids = self.tokenizer.encode(prompt)
        span = self.subject_range(ids, subject)
        base = self.p(ids, span, [])
        answer = int(base[0].argmax())
        scores = np.zeros((len(ids), self.model.config.n_layer))
        for token in range(len(ids)):
            held: list[tuple[nn.Module, Any]] = []
            if sever:
                cut = [getattr(block, sever) for block in self.model.transformer.h]
                held = [(module, self._hold(ids, span, module, token)) for module in cut]
            for layer in range(scores.shape[1]):

                def restore(x: Tensor, token: int = token) -> None:
                    x[1:, token] = x[0, token]

                changes = [*held, *((module, restore) for module in self.modules(kind, layer, window))]
                scores[token, layer] = self.p(ids, span, changes)[1:, answer].mean()
        low, high = base[1:, answer].mean(), base[0, answer]
        return {"scores": scores, "low": low, "high": high, "answer": self.tokenizer.decode([answer]), "span": span}

    def _hold(self, ids: list[int], span: tuple[int, int], module: nn.Module, token: int) -> Any:
        """Pass 1 of the severed trace: what the module gives at the token in the corrupted run."""
        seen: list[Tensor] = []
        self.p(ids, span, [(module, lambda x: seen.append(x.clone()))])

        def hold(x: Tensor) -> None:
            x[1:, token] = seen[0][1:, token]

        return hold


# --- the oracle ---


@pytest.fixture(scope="module")
def rome() -> Rome:
    lm = fresh_lm("gpt2")
    return Rome(lm.model, lm.tokenizer, [fact.subject for fact in ROME_FACTS])


def _agree(trace: Footprint, rome: Rome, fact: Fact, kind: SiteKind, window: int, sever: str | None = None) -> None:
    name = {"resid_post": "state", "mlp_out": "mlp", "attn_out": "attn"}[kind]
    expected = rome.trace(fact.text, fact.subject, name, window, sever)
    facts = trace.extras["facts"].set_index("fact").loc[fact.id]
    np.testing.assert_allclose(
        trace.grid(kind=kind, fact=fact.id, column="score"), expected["scores"], rtol=0, atol=1e-6
    )
    assert facts["clean"] == pytest.approx(expected["high"], abs=1e-6)
    assert facts["corrupted"] == pytest.approx(expected["low"], abs=1e-6)
    assert facts["answer"] == expected["answer"].strip()
    assert abs(expected["high"] - expected["low"]) > 0.01
    assert np.ptp(expected["scores"]) > 0.005
    subject = trace.tokens(fact.id)["token"].isin(["subject_first", "subject_middle", "subject_last"])
    assert (int(subject.argmax()), int(subject.sum())) == (
        expected["span"][0],
        expected["span"][1] - expected["span"][0],
    )


@pytest.mark.parametrize(("window", "engine"), [(1, "sweep"), (3, "sweep"), (4, "sweep"), (10, "sweep"), (4, "loop")])
def test_the_trace_is_romes(rome: Rome, window: int, engine: Any) -> None:
    trace = CausalTrace(window=window, engine=engine)(tiny_lm("gpt2"), ROME_FACTS)
    assert trace.run["sigma"] == pytest.approx(rome.sigma, rel=1e-6)
    for fact in ROME_FACTS if window == 3 else ROME_FACTS[:1]:
        for kind in trace.kinds:
            _agree(trace, rome, fact, kind, window)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["sweep", "loop"])
@pytest.mark.parametrize(("sever", "name"), [("mlp_out", "mlp"), ("attn_out", "attn")])
def test_the_severed_trace_is_romes(rome: Rome, sever: Any, name: str, engine: Any) -> None:
    trace = CausalTrace(kinds=STATES, sever=sever, engine=engine)(tiny_lm("gpt2"), ROME_FACTS)
    whole = CausalTrace(kinds=STATES, engine=engine)(tiny_lm("gpt2"), ROME_FACTS)
    _agree(trace, rome, ROME_FACTS[0], "resid_post", 1, name)
    assert np.abs(trace.table["score"] - whole.table["score"]).max() > 0.001


# --- identities that hold in every family ---


def test_restoring_the_top_of_the_last_token_gives_the_clean_score_and_before_the_subject_the_corrupted_one(
    lm: LM,
) -> None:
    trace = CausalTrace(samples=2, window=3)(lm, [SAID])
    facts = trace.extras["facts"].iloc[0]
    state = trace.grid(kind="resid_post", column="score")
    assert abs(facts["clean"] - facts["corrupted"]) > 1e-3
    assert state.iloc[-1, -1] == pytest.approx(facts["clean"], abs=1e-6)
    assert state.iloc[:-1, -1].to_numpy() == pytest.approx(facts["corrupted"], abs=1e-6)
    before = trace.table[trace.table["token"] == "before_subject"]
    assert len(before) > 0
    assert (before["value"] == 0).all()
    assert (trace.table["value"].abs() > 1e-4).mean() > 0.1


def test_a_severed_path_does_not_matter_above_the_last_layer(lm: LM) -> None:
    plain = CausalTrace(kinds=STATES, samples=2, token="subject_last")(lm, [SAID])
    for sever in ("mlp_out", "attn_out"):
        severed = CausalTrace(kinds=STATES, samples=2, token="subject_last", sever=sever)(lm, [SAID])
        assert severed.table["score"].iloc[-1] == pytest.approx(plain.table["score"].iloc[-1], abs=1e-6)
        assert np.abs(severed.table["score"] - plain.table["score"]).max() > 1e-5


def test_one_restored_cell_is_what_writing_it_by_hand_gives(lm: LM) -> None:
    tokens, samples = lm.encode([SAID]), 2
    trace = CausalTrace(noise=0.3, samples=samples, window=3)(lm, [SAID])
    span = tokens.spans[0]
    assert span is not None
    noise = torch.zeros(samples, tokens.ids.shape[1], lm.d_model)
    noise[:, span[0] : span[1]] = draw(lm, Noise.parse(0.3), samples=samples, tokens=span[1] - span[0], seed=1).float()
    answer = Answer(text="", ids=(int(run(lm, tokens).last_logits[0].argmax()),))
    clean, rows = run(lm, tokens, read=("mlp_out", "attn_out", "resid_post")), tokens.repeat(samples)
    for kind, layers in (("resid_post", (1,)), ("mlp_out", (0, 1, 2)), ("attn_out", (2, 3))):
        for position in (span[1] - 1, tokens.lengths[0] - 1):
            write: dict[Site, Any] = {Site(layer=0, kind="embed"): lambda x: x + noise}
            for layer in layers:
                site = Site(layer=layer, kind=kind)  # type: ignore[arg-type]
                write[Site(layer=layer, kind=kind, token=position)] = clean[site]  # type: ignore[arg-type]
            expected = score("p", run(lm, rows, write=write).logits, rows, answer).mean()
            centre = 3 if len(layers) == 2 else 1
            here = trace.grid(kind=kind, column="score").loc[position, centre]
            assert here == pytest.approx(float(expected), abs=2e-6)


# --- the parameters ---


def test_the_table_and_its_samples_tell_the_same(gpt2: LM) -> None:
    trace = CausalTrace(samples=4)(gpt2, FACTS[:2])
    samples = trace.extras["samples"]
    assert len(samples) == 4 * len(trace.table)
    grouped = samples.assign(effect=samples["score"] - samples["corrupted"]).groupby(["fact", "site"])["effect"]
    rows = trace.table.set_index(["fact", "site"]).sort_index()
    np.testing.assert_allclose(grouped.mean().sort_index(), rows["value"], atol=1e-12)
    np.testing.assert_allclose(grouped.sem().sort_index(), rows["se"], atol=1e-12)
    facts = trace.extras["facts"].set_index("fact")
    np.testing.assert_allclose(
        rows["score"] - rows["value"], facts["corrupted"].reindex(rows.index.get_level_values(0)), atol=1e-12
    )


def test_a_single_sample_has_no_standard_error(gpt2: LM) -> None:
    assert CausalTrace(samples=1, kinds=STATES)(gpt2, [EIFFEL]).table["se"].isna().all()


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(gpt2: LM) -> None:
    def table(seed: int) -> pd.DataFrame:
        return CausalTrace(seed=seed, kinds=STATES)(gpt2, [SAID]).table

    pd.testing.assert_frame_equal(table(1), table(1))
    assert np.abs(table(1)["score"] - table(2)["score"]).max() > 1e-4


@pytest.mark.parametrize("engine", ["sweep", "loop"])
def test_replacing_instead_of_adding_holds_for_the_corrupted_baseline_too(gpt2: LM, engine: Any) -> None:
    tokens = gpt2.encode([SAID])
    span = tokens.spans[0]
    assert span is not None
    trace = CausalTrace(noise=0.4, replace=True, samples=3, kinds=STATES, engine=engine)(gpt2, [SAID])
    drawn = draw(gpt2, Noise.parse(0.4), samples=3, tokens=span[1] - span[0], seed=1).float()

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, span[0] : span[1]] = drawn
        return x

    rows, facts = tokens.repeat(3), trace.extras["facts"].iloc[0]
    corrupted = run(gpt2, rows, write={Site(layer=0, kind="embed"): put}).last_logits.softmax(-1)
    low = float(corrupted[:, int(facts["answer_ids"])].mean())
    assert facts["corrupted"] == pytest.approx(low, abs=1e-6)
    added = CausalTrace(noise=0.4, samples=3, kinds=STATES)(gpt2, [SAID])
    assert abs(added.extras["facts"]["corrupted"][0] - low) > 1e-3
    assert trace.table.loc[trace.table["token"] == "before_subject", "value"].to_numpy() == pytest.approx(0, abs=1e-6)
    top = trace.grid(kind="resid_post", column="score").iloc[-1, -1]
    assert top == pytest.approx(facts["clean"], abs=1e-6)


@pytest.mark.parametrize("noise", ["s1", "u0.2", "us2", "m", "t5", 0.1])
def test_every_noise_corrupts_and_is_recorded(gpt2: LM, noise: str | float) -> None:
    trace = CausalTrace(noise=noise, samples=2, kinds=STATES, window=1)(gpt2, [SAID])
    assert abs(trace.extras["facts"]["total_effect"][0]) > 1e-3
    assert trace.run["parameters"]["samples"] == 2
    assert "s" not in str(trace.run["parameters"]["noise"])


def test_sigma_comes_from_all_subjects_or_from_each_prompts_own(gpt2: LM) -> None:
    facts = [EIFFEL, ZURICH]
    together = CausalTrace(kinds=STATES, samples=1)(gpt2, facts)
    assert together.run["sigma"] == pytest.approx(3 * subject_sigma(gpt2, [f.subject for f in facts]))
    assert "2 facts' subjects" in together.run["parameters"]["sigma_note"]
    own = CausalTrace(kinds=STATES, samples=1, sigma_from="prompt")(gpt2, facts)
    sigmas = own.extras["facts"].set_index("fact")["sigma"]
    ids = gpt2.tokenizer(" Eiffel Tower")["input_ids"]
    table = gpt2.embed.weight
    assert isinstance(table, Tensor)
    assert sigmas["eiffel"] == pytest.approx(3 * float(table[ids].detach().std()), rel=1e-6)
    assert sigmas["zurich"] != sigmas["eiffel"]


@pytest.mark.parametrize("engine", ["sweep", "loop"])
def test_swapping_the_subject_compares_with_the_other_prompt(gpt2: LM, engine: Any) -> None:
    trace = CausalTrace(corrupt="swap", substitutes=(SAID.subject, "a", TURNED), kinds=STATES, engine=engine)(
        gpt2, [SAID]
    )
    facts, state = trace.extras["facts"].iloc[0], trace.grid(kind="resid_post", column="score")
    swapped = gpt2.encode([SAID.prompt.format(TURNED)])
    low = float(run(gpt2, swapped).last_logits[0].softmax(-1)[int(facts["answer_ids"])])
    assert facts["corrupted"] == pytest.approx(low, abs=1e-6)
    assert abs(facts["clean"] - low) > 1e-3
    assert state.iloc[-1, -1] == pytest.approx(facts["clean"], abs=1e-6)
    assert state.iloc[0].to_numpy() == pytest.approx(low, abs=1e-6)
    assert trace.table["se"].isna().all()


def test_a_swap_needs_another_subject_of_equal_length(gpt2: LM) -> None:
    with pytest.raises(FactError, match=r"None of the 2 substitutes has as many tokens as 'Eiffel Tower'"):
        CausalTrace(corrupt="swap", substitutes=("Eiffel Tower", "a"))(gpt2, [SAID])
    with pytest.raises(FactError, match="of equal length"):
        CausalTrace(corrupt="swap")(gpt2, [SAID])


def test_the_other_facts_subjects_are_the_substitutes_where_none_are_given(gpt2: LM) -> None:
    twin = Fact(id="twin", subject=TURNED, prompt="Is {} a city")
    trace = CausalTrace(corrupt="swap", kinds=STATES)(gpt2, [SAID, twin])
    assert trace.run["parameters"]["substitutes"] == ["Eiffel Tower", "Tower Eiffel"]
    assert (trace.extras["facts"]["clean"] != trace.extras["facts"]["corrupted"]).all()


@pytest.mark.parametrize("kind", ["p_target", "logp"])
@pytest.mark.parametrize("engine", ["sweep", "loop"])
def test_answers_of_several_tokens_are_scored_whole(gpt2: LM, kind: ScoreKind, engine: Any) -> None:
    fact = Fact(id="x", subject=SAID.subject, prompt=SAID.prompt, target_true="São Paulo and Rio")
    trace = CausalTrace(score=kind, kinds=STATES, samples=2, engine=engine)(gpt2, [fact])
    ids = gpt2.target_ids(fact.text, fact.target_true)
    assert len(ids) > 1
    tokens = gpt2.encode([fact], targets=[fact.target_true])
    clean = score(kind, run(gpt2, tokens).logits, tokens, Answer(text=fact.target_true, ids=tuple(ids)))
    facts, state = trace.extras["facts"].iloc[0], trace.grid(kind="resid_post", column="score")
    assert facts["clean"] == pytest.approx(float(clean), rel=1e-5)
    assert len(state) == gpt2.encode([fact]).lengths[0]
    assert state.iloc[0].to_numpy() == pytest.approx(facts["corrupted"], rel=1e-5)
    assert abs(facts["total_effect"]) > 0
    if kind == "logp":  # later tokens of the answer still see the corrupted subject
        assert abs(state.iloc[-1, -1] - facts["clean"]) > 1e-4


def test_what_the_model_says_is_scored_by_every_score_whatever_it_is() -> None:
    """A token may be no word: a space, a piece of a word, a byte of a character."""
    lm = fresh_lm("gpt2")
    fact = SAID
    for token in (lm.tokenizer.encode(" ")[0], lm.tokenizer.encode("東")[0], lm.tokenizer.encode("Rio")[0]):
        with torch.no_grad():
            bias = torch.zeros(lm.d_vocab)
            bias[token] = 1e3
            lm.model.lm_head.bias = nn.Parameter(bias)
        for kind in ("p", "p_target", "logp", "rank"):
            trace = CausalTrace(score=kind, kinds=STATES, samples=1)(lm, [fact])
            assert trace.extras["facts"]["answer_ids"][0] == str(token)
            assert bool(trace.extras["facts"]["correct"][0])


@pytest.mark.parametrize("kind", ["rank", "kl"])
def test_positive_means_towards_the_clean_run_also_where_less_is_better(gpt2: LM, kind: ScoreKind) -> None:
    trace = CausalTrace(score=kind, kinds=STATES, samples=3)(gpt2, [EIFFEL])
    facts = trace.extras["facts"].iloc[0]
    assert facts["total_effect"] == pytest.approx(facts["corrupted"] - facts["clean"])
    assert trace.grid(kind="resid_post").iloc[-1, -1] == pytest.approx(facts["total_effect"], abs=1e-5)
    assert facts["clean"] >= 0


def test_a_logit_difference_is_taken_to_the_new_target_or_to_what_the_model_would_say(gpt2: LM) -> None:
    with_foil = CausalTrace(score="logit_diff", kinds=STATES, samples=1)(gpt2, [EIFFEL]).extras["facts"].iloc[0]
    assert with_foil["foil"] == "Rome"
    logits = run(gpt2, gpt2.encode([EIFFEL])).last_logits[0]
    paris, rome = (gpt2.target_ids(EIFFEL.text, word)[0] for word in ("Paris", "Rome"))
    assert with_foil["clean"] == pytest.approx(float(logits[paris] - logits[rome]), abs=1e-5)
    facts = CausalTrace(score="logit_diff", kinds=STATES, samples=1)(gpt2, [SAID]).extras["facts"].iloc[0]
    best = run(gpt2, gpt2.encode([SAID])).last_logits[0].topk(2).values
    assert facts["clean"] == pytest.approx(float(best[0] - best[1]), abs=1e-5)


def test_only_the_tokens_of_a_role_are_restored_where_one_is_named(gpt2: LM) -> None:
    whole = CausalTrace(samples=2)(gpt2, [EIFFEL])
    part = CausalTrace(samples=2, token="subject_last")(gpt2, [EIFFEL])
    rows = whole.table[whole.table["token"] == "subject_last"]
    np.testing.assert_allclose(part.table["score"], rows["score"], atol=1e-6)
    assert part.table["site"].tolist() == rows["site"].tolist()
    with pytest.raises(FactError, match=r"No token of the prompt is 'subject_middle'"):
        CausalTrace(token="subject_middle")(gpt2, [Fact(id="x", subject="P", prompt="{}aris is")])


def test_every_kind_of_site_can_be_restored(lm: LM) -> None:
    kinds: tuple[SiteKind, ...] = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")
    trace = CausalTrace(kinds=kinds, samples=1, window=1)(lm, [ZURICH])
    n = lm.encode([ZURICH]).lengths[0]
    assert trace.table.groupby("kind").size().to_dict() == {
        kind: n * (1 if kind == "embed" else lm.n_layers) for kind in kinds
    }
    pre = trace.grid(kind="resid_pre", column="score").to_numpy()
    post = trace.grid(kind="resid_post", column="score").to_numpy()
    np.testing.assert_allclose(pre[:, 1:], post[:, :-1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(trace.grid(kind="embed", column="score").to_numpy()[:, 0], pre[:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"samples": 0}, FactError, "expected 1 to"),
        ({"samples": 10**7}, FactError, "expected 1 to"),
        ({"samples": 2.5}, FactError, "whole number"),
        ({"seed": -1}, FactError, "expected 0 to"),
        ({"seed": 2**32}, FactError, "expected 0 to"),
        ({"kinds": ()}, FactError, "one or several different ones"),
        ({"kinds": ("z", "z")}, FactError, "one or several different ones"),
        ({"kinds": ("mlp",)}, FactError, "one or several different ones"),
        ({"kinds": "resid_post"}, FactError, "expected a tuple"),
        ({"score": "nope"}, FactError, "expected one of p, "),
        ({"sever": "z"}, FactError, "expected one of none, "),
        ({"noise": "1e400"}, NoiseError, "up to"),
        ({"noise": "s1e9"}, NoiseError, "up to"),
        ({"kinds": ("mlp_out",), "sever": "mlp_out"}, FactError, "cannot be severed and restored at once"),
        ({"window": 0}, SiteError, "expected 1 or more"),
        ({"noise": "loud"}, NoiseError, "spells no noise"),
    ],
)
def test_parameters_that_make_no_trace_are_refused_when_they_are_given(
    settings: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        CausalTrace(**settings)


def test_a_kind_that_the_model_does_not_have_is_refused_before_any_run() -> None:
    with pytest.raises(ModelError, match="no resid_mid"):
        CausalTrace(kinds=("resid_mid",))(tiny_lm("gptj"), [EIFFEL])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_traced_close_to_the_exact_trace(dtype: torch.dtype) -> None:
    lm = fresh_lm("llama")
    exact = CausalTrace(kinds=STATES, samples=3)(lm, [SAID])
    lm.model.to(dtype)  # type: ignore[arg-type]
    half = CausalTrace(kinds=STATES, samples=3)(lm, [SAID])
    assert half.table["score"].dtype == np.float64
    assert half.table["score"].nunique() > 10
    assert np.abs(half.table["score"] - exact.table["score"]).max() < 0.1
    assert half.run["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("n_layers", "window"), [(48, 10), (24, 10), (12, 3), (4, 3)])
def test_the_proposed_window_is_romes_for_models_that_are_deep_enough(n_layers: int, window: int) -> None:
    assert default_window(n_layers) == window
