"""What a model says next, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.facts import Fact
from workbench.hooks import run
from workbench.models import LM, Tokens


def continue_prompts(lm: LM, prompts: Sequence[Fact | str], *, n: int, top_k: int = 1, seed: int = 0) -> list[str]:
    """The next n tokens after each prompt, as text; fewer where the model's positions end.

    The model runs anew for every token, so edits beside the weights see the whole text.

    Args:
        lm: the model.
        prompts: facts or texts.
        n: how many tokens.
        top_k: sampled from so many of the most probable tokens; 1 is greedy.
        seed: of the samples.
    """
    tokens = lm.encode(prompts)
    if lm.n_positions is not None:
        n = min(n, lm.n_positions - tokens.ids.shape[1])
    ids = continue_tokens(lm, tokens, n=n, top_k=top_k, seed=seed)
    return [lm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def continue_tokens(lm: LM, tokens: Tokens, *, n: int, top_k: int, seed: int) -> Tensor:
    """The ids (row, n) that follow each prompt; arguments as those of `continue_prompts`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(tokens), device=tokens.ids.device)
    new = torch.zeros((len(tokens), 0), dtype=torch.long, device=tokens.ids.device)
    for _ in range(n):
        end = tokens.last + new.shape[1]
        top = run(lm, tokens).logits[rows, end].float().cpu().topk(top_k)
        chosen = (
            torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            if top_k > 1
            else torch.zeros_like(top.indices[:, :1])
        )
        token = top.indices.gather(1, chosen).to(new)
        new = torch.cat([new, token], 1)
        ids = torch.nn.functional.pad(tokens.ids, (0, 1))
        mask = torch.nn.functional.pad(tokens.mask, (0, 1))
        ids[rows, end + 1], mask[rows, end + 1] = token[:, 0], True
        tokens = replace(tokens, ids=ids, mask=mask)  # lengths and roles stay those of the prompt
    return new
