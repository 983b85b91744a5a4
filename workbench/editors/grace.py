"""GRACE: a codebook beside one module replaces its output near the prompts that were edited. Hartvigsen et al. 2023
(arXiv 2211.11031), algorithm 1.

1. A prompt's query is the module's input at its last token.
2. An entry has a key, a value, a radius eps and a label, the new answer. With d the distance from the query to the nearest key:
   d > eps_new + eps: a new entry; else, with another label, a new entry of radius d / 2 and the old one shrinks to d / 2 - 1e-5;
   else, outside of its radius, the entry grows to d.
3. The entry's value is trained on the answer's negative log-likelihood by Adam, with the model frozen.
4. From then on, a prompt whose query is within the radius of the nearest key gets that entry's value as output.

Departures. Labels are compared token by token; the published code compares their means, which collide. A query that is an entry's
key and brings another answer takes the entry over; as published, the old entry would get a negative radius and shadow the new one,
whose radius is 0. The module is the down projection, as EasyEdit has it for LLaMA; the published GPT2-XL runs take the up
projection. The output is replaced at the last token, as EasyEdit does; the published code's default is `replace_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Self

from workbench.editors._side_training import AnswerLoss, earlier, one_layer, read_input
from workbench.editors._values import better
from workbench.editors.base import Draft, Editor
from workbench.edits import Edit, Memory
from workbench.facts import Fact, FactError
from workbench.models import LM, Tokens

Replacement = Literal["replace_last", "replace_prompt", "replace_all"]
"""At which tokens a value takes the output's place: the prompt's last one, those before it, or all."""

SAME = 1e-3
"""A query nearer to a key than this, in units of `eps`, is that key; rounding differs between batches."""

GAP = 1e-5
"""By how much the older of two entries that are split keeps away from the middle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook(Memory):
    """Entries beside a module, in the order in which they were made."""

    keys: Float[Tensor, "entry d_in"]
    """The module's input at the last token of the prompt."""

    values: Float[Tensor, "entry d_out"]
    """What the module gives in its place."""

    radii: Float[Tensor, " entry"]
    """How far from its key an entry reaches; Euclidean, in units of the input."""

    labels: Int[Tensor, "entry token"]
    """The tokens of the answer, filled up with -1."""

    replacement: str
    """One of `Replacement`."""

    def nearest(self, queries: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
        """The distance to the nearest key, and its entry."""
        keys = self.keys.to(queries.device)
        found = torch.cdist(queries.to(keys), keys, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        return found.values, found.indices

    def label(self, entry: int) -> list[int]:
        """An entry's answer, in tokens."""
        return [token for token in self.labels[entry].tolist() if token >= 0]

    def __call__(
        self,
        module: nn.Module,
        x: Float[Tensor, "row pos d_in"],
        y: Float[Tensor, "row pos d_out"],
        tokens: Tokens | None,
    ) -> Float[Tensor, "row pos d_out"]:
        """Rows outside of every radius keep their output bit for bit. Where the prompts are not known, the last token is asked."""
        position = torch.arange(x.shape[1], device=x.device)
        last = (
            torch.full_like(position[:1].expand(len(x)), x.shape[1] - 1) if tokens is None else tokens.last.to(x.device)
        )
        distance, entry = self.nearest(x[torch.arange(len(x), device=x.device), last].detach())
        hit = distance <= self.radii.to(distance)[entry]
        if not bool(hit.any()):
            return y
        at = {
            "replace_last": position == last[:, None],
            "replace_prompt": position < last[:, None],
            "replace_all": (position >= 0).expand(len(x), -1),
        }[self.replacement]
        return torch.where((at & hit[:, None])[..., None], self.values.to(y)[entry][:, None], y)


@dataclass(frozen=True, kw_only=True)
class Grace(Editor):
    """GRACE (arXiv 2211.11031): a codebook beside one module replaces its output near the edited prompts; no weight changes.

    Facts of a batch are edited one after the other; `after` continues its codebook.
    """

    beside_weights = True
    one_by_one = True

    layers: tuple[int, ...] | None = None
    """The layer (0-based, one) of the codebook; None: the preset's, or that at three quarters of the depth."""

    module: Literal["down_proj", "o_proj"] = "down_proj"
    """Which module it stands beside: the MLP's down projection, or attention's output projection."""

    eps: float = 1.0
    """Radius of a new entry, in units of the module's input; what is right depends on the model."""

    expand: Literal["coverage", "moving_average"] = "coverage"
    """How an entry comes to hold a further query of its label: its radius grows, or its key moves halfway there too."""

    replacement: Replacement = "replace_last"
    """Which tokens' output is replaced: the prompt's last, those before it, or all."""

    n_iter: int = 100
    """Steps of Adam in the training of an entry's value."""

    learning_rate: float = 1.0
    """Adam's step size there."""

    init: Literal["cold", "warm"] = "cold"
    """What a value starts from: uniform numbers of 0 to 1, or the module's own output."""

    seed: int = 0
    """Seed of these numbers."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        if not (self.eps > 0 and self.learning_rate > 0 and self.n_iter >= 1):
            raise FactError(
                f"eps is {self.eps}, learning_rate {self.learning_rate} and n_iter {self.n_iter}, expected numbers above 0."
            )

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This editor with its layer fixed."""
        return replace(self, layers=one_layer(lm, self.layers))

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The codebook with the entries of these facts."""
        (layer,) = one_layer(lm, self.layers)
        path = f"{lm.layout.blocks}.{layer}.{getattr(lm.layout, self.module)}"
        module = lm.model.get_submodule(path)
        book = earlier(after, Codebook, path)
        told: list[dict[str, Any]] = []
        for fact in facts:
            tokens = lm.encode([fact])
            query = read_input(lm, tokens, path)[0, tokens.last[0]]
            with torch.no_grad():
                own = module.forward(query).to(better(lm))
            generator = torch.Generator().manual_seed(self.seed)  # as if each fact were edited by a call of its own
            start = own if self.init == "warm" else torch.rand(own.shape, generator=generator).to(own)
            ids = lm.target_ids(fact.text, fact.target_new or "")
            empty = Codebook(
                module=path, keys=query[:0].reshape(0, len(query)).to(own), values=own.new_zeros(0, len(own)),
                radii=own.new_zeros(0), labels=torch.zeros(0, 0, dtype=torch.long), replacement=self.replacement,
            )  # fmt: skip
            book = replace(book or empty, replacement=self.replacement)
            book, entry, how = self.placed(book, query.to(own), ids, start)
            book, loss = self._trained(lm, fact, book, entry, layer)
            told.append({"fact": fact.id, "entry": entry, "how": how, "radius": float(book.radii[entry]), "loss": loss})
        assert book is not None  # there is a fact
        return Draft(sides=(book,), told={"edited": told, "entries": len(book.keys)})

    def placed(
        self, book: Codebook, query: Float[Tensor, " d_in"], label: Sequence[int], start: Float[Tensor, " d_out"]
    ) -> tuple[Codebook, int, str]:
        """The codebook with an entry for a query (step 2), the entry's number, and what was done.

        Args:
            book: the codebook so far; may be empty.
            query: where the answer is wanted.
            label: the answer's tokens.
            start: the value of a new entry.
        """
        if not len(book.keys):
            return _with_entry(book, query, label, start, self.eps), 0, "new"
        distances, entries = book.nearest(query[None])
        d, j = float(distances[0]), int(entries[0])
        radii, keys = book.radii.clone(), book.keys.clone()
        if d > self.eps + float(radii[j]):
            return _with_entry(book, query, label, start, self.eps), len(keys), "new"
        if book.label(j) != list(label):
            if d > SAME * self.eps:
                radii[j] = d / 2 - GAP
                return _with_entry(replace(book, radii=radii), query, label, start, d / 2), len(keys), "split"
            labels, values = [book.label(entry) for entry in range(len(keys))], book.values.clone()
            labels[j], values[j] = list(label), start.to(values)
            return replace(book, labels=_padded(labels), values=values), j, "taken over"
        if d <= float(radii[j]):
            return book, j, "inside"
        radii[j] = d
        if self.expand == "moving_average":
            keys[j] = (keys[j] + query.to(keys)) / 2
        return replace(book, radii=radii, keys=keys), j, "expanded"

    def _trained(self, lm: LM, fact: Fact, book: Codebook, entry: int, layer: int) -> tuple[Codebook, float]:
        """The codebook with an entry's value trained (step 3), and the loss after the last step."""
        answer = fact.target_new or ""
        nll = AnswerLoss(lm, lm.encode([fact], targets=[answer]), lm.target_ids(fact.text, answer), layer, book.module)
        values = book.values.to(lm.device)
        value = values[entry].clone().requires_grad_()
        optimiser = torch.optim.Adam([value], lr=self.learning_rate)
        index = torch.tensor([entry], device=lm.device)
        for step in range(self.n_iter + 1):
            with torch.enable_grad():
                tried = replace(book, values=values.index_copy(0, index, value[None]))
                loss = nll(tried).mean()
            if step < self.n_iter:
                (value.grad,) = torch.autograd.grad(loss, [value])
                optimiser.step()
        return replace(book, values=values.index_copy(0, index, value.detach()[None])), float(loss.detach())


def _with_entry(
    book: Codebook, key: Float[Tensor, " d_in"], label: Sequence[int], value: Float[Tensor, " d_out"], radius: float
) -> Codebook:
    return replace(
        book,
        keys=torch.cat([book.keys.to(key), key[None]]),
        values=torch.cat([book.values.to(value), value[None]]),
        radii=torch.cat([book.radii.to(key), key.new_tensor([radius])]),
        labels=_padded([*(book.label(entry) for entry in range(len(book.keys))), list(label)]),
    )


def _padded(labels: Sequence[Sequence[int]]) -> Int[Tensor, "entry token"]:
    width = max(map(len, labels))
    return torch.tensor([[*label, *[-1] * (width - len(label))] for label in labels])
