"""How much a model says an answer: scores on logits. Every result names the one it used.

All are computed in float32 or better, whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.models import LM, Tokens, is_plain

ScoreKind = Literal["p", "p_target", "logp", "logit_diff", "rank", "kl"]
"""What is measured at the end of the prompt:

- `p`: probability of the answer's first token, as ROME does (arXiv 2202.05262)
- `p_target`: probability of the whole answer under teacher forcing
- `logp`: its logarithm, summed over the answer's tokens (Hase et al., arXiv 2301.04213)
- `logit_diff`: logit of the answer's first token minus the foil's (Zhang & Nanda, arXiv 2309.16042)
- `rank`: how many tokens are more probable than the answer's first; 0 is the top
- `kl`: KL(clean || here) of the next-token distributions in nats
"""

SCORES: tuple[ScoreKind, ...] = get_args(ScoreKind)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is scored, in tokens."""

    text: str
    """The answer, without leading space."""

    ids: tuple[int, ...]
    """Its tokens; scores of one token use the first."""

    foil_id: int | None = None
    """First token of the answer that `logit_diff` compares with."""

    foil_text: str = ""
    """That answer's text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """A score of one answer, ready to be taken. Called with logits (row, step, d_vocab) it gives one number a row."""

    kind: ScoreKind
    """What is measured."""

    answer: Answer
    """Of which answer."""

    clean: Float[Tensor, " d_vocab"] | None = None
    """For `kl`: the clean run's logits at the prompt's last token."""

    def __call__(self, logits: Float[Tensor, "row step d_vocab"]) -> Float[Tensor, " row"]:
        """See `score_answer`."""
        return score_answer(self.kind, logits, self.answer, clean=self.clean)

    def of_states(self, lm: LM, hidden: Float[Tensor, "row step d_model"]) -> Float[Tensor, " row"]:
        """The score of states that leave the last block, without all logits in memory at once.

        For probabilities the vocabulary is walked in pieces: only the answer's logits and the log-sum-exp are kept. `rank` and
        `kl` need every logit, so there some rows at a time are scored.
        """
        with torch.no_grad():
            if self.kind in ("p", "p_target", "logp") and type(lm.unembed) is nn.Linear and is_plain(lm.unembed):
                steps = torch.arange(hidden.shape[1], device=hidden.device)
                ids = torch.tensor(self.answer.ids[: len(steps)], device=hidden.device)
                normed = _normed(lm, hidden)
                total = torch.cat([_log_p(lm, some, ids) for some in normed.split(max(1, ROWS_AT_ONCE // len(steps)))])
                return total.sum(-1) if self.kind == "logp" else total.sum(-1).exp()
            at_once = max(1, 2**22 // (lm.d_vocab * hidden.shape[1]))
            return torch.cat([self(lens_logits(lm, some)) for some in hidden.split(at_once)])


ROWS_AT_ONCE = 512
"""Rows whose log-probabilities are computed together."""

TOKENS_AT_ONCE = 4096
"""Tokens of the vocabulary that meet them at a time."""


def _log_p(lm: LM, normed: Float[Tensor, "row step d_embed"], ids: Int[Tensor, " step"]) -> Float[Tensor, "row step"]:
    """Log-probability of one token at each step: its logit minus a running log-sum-exp over pieces of the vocabulary."""
    kept = torch.float64 if normed.dtype == torch.float64 else torch.float32
    total = torch.full(normed.shape[:-1], -torch.inf, dtype=kept, device=normed.device)
    chosen = torch.zeros_like(total)
    for first in range(0, lm.d_vocab, TOKENS_AT_ONCE):
        logits = _unembedded(lm, normed, slice(first, first + TOKENS_AT_ONCE)).to(kept)
        total = torch.logaddexp(total, logits.logsumexp(-1))
        inside = (ids - first).clamp(0, logits.shape[-1] - 1).expand(total.shape)
        mine = (ids >= first) & (ids < first + TOKENS_AT_ONCE)
        chosen = torch.where(mine, logits.gather(-1, inside[..., None])[..., 0], chosen)
    return chosen - total


def score_answer(
    kind: ScoreKind,
    logits: Float[Tensor, "row step d_vocab"],
    answer: Answer,
    *,
    clean: Float[Tensor, " d_vocab"] | None = None,
) -> Float[Tensor, " row"]:
    """The score of one answer in every row, from the logits where it is predicted.

    Args:
        kind: which score.
        logits: at the prompt's last token, and for `p_target` and `logp` at each further token of the answer.
        answer: what is scored.
        clean: for `kl`, the clean run's logits at the prompt's last token.

    Returns:
        One number a row: a probability, nats, logits or a rank.

    Raises:
        InputError: `logit_diff` without a foil, `kl` without `clean`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    last, first = logits[:, 0], answer.ids[0]
    if kind == "p":
        return last.softmax(-1)[:, first].clone()  # a view would keep the probabilities of the whole vocabulary
    if kind == "rank":
        return (last > last[:, [first]]).sum(-1).to(last.dtype)
    if kind == "logit_diff":
        if answer.foil_id is None:
            raise InputError("logit_diff needs a foil: an answer to compare with. Give the fact a target_new.")
        return last[:, first] - last[:, answer.foil_id]
    if kind == "kl":
        if clean is None:
            raise InputError("kl needs the clean run's logits to compare with.")
        reference = clean.to(last.dtype).log_softmax(-1)
        return (reference.exp() * (reference - last.log_softmax(-1))).sum(-1)
    steps = torch.arange(len(answer.ids), device=logits.device)
    ids = torch.tensor(answer.ids, device=logits.device)
    total = logits[:, steps].log_softmax(-1)[:, steps, ids].sum(-1)
    return total if kind == "logp" else total.exp()


def score(
    kind: ScoreKind,
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Tokens,
    answer: Answer,
    *,
    clean: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """The score of one answer in every row of a batch.

    Args:
        kind: which score.
        logits: the model's output; for `p_target` and `logp` of several tokens the prompts were encoded with their target.
        tokens: the prompts.
        answer: what is scored.
        clean: for `kl`, the logits (d_vocab) of the clean run's last prompt token.

    Returns:
        One number a row: a probability, nats, logits or a rank.

    Raises:
        InputError: `logit_diff` without a foil, `kl` without `clean`.
    """
    steps = len(answer.ids) if kind in ("p_target", "logp") else 1
    positions = tokens.last[:, None] + torch.arange(steps, device=logits.device)
    rows = torch.arange(len(tokens), device=logits.device)[:, None]
    return score_answer(kind, logits[rows, positions], answer, clean=clean)


def top_tokens(lm: LM, logits: Float[Tensor, " d_vocab"], k: int = 10) -> list[tuple[str, float]]:
    """The k most probable next tokens and their probabilities, most probable first."""
    p = logits.float().softmax(-1)
    values, ids = p.topk(min(k, len(p)))
    return [(lm.word(int(i)), float(v)) for i, v in zip(ids, values, strict=True)]


def lens_logits(lm: LM, hidden: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... d_vocab"]:
    """The logit lens: hidden states read by the final norm and the unembedding, as if they were the last layer's.

    For `attn_out` and `mlp_out`, which are additions and no states, this reads the addition alone; the norm then rescales it, so
    compare ranks rather than probabilities. A logit scale (Cohere) and a final softcap (Gemma 2) are applied.

    Args:
        lm: the model.
        hidden: the states.
        grad: keep the graph, for gradients.
    """
    with torch.set_grad_enabled(grad):
        return _unembedded(lm, _normed(lm, hidden))


def _normed(lm: LM, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_embed"]:
    normed: Tensor = lm.final_norm(hidden.to(lm.dtype))
    project = getattr(lm.model.get_submodule(lm.layout.final_norm.rpartition(".")[0]), "project_out", None)
    return normed if project is None else project(normed)  # an OPT whose embeddings are narrower than its states


def _unembedded(
    lm: LM, normed: Float[Tensor, "... d_embed"], tokens: slice | None = None
) -> Float[Tensor, "... token"]:
    """The logits of all tokens, or of some where the unembedding is a plain matrix."""
    config = lm.model.config.get_text_config()
    scale, cap = getattr(config, "logit_scale", None), getattr(config, "final_logit_softcapping", None)
    if tokens is None:
        logits: Tensor = lm.unembed(normed)
    else:
        weight, bias = lm.unembed.get_parameter("weight"), getattr(lm.unembed, "bias", None)
        logits = nn.functional.linear(normed, weight[tokens], None if bias is None else bias[tokens])
    logits = logits if scale is None else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
