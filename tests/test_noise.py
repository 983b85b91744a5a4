"""The noise has a grammar, ROME's scale and ROME's draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.examples import fresh_lm
from workbench.models import LM
from workbench.noise import Noise, NoiseError, draw, prompt_sigma, subject_sigma


@pytest.mark.parametrize(
    ("text", "family", "number", "relative"),
    [
        ("s3", "gaussian", 3, True),
        ("s", "gaussian", 1, True),
        ("s0.5", "gaussian", 0.5, True),
        ("0.1", "gaussian", 0.1, False),
        (0.1, "gaussian", 0.1, False),
        ("2", "gaussian", 2, False),
        (np.float64(0.25), "gaussian", 0.25, False),
        ("1e-05", "gaussian", 1e-5, False),
        (".5", "gaussian", 0.5, False),
        ("u0.1", "uniform", 0.1, False),
        ("us3", "uniform", 3, True),
        ("m", "multivariate", 1, False),
        ("t5", "student", 5, False),
        (" s3 ", "gaussian", 3, True),
    ],
)
def test_the_grammar_is_the_documented_one(text: str | float, family: str, number: float, relative: bool) -> None:
    noise = Noise.parse(text)
    assert (noise.family, noise.number, noise.relative) == (family, number, relative)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x3",
        "s-3",
        "3s",
        "s3x",
        "u",
        "us",
        "t",
        "m2",
        "0",
        "s0",
        "-0.1",
        "nan",
        "inf",
        "t2",
        "u0",
        "s3,5",
        "3 sigma",
        "٣",
    ],
)
def test_text_that_spells_no_noise_is_refused(text: str) -> None:
    with pytest.raises(NoiseError, match=r"spells no noise|must have a number above"):
        Noise.parse(text)


@pytest.mark.parametrize("text", ["s3", "us0.7"])
def test_a_relative_noise_is_known_once_sigma_is(text: str, gpt2: LM) -> None:
    noise = Noise.parse(text)
    with pytest.raises(NoiseError, match="not known yet"):
        draw(gpt2, noise, samples=1, tokens=1, seed=0)
    absolute = noise.absolute(0.2)
    assert absolute.number == pytest.approx(noise.number * 0.2)
    assert Noise.parse(str(absolute)).number == pytest.approx(absolute.number, rel=1e-9)


@pytest.mark.parametrize("text", ["0.125", "u0.3", "m", "t5"])
def test_an_absolute_noise_parses_from_what_it_prints(text: str) -> None:
    noise = Noise.parse(text)
    assert Noise.parse(str(noise)) == noise
    assert noise.absolute(7.0) == noise


# --- the scale ---


def test_sigma_is_one_deviation_over_all_entries_of_all_subjects_embeddings(gpt2: LM) -> None:
    subjects = ["Eiffel Tower", "Zürich", "東京"]
    table = gpt2.embed.weight
    assert isinstance(table, Tensor)
    rows = torch.cat([table[gpt2.tokenizer(subject)["input_ids"]] for subject in subjects]).detach().double().flatten()
    expected = math.sqrt(float(((rows - rows.mean()) ** 2).sum()) / (len(rows) - 1))
    assert subject_sigma(gpt2, subjects) == pytest.approx(expected, rel=1e-6)


def test_sigma_sees_no_special_token_and_what_the_model_makes_of_its_embeddings() -> None:
    lm = fresh_lm("gemma3")
    ids = lm.tokenizer("Zürich", add_special_tokens=False)["input_ids"]
    assert ids[0] != lm.tokenizer.bos_token_id
    table = lm.embed.weight
    assert isinstance(table, Tensor)
    scaled = table[ids].detach() * math.sqrt(lm.d_model)
    assert subject_sigma(lm, ["Zürich"]) == pytest.approx(float(scaled.std()), rel=1e-5)
    assert prompt_sigma(lm, ids) == pytest.approx(subject_sigma(lm, ["Zürich"]))


# --- the draws ---


def test_gaussian_noise_is_romes_random_state_times_sigma(gpt2: LM) -> None:
    drawn = draw(gpt2, Noise.parse("0.5"), samples=3, tokens=2, seed=1)
    assert torch.equal(drawn, torch.from_numpy(0.5 * np.random.RandomState(1).randn(3, 2, gpt2.d_model)))
    uniform = draw(gpt2, Noise.parse("u0.5"), samples=3, tokens=2, seed=1)
    assert torch.equal(uniform, torch.from_numpy(0.5 * np.random.RandomState(1).uniform(-1, 1, (3, 2, gpt2.d_model))))


@pytest.mark.parametrize("text", ["0.1", "u0.1", "m", "t5"])
def test_equal_seeds_draw_equal_noise_and_the_global_generators_are_left_alone(text: str, gpt2: LM) -> None:
    noise = Noise.parse(text)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = draw(gpt2, noise, samples=4, tokens=3, seed=7)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(draw(gpt2, noise, samples=4, tokens=3, seed=7), one)
    assert not torch.equal(draw(gpt2, noise, samples=4, tokens=3, seed=8), one)
    assert torch.get_rng_state().equal(state)
    assert one.shape == (4, 3, gpt2.d_model)
    assert one.dtype == torch.float64


def test_uniform_noise_fills_its_interval(gpt2: LM) -> None:
    x = draw(gpt2, Noise.parse("u0.3"), samples=200, tokens=2, seed=1)
    assert 0.299 < float(x.max()) <= 0.3
    assert -0.3 <= float(x.min()) < -0.299
    assert float(x.std()) == pytest.approx(0.3 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(("text", "n"), [("m", 40_000), ("t9", 80_000)])
def test_multivariate_noise_has_the_mean_and_covariance_of_the_embeddings(text: str, n: int) -> None:
    lm = fresh_lm("gpt2")
    table = lm.embed.weight
    assert isinstance(table, Tensor)
    with torch.no_grad():  # correlated columns and a mean, or a diagonal covariance would pass too
        table[:, 1] += 0.8 * table[:, 0]
        table[:, 2] += 0.5
    x = draw(lm, Noise.parse(text), samples=n, tokens=1, seed=3)[:, 0]
    rows = table.detach().double()
    expected = torch.cov(rows.T)
    assert float((x.mean(0) - rows.mean(0)).abs().max()) < 0.02
    assert float((torch.cov(x.T) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert float(expected[0, 1]) > 0.05


def test_student_noise_has_heavier_tails_the_fewer_its_degrees_of_freedom(gpt2: LM) -> None:
    def kurtosis(text: str) -> float:
        x = draw(gpt2, Noise.parse(text), samples=20_000, tokens=1, seed=3)[:, 0, 0]
        centred = x - x.mean()
        return float((centred**4).mean() / (centred**2).mean() ** 2)

    assert kurtosis("m") == pytest.approx(3, abs=0.15)
    assert kurtosis("t9") == pytest.approx(3 + 6 / 5, abs=0.5)  # 3 + 6 / (df - 4)
