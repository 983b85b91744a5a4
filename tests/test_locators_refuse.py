"""What no locator gives back: a map of zeros because answer and foil are one token, and a map that is not of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from tests.examples import EIFFEL, SAID, TURNED, fresh_lm, tiny_lm
from tests.test_locators_contract import LOCATORS, small
from workbench.errors import InputError
from workbench.facts import FactError
from workbench.locators import locate
from workbench.locators.activation_patching import ActivationPatching
from workbench.store import Store

DIFFERENCES = [name for name, cls in LOCATORS.items() if "logit_diff" in get_args(get_type_hints(cls).get("score"))]


ALIKE = replace(EIFFEL, target_new="Paris")


@pytest.mark.parametrize("name", sorted(set(DIFFERENCES) - {"ActivationPatching"}))
def test_a_foil_that_begins_like_the_answer_is_refused(name: str) -> None:
    locator = replace(small(name), score="logit_diff")  # type: ignore[call-arg]
    with pytest.raises(FactError, match="'Paris' and 'Paris' begin with the same token"):
        locator(tiny_lm("gpt2"), [ALIKE])


def test_activation_patching_takes_what_the_model_says_to_the_other_prompt_for_its_foil() -> None:
    found = ActivationPatching(substitutes=(TURNED,))(tiny_lm("gpt2"), [ALIKE])
    assert found.extras["facts"]["foil"][0] != "Paris"
    assert found.table["value"].any()


@pytest.mark.parametrize("name", LOCATORS)
def test_a_map_that_is_not_of_numbers_is_neither_given_nor_stored(name: str, tmp_path: Path) -> None:
    broken = fresh_lm("gpt2")
    with torch.no_grad():
        broken.part(1, broken.layout.down_proj).get_parameter("weight")[:] = torch.nan
    with pytest.raises(InputError):
        locate(small(name), broken, [SAID], store=Store(folder=tmp_path))
    assert not list(tmp_path.iterdir())
