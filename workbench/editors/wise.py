"""WISE: a side copy of one down projection, used for prompts that change it a lot. Wang et al. 2024 (arXiv 2405.14768), section 2.

1. The side memory W' starts as W. D(x) is the mean over a prompt's tokens of |a (W' - W)|, a the module's input (eq. 3).
2. Each of k shards has a random mask of ratio rho; two share about rho^2 of the entries (theorem 2.1). A fact is trained in one
   shard by SGD on its masked gradient (eq. 7) of the loss (eq. 4, 5)
   -log p(answer) + max(0, D(x_i) - alpha) + max(0, beta - D(x_e)) + max(0, gamma - (D(x_e) - D(x_i))),
   x_e the prompt alone and after texts that the model writes, x_i prompts on other subjects.
3. The shards become one memory by TIES: W' = W + Ties({W_i - W}) (eq. 8; Yadav et al. 2023, arXiv 2306.01708).
4. A prompt is answered with W' where D(x) reaches eps, the smallest D(x_e) of the edited prompts (eq. 6), else with W.
   With `retrieve`, full memories are kept, and the one with the largest D among those that reach theirs answers.

Departures. Facts are dealt to the shards in turn and a stream of edits goes on training them, where the paper fills one after the
other; masks stay, where the published code draws them again every 500 edits. eps is taken of the merged memory, so that every
edited prompt reaches it; the code keeps those of before the merge. Each row is routed by itself, in Conv1D and with biases too; the
code reads one row, and takes the maximum over tokens from 100 tokens on. The code counts |act(y') - act(y)| of the outputs:
`activation="code"`. Its retrieval compares with the newest memory's D even where that is rejected; here, memories that reach their
threshold are compared with each other. No weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import Self

from workbench.editors._side_training import AnswerLoss, earlier, one_layer, other_facts, probed, read_input
from workbench.editors._values import better, down_path, in_contexts, write_prefixes
from workbench.editors.base import Draft, Editor
from workbench.edits import Edit, EditError, Memory, unedited
from workbench.facts import Fact, FactError
from workbench.layouts import ModelError
from workbench.models import LM, Tokens

ROUNDING = 1e-3
"""How far below its threshold, as a share of it, a prompt is still routed: the same prompt in another batch gives another D."""

ENOUGH, STILL = 0.02, 1e-4
"""Training of a fact ends where the loss is at most the one and changes by at most the other, as in the published code."""

ROWS_AT_ONCE = 64
"""Prompts whose D is measured together."""

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
"""Under which of these a config names the MLP's nonlinearity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SideMemory(Memory):
    """Side copies of one weight, as differences W' - W from input to output."""

    merged: Float[Tensor, "memory d_in d_out"]
    """What each memory adds to the weight."""

    shards: Float[Tensor, "memory shard d_in d_out"]
    """What it was merged from, to go on training."""

    thresholds: Float[Tensor, " memory"]
    """From which D on a memory answers: eps, or in retrieval eps times `act_ratio`."""

    prompts: tuple[str, ...]
    """What was edited, in order."""

    members: tuple[int, ...]
    """The memory that each of them is in."""

    activation: str
    """The nonlinearity between outputs and distance; empty for none."""

    def change(self, memory: int, x: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_out"]:
        """What a memory adds to the module's output; float32 or better."""
        delta = self.merged[memory].to(x.device)
        return x.to(delta) @ delta

    def __call__(
        self,
        module: nn.Module,
        x: Float[Tensor, "row pos d_in"],
        y: Float[Tensor, "row pos d_out"],
        tokens: Tokens | None,
    ) -> Float[Tensor, "row pos d_out"]:
        """Rows that reach no threshold keep their output bit for bit. Where the prompts are not known, all tokens count."""
        where = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if tokens is None else tokens.at(None)
        changes = [self.change(memory, x) for memory in range(len(self.merged))]
        d = torch.stack([distance(change, y, where, self.activation) for change in changes])
        reached = d >= self.thresholds.to(d)[:, None] * (1 - ROUNDING)
        if not bool(reached.any()):
            return y
        best = torch.where(reached, d, -torch.inf).argmax(0)
        change = torch.stack(changes)[best, torch.arange(len(x), device=x.device)]
        return torch.where(reached.any(0)[:, None, None], (y.to(change) + change).to(y.dtype), y)


def distance(
    change: Float[Tensor, "row pos d_out"],
    y: Float[Tensor, "row pos d_out"],
    where: Bool[Tensor, "row pos"],
    activation: str,
) -> Float[Tensor, " row"]:
    """D: how much a change moves the outputs `y`, as a mean over the tokens `where`; behind a nonlinearity, where one is named."""
    if activation:
        act, before = ACT2FN[activation], y.to(change)
        change = act(before + change) - act(before)
    lengths: Tensor = torch.linalg.vector_norm(change, dim=-1)
    where = where.to(lengths.device)
    return (lengths * where).sum(1) / where.sum(1)


def ties(vectors: Float[Tensor, "vector ..."], *, density: float) -> Float[Tensor, " ..."]:
    """TIES (arXiv 2306.01708, section 3), equal weights.

    1. Of each vector, the share `density` of its entries with the largest magnitudes is kept.
    2. Each entry's sign is that of the sum over vectors.
    3. It becomes the mean over the vectors of that sign; 0 where there is none.
    """
    flat = vectors.flatten(1)
    kept = torch.zeros_like(flat)
    top = flat.abs().topk(round(density * flat.shape[1]), dim=1).indices
    kept.scatter_(1, top, flat.gather(1, top))
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    merged = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged.reshape(vectors.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Wise(Editor):
    """WISE (arXiv 2405.14768): a trained copy of one down projection answers edited prompts, the original all others.

    Hyperparameters are those of its table 10. Facts are trained one after the other; `after` goes on.
    """

    beside_weights = True
    one_by_one = True

    layers: tuple[int, ...] | None = None
    """The layer (0-based, one) of the down projection; None: the preset's, or that at three quarters of the depth."""

    rho: float = 0.2
    """Share of the weight's entries that a shard may change."""

    shards: int = 2
    """How many shards a memory is merged from: k."""

    alpha: float = 5.0
    """Margin in training: the distance D of other prompts should be below this."""

    beta: float = 20.0
    """Margin in training: the distance D of edited prompts should be above this."""

    gamma: float = 10.0
    """Margin in training: the two distances should be at least so far apart."""

    learning_rate: float = 1.0
    """Step size of SGD."""

    n_iter: int = 70
    """Most steps of training for a fact."""

    norm_constraint: float | None = 1.0
    """How far any entry of W' may be from W's; None: as far as it goes."""

    merge: Literal["ties", "mean"] = "ties"
    """How shards become one memory; mean: the mean of their differences."""

    density: float = 0.53
    """Share of each shard's entries that TIES keeps."""

    retrieve: bool = False
    """Keep several memories and let a prompt choose (WISE-Retrieve), instead of one for all."""

    capacity: int = 1000
    """With `retrieve`: how many facts a memory holds before the next begins."""

    act_ratio: float = 0.88
    """With `retrieve`: the threshold's share of eps, as in the published code."""

    eps_of: Literal["prompts", "contexts"] = "prompts"
    """Whose smallest D is eps: the edited prompts alone, or after the texts too, which lets more paraphrases in, and neighbors."""

    activation: Literal["paper", "code"] = "paper"
    """Whether D is taken of outputs, as in the paper, or behind the model's nonlinearity, as in the published code."""

    n_prefixes: int = 10
    """How many texts are put before a fact's prompt in training."""

    prefix_length: int = 10
    """Length of these texts in tokens; the model writes them."""

    locality: Literal["others", "given"] = "others"
    """Prompts that should stay: of facts on other subjects, or the fact's own neighbors and locality, which tests may use too."""

    n_locality: int = 10
    """How many prompts that should stay are drawn, anew for every fact."""

    pool: str = ""
    """A file of facts on other subjects; empty: the bundled models' facts."""

    seed: int = 0
    """Seed of masks, texts and choice of prompts."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        if not (0 < self.rho <= 1 and 0 < self.density <= 1 and self.learning_rate > 0):
            raise FactError(
                f"rho is {self.rho}, density {self.density} and learning_rate {self.learning_rate}, expected numbers above 0, and "
                "rho and density at most 1."
            )
        if (
            min(self.shards, self.n_iter, self.capacity, self.n_locality) < 1
            or min(self.n_prefixes, self.prefix_length) < 0
        ):
            raise FactError(
                f"shards is {self.shards}, n_iter {self.n_iter}, capacity {self.capacity}, n_locality {self.n_locality}, expected "
                f"1 or more; n_prefixes {self.n_prefixes} and prefix_length {self.prefix_length}, expected 0 or more."
            )

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This editor with its layer fixed."""
        return replace(self, layers=one_layer(lm, self.layers))

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The side memories with these facts."""
        (layer,) = one_layer(lm, self.layers)
        path = down_path(lm, layer)
        memory = earlier(after, SideMemory, path) or self._empty(lm, path)
        if memory.shards.shape[1] != self.shards:
            raise EditError(
                f"The earlier memory has {memory.shards.shape[1]} shards, this editor {self.shards}. Go on with as many."
            )
        memory = replace(memory, activation=_activation(lm) if self.activation == "code" else "")
        with unedited(lm):
            prefixes = write_prefixes(lm, (self.prefix_length,) * self.n_prefixes, seed=self.seed)
        known = list(after.facts) if after is not None else []
        told: list[dict[str, Any]] = []
        for fact in facts:  # nothing of a fact depends on those after it, as if each were edited by a call of its own
            which = memory.members[-1] if memory.members else 0
            which += self.retrieve and memory.members.count(which) >= self.capacity
            shard = memory.members.count(which) % self.shards
            if which == len(memory.shards):
                memory = replace(memory, shards=torch.cat([memory.shards, torch.zeros_like(memory.shards[:1])]))
            own = tuple(probe.prompt for probe in (*fact.locality, *fact.neighbors))[: self.n_locality]
            stay = own if self.locality == "given" and own else self._elsewhere(lm, fact, known)
            known.append(fact)
            delta, steps, loss = self._trained(lm, fact, layer, memory, which, shard, prefixes, stay)
            shards = memory.shards.clone()
            shards[which, shard] = delta.to(shards)
            memory = replace(
                memory, shards=shards, prompts=(*memory.prompts, fact.text), members=(*memory.members, which)
            )
            told.append({
                "fact": fact.id, "memory": which, "shard": shard, "steps": steps, "loss": loss, "locality_prompts": list(stay),
            })  # fmt: skip
        memory = self._merged(lm, memory, prefixes if self.eps_of == "contexts" else ())
        return Draft(
            sides=(memory,),
            told={"edited": told, "thresholds": [float(eps) for eps in memory.thresholds]},
        )

    def mask(self, shape: tuple[int, int], shard: int) -> Bool[Tensor, "d_in d_out"]:
        """The entries of a weight of this shape that a shard may change, the same in every call."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + shard)
        return torch.rand(shape, generator=generator) < self.rho

    def _empty(self, lm: LM, path: str) -> SideMemory:
        module = lm.model.get_submodule(path)
        weight = module.get_parameter("weight")
        shape = weight.T.shape if isinstance(module, nn.Linear) else weight.shape
        zero = torch.zeros(1, *shape, dtype=better(lm), device=weight.device)
        return SideMemory(
            module=path, merged=zero, shards=zero[:, None].repeat(1, self.shards, 1, 1), thresholds=zero[:, 0, 0],
            prompts=(), members=(), activation="",
        )  # fmt: skip

    def _elsewhere(self, lm: LM, fact: Fact, known: Sequence[Fact]) -> tuple[str, ...]:
        """Some prompts on other subjects: none that the fact is tested with, and none that has been edited already.

        For every fact there are others, so that what stays is no fixed list that a stream of edits learns by heart.
        """
        edited = {text for one in known for text in (one.text, *one.paraphrases)}
        found = sorted({one.text for one in other_facts(lm, [fact], self.pool)} - probed([fact]) - edited)
        if not found:
            raise FactError(
                "There is no prompt on another subject that is neither edited nor tested. Name a file of other facts: pool=."
            )
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + len(known)))
        return tuple(found[i] for i in order[: self.n_locality].tolist())

    def _trained(
        self,
        lm: LM,
        fact: Fact,
        layer: int,
        memory: SideMemory,
        which: int,
        shard: int,
        prefixes: Sequence[str],
        stay: Sequence[str],
    ) -> tuple[Float[Tensor, "d_in d_out"], int, float]:
        """A shard after the training on a fact (step 2), the number of steps, and the loss before the last."""
        answer, module = fact.target_new or "", lm.model.get_submodule(memory.module)
        contexts = in_contexts(fact, prefixes)
        tokens = lm.encode(contexts, targets=[answer] * len(contexts))
        answer_loss = AnswerLoss(lm, tokens, lm.target_ids(fact.text, answer), layer, memory.module)
        elsewhere = lm.encode(list(stay))
        x_e, x_i = read_input(lm, tokens, memory.module), read_input(lm, elsewhere, memory.module)
        delta = memory.shards[which, shard].to(x_e.device)
        mask = self.mask((delta.shape[0], delta.shape[1]), shard).to(delta)
        with torch.no_grad():
            y_e, y_i = module.forward(x_e), module.forward(x_i)
        loss, before = torch.inf, torch.inf
        for step in range(self.n_iter):
            tried = delta.clone().requires_grad_()

            def output(module: nn.Module, x: Tensor, y: Tensor, _: Tokens | None, tried: Tensor = tried) -> Tensor:
                return (y.to(tried) + x.to(tried) @ tried).to(y.dtype)

            with torch.enable_grad():
                nll = answer_loss(output).mean()
                d_e = distance(x_e.to(tried) @ tried, y_e, tokens.at(None), memory.activation)
                d_i = distance(x_i.to(tried) @ tried, y_i, elsewhere.at(None), memory.activation)
                margins = (d_i - self.alpha).relu().mean() + (self.beta - d_e).relu().mean()
                total = nll + margins + (self.gamma - (d_e[:, None] - d_i)).relu().mean()
                (gradient,) = torch.autograd.grad(total, [tried])
            before, loss = loss, float(total.detach())
            if loss <= ENOUGH and abs(before - loss) <= STILL:
                return delta, step, loss
            delta = delta - self.learning_rate * mask * gradient
            if self.norm_constraint is not None:
                delta = delta.clamp(-self.norm_constraint, self.norm_constraint)
        return delta, self.n_iter, loss

    def _merged(self, lm: LM, memory: SideMemory, prefixes: Sequence[str]) -> SideMemory:
        """The memories merged from their shards; a threshold is the smallest D of a memory's prompts, alone and after prefixes."""
        merged = [
            ties(shards, density=self.density) if self.merge == "ties" else shards.mean(0) for shards in memory.shards
        ]
        memory = replace(memory, merged=torch.stack(merged))
        module, thresholds = lm.model.get_submodule(memory.module), []
        for which in range(len(merged)):
            prompts = [prompt for prompt, member in zip(memory.prompts, memory.members, strict=True) if member == which]
            texts = [prefix + prompt for prompt in prompts for prefix in ("", *prefixes)]
            least = []
            for start in range(0, len(texts), ROWS_AT_ONCE):
                tokens = lm.encode(texts[start : start + ROWS_AT_ONCE])
                x = read_input(lm, tokens, memory.module)
                with torch.no_grad():
                    y, change = module.forward(x), memory.change(which, x)
                least.append(distance(change, y, tokens.at(None), memory.activation).min())
            thresholds.append(torch.stack(least).min() * (self.act_ratio if self.retrieve else 1))
        return replace(memory, thresholds=torch.stack(thresholds))


def _activation(lm: LM) -> str:
    """The name of the model's nonlinearity.

    Raises:
        ModelError: its config tells none.
    """
    config = lm.model.config.get_text_config()
    name = next((name for key in _ACTIVATIONS if isinstance(name := getattr(config, key, None), str)), None)
    if name not in ACT2FN:
        raise ModelError(
            f"The config of {lm.name} names no activation that transformers knows. Use activation='paper'."
        )
    return str(name)
