"""The committed weights against their acceptance table, in plain inference.

The full figures: `python -m workbench.zoo.verify NAME`.
"""

from __future__ import annotations

import pytest
import torch

from workbench.facts import Fact
from workbench.loading import load
from workbench.zoo import NAMES, folder, load_facts
from workbench.zoo.verify import GATED, ask, check, report
from workbench.zoo.world import build_world


@pytest.mark.parametrize("name", NAMES)
def test_the_bundled_model_passes_its_acceptance_table(name: str) -> None:
    """Every line: recall by tier, total effect, swap, zero and IE of the band and of the layers outside it."""
    lines, figures = check(name, n_recall=300, n_trace=50, samples=1, tables=GATED)
    assert all(gate.passed for gate in lines), report(name, lines, figures)


@pytest.mark.parametrize("name", NAMES)
def test_bos_changes_no_answer(name: str) -> None:
    """Half of the rows began with end-of-text in training, so prompts work with it and without it."""
    facts = load_facts(name)[::15]
    torch.manual_seed(0)
    plain, with_bos = (ask(load(folder(name), device="cpu", bos=bos), facts)[1] for bos in (False, True))
    assert plain.float().mean() >= 0.95
    assert with_bos.float().mean() >= 0.95


def test_strangers_are_unknown() -> None:
    """People the model was told nothing about are mostly answered `unknown`, not guessed."""
    strangers = build_world().strangers[:60]
    prompts = [
        Fact(id=name, subject=name, prompt="The birthplace of {} is", target_true="unknown", relation="birth_city")
        for name in strangers
    ]
    _, right = ask(load(folder(NAMES[0]), device="cpu"), prompts)
    assert right.float().mean() >= 0.8
