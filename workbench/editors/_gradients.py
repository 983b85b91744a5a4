"""What editors that follow gradients share: what they teach, and how a model is run with weights that are not its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.edits import EditError
from workbench.guard import editing, reading
from workbench.hooks import run
from workbench.models import LM, Tokens

Objective = Literal["target_new", "prompt_last"]
"""Where an answer's tokens are predicted:

- `target_new`: each behind those before it (teacher forcing)
- `prompt_last`: all at the prompt's last token, as a bag of tokens; the same for an answer of one token
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """Prompts, and the answers that they shall get."""

    tokens: Tokens
    """The prompts, with the answers' tokens behind them where those are read."""

    ids: Int[Tensor, "row step"]
    """Tokens of each row's answer."""

    mask: Bool[Tensor, "row step"]
    """True where an answer has a token."""

    at: Int[Tensor, "row step"]
    """The position at which each of them is predicted."""

    @classmethod
    def of(cls, lm: LM, prompts: Sequence[str], answers: Sequence[str], objective: Objective = "target_new") -> Lesson:
        """The lesson that these prompts have these answers."""
        forced = objective == "target_new"
        tokens = lm.encode(prompts, targets=answers if forced else None)
        spelled = [lm.target_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, spelled))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in spelled], device=lm.device)
        steps = torch.arange(width, device=lm.device)
        mask = steps < torch.tensor([[len(one)] for one in spelled], device=lm.device)
        at = torch.where(mask & forced, tokens.last[:, None] + steps, tokens.last[:, None])
        return cls(tokens=tokens, ids=ids, mask=mask, at=at)

    def loss(self, lm: LM) -> Float[Tensor, " row"]:
        """Each row's mean of -log p over the tokens of its answer, in nats, with its graph."""
        logits = run(lm, self.tokens, grad=True).logits
        rows = torch.arange(len(self.tokens), device=logits.device)[:, None]
        there = logits[rows, self.at.to(logits.device)]
        log_p = precise(there).log_softmax(-1).gather(-1, self.ids.to(there.device)[..., None])[..., 0]
        mask = self.mask.to(log_p)
        return -(log_p * mask).sum(1) / mask.sum(1)


def precise(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def put(lm: LM, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, named parameters have something added, with its graph; the sum is made in float32 and cast once.

    The model's own parameter objects are put aside and put back; other threads wait meanwhile.
    """
    with editing(lm.model), learning():
        own = {name: lm.model.get_parameter(name) for name in changes}
        places = {
            name: [
                (module, attribute)
                for module in lm.model.modules()
                for attribute, parameter in module._parameters.items()
                if parameter is own[name]  # a tied parameter stands in several
            ]
            for name in changes
        }
        try:
            for name, change in changes.items():
                weight = (precise(own[name].detach()) + change).to(own[name].dtype)
                for module, attribute in places[name]:
                    module._parameters[attribute] = weight  # type: ignore[assignment]  # a tensor with its graph
            yield
        finally:
            for name, parameter in own.items():
                for module, attribute in places[name]:
                    module._parameters[attribute] = parameter


@contextmanager
def learning() -> Iterator[None]:
    """Within, there are gradients, whatever was turned off by whoever calls.

    Raises:
        EditError: inside of `torch.inference_mode`, which cannot be left.
    """
    if torch.is_inference_mode_enabled():
        raise EditError(
            "Inside of torch.inference_mode() there are no gradients, so this editor cannot learn. Leave it."
        )
    with torch.enable_grad():
        yield


def note(losses: list[float], loss: Float[Tensor, ""]) -> float:
    """The loss as a number, appended to those of the earlier steps.

    Raises:
        EditError: it is not finite.
    """
    losses.append(float(loss.detach()))
    if not math.isfinite(losses[-1]):
        raise EditError(f"The loss is {losses[-1]} after {len(losses) - 1} steps. Take a smaller learning_rate.")
    return losses[-1]


def shadow(lm: LM) -> LM:
    """The model once more, with modules of its own on the same memory: what is done to its modules is not done to the model's.

    Its parameters need no gradient. What stands beside the model's modules is not with it.
    """
    with reading(lm.model):
        shared: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in lm.model.parameters()
        }
        return LM(copy.deepcopy(lm.model, shared), lm.tokenizer, name=lm.name, bos=lm.bos)


def zeros(lm: LM, names: Sequence[str]) -> dict[str, Tensor]:
    """No change yet of these parameters, to be learned: in float32, or float64 where they are."""
    return {
        name: torch.zeros_like(precise(lm.model.get_parameter(name).detach()), requires_grad=True) for name in names
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether a module's weight is (in, out), as GPT-2's Conv1D has it, and not (out, in)."""
    return not isinstance(module, nn.Linear)
