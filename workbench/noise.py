"""The noise that corrupts a subject in causal tracing: its grammar, its scale and its draws (arXiv 2202.05262, App. B.3-B.4).

Grammar:
- `s3`: Gaussian, 3 times sigma_t, the standard deviation of the subjects' token embeddings; `s` is `s1`
- `0.1`: Gaussian with this standard deviation
- `u0.1`: uniform in [-0.1, 0.1]; `us3`: uniform in [-3 sigma_t, 3 sigma_t]
- `m`: Gaussian with the mean and covariance of the token embeddings
- `t5`: Student-t with 5 degrees of freedom and the same covariance

Where this departs from ROME's code: the covariance of `m` and `t` is that of the vocabulary's embeddings, each token once, and
not that of a sample of Wikipedia, so that it depends on the weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.models import LM

_GRAMMAR = re.compile(r"(?P<family>us|[sutm])?(?P<number>\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)?", re.ASCII)


MOST = 1e6
"""Noise beyond this drowns every embedding, and overflows half precision."""


class NoiseError(InputError):
    """Text that spells no noise."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A parsed noise: which distribution, and its number."""

    family: Literal["gaussian", "uniform", "multivariate", "student"]
    """The distribution."""

    number: float
    """Standard deviation, half width, or degrees of freedom; unused by `multivariate`."""

    relative: bool
    """Whether `number` counts in sigma_t."""

    @classmethod
    def parse(cls, text: str | float | int) -> Noise:
        """The noise spelled by `text`.

        Raises:
            NoiseError: the text does not follow the grammar, or its number makes no noise.
        """
        spelled = str(text).strip()
        match = _GRAMMAR.fullmatch(spelled)
        if match is None or not spelled:
            raise NoiseError(f"{text!r} spells no noise. Write s3, 0.1, u0.1, us3, m or t5.")
        prefix, number = match["family"], match["number"]
        if prefix == "m" and number is None:
            return cls(family="multivariate", number=1.0, relative=False)
        if prefix == "s" and number is None:
            number = "1"
        if prefix == "m" or number is None:
            raise NoiseError(f"{text!r} spells no noise. Write s3, 0.1, u0.1, us3, m or t5.")
        value = float(number)
        least = 2 if prefix == "t" else 0
        if not least < value <= MOST:
            raise NoiseError(f"The noise {text!r} must have a number above {least} and up to {MOST:g}.")
        family: Literal["gaussian", "uniform", "student"] = (
            "student" if prefix == "t" else "uniform" if prefix in ("u", "us") else "gaussian"
        )
        return cls(family=family, number=value, relative=prefix in ("s", "us"))

    def absolute(self, sigma_t: float) -> Noise:
        """The same noise with its number in units of the embedding."""
        return Noise(family=self.family, number=self.number * sigma_t, relative=False) if self.relative else self

    def __str__(self) -> str:
        number = f"{self.number:.10g}"
        return {"gaussian": number, "uniform": f"u{number}", "multivariate": "m", "student": f"t{number}"}[self.family]


def subject_sigma(lm: LM, subjects: Iterable[str]) -> float:
    """sigma_t as ROME computes it: one unbiased standard deviation over all entries of all subjects' token embeddings.

    Every subject is tokenised on its own, without prompt, leading space or special tokens.
    """
    ids = [lm.tokenizer(subject, add_special_tokens=False)["input_ids"] for subject in subjects]
    return float(_embed(lm, [i for row in ids for i in row]).std())


def prompt_sigma(lm: LM, ids: Iterable[int]) -> float:
    """The same deviation over the given tokens only: those of one prompt's own subject."""
    return float(_embed(lm, list(ids)).std())


def draw(lm: LM, noise: Noise, *, samples: int, tokens: int, seed: int) -> Float[Tensor, "sample token d_model"]:
    """Noise vectors, float64 on the CPU: the same for the same seed and shape, as ROME's RandomState gives them.

    Raises:
        NoiseError: the noise still counts in sigma_t.
    """
    if noise.relative:
        raise NoiseError(f"The noise {noise} counts in sigma_t, which is not known yet. Call absolute(sigma_t).")
    random = np.random.RandomState(seed)
    shape = (samples, tokens, lm.d_model)
    if noise.family == "uniform":
        return torch.from_numpy(random.uniform(-1, 1, shape)) * noise.number
    normal = torch.from_numpy(random.randn(*shape))
    if noise.family == "gaussian":
        return normal * noise.number
    every = _embed(lm, range(lm.d_vocab)).double()
    mean, covariance = every.mean(0), torch.cov(every.T)
    values, vectors = torch.linalg.eigh(covariance)
    normal = normal @ (vectors * values.clamp(min=0).sqrt()).T
    if noise.family == "student":
        df = noise.number
        chi2 = torch.from_numpy(random.chisquare(df, (samples, tokens, 1)))
        normal = normal * ((df - 2) / chi2).sqrt()
    drawn: Tensor = mean + normal
    return drawn


def _embed(lm: LM, ids: Iterable[int]) -> Float[Tensor, "token d_model"]:
    """Rows of the token embedding as the model uses them, float32 on the CPU."""
    with torch.no_grad():
        rows: Tensor = lm.embed(torch.tensor(list(ids), device=lm.device)[None])
    return rows[0].float().cpu()
