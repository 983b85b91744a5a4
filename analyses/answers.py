"""What a model answers: how probable an answer is, whether it is what the model says, and what it says at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.hooks import run
from workbench.models import LM

ROWS_AT_ONCE = 64
"""Prompts that run together."""


def log_p(lm: LM, prompts: Sequence[str], answers: Sequence[str]) -> Float[Tensor, " row"]:
    """The mean log-probability per token of each answer after its prompt, under teacher forcing; on the CPU."""
    ids = [lm.target_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = lm.encode(list(prompts), targets=list(answers))
    logits = run(lm, tokens).logits
    steps = (tokens.last[:, None] + torch.arange(max(map(len, ids)), device=logits.device)).clamp(
        max=logits.shape[1] - 1
    )
    rows = torch.arange(len(tokens), device=logits.device)[:, None]
    found = logits[rows, steps].float().cpu().log_softmax(-1)
    return torch.stack([
        row[torch.arange(len(own)), torch.tensor(own)].mean() for row, own in zip(found, ids, strict=True)
    ])  # fmt: skip


def is_said(lm: LM, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether all tokens of each answer are the most probable ones after its prompt, under teacher forcing."""
    found: list[bool] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        texts, wanted = list(prompts[start : start + ROWS_AT_ONCE]), list(answers[start : start + ROWS_AT_ONCE])
        tokens = lm.encode(texts, targets=wanted)
        best, last = run(lm, tokens).logits.argmax(-1).cpu(), tokens.last.tolist()
        for row, (text, answer) in enumerate(zip(texts, wanted, strict=True)):
            ids = lm.target_ids(text, answer)
            found.append(best[row, last[row] : last[row] + len(ids)].tolist() == ids)
    return found


def next_tokens(lm: LM, prompts: Sequence[str]) -> list[int]:
    """The most probable next token of each prompt."""
    found: list[int] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        found += run(lm, lm.encode(list(prompts[start : start + ROWS_AT_ONCE]))).last_logits.argmax(-1).tolist()
    return found
