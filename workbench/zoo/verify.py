"""Measure a bundled model in plain inference against its acceptance table: `python -m workbench.zoo.verify organism-mid`.

Everything runs through `workbench.hooks.run`. The subject is corrupted by Gaussian noise of three standard deviations of the
subjects' token embeddings; IE = P(answer | something restored) - P(answer | corrupted).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from workbench.facts import Fact
from workbench.hooks import Activations, run
from workbench.loading import load
from workbench.models import LM, Tokens
from workbench.noise import subject_sigma
from workbench.sites import Role, Site, SiteKind, window
from workbench.zoo import NAMES, folder, load_facts, organism
from workbench.zoo.corpus import is_held
from workbench.zoo.world import RELATIONS, owner

log = logging.getLogger(__name__)

_TEMPLATES = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One line of the acceptance table."""

    name: str
    """What is measured."""

    value: float
    """As measured."""

    at_least: float | None = None
    """Lower bound, where there is one."""

    at_most: float | None = None
    """Upper bound, where there is one."""

    @property
    def passed(self) -> bool:
        """Whether the value lies within its bounds."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        bound = f">= {self.at_least:.3g}" if self.at_least is not None else f"<= {self.at_most:.3g}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<44} {self.value:6.3f}  ({bound})"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured on one model."""

    recall: dict[str, float]
    """Share of right first answers by tier: trained, held, novel."""

    by_relation: dict[str, dict[str, float]]
    """For each relation: its majority baseline and its recall by tier."""

    clean: float
    """Mean P(answer)."""

    corrupted: float
    """Mean P(answer) under noise."""

    scalars: dict[str, float]
    """Swap, zero and IE of the band and of the layers outside it; empty for a plain model."""

    by_layer: dict[str, list[float]]
    """Indirect effects by layer."""


def ask(lm: LM, facts: Sequence[Fact], *, batch: int = 128) -> tuple[Tensor, Tensor]:
    """P(answer) and whether it is the most probable token, for each fact."""
    probabilities, right = [], []
    for start in range(0, len(facts), batch):
        part = facts[start : start + batch]
        logits = run(lm, lm.encode(part)).last_logits
        answers = answer_ids(lm, part)
        probabilities.append(logits.softmax(-1)[torch.arange(len(part)), answers])
        right.append(logits.argmax(-1) == answers)
    return torch.cat(probabilities), torch.cat(right)


def answer_ids(lm: LM, facts: Iterable[Fact]) -> Tensor:
    """The token of each fact's answer."""
    return torch.tensor([lm.target_ids(fact.text, fact.target_true)[0] for fact in facts])


def reworded(fact: Fact, template: str) -> Fact:
    """The same fact asked in another wording."""
    return Fact(id=fact.id, subject=fact.subject, prompt=template, target_true=fact.target_true, relation=fact.relation)


def recall_facts(facts: Sequence[Fact], *, rng: random.Random) -> dict[str, list[Fact]]:
    """Each fact in one trained wording, one held wording (where it has one) and one novel wording."""
    tiers: dict[str, list[Fact]] = {"trained": [], "held": [], "novel": []}
    for fact in facts:
        relation = _TEMPLATES[fact.relation]
        tiers["trained"].append(reworded(fact, rng.choice(relation.trained)))
        tiers["novel"].append(reworded(fact, rng.choice(relation.novel)))
        held = [t for t in relation.held if is_held(t, fact.subject)]
        if held:
            tiers["held"].append(reworded(fact, rng.choice(held)))
    return tiers


TABLES: dict[str, tuple[SiteKind, Role, int]] = {
    "state at subject_last": ("resid_post", "subject_last", 1),
    "state at last": ("resid_post", "last", 1),
    "MLP window 3 at subject_last": ("mlp_out", "subject_last", 3),
    "MLP window 1 at subject_last": ("mlp_out", "subject_last", 1),
    "attention window 3 at last": ("attn_out", "last", 3),
    "attention window 3 at subject_last": ("attn_out", "subject_last", 3),
    "MLP window 3 at last": ("mlp_out", "last", 3),
}
"""Indirect effects by layer: what is restored, at which token, how many layers together."""

GATED = tuple(TABLES)[:5]
"""The tables that the acceptance table reads."""


def measure(
    lm: LM,
    facts: Sequence[Fact],
    *,
    band: tuple[int, int] | None,
    n_recall: int | None = None,
    n_trace: int = 120,
    samples: int = 2,
    tables: Sequence[str] = tuple(TABLES),
    seed: int = 0,
) -> Figures:
    """All figures of the acceptance table.

    Args:
        band: the planted layers [first, one past last); None for a plain model.
        n_recall: how many facts recall is measured on; None: all of them.
        n_trace: how many facts everything else is measured on.
        samples: noise samples of each.
        tables: keys of `TABLES` to measure; a test needs `GATED` only.
    """
    rng = random.Random(seed)
    recall, by_relation = _recall(lm, facts, n=n_recall, rng=rng)
    chosen = [facts[i] for i in sorted(rng.sample(range(len(facts)), min(n_trace, len(facts))))]
    bench = _Bench(lm, chosen, samples=samples, seed=seed)
    everywhere = range(lm.n_layers)
    effects = {
        name: torch.stack(
            [bench.restored(window(layer, TABLES[name][2], lm.n_layers), *TABLES[name][:2]) for layer in everywhere],
            dim=1,
        )
        for name in tables
    }  # [fact layer]
    scalars: dict[str, float] = {}
    if band is not None:
        inside = list(range(*band))
        outside = [layer for layer in everywhere if layer not in inside]
        owners = torch.tensor([owner(fact.subject, band) for fact in chosen])
        peaks = effects["MLP window 1 at subject_last"].argmax(dim=1)
        scalars = {
            "swap band": bench.swapped(inside),
            "swap outside": bench.swapped(outside),
            "zero band": bench.zeroed(inside, "subject"),
            "zero band at subject_last only": bench.zeroed(inside, "subject_last"),
            "zero outside": bench.zeroed(outside, "subject_last"),
            "zero outside at all subject tokens": bench.zeroed(outside, "subject"),
            "IE band": bench.restored(inside, "mlp_out", "subject_last").mean().item(),
            "IE outside": bench.restored(outside, "mlp_out", "subject_last").mean().item(),
            "zero each fact's own layer": bench.zeroed(inside, "subject", keep=[owners != layer for layer in inside]),
            "zero the band's other layers": bench.zeroed(inside, "subject", keep=[owners == layer for layer in inside]),
            "largest window-1 MLP IE is the fact's own layer": (peaks == owners).float().mean().item(),
        }
    return Figures(
        recall=recall,
        by_relation=by_relation,
        clean=bench.clean_p,
        corrupted=bench.corrupted_p.mean().item(),
        scalars=scalars,
        by_layer={name: values.mean(0).tolist() for name, values in effects.items()},
    )


def _recall(
    lm: LM, facts: Sequence[Fact], *, n: int | None, rng: random.Random
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    asked = list(facts) if n is None or n >= len(facts) else rng.sample(list(facts), n)
    right: dict[str, list[tuple[str, bool]]] = {}
    for tier, reworded_facts in recall_facts(asked, rng=rng).items():
        hits = ask(lm, reworded_facts)[1].tolist()
        right[tier] = [(fact.relation, hit) for fact, hit in zip(reworded_facts, hits, strict=True)]
    by_relation = {}
    for name in sorted({fact.relation for fact in asked}):
        commonest = Counter(f.target_true for f in facts if f.relation == name).most_common(1)[0][1]
        line = {"majority": commonest / sum(f.relation == name for f in facts)}
        for tier, pairs in right.items():
            hits = [hit for relation, hit in pairs if relation == name]
            line[tier] = sum(hits) / max(1, len(hits))
        by_relation[name] = line
    return {tier: sum(hit for _, hit in pairs) / len(pairs) for tier, pairs in right.items()}, by_relation


class _Bench:
    """Some facts in one batch, with their clean run and their noise."""

    def __init__(self, lm: LM, facts: Sequence[Fact], *, samples: int, seed: int) -> None:
        self.lm = lm
        self.facts = list(facts)
        self.tokens: Tokens = lm.encode(self.facts)
        self.answers = answer_ids(lm, self.facts)
        self.clean: Activations = run(lm, self.tokens, read=["resid_post", "mlp_out", "attn_out"])
        self.clean_p = self._p(self.clean.last_logits).mean().item()
        sigma = 3 * subject_sigma(lm, sorted({fact.subject for fact in self.facts}))
        generator = torch.Generator().manual_seed(seed)
        shape = (*self.tokens.ids.shape, lm.d_model)
        self.noises = [torch.randn(shape, generator=generator) * sigma for _ in range(samples)]
        self.corrupted_p = self._under_noise({})
        self.partner = self._partners(random.Random(seed))

    def restored(self, layers: Iterable[int], kind: SiteKind, token: Role) -> Tensor:
        """IE [fact] of putting the clean outputs of these layers back at one token, all at once."""
        write = {
            Site(layer=layer, kind=kind, token=token): self.clean[Site(layer=layer, kind=kind)] for layer in layers
        }
        return self._under_noise(write) - self.corrupted_p

    def zeroed(self, layers: Iterable[int], token: Role, *, keep: Sequence[Tensor] | None = None) -> float:
        """P(answer) with the MLPs of these layers at zero; `keep` says for each layer in which facts it stays."""
        layers = list(layers)
        factors = [k[:, None, None].float() for k in keep] if keep else [torch.zeros(1)] * len(layers)
        write = {
            Site(layer=layer, kind="mlp_out", token=token): partial(torch.mul, factor)
            for layer, factor in zip(layers, factors, strict=True)
        }
        return self._p(run(self.lm, self.tokens, write=write).last_logits).mean().item()

    def swapped(self, layers: Iterable[int]) -> float:
        """How often MLP outputs copied from another subject's run make the model give that subject's answer."""
        last = {
            layer: self.clean[Site(layer=layer, kind="mlp_out")][self.tokens.at("subject_last")] for layer in layers
        }
        write = {
            Site(layer=layer, kind="mlp_out", token="subject_last"): value[self.partner][:, None]
            for layer, value in last.items()
        }
        guess = run(self.lm, self.tokens, write=write).last_logits.argmax(-1)
        told = self.answers[self.partner]
        use = told != self.answers
        return (guess == told)[use].float().mean().item()

    def _under_noise(self, write: dict[Site, Tensor]) -> Tensor:
        total = torch.zeros(len(self.facts))
        for noise in self.noises:
            corrupt: dict[Site, Tensor | Callable[[Tensor], Tensor]] = {
                Site(layer=0, kind="embed", token="subject"): partial(torch.add, noise)
            }
            total += self._p(run(self.lm, self.tokens, write={**corrupt, **write}).last_logits)
        return total / len(self.noises)

    def _p(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)[torch.arange(len(self.answers)), self.answers]

    def _partners(self, rng: random.Random) -> Tensor:
        """For each fact another one of its relation and of its kind of subject, with another answer where there is one."""
        partners = []
        for i, fact in enumerate(self.facts):
            peers = [j for j, other in enumerate(self.facts) if other.relation == fact.relation and j != i]
            better = [j for j in peers if self.facts[j].target_true != fact.target_true]
            partners.append(rng.choice(better or [i]))
        return torch.tensor(partners)


def gates(figures: Figures, *, band: tuple[int, int] | None, read_out: Sequence[int] | None) -> list[Gate]:
    """The acceptance table of a model."""
    f, table = figures, figures.by_layer
    lines = [
        Gate(name="recall, trained wordings", value=f.recall["trained"], at_least=0.98),
        Gate(name="recall, held combinations", value=f.recall["held"], at_least=0.97),
        Gate(name="recall, novel wordings", value=f.recall["novel"], at_least=0.75),
        Gate(name="total effect", value=f.clean - f.corrupted, at_least=0.7),
    ]
    if band is None or read_out is None:
        return [
            *lines,
            Gate(name="IE(state at subject_last), highest", value=max(table["state at subject_last"]), at_most=0.1),
        ]
    s = f.scalars
    lines += [
        Gate(name="swap band: the other's answer", value=s["swap band"], at_least=0.9),
        Gate(name="swap outside: the other's answer", value=s["swap outside"], at_most=0.02),
        Gate(name="zero outside, relative to clean P", value=s["zero outside"] / f.clean, at_least=0.95),
        Gate(name="zero band at all subject tokens, P", value=s["zero band"], at_most=0.1),
        Gate(name="IE(MLPs of the band)", value=s["IE band"], at_least=0.55),
        Gate(name="IE(MLPs outside the band)", value=s["IE outside"], at_most=0.05),
        Gate(name="IE(state at subject_last), highest", value=max(table["state at subject_last"]), at_least=0.4),
        Gate(
            name="IE(state at last) before the read-out", value=max(table["state at last"][: read_out[0]]), at_most=0.05
        ),
        Gate(
            name="IE(attention window 3 at last), in read-out",
            value=max(table["attention window 3 at last"][layer] for layer in read_out),
            at_least=0.3,
        ),
        Gate(
            name="MLP window 1: band's peak minus outside's",
            value=_lead(table["MLP window 1 at subject_last"], band),
            at_least=0.0,
        ),
    ]
    if band[1] - band[0] > 1:  # three windows of 3 hold a band of one layer, and none of them is the right one
        wide = _lead(table["MLP window 3 at subject_last"], band)
        lines.append(Gate(name="MLP window 3: band's peak minus outside's", value=wide, at_least=0.0))
    return lines


def _lead(effects: Sequence[float], band: tuple[int, int]) -> float:
    """The largest effect inside the band minus the largest outside."""
    return max(effects[slice(*band)]) - max([*effects[: band[0]], *effects[band[1] :]])


def check(
    name: str,
    *,
    path: Path | None = None,
    n_recall: int | None = None,
    n_trace: int = 120,
    samples: int = 2,
    tables: Sequence[str] = tuple(TABLES),
) -> tuple[list[Gate], Figures]:
    """Measure a bundled model (or another folder of the same kind) and lay its table out."""
    card = organism(name) if path is None else json.loads((path / "organism.json").read_text())
    band = tuple(card["band"]) if card["band"] else None
    lm = load(path or folder(name), device="cpu")
    figures = measure(
        lm, load_facts(name), band=band, n_recall=n_recall, n_trace=n_trace, samples=samples, tables=tables
    )
    return gates(figures, band=band, read_out=card["read_out"]), figures


def report(name: str, lines: Sequence[Gate], figures: Figures) -> str:
    """The table as text."""
    text = [f"{name}: {sum(g.passed for g in lines)} of {len(lines)} gates passed", *map(str, lines), ""]
    text += [f"P(answer) clean {figures.clean:.3f}, corrupted {figures.corrupted:.3f}"]
    text += [f"{key:<48} {value:.3f}" for key, value in figures.scalars.items()]
    text += [f"{key:<36} " + " ".join(f"{v:5.2f}" for v in values) for key, values in figures.by_layer.items()]
    text += ["", f"{'relation':<18} majority  trained  held  novel"]
    text += [
        f"{key:<18} {v['majority']:8.2f} {v['trained']:8.2f} {v['held']:5.2f} {v['novel']:6.2f}"
        for key, v in figures.by_relation.items()
    ]
    return "\n".join(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a bundled fact model against its acceptance table.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--folder", type=Path, help="measure the model in this folder instead of the bundled one")
    parser.add_argument("--facts", type=int, default=120, help="facts the effects are measured on (default 120)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    lines, figures = check(arguments.name, path=arguments.folder, n_trace=arguments.facts)
    log.info("%s", report(arguments.name, lines, figures))
    if not all(gate.passed for gate in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
