"""What every test gets: one thread, no network, checked tensor shapes, and shared models that must come back unchanged."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub, which reads it once

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

CHECKED = [f"workbench.{name}" for name in ("hooks", "metrics", "models", "noise")]
"""Modules whose annotations, tensor shapes among them, are checked at every call."""

install_import_hook(CHECKED, "beartype.beartype")  # before the first import of any of them

from tests.examples import TRACED, fresh_lm, tiny_lm  # noqa: E402
from workbench.models import LM  # noqa: E402


@pytest.fixture(params=TRACED)
def family(request: pytest.FixtureRequest) -> str:
    """The name of every tiny model that can be traced, one after the other."""
    name: str = request.param
    return name


@pytest.fixture
def lm(family: str) -> Iterator[LM]:
    """The shared tiny model of a family; the test fails if it leaves the weights changed."""
    model = tiny_lm(family)
    before = model.weight_hash
    yield model
    assert model.weight_hash == before, "the test changed a shared model; use fresh_lm"


@pytest.fixture
def gpt2() -> Iterator[LM]:
    """The shared tiny GPT-2, for what does not depend on the family."""
    model = tiny_lm("gpt2")
    before = model.weight_hash
    yield model
    assert model.weight_hash == before, "the test changed a shared model; use fresh_lm"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = fresh_lm("gpt2")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder
