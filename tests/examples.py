"""Facts and tiny models that many tests share."""

from __future__ import annotations

from functools import cache

from tests.tiny_models import FAMILIES, tiny_lm_parts
from workbench.facts import Fact
from workbench.models import LM

NO_ROW = ("granite", "mixtral", "qwen3_moe")
"""Tiny models of families that the workbench refuses."""

TRACED: tuple[str, ...] = tuple(family for family in FAMILIES if family not in NO_ROW)
"""Tiny models of families with a layout row."""

PARALLEL = ("gptj", "gpt_neox", "phi", "cohere", "falcon")
"""Those whose attention and MLP read the same residual."""

EIFFEL = Fact(
    id="eiffel",
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    relation="landmark_city",
    target_true="Paris",
    target_new="Rome",
)
ZURICH = Fact(id="zurich", subject="Zürich", prompt="The official language of {} is", target_true="German")
JOBS = Fact(id="jobs", subject="Steve Jobs", prompt="{} founded", target_true="Apple")
MESSI = Fact(id="messi", subject="Lionel Messi", prompt="The mother tongue of {}", target_true="Madrid")
SAO_PAULO = Fact(id="sao-paulo", subject="São Paulo", prompt="{} is a city in", target_true="São Paulo")

SAID = Fact(id="said", subject="Eiffel Tower", prompt="The {} is in")
"""A short prompt whose answer is what the model says: random models give it a probability that is worth tracing."""

TURNED = "Tower Eiffel"
"""Another subject of as many tokens."""

FACTS = (EIFFEL, ZURICH, JOBS, MESSI, SAO_PAULO)
"""The subject in the middle, before the last word, at the start, and at the end; short and long."""


@cache
def tiny_lm(family: str, *, seed: int = 0) -> LM:
    """A tiny model, built once and shared: a test that changes it must build its own with `fresh_lm`."""
    return fresh_lm(family, seed=seed)


def fresh_lm(family: str, *, seed: int = 0) -> LM:
    """A tiny model of one's own."""
    return LM(*tiny_lm_parts(family, seed), name=f"tiny-{family}")
