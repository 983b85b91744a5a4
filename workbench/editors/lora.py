"""Low-rank adapters trained on the new answers (LoRA; Hu et al. 2021, arXiv 2106.09685).

1. Beside matrices W of the attention, in every layer, stand adapters: W x + (alpha / r) B A dropout(x), with B = 0 at the start
   (sec. 4.1, Eq. 3).
2. Adam steps on A and B, all facts in one batch; the loss of a fact is the mean of -log p over the tokens of its new answer, each
   predicted behind those before it.
3. The change is (alpha / r) B A, of rank r at most.

The adapters are `peft`'s, and so is the choice of matrices for a family that it knows (query and value, or the one projection that
holds both); elsewhere all of the attention's matrices but the output projection. They stand in a second tree of modules on the same
memory, so that nothing has to be taken off the model again. The model itself has no dropout meanwhile, the adapters alone have.

Defaults are EasyEdit's, whose steps are 30 for GPT-2 XL, 50 for GPT-J and 70 for Llama 2. There, edits one after the other train
the same adapter on; here each has its own, on top of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.editors._gradients import Lesson, is_transposed, learning, note, shadow
from workbench.editors._values import checked_layers
from workbench.editors.base import Draft, Editor
from workbench.edits import Change, Edit, LowRank
from workbench.facts import Fact, FactError
from workbench.models import LM
from workbench.progress import track

_ADAPTER = "edit"
"""What peft calls ours."""


@dataclass(frozen=True, kw_only=True)
class Lora(Editor):
    """LoRA (arXiv 2106.09685): low-rank adapters in the attention are trained on the new answer and added to the weights.

    The change is a product of rank `r` at most for each adapted matrix.

    The manifest tells `losses`, the mean over the facts at each step, in nats, with dropout. Memories beside the weights, of an
    edit that this one goes on from, are not seen in training.
    """

    r: int = 8
    """Rank of an adapter."""

    alpha: int = 32
    """Scale: an adapter's product is multiplied by alpha / r."""

    dropout: float = 0.1
    """Share of an adapter's inputs that are dropped in training."""

    layers: tuple[int, ...] | None = None
    """Layers whose attention is adapted, from 0; None: all."""

    learning_rate: float = 5e-3
    """Adam's step size."""

    steps: int = 30
    """How many steps of training."""

    seed: int = 0
    """Seed of the adapters' first weights, and of dropout."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        for name, least in (("r", 1), ("alpha", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise FactError(f"{name} is {getattr(self, name)}, expected {least} or more.")
        if not 0 <= self.dropout < 1:
            raise FactError(f"dropout is {self.dropout}, expected 0 or more, and below 1.")
        if self.learning_rate <= 0:
            raise FactError(f"learning_rate is {self.learning_rate}, expected more than 0.")

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The product that each adapter learned, by the weight that it stands beside."""
        layers = checked_layers(lm, range(lm.n_layers) if self.layers is None else self.layers)
        lesson = Lesson.of(lm, [fact.text for fact in facts], [fact.target_new or "" for fact in facts])
        losses: list[float] = []
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=devices), learning():
            torch.manual_seed(self.seed)
            twin = shadow(lm)
            targets = attention_matrices(lm, layers)
            tuner = self._tuner(twin.model, list(targets), is_transposed(next(iter(targets.values()))))
            adapters: dict[str, Any] = {path: twin.model.get_submodule(path).train() for path in targets}
            learned = [parameter for parameter in twin.model.parameters() if parameter.requires_grad]
            for parameter in learned:
                parameter.data = parameter.data.float()  # whatever the model's dtype
            optimizer = torch.optim.Adam(learned, lr=self.learning_rate)
            for step in track(range(1, self.steps + 1), "steps", self.steps):
                loss = lesson.loss(twin).mean()
                note(losses, loss)
                optimizer.zero_grad()
                (loss + self._penalty(adapters)).backward()
                optimizer.step()
                self._stepped(tuner, step)
        changes: dict[str, Change] = {}
        for path, adapter in adapters.items():
            b, a = (x.detach() for x in self._product(adapter))
            rows, columns = (a.T, b) if is_transposed(targets[path]) else (b, a.T)
            if b.shape[1]:
                changes[f"{path}.weight"] = LowRank(rows=rows.contiguous(), columns=columns.contiguous())
        return Draft(changes=changes, told={"losses": [round(loss, 6) for loss in losses]})

    def _tuner(self, model: nn.Module, targets: list[str], transposed: bool) -> Any:
        """Puts adapters into a model."""
        from peft import LoraConfig, LoraModel  # takes seconds

        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=transposed,
        )
        return LoraModel(model, config, _ADAPTER)

    def _penalty(self, adapters: dict[str, Any]) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def _stepped(self, tuner: Any, step: int) -> None:
        """What is done after a step, counted from 1."""

    def _product(self, adapter: Any) -> tuple[Float[Tensor, "d_out r"], Float[Tensor, "r d_in"]]:
        """What an adapter adds to its matrix, as a product."""
        return adapter.scaling[_ADAPTER] * adapter.lora_B[_ADAPTER].weight, adapter.lora_A[_ADAPTER].weight


def attention_matrices(lm: LM, layers: Sequence[int]) -> dict[str, nn.Module]:
    """Which matrices are adapted, by their path in the model: see the module."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(lm.model.config.get_text_config().model_type, ())
    chosen: dict[str, nn.Module] = {}
    for layer in layers:
        found = {
            f"{lm.layout.attn}.{path}": module
            for path, module in lm.part(layer, lm.layout.attn).named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        inputs = {path: module for path, module in found.items() if path != lm.layout.o_proj}
        named = {path: module for path, module in inputs.items() if path.rpartition(".")[2] in known}
        chosen |= {f"{lm.layout.blocks}.{layer}.{path}": module for path, module in (named or inputs).items()}
    return chosen
