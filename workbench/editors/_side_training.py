"""What editors share that work beside the weights: the place, the loss of an answer, and facts on other subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench import zoo
from workbench.above import Above
from workbench.data import read_facts
from workbench.editors._values import checked_layers
from workbench.editors.base import reserved
from workbench.edits import Edit, EditError, Memory
from workbench.facts import Fact
from workbench.hooks import beside, run
from workbench.layouts import ModelError
from workbench.models import LM, Tokens

M = TypeVar("M", bound=Memory)


def one_layer(lm: LM, layers: Sequence[int] | None) -> tuple[int]:
    """The one layer that is named, or that at three quarters of the depth.

    Raises:
        ModelError: several, or one that the model has not.
    """
    found = checked_layers(lm, (3 * (lm.n_layers - 1) // 4,) if layers is None else layers)
    if len(found) > 1:
        raise ModelError(f"layers is {found}, but a memory stands beside one layer. Name one.")
    return (found[0],)


def earlier(after: Edit | None, kind: type[M], module: str) -> M | None:
    """The memory to go on from.

    Raises:
        EditError: it stands beside another module.
    """
    found = next((side for side in after.sides if isinstance(side, kind)), None) if after is not None else None
    if found is not None and found.module != module:
        raise EditError(
            f"The earlier memory stands beside {found.module}, this editor's beside {module}. Name its layer."
        )
    return found


def read_input(lm: LM, tokens: Tokens, path: str) -> Float[Tensor, "row pos d_in"]:
    """What enters a module."""
    seen: list[Tensor] = []

    def see(x: Tensor, y: Tensor, _: Tokens | None) -> Tensor:
        seen.append(x)
        return y

    with beside(lm, [(path, see)]):
        run(lm, tokens)
    return seen[0]


class AnswerLoss:
    """Negative log-probability of an answer per token, where something else stands for what a module gives.

    An earlier memory beside the module is replaced, so that it is not counted twice.

    Args:
        lm: the model.
        tokens: prompts with the answer appended.
        ids: the answer.
        layer: the block that the module is in.
        path: of the module.
    """

    def __init__(self, lm: LM, tokens: Tokens, ids: Sequence[int], layer: int, path: str) -> None:
        self.lm, self.tokens, self.path = lm, tokens, path
        self.ids = torch.tensor(ids, device=lm.device)
        self.steps = torch.arange(len(ids), device=lm.device)
        self._above = Above(lm, tokens, layer)

    def __call__(self, output: Callable[[nn.Module, Tensor, Tensor, Tokens | None], Tensor]) -> Float[Tensor, " row"]:
        """The loss of every prompt; `output` is called as a `Memory`, and gradients flow through it."""
        module = self.lm.model.get_submodule(self.path)
        rows = torch.arange(len(self.tokens), device=self.lm.device)[:, None]
        where = self.tokens.last.to(self.lm.device)[:, None] + self.steps
        with beside(self.lm, [(self.path, lambda x, _, at: output(module, x, module.forward(x), at))]):
            said = self._above.logits(rows, where)
        said = said if said.dtype == torch.float64 else said.float()
        with torch.enable_grad():
            return -said.log_softmax(-1)[:, self.steps, self.ids].mean(1)


def other_facts(lm: LM, facts: Sequence[Fact], path: str) -> list[Fact]:
    """Facts on other subjects: of a file, or of the bundled model; where the model is no bundled one, of the first of these."""
    name = Path(lm.name).name
    known = read_facts(path) if path else zoo.load_facts(name if name in zoo.NAMES else zoo.NAMES[0])
    subjects = {fact.subject for fact in facts}
    return [fact for fact in known if fact.subject not in subjects]


def probed(facts: Sequence[Fact]) -> set[str]:
    """Every prompt that facts are tested with, and those reserved; an editor that learned from one would know the test."""
    return set(reserved()) | {
        text
        for fact in facts
        for text in (
            fact.text, *fact.paraphrases, *(p.prompt for p in (*fact.neighbors, *fact.portability, *fact.locality))
        )
    }  # fmt: skip
