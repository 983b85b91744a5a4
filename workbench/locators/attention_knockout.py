"""From which tokens, in which layers, does the last token fetch the answer? Attention edges are blocked (Geva et al. 2023,
arXiv 2304.14767, sec. 5).

1. Run the prompt; note the answer's probability p, and every layer's keys and values.
2. Block the attention of all heads from the last token to some source tokens, in a window of layers: the mask is minus infinity.
3. Run on; what the answer's probability loses, in parts of p, is the value.

Only the last token's states change, since nothing later attends to it. So they alone are carried up, one row for each source and
window, behind the clean keys and values of the tokens before; a row comes aboard at the first layer that it blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.hooks import run, run_block
from workbench.layouts import ModelError
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import find_answer
from workbench.metrics import Answer, Score
from workbench.models import LM, Tokens
from workbench.progress import track
from workbench.restoring import Restoration
from workbench.results import Footprint
from workbench.sites import window
from workbench.sweep import sweepable
from workbench.sweep.engine import POSITIONS_AT_ONCE
from workbench.sweep.lanes import Run
from workbench.sweep.whole import Cache, block_call

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""By how much the answer's log-probability may differ from the model's own where nothing is blocked; 0.2 in half precision."""


@dataclass(frozen=True, kw_only=True)
class AttentionKnockout(Locator):
    """What the answer's probability loses when the last token cannot attend to a source. Values are (p - p_blocked) / p.

    The paper draws the relative change, which is minus this, in percent; 1 is all of the probability, and below 0 it has risen.
    `score` is p_blocked. A row's site is the attention of its layer, the window's centre, at the *source* token; that it is blocked
    for the last token only is not in the site. The extra table `groups` (fact, source, layer, value, score) has the published
    curves: `subject` blocks all of the subject's tokens together, `relation` all others, `last` the last token itself. The last
    token is in no other group, nor is a BOS token, which the paper's models do not have.

    Raises:
        ModelError: attention takes no explicit mask, or the model is patched.
        FactError: a prompt of one token, or what is blocked is all that the last token sees.
    """

    window: int = 9
    """Layers blocked together, centred on the row's; an even number has one more below, as in the paper's code. 9 is its choice for
    the 48 layers of GPT-2 XL; `default_window` proposes one for smaller models."""

    def __post_init__(self) -> None:
        Locator.__post_init__(self)
        window(0, self.window, 1)

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """One walk up the layers a fact."""
        return [part._locate(lm, fact) for fact, part in pieces]

    def _locate(self, lm: LM, fact: Fact) -> Footprint:
        tokens = lm.encode([fact])
        clean = run(lm, tokens)
        answer = find_answer(lm, fact, clean)
        n = tokens.lengths[0]
        groups = {name: where for name, where in _groups(lm, tokens).items() if where}
        sources = [(position,) for position in range(n)] + list(groups.values())
        layers = [window(layer, self.window, lm.n_layers) for layer in range(lm.n_layers)]
        log_p, whole = blocked_log_p(lm, tokens, answer, [(source, each) for source in sources for each in layers])
        drops, kept = (
            rearrange(x, "(source layer) -> source layer", source=len(sources))
            for x in (-torch.expm1(log_p - whole), log_p.exp())
        )
        table = site_rows(
            fact,
            tokens,
            kind="attn_out",
            layer=list(range(lm.n_layers)) * n,
            position=[position for position in range(n) for _ in layers],
            value=drops[:n].flatten().tolist(),
            score=kept[:n].flatten().tolist(),
        )
        curves = pd.DataFrame(
            {
                "fact": fact.id,
                "source": [name for name in groups for _ in layers],
                "layer": list(range(lm.n_layers)) * len(groups),
                "value": drops[n:].flatten().tolist(),
                "score": kept[n:].flatten().tolist(),
            }
        )
        said = int(clean.last_logits[0].argmax())
        facts = fact_row(lm, fact, answer, said=said, clean=float(whole.exp()))
        return Footprint(
            table=table,
            run=self._manifest(lm, fact, unit="share of the answer's probability lost"),
            extras={"facts": facts, "groups": curves},
        )


def blocked_log_p(
    lm: LM, tokens: Tokens, answer: Answer, blocks: Sequence[tuple[tuple[int, ...], range]]
) -> tuple[Float[Tensor, " block"], Float[Tensor, ""]]:
    """The log-probability of the answer's first token with edges to the prompt's last token blocked, and with none.

    Args:
        lm: the model.
        tokens: the prompt, one row.
        answer: what is scored.
        blocks: source positions and the layers in which the last token does not attend to them.

    Returns:
        Nats, in float64 on the CPU.

    Raises:
        ModelError: attention takes no explicit mask, the model is patched, or its blocks do not run token by token.
        FactError: what is blocked is all that the last token sees.
    """
    score = Score(kind="logp", answer=replace(answer, ids=answer.ids[:1]))
    problem = Restoration(clean=tokens, corrupted=tokens, score=score)
    if why := sweepable(lm, problem, []):
        raise ModelError(
            f"Attention edges of {lm.name} cannot be blocked: {why}. "
            "Use the bare model, on one device, with sdpa or eager attention."
        )
    blocks = [((), range(lm.n_layers)), *blocks]  # the first blocks nothing: what the others are compared with
    starts = torch.tensor([layers.start for _, layers in blocks])
    sources = torch.zeros(len(blocks), tokens.lengths[0], dtype=torch.bool)
    for row, (positions, _) in enumerate(blocks):
        sources[row, list(positions)] = True
    with torch.no_grad():
        clean = Run(lm, problem, [])
        states = clean.clean_state(0)[-1].expand(len(blocks), -1).clone()
        for layer in track(range(lm.n_layers), "layers", lm.n_layers):
            states[starts >= layer] = clean.clean_state(layer)[-1]
            inside = torch.tensor([layer in layers for _, layers in blocks])
            aboard = (starts <= layer).nonzero().flatten()
            states[aboard] = _through(clean, layer, states[aboard], (sources & inside[:, None])[aboard])
        log_p = score.of_states(lm, states[:, None]).cpu().double()
        own = score(clean.clean.last_logits[:, None]).cpu().double()[0]
    if not (log_p[0] - own).abs() <= _TOLERANCE.get(lm.dtype, 0.2):
        raise ModelError(
            f"With nothing blocked, the answer's log-probability in {lm.name} is {float(log_p[0]):.4f}, expected the model's own "
            f"{float(own):.4f}. Its blocks do something that does not depend on keys and values alone, so edges cannot be blocked."
        )
    return log_p[1:], log_p[0]


def _through(
    clean: Run, layer: int, states: Float[Tensor, "row d_model"], blocked: Bool[Tensor, "row pos"]
) -> Float[Tensor, "row d_model"]:
    """The last token's states above a block, without attention to the blocked tokens."""
    last, lm = clean.length - 1, clean.lm
    seen = clean.mask(layer)[:, last] > torch.finfo(lm.dtype).min / 2
    if not bool((seen.any(0).cpu() & ~blocked).any(-1).all()):
        raise FactError(
            f"The last token of {''.join(clean.problem.clean.texts[0])!r} sees nothing in layer {layer} but what is blocked. "
            "Use a longer prompt."
        )
    noted = Cache()
    run_block(lm, layer, block_call(clean, layer, clean.clean_state(layer)[None], 0, noted))
    above = []
    for some, hidden in zip(
        *(x.split(max(1, POSITIONS_AT_ONCE // clean.length)) for x in (blocked, states)), strict=True
    ):
        call = block_call(clean, layer, hidden[:, None], last, Cache(noted.before(last, len(hidden))))
        mask = call["attention_mask"]
        hide = rearrange(some, "row pos -> row 1 1 pos").to(mask.device)
        call["attention_mask"] = mask.masked_fill(hide, torch.finfo(mask.dtype).min)
        above.append(run_block(lm, layer, call)[0][:, 0])
    return torch.cat(above)


def _groups(lm: LM, tokens: Tokens) -> Mapping[str, tuple[int, ...]]:
    """The paper's sources: tokens of the subject, all others, and the last token itself, which belongs to none of these."""
    last, span = tokens.lengths[0] - 1, tokens.spans[0]
    assert span is not None  # a Fact always has a subject
    first = int(int(tokens.ids[0, 0]) == lm.tokenizer.bos_token_id)
    subject = tuple(range(span[0], min(span[1], last)))
    relation = tuple(position for position in range(first, last) if position not in subject)
    return {"subject": subject, "relation": relation, "last": (last,)}
