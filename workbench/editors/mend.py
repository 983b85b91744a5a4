"""A network that turns the gradient of an edit into a better one (MEND; Mitchell et al. 2021, arXiv 2110.11309).

An edit's gradient of a matrix is a sum over tokens, delta_i u_i^T: u is what enters the matrix, delta the gradient of the loss by
what leaves it. So an edit of n tokens has a change of rank n at most, and a small network can work on u and delta.

1. u and delta are normalised by running means and deviations of training, and put behind each other: z = [u, delta]. Tokens of
   which one is all zero take no part.
2. Two layers z + max(0, s (U V z + b) + o) (Eq. 3). Matrices of one shape share U, V and b; scale s and offset o are each one's
   own. U is 0 at the start, and so the network the identity.
3. The change is - alpha sum_i delta'_i u'_i^T, with a rate alpha of each matrix, learned too.
4. Training, on facts and answers drawn anew each time: Adam on c_edit L_edit + c_locality L_locality. L_edit is the mean of -log p
   of the new answer with the edit on, to the prompt and to a paraphrase; L_locality is KL(without || with) of the next token after
   prompts that the edit should leave alone: a neighbor, another relation of the subject, another fact.

Facts of a fourth of the subjects, chosen by their names, are kept out of training. A trained network is kept in the results folder
under the hash of weights, facts and settings, and taken from there; training that was stopped goes on.

Code != paper: the code adds what the paper subtracts, and leaves the sign to what is learned; we subtract. Paper and code train on
Wikipedia or zsRE for up to 100,000 steps at a learning rate of 1e-6, with one paraphrase for L_edit and text of other sources for
L_locality. Our steps and rates are for small models; the weights of the losses are the paper's.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from workbench import zoo
from workbench.data import read_facts
from workbench.editors._gradients import Lesson, is_transposed, learning, note, precise, shadow
from workbench.editors._values import checked_layers
from workbench.editors.base import Draft, Editor
from workbench.edits import Change, Edit, LowRank, base_of, unedited
from workbench.facts import Fact, FactError
from workbench.hooks import Beside, beside, run
from workbench.models import LM, ModelError, Tokens
from workbench.progress import track
from workbench.results import record
from workbench.store import results_folder

FORMAT = 1
"""Of the files in which networks are kept; part of their names."""

SAVE_EVERY = 50
"""Training steps after which what is learned so far is written."""


@dataclass(frozen=True, kw_only=True)
class Mend(Editor):
    """MEND (arXiv 2110.11309): a network makes a change of the gradient; a model's first edit trains it (minutes), then it is kept.

    The change is a product for each MLP matrix of the layers; its rank is at most the number of tokens that were read.
    Several facts get the sum of their changes. The manifest tells `trained`: the steps, the facts and the mean losses of the last
    steps; and `seen`: which edited facts have a subject that was in training (with other answers).

    Raises:
        ModelError: neither a bundled model nor `data` to train on.
    """

    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are edited, from 0; None: the last three."""

    data: str = ""
    """File of facts that the model knows, to train on; empty: the bundled model's own."""

    steps: int = 300
    """Steps of the network's training, which is done once for a model."""

    batch: int = 10
    """Edits, each by itself, of which a training step takes the mean."""

    learning_rate: float = 1e-3
    """Adam's step size for the network."""

    rates_learning_rate: float = 1e-4
    """Adam's step size for the rates of the matrices."""

    edit_rate: float = 1e-4
    """Step size of every matrix's change at the start; training goes on from there."""

    c_edit: float = 0.1
    """Weight of the new answer in the network's training."""

    c_locality: float = 1.0
    """Weight, there, of what should stay as it is."""

    rank: int = 1920
    """Rank of the network's matrices U V; at most a quarter of their width."""

    seed: int = 0
    """Seed of the network's first weights, and of what is drawn for training."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        for name, least in (("steps", 1), ("batch", 1), ("rank", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise FactError(f"{name} is {getattr(self, name)}, expected {least} or more.")
        for name in ("learning_rate", "rates_learning_rate", "edit_rate"):
            if getattr(self, name) <= 0:
                raise FactError(f"{name} is {getattr(self, name)}, expected more than 0.")

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """With the layers named."""
        layers = tuple(range(max(0, lm.n_layers - 3), lm.n_layers)) if self.layers is None else self.layers
        return replace(self, layers=checked_layers(lm, layers))

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """What the trained network makes of the facts' gradients."""
        matrices = mlp_matrices(lm, self.layers or ())
        known = self._facts(lm)
        networks, told = self._trained(lm, matrices, known)
        lesson = Lesson.of(lm, [fact.text for fact in facts], [fact.target_new or "" for fact in facts])
        changes: dict[str, Change] = {}
        with torch.no_grad():
            for path, (u, delta, there) in factors(lm, lesson, list(matrices)).items():
                u, delta = (x[there] for x in networks(path, u, delta, there))
                rows, columns = (u.T, delta.T) if is_transposed(matrices[path]) else (delta.T, u.T)
                changes[f"{path}.weight"] = LowRank(rows=rows.contiguous(), columns=columns.contiguous())
        subjects = {fact.subject for fact in known if not kept_out(fact)}
        return Draft(
            changes=changes, told={"trained": told, "seen": [fact.id for fact in facts if fact.subject in subjects]}
        )

    def _facts(self, lm: LM) -> list[Fact]:
        """What there is to train on."""
        if self.data:
            facts = read_facts(self.data)
        elif Path(lm.name).name in zoo.NAMES:
            facts = zoo.load_facts(Path(lm.name).name)
        else:
            raise ModelError(
                f"{lm.name} is no bundled model, so there are no facts to train MEND's network on. "
                "Name a file of facts that it knows, as data."
            )
        if sum(not kept_out(fact) for fact in facts) < 2:
            raise FactError(f"There are {len(facts)} facts to train on, too few. Give a larger file as data.")
        return facts

    def _trained(
        self, lm: LM, matrices: Mapping[str, nn.Module], known: Sequence[Fact]
    ) -> tuple[Networks, dict[str, Any]]:
        """The network of these settings, trained now or before, and what is told of it."""
        asked = {
            "format": FORMAT,
            "base": base_of(lm),
            "facts": [record(fact) for fact in known],
            **{one.name: getattr(self, one.name) for one in fields(self) if one.name != "data"},
        }
        key = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = results_folder() / "mend" / key / "network.safetensors"
        taught = [fact for fact in known if not kept_out(fact)]
        networks = Networks(matrices, rank=self.rank, rate=self.edit_rate, seed=self.seed).to(lm.device)
        rest = [parameter for parameter in networks.parameters() if parameter is not networks.rates]
        optimizer = torch.optim.Adam(rest, lr=self.learning_rate)
        optimizer.add_param_group({"params": [networks.rates], "lr": self.rates_learning_rate})
        losses = _resume(path, networks, optimizer)
        if len(losses) < self.steps:
            with unedited(lm):
                twin = shadow(lm)
            for step in track(range(len(losses), self.steps), "training steps", self.steps - len(losses)):
                draws = random.Random(f"{self.seed} {step}")
                edit, locality = self._loss(twin, networks, [draw(draws, taught) for _ in range(self.batch)])
                total = self.c_edit * edit + self.c_locality * locality
                note([], total)
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(networks.parameters(), 100.0)
                optimizer.step()
                losses.append([float(edit.detach()), float(locality.detach())])
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                    _save(path, networks, optimizer, losses)
        last = torch.tensor(losses[-SAVE_EVERY:]).mean(0).tolist()
        told = {"steps": self.steps, "facts": len(taught), "edit_loss": last[0], "locality_loss": last[1]}
        return networks.eval(), told

    def _loss(self, twin: LM, networks: Networks, drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """The two losses of step 4, means over edits that do not see each other: each row of the batch has its own weights."""
        lesson = Lesson.of(twin, [one.prompt for one in drawn], [one.answer for one in drawn])
        found = factors(twin, lesson, networks.paths)
        with learning():
            changed = {path: networks(path, *found[path]) for path in networks.paths}
            probes = [(one.prompt, one.answer) for one in drawn] + [(one.paraphrase, one.answer) for one in drawn]
            asked = Lesson.of(twin, [prompt for prompt, _ in probes], [answer for _, answer in probes])
            with beside(twin, _rowwise(changed, [*range(len(drawn))] * 2)):
                edit = asked.loss(twin).mean()
            rows = [i for i, one in enumerate(drawn) for _ in one.alone]
            alone = twin.encode([prompt for one in drawn for prompt in one.alone])
            before = precise(run(twin, alone).last_logits).log_softmax(-1)
            with beside(twin, _rowwise(changed, rows)):
                after = precise(run(twin, alone, grad=True).last_logits).log_softmax(-1)
            locality = (before.exp() * (before - after)).sum(-1).mean()
        return edit, locality


def mlp_matrices(lm: LM, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The matrices of these blocks that are not the attention's, by their path in the model."""
    return {
        f"{lm.layout.blocks}.{layer}.{path}": module
        for layer in layers
        for path, module in lm.blocks[layer].named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not path.startswith(f"{lm.layout.attn}.")
    }


Factors = tuple[Float[Tensor, "row pos d_in"], Float[Tensor, "row pos d_out"], Bool[Tensor, "row pos"]]
"""What entered a matrix, the gradient of the loss by what left it, and at which tokens neither is all zero. In float32."""


def factors(lm: LM, lesson: Lesson, paths: Sequence[str]) -> dict[str, Factors]:
    """The gradient of the sum of a lesson's losses, for each matrix as the factors of its tokens."""
    met: dict[str, tuple[Tensor, Tensor]] = {}

    def meet(path: str, x: Tensor, y: Tensor, tokens: Tokens | None) -> Tensor:
        met[path] = x.detach(), torch.zeros_like(y, requires_grad=True)
        return y + met[path][1]

    with learning(), beside(lm, [(path, partial(meet, path)) for path in paths]):
        loss = lesson.loss(lm).sum()
        deltas = torch.autograd.grad(loss, [met[path][1] for path in paths])
    shape = lesson.tokens.ids.shape
    found = {}
    for path, delta in zip(paths, deltas, strict=True):
        u, delta = (x.reshape(*shape, -1).float() for x in (met[path][0], delta))
        found[path] = u, delta, lesson.tokens.mask & (u != 0).any(-1) & (delta != 0).any(-1)
    return found


class Networks(nn.Module):
    """The networks of all shapes of matrices; called with a matrix's path and its factors, gives those of its change."""

    def __init__(self, matrices: Mapping[str, nn.Module], *, rank: int, rate: float, seed: int) -> None:
        super().__init__()
        self.paths = list(matrices)
        self.rates = nn.Parameter(torch.full((len(matrices),), rate))
        self.network_of: dict[str, str] = {}
        self.place: dict[str, int] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for path, module in matrices.items():
            shape = tuple(module.get_parameter("weight").shape)
            d_in, d_out = shape if is_transposed(module) else reversed(shape)
            name = f"{d_in} to {d_out}"
            sizes[name] = d_in, d_out
            self.place[path] = list(self.network_of.values()).count(name)
            self.network_of[path] = name
        shared = list(self.network_of.values())
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict(
            {
                name: _Network(*size, rank=rank, n=shared.count(name), generator=generator)
                for name, size in sizes.items()
            }
        )

    def forward(
        self, path: str, u: Tensor, delta: Tensor, there: Tensor
    ) -> tuple[Float[Tensor, "row pos d_in"], Float[Tensor, "row pos d_out"]]:
        """Factors of the change, zero at tokens that take no part; the rate and the sign are in the second."""
        u, delta = self.networks[self.network_of[path]](u, delta, there, self.place[path])
        return u, -self.rates[self.paths.index(path)] * delta


class _Network(nn.Module):
    """Steps 1 and 2, for matrices of one shape."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, d_in: int, d_out: int, *, rank: int, n: int, generator: torch.Generator) -> None:
        super().__init__()
        width = d_in + d_out
        rank = max(1, min(rank, width // 4))
        self.d_in = d_in
        self.u = nn.Parameter(torch.zeros(2, width, rank))
        self.v = nn.Parameter(torch.randn(2, rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(2, width))
        self.scale = nn.Parameter(torch.ones(n, 2, width))
        self.offset = nn.Parameter(torch.zeros(n, 2, width))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    def forward(self, u: Tensor, delta: Tensor, there: Tensor, place: int) -> tuple[Tensor, Tensor]:
        z = torch.cat([u, delta], -1)
        if self.training:
            self._meet(z[there])
        z = (z - self.mean) / ((self.squares / (self.count - 1).clamp(min=1)).sqrt() + 1e-7)
        for layer in range(2):
            inner = einsum(z, self.v[layer], "row pos width, rank width -> row pos rank")
            inner = einsum(inner, self.u[layer], "row pos rank, width rank -> row pos width") + self.bias[layer]
            z = z + (self.scale[place, layer] * inner + self.offset[place, layer]).clamp(
                min=0
            )  # relu has no slope at 0
        z = z * there[..., None]
        return z[..., : self.d_in], z[..., self.d_in :]

    @torch.no_grad()
    def _meet(self, z: Float[Tensor, "token width"]) -> None:
        """Running mean and sum of squared differences from it, of all tokens so far (Chan, Golub & LeVeque 1979)."""
        if not len(z):
            return
        mean, n = z.mean(0), self.count + len(z)
        self.squares += (z - mean).square().sum(0) + (mean - self.mean).square() * self.count * len(z) / n
        self.mean += (mean - self.mean) * len(z) / n
        self.count.copy_(n)


def _rowwise(changed: Mapping[str, tuple[Tensor, Tensor]], edits: Sequence[int]) -> list[tuple[str, Beside]]:
    """What stands beside the matrices so that each row of a batch runs with the change of its own edit."""

    def change(u: Tensor, delta: Tensor, x: Tensor, y: Tensor, tokens: Tokens | None) -> Tensor:
        each = x.reshape(len(edits), -1, x.shape[-1]).float()
        along = einsum(each, u[list(edits)], "row pos d_in, row token d_in -> row pos token")
        added = einsum(along, delta[list(edits)], "row pos token, row token d_out -> row pos d_out")
        return y + added.reshape(y.shape).to(y)

    return [(path, partial(change, u, delta)) for path, (u, delta) in changed.items()]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One edit to train on."""

    prompt: str
    """The fact's own prompt."""

    answer: str
    """An answer of the same relation that is neither the true one nor the fact's `target_new`."""

    paraphrase: str
    """The same question in other words; the prompt itself where there are none."""

    alone: tuple[str, ...]
    """Prompts whose next token should stay what it is."""


def draw(draws: random.Random, facts: Sequence[Fact]) -> Drawn:
    """A fact, an answer and prompts to train on."""
    fact = draws.choice(facts)
    taken = {fact.target_true, fact.target_new or ""}
    answers = sorted({other.target_true for other in facts if other.relation == fact.relation} - taken)
    answers = answers or sorted({other.target_true for other in facts} - taken) or [fact.target_new or fact.target_true]
    groups = [[probe.prompt for probe in group] for group in (fact.neighbors, fact.locality) if group]
    others = [other.text for other in facts if other.subject != fact.subject] or [facts[0].text]
    return Drawn(
        prompt=fact.text,
        answer=draws.choice(answers),
        paraphrase=draws.choice(fact.paraphrases or (fact.text,)),
        alone=tuple(draws.choice(group) for group in [*groups, others]),
    )


def kept_out(fact: Fact) -> bool:
    """Whether a fact's subject is one of the fourth that is never trained on."""
    return zlib.crc32(fact.subject.encode()) % 4 == 0


# --- what is kept ---


def _save(path: Path, networks: Networks, optimizer: torch.optim.Optimizer, losses: Sequence[Sequence[float]]) -> None:
    """Writes what is learned so far, whole or not at all."""
    tensors = {f"network/{name}": tensor for name, tensor in networks.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():  # with it, training goes on as if it had not stopped
        tensors |= {f"adam/{i}/{name}": value for name, value in state.items()}
    tensors["losses"] = torch.tensor(losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        new = Path(temporary) / path.name
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
        new.replace(path)


def _resume(path: Path, networks: Networks, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Loads what was learned before; the losses of the steps so far."""
    if not path.is_file():
        return []
    tensors = load_file(path)
    networks.load_state_dict({k.removeprefix("network/"): v for k, v in tensors.items() if k.startswith("network/")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam/"):
            _, i, what = name.split("/")
            state.setdefault(int(i), {})[what] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    losses: list[list[float]] = tensors["losses"].tolist()
    return losses
