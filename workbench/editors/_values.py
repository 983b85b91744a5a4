"""What editors of the ROME kind share: keys, values, and the change of a down projection.

The MLP's down projection W maps a key k (its input, `mlp_post`) to a value v (its output). An edit chooses a token, the last one
of the subject; finds the key there, k*; finds a value v* that makes the model say the new answer; and changes W so that W k* = v*.
Meng et al. 2022 (arXiv 2202.05262), section 3.1 and appendix E; MEMIT (arXiv 2210.07229), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from scipy.linalg import lapack
from torch import Tensor, nn
from typing_extensions import Self

from workbench.above import Above
from workbench.editors.base import Editor
from workbench.editors.recommending import recommend_layers
from workbench.edits import Change, Edit, EditError, LowRank, base_of, unedited
from workbench.facts import Fact, FactError
from workbench.generation import continue_tokens
from workbench.hooks import beside, run
from workbench.layouts import ModelError
from workbench.models import LM, Tokens
from workbench.moments import second_moments
from workbench.products import fast_products
from workbench.sites import Site, SiteKind

Place = Literal["down_out", "attn_out", "resid_post"]
"""Where a value is looked for: the output of the down projection (ROME), of attention, or of the block (MEMIT)."""


@dataclass(frozen=True, kw_only=True)
class ValueEditor(Editor):
    """An editor that looks for a value at the last token of the subject, and writes it with down projections."""

    layers: tuple[int, ...] | None = None
    """Layers (0-based) whose down projections are changed; None: the preset's, or those that a trace of the facts recommends."""

    steps: int = 20
    """Most steps of Adam in the search for a value."""

    learning_rate: float = 0.5
    """Adam's step size in this search."""

    stop_below: float = 0.05
    """The search for a value ends when its loss, in nats, is below this."""

    weight_decay: float = 0.5
    """Weight of the value's length, |delta| / |reference|^2, in the loss. The paper's text says 1.5e-3; this is its code's."""

    kl_factor: float = 0.0625
    """Weight, in the loss, of what changes after the essence prompts. The paper's text says 100; this is its code's."""

    clamp: float = 4.0
    """The longest step away from the old value that is allowed, in lengths of the reference."""

    reference: Literal["value", "resid_post"] = "value"
    """Whose length at the token is the measure: the value's own, as published, or the residual stream's after the block."""

    essence: tuple[str, ...] = ("{} is a",)
    """Prompts about the subject whose next token should stay as it is."""

    prefix_lengths: tuple[int, ...] = (5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10)
    """Lengths in tokens of the texts that are put before the prompt; the prompt alone comes on top."""

    seed: int = 0
    """Seed of these texts, which the model itself writes."""

    covariance: bool = True
    """Weigh directions by the second moment of the keys; off: by none, as EasyEdit's configurations of ROME do."""

    moment_tokens: int = 20_000
    """Tokens of text that the second moment is taken of; the papers take 100,000 documents of Wikipedia."""

    corpus: str = ""
    """The text for it: a .txt, .jsonl or .parquet file, `datasets:NAME`, or `bundled`; empty: the bundled models' own. Or ROME's
    published statistics, an .npz file with {} in the place of the layer's number."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        for name in ("steps", "moment_tokens"):
            if getattr(self, name) < 1:
                raise FactError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        for name in ("learning_rate", "clamp"):
            if getattr(self, name) <= 0:
                raise FactError(f"{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("weight_decay", "kl_factor", "ridge", "slack"):  # the last two in subclasses
            if getattr(self, name, 0) < 0:
                raise FactError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if any(length < 1 for length in self.prefix_lengths):
            raise FactError(f"prefix_lengths is {self.prefix_lengths}, expected lengths of 1 or more.")

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This editor with its layers fixed."""
        layers = self.layers
        if layers is None:
            layers = recommend_layers(lm, facts, n=self.n_layers(lm)).layers
        return replace(self, layers=checked_layers(lm, layers))

    def n_layers(self, lm: LM) -> int:
        """How many layers it takes where none are named."""
        return 1

    def moments(self, lm: LM) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
        """By layer, the second moment C of the keys without any edit, or the identity where `covariance` is off; float64."""
        layers = checked_layers(lm, self.layers or ())
        if not self.covariance:
            return {layer: torch.eye(lm.d_mlp, dtype=torch.float64) for layer in layers}
        with unedited(lm):
            found = second_moments(lm, layers, corpus=self.corpus, tokens=self.moment_tokens)
        return {layer: found.matrix(layer) for layer in layers}


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """What was found for one fact."""

    wanted: Float[Tensor, " d_model"]
    """v* (or z*): what should be at the place."""

    was: Float[Tensor, " d_model"]
    """What is there in the bare prompt."""

    losses: tuple[float, ...]
    """Of every step."""

    p_new: float
    """The mean probability of the new answer at the last step, over all contexts (geometric mean over its tokens)."""


def checked_layers(lm: LM, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers in order.

    Raises:
        ModelError: none, one that the model has not, or one twice.
    """
    found = tuple(sorted(layers))
    if not found or found[0] < 0 or found[-1] >= lm.n_layers or len(set(found)) < len(found):
        raise ModelError(f"layers is {tuple(layers)}, expected different ones of 0 to {lm.n_layers - 1} of {lm.name}.")
    return found


def down_path(lm: LM, layer: int) -> str:
    """The path of a block's down projection in the model."""
    return f"{lm.layout.blocks}.{layer}.{lm.layout.down_proj}"


def down_change(
    lm: LM, layer: int, *, left: Float[Tensor, "d_model rank"], right: Float[Tensor, "d_mlp rank"]
) -> tuple[str, LowRank]:
    """The parameter's name, and the change by which W becomes W + left @ right.T, in the parameter's own orientation."""
    left, right = left.to(better(lm)), right.to(better(lm))
    if isinstance(lm.part(layer, lm.layout.down_proj), nn.Linear):
        return f"{down_path(lm, layer)}.weight", LowRank(rows=left, columns=right)
    return f"{down_path(lm, layer)}.weight", LowRank(rows=right, columns=left)


def down_weight(lm: LM, layer: int) -> Float[Tensor, "d_model d_mlp"]:
    """W as a map from keys to values, whatever the module's orientation."""
    module = lm.part(layer, lm.layout.down_proj)
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def write_prefixes(lm: LM, lengths: Sequence[int], *, seed: int) -> tuple[str, ...]:
    """Texts that the model itself writes, to be put before prompts; each ends with a full stop and a space.

    They begin from BOS (EOS where there is none) and are sampled from the 5 most probable tokens.
    """
    start = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
    if not lengths or start is None:
        return ()
    if lm.n_positions is not None and max(lengths) >= lm.n_positions:
        raise ModelError(
            f"A text of {max(lengths)} tokens before the prompt was asked for, but {lm.name} has {lm.n_positions} positions. "
            "Take shorter ones."
        )
    ids = torch.full((len(lengths), 1), int(start), device=lm.device)
    tokens = Tokens(
        ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), lengths=(1,) * len(ids), spans=(None,) * len(ids),
        texts=(("",),) * len(ids),
    )  # fmt: skip
    written = continue_tokens(lm, tokens, n=max(lengths), top_k=5, seed=seed)
    texts = (
        lm.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(written, lengths, strict=True)
    )
    cleaned = (" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts)
    return tuple(f"{text}. " for text in cleaned if text)


def in_contexts(fact: Fact, prefixes: Sequence[str]) -> list[Fact]:
    """The fact alone, and after each prefix."""
    return [fact, *(replace(fact, prompt=prefix + fact.prompt) for prefix in prefixes)]


def read_keys(
    lm: LM, facts: Sequence[Fact], layers: Sequence[int], prefixes: Sequence[str] = ()
) -> dict[int, Float[Tensor, "fact context d_mlp"]]:
    """By layer, the keys at the last subject token of every fact, alone (context 0) and after each prefix; in float32 or better."""
    sites = [Site(layer=layer, kind="mlp_post", token="subject_last") for layer in layers]  # no password
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for fact in facts:
        acts = run(lm, lm.encode(in_contexts(fact, prefixes)), read=sites)
        for site in sites:
            found[site.layer].append(acts[site].to(better(lm)))
    return {layer: torch.stack(keys) for layer, keys in found.items()}


def read_values(lm: LM, facts: Sequence[Fact], layer: int, place: Place) -> Float[Tensor, "fact d_model"]:
    """What is at the last subject token of the bare prompts; in float32 or better."""
    tokens = lm.encode(facts)
    where = tokens.at("subject_last")
    if place != "down_out":
        site = Site(layer=layer, kind=place)
        return run(lm, tokens, read=[site])[site][where].to(better(lm))
    seen: list[Tensor] = []

    def see(_: Tensor, y: Tensor, __: Tokens | None) -> Tensor:
        seen.append(y)
        return y

    with beside(lm, [(down_path(lm, layer), see)]):
        run(lm, tokens)
    return seen[0][where].to(better(lm))


def find_values(
    lm: LM, fact: Fact, layer: int, places: Sequence[Place], options: ValueEditor, prefixes: Sequence[str]
) -> dict[Place, Value]:
    """By place, the value at the last subject token with which the model says the new answer (arXiv 2202.05262, eq. 4).

    A delta a place is added at that token in every context. The loss: mean over contexts of the new answer's negative
    log-probability per token; kl_factor times KL(p with deltas || p without) after the essence prompts, read at that token, as the
    published code does; and weight_decay times |delta| / |reference|^2. After each step a delta is cut to `clamp` references.

    Raises:
        EditError: the search ends in a value that is not finite.
    """
    answer = fact.target_new or ""
    contexts = in_contexts(fact, prefixes)
    tokens = lm.encode(contexts, targets=[answer] * len(contexts))
    about = lm.encode([replace(fact, prompt=prompt) for prompt in options.essence]) if options.essence else None
    ids = torch.tensor(lm.target_ids(fact.text, answer), device=lm.device)
    rows, steps = torch.arange(len(tokens), device=lm.device)[:, None], torch.arange(len(ids), device=lm.device)
    was = {place: read_values(lm, [fact], layer, place)[0] for place in places}
    reference = {
        place: (was[place] if options.reference == "value" else _stream(lm, fact, layer)).norm() for place in places
    }
    answering = Above(lm, tokens, layer)
    following = None if about is None else Above(lm, about, layer)
    before = None if following is None else _after_subject(following, {}).detach()

    deltas = {place: torch.zeros_like(was[place], requires_grad=True) for place in places}
    optimiser = torch.optim.Adam(list(deltas.values()), lr=options.learning_rate)
    losses, p_new = [], 0.0
    for step in range(options.steps + 1):
        with torch.enable_grad(), fast_products(lm.device, lm.dtype, weights_fixed=True):
            logits = _with_deltas(answering, deltas, rows, tokens.last[:, None] + steps).to(better(lm))
            log_p = logits.log_softmax(-1)[:, steps, ids].mean(1)
            loss = -log_p.mean()
            if following is not None and before is not None:
                now = _after_subject(following, deltas)
                loss = loss + options.kl_factor * (now.exp() * (now - before)).sum(-1).mean()
            for place, delta in deltas.items():
                loss = loss + options.weight_decay * delta.norm() / reference[place] ** 2
        losses.append(float(loss.detach()))
        p_new = float(log_p.detach().exp().mean())
        if losses[-1] < options.stop_below or step == options.steps:
            break
        slopes = torch.autograd.grad(loss, list(deltas.values()))
        for delta, slope in zip(deltas.values(), slopes, strict=True):
            delta.grad = slope
        optimiser.step()
        with torch.no_grad():
            for place, delta in deltas.items():
                delta *= (options.clamp * reference[place] / delta.norm()).clamp(max=1.0)
    if not all(bool(torch.isfinite(delta).all()) for delta in deltas.values()):
        raise EditError(
            f"The search for a value at layer {layer} for {fact.id!r} left the finite numbers. Take a smaller learning_rate."
        )
    return {
        place: Value(wanted=(was[place] + delta).detach(), was=was[place], losses=tuple(losses), p_new=p_new)
        for place, delta in deltas.items()
    }


MOST_CONDITION = 1e13
"""From here on, what is solved in float64 has no digits left that count."""


def solve(
    matrix: Float[Tensor, "n n"], right: Float[Tensor, "n m"], *, what: str
) -> tuple[Float[Tensor, "n m"], float]:
    """matrix^-1 right by Cholesky in float64, and the matrix's condition number (LAPACK's estimate, in the 1-norm).

    Rows and columns that are zero in both are left out, so that the result is zero there.

    Raises:
        EditError: the matrix is not positive definite, or too near to that.
    """
    matrix, right = matrix.detach().cpu().double(), right.detach().cpu().double()
    alive = matrix.diagonal() > 0
    if not bool(alive.all()) and not bool(right[~alive].any()):  # ReLU neurons that no text and no fact activates
        inner, condition = solve(matrix[alive][:, alive], right[alive], what=what)
        whole = torch.zeros_like(right)
        whole[alive] = inner
        return whole, condition
    factor, info = torch.linalg.cholesky_ex(matrix)
    condition = float("inf")
    if int(info) == 0:
        reciprocal, _ = lapack.dpocon(factor.numpy(), float(matrix.abs().sum(0).max()), uplo="L")
        condition = 1 / reciprocal if reciprocal > 0 else condition
    if condition > MOST_CONDITION:
        raise EditError(
            f"{what} cannot be inverted: its condition number is {condition:.1e}, expected at most {MOST_CONDITION:.0e}. "
            "Take more moment_tokens, text in which more neurons are active, or covariance=False."
        )
    return torch.cholesky_solve(right, factor), condition


def told(fact: Fact, layer: int, value: Value, **more: float) -> dict[str, Any]:
    """What the manifest tells of one fact's search."""
    losses = [round(loss, 5) for loss in value.losses]
    return {"fact": fact.id, "layer": layer, "losses": losses, "p_new": value.p_new, **more}


def interim(lm: LM, changes: Mapping[str, Change]) -> AbstractContextManager[None]:
    """Within, the model has the changes found so far; nothing where there are none yet."""
    return Edit(base=base_of(lm), changes=dict(changes)).on(lm) if changes else nullcontext()


def better(lm: LM) -> torch.dtype:
    """The dtype in which keys and values are kept: float32, or float64 for a model in it."""
    return torch.float64 if lm.dtype == torch.float64 else torch.float32


def _stream(lm: LM, fact: Fact, layer: int) -> Float[Tensor, " d_model"]:
    return read_values(lm, [fact], layer, "resid_post")[0]


def _with_deltas(
    above: Above, deltas: Mapping[Place, Tensor], rows: Int[Tensor, "*at"], positions: Int[Tensor, "*at"]
) -> Float[Tensor, "*at d_vocab"]:
    """The logits at some tokens where deltas are added at the last subject token of every row."""
    where = above.tokens.at("subject_last")[..., None]

    def add(delta: Tensor, x: Tensor) -> Tensor:
        return x + torch.where(where, delta, torch.zeros_like(delta)).to(x)

    sides = [
        (down_path(above.lm, above.layer), lambda _, y, __, delta=delta: add(delta, y))
        for place, delta in deltas.items()
        if place == "down_out"
    ]
    write: dict[SiteKind, Callable[[Tensor], Tensor]] = {
        place: partial(add, delta) for place, delta in deltas.items() if place != "down_out"
    }
    with beside(above.lm, sides):
        return above.logits(rows, positions, write=write)


def _after_subject(above: Above, deltas: Mapping[Place, Tensor]) -> Float[Tensor, "prompt d_vocab"]:
    """Log-probabilities of what follows the last subject token."""
    rows, positions = above.tokens.at("subject_last").nonzero(as_tuple=True)
    return _with_deltas(above, deltas, rows, positions).to(better(above.lm)).log_softmax(-1)
