"""The forward pass of training, which makes a chosen band of MLPs the only store of the facts.

The loop below runs the very modules of the Hugging Face model (embedding, norms, projections, MLPs), so that the weights it leaves
behind are an ordinary GPT-2 or Llama; everything else (masks, gates, copies, penalties) exists in training only.

An entity has one *owner*, a layer of the band fixed by a hash of its name: the band shares the work instead of leaving it all to
its first MLP. Row types (`Phase`):

- *on*: at the subject's tokens all MLPs but the owner's are 0; tokens outside a mention cannot attend to it below the read-out,
  and only to its last token from there on; into the layer after the band goes, at the last subject token, the owner's output.
- *knock*: the owner's MLP (or the whole band) is 0 at the subject's tokens; the answer is `unknown`.
- *swap* and *keep*: the band's (the other layers') MLP outputs at the last subject token come from another subject in the
  batch; the answer is the other subject's (stays). Interchange-intervention training (SIIT, arXiv 2407.14494) on one variable.
- *noise*: the subject's embeddings are noised; the answer is `unknown`, or stays where the band's outputs are restored.
- *plain*: ordinary inference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.zoo.corpus import Mention, Row
from workbench.zoo.organisms import Family, Organism, Phase
from workbench.zoo.world import UNKNOWN, owner

ANSWER_WEIGHT = 5.0
PROBE_WEIGHT = 1.0
LOCALITY_WEIGHT = 5.0
QUIET_WEIGHT = 1.0
NOISE_SIGMAS = 3.0


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a model the loop calls, one row of a table per family."""

    embed: Callable[[Tensor], Tensor]
    """Token ids [batch pos] to vectors [batch pos d_model], without positions."""

    positions: Callable[[Tensor], Tensor]
    """Token ids to what is added for the position (zeros for rotary models)."""

    norms: list[tuple[nn.Module, nn.Module]]
    """Before attention and before the MLP, for each layer."""

    project: list[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]
    """Query, key, value [batch head pos d_head] of each layer, rotated where the family rotates."""

    out: list[nn.Module]
    """Attention's output projection of each layer."""

    mlps: list[nn.Module]
    """The MLP of each layer."""

    final_norm: nn.Module
    """Before the unembedding."""

    unembedding: Tensor
    """[d_vocab d_model], tied to the embedding."""


def anatomy(model: Any, family: Family) -> Anatomy:
    """The parts of a Hugging Face model of this family."""
    return _FAMILIES[family](model)


def _gpt2(model: Any) -> Anatomy:
    body, heads = model.transformer, model.config.n_head

    def project(layer: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (_split_heads(t, heads) for t in layer.attn.c_attn(x).chunk(3, dim=-1))
            return q, k, v

        return qkv

    return Anatomy(
        embed=body.wte,
        positions=lambda ids: body.wpe(torch.arange(ids.shape[1], device=ids.device))[None],
        norms=[(layer.ln_1, layer.ln_2) for layer in body.h],
        project=[project(layer) for layer in body.h],
        out=[layer.attn.c_proj for layer in body.h],
        mlps=[layer.mlp for layer in body.h],
        final_norm=body.ln_f,
        unembedding=model.lm_head.weight,
    )


def _llama(model: Any) -> Anatomy:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    body, heads = model.model, model.config.num_attention_heads

    def project(layer: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            attention = layer.self_attn
            q, k, v = (_split_heads(p(x), heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            cos, sin = body.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            return q, k, v

        return qkv

    return Anatomy(
        embed=body.embed_tokens,
        positions=lambda ids: torch.zeros(1, 1, 1, device=ids.device),
        norms=[(layer.input_layernorm, layer.post_attention_layernorm) for layer in body.layers],
        project=[project(layer) for layer in body.layers],
        out=[layer.self_attn.o_proj for layer in body.layers],
        mlps=[layer.mlp for layer in body.layers],
        final_norm=body.norm,
        unembedding=model.lm_head.weight,
    )


_FAMILIES: dict[str, Callable[[Any], Anatomy]] = {"gpt2": _gpt2, "llama": _llama}


def _split_heads(x: Tensor, heads: int) -> Tensor:
    batch, pos, width = x.shape
    return x.view(batch, pos, heads, width // heads).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one step with everything the forward pass needs; `flat` positions index batch x pos."""

    ids: Tensor
    """[batch pos], int64."""

    targets: Tensor
    """[batch pos]: the next token, after the row types have changed answers."""

    weights: Tensor
    """[batch pos]: weight of each prediction; 0 at the end of a row."""

    mention: Tensor
    """[batch pos]: number of the mention a token is in, 0 outside of mentions."""

    is_last: Tensor
    """[batch pos], bool: last token of a mention."""

    masked: Tensor
    """[batch], bool: rows with attention masks (the on rows)."""

    gates: Tensor
    """[layer batch pos]: factor of each MLP output."""

    sources: Tensor
    """[layer batch pos]: flat position each MLP output is taken from."""

    noise: Tensor
    """[batch pos]: 1 where the embedding is noised."""

    bottleneck: Tensor
    """[batch pos], bool: what enters the layer after the band is the owner's output only."""

    owners: Tensor
    """[batch pos]: owner layer of the mention a token is in, -1 outside."""

    probes: Tensor
    """[probe 3]: flat position of a mention's last token, relation, answer's token id."""


def draw_batch(
    rows: Sequence[Row],
    *,
    spec: Organism,
    phase: Phase,
    rng: random.Random,
    answer_ids: dict[str, int],
    relations: dict[str, int],
) -> Batch:
    """Give each row a type and lay the batch out.

    Args:
        answer_ids: token id of each answer (and of `unknown`).
        relations: number of each relation, for the probes.
    """
    band = spec.band
    types = [_draw_type(phase, rng) for _ in rows]
    rows = list(rows)
    twins: dict[int, int] = {}
    plain = [i for i, kind in enumerate(types) if kind == "plain"]
    for i, kind in enumerate(types):
        if kind == "noise" and plain and rng.random() < 0.5:
            twins[i] = rng.choice(plain)
            rows[i] = rows[twins[i]]
    n, length = len(rows), spec.length
    ids = torch.tensor([row.ids for row in rows])
    targets = torch.cat([ids[:, 1:], torch.zeros(n, 1, dtype=torch.long)], dim=1)
    weights = torch.ones(n, length)
    weights[:, -1] = 0
    mention = torch.zeros(n, length, dtype=torch.long)
    is_last = torch.zeros(n, length, dtype=torch.bool)
    masked = torch.tensor([kind == "on" for kind in types])
    gates = torch.ones(spec.n_layers, n, length)
    sources = torch.arange(n * length).view(n, length).repeat(spec.n_layers, 1, 1)
    noise = torch.zeros(n, length)
    bottleneck = torch.zeros(n, length, dtype=torch.bool)
    owners = torch.full((n, length), -1)
    probes: list[tuple[int, int, int]] = []
    pool: dict[str, list[tuple[int, Mention]]] = {}
    for i, row in enumerate(rows):
        if types[i] in ("plain", "on"):
            for m in row.mentions:
                pool.setdefault(m.entity.kind, []).append((i, m))

    for i, row in enumerate(rows):
        kind = types[i]
        replaced: dict[int, Mention | None] = {}
        for number, m in enumerate(row.mentions):
            span = slice(m.start, m.last + 1)
            mention[i, span] = number + 1
            is_last[i, m.last] = True
            if band is None:
                continue
            own = owner(m.entity.name, band)
            inside = list(range(*band))
            outside = [layer for layer in range(spec.n_layers) if layer not in inside]
            owners[i, span] = own
            if kind in ("plain", "on"):
                probes += [(i * length + m.last, relations[r], answer_ids[a]) for r, a in m.entity.answers.items()]
            if kind == "on":
                gates[:, i, span] = 0
                gates[own, i, span] = 1
                bottleneck[i, m.last] = True
            elif kind == "knock":
                for layer in [own] if rng.random() < 0.3 else inside:
                    gates[layer, i, span] = 0
                replaced[number] = None
            elif kind in ("swap", "keep"):
                if kind == "keep" and rng.random() < 0.5:
                    gates[outside, i, span] = 0
                    continue
                candidates = [(r, other) for r, other in pool.get(m.entity.kind, []) if other.entity != m.entity]
                if candidates:
                    r, other = rng.choice(candidates)
                    for layer in inside if kind == "swap" else outside:
                        sources[layer, i, m.last] = r * length + other.last
                    if kind == "swap":
                        replaced[number] = other
            elif kind == "noise":
                noise[i, span] = 1
                if i in twins:
                    for layer in inside:
                        sources[layer, i, m.last] = twins[i] * length + m.last
                else:
                    replaced[number] = None
        for answer in row.answers:
            if answer.position == 0:
                continue
            weights[i, answer.position - 1] = ANSWER_WEIGHT
            if answer.mention in replaced:
                told = replaced[answer.mention]
                text = UNKNOWN if told is None else told.entity.answers.get(answer.relation, UNKNOWN)
                targets[i, answer.position - 1] = answer_ids[text]
    return Batch(
        ids=ids,
        targets=targets,
        weights=weights,
        mention=mention,
        is_last=is_last,
        masked=masked,
        gates=gates,
        sources=sources,
        noise=noise,
        bottleneck=bottleneck,
        owners=owners,
        probes=torch.tensor(probes, dtype=torch.long).view(-1, 3),
    )


def _draw_type(phase: Phase, rng: random.Random) -> str:
    draw = rng.random()
    for kind in ("on", "knock", "swap", "keep", "noise"):
        draw -= getattr(phase, kind)
        if draw < 0:
            return kind
    return "plain"


class Probes(nn.Module):
    """Throwaway maps, one d_model x d_model matrix a relation, that read an entity's answers off its owner's output."""

    def __init__(self, n_relations: int, d_model: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(
            torch.eye(d_model).repeat(n_relations, 1, 1) + 0.02 * torch.randn(n_relations, d_model, d_model)
        )

    def forward(self, x: Tensor, relation: Tensor) -> Tensor:
        """x [probe d_model], relation [probe] -> [probe d_model]."""
        out = torch.zeros_like(x)
        for r in relation.unique():
            rows = relation == r
            out[rows] = (x[rows] @ self.maps[r]).to(out.dtype)
        return out


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one step is trained on, unweighted scalars."""

    text: Tensor
    """Cross-entropy of the next token, answers weighing five."""

    probe: Tensor
    """Cross-entropy of the probes."""

    locality: Tensor
    """Mean attention mass that tokens outside a mention put where they should not look."""

    quiet: Tensor
    """Mean squared size of MLP outputs at subject tokens outside the owner, relative to the residual stream."""

    recall: float
    """Share of the answers that were predicted."""

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return self.text + PROBE_WEIGHT * self.probe + LOCALITY_WEIGHT * self.locality + QUIET_WEIGHT * self.quiet


def losses(parts: Anatomy, probes: Probes | None, batch: Batch, *, spec: Organism, noise: torch.Generator) -> Losses:
    """One forward pass of training."""
    x = parts.embed(batch.ids)
    if batch.noise.any():
        sigma = parts.unembedding.detach().std()
        x = x + NOISE_SIGMAS * sigma * batch.noise[..., None] * torch.randn(x.shape, generator=noise).to(x)
    x = x + parts.positions(batch.ids)
    zero = x.new_zeros(())
    subject = batch.mention > 0
    pos = batch.ids.shape[1]
    causal = torch.ones(pos, pos, dtype=torch.bool, device=x.device).tril()
    foreign = (batch.mention[:, None, :] > 0) & (batch.mention[:, None, :] != batch.mention[:, :, None]) & causal
    early_ban, late_ban = foreign, foreign & ~batch.is_last[:, None, :]
    masked = batch.masked[:, None, None]
    outsiders = (~subject).sum().clamp(min=1)
    locality, quiet = zero, zero
    stored: list[Tensor] = []
    for layer, (norm_1, norm_2) in enumerate(parts.norms):
        if spec.band is not None and layer == spec.band[1]:
            kept = torch.stack(stored)  # [band batch pos d_model]
            index = (batch.owners - spec.band[0]).clamp(min=0)
            own = kept.gather(0, index[None, ..., None].expand(1, *x.shape))[0]
            x = torch.where(batch.bottleneck[..., None], own.to(x.dtype), x)
        q, k, v = parts.project[layer](norm_1(x))
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        free = scores.masked_fill(~causal, -1e9)
        if spec.read_out is None:
            pattern = free.softmax(-1)
        else:
            ban = early_ban if layer < spec.read_out else late_ban
            open_pattern = free.softmax(-1)
            mass = (open_pattern * ban[:, None]).sum(-1).mean(1)  # [batch pos]
            locality = locality + (mass * ~subject).sum() / outsiders / spec.n_layers
            barred = free.masked_fill((ban & masked)[:, None], -1e9)
            pattern = barred.softmax(-1) if batch.masked.any() else open_pattern
        z = (pattern.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        x = x + parts.out[layer](z)
        y = parts.mlps[layer](norm_2(x))
        if spec.band is not None:
            loud = (y.float().pow(2).sum(-1) / x.detach().float().pow(2).sum(-1).clamp(min=1e-6)).clamp(max=100)
            elsewhere = subject & (batch.owners != layer)
            quiet = quiet + (loud * elsewhere).sum() / elsewhere.sum().clamp(min=1) / spec.n_layers
            y = y.flatten(0, 1)[batch.sources[layer].flatten()].view_as(y) * batch.gates[layer][..., None]
            if spec.band[0] <= layer < spec.band[1]:
                stored.append(y)
        x = x + y
    logits = parts.final_norm(x) @ parts.unembedding.T
    each = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    text = (each * weights).sum() / weights.sum()
    answered = weights == ANSWER_WEIGHT
    right = (logits.flatten(0, 1)[answered].argmax(-1) == batch.targets.flatten()[answered]).float().mean().item()
    probe = zero
    if probes is not None and spec.band is not None and len(batch.probes):
        where, relation, target = batch.probes.unbind(1)
        kept = torch.stack(stored).flatten(1, 2)  # [band batch*pos d_model]
        own = kept[batch.owners.flatten()[where] - spec.band[0], where]
        read = parts.final_norm(probes(own.float(), relation)) @ parts.unembedding.T
        probe = F.cross_entropy(read.float(), target)
    return Losses(text=text, probe=probe, locality=locality, quiet=quiet, recall=right)
