"""The model from one block on, for prompts that are run many times, as in a search for a value: the rest is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.guard import reading
from workbench.hooks import capture_calls, has_foreign_hooks, run, run_block
from workbench.metrics import lens_logits
from workbench.models import LM, Tokens
from workbench.sites import Site, SiteKind


class Above:
    """A block and all above it, for some prompts.

    What is patched, or stands beside a module, below the block counts as it is when this is made; from the block on, as it is when
    the logits are asked for. Where somebody else has hooked the model, which he may have done above the blocks too, the whole model
    is run every time.

    Args:
        lm: the model.
        tokens: the prompts.
        layer: the block, 0-based.
    """

    def __init__(self, lm: LM, tokens: Tokens, layer: int) -> None:
        self.lm, self.tokens, self.layer = lm, tokens, layer
        self._whole = has_foreign_hooks(lm)
        if self._whole:
            return
        entry = Site(layer=layer, kind="resid_pre")
        acts, calls = capture_calls(lm, tokens, read=[entry])
        self._entering = acts[entry].detach()
        self._calls = {
            above: {name: value for name, value in call.items() if name != "hidden_states"}
            for above, call in calls.items()
            if above >= layer
        }

    def logits(
        self,
        rows: Int[Tensor, "*at"],
        positions: Int[Tensor, "*at"],
        *,
        write: Mapping[SiteKind, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "*at d_vocab"]:
        """The model's output at some tokens, with its graph, for gradients.

        Args:
            rows: which prompts; broadcasts with `positions`.
            positions: which of their tokens.
            write: by kind of site of the first of the blocks, a function applied there.
        """
        lm = self.lm
        if self._whole:
            sites = {Site(layer=self.layer, kind=kind): function for kind, function in (write or {}).items()}
            logits = run(lm, self.tokens, write=sites, grad=True).logits
            return logits[rows.to(logits.device), positions.to(logits.device)]
        hidden = self._entering.clone() if lm.layout.in_place else self._entering
        with reading(lm.model), torch.enable_grad():
            for layer, call in self._calls.items():
                written = write if layer == self.layer else None
                hidden, _ = run_block(lm, layer, {**call, "hidden_states": hidden}, write=written, tokens=self.tokens)
            chosen = hidden[rows.to(hidden.device), positions.to(hidden.device)]
            return lens_logits(lm, chosen, grad=True).to(lm.device)
